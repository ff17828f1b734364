// Few rows of activations times a matrix of weights, at the speed at which the weights arrive: tensor cores, 16 rows of
// weights and 8 of activations at a time, each warp of a block on its own share of the sum.
//
// Lane 4 g + t reads eight neighbours at column 8 t of each 32: the order within a sum is free, so that serves as the
// fragments of two products (mma.m16n8k16), for weights and activations alike. A row's result does not depend on others.
// -DWARPS a block, -DROW_TILES of 16 a block, -DBATCH_TILES of 8 a block, -DDEPTH: steps of 32 columns on their way.
#include "gpu.cuh"

/// What 16 · ROW_TILES rows of weights do; offsets in elements.
struct Task {
    i64 weight, input, output;  // of the first row of weights, of the activations' first row, of the output's first row
    int columns, activation, stride, unused;  // stride: from one activation row's outputs to the next's
};
enum Output { WRITE, ADD, LOGITS };

/// output[b, row] = activation(Σ weight[row, c] input[b, c]) for b < batch; tasks: one for each block of rows, or null:
/// all rows alike, `columns` wide. mode: WRITE elements of type E, ADD to float32, write float32 LOGITS.
extern "C" __global__ void __launch_bounds__(WARPS * 32) gemv(
    const u16* weight, const Task* tasks, int columns, int activation, const u16* input, int input_stride, void* output,
    int output_stride, int batch, int mode) {
    constexpr int ROWS = 16 * ROW_TILES, BATCH = 8 * BATCH_TILES, SIDE = BATCH + 1;
    __shared__ float sums[WARPS][ROWS][SIDE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const Task task = tasks ? tasks[blockIdx.x]
                            : Task{(i64)blockIdx.x * ROWS * columns, 0, (i64)blockIdx.x * ROWS, columns, activation, output_stride, 0};
    const int steps = task.columns / 32, each = (steps + WARPS - 1) / WARPS;
    const int first = warp * each, end = first + each < steps ? first + each : steps;
    const u16* from = weight + task.weight + (i64)g * task.columns + 8 * t;
    uint4 a[DEPTH][ROW_TILES][2];
    const auto fetch = [&](int slot, int step) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) a[slot][r][h] = load_weights(from + (i64)(16 * r + 8 * h) * task.columns + step * 32);
    };
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (first + i < end) fetch(i, first + i);
    let_next_start();
    wait_for_previous();

    const int row = blockIdx.y * BATCH + g;
    const u16* x = input + task.input + (i64)row * input_stride + 8 * t;
    float c[ROW_TILES][BATCH_TILES][4] = {};
    for (int step = first; step < end; step += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            if (step + i >= end) break;
#pragma unroll
            for (int n = 0; n < BATCH_TILES; ++n) {
                uint4 b = make_uint4(0, 0, 0, 0);
                if (row + 8 * n < batch) b = load_fresh((const void*)(x + (i64)8 * n * input_stride + (step + i) * 32));
                const u32 low[2] = {b.x, b.y}, high[2] = {b.z, b.w};
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) {
                    const uint4 p = a[i][r][0], q = a[i][r][1];
                    const u32 left[4] = {p.x, q.x, p.y, q.y}, right[4] = {p.z, q.z, p.w, q.w};
                    E::multiply(c[r][n], left, low);
                    E::multiply(c[r][n], right, high);
                }
            }
            if (step + i + DEPTH < end) fetch(i, step + i + DEPTH);
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
        else ((float*)output)[to] = sum;
    }
}
