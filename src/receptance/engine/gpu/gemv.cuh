// Few rows of activations times a matrix of weights, at the speed at which the weights arrive: tensor cores, 16 rows of
// weights and 8 of activations at a time, each warp of a block on its own share of the sum.
//
// Lane 4 g + t reads eight neighbours at column 8 t of each 32: the order within a sum is free, so that serves as the
// fragments of two products (mma.m16n8k16), for weights and activations alike. A row's result does not depend on others.
//
// Blocks stay and take tile after tile, of one product after another. Weights arrive through a ring in shared memory of which each lane reads what it
// asked for itself: nothing is waited for but the oldest copy, and copies for the next tile start before this one is done;
// those for the first, before the kernel in front has ended.
// -DGEMV_WARPS a block, -DROW_TILES of 16 a block, -DBATCH_TILES of 8 a block, -DDEPTH: steps of 32 columns on their way,
// -DIS_CHAIN: of chain.cuh, 0 or 1; -DWEIGHT_BITS: 16, or 8 with a scale for each row (bytes that are 128 too large; float16 only).
#pragma once
#include "gpu.cuh"

namespace gemv {
/// What 16 · ROW_TILES rows of weights do; offsets in elements.
struct Task {
    i64 weight, input, output;  // of the first row of weights, of the activations' first row, of the output's first row
    int columns, activation, stride, row;  // stride: from one activation row's outputs to the next's; row of the matrix
};
enum Mode { WRITE, ADD, LOGITS, GATED };

/// output[b, row] = activation(Σ weight[row, c] input[b, c]); tasks: one for each tile of rows, or null: all rows alike,
/// `columns` wide. mode: WRITE elements of type E, ADD to float32, write float32 LOGITS, or add times gate [batch, rows].
struct Product {
    const void* weight;
    const float* scales;  // of the matrix's rows, where weights have 8 bits
    const Task* tasks;
    const u16* input;
    void* output;
    const u16* gate;
    int columns, activation, input_stride, output_stride, mode, tiles;
    int first, unused;  // first: the block that takes tile 0; the others go on from there
    DEVICE Task task(int tile) const;
    DEVICE int first_tile() const { return (int)blockIdx.x >= first ? blockIdx.x - first : blockIdx.x + gridDim.x - first; }
};

constexpr int WARPS = GEMV_WARPS, ROWS = 16 * ROW_TILES, BATCH = 8 * BATCH_TILES, SIDE = BATCH + 1;
constexpr int STEP = 512 / WEIGHT_BITS, LOADS = STEP / 32;  // columns of a step; loads of activations for them
constexpr int GROUP = LOADS * BATCH_TILES < 4 ? 4 / BATCH_TILES / LOADS : 1;  // steps of which a warp holds the activations
static_assert(!IS_CHAIN || ROWS * BATCH <= WARPS * 32, "in a chain each thread has at most one of a tile's outputs");
typedef float Sums[IS_CHAIN ? 2 : 1][WARPS][ROWS][SIDE];
constexpr int RING_BYTES = WARPS * DEPTH * ROW_TILES * 1024;

DEVICE Task Product::task(int tile) const {
    return tasks ? tasks[tile] : Task{(i64)tile * ROWS * columns, 0, (i64)tile * ROWS, columns, activation, output_stride, tile * ROWS};
}

struct Group { uint4 x[GROUP][BATCH_TILES][LOADS]; };
/// A warp's share of one tile.
struct Share {
    int step, end;
    DEVICE explicit Share(int columns) {
        const int warp = threadIdx.x / 32, steps = columns / STEP, each = (steps + WARPS - 1) / WARPS;
        step = warp * each, end = step + each < steps ? step + each : steps;
    }
};

/// The weights of some products on their way, one share after another.
struct Feed {
    const Product* products;  // [count], each with tiles for at least one block
    uint4* ring;  // [DEPTH][2 · ROW_TILES][32 lanes] of the warp
    int count, product, tile, step, end, columns, slot;
    const char* from;

    /// memory: RING_BYTES, 128-byte aligned.
    DEVICE Feed(const Product* products, int count, char* memory) : products(products), count(count), product(0), slot(0) {
        ring = (uint4*)memory + threadIdx.x / 32 * DEPTH * ROW_TILES * 64 + threadIdx.x % 32;
        tile = products[0].first_tile(), step = end = 0;
        enter();
        find();
        for (int i = 0; i < DEPTH; ++i) fetch(i);
    }
    DEVICE void enter() {
        if (product >= count || tile >= products[product].tiles) return;
        const Product& p = products[product];
        const int lane = threadIdx.x % 32;
        const Task task = p.task(tile);
        const Share share(task.columns);
        step = share.step, end = share.end, columns = task.columns;
        from = (const char*)p.weight + (task.weight + (i64)(lane / 4) * columns) * (WEIGHT_BITS / 8) + 16 * (lane % 4);
    }
    DEVICE void find() {  // the next tile in which this warp has a share
        while (product < count && step >= end) {
            tile += gridDim.x;
            while (tile >= products[product].tiles && ++product < count) tile = products[product].first_tile();
            enter();
        }
    }
    DEVICE void fetch(int to) {
        if (product < count) {
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; ++i)
                copy_async(ring + (to * 2 * ROW_TILES + i) * 32, from + (i64)i * columns * WEIGHT_BITS + step * 64, true);
            ++step;
            find();
        }
        commit_copies();
    }

