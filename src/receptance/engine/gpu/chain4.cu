// RWKV-4's step in one launch, see chain.cuh. Macros of chain.cuh.
#include "chain.cuh"
#include "wkv4.cuh"

constexpr int TEAM = 128;  // channels of an item

struct Model {
    chain::Model model;
    const Layer* layers;
    u16 *k, *v, *r, *att;  // [rows, C]
};

/// batch rows: tokens [batch], slots [batch] of the states.
extern "C" __global__ void __launch_bounds__(chain::BLOCK) chain4(const Model* model, const i64* tokens, const int* slots, int batch) {
    __shared__ chain::NormMemory memory;
    chain::Chain chain(model->model, 4, tokens, slots, batch);
    constexpr int EACH_ROW = (WIDTH + TEAM - 1) / TEAM;
    chain.run(memory, [&](int layer, int) {
        const Layer& l = model->layers[layer];
        const auto place = [&](int item, int& c) {
            c = item % EACH_ROW * TEAM + team_thread<TEAM>();
            return (i64)slots[item / EACH_ROW] * WIDTH + c;
        };
        chain.for_items<TEAM>(
            EACH_ROW * batch,
            [&](int, int item) {
                int c;
                const i64 state = place(item, c);
                if (c < WIDTH) bring_to_l2(l.num + state), bring_to_l2(l.den + state), bring_to_l2(l.exp + state), bring_to_l2(l.decay + c), bring_to_l2(l.bonus + c);
                return 0;
            },
            [&](int, int item, int) {
                int c;
                const i64 state = place(item, c);
                if (c < WIDTH) step(l, model->k, model->v, model->r, (i64)(item / EACH_ROW) * WIDTH + c, state, c, model->att);
            });
    });
}
