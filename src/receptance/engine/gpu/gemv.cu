// One product, see gemv.cuh.
#include "gemv.cuh"

using namespace gemv;
static_assert(RING_BYTES + sizeof(Sums) == SHARED_BYTES, "the launch must give this much");

/// See Product; for rows b < batch. Blocks (·, BATCH rows).
extern "C" __global__ void __launch_bounds__(GEMV_WARPS * 32) gemv_product(
    const void* weight, const float* scales, const Task* tasks, int columns, int activation, const u16* input, int input_stride,
    void* output, int output_stride, const u16* gate, int batch, int mode, int tiles) {
    const Product product = {weight, scales, tasks, input, output, gate, columns, activation, input_stride, output_stride, mode, tiles};
    Feed feed(product, dynamic_shared());
    let_next_start();
    wait_for_previous();
    feed.multiply(batch, *(Sums*)(dynamic_shared() + RING_BYTES));
}
