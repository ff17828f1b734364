// Products with many rows of x by AVX-512 and AVX2: 16 rows x 256 columns of w are widened once, to bytes or to integers of 16
// bits, and serve all rows of x from the first-level cache.
// Included after panels.h, inside the namespace of the instruction set.
//
// A number of 16 bits becomes an integer of 14 bits with a power of two for each 32 of a row: that is exact for all within two
// octaves of the largest, and for the others no worse than what rounding x to 16 bits costs.

#if defined(ISA_AVX512)
#include "tiles512.h"
#elif defined(ISA_AVX2)
#include "tiles256.h"
#endif

#if HAS_TILES

static_assert(ABREAST * sizeof(Widened) <= PANEL_FLOATS * sizeof(float), "room for all");

// Panels `first`..`last` (rows of w, as many panels at a time as the form takes): widen(row, group, Widened&) and the tiles; sums as in each_panel.
// Groups of columns are the outer loop for many rows of x, as there; for few the weights come from memory in order.
template <int KIND, class F>
inline void wide_panels(const Product& p, int64_t first, int64_t last, int64_t rows, float* local, F widen) {
  Widened* w = (Widened*)local;
  const int64_t ldq = groups_of(p.w->cols), steps = (last - first + ABREAST * PANEL - 1) / (ABREAST * PANEL);
  float* sums = local + PANEL_FLOATS;
  __builtin_memset(sums, 0, (last - first + PANEL - 1) / PANEL * PANEL * rows * sizeof(float));
  for (int64_t i = 0; i < ldq * steps; i++) {
    const int64_t group = rows > FEW ? i / steps : i % ldq, n = first + (rows > FEW ? i % steps : i / ldq) * ABREAST * PANEL;
    const int64_t blocks = blocks_of_group(p.w->cols, group);
    float* to = sums + (n - first) * rows;
    widen(n, group, w[0]);
    if (ABREAST == 2 && n + PANEL < last) {
      widen(n + PANEL, group, w[1]);
      wide_tiles<KIND, 2>(w, blocks, p.q + group, ldq, rows, to);
    } else {
      wide_tiles<KIND, 1>(w, blocks, p.q + group, ldq, rows, to);
    }
  }
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t n = first; n < last; n += PANEL) {
      const int64_t count = last - n < PANEL ? last - n : PANEL;
      put(p, m, n, count, sums + (n - first) * rows + m * PANEL);
    }
  }
}

#if defined(ISA_AMX)
#include "amx.h"
#endif

// widen(row, group, Widened& or Halves&)
template <int T, class F>
inline void panels_of(const Product& p, int64_t first, int64_t last, int64_t rows, float* local, F widen) {
  constexpr int KIND = kind_of<T>();
#if defined(ISA_AMX)
  if (in_halves(T, rows)) {
    return half_panels<parts_of<T>()>(p, first, last, rows, local, [&](int64_t group, Halves* w) {
      for (int64_t n = first; n < last; n += PANEL) widen(n, group, *w++);
    });
  }
#endif
#if defined(ISA_AVX512)
  if constexpr (KIND == BYTES) {
    if (p.q->has_rest[0]) return wide_panels<BOTH>(p, first, last, rows, local, widen);
  }
#endif
  wide_panels<KIND>(p, first, last, rows, local, widen);
}

template <int T>
void tiled_packed(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  constexpr int64_t step = 8 * BLOCK / Packed<T>::numbers * Packed<T>::size;  // 256 columns of 16 rows
  const int64_t cols = p.w->cols, bytes = cols / Packed<T>::numbers * Packed<T>::size;
  const uint8_t* data = (const uint8_t*)p.w->data;
#if defined(ISA_AMX)
  if (in_bytes(p.w->type, rows)) {
    return byte_panels<T, true>(p, first, last, rows, local, [&](int64_t group, const uint8_t** w, uint8_t*) {
      for (int64_t n = first; n < last; n += GROUP) *w++ = data + n / GROUP * bytes + group * step;
    });
  }
#endif
  panels_of<T>(p, first, last, rows, local, [&](int64_t n, int64_t group, auto& w) {
    widen_packed<T>(data + n / GROUP * bytes + group * step, blocks_of_group(cols, group), w, rows > FEW ? 0 : step);
  });
}

// 16 rows in a block format, `stride` bytes apart: packed on the way, but for bytes of Q8_0
template <int T, class W>
void widen_rows(const uint8_t* p, int64_t stride, int64_t blocks, W& w) {
  constexpr int KERNEL = T == Q8_0 ? Q8 : T == Q4_0 ? Q4 : T, NUMBERS = Block<T>::numbers;
  if constexpr (T == Q8_0 && std::is_same<W, Widened>::value) return widen_q8_0(p, stride, blocks, w);
  uint8_t packed[8 * BLOCK / packed_numbers(KERNEL) * packed_bytes(KERNEL)];
  for (int64_t u = 0; u < blocks * BLOCK / NUMBERS; u++) {
    repack<T>(p + u * Block<T>::size, stride, packed + u * Packed<KERNEL>::size);
  }
  widen_packed<KERNEL>(packed, blocks, w, 0);
}

