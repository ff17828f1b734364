// Products with many rows of x by AMX: 16 rows x 256 columns of w are widened once to bfloat16 and meet 16 rows of x in tiles,
// whose sums are float32; with 12 to 16 rows of x, for which that is not worth while, the weights of Q8 and Q4 meet x as bytes. Included by tiles.h, inside the namespace of the instruction set.
//
// Weights of 4 to 8 bits are rounded to 8 bits of mantissa with their scale, and so is x: 0.2 % of each number, where the rounding
// of x to 127 steps of the largest of 32 costs two to three times as much. Weights of 16 bits, panels and their x come in two parts
// that have 16 bits of mantissa together; of four products the one of both lower parts is left out.

enum Parts { ONE_PART, TWO_PARTS, THREE_PRODUCTS };  // x and w once; x twice (bfloat16 is exact); both twice

template <int T>
constexpr int parts_of() {
  return T == BF16 ? TWO_PARTS : T == F16 || T == F32 ? THREE_PRODUCTS : ONE_PART;
}

// 16 rows x 256 columns: vectors of 16 rows x 2 columns
struct alignas(64) Halves {
  uint16_t high[8 * 16][32], low[8 * 16][32];
};

constexpr int64_t TOGETHER = 4;  // panels that meet the same tile of x
static_assert(TOGETHER * sizeof(Halves) <= PANEL_FLOATS * sizeof(float), "room for four");
static_assert(TOGETHER * PANEL == MOST_ROWS, "all panels of one product");

#if !defined(TILE_LOAD)
#define TILE_LOAD(t, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(from), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(t, to) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(to), "r"((int64_t)64) : "memory")
#define TILE_PRODUCT(sums, x, w) __asm__ volatile("tdpbf16ps %%tmm" #w ", %%tmm" #x ", %%tmm" #sums : : : "memory")
#define TILE_PRODUCT_BYTES(sums, x, w) __asm__ volatile("tdpbssd %%tmm" #w ", %%tmm" #x ", %%tmm" #sums : : : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : : : "memory")
#define TILES_BEGIN(config) __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory")
#define TILES_END() __asm__ volatile("tilerelease" : : : "memory")
#endif

// Sums in tiles 0 to 3, x in 4 and 5, w in 6 and 7: of 32 columns, two bytes each or one
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_rows[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  constexpr explicit TileConfig(int bytes) {
    bytes_of_rows[4] = bytes_of_rows[5] = (uint16_t)(32 * bytes);
    rows[6] = rows[7] = (uint8_t)(8 * bytes);
  }
};

struct WithTiles {  // while a thread works
  explicit WithTiles(int bytes) {
    const TileConfig config(bytes);
    TILES_BEGIN(config);
  }
  ~WithTiles() { TILES_END(); }
};

// sums [G][16, 16] (lds numbers apart) += what `blocks` blocks of 32 columns give, of 16 rows of x that lie `stride` bytes apart
template <int KIND, int G>
inline void tile_of_16(const Halves* w, int64_t blocks, const XGroup* x, int64_t stride, float* sums, int64_t lds) {
  TILE_LOAD(0, sums, 64);
  if constexpr (G > 1) TILE_LOAD(1, sums + lds, 64);
  if constexpr (G > 2) TILE_LOAD(2, sums + 2 * lds, 64);
  if constexpr (G > 3) TILE_LOAD(3, sums + 3 * lds, 64);
  for (int64_t b = 0; b < blocks; b++) {
    TILE_LOAD(4, x->high + b * BLOCK, stride);
    if constexpr (KIND != ONE_PART) TILE_LOAD(5, x->low + b * BLOCK, stride);
#define PANEL_STEP(g, even)                                                \
  if constexpr (G > g) {                                                   \
    TILE_LOAD(even, w[g].high[16 * b], 64);                                \
    TILE_PRODUCT(g, 4, even);                                              \
    if constexpr (KIND != ONE_PART) TILE_PRODUCT(g, 5, even);              \
  }
    PANEL_STEP(0, 6) PANEL_STEP(1, 7) PANEL_STEP(2, 6) PANEL_STEP(3, 7)
#undef PANEL_STEP
#define PANEL_STEP(g, even)                                                \
  if constexpr (G > g && KIND == THREE_PRODUCTS) {                         \
    TILE_LOAD(even, w[g].low[16 * b], 64);                                 \
    TILE_PRODUCT(g, 4, even);                                              \
  }
    PANEL_STEP(0, 6) PANEL_STEP(1, 7) PANEL_STEP(2, 6) PANEL_STEP(3, 7)
#undef PANEL_STEP
  }
  TILE_STORE(0, sums);
  if constexpr (G > 1) TILE_STORE(1, sums + lds);
  if constexpr (G > 2) TILE_STORE(2, sums + 2 * lds);
  if constexpr (G > 3) TILE_STORE(3, sums + 3 * lds);
}

