// RWKV-7's step in one launch, see chain.cuh. Macros of chain.cuh and wkv7.cuh.
#include "chain.cuh"
#include "wkv7.cuh"

/// One layer's own weights and states.
struct Layer {
    const u16 *low_rank, *vectors[VECTORS];
    Kept* state;  // [slots, H, N, N]
};
struct Model {
    chain::Model model;
    const Layer* layers;
    u16 *rkv, *hidden, *v_first, *att;  // [3, rows, C], [rows, ranks], [rows, C], [rows, C]
    int heads;
    float eps;
};

/// batch rows: tokens [batch], slots [batch] of the states.
extern "C" __global__ void __launch_bounds__(chain::BLOCK) chain7(const Model* model, const i64* tokens, const int* slots, int batch) {
    __shared__ union { chain::NormMemory norm; StepOfFew heads[chain::BLOCK / THREADS]; } memory;
    chain::Chain step(model->model, 4, tokens, slots, batch);
    const int H = model->heads, stride = step.m.stride;
    step.run(memory.norm, [&](int layer, int) {
        const Layer& l = model->layers[layer];
        step.for_items<THREADS>(
            H * batch,
            [&](int team, int item) {
                const int head = item % H;
                load_vectors(memory.heads[team].step, {l.vectors[0], l.vectors[1], l.vectors[2], l.vectors[3], l.vectors[4], l.vectors[5], l.vectors[6], l.vectors[7]}, head);
                bring_state(state_of(l.state, slots[item / H], head, H));
                return Maps(l.low_rank, H * N, head * N);
            },
            [&](int team, int item, const Maps& maps) {
                const int head = item % H, row = item / H;
                step_of_few(memory.heads[team], maps, model->rkv, stride, model->hidden + (i64)row * Maps::EACH * 32, model->v_first,
                            layer == 0, state_of(l.state, slots[row], head, H), ((i64)row * H + head) * N + thread_of_head(),
                            model->eps, model->att);
            });
    });
}
