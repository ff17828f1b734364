// Products with many rows of x: 16 rows of w at a time, 256 columns of them, brought into an order in which one vector holds
// the 16 rows, and used for all rows of x while they lie in the first-level cache.
// Included by each isa_*.cpp after blocks.h, inside its own namespace.

constexpr int PANEL = GROUP;     // rows of w
constexpr int DEPTH = 256;       // columns of a panel
constexpr int STRIP = 64;        // columns of a transposed product done at once, and lines of it, see lines.h
constexpr int LANES = PANEL / W; // vectors of a column of a panel

#if defined(ISA_AVX512) || defined(ISA_AVX2)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

#if defined(ISA_AVX512)
constexpr int TILE = 12;  // rows of x whose sums stay in registers
#elif defined(ISA_AVX2) || defined(ISA_NEON)
constexpr int TILE = 6;
#else
constexpr int TILE = 2;
#endif

constexpr int64_t MOST_ROWS = 64;  // of w in one call of `product` with many rows of x
constexpr int64_t FEW = 32;        // rows of x whose numbers stay in the second-level cache

// Of each thread: panels, sums, and with AMX 256 columns of x
#if defined(ISA_AMX)
constexpr int64_t PANEL_FLOATS = 16384;  // four panels in two parts (amx.h)
inline int64_t whole_tiles(int64_t rows) { return (rows + PANEL - 1) / PANEL * PANEL; }  // rows of x are read by 16
inline int64_t local_floats(int64_t rows) {
  return PANEL_FLOATS + whole_tiles(rows) * (MOST_ROWS + (int64_t)(sizeof(XGroup) / sizeof(float)));
}
#else
constexpr int64_t PANEL_FLOATS = W == 16 ? 5376 : PANEL * DEPTH;  // AVX-512: two panels, widened (tiles.h)
inline int64_t whole_tiles(int64_t rows) { return rows; }
inline int64_t local_floats(int64_t rows) { return PANEL_FLOATS + 2 * rows * MOST_ROWS; }
#endif

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
      for (int v = 0; v < V; v++) acc[m][v] = add_product(acc[m][v], ws[v], xs);
    }
  }
  for (int m = 0; m < M; m++) {
    for (int v = 0; v < V; v++) store(sums + m * lds + v * W, acc[m][v]);
  }
}

// The same for all rows of x: as many at a time as registers hold
__attribute__((noinline)) void float_tiles(const float* panel, const float* x, int64_t ldx, int64_t depth, int64_t rows, float* sums) {
  int64_t m = 0;
  for (; m + TILE <= rows; m += TILE) float_tile<TILE, LANES>(panel, PANEL, x + m * ldx, ldx, depth, sums + m * PANEL, PANEL);
  for (; m + 4 <= rows; m += 4) float_tile<4, LANES>(panel, PANEL, x + m * ldx, ldx, depth, sums + m * PANEL, PANEL);
  for (; m < rows; m++) float_tile<1, LANES>(panel, PANEL, x + m * ldx, ldx, depth, sums + m * PANEL, PANEL);
}

#if defined(ISA_AVX512) || defined(ISA_AVX2)
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

// Many rows of long ones: a sixth faster than many_rows, but sums have another order
template <int T>
void rows_in_panels(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  const int64_t cols = p.w->cols, stride = offset<T>(cols);
  __builtin_memset(panel, 0, PANEL * DEPTH * sizeof(float));
  each_panel(p, first, last, rows, panel + PANEL * DEPTH, [&](int64_t n, int64_t group, float* sums) {
    const int64_t k = group * DEPTH, depth = cols - k < DEPTH ? cols - k : DEPTH;
    const int64_t height = last - n < PANEL ? last - n : PANEL;
    fill_floats<T>((const char*)p.w->data + n * stride + offset<T>(k), stride, height, depth, panel);
    float_tiles(panel, p.x + k, p.ldx, depth, rows, sums);
  });
}

// Plain numbers that are stored in panels --------------------------------------------------------------------------------

// sums [G, 16] of G panels that lie `bytes` apart, for one row of x; added column by column, as float_tile adds
template <int T, int G>
inline void panel_dots(const char* w, int64_t bytes, const float* x, int64_t cols, float* sums) {
  constexpr int V = G * LANES;
  vf acc[V] = {};
  int64_t k = 0;
  do {  // see dot_block
    const vf xs = splat(x[k]);
    for (int v = 0; v < V; v++) acc[v] = add_product(acc[v], elements<T>(w + v / LANES * bytes, k * PANEL + v % LANES * W), xs);
  } while (++k < cols);
  for (int v = 0; v < V; v++) store(sums + v * W, acc[v]);
}

template <int T, int G>
inline int64_t panel_rows(const Product& p, int64_t first, int64_t last) {
  const int64_t bytes = offset<T>(PANEL * p.w->cols);
  float sums[G * PANEL];
  for (; first + G * PANEL <= last; first += G * PANEL) {
    panel_dots<T, G>((const char*)p.w->data + first / PANEL * bytes, bytes, p.x, p.w->cols, sums);
    put(p, 0, first, G * PANEL, sums);
  }
  return first;
}

template <int T>
void panel_product(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  if (rows == 1) {
    panel_rows<T, 1>(p, panel_rows<T, 2>(p, panel_rows<T, 4>(p, first, last), last), last);
    return;
  }
  const int64_t cols = p.w->cols, bytes = offset<T>(PANEL * cols);
  each_panel(p, first, last, rows, local + PANEL * DEPTH, [&](int64_t n, int64_t group, float* sums) {
    const int64_t k = group * DEPTH, depth = cols - k < DEPTH ? cols - k : DEPTH;
    const char* w = (const char*)p.w->data + n / PANEL * bytes + offset<T>(PANEL * k);
    const float* panel = (const float*)w;
    if (T != F32) {
      for (int64_t i = 0; i < PANEL * depth; i += W) store(local + i, elements<T>(w, i));
      panel = local;
    }
    float_tiles(panel, p.x + k, p.ldx, depth, rows, sums);
  });
}

