// RWKV-7's WKV for heads of 64: chunks of 16 tokens on tensor cores, one block of four warps walks along a row.
//
// Per chunk with start state S [value, key] (docs/maths.md). a', r', b', k' carry decays relative to the middle of the
// chunk, s = S diag(e^mid), g = G diag(e^(end - mid)) for the gradient G of the end state:
//
//     T = (I - tril₋(a' b'ᵀ))⁻¹      u = T (a' sᵀ + tril₋(a' k'ᵀ) v)      y = r' sᵀ + tril(r' b'ᵀ) u + tril(r' k'ᵀ) v
//     end state = (s + uᵀ b' + vᵀ k') diag(e^(end - mid))
//     z = Tᵀ (tril(r' b'ᵀ)ᵀ gy + b' gᵀ)      gradient of the start state = (g + zᵀ a' + gyᵀ r') diag(e^mid)
//
// Warp i owns rows 16 i … of the state, in registers; operands are float16, as exact as tf32, in units of powers of two
// that each chunk chooses: x = x.unit · x̂. A chunk of 16 keeps decays within e^±4.9, because log w ≥ -0.6066.
#include "tiles.cuh"

constexpr int N = 64, L = 16, WARPS = 4;
constexpr int RAW = L * N;             // elements of an input's chunk
constexpr int ROW = N + 8, TILE = L * ROW;     // halves; a padded row keeps ldmatrix free of bank conflicts
constexpr int SIDE = L + 8, PAIRS = L * SIDE;  // [L × L]
constexpr float LOG2E = 1.4426950408889634f;

enum { R, W, K, V, A, B, GY };

/// The chunk's place in tensors [batch, T, H, N].
struct Place {
  unsigned long long base;  // of the row and head
  int stride, T, head;
  const byte* resets;       // of the row
};

DEVICE Place place_of(int head, int T, int H, const byte* resets) {
  const unsigned long long row = head / H;
  return {row * T * H * N + (head % H) * N, H * N, T, head, resets ? resets + row * T : nullptr};
}

/// Start copying a chunk of one input; each thread takes 16 bytes.
DEVICE void fetch(half_bits* raw, const half_bits* x, const Place& at, int chunk) {
  const int t = chunk * L + thread() / 8, n = thread() % 8 * 8;
  copy_async(raw + thread() * 8, x + at.base + (unsigned long long)(t < at.T ? t : 0) * at.stride + n, t < at.T);
}

/// This thread's largest magnitude of the piece it fetched, over the warp, for the unit.
DEVICE void note_top(word* tops, const half_bits* raw) {
  const word* x = (const word*)(raw + thread() * 8);
  const word top = largest_of_warp(largest_magnitude(x));
  if (lane() == 0) tops[warp()] = top;
}
DEVICE word largest(const word* tops) {
  const word a = tops[0] > tops[1] ? tops[0] : tops[1], b = tops[2] > tops[3] ? tops[2] : tops[3];
  return a > b ? a : b;
}
DEVICE Unit unit_of_input(const word* tops) { return unit_of(exponent_bits((half_bits)largest(tops))); }

/// Which tokens begin a document, a bit each; lanes 0–15 hold a token's flag.
DEVICE bool reset_flag(const Place& at, int chunk) {
  const int t = chunk * L + lane();
  return at.resets && lane() < L && chunk >= 0 && t < at.T && at.resets[t];
}
DEVICE bool is_same_document(word resets, int early, int late) { return !(resets >> (early + 1) << (early + 1) & ((2u << late) - 1)); }
DEVICE bool opens(word resets, int t) { return !(resets & ((2u << t) - 1)); }  // still sees the start state
DEVICE bool closes(word resets, int t) { return !(resets >> t >> 1); }         // the end state still sees it

/// Decays around the middle of the chunk for this lane's two columns and this warp's four tokens.
struct Decays {
  Pair mid, tail;  // log2 of the decay over each half
  Pair before;     // exponent before this warp's first token, relative to the middle
};
DEVICE Decays decays_of(const half_bits* w) {
  Pair quarter[4];
  for (int i = 0; i < 4; ++i) {
    quarter[i] = {0, 0};
    for (int t = 4 * i; t < 4 * i + 4; ++t) quarter[i] = quarter[i] + read(((const word*)w)[t * 32 + lane()]);
    quarter[i] = quarter[i] * LOG2E;
  }
  const int i = warp();
  const Pair none = {0, 0};
  const Pair before = i == 0 ? none - quarter[0] - quarter[1] : i == 1 ? none - quarter[1] : i == 2 ? none : quarter[2];
  return {quarter[0] + quarter[1], quarter[2] + quarter[3], before};
}

DEVICE word* at_pair(half_bits* tile, int t) { return (word*)(tile + t * ROW) + lane(); }
DEVICE Pair raw_pair(const half_bits* raw, int x, int t) { return read(((const word*)(raw + x * RAW))[t * 32 + lane()]); }

