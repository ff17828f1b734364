// RWKV-7's time mix between the projections: what one token does to the state of one head, and what comes of it.
// -DHEAD (N), -DRANK_W, RANK_A, RANK_V, RANK_G: multiples of 32.
#include "gpu.cuh"

constexpr int N = HEAD, THREADS = 4 * N, WARPS = THREADS / 32, RANKS = RANK_W + RANK_A + RANK_V + RANK_G;
constexpr float MIN_LOG2_DECAY = -0.6065306597126334f * LOG2_E;

/// Per-layer vectors of C elements.
struct Vectors { const u16 *w0, *a0, *v0, *k_k, *k_a, *r_k, *norm_weight, *norm_bias; };

/// What a head's channels turn into before the state sees them.
struct Channels { float r[N], decay[N], k[N], v[N], erase[N], write[N], gate[N], bonus; };

DEVICE float wide_at(const u16* p) { return E::wide(*p); }

/// Sum over the first N threads of two values at once; every thread of the block calls it.
DEVICE float2 sum_of_head(float x, float y, float2* shared) {
    x = sum_of_warp(x), y = sum_of_warp(y);
    if (threadIdx.x % 32 == 0 && threadIdx.x < N) shared[threadIdx.x / 32] = make_float2(x, y);
    __syncthreads();
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < N / 32; ++i) sum.x += shared[i].x, sum.y += shared[i].y;
    return sum;
}

/// The outputs of the four low-rank maps for this head, low [4][N]: hidden [RANKS] times weight [RANKS, C].
struct LowRank {
    static constexpr int EACH = RANKS / 32, GROUPS = N / 8;
    uint4 w[EACH];
    DEVICE LowRank(const u16* weight, int c, int head) {
        const u16* from = weight + (i64)(threadIdx.x / GROUPS) * c + head * N + threadIdx.x % GROUPS * 8;
#pragma unroll
        for (int i = 0; i < EACH; ++i) w[i] = load_weights(from + (i64)i * 32 * c);
    }
    DEVICE void apply(const u16* hidden, float (&low)[4][N], float (&shared)[WARPS][4][N]) const {
        float sums[4][8] = {};
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float h = E::wide(load_fresh(hidden + i * 32 + threadIdx.x / GROUPS));
            const Eight x(w[i]);
            const int map = (i * 32 >= RANK_W) + (i * 32 >= RANK_W + RANK_A) + (i * 32 >= RANK_W + RANK_A + RANK_V);
#pragma unroll
            for (int j = 0; j < 8; ++j) sums[map][j] += h * x.f[j];
        }
#pragma unroll
        for (int map = 0; map < 4; ++map)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
                for (int mask = GROUPS; mask < 32; mask *= 2) sums[map][j] += __shfl_xor_sync(~0u, sums[map][j], mask);
                if (threadIdx.x % 32 < GROUPS) shared[threadIdx.x / 32][map][threadIdx.x % 32 * 8 + j] = sums[map][j];
            }
        __syncthreads();
        {
            const int map = threadIdx.x / N, n = threadIdx.x % N;
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) sum += shared[i][map][n];
            low[map][n] = sum;
        }
        __syncthreads();
    }
};

/// rkv [3][rkv_stride] of [rows, C]; low: the low-rank maps' outputs w, a, v, g for this channel; the first layer's
/// values are kept in v_first [rows, C], and mixed into those of others. Returns when `to` is complete.
DEVICE void prepare(Channels& to, const u16* rkv, int rkv_stride, const float (&low)[4], u16* v_first, bool is_first, i64 at,
                    int channel, const Vectors& vectors, float2* shared) {
    const bool mine = threadIdx.x < N;
    const int n = threadIdx.x;
    float r = 0.f, k = 0.f, key = 0.f, rate = 0.f, v = 0.f;
    if (mine) {
        r = E::wide(load_fresh(rkv + at)), k = E::wide(load_fresh(rkv + rkv_stride + at));
        v = E::wide(load_fresh(rkv + 2ll * rkv_stride + at));
        rate = sigmoid(wide_at(vectors.a0 + channel) + low[1]);
        key = k * wide_at(vectors.k_k + channel);
        k *= 1.f + (rate - 1.f) * wide_at(vectors.k_a + channel);
        if (is_first) v_first[at] = narrow(v);
        else v += (E::wide(load_fresh(v_first + at)) - v) * sigmoid(wide_at(vectors.v0 + channel) + low[2]);
    }
    const float2 sums = sum_of_head(key * key, mine ? r * k * wide_at(vectors.r_k + channel) : 0.f, shared);
    if (mine) {
        const float norm = sqrtf(sums.x);
        key /= norm > 1e-12f ? norm : 1e-12f;
        to.r[n] = r, to.k[n] = k, to.v[n] = v, to.erase[n] = -key, to.write[n] = key * rate, to.gate[n] = low[3];
        to.decay[n] = ex2(MIN_LOG2_DECAY * sigmoid(wide_at(vectors.w0 + channel) + low[0]));
        if (n == 0) to.bonus = sums.y;
    }
    __syncthreads();
}