    /// Outputs of a tile: element i of them, with what they are added to.
    struct Output {
        i64 to;
        float old, open;
        bool is_there;
        DEVICE Output(const Product& p, const Task& task, int batch, int i) {
            const int at = blockIdx.y * BATCH + i / ROWS;
            is_there = i < ROWS * BATCH && at < batch;
            to = task.output + (i64)at * task.stride + i % ROWS;
            old = is_there && (p.mode == ADD || p.mode == GATED) ? load_fresh((const float*)p.output + to) : 0.f;
            open = is_there && p.mode == GATED ? E::wide(load_fresh(p.gate + to)) : 1.f;
        }
        DEVICE void write(const Product& p, const Task& task, const float (&sums)[WARPS][ROWS][SIDE], int i) const {
            if (!is_there) return;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += sums[w][i % ROWS][i / ROWS];
            if (WEIGHT_BITS == 8) sum *= p.scales[task.row + i % ROWS];
            sum = activated(sum, task.activation);
            if (p.mode == WRITE) ((u16*)p.output)[to] = narrow(sum);
            else ((float*)p.output)[to] = p.mode == ADD ? old + sum : p.mode == GATED ? old + open * sum : sum;
        }
    };

    /// One product, the next of those in `products`, for rows blockIdx.y · BATCH and on of `batch`.
    DEVICE void multiply(const Product& p, int batch, Sums& sums) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        const int row = blockIdx.y * BATCH + g;
        const Share share(p.columns);
        const u16* x = p.input + (i64)row * p.input_stride + STEP / 4 * t;
        Group b, coming;  // activations
        const auto load = [&](Group& to, i64 input, int step) {
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
#pragma unroll
                for (int n = 0; n < BATCH_TILES; ++n)
#pragma unroll
                    for (int j = 0; j < LOADS; ++j) {
                        to.x[i][n][j] = make_uint4(0, 0, 0, 0);
                        if (step + i < share.end && row + 8 * n < batch)
                            to.x[i][n][j] = load_fresh((const void*)(x + input + (i64)8 * n * p.input_stride + (step + i) * STEP + 8 * j));
                    }
        };
        int buffer = 0, tile = p.first_tile();
        Task task = p.task(tile);
        if (IS_CHAIN) load(b, task.input, share.step);
        while (tile < p.tiles) {
            const int next_tile = tile + gridDim.x;
            const Task next_task = next_tile < p.tiles ? p.task(next_tile) : task;
            const Output mine(p, task, IS_CHAIN ? batch : 0, threadIdx.x);
            float c[ROW_TILES][BATCH_TILES][4] = {};
            for (int step = share.step; step < share.end; step += GROUP) {
                if (!IS_CHAIN) load(b, task.input, step);  // two blocks share a multiprocessor's registers
                else if (step + GROUP < share.end) load(coming, task.input, step + GROUP);
                else if (next_tile < p.tiles) load(coming, next_task.input, share.step);
#pragma unroll
                for (int i = 0; i < GROUP; ++i) {
                    if (step + i >= share.end) break;
                    await_all_but<DEPTH - 1>();
#pragma unroll
                    for (int r = 0; r < ROW_TILES; ++r) {
                        const uint4 p = ring[(slot * 2 * ROW_TILES + 2 * r) * 32], q = ring[(slot * 2 * ROW_TILES + 2 * r + 1) * 32];
                        const u32 words[2][4] = {{p.x, p.y, p.z, p.w}, {q.x, q.y, q.z, q.w}};
#pragma unroll
                        for (int j = 0; j < 2 * LOADS; ++j) {  // 16 columns
                            u32 a[4];
                            if (WEIGHT_BITS == 16) a[0] = words[0][2 * j], a[1] = words[1][2 * j], a[2] = words[0][2 * j + 1], a[3] = words[1][2 * j + 1];
                            else widen(words[0][j], a[0], a[2]), widen(words[1][j], a[1], a[3]);
#pragma unroll
                            for (int n = 0; n < BATCH_TILES; ++n) {
                                const uint4 y = b.x[i][n][j / 2];
                                const u32 x[2] = {j % 2 ? y.z : y.x, j % 2 ? y.w : y.y};
                                E::multiply(c[r][n], a, x);
                            }
                        }
                    }
                    fetch(slot);
                    slot = slot + 1 < DEPTH ? slot + 1 : 0;
                }
                if (IS_CHAIN) b = coming;
            }
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (int n = 0; n < BATCH_TILES; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[buffer][warp][16 * r + g + i / 2 * 8][8 * n + 2 * t + i % 2] = c[r][n][i];
            __syncthreads();
            if (IS_CHAIN) mine.write(p, task, sums[buffer], threadIdx.x);
            else
                for (int i = threadIdx.x; i < ROWS * BATCH; i += WARPS * 32) Output(p, task, batch, i).write(p, task, sums[buffer], i);
            if (!IS_CHAIN) __syncthreads();
            else buffer ^= 1;  // which no thread reads any more when all have come to the next barrier
            tile = next_tile, task = next_task;
        }
    }
};
}  // namespace gemv
