// The panels and tiles of tiles.h by AVX2: numbers of 4 to 6 bits are bytes, whose products are added in 16 bits, those of 8 bits
// integers of 16.
// Included by tiles.h, inside the namespace of the instruction set.

// Integers of 16 bits; bytes with one scale and a minimum; the same with 5 bits; with two scales
enum Kind { WORDS, MINIMA, FIVE_BITS, HALVES };

template <int T>
constexpr int kind_of() {
  return T == Q4 || T == Q4_K ? MINIMA : T == Q5_K ? FIVE_BITS : T == Q6_K ? HALVES : WORDS;
}

constexpr int ABREAST = 1;  // panels at a time

// 16 rows x 256 columns. Bytes: vectors of 16 rows x 4 columns, 16-bit integers: of 16 rows x 2 columns
struct alignas(64) Widened {
  uint8_t numbers[8 * 16][64];
  float scale[8][GROUP], least[8][GROUP];
  int16_t factor[8][3][2 * GROUP];  // a block's small scales, twice each; HALVES: two of them, and 32 times both, side by side
};

inline void store256(void* p, __m256i v) { _mm256_store_si256((__m256i*)p, v); }

// A packed group of 16 rows, `blocks` blocks of 32 columns; what lies `ahead`, if not 0, is asked for
template <int T>
__attribute__((noinline)) void widen_packed(const uint8_t* p, int64_t blocks, Widened& w, int64_t ahead) {
  constexpr bool small = Packed<T>::numbers == BLOCK;
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* header = small ? p + b * Packed<T>::size : p;
    const uint8_t* numbers = header + Packed<T>::header + (small ? 0 : b * Packed<T>::part);
    for (int i = 0; ahead && i < Packed<T>::part; i += 64) __builtin_prefetch(numbers + ahead + i);
    for (int h = 0; h < 2; h++) {
      const __m256 d = half8(header + 16 * h);
      float *scale = w.scale[b] + 8 * h, *least = w.least[b] + 8 * h;
      int16_t* factor = w.factor[b][0] + 16 * h;
      if constexpr (T == Q8) {
        for (int j = 0; j < 16; j++) {
          store256(w.numbers[16 * b + j] + 32 * h, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(numbers + j * 32 + 16 * h))));
        }
        _mm256_store_ps(scale, _mm256_mul_ps(d, _mm256_set1_ps(WIDE_UNIT)));
        continue;
      }
      for (int j = 0; T != Q8 && j < 4; j++) {
        store256(w.numbers[8 * b + j] + 32 * h, quad<T, false>(numbers + 32 * h, j));
        store256(w.numbers[8 * b + j + 4] + 32 * h, quad<T, true>(numbers + 32 * h, j));
      }
      _mm256_store_ps(scale, d);
      if (T == Q4) {
        store256(factor, _mm256_set1_epi16(1));
        _mm256_store_ps(least, _mm256_mul_ps(d, _mm256_set1_ps(8)));
        continue;
      }
      const __m128i stored = _mm_loadu_si128((const __m128i*)(header + (T == Q6_K ? 32 + b * 32 : 64 + b / 2 * 32) + 16 * h));
      const __m256i both = T == Q6_K ? _mm256_cvtepi8_epi16(stored) : _mm256_cvtepu8_epi16(stored);
      const __m256i first = _mm256_blend_epi16(both, _mm256_slli_epi32(both, 16), 0xaa);
      const __m256i second = _mm256_blend_epi16(both, _mm256_srli_epi32(both, 16), 0x55);
      store256(factor, T != Q6_K && b % 2 ? second : first);
      if (T == Q6_K) {
        store256(factor + 2 * GROUP, second);
        store256(factor + 4 * GROUP, _mm256_slli_epi16(both, 5));  // its numbers are stored with 32 added
        continue;
      }
      const __m256i minima = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(header + 192 + b * GROUP + 8 * h)));
      _mm256_store_ps(least, _mm256_mul_ps(half8(header + 32 + 16 * h), _mm256_cvtepi32_ps(minima)));
    }
  }
}

inline void transpose8(__m256i v[8]) {
  __m256 f[8];
  for (int i = 0; i < 8; i++) f[i] = _mm256_castsi256_ps(v[i]);
  transpose8(f);
  for (int i = 0; i < 8; i++) v[i] = _mm256_castps_si256(f[i]);
}

// 16 rows of Q8_0, `stride` bytes apart
__attribute__((noinline)) void widen_q8_0(const uint8_t* p, int64_t stride, int64_t blocks, Widened& w) {
  for (int64_t b = 0; b < blocks; b++, p += Block<Q8_0>::size) {
    for (int r = 0; r < GROUP; r++) {
      __builtin_prefetch(p + r * stride + 512);
      w.scale[b][r] = half_to_float(read<uint16_t>(p + r * stride)) * WIDE_UNIT;
    }
    for (int part = 0; part < 4; part++) {  // 8 rows x 16 columns
      const uint8_t* from = p + 2 + part / 2 * 8 * stride + part % 2 * 16;
      __m256i v[8];
      for (int r = 0; r < 8; r++) v[r] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(from + r * stride)));
      transpose8(v);
      for (int i = 0; i < 8; i++) store256(w.numbers[16 * b + part % 2 * 8 + i] + part / 2 * 32, v[i]);
    }
  }
}

