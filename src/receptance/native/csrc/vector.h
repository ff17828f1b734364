// Vectors of W floats, the few operations on them that differ between instruction sets, and functions that compilers
// vectorise by themselves. Included once by each isa_*.cpp, inside its own namespace.
//
// ISA_AVX512 (with VNNI), ISA_AVX2 (with FMA and F16C), ISA_NEON (with dot products) or none of them.

#if defined(ISA_AVX512)
constexpr int W = 16;
#elif defined(ISA_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline vf load(const float* p) { return *(const vf_any*)p; }
inline void store(float* p, vf v) { *(vf_any*)p = v; }
inline vf splat(float x) {  // `vf{} + x` would add: 0 + -0 is not -0
#if defined(ISA_AVX512)
  return (vf)_mm512_set1_ps(x);
#elif defined(ISA_AVX2)
  return (vf)_mm256_set1_ps(x);
#else
  return vf{x, x, x, x};
#endif
}

// sum + a b, rounded once where the processor can: a compiler that is left to choose does so in one function and not in another
inline vf add_product(vf sum, vf a, vf b) {
#if defined(ISA_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(ISA_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(ISA_NEON)
  return (vf)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  return sum + a * b;
#endif
}

inline float add_product(float sum, float a, float b) {
#if defined(ISA_AVX512) || defined(ISA_AVX2) || defined(ISA_NEON)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T read(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline float sum(vf v) {
#if defined(ISA_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(ISA_AVX2)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// sums[i] = sum(of the i-th), added in the same order
inline void sum4(vf a, vf b, vf c, vf d, float* sums) {
#if defined(ISA_AVX2)
  auto halves = [](vf x, vf y) {  // of x below, of y above
    return _mm256_add_ps(_mm256_permute2f128_ps((__m256)x, (__m256)y, 0x20), _mm256_permute2f128_ps((__m256)x, (__m256)y, 0x31));
  };
  const __m256 ac = halves(a, c), bd = halves(b, d);
  const __m256 s = _mm256_add_ps(_mm256_shuffle_ps(ac, bd, 0x44), _mm256_shuffle_ps(ac, bd, 0xee));
  const __m128 ab = _mm256_castps256_ps128(s), cd = _mm256_extractf128_ps(s, 1);
  _mm_storeu_ps(sums, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
#else
  sums[0] = sum(a), sums[1] = sum(b), sums[2] = sum(c), sums[3] = sum(d);
#endif
}

template <int N>
struct Number {  // as an argument
  static constexpr int value = N;
};

// |x| as an integer, in the order of the numbers; a NaN is above all others
inline int32_t magnitude(float x) { return bits<int32_t>(x) & 0x7fffffff; }

// Half precision -------------------------------------------------------------------------------------------------------

inline float half_to_float(uint16_t h) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  return _cvtsh_ss(h);
#elif defined(ISA_NEON)
  return (float)bits<__fp16>(h);
#else
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude < 0x400) {  // zero or subnormal: exactly magnitude * 2^-24
    float f = (float)magnitude * 5.9604644775390625e-8f;
    return bits<float>(bits<uint32_t>(f) | sign);
  }
  uint32_t exponent = magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u;  // infinities and NaN keep theirs
  return bits<float>(((magnitude << 13) + exponent) | sign);
#endif
}

inline uint16_t float_to_half(float f) {  // to nearest, ties to even
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  return (uint16_t)_cvtss_sh(f, 0);
#elif defined(ISA_NEON)
  return bits<uint16_t>((__fp16)f);
#else
  uint32_t x = bits<uint32_t>(f), sign = (x >> 16) & 0x8000;
  x &= 0x7fffffff;
  if (x > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (x >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (x < 0x38800000) {  // subnormal: the addition rounds it at the right bit
    return (uint16_t)(sign | (bits<uint32_t>(bits<float>(x) + 0.5f) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((x - 0x38000000u + 0xfff + ((x >> 13) & 1)) >> 13));
#endif
}

inline float bf16_to_float(uint16_t h) { return bits<float>((uint32_t)h << 16); }

// Elements of a matrix in a plain type ---------------------------------------------------------------------------------

template <int T>
inline int64_t offset(int64_t i) {
  return T == F32 ? i * 4 : i * 2;
}

template <int T>
inline float element(const void* row, int64_t i) {
  if (T == F32) return read<float>((const char*)row + i * 4);
  uint16_t h = read<uint16_t>((const char*)row + i * 2);
  return T == F16 ? half_to_float(h) : bf16_to_float(h);
}

template <int T>
inline vf elements(const void* row, int64_t i) {
  const char* p = (const char*)row + offset<T>(i);
  if (T == F32) return load((const float*)p);
#if defined(ISA_AVX512)
  __m256i h = _mm256_loadu_si256((const __m256i*)p);
  if (T == F16) return (vf)_mm512_cvtph_ps(h);
  return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif defined(ISA_AVX2)
  __m128i h = _mm_loadu_si128((const __m128i*)p);
  if (T == F16) return (vf)_mm256_cvtph_ps(h);
  return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#elif defined(ISA_NEON)
  if (T == F16) return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
  return (vf)vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p), 16));
#else
  vf v;
  for (int j = 0; j < W; j++) v[j] = element<T>(p, j);
  return v;
#endif
}

// W signed bytes as floats
inline vf bytes(const int8_t* p) {
#if defined(ISA_AVX512)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(ISA_AVX2)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vf v;
  for (int j = 0; j < W; j++) v[j] = (float)p[j];
  return v;
#endif
}

// The low (shift 0) or high (4) halves of W bytes as floats
template <int SHIFT>
inline vf nibbles(const uint8_t* p) {
#if defined(ISA_AVX512)
  __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  q = SHIFT ? _mm512_srli_epi32(q, 4) : _mm512_and_si512(q, _mm512_set1_epi32(15));
  return (vf)_mm512_cvtepi32_ps(q);
#elif defined(ISA_AVX2)
  __m256i q = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  q = SHIFT ? _mm256_srli_epi32(q, 4) : _mm256_and_si256(q, _mm256_set1_epi32(15));
  return (vf)_mm256_cvtepi32_ps(q);
#else
  vf v;
  for (int j = 0; j < W; j++) v[j] = (float)((p[j] >> SHIFT) & 15);
  return v;
#endif
}

// Functions of one number, vectorised in loops -------------------------------------------------------------------------

// Within 2 units in the last place; no branches. A call would keep a loop from becoming one of vectors
__attribute__((always_inline)) inline float exp_(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  float f = x - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return p * bits<float>((uint32_t)((int32_t)n + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }
inline float tanh_(float x) { return 1.0f - 2.0f / (1.0f + exp_(2.0f * x)); }
