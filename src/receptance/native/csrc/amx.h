// Products with many rows of x by AMX. Included by tiles.h, inside the namespace of the instruction set.
//
// Tiles multiply 16 rows by 16 rows of 32 columns (bfloat16, sums in float32) or of 32 columns in bytes. The first operand has its rows
// as they lie, the second four bytes of 16 rows side by side. So:
// - packed weights, bands, panels and lines, in that order already, are the second operand, and x, row by row, is the first;
// - rows of w as they lie (float16, bfloat16, Q8_0) are the first, and x is brought into tiles before, in a stage of its own.
//
// From 32 rows of x on, and for weights of 16 bits from 4 on, x and w are bfloat16. Weights of 4 to 8 bits are rounded to 8 bits of
// mantissa with their scale, and so is x: 0.2 % of each number, where the rounding of x to 127 steps of the largest of 32 costs two to
// three times as much. Weights of 16 bits, panels and their x come in two parts that have 16 bits of mantissa together; of four
// products the one of both lower parts is left out. With fewer rows, weights of 8 and 4 bits meet x as bytes.

enum Parts { ONE_PART, TWO_PARTS, THREE_PRODUCTS };  // x and w once; x twice (bfloat16 is exact); both twice

template <int T>
constexpr int parts_of() {
  return T == BF16 ? TWO_PARTS : T == F16 || T == F32 ? THREE_PRODUCTS : ONE_PART;
}

// 16 rows x 256 columns: vectors of 16 rows x 2 columns
struct alignas(64) Halves {
  uint16_t high[8 * 16][32], low[8 * 16][32];
};

// 32 columns of 16 rows of x as the second operand: vectors of 16 rows x 2 columns, in two parts. They lie where XGroups would
struct alignas(64) XTile {
  uint16_t high[16][32], low[16][32];
};

// The same as bytes: vectors of 16 rows x 4 columns, and the rows' scales
struct alignas(64) XBytes {
  int8_t q[8][64];
  float scale[PANEL];
};
static_assert(sizeof(XTile) * 8 <= sizeof(XGroup) * PANEL && sizeof(XBytes) <= sizeof(XTile), "room for them");

constexpr int64_t TOGETHER = 4;  // panels that meet the same tile of x
static_assert((PANEL * MOST_ROWS) * sizeof(float) + 3 * TOGETHER * 8 * Q8_BYTES <= PANEL_FLOATS * sizeof(float), "byte_panels");
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

// Sums in tiles 0 to 3, the first operand in 4 and 5, the second in 6 and 7: of 32 columns, two bytes each (all are alike) or one
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

// Where a block of 32 columns of 16 rows of x lies in memory: bytes from row to row, from the upper to the lower part, and from
// block to block
struct InGroups {
  int64_t stride;
  static constexpr int64_t low = offsetof(XGroup, low) - offsetof(XGroup, high), block = 2 * BLOCK;
};
struct InTiles {
  static constexpr int64_t stride = 64, low = sizeof(XTile) / 2, block = sizeof(XTile);
};

