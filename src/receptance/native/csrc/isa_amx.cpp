// The engine for AVX-512 with VNNI and AMX (bfloat16).
#include "core.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__AMX_BF16__) || defined(TILE_LOAD))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <type_traits>

#define ISA_AVX512
#define ISA_AMX

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

// Tiles must be asked for: a process that has not may not touch them
bool supported() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1;  // AMX-BF16, AMX-TILE
  return has && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
}  // namespace

const Engine* engine_amx() {
  static const Engine engine = {"amx", supported, scratch_bytes, forward, pack, pack_lines, widen, multiply, multiply_bytes, sample};
  return &engine;
}
}  // namespace receptance
#else
namespace receptance {
const Engine* engine_amx() { return nullptr; }
}  // namespace receptance
#endif
