// The sparse channel mix: sums of lines of a matrix that is stored transposed, in a plain type.
// Included by each isa_*.cpp after products.h, inside its own namespace.

// One row leaves out hidden units that are zero. Its sum is made of so many parts, whatever the number of threads, and these are
// added in order: the same on each run.
constexpr int64_t PIECES = 16, MOST_HIDDEN = 1024;

inline int64_t piece_of(int64_t hidden) {  // hidden units, whole bands
  const int64_t fair = (hidden / PIECES + BLOCK - 1) / BLOCK * BLOCK;
  return fair < BLOCK ? BLOCK : fair < MOST_HIDDEN ? fair : MOST_HIDDEN;
}
inline int64_t pieces_of(int64_t hidden) { return (hidden + piece_of(hidden) - 1) / piece_of(hidden); }

// Sums of lines: y[c] += sum over i of h[i] w[index[i]][c] ----------------------------------------------------------------

template <int T, int R>
inline void add_lines(const char* const* line, const float* h, int64_t cols, float* y) {
  int64_t c = 0;
  for (; c + W <= cols; c += W) {
    for (int r = 0; ROW_AHEAD && c % (2 * W) == 0 && r < R; r++) __builtin_prefetch(line[r] + offset<T>(c) + ROW_AHEAD);
    vf acc = load(y + c);
    for (int r = 0; r < R; r++) acc = add_product(acc, elements<T>(line[r], c), splat(h[r]));
    store(y + c, acc);
  }
  for (; c < cols; c++) {
    for (int r = 0; r < R; r++) y[c] = add_product(y[c], element<T>(line[r], c), h[r]);
  }
}

template <int T>
void add_active(const Matrix& w, const int32_t* index, const float* h, int64_t count, float* y) {
  const char* data = (const char*)w.data;
  const int64_t size = line_bytes(T, w.cols);
  int64_t i = 0;
  for (; i < count;) {
    const char* line[8];
    int many = count - i >= 8 ? 8 : 1;
    for (int r = 0; r < many; r++) line[r] = data + index[i + r] * size;
    if (many == 8) add_lines<T, 8>(line, h + i, w.cols, y);
    else add_lines<T, 1>(line, h + i, w.cols, y);
    i += many;
  }
}

// Hidden units first..last of one row h: those that are not zero. index, values: room for them. Returns their number.
int64_t add_active_lines(const Matrix& w, const float* h, int64_t first, int64_t last, int32_t* index, float* values,
                         float* y) {
  int64_t count = 0;
  for (int64_t f = first; f < last; f++) {
    index[count] = (int32_t)f;
    values[count] = h[f];
    count += h[f] != 0;
  }
  switch (w.type) {
    case F32: add_active<F32>(w, index, values, count, y); break;
    case F16: add_active<F16>(w, index, values, count, y); break;
    case BF16: add_active<BF16>(w, index, values, count, y); break;
  }
  return count;
}

// The same for many rows of h, columns first..first+width of y [rows, STRIP], added in the same order: a row's sums do not depend
// on how many rows there are --------------------------------------------------------------------------------------------

// A bit for each of `count` <= 64 hidden units that are not zero
inline uint64_t active_bits(const float* h, int64_t count) {
  uint64_t bits = 0;
  int64_t i = 0;
#if defined(ISA_AVX512)
  for (; i + W <= count; i += W) bits |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(h + i), _mm512_setzero_ps(), _CMP_NEQ_UQ) << i;
#elif defined(ISA_AVX2)
  for (; i + W <= count; i += W) {
    const __m256 active = _mm256_cmp_ps(_mm256_loadu_ps(h + i), _mm256_setzero_ps(), _CMP_NEQ_UQ);
    bits |= (uint64_t)(uint32_t)_mm256_movemask_ps(active) << i;
  }
#endif
  for (; i < count; i++) bits |= (uint64_t)(h[i] != 0) << i;
  return bits;
}

// sums [STRIP] += the active lines of `count`, which lie `stride` bytes apart
template <int T>
inline void add_strip(const char* lines, int64_t stride, const float* h, int64_t count, float* sums) {
  constexpr int V = STRIP / W < 8 ? STRIP / W : 8;
  const uint64_t active = active_bits(h, count);
  for (int64_t u = 0; u < STRIP; u += V * W) {
    vf acc[V];
    for (int v = 0; v < V; v++) acc[v] = load(sums + u + v * W);
    for (uint64_t bits = active; bits; bits &= bits - 1) {
      const int64_t i = __builtin_ctzll(bits);
      const vf by = splat(h[i]);
      for (int v = 0; v < V; v++) acc[v] = add_product(acc[v], elements<T>(lines + i * stride, u + v * W), by);
    }
    for (int v = 0; v < V; v++) store(sums + u + v * W, acc[v]);
  }
}

// Lines f..f+count as float32 [count, STRIP], zeros beyond the width
template <int T>
inline void widen_strip(const char* lines, int64_t stride, int64_t count, int64_t width, float* strip) {
  for (int64_t i = 0; i < count; i++, lines += stride, strip += STRIP) {
    int64_t u = 0;
    for (; u + W <= width; u += W) store(strip + u, elements<T>(lines, u));
    for (; u < width; u++) strip[u] = element<T>(lines, u);
    for (; u < STRIP; u++) strip[u] = 0;
  }
}

// strip: room for STRIP lines; y, part: [rows, STRIP]
template <int T>
void strip_of_lines(const Matrix& w, const float* h, int64_t rows, int64_t first, float* strip, float* part, float* y) {
  const int64_t size = line_bytes(T, w.cols), width = w.cols - first < STRIP ? w.cols - first : STRIP;
  const bool widens = rows >= 16 || width < STRIP;
  __builtin_memset(y, 0, rows * STRIP * sizeof(float));
  for (int64_t piece = 0; piece < w.rows; piece += piece_of(w.rows)) {
    const int64_t end = piece + piece_of(w.rows) < w.rows ? piece + piece_of(w.rows) : w.rows;
    __builtin_memset(part, 0, rows * STRIP * sizeof(float));
    for (int64_t f = piece; f < end; f += STRIP) {
      const int64_t count = end - f < STRIP ? end - f : STRIP;
      const char* lines = (const char*)w.data + f * size + offset<T>(first);
      if (widens) widen_strip<T>(lines, size, count, width, strip);
      for (int64_t m = 0; m < rows; m++) {
        if (widens) add_strip<F32>((const char*)strip, STRIP * 4, h + m * w.rows + f, count, part + m * STRIP);
        else add_strip<T>(lines, size, h + m * w.rows + f, count, part + m * STRIP);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < rows * STRIP; i++) y[i] += part[i];
  }
}

void strip_product(const Matrix& w, const float* h, int64_t rows, int64_t first, float* strip, float* part, float* y) {
  switch (w.type) {
    case F32: strip_of_lines<F32>(w, h, rows, first, strip, part, y); break;
    case F16: strip_of_lines<F16>(w, h, rows, first, strip, part, y); break;
    case BF16: strip_of_lines<BF16>(w, h, rows, first, strip, part, y); break;
  }
}

// x += y, times the gate if there is one. One function for one row and for many, so that compilers round both alike
__attribute__((noinline)) void add_gated(float* x, const float* gate, const float* y, int64_t n) {
  if (gate) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] += gate[i] * y[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
  }
}
