// What the kernels share: element types, conversions, the few instructions that CUDA C++ has no name for without headers.
// EMULATED: the same source compiled for a CPU by the tests, which define these instructions themselves.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

#ifndef EMULATED
__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float lg2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float half_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ u32 two_halves(float lo, float hi) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
__device__ __forceinline__ u32 two_bf16(float lo, float hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
// 64 bits that another block may write meanwhile, past the first-level cache
__device__ __forceinline__ u64 peek(const u64* p) {
    u64 x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ void publish(u64* p, u64 x) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
#endif

struct Bf16 {
    u16 bits;
    static __device__ __forceinline__ float wide(u16 x) { return __uint_as_float((u32)x << 16); }
    static __device__ __forceinline__ u32 two(float lo, float hi) { return two_bf16(lo, hi); }
};
struct Half {
    u16 bits;
    static __device__ __forceinline__ float wide(u16 x) { return half_to_float(x); }
    static __device__ __forceinline__ u32 two(float lo, float hi) { return two_halves(lo, hi); }
};

// V neighbours of element type E as they lie in memory; kept so, they take half the registers
template <class E, int V> struct Pack;
template <class E> struct Pack<E, 1> {
    u16 x;
    __device__ __forceinline__ float operator[](int) const { return E::wide(x); }
    static __device__ __forceinline__ Pack of(const float* f) { return {(u16)E::two(f[0], 0.f)}; }
};
template <class E> struct Pack<E, 2> {
    u32 x;
    __device__ __forceinline__ float operator[](int i) const { return E::wide((u16)(i ? x >> 16 : x)); }
    static __device__ __forceinline__ Pack of(const float* f) { return {E::two(f[0], f[1])}; }
};
template <> struct Pack<float, 1> {
    float x;
    __device__ __forceinline__ float operator[](int) const { return x; }
    static __device__ __forceinline__ Pack of(const float* f) { return {f[0]}; }
};
template <> struct __align__(8) Pack<float, 2> {
    float x, y;
    __device__ __forceinline__ float operator[](int i) const { return i ? y : x; }
    static __device__ __forceinline__ Pack of(const float* f) { return {f[0], f[1]}; }
};
