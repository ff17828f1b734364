// A whole step of RWKV-7 for few rows in one launch. All blocks are on the GPU at once, one on each multiprocessor; a piece of
// the step begins when the last block has done the one before it. Weights do not wait for that: each warp's ring is filled
// with those of the next products while blocks wait for each other.
// Macros of gemv.cuh, norm.cuh and wkv7.cuh; -DGEMV_BYTES: of the ring and the sums.
#include "gemv.cuh"
#include "norm.cuh"
#include "wkv7.cuh"

static_assert(gemv::RING_BYTES + sizeof(gemv::Sums) == GEMV_BYTES, "products lie behind it");
constexpr int BLOCK = GEMV_WARPS * 32, HEAD_TEAMS = BLOCK / THREADS, NORM_TEAMS = BLOCK / layer_norm::THREADS;

/// One layer's weights and states beside the matrices of its four products.
struct Layer {
    const u16 *ln1[2], *mixes1, *low_rank, *vectors[VECTORS], *ln2[2], *mixes2;
    u16 *att_shift, *ffn_shift;  // [slots, C]
    Kept* state;  // [slots, H, N, N]
};
/// What stays the same from step to step.
struct Model {
    const gemv::Product* products;  // four a layer: inputs of the time mix, its output, key, value; then the head
    const Layer* layers;
    const u16 *table, *ln_out[2];
    float* x;  // [rows, C]
    u16 *mixed, *rkv, *hidden, *v_first, *att, *normed;  // [6, rows, C], [3, rows, C], [rows, ranks], [rows, C] …
    u32* counts;  // of each piece: blocks that have done their part; zeros at first
    int stride, heads, layer_count;  // stride: rows C
    float eps, heads_eps;
};
union Memory {
    float norm[NORM_TEAMS][layer_norm::THREADS / 32];
    StepOfFew heads[HEAD_TEAMS];
};

extern "C" __global__ void __launch_bounds__(BLOCK) chain7(const Model* where, const i64* tokens, const int* slots, int batch) {
    __shared__ Memory memory;
    const Model m = *where;
    const int C = m.heads * N, count = 4 * m.layer_count + 1, grid = gridDim.x, block = blockIdx.x;
    gemv::Sums& sums = *(gemv::Sums*)(dynamic_shared() + gemv::RING_BYTES);
    gemv::Product* products = (gemv::Product*)(dynamic_shared() + GEMV_BYTES);
    for (int i = threadIdx.x; i < count * (int)sizeof(gemv::Product) / 16; i += BLOCK) ((uint4*)products)[i] = load_weights((const uint4*)m.products + i);
    __syncthreads();
    gemv::Feed feed(products, count, dynamic_shared());

    u32 piece = 0, parts = 0;  // pieces begun; blocks that the last of them has
    // a piece that blocks below `mine` take part in
    const auto wait = [&] {
        if (piece) {
            if (threadIdx.x == 0) wait_until(m.counts + piece - 1, parts);
            __syncthreads();
        }
    };
    const auto done = [&] {
        __syncthreads();
        if (threadIdx.x == 0) add_released(m.counts + piece);
    };
    const auto go_on = [&](int items) { parts = items < grid ? items : grid, ++piece; };
    const auto multiply = [&](int index) {
        const gemv::Product& p = products[index];
        if (p.first_tile() < p.tiles) {
            wait();
            feed.multiply(p, batch, sums);
            done();
        }
        go_on(p.tiles);
    };
    const auto normalise = [&](const layer_norm::Rows& rows) {
        const int team = threadIdx.x / layer_norm::THREADS, row = team * grid + block;
        if (block < batch) {
            if (row < batch) rows.expect(row);
            wait();
            for (int i = row; i < batch; i += NORM_TEAMS * grid) rows.run(i, i + 1, memory.norm[team]);
            done();
        }
        go_on(batch);
    };
    const auto step_heads = [&](const Layer& l, bool is_first) {
        const int items = m.heads * batch, team = threadIdx.x / THREADS;
        StepOfFew& own = memory.heads[team];
        if (block < items) {
#pragma unroll 1
            for (int first = 0; first < items; first += HEAD_TEAMS * grid) {
                const int item = first + team * grid + block, row = item / m.heads, head = item % m.heads;
                const bool is_there = item < items;
                const Maps maps(l.low_rank, C, is_there ? head * N : 0);
                Kept* state = state_of(l.state, slots[is_there ? row : 0], is_there ? head : 0, m.heads);
                if (is_there) {
                    load_vectors(own.step, {l.vectors[0], l.vectors[1], l.vectors[2], l.vectors[3], l.vectors[4], l.vectors[5], l.vectors[6], l.vectors[7]}, head);
                    for (int j = 0; j < PARTS; ++j) bring_to_l2(state + 4 * GROUP * j);
                }
                if (first == 0) wait();
                if (is_there)
                    step_of_few(own, maps, m.rkv, m.stride, m.hidden + (i64)row * Maps::EACH * 32, m.v_first, is_first, state,
                                (i64)row * C + head * N + thread_of_head(), m.heads_eps, m.att);
            }
            done();
        }
        go_on(items);
    };
#pragma unroll 1
    for (int index = 0; index < count; ++index) {  // each product and what comes before it
        const int layer = index / 4, stage = index % 4;
        if (stage == 1) step_heads(m.layers[layer], layer == 0);
        else if (stage != 3) {
            layer_norm::Rows rows = {m.x, m.x, nullptr, tokens, nullptr, nullptr, m.ln_out[0], m.ln_out[1], m.eps, nullptr, 0,
                                     nullptr, nullptr, slots, slots, m.normed, 0};
            if (index < count - 1) {
                const Layer& l = m.layers[layer];
                if (index == 0) rows.table = m.table;
                rows.weight = stage ? l.ln2[0] : l.ln1[0], rows.bias = stage ? l.ln2[1] : l.ln1[1];
                rows.mix = stage ? l.mixes2 : l.mixes1, rows.mixes = stage ? 1 : 6;
                rows.last = rows.next = stage ? l.ffn_shift : l.att_shift;
                rows.out = m.mixed, rows.out_stride = m.stride;
            }
            normalise(rows);
        }
        multiply(index);
    }
}
