// Tiles of float16 in shared memory and the tensor-core products between them: mma.m16n8k16, one warp each.
//
// Fragments, with g = lane / 4 and q = lane % 4:
//   accumulator [16 × 8], float c[4]:  rows g (c0, c1) and g + 8 (c2, c3), columns 2q and 2q + 1
//   left [16 × 16], 4 words:           (g, 2q)  (g + 8, 2q)  (g, 2q + 8)  (g + 8, 2q + 8), two columns a word
//   right [16 × 8], 2 words:           rows 2q and 2q + 8, two rows a word, column g
// So the accumulators of two neighbours, packed, are a left operand; and what is left of X is right of Xᵀ.
//
// tests/ops/emulator.h has the same functions for a CPU.
#pragma once

typedef unsigned int word;             // two halves
typedef unsigned short half_bits;      // one of them
typedef unsigned char byte;

typedef unsigned long long uint64;
#ifndef EMULATED
#define DEVICE __device__ __forceinline__
#else
#define DEVICE inline
#endif

#ifndef EMULATED
DEVICE word shared_address(const void* p) { return (word)__cvta_generic_to_shared(p); }

DEVICE void barrier() { __syncthreads(); }
/// Of one team of four warps: threads 128 · team …
DEVICE void team_barrier(int team) { asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory"); }
DEVICE void warp_barrier() { __syncwarp(); }

/// Copy 16 bytes from global to shared memory in the background; zeros where !ok.
DEVICE void copy_async(void* to, const void* from, bool ok) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(ok ? 16 : 0));
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

/// Four 8 × 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(word (&x)[4], const half_bits* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(p)) : "memory");
}
DEVICE void load_matrices_transposed(word (&x)[4], const half_bits* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(p)) : "memory");
}

