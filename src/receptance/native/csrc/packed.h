// Packed matrices: 16 rows interleaved, so that one vector of the input serves all of them. core.h says how they lie.
// Included by each isa_*.cpp after blocks.h, inside its own namespace.
//
// `packed_tile` is all there is to them: 16 rows, up to 256 columns, M rows of x. One row of x takes four groups of 16 rows
// at a time, each a stream of its own; many take panels (panels.h).

template <int T>
struct Packed {
  static constexpr int numbers = packed_numbers(T), size = packed_bytes(T);
  static constexpr int header = T == Q8 || T == Q4 ? 32 : T == Q6_K ? 288 : 320;  // before the numbers
  static constexpr int part = (size - header) / (numbers / BLOCK);               // 32 columns of them
};

#if defined(ISA_AVX2)

inline __m256i load256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m256i four_of(const void* x, int j) { return _mm256_set1_epi32(read<int32_t>((const char*)x + 4 * j)); }
inline __m256 half8(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// to += whole * scale - minimum * taken
inline void add_scaled(float* to, __m256i whole, __m256 scale) {
  _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scale, _mm256_loadu_ps(to)));
}
inline void add_scaled(float* to, __m256i whole, __m256 scale, __m256 minimum, __m256 taken) {
  const __m256 sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scale, _mm256_loadu_ps(to));
  _mm256_storeu_ps(to, _mm256_fnmadd_ps(minimum, taken, sums));
}

// Columns 4 j to 4 j + 3 (HIGH: 16 further) of 8 rows, unsigned. p: the numbers of 32 columns, of these rows
template <int T, bool HIGH>
inline __m256i quad(const uint8_t* p, int j) {
  __m256i v = load256(p + j * 64);
  v = _mm256_and_si256(HIGH ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
  if (T == Q5_K) {  // bit i of a byte belongs to columns 4 i to 4 i + 3
    const __m256i h = load256(p + 256);
    const __m256i at = HIGH ? _mm256_srli_epi16(h, j) : _mm256_slli_epi16(h, 4 - j);
    v = _mm256_or_si256(v, _mm256_and_si256(at, _mm256_set1_epi8(16)));
  }
  if (T == Q6_K) {  // of two vectors, bits 2 i and 2 i + 1: columns 8 i to 8 i + 3 in the first, 8 i + 4 to 8 i + 7 in the second
    const __m256i h = load256(p + 256 + j % 2 * 64);
    const __m256i at = HIGH ? _mm256_srli_epi16(h, j / 2 * 2) : _mm256_slli_epi16(h, 4 - j / 2 * 2);
    v = _mm256_or_si256(v, _mm256_and_si256(at, _mm256_set1_epi8(48)));
  }
  return v;
}

constexpr int AHEAD = 1024;  // bytes: with one row of x. Q8 is read as fast without, the others a fifth slower

// The named sums are no arrays, and loops are not unrolled further than said: GCC would keep sums in memory, at a third of the
// speed. a: rows 0-7, b: rows 8-15.
#define IN_ORDER(v) __asm__ volatile("" : "+x"(v))
#define FOR_M(DO) DO(0) if constexpr (M > 1) { DO(1) } if constexpr (M > 2) { DO(2) DO(3) }
#define SUMS __m256i &a0, __m256i &a1, __m256i &a2, __m256i &a3, __m256i &b0, __m256i &b1, __m256i &b2, __m256i &b3
#define INPUTS const int8_t *x0, const int8_t *x1, const int8_t *x2, const int8_t *x3
#define STEP(m)                                                                  \
  {                                                                              \
    __m256i xs = four_of(x##m, HIGH ? j + 4 : j);                                \
    IN_ORDER(xs);                                                                \
    a##m = _mm256_add_epi16(a##m, _mm256_maddubs_epi16(w, xs));                  \
    b##m = _mm256_add_epi16(b##m, _mm256_maddubs_epi16(v, xs));                  \
  }

// 16-bit sums of 4 columns
template <int T, bool HIGH, int M>
inline __attribute__((always_inline)) void step(const uint8_t* p, int j, INPUTS, SUMS) {
  const __m256i w = quad<T, HIGH>(p, j), v = quad<T, HIGH>(p + 32, j);
  FOR_M(STEP)
}
#undef STEP

// The same of 8 rows
#define STEP(m)                                                                  \
  {                                                                              \
    __m256i xs = four_of(x##m, HIGH ? j + 4 : j);                                \
    IN_ORDER(xs);                                                                \
    a##m = _mm256_add_epi16(a##m, _mm256_maddubs_epi16(w, xs));                  \
  }
template <int T, bool HIGH, int M>
inline __attribute__((always_inline)) void half_step(const uint8_t* p, int j, INPUTS, __m256i& a0, __m256i& a1, __m256i& a2,
                                                     __m256i& a3) {
  const __m256i w = quad<T, HIGH>(p, j);
  FOR_M(STEP)
}
#undef STEP
#define ALL_INPUTS x0, x1, x2, x3
#define ALL_SUMS a0, a1, a2, a3, b0, b1, b2, b3

// 16 rows of Q8, M rows of x, block b: pairs of columns, by x of 16 bits. p: the numbers
template <int M>
inline __attribute__((always_inline)) void wide_rows(const uint8_t* p, const uint8_t* header, int64_t b, const XGroup& g0,
                                                     const XGroup& g1, const XGroup& g2, const XGroup& g3, float* sums) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i a0 = zero, a1 = zero, a2 = zero, a3 = zero, b0 = zero, b1 = zero, b2 = zero, b3 = zero;
  const int16_t *x0 = g0.wide + b * BLOCK, *x1 = g1.wide + b * BLOCK, *x2 = g2.wide + b * BLOCK, *x3 = g3.wide + b * BLOCK;
#define STEP(m)                                                     \
  {                                                                 \
    __m256i xs = four_of(x##m, j);                                  \
    IN_ORDER(xs);                                                   \
    a##m = _mm256_add_epi32(a##m, _mm256_madd_epi16(w, xs));        \
    b##m = _mm256_add_epi32(b##m, _mm256_madd_epi16(v, xs));        \
  }
#pragma GCC unroll 2
  for (int j = 0; j < 16; j++) {
    const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + j * 32)));
    const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + j * 32 + 16)));
    FOR_M(STEP)
  }
