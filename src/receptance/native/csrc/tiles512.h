// The panels and tiles of tiles.h by AVX-512: numbers are bytes or (plain types of 16 bits) integers of 16 bits.
// Included by tiles.h, inside the namespace of the instruction set.

// One scale for 32 columns; with the rest of x; with a minimum; two scales; 16-bit integers
enum Kind { BYTES, BOTH, MINIMA, HALVES, WORDS };

template <int T>
constexpr int kind_of() {
  return T == F16 || T == BF16 ? WORDS : T == Q4_K || T == Q5_K ? MINIMA : T == Q6_K ? HALVES : BYTES;
}

// 16 rows x 256 columns. Bytes: vectors of 16 rows x 4 columns, 16-bit integers: of 16 rows x 2 columns
struct alignas(64) Widened {
  uint8_t numbers[8 * 16][64];
  float scale[8][2][GROUP], least[8][GROUP];
  int32_t start[8][2][GROUP];  // -128 times the sums of bytes: x is stored with 128 added
};

static_assert(WIDE_UNIT == 1.0f / 64, "words_of");

constexpr int ABREAST = 2;  // panels at a time

template <int KIND>
constexpr int STEPS = KIND == WORDS ? 16 : 8;  // vectors of a block

// Sums that take back the 128 of x, of columns 0-15 and 16-31 (HALVES), or of both together
template <int KIND>
inline void take_starts(Widened& w, int64_t b) {
  const __m512i zero = _mm512_setzero_si512(), middle = _mm512_set1_epi8((char)128);
  __m512i half[2] = {zero, zero};
  for (int j = 0; j < 8; j++) half[j / 4] = _mm512_dpbusd_epi32(half[j / 4], middle, _mm512_load_si512(w.numbers[8 * b + j]));
  if (KIND != HALVES) half[0] = _mm512_add_epi32(half[0], half[1]);
  _mm512_store_si512(w.start[b][0], _mm512_sub_epi32(zero, half[0]));
  _mm512_store_si512(w.start[b][1], _mm512_sub_epi32(zero, half[1]));
}

// A packed group of 16 rows, `blocks` blocks of 32 columns; what lies `ahead`, if not 0, is asked for
template <int T>
__attribute__((noinline)) void widen_packed(const uint8_t* p, int64_t blocks, Widened& w, int64_t ahead) {
  constexpr bool small = Packed<T>::numbers == BLOCK;
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* header = small ? p + b * Packed<T>::size : p;
    const uint8_t* numbers = header + Packed<T>::header + (small ? 0 : b * Packed<T>::part);
    for (int i = 0; ahead && i < Packed<T>::part; i += 64) __builtin_prefetch(numbers + ahead + i);
    const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)header));
    for (int j = 0; j < (T == Q8 ? 8 : 4); j++) {
      if (T == Q8) {
        _mm512_store_si512(w.numbers[8 * b + j], _mm512_loadu_si512(numbers + j * 64));
        continue;
      }
      __m512i low, high;
      read_bits<T>(numbers, j, low, high);
      if (T == Q4 || T == Q6_K) {
        const __m512i offset = _mm512_set1_epi8(T == Q4 ? 8 : 32);
        low = _mm512_sub_epi8(low, offset), high = _mm512_sub_epi8(high, offset);
      }
      _mm512_store_si512(w.numbers[8 * b + j], low);
      _mm512_store_si512(w.numbers[8 * b + j + 4], high);
    }
    take_starts<kind_of<T>()>(w, b);
    if (small) {
      _mm512_store_ps(w.scale[b][0], d);
      continue;
    }
    const __m256i stored = _mm256_loadu_si256((const __m256i*)(header + (T == Q6_K ? 32 + b * 32 : 64 + b / 2 * 32)));
    const __m512i pair = T == Q6_K ? _mm512_cvtepi8_epi16(stored) : _mm512_cvtepu8_epi16(stored);
    const __m512 first = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pair, 16), 16)));
    const __m512 second = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_srai_epi32(pair, 16)));
    _mm512_store_ps(w.scale[b][0], T != Q6_K && b % 2 ? second : first);
    _mm512_store_ps(w.scale[b][1], second);
    if (T == Q6_K) continue;
    const __m128i minima = _mm_loadu_si128((const __m128i*)(header + 192 + b * GROUP));
    const __m512 least = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(header + 32)));
    _mm512_store_ps(w.least[b], _mm512_mul_ps(least, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(minima))));
  }
}

