// The recurrences, a head (or, in version 4, a slice of channels) at a time, over T tokens.
// Included by each isa_*.cpp after vector.h, inside its own namespace.

constexpr int64_t SPAN = 16;  // tokens whose inputs stay in the first-level cache while all rows of a state pass over them

// S <- S diag(w) + (S a) b^T + v k^T;  y = S r.  Inputs [T, ld], state [N, N] value x key.
template <int V>
void wkv7_rows(int64_t t, int64_t ld, const float* r, const float* w, const float* k, const float* v, const float* a,
               const float* b, float* y, const float* in, float* out) {
  constexpr int64_t n = V * W;
  for (int64_t row = 0; row < n; row++) {
    vf s[V];
    for (int j = 0; j < V; j++) s[j] = load(in + row * n + j * W);
    for (int64_t i = 0; i < t; i++) {
      vf dot = s[0] * load(a + i * ld);
      for (int j = 1; j < V; j++) dot += s[j] * load(a + i * ld + j * W);
      vf held = splat(sum(dot)), value = splat(v[i * ld + row]), read_out = {};
      for (int j = 0; j < V; j++) {
        s[j] = s[j] * load(w + i * ld + j * W) + held * load(b + i * ld + j * W) + value * load(k + i * ld + j * W);
        read_out += s[j] * load(r + i * ld + j * W);
      }
      y[i * ld + row] = sum(read_out);
    }
    for (int j = 0; j < V; j++) store(out + row * n + j * W, s[j]);
  }
}

