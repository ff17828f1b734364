// A forward pass: all versions, any number of sequences with any number of tokens each. Included by each isa_*.cpp after
// the kernels, inside its own namespace.
//
// Every thread runs `forward`. What lies between two barriers is a stage: a list of tickets (rows, heads, parts of
// matrices) that the threads take until none is left. The rows of a stage are all tokens of all sequences of the chunk.

constexpr int INPUTS = MIXES;
constexpr int RKV[] = {IN_R, IN_K, IN_V}, RKVG[] = {IN_R, IN_K, IN_V, IN_G};
constexpr float MIN_LOG_DECAY = -0.60653065971f;  // -e^-1/2, version 7
constexpr int64_t TICKET_BYTES = 512 << 10;       // of weights in one ticket of a product with one row, at most

struct Run {
  Request* request;
  const Model* model;
  Team* team;
  int threads;
  int64_t rows, batch;  // of this chunk: tokens; sequences
  const State* in;
  int64_t pool;             // rows of the state's arrays, and of each sequence its row before and after the call
  const int32_t *from, *to;
  int32_t* rows_of_batch;   // 0, 1, 2, ...: where the caller names none
  // of each row of the chunk: its sequence, and its place in it; of each sequence: its first row and number of rows
  int32_t *row_seq, *row_time;
  int64_t *seq_first, *seq_rows, *seq_done, *seq_offset;
  int64_t* chunk;             // rows of this chunk, for the threads that did not cut it
  float* x;                   // [rows, C] the residual
  float* mixed[INPUTS];       // [rows, C]
  XGroup* quantised[INPUTS];  // the same
  float *r, *k, *v, *g, *y;   // [rows, A]
  float *decay, *rate, *value_gate, *first;  // [rows, A], version 7 (6: decay)
  float *low[4];              // [rows, C]: low-rank inner values
  XGroup *y_quantised, *hidden_quantised;
  float *hidden, *gate;       // [rows, F], [rows, C]
  float *last_att, *last_ffn; // [B, C]: what the next call's shift needs
  float* partial;             // [pieces, C]: parts of the sparse product, to be added to x
  const float* pending;       // null, or the gate of the partial sums
  int64_t pieces;             // of partial sums that are still to be added to x
  char* local;                // of each thread
  int64_t local_bytes;
};

template <class F>
inline void each(Run& run, int64_t count, F stage) {
  for (int64_t i; (i = team_next(run.team)) < count;) stage(i);
  team_barrier(run.team);
}

inline float* panel_of(Run& run, int thread) { return (float*)(run.local + thread * run.local_bytes); }

// Rows of w in one ticket. With one row of x: long streams, but tickets enough that no thread waits for another's last one
inline int64_t ticket_rows(const Matrix& w, int64_t rows, int threads) {
  if (w.rows < 64 * 2 * threads) return 32;  // whole blocks of y
  if (rows > 1) return MOST_ROWS;
  const int64_t fair = threads == 1 ? w.rows : w.rows / (4 * threads), most = TICKET_BYTES / line_bytes(w.type, w.cols);
  const int64_t step = (fair < most ? fair : most) / 64 * 64;  // four groups of a packed matrix, or streams of eight rows
  return step < 64 ? 64 : step;
}

// All products of a stage
void products(Run& run, int thread, const Product* list, int count, int64_t rows) {
  int64_t starts[16], step[16], total = 0;
#if defined(ISA_AMX)
  for (int i = 0; i < count; i++) {
    starts[i] = total;
    if (list[i].q && by_tiles(*list[i].w, rows)) total += tickets_of_tiles(*list[i].w, rows);
  }
  if (total > 0) {
    each(run, total, [&](int64_t ticket) {
      int i = count - 1;
      while (starts[i] > ticket) i--;
      fill_tiles(list[i], rows, ticket - starts[i]);
    });
  }
  total = 0;
#endif
  for (int i = 0; i < count; i++) {
    const Matrix& w = *list[i].w;
    step[i] = ticket_rows(w, rows, run.threads);
    starts[i] = total;
    total += (w.rows + step[i] - 1) / step[i];
  }
  each(run, total, [&](int64_t ticket) {
    int i = count - 1;
    while (starts[i] > ticket) i--;
    int64_t first = (ticket - starts[i]) * step[i], last = first + step[i];
    product(list[i], first, last < list[i].w->rows ? last : list[i].w->rows, rows, panel_of(run, thread));
  });
}

inline Product make(const Matrix& w, const float* x, const XGroup* q, float* y, int epilogue = STORE) {
  return {&w, x, w.cols, q, y, w.rows, epilogue, nullptr, nullptr, 0};
}

// Element-wise parts ---------------------------------------------------------------------------------------------------