// sums [G][16, 16] (lds numbers apart) += what `blocks` blocks of 32 columns give, of 16 rows of x; [x, w], or if x is in tiles [w, x]
template <int KIND, int G, class In>
inline void tile_of_16(const Halves* w, int64_t blocks, const char* x, In in, float* sums, int64_t lds) {
  constexpr bool turned = std::is_same<In, InTiles>::value;
  TILE_LOAD(0, sums, 64);
  if constexpr (G > 1) TILE_LOAD(1, sums + lds, 64);
  if constexpr (G > 2) TILE_LOAD(2, sums + 2 * lds, 64);
  if constexpr (G > 3) TILE_LOAD(3, sums + 3 * lds, 64);
  for (int64_t b = 0; b < blocks; b++, x += In::block) {
    TILE_LOAD(4, x, in.stride);
    if constexpr (KIND != ONE_PART) TILE_LOAD(5, x + In::low, in.stride);
#define MULTIPLY(g, xs, ws)                           \
  if constexpr (turned) { TILE_PRODUCT(g, ws, xs); }  \
  else { TILE_PRODUCT(g, xs, ws); }
#define PANEL_STEP(g, even)                                                \
  if constexpr (G > g) {                                                   \
    TILE_LOAD(even, w[g].high[16 * b], 64);                                \
    MULTIPLY(g, 4, even)                                                   \
    if constexpr (KIND != ONE_PART) { MULTIPLY(g, 5, even) }               \
  }
    PANEL_STEP(0, 6) PANEL_STEP(1, 7) PANEL_STEP(2, 6) PANEL_STEP(3, 7)
#undef PANEL_STEP
#define PANEL_STEP(g, even)                                                \
  if constexpr (G > g && KIND == THREE_PRODUCTS) {                         \
    TILE_LOAD(even, w[g].low[16 * b], 64);                                 \
    MULTIPLY(g, 4, even)                                                   \
  }
    PANEL_STEP(0, 6) PANEL_STEP(1, 7) PANEL_STEP(2, 6) PANEL_STEP(3, 7)
#undef PANEL_STEP
#undef MULTIPLY
  }
  TILE_STORE(0, sums);
  if constexpr (G > 1) TILE_STORE(1, sums + lds);
  if constexpr (G > 2) TILE_STORE(2, sums + 2 * lds);
  if constexpr (G > 3) TILE_STORE(3, sums + 3 * lds);
}

// x: of each 16 rows, `apart` bytes from the 16 before
template <int KIND, int G, class In>
inline void tiles_of(const Halves* w, int64_t blocks, const char* x, int64_t apart, In in, int64_t rows, float* sums) {
  const int64_t lds = whole_tiles(rows) * PANEL;
  for (int64_t m = 0; m < rows; m += PANEL) tile_of_16<KIND, G>(w, blocks, x + m / PANEL * apart, in, sums + m * PANEL, lds);
}

// `panels` panels, at most four
template <int KIND, class In>
inline void tiles_of(int64_t panels, const Halves* w, int64_t blocks, const char* x, int64_t apart, In in, int64_t rows, float* sums) {
  switch (panels) {
    case 1: tiles_of<KIND, 1>(w, blocks, x, apart, in, rows, sums); break;
    case 2: tiles_of<KIND, 2>(w, blocks, x, apart, in, rows, sums); break;
    case 3: tiles_of<KIND, 3>(w, blocks, x, apart, in, rows, sums); break;
    default: tiles_of<KIND, 4>(w, blocks, x, apart, in, rows, sums); break;
  }
}

// Panels `first`..`last` (rows of w, at most four panels): widen(group, Halves*) of all of them, and the tiles; inputs(group): 256
// columns of x, of row after row `ldq` apart
template <int KIND, class X, class F>
inline void half_panels(const Product& p, int64_t first, int64_t last, int64_t rows, float* local, X inputs, int64_t ldq, F widen) {
  const WithTiles tiles(2);
  Halves* w = (Halves*)local;
  const int64_t panels = (last - first + PANEL - 1) / PANEL, lds = whole_tiles(rows) * PANEL;
  const InGroups in = {ldq * (int64_t)sizeof(XGroup)};
  float* sums = local + PANEL_FLOATS;
  __builtin_memset(sums, 0, panels * lds * sizeof(float));
  for (int64_t group = 0; group < groups_of(p.w->cols); group++) {
    const int64_t blocks = blocks_of_group(p.w->cols, group);
    const XGroup* x = inputs(group);
    widen(group, w);
    tiles_of<KIND>(panels, w, blocks, (const char*)x->high, PANEL * in.stride, in, rows, sums);
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
void widen_packed(const uint8_t* p, int64_t blocks, Halves& w, int64_t) {
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

// Two vectors of 16 numbers of 16 bits, side by side: the upper parts (the first in the low halves), and what they leave over
template <int T>
inline void put_words(__m256i first, __m256i second, uint16_t* high, uint16_t* low) {
  if (T == BF16) {
    _mm512_store_si512(high, _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16)));
    return;
  }
  const __m512i upper = _mm512_set1_epi32(0xffff0000);  // cut off: what is left over has three bits
  const __m512 a = _mm512_cvtph_ps(first), b = _mm512_cvtph_ps(second);
  const __m512i ai = _mm512_castps_si512(a), bi = _mm512_castps_si512(b);
  const __m512 rest_a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(ai, upper)));
  const __m512 rest_b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(bi, upper)));
  _mm512_store_si512(high, two_columns(ai, bi));
  _mm512_store_si512(low, two_columns(_mm512_castps_si512(rest_a), _mm512_castps_si512(rest_b)));
}

