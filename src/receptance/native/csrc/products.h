// Matrix products: y[m][n] = sum over k of x[m][k] w[n][k].
// Included by each isa_*.cpp after vector.h, inside its own namespace.

enum Epilogue { STORE, ADD, GATED_ADD, RELU2, SIGMOID, TANH };

// Eight blocks of a quantised x: q * scale for weights of 4 to 6 bits (and Q8_0), and wide * scale * WIDE_UNIT for those of 8 bits
// where 16-bit products cost no more (WIDE), or for weights of 16 bits (tiles.h). Sums (of 16 q; of 32 q, times the scale) take
// back what unsigned weights add.
//
// With AMX (amx.h), products of many rows take neither: x lies there as bfloat16, and what that leaves over, as bfloat16 too.
struct alignas(64) XGroup {
#if defined(ISA_AMX)
  uint16_t high[8 * BLOCK], low[8 * BLOCK];
#endif
  float scale[8], taken[8];
  int16_t sum[16];
  int8_t q[8 * BLOCK];
  int16_t wide[8 * BLOCK];
#if defined(ISA_AVX512)
  uint8_t shifted[8 * BLOCK];  // q + 128
  uint8_t rest_shifted[8 * BLOCK];
#endif
  int8_t rest[8 * BLOCK];  // 256 times what q leaves over, for matrices of type Q8, which meet both
  int16_t rest_sum[8];
  int8_t has_rest[8];
};

#if defined(ISA_AVX512) || defined(ISA_NEON)
constexpr bool WIDE = false;  // they have dot products of bytes
#else
constexpr bool WIDE = true;
#endif
#if defined(ISA_AVX512)
constexpr float WIDE_UNIT = 1.0f / 64;  // 32 products with weights of 14 bits stay within 32 bits
#else
constexpr float WIDE_UNIT = 1.0f / 256;
#endif
#if defined(ISA_AVX2)
constexpr int Q8_TOGETHER = 2;  // columns of a row that lie together in a packed block
#else
constexpr int Q8_TOGETHER = 4;
#endif

inline int64_t groups_of(int64_t cols) { return (cols + 8 * BLOCK - 1) / (8 * BLOCK); }
inline int32_t sum_of(const XGroup& x, int64_t block) { return x.sum[2 * block] + x.sum[2 * block + 1]; }

struct Product {
  const Matrix* w;
  const float* x;     // [m, ldx]
  int64_t ldx;
  const XGroup* q;    // the same, quantised: [m, groups_of(cols)]; for quantised w
  float* y;           // [m, ldy]
  int64_t ldy;
  int epilogue;
  const float* gate;  // [m, ldy], GATED_ADD: y += gate * product
  XGroup* y_quantised;  // null, or [m, groups_of(w->rows)]: y once more, quantised
  int32_t y_for;        // for a matrix of this type
};

