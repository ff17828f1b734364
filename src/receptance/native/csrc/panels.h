// Products with many rows of x: 16 rows of w at a time, 256 columns of them, brought into an order in which one vector holds
// the 16 rows, and used for all rows of x while they lie in the first-level cache.
// Included by each isa_*.cpp after blocks.h, inside its own namespace.

constexpr int PANEL = GROUP;     // rows of w
constexpr int DEPTH = 256;       // columns of a panel
constexpr int STRIP = 32;        // columns of a transposed product done at once, see lines.h
constexpr int STRIP_ROWS = 64;
constexpr int LANES = PANEL / W; // vectors of a column of a panel

#if defined(ISA_AVX512)
constexpr int TILE = 12;  // rows of x whose sums stay in registers
#elif defined(ISA_AVX2) || defined(ISA_NEON)
constexpr int TILE = 6;
#else
constexpr int TILE = 2;
#endif

constexpr int64_t MOST_ROWS = 64;  // of w in one call of `product` with many rows of x

inline int64_t local_floats(int64_t rows) { return PANEL * DEPTH + rows * MOST_ROWS; }  // of each thread: panel, sums

// Calls work(n, group, sums) for each panel of 16 rows (n the first) and each group of 256 columns: sums [rows, 16] += ...
// Groups are the outer loop, because the rows of x do not fit into the second-level cache, but 256 columns of them do.
template <class F>
inline void each_panel(const Product& p, int64_t first, int64_t last, int64_t rows, float* sums, F work) {
  __builtin_memset(sums, 0, (last - first + PANEL - 1) / PANEL * PANEL * rows * sizeof(float));
  for (int64_t group = 0; group < groups_of(p.w->cols); group++) {
    for (int64_t n = first; n < last; n += PANEL) work(n, group, sums + (n - first) * rows);
  }
  for (int64_t n = first; n < last; n += PANEL) {
    const int64_t count = last - n < PANEL ? last - n : PANEL;
    for (int64_t m = 0; m < rows; m++) put(p, m, n, count, sums + (n - first) * rows + m * PANEL);
  }
}

// sums [M, V W] += x w, for V vectors of outputs and `depth` inputs. w [depth, ldw], x [M, ldx]
template <int M, int V>
inline void float_tile(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t depth, float* sums,
                       int64_t lds) {
  vf acc[M][V];
  for (int m = 0; m < M; m++) {
    for (int v = 0; v < V; v++) acc[m][v] = load(sums + m * lds + v * W);
  }
  for (int64_t k = 0; k < depth; k++) {
    vf ws[V];
    for (int v = 0; v < V; v++) ws[v] = load(w + k * ldw + v * W);
    for (int m = 0; m < M; m++) {
      vf xs = splat(x[m * ldx + k]);
      for (int v = 0; v < V; v++) acc[m][v] += ws[v] * xs;
    }
  }
  for (int m = 0; m < M; m++) {
    for (int v = 0; v < V; v++) store(sums + m * lds + v * W, acc[m][v]);
  }
}

