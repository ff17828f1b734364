// RWKV-4's WKV in one pass each way: every input is read once, every output written once.
//
// Macros: ELEMENT (float, Bf16, Half), CHANNELS, VECTOR (channels of a thread: 2, or 1 if CHANNELS is odd), RESETS (0, 1).
//
// A warp takes S tokens of 32 V channels into registers, a block WARPS such pieces in a row: a chunk. Each warp runs its
// tokens from nothing, one thread per channel chains the pieces' ends and what earlier blocks say comes before the
// chunk, and every warp runs its tokens again from its true start. Backward is the same from the end, with gradients as
// states; its second run takes everything from registers.
//
// Chunks pass states on through global memory. The last chunk of each GROUP publishes the state after it, every chunk its
// own contribution: a chunk waits for the state before its group and for the contributions of the chunks between. So the
// order of all sums is fixed. Blocks with a smaller index begin earlier, so what a block waits for is under way.
// A published pair of floats is one 64-bit word, so it is seen whole or not at all; NOTHING stands for "not yet".
//
// A state is (n, d, e): numerator n 2^e, denominator d 2^e. Between blocks and passes it is the average n/d and the
// log-weight e + log2 d, that is (average, 1, log-weight).

#include "device.cuh"

typedef ELEMENT E;
constexpr int C = CHANNELS, V = VECTOR;
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS 3
#endif
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS 2
#endif
constexpr int WARPS = 8, GROUP = 8, W = 32 * V;
constexpr int S = 16, SAVE = 8;         // tokens of a warp in the forward pass, and in the backward one
constexpr float EMPTY = -1e38f;         // exponent of a state that has seen nothing
constexpr float LEAST = -1e30f;         // log-decay: keeps sums of them finite
constexpr u64 NOTHING = ~0ull;
typedef Pack<E, V> P;

__device__ __forceinline__ u64 pair(float x, float y) {
    u64 bits = (u64)__float_as_uint(y) << 32 | __float_as_uint(x);
    return bits == NOTHING ? NOTHING - 1 : bits;  // another NaN
}
__device__ __forceinline__ u64 await(const u64* p) {
    u64 x;
    while ((x = peek(p)) == NOTHING) {}
    return x;
}
__device__ __forceinline__ float low(u64 x) { return __uint_as_float((u32)x); }
__device__ __forceinline__ float high(u64 x) { return __uint_as_float((u32)(x >> 32)); }

// 2^(a - max(a, b)) and 2^(b - max(a, b)), by one exponential
__device__ __forceinline__ void weigh(float a, float b, float& x, float& y) {
    float d = a - b, z = ex2(-fabsf(d));
    x = d >= 0 ? 1.f : z;
    y = d >= 0 ? z : 1.f;
}

struct State {
    float n, d, e;
    __device__ __forceinline__ void add(float decay, float n1, float d1, float e1) {  // what follows it
        float faded = e + decay, past, now;
        weigh(faded, e1, past, now);
        n = past * n + now * n1;
        d = past * d + now * d1;
        e = fmaxf(faded, e1);
    }
    __device__ __forceinline__ float average() const { return d > 0 ? n * rcp(d) : 0.f; }
    __device__ __forceinline__ float weight() const { return d > 0 ? e + lg2(d) : EMPTY; }
    __device__ __forceinline__ void normalise() { n = average(), e = weight(), d = 1; }
};

struct Place {  // of a block
    int chunk, b, length;  // length: of the row
    int origin, c;         // the block's and the thread's first channel
    bool alive;            // is there a channel c?
};

__device__ __forceinline__ Place place(const int* lengths, int T, int batch, bool from_end, int size) {
    constexpr int columns = (C + W - 1) / W;
    int index = blockIdx.x, chunks = (T + size - 1) / size;
    Place p;
    p.chunk = index / (columns * batch);
    if (from_end) p.chunk = chunks - 1 - p.chunk;
    p.b = index / columns % batch;
    p.origin = index % columns * W;
    p.c = p.origin + (threadIdx.x % 32) * V;
    p.alive = p.c < C;
    if (!p.alive) p.c = 0;  // reads something, writes nothing
    p.length = lengths ? min(max(lengths[p.b], 0), T) : T;
    return p;
}