// One block of 32 numbers. The scale's inverse must be finite; with a NaN among them the scale is one. NaN become the least integer,
// and sums of those must not overflow
#if defined(ISA_AVX512)
inline void quantise_block(const float* x, XGroup& group, int64_t b, bool with_rest) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  const __m512i all_but_sign = _mm512_set1_epi32(0x7fffffff);  // see `magnitude`
  const __m512i first = _mm512_and_si512((__m512i)low, all_but_sign), second = _mm512_and_si512((__m512i)high, all_but_sign);
  const float largest = bits<float>(_mm512_reduce_max_epi32(_mm512_max_epi32(first, second)));
  const float inverse = largest > 1e-30f ? 127 / largest : 0;
  group.scale[b] = largest / 127;
  const __m512 by = _mm512_set1_ps(inverse);
  const __m512i whole[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(low, by)), _mm512_cvtps_epi32(_mm512_mul_ps(high, by))};
  int32_t total = 0;
  for (int h = 0; h < 2; h++) {
    const __m128i q = _mm512_cvtepi32_epi8(whole[h]);
    _mm_storeu_si128((__m128i*)(group.q + b * BLOCK + 16 * h), q);
    _mm_storeu_si128((__m128i*)(group.shifted + b * BLOCK + 16 * h), _mm_xor_si128(q, _mm_set1_epi8((char)128)));
#if !defined(ISA_AMX)
    const __m512i wide = _mm512_cvtps_epi32(_mm512_mul_ps(h ? high : low, _mm512_set1_ps(inverse / WIDE_UNIT)));
    _mm256_storeu_si256((__m256i*)(group.wide + b * BLOCK + 16 * h), _mm512_cvtepi32_epi16(wide));
#endif
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(q, _mm_set1_epi8((char)128)), _mm_setzero_si128());
    const int32_t sum = _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
    group.sum[b * 2 + h] = (int16_t)sum;
    total += sum;
  }
  group.taken[b] = group.scale[b] * (float)total;
  group.has_rest[b] = with_rest;
  if (!with_rest) return;
  int32_t rest_sum = 0;
  for (int h = 0; h < 2; h++) {
    const __m512 left = _mm512_fmsub_ps(h ? high : low, by, _mm512_cvtepi32_ps(whole[h]));
    const __m512i steps = _mm512_min_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(left, _mm512_set1_ps(256))), _mm512_set1_epi32(127));
    const __m128i q = _mm512_cvtepi32_epi8(_mm512_max_epi32(steps, _mm512_set1_epi32(-128)));
    const __m128i shifted = _mm_xor_si128(q, _mm_set1_epi8((char)128)), sums = _mm_sad_epu8(shifted, _mm_setzero_si128());
    _mm_storeu_si128((__m128i*)(group.rest + b * BLOCK + 16 * h), q);
    _mm_storeu_si128((__m128i*)(group.rest_shifted + b * BLOCK + 16 * h), shifted);
    rest_sum += _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
  }
  group.rest_sum[b] = (int16_t)rest_sum;
}
#else
inline void quantise_block(const float* x, XGroup& group, int64_t b, bool with_rest) {
  int8_t* q = group.q + b * BLOCK;
  int16_t* wide = group.wide + b * BLOCK;
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int i = 0; i < BLOCK; i++) most = magnitude(x[i]) > most ? magnitude(x[i]) : most;
  const float largest = bits<float>(most);
  const float inverse = largest > 1e-30f ? 127 / largest : 0;
  group.scale[b] = largest / 127;
  int32_t whole[BLOCK];
#pragma omp simd
  for (int i = 0; i < BLOCK; i++) whole[i] = (int32_t)((x[i] * inverse + 12582912.0f) - 12582912.0f);
#pragma omp simd
  for (int i = 0; i < BLOCK; i++) q[i] = (int8_t)whole[i];
  for (int h = 0; h < 2; h++) {
    uint32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < 16; i++) total += (uint32_t)whole[16 * h + i];
    group.sum[b * 2 + h] = (int16_t)total;
  }
  group.taken[b] = group.scale[b] * (float)sum_of(group, b);
  group.has_rest[b] = with_rest;
  for (int i = 0; !WIDE && with_rest && i < BLOCK; i++) {
    const float left = (x[i] * inverse - (float)whole[i]) * 256, steps = left < 127 ? left : 127;
    group.rest[b * BLOCK + i] = (int8_t)(int32_t)((steps + 12582912.0f) - 12582912.0f);
  }
  if (!WIDE) return;
#pragma omp simd
  for (int i = 0; i < BLOCK; i++) wide[i] = (int16_t)(int32_t)((x[i] * (inverse / WIDE_UNIT) + 12582912.0f) - 12582912.0f);
}
#endif

// rows of x from which on tiles are worth while (tiles.h)
#if defined(ISA_AVX2)
constexpr int64_t TILED = 33;
#else
constexpr int64_t TILED = 4;
#endif
constexpr int64_t HALVED = 32;  // the same of bfloat16 (amx.h)