/// (GroupNorm(y) + bonus v) gate of one head, y in shared memory.
DEVICE float finished(const float (&y)[N], int n, int channel, float eps, const Vectors& vectors, float bonus, float v, float gate) {
    const int lane = threadIdx.x % 32;
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < N; i += 32) sum += y[i + lane];
    const float mean = sum_of_warp(sum) / N;
#pragma unroll
    for (int i = 0; i < N; i += 32) squares += (y[i + lane] - mean) * (y[i + lane] - mean);
    const float scale = 1.f / sqrtf(sum_of_warp(squares) / N + eps);
    const float normed = (y[n] - mean) * scale * wide_at(vectors.norm_weight + channel) + wide_at(vectors.norm_bias + channel);
    return (normed + bonus * v) * gate;
}

#ifdef HALF_STATE
/// Keys of a state row in a thread's hands: groups of eight 16-bit numbers.
constexpr int GROUP = 8;
typedef u16 Kept;
#else
constexpr int GROUP = 4;
typedef float Kept;
#endif
constexpr int PARTS = N / (4 * GROUP) > 0 ? N / (4 * GROUP) : 1;

/// One token for each of `rows` sequences, in place on state [slots, H, N, N] (value x key). Block (head, row).
/// hidden [rows, RANKS] and low_rank [RANKS, C], or low [4][rkv_stride] of [rows, C] when those maps are already applied.
extern "C" __global__ void __launch_bounds__(THREADS) wkv7_step(
    const u16* rkv, int rkv_stride, const u16* hidden, const u16* low_rank, const u16* low, u16* v_first, int is_first,
    Kept* state, const int* slots, const u16* w0, const u16* a0, const u16* v0, const u16* k_k, const u16* k_a, const u16* r_k,
    const u16* norm_weight, const u16* norm_bias, float eps, u16* out) {
    __shared__ Channels m;
    __shared__ float lows[4][N], parts[WARPS][4][N], y[N];
    __shared__ float2 shared[N / 32];
    const int head = blockIdx.x, row = blockIdx.y, H = gridDim.x, C = H * N;
    const Vectors vectors = {w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias};
    const int value = threadIdx.x / 4, quarter = threadIdx.x % 4;
    Kept* mine = state + (((i64)slots[row] * H + head) * N + value) * N + quarter * GROUP;
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
        if (quarter % 2 == 0) bring_to_l2(mine + 4 * GROUP * i);
    float low_mine[4] = {};
    const i64 at = (i64)row * C + head * N + threadIdx.x;  // of the first N threads
    uint4 kept[PARTS];
    const auto load_state = [&] {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) kept[i] = load_fresh((const void*)(mine + 4 * GROUP * i));
    };
    if (hidden) {
        const LowRank maps(low_rank, C, head);
        let_next_start();
        wait_for_previous();
        load_state();
        maps.apply(hidden + (i64)row * RANKS, lows, parts);
        if (threadIdx.x < N)
            for (int i = 0; i < 4; ++i) low_mine[i] = lows[i][threadIdx.x];
    } else {
        let_next_start();
        wait_for_previous();
        load_state();
        if (threadIdx.x < N)
            for (int i = 0; i < 4; ++i) low_mine[i] = i == 2 && is_first ? 0.f : E::wide(load_fresh(low + (i64)i * rkv_stride + at));
    }
    prepare(m, rkv, rkv_stride, low_mine, v_first, is_first, at, head * N + threadIdx.x, vectors, shared);

    float s[PARTS][GROUP], erased = 0.f, sum = 0.f;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
