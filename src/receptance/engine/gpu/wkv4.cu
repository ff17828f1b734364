// RWKV-4's time mix between the projections, see wkv4.cuh. -DCHANNELS.
#include "wkv4.cuh"

/// One token for each row. Blocks (·, row).
extern "C" __global__ void __launch_bounds__(256) wkv4_step(
    const u16* k, const u16* v, const u16* r, const float* decay, const float* bonus, float* num, float* den, float* exp,
    const int* slots, u16* out) {
    const int c = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
    let_next_start();
    wait_for_previous();
    if (c >= CHANNELS) return;
    step({decay, bonus, num, den, exp}, k, v, r, (i64)row * CHANNELS + c, (i64)slots[row] * CHANNELS + c, c, out);
}
/// For prompts: out = sigmoid(r) y, y at the operator's place of each token, -1 for padding.
extern "C" __global__ void __launch_bounds__(256) wkv4_finish(const u16* y, const u16* r, const int* place, u16* out) {
    const int c = blockIdx.x * 256 + threadIdx.x, row = blockIdx.y;
    let_next_start();
    wait_for_previous();
    if (c >= CHANNELS || place[row] < 0) return;
    const i64 at = (i64)row * CHANNELS + c;
    out[at] = narrow(sigmoid(E::wide(load_fresh(r + at))) * E::wide(load_fresh(y + (i64)place[row] * CHANNELS + c)));
}
