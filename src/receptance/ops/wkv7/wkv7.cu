// RWKV-7's WKV for heads of 64: chunks of 16 tokens on tensor cores, one block of four warps walks along a row.
//
// Per chunk with start state S [value, key] (docs/maths.md). a', r', b', k' carry decays relative to the middle of the
// chunk, s = S diag(e^mid), g = G diag(e^(end - mid)) for the gradient G of the end state:
//
//     T = (I - tril₋(a' b'ᵀ))⁻¹      u = T (a' sᵀ + tril₋(a' k'ᵀ) v)      y = r' sᵀ + tril(r' b'ᵀ) u + tril(r' k'ᵀ) v
//     end state = (s + uᵀ b' + vᵀ k') diag(e^(end - mid))
//     z = Tᵀ (tril(r' b'ᵀ)ᵀ gy + b' gᵀ)      gradient of the start state = (g + zᵀ a' + gyᵀ r') diag(e^mid)
//
// Warp i of a team owns rows 16 i … of the state, in registers; operands are float16, as exact as tf32, in units of powers
// of two that each chunk chooses: x = x.unit · x̂. A chunk of 16 keeps decays within e^±4.9, because log w ≥ -0.6066.
//
// Teams of four warps work on neighbouring chunks at the same time, one barrier a step: the first prepares tiles and the
// [L × L] matrices, the second carries the state (or its gradient) on, the third makes the gradients.
#include "tiles.cuh"

constexpr int N = 64, L = 16, WARPS = 4;
constexpr int ROW = N + 8, TILE = L * ROW;     // halves; padded rows keep reads of columns free of bank conflicts
constexpr int SIDE = L + 8, PAIRS = L * SIDE;  // [L × L]
constexpr float LOG2E = 1.4426950408889634f;

enum { R, W, K, V, A, B, GY };
enum { AK, RB, RK, T_INVERSE };  // by the warp that makes it

/// The chunk's place in tensors [batch, T, H, N].
struct Place {
  uint64 base;  // of the row and head
  int stride, T;
  const byte* resets;  // of the row
};
DEVICE Place place_of(int head, int T, int H, const byte* resets) {
  const uint64 row = head / H;
  return {row * T * H * N + (head % H) * N, H * N, T, resets ? resets + row * T : nullptr};
}

/// Where a row's maps are cut: at segments of `length` chunks and at every `piece` of them. A piece is what lies between.
struct Cuts {
  int length, piece;
  DEVICE int number(int chunk) const { return chunk / piece + chunk / length; }  // of its piece
  DEVICE int begin(int chunk) const { return max(chunk / piece * piece, chunk / length * length); }
  DEVICE int end(int chunk) const { return min((chunk / piece + 1) * piece, (chunk / length + 1) * length); }
};

/// Start copying a chunk of one input; each thread takes 16 bytes.
DEVICE void fetch(half_bits* raw, const half_bits* x, const Place& at, int chunk) {
  const int row = thread() / 8, n = thread() % 8 * 8, t = chunk * L + row;
  copy_async(raw + row * ROW + n, x + at.base + (uint64)(t < at.T ? t : 0) * at.stride + n, t < at.T);
}
/// The exponents of the largest magnitudes that this warp fetched, of the tensors in WHICH (a bit each).
template <word WHICH>
DEVICE void note_tops(word (&tops)[7][WARPS], const half_bits (*raw)[TILE]) {
  word top[7];
#pragma unroll
  for (int x = 0; x < 7; ++x)
    if (WHICH >> x & 1) top[x] = largest_magnitude(*(const Quad*)(raw[x] + thread() / 8 * ROW + thread() % 8 * 8));
#pragma unroll
  for (int x = 0; x < 7; ++x)  // one after another is one wait, each with its store would be as many
    if (WHICH >> x & 1) top[x] = largest_of_warp(top[x]);
  if (lane() == 0) {
#pragma unroll
    for (int x = 0; x < 7; ++x)
      if (WHICH >> x & 1) tops[x][warp()] = exponent_of(top[x] >> 16);
  }
}
DEVICE void note_top(word* tops, const float (&c)[8][4]) {  // of a state
  float top = 0;
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) top = largest(top, magnitude(c[j][i]));
  const word exponent = largest_of_warp(as_word(top)) >> 23;
  if (lane() == 0) tops[warp()] = exponent;
}
DEVICE float two_to(int exponent) { return exponent > 0 ? as_float(exponent << 23) : 0; }  // biased by 127
DEVICE int unit_exponent(int own, int added) {
  const int exponent = own > added ? own : added;
  return exponent < 87 ? 87 : exponent > 167 ? 167 : exponent;
}

/// Which tokens begin a document, a bit each; lanes 0–15 hold a token's flag.
DEVICE bool reset_flag(const Place& at, int chunk) {
  const int t = chunk * L + lane();
  return at.resets && lane() < L && t < at.T && at.resets[t];
}
DEVICE bool is_one_document(word resets, int early, int late) {
  return !(resets >> early >> 1 << early << 1 & ((2u << late) - 1));
}
DEVICE bool opens(word resets, int t) { return !(resets & ((2u << t) - 1)); }  // still sees the start state
DEVICE bool closes(word resets, int t) { return !(resets >> t >> 1); }         // the end state still sees it

/// What a lane knows for good: its place in fragments, and triangles as masks and as operands.
struct Lane {
  int g, q, here;  // here: of its first element in a tile, columns of this warp
  word below, upto, above, from;  // masks of a diagonal block [8 × 8]: column < row, ≤, >, ≥
  DEVICE Lane() : g(lane() / 4), q(lane() % 4), here(g * ROW + warp() * 16 + q * 2) {
    const int column = 2 * q;
    below = (column < g ? 0xffffu : 0) | (column + 1 < g ? 0xffff0000u : 0);
    upto = (column <= g ? 0xffffu : 0) | (column + 1 <= g ? 0xffff0000u : 0);
    above = ~upto, from = ~below;
  }
};

/// log2 of the decay from the middle of the chunk to each token's end and to its start, for this warp's 16 columns.
struct Exponents {
  Square end, start;
  DEVICE Exponents(const half_bits* w, const Lane& my) : end{}, start{} {
    const word ones = ONE * 0x10001u, minus = ones | 0x80008000u;
    const word to_end[4] = {minus & my.above, 0, 0, ones & my.upto}, to_start[4] = {minus & my.from, 0, 0, ones & my.below};
    word x[4];
    load_right(x, w + warp() * 16, ROW);
    for (int n = 0; n < 2; ++n) {
      multiply_inputs(end[n], to_end, x[2 * n], x[2 * n + 1]);
      multiply_inputs(start[n], to_start, x[2 * n], x[2 * n + 1]);
      for (int i = 0; i < 4; ++i) end[n][i] *= LOG2E, start[n][i] *= LOG2E;
    }
  }
};