// Not inlined, as group_norm: the same row may come by several ways, and copies of a sum need not round alike
__attribute__((noinline)) void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float* y) {
  float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += x[i];
  const float mean = total / n;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1 / __builtin_sqrtf(squares / n + 1e-5f);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

__attribute__((noinline)) void group_norm(float* y, const float* weight, const float* bias, int64_t n) {
  float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += y[i];
  const float mean = total / n;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) squares += (y[i] - mean) * (y[i] - mean);
  const float scale = 1 / __builtin_sqrtf(squares / n + 64e-5f);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = (y[i] - mean) * scale * weight[i] + bias[i];
}

void mix(const float* x, const float* previous, const float* weight, int64_t n, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = x[i] + (previous[i] - x[i]) * weight[i];
}

// x += the parts of the sparse product that the threads have summed
void add_pending(Run& run) {
  const int64_t c = run.model->n_embd;
  for (int64_t i = 1; i < run.pieces; i++) {
    const float* part = run.partial + i * c;
#pragma omp simd
    for (int64_t j = 0; j < c; j++) run.partial[j] += part[j];
  }
  add_gated(run.x, run.pending, run.partial, c);
}

// A stage over blocks of rows: layer norm, then `mixes(row, normed, previous)`. The last row of each sequence is kept in
// `last` [B, C], and the row before each sequence's first one comes from `shift`, of one layer of the state.
template <class F>
void normed_rows(Run& run, int thread, const float* weight, const float* bias, const float* shift, float* last,
                 F mixes) {
  const int64_t c = run.model->n_embd;
  int64_t block = run.rows / (4 * run.threads);
  block = block < 1 ? 1 : block > 16 ? 16 : block;
  float* lines[2] = {panel_of(run, thread), panel_of(run, thread) + c};
  each(run, (run.rows + block - 1) / block, [&](int64_t ticket) {
    if (run.pieces) add_pending(run);  // one row, so one ticket
    const int64_t first = ticket * block, end = first + block < run.rows ? first + block : run.rows;
    for (int64_t m = first; m < end; m++) {
      float *now = lines[m & 1], *before = lines[(m & 1) ^ 1];
      const int32_t seq = run.row_seq[m], time = run.row_time[m];
      const float* previous = before;
      if (time == 0) previous = shift + run.from[seq] * c;
      else if (m == first) layer_norm(run.x + (m - 1) * c, weight, bias, c, before);
      layer_norm(run.x + m * c, weight, bias, c, now);
      mixes(m, now, previous);
      if (time == run.seq_rows[seq] - 1) __builtin_memcpy(last + seq * c, now, c * sizeof(float));
    }
  });
  run.pieces = 0;
}

// After the stage of normed_rows: the shift that the next call needs
void keep_shift(Run& run, int thread, const float* last, float* shift) {
  const int64_t c = run.model->n_embd;
  if (thread != 0) return;
  for (int64_t s = 0; s < run.batch; s++) {
    if (run.seq_rows[s] > 0) __builtin_memcpy(shift + run.to[s] * c, last + s * c, c * sizeof(float));
  }
}

inline void quantise_for(Run& run, const Matrix& w, int input, int64_t m, int64_t rows) {
  const int64_t c = w.cols;
  if (takes_blocks(w, rows)) quantise(run.mixed[input] + m * c, c, rows, w.type, run.quantised[input], m, groups_of(c));
}

// Channel mix ----------------------------------------------------------------------------------------------------------

