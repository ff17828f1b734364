// Quantising at load: from plain rows into packed groups, lines or bands.
// Included by each isa_*.cpp after bands.h, inside its own namespace.

inline void plain_row(const Matrix& w, int64_t row, int64_t first, int64_t count, float* out) {
  const char* p = (const char*)w.data + (row * w.cols + first) * (w.type == F32 ? 4 : 2);
  for (int64_t i = 0; i < count; i++) {
    out[i] = w.type == F32 ? element<F32>(p, i) : w.type == F16 ? element<F16>(p, i) : element<BF16>(p, i);
  }
}

// The scale of a block, as stored, and its numbers: -127..127, or 0..15 that stand for -8..7
uint16_t encode(const float* x, int32_t type, int32_t* q) {
  float largest = 0;
  for (int i = 0; i < BLOCK; i++) {
    if (magnitude(x[i]) > magnitude(largest)) largest = x[i];
  }
  // in 4 bits the number furthest from zero, whatever its sign, becomes exactly -8
  uint16_t stored = float_to_half(type == Q8 ? __builtin_fabsf(largest) / 127 : largest / -8);
  float scale = half_to_float(stored), inverse = scale != 0 ? 1 / scale : 0;
  const int32_t lowest = type == Q8 ? -127 : -8, highest = type == Q8 ? 127 : 7;
  for (int i = 0; i < BLOCK; i++) {
    float y = x[i] * inverse;
    y = y > lowest ? (y < highest ? y : highest) : lowest;
    q[i] = (int32_t)((y + 12582912.0f) - 12582912.0f) + (type == Q4 ? 8 : 0);
  }
  return stored;
}

void pack(const Matrix& from, void* to, int32_t type, int64_t first_group, int64_t last_group) {
  switch (from.type) {
    case Q8_0: return repack_groups<Q8_0>(from, (uint8_t*)to, first_group, last_group);
    case Q4_0: return repack_groups<Q4_0>(from, (uint8_t*)to, first_group, last_group);
    case Q4_K: return repack_groups<Q4_K>(from, (uint8_t*)to, first_group, last_group);
    case Q5_K: return repack_groups<Q5_K>(from, (uint8_t*)to, first_group, last_group);
    case Q6_K: return repack_groups<Q6_K>(from, (uint8_t*)to, first_group, last_group);
  }
  if (type >= PANEL_F32) {  // the same numbers, of whole groups of rows
    const int64_t item = type == PANEL_F32 ? 4 : 2, row = from.cols * item;
    for (int64_t g = first_group; g < last_group; g++) {
      char* out = (char*)to + g * GROUP * row;
      for (int64_t c = 0; c < from.cols; c++) {
        for (int64_t r = 0; r < GROUP; r++, out += item) {
          __builtin_memcpy(out, (const char*)from.data + (g * GROUP + r) * row + c * item, item);
        }
      }
    }
    return;
  }
  const int64_t blocks = from.cols / BLOCK, bytes = type == Q8 ? Q8_BYTES : Q4_BYTES;
  float x[BLOCK];
  int32_t q[BLOCK];
  for (int64_t g = first_group; g < last_group; g++) {
    for (int64_t b = 0; b < blocks; b++) {
      uint8_t* p = (uint8_t*)to + (g * blocks + b) * bytes;
      for (int64_t r = 0; r < GROUP; r++) {
        int64_t row = g * GROUP + r;
        if (row < from.rows) plain_row(from, row, b * BLOCK, BLOCK, x);
        else __builtin_memset(x, 0, sizeof x);  // rows that fill the last group
        uint16_t scale = encode(x, type, q);
        __builtin_memcpy(p + 2 * r, &scale, 2);
        for (int k = 0; k < (type == Q8 ? 32 : 16); k++) {
          const int together = type == Q8 ? Q8_TOGETHER : 4;
          uint8_t* at = p + GROUP * 2 + (k / together * GROUP + r) * together + k % together;
          *at = (uint8_t)(type == Q8 ? q[k] : q[k] | q[k + 16] << 4);
        }
      }
    }
  }
}

