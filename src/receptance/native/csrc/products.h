// Matrix products: y[m][n] = sum over k of x[m][k] w[n][k].
// Included by each isa_*.cpp after vector.h, inside its own namespace.

enum Epilogue { STORE, ADD, GATED_ADD, RELU2, SIGMOID, TANH };

// Eight blocks of a quantised x, twice: q * scale for weights of 4 to 6 bits, and wide * scale / 256 for those of 8 bits where
// 16-bit products cost no more (WIDE). Sums (of 16 q, of 32 wide) take back what unsigned weights add.
struct XGroup {
  float scale[8];
  int32_t sum[16], wide_sum[8];
  int8_t q[8 * BLOCK];
  int16_t wide[8 * BLOCK];
};

#if defined(ISA_AVX512) || defined(ISA_NEON)
constexpr bool WIDE = false;  // they have dot products of bytes
#else
constexpr bool WIDE = true;
#endif
constexpr float WIDE_UNIT = 1.0f / 256;
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
};

constexpr int AHEAD = 2048;   // bytes of prefetch

// n numbers, whole blocks, into the blocks from `first` on
void quantise(const float* x, int64_t n, XGroup* out, int64_t first = 0) {
  for (int64_t b = first; b < first + n / BLOCK; b++, x += BLOCK) {
    XGroup& group = out[b / 8];
    int8_t* q = group.q + b % 8 * BLOCK;
    int16_t* wide = group.wide + b % 8 * BLOCK;
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < BLOCK; i++) largest = __builtin_fabsf(x[i]) > largest ? __builtin_fabsf(x[i]) : largest;
    const float inverse = largest > 1e-30f ? 127 / largest : 0;  // it must be finite
    group.scale[b % 8] = largest / 127;
    int32_t whole[BLOCK];
#pragma omp simd
    for (int i = 0; i < BLOCK; i++) whole[i] = (int32_t)((x[i] * inverse + 12582912.0f) - 12582912.0f);
#pragma omp simd
    for (int i = 0; i < BLOCK; i++) q[i] = (int8_t)whole[i];
    for (int h = 0; h < 2; h++) {
      uint32_t total = 0;  // unsigned: NaN becomes the least integer, and sums of those must not overflow
#pragma omp simd reduction(+ : total)
      for (int i = 0; i < 16; i++) total += (uint32_t)whole[16 * h + i];
      group.sum[b % 8 * 2 + h] = (int32_t)total;
    }
    if (!WIDE) continue;
    uint32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < BLOCK; i++) {
      whole[i] = (int32_t)((x[i] * (inverse * 256) + 12582912.0f) - 12582912.0f);
      total += (uint32_t)whole[i];
    }
    group.wide_sum[b % 8] = (int32_t)total;
#pragma omp simd
    for (int i = 0; i < BLOCK; i++) wide[i] = (int16_t)whole[i];
  }
}

