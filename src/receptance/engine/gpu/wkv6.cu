// RWKV-5's and 6's time mix around the projections: RWKV-6's mixes, and what one token does to the state of one head.
// -DHEAD (N); -DRANK_MIX, -DRANK_DECAY: of RWKV-6's low-rank maps, multiples of 32.
#include "head.cuh"

constexpr int MIXES = 5;
enum { SAME, BEFORE = 2, FIRST };  // rows of `mixed`: the token's norm, the previous one's, the first of five mixes
typedef LowRank<RANK_MIX, RANK_MIX, RANK_MIX, RANK_MIX, RANK_MIX, RANK_MIX> MixMaps;
typedef LowRank<RANK_DECAY, RANK_DECAY> DecayMap;

/// mixed [8][stride] of [rows, C]: mixed[FIRST + j] = same + (before - same) (base[j] + hidden[j] weight[j]). Blocks (head, row);
/// hidden [rows, MIXES · RANK_MIX]; weight [MIXES, RANK_MIX, C]; base [MIXES, C].
extern "C" __global__ void __launch_bounds__(THREADS) wkv6_mix(
    const u16* hidden, const u16* weight, const u16* base, u16* mixed, int stride) {
    __shared__ float lows[MIXES][N];
    __shared__ MixMaps::Parts parts;
    const int C = gridDim.x * N, first = blockIdx.x * N;
    const MixMaps maps(weight, C, first);
    let_next_start();
    wait_for_previous();
    maps.apply(hidden + (i64)blockIdx.y * MIXES * RANK_MIX, lows, parts);
    for (int i = threadIdx.x; i < MIXES * N; i += THREADS) {
        const int j = i / N, channel = first + i % N;
        const i64 at = (i64)blockIdx.y * C + channel;
        const float same = E::wide(load_fresh(mixed + SAME * (i64)stride + at)), before = E::wide(load_fresh(mixed + BEFORE * (i64)stride + at));
        mixed[(i64)(FIRST + j) * stride + at] = narrow(same + (before - same) * (wide_at(base + j * C + channel) + lows[j][i % N]));
    }
}
/// The same where the maps are applied already: low [MIXES][stride] of [rows, C]. Blocks (·, mix); a thread for eight channels.
extern "C" __global__ void __launch_bounds__(256) wkv6_mix_many(
    const u16* low, const u16* base, u16* mixed, int stride, int groups, int C) {
    let_next_start();
    wait_for_previous();
    const int group = blockIdx.x * 256 + threadIdx.x, j = blockIdx.y;
    if (group >= groups) return;
    const i64 at = (i64)group * 8;
    const Eight same(load_fresh((const void*)(mixed + SAME * (i64)stride + at))), before(load_fresh((const void*)(mixed + BEFORE * (i64)stride + at)));
    const Eight mine(load_fresh((const void*)(low + (i64)j * stride + at))), mix(load_weights(base + (i64)j * C + at % C));
    float x[8];
    for (int i = 0; i < 8; ++i) x[i] = same.f[i] + (before.f[i] - same.f[i]) * (mix.f[i] + mine.f[i]);
    *(uint4*)(mixed + (i64)(FIRST + j) * stride + at) = packed(x);
}

/// e^(-e^x): a step's decay.
DEVICE float decay_of(float x) { return ex2(-LOG2_E * ex2(LOG2_E * x)); }
DEVICE float silu(float x) { return x * sigmoid(x); }

struct Step {
    float r[N], decay[N], k[N], v[N], y[N], bonus;
    float2 sums[N / 32];
    float low[1][N];
    DecayMap::Parts parts;
};