template <int KIND, int G>
inline void tiles_of(const Halves* w, int64_t blocks, const XGroup* x, int64_t ldq, int64_t rows, float* sums) {
  const int64_t lds = whole_tiles(rows) * PANEL;
  for (int64_t m = 0; m < rows; m += PANEL) {
    tile_of_16<KIND, G>(w, blocks, x + m * ldq, ldq * (int64_t)sizeof(XGroup), sums + m * PANEL, lds);
  }
}

// Panels `first`..`last` (rows of w, at most four panels): widen(row, group, Halves&) and the tiles; inputs(group): 256 columns of
// x, of row after row `ldq` apart
template <int KIND, class X, class F>
inline void half_panels(const Product& p, int64_t first, int64_t last, int64_t rows, float* local, X inputs, int64_t ldq, F widen) {
  const WithTiles tiles(2);
  Halves* w = (Halves*)local;
  const int64_t panels = (last - first + PANEL - 1) / PANEL, lds = whole_tiles(rows) * PANEL;
  float* sums = local + PANEL_FLOATS;
  __builtin_memset(sums, 0, panels * lds * sizeof(float));
  for (int64_t group = 0; group < groups_of(p.w->cols); group++) {
    const int64_t blocks = blocks_of_group(p.w->cols, group);
    const XGroup* x = inputs(group);
    for (int64_t i = 0; i < panels; i++) widen(first + i * PANEL, group, w[i]);
    switch (panels) {
      case 1: tiles_of<KIND, 1>(w, blocks, x, ldq, rows, sums); break;
      case 2: tiles_of<KIND, 2>(w, blocks, x, ldq, rows, sums); break;
      case 3: tiles_of<KIND, 3>(w, blocks, x, ldq, rows, sums); break;
      default: tiles_of<KIND, 4>(w, blocks, x, ldq, rows, sums); break;
    }
  }
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t n = first; n < last; n += PANEL) {
      const int64_t count = last - n < PANEL ? last - n : PANEL;
      put(p, m, n, count, sums + (n - first) / PANEL * lds + m * PANEL);
    }
  }
}

template <int KIND, class F>
inline void half_panels(const Product& p, int64_t first, int64_t last, int64_t rows, float* local, F widen) {
  half_panels<KIND>(p, first, last, rows, local, [&](int64_t group) { return p.q + group; }, groups_of(p.w->cols), widen);
}

// Widening ---------------------------------------------------------------------------------------------------------------

inline __m512i rounded(__m512 x) {  // bfloat16 in the upper halves
  return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
}
inline __m512i two_columns(__m512i first, __m512i second) {  // their upper halves, side by side
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
}