#if defined(ISA_AVX512) || defined(ISA_AVX2)
inline void transpose8(__m256 v[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

template <int T>
inline __m256 eight(const void* p) {
  if (T == F32) return _mm256_loadu_ps((const float*)p);
  __m128i h = _mm_loadu_si128((const __m128i*)p);
  if (T == F16) return _mm256_cvtph_ps(h);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
#endif

// panel [depth, 16] = the columns of `height` rows; the others are left as they are, and so are their results
template <int T>
inline void fill_floats(const char* w, int64_t stride, int64_t height, int64_t depth, float* panel) {
  int64_t k = 0;
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  for (; height == PANEL && k + 8 <= depth; k += 8) {
    for (int h = 0; h < PANEL; h += 8) {
      __m256 v[8];
      for (int r = 0; r < 8; r++) v[r] = eight<T>(w + (h + r) * stride + offset<T>(k));
      transpose8(v);
      for (int i = 0; i < 8; i++) _mm256_storeu_ps(panel + (k + i) * PANEL + h, v[i]);
    }
  }
#endif
  for (; k < depth; k++) {
    for (int64_t r = 0; r < height; r++) panel[k * PANEL + r] = element<T>(w + r * stride, k);
  }
}

template <int T>
void many_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  const int64_t cols = p.w->cols, stride = offset<T>(cols);
  __builtin_memset(panel, 0, PANEL * DEPTH * sizeof(float));
  each_panel(p, first, last, rows, panel + PANEL * DEPTH, [&](int64_t n, int64_t group, float* sums) {
    const int64_t k = group * DEPTH, depth = cols - k < DEPTH ? cols - k : DEPTH;
    const int64_t height = last - n < PANEL ? last - n : PANEL;
    fill_floats<T>((const char*)p.w->data + n * stride + offset<T>(k), stride, height, depth, panel);
    const float* x = p.x + k;
    int64_t m = 0;
    for (; m + TILE <= rows; m += TILE) {
      float_tile<TILE, LANES>(panel, PANEL, x + m * p.ldx, p.ldx, depth, sums + m * PANEL, PANEL);
    }
    for (; m < rows; m++) float_tile<1, LANES>(panel, PANEL, x + m * p.ldx, p.ldx, depth, sums + m * PANEL, PANEL);
  });
}

#if defined(ISA_AVX512) || defined(ISA_AVX2)

// How numbers of 16 rows lie and are multiplied. PAIRS: signed bytes, two columns of each row together, by 16-bit x.
// QUADS: unsigned bytes, four columns, by bytes. NIBBLES: the same in half the room, as in a packed Q4 block.
enum Order { PAIRS, QUADS, NIBBLES };

// sums + one step of 8 rows of w and one of x
template <int ORDER>
inline __m256i with_products(__m256i sums, __m256i w, __m256i x) {
  if (ORDER == PAIRS) return _mm256_add_epi32(sums, _mm256_madd_epi16(w, x));
#if defined(ISA_AVX512)
  return _mm256_dpbusd_epi32(sums, w, x);
#else
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x));  // 8 steps of 15 x 127 x 2 do not overflow
#endif
}

template <int ORDER>
inline __m256i widened(__m256i sums) {  // to 32 bits
#if defined(ISA_AVX512)
  return sums;
#else
  return ORDER == PAIRS ? sums : _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#endif
}

// out[2 m], out[2 m + 1]: the dot products of 16 rows of w with x[m], for M = 4 or 1. Inlined or in an array,
// GCC keeps the sums in memory, at a third of the speed.
template <int ORDER, int STEPS, int M>
__attribute__((noinline)) void dots(const uint8_t* numbers, const char* const* x, __m256i* out) {
  constexpr int BYTES = ORDER == PAIRS ? 32 : 64;
  const char *x0 = x[0], *x1 = x[M > 1 ? 1 : 0], *x2 = x[M > 1 ? 2 : 0], *x3 = x[M > 1 ? 3 : 0];
  __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  for (int j = 0; j < STEPS; j++) {
    const uint8_t* at = numbers + (ORDER == NIBBLES ? j % 4 : j) * BYTES;
    __m256i low, high;
    if (ORDER == PAIRS) {
      low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at));
      high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(at + 16)));
    } else {
      low = _mm256_loadu_si256((const __m256i*)at);
      high = _mm256_loadu_si256((const __m256i*)(at + 32));
      if (ORDER == NIBBLES) {
        const int shift = j / 4 * 4;
        low = _mm256_and_si256(_mm256_srli_epi16(low, shift), _mm256_set1_epi8(15));
        high = _mm256_and_si256(_mm256_srli_epi16(high, shift), _mm256_set1_epi8(15));
      }
    }
    __m256i xs = _mm256_set1_epi32(read<int32_t>(x0 + 4 * j));
    a0 = with_products<ORDER>(a0, low, xs), b0 = with_products<ORDER>(b0, high, xs);
    if (M == 1) continue;
    xs = _mm256_set1_epi32(read<int32_t>(x1 + 4 * j));
    a1 = with_products<ORDER>(a1, low, xs), b1 = with_products<ORDER>(b1, high, xs);
    xs = _mm256_set1_epi32(read<int32_t>(x2 + 4 * j));
    a2 = with_products<ORDER>(a2, low, xs), b2 = with_products<ORDER>(b2, high, xs);
    xs = _mm256_set1_epi32(read<int32_t>(x3 + 4 * j));
    a3 = with_products<ORDER>(a3, low, xs), b3 = with_products<ORDER>(b3, high, xs);
  }
  out[0] = widened<ORDER>(a0), out[1] = widened<ORDER>(b0);
  if (M == 1) return;
  out[2] = widened<ORDER>(a1), out[3] = widened<ORDER>(b1);
  out[4] = widened<ORDER>(a2), out[5] = widened<ORDER>(b2);
  out[6] = widened<ORDER>(a3), out[7] = widened<ORDER>(b3);
}

