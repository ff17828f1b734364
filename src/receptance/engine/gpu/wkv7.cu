// RWKV-7's time mix between the projections: what one token does to the state of one head, and what comes of it.
// -DHEAD (N); -DRANK_V, RANK_W, RANK_A, RANK_G: multiples of 32; -DRANK_ROWS: rows between two maps' weights;
// -DSTEP_THREADS of a multiprocessor in wkv7_step_many.
#include "head.cuh"

enum { LOW_V, LOW_W, LOW_A, LOW_G };  // order of the low-rank maps
typedef LowRank<RANK_ROWS, RANK_V, RANK_W, RANK_A, RANK_G> Maps;
constexpr float MIN_LOG2_DECAY = -0.6065306597126334f * LOG2_E;

/// A layer's vectors, of C elements each.
enum { W0, A0, V0, K_K, K_A, R_K, NORM_WEIGHT, NORM_BIAS, VECTORS };
struct Vectors { const u16* of[VECTORS]; };

/// What a head's channels turn into before the state sees them.
struct Channels { float r[N], decay[N], k[N], v[N], erase[N], write[N], gate[N], bonus; };
struct Step {
    Channels channels;
    float vectors[VECTORS][N];  // of this head; a channel's are its thread's
    float2 sums[N / 32];
    float y[N];
};
/// What a row's channel reads, not yet widened: that would wait for it.
struct Given { u16 r, k, v, first, low[4]; };

DEVICE void load_vectors(Step& m, const Vectors& vectors) {
    if (threadIdx.x < N)
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) m.vectors[i][threadIdx.x] = wide_at(vectors.of[i] + blockIdx.x * N + threadIdx.x);
}
/// rkv [3][rkv_stride] of [rows, C]; v_first [rows, C]: the first layer's values.
DEVICE void load_given(Given& x, const u16* rkv, int rkv_stride, const u16* v_first, int is_first, i64 at) {
    x.r = load_fresh(rkv + at), x.k = load_fresh(rkv + rkv_stride + at), x.v = load_fresh(rkv + 2ll * rkv_stride + at);
    if (!is_first) x.first = load_fresh(v_first + at);
}
/// From what channels read, and the outputs of their low-rank maps, to m.channels; returns when they are complete. The
/// first layer's values are kept in v_first, and mixed into those of others.
DEVICE void prepare(Step& m, const Given& given, const float (&low)[4], u16* v_first, int is_first, i64 at) {
    Channels& to = m.channels;
    const bool mine = threadIdx.x < N;
    const int n = threadIdx.x;
    float r = 0.f, k = 0.f, key = 0.f, rate = 0.f, v = 0.f;
    if (mine) {
        r = E::wide(given.r), k = E::wide(given.k), v = E::wide(given.v);
        rate = sigmoid(m.vectors[A0][n] + low[LOW_A]);
        key = k * m.vectors[K_K][n];
        k *= 1.f + (rate - 1.f) * m.vectors[K_A][n];
        if (is_first) v_first[at] = narrow(v);
        else v += (E::wide(given.first) - v) * sigmoid(m.vectors[V0][n] + low[LOW_V]);
    }
    const float2 sums = sum_of_head(key * key, mine ? r * k * m.vectors[R_K][n] : 0.f, m.sums);
    if (mine) {
        const float norm = sqrtf(sums.x);
        key /= norm > 1e-12f ? norm : 1e-12f;
        to.r[n] = r, to.k[n] = k, to.v[n] = v, to.erase[n] = -key, to.write[n] = key * rate, to.gate[n] = low[LOW_G];
        to.decay[n] = ex2(MIN_LOG2_DECAY * sigmoid(m.vectors[W0][n] + low[LOW_W]));
        if (n == 0) to.bonus = sums.y;
    }
    __syncthreads();
}

