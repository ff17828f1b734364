// What the inference kernels share. Weights, activations and token shifts are of 16-bit type E; sums are float32.
//
// Kernels are chained: each may start while the one before it still runs, fetches weights, and only then waits. Whatever
// another kernel writes is read after `wait_for_previous`, past the first-level cache. But for the states: the first kernel of
// a step starts when all of the step before has ended, so that they lie ready.
#pragma once
#include "device.cuh"
#define DEVICE __device__ __forceinline__

#ifdef BFLOAT16
typedef Bf16 E;
#else
typedef Half E;
#endif

#ifndef EMULATED
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE uint4 load_weights(const void* p) {  // 16 bytes that no kernel writes, read once
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}
DEVICE uint4 load_fresh(const void* p) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}
DEVICE float load_fresh(const float* p) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
    return x;
}
DEVICE u16 load_fresh(const u16* p) {
    u16 x;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(x) : "l"(p) : "memory");
    return x;
}
/// Four bytes, each 128 too large, as numbers of 16 bits (float16).
DEVICE void widen_int8(u32 x, u32& low, u32& high) {
    asm("prmt.b32 %0, %1, 0x64646464, 0x4140;" : "=r"(low) : "r"(x));  // 1024 + byte
    asm("prmt.b32 %0, %1, 0x64646464, 0x4342;" : "=r"(high) : "r"(x));
    asm("sub.f16x2 %0, %0, %1;" : "+r"(low) : "r"(0x64806480));
    asm("sub.f16x2 %0, %0, %1;" : "+r"(high) : "r"(0x64806480));
}
/// Four bytes of type e4m3 as float16, 1/256 of them: the exponent's bits mean 2^-8 of what they did.
DEVICE void widen_float8(u32 x, u32& low, u32& high) {
    asm("prmt.b32 %0, %1, 0, 0x1404;" : "=r"(low) : "r"(x));  // the first two bytes, each above a zero
    asm("prmt.b32 %0, %1, 0, 0x3424;" : "=r"(high) : "r"(x));
    low = (low & 0x80008000) | (low & 0x7f007f00) >> 1;
    high = (high & 0x80008000) | (high & 0x7f007f00) >> 1;
}
template <int N> DEVICE void await_all_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }  // groups of copies
DEVICE void bring_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
template <int TEAM> DEVICE void team_sync() { asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / TEAM), "n"(TEAM) : "memory"); }
#else
inline void wait_for_previous() {}
inline void let_next_start() {}
inline uint4 load_weights(const void* p) { return *(const uint4*)p; }
inline uint4 load_fresh(const void* p) { return *(const uint4*)p; }
inline float load_fresh(const float* p) { return *p; }
inline u16 load_fresh(const u16* p) { return *p; }
inline void widen_int8(u32 x, u32& low, u32& high) {
    const auto value = [&](int i) { return (float)(int)(x >> 8 * i & 255) - 128.f; };
    low = two_halves(value(0), value(1)), high = two_halves(value(2), value(3));
}
inline void widen_float8(u32 x, u32& low, u32& high) {
    const auto bits = [&](int i) { const u32 b = x >> 8 * i & 255; return (b & 128) << 8 | (b & 127) << 7; };
    low = bits(0) | bits(1) << 16, high = bits(2) | bits(3) << 16;
}
template <int N> void await_all_but() { await_groups(N); }
inline void bring_to_l2(const void*) {}
template <int TEAM> void team_sync() { emulation::wait_in_team(TEAM); }
#endif

// -DCLUSTER blocks see each other's shared memory.
#if !defined(EMULATED) && CLUSTER > 1
DEVICE void sync_cluster() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
template <class T> DEVICE const T* of_block(const T* p, int block) {  // the same place in another block's
    const T* q;
    asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(block));
    return q;
}
#else
DEVICE void sync_cluster() { __syncthreads(); }
template <class T> DEVICE const T* of_block(const T* p, int) { return p; }
#endif

/// Threads of a block that have something of their own to do: TEAM side by side, a multiple of 32.
template <int TEAM> DEVICE int team_thread() { return threadIdx.x % TEAM; }

DEVICE float sigmoid(float x) { return rcp(1.f + ex2(-LOG2_E * x)); }

/// Eight neighbours of type E as float32.
struct Eight {
    float f[8];
    DEVICE explicit Eight(uint4 x) {
        const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) f[2 * i] = E::wide((u16)words[i]), f[2 * i + 1] = E::wide((u16)(words[i] >> 16));
    }
};
DEVICE uint4 packed(const float (&f)[8]) { return make_uint4(E::two(f[0], f[1]), E::two(f[2], f[3]), E::two(f[4], f[5]), E::two(f[6], f[7])); }
DEVICE u16 narrow(float x) { return (u16)E::two(x, 0.f); }
DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
}

enum Activation { NONE, TANH, SIGMOID, RELU_SQUARE };
DEVICE float activated(float x, int activation) {
    if (activation == TANH) return 2.f * sigmoid(2.f * x) - 1.f;
    if (activation == SIGMOID) return sigmoid(x);
    if (activation == RELU_SQUARE) return x > 0.f ? x * x : 0.f;
    return x;
}
