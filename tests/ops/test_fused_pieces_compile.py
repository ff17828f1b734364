"""Every kernel of the fused pieces compiles for a Hopper GPU; the interpreter, which needs none, accepts more."""

import os
import subprocess
import sys

import pytest

PLAIN_NUMBERS = {"rows": "i32", "T": "i32", "C": "i32", "H": "i32", "N": "i32", "n": "i32", "V": "i32", "SPAN": "i32",
                 "eps": "fp32", "penalty": "fp32"}  # fmt: skip
EXACT = {"partial_ptr", "mean_ptr", "inverse_ptr", "weights_ptr", "loss_ptr"}  # float32 in any call


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

    from receptance.ops.ffn import triton as ffn
    from receptance.ops.head_loss import triton as loss
    from receptance.ops.heads import triton as heads
    from receptance.ops.norm import triton as norm
    from receptance.ops.prepare import triton as prepare
    from receptance.ops.shift import triton as shift

    tile = {"BR": 32, "BN": 64}
    limits = {"LOW": prepare.MIN_LOG_DECAY, "MIN_NORM": prepare.MIN_NORM, **tile}
    alone = {"own_ptr": None, "g_own_ptr": None, "resets_ptr": None}
    mixes = [{"M": m, "PRESENT": p, "BR": 32, "BC": 64, **more} for m, p, more in ((6, False, alone), (5, True, {}))]
    gates = [{"GATE": g, "BONUS": b, **tile} for g, b in ((1, True), (2, False), (0, False))]
    rows = [{"ADD": add, "BR": 2, "BC": 1024} for add in (True, False)]
    losses = [{"WEIGHTED": w, "GRADIENT": g, "BLOCK": 8192} for w, g in ((True, True), (False, False))]
    kernels = [
        *((kernel, options) for kernel in (shift._mix, shift._mix_backward) for options in mixes),
        *((kernel, limits) for kernel in (prepare._keys, prepare._keys_backward)),
        *((kernel, tile) for kernel in (prepare._residual, prepare._residual_backward)),
        *((kernel, options) for kernel in (heads._gate_heads, heads._gate_heads_backward) for options in gates),
        *((kernel, options) for kernel in (norm._normalise_rows, norm._normalise_rows_backward) for options in rows),
        *((getattr(ffn, name), {"BLOCK": 4096}) for name in
          ("_relu_square", "_relu_square_backward", "_gate", "_gate_backward")),
        *((loss._softmax_gradient, options) for options in losses),
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


if __name__ == "__main__":
    main()