#undef STEP
  const __m256 d = half8(header), e = half8(header + 16);
#define END(m)                                                              \
  {                                                                         \
    const __m256 x_scale = _mm256_set1_ps(g##m.scale[b] * WIDE_UNIT);       \
    add_scaled(sums + m * GROUP, a##m, _mm256_mul_ps(d, x_scale));          \
    add_scaled(sums + m * GROUP + 8, b##m, _mm256_mul_ps(e, x_scale));      \
  }
  FOR_M(END)
#undef END
}

// The same of the others: quads of columns, by x of 8 bits
template <int T, int M>
inline __attribute__((always_inline)) void sixteen_rows(const uint8_t* p, const uint8_t* header, int64_t b, const XGroup& g0,
                                                        const XGroup& g1, const XGroup& g2, const XGroup& g3, float* sums) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i a0 = zero, a1 = zero, a2 = zero, a3 = zero, b0 = zero, b1 = zero, b2 = zero, b3 = zero;
  const int8_t *x0 = g0.q + b * BLOCK, *x1 = g1.q + b * BLOCK, *x2 = g2.q + b * BLOCK, *x3 = g3.q + b * BLOCK;
  __m256 least_a = _mm256_setzero_ps(), least_b = least_a;
  if constexpr (T == Q4 || T == Q4_K) {  // 8 steps of 15 x 127 x 2 do not overflow
#pragma GCC unroll 2
    for (int j = 0; j < 4; j++) {
      step<T, false, M>(p, j, ALL_INPUTS, ALL_SUMS);
      step<T, true, M>(p, j, ALL_INPUTS, ALL_SUMS);
    }
  }
  if constexpr (T == Q4) {
    const __m256i ones = _mm256_set1_epi16(1);
#define WIDEN(m) a##m = _mm256_madd_epi16(a##m, ones), b##m = _mm256_madd_epi16(b##m, ones);
    FOR_M(WIDEN)
#undef WIDEN
    least_a = _mm256_mul_ps(half8(header), _mm256_set1_ps(8)), least_b = _mm256_mul_ps(half8(header + 16), _mm256_set1_ps(8));
  } else {
    // two scales of each row, of this block and its neighbour, or in Q6_K of the two halves of this one
    const uint8_t* pair = header + (T == Q6_K ? 32 + b * 32 : 64 + b / 2 * 32);
    __m256i both[2], first[2], second[2];
    for (int half = 0; half < 2; half++) {
      const __m128i stored = _mm_loadu_si128((const __m128i*)(pair + half * 16));
      both[half] = T == Q6_K ? _mm256_cvtepi8_epi16(stored) : _mm256_cvtepu8_epi16(stored);
      first[half] = _mm256_blend_epi16(both[half], _mm256_slli_epi32(both[half], 16), 0xaa);
      second[half] = _mm256_blend_epi16(both[half], _mm256_srli_epi32(both[half], 16), 0x55);
      if (T != Q6_K && b % 2) first[half] = second[half];
    }
    if constexpr (T == Q4_K) {
#define SCALED(m) a##m = _mm256_madd_epi16(a##m, first[0]), b##m = _mm256_madd_epi16(b##m, first[1]);
      FOR_M(SCALED)
#undef SCALED
    } else {
      __m256i whole0 = zero, whole1 = zero, whole2 = zero, whole3 = zero;
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {  // there are no registers for all
        __m256i c0 = zero, c1 = zero, c2 = zero, c3 = zero;
#define INTO(m) c##m = _mm256_add_epi32(c##m, _mm256_madd_epi16(a##m, scale)), a##m = zero;
#define PART(HIGH, FIRST)                                                                                               \
  {                                                                                                                     \
    half_step<T, HIGH, M>(p + half * 32, FIRST, ALL_INPUTS, a0, a1, a2, a3);                                            \
    half_step<T, HIGH, M>(p + half * 32, FIRST + 1, ALL_INPUTS, a0, a1, a2, a3);                                        \
    const __m256i scale = HIGH && T == Q6_K ? second[half] : first[half];                                               \
    FOR_M(INTO)                                                                                                         \
  }
        PART(false, 0) PART(false, 2) PART(true, 0) PART(true, 2)  // 2 steps of 63 x 127 x 2 do not overflow
#undef PART
#undef INTO
        // the numbers of Q6_K are stored with 32 added
#define TAKE(m)                                                                                            \
  if constexpr (T == Q6_K) {                                                                               \
    const __m256i taken = _mm256_madd_epi16(both[half], four_of(g##m.sum, (int)b));                        \
    c##m = _mm256_sub_epi32(c##m, _mm256_slli_epi32(taken, 5));                                            \
  }                                                                                                        \
  if (half == 0) b##m = c##m; else whole##m = c##m;
        FOR_M(TAKE)
#undef TAKE
      }
#define SWAP(m) a##m = b##m, b##m = whole##m;
      FOR_M(SWAP)
#undef SWAP
    }
    if constexpr (T != Q6_K) {
      const __m128i minima = _mm_loadu_si128((const __m128i*)(header + 192 + b * GROUP));
      least_a = _mm256_mul_ps(half8(header + 32), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(minima)));
      least_b = _mm256_mul_ps(half8(header + 48), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(minima, 8))));
    }
  }
  const __m256 d = half8(header), e = half8(header + 16);
#define END(m)                                                                                       \
  {                                                                                                  \
    const __m256 x_scale = _mm256_set1_ps(g##m.scale[b]), taken = _mm256_set1_ps(g##m.taken[b]);     \
    float* to = sums + m * GROUP;                                                                    \
    if constexpr (T == Q6_K) {                                                                       \
      add_scaled(to, a##m, _mm256_mul_ps(d, x_scale));                                               \
      add_scaled(to + 8, b##m, _mm256_mul_ps(e, x_scale));                                           \
    } else {                                                                                         \
      add_scaled(to, a##m, _mm256_mul_ps(d, x_scale), least_a, taken);                               \
      add_scaled(to + 8, b##m, _mm256_mul_ps(e, x_scale), least_b, taken);                           \
    }                                                                                                \
  }
  FOR_M(END)
#undef END
}

// sums [G, M, 16] += what `blocks` blocks of 32 columns give, at most 8, in G groups of 16 rows that lie `bytes` apart, each a
// stream of its own. w: the first byte; x [M, ldq]; M = 1, 2 or 4
template <int T, int M, int G>
__attribute__((noinline)) void packed_tile(const uint8_t* w, int64_t bytes, int64_t blocks, const XGroup* x, int64_t ldq,
                                           float* sums) {
  const XGroup &g0 = x[0], &g1 = x[M > 1 ? ldq : 0], &g2 = x[M > 2 ? 2 * ldq : 0], &g3 = x[M > 2 ? 3 * ldq : 0];
  constexpr bool small = Packed<T>::numbers == BLOCK;
  for (int64_t b = 0; b < blocks; b++) {
    for (int g = 0; g < G; g++) {
      const uint8_t* header = w + g * bytes + (small ? b * Packed<T>::size : 0);
      const uint8_t* numbers = header + Packed<T>::header + (small ? 0 : b * Packed<T>::part);
      for (int i = 0; M == 1 && T != Q8 && i < Packed<T>::part; i += 64) __builtin_prefetch(numbers + i + AHEAD);
      if constexpr (T == Q8) wide_rows<M>(numbers, header, b, g0, g1, g2, g3, sums + g * M * GROUP);
      else sixteen_rows<T, M>(numbers, header, b, g0, g1, g2, g3, sums + g * M * GROUP);
      __asm__ volatile("" ::: "memory");  // sums stay where they are: there are no registers for them
    }
  }
}

#undef IN_ORDER
#undef ALL_INPUTS
#undef ALL_SUMS
#undef INPUTS
#undef SUMS
#undef FOR_M

#else

#if defined(ISA_AVX512)

// Columns 4 j to 4 j + 3 and 16 further of a packed block of 16 rows in 4 to 6 bits, as bytes without sign
template <int T>
inline void read_bits(const uint8_t* numbers, int j, __m512i& low, __m512i& high) {
  const __m512i fifteen = _mm512_set1_epi8(15), both = _mm512_loadu_si512(numbers + j * 64);
  low = _mm512_and_si512(both, fifteen), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen);
  if (T == Q5_K) {  // bit i of a byte belongs to columns 4 i to 4 i + 3
    const __m512i h = _mm512_loadu_si512(numbers + 256), bit = _mm512_set1_epi8(16);
    low = _mm512_or_si512(low, _mm512_and_si512(_mm512_slli_epi16(h, 4 - j), bit));
    high = _mm512_or_si512(high, _mm512_and_si512(_mm512_srli_epi16(h, j), bit));
  }
  if (T == Q6_K) {  // of two vectors, bits 2 i and 2 i + 1: columns 8 i to 8 i + 3, and in the second 8 i + 4 to 8 i + 7
    const __m512i h = _mm512_loadu_si512(numbers + 256 + j % 2 * 64), twice = _mm512_set1_epi8(48);
    low = _mm512_or_si512(low, _mm512_and_si512(_mm512_slli_epi16(h, 4 - j / 2 * 2), twice));
    high = _mm512_or_si512(high, _mm512_and_si512(_mm512_srli_epi16(h, j / 2 * 2), twice));
  }
}

template <int T, int M>
inline void one_tile(const uint8_t* w, int64_t blocks, const XGroup* x, int64_t ldq, float* sums) {
  constexpr bool small = Packed<T>::numbers == BLOCK;
  constexpr int offset = T == Q8 ? 128 : T == Q4 ? 8 : T == Q6_K ? 32 : 0;  // added to the numbers
  const bool has_rest = T == Q8 && x->has_rest[0];
  __m512 acc[M];
  for (int m = 0; m < M; m++) acc[m] = _mm512_loadu_ps(sums + m * GROUP);
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* header = small ? w + b * Packed<T>::size : w;
    const uint8_t* p = header + Packed<T>::header + (small ? 0 : b * Packed<T>::part);
    for (int i = 0; M == 1 && i < Packed<T>::part; i += 64) __builtin_prefetch(p + i + 2048);
    const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)header));
    __m512i dot[M], upper[M];  // Q6_K: columns 0-15 and 16-31, which have scales of their own; Q8: the rest of x
    for (int m = 0; m < M; m++) {
      const int16_t* sum = x[m * ldq].sum + 2 * b;
      dot[m] = _mm512_set1_epi32(-offset * (T == Q6_K ? sum[0] : sum[0] + sum[1]));
      upper[m] = _mm512_set1_epi32(-offset * (T == Q8 ? x[m * ldq].rest_sum[b] : sum[1]));
    }
    for (int j = 0; j < (T == Q8 ? 8 : 4); j++) {
      __m512i low, high;
      if constexpr (T == Q8) {
        low = high = _mm512_xor_si512(_mm512_loadu_si512(p + j * 64), _mm512_set1_epi8((char)0x80));
      } else {
        read_bits<T>(p, j, low, high);
      }
      for (int m = 0; m < M; m++) {
        const int8_t* q = x[m * ldq].q + b * BLOCK + 4 * j;
        dot[m] = _mm512_dpbusd_epi32(dot[m], low, _mm512_set1_epi32(read<int32_t>(q)));
        if (T == Q8) {
          const int8_t* rest = x[m * ldq].rest + b * BLOCK + 4 * j;
          if (has_rest) upper[m] = _mm512_dpbusd_epi32(upper[m], low, _mm512_set1_epi32(read<int32_t>(rest)));
          continue;
        }
        __m512i& to = T == Q6_K ? upper[m] : dot[m];
        to = _mm512_dpbusd_epi32(to, high, _mm512_set1_epi32(read<int32_t>(q + 16)));
      }
    }
    if (small) {
      for (int m = 0; m < M; m++) {
        const __m512 both = _mm512_mul_ps(d, _mm512_set1_ps(x[m * ldq].scale[b]));
        __m512 sum = _mm512_cvtepi32_ps(dot[m]);
        if (has_rest) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper[m]), _mm512_set1_ps(1.0f / 256), sum);
        acc[m] = _mm512_fmadd_ps(sum, both, acc[m]);
      }
      continue;
    }
    const __m256i stored = _mm256_loadu_si256((const __m256i*)(header + (T == Q6_K ? 32 + b * 32 : 64 + b / 2 * 32)));
    const __m512i pair = T == Q6_K ? _mm512_cvtepi8_epi16(stored) : _mm512_cvtepu8_epi16(stored);
    const __m512 first = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pair, 16), 16)));
    const __m512 second = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(pair, 16)));
    __m512 least = _mm512_setzero_ps();
    if (T != Q6_K) {
      const __m128i minima = _mm_loadu_si128((const __m128i*)(header + 192 + b * GROUP));
      least = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(header + 32))),
                            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(minima)));
    }
    for (int m = 0; m < M; m++) {
      const XGroup& group = x[m * ldq];
      const __m512 x_scale = _mm512_set1_ps(group.scale[b]), scale = T != Q6_K && b % 2 ? second : first;
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m]), _mm512_mul_ps(scale, x_scale), acc[m]);
      if (T == Q6_K) acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(upper[m]), _mm512_mul_ps(second, x_scale), acc[m]);
      else acc[m] = _mm512_fnmadd_ps(least, _mm512_set1_ps(group.taken[b]), acc[m]);
    }
  }
  for (int m = 0; m < M; m++) _mm512_storeu_ps(sums + m * GROUP, acc[m]);
}