inline __m256i four_bytes(const void* p) { return _mm256_set1_epi32(read<int32_t>(p)); }

// sums += x w, by pairs of 16-bit numbers, or by pairs of bytes (w unsigned) into 16 bits. By hand: GCC copies the sums
template <int KIND>
inline void add_products(__m256i& sums, __m256i x, __m256i w) {
  __m256i product;
  if (KIND == WORDS) __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(product) : "x"(x), "x"(w));
  else __asm__("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sums), "=&x"(product) : "x"(x), "x"(w));
}

// A block's end, 8 rows: to += whole * scale * x's scale - least * taken
template <int KIND>
inline void add_block(float* to, __m256i whole, const float* scale, const float* least, const XGroup& x, int64_t b) {
  const __m256 both = _mm256_mul_ps(_mm256_load_ps(scale), _mm256_broadcast_ss(x.scale + b));
  __m256 sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, _mm256_loadu_ps(to));
  if (KIND == MINIMA || KIND == FIVE_BITS) sums = _mm256_fnmadd_ps(_mm256_load_ps(least), _mm256_broadcast_ss(x.taken + b), sums);
  _mm256_storeu_ps(to, sums);
}

// sums [M, 16] of M rows of x += what `blocks` blocks give: 16 rows of w at once, or 8 where sums of 16 bits are full before the end
template <int KIND, int M>
__attribute__((noinline)) void wide_tile(const Widened& w, int64_t blocks, const XGroup* x, int64_t ldq, float* sums) {
  const auto input = [&](int m, int64_t b, int j) {
    const XGroup& group = x[m * ldq];
    return KIND == WORDS ? four_bytes(group.wide + b * BLOCK + 2 * j) : four_bytes(group.q + b * BLOCK + 4 * j);
  };
  for (int64_t b = 0; b < blocks; b++) {
    if constexpr (KIND <= MINIMA) {
      constexpr int STEPS = KIND == WORDS ? 16 : 8;
      __m256i dot[2][M] = {};
      const auto step = [&](int j) __attribute__((always_inline)) {
        const __m256i low = load256(w.numbers[STEPS * b + j]), high = load256(w.numbers[STEPS * b + j] + 32);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const __m256i xs = input(m, b, j);
          add_products<KIND>(dot[0][m], xs, low);
          add_products<KIND>(dot[1][m], xs, high);
        }
      };
#pragma GCC unroll 1
      for (int j = 0; j < STEPS; j += 2) step(j), step(j + 1);
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const __m256i whole = KIND == WORDS ? dot[h][m] : _mm256_madd_epi16(dot[h][m], load256(w.factor[b][0] + 16 * h));
          add_block<KIND>(sums + m * GROUP + 8 * h, whole, w.scale[b] + 8 * h, w.least[b] + 8 * h, x[m * ldq], b);
        }
      }
    } else {
      constexpr int TOGETHER = KIND == HALVES ? 2 : 4;  // steps
#pragma GCC unroll 1
      for (int h = 0; h < 2; h++) {
        __m256i whole[M] = {};
#pragma GCC unroll 1
        for (int from = 0; from < 8; from += TOGETHER) {
          __m256i dot[M] = {};
#pragma GCC unroll 4
          for (int j = from; j < from + TOGETHER; j++) {
            const __m256i ws = load256(w.numbers[8 * b + j] + 32 * h);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) add_products<KIND>(dot[m], input(m, b, j), ws);
          }
          const __m256i factor = load256(w.factor[b][KIND == HALVES ? from / 4 : 0] + 16 * h);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) whole[m] = _mm256_add_epi32(whole[m], _mm256_madd_epi16(dot[m], factor));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          if (KIND == HALVES) {
            const __m256i taken = _mm256_madd_epi16(load256(w.factor[b][2] + 16 * h), four_bytes(x[m * ldq].sum + 2 * b));
            whole[m] = _mm256_sub_epi32(whole[m], taken);
          }
          add_block<KIND>(sums + m * GROUP + 8 * h, whole[m], w.scale[b] + 8 * h, w.least[b] + 8 * h, x[m * ldq], b);
        }
      }
    }
    __asm__ volatile("" ::: "memory");
  }
}

template <int KIND, int>
inline void wide_tiles(const Widened* w, int64_t blocks, const XGroup* x, int64_t ldq, int64_t rows, float* sums) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6) wide_tile<KIND, 6>(*w, blocks, x + m * ldq, ldq, sums + m * GROUP);
  for (; m + 4 <= rows; m += 4) wide_tile<KIND, 4>(*w, blocks, x + m * ldq, ldq, sums + m * GROUP);
  for (; m + 2 <= rows; m += 2) wide_tile<KIND, 2>(*w, blocks, x + m * ldq, ldq, sums + m * GROUP);
  if (m < rows) wide_tile<KIND, 1>(*w, blocks, x + m * ldq, ldq, sums + m * GROUP);
}
