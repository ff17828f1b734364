// RWKV-5 and 6's WKV for 16-bit inputs: tensor cores (tf32), the state in registers.
//
// Macros: ELEMENT (Bf16, Half) of r, k, v, y; DECAY (float or one of those) of w; HEAD: 32, 64 or 128; RESETS (0, 1);
// VALUES_BUFFERS: 2 takes more shared memory, and the gradients of values wait for no barrier of their own.
//
// A block walks one head's tokens, or a segment of them, in chunks of 16. With upto and before the sums of the log-decay
// with and without a token's own, total the chunk's, and S (value x key) the state at its start:
//
//     y = A v + (r e^before) S^T        A[t, s] = Σ_n r_t k_s e^{before_t - upto_s} for s < t, Σ_n r_t u k_t for s = t
//     S = S diag(e^total) + v^T (k e^{total - upto})
//
// Backward, with G = gy v^T below the diagonal and dS the gradient of the state at the chunk's end:
//
//     gv = A^T gy + (k e^{total - upto}) dS^T      dS = dS diag(e^total) + gy^T (r e^before)
//     gr = G (k e^{-upto}) e^before + (gy S) e^before,  gk = G^T (r e^before) e^{-upto} + (v dS) e^{total - upto}
//
// and the bonus's terms. The two exponents of a pair (t, s) meet in the middle of s's half of the chunk, after its fourth
// token: one of them may be positive, by four decays at most, and FLOOR keeps that finite.
//
// Who holds what. Lane 4 g + t of a warp has tokens g and g + 8 and key channels 2t, 2t + 1, 8 + 2t, 9 + 2t of the 16
// that are the warp's: x[h][c], h the token's half, c = 2 b + i the channel 8 b + 2 t + i. These are at once the operands
// of products over channels, and accumulators over tokens. Where the tokens are summed over, the two indices of an
// operand 8 wide are taken as 2t and 2t + 1 instead of t and t + 4 on both sides: an accumulator is an operand as it is.

#include "device.cuh"

#ifndef GRADIENT_BLOCKS
#define GRADIENT_BLOCKS (HEAD == 128 ? 1 : 2)
#endif
#ifndef WALK_BLOCKS
#define WALK_BLOCKS (HEAD == 128 ? 1 : 4)
#endif
#ifndef VALUES_BUFFERS
#define VALUES_BUFFERS 1
#endif
typedef ELEMENT E;
typedef DECAY D;
constexpr int N = HEAD, L = 16;
constexpr int WARPS = N / 16, THREADS = 32 * WARPS, BLOCKS = N / 8;  // BLOCKS: of 8 channels
constexpr float FLOOR = -18 * LOG2_E;            // of one token's log-decay, base 2: e^-18 = 1.5e-8

__device__ __forceinline__ float low(u32 x) { return E::wide((u16)x); }
__device__ __forceinline__ float high(u32 x) { return E::wide((u16)(x >> 16)); }
__device__ __forceinline__ u32 bits(float x) { return __float_as_uint(x); }  // of what tf32 holds exactly

// Tiles in shared memory: pieces of 16 bytes change places, so that a column of rows lies in different banks.
__device__ __forceinline__ int place(int row, int n) {
    int swap = N == 32 ? row >> 1 & 3 : row & 7;
    return row * N + ((n / 8) ^ swap) * 8 + n % 8;
}
__device__ __forceinline__ int place(int row, int n, const float*) { return row * N + ((n / 4) ^ (row & 3) * 2) * 4 + n % 4; }
__device__ __forceinline__ int place(int row, int n, const u16*) { return place(row, n); }

template <class T> struct Raw { typedef u16 type; };
template <> struct Raw<float> { typedef float type; };
typedef typename Raw<D>::type DecayBits;

__device__ __forceinline__ void two(const float* p, float& x, float& y) { x = p[0], y = p[1]; }
__device__ __forceinline__ void two(const u16* p, float& x, float& y) {
    u32 word = *(const u32*)p;
    x = low(word), y = high(word);
}

// ROWS rows of a tile, of which the first `left` exist and the rest are zeros; a thread takes the same piece of each 16th
// row, or each 8th of float32, and so the same place in it
template <int ROWS, class T> __device__ __forceinline__ void fetch(T* tile, const T* from, int stride, int left) {
    constexpr int PIECE = 16 / sizeof(T), PIECES = N / PIECE, STEP = THREADS / PIECES;
    int row = threadIdx.x / PIECES, n = threadIdx.x % PIECES * PIECE;
    T* to = tile + place(row, n, tile);
    from += (i64)row * stride + n;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) copy_async(to + i * N, from + (i64)i * stride, row + i < left);
}

struct Lane {
    int warp, lane, g, t, own;  // own: the warp's first channel
    __device__ Lane() : warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4), own(16 * warp) {}
};

// Channel block b lies a bit of the place away, the token's half eight rows.
template <class T> __device__ __forceinline__ void read(const T* tile, const Lane& my, float (&x)[2][4]) {
    int at = place(my.g, my.own + 2 * my.t, tile);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int b = 0; b < 2; b++) two(tile + (at ^ 8 * b) + 8 * h * N, x[h][2 * b], x[h][2 * b + 1]);
}