// Lines of outputs, `size` bytes apart: 32 of them are a block. Panel after panel lies `apart` bytes further on. Lines of a large
// matrix are in different pages, so that no processor sees them coming
template <int T>
void widen_lines(const char* p, int64_t size, int64_t blocks, int64_t panels, int64_t apart, Halves* w) {
  for (int64_t i = 0; i < 16 * blocks; i++, p += 2 * size) {
    for (int64_t n = 0; n < panels; n++) {
      const char* at = p + n * apart;
      if (n % 2 == 0) __builtin_prefetch(at + 32 * size), __builtin_prefetch(at + 33 * size);
      put_words<T>(_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)(at + size)), w[n].high[i], w[n].low[i]);
    }
  }
}

// Rows of 16 bits as they lie: first operand of products whose second is x in tiles ------------------------------------------

// The order of columns in a tile is that of pairs (j, j + 16), which two loads give; numbers that need no widening keep theirs
template <int T>
inline void put_row(const char* p, uint16_t* high, uint16_t* low) {
  if (T == BF16) _mm512_store_si512(high, _mm512_loadu_si512(p));
  else put_words<T>(_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32)), high, low);
}

// A block of Q8_0, rounded to 8 bits of mantissa with its scale
inline void put_row_of_bytes(const char* p, uint16_t* high) {
  const __m512 scale = _mm512_set1_ps(half_to_float(read<uint16_t>(p)));
  const auto half = [&](const char* at) {
    return rounded(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at))), scale));
  };
  _mm512_store_si512(high, two_columns(half(p + 2), half(p + 18)));
}

// 32 columns of `count` rows of x, at most 16; the others are zero
template <int T>
void fill_tile(const float* x, int64_t ldx, int64_t count, XTile& to) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  __m512i high[16], low[16];
  for (int64_t r = 0; r < 16; r++) {
    __m512i h[2] = {}, l[2] = {};
    for (int i = 0; r < count && i < 2; i++) {
      const __m512 v = _mm512_loadu_ps(x + r * ldx + 16 * i);
      h[i] = _mm512_and_si512(rounded(v), upper);
      l[i] = rounded(_mm512_sub_ps(v, _mm512_castsi512_ps(h[i])));
    }
    if (T == BF16) {
      const auto in_order = [](const __m512i* v) {
        const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(v[0], 16)), b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(v[1], 16));
        return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
      };
      high[r] = in_order(h), low[r] = in_order(l);
    } else {
      high[r] = two_columns(h[0], h[1]), low[r] = two_columns(l[0], l[1]);
    }
  }
  transpose16(high);
  transpose16(low);
  for (int i = 0; i < 16; i++) {
    _mm512_store_si512(to.high[i], high[i]);
    _mm512_store_si512(to.low[i], low[i]);
  }
}

// Tickets of 256 columns of 16 rows
inline int64_t tickets_of_tiles(const Matrix& w, int64_t rows) { return whole_tiles(rows) / PANEL * groups_of(w.cols); }

inline void fill_bytes(const float* x, int64_t ldx, int64_t count, XBytes& to) {
  XGroup group;
  for (int64_t r = 0; r < PANEL; r++) {
    if (r < count) quantise_block(x + r * ldx, group, 0, false);
    else __builtin_memset(group.q, 0, BLOCK);
    to.scale[r] = r < count ? group.scale[0] : 0;
    for (int i = 0; i < 8; i++) __builtin_memcpy(to.q[i] + 4 * r, group.q + 4 * i, 4);
  }
}

