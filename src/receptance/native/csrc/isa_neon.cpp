// The engine for NEON with 8-bit dot products.
#include "core.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#if defined(__linux__)
#include <sys/auxv.h>
static bool has_dot_products() { return getauxval(AT_HWCAP) & (1 << 20); }
#else
static bool has_dot_products() { return true; }  // every Apple processor with 64 bits that runs a Python of today
#endif

#define ISA_NEON

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
  return has_dot_products();
}
}  // namespace

const Engine* engine_neon() {
  static const Engine engine = {"neon", supported, scratch_bytes, forward, pack, pack_lines, widen, multiply, multiply_bytes, sample};
  return &engine;
}
}  // namespace receptance
#else
namespace receptance {
const Engine* engine_neon() { return nullptr; }
}  // namespace receptance
#endif