/// tril(x yᵀ) as float16, or strictly lower; rows late, columns early.
DEVICE void scores(Square& c, const half_bits* x, const half_bits* y) {
  for (int i = 0; i < 4; ++i) {
    word left[4], right[4];
    load_left(left, x + 16 * i, ROW);
    load_right_transposed(right, y + 16 * i, ROW);
    multiply(c, left, right);
  }
}
DEVICE void mask_lower(Square& c, bool strict, word resets) {
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) {
      const int late = lane() / 4 + i / 2 * 8, early = n * 8 + lane() % 4 * 2 + i % 2;
      const bool keep = early + strict <= late && (!resets || is_same_document(resets, early, late));
      c[n][i] = keep ? c[n][i] : 0;
    }
}
DEVICE void mask_upper(Square& c, bool strict, word resets) {  // of the transposed: rows early, columns late
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) {
      const int early = lane() / 4 + i / 2 * 8, late = n * 8 + lane() % 4 * 2 + i % 2;
      const bool keep = early + strict <= late && (!resets || is_same_document(resets, early, late));
      c[n][i] = keep ? c[n][i] : 0;
    }
}
DEVICE void store_pairs(half_bits* to, const Square& c) {
  for (int n = 0; n < 2; ++n) {
    word* row = (word*)(to + lane() / 4 * SIDE + n * 8) + lane() % 4;
    row[0] = pack(c[n][0], c[n][1]);
    row[8 * SIDE / 2] = pack(c[n][2], c[n][3]);
  }
}

/// The four matrices of a chunk, one a warp: T (through `square`, float32 [L, L]), ak, rb, rk as they stand in `pairs`.
DEVICE void make_pairs(half_bits* pairs, float* square, const half_bits* a, const half_bits* r, const half_bits* b,
                       const half_bits* k, float ab_unit, word resets) {
  Square c = {};
  scores(c, warp() < 2 ? a : r, warp() & 1 ? k : b);
  mask_lower(c, warp() < 2, resets);
  if (warp() != 0) return store_pairs(pairs + warp() * PAIRS, c);
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i)
      square[(lane() / 4 + i / 2 * 8) * L + n * 8 + lane() % 4 * 2 + i % 2] = c[n][i] * ab_unit;
  warp_barrier();
  float x[L];  // column `lane` of the inverse, by substitution
  const int column = lane() & (L - 1);
#pragma unroll
  for (int i = 0; i < L; ++i) {
    x[i] = i == column ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < i; ++j) x[i] += square[i * L + j] * x[j];
  }
  if (lane() < L)
    for (int i = 0; i < L; ++i) pairs[i * SIDE + column] = float_to_half(x[i]);
}

/// State rows as operands: c [16 × 64] packed, s[j] = columns 8 j … of rows g and g + 8.
typedef word State[8][2];
DEVICE void left_of(word (&x)[4], const State& s, int i) { x[0] = s[2 * i][0], x[1] = s[2 * i][1], x[2] = s[2 * i + 1][0], x[3] = s[2 * i + 1][1]; }

/// [16 value rows × L] += s xᵀ
DEVICE void state_times(Square& c, const State& s, const half_bits* x) {
  for (int i = 0; i < 4; ++i) {
    word left[4], right[4];
    left_of(left, s, i);
    load_right_transposed(right, x + 16 * i, ROW);
    multiply(c, left, right);
  }
}
/// [L × 16 value rows] += x sᵀ
DEVICE void times_state(Square& c, const half_bits* x, const State& s) {
  for (int i = 0; i < 4; ++i) {
    word left[4], right[4];
    load_left(left, x + 16 * i, ROW);
    left_of(right, s, i);
    multiply_by_left(c, left, right);
  }
}
/// c [16 × 64] += left x, x a tile [L × 64]
DEVICE void accumulate(float (&c)[8][4], const word (&left)[4], const half_bits* x) {
  for (int i = 0; i < 4; ++i) {
    word right[4];
    load_right(right, x + 16 * i, ROW);
    multiply(c[2 * i], left, right[0], right[1]);
    multiply(c[2 * i + 1], left, right[2], right[3]);
  }
}
/// Zero the tokens that `keeps` rejects, in a left operand whose columns are tokens.
template <typename Keeps>
DEVICE void mask_tokens(word (&x)[4], word resets, Keeps keeps) {
  for (int i = 0; i < 4; ++i) {
    const int t = i / 2 * 8 + lane() % 4 * 2;
    x[i] &= (keeps(resets, t) ? 0xffffu : 0) | (keeps(resets, t + 1) ? 0xffff0000u : 0);
  }
}
DEVICE float largest_of_state(const float (&c)[8][4]) {
  float top = 0;
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) top = largest(top, c[j][i] < 0 ? -c[j][i] : c[j][i]);
  return top;
}
DEVICE Pair columns(const float* x, int j) { return {x[j * 8 + lane() % 4 * 2], x[j * 8 + lane() % 4 * 2 + 1]}; }
DEVICE void read_state(float (&c)[8][4], const float* from) {  // [N, N]
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) c[j][i] = from[(warp() * 16 + lane() / 4 + i / 2 * 8) * N + j * 8 + lane() % 4 * 2 + i % 2];
}
DEVICE void write_state(const float (&c)[8][4], float* to) {
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 2; ++i) {
      Pair* row = (Pair*)(to + (warp() * 16 + lane() / 4 + i * 8) * N + j * 8) + lane() % 4;
      *row = {c[j][2 * i], c[j][2 * i + 1]};
    }
}
DEVICE void write_tokens(half_bits* to, const Place& at, int chunk, const Square& c) {  // [L × 16 value columns]
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 2; ++i) {
      const int t = chunk * L + lane() / 4 + i * 8;
      word* row = (word*)(to + at.base + (unsigned long long)t * at.stride + warp() * 16 + n * 8) + lane() % 4;
      if (t < at.T) *row = written({c[n][2 * i], c[n][2 * i + 1]});
    }
}

