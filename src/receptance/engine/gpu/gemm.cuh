// Dozens to hundreds of rows of activations times matrices of weights, on the tensor cores of compute capability 9.0.
//
// A block has 64 · GROUPS rows of weights and BATCH of activations. Both come in steps of 64 columns through a ring in shared memory,
// in the order in which the products want them: rows of 128 bytes, of which the sixteenths of every eight rows are exchanged
// (the 128-byte swizzle). The weights of the first steps are asked for before the kernel in front has ended.
// SPLIT blocks, a cluster, share the columns of one tile; each then adds up a part of it over their shared memory, in one order.
//
// -DGROUPS of 128 threads, -DBATCH: 16, 32, 64, 128 or 256; -DDEPTH: steps of the ring; -DCLUSTER: SPLIT.
#pragma once
#include "gpu.cuh"

#ifndef EMULATED
DEVICE void show_copies_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void await_products_but() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
/// Of a tile of rows of 128 bytes, in the order above; p may lie 32, 64 or 96 bytes behind its begin.
DEVICE u64 described(const char* p) {
    return (u64)(shared_address(p) >> 4 & 0x3fff) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
#ifdef BFLOAT16
#define PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {"
#else
#define PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {"
#endif
#define D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define D16 D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D32 D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D64 D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OF4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OF8(i) OF4(i), OF4(i + 4)
#define OF16(i) OF8(i), OF8(i + 8)
#define OF32(i) OF16(i), OF16(i + 16)
/// d += a bᵀ, 64 rows of a and N of b, 16 columns: d[4 j + 2 h + i] is row 16 warp + g + 8 h, column 8 j + 2 t + i, lane 4 g + t.
template <int N> DEVICE void multiply_tiles(float* d, const char* a, const char* b) {
    const u64 x = described(a), y = described(b);
    if constexpr (N == 16) asm volatile(PRODUCT(16) D8 "}, %8, %9, 1, 1, 1, 0, 0;" : OF8(0) : "l"(x), "l"(y));
    if constexpr (N == 32) asm volatile(PRODUCT(32) D16 "}, %16, %17, 1, 1, 1, 0, 0;" : OF16(0) : "l"(x), "l"(y));
    if constexpr (N == 64) asm volatile(PRODUCT(64) D32 "}, %32, %33, 1, 1, 1, 0, 0;" : OF32(0) : "l"(x), "l"(y));
    if constexpr (N == 128) asm volatile(PRODUCT(128) D64 "}, %64, %65, 1, 1, 1, 0, 0;" : OF32(0), OF32(32) : "l"(x), "l"(y));
}
/// From a multiple of 1024 bytes on.
DEVICE char* aligned_shared() {
    char* p = dynamic_shared();
    return p + (-shared_address(p) & 1023);
}
#else
inline void show_copies_to_products() {}
inline void begin_products() {}
inline void commit_products() {}
template <int N> void await_products_but() {}
inline char* aligned_shared() { return dynamic_shared(); }
template <int N> void multiply_tiles(float* d, const char* a, const char* b) {
    const auto at = [](const char* p, int row, int column) {
        const size_t within = (size_t)p % 1024;
        return E::wide(*(const u16*)(p - within + ((row * 128 + within + 2 * column) ^ (row % 8) << 4)));
    };
    const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < N / 2; ++i)
        for (int k = 0; k < 16; ++k) d[i] += at(a, 16 * warp + g + i / 2 % 2 * 8, k) * at(b, i / 4 * 8 + 2 * t + i % 2, k);
}
#endif

namespace gemm {
constexpr int SPLIT = CLUSTER, THREADS = 128 * GROUPS, ROWS = 64 * GROUPS, STEP = 64, LEAD = DEPTH - 2;
constexpr int PART = BATCH < 128 ? BATCH : 128, PARTS = BATCH / PART;  // of a product
constexpr int SLOT = (ROWS + BATCH) * 128, SIDE = ROWS + 4;  // bytes of a step; floats from one activation row's sums to the next's
constexpr int HEIGHT = THREADS / 8;  // rows that all threads copy at once
constexpr int BYTES = DEPTH * SLOT > BATCH * SIDE * 4 ? DEPTH * SLOT : BATCH * SIDE * 4;
static_assert(BYTES + 1024 == SHARED_BYTES, "the launch must give this much");
static_assert(DEPTH >= 3 && BATCH * ROWS % (8 * SPLIT) == 0, "");

/// What a tile of `rows` <= ROWS rows of weights does; offsets in elements.
struct Task {
    i64 weight, input, output;  // of the first row of weights, of the activations' first row, of the output's first row
    int columns, activation, stride, rows;  // stride: from one activation row's outputs to the next's
};
enum Mode { WRITE, ADD, LOGITS, GATED };  // see gemv.cuh

struct Tile {
    const Task& task;
    const u16 *weight, *input;  // this thread's sixteenth of its first row
    char* ring;
    i64 input_stride;
    int first, end, batch;  // steps; rows of activations from this block's on