void channel_mix(Run& run, int thread, const ChannelMix& ffn, const float* weight, const float* bias,
                 const float* shift_in, float* shift_out) {
  const Model& model = *run.model;
  const int64_t c = model.n_embd, f = ffn.key.rows, rows = run.rows;
  const bool gated = ffn.receptance.data != nullptr;
  normed_rows(run, thread, weight, bias, shift_in, run.last_ffn, [&](int64_t m, const float* x, const float* previous) {
    mix(x, previous, ffn.mix_k, c, run.mixed[IN_K] + m * c);
    quantise_for(run, ffn.key, IN_K, m, rows);
    if (gated) {
      mix(x, previous, ffn.mix_r, c, run.mixed[IN_R] + m * c);
      quantise_for(run, ffn.receptance, IN_R, m, rows);
    }
  });
  keep_shift(run, thread, run.last_ffn, shift_out);
  Product list[2] = {make(ffn.key, run.mixed[IN_K], run.quantised[IN_K], run.hidden, RELU2)};
  if (gated) list[1] = make(ffn.receptance, run.mixed[IN_R], run.quantised[IN_R], run.gate, SIGMOID);
  const bool by_outputs = has_rows_of_outputs(ffn.value.type);
  const bool in_blocks = rows > 1 && (is_bands(ffn.value.type) || lines_by_words(ffn.value, rows));
  if (by_outputs || in_blocks) list[0].y_quantised = run.hidden_quantised, list[0].y_for = ffn.value.type;
  products(run, thread, list, gated ? 2 : 1, rows);

  if (by_outputs) {  // its rows are channels: all hidden units are read
    list[0] = make(ffn.value, run.hidden, run.hidden_quantised, run.x, gated ? GATED_ADD : ADD);
    list[0].gate = run.gate;
    products(run, thread, list, 1, rows);
    return;
  }

  if (rows == 1) {  // only the lines of hidden units that are not zero
    const int64_t step = piece_of(f);
    const uint8_t** line = (const uint8_t**)panel_of(run, thread);
    float* values = (float*)(line + MOST_HIDDEN);
    int64_t active = 0;
    each(run, pieces_of(f), [&](int64_t piece) {
      const int64_t first = piece * step, last = first + step < f ? first + step : f;
      float* sum = run.partial + piece * c;
      __builtin_memset(sum, 0, c * sizeof(float));
      if (ffn.value.type == BAND_Q8_0) active += add_bands<BAND_Q8_0>(ffn.value, run.hidden, first, last, line, values, sum);
      else if (ffn.value.type == BAND_Q4_0) active += add_bands<BAND_Q4_0>(ffn.value, run.hidden, first, last, line, values, sum);
      else active += add_active_lines(ffn.value, run.hidden, first, last, (int32_t*)line, values, sum);
    });
    __atomic_fetch_add(&run.request->active, active, __ATOMIC_RELAXED);
    if (thread == 0) run.request->hidden += f;
    run.pieces = pieces_of(f);
    run.pending = gated ? run.gate : nullptr;
    return;
  }
  if (in_blocks) {
    const Matrix turned = {c, f, ffn.value.data, ffn.value.type, 0};
    Product p = make(turned, run.hidden, run.hidden_quantised, run.x, gated ? GATED_ADD : ADD);
    p.gate = run.gate;
    // Tickets of whole pairs of cache lines, which processors fetch together, if there are enough for all threads
    int64_t step = ffn.value.type == BAND_Q4_0 ? 4 * MOST_ROWS : 2 * MOST_ROWS;
    while (step > MOST_ROWS && c < 2 * step * run.threads) step /= 2;
    each(run, (c + step - 1) / step, [&](int64_t ticket) {
      const int64_t end = (ticket + 1) * step < c ? (ticket + 1) * step : c;
      for (int64_t first = ticket * step; first < end; first += MOST_ROWS) {
        const int64_t last = first + MOST_ROWS < end ? first + MOST_ROWS : end;
        turned_product(p, first, last, rows, panel_of(run, thread));
      }
    });
    return;
  }
  each(run, (c + STRIP - 1) / STRIP, [&](int64_t ticket) {
    const int64_t first = ticket * STRIP, width = c - first < STRIP ? c - first : STRIP;
    float *strip = panel_of(run, thread), *part = strip + PANEL_FLOATS, *y = part + rows * STRIP;
    strip_product(ffn.value, run.hidden, rows, first, strip, part, y);
    for (int64_t m = 0; m < rows; m++) {
      add_gated(run.x + m * c + first, gated ? run.gate + m * c + first : nullptr, y + m * STRIP, width);
    }
  });
}

// Time mix -------------------------------------------------------------------------------------------------------------

// Tickets (sequence, head): `work(sequence, first row, rows, first channel)`
template <class F>
inline void heads(Run& run, int64_t width, F work) {
  const int64_t per = (run.model->dim_att + width - 1) / width;
  each(run, run.batch * per, [&](int64_t ticket) {
    const int64_t s = ticket / per;
    if (run.seq_rows[s] > 0) work(s, run.seq_first[s], run.seq_rows[s], ticket % per * width);
  });
}

// A head, which quantises its own outputs, must have whole blocks of them
inline bool output_in_blocks(const Run& run, const Matrix& output) {
  const bool whole = run.model->version == 4 || run.model->head_size % BLOCK == 0;
  return is_quantised(output.type) || (whole && by_words(output, run.rows));
}

inline void quantise_output(Run& run, const Matrix& output, int64_t row, int64_t t, int64_t channel, int64_t n) {
  if (!output_in_blocks(run, output) || by_tiles(output, run.rows)) return;
  const int64_t a = output.cols;
  for (int64_t m = row; m < row + t; m++) {
    quantise(run.y + m * a + channel, n, run.rows, output.type, run.y_quantised, m, groups_of(a), channel / BLOCK);
  }
}

void output_product(Run& run, int thread, const Layer& layer) {
  const bool quantised = output_in_blocks(run, layer.output) || by_tiles(layer.output, run.rows);
  const XGroup* q = quantised ? run.y_quantised : nullptr;
  Product list[1] = {make(layer.output, run.y, q, run.x, ADD)};
  products(run, thread, list, 1, run.rows);
}

