// Matrices in the block formats of GGUF files, read row by row where they lie. native/blocks.py defines what the bytes mean.
// Included by each isa_*.cpp after products.h, inside its own namespace.
//
// All formats are read as parts of 32 numbers, which meet the 32 numbers of x that share a scale. A vector of 32 bytes is one
// register with AVX2, two with NEON; only `dot` differs between instruction sets.

typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef uint8_t u8x32_any __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x8_any __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i32x8_any __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef int8_t s8x8 __attribute__((vector_size(8)));

inline u8x32 load32(const void* p) { return *(const u8x32_any*)p; }
inline f32x8 load8(const float* p) { return *(const f32x8_any*)p; }
inline f32x8 to_floats(i32x8 v) { return __builtin_convertvector(v, f32x8); }

// One half-precision number, eight times
inline f32x8 eight_of(const void* half) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  return (f32x8)_mm256_cvtph_ps(_mm_set1_epi16((short)read<uint16_t>(half)));
#else
  return f32x8{} + half_to_float(read<uint16_t>(half));
#endif
}

inline float sum8(f32x8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// 8 sums of 4 products each, in order: the first 4 belong to numbers 0-15. q: unsigned up to 63, or SIGNED; x: signed
template <bool SIGNED>
inline i32x8 dot(u8x32 q, u8x32 x) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  __m256i a = (__m256i)q, b = (__m256i)x;
  if (SIGNED) b = _mm256_sign_epi8(b, a), a = _mm256_abs_epi8(a);  // |q| and x with q's sign; x is never -128
#if defined(ISA_AVX512)
  return (i32x8)_mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b);
#else
  return (i32x8)_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
#endif
#elif defined(ISA_NEON)
  typedef int8_t half_of __attribute__((vector_size(16)));
  struct Halves { half_of low, high; };
  const Halves a = bits<Halves>(q), b = bits<Halves>(x);
  const int32x4_t zero = vdupq_n_s32(0);
  struct Sums { int32x4_t low, high; };
  return bits<i32x8>(Sums{vdotq_s32(zero, (int8x16_t)a.low, (int8x16_t)b.low),
                       vdotq_s32(zero, (int8x16_t)a.high, (int8x16_t)b.high)});
#else
  i32x8 sums = {};
  for (int i = 0; i < 32; i++) sums[i / 4] += (int32_t)(int8_t)q[i] * (int8_t)x[i];
  return sums;
#endif
}

// The same of 32 signed bytes and 32 numbers of 16 bits
inline i32x8 dot_wide(const uint8_t* q, const int16_t* x) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)q));
  const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(q + 16)));
  return (i32x8)_mm256_add_epi32(_mm256_madd_epi16(low, _mm256_loadu_si256((const __m256i*)x)),
                                 _mm256_madd_epi16(high, _mm256_loadu_si256((const __m256i*)(x + 16))));
#else
  i32x8 sums = {};
  for (int i = 0; i < 32; i++) sums[i / 4] += (int32_t)(int8_t)q[i] * x[i];
  return sums;
#endif
}

template <int T>
struct Block {
  static constexpr int64_t numbers = T == Q8_0 || T == Q4_0 ? 32 : 256;
  static constexpr int64_t size = line_bytes(T, numbers);
};

// The numbers of part I of a block, as stored: unsigned, but those of Q8_0
template <int T, int I>
inline u8x32 part(const uint8_t* p) {
  if (T == Q8_0) return load32(p + 2);
  if (T == Q4_0) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
    const __m128i v = _mm_loadu_si128((const __m128i*)(p + 2));
    return (u8x32)_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
#else
    typedef uint8_t half_of __attribute__((vector_size(16)));
    struct Halves { half_of low, high; };
    half_of v = read<half_of>(p + 2);
    return bits<u8x32>(Halves{v & 15, v >> 4});
#endif
  }
  if (T == Q4_K || T == Q5_K) {
    u8x32 v = load32(p + (T == Q4_K ? 16 : 48) + I / 2 * 32);
    v = I % 2 ? v >> 4 : v & 15;
    if (T == Q5_K) v |= (load32(p + 16) >> I & 1) << 4;
    return v;
  }
  u8x32 v = load32(p + I / 4 * 64 + I % 2 * 32);
  v = I % 4 < 2 ? v & 15 : v >> 4;
  return v | (load32(p + 128 + I / 4 * 32) >> I % 4 * 2 & 3) << 4;
}