struct Forward {
  half_bits raw[6 * RAW];
  half_bits a[TILE], r[TILE], b[TILE], k[TILE], v[TILE];
  half_bits pairs[4 * PAIRS];
  float square[L * L], mid[N], tail[N];
  word tops[7][WARPS];  // of the inputs; of the state
};

/// One segment of one head. MAP: no outputs but the end state; what block.z picks is the part that the inputs write
/// (0, from a zero state) or the segment's linear map (1, from the identity, without v).
template <bool MAP>
DEVICE void forward(byte* memory, const half_bits* r, const half_bits* w, const half_bits* k, const half_bits* v,
                    const half_bits* a, const half_bits* b, const byte* resets, const float* start, half_bits* y,
                    float* end, half_bits* states, float* units, int T, int H, int chunks, int length, int head,
                    int segment, int segments, int part) {
  Forward& m = *(Forward*)memory;
  const Place at = place_of(head, T, H, resets);
  const half_bits* inputs[6] = {r, w, k, v, a, b};
  const int first = segment * length, last = first + length < chunks ? first + length : chunks;
  const unsigned long long square = (unsigned long long)((head * segments + segment) * (MAP ? 2 : 1) + part) * N * N;
  const bool is_map = MAP && part == 1;

  for (int x = MAP ? W : R; x <= B; ++x) fetch(m.raw + x * RAW, inputs[x], at, first);
  commit_copies();
  bool flag = reset_flag(at, first);
  float state[8][4] = {};
  if (!MAP) read_state(state, start + square);
  if (is_map)
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 4; ++i) state[j][i] = warp() * 16 + lane() / 4 + i / 2 * 8 == j * 8 + lane() % 4 * 2 + i % 2;

  for (int chunk = first; chunk < last; ++chunk) {
    wait_copies<0>();
    for (int x = MAP ? K : R; x <= B; ++x)
      if (x != W) note_top(m.tops[x], m.raw + x * RAW);
    const word top = largest_of_warp(as_word(largest_of_state(state)));
    if (lane() == 0) m.tops[6][warp()] = top;
    const word documents = vote(flag);
    barrier();

    const Unit ru = unit_of_input(m.tops[MAP ? K : R]), ku = unit_of_input(m.tops[K]), au = unit_of_input(m.tops[A]);
    const Unit bu = unit_of_input(m.tops[B]), vu = unit_of_input(m.tops[V]);
    Unit su = unit_of(largest(m.tops[6]) >> 23);  // of the state and all that is added to it
    const float kv = ku.value * vu.value;
    if (kv > su.value) su = unit_of(as_word(kv) >> 23);
    {
      const Decays d = decays_of(m.raw + W * RAW);
      if (warp() == 0) ((Pair*)m.mid)[lane()] = exp2(d.mid);
      if (warp() == 1) ((Pair*)m.tail)[lane()] = exp2(d.tail);
      Pair x = d.before, rise = exp2(x);
      for (int t = warp() * 4; t < warp() * 4 + 4; ++t) {
        *at_pair(m.a, t) = pack(raw_pair(m.raw, A, t) * rise * au.inverse);
        x = x + raw_pair(m.raw, W, t) * LOG2E;
        rise = exp2(x);
        const Pair fall = exp2(x * -1.f);
        if (!MAP) *at_pair(m.r, t) = pack(raw_pair(m.raw, R, t) * rise * ru.inverse);
        *at_pair(m.b, t) = pack(raw_pair(m.raw, B, t) * fall * bu.inverse);
        *at_pair(m.k, t) = pack(raw_pair(m.raw, K, t) * fall * ku.inverse);
        *at_pair(m.v, t) = is_map ? 0 : pack(raw_pair(m.raw, V, t) * vu.inverse);
      }
    }
    barrier();

    if (chunk + 1 < last) {
      for (int x = MAP ? W : R; x <= B; ++x) fetch(m.raw + x * RAW, inputs[x], at, chunk + 1);
      flag = reset_flag(at, chunk + 1);
    }
    commit_copies();
    State s;
    for (int j = 0; j < 8; ++j) {
      const Pair mid = columns(m.mid, j) * su.inverse;
      for (int i = 0; i < 2; ++i) {
        state[j][2 * i] *= mid.x, state[j][2 * i + 1] *= mid.y;
        s[j][i] = pack(state[j][2 * i], state[j][2 * i + 1]);
      }
    }
    if (!MAP && states) {
      const unsigned long long where = (unsigned long long)head * chunks + chunk;
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 2; ++i)
          ((word*)(states + where * N * N + (warp() * 16 + lane() / 4 + i * 8) * N + j * 8))[lane() % 4] = s[j][i];
      if (thread() == 0) units[where] = su.value;
    }
    Square from_state = {}, read_out = {};
    make_pairs(m.pairs, m.square, m.a, m.r, m.b, m.k, au.value * bu.value, documents);
    state_times(from_state, s, m.a);
    if (!MAP) times_state(read_out, m.r, s);
    barrier();

    // u is in units of 16 a.unit s.unit: no sum of 64 products overflows float16
    word values[4], x[4];
    load_left_transposed(values, m.v + warp() * 16, ROW);
    const float kv_share = kv * su.inverse;
    Square c = {};
    load_right_transposed(x, m.pairs + 1 * PAIRS, SIDE);
    multiply(c, values, x);
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) {
        const bool sees = !documents || opens(documents, n * 8 + lane() % 4 * 2 + i % 2);
        c[n][i] = (c[n][i] * kv_share + (sees ? from_state[n][i] : 0)) * 0.0625f;
      }
    word solved[4];
    as_left(solved, c);
    load_right_transposed(x, m.pairs, SIDE);
    Square u = {};
    multiply(u, solved, x);
    const float erase = 16 * au.value * bu.value;
    if (!MAP) {
      as_left(solved, u);
      Square through_u = {}, through_v = {};
      load_left(x, m.pairs + 2 * PAIRS, SIDE);
      multiply_by_left(through_u, x, solved);
      load_left(x, m.pairs + 3 * PAIRS, SIDE);
      multiply_by_left(through_v, x, values);
      for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) {
          const bool sees = !documents || opens(documents, lane() / 4 + i / 2 * 8);
          c[n][i] = ((sees ? read_out[n][i] : 0) + through_u[n][i] * erase + through_v[n][i] * kv_share) *
                    (ru.value * su.value);
        }
      write_tokens(y, at, chunk, c);
    }
    as_left(solved, u, erase);
    const word share = pack(kv_share, kv_share);
    for (int i = 0; i < 4; ++i) values[i] = scale_halves(values[i], share);
    if (documents) {
      mask_tokens(solved, documents, closes);
      mask_tokens(values, documents, closes);
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) state[j][i] = 0;
    }
    accumulate(state, solved, m.b);
    accumulate(state, values, m.k);
    for (int j = 0; j < 8; ++j) {
      const Pair tail = columns(m.tail, j) * su.value;
      for (int i = 0; i < 2; ++i) state[j][2 * i] *= tail.x, state[j][2 * i + 1] *= tail.y;
    }
  }
  write_state(state, end + square);
}