void finish(float* y, int64_t n, int epilogue) {
  switch (epilogue) {
    case RELU2:
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = y[i] > 0 ? y[i] * y[i] : 0;
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
  finish(y, count, p.epilogue);
  float* to = p.y + m * p.ldy + n;
  const float* gate = p.gate + m * p.ldy + n;
  for (int64_t i = 0; i < count; i++) {
    to[i] = p.epilogue == ADD ? to[i] + y[i] : p.epilogue == GATED_ADD ? to[i] + gate[i] * y[i] : y[i];
  }
}

// One row of x, plain weights: R rows of w at once, each a stream of its own --------------------------------------------

template <int T, int R>
inline void dot_rows(const char* w, int64_t stride, const float* x, int64_t cols, float* y) {
  constexpr int STEP = T == F32 ? 16 : 32;  // 64 bytes
  vf acc[R] = {};
  int64_t k = 0;
  for (; k + STEP <= cols; k += STEP) {
    for (int r = 0; r < R; r++) __builtin_prefetch(w + r * stride + offset<T>(k) + AHEAD);
    for (int u = 0; u < STEP; u += W) {
      vf xs = load(x + k + u);
      for (int r = 0; r < R; r++) acc[r] += elements<T>(w + r * stride, k + u) * xs;
    }
  }
  for (; k + W <= cols; k += W) {
    for (int r = 0; r < R; r++) acc[r] += elements<T>(w + r * stride, k) * load(x + k);
  }
  for (int r = 0; r < R; r++) {
    float rest = 0;
    for (int64_t j = k; j < cols; j++) rest += element<T>(w + r * stride, j) * x[j];
    y[r] = sum(acc[r]) + rest;
  }
}

template <int T>
void one_row(const Product& p, int64_t first, int64_t last) {
  const int64_t cols = p.w->cols, stride = offset<T>(cols);
  const char* w = (const char*)p.w->data;
  float y[8];
  for (int64_t n = first; n < last;) {
    int count = last - n >= 8 ? 8 : 1;
    if (count == 8) dot_rows<T, 8>(w + n * stride, stride, p.x, cols, y);
    else dot_rows<T, 1>(w + n * stride, stride, p.x, cols, y);
    put(p, 0, n, count, y);
    n += count;
  }
}

// Packed weights: G groups of 16 rows, M rows of x -----------------------------------------------------------------------

template <int T, int G, int M>
inline void packed(const uint8_t* w, int64_t group_bytes, int64_t blocks, const XGroup* x, int64_t ldq,
                   float (*y)[M][GROUP]) {
  constexpr int BYTES = T == Q8 ? Q8_BYTES : Q4_BYTES;
  constexpr int VECTORS = T == Q8 ? 8 : 4;
#if defined(ISA_AVX512)
  __m512 acc[G][M] = {};
  for (int64_t b = 0; b < blocks; b++) {
    for (int g = 0; g < G; g++) {
      const uint8_t* p = w + g * group_bytes + b * BYTES;
      if (M == 1) {
        for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i + AHEAD);
      }
      __m512i dot[M] = {};
      for (int j = 0; j < VECTORS; j++) {
        __m512i q = _mm512_loadu_si512(p + GROUP * 2 + j * 64);
        if (T == Q8) {
          q = _mm512_xor_si512(q, _mm512_set1_epi8((char)0x80));  // + 128: unsigned
          for (int m = 0; m < M; m++) {
            __m512i xs = _mm512_set1_epi32(read<int32_t>(x[m * ldq + b / 8].q + b % 8 * BLOCK + 4 * j));
            dot[m] = _mm512_dpbusd_epi32(dot[m], q, xs);
          }
        } else {
          __m512i low = _mm512_and_si512(q, _mm512_set1_epi8(15));
          __m512i high = _mm512_and_si512(_mm512_srli_epi16(q, 4), _mm512_set1_epi8(15));
          for (int m = 0; m < M; m++) {
            const int8_t* xq = x[m * ldq + b / 8].q + b % 8 * BLOCK;
            dot[m] = _mm512_dpbusd_epi32(dot[m], low, _mm512_set1_epi32(read<int32_t>(xq + 4 * j)));
            dot[m] = _mm512_dpbusd_epi32(dot[m], high, _mm512_set1_epi32(read<int32_t>(xq + 16 + 4 * j)));
          }
        }
      }
      __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
      for (int m = 0; m < M; m++) {
        const XGroup& xg = x[m * ldq + b / 8];
        dot[m] = _mm512_sub_epi32(dot[m], _mm512_set1_epi32((T == Q8 ? 128 : 8) * sum_of(xg, b % 8)));
        __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(xg.scale[b % 8]));
        acc[g][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m]), both, acc[g][m]);
      }
    }
  }
  for (int g = 0; g < G; g++) {
    for (int m = 0; m < M; m++) _mm512_storeu_ps(y[g][m], acc[g][m]);
  }
#elif defined(ISA_AVX2)
  const __m256i ones = _mm256_set1_epi16(1);
  const float unit = T == Q8 ? WIDE_UNIT : 1;
  __m256 acc[G][M][2] = {};
  for (int64_t b = 0; b < blocks; b++) {
    for (int g = 0; g < G; g++) {
      const uint8_t* p = w + g * group_bytes + b * BYTES;
      if (M == 1) {
        for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i + AHEAD);
      }
      __m256i dot[M][2] = {};  // Q8: 32-bit sums; Q4: 16-bit sums, which 8 products of 15 x 127 x 2 do not overflow
      for (int j = 0; T == Q8 && j < 16; j++) {  // two columns of 16 rows
        const __m128i* at = (const __m128i*)(p + GROUP * 2 + j * 32);
        const __m256i q[2] = {_mm256_cvtepi8_epi16(_mm_loadu_si128(at)), _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1))};
        for (int m = 0; m < M; m++) {
          __m256i xs = _mm256_set1_epi32(read<int32_t>(x[m * ldq + b / 8].wide + b % 8 * BLOCK + 2 * j));
          for (int h = 0; h < 2; h++) dot[m][h] = _mm256_add_epi32(dot[m][h], _mm256_madd_epi16(q[h], xs));
        }
      }
      for (int j = 0; T == Q4 && j < 4; j++) {
        const __m256i* at = (const __m256i*)(p + GROUP * 2 + j * 64);
        const __m256i q[2] = {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
        const __m256i mask = _mm256_set1_epi8(15);
        const __m256i low[2] = {_mm256_and_si256(q[0], mask), _mm256_and_si256(q[1], mask)};
        const __m256i high[2] = {_mm256_and_si256(_mm256_srli_epi16(q[0], 4), mask),
                                 _mm256_and_si256(_mm256_srli_epi16(q[1], 4), mask)};
        for (int m = 0; m < M; m++) {
          const int8_t* xq = x[m * ldq + b / 8].q + b % 8 * BLOCK;
          __m256i first = _mm256_set1_epi32(read<int32_t>(xq + 4 * j));
          __m256i second = _mm256_set1_epi32(read<int32_t>(xq + 16 + 4 * j));
          for (int h = 0; h < 2; h++) {
            dot[m][h] = _mm256_add_epi16(dot[m][h], _mm256_maddubs_epi16(low[h], first));
            dot[m][h] = _mm256_add_epi16(dot[m][h], _mm256_maddubs_epi16(high[h], second));
          }
        }
      }
      for (int h = 0; h < 2; h++) {
        __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + h * 16)));
        for (int m = 0; m < M; m++) {
          const XGroup& xg = x[m * ldq + b / 8];
          __m256i whole = dot[m][h];
          if (T == Q4) whole = _mm256_sub_epi32(_mm256_madd_epi16(whole, ones), _mm256_set1_epi32(8 * sum_of(xg, b % 8)));
          __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(xg.scale[b % 8] * unit));
          acc[g][m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, acc[g][m][h]);
        }
      }
    }
  }
  for (int g = 0; g < G; g++) {
    for (int m = 0; m < M; m++) {
      _mm256_storeu_ps(y[g][m], acc[g][m][0]);
      _mm256_storeu_ps(y[g][m] + 8, acc[g][m][1]);
    }
  }