// The 8 scales and the 8 minima of a block of Q4_K or Q5_K, of 6 bits each: a byte for each
struct SmallScales { uint64_t scales, minima; };

inline SmallScales small_scales(const uint8_t* p) {
  const uint32_t low = read<uint32_t>(p + 4), middle = read<uint32_t>(p + 8), high = read<uint32_t>(p + 12);
  const uint32_t first = 0x3f3f3f3f, fours = 0x0f0f0f0f, twos = 0x30303030;
  return {(low & first) | (uint64_t)((high & fours) | (low >> 2 & twos)) << 32,
          (middle & first) | (uint64_t)((high >> 4 & fours) | (middle >> 2 & twos)) << 32};
}

inline void scales_and_minima(const uint8_t* p, f32x8& scales, f32x8& minima) {
  const SmallScales small = small_scales(p);
  scales = to_floats(__builtin_convertvector(bits<u8x8>(small.scales), i32x8)) * half_to_float(read<uint16_t>(p));
  minima = to_floats(__builtin_convertvector(bits<u8x8>(small.minima), i32x8)) * half_to_float(read<uint16_t>(p + 2));
}

inline f32x8 two(float low, float high) { return f32x8{low, low, low, low, high, high, high, high}; }

template <int T, int R, int I>
inline void add_part(const uint8_t* w, int64_t stride, const XGroup& x, const float (*scales)[16], f32x8* acc) {
  const u8x32 xs = load32(x.q + I * BLOCK);
  u8x32 middle = {};
  i32x8 taken = {};
  if (T == Q6_K) taken = dot<false>(middle + 32, xs);  // its numbers are stored with 32 added
  for (int r = 0; r < R; r++) {
    i32x8 sums = dot<false>(part<T, I>(w + r * stride), xs);
    if (T == Q6_K) {
      acc[r] += to_floats(sums - taken) * two(scales[r][2 * I], scales[r][2 * I + 1]);
    } else {
      acc[r] += to_floats(sums) * scales[r][I];
    }
  }
}