// Plain numbers in rows: R rows of w by M of x along the columns, added in the order in which dot_rows adds one row of x, so that
// a row's results do not depend on how many there are ------------------------------------------------------------------

template <int T, int R, int M>
inline void dot_block(const char* w, int64_t stride, const float* x, int64_t ldx, int64_t cols, float* y, int64_t ldy) {
  int64_t k = 0;
  for (int m = 0; cols < W && m < M; m++) __builtin_memset(y + m * ldy, 0, R * sizeof(float));
  if (cols >= W) {
    vf acc[R][M] = {};
    do {
      vf xs[M];
      for (int m = 0; m < M; m++) xs[m] = load(x + m * ldx + k);
      for (int r = 0; r < R; r++) {
        const vf ws = elements<T>(w + r * stride, k);
        for (int m = 0; m < M; m++) acc[r][m] = add_product(acc[r][m], ws, xs[m]);
      }
      k += W;
    } while (k + W <= cols);  // not `for`: with a way past all rounds, GCC clears and keeps the sums in memory as well
    for (int m = 0; m < M; m++) {
      if constexpr (R == 4) {
        sum4(acc[0][m], acc[1][m], acc[2][m], acc[3][m], y + m * ldy);
      } else {
        for (int r = 0; r < R; r++) y[m * ldy + r] = sum(acc[r][m]);
      }
    }
  }
  for (int m = 0; k < cols && m < M; m++) {
    for (int r = 0; r < R; r++) {
      float rest = 0;
      for (int64_t j = k; j < cols; j++) rest = add_product(rest, element<T>(w + r * stride, j), x[m * ldx + j]);
      y[m * ldy + r] += rest;
    }
  }
}

// The R rows of w behind these are asked for meanwhile: too short for the processor to see them coming
template <int T, int R>
inline void dot_blocks(const char* w, int64_t stride, const float* x, int64_t ldx, int64_t cols, int64_t rows, float* y, int64_t ldy) {
  constexpr int M = TILE > 6 ? 6 : 3;  // R M sums stay in registers
  const int64_t share = R * stride / ((rows + M - 1) / M);
  int64_t m = 0;
  auto next = [&](auto count) {
    constexpr int N = decltype(count)::value;
    for (int64_t i = m / M * share; rows <= FEW && i < (m / M + 1) * share; i += 64) __builtin_prefetch(w + R * stride + i);
    dot_block<T, R, N>(w, stride, x + m * ldx, ldx, cols, y + m * ldy, ldy);
    m += N;
  };
  while (m + M <= rows) next(Number<M>());
  while (m + 3 <= rows && rows - m != 4) next(Number<3>());
  while (m + 2 <= rows) next(Number<2>());
  if (m < rows) next(Number<1>());
}

constexpr int64_t LONG_ROWS = 1024, MANY = 48;  // of w; of x: beyond both, panels are faster
constexpr int64_t X_FLOATS = 128 << 8;   // of x that pass over a block of w
constexpr int64_t WIDENED_FROM = 24;     // rows of x for which 16-bit numbers are widened beforehand

template <int T>
void many_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  constexpr int R = 4;
  const int64_t cols = p.w->cols, size = offset<T>(cols), count = last - first;
  const bool widens = T != F32 && rows >= WIDENED_FROM && R * cols <= PANEL * DEPTH && cols % W == 0;
  const int64_t fits = X_FLOATS / cols / 12 * 12, step = fits < 12 ? 12 : fits;
  float* y = local + PANEL * DEPTH;  // [rows, count]
  for (int64_t from = 0; from < rows; from += step) {
    const int64_t many = rows - from < step ? rows - from : step;
    const float* x = p.x + from * p.ldx;
    int64_t n = 0;
    for (; n + R <= count; n += R) {
      const char* w = (const char*)p.w->data + (first + n) * size;
      if (widens) {
        for (int64_t i = 0; i < R * cols; i += W) store(local + i, elements<T>(w, i));
        dot_blocks<F32, R>((const char*)local, cols * 4, x, p.ldx, cols, many, y + from * count + n, count);
      } else {
        dot_blocks<T, R>(w, size, x, p.ldx, cols, many, y + from * count + n, count);
      }
    }
    for (; n < count; n++) {
      const char* w = (const char*)p.w->data + (first + n) * size;
      dot_blocks<T, 1>(w, size, x, p.ldx, cols, many, y + from * count + n, count);
    }
  }
  for (int64_t m = 0; m < rows; m++) put(p, m, first, count, y + m * count);
}

template <int T>
void many_packed_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  constexpr int64_t step = 8 * BLOCK / Packed<T>::numbers * Packed<T>::size;  // 256 columns of 16 rows
  const int64_t cols = p.w->cols, bytes = cols / Packed<T>::numbers * Packed<T>::size;
  each_panel(p, first, last, rows, local + PANEL * DEPTH, [&](int64_t n, int64_t group, float* sums) {
    const uint8_t* w = (const uint8_t*)p.w->data + n / GROUP * bytes + group * step;
    packed_tiles<T>(w, blocks_of_group(cols, group), p.q + group, groups_of(cols), rows, sums);
  });
}
