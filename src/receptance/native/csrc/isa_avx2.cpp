// The engine for AVX2, FMA and F16C.
#include "core.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#define ISA_AVX2

namespace receptance {
namespace {
#include "vector.h"
#include "products.h"
#include "blocks.h"
#include "packed.h"
#include "panels.h"
#include "tiles.h"
#include "dispatch.h"
#include "lines.h"
#include "bands.h"
#include "pack.h"
#include "wkv.h"
#include "engine.h"
#include "sample.h"

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

const Engine* engine_avx2() {
  static const Engine engine = {"avx2", supported, scratch_bytes, forward, pack, pack_lines, widen, multiply, multiply_bytes, sample};
  return &engine;
}
}  // namespace receptance
#else
namespace receptance {
const Engine* engine_avx2() { return nullptr; }
}  // namespace receptance
#endif
