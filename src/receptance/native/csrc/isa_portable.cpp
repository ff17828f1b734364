// The engine for any machine (on ARM the compiler's NEON).
#include "core.h"


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
  return true;
}
}  // namespace

const Engine* engine_portable() {
  static const Engine engine = {"portable", supported, scratch_bytes, forward, pack, pack_lines, widen, multiply, multiply_bytes, sample};
  return &engine;
}
}  // namespace receptance