DEVICE word& at(half_bits* tile, int place) { return *(word*)(tile + place); }
DEVICE word at(const half_bits* tile, int place) { return *(const word*)(tile + place); }
/// Of a tile of each of the tensors in WHICH, this lane's words: rows g and g + 8, columns from 0 and from 8 on of its
/// warp. All are read before anything is written: the compiler cannot know that tiles are apart and would wait for each.
template <word WHICH>
struct Inputs {
  word x[7][4];
  DEVICE Inputs(const half_bits (*raw)[TILE], const Lane& my) {
#pragma unroll
    for (int tensor = 0; tensor < 7; ++tensor)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (WHICH >> tensor & 1) x[tensor][i] = at(raw[tensor], my.here + i % 2 * 8 * ROW + i / 2 * 8);
  }
};
/// An input in its unit (`power`: the inverse), as float16, and times a decay.
DEVICE word in_unit(word x, word power) { return pack(read(scale_input(x, power))); }
DEVICE word decayed(word x, word power, Pair decay) { return pack(read(scale_input(x, power)) * decay); }

/// [L × L] += x yᵀ
DEVICE void scores(Square& c, const half_bits* x, const half_bits* y) {
  for (int i = 0; i < 4; ++i) {
    word left[4], right[4];
    load_left(left, x + 16 * i, ROW);
    load_right_transposed(right, y + 16 * i, ROW);
    multiply(c, left, right);
  }
}
/// Zero pairs of tokens from different documents; is_late: rows are the later ones.
DEVICE void mask_documents(Square& c, word resets, bool is_late) {
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) {
      const int row = lane() / 4 + i / 2 * 8, column = n * 8 + lane() % 4 * 2 + i % 2;
      if (!is_one_document(resets, is_late ? column : row, is_late ? row : column)) c[n][i] = 0;
    }
}
DEVICE void keep_lower(word (&x)[4], word diagonal) { x[0] &= diagonal, x[2] = 0, x[3] &= diagonal; }
DEVICE void keep_upper(word (&x)[4], word diagonal) { x[0] &= diagonal, x[1] = 0, x[3] &= diagonal; }

/// This warp's matrix of a chunk, masked by documents. tiles: a', r', b', k'.
DEVICE void make_scores(Square& c, const half_bits* tiles, word resets) {
  scores(c, tiles + (warp() + 1) / 2 % 2 * TILE, tiles + (3 - warp() % 2) * TILE);
  if (resets) mask_documents(c, resets, true);
}
/// As float16 in its operands' units; not for the warp of the inverse.
DEVICE void make_pairs(half_bits* pairs, const half_bits* tiles, word resets, const Lane& my) {
  Square c = {};
  make_scores(c, tiles, resets);
  word x[4];
  as_left(x, c);
  keep_lower(x, warp() == AK ? my.below : my.upto);
  half_bits* to = pairs + warp() * PAIRS + my.g * SIDE + my.q * 2;
  at(to, 0) = x[0], at(to, 8 * SIDE) = x[1], at(to, 8) = x[2], at(to, 8 * SIDE + 8) = x[3];
}
/// The triangular inverse, in units of 1. saved: for the backward pass, or null.
DEVICE void make_inverse(half_bits* inverse, float (&square)[L][L + 4], const half_bits* tiles, float unit, word resets,
                         half_bits* saved, const Lane& my) {
  Square c = {};
  make_scores(c, tiles, resets);
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) square[n * 8 + my.q * 2 + i % 2][my.g + i / 2 * 8] = c[n][i] * unit;
  warp_barrier();
  float x[L];  // column `lane` of (I - tril₋(squareᵀ))⁻¹: each row, once known, is taken to all below
  const int column = lane() % L;
#pragma unroll
  for (int i = 0; i < L; ++i) x[i] = i == column ? 1.f : 0.f;
#pragma unroll
  for (int j = 0; j < L - 1; ++j)
#pragma unroll
    for (int i = j + 1; i < L; ++i) x[i] += square[j][i] * x[j];
  if (lane() < L)
    for (int i = 0; i < L; ++i) inverse[i * SIDE + column] = float_to_half(x[i]);
  if (!saved) return;
  warp_barrier();
  ((Quad*)saved)[lane()] = *(const Quad*)(inverse + lane() / 2 * SIDE + lane() % 2 * 8);
}

/// State rows as operands: [16 × 64], s[j] = columns 8 j … of rows g and g + 8.
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
/// c = (c · factor + more) / 16
DEVICE void combine(Square& c, float factor, const Square& more) {
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) c[n][i] = c[n][i] * (factor * 0.0625f) + more[n][i] * 0.0625f;
}
/// Zero the tokens that `keeps` rejects: of a left operand's columns, of an accumulator's columns or rows.
template <typename Keeps>
DEVICE void mask_tokens(word (&x)[4], word resets, Keeps keeps) {
  for (int i = 0; i < 4; ++i) {
    const int t = i / 2 * 8 + lane() % 4 * 2;
    x[i] &= (keeps(resets, t) ? 0xffffu : 0) | (keeps(resets, t + 1) ? 0xffff0000u : 0);
  }
}
template <typename Keeps>
DEVICE void mask_columns(Square& c, word resets, Keeps keeps) {
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i)
      if (!keeps(resets, n * 8 + lane() % 4 * 2 + i % 2)) c[n][i] = 0;
}
template <int COLUMNS, typename Keeps>
DEVICE void mask_rows(float (&c)[COLUMNS][4], word resets, Keeps keeps) {
  for (int n = 0; n < COLUMNS; ++n)
    for (int i = 0; i < 4; ++i)
      if (!keeps(resets, lane() / 4 + i / 2 * 8)) c[n][i] = 0;
}
DEVICE void scale_columns(float (&c)[8][4], const float* by, float factor, const Lane& my) {
  for (int j = 0; j < 8; ++j) {
    const Pair x = *(const Pair*)(by + j * 8 + my.q * 2) * factor;
    c[j][0] *= x.x, c[j][1] *= x.y, c[j][2] *= x.x, c[j][3] *= x.y;
  }
}
DEVICE void pack_state(State& s, const float (&c)[8][4]) {
  for (int j = 0; j < 8; ++j) s[j][0] = pack(c[j][0], c[j][1]), s[j][1] = pack(c[j][2], c[j][3]);
}
DEVICE void read_state(float (&c)[8][4], const float* from, const Lane& my) {  // [N, N]
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 2; ++i) {
      const Pair x = *(const Pair*)(from + (warp() * 16 + my.g + i * 8) * N + j * 8 + my.q * 2);
      c[j][2 * i] = x.x, c[j][2 * i + 1] = x.y;
    }
}
DEVICE void write_state(const float (&c)[8][4], float* to, const Lane& my) {
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 2; ++i) *(Pair*)(to + (warp() * 16 + my.g + i * 8) * N + j * 8 + my.q * 2) = {c[j][2 * i], c[j][2 * i + 1]};
}
DEVICE void set_identity(float (&c)[8][4], const Lane& my, float one = 1) {
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) c[j][i] = warp() * 16 + my.g + i / 2 * 8 == j * 8 + my.q * 2 + i % 2 ? one : 0;
}
/// [L × 16] to this warp's columns of a tensor; `to`: at this lane's first element.
DEVICE void write_tokens(half_bits* to, int stride, int left, const Square& c, float unit, const Lane& my) {
  for (int i = 0; i < 2; ++i)
    if (my.g + 8 * i < left)
      for (int n = 0; n < 2; ++n) *(word*)(to + 8 * i * stride + 8 * n) = written(Pair{c[n][2 * i], c[n][2 * i + 1]} * unit);
}