/// One token for one row and head, in place on the row's state [N, N] (value x key), of which the thread keeps what lies at
/// `state`. The next call may follow at once.
DEVICE void step(Step& memory, const StateRow& kept, Kept* state, float eps, u16* out, i64 at) {
    const Channels& m = memory.channels;
    float(&y)[N] = memory.y;
    const int value = threadIdx.x / 4, quarter = threadIdx.x % 4;
    float s[PARTS][GROUP], erased = 0.f, sum = 0.f;
    kept.unpack(s);
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
        for (int j = 0; j < GROUP; ++j) erased += s[i][j] * m.erase[(4 * i + quarter) * GROUP + j];
    erased += __shfl_xor_sync(~0u, erased, 1);
    erased += __shfl_xor_sync(~0u, erased, 2);
    const float v = m.v[value];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            const int key = (4 * i + quarter) * GROUP + j;
            s[i][j] = s[i][j] * m.decay[key] + (erased * m.write[key] + v * m.k[key]);
            sum += s[i][j] * m.r[key];
        }
        store_state(state + 4 * GROUP * i, s[i]);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (quarter == 0) y[value] = sum;
    __syncthreads();
    if (threadIdx.x < N) {
        const int n = threadIdx.x;
        const float x = normed(y, n, eps, memory.vectors[NORM_WEIGHT][n], memory.vectors[NORM_BIAS][n]);
        out[at] = narrow((x + m.bonus * m.v[n]) * m.gate[n]);
    }
}
DEVICE Kept* state_of(Kept* state, int slot) {  // the thread's part of the block's head
    return state + (((i64)slot * gridDim.x + blockIdx.x) * N + threadIdx.x / 4) * N + threadIdx.x % 4 * GROUP;
}

#define STEP_PARAMETERS                                                                                                     \
    u16 *v_first, int is_first, Kept *state, const int *slots, const u16 *w0, const u16 *a0, const u16 *v0, const u16 *k_k, \
        const u16 *k_a, const u16 *r_k, const u16 *norm_weight, const u16 *norm_bias, float eps, u16 *out

/// State [slots, H, N, N]. Blocks (head, row). hidden [rows, sum of ranks]; low_rank [4, RANK_ROWS, C].
extern "C" __global__ void __launch_bounds__(THREADS) wkv7_step(
    const u16* rkv, int rkv_stride, const u16* hidden, const u16* low_rank, STEP_PARAMETERS) {
    __shared__ Step memory;
    __shared__ float lows[4][N];
    __shared__ Maps::Parts parts;
    const int row = blockIdx.y;
    const i64 at = (i64)row * gridDim.x * N + blockIdx.x * N + threadIdx.x;  // of the first N threads
    const Maps maps(low_rank, gridDim.x * N, blockIdx.x * N);
    load_vectors(memory, {w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias});
    let_next_start();
    wait_for_previous();
    Kept* mine = state_of(state, slots[row]);
    StateRow kept;
    kept.load(mine);
    Given given = {};
    if (threadIdx.x < N) load_given(given, rkv, rkv_stride, v_first, is_first, at);
    maps.apply(hidden + (i64)row * Maps::EACH * 32, lows, parts);
    float low[4] = {};
    if (threadIdx.x < N)
        for (int i = 0; i < 4; ++i) low[i] = lows[i][threadIdx.x];
    prepare(memory, given, low, v_first, is_first, at);
    step(memory, kept, mine, eps, out, at);
}
/// The same where the maps are applied already, given [4][low_stride] of [rows, C]; blocks (head, ·), each for some of the
/// rows: a row's state is on its way while the one before it is stepped.
extern "C" __global__ void __launch_bounds__(THREADS, STEP_THREADS / THREADS) wkv7_step_many(
    const u16* rkv, int rkv_stride, const u16* given, int low_stride, STEP_PARAMETERS, int rows) {
    __shared__ Step memory;
    const i64 C = (i64)gridDim.x * N, from = blockIdx.x * N + threadIdx.x;  // of the first N threads
    load_vectors(memory, {w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias});
    let_next_start();
    wait_for_previous();
    const auto load = [&](Given& x, i64 at) {
        if (threadIdx.x >= N) return;
        load_given(x, rkv, rkv_stride, v_first, is_first, at);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i >= is_first) x.low[i] = load_fresh(given + (i64)i * low_stride + at);
    };
    int row = blockIdx.y, after = row + gridDim.y;
    Kept* mine = state_of(state, slots[row]);
    int slot = after < rows ? slots[after] : 0;
    Given x = {}, next = {};
    StateRow kept, next_kept;
    kept.load(mine);
    load(x, row * C + from);
    for (; row < rows; row = after, after += gridDim.y) {
        Kept* other = state_of(state, slot);
        if (after < rows) {
            next_kept.load(other);
            load(next, after * C + from);
            if (after + gridDim.y < rows) slot = slots[after + gridDim.y];
        }
        float low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) low[i] = E::wide(x.low[i]);
        prepare(memory, x, low, v_first, is_first, row * C + from);
        step(memory, kept, mine, eps, out, row * C + from);
        kept = next_kept, x = next, mine = other;
    }
}