void time_mix4(Run& run, int thread, int64_t index) {
  const Model& model = *run.model;
  const Layer& layer = model.layers[index];
  const int64_t c = model.n_embd, a = model.dim_att, at = index * run.pool;
  const Matrix* by[MIXES] = {&layer.receptance, nullptr, &layer.key, &layer.value};
  normed_rows(run, thread, layer.ln1_weight, layer.ln1_bias, run.in->att_shift + at * c, run.last_att,
              [&](int64_t m, const float* x, const float* previous) {
                for (int i : RKV) {
                  mix(x, previous, layer.mix[i], c, run.mixed[i] + m * c);
                  quantise_for(run, *by[i], i, m, run.rows);
                }
              });
  keep_shift(run, thread, run.last_att, run.request->out->att_shift + at * c);
  Product list[3] = {make(layer.receptance, run.mixed[IN_R], run.quantised[IN_R], run.r, SIGMOID),
                     make(layer.key, run.mixed[IN_K], run.quantised[IN_K], run.k),
                     make(layer.value, run.mixed[IN_V], run.quantised[IN_V], run.v)};
  products(run, thread, list, 3, run.rows);
  const State &in = *run.in, &out = *run.request->out;
  heads(run, 64, [&](int64_t s, int64_t row, int64_t t, int64_t channel) {
    const int64_t n = a - channel < 64 ? a - channel : 64, o = row * a + channel;
    const int64_t from = (at + run.from[s]) * a + channel, place = (at + run.to[s]) * a + channel;
    float* fields[3][2] = {{in.num, out.num}, {in.den, out.den}, {in.exp, out.exp}};
    for (auto& field : fields) {
      if (field[0] + from != field[1] + place) __builtin_memcpy(field[1] + place, field[0] + from, n * sizeof(float));
    }
    wkv4(n, t, a, layer.decay + channel, layer.bonus + channel, run.k + o, run.v + o, run.y + o, out.num + place,
         out.den + place, out.exp + place);
    for (int64_t m = row; m < row + t; m++) {
#pragma omp simd
      for (int64_t i = channel; i < channel + n; i++) run.y[m * a + i] *= run.r[m * a + i];
    }
    quantise_output(run, layer.output, row, t, channel, n);
  });
  output_product(run, thread, layer);
}

// Group norm and gate of one head's y
void norm_and_gate(Run& run, const Layer& layer, int64_t row, int64_t t, int64_t channel, int64_t n) {
  const int64_t a = run.model->dim_att;
  for (int64_t m = row; m < row + t; m++) {
    float *y = run.y + m * a + channel, *g = run.g + m * a + channel;
    group_norm(y, layer.lnx_weight + channel, layer.lnx_bias + channel, n);
    if (run.model->has_gate) {
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] *= g[i] * sigmoid(g[i]);
    }
  }
  quantise_output(run, layer.output, row, t, channel, n);
}

void time_mix5(Run& run, int thread, int64_t index) {
  const Model& model = *run.model;
  const Layer& layer = model.layers[index];
  const int64_t c = model.n_embd, a = model.dim_att, n = model.head_size, at = index * run.pool;
  const Matrix* by[MIXES] = {&layer.receptance, nullptr, &layer.key, &layer.value, nullptr, &layer.gate};
  normed_rows(run, thread, layer.ln1_weight, layer.ln1_bias, run.in->att_shift + at * c, run.last_att,
              [&](int64_t m, const float* x, const float* previous) {
                for (int i : RKVG) {
                  if (i == IN_G && !model.has_gate) continue;
                  mix(x, previous, layer.mix[i], c, run.mixed[i] + m * c);
                  quantise_for(run, *by[i], i, m, run.rows);
                }
              });
  keep_shift(run, thread, run.last_att, run.request->out->att_shift + at * c);
  Product list[4] = {make(layer.receptance, run.mixed[IN_R], run.quantised[IN_R], run.r),
                     make(layer.key, run.mixed[IN_K], run.quantised[IN_K], run.k),
                     make(layer.value, run.mixed[IN_V], run.quantised[IN_V], run.v)};
  if (model.has_gate) list[3] = make(layer.gate, run.mixed[IN_G], run.quantised[IN_G], run.g);
  products(run, thread, list, model.has_gate ? 4 : 3, run.rows);
  heads(run, n, [&](int64_t s, int64_t row, int64_t t, int64_t channel) {
    const int64_t o = row * a + channel, from = ((at + run.from[s]) * a + channel) * n;
    const int64_t place = ((at + run.to[s]) * a + channel) * n;
    wkv6(n, t, a, 0, run.r + o, layer.decay + channel, run.k + o, run.v + o, layer.bonus + channel, run.y + o,
         run.in->wkv + from, run.request->out->wkv + place);
    norm_and_gate(run, layer, row, t, channel, n);
  });
  output_product(run, thread, layer);
}