// One row of x and R rows of w, each a stream of its own
template <int T, int R>
inline void block_dots(const uint8_t* w, int64_t stride, const XGroup* x, int64_t cols, float* y) {
  f32x8 acc[R] = {};
  if (T == Q8_0 || T == Q4_0) {
    for (int64_t b = 0; b < cols / BLOCK; b++, w += Block<T>::size) {
      const XGroup& group = x[b / 8];
      const u8x32 xs = load32(group.q + b % 8 * BLOCK);
      i32x8 taken = {8 * sum_of(group, b % 8)};
      const float x_scale = group.scale[b % 8] * (T == Q8_0 && WIDE ? WIDE_UNIT : 1);
      for (int r = 0; r < R; r++) {
        const uint8_t* p = w + r * stride;
        if (ROW_AHEAD) __builtin_prefetch(p + 4 * ROW_AHEAD);
        i32x8 sums = T == Q8_0 && WIDE ? dot_wide(p + 2, group.wide + b % 8 * BLOCK) : dot<T == Q8_0>(part<T, 0>(p), xs);
        if (T == Q4_0) sums -= taken;  // its numbers are stored with 8 added
        acc[r] += to_floats(sums) * (eight_of(p) * x_scale);
      }
    }
  } else {
    for (int64_t b = 0; b < cols / 256; b++, w += Block<T>::size) {
      const XGroup& group = x[b];
      const f32x8 x_scales = load8(group.scale);
      float scales[R][16];
      for (int r = 0; r < R; r++) {
        const uint8_t* p = w + r * stride;
        if (T == Q6_K) {
          const float d = half_to_float(read<uint16_t>(p + 208));
          const f32x8 low = to_floats(__builtin_convertvector(read<s8x8>(p + 192), i32x8)) * d;
          const f32x8 high = to_floats(__builtin_convertvector(read<s8x8>(p + 200), i32x8)) * d;
          for (int i = 0; i < 8; i++) {
            scales[r][i] = low[i] * group.scale[i / 2];
            scales[r][8 + i] = high[i] * group.scale[4 + i / 2];
          }
        } else {
          f32x8 s, m;
          scales_and_minima(p, s, m);
          acc[r] -= m * load8(group.taken);
          *(f32x8_any*)scales[r] = s * x_scales;
        }
      }
      add_part<T, R, 0>(w, stride, group, scales, acc);
      add_part<T, R, 1>(w, stride, group, scales, acc);
      add_part<T, R, 2>(w, stride, group, scales, acc);
      add_part<T, R, 3>(w, stride, group, scales, acc);
      add_part<T, R, 4>(w, stride, group, scales, acc);
      add_part<T, R, 5>(w, stride, group, scales, acc);
      add_part<T, R, 6>(w, stride, group, scales, acc);
      add_part<T, R, 7>(w, stride, group, scales, acc);
    }
  }
  for (int r = 0; r < R; r++) y[r] = sum8(acc[r]);
}

template <int T>
void block_rows(const Product& p, int64_t first, int64_t last) {
  const int64_t cols = p.w->cols, size = line_bytes(T, cols);
  const uint8_t* w = (const uint8_t*)p.w->data;
  in_streams<4>(
      p, first, last, [&](int64_t n, int64_t each, float* y) { block_dots<T, 4>(w + n * size, each * size, p.q, cols, y); },
      [&](int64_t n, float* y) { block_dots<T, 1>(w + n * size, size, p.q, cols, y); });
}

// A row as float32 --------------------------------------------------------------------------------------------------------

template <int T, int I>
inline void widen_part(const uint8_t* p, const float* scales, const float* minima, float* to) {
  const u8x32 q = part<T, I>(p);
  for (int i = 0; i < 32; i++) {
    const float number = T == Q8_0 ? (float)(int8_t)q[i] : (float)((int32_t)q[i] - (T == Q4_0 ? 8 : T == Q6_K ? 32 : 0));
    const float x = scales[T == Q6_K ? 2 * I + i / 16 : I] * number;
    to[I * 32 + i] = T == Q4_K || T == Q5_K ? x - minima[I] : x;
  }
}

template <int T>
void widen_blocks(const uint8_t* p, int64_t cols, float* to) {
  for (int64_t c = 0; c < cols; c += Block<T>::numbers, p += Block<T>::size, to += Block<T>::numbers) {
    float scales[16], minima[8] = {};
    if (T == Q8_0 || T == Q4_0) {
      scales[0] = half_to_float(read<uint16_t>(p));
      widen_part<T, 0>(p, scales, minima, to);
      continue;
    }
    if (T == Q6_K) {
      for (int i = 0; i < 16; i++) scales[i] = half_to_float(read<uint16_t>(p + 208)) * (float)(int8_t)p[192 + i];
    } else {
      f32x8 s, m;
      scales_and_minima(p, s, m);
      *(f32x8_any*)scales = s;
      *(f32x8_any*)minima = m;
    }
    widen_part<T, 0>(p, scales, minima, to);
    widen_part<T, 1>(p, scales, minima, to);
    widen_part<T, 2>(p, scales, minima, to);
    widen_part<T, 3>(p, scales, minima, to);
    widen_part<T, 4>(p, scales, minima, to);
    widen_part<T, 5>(p, scales, minima, to);
    widen_part<T, 6>(p, scales, minima, to);
    widen_part<T, 7>(p, scales, minima, to);
  }
}