/// What the first team finds out about a chunk for the others: exponents of the inputs' units, document starts.
struct Facts { int r, k, v, a, b, gy; word documents; };
DEVICE Facts facts_of(const word (&tops)[7][WARPS], word documents) {
  const Quad x = *(const Quad*)tops[lane() < 7 ? lane() : 0];
  const word p = x.x > x.y ? x.x : x.y, q = x.z > x.w ? x.z : x.w, exponent = clamp(p > q ? p : q, LEAST, MOST);
  const auto of = [&](int tensor) { return (int)shuffle(exponent, tensor); };
  return {of(R), of(K), of(V), of(A), of(B), of(GY), documents};
}
DEVICE int unit_of_state(const word* tops, int unit, int added) {
  const word a = tops[0] > tops[1] ? tops[0] : tops[1], b = tops[2] > tops[3] ? tops[2] : tops[3];
  return unit_exponent((int)(a > b ? a : b) + unit - 127, added);
}

template <int MAKERS>
struct Forward {
  static constexpr int SLOTS = MAKERS + 1;
  half_bits raw[2][6][TILE];  // of the chunk at hand and the next
  struct alignas(16) {
    half_bits tiles[5][TILE];  // a', r', b', k', v
    half_bits pairs[4][PAIRS];
    float scale[N], tail[N];   // decays of the state's columns: the last chunk's second half with this one's first; this one's second
    Facts facts;
  } chunks[SLOTS];
  alignas(16) half_bits s[2][WARPS][16 * ROW];  // states on their way out
  alignas(16) float square[L][L + 4];
  alignas(16) word tops[7][WARPS], state_tops[2][2][WARPS];  // exponents
};

