// A whole step for few rows in one launch. All blocks are on the GPU at once, one on each multiprocessor; a piece of the step
// begins when the last block has done the one before it. Weights do not wait for that: each warp's ring is filled with those
// of the next products while blocks wait for each other.
// Macros of gemv.cuh and norm.cuh; -DGEMV_BYTES: of the ring and the sums.
#pragma once
#include "gemv.cuh"
#include "norm.cuh"

namespace chain {
static_assert(gemv::RING_BYTES + sizeof(gemv::Sums) == GEMV_BYTES, "the products lie behind them");
constexpr int BLOCK = GEMV_WARPS * 32;

/// One layer's norms and mixes, and the states that they look at [slots, C].
struct Norms {
    const u16 *ln1[2], *mixes1, *ln2[2], *mixes2;
    u16 *att_shift, *ffn_shift;
};
/// What stays the same from step to step.
struct Model {
    const gemv::Product* products;  // some a layer, of which the last two are the channel mix's; then the head
    const Norms* norms;  // of each layer
    const u16 *table, *ln_out[2];
    float* x;  // [rows, C]
    u16 *mixed, *normed;  // [mixes, rows, C], [rows, C]
    u32* counts;  // of each piece: blocks that have done their part; zeros at first
    int stride, layers, mixes1, mixes2;  // stride: rows C
    float eps;
    int unused;
};

struct Chain {
    const Model& m;
    const gemv::Product* products;
    gemv::Feed feed;
    const i64* tokens;
    const int* slots;
    int batch, each;  // products of a layer
    u32 piece, parts;  // pieces begun; blocks that take part in the last of them

    static DEVICE const gemv::Product* copied(const gemv::Product* from, int count) {
        uint4* to = (uint4*)(dynamic_shared() + GEMV_BYTES);
        for (int i = threadIdx.x; i < count * (int)sizeof(gemv::Product) / 16; i += BLOCK) to[i] = load_weights((const uint4*)from + i);
        __syncthreads();
        return (const gemv::Product*)to;
    }
    DEVICE int count() const { return each * m.layers + 1; }
    DEVICE Chain(const Model& model, int each, const i64* tokens, const int* slots, int batch)
        : m(model), products(copied(model.products, each * model.layers + 1)), feed(products, each * model.layers + 1, dynamic_shared()),
          tokens(tokens), slots(slots), batch(batch), each(each), piece(0), parts(0) {}

    DEVICE void wait() {
        if (piece == 0) return;
        if (threadIdx.x == 0) wait_until(m.counts + piece - 1, parts);
        __syncthreads();
    }
    DEVICE void done() {
        __syncthreads();
        if (threadIdx.x == 0) add_released(m.counts + piece);
    }
    DEVICE void go_on(int items) { parts = items < (int)gridDim.x ? items : gridDim.x, ++piece; }

    DEVICE void multiply(int index) {
        const gemv::Product& p = products[index];
        if (p.first_tile() < p.tiles) {
            wait();
            feed.multiply(p, batch, *(gemv::Sums*)(dynamic_shared() + gemv::RING_BYTES));
            done();
        }
        go_on(p.tiles);
    }
    /// work(team, item, expect(team, item)) for each of the items, by teams of threads; `expect` must not look at what the
    /// pieces before this one make.
    template <int TEAM, class Expect, class Work> DEVICE void for_items(int items, Expect expect, Work work) {
        const int team = threadIdx.x / TEAM;
        if ((int)blockIdx.x < items) {
#pragma unroll 1
            for (int first = 0; first < items; first += BLOCK / TEAM * gridDim.x) {
                const int item = first + team * gridDim.x + blockIdx.x;
                const auto expected = expect(team, item < items ? item : 0);
                if (first == 0) wait();
                if (item < items) work(team, item, expected);
            }
            done();
        }
        go_on(items);
    }
    DEVICE void normalise(int index, float (*shared)[layer_norm::THREADS / 32]) {
        layer_norm::Rows rows = {m.x, m.x, nullptr, tokens, nullptr, nullptr, m.ln_out[0], m.ln_out[1], m.eps, nullptr, 0,
                                 nullptr, nullptr, slots, slots, m.normed, 0};
        if (index < count() - 1) {
            const Norms& l = m.norms[index / each];
            const bool is_second = index % each;
            if (index == 0) rows.table = m.table;
            rows.weight = is_second ? l.ln2[0] : l.ln1[0], rows.bias = is_second ? l.ln2[1] : l.ln1[1];
            rows.mix = is_second ? l.mixes2 : l.mixes1, rows.mixes = is_second ? m.mixes2 : m.mixes1;
            rows.last = rows.next = is_second ? l.ffn_shift : l.att_shift;
            rows.out = m.mixed, rows.out_stride = m.stride;
        }
        for_items<layer_norm::THREADS>(
            batch, [&](int, int row) { return rows.expect(row), layer_norm::Held(rows); },
            [&](int team, int row, const layer_norm::Held& weights) { rows.run(row, row + 1, shared[team], weights); });
    }
    /// The step. before(layer, i): the piece before the layer's i-th product, of those between the two norms.
    template <class Before> DEVICE void run(float (*shared)[layer_norm::THREADS / 32], Before before) {
#pragma unroll 1
        for (int index = 0; index < count(); ++index) {
            const int layer = index / each, i = index % each;
            if (i == 0 || i == each - 2) normalise(index, shared);
            else if (i < each - 2) before(layer, i);
            multiply(index);
        }
    }
};
constexpr int NORM_TEAMS = BLOCK / layer_norm::THREADS;
typedef float NormMemory[NORM_TEAMS][layer_norm::THREADS / 32];
}  // namespace chain