#else

// Columns 4 i to 4 i + 3 of 16 rows in quads[i], without what is added to them
template <int T>
inline void unpack(const uint8_t* p, int8_t (*quads)[64]) {
  for (int i = 0; i < 8; i++) {
    for (int k = 0; k < 64; k++) {
      if (T == Q8) {
        quads[i][k] = (int8_t)p[i * 64 + k];
        continue;
      }
      int number = p[i % 4 * 64 + k] >> i / 4 * 4 & 15;
      if (T == Q5_K) number |= (p[256 + k] >> i & 1) << 4;
      if (T == Q6_K) number |= (p[256 + i % 2 * 64 + k] >> i / 2 * 2 & 3) << 4;
      quads[i][k] = (int8_t)(number - (T == Q4 ? 8 : T == Q6_K ? 32 : 0));
    }
  }
}

template <int T, int M>
void one_tile(const uint8_t* w, int64_t blocks, const XGroup* x, int64_t ldq, float* sums) {
  constexpr bool small = Packed<T>::numbers == BLOCK, wide = T == Q8 && WIDE;
  int8_t quads[8][64];
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* header = small ? w + b * Packed<T>::size : w;
    unpack<T>(header + Packed<T>::header + (small ? 0 : b * Packed<T>::part), quads);
    float scales[2][GROUP], minima[GROUP] = {};  // of columns 0-15 and 16-31
    for (int r = 0; r < GROUP; r++) {
      const float d = half_to_float(read<uint16_t>(header + 2 * r));
      const uint8_t* pair = header + (T == Q6_K ? 32 + b * 32 : 64 + b / 2 * 32) + 2 * r;
      if (small) scales[0][r] = scales[1][r] = d;
      else if (T == Q6_K) scales[0][r] = d * (float)(int8_t)pair[0], scales[1][r] = d * (float)(int8_t)pair[1];
      else scales[0][r] = scales[1][r] = d * (float)pair[b % 2];
      if (T == Q4_K || T == Q5_K) minima[r] = half_to_float(read<uint16_t>(header + 32 + 2 * r)) * (float)header[192 + b * GROUP + r];
    }
    for (int m = 0; m < M; m++) {
      const XGroup& group = x[m * ldq];
      int32_t dot[2][GROUP] = {}, rest[GROUP] = {};
      for (int i = 0; i < 8; i++) {
#if defined(ISA_NEON)
        const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(group.q + b * BLOCK + 4 * i)));
        for (int r = 0; r < GROUP; r += 4) {
          vst1q_s32(dot[i / 4] + r, vdotq_s32(vld1q_s32(dot[i / 4] + r), vld1q_s8(quads[i] + 4 * r), xs));
        }
        if (T != Q8 || !group.has_rest[b]) continue;
        const int8x16_t rs = vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(group.rest + b * BLOCK + 4 * i)));
        for (int r = 0; r < GROUP; r += 4) {
          vst1q_s32(rest + r, vdotq_s32(vld1q_s32(rest + r), vld1q_s8(quads[i] + 4 * r), rs));
        }