/// Chunks from `first` to before `last` of one head. MAP: nothing but, for each piece, what the inputs write (from a zero
/// state) by the second team, and the linear map (from the identity, without v) by the third; `end` holds all of the head's.
/// MAKERS: teams that prepare chunks; of two, the third team is the other one, and each takes two steps for its chunks:
/// tiles, then pairs. That is faster where a block has a multiprocessor for itself.
template <bool MAP, int MAKERS>
DEVICE void forward(byte* memory, const half_bits* r, const half_bits* w, const half_bits* k, const half_bits* v,
                    const half_bits* a, const half_bits* b, const byte* resets, const float* start, half_bits* y,
                    float* end, half_bits* states, float* units, half_bits* inverses, int T, int H, int chunks, int head,
                    int first, int last, const Cuts& cuts) {
  constexpr int TEAMS = MAP ? 3 : 1 + MAKERS;
  typedef Forward<MAKERS> Memory;
  Memory& m = *(Memory*)memory;
  const Lane my;
  const Place place = place_of(head, T, H, resets);
  const half_bits* inputs[6] = {r, w, k, v, a, b};
  int cut = MAP ? cuts.end(first) : last;

  if (team() == 0 || (MAKERS == 2 && team() == 2)) {
    const int maker = team() / 2;
    bool flag = false, next_flag = false;
    const auto fetch_chunk = [&](int chunk) {
      if (chunk < last)
        for (int x = MAP ? W : R; x <= B; ++x) fetch(m.raw[(chunk - first) & 1][x], inputs[x], place, chunk);
      commit_copies();
      if (MAKERS == 1) flag = next_flag;
      (MAKERS == 1 ? next_flag : flag) = chunk < last && reset_flag(place, chunk);
    };
    Pair tail[2] = {};
    Facts f;
    const auto make_tiles = [&](int chunk) {
      auto& to = m.chunks[chunk % Memory::SLOTS];
      auto& raw = m.raw[(chunk - first) & 1];
      if (MAKERS == 1) await_all_but_one();
      else await_copies();
      note_tops<1 << K | 1 << V | 1 << A | 1 << B | (MAP ? 0 : 1 << R)>(m.tops, raw);
      const word documents = vote(flag);
      team_barrier(team());

      const Inputs<1 << K | 1 << V | 1 << A | 1 << B | (MAP ? 0 : 1 << R)> in(raw, my);
      f = facts_of(m.tops, documents);
      if (thread() == 0) to.facts = f;
      const Exponents e(raw[W], my);
      if (MAP && chunk == cut) {
        tail[0] = tail[1] = {0, 0};
        cut = cuts.end(chunk);
      }
      const word rp = power_of_two(254 - f.r), kp = power_of_two(254 - f.k), ap = power_of_two(254 - f.a);
      const word bp = power_of_two(254 - f.b), vp = power_of_two(254 - f.v);
      for (int n = 0; n < 2; ++n) {
        const int column = warp() * 16 + n * 8 + my.q * 2;
        const Pair mid = {-as_float(shuffle(as_word(e.start[n][0]), my.q)), -as_float(shuffle(as_word(e.start[n][1]), my.q))};
        const Pair before = tail[n];
        tail[n] = {e.end[n][2], e.end[n][3]};
        if (my.g == 7) {  // of two makers, the other one has `before`: for now, exponents
          *(Pair*)(to.scale + column) = MAKERS == 1 ? exp2(mid + before) : mid;
          *(Pair*)(to.tail + column) = MAKERS == 1 ? exp2(tail[n]) : tail[n];
        }
        for (int i = 0; i < 2; ++i) {
          const int here = my.here + 8 * i * ROW + 8 * n, x = 2 * n + i;
          const Pair rise = {e.end[n][2 * i], e.end[n][2 * i + 1]}, fall = exp2(rise * -1.f);
          at(to.tiles[0], here) = decayed(in.x[A][x], ap, exp2(Pair{e.start[n][2 * i], e.start[n][2 * i + 1]}));
          if (!MAP) at(to.tiles[1], here) = decayed(in.x[R][x], rp, exp2(rise));
          at(to.tiles[2], here) = decayed(in.x[B][x], bp, fall);
          at(to.tiles[3], here) = decayed(in.x[K][x], kp, fall);
          at(to.tiles[4], here) = in_unit(in.x[V][x], vp);
        }
      }
      team_barrier(team());
      fetch_chunk(chunk + 2);
    };
    const auto make_chunk_pairs = [&](int chunk) {
      auto& to = m.chunks[chunk % Memory::SLOTS];
      if (MAKERS == 2 && thread() < N) {
        const float before = chunk > first ? m.chunks[(chunk - 1) % Memory::SLOTS].tail[thread()] : 0;
        to.scale[thread()] = exp2(to.scale[thread()] + before);
        if (chunk == last - 1) to.tail[thread()] = exp2(to.tail[thread()]);
      }
      if (warp() != T_INVERSE) {
        if (!MAP || warp() == AK) make_pairs(to.pairs[0], to.tiles[0], f.documents, my);
      } else {
        half_bits* saved = inverses ? inverses + ((uint64)head * chunks + chunk) * L * L : nullptr;
        make_inverse(to.pairs[T_INVERSE], m.square, to.tiles[0], two_to(f.a + f.b - 127), f.documents, saved, my);
      }
    };
    fetch_chunk(first + maker);
    if (MAKERS == 1) fetch_chunk(first + 1);
    for (int step = first; step < last + MAKERS - 1; ++step) {
      const bool is_mine = MAKERS == 1 || ((step - first) & 1) == maker;
      if (is_mine && step < last) make_tiles(step);
      if (MAKERS == 1) make_chunk_pairs(step);
      else if (!is_mine && step > first) make_chunk_pairs(step - 1);
      barrier<TEAMS>();
    }
    barrier<TEAMS>();  // stays until the others have read what it wrote
    return;
  }

  const bool is_map = MAP && team() == 2;
  word(&tops)[2][WARPS] = m.state_tops[team() - 1];
  float state[8][4] = {};  // in units of 2^unit, its columns not yet decayed by the second half of the last chunk
  int unit = 127;
  if (!MAP) read_state(state, start, my);
  if (is_map) set_identity(state, my);
  if (!MAP) y += place.base + (uint64)(first * L + my.g) * place.stride + warp() * 16 + my.q * 2;
  if (!MAP && states) states += ((uint64)head * chunks + first) * N * N + warp() * 16 * N + lane() * 8;
  note_top(tops[first & 1], state);
  for (int i = 0; i < MAKERS; ++i) barrier<TEAMS>();

  for (int chunk = first; chunk < last; ++chunk) {
    const auto& from = m.chunks[chunk % Memory::SLOTS];
    const Facts f = from.facts;
    const int old = unit;
    unit = unit_of_state(tops[chunk & 1], unit, is_map ? 0 : f.k + f.v - 127);
    scale_columns(state, from.scale, two_to(127 + old - unit), my);
    State s;
    pack_state(s, state);
    Square from_state = {}, read_out = {};
    state_times(from_state, s, from.tiles[0]);
    if (!MAP) times_state(read_out, from.tiles[1], s);
    if (!MAP && states) {
      half_bits* out = m.s[chunk & 1][warp()];
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 2; ++i) at(out, (my.g + i * 8) * ROW + j * 8 + my.q * 2) = s[j][i];
      warp_barrier();
      for (int i = 0; i < 4; ++i)
        *(Quad*)(states + i * 4 * N) = *(const Quad*)(out + (i * 4 + lane() / 8) * ROW + lane() % 8 * 8);
      states += N * N;
      if (thread() == 0) units[(uint64)head * chunks + chunk] = two_to(unit);
    }

    // u is in units of 16 · a's · the state's: no sum of 64 products overflows float16
    const float added = two_to(f.k + f.v - unit), erased = two_to(f.a + f.b - 127 + 4);
    word values[4] = {}, x[4], solved[4];
    if (!is_map) load_left_transposed(values, from.tiles[4] + warp() * 16, ROW);
    Square c = {}, u = {};
    load_right_transposed(x, from.pairs[AK], SIDE);
    multiply(c, values, x);
    if (f.documents) mask_columns(from_state, f.documents, opens);
    combine(c, added, from_state);
    as_left(solved, c);
    load_right_transposed(x, from.pairs[T_INVERSE], SIDE);
    multiply(u, solved, x);
    if (!MAP) {
      as_left(solved, u);
      Square through_u = {}, through_v = {};
      load_left(x, from.pairs[RB], SIDE);
      multiply_by_left(through_u, x, solved);
      load_left(x, from.pairs[RK], SIDE);
      multiply_by_left(through_v, x, values);
      if (f.documents) mask_rows<2>(read_out, f.documents, opens);
      for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) c[n][i] = read_out[n][i] + through_u[n][i] * erased + through_v[n][i] * added;
      write_tokens(y, place.stride, T - chunk * L, c, two_to(f.r + unit - 127), my);
      y += L * place.stride;
    }
    as_left(solved, u, erased);
    const word share = pack(added, added);
    for (int i = 0; i < 4; ++i) values[i] = scale_halves(values[i], share);
    if (f.documents) {
      mask_tokens(solved, f.documents, closes);
      mask_tokens(values, f.documents, closes);
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) state[j][i] = 0;
    }
    accumulate(state, solved, from.tiles[2]);
    if (!is_map) accumulate(state, values, from.tiles[3]);
    if (MAP && (chunk + 1 == cut || chunk + 1 == last)) {
      scale_columns(state, from.tail, two_to(unit), my);
      write_state(state, end + (uint64)(cuts.number(chunk) * 2 + is_map) * N * N, my);
      set_identity(state, my, is_map);
      unit = 127, cut = cuts.end(chunk + 1);
    }
    note_top(tops[(chunk + 1) & 1], state);
    barrier<TEAMS>();
  }
  if (MAP) return;
  scale_columns(state, m.chunks[(last - 1) % Memory::SLOTS].tail, two_to(unit), my);
  write_state(state, end, my);
}

