// Few rows of activations times a matrix of weights, at the speed at which the weights arrive: tensor cores, 16 rows of
// weights and 8 of activations at a time, each warp of a block on its own share of the sum.
//
// Lane 4 g + t reads 16 bytes of neighbours in each step of 64: the order within a sum is free, so that they serve as the
// fragments of two products or four (mma.m16n8k16), for weights and activations alike. A row's result does not depend on others.
//
// Blocks stay and take tile after tile. Weights arrive through a ring in shared memory of which each lane reads what it
// asked for itself: nothing is waited for but the oldest copy, and copies for the next tile start before this one is done;
// those for the first, before the kernel in front has ended.
// -DGEMV_WARPS a block, -DROW_TILES of 16 a block, -DBATCH_TILES of 8 a block, -DDEPTH: steps on their way; -DWEIGHT_BITS: 16, or 8 with
// a scale for each row: bytes that are 128 too large or, with -DFLOAT8, of type e4m3, with scales for 1/256 of them (float16 only).
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
    DEVICE Task task(int tile) const;
};

constexpr int WARPS = GEMV_WARPS, ROWS = 16 * ROW_TILES, BATCH = 8 * BATCH_TILES, SIDE = BATCH + 1;
constexpr int STEP = 512 / WEIGHT_BITS, LOADS = STEP / 32;  // columns of a step; loads of activations for them
constexpr int GROUP = LOADS * BATCH_TILES < 4 ? 4 / BATCH_TILES / LOADS : 1;  // steps of which a warp holds the activations
typedef float Sums[WARPS][ROWS][SIDE];
constexpr int RING_BYTES = WARPS * DEPTH * ROW_TILES * 1024;

DEVICE Task Product::task(int tile) const {
    return tasks ? tasks[tile] : Task{(i64)tile * ROWS * columns, 0, (i64)tile * ROWS, columns, activation, output_stride, tile * ROWS};
}

#ifdef FLOAT8
DEVICE void widened(u32 x, u32& low, u32& high) { widen_float8(x, low, high); }
#else
DEVICE void widened(u32 x, u32& low, u32& high) { widen_int8(x, low, high); }
#endif

/// A warp's share of one tile.
struct Share {
    int step, end;
    DEVICE explicit Share(int columns) {
        const int warp = threadIdx.x / 32, steps = columns / STEP, each = (steps + WARPS - 1) / WARPS;
        step = warp * each, end = step + each < steps ? step + each : steps;
    }
};

/// The weights of a product on their way.
struct Feed {
    const Product& p;
    uint4* ring;  // [DEPTH][2 · ROW_TILES][32 lanes] of the warp
    int tile, step, end, columns, slot;
    const char* from;

    /// memory: RING_BYTES, 128-byte aligned.
    DEVICE Feed(const Product& product, char* memory) : p(product), tile(blockIdx.x), step(0), end(0), slot(0) {
        ring = (uint4*)memory + threadIdx.x / 32 * DEPTH * ROW_TILES * 64 + threadIdx.x % 32;
        enter();
        find();
        for (int i = 0; i < DEPTH; ++i) fetch(i);
    }
    DEVICE void enter() {
        if (tile >= p.tiles) return;
        const int lane = threadIdx.x % 32;
        const Task task = p.task(tile);
        const Share share(task.columns);
        step = share.step, end = share.end, columns = task.columns;
        from = (const char*)p.weight + (task.weight + (i64)(lane / 4) * columns) * (WEIGHT_BITS / 8) + 16 * (lane % 4);
    }
    DEVICE void find() {  // the next tile in which this warp has a share
        while (tile < p.tiles && step >= end) tile += gridDim.x, enter();
    }
    DEVICE void fetch(int to) {
        if (tile < p.tiles) {
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; ++i)
                copy_async(ring + (to * 2 * ROW_TILES + i) * 32, from + (i64)i * columns * WEIGHT_BITS + step * 64, true);
            ++step;
            find();
        }
        commit_copies();
    }

    DEVICE void multiply(int batch, Sums& sums) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
        const int row = blockIdx.y * BATCH + g;
        const u16* x = p.input + (i64)row * p.input_stride + STEP / 4 * t;
        for (int mine = blockIdx.x; mine < p.tiles; mine += gridDim.x) {
            const Task task = p.task(mine);
            const Share share(task.columns);
            float c[ROW_TILES][BATCH_TILES][4] = {};
            for (int first = share.step; first < share.end; first += GROUP) {
                uint4 b[GROUP][BATCH_TILES][LOADS];  // activations
#pragma unroll
                for (int i = 0; i < GROUP; ++i)
#pragma unroll
                    for (int n = 0; n < BATCH_TILES; ++n)
#pragma unroll
                        for (int j = 0; j < LOADS; ++j) {
                            b[i][n][j] = make_uint4(0, 0, 0, 0);
                            if (first + i < share.end && row + 8 * n < batch)
                                b[i][n][j] = load_fresh((const void*)(x + task.input + (i64)8 * n * p.input_stride + (first + i) * STEP + 8 * j));
                        }
#pragma unroll
                for (int i = 0; i < GROUP; ++i) {
                    if (first + i >= share.end) break;
                    await_all_but<DEPTH - 1>();
#pragma unroll
                    for (int r = 0; r < ROW_TILES; ++r) {
                        const uint4 v = ring[(slot * 2 * ROW_TILES + 2 * r) * 32], w = ring[(slot * 2 * ROW_TILES + 2 * r + 1) * 32];
                        const u32 words[2][4] = {{v.x, v.y, v.z, v.w}, {w.x, w.y, w.z, w.w}};
#pragma unroll
                        for (int j = 0; j < 2 * LOADS; ++j) {  // 16 columns
                            u32 a[4];
                            if (WEIGHT_BITS == 16) a[0] = words[0][2 * j], a[1] = words[1][2 * j], a[2] = words[0][2 * j + 1], a[3] = words[1][2 * j + 1];
                            else widened(words[0][j], a[0], a[2]), widened(words[1][j], a[1], a[3]);
#pragma unroll
                            for (int n = 0; n < BATCH_TILES; ++n) {
                                const uint4 z = b[i][n][j / 2];
                                const u32 part[2] = {j % 2 ? z.z : z.x, j % 2 ? z.w : z.y};
                                E::multiply(c[r][n], a, part);
                            }
                        }
                    }
                    fetch(slot);
                    slot = slot + 1 < DEPTH ? slot + 1 : 0;
                }
            }
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (int n = 0; n < BATCH_TILES; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[warp][16 * r + g + i / 2 * 8][8 * n + 2 * t + i % 2] = c[r][n][i];
            __syncthreads();
            for (int i = threadIdx.x; i < ROWS * BATCH; i += WARPS * 32) write(task, batch, sums, i);
            __syncthreads();
        }
    }
    /// Output i of a tile.
    DEVICE void write(const Task& task, int batch, const Sums& sums, int i) const {
        const int at = blockIdx.y * BATCH + i / ROWS;
        if (at >= batch) return;
        const i64 to = task.output + (i64)at * task.stride + i % ROWS;
        const float old = p.mode == ADD || p.mode == GATED ? load_fresh((const float*)p.output + to) : 0.f;
        const float open = p.mode == GATED ? E::wide(load_fresh(p.gate + to)) : 1.f;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w][i % ROWS][i / ROWS];
        if (WEIGHT_BITS == 8) sum *= p.scales[task.row + i % ROWS];
        sum = activated(sum, task.activation);
        if (p.mode == WRITE) ((u16*)p.output)[to] = narrow(sum);
        else ((float*)p.output)[to] = old + open * sum;
    }
};
}  // namespace gemv