inline void fill_tiles(const Product& p, int64_t rows, int64_t ticket) {
  const int64_t groups = groups_of(p.w->cols), m = ticket / groups * PANEL, group = ticket % groups;
  XTile* to = (XTile*)p.q + m / PANEL * (p.w->cols / BLOCK) + group * 8;
  const float* x = p.x + m * p.ldx + group * DEPTH;
  const int64_t count = rows - m < PANEL ? rows - m : PANEL;
  for (int64_t b = 0; b < blocks_of_group(p.w->cols, group); b++) {
    if (p.w->type == Q8_0 && rows <= PANEL) fill_bytes(x + b * BLOCK, p.ldx, count, ((XBytes*)p.q)[group * 8 + b]);
    else if (p.w->type == BF16) fill_tile<BF16>(x + b * BLOCK, p.ldx, count, to[b]);
    else fill_tile<F16>(x + b * BLOCK, p.ldx, count, to[b]);
  }
}

// Results of 16 rows of w from n on: sums [16, 16] of rows of x from m on
inline void put_turned(const Product& p, int64_t m, int64_t rows, int64_t n, int64_t last, const float* sums) {
  __m512i v[16];
  alignas(64) float y[16];
  for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(sums + i * PANEL);
  transpose16(v);
  for (int64_t i = 0; i < 16 && m + i < rows; i++) {
    _mm512_store_si512(y, v[i]);
    put(p, m + i, n, last - n < PANEL ? last - n : PANEL, y);
  }
}

// Up to 16 rows of x: while 32 columns of 16 rows of w are widened, those two before them meet x. What is stored on the way lies
// within 4 KB, as in byte_panels
template <int T>
void few_tiled_rows(const Product& p, int64_t first, int64_t last, int64_t rows) {
  const WithTiles tiles(2);
  const int64_t stride = 2 * p.w->cols, blocks = p.w->cols / BLOCK, total = (last - first + PANEL - 1) / PANEL * blocks;
  const XTile* x = (const XTile*)p.q;
  const char* data = (const char*)p.w->data;
  struct alignas(64) {
    uint16_t high[16][32], low[16][32];
  } widened[2];
  alignas(64) float sums[3][16 * PANEL];
  int64_t b = 0, n = first, column = 0, row = first;  // of the block that meets x, and of the one that is widened
  for (int64_t i = 0; i < total + 2; i++) {
    if (i >= 2) {
      if (b == 0) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (T == F16) TILE_ZERO(2);
      }
      TILE_LOAD(4, x[b].high, 64);
      TILE_LOAD(5, x[b].low, 64);
      if (T == BF16 && n + PANEL <= last) TILE_LOAD(6, data + n * stride + b * 64, stride);  // as it lies
      else TILE_LOAD(6, widened[i % 2].high, 64);
      TILE_PRODUCT(0, 6, 4);
      TILE_PRODUCT(1, 6, 5);
      if (T == F16) {
        TILE_LOAD(7, widened[i % 2].low, 64);
        TILE_PRODUCT(2, 7, 4);
      }
      if (++b == blocks) {
        TILE_STORE(0, sums[0]);
        TILE_STORE(1, sums[1]);
        if (T == F16) TILE_STORE(2, sums[2]);
        for (int j = 0; j < 16 * PANEL; j += 16) {
          __m512 all = _mm512_add_ps(_mm512_load_ps(sums[0] + j), _mm512_load_ps(sums[1] + j));
          if (T == F16) all = _mm512_add_ps(all, _mm512_load_ps(sums[2] + j));
          _mm512_store_ps(sums[0] + j, all);
        }
        put_turned(p, 0, rows, n, last, sums[0]);
        b = 0, n += PANEL;
      }
    }
    if (i < total) {
      const char* from = data + row * stride + column * 64;
      const int64_t ahead = column + 8 < blocks ? 512 : 512 + (PANEL - 1) * stride;  // there, the next rows
      for (int64_t r = 0; r < 16; r++) {
        __builtin_prefetch(from + r * stride + ahead, 0, 2);
        if (T == BF16 && row + PANEL <= last) continue;
        put_row<T>(row + r < last ? from + r * stride : from, widened[i % 2].high[r], widened[i % 2].low[r]);
      }
      if (++column == blocks) column = 0, row += PANEL;
    }
  }
}