// Columns 4 j to 4 j + 3 of 16 rows, unsigned numbers in bytes u: u scale + start. A number is put into the mantissa of 2^15 (BITS
// = 8) or, with less to round in start, of 2^7 (numbers of at most 6 bits); start takes that back as well.
template <int BITS>
inline void put_quads(__m512i u, __m512 scale, __m512 start, uint16_t (*to)[32]) {
  constexpr bool small = BITS < 8;
  const __m512i number = _mm512_set1_epi32(small ? 0x3f0000 : 0xff00), magic = _mm512_set1_epi32(small ? 0x43000000 : 0x47000000);
  const __m512i left = _mm512_slli_epi32(u, 8), right = _mm512_srli_epi32(u, 8);
  const __m512i at[4] = {small ? _mm512_slli_epi32(u, 16) : left, small ? left : u, small ? u : right,
                         small ? right : _mm512_srli_epi32(u, 16)};
  __m512i f[4];
  for (int i = 0; i < 4; i++) {
    const __m512i whole = _mm512_ternarylogic_epi32(at[i], number, magic, 0xea);  // at & number | magic
    f[i] = rounded(_mm512_fmadd_ps(_mm512_castsi512_ps(whole), scale, start));
  }
  _mm512_store_si512(to[0], two_columns(f[0], f[1]));
  _mm512_store_si512(to[1], two_columns(f[2], f[3]));
}

// -(2^15 or 2^7 + offset) scale, for Q8 and Q4 without error, since a scale has 11 bits of mantissa
template <int BITS>
inline __m512 start_of(__m512 scale, float offset) {
  return _mm512_mul_ps(scale, _mm512_set1_ps(-((BITS < 8 ? 128 : 32768) + offset)));
}

// A packed group of 16 rows, `blocks` blocks of 32 columns
template <int T>
void widen_packed(const uint8_t* p, int64_t blocks, Halves& w) {
  constexpr bool small = Packed<T>::numbers == BLOCK;
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* header = small ? p + b * Packed<T>::size : p;
    const uint8_t* numbers = header + Packed<T>::header + (small ? 0 : b * Packed<T>::part);
    const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)header));
    uint16_t(*to)[32] = w.high + 16 * b;
    if (T == Q8) {
      const __m512 start = start_of<8>(d, 128);
      for (int j = 0; j < 8; j++) {
        put_quads<8>(_mm512_xor_si512(_mm512_loadu_si512(numbers + j * 64), _mm512_set1_epi8((char)128)), d, start, to + 2 * j);
      }
      continue;
    }
    __m512 scale[2] = {d, d}, start[2];  // of columns 0-15 and 16-31
    if (T == Q4) {
      start[0] = start[1] = start_of<4>(d, 8);
    } else {
      const __m256i stored = _mm256_loadu_si256((const __m256i*)(header + (T == Q6_K ? 32 + b * 32 : 64 + b / 2 * 32)));
      const __m512i pair = T == Q6_K ? _mm512_cvtepi8_epi16(stored) : _mm512_cvtepu8_epi16(stored);
      scale[0] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pair, 16), 16)));
      scale[1] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(pair, 16)));
      if (T != Q6_K) scale[b % 2 ? 0 : 1] = scale[b % 2];
      start[0] = start_of<6>(scale[0], T == Q6_K ? 32 : 0), start[1] = start_of<6>(scale[1], T == Q6_K ? 32 : 0);
      if (T != Q6_K) {
        const __m128i minima = _mm_loadu_si128((const __m128i*)(header + 192 + b * GROUP));
        const __m512 least = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(header + 32))),
                                           _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(minima)));
        start[0] = start[1] = _mm512_sub_ps(start[0], least);
      }
    }
    for (int j = 0; j < 4; j++) {
      __m512i low, high;
      read_bits<T>(numbers, j, low, high);
      put_quads<6>(low, scale[0], start[0], to + 2 * j);
      put_quads<6>(high, scale[1], start[1], to + 2 * j + 8);
    }
  }
}