struct Backward {
  half_bits raw[7 * RAW];
  half_bits a[TILE], r[TILE], b[TILE], k[TILE];
  half_bits s[N * ROW];                                                 // the start state
  union {
    struct { half_bits g[N * ROW], v[TILE], gy[TILE], u[TILE], z[TILE]; };  // until the products of the gradients are done
    float products[4][L][N + 2];                                          // then gradient ⊙ input of a, r, b, k
  };
  half_bits pairs[4 * PAIRS];
  float square[L * L], mid[N], tail[N];
  float rise[L + 1][N], fall[L][N];  // decays since the middle before each token and at the end; their inverses
  float flow[2][WARPS][N];           // Σ over 16 value rows of state ⊙ its gradient at the chunk's end, for two chunks
  Pair sums[WARPS][N / 2];           // what four tokens add to the gradient of earlier decays
  word tops[7][WARPS];
};

/// flow[column] = Σ over this warp's rows of c ⊙ s, times unit
DEVICE void write_flow(float* flow, const float (&c)[8][4], const State& s, float unit) {
  for (int j = 0; j < 8; ++j) {
    const Pair upper = unpack(s[j][0]), lower = unpack(s[j][1]);
    Pair x = {c[j][0] * upper.x + c[j][2] * lower.x, c[j][1] * upper.y + c[j][3] * lower.y};
    for (int mask = 4; mask < 32; mask *= 2) x = x + Pair{shuffle_xor(x.x, mask), shuffle_xor(x.y, mask)};
    if (lane() < 4) ((Pair*)(flow + j * 8))[lane()] = x * unit;
  }
}

