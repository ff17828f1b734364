// From logits to the next token, a block for each row: bias and penalties, truncation by top_p, top_k and min_p of the
// untempered distribution, temperature, and the inverse of the cumulative distribution. Nothing is sorted: the least
// probability kept is found in a histogram of the distance to the largest logit, then digit by digit in one of its bins.
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

struct Shared {
    u32 low[BINS], high[BINS], count[BINS];  // a bin's mass in two words: atomics of 64 bits are loops
    u64 sums[WARPS];
    u64 total, mine, massed, share_mass;  // share: of the bins that this block adds up for its row
    float tops[WARPS];
    int ids[WARPS];
    u32 bin, counted, listed, share_count;
    float top;
    int best;
    u32 list[LIST];  // the bits of distances in one bin, those of this block first
    u8 owners[LIST];  // of which warp's run
};
// Behind them, -DROW_BYTES: room for the block's logits, which are read several times.
constexpr int KEPT_FROM = (sizeof(Shared) + 15) / 16 * 16;
static_assert(KEPT_FROM + ROW_BYTES <= SHARED_BYTES, "the launch must give this much");

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
static_assert(WARPS == 32, "sums of warps are a warp's");
/// The sum of x over all threads before this one; total: over all.
DEVICE u64 sum_before(u64 x, Shared& m, u64& total) {
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
    u64 warps = m.sums[lane];  // as many as lanes
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const u64 other = shuffle_up(warps, by);
        if (lane >= by) warps += other;
    }
    total = shuffle(warps, 31);
    const u64 before = shuffle(warps, warp ? warp - 1 : 0);
    return (warp ? before : 0) + sum - x;
}

