// Value matrices of the channel mix in blocks of 8 or 4 bits, so that the rows of hidden units that are zero need not be read.
// Included by each isa_*.cpp after lines.h, inside its own namespace.
//
// A band is 32 hidden units: first the scales of all C channels (f16), then a line of C numbers for each unit. The numbers and
// scales are those of Q8_0 and Q4_0, whose blocks are 32 hidden units of one channel. In 4 bits, byte i of each 16 bytes holds
// channels i and i + 16 of 32.

template <int T>
constexpr int64_t band_bytes(int64_t cols) {
  return 2 * cols + (T == BAND_Q8_0 ? BLOCK * cols : BLOCK / 2 * cols);
}
template <int T>
constexpr int64_t band_line(int64_t cols) {
  return T == BAND_Q8_0 ? cols : cols / 2;
}

// One row: only lines that are needed --------------------------------------------------------------------------------------

template <int T>
inline vf band_part(const uint8_t* line, int64_t c) {  // W numbers, of 4 bits with 8 added
  if (T == BAND_Q8_0) return bytes((const int8_t*)line + c);
  const uint8_t* p = line + c / BLOCK * 16 + c % 16;
  return c % BLOCK < 16 ? nibbles<0>(p) : nibbles<4>(p);
}

inline vf halves(const uint8_t* p) { return elements<F16>(p, 0); }

// y[c..] += scales times the sum of these lines; what lies ahead of them is asked for
template <int T, int WIDTH>
inline void add_band_part(const uint8_t* scales, const uint8_t* const* line, const float* h, int64_t count,
                          const uint8_t* const* ahead, int64_t further, int64_t c, float start, float* y) {
  constexpr int V = WIDTH / W;
  for (int64_t i = 0; i < further; i++) __builtin_prefetch(ahead[i] + (T == BAND_Q8_0 ? c : c / 2));
  vf acc[V];
  for (int v = 0; v < V; v++) acc[v] = splat(start);
  for (int64_t i = 0; i < count; i++) {
    const vf hs = splat(h[i]);
    for (int v = 0; v < V; v++) acc[v] += band_part<T>(line[i], c + v * W) * hs;
  }
  for (int v = 0; v < V; v++) {
    float* to = y + c + v * W;
    store(to, load(to) + acc[v] * halves(scales + 2 * (c + v * W)));
  }
}

template <int T>
void add_band(const uint8_t* band, const uint8_t* const* line, const float* h, int64_t count, const uint8_t* const* ahead,
              int64_t further, int64_t cols, float* y) {
  float start = 0;
  for (int64_t i = 0; T == BAND_Q4_0 && i < count; i++) start -= 8 * h[i];
  int64_t c = 0;
  for (; c + 2 * BLOCK <= cols; c += 2 * BLOCK) {
    add_band_part<T, 2 * BLOCK>(band, line, h, count, ahead, further, c, start, y);
  }
  for (; c < cols; c += BLOCK) add_band_part<T, BLOCK>(band, line, h, count, ahead, 0, c, start, y);
}

// Hidden units first..last, whole bands, of which those that are not zero are `count` lines; room: for `last - first` of each
template <int T>
int64_t add_bands(const Matrix& w, const float* h, int64_t first, int64_t last, const uint8_t** line, float* values, float* y) {
  const uint8_t* data = (const uint8_t*)w.data;
  const int64_t cols = w.cols, bytes = band_bytes<T>(cols), size = band_line<T>(cols);
  int64_t count = 0, done = 0, ends[MOST_HIDDEN / BLOCK];
  for (int64_t f = first; f < last; f++) {
    line[count] = data + f / BLOCK * bytes + 2 * cols + f % BLOCK * size;
    values[count] = h[f];
    count += h[f] != 0;
    ends[(f - first) / BLOCK] = count;
  }
  for (int64_t b = 0; b < (last - first) / BLOCK; done = ends[b++]) {
    if (ends[b] == done) continue;
    const int64_t next = (b + 1) * BLOCK < last - first ? ends[b + 1] - ends[b] : 0;
    add_band<T>(data + (first / BLOCK + b) * bytes, line + done, values + done, ends[b] - done, line + ends[b], next, cols, y);
  }
  return count;
}