#else
        for (int r = 0; r < GROUP; r++) {
          for (int k = 0; k < 4; k++) {
            const int64_t c = b * BLOCK + 4 * i + k;
            dot[i / 4][r] += quads[i][4 * r + k] * (wide ? group.wide[c] : group.q[c]);
          }
        }
#endif
      }
      const float x_scale = group.scale[b] * (wide ? WIDE_UNIT : 1);
      for (int r = 0; r < GROUP; r++) {
        const float both = (float)dot[0][r] * scales[0][r] + ((float)dot[1][r] + (float)rest[r] / 256) * scales[1][r];
        sums[m * GROUP + r] += both * x_scale - minima[r] * group.taken[b];
      }
    }
  }
}

#endif

template <int T, int M, int G>
inline void packed_tile(const uint8_t* w, int64_t bytes, int64_t blocks, const XGroup* x, int64_t ldq, float* sums) {
  for (int g = 0; g < G; g++) one_tile<T, M>(w + g * bytes, blocks, x, ldq, sums + g * M * GROUP);
}
#endif

// M at a time, then what is left
template <int T>
inline void packed_tiles(const uint8_t* w, int64_t blocks, const XGroup* x, int64_t ldq, int64_t rows, float* sums) {
#if defined(ISA_AVX512)
  constexpr int M = 8;
#else
  constexpr int M = 4;
#endif
  int64_t m = 0;
  for (; m + M <= rows; m += M) packed_tile<T, M, 1>(w, 0, blocks, x + m * ldq, ldq, sums + m * GROUP);
  for (; m + 2 <= rows; m += 2) packed_tile<T, 2, 1>(w, 0, blocks, x + m * ldq, ldq, sums + m * GROUP);
  for (; m < rows; m++) packed_tile<T, 1, 1>(w, 0, blocks, x + m * ldq, ldq, sums + m * GROUP);
}