__device__ __forceinline__ float from_lane(float x, int lane) { return __shfl_sync(~0u, x, lane); }

// Sums over tokens: with those before (base 2), and over all
__device__ __forceinline__ void sums(const float (&x)[2][4], const Lane& my, float (&upto)[2][4], float (&total)[4]) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = x[h][c];
#pragma unroll
            for (int d = 1; d < 8; d *= 2) {
                float other = __shfl_up_sync(~0u, sum, 4 * d);
                if (my.g >= d) sum += other;
            }
            upto[h][c] = sum;
        }
        upto[1][c] += from_lane(upto[0][c], 28 + my.t);
        total[c] = from_lane(upto[1][c], 28 + my.t);
    }
}

struct Documents {  // of a chunk, counted from the one that began before it
    u32 begins;     // bit t: token t begins one
    __device__ __forceinline__ Documents(const u8* resets, int lane, int left) : begins(0) {
#if RESETS
        begins = __ballot_sync(~0u, lane < min(left, L) && resets[min(lane, max(left - 1, 0))] != 0);
#endif
    }
    __device__ __forceinline__ int of(int t) const { return RESETS ? __popc(begins & ((2u << t) - 1)) : 0; }
    __device__ __forceinline__ int last() const { return RESETS ? __popc(begins) : 0; }
};

struct Factors {
    float upto[2][4], before[2][4], total[4], w[2][4];
    __device__ __forceinline__ void make(const DecayBits* tile, const Lane& my) {
        read(tile, my, w);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int c = 0; c < 4; c++) w[h][c] = fmaxf(w[h][c] * LOG2_E, FLOOR);
        sums(w, my, upto, total);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int c = 0; c < 4; c++) before[h][c] = upto[h][c] - w[h][c];
    }
    // e^before for tokens that see the chunk's start, e^{total - upto} for those its end sees
    __device__ __forceinline__ float read_(int h, int c, int document) const { return document == 0 ? ex2(before[h][c]) : 0.f; }
    __device__ __forceinline__ float write_(int h, int c, bool is_last) const { return is_last ? ex2(total[c] - upto[h][c]) : 0.f; }
    __device__ __forceinline__ float decay(int c, bool whole) const { return whole ? ex2(total[c]) : 0.f; }
    // rise0, rise1: of a reading token for keys in the first and second half; fall: of a key
    __device__ __forceinline__ void meet(const Lane& my, float (&rise0)[2][4], float (&rise1)[4], float (&fall)[2][4]) const {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float middle0 = from_lane(upto[0][c], 12 + my.t), middle1 = from_lane(upto[1][c], 12 + my.t);
            rise0[0][c] = ex2(before[0][c] - middle0);
            rise0[1][c] = ex2(before[1][c] - middle0);
            rise1[c] = ex2(before[1][c] - middle1);
            fall[0][c] = ex2(middle0 - upto[0][c]);
            fall[1][c] = ex2(middle1 - upto[1][c]);
        }
    }
};

// Tokens x channels turned round: channel n's row of 16 holds tokens 2q, 2q + 8, 2q + 1, 2q + 9 for q = 0..3, which
// change places with n. first: a multiple of 8.
__device__ __forceinline__ void turn(u32* to, int first, const Lane& my, const u32 (&x)[2][4]) {
    to += (first + 2 * my.t) * L + 4 * ((my.g / 2) ^ my.t) + 2 * (my.g % 2);
#pragma unroll
    for (int c = 0; c < 4; c++) *(uint2*)(to + (8 * (c / 2) + c % 2) * L) = make_uint2(x[0][c], x[1][c]);
}
// channel first + g's row
__device__ __forceinline__ uint4 row_of(const u32* from, int first, const Lane& my) {
    return *(const uint4*)(from + my.g * L + 4 * (my.t ^ (my.g / 2)) + first * L);
}

// d += a b for an accumulator b = (c0, c1) or (c2, c3) of a state
__device__ __forceinline__ void times_state(float (&d0)[4], float (&d1)[4], const u32 (&a)[4], const float (&s)[4]) {
    const u32 b0[2] = {to_tf32(s[0]), to_tf32(s[1])}, b1[2] = {to_tf32(s[2]), to_tf32(s[3])};
    mma_tf32(d0, a, b0);
    mma_tf32(d1, a, b1);
}

// d += a b, 16 channels, for inputs a and a state b rounded to bfloat16; as tf32 if the inputs are no bfloat16
__device__ __forceinline__ void multiply_state(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    if (E::IS_BF16) {
        mma_bf16(d, a, b);
    } else {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const u32 rows[4] = {bits(low(a[2 * e])), bits(low(a[2 * e + 1])), bits(high(a[2 * e])), bits(high(a[2 * e + 1]))};
            const u32 columns[2] = {b[e] << 16, b[e] & 0xffff0000u};
            mma_tf32(d, rows, columns);
        }
    }
}