// Many rows: packed on the way --------------------------------------------------------------------------------------------

// v[k]: numbers of 16 channels of line k, as bytes; the interleaved result has 4 lines of each channel side by side
inline void interleave4(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, uint8_t* to) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  const __m128i va = _mm_loadu_si128((const __m128i*)a), vb = _mm_loadu_si128((const __m128i*)b);
  const __m128i vc = _mm_loadu_si128((const __m128i*)c), vd = _mm_loadu_si128((const __m128i*)d);
  const __m128i ab = _mm_unpacklo_epi8(va, vb), cd = _mm_unpacklo_epi8(vc, vd);
  const __m128i ef = _mm_unpackhi_epi8(va, vb), gh = _mm_unpackhi_epi8(vc, vd);
  _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi16(ab, cd));
  _mm_storeu_si128((__m128i*)(to + 16), _mm_unpackhi_epi16(ab, cd));
  _mm_storeu_si128((__m128i*)(to + 32), _mm_unpacklo_epi16(ef, gh));
  _mm_storeu_si128((__m128i*)(to + 48), _mm_unpackhi_epi16(ef, gh));
#else
  for (int r = 0; r < GROUP; r++) to[4 * r] = a[r], to[4 * r + 1] = b[r], to[4 * r + 2] = c[r], to[4 * r + 3] = d[r];
#endif
}

inline void interleave2(const uint8_t* a, const uint8_t* b, uint8_t* to) {
#if defined(ISA_AVX512) || defined(ISA_AVX2)
  const __m128i va = _mm_loadu_si128((const __m128i*)a), vb = _mm_loadu_si128((const __m128i*)b);
  _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi8(va, vb));
  _mm_storeu_si128((__m128i*)(to + 16), _mm_unpackhi_epi8(va, vb));
#else
  for (int r = 0; r < GROUP; r++) to[2 * r] = a[r], to[2 * r + 1] = b[r];
#endif
}

// Channels c..c+15 of a band as a packed block of 16 rows
template <int T>
inline void pack_band(const uint8_t* band, int64_t cols, int64_t c, uint8_t* to) {
  __builtin_memcpy(to, band + 2 * c, 2 * GROUP);
  to += 2 * GROUP;
  const int64_t size = band_line<T>(cols);
  const uint8_t* p = band + 2 * cols + (T == BAND_Q8_0 ? c : c / BLOCK * 16);
  if (T == BAND_Q8_0) {
    for (int k = 0; k < BLOCK; k += Q8_TOGETHER, to += GROUP * Q8_TOGETHER, p += Q8_TOGETHER * size) {
      if (Q8_TOGETHER == 4) interleave4(p, p + size, p + 2 * size, p + 3 * size, to);
      else interleave2(p, p + size, to);
    }
    return;
  }
  uint8_t both[16][GROUP];  // hidden units k and k + 16
  const bool high = c % BLOCK >= 16;
  for (int k = 0; k < 16; k++) {
    const uint8_t *a = p + k * size, *b = p + (k + 16) * size;
    if (high) {
      for (int r = 0; r < GROUP; r++) both[k][r] = (uint8_t)(a[r] >> 4 | (b[r] & 0xf0));
    } else {
      for (int r = 0; r < GROUP; r++) both[k][r] = (uint8_t)((a[r] & 15) | (b[r] & 15) << 4);
    }
  }
  for (int k = 0; k < 16; k += 4) interleave4(both[k], both[k + 1], both[k + 2], both[k + 3], to + k * GROUP);
}

