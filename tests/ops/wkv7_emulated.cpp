// The kernels of ops/wkv7/wkv7.cu as functions of a shared library: the launch's grid first, then their arguments.
#include "emulator.h"
#include "wkv7.cu"

#define SHAPE_ARGS T, H, chunks, length
extern "C" void run_forward(int heads, int segments, INPUTS, const byte* resets, const float* starts, half_bits* y,
                            float* ends, half_bits* states, float* units, SHAPE) {
  emulator::run({(unsigned)heads, (unsigned)segments, 1}, 256, [=] {
    wkv7_forward(r, w, k, v, a, b, resets, starts, y, ends, states, units, SHAPE_ARGS);
  });
}
extern "C" void run_forward_maps(int heads, int segments, INPUTS, const byte* resets, float* maps, SHAPE) {
  emulator::run({(unsigned)heads, (unsigned)segments, 1}, 384, [=] {
    wkv7_forward_maps(r, w, k, v, a, b, resets, maps, SHAPE_ARGS);
  });
}
extern "C" void run_join(int heads, int segments, const float* maps, int map_stride, const float* parts, int part_stride,
                         const float* first, float* starts, int count, int reverse) {
  emulator::run({(unsigned)heads, 4, 1}, 128, [=] {
    wkv7_join(maps, map_stride, parts, part_stride, first, starts, count, reverse);
  });
}
extern "C" void run_backward(int heads, int segments, INPUTS, const half_bits* gy, const byte* resets,
                             const half_bits* states, const float* units, const float* ends, const float* g_ends,
                             half_bits* gr, half_bits* gw, half_bits* gk, half_bits* gv, half_bits* ga, half_bits* gb,
                             float* g_starts, SHAPE) {
  emulator::run({(unsigned)heads, (unsigned)segments, 1}, 384, [=] {
    wkv7_backward(r, w, k, v, a, b, gy, resets, states, units, ends, g_ends, gr, gw, gk, gv, ga, gb, g_starts,
                  SHAPE_ARGS);
  });
}
extern "C" void run_backward_maps(int heads, int segments, INPUTS, const half_bits* gy, const byte* resets,
                                  float* g_starts, SHAPE) {
  emulator::run({(unsigned)heads, (unsigned)segments, 1}, 256, [=] {
    wkv7_backward_maps(r, w, k, v, a, b, gy, resets, g_starts, SHAPE_ARGS);
  });
}