// The factor of a state as the tensor cores take it: [BLOCKS, 32 lanes, 4]
__device__ __forceinline__ void store_operand(u32* operand, const u32 (&q)[2][4], const Lane& my) {
#pragma unroll
    for (int b = 0; b < 2; b++)
        *(uint4*)(operand + ((2 * my.warp + b) * 32 + my.lane) * 4) = make_uint4(q[0][2 * b], q[1][2 * b], q[0][2 * b + 1], q[1][2 * b + 1]);
}
// A or its transpose over this warp's channels, to [WARPS, 2, 32, 4]; bonus: its diagonal, this lane's channels of tokens g, g + 8
__device__ __forceinline__ void store_part(float* parts, float (&scores)[2][4], float (&bonus)[2], const Lane& my) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        bonus[h] += __shfl_xor_sync(~0u, bonus[h], 1);
        bonus[h] += __shfl_xor_sync(~0u, bonus[h], 2);
        if (my.g / 2 == my.t) scores[h][2 * h + my.g % 2] = bonus[h];
    }
#pragma unroll
    for (int b = 0; b < 2; b++)
        *(float4*)(parts + ((my.warp * 2 + b) * 32 + my.lane) * 4) = make_float4(scores[b][0], scores[b][1], scores[b][2], scores[b][3]);
}
// This warp's value channels of v or gy: x[half][channel g or g + 8][token 2t + i]
__device__ __forceinline__ void read_values(float (&x)[2][2][2], const u16* tile, const Lane& my) {
    u32 words[4];
    load_transposed(words, tile + place(my.lane / 16 * 8 + my.lane % 8, my.own + my.lane / 8 % 2 * 8));
#pragma unroll
    for (int q = 0; q < 4; q++) x[q / 2][q % 2][0] = low(words[q]), x[q / 2][q % 2][1] = high(words[q]);
}
// y += A x; TURNED: parts and rows are A's transpose
template <bool TURNED>
__device__ __forceinline__ void multiply_pairs(float (&y)[2][4], const float* parts, const float (&x)[2][2][2], const Documents& documents, const Lane& my) {
#pragma unroll
    for (int b = 0; b < 2; b++) {
        float a[4] = {};
#pragma unroll
        for (int p = 0; p < WARPS; p++) {
            float4 part = *(const float4*)(parts + ((p * 2 + b) * 32 + my.lane) * 4);
            a[0] += part.x, a[1] += part.y, a[2] += part.z, a[3] += part.w;
        }
        u32 masked[4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int row = my.g + 8 * (c / 2), column = 8 * b + 2 * my.t + c % 2;
            bool seen = (TURNED ? column >= row : row >= column) && (!RESETS || documents.of(row) == documents.of(column));
            masked[c] = seen ? to_tf32(a[c]) : 0;
        }
        const u32 rows[4] = {masked[0], masked[2], masked[1], masked[3]};
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const u32 columns[2] = {bits(x[b][m][0]), bits(x[b][m][1])};
            mma_tf32(y[m], rows, columns);
        }
    }
}
// This warp's 16 channels of 16 tokens, of which `left` exist; out: the chunk's first token
__device__ __forceinline__ void write_values(u16* out, int stride, int left, const float (&y)[2][4], const Lane& my) {
    out += (i64)my.g * stride + my.own + 2 * my.t;
#pragma unroll
    for (int h = 0; h < 2; h++, out += (i64)8 * stride)
        if (my.g + 8 * h < left)
#pragma unroll
            for (int m = 0; m < 2; m++) *(u32*)(out + 8 * m) = E::two(y[m][2 * h], y[m][2 * h + 1]);
}

struct Inputs {
    const u16 *r, *k, *v, *gy;
    const DecayBits* w;
    int w_t;  // w's step from token to token, 0 if all have the same
    const float* u;
    const u8* resets;
    int T, H, segments, length;  // of a segment, whole chunks
};

struct Where {
    int b, segment, h, first, stop;  // tokens of the segment
    i64 state, row;                  // number of the state, the row's first token in [B T]
    // left_out: segments of a row that the grid leaves out, at its end or from_end at its beginning
    __device__ __forceinline__ Where(const Inputs& in, int left_out = 0, bool from_end = false) {
        int i = blockIdx.x;
        h = i % in.H, i /= in.H;
        segment = i % (in.segments - left_out) + (from_end ? left_out : 0), b = i / (in.segments - left_out);
        state = ((i64)b * in.segments + segment) * in.H + h;
        first = segment * in.length, stop = min(in.T, first + in.length);
        row = (i64)b * in.T;
    }
    __device__ __forceinline__ i64 at(const Inputs& in, int token) const { return ((row + token) * in.H + h) * N; }
    __device__ __forceinline__ i64 saved(const Inputs& in, int token) const {
        return (((i64)b * ((in.T + L - 1) / L) + token / L) * in.H + h) * N * N;
    }
    __device__ __forceinline__ i64 w_at(const Inputs& in, int token) const { return (row + token) * in.w_t + h * N; }
};