inline int64_t blocks_of_group(int64_t cols, int64_t group) {
  const int64_t left = cols / BLOCK - group * 8;
  return left < 8 ? left : 8;
}

inline void put_group(const Product& p, int64_t n, int64_t last, float* sums) {
  put(p, 0, n, last - n < GROUP ? last - n : GROUP, sums);
}

// Rows first..last, of which `first` begins a group of 16, with one row of x: four streams, each over groups that follow one
// another, since the end of a group of 768 columns comes before the processor has got into its stride
template <int T>
void packed_row(const Product& p, int64_t first, int64_t last) {
  constexpr int STREAMS = 4;
  const int64_t cols = p.w->cols, bytes = cols / Packed<T>::numbers * Packed<T>::size;  // of 16 rows
  constexpr int64_t step = 8 * BLOCK / Packed<T>::numbers * Packed<T>::size;            // 256 columns of them
  const int64_t total = (last - first + GROUP - 1) / GROUP, each = total / STREAMS;
  const uint8_t* w = (const uint8_t*)p.w->data + first / GROUP * bytes;
  float sums[STREAMS][GROUP];
  for (int64_t n = 0; n < each; n++) {
    __builtin_memset(sums, 0, sizeof sums);
    for (int64_t group = 0; group < groups_of(cols); group++) {
      packed_tile<T, 1, STREAMS>(w + n * bytes + group * step, each * bytes, blocks_of_group(cols, group), p.q + group, 0, sums[0]);
    }
    for (int64_t i = 0; i < STREAMS; i++) put_group(p, first + (i * each + n) * GROUP, last, sums[i]);
  }
  for (int64_t n = STREAMS * each; n < total; n++) {
    __builtin_memset(sums[0], 0, sizeof sums[0]);
    for (int64_t group = 0; group < groups_of(cols); group++) {
      packed_tile<T, 1, 1>(w + n * bytes + group * step, 0, blocks_of_group(cols, group), p.q + group, 0, sums[0]);
    }
    put_group(p, first + n * GROUP, last, sums[0]);
  }
}