/// place[token]: its place in the operator's tensors [batch, T, H, N]: six of them, r, log decay, k, v, a, b.
extern "C" __global__ void __launch_bounds__(256) wkv7_prepare(
    const u16* rkv, int stride, const u16* low, u16* v_first, int is_first, const u16* w0, const u16* a0, const u16* v0,
    const u16* k_k, const u16* k_a, const u16* r_k, const int* place, u16* inputs, int inputs_stride, float* bonuses, int rows) {
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x, row = blockIdx.y * TOKENS + threadIdx.x / 32, H = gridDim.x, C = H * N;
    if (row >= rows) return;
    const int channel = head * N + threadIdx.x % 32 * EACH;
    const i64 at = (i64)row * C + channel;
    const auto given = [&](const u16* x, int part) { return read(x + (i64)part * stride + at); };
    const Few r = given(rkv, 0), raw = given(rkv, 1), low_w = given(low, LOW_W), low_a = given(low, LOW_A);
    const Few w_0 = read(w0 + channel), a_0 = read(a0 + channel), kk = read(k_k + channel), ka = read(k_a + channel);
    const Few rk = read(r_k + channel);
    Few v = given(rkv, 2), k, key, rate, decay, erase, add;
    if (is_first) write(v_first + at, v);
    else {
        const Few first = read(v_first + at), v_0 = read(v0 + channel), low_v = given(low, LOW_V);
        for (int i = 0; i < EACH; ++i) v.f[i] += (first.f[i] - v.f[i]) * sigmoid(v_0.f[i] + low_v.f[i]);
    }
    float squares = 0.f, bonus = 0.f;
    for (int i = 0; i < EACH; ++i) {
        rate.f[i] = sigmoid(a_0.f[i] + low_a.f[i]);
        key.f[i] = raw.f[i] * kk.f[i];
        k.f[i] = raw.f[i] * (1.f + (rate.f[i] - 1.f) * ka.f[i]);
        decay.f[i] = -0.6065306597126334f * sigmoid(w_0.f[i] + low_w.f[i]);
        squares += key.f[i] * key.f[i], bonus += r.f[i] * k.f[i] * rk.f[i];
    }
    const float norm = sqrtf(sum_of_warp(squares));
    bonus = sum_of_warp(bonus);
    for (int i = 0; i < EACH; ++i) {
        key.f[i] /= norm > 1e-12f ? norm : 1e-12f;
        erase.f[i] = -key.f[i], add.f[i] = key.f[i] * rate.f[i];
    }
    u16* to = inputs + (i64)place[row] * C + channel;
    write(to, r), write(to + (i64)inputs_stride, decay), write(to + 2ll * inputs_stride, k);
    write(to + 3ll * inputs_stride, v), write(to + 4ll * inputs_stride, erase), write(to + 5ll * inputs_stride, add);
    if (threadIdx.x % 32 == 0) bonuses[row * H + head] = bonus;
}
/// out = (GroupNorm(y) + bonus v) gate; y and v of the operator's shape.
extern "C" __global__ void __launch_bounds__(256) wkv7_finish(
    const u16* y, const u16* v, const u16* gate, const float* bonuses, const int* place, const u16* norm_weight,
    const u16* norm_bias, float eps, u16* out, int rows) {
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x, row = blockIdx.y * TOKENS + threadIdx.x / 32, H = gridDim.x, C = H * N;
    if (row >= rows) return;
    const int channel = head * N + threadIdx.x % 32 * EACH;
    const i64 from = (i64)place[row] * C + channel, at = (i64)row * C + channel;
    const Few value = read(v + from), g = read(gate + at);
    Few x = normed(read(y + from), channel, eps, norm_weight, norm_bias);
    const float bonus = bonuses[row * H + head];
    for (int i = 0; i < EACH; ++i) x.f[i] = (x.f[i] + bonus * value.f[i]) * g.f[i];
    write(out + at, x);
}