void time_mix6(Run& run, int thread, int64_t index) {
  const Model& model = *run.model;
  const Layer& layer = model.layers[index];
  const int64_t c = model.n_embd, n = model.head_size, at = index * run.pool, rank = layer.maa2[0].cols;
  float *now = run.decay, *before = run.rate;  // [rows, C]: the normed rows, until the second stage
  normed_rows(run, thread, layer.ln1_weight, layer.ln1_bias, run.in->att_shift + at * c, run.last_att,
              [&](int64_t m, const float* x, const float* previous) {
                __builtin_memcpy(now + m * c, x, c * sizeof(float));
                __builtin_memcpy(before + m * c, previous, c * sizeof(float));
                mix(x, previous, layer.mix_x, c, run.mixed[IN_A] + m * c);
              });
  keep_shift(run, thread, run.last_att, run.request->out->att_shift + at * c);
  Product inner[1] = {make(layer.maa1, run.mixed[IN_A], nullptr, run.low[0], TANH)};  // [rows, 5 rank]
  products(run, thread, inner, 1, run.rows);

  const int inputs[5] = {IN_W, IN_K, IN_V, IN_R, IN_G};
  Product corrections[5];
  for (int i = 0; i < 5; i++) {
    corrections[i] = {&layer.maa2[i], run.low[0] + i * rank, 5 * rank, nullptr, run.mixed[inputs[i]], c, STORE, nullptr, nullptr, 0};
  }
  products(run, thread, corrections, 5, run.rows);
  const Matrix* by[MIXES] = {&layer.receptance, &layer.w1, &layer.key, &layer.value, nullptr, &layer.gate};
  each(run, run.rows * 5, [&](int64_t ticket) {
    const int64_t m = ticket / 5;
    const int i = inputs[ticket % 5];
    float *y = run.mixed[i] + m * c, *x = now + m * c, *previous = before + m * c;
    const float* weight = layer.mix[i];
#pragma omp simd
    for (int64_t j = 0; j < c; j++) y[j] = x[j] + (previous[j] - x[j]) * (weight[j] + y[j]);
    quantise_for(run, *by[i], i, m, run.rows);
  });

  Product list[5] = {make(layer.receptance, run.mixed[IN_R], run.quantised[IN_R], run.r),
                     make(layer.key, run.mixed[IN_K], run.quantised[IN_K], run.k),
                     make(layer.value, run.mixed[IN_V], run.quantised[IN_V], run.v),
                     make(layer.gate, run.mixed[IN_G], run.quantised[IN_G], run.g),
                     make(layer.w1, run.mixed[IN_W], nullptr, run.low[0], TANH)};
  products(run, thread, list, 5, run.rows);
  heads(run, n, [&](int64_t s, int64_t row, int64_t t, int64_t channel) {
    const int64_t o = row * c + channel, r = layer.w2.cols;
    const int64_t from = ((at + run.from[s]) * c + channel) * n, place = ((at + run.to[s]) * c + channel) * n;
    Product decay = {&layer.w2, run.low[0] + row * r, r, nullptr, run.decay + row * c, c, STORE, nullptr, nullptr, 0};
    product(decay, channel, channel + n, t, panel_of(run, thread));
    for (int64_t m = row; m < row + t; m++) {
      float *w = run.decay + m * c + channel;
      const float* base = layer.decay + channel;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) w[i] = exp_(-exp_(base[i] + w[i]));
    }
    wkv6(n, t, c, c, run.r + o, run.decay + o, run.k + o, run.v + o, layer.bonus + channel, run.y + o,
         run.in->wkv + from, run.request->out->wkv + place);
    norm_and_gate(run, layer, row, t, channel, n);
  });
  output_product(run, thread, layer);
}

// What stands between the products and the recurrence of one token of one head: decay, rate, value residual, removal key
void prepare7(Run& run, const Layer& layer, bool first_layer, int64_t o, int64_t channel, int64_t n) {
  float *w = run.decay + o, *rate = run.rate + o, *k = run.k + o, *v = run.v + o;
  float *removal = run.mixed[IN_R] + o, *replace = run.mixed[IN_W] + o;  // the mixes are no longer needed: a_op and b_op
  const float *w0 = layer.decay + channel, *a0 = layer.a0 + channel, *k_k = layer.k_k + channel;
  const float* k_a = layer.k_a + channel;
  if (first_layer) {
    __builtin_memcpy(run.first + o, v, n * sizeof(float));
  } else {
    const float *v0 = layer.v0 + channel, *gate = run.value_gate + o, *first = run.first + o;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) v[i] += (first[i] - v[i]) * sigmoid(v0[i] + gate[i]);
  }
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) {
    removal[i] = k[i] * k_k[i];
    squares += removal[i] * removal[i];
  }
  const float length = __builtin_sqrtf(squares), inverse = 1 / (length > 1e-12f ? length : 1e-12f);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float a = sigmoid(a0[i] + rate[i]), kk = removal[i] * inverse;
    w[i] = exp_(MIN_LOG_DECAY * sigmoid(w0[i] + w[i]));
    k[i] *= 1 + (a - 1) * k_a[i];
    removal[i] = -kk;
    replace[i] = kk * a;
  }
}

