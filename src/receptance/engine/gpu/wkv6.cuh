// RWKV-5's and 6's time mix around the projections: RWKV-6's mixes, and what one token does to the state of one head.
// -DHEAD (N); -DRANK_MIX, -DRANK_DECAY: of RWKV-6's low-rank maps, multiples of 32.
#pragma once
#include "head.cuh"

constexpr int MIXES = 5;
enum { SAME, BEFORE = 2, FIRST };  // rows of `mixed`: the token's norm, the previous one's, the first of five mixes
typedef LowRank<RANK_MIX, RANK_MIX, RANK_MIX, RANK_MIX, RANK_MIX, RANK_MIX> MixMaps;
typedef LowRank<RANK_DECAY, RANK_DECAY> DecayMap;
struct Mix {
    float lows[MIXES][N];
    MixMaps::Parts parts;
};

/// mixed [8][stride] of [rows, C]: mixed[FIRST + j] = same + (before - same) (base[j] + hidden[j] weight[j]) for the channels of
/// one head, which begin at `at`, and one row; hidden [MIXES · RANK_MIX]; weight, in maps, [MIXES, RANK_MIX, C]; base [MIXES, C].
DEVICE void mix(Mix& m, const MixMaps& maps, const u16* hidden, const u16* base, int C, int first, u16* mixed, int stride, i64 at) {
    maps.apply(hidden, m.lows, m.parts);
    for (int i = thread_of_head(); i < MIXES * N; i += THREADS) {
        const int j = i / N, n = i % N;
        const float same = E::wide(load_fresh(mixed + SAME * (i64)stride + at + n)), before = E::wide(load_fresh(mixed + BEFORE * (i64)stride + at + n));
        mixed[(i64)(FIRST + j) * stride + at + n] = narrow(same + (before - same) * (wide_at(base + j * C + first + n) + m.lows[j][n]));
    }
}

/// e^(-e^x): a step's decay.
DEVICE float decay_of(float x) { return ex2(-LOG2_E * ex2(LOG2_E * x)); }
DEVICE float silu(float x) { return x * sigmoid(x); }

/// A layer's vectors, of C elements each.
struct Vectors {
    const float *base, *bonus;
    const u16 *norm_weight, *norm_bias;
};
struct Step {
    float r[N], decay[N], k[N], v[N], y[N], bonus;
    float vectors[4][N];  // of this head; a channel's are its thread's
    float2 sums[N / 32];
};
/// What a row's channel reads, not yet widened: that would wait for it.
struct Given { u16 r, k, v, gate; };

DEVICE void load_vectors(Step& m, const Vectors& vectors, int head) {
    const int n = thread_of_head(), channel = head * N + n;
    if (n >= N) return;
    m.vectors[0][n] = vectors.base[channel], m.vectors[1][n] = vectors.bonus[channel];
    m.vectors[2][n] = wide_at(vectors.norm_weight + channel), m.vectors[3][n] = wide_at(vectors.norm_bias + channel);
}
DEVICE Given load_given(const u16* r, const u16* k, const u16* v, const u16* gate, i64 at) {
    Given x = {};
    if (thread_of_head() >= N) return x;
    x.r = load_fresh(r + at), x.k = load_fresh(k + at), x.v = load_fresh(v + at);
    if (gate) x.gate = load_fresh(gate + at);
    return x;
}
/// One token for one row and head, in place on the row's state [N, N] (value x key), of which the thread keeps what lies at
/// `state`. more: what is added to the channel's `base` before it becomes a decay. The next call may follow at once.
DEVICE void step(Step& m, const Given& x, float more, const StateRow& kept, Kept* state, bool has_gate, float eps, u16* out, i64 at) {
    const int n = thread_of_head();
    const bool mine = n < N;
    float product = 0.f;
    if (mine) {
        const float r = E::wide(x.r), k = E::wide(x.k);
        m.r[n] = r, m.k[n] = k, m.v[n] = E::wide(x.v);
        m.decay[n] = decay_of(m.vectors[0][n] + more);
        product = r * k * m.vectors[1][n];
    }
    const float2 sums = sum_of_head(product, 0.f, m.sums);
    if (n == 0) m.bonus = sums.x;
    sync_head();

    float s[PARTS][GROUP], sum[VALUES] = {}, v[VALUES];
    kept.unpack(s);
#pragma unroll
    for (int u = 0; u < VALUES; ++u) v[u] = m.v[value_of(u)];
#pragma unroll
    for (int part = 0; part < KEY_PARTS; ++part) {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            const int key = key_of(part) + j;
#pragma unroll
            for (int u = 0; u < VALUES; ++u) {
                float& x = s[u * KEY_PARTS + part][j];
                sum[u] += x * m.r[key];
                x = x * m.decay[key] + v[u] * m.k[key];
            }
        }
#pragma unroll
        for (int u = 0; u < VALUES; ++u) store_state(state + offset_of(u * KEY_PARTS + part), s[u * KEY_PARTS + part]);
    }
#pragma unroll
    for (int u = 0; u < VALUES; ++u) {
        sum[u] = sum_of_keys(sum[u]);
        if (key_of(0) == 0) m.y[value_of(u)] = sum[u] + m.bonus * v[u];
    }
    sync_head();
    if (mine) {
        const float y = normed(m.y, n, eps, m.vectors[2][n], m.vectors[3][n]);
        out[at] = narrow(has_gate ? y * silu(E::wide(x.gate)) : y);
    }
}
/// What a team needs to do a step for few rows.
struct StepOfFew {
    Step step;
    float low[1][N];
    DecayMap::Parts parts;
};