#else
  const float unit = T == Q8 && WIDE ? WIDE_UNIT : 1;
  __builtin_memset(y, 0, sizeof(float) * G * M * GROUP);
  for (int64_t b = 0; b < blocks; b++) {
    for (int g = 0; g < G; g++) {
      const uint8_t* p = w + g * group_bytes + b * BYTES;
      int32_t dot[M][GROUP] = {};
#if defined(ISA_NEON)
      int32x4_t parts[M][4] = {};
      for (int j = 0; j < VECTORS; j++) {
        for (int i = 0; i < 4; i++) {
          uint8x16_t q = vld1q_u8(p + GROUP * 2 + j * 64 + i * 16);
          int8x16_t low = T == Q8 ? vreinterpretq_s8_u8(q) : vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15)));
          int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(q, 4));
          for (int m = 0; m < M; m++) {
            const int8_t* xq = x[m * ldq + b / 8].q + b % 8 * BLOCK;
            int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(xq + 4 * j)));
            parts[m][i] = vdotq_s32(parts[m][i], low, xs);
            if (T == Q4) {
              xs = vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(xq + 16 + 4 * j)));
              parts[m][i] = vdotq_s32(parts[m][i], high, xs);
            }
          }
        }
      }
      for (int m = 0; m < M; m++) {
        for (int i = 0; i < 4; i++) vst1q_s32(dot[m] + 4 * i, parts[m][i]);
      }
#else
      for (int j = 0; j < VECTORS; j++) {
        for (int m = 0; m < M; m++) {
          const int8_t* xq = x[m * ldq + b / 8].q + b % 8 * BLOCK + 4 * j;
          const int16_t* xw = x[m * ldq + b / 8].wide + b % 8 * BLOCK + 4 * j;
          for (int r = 0; r < GROUP; r++) {
            const uint8_t* q = p + GROUP * 2 + j * 64 + r * 4;
            for (int i = 0; i < 4; i++) {
              if (T == Q8) dot[m][r] += (int32_t)(int8_t)q[i] * xw[i];
              else dot[m][r] += (int32_t)(q[i] & 15) * xq[i] + (int32_t)(q[i] >> 4) * xq[16 + i];
            }
          }
        }
      }
#endif
      for (int m = 0; m < M; m++) {
        const XGroup& xg = x[m * ldq + b / 8];
        for (int r = 0; r < GROUP; r++) {
          int32_t whole = T == Q4 ? dot[m][r] - 8 * sum_of(xg, b % 8) : dot[m][r];
          y[g][m][r] += (float)whole * (half_to_float(read<uint16_t>(p + 2 * r)) * xg.scale[b % 8] * unit);
        }
      }
    }
  }
#endif
}

#if defined(ISA_AVX512)
constexpr int PACKED_TILE = 8;  // rows of x whose sums stay in registers
#else
constexpr int PACKED_TILE = 4;
#endif

template <int T>
void packed_row(const Product& p, int64_t first, int64_t last) {
  const int64_t blocks = p.w->cols / BLOCK, group_bytes = blocks * (T == Q8 ? Q8_BYTES : Q4_BYTES);
  const uint8_t* w = (const uint8_t*)p.w->data;
  int64_t n = first;
  for (; n + 4 * GROUP <= last; n += 4 * GROUP) {
    float y[4][1][GROUP];
    packed<T, 4, 1>(w + n / GROUP * group_bytes, group_bytes, blocks, p.q, 0, y);
    for (int g = 0; g < 4; g++) put(p, 0, n + g * GROUP, GROUP, y[g][0]);
  }
  for (; n < last; n += GROUP) {
    float y[1][1][GROUP];
    packed<T, 1, 1>(w + n / GROUP * group_bytes, group_bytes, blocks, p.q, 0, y);
    put(p, 0, n, last - n < GROUP ? last - n : GROUP, y[0][0]);
  }
}