// OUTPUT: y and the state from first to last chunk. Without, only the state, from nothing, and the product of the decays;
// then BACK is the state's gradient, from gy and from last to first.
template <bool BACK, bool OUTPUT>
__device__ __forceinline__ void walk(const Inputs& in, const float* starts, u16* out, u16* saved, float* ends, float* decays, float* end) {
    char* shared = dynamic_shared();
    struct Tiles {
        u16 r[L * N], k[L * N], x[L * N];
        DecayBits w[L * N];
    };
    Tiles* tiles = (Tiles*)shared;                 // two: one is filled while the other is used
    u32* operand = (u32*)(tiles + 2);              // [BLOCKS, 32 lanes, 4]: the factor of the state
    u32* addend = operand + L * N;                 // what the state takes up, turned
    float* parts = (float*)(addend + L * N);       // [WARPS, 2, 32, 4]: A over each warp's channels
    float* decay = parts + WARPS * L * L;          // [N]
    u16* rounded = (u16*)(decay + N);              // [N, N], the state on its way to memory, a warp's rows each
    const Lane my;
    const Where at(in, OUTPUT ? 0 : 1, BACK);
    const u16* x_ = BACK ? in.gy : in.v;
    int chunks = (at.stop - at.first + L - 1) / L;

    auto fetch_chunk = [&](int i) {
        int token = at.first + (BACK ? chunks - 1 - i : i) * L, left = at.stop - token;
        Tiles& tile = tiles[i % 2];
        i64 from = at.at(in, token);
        int stride = in.H * N;
        if (OUTPUT || BACK) fetch<L>(tile.r, in.r + from, stride, left);
        if (OUTPUT || !BACK) fetch<L>(tile.k, in.k + from, stride, left);
        fetch<L>(tile.x, x_ + from, stride, left);
        fetch<L>(tile.w, in.w + at.w_at(in, token), in.w_t, left);
        commit_copies();
    };

    float s[BLOCKS][4], u[4], product[4] = {1, 1, 1, 1};
    // rows my.own + g and + 8 (value channels), columns 8 j + 2 t + i (key channels)
    auto element = [&](int j, int c) { return (my.own + my.g + 8 * (c / 2)) * N + 8 * j + 2 * my.t + c % 2; };
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[j][c] = starts ? starts[at.state * N * N + element(j, c)] : 0.f;
#pragma unroll
    for (int c = 0; c < 4; c++) u[c] = OUTPUT ? in.u[at.h * N + my.own + 8 * (c / 2) + 2 * my.t + c % 2] : 0.f;

    if (chunks > 0) fetch_chunk(0);
    for (int i = 0; i < chunks; i++) {
        int chunk = BACK ? chunks - 1 - i : i, token = at.first + chunk * L, left = at.stop - token;
        await_copies();
        __syncthreads();
        if (i + 1 < chunks) fetch_chunk(i + 1);
        const Tiles& tile = tiles[i % 2];
        const Documents documents(in.resets + at.row + token, my.lane, left);
        int doc[2] = {documents.of(my.g), documents.of(my.g + 8)}, last = documents.last();

        Factors f;
        f.make(tile.w, my);
        float r[2][4], k[2][4];
        if (OUTPUT || BACK) read(tile.r, my, r);
        if (OUTPUT || !BACK) read(tile.k, my, k);
        u32 reads[2][4], writes[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (OUTPUT || BACK) reads[h][c] = to_tf32(r[h][c] * f.read_(h, c, doc[h]));
                if (OUTPUT || !BACK) writes[h][c] = to_tf32(k[h][c] * f.write_(h, c, doc[h] == last));
            }
        turn(addend, my.own, my, BACK ? reads : writes);
        if (my.g == 0)
#pragma unroll
            for (int c = 0; c < 4; c++) decay[my.own + 8 * (c / 2) + 2 * my.t + c % 2] = f.decay(c, last == 0);
        if (!OUTPUT)
#pragma unroll
            for (int c = 0; c < 4; c++) product[c] *= f.decay(c, last == 0);
        if (OUTPUT) {
            store_operand(operand, reads, my);
            float rise0[2][4], rise1[4], fall[2][4], scores[2][4] = {}, bonus[2] = {};
            f.meet(my, rise0, rise1, fall);
            u32 r0[2][4], r1[4], kf[2][4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                r1[c] = to_tf32(r[1][c] * rise1[c]);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    r0[h][c] = to_tf32(r[h][c] * rise0[h][c]);
                    kf[h][c] = to_tf32(k[h][c] * fall[h][c]);
                    bonus[h] += r[h][c] * u[c] * k[h][c];
                }
            }
#pragma unroll
            for (int b = 0; b < 2; b++) {
                int c = 2 * b, e = c + 1;  // rows are readers, columns are keys
                const u32 a0[4] = {r0[0][c], r0[1][c], r0[0][e], r0[1][e]}, b0[2] = {kf[0][c], kf[0][e]};
                const u32 a1[4] = {0, r1[c], 0, r1[e]}, b1[2] = {kf[1][c], kf[1][e]};
                mma_tf32(scores[0], a0, b0);
                mma_tf32(scores[1], a1, b1);
            }
            store_part(parts, scores, bonus, my);
        }
        __syncthreads();

        float x[2][2][2];
        read_values(x, tile.x, my);
        if (OUTPUT) {
            if (saved) {
                u16* own = rounded + my.own * N;
                int to = place(my.g, 2 * my.t);
#pragma unroll
                for (int j = 0; j < BLOCKS; j++) {
                    *(u32*)(own + (to ^ 8 * j)) = two_bf16(s[j][0], s[j][1]);
                    *(u32*)(own + (to ^ 8 * j) + 8 * N) = two_bf16(s[j][2], s[j][3]);
                }
                __syncwarp();
                uint4* whole = (uint4*)(saved + at.saved(in, token) + my.own * N) + my.lane;  // rows in one go
#pragma unroll
                for (int i = 0; i < N / 16; i++) {
                    int piece = 32 * i + my.lane;
                    whole[32 * i] = *(const uint4*)(own + place(piece / BLOCKS, piece % BLOCKS * 8));
                }
                __syncwarp();
            }
            float y[2][4] = {};
            multiply_pairs<false>(y, parts, x, documents, my);
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) {
                uint4 q = *(const uint4*)(operand + (j * 32 + my.lane) * 4);
                const u32 a[4] = {q.x, q.y, q.z, q.w};
                times_state(y[0], y[1], a, s[j]);
            }
            write_values(out + at.at(in, token), in.H * N, left, y, my);
        }
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            float2 d = *(const float2*)(decay + 8 * j + 2 * my.t);
            s[j][0] *= d.x, s[j][1] *= d.y, s[j][2] *= d.x, s[j][3] *= d.y;
            uint4 q = row_of(addend, 8 * j, my);
            const u32 b0[2] = {q.x, q.z}, b1[2] = {q.y, q.w};
            const u32 a0[4] = {bits(x[0][0][0]), bits(x[0][1][0]), bits(x[0][0][1]), bits(x[0][1][1])};
            const u32 a1[4] = {bits(x[1][0][0]), bits(x[1][1][0]), bits(x[1][0][1]), bits(x[1][1][1])};
            mma_tf32(s[j], a0, b0);
            mma_tf32(s[j], a1, b1);
        }
    }
    float* to = OUTPUT ? (at.segment == in.segments - 1 ? end + ((i64)at.b * in.H + at.h) * N * N : nullptr) : ends + at.state * N * N;
    if (to)
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            *(float2*)(to + element(j, 0)) = make_float2(s[j][0], s[j][1]);
            *(float2*)(to + element(j, 2)) = make_float2(s[j][2], s[j][3]);
        }
    if (!OUTPUT && my.g == 0)
