// RWKV-4's time mix between the projections: an average of values, weighted by exponentials, channel by channel.
// -DCHANNELS.
#include "gpu.cuh"

DEVICE float e_to(float x) { return ex2(LOG2_E * x); }

/// One token for each row, in place on num, den, exp [slots, C]: out = sigmoid(r) y. Blocks (·, row); k, v, r [rows, C].
extern "C" __global__ void __launch_bounds__(256) wkv4_step(
    const u16* k, const u16* v, const u16* r, const float* decay, const float* bonus, float* num, float* den, float* exp,
    const int* slots, u16* out) {
    const int c = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
    let_next_start();
    wait_for_previous();
    if (c >= CHANNELS) return;
    const i64 at = (i64)row * CHANNELS + c, state = (i64)slots[row] * CHANNELS + c;
    const float key = E::wide(load_fresh(k + at)), value = E::wide(load_fresh(v + at)), gate = sigmoid(E::wide(load_fresh(r + at)));
    const float n = load_fresh(num + state), d = load_fresh(den + state), e = load_fresh(exp + state);
    const float first = bonus[c] + key;
    float top = e > first ? e : first;
    float past = e_to(e - top), now = e_to(first - top);
    out[at] = narrow(gate * (past * n + now * value) / (past * d + now));
    const float later = e + decay[c];
    top = later > key ? later : key;
    past = e_to(later - top), now = e_to(key - top);
    num[state] = past * n + now * value, den[state] = past * d + now, exp[state] = top;
}
/// For prompts: out = sigmoid(r) y, y at the operator's place of each token.
extern "C" __global__ void __launch_bounds__(256) wkv4_finish(const u16* y, const u16* r, const int* place, u16* out) {
    const int c = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
    let_next_start();
    wait_for_previous();
    if (c >= CHANNELS) return;
    const i64 at = (i64)row * CHANNELS + c;
    out[at] = narrow(sigmoid(E::wide(load_fresh(r + at))) * E::wide(load_fresh(y + (i64)place[row] * CHANNELS + c)));
}