DEVICE void multiply(float (&c)[4], const word (&a)[4], word b0, word b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE word shuffle(word x, int from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE word vote(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE word largest_of_warp(word x) { return __reduce_max_sync(0xffffffffu, x); }

DEVICE word pack(float low, float high) {  // to float16, nearest even
  word x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE float half_to_float(half_bits x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE half_bits float_to_half(float x) {
  half_bits y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE word pack_bfloat16(float low, float high) {
  word x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE word scale_halves(word x, word factor) {  // each half by its own
  word y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(factor));
  return y;
}
DEVICE word scale_bfloat16(word x, word factor) {
  word y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(factor), "r"(0x80008000u));
  return y;
}
DEVICE void multiply_bfloat16(float (&c)[4], const word (&a)[4], word b0, word b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE word larger_halves(word x, word y) {  // as unsigned 16-bit integers
#if __CUDA_ARCH__ >= 900
  word z;
  asm("max.u16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
#else
  return __vmaxu2(x, y);
#endif
}
DEVICE float largest(float x, float y) { return fmaxf(x, y); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE float as_float(word x) { return __uint_as_float(x); }
DEVICE word as_word(float x) { return __float_as_uint(x); }
DEVICE int lane() { return threadIdx.x & 31; }
DEVICE int thread() { return threadIdx.x & 127; }      // of the team
DEVICE int warp() { return threadIdx.x >> 5 & 3; }      // of the team
DEVICE int team() { return threadIdx.x >> 7; }
#endif

struct alignas(8) Pair { float x, y; };  // two neighbouring columns
struct alignas(16) Quad { word x, y, z, w; };

DEVICE Pair operator+(Pair p, Pair q) { return {p.x + q.x, p.y + q.y}; }
DEVICE Pair operator-(Pair p, Pair q) { return {p.x - q.x, p.y - q.y}; }
DEVICE Pair operator*(Pair p, Pair q) { return {p.x * q.x, p.y * q.y}; }
DEVICE Pair operator*(Pair p, float f) { return {p.x * f, p.y * f}; }
DEVICE Pair exp2(Pair p) { return {exp2(p.x), exp2(p.y)}; }
DEVICE word pack(Pair p) { return pack(p.x, p.y); }
DEVICE Pair unpack(word x) { return {half_to_float((half_bits)x), half_to_float((half_bits)(x >> 16))}; }

// What the caller's tensors hold: bfloat16, or float16 when compiled with -DFLOAT16.
#ifdef FLOAT16
constexpr word ONE = 0x3c00, LEAST = 113, MOST = 141;  // 1; exponents of units that a float16 can hold, inverse too
DEVICE Pair read(word x) { return unpack(x); }
DEVICE word written(Pair p) { return pack(p); }
DEVICE word exponent_of(half_bits magnitude) { return as_word(half_to_float(magnitude)) >> 23; }
DEVICE word power_of_two(word exponent) { return (exponent - 112) * 0x04000400u; }
DEVICE word scale_input(word x, word factor) { return scale_halves(x, factor); }
DEVICE void multiply_inputs(float (&c)[4], const word (&a)[4], word b0, word b1) { multiply(c, a, b0, b1); }
#else
constexpr word ONE = 0x3f80, LEAST = 87, MOST = 167;
DEVICE Pair read(word x) { return {as_float(x << 16), as_float(x & 0xffff0000u)}; }
DEVICE word written(Pair p) { return pack_bfloat16(p.x, p.y); }
DEVICE word exponent_of(half_bits magnitude) { return magnitude >> 7; }
DEVICE word power_of_two(word exponent) { return exponent * 0x00800080u; }
DEVICE word scale_input(word x, word factor) { return scale_bfloat16(x, factor); }
DEVICE void multiply_inputs(float (&c)[4], const word (&a)[4], word b0, word b1) { multiply_bfloat16(c, a, b0, b1); }
#endif

/// The largest magnitude among eight elements: its bits in the upper half of the word, the lower half is noise.
DEVICE word largest_magnitude(const word* x) {
  const word mask = 0x7fff7fffu;
  const word top = larger_halves(larger_halves(x[0] & mask, x[1] & mask), larger_halves(x[2] & mask, x[3] & mask));
  return top > top << 16 ? top : top << 16;
}

/// A power of two by float32's exponent, and its inverse. Units bring the largest magnitude into [1, 2).
struct Unit {
  float value, inverse;
  DEVICE explicit Unit(word exponent) : value(as_float(exponent << 23)), inverse(as_float((254 - exponent) << 23)) {}
};
DEVICE word clamp(word x, word least, word most) { return x < least ? least : x > most ? most : x; }

// Operands out of tiles: X is [16 × 16] at p with `stride` halves a row, unless said otherwise.
DEVICE int by_column() { return (lane() & 7) + (lane() & 8); }       // rows of matrices 0 and 1, then 2 and 3
DEVICE int by_row() { return (lane() & 7) + ((lane() & 16) >> 1); }  // rows of matrices 0 and 2, then 1 and 3
DEVICE void load_left(word (&x)[4], const half_bits* p, int stride) {
  load_matrices(x, p + by_column() * stride + (lane() >> 4) * 8);
}
DEVICE void load_left_transposed(word (&x)[4], const half_bits* p, int stride) {  // left operand Xᵀ
  load_matrices_transposed(x, p + by_row() * stride + ((lane() >> 3) & 1) * 8);
}
/// Right operand X for columns 0–7 (x0, x1) and 8–15 (x2, x3).
DEVICE void load_right(word (&x)[4], const half_bits* p, int stride) {
  load_matrices_transposed(x, p + by_column() * stride + (lane() >> 4) * 8);
}
DEVICE void load_right_transposed(word (&x)[4], const half_bits* p, int stride) {  // right operand Xᵀ
  load_matrices(x, p + by_row() * stride + ((lane() >> 3) & 1) * 8);
}

typedef float Square[2][4];  // accumulators of [16 × 16]

DEVICE void multiply(Square& c, const word (&a)[4], const word (&b)[4]) {  // b as load_right gives it
  multiply(c[0], a, b[0], b[1]);
  multiply(c[1], a, b[2], b[3]);
}
/// c += a xᵀ for x as a left operand.
DEVICE void multiply_by_left(Square& c, const word (&a)[4], const word (&x)[4]) {
  multiply(c[0], a, x[0], x[2]);
  multiply(c[1], a, x[1], x[3]);
}
DEVICE void as_left(word (&x)[4], const Square& c, float factor = 1) {
  x[0] = pack(c[0][0] * factor, c[0][1] * factor), x[1] = pack(c[0][2] * factor, c[0][3] * factor);
  x[2] = pack(c[1][0] * factor, c[1][1] * factor), x[3] = pack(c[1][2] * factor, c[1][3] * factor);
}
