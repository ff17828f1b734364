// Residual sum, layer norm, token shift and its mixes in one pass over the rows of x. -DWIDTH: channels, a multiple of 8.
#pragma once
#include "gpu.cuh"

namespace layer_norm {
constexpr int GROUPS = WIDTH / 8, THREADS = GROUPS < 256 ? (GROUPS + 31) / 32 * 32 : 256, EACH = (GROUPS + THREADS - 1) / THREADS;

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
    /// What a row is made of, not yet widened: that would wait for it.
    struct Ahead {
        uint4 x[EACH][2], more[EACH], open[EACH];
        int begins, ends;
    };
    DEVICE void fetch(Ahead& a, int row) const {
        if (mixes) a.begins = begins[row], a.ends = ends[row];
        const i64 at = (i64)row * WIDTH, from = table ? tokens[row] * WIDTH : at;
        for_groups([&](int i, int c) {
            if (table) a.x[i][0] = load_fresh((const void*)(table + from + c));
            else a.x[i][0] = load_fresh((const void*)(x + at + c)), a.x[i][1] = load_fresh((const void*)(x + at + c + 4));
            if (delta) a.more[i] = load_fresh((const void*)(delta + at + c));
            if (gate) a.open[i] = load_fresh((const void*)(gate + at + c));
        });
    }
    /// The norm of a row; where `keeps`, its sum is written.
    template <class Weights> DEVICE void take(Row& now, const Ahead& a, int row, bool keeps, float* shared, const Weights& weights) const {
        for_groups([&](int i, int c) {
            if (table) {
                const Eight eight(a.x[i][0]);
                for (int j = 0; j < 8; ++j) now[i][j] = eight.f[j];
            } else
                for (int h = 0; h < 2; ++h) {
                    now[i][4 * h] = __uint_as_float(a.x[i][h].x), now[i][4 * h + 1] = __uint_as_float(a.x[i][h].y);
                    now[i][4 * h + 2] = __uint_as_float(a.x[i][h].z), now[i][4 * h + 3] = __uint_as_float(a.x[i][h].w);
                }
            if (delta) {
                Eight more(a.more[i]);
                if (gate) {
                    const Eight open(a.open[i]);
                    for (int j = 0; j < 8; ++j) more.f[j] *= sigmoid(open.f[j]);
                }
                for (int j = 0; j < 8; ++j) now[i][j] += more.f[j];
            }
            if (keeps && (table || delta))
                for (int h = 0; h < 2; ++h) *(float4*)(sum + (i64)row * WIDTH + c + 4 * h) = make_float4(now[i][4 * h], now[i][4 * h + 1], now[i][4 * h + 2], now[i][4 * h + 3]);
        });
        normalise(now, eps, shared);
        for_groups([&](int i, int c) {
            const Eight w(weights.scale(i, c)), b(weights.shift(i, c));
            for (int j = 0; j < 8; ++j) now[i][j] = now[i][j] * w.f[j] + b.f[j];
        });
    }
    /// shared: THREADS / 32 numbers of the team. weights: Held or Direct. A row is on its way while the one before it is mixed.
    template <class Weights> DEVICE void run(int first, int end, float* shared, const Weights& weights) const {
        Row now, before;
        Ahead here, next;
        fetch(here, first);
        for (int row = first; row < end; ++row) {
            if (mixes && here.begins >= 0) load_row(before, last + (i64)here.begins * WIDTH);
            else if (mixes && row == first) {
                fetch(next, row - 1);
                take(before, next, row - 1, false, shared, weights);
            }
            if (row + 1 < end) fetch(next, row + 1);
            take(now, here, row, true, shared, weights);
            if (mixes && here.ends >= 0) store_row(this->next + (i64)here.ends * WIDTH, now);
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
            here = next;
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