// 16 rows of Q8_0, `stride` bytes apart
__attribute__((noinline)) void widen_q8_0(const uint8_t* p, int64_t stride, int64_t blocks, Widened& w) {
  for (int64_t b = 0; b < blocks; b++, p += Block<Q8_0>::size) {
    fill_quads<Q8_0, 0>(p, stride, w.numbers + 8 * b);
    for (int r = 0; r < GROUP; r++) w.scale[b][0][r] = half_to_float(read<uint16_t>(p + r * stride));
    take_starts<BYTES>(w, b);
  }
}

// v[i]: columns 2 i (the low half) and 2 i + 1 of 16 rows, in 16 bits, as integers with a scale of each row
template <int T>
inline void words_of(const __m512i* v, uint8_t (*to)[64], float* scale) {
  constexpr int MANTISSA = T == F16 ? 10 : 7, SHIFT = 12 - MANTISSA;
  const __m512i positive = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < 16; i++) most = _mm512_max_epu16(most, _mm512_and_si512(v[i], positive));
  most = _mm512_max_epu16(most, _mm512_or_si512(_mm512_srli_epi32(most, 16), _mm512_slli_epi32(most, 16)));
  most = _mm512_max_epu16(_mm512_srli_epi16(most, MANTISSA), one);  // the exponent, in both halves
  for (int i = 0; i < 16; i++) {
    const __m512i x = _mm512_and_si512(v[i], positive), e = _mm512_srli_epi16(x, MANTISSA);
    const __m512i implicit = _mm512_slli_epi16(_mm512_min_epu16(e, one), MANTISSA);  // but not of subnormal numbers
    __m512i m = _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi16((1 << MANTISSA) - 1)), implicit);
    m = _mm512_srlv_epi16(_mm512_slli_epi16(m, SHIFT + 1), _mm512_sub_epi16(most, _mm512_max_epu16(e, one)));
    m = _mm512_srli_epi16(_mm512_add_epi16(m, one), 1);
    _mm512_store_si512(to[i], _mm512_mask_sub_epi16(m, _mm512_movepi16_mask(v[i]), _mm512_setzero_si512(), m));
  }
  // 2^(exponent - bias - 12), and x's unit
  constexpr int BIAS = T == F16 ? 15 : 127;
  const __m512i e = _mm512_sub_epi32(_mm512_srli_epi32(most, 16), _mm512_set1_epi32(BIAS + 12 + 6 - 127));
  _mm512_store_si512(scale, _mm512_slli_epi32(_mm512_max_epi32(e, _mm512_setzero_si512()), 23));
}

// Up to 16 rows of 16-bit numbers, `stride` bytes apart; the results of those that are not there are nobody's
template <int T>
void widen_plain(const char* p, int64_t stride, int64_t height, int64_t blocks, Widened& w) {
  for (int64_t b = 0; b < blocks; b++, p += 64) {
    __m512i v[16];
    for (int64_t r = 0; r < 16; r++) {
      v[r] = r < height ? _mm512_loadu_si512(p + r * stride) : _mm512_setzero_si512();
      __builtin_prefetch(p + r * stride + 512);
    }
    transpose16(v);
    words_of<T>(v, w.numbers + 16 * b, w.scale[b][0]);
  }
}

// Lines of 16 outputs: 32 of them are a block
template <int T>
void widen_lines(const char* p, int64_t size, int64_t blocks, Widened& w) {
  for (int64_t b = 0; b < blocks; b++) {
    __m512i v[16];
    for (int i = 0; i < 16; i++, p += 2 * size) {
      __builtin_prefetch(p + 32 * size), __builtin_prefetch(p + 33 * size);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + size)));
      v[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    words_of<T>(v, w.numbers + 16 * b, w.scale[b][0]);
  }
}