#endif

// Packed weights lie in the right order already. sums [M, 16] += what `blocks` blocks give
template <int T, int M>
inline void packed_tile(const uint8_t* w, int64_t blocks, const XGroup* x, int64_t ldq, float* sums) {
#if defined(ISA_AVX2)
  constexpr int SIZE = T == Q8 ? Q8_BYTES : Q4_BYTES;
  for (int64_t b = 0; b < blocks; b++, w += SIZE) {
    const char* numbers[M];
    for (int m = 0; m < M; m++) {
      numbers[m] = T == Q8 ? (const char*)(x[m * ldq].wide + b * BLOCK) : (const char*)(x[m * ldq].q + b * BLOCK);
    }
    __m256i dot[2 * M];
    dots<T == Q8 ? PAIRS : NIBBLES, T == Q8 ? 16 : 8, M>(w + GROUP * 2, numbers, dot);
    for (int h = 0; h < 2; h++) {
      const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(w + h * 16)));
      for (int m = 0; m < M; m++) {
        const XGroup& group = x[m * ldq];
        __m256i whole = dot[2 * m + h];
        if (T == Q4) whole = _mm256_sub_epi32(whole, _mm256_set1_epi32(8 * sum_of(group, b)));
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(group.scale[b] * (T == Q8 ? WIDE_UNIT : 1)));
        float* to = sums + m * PANEL + h * 8;
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, _mm256_loadu_ps(to)));
      }
    }
  }
#else
  float y[1][M][GROUP];
  packed<T, 1, M>(w, 0, blocks, x, ldq, y);
  for (int m = 0; m < M; m++) {
    for (int i = 0; i < GROUP; i++) sums[m * PANEL + i] += y[0][m][i];
  }
#endif
}

template <int T>
inline void packed_tiles(const uint8_t* panel, int64_t blocks, const XGroup* x, int64_t ldq, int64_t rows, float* sums) {
  constexpr int M = PACKED_TILE;
  int64_t m = 0;
  for (; m + M <= rows; m += M) packed_tile<T, M>(panel, blocks, x + m * ldq, ldq, sums + m * PANEL);
  for (; m < rows; m++) packed_tile<T, 1>(panel, blocks, x + m * ldq, ldq, sums + m * PANEL);
}

inline int64_t blocks_of_group(int64_t cols, int64_t group) {
  const int64_t left = cols / BLOCK - group * 8;
  return left < 8 ? left : 8;
}

template <int T>
void many_packed_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  constexpr int SIZE = T == Q8 ? Q8_BYTES : Q4_BYTES;
  const int64_t cols = p.w->cols, ldq = groups_of(cols), group_bytes = cols / BLOCK * SIZE;
  each_panel(p, first, last, rows, local + PANEL * DEPTH, [&](int64_t n, int64_t group, float* sums) {
    const uint8_t* w = (const uint8_t*)p.w->data + n / GROUP * group_bytes + group * 8 * SIZE;
    packed_tiles<T>(w, blocks_of_group(cols, group), p.q + group, ldq, rows, sums);
  });
}