#pragma unroll
        for (int c = 0; c < 4; c++) decays[at.state * N + my.own + 8 * (c / 2) + 2 * my.t + c % 2] = product[c];
}

#define INPUTS                                                                                                        \
    const u16 *r, const DecayBits *w, const u16 *k, const u16 *v, const float *u, const u16 *gy, const u8 *resets,    \
        int w_t, int T, int H, int segments, int length
#define GIVEN                                                   \
    Inputs { r, k, v, gy, w, w_t, u, resets, T, H, segments, length }

extern "C" __global__ void __launch_bounds__(THREADS, WALK_BLOCKS)
forward(INPUTS, const float* starts, u16* y, u16* saved, float* end) {
    walk<false, true>(GIVEN, starts, y, saved, nullptr, nullptr, end);
}
// Grid: all segments but the last one (backward_ends: the first), whose end (start) nothing is chained to
extern "C" __global__ void __launch_bounds__(THREADS)
forward_ends(INPUTS, float* ends, float* decays) {
    walk<false, false>(GIVEN, nullptr, nullptr, nullptr, ends, decays, nullptr);
}
extern "C" __global__ void __launch_bounds__(THREADS)
backward_ends(INPUTS, float* ends, float* decays) {
    walk<true, false>(GIVEN, nullptr, nullptr, nullptr, ends, decays, nullptr);
}

// Every segment's start written over what the segment adds, from `first` on; from_end: from the last segment
extern "C" __global__ void chain(float* ends, const float* decays, const float* first, int H, int segments, int from_end) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, number = i / (N * N), b = number / H, h = number % H;
    i %= N * N;
    float state = first ? first[(i64)number * N * N + i] : 0.f;
    constexpr int AT_ONCE = 8;
    for (int done = 0; done < segments; done += AT_ONCE) {
        float own[AT_ONCE], decay[AT_ONCE];
        i64 at[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            int segment = min(done + j, segments - 1);
            bool is_read = done + j < segments - 1;
            at[j] = ((i64)b * segments + (from_end ? segments - 1 - segment : segment)) * H + h;
            own[j] = is_read ? ends[at[j] * N * N + i] : 0.f, decay[j] = is_read ? decays[at[j] * N + i % N] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (done + j < segments) ends[at[j] * N * N + i] = state;
            state = state * decay[j] + own[j];
        }
    }
}

// A place in a tile [N, N] of float32 where neither rows g, columns 2t nor rows 2t, columns g share banks
__device__ __forceinline__ int turning_place(int row, int n) {
    return row * N + ((n / 4) ^ ((row & 3) ^ (row >> 2 & 1)) * 2) * 4 + n % 4;
}

