// What the time mixes share whose state is a matrix for each head. -DHEAD (N).
#pragma once
#include "gpu.cuh"

constexpr int N = HEAD, THREADS = 4 * N, WARPS = THREADS / 32;  // of a team, which has one head's state

DEVICE int thread_of_head() { return team_thread<THREADS>(); }
DEVICE void sync_head() { team_sync<THREADS>(); }

DEVICE float wide_at(const u16* p) { return E::wide(*p); }

/// Sum over the first N threads of two values at once; every thread of the block calls it.
DEVICE float2 sum_of_head(float x, float y, float2* shared) {
    x = sum_of_warp(x), y = sum_of_warp(y);
    if (thread_of_head() % 32 == 0 && thread_of_head() < N) shared[thread_of_head() / 32] = make_float2(x, y);
    sync_head();
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < N / 32; ++i) sum.x += shared[i].x, sum.y += shared[i].y;
    return sum;
}

/// The outputs of low-rank maps for N channels from `first` on, low [maps][N]: hidden, the maps' inner vectors one behind the
/// other, times weight [maps, STRIDE, C]. Ranks are multiples of 32.
template <int STRIDE, int... RANKS> struct LowRank {
    static constexpr int MAPS = sizeof...(RANKS), EACH = (RANKS + ...) / 32, GROUPS = N / 8;
    typedef float Parts[WARPS][MAPS][N];
    uint4 w[EACH];
    static DEVICE constexpr int first_of(int map) {
        int sum = 0, i = 0;
        ((sum += i++ < map ? RANKS : 0), ...);
        return sum;
    }
    static DEVICE constexpr int map_of(int i) {
        int map = -1, first = 0;
        ((map += first <= i * 32, first += RANKS), ...);
        return map;
    }
    DEVICE LowRank(const u16* weight, int c, int first) {
        const u16* from = weight + (i64)(thread_of_head() / GROUPS) * c + first + thread_of_head() % GROUPS * 8;
#pragma unroll
        for (int i = 0; i < EACH; ++i) w[i] = load_weights(from + (i64)(map_of(i) * STRIDE + i * 32 - first_of(map_of(i))) * c);
    }
    DEVICE void apply(const u16* hidden, float (&low)[MAPS][N], Parts& shared) const {
        float sums[MAPS][8] = {};
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float h = E::wide(load_fresh(hidden + i * 32 + thread_of_head() / GROUPS));
            const Eight x(w[i]);
            const int map = map_of(i);
#pragma unroll
            for (int j = 0; j < 8; ++j) sums[map][j] += h * x.f[j];
        }
#pragma unroll
        for (int map = 0; map < MAPS; ++map)
#pragma unroll
            for (int j = 0; j < 8; ++j) {
#pragma unroll
                for (int mask = GROUPS; mask < 32; mask *= 2) sums[map][j] += __shfl_xor_sync(~0u, sums[map][j], mask);
                if (thread_of_head() % 32 < GROUPS) shared[thread_of_head() / 32][map][thread_of_head() % 32 * 8 + j] = sums[map][j];
            }
        sync_head();
        for (int i = thread_of_head(); i < MAPS * N; i += THREADS) {
            float sum = 0.f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp][i / N][i % N];
            low[i / N][i % N] = sum;
        }
        sync_head();
    }
};

/// GroupNorm(y) of one head, y in shared memory: what the n-th channel becomes.
DEVICE float normed(const float (&y)[N], int n, float eps, float weight, float bias) {
    const int lane = thread_of_head() % 32;
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < N; i += 32) sum += y[i + lane];
    const float mean = sum_of_warp(sum) / N;
#pragma unroll
    for (int i = 0; i < N; i += 32) squares += (y[i + lane] - mean) * (y[i + lane] - mean);
    const float scale = 1.f / sqrtf(sum_of_warp(squares) / N + eps);
    return (y[n] - mean) * scale * weight + bias;
}

