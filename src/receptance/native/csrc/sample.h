// From logits to the next token, as receptance/engine/numpy_sampling.py does it: bias, penalties, truncation by top-p,
// top-k and min-p on the untempered distribution, then the temperature. Included by each isa_*.cpp.

constexpr int64_t DRAW_BLOCK = 64;  // numbers summed before the running sum is looked at

// The largest of a heap of n numbers goes out; the others stay a heap.
inline void sift(float* heap, int64_t n, int64_t i) {
  const float x = heap[i];
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && heap[child + 1] > heap[child]) child++;
    if (heap[child] <= x) break;
    heap[i] = heap[child];
  }
  heap[i] = x;
}

// How many of p [n] are at least `least`, and roughly what they add up to
inline int64_t count_from(const float* p, int64_t n, float least, float& mass) {
  float sum = 0;
  int32_t count = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t i = 0; i < n; i++) {
    sum += p[i] >= least ? p[i] : 0;
    count += p[i] >= least;
  }
  mass = sum;
  return count;
}

// The probability at which the most probable tokens reach top_p, but at most the top_k-th one. p [n], of which `most` is the
// largest; heap [n] is memory.
//
// A heap gives tokens in order, one by one. Passes over all of p, each of which costs as much as a few of them, first find a
// bound above which all are kept, and one below which none is needed.
inline float truncation(const float* p, int64_t n, float most, double top_p, int64_t top_k, float* heap) {
  constexpr float ROUGH = 1e-5f;  // what a rough sum may be off
  // less probable tokens than this add up to less than 1 - top_p: they are not needed to reach top_p
  const float never = top_p < 1 ? (float)((1 - top_p) * 0.999 / n) : 0;
  float kept = __builtin_inff(), least = most;
  auto place = [&](float bound) {  // returns whether the bound became one of the two
    float mass;
    const int64_t count = count_from(p, n, bound, mass);
    if (mass > top_p + ROUGH || count >= top_k) least = bound;
    else if (mass < top_p - ROUGH) kept = bound;
    else return false;
    return true;
  };
  while (least == most && kept > never && (kept > most || kept > 1e-30f)) {
    const float bound = kept > most ? most * 0.25f : kept * 0.25f;
    if (!place(bound > never ? bound : never)) break;
  }
  for (int i = 0; i < 6 && least < most && kept <= most && place(0.5f * (least + kept)); i++) {}
  if (least == most) least = never;
  while (true) {
    double sum = 0;
    int64_t rank = 0, count = 0;
#pragma omp simd reduction(+ : sum, rank)
    for (int64_t i = 0; i < n; i++) {
      sum += p[i] >= kept ? p[i] : 0;
      rank += p[i] >= kept;
    }
    for (int64_t i = 0; i < n; i++) {
      heap[count] = p[i];
      count += p[i] >= least && p[i] < kept;
    }
    for (int64_t i = count / 2 - 1; i >= 0; i--) sift(heap, count, i);
    float last = 0;
    for (; count > 0; rank++) {
      last = heap[0];
      sum += last;
      if (sum >= top_p || rank + 1 >= top_k) return last;
      heap[0] = heap[--count];
      sift(heap, count, 0);
    }
    if (least <= never) return last;
    least = never;  // a rough sum was further off
  }
}

__attribute__((always_inline)) inline float weight_of(float x) { return x < -87 ? 0 : exp_(x); }  // exp_ has no zero

