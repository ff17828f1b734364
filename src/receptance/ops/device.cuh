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
extern __shared__ __align__(128) char dynamic_memory[];
__device__ __forceinline__ char* dynamic_shared() { return dynamic_memory; }
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
// d += a b, 16 x 8 x 8, row x column; lane = 4 g + t holds a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);
// b: (t, g), (t + 4, g); d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ __forceinline__ void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// the same with 16 channels: word (g, t) of a holds (g, 2t) and (g, 2t + 1), then rows g + 8, then channels from 8 on
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_half(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// to the nearest tf32; the low 13 bits are left for the tensor cores to ignore
__device__ __forceinline__ u32 to_tf32(float x) { return __float_as_uint(x) + 0x1000; }
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// four 8 x 8 matrices of 16-bit elements; lane 8 i + j gives row j of matrix i and gets, of each, (g, 2t) and (g, 2t + 1),
// transposed (2t, g) and (2t + 1, g)
__device__ __forceinline__ void load_matrices(u32 (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
// 16 bytes from global to shared memory in the background, or zeros
__device__ __forceinline__ void copy_async(void* to, const void* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(is_there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void publish(u64* p, u64 x) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
#endif

struct Bf16 {
    static constexpr bool IS_BF16 = true;
    u16 bits;
    static __device__ __forceinline__ float wide(u16 x) { return __uint_as_float((u32)x << 16); }
    static __device__ __forceinline__ u32 two(float lo, float hi) { return two_bf16(lo, hi); }
    static __device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bf16(d, a, b); }
};
struct Half {
    static constexpr bool IS_BF16 = false;
    u16 bits;
    static __device__ __forceinline__ float wide(u16 x) { return half_to_float(x); }
    static __device__ __forceinline__ u32 two(float lo, float hi) { return two_halves(lo, hi); }
    static __device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_half(d, a, b); }
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