#ifdef HALF_STATE
/// Keys of a state row in a thread's hands: groups of eight 16-bit numbers.
constexpr int GROUP = 8;
typedef u16 Kept;
#else
constexpr int GROUP = 4;
typedef float Kept;
#endif
// Of a thread: VALUES rows of a state, in each of them groups of keys that are KEY_LANES groups apart; lanes side by side take
// groups side by side, so that they move lines of 128 bytes.
constexpr int KEY_LANES = N / GROUP < 8 ? N / GROUP : 8, KEY_PARTS = N / (KEY_LANES * GROUP), VALUES = N * KEY_LANES / THREADS;
constexpr int PARTS = VALUES * KEY_PARTS, NEXT_VALUE = THREADS / KEY_LANES;
DEVICE int value_of(int u) { return thread_of_head() / KEY_LANES + u * NEXT_VALUE; }
DEVICE int key_of(int part) { return (part * KEY_LANES + thread_of_head() % KEY_LANES) * GROUP; }
DEVICE constexpr int offset_of(int i) { return i / KEY_PARTS * NEXT_VALUE * N + i % KEY_PARTS * KEY_LANES * GROUP; }
DEVICE float sum_of_keys(float x) {
#pragma unroll
    for (int mask = 1; mask < KEY_LANES; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
}

/// The part of a state that a thread keeps: s[u KEY_PARTS + part][j] is of value value_of(u) and key key_of(part) + j.
struct StateRow {
    uint4 kept[PARTS];
    DEVICE void load(const Kept* mine) {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) kept[i] = load_fresh((const void*)(mine + offset_of(i)));
    }
    DEVICE void unpack(float (&s)[PARTS][GROUP]) const {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
#ifdef HALF_STATE
            const Eight eight(kept[i]);
            for (int j = 0; j < 8; ++j) s[i][j] = eight.f[j];
#else
            s[i][0] = __uint_as_float(kept[i].x), s[i][1] = __uint_as_float(kept[i].y);
            s[i][2] = __uint_as_float(kept[i].z), s[i][3] = __uint_as_float(kept[i].w);
#endif
        }
    }
};
/// Where the thread's part of a head's state begins, in [slots, heads, N, N] (value x key).
DEVICE Kept* state_of(Kept* state, int slot, int head, int heads) {
    return state + (((i64)slot * heads + head) * N + value_of(0)) * N + key_of(0);
}
DEVICE void store_state(Kept* to, const float (&s)[GROUP]) {
#ifdef HALF_STATE
    *(uint4*)to = packed(s);
#else
    *(float4*)to = make_float4(s[0], s[1], s[2], s[3]);
#endif
}

// For the tokens of prompts, in two halves around the operator on whole rows: LANES for each (head, token), a lane's channels
// side by side. All lanes of a warp come to the sums, those of padding too.
constexpr int LANES = 16, EACH = N / LANES, TOKENS = 256 / LANES, TURNS = 2;  // tokens of a block at a time, and of a lane
struct alignas(2 * EACH) Halves { u32 two[EACH / 2]; };
struct Few { float f[EACH]; };
DEVICE Few read(const u16* p) {
    const Halves halves = *(const Halves*)p;
    Few x;
#pragma unroll
    for (int i = 0; i < EACH; ++i) x.f[i] = Pack<E, 2>{halves.two[i / 2]}[i % 2];
    return x;
}
DEVICE void write(u16* p, const Few& x) {
    Halves halves;
#pragma unroll
    for (int i = 0; i < EACH / 2; ++i) halves.two[i] = E::two(x.f[2 * i], x.f[2 * i + 1]);
    *(Halves*)p = halves;
}
DEVICE void write(float* p, const Few& x) {
#pragma unroll
    for (int i = 0; i < EACH; i += 2) *(float2*)(p + i) = make_float2(x.f[i], x.f[i + 1]);
}
DEVICE float sum_of_lanes(float x) {
#pragma unroll
    for (int mask = LANES / 2; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
}
/// GroupNorm of a head whose channels are in the lanes' hands.
DEVICE Few normed(Few x, int channel, float eps, const u16* norm_weight, const u16* norm_bias) {
    const Few weight = read(norm_weight + channel), bias = read(norm_bias + channel);
    float sum = 0.f, squares = 0.f;
    for (int i = 0; i < EACH; ++i) sum += x.f[i];
    const float mean = sum_of_lanes(sum) / N;
    for (int i = 0; i < EACH; ++i) x.f[i] -= mean, squares += x.f[i] * x.f[i];
    const float scale = 1.f / sqrtf(sum_of_lanes(squares) / N + eps);
    for (int i = 0; i < EACH; ++i) x.f[i] = x.f[i] * scale * weight.f[i] + bias.f[i];
    return x;
}