// Blocks -------------------------------------------------------------------------------------------------------------------

#if defined(ISA_AVX512) || defined(ISA_AVX2)

// 8 rows of 32 bytes: vector i gets bytes 4 i to 4 i + 3 of each
inline void transpose_quads(__m256i v[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i++) t[i] = _mm256_castsi256_ps(v[i]);
  transpose8(t);
  for (int i = 0; i < 8; i++) v[i] = _mm256_castps_si256(t[i]);
}

// To the order of a packed Q8 block: numbers of 8 rows, at `to` the first of them, 32 columns
inline void store_numbers(__m256i v[8], bool pairs, uint8_t* to, int64_t half) {
  transpose_quads(v);
  const __m256i in_pairs = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13,
                                            2, 3, 6, 7, 10, 11, 14, 15);
  for (int i = 0; i < 8; i++) {
    if (!pairs) {
      _mm256_storeu_si256((__m256i*)(to + i * 64 + half * 32), v[i]);
      continue;
    }
    const __m256i both = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v[i], in_pairs), 0xd8);
    _mm_storeu_si128((__m128i*)(to + i * 64 + half * 16), _mm256_castsi256_si128(both));
    _mm_storeu_si128((__m128i*)(to + i * 64 + 32 + half * 16), _mm256_extracti128_si256(both, 1));
  }
}

// 16 rows of one Q8_0 or Q4_0 block as one packed block
template <int T>
inline void repack(const uint8_t* w, int64_t stride, uint8_t* to) {
  for (int r = 0; r < GROUP; r++) __builtin_memcpy(to + 2 * r, w + r * stride, 2);
  for (int half = 0; half < 2; half++) {
    const uint8_t* p = w + half * 8 * stride + 2;
    __m256i v[8];
    if (T == Q8_0) {
      for (int r = 0; r < 8; r++) v[r] = _mm256_loadu_si256((const __m256i*)(p + r * stride));
      store_numbers(v, WIDE, to + GROUP * 2, half);
    } else {
      for (int r = 0; r < 8; r++) v[r] = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(p + r * stride)));
      transpose_quads(v);
      for (int i = 0; i < 4; i++) _mm256_storeu_si256((__m256i*)(to + GROUP * 2 + i * 64 + half * 32), v[i]);
    }
  }
}

// 16 rows of one block of a K format. Numbers as in a packed Q8 block, 8 of them
struct KPanel {
  uint8_t numbers[8][GROUP * BLOCK];
  float scales[16][GROUP], minima[8][GROUP];  // of parts of 16 numbers (Q6_K, which has no minima) or 32
};

template <int T>
struct Panel {
  static constexpr bool pairs = WIDE && T != Q4_K;  // 16-bit products; else those of bytes, for which 4 bits are few enough
  static constexpr int part = T == Q6_K ? 16 : 32;
};

template <int T, int I>
inline void fill_part(const uint8_t* w, int64_t stride, KPanel& panel) {
  for (int half = 0; half < 2; half++) {
    __m256i v[8];
    for (int r = 0; r < 8; r++) {
      v[r] = (__m256i)part<T, I>(w + (half * 8 + r) * stride);
      if (T == Q6_K && Panel<T>::pairs) v[r] = _mm256_sub_epi8(v[r], _mm256_set1_epi8(32));
    }
    store_numbers(v, Panel<T>::pairs, panel.numbers[I], half);
  }
}

template <int T>
inline void fill_block(const uint8_t* w, int64_t stride, KPanel& panel) {
  for (int r = 0; r < GROUP; r++) {
    const uint8_t* p = w + r * stride;
    if (T == Q6_K) {
      const float d = half_to_float(read<uint16_t>(p + 208));
      for (int i = 0; i < 16; i++) panel.scales[i][r] = d * (float)(int8_t)p[192 + i];
    } else {
      f32x8 s, m;
      scales_and_minima(p, s, m);
      for (int i = 0; i < 8; i++) panel.scales[i][r] = s[i], panel.minima[i][r] = m[i];
    }
  }
  fill_part<T, 0>(w, stride, panel);
  fill_part<T, 1>(w, stride, panel);
  fill_part<T, 2>(w, stride, panel);
  fill_part<T, 3>(w, stride, panel);
  fill_part<T, 4>(w, stride, panel);
  fill_part<T, 5>(w, stride, panel);
  fill_part<T, 6>(w, stride, panel);
  fill_part<T, 7>(w, stride, panel);
}

