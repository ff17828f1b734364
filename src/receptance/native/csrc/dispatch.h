// Products of every type. Included by each isa_*.cpp after tiles.h, inside its own namespace.

template <int T>
void packed_product(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  if (rows == 1) return packed_row<T>(p, first, last);
#if HAS_TILES
  if (rows >= TILED) return tiled_packed<T>(p, first, last, rows, panel);
#endif
  many_packed_rows<T>(p, first, last, rows, panel);
}

template <int T>
void plain_product(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
#if defined(ISA_AMX)
  if constexpr (T != F32) {
    if (p.q && by_tiles(*p.w, rows)) return tiled_rows<T>(p, first, last, rows, panel);
  }
#elif defined(ISA_AVX512)
  if constexpr (T != F32) {
    if (p.q && by_words(*p.w, rows)) return tiled_plain<T>(p, first, last, rows, panel);
  }
#endif
  if (rows == 1) one_row<T>(p, first, last);
  else if (rows > MANY && p.w->cols >= LONG_ROWS && !p.w->exact) rows_in_panels<T>(p, first, last, rows, panel);
  else many_rows<T>(p, first, last, rows, panel);
}

// Rows in a block format: packed on the way
template <int T>
void many_block_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
#if defined(ISA_AMX)
  if (T == Q8_0 && p.q && by_tiles(*p.w, rows)) {
    return rows <= PANEL ? few_byte_rows(p, first, last, rows) : tiled_rows<Q8_0>(p, first, last, rows, local);
  }
#endif
#if HAS_TILES
  if (rows >= TILED) return tiled_blocks<T>(p, first, last, rows, local);
#endif
  constexpr int KERNEL = T == Q8_0 ? Q8 : T == Q4_0 ? Q4 : T, NUMBERS = Block<T>::numbers;
  const int64_t cols = p.w->cols, size = line_bytes(T, cols), whole = (last - first) / PANEL * PANEL;
  each_panel(p, first, first + whole, rows, local + PANEL * DEPTH, [&](int64_t n, int64_t group, float* sums) {
    const uint8_t* w = (const uint8_t*)p.w->data + n * size + group * DEPTH / NUMBERS * Block<T>::size;
    uint8_t* panel = (uint8_t*)local;
    const int64_t blocks = blocks_of_group(cols, group), units = blocks * BLOCK / NUMBERS;
    for (int64_t r = PANEL; r < 2 * PANEL; r++) {  // the next panel: the processor does not see such short rows coming
      for (int64_t i = 0; i < units * Block<T>::size; i += 64) __builtin_prefetch(w + r * size + i);
    }
    for (int64_t u = 0; u < units; u++) repack<T>(w + u * Block<T>::size, size, panel + u * Packed<KERNEL>::size);
    packed_tiles<KERNEL>(panel, blocks, p.q + group, groups_of(cols), rows, sums);
  });
  for (int64_t m = 0; m < rows && first + whole < last; m++) {
    Product one = p;
    one.q += m * groups_of(cols), one.y += m * p.ldy, one.gate += m * p.ldy;
    block_rows<T>(one, first + whole, last);
  }
}

template <int T>
void block_product(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  if (rows == 1) block_rows<T>(p, first, last);
  else many_block_rows<T>(p, first, last, rows, panel);
}

template <int T>
void low_rank_product(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
#if defined(ISA_AMX)
  if constexpr (T != F32) {
    if (rows >= 12 && !p.w->exact && p.w->cols % BLOCK == 0) return tiled_panel<T>(p, first, last, rows, panel);
  }
#endif
  panel_product<T>(p, first, last, rows, panel);
}

void product_part(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  switch (p.w->type) {
    case F32: plain_product<F32>(p, first, last, rows, panel); break;
    case F16: plain_product<F16>(p, first, last, rows, panel); break;
    case BF16: plain_product<BF16>(p, first, last, rows, panel); break;
    case PANEL_F32: low_rank_product<F32>(p, first, last, rows, panel); break;
    case PANEL_F16: low_rank_product<F16>(p, first, last, rows, panel); break;
    case PANEL_BF16: low_rank_product<BF16>(p, first, last, rows, panel); break;
    case Q8: packed_product<Q8>(p, first, last, rows, panel); break;
    case PACKED_Q8_0: packed_product<Q8>(p, first, last, rows, panel); break;
    case Q4: packed_product<Q4>(p, first, last, rows, panel); break;
    case PACKED_Q4_0: packed_product<Q4>(p, first, last, rows, panel); break;
    case PACKED_Q4_K: packed_product<Q4_K>(p, first, last, rows, panel); break;
    case PACKED_Q5_K: packed_product<Q5_K>(p, first, last, rows, panel); break;
    case PACKED_Q6_K: packed_product<Q6_K>(p, first, last, rows, panel); break;
    case Q8_0: block_product<Q8_0>(p, first, last, rows, panel); break;
    case Q4_0: block_product<Q4_0>(p, first, last, rows, panel); break;
    case Q4_K: block_product<Q4_K>(p, first, last, rows, panel); break;
    case Q5_K: block_product<Q5_K>(p, first, last, rows, panel); break;
    case Q6_K: block_product<Q6_K>(p, first, last, rows, panel); break;
  }
}

// Rows first..last of w against `rows` rows of x; `first` a multiple of 16 where w is packed. panel: local_floats(rows).
void product(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  const int64_t most = rows > 1 ? MOST_ROWS : last - first;
  for (int64_t n = first; n < last; n += most) product_part(p, n, n + most < last ? n + most : last, rows, panel);
  if (!p.y_quantised) return;
  for (int64_t m = 0; m < rows; m++) {
    quantise(p.y + m * p.ldy + first, last - first, rows, p.y_for, p.y_quantised, m, groups_of(p.w->rows), first / BLOCK);
  }
}

void widen(const Matrix& from, int64_t first, int64_t last, float* to) {
  const int64_t cols = from.cols, size = line_bytes(from.type, cols);
  for (int64_t n = first; n < last; n++, to += cols) {
    const uint8_t* row = (const uint8_t*)from.data + n * size;
    switch (from.type) {
      case F32: __builtin_memcpy(to, row, size); break;
      case F16: for (int64_t i = 0; i < cols; i++) to[i] = element<F16>(row, i); break;
      case BF16: for (int64_t i = 0; i < cols; i++) to[i] = element<BF16>(row, i); break;
      case Q8_0: widen_blocks<Q8_0>(row, cols, to); break;
      case Q4_0: widen_blocks<Q4_0>(row, cols, to); break;
      case Q4_K: widen_blocks<Q4_K>(row, cols, to); break;
      case Q5_K: widen_blocks<Q5_K>(row, cols, to); break;
      case Q6_K: widen_blocks<Q6_K>(row, cols, to); break;
    }
  }
}