#if defined(ISA_AMX)
// Channels c..c+63 of a band (or 16 or 32 less) as packed blocks of Q8, `apart` bytes from each other
template <int T>
inline void bytes_of_band(const uint8_t* band, int64_t cols, int64_t c, int64_t panels, uint8_t* to, int64_t apart) {
  const int64_t size = band_line<T>(cols);
  const uint8_t* p = band + 2 * cols + (T == BAND_Q8_0 ? c : c / 2);
  for (int64_t i = 0; i < panels; i++) __builtin_memcpy(to + i * apart, band + 2 * (c + i * GROUP), 2 * GROUP);
  const __mmask64 there = panels >= 4 ? ~0ull : (1ull << (GROUP * panels)) - 1;
  const __mmask32 half = panels >= 4 ? ~0u : (1u << (GROUP / 2 * panels)) - 1;
  const auto line = [&](const uint8_t* from) {  // numbers of 64 channels
    if (T == BAND_Q8_0) return _mm512_maskz_loadu_epi8(there, from);
    const __m512i both = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(half, from));
    const __m512i twice = _mm512_shuffle_i32x4(both, both, 0x50);  // the upper halves are those of every second 16 channels
    const __m512i shifted = _mm512_mask_srli_epi16(twice, 0xff00ff00, twice, 4);
    return _mm512_sub_epi8(_mm512_and_si512(shifted, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
  };
  for (int k = 0; k < BLOCK; k += 4, p += 4 * size) {
    for (int i = 0; i < 4; i++) __builtin_prefetch(p + i * size + 2 * band_bytes<T>(cols));
    const __m512i v0 = line(p), v1 = line(p + size), v2 = line(p + 2 * size), v3 = line(p + 3 * size);
    const __m512i low01 = _mm512_unpacklo_epi8(v0, v1), low23 = _mm512_unpacklo_epi8(v2, v3);
    const __m512i high01 = _mm512_unpackhi_epi8(v0, v1), high23 = _mm512_unpackhi_epi8(v2, v3);
    const __m512i a = _mm512_unpacklo_epi16(low01, low23), b = _mm512_unpackhi_epi16(low01, low23);      // channels 0-3, 4-7
    const __m512i d = _mm512_unpacklo_epi16(high01, high23), e = _mm512_unpackhi_epi16(high01, high23);  // of each 16
    const __m512i ab01 = _mm512_shuffle_i32x4(a, b, 0x44), ab23 = _mm512_shuffle_i32x4(a, b, 0xee);
    const __m512i de01 = _mm512_shuffle_i32x4(d, e, 0x44), de23 = _mm512_shuffle_i32x4(d, e, 0xee);
    uint8_t* out = to + 2 * GROUP + k / 4 * 64;
    _mm512_storeu_si512(out, _mm512_shuffle_i32x4(ab01, de01, 0x88));
    if (panels > 1) _mm512_storeu_si512(out + apart, _mm512_shuffle_i32x4(ab01, de01, 0xdd));
    if (panels > 2) _mm512_storeu_si512(out + 2 * apart, _mm512_shuffle_i32x4(ab23, de23, 0x88));
    if (panels > 3) _mm512_storeu_si512(out + 3 * apart, _mm512_shuffle_i32x4(ab23, de23, 0xdd));
  }
}
#endif

// Channels first..last (whole groups of 16) of p.w [channels, hidden units], whose data are bands
template <int T>
void band_rows(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  constexpr int KERNEL = T == BAND_Q8_0 ? Q8 : Q4;
  const int64_t channels = p.w->rows, bytes = band_bytes<T>(channels);
  const uint8_t* data = (const uint8_t*)p.w->data;
  const auto pack_panel = [&](int64_t n, int64_t group, int64_t blocks, uint8_t* to) {
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t* band = data + (group * 8 + b) * bytes;
      const uint8_t* ahead = band + 2 * bytes + 2 * channels + (T == BAND_Q8_0 ? n : n / 2);
      for (int k = 0; n % (4 * GROUP) == 0 && k < BLOCK; k++) __builtin_prefetch(ahead + k * band_line<T>(channels));
      pack_band<T>(band, channels, n, to + b * Packed<KERNEL>::size);
    }
  };
#if HAS_TILES
  if (rows >= TILED) {
#if defined(ISA_AMX)
    if (in_bytes(T, rows)) {
      return byte_panels<Q8, false>(p, first, last, rows, local, [&](int64_t group, const uint8_t** w, uint8_t* room) {
        const int64_t blocks = blocks_of_group(p.w->cols, group), panels = (last - first) / PANEL;
        for (int64_t i = 0; i < panels; i++) w[i] = room + i * blocks * Q8_BYTES;
        for (int64_t b = 0; b < blocks; b++) {
          uint8_t* to = room + b * Q8_BYTES;
          bytes_of_band<T>(data + (group * 8 + b) * bytes, channels, first, panels, to, blocks * Q8_BYTES);
        }
      });
    }
#endif
    panels_of<KERNEL>(p, first, last, rows, local, [&](int64_t n, int64_t group, auto& w) {
      uint8_t packed[8 * Packed<KERNEL>::size];
      const int64_t blocks = blocks_of_group(p.w->cols, group);
      pack_panel(n, group, blocks, packed);
      widen_packed<KERNEL>(packed, blocks, w, 0);
    });
    return;
  }
#endif
  each_panel(p, first, last, rows, local + PANEL_FLOATS, [&](int64_t n, int64_t group, float* sums) {
    const int64_t blocks = blocks_of_group(p.w->cols, group);
    pack_panel(n, group, blocks, (uint8_t*)local);
    packed_tiles<KERNEL>((const uint8_t*)local, blocks, p.q + group, groups_of(p.w->cols), rows, sums);
  });
}