struct BackwardMaps {
  half_bits raw[2][7][TILE];  // of the chunk at hand and the next
  struct alignas(16) {
    half_bits tiles[4][TILE], values[2][TILE];      // a', r', b', k'; gy, v
    float flow[WARPS][N];                           // Σ over 16 value rows of state ⊙ its gradient at the chunk's end
    Facts facts;
    int unit;                                       // of the state's gradient
    float s_unit;
  } chunks[3];
  struct alignas(16) {
    half_bits pairs[3][PAIRS];
    float scale[N], mid[N];       // decays of the gradient's columns: the later chunk's first half with this one's second; this one's first
  } steps[2];
  alignas(16) half_bits inverses[4][PAIRS];  // of those at hand and the next two
  alignas(16) word tops[7][WARPS], state_tops[2][2][WARPS];  // exponents
};
struct Backward : BackwardMaps {
  struct alignas(16) {  // decays from the middle to each token's start and the last one's end; to its end, inverted
    float rise[L + 1][N + 8], fall[L][N + 8];
  } decays[3];
  alignas(16) half_bits s[5][N * ROW];       // start states, decayed to the middle
  struct alignas(16) {
    half_bits g[N * ROW];         // the end state's gradient, grown from the middle
    half_bits solved[2][TILE];    // z, u
  } found[2];
  alignas(16) float products[4][L][N + 8];    // gradient ⊙ input of a, r, b, k
  Pair sums[WARPS][N / 2];        // what four tokens add to the gradients of earlier decays
};

/// flow[column] = unit · Σ over the warp's 16 rows of x [16 × 64], each lane's two rows summed before.
DEVICE void write_flow(float* flow, Pair (&x)[8], float unit, const Lane& my) {
#pragma unroll
  for (int half = 4; half; half /= 2) {
    const bool upper = my.g & half;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const Pair keep = upper ? x[j + half] : x[j], send = upper ? x[j] : x[j + half];
      x[j] = keep + Pair{shuffle_xor(send.x, half * 4), shuffle_xor(send.y, half * 4)};
    }
  }
  *(Pair*)(flow + my.g * 8 + my.q * 2) = x[0] * unit;
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
DEVICE void store_transposed(half_bits* tile, const word (&x)[4], const Lane& my) {
  half_bits* to = tile + my.q * 2 * ROW + warp() * 16 + my.g;
  for (int i = 0; i < 4; ++i) {
    half_bits* here = to + i / 2 * 8 * ROW + i % 2 * 8;
    here[0] = (half_bits)x[i], here[ROW] = (half_bits)(x[i] >> 16);
  }
}

