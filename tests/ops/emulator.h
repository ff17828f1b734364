// CUDA blocks on a CPU, to test the kernels' logic where there is no GPU: each thread is a fiber, and those of a warp or a
// block meet at every collective operation. Shared memory begins as NaN. The functions are those of ops/tiles.cuh.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)

typedef unsigned int word;
typedef unsigned short half_bits;
typedef unsigned char byte;
typedef unsigned long long uint64;

struct Dim { unsigned x, y, z; };
static Dim blockIdx, gridDim;
alignas(16) byte memory[228 * 1024];

namespace emulator {
constexpr int STACK = 256 * 1024;
struct Meeting { int arrived = 0; unsigned turn = 0; };  // of a warp or a block
struct Fiber { ucontext_t context; std::unique_ptr<char[]> stack; bool done = false; };
struct Slot { const void* p; word x[8]; };               // what a lane brings to a warp's operation

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current, alive;
static Meeting block, teams[8], warps[32];
static Slot slots[2][1024];
static std::function<void()> body;

inline void meet(Meeting& m, int size) {
  const unsigned turn = m.turn;
  if (++m.arrived == size) {
    m.arrived = 0;
    ++m.turn;
    return;
  }
  while (m.turn == turn) swapcontext(&fibers[current].context, &scheduler);
}
/// Bring a slot and see the slots of the whole warp.
inline const Slot* exchange(const Slot& mine) {
  const int w = current / 32;
  Slot* all = slots[warps[w].turn & 1];
  all[current] = mine;
  meet(warps[w], 32);
  return all + w * 32;
}
inline void enter() {
  body();
  fibers[current].done = true;
  --alive;
  swapcontext(&fibers[current].context, &scheduler);
}
inline void run_block(int threads, const std::function<void()>& kernel) {
  memset(memory, 0xff, sizeof memory);
  body = kernel;
  block = {};
  for (Meeting& m : warps) m = {};
  for (Meeting& m : teams) m = {};
  fibers.resize(threads);
  alive = threads;
  for (Fiber& f : fibers) {
    if (!f.stack) f.stack.reset(new char[STACK]);
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, (void (*)())enter, 0);
  }
  while (alive)
    for (current = 0; current < threads; ++current)
      if (!fibers[current].done) swapcontext(&scheduler, &fibers[current].context);
}
inline void run(Dim grid, int threads, const std::function<void()>& kernel) {
  gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads, kernel);
}
}  // namespace emulator

inline int thread() { return emulator::current & 127; }
inline int lane() { return emulator::current & 31; }
inline int warp() { return emulator::current >> 5 & 3; }
inline int team() { return emulator::current >> 7; }
inline void barrier() { emulator::meet(emulator::block, (int)emulator::fibers.size()); }
inline void team_barrier(int team) { emulator::meet(emulator::teams[team], 128); }
inline void warp_barrier() { emulator::exchange({}); }

inline void check_aligned(const void* p) {
  if ((uintptr_t)p % 16) fprintf(stderr, "emulator: an address that is not a multiple of 16\n"), abort();
}
inline void copy_async(void* to, const void* from, bool ok) {
  check_aligned(to);
  check_aligned(from);
  if (ok) memcpy(to, from, 16);
  else memset(to, 0, 16);
}
inline void commit_copies() {}
template <int PENDING>
void wait_copies() {}

inline float half_to_float(half_bits x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return (float)y;
}
inline half_bits float_to_half(float x) {
  const _Float16 y = (_Float16)x;
  half_bits bits;
  memcpy(&bits, &y, 2);
  return bits;
}
inline float as_float(word x) { float y; memcpy(&y, &x, 4); return y; }
inline word as_word(float x) { word y; memcpy(&y, &x, 4); return y; }
inline word pack(float low, float high) { return float_to_half(low) | (word)float_to_half(high) << 16; }
inline word to_bfloat16(float x) {
  const word bits = as_word(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline word pack_bfloat16(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }
inline word scale_halves(word x, word factor) {
  return pack(half_to_float(x) * half_to_float(factor), half_to_float(x >> 16) * half_to_float(factor >> 16));
}
inline word scale_bfloat16(word x, word factor) {
  return pack_bfloat16(as_float(x << 16) * as_float(factor << 16), as_float(x & ~0xffffu) * as_float(factor & ~0xffffu));
}
inline float largest(float x, float y) { return x > y ? x : y; }
inline float magnitude(float x) { return std::fabs(x); }
inline float exp2(float x) { return std::exp2(x); }
inline word larger_halves(word x, word y) {
  const word low = (x & 0xffff) > (y & 0xffff) ? x & 0xffff : y & 0xffff;
  return low | ((x >> 16) > (y >> 16) ? x >> 16 : y >> 16) << 16;
}

inline float shuffle_xor(float x, int mask) {
  return as_float(emulator::exchange({nullptr, {as_word(x)}})[lane() ^ mask].x[0]);
}
inline word shuffle(word x, int from) { return emulator::exchange({nullptr, {x}})[from].x[0]; }
inline word vote(bool x) {
  const emulator::Slot* all = emulator::exchange({nullptr, {x}});
  word votes = 0;
  for (int i = 0; i < 32; ++i) votes |= all[i].x[0] << i;
  return votes;
}
inline word largest_of_warp(word x) {
  const emulator::Slot* all = emulator::exchange({nullptr, {x}});
  for (int i = 0; i < 32; ++i) x = all[i].x[0] > x ? all[i].x[0] : x;
  return x;
}
inline void load_matrices(word (&x)[4], const half_bits* p) {
  check_aligned(p);
  const emulator::Slot* all = emulator::exchange({p, {}});
  for (int i = 0; i < 4; ++i) x[i] = ((const word*)all[i * 8 + lane() / 4].p)[lane() % 4];
  warp_barrier();  // nobody overwrites the rows before all have read them
}
inline void load_matrices_transposed(word (&x)[4], const half_bits* p) {
  check_aligned(p);
  const emulator::Slot* all = emulator::exchange({p, {}});
  const auto at = [&](int i, int row) { return (word)((const half_bits*)all[i * 8 + row].p)[lane() / 4]; };
  for (int i = 0; i < 4; ++i) x[i] = at(i, lane() % 4 * 2) | at(i, lane() % 4 * 2 + 1) << 16;
  warp_barrier();
}
template <typename Read>
void multiply_as(float (&c)[4], const word (&a)[4], word b0, word b1, Read read) {
  const emulator::Slot* all = emulator::exchange({nullptr, {a[0], a[1], a[2], a[3], b0, b1}});
  const auto half_of = [&](word x, int i) { return read((half_bits)(x >> 16 * (i & 1))); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = half_of(all[row % 8 * 4 + k % 8 / 2].x[row / 8 + k / 8 * 2], k);
      c[i] += left * half_of(all[column * 4 + k % 8 / 2].x[4 + k / 8], k);
    }
  }
}
inline void multiply(float (&c)[4], const word (&a)[4], word b0, word b1) { multiply_as(c, a, b0, b1, half_to_float); }
inline void multiply_bfloat16(float (&c)[4], const word (&a)[4], word b0, word b1) {
  multiply_as(c, a, b0, b1, [](half_bits x) { return as_float((word)x << 16); });
}
