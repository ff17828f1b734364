// Runs a CUDA kernel on a CPU, block after block; the threads of a block are coroutines that switch at barriers and at
// the instructions of a whole warp. It judges arithmetic, indices and barriers, not races between blocks. Copies in the
// background arrive as late as they may. RACES: built with -fsanitize=thread, which then reports accesses of a block's
// threads that no barrier orders; nothing else orders them, neither the order they are run in nor shuffles.
#pragma once
#define EMULATED
#include <ucontext.h>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include <functional>
#include <algorithm>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)
#define __restrict__
#define __noinline__

using std::max;
using std::min;
struct dim3 { unsigned x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline unsigned __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
template <class T> T atomicAdd(T* p, T x) { T old = *p; *p += x; return old; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) static char emulated_shared[256 * 1024];  // dynamic shared memory

#ifdef RACES
#include <sanitizer/tsan_interface.h>
#define UNSEEN __attribute__((no_sanitize("thread")))  // what is the emulation's own
#else
#define UNSEEN
#endif

namespace emulation {
struct Copy { void* to; const void* from; bool is_there; };
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool began = false, done = false;
    int waits = -1;  // for which barrier: 0 the block's, 1 + i warp i's, 64 + i team i's
    std::vector<Copy> copies;   // in the background, of which the last ones belong to no group yet
    std::vector<size_t> groups;  // sizes of those committed
#ifdef RACES
    void* fiber = nullptr;
#endif
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline int current;
inline std::function<void()> body;
#ifdef RACES
inline void* main_fiber;
inline char tokens[128];  // of barriers
UNSEEN inline void runs(void* fiber, bool ordered) { __tsan_switch_to_fiber(fiber, ordered ? 0 : __tsan_switch_to_fiber_no_sync); }
UNSEEN inline void leaves() { runs(main_fiber, false); }
UNSEEN inline void ends() { runs(main_fiber, true); }
UNSEEN inline void enters(Thread& t, bool first) { runs(t.fiber, first); }
UNSEEN inline void gives(int barrier) { __tsan_release(tokens + barrier); }
UNSEEN inline void takes(Thread& t, int barrier) { enters(t, false), __tsan_acquire(tokens + barrier), leaves(); }
UNSEEN inline void is_born(Thread& t) {
    main_fiber = __tsan_get_current_fiber();
    if (t.fiber) __tsan_destroy_fiber(t.fiber);
    t.fiber = __tsan_create_fiber(0);
}
#else
UNSEEN inline void leaves() {}
UNSEEN inline void ends() {}
UNSEEN inline void enters(Thread&, bool) {}
UNSEEN inline void gives(int) {}
UNSEEN inline void takes(Thread&, int) {}
UNSEEN inline void is_born(Thread&) {}
#endif
UNSEEN inline void start() {
    body();
    threads[current].done = true;
    ends();
    swapcontext(&threads[current].context, &scheduler);
}
inline unsigned team_size = 128;
UNSEEN inline void wait(int barrier, bool orders) {
    if (orders) gives(barrier);
    threads[current].waits = barrier;
    leaves();
    swapcontext(&threads[current].context, &scheduler);
}
UNSEEN inline void go_on(unsigned first, unsigned end) {
    for (unsigned i = first; i < end; i++)
        if (!threads[i].done) takes(threads[i], threads[i].waits), threads[i].waits = -1;
}

// teams of one size at a time
UNSEEN inline void wait_in_team(unsigned size) { team_size = size, wait(64 + threadIdx.x / size, true); }

UNSEEN inline void block(unsigned n) {
    team_size = 128;
    if (threads.size() < n) threads.resize(n);
    for (unsigned i = 0; i < n; i++) {
        Thread& t = threads[i];
        t.began = t.done = false, t.waits = -1;
        t.copies.clear(), t.groups.clear();
        is_born(t);
        t.stack.resize(256 * 1024);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.data(), t.context.uc_stack.ss_size = t.stack.size(), t.context.uc_link = &scheduler;
        makecontext(&t.context, start, 0);
    }
    for (bool progress = true, left = true; left;) {
        if (!progress) fprintf(stderr, "emulation: the threads wait for each other\n"), abort();
        progress = left = false;
        for (unsigned i = 0; i < n; i++) {
            if (threads[i].done || threads[i].waits >= 0) continue;
            current = i, threadIdx.x = i;
            enters(threads[i], !threads[i].began), threads[i].began = true;
            swapcontext(&scheduler, &threads[i].context);
            progress = true;
        }
        for (unsigned warp = 0; warp < (n + 31) / 32; warp++) {  // a warp that is all there
            bool all = true;
            for (unsigned i = warp * 32; i < std::min(n, warp * 32 + 32); i++) all &= threads[i].waits == (int)warp + 1;
            if (all) go_on(warp * 32, std::min(n, warp * 32 + 32)), progress = true;
        }
        for (unsigned team = 0; team < n / team_size; team++) {
            const unsigned first = team * team_size, end = first + team_size;
            bool all = true;
            for (unsigned i = first; i < end; i++) all &= threads[i].waits == (int)team + 64;
            if (all) go_on(first, end), progress = true;
        }
        bool all = true, some = false;
        for (unsigned i = 0; i < n; i++) all &= threads[i].done || threads[i].waits == 0, some |= !threads[i].done, left |= !threads[i].done;
        if (all && some) go_on(0, n), progress = true;
    }
}

template <class T> T take(const char*& p, const char* base) {
    size_t size = sizeof(T), at = (p - base + size - 1) / size * size;
    T x;
    memcpy(&x, base + at, size);
    p = base + at + size;
    return x;
}
template <class... A> UNSEEN void launch(void (*kernel)(A...), unsigned x, unsigned y, unsigned z, unsigned n, const char* parameters) {
    const char* p = parameters;
    std::tuple<A...> arguments{take<A>(p, parameters)...};
    gridDim = {x, y, z}, blockDim = {n, 1, 1};
    body = [&] { std::apply(kernel, arguments); };
    for (unsigned k = 0; k < z; k++) for (unsigned j = 0; j < y; j++) for (unsigned i = 0; i < x; i++) {
        blockIdx = {i, j, k};
        memset(emulated_shared, 0xff, sizeof(emulated_shared));  // NaN: nothing may be read before it is written
        block(n);
    }
}

// what every lane of a warp gives is seen by all
template <class T> UNSEEN const T* together(const T& mine) {
    static T given[32][32];
    int warp = threadIdx.x / 32;
    given[warp][threadIdx.x % 32] = mine;
    wait(warp + 1, false);
    return given[warp];
}
inline void apart() { wait(threadIdx.x / 32 + 1, false); }  // all have seen it
}  // namespace emulation

inline void __syncthreads() { emulation::wait(0, true); }
inline void __syncwarp(unsigned = ~0u) { emulation::wait(threadIdx.x / 32 + 1, true); }
template <class T> T __shfl_sync(unsigned, T x, int lane) {
    T y = emulation::together(x)[lane % 32];
    emulation::apart();
    return y;
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits) { return __shfl_sync(mask, x, (threadIdx.x % 32) ^ bits); }
template <class T> T __shfl_up_sync(unsigned mask, T x, int by) {
    int lane = threadIdx.x % 32;
    return __shfl_sync(mask, x, lane >= by ? lane - by : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, int by) {
    int lane = threadIdx.x % 32;
    return __shfl_sync(mask, x, lane + by < 32 ? lane + by : lane);
}

inline float ex2(float x) { return exp2f(x); }
inline float lg2(float x) { return log2f(x); }
inline float rcp(float x) { return 1 / x; }
inline float half_to_float(unsigned short x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
inline unsigned two_halves(float lo, float hi) {
    _Float16 y[2] = {(_Float16)lo, (_Float16)hi};
    unsigned x; memcpy(&x, y, 4);
    return x;
}
inline unsigned one_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned two_bf16(float lo, float hi) { return one_bf16(hi) << 16 | one_bf16(lo); }
inline unsigned long long peek(const unsigned long long* p) {
    if (*p == ~0ull) fprintf(stderr, "emulation: a block waits for a later one\n"), abort();
    return *p;
}
inline void publish(unsigned long long* p, unsigned long long x) { *p = x; }

// matrix instructions: fragments as PTX lays them out. g = lane / 4, t = lane % 4
template <class Widen>
inline void emulated_mma(float (&d)[4], const unsigned* a, int n_a, const unsigned* b, int n_b, Widen&& product) {
    struct Fragments { unsigned a[4], b[2]; } mine = {};
    memcpy(mine.a, a, 4 * n_a), memcpy(mine.b, b, 4 * n_b);
    const Fragments* all = emulation::together(mine);
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) d[i] += product(all, g + 8 * (i / 2), 2 * t + i % 2);
    emulation::apart();
}
inline float tf32(unsigned x) { return __uint_as_float(x & 0xffffe000u); }  // the hardware ignores the low 13 bits
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {  // 16 x 8 x 8
    emulated_mma(d, a, 4, b, 2, [](auto* all, int row, int column) {
        double sum = 0;
        for (int k = 0; k < 8; k++)
            sum += (double)tf32(all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)]) * tf32(all[column * 4 + k % 4].b[k / 4]);
        return (float)sum;
    });
}
template <class Wide> inline void emulated_mma_16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Wide wide) {
    emulated_mma(d, a, 4, b, 2, [&](auto* all, int row, int column) {  // 16 x 8 x 16
        double sum = 0;
        for (int k = 0; k < 16; k++) {
            unsigned x = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], y = all[column * 4 + k % 8 / 2].b[k / 8];
            sum += (double)wide(k % 2 ? x >> 16 : x & 0xffff) * wide(k % 2 ? y >> 16 : y & 0xffff);
        }
        return (float)sum;
    });
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulated_mma_16(d, a, b, [](unsigned x) { return __uint_as_float(x << 16); });
}
inline void mma_half(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulated_mma_16(d, a, b, [](unsigned x) { return half_to_float((unsigned short)x); });
}
inline unsigned to_tf32(float x) { return __float_as_uint(x) + 0x1000; }
inline void emulated_matrices(unsigned (&x)[4], const void* row, bool transposed) {
    if ((size_t)row % 16) fprintf(stderr, "emulation: a row of a matrix is not aligned\n"), abort();
    const void* const* rows = emulation::together(row);
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        auto at = [&](int r, int c) { return (unsigned)((const unsigned short*)rows[8 * i + r])[c]; };
        x[i] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
    emulation::apart();
}
inline void load_matrices(unsigned (&x)[4], const void* row) { emulated_matrices(x, row, false); }
inline void load_transposed(unsigned (&x)[4], const void* row) { emulated_matrices(x, row, true); }
typedef unsigned long long __attribute__((may_alias)) eight_bytes;
inline void set_16_bytes(void* to, eight_bytes low, eight_bytes high) {  // memset and memcpy are no accesses to the sanitizer
    ((eight_bytes*)to)[0] = low, ((eight_bytes*)to)[1] = high;
}
inline void copy_async(void* to, const void* from, bool is_there) {
    if ((size_t)to % 16 || (is_there && (size_t)from % 16)) fprintf(stderr, "emulation: a copy is not aligned\n"), abort();
    set_16_bytes(to, ~0ull, ~0ull);  // nobody may look, or write, between here and the wait
    emulation::threads[emulation::current].copies.push_back({to, from, is_there});
}
inline void commit_copies() {
    auto& my = emulation::threads[emulation::current];
    size_t before = 0;
    for (size_t size : my.groups) before += size;
    my.groups.push_back(my.copies.size() - before);
}
inline void await_groups(size_t but) {
    auto& my = emulation::threads[emulation::current];
    while (my.groups.size() > but) {
        for (size_t i = 0; i < my.groups[0]; i++) {
            const emulation::Copy& x = my.copies[i];
            const eight_bytes* from = (const eight_bytes*)x.from;
            set_16_bytes(x.to, x.is_there ? from[0] : 0, x.is_there ? from[1] : 0);
        }
        my.copies.erase(my.copies.begin(), my.copies.begin() + my.groups[0]);
        my.groups.erase(my.groups.begin());
    }
}
inline void await_copies() { await_groups(0); }
inline unsigned __ballot_sync(unsigned, bool x) {
    const bool* all = emulation::together(x);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= (unsigned)all[i] << i;
    emulation::apart();
    return bits;
}
inline char* dynamic_shared() { return emulated_shared; }