__device__ __forceinline__ int clamp(int x, int top) { return min(max(x, 0), top); }

// Waits for what comes before the chunk at `place` of its row (counted from where the scan begins): the contributions of
// the chunks before it in its group, and the state before the group, as the last row. All threads of the block call it.
// work: [WORDS, chunks, batch C] contributions, then [groups, batch C] states; column: of the block's first channel.
template <int WORDS>
__device__ __forceinline__ void gather(u64 (&words)[GROUP][WORDS][W], const u64* work, int place, int chunks, int origin,
                                       i64 columns, i64 column) {
    int group = place / GROUP, before = place % GROUP;
    for (int i = threadIdx.x; i < GROUP * WORDS * W; i += 32 * WARPS) {
        int lane = i % W, word = i / W % WORDS, j = i / W / WORDS;
        if (origin + lane >= C) continue;
        if (j < before) words[j][word][lane] = await(work + ((i64)word * chunks + group * GROUP + j) * columns + column + lane);
        else if (j == GROUP - 1 && word == 0 && group > 0)
            words[j][0][lane] = await(work + ((i64)WORDS * chunks + group) * columns + column + lane);
    }
    __syncthreads();
}

// A warp's tokens; FULL: there are S of them, which lets their work overlap
template <bool FULL> __device__ __forceinline__ void advance(State (&x)[V], const P* k, const P* v, const float* w, u32 begins, int left) {
#pragma unroll
    for (int s = 0; s < S; s++)
        if (FULL || s < left)
#pragma unroll
            for (int i = 0; i < V; i++) {
                if (RESETS && begins >> s & 1) x[i].e = EMPTY;
                x[i].add(w[i], v[s][i], 1, k[s][i] * LOG2_E);
            }
}