template <int T>
void tiled_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  if constexpr (T != Q8_0) {
    if (rows <= PANEL) return few_tiled_rows<T>(p, first, last, rows);
  }
  const WithTiles tiles(2);
  Halves* w = (Halves*)local;
  constexpr int64_t block = T == Q8_0 ? 2 + BLOCK : 2 * BLOCK;  // bytes
  const int64_t stride = block * (p.w->cols / BLOCK), panels = (last - first + PANEL - 1) / PANEL, lds = whole_tiles(rows) * PANEL;
  const int64_t apart = p.w->cols / BLOCK * (int64_t)sizeof(XTile);
  float* sums = local + PANEL_FLOATS;
  __builtin_memset(sums, 0, panels * lds * sizeof(float));
  for (int64_t group = 0; group < groups_of(p.w->cols); group++) {
    const int64_t blocks = blocks_of_group(p.w->cols, group);
    for (int64_t r = 0; r < panels * PANEL; r++) {
      const char* from = (const char*)p.w->data + (first + r < last ? first + r : last - 1) * stride + group * 8 * block;
      Halves& to = w[r / PANEL];
      for (int64_t b = 0; b < blocks; b++, from += block) {
        __builtin_prefetch(from + 512);
        if (T == Q8_0) put_row_of_bytes(from, to.high[16 * b + r % PANEL]);
        else put_row<T>(from, to.high[16 * b + r % PANEL], to.low[16 * b + r % PANEL]);
      }
    }
    const char* x = (const char*)((const XTile*)p.q + group * 8);
    tiles_of<parts_of<T>()>(panels, w, blocks, x, apart, InTiles(), rows, sums);
  }
  for (int64_t m = 0; m < rows; m += PANEL) {
    for (int64_t n = first; n < last; n += PANEL) put_turned(p, m, rows, n, last, sums + (n - first) / PANEL * lds + m * PANEL);
  }
}

// Bytes: few rows of x -----------------------------------------------------------------------------------------------------

// The numbers of 32 columns of 16 packed rows as signed bytes, 8 vectors of 16 rows x 4 columns, in `to`; those of Q4 16 times
template <int T>
inline void bytes_of(const uint8_t* numbers, uint8_t (*to)[64]) {
  for (int j = 0; j < 4; j++) {
    __m512i low, high;
    if (T == Q4) {  // in the upper half of a byte, less 8
      const __m512i both = _mm512_loadu_si512(numbers + 64 * j), upper = _mm512_set1_epi8((char)0xf0), sign = _mm512_set1_epi8((char)128);
      low = _mm512_ternarylogic_epi32(_mm512_slli_epi16(both, 4), upper, sign, 0x6a);  // both & upper ^ sign
      high = _mm512_ternarylogic_epi32(both, upper, sign, 0x6a);
    } else {
      read_bits<T>(numbers, j, low, high);
    }
    _mm512_store_si512(to[j], low);
    _mm512_store_si512(to[j + 4], high);
  }
}

// sums[m] += what block b of 16 packed rows, w the first byte of 256 columns of them, gives with its dots [m, 16]
template <int T, int PART>
inline void add_dots(const uint8_t* w, int64_t b, const int32_t (*dots)[16], const XBlocks& x, __m512* sums) {
  constexpr bool small = Packed<T>::numbers == BLOCK;
  const uint8_t* header = small ? w + b * Packed<T>::size : w;
  __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)header)), least = scale;
  if (PART == 1) scale = _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 256));
  if (T == Q4) scale = _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 16));
  if (!small) {
    const __m512i pair = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(header + 64 + b / 2 * 32)));
    const __m512i own = _mm512_srl_epi32(_mm512_sll_epi32(pair, _mm_cvtsi32_si128(b % 2 ? 0 : 16)), _mm_cvtsi32_si128(16));
    const __m128i minima = _mm_loadu_si128((const __m128i*)(header + 192 + b * GROUP));
    scale = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(own));
    least = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(header + 32))),
                          _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(minima)));
  }
