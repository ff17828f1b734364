// Products of every type. Included by each isa_*.cpp after panels.h, inside its own namespace.

template <int T>
void packed_product(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  rows == 1 ? packed_row<T>(p, first, last) : many_packed_rows<T>(p, first, last, rows, panel);
}

template <int T>
void plain_product(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  if (rows == 1) one_row<T>(p, first, last);
  else if (rows <= FEW) few_rows<T>(p, first, last, rows, panel);
  else many_rows<T>(p, first, last, rows, panel);
}

void product_part(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  switch (p.w->type) {
    case F32: plain_product<F32>(p, first, last, rows, panel); break;
    case F16: plain_product<F16>(p, first, last, rows, panel); break;
    case BF16: plain_product<BF16>(p, first, last, rows, panel); break;
    case PANEL_F32: panel_product<F32>(p, first, last, rows, panel); break;
    case PANEL_F16: panel_product<F16>(p, first, last, rows, panel); break;
    case PANEL_BF16: panel_product<BF16>(p, first, last, rows, panel); break;
    case Q8: packed_product<Q8>(p, first, last, rows, panel); break;
    case PACKED_Q8_0: packed_product<Q8>(p, first, last, rows, panel); break;
    case Q4: packed_product<Q4>(p, first, last, rows, panel); break;
    case PACKED_Q4_0: packed_product<Q4>(p, first, last, rows, panel); break;
    case PACKED_Q4_K: packed_product<Q4_K>(p, first, last, rows, panel); break;
    case PACKED_Q5_K: packed_product<Q5_K>(p, first, last, rows, panel); break;
    case PACKED_Q6_K: packed_product<Q6_K>(p, first, last, rows, panel); break;
    case Q8_0: rows == 1 ? block_rows<Q8_0>(p, first, last) : many_block_rows<Q8_0>(p, first, last, rows, panel); break;
    case Q4_0: rows == 1 ? block_rows<Q4_0>(p, first, last) : many_block_rows<Q4_0>(p, first, last, rows, panel); break;
    case Q4_K: rows == 1 ? block_rows<Q4_K>(p, first, last) : many_block_rows<Q4_K>(p, first, last, rows, panel); break;
    case Q5_K: rows == 1 ? block_rows<Q5_K>(p, first, last) : many_block_rows<Q5_K>(p, first, last, rows, panel); break;
    case Q6_K: rows == 1 ? block_rows<Q6_K>(p, first, last) : many_block_rows<Q6_K>(p, first, last, rows, panel); break;
  }
}

// Rows first..last of w against `rows` rows of x; `first` a multiple of 16 where w is packed. panel: local_floats(rows).
void product(const Product& p, int64_t first, int64_t last, int64_t rows, float* panel) {
  const int64_t most = rows > 1 ? MOST_ROWS : last - first;
  for (int64_t n = first; n < last; n += most) product_part(p, n, n + most < last ? n + most : last, rows, panel);
  if (!p.y_quantised) return;
  for (int64_t m = 0; m < rows; m++) {
    quantise(p.y + m * p.ldy + first, last - first, p.y_quantised + m * groups_of(p.w->rows), first / BLOCK);
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