template <bool FULL>
__device__ __forceinline__ void write(State (&x)[V], const P* k, const P* v, const float* w, const float* u, u32 begins,
                                      int left, int rest, E* y, float2* saved) {
#pragma unroll
    for (int s = 0; s < S; s++) {
        if (s % SAVE == 0 && saved && (FULL || s < rest))
#pragma unroll
            for (int i = 0; i < V; i++) {
                x[i].normalise();
                saved[s / SAVE * C + i] = make_float2(x[i].n, x[i].e);
            }
        float out[V] = {};
        if (FULL || s < left)
#pragma unroll
            for (int i = 0; i < V; i++) {
                float key = k[s][i] * LOG2_E, value = v[s][i], past, now;
                if (RESETS && begins >> s & 1) x[i].e = EMPTY;
                weigh(x[i].e, u[i] + key, past, now);
                out[i] = (past * x[i].n + now * value) * rcp(past * x[i].d + now);
                x[i].add(w[i], value, 1, key);
            }
        if (FULL || s < rest) *(P*)(y + s * C) = P::of(out);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, FORWARD_BLOCKS)
forward(const float* __restrict__ w_, const E* __restrict__ k_, const E* __restrict__ v_, const float* __restrict__ u_,
        const float* num, const float* den, const float* exp, const int* lengths, const u8* resets, const u8* cuts,
        u64* work, E* y_, float* saved, float* end_num, float* end_den, float* end_exp, int T, int batch) {
    constexpr int L = S * WARPS;
    __shared__ float ends[WARPS][3][W];
    __shared__ u64 words[GROUP][1][W];
    __shared__ int cut[WARPS];
    Place at = place(lengths, T, batch, false, L);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32 * V;
    int chunks = (T + L - 1) / L, start = at.chunk * L, first = start + warp * S;
    int left = clamp(at.length - first, S), rest = clamp(T - first, S);
    i64 columns = (i64)batch * C, row = (i64)at.b * T + first;
    k_ += row * C + at.c, v_ += row * C + at.c, y_ += row * C + at.c;

    P k[S], v[S];
#pragma unroll
    for (int s = 0; s < S; s++)
        if (s < left) {
            k[s] = *(const P*)(k_ + s * C);
            v[s] = *(const P*)(v_ + s * C);
        }
    u32 begins = 0;  // bit s: a document begins at token s
#if RESETS
    for (int s = 0; s < left; s++) begins |= (u32)(resets[row + s] != 0) << s;
#endif
    float w[V], u[V];
    State x[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        w[i] = fmaxf(w_[at.c + i] * LOG2_E, LEAST);
        u[i] = u_[at.c + i] * LOG2_E;
        x[i] = {0, 0, EMPTY};
    }
    if (left == S) advance<true>(x, k, v, w, begins, left);
    else advance<false>(x, k, v, w, begins, left);
#pragma unroll
    for (int i = 0; i < V; i++) ends[warp][0][lane + i] = x[i].n, ends[warp][1][lane + i] = x[i].d, ends[warp][2][lane + i] = x[i].e;
    if (lane == 0) cut[warp] = begins != 0;
    __syncthreads();

    // from here to the next barriers a thread has one channel, if there are enough
    int c = threadIdx.x, before = at.chunk % GROUP, group = at.chunk / GROUP;
    i64 column = (i64)at.b * C + at.origin;
    bool chains = c < W && at.origin + c < C;
    float decay = chains ? fmaxf(w_[at.origin + c] * LOG2_E, LEAST) : 0.f;
    if (chains && before != GROUP - 1 && at.chunk != chunks - 1) {
        State all = {0, 0, EMPTY};
#pragma unroll
        for (int j = 0; j < WARPS; j++) {
            if (cut[j]) all.e = EMPTY;
            all.add(clamp(at.length - start - j * S, S) * decay, ends[j][0][c], ends[j][1][c], ends[j][2][c]);
        }
        publish(work + at.chunk * columns + column + c, pair(all.average(), all.weight()));
    }
    gather<1>(words, work, at.chunk, chunks, at.origin, columns, column);
    if (chains) {
        State now;
        if (group == 0) {
            now = {num[column + c], den[column + c], exp[column + c] * LOG2_E};
            now.normalise();
        } else {
            now = {low(words[GROUP - 1][0][c]), 1, high(words[GROUP - 1][0][c])};
        }
        for (int j = 0; j < before; j++) {
            int chunk = group * GROUP + j;
            if (RESETS && cuts[(i64)at.b * chunks + chunk]) now.e = EMPTY;
            now.add(clamp(at.length - chunk * L, L) * decay, low(words[j][0][c]), 1, high(words[j][0][c]));
        }
#pragma unroll
        for (int j = 0; j < WARPS; j++) {
            State own = {ends[j][0][c], ends[j][1][c], ends[j][2][c]};
            ends[j][0][c] = now.n, ends[j][1][c] = now.d, ends[j][2][c] = now.e;
            if (cut[j]) now.e = EMPTY;
            now.add(clamp(at.length - start - j * S, S) * decay, own.n, own.d, own.e);
        }
        if (before == GROUP - 1 && at.chunk != chunks - 1)
            publish(work + (chunks + group + 1) * columns + column + c, pair(now.average(), now.weight()));
        if (at.chunk == chunks - 1) {
            end_num[column + c] = now.average(), end_den[column + c] = 1;
            end_exp[column + c] = fmaxf(now.weight() * LN_2, EMPTY);
        }
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < V; i++) x[i] = {ends[warp][0][lane + i], ends[warp][1][lane + i], ends[warp][2][lane + i]};
    if (!at.alive) return;
    float2* to = saved ? (float2*)saved + ((i64)at.b * ((T + SAVE - 1) / SAVE) + first / SAVE) * C + at.c : nullptr;
    if (left == S) write<true>(x, k, v, w, u, begins, left, rest, y_, to);
    else write<false>(x, k, v, w, u, begins, left, rest, y_, to);
}

struct Kept {  // of a token, from the first to the second run
    float y, to_past, to_now;
    float factor;  // of the smaller one: the new token's, or if negative the past's
};
struct Sums {
    float p, r;     // gradients of n and d
    float through;  // what of the end's gradient reaches the start
};

template <bool FULL>
__device__ __forceinline__ void advance(State (&x)[V], Sums (&sums)[V], Kept (&kept)[SAVE][V], const P* k, const P* v,
                                        const P* gy, const float* w, const float* u, u32 begins, int left) {
#pragma unroll
    for (int s = 0; s < SAVE; s++)
        if (FULL || s < left)
#pragma unroll
            for (int i = 0; i < V; i++) {
                float key = k[s][i] * LOG2_E, value = v[s][i], past, now;
                if (RESETS && begins >> s & 1) x[i].e = EMPTY;
                weigh(x[i].e, u[i] + key, past, now);
                float norm = rcp(past * x[i].d + now), q = gy[s][i] * norm;
                Kept& token = kept[s][i];
                token.y = (past * x[i].n + now * value) * norm;
                token.to_past = q * past, token.to_now = q * now;
                float share = token.to_past * sums[i].through;
                sums[i].p += share, sums[i].r -= share * token.y;
                float faded = x[i].e + w[i], d = faded - key, z = ex2(-fabsf(d));
                token.factor = d >= 0 ? z : -z;
                past = d >= 0 ? 1.f : z, now = d >= 0 ? z : 1.f;
                x[i] = {past * x[i].n + now * value, past * x[i].d + now, fmaxf(faded, key)};
                sums[i].through *= past;
            }
}

// With H = p n + r d after a token and E the part of gk that went through the state, gw = Σ (H - E), and H before the
// token is H - gk: no state but the last is needed.
template <bool FULL>
__device__ __forceinline__ void write(const State (&x)[V], Sums (&sums)[V], const Kept (&kept)[SAVE][V], const P* v,
                                      int left, int rest, E* gk_, E* gv_, float* gw, float* gu) {
    float h[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        float scale = rcp(x[i].d);
        sums[i].p *= scale, sums[i].r *= scale;
        h[i] = sums[i].p * x[i].n + sums[i].r * x[i].d;
    }
#pragma unroll
    for (int s = SAVE - 1; s >= 0; s--) {
        float gk[V] = {}, gv[V] = {};
        if (FULL || s < left)
#pragma unroll
            for (int i = 0; i < V; i++) {
                const Kept& token = kept[s][i];
                float& p = sums[i].p;
                float& r = sums[i].r;
                float value = v[s][i], z = token.factor;
                bool is_past = __float_as_uint(z) >> 31;  // -0 is negative here
                float past = is_past ? -z : 1.f, now = is_past ? 1.f : z;
                float direct = token.to_now * (value - token.y), stored = now * (p * value + r);
                gk[i] = direct + stored;
                gv[i] = token.to_now + now * p;
                gu[i] += direct;
                gw[i] += h[i] - stored;
                h[i] -= gk[i];
                p = past * p + token.to_past;
                r = past * r - token.to_past * token.y;
            }
        if (FULL || s < rest) *(P*)(gk_ + s * C) = P::of(gk), *(P*)(gv_ + s * C) = P::of(gv);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BACKWARD_BLOCKS)
backward(const float* __restrict__ w_, const E* __restrict__ k_, const E* __restrict__ v_, const float* __restrict__ u_,
         const E* __restrict__ gy_, const float* den, const float* g_num, const float* g_den, const int* lengths,
         const u8* resets, const float* __restrict__ saved, u64* work, E* gk_, E* gv_, float* gw_, float* gu_,
         float* g_num0, float* g_den0, int T, int batch) {
    constexpr int S = SAVE, L = S * WARPS;
    __shared__ float ends[WARPS][3][W];
    __shared__ u64 words[GROUP][2][W];
    Place at = place(lengths, T, batch, true, L);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32 * V;
    int chunks = (T + L - 1) / L, first = at.chunk * L + warp * S;
    int left = clamp(at.length - first, S), rest = clamp(T - first, S);
    i64 columns = (i64)batch * C, row = (i64)at.b * T + first, offset = row * C + at.c;
    k_ += offset, v_ += offset, gy_ += offset, gk_ += offset, gv_ += offset;

    P k[S], v[S], gy[S];
#pragma unroll
    for (int s = 0; s < S; s++)
        if (s < left) {
            k[s] = *(const P*)(k_ + s * C);
            v[s] = *(const P*)(v_ + s * C);
            gy[s] = *(const P*)(gy_ + s * C);
        }
    u32 begins = 0;
#if RESETS
    for (int s = 0; s < left; s++) begins |= (u32)(resets[row + s] != 0) << s;
#endif
    float w[V], u[V], gw[V] = {}, gu[V] = {};
    Kept kept[S][V];
    Sums sums[V];
    State x[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        w[i] = fmaxf(w_[at.c + i] * LOG2_E, LEAST);
        u[i] = u_[at.c + i] * LOG2_E;
        sums[i] = {0, 0, 1};
        x[i] = {0, 1, EMPTY};
        if (rest) {
            float2 from = ((const float2*)saved)[((i64)at.b * ((T + SAVE - 1) / SAVE) + first / SAVE) * C + at.c + i];
            x[i].n = from.x, x[i].e = from.y;
        }
    }
    if (left == S) advance<true>(x, sums, kept, k, v, gy, w, u, begins, left);
    else advance<false>(x, sums, kept, k, v, gy, w, u, begins, left);
#pragma unroll
    for (int i = 0; i < V; i++) sums[i].through *= rcp(x[i].d);  // what follows starts from a state whose d is 1
#pragma unroll
    for (int i = 0; i < V; i++) ends[warp][0][lane + i] = sums[i].p, ends[warp][1][lane + i] = sums[i].r, ends[warp][2][lane + i] = sums[i].through;
    __syncthreads();

    int c = threadIdx.x, place = chunks - 1 - at.chunk, before = place % GROUP, group = place / GROUP;
    i64 column = (i64)at.b * C + at.origin;
    bool chains = c < W && at.origin + c < C;
    if (chains && before != GROUP - 1 && at.chunk != 0) {
        float p = 0, r = 0, all = 1;
#pragma unroll
        for (int j = WARPS - 1; j >= 0; j--) {
            p = ends[j][0][c] + ends[j][2][c] * p;
            r = ends[j][1][c] + ends[j][2][c] * r;
            all *= ends[j][2][c];
        }
        u64* to = work + place * columns + column + c;
        publish(to, pair(p, r));
        publish(to + chunks * columns, pair(all, 0));
    }
    gather<2>(words, work, place, chunks, at.origin, columns, column);
    if (chains) {
        float p, r;
        if (group == 0) p = g_num ? g_num[column + c] : 0, r = g_den ? g_den[column + c] : 0;
        else p = low(words[GROUP - 1][0][c]), r = high(words[GROUP - 1][0][c]);
        for (int j = 0; j < before; j++) {
            float all = low(words[j][1][c]);
            p = low(words[j][0][c]) + all * p;
            r = high(words[j][0][c]) + all * r;
        }
#pragma unroll
        for (int j = WARPS - 1; j >= 0; j--) {
            float own_p = ends[j][0][c], own_r = ends[j][1][c], all = ends[j][2][c];
            ends[j][0][c] = p, ends[j][1][c] = r;
            p = own_p + all * p;
            r = own_r + all * r;
        }
        if (before == GROUP - 1 && at.chunk != 0) publish(work + (2 * chunks + group + 1) * columns + column + c, pair(p, r));
        if (at.chunk == 0) {  // of a state whose den is 1
            float d = den[column + c];
            g_num0[column + c] = d > 0 ? p / d : 0;
            g_den0[column + c] = d > 0 ? r / d : 0;
        }
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < V; i++) sums[i].p = ends[warp][0][lane + i], sums[i].r = ends[warp][1][lane + i];
    if (!at.alive) left = rest = 0;
    if (left == S) write<true>(x, sums, kept, v, left, rest, gk_, gv_, gw, gu);
    else write<false>(x, sums, kept, v, left, rest, gk_, gv_, gw, gu);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; i++) ends[warp][0][lane + i] = gw[i], ends[warp][1][lane + i] = gu[i];
    __syncthreads();
    if (chains) {
        float sw = 0, su = 0;
        for (int j = 0; j < WARPS; j++) sw += ends[j][0][c], su += ends[j][1][c];
        gw_[at.chunk * columns + column + c] = sw;
        gu_[at.chunk * columns + column + c] = su;
    }
}