    DEVICE Tile(const Task& t, const u16* weights, const u16* inputs, int stride, int left, char* memory)
        : task(t), ring(memory), input_stride(stride), batch(left) {
        const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 8, rank = blockIdx.x % SPLIT;
        const int steps = (task.columns + STEP - 1) / STEP, each = (steps + SPLIT - 1) / SPLIT;
        first = rank * each, end = first + each < steps ? first + each : steps;
        weight = weights + task.weight + (i64)row * task.columns + column;
        input = inputs + task.input + row * input_stride + column;
    }
    DEVICE char* place(int step) const {
        const int row = threadIdx.x / 8;
        return ring + (step - first) % DEPTH * SLOT + row * 128 + (threadIdx.x % 8 ^ row % 8) * 16;
    }
    DEVICE bool has_columns(int step) const { return step * STEP + (int)threadIdx.x % 8 * 8 < task.columns; }
    DEVICE void fetch_weights(int step) const {
        if (step >= end) return;
        char* to = place(step);
        const bool there = has_columns(step);
#pragma unroll
        for (int i = 0; i < ROWS / HEIGHT; ++i) {
            const bool is_row = (int)threadIdx.x / 8 + i * HEIGHT < task.rows;
            copy_async(to + i * HEIGHT * 128, is_row ? weight + (i64)i * HEIGHT * task.columns + step * STEP : weight, there && is_row);
        }
    }
    DEVICE void fetch_input(int step) const {
        if (step < end) {
            char* to = place(step) + ROWS * 128;
            const bool there = has_columns(step);
#pragma unroll
            for (int i = 0; i < (BATCH + HEIGHT - 1) / HEIGHT; ++i) {
                if (BATCH < HEIGHT && (int)threadIdx.x / 8 >= BATCH) break;
                const bool is_row = (int)threadIdx.x / 8 + i * HEIGHT < batch;
                copy_async(to + i * HEIGHT * 128, is_row ? input + i * HEIGHT * input_stride + step * STEP : input, there && is_row);
            }
        }
        commit_copies();
    }
    /// A block's sums [BATCH][SIDE] lie in the ring then.
    DEVICE void multiply() const {
        const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float d[PARTS][PART / 2] = {};
        for (int step = first; step < end; ++step) {
            await_all_but<LEAD - 1>();
            show_copies_to_products();
            __syncthreads();  // now everyone's copies are there, and the products of the step before the last are done
            const char* slot = ring + (step - first) % DEPTH * SLOT;
            begin_products();
#pragma unroll
            for (int k = 0; k < STEP / 16; ++k)
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    multiply_tiles<PART>(d[part], slot + group * 64 * 128 + 32 * k, slot + (ROWS + part * PART) * 128 + 32 * k);
            commit_products();
            fetch_weights(step + LEAD);
            fetch_input(step + LEAD);
            await_products_but<1>();
        }
        await_products_but<0>();
        await_all_but<0>();
        __syncthreads();
        float* sums = (float*)ring + group * 64 + 16 * warp + g;
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
#pragma unroll
            for (int i = 0; i < PART / 2; ++i) sums[(part * PART + i / 4 * 8 + 2 * t + i % 2) * SIDE + i / 2 % 2 * 8] = d[part][i];
        sync_cluster();
    }
    /// This block's part of the tile: over all blocks of the cluster, eight outputs of a row at a time.
    DEVICE void write(void* output, const u16* gate, int mode) const {
        constexpr int ALL = BATCH * ROWS / 8, EACH = ALL / SPLIT;
        const int from = blockIdx.x % SPLIT * EACH;
        for (int i = from + threadIdx.x; i < from + EACH; i += THREADS) {
            const int at = i / (ROWS / 8), row = i % (ROWS / 8) * 8;
            if (at >= batch || row >= task.rows) continue;
            const i64 to = task.output + (i64)at * task.stride + row;
            float f[8] = {};
#pragma unroll
            for (int block = 0; block < SPLIT; ++block) {
                const float4* sums = (const float4*)(of_block((const float*)ring, block) + at * SIDE + row);
                const float4 x = sums[0], y = sums[1];
                f[0] += x.x, f[1] += x.y, f[2] += x.z, f[3] += x.w, f[4] += y.x, f[5] += y.y, f[6] += y.z, f[7] += y.w;
            }
            for (int j = 0; j < 8; ++j) f[j] = activated(f[j], task.activation);
            if (mode == WRITE) {
                *(uint4*)((u16*)output + to) = packed(f);
                continue;
            }
            float* wide = (float*)output + to;
            if (mode == GATED) {
                const Eight open(load_fresh((const void*)(gate + to)));
                for (int j = 0; j < 8; ++j) f[j] *= open.f[j];
            }
            if (mode != LOGITS)
                for (int h = 0; h < 2; ++h) {
                    const uint4 old = load_fresh((const void*)(wide + 4 * h));
                    f[4 * h] += __uint_as_float(old.x), f[4 * h + 1] += __uint_as_float(old.y);
                    f[4 * h + 2] += __uint_as_float(old.z), f[4 * h + 3] += __uint_as_float(old.w);
                }
            for (int h = 0; h < 2; ++h) ((float4*)wide)[h] = make_float4(f[4 * h], f[4 * h + 1], f[4 * h + 2], f[4 * h + 3]);
        }
        if (SPLIT > 1) sync_cluster();  // others may still read this block's sums
    }
};
}  // namespace gemm
