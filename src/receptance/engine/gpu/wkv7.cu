// RWKV-7's time mix between the projections: what one token does to the state of one head, and what comes of it.
// -DHEAD (N); -DRANK_V, RANK_W, RANK_A, RANK_G: multiples of 32; -DRANK_ROWS: rows between two maps' weights.
#include "gpu.cuh"

constexpr int N = HEAD, THREADS = 4 * N, WARPS = THREADS / 32, RANKS = RANK_V + RANK_W + RANK_A + RANK_G;
enum { LOW_V, LOW_W, LOW_A, LOW_G };  // order of the low-rank maps
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

/// The outputs of the four low-rank maps for this head, low [4][N]: hidden [RANKS] times weight [4, RANK_ROWS, C].
struct LowRank {
    static constexpr int EACH = RANKS / 32, GROUPS = N / 8;
    uint4 w[EACH];
    static DEVICE constexpr int first_of(int map) { return (map > 0) * RANK_V + (map > 1) * RANK_W + (map > 2) * RANK_A; }
    static DEVICE constexpr int map_of(int i) { return (i * 32 >= first_of(1)) + (i * 32 >= first_of(2)) + (i * 32 >= first_of(3)); }
    DEVICE LowRank(const u16* weight, int c, int head) {
        const u16* from = weight + (i64)(threadIdx.x / GROUPS) * c + head * N + threadIdx.x % GROUPS * 8;
#pragma unroll
        for (int i = 0; i < EACH; ++i) w[i] = load_weights(from + (i64)(map_of(i) * RANK_ROWS + i * 32 - first_of(map_of(i))) * c);
    }
    DEVICE void apply(const u16* hidden, float (&low)[4][N], float (&shared)[WARPS][4][N]) const {
        float sums[4][8] = {};
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float h = E::wide(load_fresh(hidden + i * 32 + threadIdx.x / GROUPS));
            const Eight x(w[i]);
            const int map = map_of(i);
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
    uint4 kept[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) kept[i] = load_fresh((const void*)(mine + 4 * GROUP * i));
    float low_mine[4] = {};
    low(low_mine, at);
    prepare(m, rkv, rkv_stride, low_mine, v_first, is_first, at, head * N + threadIdx.x, vectors, memory.sums);

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


#define STEP_PARAMETERS                                                                                                     \
    u16 *v_first, int is_first, Kept *state, const int *slots, const u16 *w0, const u16 *a0, const u16 *v0, const u16 *k_k, \
        const u16 *k_a, const u16 *r_k, const u16 *norm_weight, const u16 *norm_bias, float eps, u16 *out

/// Blocks (head, row). hidden [rows, RANKS]; low_rank [4, RANK_ROWS, C]; rkv [3][rkv_stride] of [rows, C].
extern "C" __global__ void __launch_bounds__(THREADS) wkv7_step(
    const u16* rkv, int rkv_stride, const u16* hidden, const u16* low_rank, STEP_PARAMETERS) {
    __shared__ Step memory;
    __shared__ float lows[4][N], parts[WARPS][4][N];
    const LowRank maps(low_rank, gridDim.x * N, blockIdx.x);
    const Vectors vectors = {w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias};
    step(memory, rkv, rkv_stride, v_first, is_first, state, slots, vectors, eps, out, [&](float(&low)[4], i64) {
        maps.apply(hidden + (i64)blockIdx.y * RANKS, lows, parts);
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

// The same for the tokens of a prompt, in two halves around the operator on whole rows: a warp for each (head, token),
// the lane's channels side by side.
constexpr int EACH = N / 32, TOKENS = 8;  // warps of a block
struct Few { float f[EACH]; };
DEVICE Few read(const u16* p) {
    const Pack<E, EACH <= 2 ? EACH : 1>* packs = (const Pack<E, EACH <= 2 ? EACH : 1>*)p;
    Few x;
#pragma unroll
    for (int i = 0; i < EACH; ++i) x.f[i] = EACH <= 2 ? packs[0][i] : packs[i][0];
    return x;
}
DEVICE void write(u16* p, const Few& x) {
    if (EACH == 2) *(u32*)p = E::two(x.f[0], x.f[EACH - 1]);
    else for (int i = 0; i < EACH; ++i) p[i] = narrow(x.f[i]);
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
    const Few value = read(v + from), g = read(gate + at), weight = read(norm_weight + channel), bias = read(norm_bias + channel);
    Few x = read(y + from);
    float sum = 0.f, squares = 0.f;
    for (int i = 0; i < EACH; ++i) sum += x.f[i];
    const float mean = sum_of_warp(sum) / N;
    for (int i = 0; i < EACH; ++i) x.f[i] -= mean, squares += x.f[i] * x.f[i];
    const float scale = 1.f / sqrtf(sum_of_warp(squares) / N + eps), bonus = bonuses[row * H + head];
    for (int i = 0; i < EACH; ++i) x.f[i] = (x.f[i] * scale * weight.f[i] + bias.f[i] + bonus * value.f[i]) * g.f[i];
    write(out + at, x);
}
