// Residual sum, layer norm, token shift and its mixes in one pass over the rows of x. -DWIDTH: channels, a multiple of 8.
#pragma once
#include "gpu.cuh"

namespace layer_norm {
constexpr int THREADS = 256, GROUPS = WIDTH / 8, EACH = (GROUPS + THREADS - 1) / THREADS;

/// One row's channels in a thread's registers: groups thread, thread + THREADS, … of eight.
typedef float Row[EACH][8];
template <class Body> DEVICE void for_groups(Body body) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int group = i * THREADS + team_thread<THREADS>();
        if (group < GROUPS) body(i, group * 8);
    }
}
DEVICE float sum_of_block(float x, float* shared) {
    x = sum_of_warp(x);
    team_sync<THREADS>();
    const int thread = team_thread<THREADS>();
    if (thread % 32 == 0) shared[thread / 32] = x;
    team_sync<THREADS>();
    float sum = 0.f;
    for (int i = 0; i < THREADS / 32; ++i) sum += shared[i];
    return sum;
}
DEVICE void normalise(Row& x, float eps, float* shared) {
    float sum = 0.f, squares = 0.f;
    for_groups([&](int i, int) { for (int j = 0; j < 8; ++j) sum += x[i][j]; });
    const float mean = sum_of_block(sum, shared) / WIDTH;
    for_groups([&](int i, int) { for (int j = 0; j < 8; ++j) x[i][j] -= mean, squares += x[i][j] * x[i][j]; });
    const float variance = sum_of_block(squares, shared) / WIDTH + eps;
    const float scale = 1.f / sqrtf(variance);
    for_groups([&](int i, int) { for (int j = 0; j < 8; ++j) x[i][j] *= scale; });
}
DEVICE void load_row(Row& x, const u16* p) {
    for_groups([&](int i, int c) {
        const Eight eight(load_fresh((const void*)(p + c)));
        for (int j = 0; j < 8; ++j) x[i][j] = eight.f[j];
    });
}
DEVICE void load_row(Row& x, const float* p) {
    for_groups([&](int i, int c) {
        for (int h = 0; h < 2; ++h) {
            const uint4 four = load_fresh((const void*)(p + c + 4 * h));
            x[i][4 * h] = __uint_as_float(four.x), x[i][4 * h + 1] = __uint_as_float(four.y);
            x[i][4 * h + 2] = __uint_as_float(four.z), x[i][4 * h + 3] = __uint_as_float(four.w);
        }
    });
}
DEVICE void store_row(u16* p, const Row& x) {
    for_groups([&](int i, int c) { *(uint4*)(p + c) = packed(x[i]); });
}

/// For every row of x [rows, C], float32:
///   sum = table[token] (table: [V, C] or null) or x + delta sigmoid(gate) (delta, gate: [rows, C] or null);
///   n = norm(sum) weight + bias
///   out[m] = n + (p - n) mix[m], where p is n of the row before; a row with begins[row] >= 0 takes it from
///   last[begins[row]] and one with ends[row] >= 0 leaves n in next[ends[row]]. mixes = 0: out = n.
/// mix [mixes, C]; out [mixes, out_stride] of rows. A team of threads does the rows from first to end, from the second on with the
/// row before at hand; where no row looks at its neighbour, sum may be x and next may be last.
constexpr int MOST_MIXES = 6;
struct Rows {
    const float* x;
    float* sum;
    const u16* table;
    const i64* tokens;
    const u16 *delta, *gate, *weight, *bias;
    float eps;
    const u16* mix;
    int mixes;
    const u16* last;
    u16* next;
    const int *begins, *ends;
    u16* out;
    int out_stride;