/// One token for each row and head, in place on state [slots, H, N, N] (value x key). Blocks (head, row); r, k, v, gate
/// [rows, C], gate null: none. Added to `base` before it becomes a decay: low [rows, C], or hidden [rows, RANK_DECAY] times
/// weight [RANK_DECAY, C], or nothing.
extern "C" __global__ void __launch_bounds__(THREADS) wkv6_step(
    const u16* r, const u16* k, const u16* v, const u16* gate, const u16* hidden, const u16* weight, const u16* low, Kept* state,
    const int* slots, const float* base, const float* bonus, const u16* norm_weight, const u16* norm_bias, float eps, u16* out) {
    __shared__ Step m;
    const int head = blockIdx.x, row = blockIdx.y, H = gridDim.x, C = H * N, n = threadIdx.x;
    const int value = threadIdx.x / 4, quarter = threadIdx.x % 4, channel = head * N + n;
    const i64 at = (i64)row * C + channel;  // of the first N threads
    const bool mine = n < N;
    Kept* row_of_state = state + (((i64)slots[row] * H + head) * N + value) * N + quarter * GROUP;
    if (hidden) {
        const DecayMap map(weight, C, head * N);
        let_next_start();
        wait_for_previous();
        map.apply(hidden + (i64)row * RANK_DECAY, m.low, m.parts);
    } else {
        let_next_start();
        wait_for_previous();
    }
    StateRow kept;
    kept.load(row_of_state);
    float product = 0.f;
    if (mine) {
        const float more = hidden ? m.low[0][n] : low ? E::wide(load_fresh(low + at)) : 0.f;
        m.r[n] = E::wide(load_fresh(r + at)), m.k[n] = E::wide(load_fresh(k + at)), m.v[n] = E::wide(load_fresh(v + at));
        m.decay[n] = decay_of(base[channel] + more);
        product = m.r[n] * m.k[n] * bonus[channel];
    }
    const float2 sums = sum_of_head(product, 0.f, m.sums);
    if (n == 0) m.bonus = sums.x;
    __syncthreads();

    float s[PARTS][GROUP], sum = 0.f;
    kept.unpack(s);
    const float mine_v = m.v[value];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            const int key = (4 * i + quarter) * GROUP + j;
            sum += s[i][j] * m.r[key];
            s[i][j] = s[i][j] * m.decay[key] + mine_v * m.k[key];
        }
        store_state(row_of_state + 4 * GROUP * i, s[i]);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (quarter == 0) m.y[value] = sum + m.bonus * mine_v;
    __syncthreads();
    if (mine) {
        const float x = normed(m.y, n, eps, wide_at(norm_weight + channel), wide_at(norm_bias + channel));
        out[at] = narrow(gate ? x * silu(E::wide(load_fresh(gate + at))) : x);
    }
}

/// For prompts: place[token]: its place in the operator's tensors [batch, T, H, N]: r, k, v in `inputs`, the decay's logarithm.
/// low [rows, C] or null.
extern "C" __global__ void __launch_bounds__(256) wkv6_prepare(
    const u16* r, const u16* k, const u16* v, const u16* low, const float* base, const int* place, u16* inputs,
    int inputs_stride, float* decays, int rows) {
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x, row = blockIdx.y * TOKENS + threadIdx.x / 32, C = gridDim.x * N;
    if (row >= rows) return;
    const int channel = head * N + threadIdx.x % 32 * EACH;
    const i64 at = (i64)row * C + channel, to = (i64)place[row] * C + channel;
    Few decay;
    for (int i = 0; i < EACH; ++i) decay.f[i] = base[channel + i];
    if (low) {
        const Few more = read(low + at);
        for (int i = 0; i < EACH; ++i) decay.f[i] += more.f[i];
    }
    for (int i = 0; i < EACH; ++i) decay.f[i] = -ex2(LOG2_E * decay.f[i]);
    write(inputs + to, read(r + at)), write(inputs + (i64)inputs_stride + to, read(k + at));
    write(inputs + 2ll * inputs_stride + to, read(v + at)), write(decays + to, decay);
}
/// out = GroupNorm(y) silu(gate); y of the operator's shape, gate null: none.
extern "C" __global__ void __launch_bounds__(256) wkv6_finish(
    const u16* y, const u16* gate, const int* place, const u16* norm_weight, const u16* norm_bias, float eps, u16* out, int rows) {
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x, row = blockIdx.y * TOKENS + threadIdx.x / 32, C = gridDim.x * N;
    if (row >= rows) return;
    const int channel = head * N + threadIdx.x % 32 * EACH;
    const i64 at = (i64)row * C + channel;
    Few x = normed(read(y + (i64)place[row] * C + channel), channel, eps, norm_weight, norm_bias);
    if (gate) {
        const Few g = read(gate + at);
        for (int i = 0; i < EACH; ++i) x.f[i] *= silu(g.f[i]);
    }
    write(out + at, x);
}
