// The C interface that receptance/native/library.py calls through ctypes. The structures of core.h are its arguments.
#include <cstring>

#include "core.h"

using namespace receptance;

#if defined(_WIN32)
#define API extern "C" __declspec(dllexport)
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

// The best engine that this machine supports, or the one of this name if it does; null if not.
API const Engine* receptance_engine(const char* name) {
  const Engine* const engines[] = {engine_amx(), engine_avx512(), engine_avx2(), engine_neon(), engine_portable()};  // best first
  for (const Engine* engine : engines) {
    if (engine && engine->supported() && (!name || !*name || !strcmp(name, engine->name))) return engine;
  }
  return nullptr;
}

API const char* receptance_engine_name(const Engine* engine) { return engine->name; }

// What this was compiled from, see build.py
API const char* receptance_sources() { return SOURCES_HASH; }

// Sizes of the structures, which library.py repeats
API int64_t receptance_size(int32_t which) {
  const int64_t sizes[] = {sizeof(Matrix), sizeof(ChannelMix), sizeof(Layer), sizeof(Model), sizeof(State), sizeof(Request),
                           sizeof(SampleRow)};
  return which >= 0 && which < 7 ? sizes[which] : -1;
}

API Team* receptance_team_new(int32_t threads) { return team_new(threads); }
API void receptance_team_free(Team* team) { team_free(team); }

API int64_t receptance_scratch_bytes(const Engine* engine, const Model* model, int64_t rows, int32_t threads) {
  return engine->scratch_bytes(*model, rows, threads);
}

API void receptance_forward(const Engine* engine, Request* request) { engine->forward(*request); }

namespace {
struct Packing {
  const Engine* engine;
  Team* team;
  const Matrix* from;
  void* to;
  int32_t type, transpose, lines;
};

void pack_parts(void* context, int) {
  const Packing& p = *(const Packing*)context;
  const int64_t rows = p.transpose ? p.from->cols : p.from->rows;
  const int64_t count = p.lines ? rows : (rows + GROUP - 1) / GROUP, step = p.lines ? 64 : 4;
  for (int64_t first; (first = team_next(p.team) * step) < count;) {
    const int64_t last = first + step < count ? first + step : count;
    if (p.lines) p.engine->pack_lines(*p.from, p.transpose, p.to, p.type, first, last);
    else p.engine->pack(*p.from, p.to, p.type, first, last);
  }
}
}  // namespace

// A plain matrix into packed groups of a quantised type
API void receptance_pack(const Engine* engine, Team* team, const Matrix* from, void* to, int32_t type) {
  Packing packing = {engine, team, from, to, type, 0, 0};
  team_run(team, pack_parts, &packing);
}

// A plain matrix into lines of any type, transposed or not
API void receptance_pack_lines(const Engine* engine, Team* team, const Matrix* from, int32_t transpose, void* to,
                               int32_t type) {
  Packing packing = {engine, team, from, to, type, transpose, 1};
  team_run(team, pack_parts, &packing);
}

// Rows first..last of a matrix in a plain or block type, as float32
API void receptance_widen(const Engine* engine, const Matrix* from, int64_t first, int64_t last, float* to) {
  engine->widen(*from, first, last, to);
}

// y[rows, w.rows] = x[rows, w.cols] w^T as `forward` does it. scratch: receptance_multiply_bytes, aligned to 64
API void receptance_multiply(const Engine* engine, Team* team, const Matrix* w, const float* x, int64_t rows, float* y,
                             void* scratch) {
  engine->multiply(*w, x, rows, y, team, scratch);
}

API int64_t receptance_multiply_bytes(const Engine* engine, const Matrix* w, int64_t rows, int32_t threads) {
  return engine->multiply_bytes(*w, rows, threads);
}

// The next token of each row. scratch: 3 vocab numbers for each thread of the team
API void receptance_sample(const Engine* engine, Team* team, SampleRow* rows, int64_t count, int64_t vocab,
                           float* scratch) {
  engine->sample(rows, count, vocab, team, scratch);
}