/// Chunks from before `last` to `first` of one head. MAP: nothing but, for each piece, what gy sends to its start state,
/// by the second team, and for those from chunk `mapped` on the linear map by the third; `g_starts` holds all of the head's.
template <bool MAP>
DEVICE void backward(byte* memory, const half_bits* r, const half_bits* w, const half_bits* k, const half_bits* v,
                     const half_bits* a, const half_bits* b, const half_bits* gy, const byte* resets,
                     const half_bits* states, const float* units, const half_bits* inverses, const float* ends,
                     const float* g_ends, half_bits* gr, half_bits* gw, half_bits* gk, half_bits* gv, half_bits* ga, half_bits* gb,
                     float* g_starts, int T, int H, int chunks, int head, int first, int last, int mapped, const Cuts& cuts) {
  constexpr int TEAMS = 3;
  Backward& m = *(Backward*)memory;
  const Lane my;
  const Place place = place_of(head, T, H, resets);
  const half_bits* inputs[7] = {r, w, k, v, a, b, gy};
  const uint64 states_before = (uint64)head * chunks;
  int cut = MAP ? cuts.begin(last - 1) : first;

  if (team() == 0) {
    bool flag = false, next_flag = false;
    float s_unit = 1, next_unit = 1;
    const auto fetch_chunk = [&](int chunk) {
      const bool ok = chunk >= first;
      for (int x = R; ok && x <= GY; ++x)
        if (!MAP || (x != V && x != K)) fetch(m.raw[chunk & 1][x], inputs[x], place, chunk);
      if (!MAP && ok) {
        const half_bits* from = states + (states_before + chunk) * N * N + thread() * 8;
        half_bits* to = m.s[chunk % 5] + thread() / 8 * ROW + thread() % 8 * 8;
        for (int i = 0; i < 4; ++i) copy_async(to + i * 16 * ROW, from + i * 16 * N, true);
      }
      if (ok && warp() == T_INVERSE)
        copy_async(m.inverses[chunk & 3] + lane() / 2 * SIDE + lane() % 2 * 8, inverses + (states_before + chunk) * L * L + lane() * 8, true);
      commit_copies();
      flag = next_flag, next_flag = ok && reset_flag(place, chunk);
      s_unit = next_unit;
      if (!MAP && ok) next_unit = units[states_before + chunk];
    };
    fetch_chunk(last - 1);
    fetch_chunk(last - 2);
    Pair mid[2] = {};
    for (int chunk = last - 1; chunk >= first; --chunk) {
      auto& to = m.chunks[chunk % 3];
      auto& step = m.steps[chunk & 1];
      auto& decays = m.decays[chunk % 3];
      auto& raw = m.raw[chunk & 1];
      await_all_but_one();
      note_tops<1 << R | 1 << A | 1 << B | 1 << GY | (MAP ? 0 : 1 << V | 1 << K)>(m.tops, raw);
      const word documents = vote(flag);
      team_barrier(0);

      const Inputs<1 << R | 1 << A | 1 << B | 1 << GY | (MAP ? 0 : 1 << V | 1 << K)> in(raw, my);
      const Facts f = facts_of(m.tops, documents);
      if (thread() == 0) {
        to.facts = f;
        to.s_unit = s_unit;
      }
      const Exponents e(raw[W], my);
      const word rp = power_of_two(254 - f.r), kp = power_of_two(254 - f.k), ap = power_of_two(254 - f.a);
      const word bp = power_of_two(254 - f.b), vp = power_of_two(254 - f.v), yp = power_of_two(254 - f.gy);
      for (int n = 0; n < 2; ++n) {
        const int column = warp() * 16 + n * 8 + my.q * 2;
        const Pair later = MAP && chunk + 1 == cut ? Pair{0, 0} : mid[n];
        mid[n] = {-as_float(shuffle(as_word(e.start[n][0]), my.q)), -as_float(shuffle(as_word(e.start[n][1]), my.q))};
        if (my.g == 7) *(Pair*)(step.scale + column) = exp2(later + Pair{e.end[n][2], e.end[n][3]});
        if (my.g == 7) *(Pair*)(step.mid + column) = exp2(mid[n]);
        if (!MAP && my.g == 0) *(Pair*)&decays.rise[0][column] = exp2(Pair{e.start[n][0], e.start[n][1]});
        for (int i = 0; i < 2; ++i) {
          const int here = my.here + 8 * i * ROW + 8 * n, t = my.g + 8 * i, x = 2 * n + i;
          const Pair end = {e.end[n][2 * i], e.end[n][2 * i + 1]}, rise = exp2(end), fall = exp2(end * -1.f);
          at(to.tiles[0], here) = decayed(in.x[A][x], ap, exp2(Pair{e.start[n][2 * i], e.start[n][2 * i + 1]}));
          at(to.tiles[1], here) = decayed(in.x[R][x], rp, rise);
          at(to.tiles[2], here) = decayed(in.x[B][x], bp, fall);
          at(to.values[0], here) = in_unit(in.x[GY][x], yp);
          if (!MAP) {
            at(to.tiles[3], here) = decayed(in.x[K][x], kp, fall);
            at(to.values[1], here) = in_unit(in.x[V][x], vp);
            *(Pair*)&decays.rise[t + 1][column] = rise;
            *(Pair*)&decays.fall[t][column] = fall;
          }
        }
      }
      if (MAP && chunk + 1 == cut) cut = cuts.begin(chunk);
      team_barrier(0);
      fetch_chunk(chunk - 2);
      if (MAP ? warp() == RB : warp() != T_INVERSE) make_pairs(step.pairs[0], to.tiles[0], documents, my);
      barrier<TEAMS>();
    }
    if (!MAP) barrier<TEAMS>();
    return;
  }

  if (team() == 1 || MAP) {
    const bool is_map = MAP && team() == 2;
    word(&tops)[2][WARPS] = m.state_tops[is_map];
    float g[8][4] = {};  // gradient of the state at the chunk's end, in units of 2^unit, not yet times the later chunk's first half
    int unit = 127;
    if (!MAP) {
      Pair x[8] = {};
      if (g_ends) {
        read_state(g, g_ends, my);
        float end[8][4];
        read_state(end, ends, my);
        for (int j = 0; j < 8; ++j) x[j] = {g[j][0] * end[j][0] + g[j][2] * end[j][2], g[j][1] * end[j][1] + g[j][3] * end[j][3]};
      }
      write_flow(m.chunks[(last - 1) % 3].flow[warp()], x, 1, my);
      gv += place.base + (uint64)my.g * place.stride + warp() * 16 + my.q * 2;
    }
    if (is_map) set_identity(g, my);
    note_top(tops[(last - 1) & 1], g);
    barrier<TEAMS>();

    for (int chunk = last - 1; chunk >= first; --chunk) {
      if (is_map && chunk < mapped) {
        if (chunk > first) barrier<TEAMS>();
        continue;
      }
      auto& from = m.chunks[chunk % 3];
      const auto& step = m.steps[chunk & 1];
      auto& to = m.found[chunk & 1];
      const Facts f = from.facts;
      const int old = unit;
      unit = unit_of_state(tops[chunk & 1], unit, is_map ? 0 : f.r + f.gy - 127);
      scale_columns(g, step.scale, two_to(127 + old - unit), my);
      State gs;
      pack_state(gs, g);
      Square z_state = {};
      state_times(z_state, gs, from.tiles[2]);

      // z in units of 16 · b's · the gradient's, u in units of 16 · a's · the state's
      const float given = two_to(f.r + f.gy - unit), erased = two_to(f.a + f.b - 127 + 4);
      word grads[4] = {}, x[4], solved[4], z_left[4];
      Square c = {}, z = {};
      if (!is_map) load_left_transposed(grads, from.values[0] + warp() * 16, ROW);
      load_right(x, step.pairs[RB], SIDE);
      multiply(c, grads, x);
      if (f.documents) mask_columns(z_state, f.documents, closes);
      combine(c, given, z_state);
      as_left(solved, c);
      load_right(x, m.inverses[chunk & 3], SIDE);
      multiply(z, solved, x);
      if (f.documents)
        for (int j = 0; j < 8; ++j)
          for (int i = 0; i < 4; ++i) g[j][i] = 0;
      as_left(solved, z, erased);
      word shared_grads[4];
      const word share = pack(given, given);
      for (int i = 0; i < 4; ++i) shared_grads[i] = scale_halves(grads[i], share);
      if (f.documents) {
        mask_tokens(solved, f.documents, opens);
        mask_tokens(shared_grads, f.documents, opens);
      }
      accumulate(g, solved, from.tiles[0]);
      if (!is_map) accumulate(g, shared_grads, from.tiles[1]);
      if (MAP && (chunk == cut || chunk == first)) {
        scale_columns(g, step.mid, two_to(unit), my);
        write_state(g, g_starts + (uint64)(cuts.number(chunk) * 2 + is_map) * N * N, my);
        set_identity(g, my, is_map);
        unit = 127, cut = cuts.begin(chunk - 1);
      }
      note_top(tops[(chunk - 1) & 1], g);
      if (!MAP) {
        for (int j = 0; j < 8; ++j)
          for (int i = 0; i < 2; ++i) at(to.g, (warp() * 16 + my.g + i * 8) * ROW + j * 8 + my.q * 2) = gs[j][i];
        if (thread() == 0) from.unit = unit;
        as_left(z_left, z);
        store_transposed(to.solved[0], z_left, my);
        const float s_unit = from.s_unit, k_unit = two_to(f.k), v_unit = two_to(f.v), g_unit = two_to(unit);
        State s;
        for (int i = 0; i < 4; ++i) {
          load_left(x, m.s[chunk % 5] + warp() * 16 * ROW + 16 * i, ROW);
          s[2 * i][0] = x[0], s[2 * i][1] = x[1], s[2 * i + 1][0] = x[2], s[2 * i + 1][1] = x[3];
        }
        Pair flow[8];
        for (int j = 0; j < 8; ++j) {
          const Pair upper = unpack(s[j][0]), lower = unpack(s[j][1]);
          flow[j] = {g[j][0] * upper.x + g[j][2] * lower.x, g[j][1] * upper.y + g[j][3] * lower.y};
        }
        if (chunk > first) write_flow(m.chunks[(chunk - 1) % 3].flow[warp()], flow, g_unit * s_unit, my);

        word values[4];
        load_left_transposed(values, from.values[1] + warp() * 16, ROW);
        Square u_state = {}, q = {}, u = {};
        state_times(u_state, s, from.tiles[0]);
        load_right_transposed(x, step.pairs[AK], SIDE);
        multiply(q, values, x);
        if (f.documents) mask_columns(u_state, f.documents, opens);
        combine(q, k_unit * v_unit / s_unit, u_state);
        as_left(solved, q);
        load_right_transposed(x, m.inverses[chunk & 3], SIDE);
        multiply(u, solved, x);
        as_left(solved, u);
        store_transposed(to.solved[1], solved, my);

        Square v_state = {}, through_z = {}, through_y = {};
        times_state(v_state, from.tiles[3], gs);
        load_left_transposed(x, step.pairs[AK], SIDE);
        multiply_by_left(through_z, x, z_left);
        load_left_transposed(x, step.pairs[RK], SIDE);
        multiply_by_left(through_y, x, grads);
        if (f.documents) mask_rows<2>(v_state, f.documents, closes);
        for (int n = 0; n < 2; ++n)
          for (int i = 0; i < 4; ++i) c[n][i] = v_state[n][i] + through_z[n][i] * erased + through_y[n][i] * given;
        write_tokens(gv + (uint64)chunk * L * place.stride, place.stride, T - chunk * L, c, k_unit * g_unit, my);
      }
      if (!MAP || chunk > first) barrier<TEAMS>();
    }
    if (MAP) return;
    scale_columns(g, m.steps[first & 1].mid, two_to(unit), my);
    write_state(g, g_starts, my);
    return;
  }

  // One gradient a warp: of a, r from (z, gy), (u, v) and the state; of b, k from (u, v), (z, gy) and its gradient.
  const int role = warp();
  const bool is_reader = role < 2;
  half_bits* grad_out = role == 0 ? ga : role == 1 ? gr : role == 2 ? gb : gk;
  grad_out += place.base + (uint64)(lane() / 8) * place.stride + lane() % 8 * 8;
  Pair late[4];  // of w's gradient: what this warp's four tokens add to it
  const auto finish_decays = [&](int chunk) {
    Pair x = {0, 0};
    for (int i = 0; i < WARPS; ++i) x = x + ((const Pair*)m.chunks[chunk % 3].flow[i])[lane()];
    for (int i = warp() + 1; i < WARPS; ++i) x = x + m.sums[i][lane()];
    const int t = chunk * L + warp() * 4;
    word* to = (word*)(gw + place.base + (uint64)t * place.stride) + lane();
    for (int i = 0; i < 4; ++i)
      if (t + i < T) to[i * place.stride / 2] = written(x + late[i]);
  };
  barrier<TEAMS>();
  barrier<TEAMS>();

  for (int chunk = last - 1; chunk >= first; --chunk) {
    auto& from = m.chunks[chunk % 3];
    const auto& found = m.found[chunk & 1];
    const Facts f = from.facts;
    const half_bits* mine = role == 0 ? found.solved[0] : role == 1 ? from.values[0] : role == 2 ? found.solved[1] : from.values[1];
    const half_bits* solved_tile = found.solved[is_reader];  // u or z
    const half_bits* plain_tile = from.values[is_reader];    // v or gy
    const half_bits *state = is_reader ? m.s[chunk % 5] : found.g, *factors = from.tiles[is_reader ? 2 : 0];
    word left[4][4], x[4];
    for (int i = 0; i < 4; ++i) load_left(left[i], mine + 16 * i, ROW);
    float grad[8][4] = {};
    for (int i = 0; i < 4; ++i) accumulate(grad, left[i], state + 16 * i * ROW);
    Square with_solved = {}, with_plain = {};
    tile_products(with_solved, left, solved_tile);
    tile_products(with_plain, left, plain_tile);
    if (f.documents) {
      if (is_reader) mask_rows<8>(grad, f.documents, opens);
      else mask_rows<8>(grad, f.documents, closes);
      mask_documents(with_solved, f.documents, is_reader);
      mask_documents(with_plain, f.documents, is_reader);
    }
    const float s_unit = from.s_unit, g_unit = two_to(from.unit), k_unit = two_to(f.k), v_unit = two_to(f.v);
    as_left(x, with_solved, two_to(f.a + f.b - 127 + 4));
    if (is_reader) keep_lower(x, role == 0 ? my.below : my.upto);
    else keep_upper(x, my.above);
    accumulate(grad, x, factors);
    as_left(x, with_plain, is_reader ? k_unit * v_unit / s_unit : two_to(f.r + f.gy - from.unit));
    if (is_reader) keep_lower(x, role == 0 ? my.below : my.upto);
    else keep_upper(x, my.from);
    accumulate(grad, x, factors + TILE);

    const float a_unit = two_to(f.a), b_unit = two_to(f.b), r_unit = two_to(f.r), y_unit = two_to(f.gy);
    const float z_unit = 16 * b_unit * g_unit, u_unit = 16 * a_unit * s_unit;
    const float out = role == 0 ? z_unit * s_unit : role == 1 ? y_unit * s_unit : role == 2 ? u_unit * g_unit : v_unit * g_unit;
    team_barrier(2);
    {
      const float* decay = (role < 2 ? m.decays[chunk % 3].rise[role] : m.decays[chunk % 3].fall[0]) + my.g * (N + 8) + my.q * 2;
      half_bits* tile = from.tiles[role] + my.g * ROW + my.q * 2;
      float* product = &m.products[role][my.g][my.q * 2];
      for (int i = 0; i < 2; ++i) {
        word inputs[8];
        Pair decays[8];
        for (int j = 0; j < 8; ++j) {  // read before anything is written, as in Inputs
          inputs[j] = at(tile, i * 8 * ROW + j * 8);
          decays[j] = *(const Pair*)(decay + i * 8 * (N + 8) + j * 8) * out;
        }
        for (int j = 0; j < 8; ++j) {
          const Pair value = {grad[j][2 * i], grad[j][2 * i + 1]};
          *(Pair*)(product + i * 8 * (N + 8) + j * 8) = value * unpack(inputs[j]);
          at(tile, i * 8 * ROW + j * 8) = written(value * decays[j]);
        }
      }
    }
    warp_barrier();
    for (int i = 0; i < 4; ++i)
      if (chunk * L + i * 4 + lane() / 8 < T)
        *(Quad*)(grad_out + (uint64)(chunk * L + i * 4) * place.stride) =
            *(const Quad*)(from.tiles[role] + (i * 4 + lane() / 8) * ROW + lane() % 8 * 8);
    team_barrier(2);

    // w enters every exponent at a token's end from its own on, and every one at a start after it
    Pair sum = {0, 0};
    const float from_a = z_unit * s_unit * a_unit, from_r = y_unit * s_unit * r_unit;
    const float from_b = u_unit * g_unit * b_unit, from_k = v_unit * g_unit * k_unit;
    for (int i = 3; i >= 0; --i) {
      const auto product = [&](int x) { return *(const Pair*)&m.products[x][warp() * 4 + i][lane() * 2]; };
      late[i] = sum = sum + product(1) * from_r - product(2) * from_b - product(3) * from_k;
      sum = sum + product(0) * from_a;
    }
    m.sums[warp()][lane()] = sum;
    team_barrier(2);
    finish_decays(chunk);
    if (chunk > first) barrier<TEAMS>();
  }
}

