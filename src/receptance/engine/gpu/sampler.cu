// From logits to the next token, a block for each row: bias and penalties, truncation by top_p, top_k and min_p of the
// untempered distribution, temperature, and the inverse of the cumulative distribution. Nothing is sorted: the least
// probability kept is found digit by digit, in histograms of the distance to the largest logit.
//
// Sums that decide something are integers (probabilities in units of 2^-40), so that their order does not matter.
// -DCLUSTER blocks share a row, each a run of ids, and read each other's sums; all come to the same cuts.
#include "gpu.cuh"

constexpr int THREADS = 1024, BINS = 2 * THREADS, LIST = 4096, WARPS = THREADS / 32, STRIDE = 128;
constexpr float ROOT = 1048576.f;  // of 2^40

/// A row of the table (SampleRow in native/library.py). top_k = V and top_p > 1 cut nothing. room: for adjusted logits [V], where
/// there are penalties or biases. allowed [ceil(V / 32)]: a bit for each token that may come, or null. With penalties: occurrence [V] and seen [V] (0 never, 1 in the prompt, 2 generated) count,
/// weight [V] is what one occurrence counts where digits are not penalised; without, they are null.
struct Row {
    float* room;
    const u32* allowed;
    float* occurrence;
    u8* seen;
    const float* weight;
    const int* bias_ids;
    const float* bias_values;
    double top_p, uniform;
    float temperature, min_p, presence, frequency, repetition, decay;
    int biases, top_k, count_digits, token;
};

#if !defined(EMULATED) && CLUSTER > 1
DEVICE void sync_row() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
template <class T> DEVICE const T* of_block(const T* p, int block) {  // the same place in another block's shared memory
    const T* q;
    asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(block));
    return q;
}
#else
DEVICE void sync_row() { __syncthreads(); }
template <class T> DEVICE const T* of_block(const T* p, int) { return p; }
#endif

struct Shared {
    u32 low[BINS], high[BINS], count[BINS];  // a bin's mass in two words: atomics of 64 bits are loops
    u64 sums[THREADS / 32];
    u64 total, mine;
    float tops[THREADS / 32];
    int ids[THREADS / 32];
    u32 bin, counted, listed;
    float top;
    int best;
    u64 massed;
    float list[LIST];  // distances
};

/// e^-distance in units, rounded; in two steps because conversions to 64 bits are slow.
DEVICE u64 units(float distance) {
    const float x = ex2(-LOG2_E * distance) * ROOT;
    const u32 high = (u32)x;
    return ((u64)high << 20) + (u32)((x - (float)high) * ROOT + 0.5f);
}
DEVICE void add_mass(Shared& m, u32 bin, u64 mass) {
    const u32 low = (u32)mass, before = atomicAdd(&m.low[bin], low), high = (u32)(mass >> 32) + (before + low < before);
    if (high) atomicAdd(&m.high[bin], high);
}
DEVICE u64 shuffle_up(u64 x, int by) {
    const u32 low = __shfl_up_sync(~0u, (u32)x, by), high = __shfl_up_sync(~0u, (u32)(x >> 32), by);
    return (u64)high << 32 | low;
}
DEVICE u64 shuffle(u64 x, int lane) {
    const u32 low = __shfl_sync(~0u, (u32)x, lane), high = __shfl_sync(~0u, (u32)(x >> 32), lane);
    return (u64)high << 32 | low;
}
/// The sum of x over all threads before this one; `total` gets that over all.
DEVICE u64 sum_before(u64 x, Shared& m) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = x;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const u64 other = shuffle_up(sum, by);
        if (lane >= by) sum += other;
    }
    __syncthreads();
    if (lane == 31) m.sums[warp] = sum;
    __syncthreads();
    u64 before = 0, total = 0;
    for (int i = 0; i < THREADS / 32; ++i) before += i < warp ? m.sums[i] : 0, total += m.sums[i];
    if (threadIdx.x == 0) m.total = total;
    __syncthreads();
    return before + sum - x;
}