// Lines first..last of the result: rows of `from`, or its columns when it is to be transposed
void pack_plain_lines(const Matrix& from, bool transpose, void* to, int32_t type, int64_t first, int64_t last) {
  const int64_t cols = transpose ? from.rows : from.cols, size = line_bytes(type, cols);
  constexpr int WIDE = 16;
  char* out = (char*)to;
  if (transpose && type == from.type) {  // the same bits in another order
    const int64_t item = type == F32 ? 4 : 2;
    for (int64_t f = first; f < last; f += WIDE) {
      for (int64_t c = 0; c < cols; c++) {
        const char* p = (const char*)from.data + (c * from.cols + f) * item;
        for (int64_t i = 0; i < WIDE && f + i < last; i++) {
          __builtin_memcpy(out + (f + i) * size + c * item, p + i * item, item);
        }
      }
    }
    return;
  }
  float* lines = (float*)__builtin_malloc(WIDE * cols * sizeof(float));
  float part[WIDE];
  for (int64_t f = first; f < last; f += WIDE) {
    const int64_t many = last - f < WIDE ? last - f : WIDE;
    for (int64_t c = 0; transpose && c < cols; c++) {
      plain_row(from, c, f, many, part);
      for (int64_t i = 0; i < many; i++) lines[i * cols + c] = part[i];
    }
    for (int64_t i = 0; i < many; i++) {
      float* line = lines + i * cols;
      if (!transpose) plain_row(from, f + i, 0, cols, line);
      char* at = out + (f + i) * size;
      for (int64_t c = 0; c < cols; c++) {
        uint32_t x = bits<uint32_t>(line[c]);
        uint16_t half = type == F16 ? float_to_half(line[c]) : (uint16_t)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
        if (type == F32) __builtin_memcpy(at + 4 * c, &x, 4);
        else __builtin_memcpy(at + 2 * c, &half, 2);
      }
    }
  }
  __builtin_free(lines);
}

inline void put_band_number(uint8_t* line, int32_t type, int64_t c, int32_t q) {
  if (type == BAND_Q8_0) {
    line[c] = (uint8_t)q;
    return;
  }
  uint8_t& both = line[c / BLOCK * 16 + c % 16];
  both = (uint8_t)(c % BLOCK < 16 ? q : both | q << 4);  // the lower channel comes first
}

// Bands first..last of plain numbers [channels, hidden units], quantised
void bands_of_plain(const Matrix& from, uint8_t* to, int32_t type, int64_t first, int64_t last) {
  const int64_t channels = from.rows, size = type == BAND_Q8_0 ? channels : channels / 2, bytes = 2 * channels + BLOCK * size;
  float x[BLOCK];
  int32_t q[BLOCK];
  for (int64_t b = first; b < last; b++) {
    uint8_t* band = to + b * bytes;
    for (int64_t c = 0; c < channels; c++) {
      plain_row(from, c, b * BLOCK, BLOCK, x);
      const uint16_t scale = encode(x, type == BAND_Q8_0 ? Q8 : Q4, q);
      __builtin_memcpy(band + 2 * c, &scale, 2);
      for (int k = 0; k < BLOCK; k++) put_band_number(band + 2 * channels + k * size, type, c, q[k]);
    }
  }
}

// The same of all types; in bands, whole ones of a matrix that is to be transposed
void pack_lines(const Matrix& from, bool transpose, void* to, int32_t type, int64_t first, int64_t last) {
  if (!is_bands(type)) return pack_plain_lines(from, transpose, to, type, first, last);
  if (from.type == Q8_0) return bands_of_blocks<Q8_0>(from, (uint8_t*)to, first / BLOCK, last / BLOCK);
  if (from.type == Q4_0) return bands_of_blocks<Q4_0>(from, (uint8_t*)to, first / BLOCK, last / BLOCK);
  bands_of_plain(from, (uint8_t*)to, type, first / BLOCK, last / BLOCK);
}