#if defined(ISA_AMX)
// Whether so many rows of x meet weights of this type as bfloat16 (amx.h), and whether as bytes in tiles
constexpr bool in_halves(int32_t type, int64_t rows) {
  return rows >= HALVED || type <= BF16 || ((type == Q6_K || type == PACKED_Q6_K) && rows >= 12);
}
constexpr bool in_bytes(int32_t type, int64_t rows) {
  return rows >= 12 && rows <= GROUP && type >= Q8 && type <= BAND_Q4_0 && type != PACKED_Q6_K && !is_blocks(type);
}

// 256 columns of 16 rows of x for those: XGroup's fields, but blocks of all rows side by side
struct alignas(64) XBlocks {
  int8_t q[8][16][BLOCK], rest[8][16][BLOCK];
  float scale[16][8], taken[16][8];
};
static_assert(sizeof(XBlocks) <= 16 * sizeof(XGroup), "they lie where XGroups would");

// x = high + low, each rounded to bfloat16, halves up
inline void into_parts(const float* x, int64_t n, XGroup* out, int64_t first) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
  for (int64_t i = first * BLOCK; i < first * BLOCK + n; i += 16, x += 16) {
    const __m512 v = _mm512_loadu_ps(x);
    const __m512i high = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(v), half), upper);
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(_mm512_sub_ps(v, _mm512_castsi512_ps(high))), half);
    XGroup& group = out[i / (8 * BLOCK)];
    _mm256_store_si256((__m256i*)(group.high + i % (8 * BLOCK)), _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
    _mm256_store_si256((__m256i*)(group.low + i % (8 * BLOCK)), _mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16)));
  }
}
#endif

// n numbers of row m, whole blocks, into the blocks from `first` on of `to` [rows, groups]; rows: how many of x the product has, with
// weights of this type
void quantise(const float* x, int64_t n, int64_t rows, int32_t type, XGroup* to, int64_t m, int64_t groups, int64_t first = 0) {
  XGroup* out = to + m * groups;
#if defined(ISA_AMX)
  if (in_halves(type, rows)) return into_parts(x, n, out, first);
  if (in_bytes(type, rows)) {
    for (int64_t b = first; b < first + n / BLOCK; b++, x += BLOCK) {
      XBlocks& group = ((XBlocks*)to)[b / 8];
      XGroup block;
      quantise_block(x, block, 0, type == Q8);
      __builtin_memcpy(group.q[b % 8][m], block.q, BLOCK);
      if (type == Q8) __builtin_memcpy(group.rest[b % 8][m], block.rest, BLOCK);
      group.scale[m][b % 8] = block.scale[0], group.taken[m][b % 8] = block.taken[0];
    }
    return;
  }
#endif
  for (int64_t b = first; b < first + n / BLOCK; b++, x += BLOCK) quantise_block(x, out[b / 8], b % 8, type == Q8);
}

__attribute__((noinline)) void finish(float* y, int64_t n, int epilogue) {
  switch (epilogue) {
    case RELU2:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = y[i] < 0 ? 0 : y[i] * y[i];
      break;
    case SIGMOID:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = sigmoid(y[i]);
      break;
    case TANH:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = tanh_(y[i]);
      break;
  }
}

// Results n..n+count of row m go where they belong
inline void put(const Product& p, int64_t m, int64_t n, int64_t count, float* y) {
  float* to = p.y + m * p.ldy + n;
  const float* gate = p.gate + m * p.ldy + n;
  if (count == GROUP && p.epilogue <= RELU2) {  // nearly always, where there are many rows
    for (int i = 0; i < GROUP; i += W) {
      const vf v = load(y + i);
      if (p.epilogue == STORE) store(to + i, v);
      else if (p.epilogue == ADD) store(to + i, load(to + i) + v);
      else if (p.epilogue == GATED_ADD) store(to + i, load(to + i) + load(gate + i) * v);
      else store(to + i, v < vf{} ? vf{} : v * v);
    }
    return;
  }
  finish(y, count, p.epilogue);
  for (int64_t i = 0; i < count; i++) {
    to[i] = p.epilogue == ADD ? to[i] + y[i] : p.epilogue == GATED_ADD ? to[i] + gate[i] * y[i] : y[i];
  }
}