void time_mix7(Run& run, int thread, int64_t index) {
  const Model& model = *run.model;
  const Layer& layer = model.layers[index];
  const int64_t c = model.n_embd, n = model.head_size, at = index * run.pool;
  const Matrix* by[MIXES] = {&layer.receptance, &layer.w1, &layer.key, &layer.value, &layer.a1, &layer.g1};
  normed_rows(run, thread, layer.ln1_weight, layer.ln1_bias, run.in->att_shift + at * c, run.last_att,
              [&](int64_t m, const float* x, const float* previous) {
                for (int i = 0; i < MIXES; i++) {
                  mix(x, previous, layer.mix[i], c, run.mixed[i] + m * c);
                  quantise_for(run, *by[i], i, m, run.rows);
                }
              });
  keep_shift(run, thread, run.last_att, run.request->out->att_shift + at * c);
  const bool first_layer = index == 0;
  Product list[7] = {make(layer.receptance, run.mixed[IN_R], run.quantised[IN_R], run.r),
                     make(layer.key, run.mixed[IN_K], run.quantised[IN_K], run.k),
                     make(layer.value, run.mixed[IN_V], run.quantised[IN_V], run.v),
                     make(layer.w1, run.mixed[IN_W], nullptr, run.low[0], TANH),
                     make(layer.a1, run.mixed[IN_A], nullptr, run.low[1]),
                     make(layer.g1, run.mixed[IN_G], nullptr, run.low[2], SIGMOID)};
  if (!first_layer) list[6] = make(layer.v1, run.mixed[IN_V], nullptr, run.low[3]);
  products(run, thread, list, first_layer ? 6 : 7, run.rows);

  // the outer halves of the low-rank maps: a head takes its own, but several sequences share what they read
  const int outers = first_layer ? 3 : 4;
  const Product outer[4] = {make(layer.w2, run.low[0], nullptr, run.decay), make(layer.a2, run.low[1], nullptr, run.rate),
                            make(layer.g2, run.low[2], nullptr, run.g), make(layer.v2, run.low[3], nullptr, run.value_gate)};
  if (run.batch > 1) products(run, thread, outer, outers, run.rows);
  heads(run, n, [&](int64_t s, int64_t row, int64_t t, int64_t channel) {
    const int64_t o = row * c + channel, from = ((at + run.from[s]) * c + channel) * n;
    const int64_t place = ((at + run.to[s]) * c + channel) * n;
    for (int i = 0; run.batch == 1 && i < outers; i++) product(outer[i], channel, channel + n, t, panel_of(run, thread));
    for (int64_t m = row; m < row + t; m++) prepare7(run, layer, first_layer, m * c + channel, channel, n);
    // the state of the head that this thread may take next
    const char* ahead = (const char*)(run.in->wkv + from + run.threads * n * n);
    for (int64_t i = 0; run.batch > 1 && i < n * n * (int64_t)sizeof(float); i += 64) __builtin_prefetch(ahead + i, 0, 2);
    wkv7(n, t, c, run.r + o, run.decay + o, run.k + o, run.v + o, run.mixed[IN_R] + o, run.mixed[IN_W] + o, run.y + o,
         run.in->wkv + from, run.request->out->wkv + place);
    for (int64_t m = row; m < row + t; m++) {
      const int64_t i0 = m * c + channel;
      float *y = run.y + i0, *r = run.r + i0, *k = run.k + i0, *v = run.v + i0, *g = run.g + i0, bonus = 0;
      const float* r_k = layer.bonus + channel;
      group_norm(y, layer.lnx_weight + channel, layer.lnx_bias + channel, n);
#pragma omp simd reduction(+ : bonus)
      for (int64_t i = 0; i < n; i++) bonus += r[i] * k[i] * r_k[i];
#pragma omp simd
      for (int64_t i = 0; i < n; i++) y[i] = (y[i] + bonus * v[i]) * g[i];
    }
    quantise_output(run, layer.output, row, t, channel, n);
  });
  output_product(run, thread, layer);
}

// The whole ------------------------------------------------------------------------------------------------------------

// Which tokens this chunk has. Returns whether it has any.
bool next_chunk(Run& run) {
  Request& request = *run.request;
  int64_t left = 0;
  for (int64_t s = 0; s < run.batch; s++) left += request.lengths[s] > run.seq_done[s];
  if (left == 0) return false;
  const int64_t each_rows = request.chunk_rows / left < 1 ? 1 : request.chunk_rows / left;
  run.rows = 0;
  for (int64_t s = 0; s < run.batch; s++) {
    int64_t count = request.lengths[s] - run.seq_done[s];
    count = count < each_rows ? count : each_rows;
    run.seq_first[s] = run.rows;
    run.seq_rows[s] = count;
    for (int64_t t = 0; t < count; t++, run.rows++) {
      run.row_seq[run.rows] = (int32_t)s;
      run.row_time[run.rows] = (int32_t)t;
    }
  }
  return true;
}