    /// Has what the row's state gives on its way.
    DEVICE void expect(int row) const {
        const int thread = team_thread<THREADS>();
        if (mixes && begins[row] >= 0 && thread * 64 < WIDTH) bring_to_l2(last + (i64)begins[row] * WIDTH + thread * 64);
    }
    /// shared: THREADS / 32 numbers of the team. weights: Held or Direct.
    template <class Weights> DEVICE void run(int first, int end, float* shared, const Weights& weights) const {
        Row now, before;
        const auto take = [&](int row, bool keeps) {
            if (table) load_row(now, table + tokens[row] * WIDTH);
            else load_row(now, x + (i64)row * WIDTH);
            if (delta) {
                Row more;
                load_row(more, delta + (i64)row * WIDTH);
                if (gate) {
                    Row open;
                    load_row(open, gate + (i64)row * WIDTH);
                    for_groups([&](int i, int) { for (int j = 0; j < 8; ++j) more[i][j] *= sigmoid(open[i][j]); });
                }
                for_groups([&](int i, int) { for (int j = 0; j < 8; ++j) now[i][j] += more[i][j]; });
            }
            if (keeps && (table || delta))
                for_groups([&](int i, int c) {
                    for (int h = 0; h < 2; ++h) *(float4*)(sum + (i64)row * WIDTH + c + 4 * h) = make_float4(now[i][4 * h], now[i][4 * h + 1], now[i][4 * h + 2], now[i][4 * h + 3]);
                });
            normalise(now, eps, shared);
            for_groups([&](int i, int c) {
                const Eight w(weights.scale(i, c)), b(weights.shift(i, c));
                for (int j = 0; j < 8; ++j) now[i][j] = now[i][j] * w.f[j] + b.f[j];
            });
        };
        for (int row = first; row < end; ++row) {
            if (mixes && begins[row] >= 0) load_row(before, last + (i64)begins[row] * WIDTH);
            else if (mixes && row == first) {
                take(row - 1, false);
                for_groups([&](int i, int) { for (int j = 0; j < 8; ++j) before[i][j] = now[i][j]; });
            }
            take(row, true);
            if (mixes && ends[row] >= 0) store_row(next + (i64)ends[row] * WIDTH, now);
            if (!mixes) store_row(out + (i64)row * WIDTH, now);
#pragma unroll
            for (int m = 0; m < MOST_MIXES; ++m)
                if (m < mixes) for_groups([&](int i, int c) {
                    const Eight mu(weights.mix(m, i, c));
                    float mixed[8];
                    for (int j = 0; j < 8; ++j) mixed[j] = now[i][j] + (before[i][j] - now[i][j]) * mu.f[j];
                    *(uint4*)(out + (i64)m * out_stride + (i64)row * WIDTH + c) = packed(mixed);
                });
            for_groups([&](int i, int) { for (int j = 0; j < 8; ++j) before[i][j] = now[i][j]; });
        }
    }
};
/// A thread's weights, fetched before they are needed; or where they are.
struct Held {
    uint4 scales[EACH], shifts[EACH], mixes[MOST_MIXES][EACH];
    DEVICE explicit Held(const Rows& rows) {
        for_groups([&](int i, int c) {
            scales[i] = load_weights(rows.weight + c), shifts[i] = load_weights(rows.bias + c);
#pragma unroll
            for (int m = 0; m < MOST_MIXES; ++m)
                if (m < rows.mixes) mixes[m][i] = load_weights(rows.mix + (i64)m * WIDTH + c);
        });
    }
    DEVICE uint4 scale(int i, int) const { return scales[i]; }
    DEVICE uint4 shift(int i, int) const { return shifts[i]; }
    DEVICE uint4 mix(int m, int i, int) const { return mixes[m][i]; }
};
struct Direct {
    const Rows& rows;
    DEVICE uint4 scale(int, int c) const { return load_weights(rows.weight + c); }
    DEVICE uint4 shift(int, int c) const { return load_weights(rows.bias + c); }
    DEVICE uint4 mix(int m, int, int c) const { return load_weights(rows.mix + (i64)m * WIDTH + c); }
};
}  // namespace layer_norm