// One row of x, plain weights: R rows of w at once, each a stream of its own --------------------------------------------

// Rows w, w + stride, ... Prefetch instructions add 8 % of bandwidth on a Xeon (34 GB/s with two threads) and cost a quarter of it
// on an EPYC with AVX2.
#if defined(ISA_AVX512)
constexpr int ROW_AHEAD = 512;
#else
constexpr int ROW_AHEAD = 0;
#endif

// Of at least STEP columns. Returns how many were taken: those that are left fill no vector
template <int T, int R, int STEP>
inline int64_t dot_steps(const char* w, int64_t stride, const float* x, int64_t cols, float* y) {
  vf acc[R] = {};
  int64_t k = 0;
  do {  // not `for`: with a way past all rounds, GCC clears and keeps the sums in memory as well
    for (int r = 0; ROW_AHEAD && r < R; r++) __builtin_prefetch(w + r * stride + offset<T>(k) + ROW_AHEAD);
    for (int u = 0; u < STEP; u += W) {
      const vf xs = load(x + k + u);
      for (int r = 0; r < R; r++) acc[r] = add_product(acc[r], elements<T>(w + r * stride, k + u), xs);
    }
    k += STEP;
  } while (k + STEP <= cols);
  for (; k + W <= cols; k += W) {
    for (int r = 0; r < R; r++) acc[r] = add_product(acc[r], elements<T>(w + r * stride, k), load(x + k));
  }
  for (int r = 0; r < R; r++) y[r] = sum(acc[r]);
  return k;
}

template <int T, int R>
inline void dot_rows(const char* w, int64_t stride, const float* x, int64_t cols, float* y) {
  constexpr int STEP = T == F32 ? 16 : 32;  // 64 bytes
  int64_t k = 0;
  if (cols >= STEP) k = dot_steps<T, R, STEP>(w, stride, x, cols, y);
  else if (cols >= W) k = dot_steps<T, R, W>(w, stride, x, cols, y);
  else for (int r = 0; r < R; r++) y[r] = 0;
  for (int r = 0; k < cols && r < R; r++) {
    float rest = 0;
    for (int64_t j = k; j < cols; j++) rest = add_product(rest, element<T>(w + r * stride, j), x[j]);
    y[r] += rest;
  }
}

// Calls work(row, R, stride in rows, y) so that each of R streams passes over its share of the rows one after the other: rows
// of an ordinary model are too short for the processor to know where the next one lies. Then the rows that are left.
template <int R, class Many, class One>
inline void in_streams(const Product& p, int64_t first, int64_t last, Many many, One one) {
  const int64_t each = (last - first) / R;
  float y[R * 64], sums[R];
  for (int64_t from = 0; from < each; from += 64) {
    const int64_t count = each - from < 64 ? each - from : 64;
    for (int64_t i = 0; i < count; i++) {
      many(first + from + i, each, sums);
      for (int r = 0; r < R; r++) y[r * 64 + i] = sums[r];
    }
    for (int r = 0; r < R; r++) put(p, 0, first + r * each + from, count, y + r * 64);
  }
  for (int64_t n = first + R * each; n < last; n++) {
    one(n, sums);
    put(p, 0, n, 1, sums);
  }
}

template <int T>
void one_row(const Product& p, int64_t first, int64_t last) {
  const int64_t cols = p.w->cols, size = offset<T>(cols);
  const char* w = (const char*)p.w->data;
  in_streams<8>(
      p, first, last, [&](int64_t n, int64_t each, float* y) { dot_rows<T, 8>(w + n * size, each * size, p.x, cols, y); },
      [&](int64_t n, float* y) { dot_rows<T, 1>(w + n * size, size, p.x, cols, y); });
}