// gr, gk, gv, gw, the start state's gradient and each segment's share of gu, from the saved states and the gradients of the segments' end states
extern "C" __global__ void __launch_bounds__(THREADS, GRADIENT_BLOCKS)
gradients(INPUTS, const u16* saved, const float* ends, u16* gr_, u16* gk_, u16* gv_, D* gw_, float* gu_, float* start) {
    const Inputs in = GIVEN;
    struct Tiles {
        u16 r[L * N], k[L * N], v[L * N], gy[L * N], s[N * N];
        DecayBits w[L * N];
    };
    struct Own {  // a warp's, turned, and the chunk's decay
        u32 reads[L * L], keys[L * L], readers0[L * L], readers1[L * L];
        float decay[L];
    };
    Tiles* tiles = (Tiles*)dynamic_shared();
    const Lane my;
    Own& own = ((Own*)(tiles + 2))[my.warp];
    struct Shared {  // what all warps need for gv
        float turning[N * N];        // the state's gradient at the chunk's end, by keys
        u32 operand[L * N];          // its factor, as in walk
        float parts[WARPS * L * L];  // A's transpose over each warp's channels, [WARPS, 2, 32, 4]
    };
    Shared* shared = (Shared*)((Own*)(tiles + 2) + WARPS);
    const Where at(in);
    int chunks = (at.stop - at.first + L - 1) / L;

    auto fetch_chunk = [&](int i) {
        int token = at.first + (chunks - 1 - i) * L, left = at.stop - token;
        Tiles& tile = tiles[i % 2];
        i64 from = at.at(in, token);
        int stride = in.H * N;
        fetch<L>(tile.r, in.r + from, stride, left);
        fetch<L>(tile.k, in.k + from, stride, left);
        fetch<L>(tile.v, in.v + from, stride, left);
        fetch<L>(tile.gy, in.gy + from, stride, left);
        fetch<L>(tile.w, in.w + at.w_at(in, token), in.w_t, left);
        fetch<N>(tile.s, saved + at.saved(in, token), N, N);
        commit_copies();
    };

    // the state's gradient, turned round: rows my.own + g and + 8 (key channels), columns 8 j + 2 t + i (value channels)
    float gs[BLOCKS][4], bonus[4], gu[4] = {};
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) gs[j][c] = !ends ? 0.f : ends[at.state * N * N + (8 * j + 2 * my.t + c % 2) * N + my.own + my.g + 8 * (c / 2)];
#pragma unroll
    for (int c = 0; c < 4; c++) bonus[c] = in.u[at.h * N + my.own + 8 * (c / 2) + 2 * my.t + c % 2];

    float values[2][2][2];  // this warp's gy of the chunk whose gv is to be made
    auto finish_values = [&](int i) {
        int token = at.first + (chunks - 1 - i) * L, left = at.stop - token;
        const Shared& from = shared[i % VALUES_BUFFERS];
        const Documents documents(in.resets + at.row + token, my.lane, left);
        float gv[2][4] = {};
        multiply_pairs<true>(gv, from.parts, values, documents, my);
        int even = turning_place(2 * my.t, my.own + my.g), odd = turning_place(2 * my.t + 1, my.own + my.g);
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            uint4 q = *(const uint4*)(from.operand + (j * 32 + my.lane) * 4);
            const u32 a[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const u32 b[2] = {bits(from.turning[(even ^ 8 * m) + 8 * j * N]), bits(from.turning[(odd ^ 8 * m) + 8 * j * N])};
                mma_tf32(gv[m], a, b);
            }
        }
        write_values(gv_ + at.at(in, token), in.H * N, left, gv, my);
    };

    if (chunks > 0) fetch_chunk(0);
    for (int i = 0; i < chunks; i++) {
        int token = at.first + (chunks - 1 - i) * L, left = at.stop - token;
        await_copies();
        __syncthreads();
        if (i + 1 < chunks) fetch_chunk(i + 1);
        if (VALUES_BUFFERS == 2 && i > 0) finish_values(i - 1);
        const Tiles& tile = tiles[i % 2];
        const Documents documents(in.resets + at.row + token, my.lane, left);
        int doc[2] = {documents.of(my.g), documents.of(my.g + 8)}, last = documents.last();

        // Sums over the value channels: G, G^T, gy S, v dS; and what the chunk's whole decay gets.
        int rows = place(my.lane / 8 % 2 * 8 + my.lane % 8, my.lane / 16 * 8);  // j blocks further: ^ 8 j
        int columns = place(my.lane / 16 * 8 + my.lane % 8, my.lane / 8 % 2 * 8);
        int state = place(my.lane / 16 * 8 + my.lane % 8, my.own + my.lane / 8 % 2 * 8);
        float g[2][4] = {}, turned_g[2][4] = {}, from_start[2][4] = {}, to_end[2][4] = {}, through[2] = {};
#pragma unroll
        for (int j = 0; j < BLOCKS; j += 2) {
            u32 gy[4], v[4], s[4];
            load_matrices(gy, tile.gy + (rows ^ 8 * j));
            load_matrices(v, tile.v + (rows ^ 8 * j));
            load_transposed(s, tile.s + state + 8 * j * N);
            const u32 v0[2] = {v[0], v[2]}, v1[2] = {v[1], v[3]}, gy0[2] = {gy[0], gy[2]}, gy1[2] = {gy[1], gy[3]};
            E::multiply(g[0], gy, v0);
            E::multiply(g[1], gy, v1);
            E::multiply(turned_g[0], v, gy0);
            E::multiply(turned_g[1], v, gy1);
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const u32 of_s[2] = {s[b], s[2 + b]};
                const u32 of_gs[2] = {two_bf16(gs[j][2 * b], gs[j][2 * b + 1]), two_bf16(gs[j + 1][2 * b], gs[j + 1][2 * b + 1])};
                multiply_state(from_start[b], gy, of_s);
                multiply_state(to_end[b], v, of_gs);
#pragma unroll
                for (int e = 0; e < 2; e++)
                    through[b] += Bf16::wide((u16)of_s[e]) * gs[j + e][2 * b] + Bf16::wide((u16)(of_s[e] >> 16)) * gs[j + e][2 * b + 1];
            }
        }
        float g_bonus[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            g_bonus[h] = from_lane(my.g % 2 ? g[h][2 * h + 1] : g[h][2 * h], 4 * my.g + my.g / 2);
            through[h] += __shfl_xor_sync(~0u, through[h], 1);
            through[h] += __shfl_xor_sync(~0u, through[h], 2);
        }

        Factors f;
        f.make(tile.w, my);
        float r[2][4], k[2][4], rise0[2][4], rise1[4], fall[2][4];
        read(tile.r, my, r);
        read(tile.k, my, k);
        f.meet(my, rise0, rise1, fall);
        u32 reads[2][4], writes[2][4], r0[2][4], r1[2][4], kf[2][4];
        float diagonal[2] = {};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            r1[0][c] = 0, r1[1][c] = to_tf32(r[1][c] * rise1[c]);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float factor = f.read_(h, c, doc[h]);
                reads[h][c] = to_tf32(r[h][c] * factor);
                from_start[c / 2][2 * h + c % 2] *= factor;
                factor = f.write_(h, c, doc[h] == last);
                writes[h][c] = to_tf32(k[h][c] * factor);
                to_end[c / 2][2 * h + c % 2] *= factor;
                diagonal[h] += r[h][c] * bonus[c] * k[h][c];
                r0[h][c] = to_tf32(r[h][c] * rise0[h][c]);
                kf[h][c] = to_tf32(k[h][c] * fall[h][c]);
            }
        }
        {
            Shared& to_all = shared[i % VALUES_BUFFERS];
            store_operand(to_all.operand, writes, my);
            float scores[2][4] = {};
#pragma unroll
            for (int b = 0; b < 2; b++) {
                int c = 2 * b, e = c + 1;  // rows are keys, columns are readers
                const u32 a0[4] = {kf[0][c], 0, kf[0][e], 0}, b0[2] = {r0[0][c], r0[0][e]}, b1[2] = {r0[1][c], r0[1][e]};
                const u32 a1[4] = {0, kf[1][c], 0, kf[1][e]}, b2[2] = {r1[1][c], r1[1][e]};
                mma_tf32(scores[0], a0, b0);
                mma_tf32(scores[1], a0, b1);
                mma_tf32(scores[1], a1, b2);
            }
            store_part(to_all.parts, scores, diagonal, my);
            int to = turning_place(my.own + my.g, 2 * my.t);
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) {
                *(uint2*)(to_all.turning + (to ^ 8 * j)) = make_uint2(to_tf32(gs[j][0]), to_tf32(gs[j][1]));
                *(uint2*)(to_all.turning + (to ^ 8 * j) + 8 * N) = make_uint2(to_tf32(gs[j][2]), to_tf32(gs[j][3]));
            }
        }
        __syncwarp();  // the chunk before has been read
        turn(own.reads, 0, my, reads);
        turn(own.keys, 0, my, kf);
        turn(own.readers0, 0, my, r0);
        turn(own.readers1, 0, my, r1);
        if (my.g == 0)
