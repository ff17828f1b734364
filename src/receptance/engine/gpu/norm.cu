// Residual sum, layer norm, token shift and its mixes in one pass over the rows of x; activations.
#include "norm.cuh"

#define PARAMETERS                                                                                                              \
    const float *x, float *sum, const u16 *table, const i64 *tokens, const u16 *delta, const u16 *gate, const u16 *weight,        \
        const u16 *bias, float eps, const u16 *mix, int mixes, const u16 *last, u16 *next, const int *begins, const int *ends,     \
        u16 *out, int out_stride
#define ROWS {x, sum, table, tokens, delta, gate, weight, bias, eps, mix, mixes, last, next, begins, ends, out, out_stride}

/// See layer_norm::Rows. A block does `each` rows.
extern "C" __global__ void __launch_bounds__(layer_norm::THREADS) norm_mix(PARAMETERS, int rows, int each) {
    __shared__ float shared[layer_norm::THREADS / 32];
    const int first = blockIdx.x * each, end = first + each < rows ? first + each : rows;
    const layer_norm::Rows task = ROWS;
    let_next_start();
    if (layer_norm::EACH <= 2) {  // weights that fit in registers
        const layer_norm::Held weights(task);
        wait_for_previous();
        task.run(first, end, shared, weights);
    } else {
        wait_for_previous();
        task.run(first, end, shared, layer_norm::Direct{task});
    }
}
/// A block for each row, its weights at hand when the row is there.
extern "C" __global__ void __launch_bounds__(layer_norm::THREADS) norm_mix_row(PARAMETERS) {
    __shared__ float shared[layer_norm::THREADS / 32];
    const int row = blockIdx.x;
    const layer_norm::Rows task = ROWS;
    let_next_start();
    task.expect(row);
    const layer_norm::Held weights(task);
    wait_for_previous();
    task.run(row, row + 1, shared, weights);
}

/// x = activation(x) for x [4, part groups of eight]: the first to the last part's activation in the bits of `kinds`, four
/// each.
extern "C" __global__ void activate(u16* x, int part, int kinds) {
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.x * blockDim.x + threadIdx.x, activation = kinds >> 4 * blockIdx.y & 15;
    if (i >= part || activation == NONE) return;
    u16* at = x + 8 * ((i64)blockIdx.y * part + i);
    Eight eight(load_fresh((const void*)at));
    for (int j = 0; j < 8; ++j) eight.f[j] = activated(eight.f[j], activation);
    *(uint4*)at = packed(eight.f);
}