// 16 rows of a block format as a packed block: the same numbers and scales in another order ------------------------------------

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
#endif

#if defined(ISA_AVX512)
inline void transpose16(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

// quads[i] = columns 4 i to 4 i + 3 of part I of 16 rows
template <int T, int I>
inline void fill_quads(const uint8_t* w, int64_t stride, uint8_t (*quads)[64]) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  for (int half = 0; half < 2; half++) {
    __m256 v[8];
    for (int r = 0; r < 8; r++) v[r] = (__m256)part<T, I>(w + (half * 8 + r) * stride);
    transpose8(v);
    for (int i = 0; i < 8; i++) _mm256_storeu_ps((float*)(quads[i] + half * 32), v[i]);
  }
#else
  for (int r = 0; r < GROUP; r++) {
    const u8x32 v = part<T, I>(w + r * stride);
    for (int c = 0; c < BLOCK; c++) quads[c / 4][4 * r + c % 4] = v[c];
  }
#endif
}

template <int T, int I>
inline void repack_part(const uint8_t* w, int64_t stride, uint8_t* to) {
  uint8_t quads[8][64];
  fill_quads<T, I>(w, stride, quads);
  if (T == Q8_0) {
    for (int i = 0; i < 8; i++, to += 64) {
      if (Q8_TOGETHER == 4) {
        __builtin_memcpy(to, quads[i], 64);
        continue;
      }
#if defined(ISA_AVX2)
      // even pairs of bytes, then odd ones: in each lane, in each half, in both
      const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                             0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
      const __m256i a = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load256(quads[i]), order), 0xd8);
      const __m256i b = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load256(quads[i] + 32), order), 0xd8);
      _mm256_storeu_si256((__m256i*)to, _mm256_permute2x128_si256(a, b, 0x20));
      _mm256_storeu_si256((__m256i*)(to + 32), _mm256_permute2x128_si256(a, b, 0x31));
