// The engine for AVX-512 with VNNI.
#include "core.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#define ISA_AVX512

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
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
}  // namespace

const Engine* engine_avx512() {
  static const Engine engine = {"avx512", supported, scratch_bytes, forward, pack, pack_lines, widen, multiply, multiply_bytes, sample};
  return &engine;
}
}  // namespace receptance
#else
namespace receptance {
const Engine* engine_avx512() { return nullptr; }
}  // namespace receptance
#endif
