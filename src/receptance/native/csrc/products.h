// Matrix products: y[m][n] = sum over k of x[m][k] w[n][k].
// Included by each isa_*.cpp after vector.h, inside its own namespace.

enum Epilogue { STORE, ADD, GATED_ADD, RELU2, SIGMOID, TANH };

// Eight blocks of a quantised x: q * scale, and the sum of each block, which takes back what unsigned weights add
struct XGroup {
  float scale[8];
  int32_t sum[8];
  int8_t q[8 * BLOCK];
};

inline int64_t groups_of(int64_t cols) { return (cols + 8 * BLOCK - 1) / (8 * BLOCK); }

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

constexpr int PANEL = 16;     // rows of w converted to float at once
constexpr int DEPTH = 1024;   // columns of them
constexpr int STRIP = 32;     // columns of a transposed product done at once
constexpr int STRIP_ROWS = 64;
constexpr int AHEAD = 2048;   // bytes of prefetch

// n numbers, whole blocks, into the blocks from `first` on
void quantise(const float* x, int64_t n, XGroup* out, int64_t first = 0) {
  for (int64_t b = first; b < first + n / BLOCK; b++, x += BLOCK) {
    XGroup& group = out[b / 8];
    int8_t* to = group.q + b % 8 * BLOCK;
    float largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < BLOCK; i++) largest = __builtin_fabsf(x[i]) > largest ? __builtin_fabsf(x[i]) : largest;
    float scale = largest / 127, inverse = largest > 1e-30f ? 127 / largest : 0;  // 127 / largest must be finite
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < BLOCK; i++) {
      int32_t q = (int32_t)((x[i] * inverse + 12582912.0f) - 12582912.0f);
      to[i] = (int8_t)q;
      total += q;
    }
    group.scale[b % 8] = scale;
    group.sum[b % 8] = total;
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

// Many rows of x, plain weights: panels converted to float, in tiles that stay in registers ------------------------------

template <int R, int M>
inline void tile(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t depth, float* y, int64_t ldy) {
  vf acc[M][R] = {};
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    vf xs[M];
    for (int m = 0; m < M; m++) xs[m] = load(x + m * ldx + k);
    for (int r = 0; r < R; r++) {
      vf ws = load(w + r * ldw + k);
      for (int m = 0; m < M; m++) acc[m][r] += ws * xs[m];
    }
  }
  for (int m = 0; m < M; m++) {
    for (int r = 0; r < R; r++) {
      float rest = 0;
      for (int64_t j = k; j < depth; j++) rest += w[r * ldw + j] * x[m * ldx + j];
      y[m * ldy + r] += sum(acc[m][r]) + rest;
    }
  }
}

template <int R>
inline void tiles(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t rows, int64_t depth, float* y,
                  int64_t ldy) {
  int64_t m = 0;
  for (; m + TILE <= rows; m += TILE) tile<R, TILE>(w, ldw, x + m * ldx, ldx, depth, y + m * ldy, ldy);
  for (; m < rows; m++) tile<R, 1>(w, ldw, x + m * ldx, ldx, depth, y + m * ldy, ldy);
}

