// What all parts of the core share: matrices, the model, the state, and the team of threads.
//
// The computation (engine.h) is compiled once for each instruction set, see the isa_*.cpp files; everything here is plain
// data, so that no inline function can be linked from one instruction set into another.
#pragma once
#include <cstdint>

namespace receptance {

// How a matrix is stored. The first three are row by row, as in checkpoints. Q8 and Q4 hold blocks of 32 numbers with one
// half-precision scale each, 16 rows interleaved for dot products ("packed"). The
// next five are row by row in the block formats of GGUF files (blocks.h), read where they lie, and the five after them the same
// numbers and scales packed. Panels hold plain numbers of 16 rows column by column: low-rank maps, whose rows are short. Bands
// hold the numbers and scales of Q8_0 and Q4_0 so that hidden units of a value matrix can be left out (bands.h).
enum Type : int32_t {
  F32 = 0, F16, BF16, Q8, Q4, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K, PACKED_Q8_0, PACKED_Q4_0, PACKED_Q4_K, PACKED_Q5_K, PACKED_Q6_K,
  PANEL_F32, PANEL_F16, PANEL_BF16, BAND_Q8_0, BAND_Q4_0
};

constexpr int BLOCK = 32;  // numbers that share a scale
constexpr int GROUP = 16;  // rows interleaved in a packed matrix

// Packed: for each group of 16 rows and each block of 32 columns, 16 scales (f16) and then the numbers, in vectors of 16 rows
// x 4 columns (Q8 with AVX2: 2). Q8: 8 vectors of 64 bytes. Q4: 4 vectors of 64 bytes, whose low halves are columns 0-15 and
// high halves 16-31.
constexpr int Q8_BYTES = GROUP * 2 + GROUP * BLOCK;
constexpr int Q4_BYTES = GROUP * 2 + GROUP * BLOCK / 2;

// The K formats packed: for each group of 16 rows and 256 columns, 16 scales (f16), 16 scales of the minima (f16, not Q6_K), the
// small scales as bytes, of two neighbouring parts of each row side by side, the minima as bytes (not Q6_K), and for each 32
// columns the low halves as in Q4, then the higher bits: Q5_K 64 bytes, bit i for columns 4 i to 4 i + 3; Q6_K twice 64 bytes,
// bits 2 i and 2 i + 1 for columns 8 i to 8 i + 3 in the first and 8 i + 4 to 8 i + 7 in the second.
constexpr int packed_numbers(int32_t type) { return type == Q8 || type == Q4 ? BLOCK : 8 * BLOCK; }
constexpr int packed_bytes(int32_t type) {  // of 16 rows and so many columns
  return type == Q8 ? Q8_BYTES : type == Q4 ? Q4_BYTES : type == Q4_K ? 320 + 8 * 256 : type == Q5_K ? 320 + 8 * 320 : 288 + 8 * 384;
}

struct Matrix {
  int64_t rows, cols;
  const void* data;  // null: absent
  int32_t type;
  int32_t exact;  // 16-bit numbers meet x as float32 always, not as integers where that is faster
};

// Channel mix. `value` is stored transposed, [F, C], in a plain type or in bands, so that the rows of inactive hidden units need
// not be read; but in the other formats of GGUF files as it is there, [C, F].
struct ChannelMix {
  const float *mix_k, *mix_r;  // weights of (previous - current)
  Matrix key, receptance, value;
};

enum Mix { IN_R, IN_W, IN_K, IN_V, IN_A, IN_G, MIXES };  // inputs of the time mix

struct Layer {
  const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
  const float* mix[MIXES];
  const float *lnx_weight, *lnx_bias;
  const float *decay;  // 4, 5: the log-decay; 6: its raw base; 7: w0
  const float* bonus;  // 4: time_first; 5, 6: u; 7: r_k
  const float *a0, *v0, *k_k, *k_a;  // 7
  const float* mix_x;                // 6
  Matrix receptance, key, value, gate, output;
  Matrix w1, w2, a1, a2, v1, v2, g1, g2;  // low rank, [rank, C] and [C, rank]
  Matrix maa1, maa2[5];                   // 6: [5 rank, C] and [C, rank], in the order w, k, v, r, g
  ChannelMix ffn, ffn_pre;                // ffn_pre: in place of the first time mix of some RWKV-4
};

struct Model {
  int32_t version;  // 4, 5, 6 or 7
  int32_t n_layer, n_embd, dim_att, dim_ffn, vocab, head_size;
  int32_t has_gate, pre_ffn;
  Matrix emb, head;
  const float *ln0_weight, *ln0_bias, *lnout_weight, *lnout_bias;
  Layer* layers;
};

// The tensors of a State, float32. In and out may be the same memory.
struct State {
  float *att_shift, *ffn_shift;  // [L, B, C]
  float* wkv;                    // [L, B, H, N, N], value x key
  float *num, *den, *exp;        // [L, B, A], version 4
};

// A team of threads, which all run the same function and meet in barriers. Waiting spins for some microseconds and then
// gives the core away: a spinning team on a busy machine would be many times slower than one thread.
struct Team;
Team* team_new(int threads);  // null: the system does not start so many
void team_free(Team*);
int team_size(const Team*);
void team_run(Team*, void (*work)(void* context, int thread), void* context);  // returns when all threads have
void team_barrier(Team*);
int64_t team_next(Team*);  // a ticket: 0, 1, 2, ... among all threads since the last barrier

struct Request {
  const Model* model;
  Team* team;
  const int32_t* tokens;   // all rows, one after the other
  const int32_t* lengths;  // [B]
  int32_t batch;
  const State *in, *out;
  float* logits;      // [number of tokens, V] or [B, V]; rows of length 0 are left alone
  int32_t last_only;  // logits of each row's last token alone
  void* scratch;      // `scratch_bytes` bytes, aligned to 64
  int64_t chunk_rows; // at most so many tokens at once (at least one for each row)
  int64_t active;     // out: hidden units that were not zero, and
  int64_t hidden;     // out: all of them, where the sparse product was used
  // Null: sequence s has row s of the state. Else row from[s] of `in` becomes row to[s] of `out`, both of `pool` rows; a
  // row that is written is no other sequence's.
  const int32_t *from, *to;
  int64_t pool;
};

// How the next token of one row is drawn: the fields of SamplingParams, and what the row has read and written.
struct SampleRow {
  const float* logits;       // [vocab]
  const uint32_t* mask;      // null, or a bit for each token that may come
  float* occurrence;         // [vocab]: decayed number of times each token was generated; changed
  uint8_t* seen;             // [vocab]: 0 = never, 1 = in the prompt, GENERATED; null: no penalties; changed
  const float* weight;       // [vocab]: what an occurrence counts where digits are not penalised
  const int32_t* bias_ids;
  const float* bias_values;
  double top_p, uniform;     // top_p above 1: all
  float temperature, min_p, presence, frequency, repetition, decay;
  int32_t biases, top_k, count_digits;
  int32_t token;             // out
};
constexpr uint8_t GENERATED = 2;

struct Engine {
  const char* name;
  bool (*supported)();
  int64_t (*scratch_bytes)(const Model&, int64_t rows, int threads);
  void (*forward)(Request&);
  // Numbers [rows, cols] of a plain type into a quantised one, or of a block format into the same packed (of whole groups of
  // rows); groups first..last of the result.
  void (*pack)(const Matrix& from, void* to, int32_t type, int64_t first_group, int64_t last_group);
  void (*pack_lines)(const Matrix& from, bool transpose, void* to, int32_t type, int64_t first, int64_t last);
  // Rows first..last of a matrix in a plain or block type, as float32
  void (*widen)(const Matrix& from, int64_t first, int64_t last, float* to);
  // y[rows, w.rows] = x[rows, w.cols] w^T, on all threads, x rounded as in `forward`; scratch as in `multiply_bytes`
  void (*multiply)(const Matrix& w, const float* x, int64_t rows, float* y, Team*, void* scratch);
  int64_t (*multiply_bytes)(const Matrix& w, int64_t rows, int threads);
  // The next token of each row; scratch: 3 vocab numbers for each thread
  void (*sample)(SampleRow* rows, int64_t count, int64_t vocab, Team*, float* scratch);
};

const Engine* engine_portable();
const Engine* engine_avx2();
const Engine* engine_avx512();
const Engine* engine_amx();
const Engine* engine_neon();

constexpr bool is_blocks(int32_t type) { return type >= Q8_0 && type <= Q6_K; }
constexpr bool is_quantised(int32_t type) { return type >= Q8 && type < PANEL_F32; }
constexpr bool is_bands(int32_t type) { return type >= BAND_Q8_0; }
constexpr bool has_rows_of_outputs(int32_t type) { return type >= Q8_0 && !is_bands(type); }  // of a value matrix

constexpr int64_t line_bytes(int32_t type, int64_t cols) {  // of one row of a matrix in a type that has rows; else on average
  switch (type) {
    case F32: case PANEL_F32: return cols * 4;
    case Q8: case Q8_0: case BAND_Q8_0: return cols / BLOCK * (2 + BLOCK);
    case Q4: case Q4_0: case BAND_Q4_0: return cols / BLOCK * (2 + BLOCK / 2);
    case Q4_K: return cols / 256 * 144;
    case Q5_K: return cols / 256 * 176;
    case Q6_K: return cols / 256 * 210;
    case PACKED_Q8_0: return cols / BLOCK * Q8_BYTES / GROUP;  // on average
    case PACKED_Q4_0: return cols / BLOCK * Q4_BYTES / GROUP;
    case PACKED_Q4_K: return cols / 256 * packed_bytes(Q4_K) / GROUP;
    case PACKED_Q5_K: return cols / 256 * packed_bytes(Q5_K) / GROUP;
    case PACKED_Q6_K: return cols / 256 * packed_bytes(Q6_K) / GROUP;
    default: return cols * 2;
  }
}

}  // namespace receptance
