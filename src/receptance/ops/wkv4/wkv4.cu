// RWKV-4's WKV in one pass each way: every input is read once, every output written once.
//
// Macros: ELEMENT (float, Bf16, Half), CHANNELS, VECTOR (channels of a thread: 2, or 1 if CHANNELS is odd), RESETS (0, 1).
//
// A warp takes S tokens of 32 V channels into registers, a block WARPS such pieces in a row: a chunk. Each warp runs its
// tokens from nothing, the block's first warp chains the pieces' ends, learns from earlier blocks what comes before the
// chunk, and every warp runs its tokens again from its true start. Backward is the same from the end, with gradients as
// states; its second run takes everything from registers.
//
// Chunks pass states on through global memory. The last chunk of each GROUP publishes the state after it, every chunk its
// own contribution: a chunk waits for the state before its group and for the contributions of the chunks between. So the
// order of all sums is fixed. Blocks take their chunk's number from a counter: what they wait for has begun before them.
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
    int chunk, b, c, length;  // length: of the row
    i64 column;               // b C + c
    bool alive;               // is there a channel c?
};

__device__ __forceinline__ Place place(u64* counter, const int* lengths, int T, int batch, bool from_end, int size) {
    __shared__ int ticket;
    if (threadIdx.x == 0) ticket = (int)atomicAdd(counter, 1ull) + 1;  // it began at -1
    __syncthreads();
    constexpr int columns = (C + W - 1) / W;
    int chunks = (T + size - 1) / size;
    Place p;
    p.chunk = ticket / (columns * batch);
    if (from_end) p.chunk = chunks - 1 - p.chunk;
    p.b = ticket / columns % batch;
    p.c = ticket % columns * W + (threadIdx.x % 32) * V;
    p.alive = p.c < C;
    if (!p.alive) p.c = 0;  // reads something, writes nothing
    p.column = (i64)p.b * C + p.c;
    p.length = lengths ? min(max(lengths[p.b], 0), T) : T;
    return p;
}

__device__ __forceinline__ int clamp(int x, int top) { return min(max(x, 0), top); }

// Words of all chunks and of all groups' starts, behind the counter: [chunks, batch C, words], [groups + 1, batch C]
__device__ __forceinline__ u64* published(u64* work, i64 row, i64 columns, i64 column, int words) {
    return work + 1 + (row * columns + column) * words;
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
    __shared__ int cut[WARPS];
    Place at = place(work, lengths, T, batch, false, L);
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

    if (warp == 0) {
        int group = at.chunk / GROUP, from = group * GROUP;
        u64* contributions = work;
        u64* starts = work + chunks * columns;
        if (at.chunk % GROUP != GROUP - 1 && at.chunk != chunks - 1) {
#pragma unroll
            for (int i = 0; i < V; i++) {
                State all = {0, 0, EMPTY};
                for (int j = 0; j < WARPS; j++) {
                    if (cut[j]) all.e = EMPTY;
                    all.add(clamp(at.length - start - j * S, S) * w[i], ends[j][0][lane + i], ends[j][1][lane + i], ends[j][2][lane + i]);
                }
                if (at.alive) publish(published(contributions, at.chunk, columns, at.column + i, 1), pair(all.average(), all.weight()));
            }
        }
#pragma unroll
        for (int i = 0; i < V; i++) {
            State now;
            if (group == 0) {
                now = {num[at.column + i], den[at.column + i], exp[at.column + i] * LOG2_E};
                now.normalise();
            } else {
                u64 word = await(published(starts, group, columns, at.column + i, 1));
                now = {low(word), 1, high(word)};
            }
            for (int j = from; j < at.chunk; j++) {
                u64 word = await(published(contributions, j, columns, at.column + i, 1));
                if (RESETS && cuts[(i64)at.b * chunks + j]) now.e = EMPTY;
                now.add(clamp(at.length - j * L, L) * w[i], low(word), 1, high(word));
            }
            x[i] = now;
        }
#pragma unroll
        for (int i = 0; i < V; i++) {
            State now = x[i];
            for (int j = 0; j < WARPS; j++) {
                State own = {ends[j][0][lane + i], ends[j][1][lane + i], ends[j][2][lane + i]};
                ends[j][0][lane + i] = now.n, ends[j][1][lane + i] = now.d, ends[j][2][lane + i] = now.e;
                if (cut[j]) now.e = EMPTY;
                now.add(clamp(at.length - start - j * S, S) * w[i], own.n, own.d, own.e);
            }
            if (at.alive && at.chunk % GROUP == GROUP - 1)
                publish(published(starts, group + 1, columns, at.column + i, 1), pair(now.average(), now.weight()));
            if (at.alive && at.chunk == chunks - 1)
                end_num[at.column + i] = now.average(), end_den[at.column + i] = 1,
                end_exp[at.column + i] = fmaxf(now.weight() * LN_2, EMPTY);
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
    Place at = place(work, lengths, T, batch, true, L);
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

    if (warp == 0) {
        int place = chunks - 1 - at.chunk, group = place / GROUP, from = group * GROUP;  // counted from the end
        u64* contributions = work;
        u64* starts = work + 2 * chunks * columns;
        if (place % GROUP != GROUP - 1 && at.chunk != 0) {
#pragma unroll
            for (int i = 0; i < V; i++) {
                float ps = 0, rs = 0, all = 1;
                for (int j = WARPS - 1; j >= 0; j--) {
                    ps = ends[j][0][lane + i] + ends[j][2][lane + i] * ps;
                    rs = ends[j][1][lane + i] + ends[j][2][lane + i] * rs;
                    all *= ends[j][2][lane + i];
                }
                u64* to = published(contributions, place, columns, at.column + i, 2);
                if (at.alive) publish(to, pair(ps, rs)), publish(to + 1, pair(all, 0));
            }
        }
#pragma unroll
        for (int i = 0; i < V; i++) {
            float p, r;
            if (group == 0) {
                p = g_num[at.column + i], r = g_den[at.column + i];
            } else {
                u64 word = await(published(starts, group, columns, at.column + i, 1));
                p = low(word), r = high(word);
            }
            for (int j = from; j < place; j++) {
                u64* of = published(contributions, j, columns, at.column + i, 2);
                u64 word = await(of);
                float all = low(await(of + 1));
                p = low(word) + all * p;
                r = high(word) + all * r;
            }
            for (int j = WARPS - 1; j >= 0; j--) {
                float ps = ends[j][0][lane + i], rs = ends[j][1][lane + i], all = ends[j][2][lane + i];
                ends[j][0][lane + i] = p, ends[j][1][lane + i] = r;
                p = ps + all * p;
                r = rs + all * r;
            }
            if (at.alive && place % GROUP == GROUP - 1)
                publish(published(starts, group + 1, columns, at.column + i, 1), pair(p, r));
            if (at.alive && at.chunk == 0) {  // of the average and the log-weight's e^: den is 1 there
                float d = den[at.column + i];
                g_num0[at.column + i] = d > 0 ? p / d : 0;
                g_den0[at.column + i] = d > 0 ? r / d : 0;
            }
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
    if (warp == 0 && at.alive)
#pragma unroll
        for (int i = 0; i < V; i++) {
            float sw = 0, su = 0;
            for (int j = 0; j < WARPS; j++) sw += ends[j][0][lane + i], su += ends[j][1][lane + i];
            gw_[at.chunk * columns + at.column + i] = sw;
            gu_[at.chunk * columns + at.column + i] = su;
        }
}
