// Few rows of activations times a matrix of weights, at the speed at which the weights arrive: tensor cores, 16 rows of
// weights and 8 of activations at a time, each warp of a block on its own share of the sum.
//
// Lane 4 g + t reads eight neighbours at column 8 t of each 32: the order within a sum is free, so that serves as the
// fragments of two products (mma.m16n8k16), for weights and activations alike. A row's result does not depend on others.
//
// Blocks stay and take tile after tile. Weights arrive through a ring in shared memory of which each lane reads what it
// asked for itself: nothing is waited for but the oldest copy, and copies for the next tile start before this one is done;
// those for the first, before the kernel in front has ended.
// -DWARPS a block, -DROW_TILES of 16 a block, -DBATCH_TILES of 8 a block, -DDEPTH: steps of 32 columns on their way.
#include "gpu.cuh"

/// What 16 · ROW_TILES rows of weights do; offsets in elements.
struct Task {
    i64 weight, input, output;  // of the first row of weights, of the activations' first row, of the output's first row
    int columns, activation, stride, unused;  // stride: from one activation row's outputs to the next's
};
enum Output { WRITE, ADD, LOGITS, GATED };

constexpr int ROWS = 16 * ROW_TILES, BATCH = 8 * BATCH_TILES, SIDE = BATCH + 1, GROUP = BATCH_TILES < 4 ? 4 / BATCH_TILES : 1;
typedef float Sums[WARPS][ROWS][SIDE];
constexpr int RING_BYTES = WARPS * DEPTH * ROW_TILES * 1024;
static_assert(RING_BYTES + sizeof(Sums) == SHARED_BYTES, "the launch must give this much");

/// A warp's share of one tile after another.
struct Cursor {
    const u16* from;
    int tile, step, end, columns;
};

/// output[b, row] = activation(Σ weight[row, c] input[b, c]) for b < batch; tasks: one for each tile of rows, or null: all
/// rows alike, `columns` wide. mode: WRITE elements of type E, ADD to float32, write float32 LOGITS, or add times
/// gate [batch, rows].
extern "C" __global__ void __launch_bounds__(WARPS * 32) gemv(
    const u16* weight, const Task* tasks, int columns, int activation, const u16* input, int input_stride, void* output,
    int output_stride, const u16* gate, int batch, int mode, int tiles) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    uint4* ring = (uint4*)dynamic_shared() + warp * DEPTH * ROW_TILES * 64 + lane;  // [DEPTH][2 · ROW_TILES][32 lanes]
    Sums& sums = *(Sums*)(dynamic_shared() + RING_BYTES);
    const auto task_of = [&](int tile) {
        return tasks ? tasks[tile] : Task{(i64)tile * ROWS * columns, 0, (i64)tile * ROWS, columns, activation, output_stride, 0};
    };
    const auto enter = [&](Cursor& x, const Task& task) {
        const int steps = task.columns / 32, each = (steps + WARPS - 1) / WARPS;
        x.step = warp * each, x.end = x.step + each < steps ? x.step + each : steps, x.columns = task.columns;
        x.from = weight + task.weight + (i64)g * task.columns + 8 * t;
    };
    Cursor next = {};
    const auto find = [&] {  // the next tile in which this warp has a share
        while (next.tile < tiles && next.step >= next.end) {
            next.tile += gridDim.x;
            if (next.tile < tiles) enter(next, task_of(next.tile));
        }
    };
    const auto fetch = [&](int slot) {
        if (next.tile < tiles) {
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; ++i)
                copy_async(ring + (slot * 2 * ROW_TILES + i) * 32, next.from + (i64)8 * i * next.columns + next.step * 32, true);
            ++next.step;
            find();
        }
        commit_copies();
    };
    next.tile = blockIdx.x;
    if (next.tile < tiles) enter(next, task_of(next.tile));
    find();
    for (int i = 0; i < DEPTH; ++i) fetch(i);
    let_next_start();
    wait_for_previous();

    const int row = blockIdx.y * BATCH + g;
    int slot = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Task task = task_of(tile);
        Cursor now;
        enter(now, task);
        const u16* x = input + task.input + (i64)row * input_stride + 8 * t;
        float c[ROW_TILES][BATCH_TILES][4] = {};
        for (int step = now.step; step < now.end; step += GROUP) {
            uint4 b[GROUP][BATCH_TILES];
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
#pragma unroll
                for (int n = 0; n < BATCH_TILES; ++n) {
                    b[i][n] = make_uint4(0, 0, 0, 0);
                    if (step + i < now.end && row + 8 * n < batch)
                        b[i][n] = load_fresh((const void*)(x + (i64)8 * n * input_stride + (step + i) * 32));
                }
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                if (step + i >= now.end) break;
                await_all_but<DEPTH - 1>();
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) {
                    const uint4 p = ring[(slot * 2 * ROW_TILES + 2 * r) * 32], q = ring[(slot * 2 * ROW_TILES + 2 * r + 1) * 32];
                    const u32 left[4] = {p.x, q.x, p.y, q.y}, right[4] = {p.z, q.z, p.w, q.w};
#pragma unroll
                    for (int n = 0; n < BATCH_TILES; ++n) {
                        const u32 low[2] = {b[i][n].x, b[i][n].y}, high[2] = {b[i][n].z, b[i][n].w};
                        E::multiply(c[r][n], left, low);
                        E::multiply(c[r][n], right, high);
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
        for (int i = threadIdx.x; i < ROWS * BATCH; i += WARPS * 32) {
            const int r = i % ROWS, b = i / ROWS, at = blockIdx.y * BATCH + b;
            if (at >= batch) break;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += sums[w][r][b];
            const i64 to = task.output + (i64)at * task.stride + r;
            sum = activated(sum, task.activation);
            if (mode == WRITE) ((u16*)output)[to] = narrow(sum);
            else if (mode == ADD) ((float*)output)[to] = load_fresh((const float*)output + to) + sum;
            else if (mode == GATED) ((float*)output)[to] = load_fresh((const float*)output + to) + E::wide(load_fresh(gate + to)) * sum;
            else ((float*)output)[to] = sum;
        }
        __syncthreads();
    }
}