static_assert(sizeof(Forward<1>) <= FORWARD_BYTES && sizeof(Forward<2>) <= FORWARD_FEW_BYTES, "shared memory");
static_assert(sizeof(Backward) <= BACKWARD_BYTES, "shared memory");
static_assert(sizeof(BackwardMaps) <= BACKWARD_MAPS_BYTES, "shared memory");

#define INPUTS const half_bits *r, const half_bits *w, const half_bits *k, const half_bits *v, const half_bits *a, const half_bits *b
#define SHAPE int T, int H, int chunks, int length, int piece

/// What a block of the grid (heads, segments) has: its number, and chunks from first to before last.
struct Segment {
  uint64 square;
  int first, last;
  DEVICE Segment(int chunks, int length)
      : square((uint64)(blockIdx.x * gridDim.y + blockIdx.y) * N * N), first(blockIdx.y * length), last(min(first + length, chunks)) {}
};

/// Grid (heads, segments).
extern "C" __global__ void __launch_bounds__(256, 2)
wkv7_forward(INPUTS, const byte* resets, const float* starts, half_bits* y, float* ends, half_bits* states, float* units, half_bits* inverses, SHAPE) {
  const Segment my(chunks, length);
  forward<false, 1>((byte*)dynamic_shared(), r, w, k, v, a, b, resets, starts + my.square, y, ends + my.square, states, units,
                    inverses, T, H, chunks, blockIdx.x, my.first, my.last, {length, piece});
}