// sums [M, 16] += what 256 columns give
template <int T, int M>
inline void k_tile(const KPanel& panel, const XGroup* x, int64_t ldq, float* sums) {
  constexpr bool pairs = Panel<T>::pairs;
  constexpr int PART = Panel<T>::part;
  for (int i = 0; i < 256 / PART; i++) {
    const int b = i * PART / BLOCK;
    const char* numbers[M];
    for (int m = 0; m < M; m++) {
      numbers[m] = pairs ? (const char*)(x[m * ldq].wide + i * PART) : (const char*)(x[m * ldq].q + i * PART);
    }
    __m256i dot[2 * M];
    dots<pairs ? PAIRS : QUADS, PART / (pairs ? 2 : 4), M>(panel.numbers[0] + i * PART * GROUP, numbers, dot);
    for (int h = 0; h < 2; h++) {
      const __m256 scale = _mm256_loadu_ps(panel.scales[i] + h * 8), minimum = _mm256_loadu_ps(panel.minima[b] + h * 8);
      for (int m = 0; m < M; m++) {
        const XGroup& group = x[m * ldq];
        const float x_scale = pairs ? group.scale[b] * WIDE_UNIT : group.scale[b];
        const float x_sum = x_scale * (float)(pairs ? group.wide_sum[b] : sum_of(group, b));
        __m256i whole = dot[2 * m + h];
        if (!pairs && T == Q6_K) whole = _mm256_sub_epi32(whole, _mm256_set1_epi32(32 * group.sum[i]));
        float* to = sums + m * PANEL + h * 8;
        __m256 acc = _mm256_loadu_ps(to);
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_mul_ps(scale, _mm256_set1_ps(x_scale)), acc);
        if (T != Q6_K) acc = _mm256_fnmadd_ps(minimum, _mm256_set1_ps(x_sum), acc);
        _mm256_storeu_ps(to, acc);
      }
    }
  }
}

template <int T>
void many_block_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  constexpr int M = 4, PACKED = T == Q8_0 ? Q8 : Q4, SIZE = T == Q8_0 ? Q8_BYTES : Q4_BYTES;
  const int64_t cols = p.w->cols, stride = line_bytes(T, cols), ldq = groups_of(cols);
  const int64_t whole = (last - first) / PANEL * PANEL;
  each_panel(p, first, first + whole, rows, local + PANEL * DEPTH, [&](int64_t n, int64_t group, float* sums) {
    const uint8_t* w = (const uint8_t*)p.w->data + n * stride;
    const XGroup* x = p.q + group;
    if (T == Q8_0 || T == Q4_0) {
      uint8_t* panel = (uint8_t*)local;
      const int64_t blocks = blocks_of_group(cols, group);
      for (int64_t b = 0; b < blocks; b++) repack<T>(w + (group * 8 + b) * Block<T>::size, stride, panel + b * SIZE);
      packed_tiles<PACKED>(panel, blocks, x, ldq, rows, sums);
      return;
    }
    KPanel& panel = *(KPanel*)local;
    fill_block<T>(w + group * Block<T>::size, stride, panel);
    int64_t m = 0;
    for (; m + M <= rows; m += M) k_tile<T, M>(panel, x + m * ldq, ldq, sums + m * PANEL);
    for (; m < rows; m++) k_tile<T, 1>(panel, x + m * ldq, ldq, sums + m * PANEL);
  });
  if (first + whole < last) block_rows<T>(p, first + whole, last, rows);
}

#else

template <int T>
void many_block_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float*) {
  block_rows<T>(p, first, last, rows);
}

#endif