void embed(Run& run) {
  const Model& model = *run.model;
  const int64_t c = model.n_embd;
  each(run, run.rows, [&](int64_t m) {
    const int64_t s = run.row_seq[m], at = run.seq_offset[s] + run.seq_done[s] + run.row_time[m];
    const int64_t token = run.request->tokens[at];
    float* x = run.x + m * c;
    widen(model.emb, token, token + 1, x);
    layer_norm(x, model.ln0_weight, model.ln0_bias, c, x);
  });
}

// ln_out and head of the rows whose logits are wanted; rows that lie together in `logits` make one product
void head(Run& run, int thread) {
  const Model& model = *run.model;
  Request& request = *run.request;
  const int64_t c = model.n_embd;
  if (run.pieces) {
    each(run, 1, [&](int64_t) { add_pending(run); });
    run.pieces = 0;
  }
  for (int64_t s = 0; s < run.batch;) {
    // a run of rows of x: all rows of one sequence, or the last rows of following sequences that end here
    int64_t count = 0, target = run.seq_offset[s] + run.seq_done[s], first = s;
    if (!request.last_only) {
      count = run.seq_rows[s++];
    } else {
      target = s;
      while (s < run.batch && run.seq_rows[s] > 0 && run.seq_done[s] + run.seq_rows[s] == request.lengths[s]) {
        s++, count++;
      }
      if (count == 0) s++;
    }
    if (count == 0) continue;
    each(run, count, [&](int64_t i) {
      const int64_t m = request.last_only ? run.seq_first[first + i] + run.seq_rows[first + i] - 1
                                          : run.seq_first[first] + i;
      layer_norm(run.x + m * c, model.lnout_weight, model.lnout_bias, c, run.mixed[IN_R] + i * c);
      quantise_for(run, model.head, IN_R, i, count);
    });
    Product list[1] = {make(model.head, run.mixed[IN_R], run.quantised[IN_R], request.logits + target * model.vocab)};
    products(run, thread, list, 1, count);
  }
}

void layers(Run& run, int thread) {
  const Model& model = *run.model;
  const State& out = *run.request->out;
  for (int64_t i = 0; i < model.n_layer; i++) {
    const Layer& layer = model.layers[i];
    const int64_t shift = i * run.pool * model.n_embd;
    if (i == 0 && model.pre_ffn) {
      channel_mix(run, thread, layer.ffn_pre, layer.ln1_weight, layer.ln1_bias, run.in->att_shift, out.att_shift);
    } else if (model.version == 4) {
      time_mix4(run, thread, i);
    } else if (model.version == 5) {
      time_mix5(run, thread, i);
    } else if (model.version == 6) {
      time_mix6(run, thread, i);
    } else {
      time_mix7(run, thread, i);
    }
    channel_mix(run, thread, layer.ffn, layer.ln2_weight, layer.ln2_bias, run.in->ffn_shift + shift,
                out.ffn_shift + shift);
  }
}

struct Slab {  // hands out aligned parts of one piece of memory; without any it only counts
  char* base;
  int64_t used;
  template <class T>
  T* take(int64_t count) {
    char* p = base + used;
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return (T*)p;
  }
};

void lay_out(Run& run, Slab& slab, const Model& model, int64_t rows, int64_t batch, int threads) {
  const int64_t c = model.n_embd, a = model.dim_att, f = model.dim_ffn, wide = c > a ? c : a;
  run.row_seq = slab.take<int32_t>(rows);
  run.row_time = slab.take<int32_t>(rows);
  int64_t** const of_sequences[] = {&run.seq_first, &run.seq_rows, &run.seq_done, &run.seq_offset};
  for (int64_t** p : of_sequences) *p = slab.take<int64_t>(batch);
  run.rows_of_batch = slab.take<int32_t>(batch);
  run.chunk = slab.take<int64_t>(1);
  run.x = slab.take<float>(rows * c);
  for (auto& p : run.mixed) p = slab.take<float>(rows * wide);
  for (auto& p : run.quantised) p = slab.take<XGroup>(whole_tiles(rows) * groups_of(wide));
  float** const of_all[] = {&run.r, &run.k, &run.v, &run.g, &run.y};
  for (float** p : of_all) *p = slab.take<float>(rows * a);
  float** const of_some[] = {&run.decay, &run.rate, &run.value_gate, &run.first};
  for (float** p : of_some) *p = slab.take<float>(model.version >= 6 ? rows * a : 0);
  int64_t rank = 0;
  for (int64_t i = 0; i < model.n_layer; i++) {
    const Layer& layer = model.layers[i];
    const Matrix* const inner[] = {&layer.w1, &layer.a1, &layer.g1, &layer.v1, &layer.maa1};
    for (const Matrix* w : inner) rank = w->rows > rank ? w->rows : rank;
  }
  for (auto& p : run.low) p = slab.take<float>(rows * rank);
  run.y_quantised = slab.take<XGroup>(whole_tiles(rows) * groups_of(a));
  run.hidden = slab.take<float>(rows * f);
  run.hidden_quantised = slab.take<XGroup>(whole_tiles(rows) * groups_of(f));
  run.gate = slab.take<float>(rows * c);
  run.last_att = slab.take<float>(batch * c);
  run.last_ffn = slab.take<float>(batch * c);
  run.partial = slab.take<float>(pieces_of(f) * c);
  int64_t local = local_floats(rows);
  if (2 * c > local) local = 2 * c;
  run.local_bytes = (local * (int64_t)sizeof(float) + 63) / 64 * 64;
  run.local = slab.take<char>(threads * run.local_bytes);
}