inline double sum_of(const float* x, int64_t n) {
  double parts[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int j = 0; j < 4; j++) parts[j] += x[i + j];
  }
  for (; i < n; i++) parts[0] += x[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// The first place where the running sum of p is above u of the whole
inline int32_t draw_from(const float* p, int64_t n, double u) {
  const double target = u * sum_of(p, n);
  double sum = 0;
  int32_t last = 0;
  for (int64_t block = 0; block < n; block += DRAW_BLOCK) {
    const int64_t size = n - block < DRAW_BLOCK ? n - block : DRAW_BLOCK;
    const double after = sum + sum_of(p + block, size);
    if (after > target || block + size == n) {
      for (int64_t i = block; i < block + size; i++) {
        if (p[i] == 0) continue;
        last = (int32_t)i;
        sum += p[i];
        if (sum > target) return last;
      }
    }
    sum = after;
  }
  for (int64_t i = n - 1; i > 0; i--) {  // rounding: the last token with any mass
    if (p[i] > 0) return (int32_t)i;
  }
  return last;
}

// scratch: 3 vocab numbers. The token is -1 where a logit is not a number.
void sample_row(SampleRow& row, int64_t vocab, float* scratch) {
  float *x = scratch, *p = scratch + vocab;
  __builtin_memcpy(x, row.logits, vocab * sizeof(float));
  for (int32_t i = 0; i < row.biases; i++) x[row.bias_ids[i]] += row.bias_values[i];
  if (row.seen) {
    for (int64_t i = 0; i < vocab; i++) {
      if (!row.seen[i]) continue;
      x[i] = x[i] > 0 ? x[i] / row.repetition : x[i] * row.repetition;
      if (row.seen[i] == GENERATED) x[i] -= row.presence + row.occurrence[i] * row.frequency;
    }
  }
  if (row.mask) {
    for (int64_t i = 0; i < vocab; i++) {
      if (!(row.mask[i >> 5] >> (i & 31) & 1)) x[i] = -__builtin_inff();
    }
  }
  float most = -__builtin_inff();
  int32_t unordered = 0;
#pragma omp simd reduction(max : most) reduction(| : unordered)
  for (int64_t i = 0; i < vocab; i++) {
    most = x[i] > most ? x[i] : most;
    unordered |= x[i] != x[i];
  }
  row.token = -1;
  if (unordered) return;
  if (row.temperature == 0 || most == -__builtin_inff()) {
    int64_t i = 0;
    while (x[i] < most) i++;
    row.token = (int32_t)i;
  } else {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < vocab; i++) {
      p[i] = weight_of(x[i] - most);
      sum += p[i];
    }
    const float scale = 1 / sum;
    float floor = row.min_p * scale;
    const bool sorted = row.top_p < 1 || row.top_k < vocab;
    if (sorted || row.min_p > 0) {
#pragma omp simd
      for (int64_t i = 0; i < vocab; i++) p[i] *= scale;
      if (sorted) {
        const float at = truncation(p, vocab, scale, row.top_p, row.top_k, p + vocab);
        floor = at > floor ? at : floor;
      }
      const float rate = 1 / (row.temperature > 1e-6f ? row.temperature : 1e-6f);
#pragma omp simd
      for (int64_t i = 0; i < vocab; i++) p[i] = p[i] >= floor ? weight_of((x[i] - most) * rate) : 0;
    } else if (row.temperature != 1) {
      const float rate = 1 / (row.temperature > 1e-6f ? row.temperature : 1e-6f);
#pragma omp simd
      for (int64_t i = 0; i < vocab; i++) p[i] = weight_of((x[i] - most) * rate);
    }
    row.token = draw_from(p, vocab, row.uniform);
  }
  if (row.seen) {  // everything before it decays first
#pragma omp simd
    for (int64_t i = 0; i < vocab; i++) row.occurrence[i] *= row.decay;
    row.occurrence[row.token] += row.count_digits ? 1 : row.weight[row.token];
    row.seen[row.token] = GENERATED;
  }
}

struct Sampling {
  SampleRow* rows;
  Team* team;
  int64_t count, vocab;
  float* scratch;
};

void sample_thread(void* context, int thread) {
  const Sampling& job = *(const Sampling*)context;
  for (int64_t i; (i = team_next(job.team)) < job.count;) {
    sample_row(job.rows[i], job.vocab, job.scratch + thread * 3 * job.vocab);
  }
}

void sample(SampleRow* rows, int64_t count, int64_t vocab, Team* team, float* scratch) {
  Sampling job = {rows, team, count, vocab, scratch};
  if (count == 1) sample_row(rows[0], vocab, scratch);  // waking the team costs as much
  else team_run(team, sample_thread, &job);
}
