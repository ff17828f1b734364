"""Every kernel of the fused pieces compiles for a Hopper GPU; the interpreter, which needs none, accepts more."""

import os
import subprocess
import sys

import pytest

PLAIN_NUMBERS = {**dict.fromkeys(("rows", "T", "C", "H", "N", "n", "V", "SPAN", "R0", "R1", "R2", "R3",
                                 "WIDTH"), "i32"),
                 **dict.fromkeys(("eps", "penalty", "beta1", "rest1", "beta2", "rest2"), "fp32")}  # fmt: skip
# float32 in any call
EXACT = {"partial_ptr", "mean_ptr", "inverse_ptr", "weights_ptr", "loss_ptr", "statistics_ptr", "master_ptr",
         "shares_ptr", "square_ptr", "numbers_ptr", "bonus_ptr", "g_bonus_ptr", "u_ptr", "gu_ptr"}  # fmt: skip


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled" in done.stdout


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from receptance.ops.adamw import triton as adamw
    from receptance.ops.ffn import triton as ffn
    from receptance.ops.head_loss import triton as loss
    from receptance.ops.heads import triton as heads
    from receptance.ops.low_rank import triton as low_rank
    from receptance.ops.norm import triton as norm
    from receptance.ops.prepare import triton as prepare
    from receptance.ops.products import triton as products
    from receptance.ops.shares import triton as shares
    from receptance.ops.shift import triton as shift

    tile = {"BR": 32, "BN": 64}
    limits = {"LOW": prepare.MIN_LOG_DECAY, "MIN_NORM": prepare.MIN_NORM, "STAGES": 3, **tile}
    plain = dict.fromkeys(("delta_ptr", "weight_ptr", "bias_ptr", "sum_ptr", "end_ptr", "statistics_ptr", "g_sum_ptr",
                           "g_end_ptr"))  # fmt: skip
    alone = {"own_ptr": None, "g_own_ptr": None, "resets_ptr": None}
    mixes = [{"NORM": False, "M": 5, "PRESENT": True, **plain}, {"NORM": True, "M": 4, "PRESENT": False, **alone}]
    mixes = [{**options, "BC": 1024, "STAGES": 3} for options in mixes]
    gates = [{"GATE": g, "BONUS": b, "STAGES": 3, **tile} for g, b in ((1, True), (2, False), (0, False))]
    rows = [{"ADD": add, "BR": 2, "BC": 1024} for add in (True, False)]
    losses = [{"WEIGHTED": w, "GRADIENT": g, "GROUPS": 1024, "BN": 8} for w, g in ((True, True), (False, False))]
    kernels = [
        *((kernel, options) for kernel in (shift._mix, shift._mix_backward) for options in mixes),
        *((kernel, {**limits, **more}) for kernel in (prepare._keys, prepare._keys_backward)
          for more in ({}, dict.fromkeys(("r_ptr", "rk_ptr", "bonus_ptr", "gr_ptr", "g_bonus_ptr", "out_r")))),
        *((kernel, tile) for kernel in (prepare._residual, prepare._residual_backward)),
        *((kernel, options) for kernel in (heads._gate_heads, heads._gate_heads_backward) for options in gates),
        *((kernel, options) for kernel in (norm._normalise_rows, norm._normalise_rows_backward) for options in rows),
        *((getattr(ffn, name), {"BLOCK": 4096}) for name in
          ("_relu_square", "_relu_square_backward", "_gate", "_gate_backward")),
        *((loss._softmax_gradient, options) for options in losses),
        *((kernel, {"BR": 64, "BN": 64}) for kernel in (low_rank._stack, low_rank._stack_backward)),
        *((kernel, {"BR": 32, "BN": 64, **{f"F{j}": f for j, f in enumerate((1, 0, 2, 0))}, **more})
          for kernel in (low_rank._shift, low_rank._shift_backward) for more in ({}, {"resets_ptr": None})),
        (shares._sum_shares, {"BR": 128, "BN": 32}),
        (adamw._update, {"BLOCK": 2048}),
    ]  # fmt: skip
    for kernel, options in kernels:
        types = {name: "*fp32" if name in EXACT else "*i64" if name == "targets_ptr" else
                 "*i1" if name == "resets_ptr" else "*bf16"
                 for name in kernel.arg_names}  # fmt: skip
        types |= {name: kind for name, kind in PLAIN_NUMBERS.items() if name in types}
        options = {name: value for name, value in options.items() if name in types}
        types |= dict.fromkeys(options, "constexpr")
        source = triton.compiler.ASTSource(kernel, types, constexprs=options)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        print("compiled", kernel.fn.__name__, options)
    for backward in (False, True):
        matrix = "tensordesc<bf16[64, 256]>" if backward else "tensordesc<bf16[256, 64]>"
        types = {"a": "tensordesc<bf16[128, 64]>", "b": matrix}
        types |= dict.fromkeys(("squares", "out"), "tensordesc<bf16[128, 128]>")
        types |= dict.fromkeys(("M", "N", "K", "PROGRAMS"), "i32")
        options = {"BACKWARD": backward, **{x: getattr(products, x) for x in ("BM", "BN", "BK", "GROUP")}}
        types |= dict.fromkeys(options, "constexpr")
        source = triton.compiler.ASTSource(products._product, types, constexprs=options)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
        print("compiled", products._product.fn.__name__, options)


if __name__ == "__main__":
    main()