// Channels first..last of a value matrix that lies by hidden units, p.w: [channels, hidden units]
void turned_product(const Product& p, int64_t first, int64_t last, int64_t rows, float* local) {
  switch (p.w->type) {
    case BAND_Q8_0: band_rows<BAND_Q8_0>(p, first, last, rows, local); break;
    case BAND_Q4_0: band_rows<BAND_Q4_0>(p, first, last, rows, local); break;
#if defined(ISA_AVX512)
    case F16: tiled_lines<F16>(p, first, last, rows, local); break;
    case BF16: tiled_lines<BF16>(p, first, last, rows, local); break;
#endif
  }
}

// At load -------------------------------------------------------------------------------------------------------------------

// Bands first..last of a matrix [channels, hidden units] in Q8_0 or Q4_0
template <int T>
void bands_of_blocks(const Matrix& from, uint8_t* to, int64_t first, int64_t last) {
  constexpr int TO = T == Q8_0 ? BAND_Q8_0 : BAND_Q4_0;
  const int64_t channels = from.rows, stride = line_bytes(T, from.cols), size = band_line<TO>(channels);
  for (int64_t b = first; b < last; b++) {
    uint8_t *band = to + b * band_bytes<TO>(channels), *lines = band + 2 * channels;
    for (int64_t c = 0; c < channels; c += GROUP) {
      const uint8_t* w = (const uint8_t*)from.data + c * stride + b * Block<T>::size;
      for (int r = 0; r < GROUP; r++) __builtin_memcpy(band + 2 * (c + r), w + r * stride, 2);
      uint8_t quads[8][64];  // of 4 hidden units of 16 channels
      fill_quads<T, 0>(w, stride, quads);
      for (int k = 0; k < BLOCK; k++) {
        uint8_t* line = lines + k * size + (T == Q8_0 ? c : c / BLOCK * 16);
        const uint8_t* q = quads[k / 4] + k % 4;
        for (int r = 0; r < GROUP; r++) {
          if (T == Q8_0) line[r] = q[4 * r];
          else line[r] = (uint8_t)(c % BLOCK < 16 ? q[4 * r] : line[r] | q[4 * r] << 4);
        }
      }
    }
  }
}