/// [L × L] += x yᵀ over 64 values, x as left operands
DEVICE void tile_products(Square& c, const word (&x)[4][4], const half_bits* y) {
  for (int i = 0; i < 4; ++i) {
    word right[4];
    load_right_transposed(right, y + 16 * i, ROW);
    multiply(c, x[i], right);
  }
}

/// [16 value rows × L] to a tile [L × 64]
DEVICE void store_transposed(half_bits* tile, const Square& c) {
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i)
      tile[(n * 8 + lane() % 4 * 2 + i % 2) * ROW + warp() * 16 + lane() / 4 + i / 2 * 8] = float_to_half(c[n][i]);
}

/// One segment of one head, from its last chunk to its first. MAP: only what gy sends to the segment's start state.
template <bool MAP>
DEVICE void backward(byte* memory, const half_bits* r, const half_bits* w, const half_bits* k, const half_bits* v,
                     const half_bits* a, const half_bits* b, const half_bits* gy, const byte* resets,
                     const half_bits* states, const float* units, const float* ends, const float* g_ends,
                     half_bits* gr, half_bits* gw, half_bits* gk, half_bits* gv, half_bits* ga, half_bits* gb,
                     float* g_starts, int T, int H, int chunks, int length, int head, int segment, int segments) {
  Backward& m = *(Backward*)memory;
  const Place at = place_of(head, T, H, resets);
  const half_bits* inputs[7] = {r, w, k, v, a, b, gy};
  const int first = segment * length, last = first + length < chunks ? first + length : chunks;
  const unsigned long long square = (unsigned long long)(head * segments + segment) * N * N;
  const auto fetch_inputs = [&](int chunk) {
    for (int x = R; x <= GY; ++x)
      if (!MAP || (x != V && x != K)) fetch(m.raw + x * RAW, inputs[x], at, chunk);
  };
  const auto fetch_state = [&](int chunk) {
    const half_bits* from = states + ((unsigned long long)head * chunks + chunk) * N * N;
    for (int i = 0; i < 4; ++i) {
      const int row = i * 16 + thread() / 8, n = thread() % 8 * 8;
      copy_async(m.s + row * ROW + n, from + row * N + n, true);
    }
  };

  fetch_inputs(last - 1);
  if (!MAP) fetch_state(last - 1);
  commit_copies();
  bool flag = reset_flag(at, last - 1);
  float g[8][4] = {};  // gradient of the state at the chunk's end
  if (!MAP) {
    read_state(g, g_ends + square);
    float flow[8][4];
    read_state(flow, ends + square);
    for (int j = 0; j < 8; ++j) {
      Pair x = {g[j][0] * flow[j][0] + g[j][2] * flow[j][2], g[j][1] * flow[j][1] + g[j][3] * flow[j][3]};
      for (int mask = 4; mask < 32; mask *= 2) x = x + Pair{shuffle_xor(x.x, mask), shuffle_xor(x.y, mask)};
      if (lane() < 4) ((Pair*)(m.flow[(last - 1) & 1][warp()] + j * 8))[lane()] = x;
    }
  }
  Pair late[4];  // of w's gradient: what this warp's four tokens add to it
  const auto finish_decays = [&](int chunk) {
    Pair x = {0, 0};
    for (int i = 0; i < WARPS; ++i) x = x + ((Pair*)m.flow[chunk & 1][i])[lane()];
    for (int i = warp() + 1; i < WARPS; ++i) x = x + m.sums[i][lane()];
    for (int i = 0; i < 4; ++i) {
      const int t = chunk * L + warp() * 4 + i;
      if (t < T) ((word*)(gw + at.base + (unsigned long long)t * at.stride))[lane()] = written(x + late[i]);
    }
  };

  for (int chunk = last - 1; chunk >= first; --chunk) {
    wait_copies<0>();
    for (int x = R; x <= GY; ++x)
      if (x != W && (!MAP || (x != V && x != K))) note_top(m.tops[x], m.raw + x * RAW);
    const word top = largest_of_warp(as_word(largest_of_state(g)));
    if (lane() == 0) m.tops[W][warp()] = top;
    const word documents = vote(flag);
    const float s_unit = MAP ? 1.f : units[(unsigned long long)head * chunks + chunk];
    barrier();

    if (!MAP && chunk + 1 < last) finish_decays(chunk + 1);
    const Unit ru = unit_of_input(m.tops[R]), au = unit_of_input(m.tops[A]), bu = unit_of_input(m.tops[B]);
    const Unit yu = unit_of_input(m.tops[GY]), ku = unit_of_input(m.tops[MAP ? R : K]);
    const Unit vu = unit_of_input(m.tops[MAP ? R : V]);
    Unit gu = unit_of(largest(m.tops[W]) >> 23);  // of the state's gradient and all that is added to it
    const float ry = ru.value * yu.value;
    if (ry > gu.value) gu = unit_of(as_word(ry) >> 23);
    {
      const Decays d = decays_of(m.raw + W * RAW);
      if (warp() == 0) ((Pair*)m.mid)[lane()] = exp2(d.mid);
      if (warp() == 1) ((Pair*)m.tail)[lane()] = exp2(d.tail);
      Pair x = d.before, rise = exp2(x);
      if (!MAP) ((Pair*)m.rise[warp() * 4])[lane()] = rise;
      for (int t = warp() * 4; t < warp() * 4 + 4; ++t) {
        *at_pair(m.a, t) = pack(raw_pair(m.raw, A, t) * rise * au.inverse);
        x = x + raw_pair(m.raw, W, t) * LOG2E;
        rise = exp2(x);
        const Pair fall = exp2(x * -1.f);
        *at_pair(m.r, t) = pack(raw_pair(m.raw, R, t) * rise * ru.inverse);
        *at_pair(m.b, t) = pack(raw_pair(m.raw, B, t) * fall * bu.inverse);
        *at_pair(m.gy, t) = pack(raw_pair(m.raw, GY, t) * yu.inverse);
        if (!MAP) {
          *at_pair(m.k, t) = pack(raw_pair(m.raw, K, t) * fall * ku.inverse);
          *at_pair(m.v, t) = pack(raw_pair(m.raw, V, t) * vu.inverse);
          ((Pair*)m.fall[t])[lane()] = fall;
          // The next warp writes the same value to its own first row.
          if (t % 4 != 3 || t == L - 1) ((Pair*)m.rise[t + 1])[lane()] = rise;
        }
      }
    }
    barrier();

    if (chunk > first) {
      fetch_inputs(chunk - 1);
      flag = reset_flag(at, chunk - 1);
    }
    commit_copies();
    State gs, s;
    for (int j = 0; j < 8; ++j) {
      const Pair tail = columns(m.tail, j) * gu.inverse;
      for (int i = 0; i < 2; ++i) {
        g[j][2 * i] *= tail.x, g[j][2 * i + 1] *= tail.y;
        gs[j][i] = pack(g[j][2 * i], g[j][2 * i + 1]);
        if (!MAP) ((word*)(m.g + (warp() * 16 + lane() / 4 + i * 8) * ROW + j * 8))[lane() % 4] = gs[j][i];
      }
    }
    Square u_state = {}, z_state = {}, v_state = {};
    state_times(z_state, gs, m.b);
    if (!MAP) {
      for (int i = 0; i < 4; ++i) {
        word x[4];
        load_left(x, m.s + warp() * 16 * ROW + 16 * i, ROW);
        s[2 * i][0] = x[0], s[2 * i][1] = x[1], s[2 * i + 1][0] = x[2], s[2 * i + 1][1] = x[3];
      }
      state_times(u_state, s, m.a);
      times_state(v_state, m.k, gs);
    }
    make_pairs(m.pairs, m.square, m.a, m.r, m.b, MAP ? m.b : m.k, au.value * bu.value, documents);
    barrier();

    // u in units of 16 a.unit s.unit, z in units of 16 b.unit g.unit
    const float kv_share = ku.value * vu.value / s_unit, ry_share = ry * gu.inverse, erase = 16 * au.value * bu.value;
    word values[4], grads[4], x[4], z_left[4];
    load_left_transposed(grads, m.gy + warp() * 16, ROW);
    Square c = {}, z = {};
    load_right(x, m.pairs + 2 * PAIRS, SIDE);
    multiply(c, grads, x);
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i) {
        const bool sees = !documents || closes(documents, n * 8 + lane() % 4 * 2 + i % 2);
        c[n][i] = (c[n][i] * ry_share + (sees ? z_state[n][i] : 0)) * 0.0625f;
      }
    word solved[4];
    as_left(solved, c);
    load_right(x, m.pairs, SIDE);
    multiply(z, solved, x);
    as_left(z_left, z);
    if (!MAP) {
      store_transposed(m.z, z);
      load_left_transposed(values, m.v + warp() * 16, ROW);
      Square q = {}, u = {};
      load_right_transposed(x, m.pairs + 1 * PAIRS, SIDE);
      multiply(q, values, x);
      for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) {
          const bool sees = !documents || opens(documents, n * 8 + lane() % 4 * 2 + i % 2);
          q[n][i] = (q[n][i] * kv_share + (sees ? u_state[n][i] : 0)) * 0.0625f;
        }
      as_left(solved, q);
      load_right_transposed(x, m.pairs, SIDE);
      multiply(u, solved, x);
      store_transposed(m.u, u);

      Square through_z = {}, through_y = {};
      load_left_transposed(x, m.pairs + 1 * PAIRS, SIDE);
      multiply_by_left(through_z, x, z_left);
      load_left_transposed(x, m.pairs + 3 * PAIRS, SIDE);
      multiply_by_left(through_y, x, grads);
      for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) {
          const bool sees = !documents || closes(documents, lane() / 4 + i / 2 * 8);
          c[n][i] = ((sees ? v_state[n][i] : 0) + through_z[n][i] * erase + through_y[n][i] * ry_share) *
                    (ku.value * gu.value);
        }
      write_tokens(gv, at, chunk, c);
    }
    as_left(solved, z, erase);
    const word share = pack(ry_share, ry_share);
    for (int i = 0; i < 4; ++i) grads[i] = scale_halves(grads[i], share);
    if (documents) {
      mask_tokens(solved, documents, opens);
      mask_tokens(grads, documents, opens);
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) g[j][i] = 0;
    }
    accumulate(g, solved, m.a);
    accumulate(g, grads, m.r);
    if (!MAP) write_flow(m.flow[(chunk - 1) & 1][warp()], g, s, gu.value * s_unit);
    for (int j = 0; j < 8; ++j) {
      const Pair mid = columns(m.mid, j) * gu.value;
      for (int i = 0; i < 2; ++i) g[j][2 * i] *= mid.x, g[j][2 * i + 1] *= mid.y;
    }
    if (MAP) continue;
    barrier();

    // One gradient a warp, [L × 64]: a, r of (z, gy) with (u, v) and the state; b, k of (u, v) with (z, gy) and its gradient.
    const int role = warp();
    const bool is_reader = role < 2;
    word left[4][4];
    const half_bits* mine = role == 0 ? m.z : role == 1 ? m.gy : role == 2 ? m.u : m.v;
    for (int i = 0; i < 4; ++i) load_left(left[i], mine + 16 * i, ROW);
    float grad[8][4] = {};
    for (int i = 0; i < 4; ++i) accumulate(grad, left[i], (is_reader ? m.s : m.g) + 16 * i * ROW);
    if (documents)
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) {
          const int t = lane() / 4 + i / 2 * 8;
          if (!(is_reader ? opens(documents, t) : closes(documents, t))) grad[j][i] = 0;
        }
    Square erased = {}, plain = {};
    tile_products(erased, left, is_reader ? m.u : m.z);
    tile_products(plain, left, is_reader ? m.v : m.gy);
    if (is_reader) {
      mask_lower(erased, role == 0, documents);
      mask_lower(plain, role == 0, documents);
    } else {
      mask_upper(erased, true, documents);
      mask_upper(plain, false, documents);
    }
    as_left(x, erased, erase);
    accumulate(grad, x, is_reader ? m.b : m.a);
    as_left(x, plain, is_reader ? kv_share : ry_share);
    accumulate(grad, x, is_reader ? m.k : m.r);
    const float unit = role == 0   ? 16 * bu.value * gu.value * s_unit
                       : role == 1 ? yu.value * s_unit
                       : role == 2 ? 16 * au.value * s_unit * gu.value
                                   : vu.value * gu.value;
    const float own = role == 0 ? au.value : role == 1 ? ru.value : role == 2 ? bu.value : ku.value;
    barrier();

    if (chunk > first) fetch_state(chunk - 1);
    commit_copies();
    half_bits* tile = role == 0 ? m.a : role == 1 ? m.r : role == 2 ? m.b : m.k;
    const float* decay = role == 0 ? m.rise[0] : role == 1 ? m.rise[1] : m.fall[0];
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 2; ++i) {
        const int t = lane() / 4 + i * 8, n = j * 8 + lane() % 4 * 2;
        word* here = (word*)(tile + t * ROW + n);
        const Pair value = Pair{grad[j][2 * i], grad[j][2 * i + 1]} * unit;
        *(Pair*)&m.products[role][t][n] = value * unpack(*here) * own;
        *here = written(value * *(const Pair*)(decay + t * N + n));
      }
    warp_barrier();
    half_bits* to = role == 0 ? ga : role == 1 ? gr : role == 2 ? gb : gk;
    for (int i = 0; i < 4; ++i) {
      const int row = i * 4 + lane() / 8, n = lane() % 8 * 8, t = chunk * L + row;
      if (t < T) *(Quad*)(to + at.base + (unsigned long long)t * at.stride + n) = *(const Quad*)(tile + row * ROW + n);
    }
    barrier();

    // w enters every inclusive exponent from its token on and every exclusive one after it
    Pair sum = {0, 0};
    for (int i = 3; i >= 0; --i) {
      const int t = warp() * 4 + i;
      const auto product = [&](int x) { return ((const Pair*)m.products[x][t])[lane()]; };
      late[i] = sum = sum + product(1) - product(2) - product(3);
      sum = sum + product(0);
    }
    m.sums[warp()][lane()] = sum;
  }
  if (!MAP) {
    barrier();
    finish_decays(first);
  }
  write_state(g, g_starts + square);
}

