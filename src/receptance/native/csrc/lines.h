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
    for (int r = 0; r < R; r++) acc += elements<T>(line[r], c) * h[r];
    store(y + c, acc);
  }
  for (; c < cols; c++) {
    for (int r = 0; r < R; r++) y[c] += element<T>(line[r], c) * h[r];
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

// The same for many rows of h, columns first..first+STRIP: y [rows, STRIP] is set to the whole sum ------------------------

template <int T>
inline void strip_of_lines(const Matrix& w, int64_t f, int64_t count, int64_t first, float* strip) {
  const int64_t cols = w.cols, width = cols - first < STRIP ? cols - first : STRIP, size = line_bytes(T, cols);
  for (int64_t i = 0; i < count; i++, strip += STRIP) {
    const char* line = (const char*)w.data + (f + i) * size;
      int64_t u = 0;
    for (; u + W <= width; u += W) store(strip + u, elements<T>(line, first + u));
    for (; u < width; u++) strip[u] = element<T>(line, first + u);
    for (; u < STRIP; u++) strip[u] = 0;
  }
}

void strip_product(const Matrix& w, const float* h, int64_t rows, int64_t first, float* strip, float* y) {
  constexpr int V = 2 * W < STRIP ? 2 : STRIP / W, M = 6;
  __builtin_memset(y, 0, rows * STRIP * sizeof(float));
  for (int64_t f = 0; f < w.rows; f += STRIP_ROWS) {
    int64_t count = w.rows - f < STRIP_ROWS ? w.rows - f : STRIP_ROWS;
    switch (w.type) {
      case F32: strip_of_lines<F32>(w, f, count, first, strip); break;
      case F16: strip_of_lines<F16>(w, f, count, first, strip); break;
      case BF16: strip_of_lines<BF16>(w, f, count, first, strip); break;
    }
    for (int u = 0; u < STRIP; u += V * W) {
      int64_t m = 0;
      for (; m + M <= rows; m += M) {
        float_tile<M, V>(strip + u, STRIP, h + m * w.rows + f, w.rows, count, y + m * STRIP + u, STRIP);
      }
      for (; m < rows; m++) {
        float_tile<1, V>(strip + u, STRIP, h + m * w.rows + f, w.rows, count, y + m * STRIP + u, STRIP);
      }
    }
  }
}