int64_t scratch_bytes(const Model& model, int64_t rows, int threads) {
  Run run;
  Slab slab = {nullptr, 0};
  lay_out(run, slab, model, rows, rows, threads);
  return slab.used;
}

void thread_main(void* context, int thread) {
  Run run = *(const Run*)context;  // its own copy: the counters of a chunk are the same for all
  while (true) {
    // the tables of the chunk are shared: one thread fills them
    each(run, 1, [&](int64_t) { *run.chunk = next_chunk(run) ? run.rows : 0; });
    run.rows = *run.chunk;
    if (run.rows == 0) return;
    embed(run);
    layers(run, thread);
    head(run, thread);
    team_barrier(run.team);  // all have read the tables before one changes them
    each(run, 1, [&](int64_t) {
      for (int64_t s = 0; s < run.batch; s++) run.seq_done[s] += run.seq_rows[s];
    });
    run.in = run.request->out;  // the next chunk goes on from this one
    run.from = run.to;
  }
}

void forward(Request& request) {
  Run run = {};
  Slab slab = {(char*)request.scratch, 0};
  run.request = &request;
  run.model = request.model;
  run.team = request.team;
  run.threads = team_size(request.team);
  run.batch = request.batch;
  run.in = request.in;
  const int64_t rows = request.chunk_rows > run.batch ? request.chunk_rows : run.batch;
  lay_out(run, slab, *request.model, rows, rows, run.threads);
  for (int64_t s = 0, offset = 0; s < run.batch; offset += request.lengths[s++]) {
    run.seq_done[s] = 0;
    run.seq_offset[s] = offset;
    run.rows_of_batch[s] = (int32_t)s;
  }
  run.pool = request.from ? request.pool : run.batch;
  run.from = request.from ? request.from : run.rows_of_batch;
  run.to = request.from ? request.to : run.rows_of_batch;
  team_run(request.team, thread_main, &run);
}

// One product by itself: for tests and measurements ---------------------------------------------------------------------

struct Multiply {
  const Product* product;
  Team* team;
  int64_t rows;
  float* local;
  XGroup* q;
};

int64_t multiply_bytes(const Matrix& w, int64_t rows, int threads) {
  return whole_tiles(rows) * groups_of(w.cols) * (int64_t)sizeof(XGroup) + threads * local_floats(rows) * (int64_t)sizeof(float);
}

void multiply_thread(void* context, int thread) {
  const Multiply& job = *(const Multiply*)context;
  const Product& p = *job.product;
  const int64_t groups = groups_of(p.w->cols);
  if (takes_blocks(*p.w, job.rows)) {
    for (int64_t m; (m = team_next(job.team)) < job.rows;) quantise(p.x + m * p.ldx, p.w->cols, job.rows, p.w->type, job.q, m, groups);
    team_barrier(job.team);
  }
#if defined(ISA_AMX)
  if (by_tiles(*p.w, job.rows)) {
    for (int64_t i; (i = team_next(job.team)) < tickets_of_tiles(*p.w, job.rows);) fill_tiles(p, job.rows, i);
    team_barrier(job.team);
  }
#endif
  const int64_t step = ticket_rows(*p.w, job.rows, team_size(job.team));
  for (int64_t n; (n = team_next(job.team) * step) < p.w->rows;) {
    const int64_t last = n + step < p.w->rows ? n + step : p.w->rows;
    product(p, n, last, job.rows, job.local + thread * local_floats(job.rows));
  }
}

void multiply(const Matrix& w, const float* x, int64_t rows, float* y, Team* team, void* scratch) {
  XGroup* q = (XGroup*)scratch;
  const Product p = make(w, x, q, y);
  Multiply job = {&p, team, rows, (float*)(q + whole_tiles(rows) * groups_of(w.cols)), q};
  team_run(team, multiply_thread, &job);
}