// 16 rows in a block format, `stride` bytes apart
template <int T>
void widen_rows(const uint8_t* p, int64_t stride, int64_t blocks, Halves& w) {
  constexpr int KERNEL = T == Q8_0 ? Q8 : T == Q4_0 ? Q4 : T, NUMBERS = Block<T>::numbers;
  uint8_t packed[8 * BLOCK / packed_numbers(KERNEL) * packed_bytes(KERNEL)];
  for (int64_t u = 0; u < blocks * BLOCK / NUMBERS; u++) {
    repack<T>(p + u * Block<T>::size, stride, packed + u * Packed<KERNEL>::size);
  }
  widen_packed<KERNEL>(packed, blocks, w);
}

// Two columns of 16 rows in 16 bits (the first in the low halves): the parts of each
template <int T>
inline void put_words(__m512i v, uint16_t* high, uint16_t* low) {
  if (T == BF16) {
    _mm512_store_si512(high, v);
    return;
  }
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  const __m512 f[2] = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)))};
  __m512i h[2], l[2];
  for (int i = 0; i < 2; i++) {
    h[i] = _mm512_and_si512(rounded(f[i]), upper);
    l[i] = rounded(_mm512_sub_ps(f[i], _mm512_castsi512_ps(h[i])));
  }
  _mm512_store_si512(high, two_columns(h[0], h[1]));
  _mm512_store_si512(low, two_columns(l[0], l[1]));
}

// Up to 16 rows of 16-bit numbers, `stride` bytes apart; the results of those that are not there are nobody's
template <int T>
void widen_plain(const char* p, int64_t stride, int64_t height, int64_t blocks, Halves& w) {
  for (int64_t b = 0; b < blocks; b++, p += 64) {
    __m512i v[16];
    for (int64_t r = 0; r < 16; r++) {
      v[r] = r < height ? _mm512_loadu_si512(p + r * stride) : _mm512_setzero_si512();
      __builtin_prefetch(p + r * stride + 512);
    }
    transpose16(v);
    for (int i = 0; i < 16; i++) put_words<T>(v[i], w.high[16 * b + i], w.low[16 * b + i]);
  }
}

// Lines of 16 outputs, `size` bytes apart: 32 of them are a block
template <int T>
void widen_lines(const char* p, int64_t size, int64_t blocks, Halves& w) {
  for (int64_t i = 0; i < 16 * blocks; i++, p += 2 * size) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + size)));
    put_words<T>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)), w.high[i], w.low[i]);
  }
}

// Bytes: few rows of x -----------------------------------------------------------------------------------------------------

template <int T>
constexpr bool by_bytes(int64_t rows) {
  return rows >= 12 && rows <= 16 && (T == Q8 || T == Q4);
}

// The numbers of a packed block of 16 rows as signed bytes, 8 vectors of 16 rows x 4 columns: where they lie, or in `to`
template <int T>
inline const uint8_t* bytes_of(const uint8_t* numbers, uint8_t (*to)[64]) {
  if (T == Q8) return numbers;
  const __m512i fifteen = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  for (int j = 0; j < 4; j++) {
    const __m512i both = _mm512_loadu_si512(numbers + j * 64);
    _mm512_store_si512(to[j], _mm512_sub_epi8(_mm512_and_si512(both, fifteen), eight));
    _mm512_store_si512(to[j + 4], _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen), eight));
  }
  return to[0];
}