#ifdef HALF_STATE
        const Eight eight(kept[i]);
        for (int j = 0; j < 8; ++j) s[i][j] = eight.f[j];
#else
        s[i][0] = __uint_as_float(kept[i].x), s[i][1] = __uint_as_float(kept[i].y);
        s[i][2] = __uint_as_float(kept[i].z), s[i][3] = __uint_as_float(kept[i].w);
#endif
#pragma unroll
        for (int j = 0; j < GROUP; ++j) erased += s[i][j] * m.erase[(4 * i + quarter) * GROUP + j];
    }
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
#ifdef HALF_STATE
        *(uint4*)(mine + 4 * GROUP * i) = packed(s[i]);
#else
        *(float4*)(mine + 4 * GROUP * i) = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
#endif
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (quarter == 0) y[value] = sum;
    __syncthreads();
    if (threadIdx.x < N)
        out[at] = narrow(finished(y, threadIdx.x, head * N + threadIdx.x, eps, vectors, m.bonus, m.v[threadIdx.x], m.gate[threadIdx.x]));
}

/// The same for the tokens of a prompt, in two halves around the operator on whole rows. Block (head, token) of N
/// threads; place[token]: its place in the operator's tensors [batch, T, H, N]: six of them, r, log decay, k, v, a, b.
extern "C" __global__ void __launch_bounds__(N) wkv7_prepare(
    const u16* rkv, int rkv_stride, const u16* low, u16* v_first, int is_first, const u16* w0, const u16* a0, const u16* v0,
    const u16* k_k, const u16* k_a, const u16* r_k, const int* place, u16* inputs, int inputs_stride, float* bonuses) {
    __shared__ float2 shared[N / 32];
    const int head = blockIdx.x, row = blockIdx.y, H = gridDim.x, C = H * N, n = threadIdx.x, channel = head * N + n;
    let_next_start();
    wait_for_previous();
    const i64 at = (i64)row * C + channel;
    const float r = E::wide(rkv[at]), raw = E::wide(rkv[rkv_stride + at]);
    float v = E::wide(rkv[2ll * rkv_stride + at]);
    const float rate = sigmoid(wide_at(a0 + channel) + E::wide(low[rkv_stride + at]));
    const float k = raw * (1.f + (rate - 1.f) * wide_at(k_a + channel));
    float key = raw * wide_at(k_k + channel);
    if (is_first) v_first[at] = narrow(v);
    else v += (E::wide(v_first[at]) - v) * sigmoid(wide_at(v0 + channel) + E::wide(low[2ll * rkv_stride + at]));
    const float2 sums = sum_of_head(key * key, r * k * wide_at(r_k + channel), shared);
    const float norm = sqrtf(sums.x);
    key /= norm > 1e-12f ? norm : 1e-12f;
    const float values[6] = {r, -0.6065306597126334f * sigmoid(wide_at(w0 + channel) + E::wide(low[at])), k, v, -key, key * rate};
    u16* to = inputs + (i64)place[row] * C + channel;
    for (int i = 0; i < 6; ++i) to[(i64)i * inputs_stride] = narrow(values[i]);
    if (n == 0) bonuses[row * H + head] = sums.y;
}
/// out = (GroupNorm(y) + bonus v) gate; y and v of the operator's shape.
extern "C" __global__ void __launch_bounds__(N) wkv7_finish(
    const u16* y, const u16* v, const u16* gate, const float* bonuses, const int* place, const u16* norm_weight,
    const u16* norm_bias, float eps, u16* out) {
    __shared__ float shared[N];
    const int head = blockIdx.x, row = blockIdx.y, H = gridDim.x, C = H * N, n = threadIdx.x, channel = head * N + n;
    let_next_start();
    wait_for_previous();
    const i64 from = (i64)place[row] * C + channel, at = (i64)row * C + channel;
    shared[n] = E::wide(y[from]);
    __syncthreads();
    const Vectors vectors = {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, norm_weight, norm_bias};
    out[at] = narrow(finished(shared, n, channel, eps, vectors, bonuses[row * H + head], E::wide(v[from]), E::wide(gate[at])));
}