template <int T>
void tiled_blocks(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  constexpr int KERNEL = T == Q8_0 ? Q8 : T == Q4_0 ? Q4 : T;
  constexpr int64_t bytes = DEPTH / Block<T>::numbers * Block<T>::size;  // of 256 columns of one row
  const int64_t cols = p.w->cols, size = line_bytes(T, cols);
  const uint8_t* data = (const uint8_t*)p.w->data;
  panels_of<KERNEL>(p, first, last, rows, local, [&](int64_t n, int64_t group, auto& w) {
    const uint8_t* from = data + n * size + group * bytes;
    const int64_t blocks = blocks_of_group(cols, group);
    if (n + PANEL <= last) return widen_rows<T>(from, size, blocks, w);
    uint8_t whole[PANEL * bytes] = {};  // the last rows, and zeros below them
    for (int64_t r = 0; r < last - n; r++) {
      __builtin_memcpy(whole + r * bytes, from + r * size, blocks * BLOCK / Block<T>::numbers * Block<T>::size);
    }
    widen_rows<T>(whole, bytes, blocks, w);
  });
}

#if defined(ISA_AVX512) && !defined(ISA_AMX)
template <int T>
void tiled_plain(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  const int64_t cols = p.w->cols, stride = 2 * cols;
  const char* data = (const char*)p.w->data;
  panels_of<T>(p, first, last, rows, local, [&](int64_t n, int64_t group, auto& w) {
    const int64_t height = last - n < PANEL ? last - n : PANEL;
    widen_plain<T>(data + n * stride + group * DEPTH * 2, stride, height, blocks_of_group(cols, group), w);
  });
}
#endif

#if defined(ISA_AVX512)
// p.w: [outputs, inputs], whose data are lines of outputs; whole panels of outputs and blocks of inputs
template <int T>
void tiled_lines(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  const int64_t size = 2 * p.w->rows;
  const char* data = (const char*)p.w->data;
#if defined(ISA_AMX)
  if (rows <= PANEL) {
    const auto block = [&](int64_t b) { return (const char*)(p.q[b / 8].high + b % 8 * BLOCK); };
    const int64_t stride = groups_of(p.w->cols) * (int64_t)sizeof(XGroup);
    return few_lines<T>(p, first, last, rows, data + 2 * first, size, 2 * PANEL, block, stride);
  }
  return half_panels<parts_of<T>()>(p, first, last, rows, local, [&](int64_t group, Halves* w) {
    const int64_t panels = (last - first + PANEL - 1) / PANEL;
    widen_lines<T>(data + group * DEPTH * size + 2 * first, size, blocks_of_group(p.w->cols, group), panels, 2 * PANEL, w);
  });
#else
  panels_of<T>(p, first, last, rows, local, [&](int64_t n, int64_t group, auto& w) {
    widen_lines<T>(data + group * DEPTH * size + 2 * n, size, blocks_of_group(p.w->cols, group), w);
  });
#endif
}
#endif

#endif

#if defined(ISA_AVX512)

// Whether so many rows of x meet plain weights as integers, or (AMX) in tiles
inline bool takes_sixteen_bits(const Matrix& w, int64_t rows) {
  return (w.type == F16 || w.type == BF16) && !w.exact && rows >= TILED && w.cols % BLOCK == 0;
}
#if defined(ISA_AMX)
inline bool by_words(const Matrix&, int64_t) { return false; }
inline bool by_tiles(const Matrix& w, int64_t rows) {
  const bool bytes = w.type == Q8_0 && w.rows % PANEL == 0 && ((rows >= TILED && rows <= PANEL) || rows >= HALVED);
  return bytes || takes_sixteen_bits(w, rows);
}
#else
inline bool by_words(const Matrix& w, int64_t rows) { return takes_sixteen_bits(w, rows); }
#endif
inline bool lines_by_words(const Matrix& w, int64_t rows) {
  return (w.type == F16 || w.type == BF16) && !w.exact && rows >= TILED && w.cols % PANEL == 0 && w.rows % BLOCK == 0;
}

#else

inline bool by_words(const Matrix&, int64_t) { return false; }
inline bool lines_by_words(const Matrix&, int64_t) { return false; }

#endif

#if !defined(ISA_AMX)
inline bool by_tiles(const Matrix&, int64_t) { return false; }
#endif

// Whether so many rows of x meet w in blocks; in tiles they do not
inline bool takes_blocks(const Matrix& w, int64_t rows) { return !by_tiles(w, rows) && (is_quantised(w.type) || by_words(w, rows)); }