#if defined(ISA_AVX512)
// Sums of four vectors
inline __m128 sum4(vf a, vf b, vf c, vf d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The same, four rows of the state at a time: they share what is loaded, and their sums across vectors are made together
void wkv7_rows4(int64_t t, int64_t ld, const float* r, const float* w, const float* k, const float* v, const float* a,
                const float* b, float* y, const float* in, float* out) {
  constexpr int64_t V = 4, n = V * W;
  for (int64_t row = 0; row < n; row += 4) {
    vf s[4][V];
    for (int q = 0; q < 4; q++) {
      for (int j = 0; j < V; j++) s[q][j] = load(in + (row + q) * n + j * W);
      for (int j = 0; j < V; j++) __builtin_prefetch(in + (row + q + 12) * n + j * W);
    }
    for (int64_t i = 0; i < t; i++) {
      const int64_t o = i * ld;
      vf dot[4] = {};
      for (int j = 0; j < V; j++) {
        const vf as = load(a + o + j * W);
        for (int q = 0; q < 4; q++) dot[q] += s[q][j] * as;
      }
      float held[4];
      _mm_storeu_ps(held, sum4(dot[0], dot[1], dot[2], dot[3]));
      vf read_out[4] = {};
      for (int j = 0; j < V; j++) {
        const vf ws = load(w + o + j * W), bs = load(b + o + j * W), ks = load(k + o + j * W), rs = load(r + o + j * W);
        for (int q = 0; q < 4; q++) {
          s[q][j] = s[q][j] * ws + splat(held[q]) * bs + splat(v[o + row + q]) * ks;
          read_out[q] += s[q][j] * rs;
        }
      }
      _mm_storeu_ps(y + o + row, sum4(read_out[0], read_out[1], read_out[2], read_out[3]));
    }
    for (int q = 0; q < 4; q++) {
      for (int j = 0; j < V; j++) store(out + (row + q) * n + j * W, s[q][j]);
    }
  }
}
#else
constexpr auto wkv7_rows4 = wkv7_rows<64 / W>;
#endif

void wkv7_any(int64_t n, int64_t t, int64_t ld, const float* r, const float* w, const float* k, const float* v,
              const float* a, const float* b, float* y, const float* in, float* out) {
  for (int64_t row = 0; row < n; row++) {
    float* s = out + row * n;
    if (in != out) __builtin_memcpy(s, in + row * n, n * sizeof(float));
    for (int64_t i = 0; i < t; i++) {
      float held = 0, read_out = 0, value = v[i * ld + row];
      for (int64_t j = 0; j < n; j++) held += s[j] * a[i * ld + j];
      for (int64_t j = 0; j < n; j++) {
        s[j] = s[j] * w[i * ld + j] + held * b[i * ld + j] + value * k[i * ld + j];
        read_out += s[j] * r[i * ld + j];
      }
      y[i * ld + row] = read_out;
    }
  }
}

void wkv7(int64_t n, int64_t t, int64_t ld, const float* r, const float* w, const float* k, const float* v,
          const float* a, const float* b, float* y, const float* in, float* out) {
  for (int64_t i = 0; i < t; i += SPAN, in = out) {
    const int64_t o = i * ld, m = t - i < SPAN ? t - i : SPAN;
    if (n == 64) wkv7_rows4(m, ld, r + o, w + o, k + o, v + o, a + o, b + o, y + o, in, out);
    else wkv7_any(n, m, ld, r + o, w + o, k + o, v + o, a + o, b + o, y + o, in, out);
  }
}

// y = r^T (diag(u) k v^T + S);  S <- diag(w) S + k v^T, with S stored value x key and w [T, ldw], ldw = 0: the same for all
template <int V>
void wkv6_rows(int64_t t, int64_t ld, int64_t ldw, const float* r, const float* w, const float* k, const float* v,
               const float* bonus, float* y, const float* in, float* out) {
  constexpr int64_t n = V * W;
  for (int64_t row = 0; row < n; row++) {
    vf s[V];
    for (int j = 0; j < V; j++) s[j] = load(in + row * n + j * W);
    for (int64_t i = 0; i < t; i++) {
      vf value = splat(v[i * ld + row]), read_out = {};
      for (int j = 0; j < V; j++) {
        read_out += s[j] * load(r + i * ld + j * W);
        s[j] = s[j] * load(w + i * ldw + j * W) + value * load(k + i * ld + j * W);
      }
      y[i * ld + row] = sum(read_out) + v[i * ld + row] * bonus[i];
    }
    for (int j = 0; j < V; j++) store(out + row * n + j * W, s[j]);
  }
}

void wkv6_any(int64_t n, int64_t t, int64_t ld, int64_t ldw, const float* r, const float* w, const float* k,
              const float* v, const float* bonus, float* y, const float* in, float* out) {
  for (int64_t row = 0; row < n; row++) {
    float* s = out + row * n;
    if (in != out) __builtin_memcpy(s, in + row * n, n * sizeof(float));
    for (int64_t i = 0; i < t; i++) {
      float read_out = 0, value = v[i * ld + row];
      for (int64_t j = 0; j < n; j++) {
        read_out += s[j] * r[i * ld + j];
        s[j] = s[j] * w[i * ldw + j] + value * k[i * ld + j];
      }
      y[i * ld + row] = read_out + value * bonus[i];
    }
  }
}

void wkv6(int64_t n, int64_t t, int64_t ld, int64_t ldw, const float* r, const float* w, const float* k, const float* v,
          const float* u, float* y, const float* in, float* out) {
  float bonus[SPAN];  // r . (u k) of each token
  for (int64_t i = 0; i < t; i += SPAN, in = out) {
    const int64_t o = i * ld, m = t - i < SPAN ? t - i : SPAN;
    for (int64_t s = 0; s < m; s++) {
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < n; j++) total += r[o + s * ld + j] * u[j] * k[o + s * ld + j];
      bonus[s] = total;
    }
    if (n == 64) wkv6_rows<64 / W>(m, ld, ldw, r + o, w + i * ldw, k + o, v + o, bonus, y + o, in, out);
    else wkv6_any(n, m, ld, ldw, r + o, w + i * ldw, k + o, v + o, bonus, y + o, in, out);
  }
}

// Channels 0..n of: y = (e^(pp-p) aa + e^(u+k-p) v) / (the same with bb and 1); the state is kept relative to e^pp
void wkv4(int64_t n, int64_t t, int64_t ld, const float* w, const float* u, const float* k, const float* v, float* y,
          float* aa, float* bb, float* pp) {
  for (int64_t i = 0; i < t; i++, k += ld, v += ld, y += ld) {
#pragma omp simd
    for (int64_t c = 0; c < n; c++) {
      float now = u[c] + k[c], p = pp[c] > now ? pp[c] : now;
      float e1 = exp_(pp[c] - p), e2 = exp_(now - p);
      y[c] = (e1 * aa[c] + e2 * v[c]) / (e1 * bb[c] + e2);
      float faded = pp[c] + w[c];
      p = faded > k[c] ? faded : k[c];
      e1 = exp_(faded - p), e2 = exp_(k[c] - p);
      aa[c] = e1 * aa[c] + e2 * v[c];
      bb[c] = e1 * bb[c] + e2;
      pp[c] = p;
    }
  }
}