#pragma GCC unroll 16
  for (int m = 0; m < 16; m++) {
    const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scale[m][b]));
    sums[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots[m])), both, sums[m]);
    if (!small) sums[m] = _mm512_fnmadd_ps(least, _mm512_set1_ps(x.taken[m][b]), sums[m]);
  }
}

// Panels `first`..`last`, at most four, with up to 16 rows of x; packed(group, w, room): sets w[i] to 256 columns of the 16 rows of
// panel i as they lie in a packed group, there or in `room`, which has space for all.
//
// Blocks of 32 columns pass from hand to hand: one becomes bytes, the second one before it meets x in tiles, and the products of the
// fifth before are scaled and added. Nothing then waits for what was stored just before; and all that is stored on the way lies
// within 4 KB, since a load waits for a store before it that has the same last 12 bits of its address.
template <int T, bool IN_MEMORY, class F>
inline void byte_panels(const Product& p, int64_t first, int64_t last, int64_t rows, float* local, F packed) {
  const WithTiles tiles(1);
  constexpr int64_t ROOM = TOGETHER * 8 * Q8_BYTES;
  constexpr int64_t AHEAD = 8 * BLOCK / Packed<T>::numbers * Packed<T>::size;  // the next 256 columns of these rows
  constexpr int64_t TO_TILES = 2, TO_SUMS = 5;                                 // blocks
  struct Place {
    int64_t panel, group, b, blocks;
    const uint8_t* w;
  };
  struct alignas(64) {
    int32_t dots[3][16][16];
    uint8_t numbers[2][8][64];
    int32_t rest[3][16][16];
  } on_the_way;
  auto& [dots, numbers, rest] = on_the_way;
  const int64_t cols = p.w->cols, ldq = groups_of(cols), panels = (last - first + PANEL - 1) / PANEL;
  const int64_t total = cols / BLOCK * panels;
  const XBlocks* x = (const XBlocks*)p.q;
  float* sums = local;
  uint8_t* room = (uint8_t*)(local + PANEL * MOST_ROWS);
  const bool has_rest = T == Q8 && p.w->type == Q8;
  const uint8_t* w[3][TOGETHER] = {};
  __builtin_memset(sums, 0, panels * PANEL * PANEL * sizeof(float));
  packed(0, w[0], room);
  Place next = {0, 0, 0, blocks_of_group(cols, 0), w[0][0]}, now = next, done = next;
  const auto advance = [&](Place& at) {  // whether it is another panel's
    if (++at.b < at.blocks) return false;
    at.b = 0;
    if (++at.panel == panels) {
      at.panel = 0;
      if (++at.group < ldq) at.blocks = blocks_of_group(cols, at.group);
    }
    at.w = w[at.group % 3][at.panel];
    return true;
  };
  const auto numbers_at = [](const Place& at) {
    return at.w + (Packed<T>::numbers == BLOCK ? at.b * Packed<T>::size + Packed<T>::header : Packed<T>::header + at.b * Packed<T>::part);
  };
  __m512 acc[16];
#pragma GCC unroll 16
  for (int m = 0; m < 16; m++) acc[m] = _mm512_setzero_ps();
  int slot = 0;
  for (int64_t i = 0; i < total + TO_SUMS; i++, slot = slot == 2 ? 0 : slot + 1) {
    if (i >= TO_SUMS) {
      add_dots<T, 0>(done.w, done.b, dots[slot], x[done.group], acc);
      if (has_rest) add_dots<T, 1>(done.w, done.b, rest[slot], x[done.group], acc);
      const int64_t panel = done.panel;
      if (advance(done)) {
        float *from = sums + panel * PANEL * PANEL, *to = sums + done.panel * PANEL * PANEL;
#pragma GCC unroll 16
        for (int m = 0; m < 16; m++) {
          _mm512_store_ps(from + m * PANEL, acc[m]);
          acc[m] = _mm512_load_ps(to + m * PANEL);
        }
      }
    }
    if (i >= TO_TILES && i < total + TO_TILES) {
      const uint8_t* ws = T == Q8 ? numbers_at(now) : numbers[i % 2][0];
      TILE_ZERO(0);
      TILE_LOAD(4, x[now.group].q[now.b], BLOCK);
      TILE_LOAD(6, ws, 64);
      TILE_PRODUCT_BYTES(0, 4, 6);
      TILE_STORE(0, dots[slot]);
      if (has_rest) {
        TILE_ZERO(1);
        TILE_LOAD(5, x[now.group].rest[now.b], BLOCK);
        TILE_PRODUCT_BYTES(1, 5, 6);
        TILE_STORE(1, rest[slot]);
      }
      advance(now);
    }
    if (i < total) {
      const uint8_t* from = numbers_at(next);
      if (T != Q8) bytes_of<T>(from, numbers[i % 2]);
      for (int j = 0; IN_MEMORY && j < Packed<T>::part; j += 64) __builtin_prefetch(from + AHEAD + j, 0, 2);
      const int64_t group = next.group + 1;
      if (next.panel == panels - 1 && next.b == next.blocks - 1 && group < ldq) packed(group, w[group % 3], room + group % 3 * ROOM);
      advance(next);
    }
  }
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t n = first; n < last; n += PANEL) {
      const int64_t count = last - n < PANEL ? last - n : PANEL;
      put(p, m, n, count, sums + (n - first) * PANEL + m * PANEL);
    }
  }
}

