// RWKV-7's time mix between the projections: what one token does to the state of one head, and what comes of it.
// -DHEAD (N); -DRANK_V, RANK_W, RANK_A, RANK_G: multiples of 32; -DRANK_ROWS: rows between two maps' weights.
#pragma once
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

DEVICE void load_vectors(Step& m, const Vectors& vectors, int head) {
    const int n = thread_of_head();
    if (n < N)
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) m.vectors[i][n] = wide_at(vectors.of[i] + head * N + n);
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
    const bool mine = thread_of_head() < N;
    const int n = thread_of_head();
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
    sync_head();
}

/// One token for one row and head, in place on the row's state [N, N] (value x key), of which the thread keeps what lies at
/// `state`. The next call may follow at once.
DEVICE void step(Step& memory, const StateRow& kept, Kept* state, float eps, u16* out, i64 at) {
    const Channels& m = memory.channels;
    float(&y)[N] = memory.y;
    float s[PARTS][GROUP], erased[VALUES] = {}, sum[VALUES] = {}, v[VALUES];
    kept.unpack(s);
#pragma unroll
    for (int part = 0; part < KEY_PARTS; ++part)
#pragma unroll
        for (int j = 0; j < GROUP; ++j)
#pragma unroll
            for (int u = 0; u < VALUES; ++u) erased[u] += s[u * KEY_PARTS + part][j] * m.erase[key_of(part) + j];
#pragma unroll
    for (int u = 0; u < VALUES; ++u) erased[u] = sum_of_keys(erased[u]), v[u] = m.v[value_of(u)];
#pragma unroll
    for (int part = 0; part < KEY_PARTS; ++part) {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            const int key = key_of(part) + j;
#pragma unroll
            for (int u = 0; u < VALUES; ++u) {
                float& x = s[u * KEY_PARTS + part][j];
                x = x * m.decay[key] + (erased[u] * m.write[key] + v[u] * m.k[key]);
                sum[u] += x * m.r[key];
            }
        }
#pragma unroll
        for (int u = 0; u < VALUES; ++u) store_state(state + offset_of(u * KEY_PARTS + part), s[u * KEY_PARTS + part]);
    }
#pragma unroll
    for (int u = 0; u < VALUES; ++u) {
        sum[u] = sum_of_keys(sum[u]);
        if (key_of(0) == 0) y[value_of(u)] = sum[u];
    }
    sync_head();
    if (thread_of_head() < N) {
        const int n = thread_of_head();
        const float x = normed(y, n, eps, memory.vectors[NORM_WEIGHT][n], memory.vectors[NORM_BIAS][n]);
        out[at] = narrow((x + m.bonus * m.v[n]) * m.gate[n]);
    }
}
/// What a team needs to do a step for few rows.
struct StepOfFew {
    Step step;
    float lows[4][N];
    Maps::Parts parts;
};
/// hidden: the row's inner vectors. maps, and m.step.vectors, are of this head.
DEVICE void step_of_few(StepOfFew& m, const Maps& maps, const u16* rkv, int rkv_stride, const u16* hidden, u16* v_first,
                        int is_first, const StateRow& kept, Kept* mine, i64 at, float eps, u16* out) {
    const int n = thread_of_head();
    Given given = {};
    if (n < N) load_given(given, rkv, rkv_stride, v_first, is_first, at);
    maps.apply(hidden, m.lows, m.parts);
    float low[4] = {};
    if (n < N)
        for (int i = 0; i < 4; ++i) low[i] = m.lows[i][n];
    prepare(m.step, given, low, v_first, is_first, at);
    step(m.step, kept, mine, eps, out, at);
}
