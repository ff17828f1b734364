// One product of a few hundred rows, see gemm.cuh.
#include "gemm.cuh"

using namespace gemm;

/// output[b, row] = activation(Σ weight[row, c] input[b, c]) for rows b < batch; mode: as in gemv.cuh, gate [batch, stride].
/// Blocks (SPLIT · tasks, BATCH rows).
extern "C" __global__ void __launch_bounds__(THREADS) gemm_product(
    const u16* weight, const Task* tasks, const u16* input, int input_stride, void* output, const u16* gate, int batch, int mode) {
    const int from = blockIdx.y * BATCH;
    Task task = tasks[blockIdx.x / SPLIT];
    task.input += (i64)from * input_stride, task.output += (i64)from * task.stride;
    const Tile tile(task, weight, input, input_stride, batch - from, aligned_shared());
    for (int i = 0; i < LEAD; ++i) tile.fetch_weights(tile.first + i);
    let_next_start();
    wait_for_previous();
    for (int i = 0; i < LEAD; ++i) tile.fetch_input(tile.first + i);
    tile.multiply();
    tile.write(output, gate, mode);
}
