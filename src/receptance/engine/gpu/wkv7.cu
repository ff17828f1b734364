// RWKV-7's time mix between the projections, see wkv7.cuh. -DSTEP_THREADS of a multiprocessor in wkv7_step_many.
#include "wkv7.cuh"

#define STEP_PARAMETERS                                                                                                     \
    u16 *v_first, int is_first, Kept *state, const int *slots, const u16 *w0, const u16 *a0, const u16 *v0, const u16 *k_k, \
        const u16 *k_a, const u16 *r_k, const u16 *norm_weight, const u16 *norm_bias, float eps, u16 *out

/// State [slots, H, N, N]. Blocks (head, row). hidden [rows, sum of ranks]; low_rank [4, RANK_ROWS, C].
extern "C" __global__ void __launch_bounds__(THREADS) wkv7_step(
    const u16* rkv, int rkv_stride, const u16* hidden, const u16* low_rank, STEP_PARAMETERS) {
    __shared__ StepOfFew memory;
    const int row = blockIdx.y;
    const i64 at = (i64)row * gridDim.x * N + blockIdx.x * N + threadIdx.x;  // of the first N threads
    const Maps maps(low_rank, gridDim.x * N, blockIdx.x * N);
    load_vectors(memory.step, {w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias}, blockIdx.x);
    Kept* mine = state_of(state, slots[row], blockIdx.x, gridDim.x);
    StateRow kept;
    kept.load(mine);
    let_next_start();
    wait_for_previous();
    step_of_few(
        memory, maps, rkv, rkv_stride, hidden + (i64)row * Maps::EACH * 32, v_first, is_first, kept, mine, at, eps, out);
}
/// The same where the maps are applied already, given [4][low_stride] of [rows, C]; blocks (head, ·), each for some of the
/// rows: a row's state is on its way while the one before it is stepped.
extern "C" __global__ void __launch_bounds__(THREADS, STEP_THREADS / THREADS) wkv7_step_many(
    const u16* rkv, int rkv_stride, const u16* given, int low_stride, STEP_PARAMETERS, int rows) {
    __shared__ Step memory;
    const i64 C = (i64)gridDim.x * N, from = blockIdx.x * N + threadIdx.x;  // of the first N threads
    load_vectors(memory, {w0, a0, v0, k_k, k_a, r_k, norm_weight, norm_bias}, blockIdx.x);
    int row = blockIdx.y, after = row + gridDim.y;
    Kept* mine = state_of(state, slots[row], blockIdx.x, gridDim.x);
    int slot = after < rows ? slots[after] : 0;
    StateRow kept, next_kept;
    kept.load(mine);
    let_next_start();
    wait_for_previous();
    const auto load = [&](Given& x, i64 at) {
        if (threadIdx.x >= N) return;
        load_given(x, rkv, rkv_stride, v_first, is_first, at);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i >= is_first) x.low[i] = load_fresh(given + (i64)i * low_stride + at);
    };
    Given x = {}, next = {};
    load(x, row * C + from);
    for (; row < rows; row = after, after += gridDim.y) {
        Kept* other = state_of(state, slot, blockIdx.x, gridDim.x);
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

/// place[token]: its place in the operator's tensors [batch, T, H, N], -1 for padding: six of them, r, log decay, k, v, a, b.
extern "C" __global__ void __launch_bounds__(256) wkv7_prepare(
    const u16* rkv, int stride, const u16* low, u16* v_first, int is_first, const u16* w0, const u16* a0, const u16* v0,
    const u16* k_k, const u16* k_a, const u16* r_k, const int* place, u16* inputs, int inputs_stride, float* bonuses, int rows) {
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x, token = blockIdx.y * TOKENS + threadIdx.x / LANES, H = gridDim.x, C = H * N;
    const int there = token < rows ? place[token] : -1, row = there < 0 ? 0 : token;  // padding reads the first row instead
    const int channel = head * N + threadIdx.x % LANES * EACH;
    const i64 at = (i64)row * C + channel;
    const auto given = [&](const u16* x, int part) { return read(x + (i64)part * stride + at); };
    const Few r = given(rkv, 0), raw = given(rkv, 1), low_w = given(low, LOW_W), low_a = given(low, LOW_A);
    const Few w_0 = read(w0 + channel), a_0 = read(a0 + channel), kk = read(k_k + channel), ka = read(k_a + channel);
    const Few rk = read(r_k + channel);
    Few v = given(rkv, 2), k, key, rate, decay, erase, add;
    if (is_first) {
        if (there >= 0) write(v_first + at, v);
    } else {
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
    const float norm = sqrtf(sum_of_lanes(squares));
    bonus = sum_of_lanes(bonus);
    if (there < 0) return;
    for (int i = 0; i < EACH; ++i) {
        key.f[i] /= norm > 1e-12f ? norm : 1e-12f;
        erase.f[i] = -key.f[i], add.f[i] = key.f[i] * rate.f[i];
    }
    u16* to = inputs + (i64)there * C + channel;
    write(to, r), write(to + (i64)inputs_stride, decay), write(to + 2ll * inputs_stride, k);
    write(to + 3ll * inputs_stride, v), write(to + 4ll * inputs_stride, erase), write(to + 5ll * inputs_stride, add);
    if (threadIdx.x % LANES == 0) bonuses[row * H + head] = bonus;
}
/// out = (GroupNorm(y) + bonus v) gate; y and v of the operator's shape. Lanes do TURNS tokens, all on their way at once.
extern "C" __global__ void __launch_bounds__(256) wkv7_finish(
    const u16* y, const u16* v, const u16* gate, const float* bonuses, const int* place, const u16* norm_weight,
    const u16* norm_bias, float eps, u16* out, int rows) {
    let_next_start();
    wait_for_previous();
    const int head = blockIdx.x, first = blockIdx.y * TOKENS * TURNS + threadIdx.x / LANES, H = gridDim.x, C = H * N;
    const int channel = head * N + threadIdx.x % LANES * EACH;
    int places[TURNS];
    float bonus[TURNS];
    Few x[TURNS], value[TURNS], g[TURNS];
#pragma unroll
    for (int t = 0; t < TURNS; ++t) places[t] = first + t * TOKENS < rows ? place[first + t * TOKENS] : -1;
#pragma unroll
    for (int t = 0; t < TURNS; ++t) {  // padding reads the first row instead
        const i64 row = places[t] < 0 ? 0 : first + t * TOKENS, from = (i64)(places[t] < 0 ? 0 : places[t]) * C + channel;
        x[t] = read(y + from), value[t] = read(v + from), g[t] = read(gate + row * C + channel), bonus[t] = bonuses[row * H + head];
    }
#pragma unroll
    for (int t = 0; t < TURNS; ++t) {
        x[t] = normed(x[t], channel, eps, norm_weight, norm_bias);
        for (int i = 0; i < EACH; ++i) x[t].f[i] = (x[t].f[i] + bonus[t] * value[t].f[i]) * g[t].f[i];
        if (places[t] >= 0) write(out + (i64)(first + t * TOKENS) * C + channel, x[t]);
    }
}