// ops/tiles.cuh
inline void await_all_but_one() { await_groups(1); }
inline void team_barrier(int team) { emulation::wait(64 + team, true); }
template <int TEAMS> void barrier() {  // all must come, and none may have left
    bool all = blockDim.x == 128 * TEAMS;
    for (unsigned i = 0; i < blockDim.x; i++) all &= !emulation::threads[i].done;
    if (!all) fprintf(stderr, "emulation: a barrier of %d threads in a block of fewer or more\n", 128 * TEAMS), abort();
    emulation::wait(0, true);
}
inline unsigned largest_of_warp(unsigned x) {
    const unsigned* all = emulation::together(x);
    for (int i = 0; i < 32; i++) x = max(x, all[i]);
    emulation::apart();
    return x;
}
inline unsigned short float_to_half(float x) { return (unsigned short)two_halves(x, 0); }
inline unsigned scale_halves(unsigned x, unsigned by) {
    auto low = [](unsigned y) { return half_to_float((unsigned short)y); };
    return two_halves(low(x) * low(by), low(x >> 16) * low(by >> 16));
}
inline unsigned scale_bfloat16(unsigned x, unsigned by) {
    auto low = [](unsigned y) { return __uint_as_float(y << 16); };
    return two_bf16(low(x) * low(by), low(x >> 16) * low(by >> 16));
}
inline unsigned larger_halves(unsigned x, unsigned y) { return max(x & 0xffff, y & 0xffff) | max(x >> 16, y >> 16) << 16; }