template <int T>
void many_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  const int64_t cols = p.w->cols, stride = offset<T>(cols);
  const char* w = (const char*)p.w->data;
  if (p.epilogue != ADD) {
    for (int64_t m = 0; m < rows; m++) __builtin_memset(p.y + m * p.ldy + first, 0, (last - first) * sizeof(float));
  }
  for (int64_t k = 0; k < cols; k += DEPTH) {
    int64_t depth = cols - k < DEPTH ? cols - k : DEPTH;
    for (int64_t n = first; n < last; n += PANEL) {
      int64_t height = last - n < PANEL ? last - n : PANEL;
      const float* rows_of_w = (const float*)(w + n * stride) + k;
      int64_t ldw = cols;
      if (T != F32) {
        for (int64_t r = 0; r < height; r++) {
          const char* row = w + (n + r) * stride + offset<T>(k);
          int64_t j = 0;
          for (; j + W <= depth; j += W) store(panel + r * DEPTH + j, elements<T>(row, j));
          for (; j < depth; j++) panel[r * DEPTH + j] = element<T>(row, j);
        }
        rows_of_w = panel;
        ldw = DEPTH;
      }
      int64_t r = 0;
      for (; r + 4 <= height; r += 4) {
        tiles<4>(rows_of_w + r * ldw, ldw, p.x + k, p.ldx, rows, depth, p.y + n + r, p.ldy);
      }
      for (; r < height; r++) tiles<1>(rows_of_w + r * ldw, ldw, p.x + k, p.ldx, rows, depth, p.y + n + r, p.ldy);
    }
  }
  for (int64_t m = 0; m < rows; m++) finish(p.y + m * p.ldy + first, last - first, p.epilogue);
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
        dot[m] = _mm512_sub_epi32(dot[m], _mm512_set1_epi32((T == Q8 ? 128 : 8) * xg.sum[b % 8]));
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
  __m256 acc[G][M][2] = {};
  for (int64_t b = 0; b < blocks; b++) {
    for (int g = 0; g < G; g++) {
      const uint8_t* p = w + g * group_bytes + b * BYTES;
      if (M == 1) {
        for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i + AHEAD);
      }
      __m256i dot[M][2] = {};  // Q8: 32-bit sums; Q4: 16-bit sums, which 8 products of 15 x 127 x 2 do not overflow
      for (int j = 0; j < VECTORS; j++) {
        const __m256i* at = (const __m256i*)(p + GROUP * 2 + j * 64);
        const __m256i q[2] = {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
        if (T == Q8) {  // products of unsigned and signed bytes: |w| and x with w's sign
          const __m256i size[2] = {_mm256_abs_epi8(q[0]), _mm256_abs_epi8(q[1])};
          for (int m = 0; m < M; m++) {
            __m256i xs = _mm256_set1_epi32(read<int32_t>(x[m * ldq + b / 8].q + b % 8 * BLOCK + 4 * j));
            for (int h = 0; h < 2; h++) {
              __m256i pairs = _mm256_maddubs_epi16(size[h], _mm256_sign_epi8(xs, q[h]));
              dot[m][h] = _mm256_add_epi32(dot[m][h], _mm256_madd_epi16(pairs, ones));
            }
          }
        } else {
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
      }
      for (int h = 0; h < 2; h++) {
        __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + h * 16)));
        for (int m = 0; m < M; m++) {
          const XGroup& xg = x[m * ldq + b / 8];
          __m256i whole = dot[m][h];
          if (T == Q4) whole = _mm256_sub_epi32(_mm256_madd_epi16(whole, ones), _mm256_set1_epi32(8 * xg.sum[b % 8]));
          __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(xg.scale[b % 8]));
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
          for (int r = 0; r < GROUP; r++) {
            const uint8_t* q = p + GROUP * 2 + j * 64 + r * 4;
            for (int i = 0; i < 4; i++) {
              if (T == Q8) dot[m][r] += (int32_t)(int8_t)q[i] * xq[i];
              else dot[m][r] += (int32_t)(q[i] & 15) * xq[i] + (int32_t)(q[i] >> 4) * xq[16 + i];
            }
          }
        }
      }
#endif
      for (int m = 0; m < M; m++) {
        const XGroup& xg = x[m * ldq + b / 8];
        for (int r = 0; r < GROUP; r++) {
          int32_t whole = T == Q4 ? dot[m][r] - 8 * xg.sum[b % 8] : dot[m][r];
          y[g][m][r] += (float)whole * (half_to_float(read<uint16_t>(p + 2 * r)) * xg.scale[b % 8]);
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
void packed_rows(const Product& p, int64_t first, int64_t last, int64_t rows) {
  const int64_t blocks = p.w->cols / BLOCK, group_bytes = blocks * (T == Q8 ? Q8_BYTES : Q4_BYTES);
  const int64_t ldq = groups_of(p.w->cols);
  const uint8_t* w = (const uint8_t*)p.w->data;
  int64_t n = first;
  if (rows == 1) {
    for (; n + 4 * GROUP <= last; n += 4 * GROUP) {
      float y[4][1][GROUP];
      packed<T, 4, 1>(w + n / GROUP * group_bytes, group_bytes, blocks, p.q, ldq, y);
      for (int g = 0; g < 4; g++) put(p, 0, n + g * GROUP, GROUP, y[g][0]);
    }
  }
  for (; n < last; n += GROUP) {
    const uint8_t* group = w + n / GROUP * group_bytes;
    const int64_t count = last - n < GROUP ? last - n : GROUP;
    int64_t m = 0;
    for (; m + PACKED_TILE <= rows; m += PACKED_TILE) {
      float y[1][PACKED_TILE][GROUP];
      packed<T, 1, PACKED_TILE>(group, group_bytes, blocks, p.q + m * ldq, ldq, y);
      for (int i = 0; i < PACKED_TILE; i++) put(p, m + i, n, count, y[0][i]);
    }
    for (; m < rows; m++) {
      float y[1][1][GROUP];
      packed<T, 1, 1>(group, group_bytes, blocks, p.q + m * ldq, ldq, y);
      put(p, m, n, count, y[0][0]);
    }
  }
}
