// Tiles of float16 in shared memory and the tensor-core products between them: mma.m16n8k16, one warp each.
//
// Fragments, with g = lane / 4 and q = lane % 4:
//   accumulator [16 × 8], float c[4]:  rows g (c0, c1) and g + 8 (c2, c3), columns 2q and 2q + 1
//   left [16 × 16], 4 words:           (g, 2q)  (g + 8, 2q)  (g, 2q + 8)  (g + 8, 2q + 8), two columns a word
//   right [16 × 8], 2 words:           rows 2q and 2q + 8, two rows a word, column g
// So the accumulators of two neighbours, packed, are a left operand; and what is left of X is right of Xᵀ.
//
// EMULATED: the same source compiled for a CPU by the tests, which define the instructions themselves.
#pragma once
#include "device.cuh"

typedef u32 word;       // two halves
typedef u16 half_bits;  // one of them
typedef u8 byte;
typedef u64 uint64;
#define DEVICE __device__ __forceinline__

#ifndef EMULATED
/// Of one team of four warps: threads 128 · team …
DEVICE void team_barrier(int team) { asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory"); }
/// Of a block of so many teams, which may come to it from different lines: __syncthreads and bar.sync, which is
/// barrier.sync.aligned, are for all at one line.
template <int TEAMS>
DEVICE void barrier() {
  asm volatile("barrier.sync 0, %0;" ::"n"(128 * TEAMS) : "memory");
}
DEVICE void await_all_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }  // of the committed groups
DEVICE word largest_of_warp(word x) { return __reduce_max_sync(0xffffffffu, x); }
DEVICE half_bits float_to_half(float x) {
  half_bits y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
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
DEVICE word larger_halves(word x, word y) {  // as unsigned 16-bit integers
#if __CUDA_ARCH__ >= 900
  word z;
  asm("max.u16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
#else
  return __vmaxu2(x, y);
#endif
}
#endif

DEVICE void warp_barrier() { __syncwarp(); }
DEVICE int lane() { return threadIdx.x & 31; }
DEVICE int warp() { return threadIdx.x >> 5 & 3; }  // of the team
DEVICE int thread() { return threadIdx.x & 127; }   // of the team
DEVICE int team() { return threadIdx.x >> 7; }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE word shuffle(word x, int from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE word vote(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE void multiply(float (&c)[4], const word (&a)[4], word b0, word b1) {
  const word b[2] = {b0, b1};
  mma_half(c, a, b);
}
DEVICE float largest(float x, float y) { return fmaxf(x, y); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE float as_float(word x) { return __uint_as_float(x); }
DEVICE word as_word(float x) { return __float_as_uint(x); }
DEVICE word pack(float low, float high) { return two_halves(low, high); }
DEVICE float exp2(float x) { return ex2(x); }

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
DEVICE word written(Pair p) { return two_bf16(p.x, p.y); }
DEVICE word exponent_of(half_bits magnitude) { return magnitude >> 7; }
DEVICE word power_of_two(word exponent) { return exponent * 0x00800080u; }
DEVICE word scale_input(word x, word factor) { return scale_bfloat16(x, factor); }
DEVICE void multiply_inputs(float (&c)[4], const word (&a)[4], word b0, word b1) {
  const word b[2] = {b0, b1};
  mma_bf16(c, a, b);
}
#endif

/// The largest magnitude among eight elements: its bits in the upper half of the word, the lower half is noise.
DEVICE word largest_magnitude(const Quad& x) {
  const word mask = 0x7fff7fffu;
  const word top = larger_halves(larger_halves(x.x & mask, x.y & mask), larger_halves(x.z & mask, x.w & mask));
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
  load_transposed(x, p + by_row() * stride + ((lane() >> 3) & 1) * 8);
}
/// Right operand X for columns 0–7 (x0, x1) and 8–15 (x2, x3).
DEVICE void load_right(word (&x)[4], const half_bits* p, int stride) {
  load_transposed(x, p + by_column() * stride + (lane() >> 4) * 8);
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