// Rows of Q8_0 as they lie, whole panels of them, with up to 16 rows of x: while the products of a block are made, those of the third
// before are scaled and added
inline void few_byte_rows(const Product& p, int64_t first, int64_t last, int64_t rows) {
  const WithTiles tiles(1);
  constexpr int64_t SIZE = 2 + BLOCK;
  const int64_t blocks = p.w->cols / BLOCK, stride = blocks * SIZE;
  const XBytes* x = (const XBytes*)p.q;
  alignas(64) int32_t dots[3][16][16];
  alignas(64) float sums[16 * PANEL], of_rows[16];
  const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_mullo_epi32(_mm512_set1_epi32((int32_t)stride), row);
  for (int64_t n = first; n < last; n += PANEL) {
    const uint8_t* w = (const uint8_t*)p.w->data + n * stride;
    __m512 acc[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) acc[r] = _mm512_setzero_ps();
    int slot = 0;
    for (int64_t b = 0; b < blocks + 3; b++, slot = slot == 2 ? 0 : slot + 1) {
      const uint8_t* from = w + b * SIZE;
      if (b >= 3) {
        const __m512i words = _mm512_i32gather_epi32(at, from - 3 * SIZE, 1);  // the scale, and two numbers
        _mm512_store_ps(of_rows, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)));
        const __m512 of_x = _mm512_load_ps(x[b - 3].scale);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
          const __m512 both = _mm512_mul_ps(of_x, _mm512_set1_ps(of_rows[r]));
          acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots[slot][r])), both, acc[r]);
        }
      }
      if (b < blocks) {
        for (int64_t r = b % 2 * 8; r < b % 2 * 8 + 8; r++) __builtin_prefetch(from + r * stride + 768, 0, 2);
        TILE_ZERO(0);
        TILE_LOAD(4, from + 2, stride);
        TILE_LOAD(6, x[b].q, 64);
        TILE_PRODUCT_BYTES(0, 4, 6);
        TILE_STORE(0, dots[slot]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) _mm512_store_ps(sums + r * PANEL, acc[r]);
    put_turned(p, 0, rows, n, last, sums);
  }
}

