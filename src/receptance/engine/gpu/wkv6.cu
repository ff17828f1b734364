// RWKV-5's and 6's time mix around the projections, see wkv6.cuh. -DSTEP_THREADS of a multiprocessor in wkv6_step_many.
#include "wkv6.cuh"

/// See mix. Blocks (head, row).
extern "C" __global__ void __launch_bounds__(THREADS) wkv6_mix(
    const u16* hidden, const u16* weight, const u16* base, u16* mixed, int stride) {
    __shared__ Mix memory;
    const int C = gridDim.x * N, first = blockIdx.x * N;
    const MixMaps maps(weight, C, first);
    let_next_start();
    wait_for_previous();
    mix(memory, maps, hidden + (i64)blockIdx.y * MIXES * RANK_MIX, base, C, first, mixed, stride, (i64)blockIdx.y * C + first);
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

#define STEP_PARAMETERS                                                                                                        \
    const u16 *r, const u16 *k, const u16 *v, const u16 *gate, Kept *state, const int *slots, const float *base, const float *bonus, \
        const u16 *norm_weight, const u16 *norm_bias, float eps, u16 *out

/// State [slots, H, N, N] (value x key). Blocks (head, row); r, k, v, gate [rows, C], gate null: none. Added to `base` before it
/// becomes a decay: hidden [rows, RANK_DECAY] times weight [RANK_DECAY, C]; or nothing, where these are null.
extern "C" __global__ void __launch_bounds__(THREADS) wkv6_step(STEP_PARAMETERS, const u16* hidden, const u16* weight) {
    __shared__ StepOfFew m;
    const int head = blockIdx.x, row = blockIdx.y, H = gridDim.x, C = H * N, n = threadIdx.x;
    const i64 at = (i64)row * C + head * N + n;  // of the first N threads
    Kept* mine = state_of(state, slots[row], head, H);
    StateRow kept;
    kept.load(mine);
    Given x;
    float more = 0.f;
    load_vectors(m.step, {base, bonus, norm_weight, norm_bias}, head);
    if (hidden) {
        const DecayMap map(weight, C, head * N);
        let_next_start();
        wait_for_previous();
        x = load_given(r, k, v, gate, at);
        map.apply(hidden + (i64)row * RANK_DECAY, m.low, m.parts);
        if (n < N) more = m.low[0][n];
    } else {
        let_next_start();
        wait_for_previous();
        x = load_given(r, k, v, gate, at);
    }
    step(m.step, x, more, kept, mine, gate, eps, out, at);
}
/// The same where the map is applied already, low [rows, C], or null; blocks (head, ·), each for some of the rows: a row's state
/// is on its way while the one before it is stepped.
extern "C" __global__ void __launch_bounds__(THREADS, STEP_THREADS / THREADS) wkv6_step_many(STEP_PARAMETERS, const u16* low, int rows) {
    __shared__ Step memory;
    const int head = blockIdx.x, H = gridDim.x;
    const i64 C = (i64)H * N, from = head * N + threadIdx.x;  // of the first N threads
    load_vectors(memory, {base, bonus, norm_weight, norm_bias}, head);
    int row = blockIdx.y, after = row + gridDim.y;
    Kept* mine = state_of(state, slots[row], head, H);
    int slot = after < rows ? slots[after] : 0;
    StateRow kept, next_kept;
    kept.load(mine);
    let_next_start();
    wait_for_previous();
    Given x = load_given(r, k, v, gate, row * C + from), next = {};
    u16 more = 0, next_more = 0;
    if (low && threadIdx.x < N) more = load_fresh(low + row * C + from);
    for (; row < rows; row = after, after += gridDim.y) {
        Kept* other = state_of(state, slot, head, H);
        if (after < rows) {
            next_kept.load(other);
            next = load_given(r, k, v, gate, after * C + from);
            if (low && threadIdx.x < N) next_more = load_fresh(low + after * C + from);
            if (after + gridDim.y < rows) slot = slots[after + gridDim.y];
        }
        step(memory, x, E::wide(more), kept, mine, gate, eps, out, row * C + from);
        kept = next_kept, x = next, more = next_more, mine = other;
    }
}

/// For prompts: place[token]: its place in the operator's tensors [batch, T, H, N], -1 for padding: r, k, v in `inputs`, the decay's logarithm.
/// low [rows, C] or null.
extern "C" __global__ void __launch_bounds__(256) wkv6_prepare(
    const u16* r, const u16* k, const u16* v, const u16* low, const float* base, const int* place, u16* inputs,
    int inputs_stride, float* decays, int rows) {
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x, row = blockIdx.y * TOKENS + threadIdx.x / LANES, C = gridDim.x * N;
    if (row >= rows || place[row] < 0) return;
    const int channel = head * N + threadIdx.x % LANES * EACH;
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
    const int head = blockIdx.x, row = blockIdx.y * TOKENS + threadIdx.x / LANES, C = gridDim.x * N;
    const int there = row < rows ? place[row] : -1;
    const int channel = head * N + threadIdx.x % LANES * EACH;
    const i64 at = (i64)row * C + channel;
    Few x = normed(read(y + (i64)(there < 0 ? 0 : there) * C + channel), channel, eps, norm_weight, norm_bias);
    if (there < 0) return;
    if (gate) {
        const Few g = read(gate + at);
        for (int i = 0; i < EACH; ++i) x.f[i] *= silu(g.f[i]);
    }
    write(out + at, x);
}