#pragma unroll
            for (int c = 0; c < 4; c++) own.decay[8 * (c / 2) + 2 * my.t + c % 2] = f.decay(c, last == 0);
        __syncwarp();

        float gr[2][4], gk[2][4], suffix[2][4], x[2][4], g_total[4];
        {
            u32 a[2][4], t[2][4];
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    int row = my.g + 8 * (c / 2), column = 8 * b + 2 * my.t + c % 2;
                    bool same = !RESETS || documents.of(row) == documents.of(column);
                    a[b][c] = row > column && same ? to_tf32(g[b][c]) : 0;
                    t[b][c] = row < column && same ? to_tf32(turned_g[b][c]) : 0;
                }
            float sum0[2][4] = {}, sum1[2][4] = {}, back[2][4] = {};
            const u32 a0[4] = {a[0][0], a[0][2], a[0][1], a[0][3]}, a1[4] = {a[1][0], a[1][2], a[1][1], a[1][3]};
            const u32 c0[4] = {t[0][0], 0, t[0][1], 0}, c1[4] = {t[1][0], 0, t[1][1], 0}, c2[4] = {0, t[1][2], 0, t[1][3]};
#pragma unroll
            for (int b = 0; b < 2; b++) {
                uint4 key = row_of(own.keys, 8 * b, my), p = row_of(own.readers0, 8 * b, my), q = row_of(own.readers1, 8 * b, my);
                const u32 k0[2] = {key.x, key.z}, k1[2] = {key.y, key.w}, p0[2] = {p.x, p.z}, p1[2] = {p.y, p.w}, q1[2] = {q.y, q.w};
                mma_tf32(sum0[b], a0, k0);
                mma_tf32(sum1[b], a1, k1);
                mma_tf32(back[b], c0, p0);
                mma_tf32(back[b], c1, p1);
                mma_tf32(back[b], c2, q1);
            }
