// RWKV-7's time mix between the projections: what one token does to the state of one head, and what comes of it.
// -DHEAD (N); -DRANK_V, RANK_W, RANK_A, RANK_G: multiples of 32; -DRANK_ROWS: rows between two maps' weights.
#include "head.cuh"

enum { LOW_V, LOW_W, LOW_A, LOW_G };  // order of the low-rank maps
typedef LowRank<RANK_ROWS, RANK_V, RANK_W, RANK_A, RANK_G> Maps;
constexpr float MIN_LOG2_DECAY = -0.6065306597126334f * LOG2_E;

/// Per-layer vectors of C elements.
struct Vectors { const u16 *w0, *a0, *v0, *k_k, *k_a, *r_k, *norm_weight, *norm_bias; };

/// What a head's channels turn into before the state sees them.
struct Channels { float r[N], decay[N], k[N], v[N], erase[N], write[N], gate[N], bonus; };

/// rkv [3][rkv_stride] of [rows, C]; low: the low-rank maps' outputs for this channel; the first layer's
/// values are kept in v_first [rows, C], and mixed into those of others. Returns when `to` is complete.
DEVICE void prepare(Channels& to, const u16* rkv, int rkv_stride, const float (&low)[4], u16* v_first, bool is_first, i64 at,
                    int channel, const Vectors& vectors, float2* shared) {
    const bool mine = threadIdx.x < N;
    const int n = threadIdx.x;
    float r = 0.f, k = 0.f, key = 0.f, rate = 0.f, v = 0.f;
    if (mine) {
        r = E::wide(load_fresh(rkv + at)), k = E::wide(load_fresh(rkv + rkv_stride + at));
        v = E::wide(load_fresh(rkv + 2ll * rkv_stride + at));
        rate = sigmoid(wide_at(vectors.a0 + channel) + low[LOW_A]);
        key = k * wide_at(vectors.k_k + channel);
        k *= 1.f + (rate - 1.f) * wide_at(vectors.k_a + channel);
        if (is_first) v_first[at] = narrow(v);
        else v += (E::wide(load_fresh(v_first + at)) - v) * sigmoid(wide_at(vectors.v0 + channel) + low[LOW_V]);
    }
    const float2 sums = sum_of_head(key * key, mine ? r * k * wide_at(vectors.r_k + channel) : 0.f, shared);
    if (mine) {
        const float norm = sqrtf(sums.x);
        key /= norm > 1e-12f ? norm : 1e-12f;
        to.r[n] = r, to.k[n] = k, to.v[n] = v, to.erase[n] = -key, to.write[n] = key * rate, to.gate[n] = low[LOW_G];
        to.decay[n] = ex2(MIN_LOG2_DECAY * sigmoid(wide_at(vectors.w0 + channel) + low[LOW_W]));
        if (n == 0) to.bonus = sums.y;
    }
    __syncthreads();
}

struct Step {
    Channels channels;
    float2 sums[N / 32];
    float y[N];
};
/// One token for one row and head, in place on state [slots, H, N, N] (value x key). low(): the low-rank maps' outputs for
/// the channel of each of the first N threads, called when the previous kernel's results are there.
template <class Low>
DEVICE void step(Step& memory, const u16* rkv, int rkv_stride, u16* v_first, int is_first, Kept* state, const int* slots,
                 const Vectors& vectors, float eps, u16* out, Low low) {
    Channels& m = memory.channels;
    float(&y)[N] = memory.y;
    const int head = blockIdx.x, row = blockIdx.y, H = gridDim.x, C = H * N;
    const int value = threadIdx.x / 4, quarter = threadIdx.x % 4;
    Kept* mine = state + (((i64)slots[row] * H + head) * N + value) * N + quarter * GROUP;
    const i64 at = (i64)row * C + head * N + threadIdx.x;  // of the first N threads
    let_next_start();
    wait_for_previous();
    StateRow kept;
    kept.load(mine);
    float low_mine[4] = {};
    low(low_mine, at);
    prepare(m, rkv, rkv_stride, low_mine, v_first, is_first, at, head * N + threadIdx.x, vectors, memory.sums);

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
        store_state(mine + 4 * GROUP * i, s[i]);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (quarter == 0) y[value] = sum;
    __syncthreads();
    if (threadIdx.x < N) {
        const int n = threadIdx.x, channel = head * N + n;
        out[at] = narrow((normed(y, n, channel, eps, vectors.norm_weight, vectors.norm_bias) + m.bonus * m.v[n]) * m.gate[n]);
    }
}

#define STEP_PARAMETERS                                                                                                     \
    u16 *v_first, int is_first, Kept *state, const int *slots, const u16 *w0, const u16 *a0, const u16 *v0, const u16 *k_k, \
        const u16 *k_a, const u16 *r_k, const u16 *norm_weight, const u16 *norm_bias, float eps, u16 *out

/// Blocks (head, row). hidden [rows, sum of ranks]; low_rank [4, RANK_ROWS, C]; rkv [3][rkv_stride] of [rows, C].
extern "C" __global__ void __launch_bounds__(THREADS) wkv7_step(
    const u16* rkv, int rkv_stride, const u16* hidden, const u16* low_rank, STEP_PARAMETERS) {
    __shared__ Step memory;
    __shared__ float lows[4][N];
    __shared__ Maps::Parts parts;
    const Maps maps(low_rank, gridDim.x * N, blockIdx.x * N);
    const Vectors vectors = {w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias};
    step(memory, rkv, rkv_stride, v_first, is_first, state, slots, vectors, eps, out, [&](float(&low)[4], i64) {
        maps.apply(hidden + (i64)blockIdx.y * Maps::EACH * 32, lows, parts);
        if (threadIdx.x < N)
            for (int i = 0; i < 4; ++i) low[i] = lows[i][threadIdx.x];
    });
}
/// The same where the maps are applied already: given [4][low_stride] of [rows, C].
extern "C" __global__ void __launch_bounds__(THREADS, 1280 / THREADS) wkv7_step_many(
    const u16* rkv, int rkv_stride, const u16* given, int low_stride, STEP_PARAMETERS) {
    __shared__ Step memory;
    const Vectors vectors = {w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias};
    step(memory, rkv, rkv_stride, v_first, is_first, state, slots, vectors, eps, out, [&](float(&low)[4], i64 at) {
        if (threadIdx.x < N)
            for (int i = is_first; i < 4; ++i) low[i] = E::wide(load_fresh(given + (i64)i * low_stride + at));
    });
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
