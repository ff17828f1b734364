// One product, see gemv.cuh. -DNORMED 1: of a layer norm's mixes, which each block makes for itself; then -DWIDTH, see norm.cuh.
#include "gemv.cuh"
#if NORMED
#include "norm.cuh"
#endif

using namespace gemv;
static_assert(RING_BYTES + sizeof(Sums) == SHARED_BYTES, "the launch must give this much");

#define PARAMETERS                                                                                                                \
    const void *weight, const float *scales, const Task *tasks, int columns, int activation, const u16 *input, int input_stride,    \
        void *output, int output_stride, const u16 *gate, int batch, int mode, int tiles
#define PRODUCT {weight, scales, tasks, input, output, gate, columns, activation, input_stride, output_stride, mode, tiles}

#if NORMED
constexpr int ROOM = WIDTH + 32;  // a row of mixes in shared memory, with its neighbour on other banks
static_assert(WARPS * 32 % layer_norm::THREADS == 0, "teams of the norm");

/// The matrix times mixes of a layer norm of x [rows, C], rows < batch ≤ BATCH, see layer_norm::Rows; Task's inputs are multiples of mix_stride.
/// Each block makes those mixes that its tiles read, in shared memory: at most `room` of them. Others read `last` meanwhile:
/// what it becomes goes to kept [rows, C], and from there, in a later launch, to its place.
extern "C" __global__ void __launch_bounds__(GEMV_WARPS * 32, 2) gemv_product(
    PARAMETERS, const float* x, float* sum, const u16* table, const i64* tokens, const u16* norm_weight, const u16* norm_bias,
    float eps, const u16* mix, int mixes, int mix_stride, const u16* last, const int* slots, u16* kept) {
    const Product product = PRODUCT;
    const layer_norm::Rows rows = {x, sum, table, tokens, nullptr, nullptr, norm_weight, norm_bias, eps, mix, mixes, last, kept, slots, nullptr, nullptr, 0};
    Feed feed(product, dynamic_shared());
    let_next_start();
    u32 wanted = 0;  // bits of mixes
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) wanted |= 1u << (tasks ? (int)tasks[tile].input / mix_stride : 0);
    const int team = threadIdx.x / layer_norm::THREADS, teams = WARPS * 32 / layer_norm::THREADS;
    for (int row = team; row < batch; row += teams) rows.expect(row);
    const layer_norm::Held<1> weights(rows, wanted ? __ffs(wanted) - 1 : 0);
    wait_for_previous();
    float(*const shared)[layer_norm::THREADS / 32] = (float(*)[layer_norm::THREADS / 32])(dynamic_shared() + RING_BYTES);
    u16* const mixed = (u16*)(dynamic_shared() + RING_BYTES + sizeof(Sums));
    for (int row = team; row < batch; row += teams) {
        layer_norm::Row now, before;
        if (mixes) layer_norm::load_row(before, last + (i64)slots[row] * WIDTH);
        rows.take(now, row, blockIdx.x == 0, shared[team], weights);
        if (mixes && blockIdx.x == 0) layer_norm::store_row(kept + (i64)row * WIDTH, now);
        if (!mixes) layer_norm::store_row(mixed + row * ROOM, now);
        else {
            u16* to = mixed + row * ROOM;
            layer_norm::store_mixed(to, now, before, [&](int i, int c) { return weights.mix(0, i, c); });
            for (u32 left = wanted & (wanted - 1); left; left &= left - 1) {
                const layer_norm::Direct others{rows};
                const int m = __ffs(left) - 1;
                layer_norm::store_mixed(to += batch * ROOM, now, before, [&](int i, int c) { return others.mix(m, i, c); });
            }
        }
    }
    __syncthreads();
    feed.multiply(
        batch, *(Sums*)(dynamic_shared() + RING_BYTES),
        [&](const Task& task, int row, int column) {
            const int m = tasks ? (int)task.input / mix_stride : 0;
            return mixed + (__popc(wanted & ((1u << m) - 1)) * batch + row) * ROOM + column;
        },
        [](const u16* p) { return *(const uint4*)p; });
}
#else
/// See Product; for rows b < batch. Blocks (·, BATCH rows). Rows of kept [·, C], if any, go to last[slots[row]], for C = copied.
extern "C" __global__ void __launch_bounds__(GEMV_WARPS * 32) gemv_product(PARAMETERS, const u16* kept, u16* last, const int* slots, int copied) {
    const Product product = PRODUCT;
    Feed feed(product, dynamic_shared());
    let_next_start();
    wait_for_previous();
    if (kept && blockIdx.y == 0)
        for (int row = blockIdx.x; row < batch; row += gridDim.x)
            for (int i = threadIdx.x * 8; i < copied; i += WARPS * 32 * 8)
                *(uint4*)(last + (i64)slots[row] * copied + i) = load_fresh((const void*)(kept + (i64)row * copied + i));
    feed.multiply(
        batch, *(Sums*)(dynamic_shared() + RING_BYTES),
        [&](const Task& task, int row, int column) { return input + task.input + (i64)row * input_stride + column; },
        [](const u16* p) { return load_fresh((const void*)p); });
}
#endif