/// The same for at most as many blocks as there are multiprocessors.
extern "C" __global__ void __launch_bounds__(384, 1)
wkv7_forward_few(INPUTS, const byte* resets, const float* starts, half_bits* y, float* ends, half_bits* states, float* units, half_bits* inverses, SHAPE) {
  const Segment my(chunks, length);
  forward<false, 2>((byte*)dynamic_shared(), r, w, k, v, a, b, resets, starts + my.square, y, ends + my.square, states, units,
                    inverses, T, H, chunks, blockIdx.x, my.first, my.last, {length, piece});
}

/// Grid (heads, blocks of `piece` chunks of all segments but the last); maps [heads, pieces, 2, N, N]: what inputs write,
/// then the map S → S P.
extern "C" __global__ void __launch_bounds__(384, 2)
wkv7_forward_maps(INPUTS, const byte* resets, float* maps, SHAPE) {
  const Cuts cuts = {length, piece};
  const int first = blockIdx.y * piece, last = min(first + piece, (chunks - 1) / length * length);
  maps += (uint64)blockIdx.x * (cuts.number(chunks - 1) + 1) * 2 * N * N;
  forward<true, 1>((byte*)dynamic_shared(), r, w, k, v, a, b, resets, nullptr, nullptr, maps, nullptr, nullptr, nullptr, T, H,
                   chunks, blockIdx.x, first, last, cuts);
}

/// Grid (heads, segments).
extern "C" __global__ void __launch_bounds__(384, 1)
wkv7_backward(INPUTS, const half_bits* gy, const byte* resets, const half_bits* states, const float* units,
              const half_bits* inverses, const float* ends, const float* g_ends, half_bits* gr, half_bits* gw, half_bits* gk,
              half_bits* gv, half_bits* ga, half_bits* gb, float* g_starts, SHAPE) {
  const Segment my(chunks, length);
  backward<false>((byte*)dynamic_shared(), r, w, k, v, a, b, gy, resets, states, units, inverses, ends + my.square,
                  g_ends ? g_ends + my.square : nullptr, gr, gw, gk, gv, ga, gb, g_starts + my.square, T, H, chunks, blockIdx.x,
                  my.first, my.last, 0, {length, piece});
}

/// Grid (heads, blocks of `piece` chunks, from the last, of all segments but the first); parts [heads, pieces, 2, N, N]:
/// what gy sends to a piece's start, then, of the last segment only, the map G → G Pᵀ.
extern "C" __global__ void __launch_bounds__(384, 2)
wkv7_backward_maps(INPUTS, const half_bits* gy, const byte* resets, const half_bits* inverses, float* parts, SHAPE) {
  const Cuts cuts = {length, piece};
  const int from = ((chunks - 1) / piece - blockIdx.y) * piece;
  parts += (uint64)blockIdx.x * (cuts.number(chunks - 1) + 1) * 2 * N * N;
  backward<true>((byte*)dynamic_shared(), r, w, k, v, a, b, gy, resets, nullptr, nullptr, inverses, nullptr, nullptr, nullptr,
                 nullptr, nullptr, nullptr, nullptr, nullptr, parts, T, H, chunks, blockIdx.x, max(from, length),
                 min(from + piece, chunks), (chunks - 1) / length * length, cuts);
}

/// Grid (heads, 4): rows of the state. Every segment's start: starts[0] = first, then state → state · P + part over all
/// pieces, and no `first` is zeros; in reverse, from the last segment's end, with Pᵀ. maps, parts: [heads, pieces, 2, N, N].
extern "C" __global__ void __launch_bounds__(128)
wkv7_join(const float* maps, const float* parts, const float* first, float* starts, int reverse, int chunks, int length, int piece) {
  byte* memory = (byte*)dynamic_shared();
  float(&p)[N][N + 1] = *(float(*)[N][N + 1])memory;
  float(&state)[16][N] = *(float(*)[16][N])(memory + sizeof p);
  const Cuts cuts = {length, piece};
  const int column = thread() % N, row = thread() / N * 8, late = (chunks - 1) / length * length;
  const uint64 head = blockIdx.x, rows = blockIdx.y * 16ull * N, pieces = cuts.number(chunks - 1) + 1;
  float x[8];
  for (int i = 0; i < 8; ++i) x[i] = first ? first[head * N * N + rows + (row + i) * N + column] : 0;
  for (int at = reverse ? chunks : 0;;) {
    if (at % length == 0 || at == chunks) {
      const int segment = reverse ? (at - 1) / length : at / length;
      for (int i = 0; i < 8; ++i)
        starts[(head * (late / length + 1) + segment) * N * N + rows + (row + i) * N + column] = x[i];
    }
    if (at == (reverse ? length : late)) return;
    const int begin = reverse ? cuts.begin(at - 1) : at;
    const float* part = parts + (head * pieces + cuts.number(begin)) * 2 * N * N;
    const float* map = maps + (part - parts) + N * N;
    if (reverse && begin >= late) map = part + N * N;  // Pᵀ
    for (int i = thread(); i < N * N; i += 128) {
      const float value = map[i];
      if (reverse && begin < late) p[i % N][i / N] = value;
      else p[i / N][i % N] = value;
    }
    for (int i = 0; i < 8; ++i) {
      state[row + i][column] = x[i];
      x[i] = part[rows + (row + i) * N + column];
    }
    barrier<1>();
    for (int j = 0; j < N; ++j)
      for (int i = 0; i < 8; ++i) x[i] += state[row + i][j] * p[j][column];
    barrier<1>();
    at = reverse ? begin : cuts.end(at);
  }
}