inline __m512i four_bytes(const void* p) { return _mm512_set1_epi32(read<int32_t>(p)); }

// sums += x w, by quads of bytes (x unsigned) or pairs of 16-bit numbers. By hand: GCC copies the sums before and after each
// of its intrinsics, two moves for every product
template <int KIND>
inline void add_products(__m512i& sums, __m512i x, __m512i w) {
#if defined(__AVX512VNNI__)
  if (KIND == WORDS) __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
  else __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
#else
  sums = KIND == WORDS ? _mm512_dpwssd_epi32(sums, x, w) : _mm512_dpbusd_epi32(sums, x, w);
#endif
}

// sums [G, ..., 16] (lds numbers apart) of M rows of x += what `blocks` blocks give
template <int KIND, int M, int G>
__attribute__((noinline)) void wide_tile(const Widened* w, int64_t blocks, const XGroup* x, int64_t ldq, float* sums,
                                         int64_t lds) {
  constexpr int PARTS = KIND == HALVES || KIND == BOTH ? 2 : 1, COUNT = STEPS<KIND> / (KIND == HALVES ? 2 : 1);
  for (int64_t b = 0; b < blocks; b++) {
    for (int part = 0; part < PARTS; part++) {
      __m512i dot[G][M];
#pragma GCC unroll 2
      for (int g = 0; g < G; g++) {
        __m512i start = KIND == WORDS ? _mm512_setzero_si512() : _mm512_load_si512(w[g].start[b][KIND == BOTH ? 0 : part]);
        __asm__("" : "+v"(start));  // else GCC clears sums of zero in memory, by `rep stos`
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) dot[g][m] = start;
      }
#pragma GCC unroll 2
      for (int j = 0; j < COUNT; j++) {
        __m512i ws[G];
#pragma GCC unroll 2
        for (int g = 0; g < G; g++) ws[g] = _mm512_load_si512(w[g].numbers[STEPS<KIND> * b + (KIND == BOTH ? 0 : part * COUNT) + j]);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const XGroup& group = x[m * ldq];
          const uint8_t* bytes = (KIND == BOTH && part ? group.rest_shifted : group.shifted) + b * BLOCK;
          const __m512i xs = KIND == WORDS ? four_bytes(group.wide + b * BLOCK + 2 * j)
                                           : four_bytes(bytes + 4 * (KIND == BOTH ? j : part * COUNT + j));
#pragma GCC unroll 2
          for (int g = 0; g < G; g++) add_products<KIND>(dot[g][m], xs, ws[g]);
        }
      }
#pragma GCC unroll 2
      for (int g = 0; g < G; g++) {
        __m512 scale = _mm512_load_ps(w[g].scale[b][KIND == BOTH ? 0 : part]);
        if (KIND == BOTH && part) scale = _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 256));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const XGroup& group = x[m * ldq];
          float* to = sums + g * lds + m * GROUP;
          const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(group.scale[b]));
          __m512 acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[g][m]), both, _mm512_loadu_ps(to));
          if (KIND == MINIMA) acc = _mm512_fnmadd_ps(_mm512_load_ps(w[g].least[b]), _mm512_set1_ps(group.taken[b]), acc);
          _mm512_storeu_ps(to, acc);
        }
      }
    }
    __asm__ volatile("" ::: "memory");
  }
}

template <int KIND, int G>
inline void wide_tiles(const Widened* w, int64_t blocks, const XGroup* x, int64_t ldq, int64_t rows, float* sums) {
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) wide_tile<KIND, 8, G>(w, blocks, x + m * ldq, ldq, sums + m * GROUP, rows * GROUP);
  for (; m + 4 <= rows; m += 4) wide_tile<KIND, 4, G>(w, blocks, x + m * ldq, ldq, sums + m * GROUP, rows * GROUP);
  for (; m < rows; m++) wide_tile<KIND, 1, G>(w, blocks, x + m * ldq, ldq, sums + m * GROUP, rows * GROUP);
}