/// Four logits at i, a multiple of four; rows lie apart by one.
struct Four { float f[4]; };
DEVICE Four four_of(const float* wide, const u16* half, int i) {
    if (half) {
        const Pack<E, 2>* packs = (const Pack<E, 2>*)(half + i);
        const Pack<E, 2> x = packs[0], y = packs[1];
        return {x[0], x[1], y[0], y[1]};
    }
    const uint4 x = load_fresh((const void*)(wide + i));
    return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
}
/// body(i, logit) for ids from first to end, several loads on their way at a time.
template <class Load, class Body> DEVICE void for_all(int first, int end, Load load, Body body) {
    constexpr int AHEAD = 4;
    for (int start = first + 4 * threadIdx.x; start < end; start += 4 * THREADS * AHEAD) {
        Four x[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
            if (start + 4 * THREADS * a < end) x[a] = load(start + 4 * THREADS * a);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (start + 4 * THREADS * a + j < end) body(start + 4 * THREADS * a + j, x[a].f[j]);
    }
}

/// The largest distance kept by top_k and top_p, as its bits: the first position, from the most probable token on, that is
/// the k-th or at which the sum of probabilities reaches top_p; tokens as probable as that one are kept too.
template <class Load>
DEVICE u32 largest_kept(Shared& m, int vocab, int first, int end, u32 k, double top_p, float top, Load load) {
    // distances are positive floats and ordered as their bits are. First 2048 bins of equal width, which spread the tokens,
    // then the one that matters in 2048 ranges of bits, until a range is one number
    u32 low = 0, high = 0x7f800001, counted = 0;
    u64 massed = 0, wanted = ~0ull;
    const bool counts_matter = k < (u32)vocab;
    int shift = -1;
#pragma unroll 1
    while (high - low > 1) {
        for (int i = threadIdx.x; i < BINS; i += THREADS) m.low[i] = m.high[i] = m.count[i] = 0;
        if (threadIdx.x == 0 && m.listed > LIST) m.listed = 0;
        __syncthreads();
        const u32 listed = m.listed;
        __syncthreads();
        const auto enter = [&](float d) {
            const u32 bits = __float_as_uint(d);
            if (bits < low || bits >= high) return false;
            const u32 bin = shift < 0 ? (d < BINS / 64 ? (u32)(d * 64.f) : BINS - 1) : (bits - low) >> shift;
            if (counts_matter) atomicAdd(&m.count[bin], 1u);
            const u64 mass = units(d);
            if (mass) add_mass(m, bin, mass);
            return true;
        };
        if (listed) {  // all that lies in the range
            for (u32 i = threadIdx.x; i < listed; i += THREADS) enter(m.list[i]);
        } else {
            for_all(first, end, load, [&](int, float x) {
                const float d = top - x;
                if (!enter(d) || shift < 0) return;
                const u32 at = atomicAdd(&m.listed, 1u);
                if (at < LIST) m.list[at] = d;
            });
        }
        sync_row();
        // each thread two bins: the one in which the sums reach their goals
        const int bin = threadIdx.x * 2;
        u64 c0 = 0, c1 = 0, m0 = 0, m1 = 0;
#pragma unroll
        for (int i = 0; i < CLUSTER; ++i) {
            const Shared& x = *of_block(&m, i);
            c0 += x.count[bin], c1 += x.count[bin + 1];
            m0 += (u64)x.high[bin] << 32 | x.low[bin], m1 += (u64)x.high[bin + 1] << 32 | x.low[bin + 1];
        }
        const u64 counts = counted + sum_before(c0 + c1, m), masses = massed + sum_before(m0 + m1, m);
        if (shift < 0 && top_p < 1.) wanted = (u64)(top_p * (double)m.total + 0.5);
        const auto reached = [&](u64 count, u64 mass) { return count >= k || mass >= wanted; };
        const bool is_last = bin == BINS - 2;  // rounding may keep the sum below its goal
        if (!reached(counts, masses) && (reached(counts + c0 + c1, masses + m0 + m1) || is_last)) {
            const bool in_first = reached(counts + c0, masses + m0);
            m.bin = bin + !in_first;
            m.counted = (u32)(counts + (in_first ? 0 : c0)), m.massed = masses + (in_first ? 0 : m0);
        }
        __syncthreads();
        const u32 found = m.bin;
        counted = m.counted, massed = m.massed;
        sync_row();
        if (shift < 0) {
            low = __float_as_uint(found / 64.f);
            if (found < BINS - 1) high = __float_as_uint((found + 1) / 64.f);
        } else {
            low += found << shift;
            high = high - low < 1u << shift ? high : low + (1u << shift);
        }
        shift = 32 - __clz(high - low - 1) - 11;
        if (shift < 0) shift = 0;
    }
    return low;
}

/// Blocks CLUSTER · rows. logits [rows, V], float32 or, where `half` is not null, of type E. tokens [rows]: -1 where logits are not numbers; again: the
/// next step's inputs, or null.
extern "C" __global__ void __launch_bounds__(1024) sample(
    const float* logits, const u16* half, int vocab, int stride, const Row* rows, i64* tokens, i64* again) {
    Shared& m = *(Shared*)dynamic_shared();
    const int row = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int run = (vocab + CLUSTER * STRIDE - 1) / (CLUSTER * STRIDE) * STRIDE, from_id = rank * run;
    const int to_id = from_id + run < vocab ? from_id + run : vocab;  // ids of this block
    let_next_start();
    wait_for_previous();
    const Row p = rows[row];
    const float* wide = logits + (i64)row * stride;
    const u16* narrow_row = half + (i64)row * stride;
    float* own = p.room;
    const auto raw = [&](int i) {
        const float x = half ? E::wide(load_fresh(narrow_row + i)) : load_fresh(wide + i);
        return p.allowed && !(p.allowed[i / 32] >> i % 32 & 1) ? -__uint_as_float(0x7f800000) : x;
    };
    const bool is_adjusted = p.seen || p.biases;
    if (is_adjusted) {
        for (int i = from_id + threadIdx.x; i < to_id; i += THREADS) own[i] = raw(i);
        __syncthreads();
        for (int i = threadIdx.x; i < p.biases; i += THREADS)
            if (p.bias_ids[i] >= from_id && p.bias_ids[i] < to_id) atomicAdd(own + p.bias_ids[i], p.bias_values[i]);
        __syncthreads();
        if (p.seen)
            for (int i = from_id + threadIdx.x; i < to_id; i += THREADS) {
                const int state = p.seen[i];
                float x = load_fresh(own + i);
                if (state) x = x > 0.f ? x / p.repetition : x * p.repetition;
                if (state == 2) x -= p.presence + p.occurrence[i] * p.frequency;
                own[i] = x;
            }
        __syncthreads();
    }
    const auto logit = [&](int i) {
        Four x = is_adjusted ? four_of(own, nullptr, i) : four_of(wide, half ? narrow_row : nullptr, i);
        if (!is_adjusted && p.allowed)
            for (int j = 0; j < 4; ++j)
                if (i + j >= vocab || !(p.allowed[(i + j) / 32] >> (i + j) % 32 & 1)) x.f[j] = -__uint_as_float(0x7f800000);
        return x;
    };

    float top = -__uint_as_float(0x7f800000);
    int best = 0x7fffffff;
    bool is_number = true;
    for_all(from_id, to_id, logit, [&](int i, float x) {
        is_number &= x == x;
        if (x > top || (x == top && i < best)) top = x, best = i;
    });
#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        const float x = __shfl_xor_sync(~0u, top, mask);
        const int i = __shfl_xor_sync(~0u, best, mask);
        if (x > top || (x == top && i < best)) top = x, best = i;
    }
    is_number = __ballot_sync(~0u, is_number) == ~0u;
    if (threadIdx.x == 0) m.listed = 0;
    if (lane == 0) m.tops[warp] = is_number ? top : __uint_as_float(0x7fc00000), m.ids[warp] = best;
    __syncthreads();
    top = m.tops[0], best = m.ids[0];
    is_number = top == top;
    for (int i = 1; i < THREADS / 32; ++i) {
        const float x = m.tops[i];
        is_number &= x == x;
        if (x > top || (x == top && m.ids[i] < best)) top = x, best = m.ids[i];
    }
    if (CLUSTER > 1) {
        if (threadIdx.x == 0) m.top = is_number ? top : __uint_as_float(0x7fc00000), m.best = best;
        sync_row();
        for (int i = 0; i < CLUSTER; ++i) {
            const float x = *of_block(&m.top, i);
            const int other = *of_block(&m.best, i);
            is_number &= x == x;
            if (x > top || (x == top && other < best)) top = x, best = other;
        }
    }
    is_number &= top > -__uint_as_float(0x7f800000) && top < __uint_as_float(0x7f800000);

    int token = is_number ? best : -1;
    bool is_mine = rank == 0;  // which of the row's blocks has the token
    if (is_number && p.temperature > 0.f) {
        u32 kept = 0x7f7fffff;  // the bits of the largest finite distance
        if (p.top_p < 1. || p.top_k < vocab) kept = largest_kept(m, vocab, from_id, to_id, p.top_k, p.top_p, top, logit);
        if (p.min_p > 0.f) {  // e^-distance >= min_p
            const float most = -LN_2 * lg2(p.min_p) * 1.000001f;
            if (!(most >= __uint_as_float(kept))) kept = most > 0.f ? __float_as_uint(most) : 0u;
        }
        // each warp a run of ids, which its lanes read side by side; what comes before a run is all that order decides
        const int each = (run + WARPS * STRIDE - 1) / (WARPS * STRIDE) * STRIDE, first = from_id + warp * each;
        const int end = first + each < to_id ? first + each : to_id;
        const float scale = 1.f / (p.temperature > 1e-6f ? p.temperature : 1e-6f);
        const auto shares = [&](int i, u64 (&share)[4]) {
            const Four x = logit(i);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float d = top - x.f[j];
                share[j] = i + j < end && __float_as_uint(d) <= kept ? units(d * scale) : 0ull;
            }
            return share[0] + share[1] + share[2] + share[3];
        };
        u64 mine = 0, share[4];
#pragma unroll 4
        for (int i = first + 4 * lane; i < end; i += STRIDE) mine += shares(i, share);
        const u64 lanes_before = sum_before(mine, m);
        u64 others = 0, total = m.total;  // of the blocks before this one, and of all
        if (CLUSTER > 1) {
            if (threadIdx.x == 0) m.mine = m.total;
            sync_row();
            total = 0;
            for (int i = 0; i < CLUSTER; ++i) {
                const u64 x = *of_block(&m.mine, i);
                others += i < rank ? x : 0, total += x;
            }
        }
        u64 before = shuffle(lanes_before, 0);
        u64 point = (u64)(p.uniform * (double)total);
        if (point >= total) point = total - 1;
        is_mine = others <= point && point < others + m.total;
        point -= others;  // wraps around where it is another block's
        if (is_mine && before <= point && point < shuffle(lanes_before + mine, 31)) {
#pragma unroll 4
            for (int start = first; start < end; start += STRIDE) {
                const u64 here = start + 4 * lane < end ? shares(start + 4 * lane, share) : 0;
                u64 sum = here;
#pragma unroll
                for (int by = 1; by < 32; by *= 2) {
                    const u64 other = shuffle_up(sum, by);
                    if (lane >= by) sum += other;
                }
                u64 from = before + sum - here;
                if (here && from <= point && point < from + here)
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        if (from <= point && point < from + share[j]) m.ids[0] = start + 4 * lane + j;
                        from += share[j];
                    }
                before += shuffle(sum, 31);
            }
        }
        __syncthreads();
        token = m.ids[0];
    }
    if (p.seen && token >= 0 && is_mine) {  // one more counted, everything before it decays first
        __syncthreads();
        if (p.decay != 1.f)
            for (int i = threadIdx.x; i < vocab; i += THREADS) p.occurrence[i] *= p.decay;
        __syncthreads();
        if (threadIdx.x == 0) p.occurrence[token] += p.count_digits ? 1.f : p.weight[token], p.seen[token] = 2;
    }
    if (is_mine && threadIdx.x == 0) {
        tokens[row] = token;
        if (again) again[row] = token < 0 ? 0 : token;
    }    if (CLUSTER > 1) sync_row();  // others may still read this block's sums
}
