// From logits to the next token, as receptance/engine/numpy_sampling.py does it: bias, penalties, truncation by top-p,
// top-k and min-p on the untempered distribution, then the temperature. Included by each isa_*.cpp.

constexpr int64_t DRAW_BLOCK = 64;  // numbers that are looked at together

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

// Those of p [n] that are at least `least`, into found [n]. Returns their number.
inline int64_t gather_from(const float* p, int64_t n, float least, float* found) {
  int64_t count = 0;
  for (int64_t block = 0; block < n; block += DRAW_BLOCK) {
    const int64_t end = block + DRAW_BLOCK < n ? block + DRAW_BLOCK : n;
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = block; i < end; i++) most = p[i] > most ? p[i] : most;
    if (most < least) continue;
    for (int64_t i = block; i < end; i++) {
      found[count] = p[i];
      count += p[i] >= least;
    }
  }
  return count;
}

// The probability at which the most probable tokens reach top_p, but at most the top_k-th one. p [n], of which `most` is the
// largest; heap [n] is memory.
//
// A heap gives tokens in order, one by one. Before it, passes over all, each of which costs as much as a few of them, find where
// enough tokens lie; then the heap is needed only between a bound above which all are kept and one below which none is needed.
inline float truncation(const float* p, int64_t n, float most, double top_p, int64_t top_k, float* heap) {
  constexpr float ROUGH = 1e-5f;  // what a rough sum may be off
  // less probable tokens than this add up to less than 1 - top_p: they are not needed to reach top_p
  const float never = top_p < 1 ? (float)((1 - top_p) * 0.999 / n) : 0;
  float kept = __builtin_inff(), least = most, mass = 0;
  for (int64_t above = 0; mass < top_p + ROUGH && above < top_k && least > never;) {
    if (mass < top_p - ROUGH && above > 0) kept = least;
    least = least * 0.25f > never + 1e-30f ? least * 0.25f : never;
    above = count_from(p, n, least, mass);
  }
  while (true) {
    int64_t count = gather_from(p, n, least, heap), rank = 0;
    float low = least, high = kept;
    for (int i = 0; i < 6 && count > 16 && high <= most; i++) {
      const float middle = 0.5f * (low + high);
      const int64_t above = count_from(heap, count, middle, mass);
      if (mass > top_p + ROUGH || above >= top_k) low = middle;
      else if (mass < top_p - ROUGH) high = middle;
      else break;
    }
    double sum = 0;
    int64_t between = 0;
    for (int64_t i = 0; i < count; i++) {
      const float x = heap[i];
      sum += x >= high ? x : 0;
      rank += x >= high;
      heap[between] = x;
      between += x >= low && x < high;
    }
    for (int64_t i = between / 2 - 1; i >= 0; i--) sift(heap, between, i);
    float last = 0;
    for (; between > 0; rank++) {
      last = heap[0];
      sum += last;
      if (sum >= top_p || rank + 1 >= top_k) return last;
      heap[0] = heap[--between];
      sift(heap, between, 0);
    }
    if (least <= never && low <= least) return last;
    least = never, kept = __builtin_inff();  // a rough sum was further off
  }
}

__attribute__((always_inline)) inline float weight_of(float x) { return x < -87 ? 0 : exp_(x); }  // exp_ has no zero

inline double sum_of(const float* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i];
  return sum;
}

// The first place where the running sum of p is above u of the whole
inline int32_t draw_from(const float* p, int64_t n, double u) {
  constexpr int64_t MOST = 1024;
  const int64_t width = DRAW_BLOCK * (n / (MOST * DRAW_BLOCK) + 1);
  double sums[MOST], total = 0, sum = 0;  // of each block
  for (int64_t first = 0, i = 0; first < n; first += width, i++) {
    sums[i] = sum_of(p + first, n - first < width ? n - first : width);
    total += sums[i];
  }
  const double target = u * total;
  int32_t last = 0;
  for (int64_t first = 0, i = 0; first < n; first += width, i++) {
    const int64_t end = n - first < width ? n : first + width;
    const double after = sum + sums[i];
    if (after > target || end == n) {
      for (int64_t j = first; j < end; j++) {
        if (p[j] == 0) continue;
        last = (int32_t)j;
        sum += p[j];
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

// scratch: 3 vocab numbers. The token is -1 where a logit is not a number or +inf.
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
  int32_t broken = 0;
#pragma omp simd reduction(max : most) reduction(| : broken)
  for (int64_t i = 0; i < vocab; i++) {
    most = x[i] > most ? x[i] : most;
    broken |= !(x[i] < __builtin_inff());
  }
  row.token = -1;
  if (broken) return;
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
