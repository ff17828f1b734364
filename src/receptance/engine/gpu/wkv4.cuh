// RWKV-4's time mix between the projections: an average of values, weighted by exponentials, channel by channel.
#pragma once
#include "gpu.cuh"

DEVICE float e_to(float x) { return ex2(LOG2_E * x); }

/// A layer's vectors [C] and states [slots, C].
struct Layer {
    const float *decay, *bonus;
    float *num, *den, *exp;
};
/// One token for one row's channel c, in place: out = sigmoid(r) y; at: of the row's channel in k, v, r [rows, C].
DEVICE void step(const Layer& l, const u16* k, const u16* v, const u16* r, i64 at, i64 state, int c, u16* out) {
    const float key = E::wide(load_fresh(k + at)), value = E::wide(load_fresh(v + at)), gate = sigmoid(E::wide(load_fresh(r + at)));
    const float n = load_fresh(l.num + state), d = load_fresh(l.den + state), e = load_fresh(l.exp + state);
    const float first = l.bonus[c] + key;
    float top = e > first ? e : first;
    float past = e_to(e - top), now = e_to(first - top);
    out[at] = narrow(gate * (past * n + now * value) / (past * d + now));
    const float later = e + l.decay[c];
    top = later > key ? later : key;
    past = e_to(later - top), now = e_to(key - top);
    l.num[state] = past * n + now * value, l.den[state] = past * d + now, l.exp[state] = top;
}