#else
      for (int r = 0; r < GROUP; r++) {
        __builtin_memcpy(to + 2 * r, quads[i] + 4 * r, 2);
        __builtin_memcpy(to + 2 * GROUP + 2 * r, quads[i] + 4 * r + 2, 2);
      }
#endif
    }
    return;
  }
  for (int i = 0; i < 4; i++) {
    for (int k = 0; k < 64; k++) to[i * 64 + k] = (uint8_t)((quads[i][k] & 15) | quads[i + 4][k] << 4);
  }
  for (int k = 0; T == Q5_K && k < 64; k++) {
    int high = 0;
    for (int i = 0; i < 8; i++) high |= quads[i][k] >> 4 << i;
    to[256 + k] = (uint8_t)high;
  }
  for (int k = 0; T == Q6_K && k < 128; k++) {
    int high = 0;
    for (int i = 0; i < 4; i++) high |= quads[2 * i + k / 64][k % 64] >> 4 << 2 * i;
    to[256 + k] = (uint8_t)high;
  }
}

template <int T>
__attribute__((noinline)) void repack(const uint8_t* w, int64_t stride, uint8_t* to) {
  constexpr int KERNEL = T == Q8_0 ? Q8 : T == Q4_0 ? Q4 : T, PART = Packed<KERNEL>::part;
  uint8_t* numbers = to + Packed<KERNEL>::header;
  for (int r = 0; r < GROUP; r++) {
    const uint8_t* p = w + r * stride;
    __builtin_memcpy(to + 2 * r, p + (T == Q6_K ? 208 : 0), 2);
    if (T == Q6_K) {
      for (int i = 0; i < 8; i++) __builtin_memcpy(to + 32 + i * 32 + 2 * r, p + 192 + 2 * i, 2);
    } else if (T == Q4_K || T == Q5_K) {
      __builtin_memcpy(to + 32 + 2 * r, p + 2, 2);
      const SmallScales small = small_scales(p);
      for (int i = 0; i < 8; i++) {
        to[64 + i / 2 * 32 + 2 * r + i % 2] = (uint8_t)(small.scales >> 8 * i);
        to[192 + i * GROUP + r] = (uint8_t)(small.minima >> 8 * i);
      }
    }
  }
  repack_part<T, 0>(w, stride, numbers);
  if (T == Q8_0 || T == Q4_0) return;
  repack_part<T, 1>(w, stride, numbers + PART);
  repack_part<T, 2>(w, stride, numbers + 2 * PART);
  repack_part<T, 3>(w, stride, numbers + 3 * PART);
  repack_part<T, 4>(w, stride, numbers + 4 * PART);
  repack_part<T, 5>(w, stride, numbers + 5 * PART);
  repack_part<T, 6>(w, stride, numbers + 6 * PART);
  repack_part<T, 7>(w, stride, numbers + 7 * PART);
}

// Groups first..last of a matrix in a block format, whose rows are whole groups
template <int T>
void repack_groups(const Matrix& from, uint8_t* to, int64_t first, int64_t last) {
  constexpr int KERNEL = T == Q8_0 ? Q8 : T == Q4_0 ? Q4 : T;
  const int64_t stride = line_bytes(T, from.cols), units = from.cols / Block<T>::numbers;
  for (int64_t g = first; g < last; g++) {
    const uint8_t* w = (const uint8_t*)from.data + g * GROUP * stride;
    for (int64_t u = 0; u < units; u++) {
      repack<T>(w + u * Block<T>::size, stride, to + (g * units + u) * Packed<KERNEL>::size);
    }
  }
}
