// RWKV-5's and 6's step in one launch, see chain.cuh. Macros of chain.cuh and wkv6.cuh; -DHAS_MIX: RWKV-6's mixes.
#include "chain.cuh"
#include "wkv6.cuh"

/// One layer's own weights and states.
struct Layer {
    Vectors vectors;
    const u16 *mix_out, *mix_base, *decay_out;  // RWKV-6's
    Kept* state;  // [slots, H, N, N]
};
struct Model {
    chain::Model model;
    const Layer* layers;
    u16 *r, *k, *v, *gate, *inner, *hidden, *att;  // [rows, C] but for RWKV-6's [rows, MIXES RANK_MIX] and [rows, RANK_DECAY]; gate may be null
    int heads;
    float eps;
};

/// batch rows: tokens [batch], slots [batch] of the states.
extern "C" __global__ void __launch_bounds__(chain::BLOCK) chain6(const Model* model, const i64* tokens, const int* slots, int batch) {
    __shared__ union { chain::NormMemory norm; Mix mix[chain::BLOCK / THREADS]; StepOfFew heads[chain::BLOCK / THREADS]; } memory;
#ifdef HAS_MIX
    constexpr int EACH_LAYER = 5;  // products
    typedef DecayMap Map;
#else
    constexpr int EACH_LAYER = 4;
    typedef int Map;
#endif
    chain::Chain step(model->model, EACH_LAYER, tokens, slots, batch);
    const int H = model->heads, C = H * N, stride = step.m.stride;
    step.run(memory.norm, [&](int layer, int i) {
        const Layer& l = model->layers[layer];
#ifdef HAS_MIX
        if (i == 1) {
            step.for_items<THREADS>(
                H * batch, [&](int, int item) { return MixMaps(l.mix_out, C, item % H * N); },
                [&](int team, int item, const MixMaps& maps) {
                    const int first = item % H * N, row = item / H;
                    mix(memory.mix[team], maps, model->inner + (i64)row * MIXES * RANK_MIX, l.mix_base, C, first, step.m.mixed, stride,
                        (i64)row * C + first);
                });
            return;
        }
#endif
        step.for_items<THREADS>(
            H * batch,
            [&](int team, int item) {
                load_vectors(memory.heads[team].step, l.vectors, item % H);
                bring_state(state_of(l.state, slots[item / H], item % H, H));
#ifdef HAS_MIX
                return DecayMap(l.decay_out, C, item % H * N);
#else
                return 0;
#endif
            },
            [&](int team, int item, const Map& map) {
                const int head = item % H, row = item / H, n = thread_of_head();
                const i64 at = (i64)row * C + head * N + n;
                StepOfFew& m = memory.heads[team];
                Kept* state = state_of(l.state, slots[row], head, H);
                StateRow kept;
                kept.load(state);
                const Given x = load_given(model->r, model->k, model->v, model->gate, at);
                float more = 0.f;
#ifdef HAS_MIX
                map.apply(model->hidden + (i64)row * RANK_DECAY, m.low, m.parts);
                if (n < N) more = m.low[0][n];
#endif
                ::step(m.step, x, more, kept, state, model->gate, model->eps, model->att, at);
            });
    });
}