#pragma unroll
            for (int c = 0; c < 4; c++) g_total[c] = 0;
            // With the operands as rounded, what a pair gives to both its tokens is the same, and goes away where it must.
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    int b = c / 2, e = 2 * h + c % 2;
                    auto rounded = [](u32 x) { return __uint_as_float(x & 0xffffe000u); };
                    float start = from_start[b][e], end = to_end[b][e];
                    gr[h][c] = sum0[b][e] * rise0[h][c] + (h ? sum1[b][e] * rise1[c] : 0.f) + start;
                    gk[h][c] = back[b][e] * fall[h][c] + end;
                    x[h][c] = sum0[b][e] * rounded(r0[h][c]) + (h ? sum1[b][e] * rounded(r1[h][c]) : 0.f);
                    suffix[h][c] = x[h][c] - back[b][e] * rounded(kf[h][c]) + start * r[h][c] - end * k[h][c];
                    x[h][c] += start * r[h][c];
                    g_total[c] += end * k[h][c];
                }
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float decayed = from_lane(through[c / 2], 4 * (2 * my.t + c % 2)) * f.decay(c, last == 0);
#pragma unroll
            for (int d = 4; d < 32; d *= 2) g_total[c] += __shfl_xor_sync(~0u, g_total[c], d);
            g_total[c] += decayed;
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int d = 1; d < 8; d *= 2) {
                    float other = __shfl_down_sync(~0u, suffix[h][c], 4 * d);
                    if (my.g + d < 8) suffix[h][c] += other;
                }
            suffix[0][c] += from_lane(suffix[1][c], my.t);
        }
        {  // the state's gradient at the chunk's start
            float d0 = own.decay[my.g], d1 = own.decay[my.g + 8];
            uint4 p = row_of(own.reads, 0, my), q = row_of(own.reads, 8, my);
            const u32 a0[4] = {p.x, q.x, p.z, q.z}, a1[4] = {p.y, q.y, p.w, q.w};
#pragma unroll
            for (int j = 0; j < BLOCKS; j += 2) {
                u32 gy[4];
                load_transposed(gy, tile.gy + (columns ^ 8 * j));
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float(&sum)[4] = gs[j + e];
                    sum[0] *= d0, sum[1] *= d0, sum[2] *= d1, sum[3] *= d1;
                    const u32 b0[2] = {bits(low(gy[e])), bits(high(gy[e]))}, b1[2] = {bits(low(gy[2 + e])), bits(high(gy[2 + e]))};
                    mma_tf32(sum, a0, b0);
                    mma_tf32(sum, a1, b1);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            i64 to = at.at(in, token) + (i64)(my.g + 8 * h) * in.H * N + my.own + 2 * my.t;
            float gw[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                gw[c] = f.w[h][c] > FLOOR ? suffix[h][c] + g_total[c] - x[h][c] : 0.f;
                float scaled = g_bonus[h] * bonus[c];
                gr[h][c] += scaled * k[h][c];
                gk[h][c] += scaled * r[h][c];
                gu[c] += g_bonus[h] * r[h][c] * k[h][c];
            }
            if (my.g + 8 * h < left)
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    *(u32*)(gr_ + to + 8 * b) = E::two(gr[h][2 * b], gr[h][2 * b + 1]);
                    *(u32*)(gk_ + to + 8 * b) = E::two(gk[h][2 * b], gk[h][2 * b + 1]);
                    *(Pack<D, 2>*)(gw_ + to + 8 * b) = Pack<D, 2>::of(gw + 2 * b);
                }
        }
        read_values(values, tile.gy, my);
        if (VALUES_BUFFERS == 1) {
            __syncthreads();
            finish_values(i);
        }
    }
    if (VALUES_BUFFERS == 2 && chunks > 0) {
        __syncthreads();
        finish_values(chunks - 1);
    }
    if (at.segment == 0)
#pragma unroll
        for (int j = 0; j < BLOCKS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                start[((i64)at.b * in.H + at.h) * N * N + (8 * j + 2 * my.t + c % 2) * N + my.own + my.g + 8 * (c / 2)] = gs[j][c];
#pragma unroll
    for (int c = 0; c < 4; c++) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) gu[c] += __shfl_xor_sync(~0u, gu[c], d);
        if (my.g == 0) gu_[at.state * N + my.own + 8 * (c / 2) + 2 * my.t + c % 2] = gu[c];
    }
}