/// Four logits at i, a multiple of four; rows lie apart by one.
struct Four { float f[4]; };
DEVICE Four four_of(uint4 x, bool is_half) {
    if (is_half) {
        const Pack<E, 2> low = {x.x}, high = {x.y};
        return {low[0], low[1], high[0], high[1]};
    }
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

/// Where the search for the largest distance kept by top_k and top_p stands: the first position, from the most probable token on,
/// that is the k-th or at which the sum of probabilities reaches top_p; tokens as probable as that one are kept too.
/// Distances are positive floats and ordered as their bits are.
struct Search {
    u32 k, low, high, counted;  // the bits lie in [low, high); positions before
    u64 massed, wanted;  // probability before them, and that is to be reached
    bool counts_matter;
    int shift;  // of bits, to their bin; -1: bins of equal width, which spread the tokens

    DEVICE void clear(Shared& m) const {
        for (int i = threadIdx.x; i < BINS; i += THREADS) m.low[i] = m.high[i] = m.count[i] = 0;
        if (threadIdx.x == 0) m.bin = ~0u;
        __syncthreads();
    }
    DEVICE void enter(Shared& m, u32 bits) const {
        if (bits < low || bits >= high) return;
        const float d = __uint_as_float(bits);
        const u32 bin = shift < 0 ? (d < BINS / 64 ? (u32)(d * 64.f) : BINS - 1) : (bits - low) >> shift;
        if (counts_matter) atomicAdd(&m.count[bin], 1u);
        const u64 mass = units(d);
        if (mass) add_mass(m, bin, mass);
    }
    /// Go on in the bin where the sums reach their goal. BLOCKS have entered tokens, each adds up its share of the bins. top_p: of the first time.
    template <int BLOCKS> DEVICE void narrow_down(Shared& m, int rank, double top_p) {
        constexpr int SHARE = BINS / BLOCKS;
        const int bin = (BLOCKS > 1 ? rank * SHARE : 0) + 2 * threadIdx.x;
        const bool has_bins = 2 * threadIdx.x < SHARE;
        u64 c[2] = {}, mass[2] = {}, count_of_share, mass_of_share;
        BLOCKS > 1 ? sync_cluster() : __syncthreads();
        if (has_bins)
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) {
                const Shared& x = BLOCKS > 1 ? *of_block(&m, i) : m;
                for (int j = 0; j < 2; ++j) c[j] += x.count[bin + j], mass[j] += (u64)x.high[bin + j] << 32 | x.low[bin + j];
            }
        u64 counts = counted + sum_before(c[0] + c[1], m, count_of_share);
        u64 masses = massed + sum_before(mass[0] + mass[1], m, mass_of_share);
        u64 total = mass_of_share;
        if (BLOCKS > 1) {
            if (threadIdx.x == 0) m.share_count = (u32)count_of_share, m.share_mass = mass_of_share;
            sync_cluster();
            total = 0;
            for (int i = 0; i < BLOCKS; ++i) {
                const u64 x = *of_block(&m.share_mass, i);
                total += x;
                if (i < rank) masses += x, counts += *of_block(&m.share_count, i);
            }
        }
        if (shift < 0 && top_p < 1.) wanted = (u64)(top_p * (double)total + 0.5);
        const auto reached = [&](u64 count, u64 sum) { return count >= k || sum >= wanted; };
        const bool is_last = bin == BINS - 2;  // rounding may keep the sum below its goal
        if (has_bins && !reached(counts, masses) && (reached(counts + c[0] + c[1], masses + mass[0] + mass[1]) || is_last)) {
            const bool in_first = reached(counts + c[0], masses + mass[0]);
            m.bin = bin + !in_first;
            m.counted = (u32)(counts + (in_first ? 0 : c[0])), m.massed = masses + (in_first ? 0 : mass[0]);
        }
        BLOCKS > 1 ? sync_cluster() : __syncthreads();
        u32 found = 0;
        for (int i = 0; i < BLOCKS; ++i) {
            const Shared& x = BLOCKS > 1 ? *of_block(&m, i) : m;
            if (x.bin != ~0u) found = x.bin, counted = x.counted, massed = x.massed;
        }
        BLOCKS > 1 ? sync_cluster() : __syncthreads();
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
    DEVICE bool is_done() const { return high - low <= 1; }
};

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
    const char* const row_from = half ? (const char*)(narrow_row + from_id) : (const char*)(wide + from_id);
    char* const kept_row = dynamic_shared() + KEPT_FROM;
    const bool is_half = half && !is_adjusted;
    const int size = is_half ? 2 : 4, bytes = ((to_id - from_id) * size + 15) / 16 * 16;
    const bool is_kept = !is_adjusted && bytes <= ROW_BYTES && stride * size % 16 == 0;
    if (is_kept) {
        for (int i = 16 * threadIdx.x; i < bytes; i += 16 * THREADS) copy_async(kept_row + i, row_from + i, true);
        commit_copies();
        await_copies();
        __syncthreads();
    }
    const auto logit = [&](int i) {
        uint4 words = make_uint4(0, 0, 0, 0);
        if (is_kept) {
            const char* here = kept_row + (i - from_id) * size;
            if (is_half) *(uint2*)&words = *(const uint2*)here;
            else words = *(const uint4*)here;
        } else if (is_half) *(uint2*)&words = *(const uint2*)(narrow_row + i);
        else words = load_fresh((const void*)((is_adjusted ? own : wide) + i));
        Four x = four_of(words, is_half);
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
        sync_cluster();
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
        u32 cap = 0x7f7fffff;  // the bits of the largest finite distance, or of the largest of min_p: e^-distance >= min_p
        if (p.min_p > 0.f) {
            const float most = -LN_2 * lg2(p.min_p) * 1.000001f;
            if (!(most >= __uint_as_float(cap))) cap = most > 0.f ? __float_as_uint(most) : 0u;
        }
        // each warp a run of ids, which its lanes read side by side; what comes before a run is all that order decides
        const int each = (run + WARPS * STRIDE - 1) / (WARPS * STRIDE) * STRIDE, first = from_id + warp * each;
        const int end = first + each < to_id ? first + each : to_id;
        const float scale = 1.f / (p.temperature > 1e-6f ? p.temperature : 1e-6f);
        u32 kept = cap;
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
        bool is_summed = false;
        if (p.top_p < 1. || p.top_k < vocab) {
            u32 own = 0;  // of the list
            Search search = {(u32)p.top_k, 0, 0x7f800001, 0, 0, ~0ull, p.top_k < vocab, -1};
#pragma unroll 1
            do {
                search.clear(m);
                for_all(from_id, to_id, logit, [&](int, float x) { search.enter(m, __float_as_uint(top - x)); });
                const bool is_first = search.shift < 0;
                search.narrow_down<CLUSTER>(m, rank, p.top_p);
                if (!is_first) continue;
                // a pass that adds up what is surely kept, and lists what lies in the bin
#pragma unroll 2
                for (int i = first + 4 * lane; i < end; i += STRIDE) {
                    const Four x = logit(i);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float d = top - x.f[j];
                        const u32 bits = __float_as_uint(d);
                        if (i + j >= end || bits >= search.high) continue;
                        if (bits < search.low) mine += bits <= cap ? units(d * scale) : 0ull;
                        else {
                            const u32 at = atomicAdd(&m.listed, 1u);
                            if (at < LIST) m.list[at] = bits, m.owners[at] = warp;
                        }
                    }
                }
                sync_cluster();
                own = m.listed;
                u32 listed = own;
                for (int i = 0; i < CLUSTER; ++i) listed += i == rank ? 0 : *of_block(&m.listed, i);
                is_summed = listed <= LIST;
                if (!is_summed) continue;
                u32 to = own;
                for (int i = 0; i < CLUSTER; ++i) {
                    if (i == rank) continue;
                    const Shared& x = *of_block(&m, i);
                    const u32 n = x.listed;
                    for (u32 at = threadIdx.x; at < n; at += THREADS) m.list[to + at] = x.list[at];
                    to += n;
                }
                while (!search.is_done()) {
                    search.clear(m);
                    for (u32 i = threadIdx.x; i < listed; i += THREADS) search.enter(m, m.list[i]);
                    search.narrow_down<1>(m, 0, 1.);
                }
            } while (!search.is_done());
            kept = search.low < cap ? search.low : cap;
            if (is_summed) {
                if (lane == 0) m.low[warp] = m.high[warp] = 0;
                __syncthreads();
                for (u32 i = threadIdx.x; i < own; i += THREADS)
                    if (m.list[i] <= kept) add_mass(m, m.owners[i], units(__uint_as_float(m.list[i]) * scale));
                __syncthreads();
                if (lane == 0) mine += (u64)m.high[warp] << 32 | m.low[warp];
            }
        }
        if (!is_summed) {
            mine = 0;
#pragma unroll 4
            for (int i = first + 4 * lane; i < end; i += STRIDE) mine += shares(i, share);
        }
        u64 others = 0, sum_of_block, total;  // of the blocks before this one, of this one, of all
        const u64 lanes_before = sum_before(mine, m, sum_of_block);
        total = sum_of_block;
        if (CLUSTER > 1) {
            if (threadIdx.x == 0) m.mine = sum_of_block;
            sync_cluster();
            total = 0;
            for (int i = 0; i < CLUSTER; ++i) {
                const u64 x = *of_block(&m.mine, i);
                others += i < rank ? x : 0, total += x;
            }
        }
        u64 before = shuffle(lanes_before, 0);
        u64 point = (u64)(p.uniform * (double)total);
        if (point >= total) point = total - 1;
        is_mine = others <= point && point < others + sum_of_block;
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
    }
    if (CLUSTER > 1) sync_cluster();  // others may still read this block's sums
}