// sums [16, 16] += what `blocks` blocks of a packed group of 16 rows give, at most 8, of 16 rows of x that lie ldq apart
template <int T>
__attribute__((noinline)) void byte_tile(const uint8_t* w, int64_t blocks, const XGroup* x, int64_t ldq, float* sums) {
  const int64_t stride = ldq * (int64_t)sizeof(XGroup);
  alignas(64) uint8_t numbers[4][8][64];
  alignas(64) int32_t dots[4][16][16];
  __m512 acc[16];
#pragma GCC unroll 16
  for (int m = 0; m < 16; m++) acc[m] = _mm512_load_ps(sums + m * PANEL);
  for (int64_t first = 0; first < blocks; first += 4, w += 4 * Packed<T>::size) {
    const int64_t count = blocks - first < 4 ? blocks - first : 4;
#define BLOCK_STEP(i, xs, ws)                                                                        \
  if (i < count) {                                                                                   \
    const uint8_t* at = bytes_of<T>(w + i * Packed<T>::size + Packed<T>::header, numbers[i]);        \
    TILE_ZERO(i);                                                                                    \
    TILE_LOAD(xs, x->q + (first + i) * BLOCK, stride);                                               \
    TILE_LOAD(ws, at, 64);                                                                           \
    TILE_PRODUCT_BYTES(i, xs, ws);                                                                   \
  }
    BLOCK_STEP(0, 4, 6) BLOCK_STEP(1, 5, 7) BLOCK_STEP(2, 4, 6) BLOCK_STEP(3, 5, 7)
#undef BLOCK_STEP
    TILE_STORE(0, dots[0]);
    if (count > 1) TILE_STORE(1, dots[1]);
    if (count > 2) TILE_STORE(2, dots[2]);
    if (count > 3) TILE_STORE(3, dots[3]);
    for (int64_t i = 0; i < count; i++) {
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(w + i * Packed<T>::size)));
#pragma GCC unroll 16
      for (int m = 0; m < 16; m++) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x[m * ldq].scale[first + i]));
        acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots[i][m])), both, acc[m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < 16; m++) _mm512_store_ps(sums + m * PANEL, acc[m]);
}

// Panels `first`..`last`, at most four; packed(group, w, room): sets w[i] to 256 columns of the 16 rows of panel i as they lie in
// a packed group, there or in `room`, which has space for all
template <int T, class F>
inline void byte_panels(const Product& p, int64_t first, int64_t last, int64_t rows, float* local, F packed) {
  const WithTiles tiles(1);
  const int64_t ldq = groups_of(p.w->cols), lds = whole_tiles(rows) * PANEL, panels = (last - first + PANEL - 1) / PANEL;
  float* sums = local;
  uint8_t* room = (uint8_t*)(local + HALVED * MOST_ROWS);
  __builtin_memset(sums, 0, panels * lds * sizeof(float));
  for (int64_t group = 0; group < ldq; group++) {
    const uint8_t* w[TOGETHER];
    packed(group, w, room);
    for (int64_t i = 0; i < panels; i++) {
      for (int64_t m = 0; m < rows; m += PANEL) {
        byte_tile<T>(w[i], blocks_of_group(p.w->cols, group), p.q + m * ldq + group, ldq, sums + i * lds + m * PANEL);
      }
    }
  }
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t n = first; n < last; n += PANEL) {
      const int64_t count = last - n < PANEL ? last - n : PANEL;
      put(p, m, n, count, sums + (n - first) / PANEL * lds + m * PANEL);
    }
  }
}

// Low-rank maps: panels of plain numbers, and x as it is, brought into parts here. Whole blocks of columns
template <int T>
void tiled_panel(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  const int64_t cols = p.w->cols, bytes = offset<T>(PANEL * cols);
  XGroup* x = (XGroup*)(local + PANEL_FLOATS + whole_tiles(rows) * MOST_ROWS);
  const auto inputs = [&](int64_t group) {
    const int64_t n = blocks_of_group(cols, group) * BLOCK;
    for (int64_t m = 0; m < rows; m++) into_parts(p.x + m * p.ldx + group * DEPTH, n, x + m, 0);
    return x;
  };
  half_panels<parts_of<T>()>(p, first, last, rows, local, inputs, 1, [&](int64_t n, int64_t group, Halves& w) {
    const char* from = (const char*)p.w->data + n / PANEL * bytes + offset<T>(PANEL * DEPTH * group);
    widen_lines<T>(from, 2 * PANEL, blocks_of_group(cols, group), w);
  });
}