static_assert(sizeof(Forward) <= FORWARD_BYTES && sizeof(Backward) <= BACKWARD_BYTES, "shared memory");

#define INPUTS const half_bits *r, const half_bits *w, const half_bits *k, const half_bits *v, const half_bits *a, const half_bits *b
#define SHAPE int T, int H, int chunks, int length

extern "C" {
/// Grid (heads, segments).
__global__ void __launch_bounds__(WARPS * 32, 4)
wkv7_forward(INPUTS, const byte* resets, const float* starts, half_bits* y, float* ends, half_bits* states, float* units, SHAPE) {
  extern __shared__ __align__(16) byte memory[];
  forward<false>(memory, r, w, k, v, a, b, resets, starts, y, ends, states, units, T, H, chunks, length, blockIdx.x,
                 blockIdx.y, gridDim.y, 0);
}

/// Grid (heads, segments, 2); maps [heads, segments, 2, N, N]: what inputs write, then the map S → S P.
__global__ void __launch_bounds__(WARPS * 32, 4)
wkv7_forward_maps(INPUTS, const byte* resets, float* maps, SHAPE) {
  extern __shared__ __align__(16) byte memory[];
  forward<true>(memory, r, w, k, v, a, b, resets, nullptr, nullptr, maps, nullptr, nullptr, T, H, chunks, length,
                blockIdx.x, blockIdx.y, gridDim.y, blockIdx.z);
}

__global__ void __launch_bounds__(WARPS * 32, 3)
wkv7_backward(INPUTS, const half_bits* gy, const byte* resets, const half_bits* states, const float* units,
              const float* ends, const float* g_ends, half_bits* gr, half_bits* gw, half_bits* gk, half_bits* gv,
              half_bits* ga, half_bits* gb, float* g_starts, SHAPE) {
  extern __shared__ __align__(16) byte memory[];
  backward<false>(memory, r, w, k, v, a, b, gy, resets, states, units, ends, g_ends, gr, gw, gk, gv, ga, gb, g_starts,
                  T, H, chunks, length, blockIdx.x, blockIdx.y, gridDim.y);
}

__global__ void __launch_bounds__(WARPS * 32, 4)
wkv7_backward_maps(INPUTS, const half_bits* gy, const byte* resets, float* g_starts, SHAPE) {
  extern __shared__ __align__(16) byte memory[];
  backward<true>(memory, r, w, k, v, a, b, gy, resets, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                 nullptr, nullptr, nullptr, g_starts, T, H, chunks, length, blockIdx.x, blockIdx.y, gridDim.y);
}

/// Grid (heads, 4): rows of the state. Every segment's start: starts[0] = first, then state → state · P + part, where P
/// is each segment's map; in reverse, from the last segment, with Pᵀ. maps and parts advance by their strides (floats).
__global__ void __launch_bounds__(128)
wkv7_join(const float* maps, int map_stride, const float* parts, int part_stride, const float* first, float* starts,
          int segments, int reverse) {
  extern __shared__ __align__(16) byte memory[];
  float(&p)[N][N + 1] = *(float(*)[N][N + 1])memory;
  float(&state)[16][N] = *(float(*)[16][N])(memory + sizeof p);
  const int column = thread() % N, row = thread() / N * 8;
  const unsigned long long head = blockIdx.x, rows = blockIdx.y * 16ull * N;
  float x[8];
  for (int i = 0; i < 8; ++i) x[i] = first[head * N * N + rows + (row + i) * N + column];
  for (int step = 0; step < segments; ++step) {
    const unsigned long long at = head * segments + (reverse ? segments - 1 - step : step);
    for (int i = thread(); i < N * N; i += 128) {
      const float value = maps[at * map_stride + i];
      if (reverse) p[i % N][i / N] = value;
      else p[i / N][i % N] = value;
    }
    for (int i = 0; i < 8; ++i) {
      state[row + i][column] = x[i];
      starts[at * N * N + rows + (row + i) * N + column] = x[i];
      x[i] = parts[at * part_stride + rows + (row + i) * N + column];
    }
    barrier();
    for (int j = 0; j < N; ++j)
      for (int i = 0; i < 8; ++i) x[i] += state[row + i][j] * p[j][column];
    barrier();
  }
}
}