// Lines of outputs, as for widen_lines, with up to 16 rows of x; inputs(b): where block b of 32 columns of them lies, its rows
// `stride` bytes apart. While a block is widened, the second one before it meets x
template <int T, int G, class X>
void few_lines(const Product& p, int64_t first, int64_t last, int64_t rows, const char* lines, int64_t size, int64_t apart, X inputs, int64_t stride) {
  const WithTiles tiles(2);
  struct alignas(64) {
    uint16_t high[16][32], low[16][32];
  } w[2][G];
  alignas(64) float sums[G][16 * PANEL];
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  const int64_t blocks = p.w->cols / BLOCK;
  for (int64_t b = 0; b < blocks + 2; b++) {
    if (b >= 2) {
      const char* x = inputs(b - 2);
      TILE_LOAD(4, x, stride);
      TILE_LOAD(5, x + InGroups::low, stride);
#define PANEL_STEP(g)                             \
  if constexpr (G > g) {                          \
    TILE_LOAD(6, w[b % 2][g].high, 64);           \
    TILE_PRODUCT(g, 4, 6);                        \
    TILE_PRODUCT(g, 5, 6);                        \
    if constexpr (parts_of<T>() == THREE_PRODUCTS) { \
      TILE_LOAD(7, w[b % 2][g].low, 64);          \
      TILE_PRODUCT(g, 4, 7);                      \
    }                                             \
  }
      PANEL_STEP(0) PANEL_STEP(1) PANEL_STEP(2) PANEL_STEP(3)
#undef PANEL_STEP
    }
    for (int64_t i = 0; b < blocks && i < 16; i++, lines += 2 * size) {
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        const char* at = lines + g * apart;
        if (g % 2 == 0) __builtin_prefetch(at + 32 * size), __builtin_prefetch(at + 33 * size);
        put_words<T>(_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)(at + size)), w[b % 2][g].high[i], w[b % 2][g].low[i]);
      }
    }
  }
  TILE_STORE(0, sums[0]);
  if constexpr (G > 1) TILE_STORE(1, sums[1]);
  if constexpr (G > 2) TILE_STORE(2, sums[2]);
  if constexpr (G > 3) TILE_STORE(3, sums[3]);
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t n = first; n < last; n += PANEL) put(p, m, n, last - n < PANEL ? last - n : PANEL, sums[(n - first) / PANEL] + m * PANEL);
  }
}

template <int T, class X>
void few_lines(const Product& p, int64_t first, int64_t last, int64_t rows, const char* lines, int64_t size, int64_t apart, X inputs, int64_t stride) {
  switch ((last - first + PANEL - 1) / PANEL) {
    case 1: return few_lines<T, 1>(p, first, last, rows, lines, size, apart, inputs, stride);
    case 2: return few_lines<T, 2>(p, first, last, rows, lines, size, apart, inputs, stride);
    case 3: return few_lines<T, 3>(p, first, last, rows, lines, size, apart, inputs, stride);
    default: return few_lines<T, 4>(p, first, last, rows, lines, size, apart, inputs, stride);
  }
}

// Low-rank maps: panels of plain numbers, and x as it is, brought into parts here. Whole blocks of columns
template <int T>
void tiled_panel(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  const int64_t cols = p.w->cols, bytes = offset<T>(PANEL * cols);
  const char* data = (const char*)p.w->data + first / PANEL * bytes;
  XGroup* x = (XGroup*)(local + PANEL_FLOATS + whole_tiles(rows) * MOST_ROWS);
  const auto inputs = [&](int64_t group) {
    const int64_t n = blocks_of_group(cols, group) * BLOCK;
    for (int64_t m = 0; m < rows; m++) into_parts(p.x + m * p.ldx + group * DEPTH, n, x + m, 0);
    return x;
  };
  if (rows <= PANEL) {
    const auto block = [&](int64_t b) { return (const char*)((b % 8 ? x : inputs(b / 8))->high + b % 8 * BLOCK); };
    return few_lines<T>(p, first, last, rows, data, 2 * PANEL, bytes, block, sizeof(XGroup));
  }
  half_panels<parts_of<T>()>(p, first, last, rows, local, inputs, 1, [&](int64_t group, Halves* w) {
    const int64_t panels = (last - first + PANEL - 1) / PANEL;
    widen_lines<T>(data + offset<T>(PANEL * DEPTH * group), 2 * PANEL, blocks_of_group(cols, group), panels, bytes, w);
  });
}
