"""Group norm, bonus and gate in Triton: one kernel forward, one backward; statistics are made again, not kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, WARPS = 1024, 4  # elements of a tile: 16 bytes of bfloat16 a thread
PROGRAMS = 1056  # of the backward pass: each sums its tiles' share of the gradients of vectors before it writes them
GATES = {"none": 0, "plain": 1, "silu": 2}


@triton.jit
def _load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, at, x, mask):
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(tile, rows, H, N, BR: tl.constexpr, BN: tl.constexpr):
    row = tile * BR + tl.arange(0, BR)
    i = tl.arange(0, BN)
    c = tl.program_id(1) * N + i
    return c, row[:, None].to(tl.int64) * (H * N) + c[None, :], i < N, (row < rows)[:, None] & (i < N)[None, :]


@triton.jit
def _normalise(y_ptr, at, mask, N, eps):
    """(y − mean) / deviation of each row of a head, and 1 / deviation."""
    y = _load(y_ptr, at, mask)
    centred = tl.where(mask, y - (tl.sum(y, 1) / N)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)[:, None]
    return centred * inverse, inverse


@triton.jit
def _gate_heads(y_ptr, weight_ptr, bias_ptr, gate_ptr, r_ptr, k_ptr, v_ptr, rk_ptr, out_ptr, rows, H, N, eps,
                GATE: tl.constexpr, BONUS: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    c, at, inside, mask = _tile(tl.program_id(0), rows, H, N, BR, BN)
    normed, _ = _normalise(y_ptr, at, mask, N, eps)
    out = normed * _load(weight_ptr, c, inside)[None, :] + _load(bias_ptr, c, inside)[None, :]
    if BONUS:
        scaled = _load(k_ptr, at, mask) * _load(rk_ptr, c, inside)[None, :]
        out += tl.sum(_load(r_ptr, at, mask) * scaled, 1)[:, None] * _load(v_ptr, at, mask)
    if GATE > 0:
        gate = _load(gate_ptr, at, mask)
        out *= gate * tl.sigmoid(gate) if GATE == 2 else gate
    _store(out_ptr, at, out, mask)


@triton.jit
def _gate_heads_backward(y_ptr, weight_ptr, bias_ptr, gate_ptr, r_ptr, k_ptr, v_ptr, rk_ptr, g_ptr,
                         gy_ptr, g_gate_ptr, gr_ptr, gk_ptr, gv_ptr, partial_ptr, rows, H, N, eps, SPAN,
                         GATE: tl.constexpr, BONUS: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A program's share of the gradients of weight, bias and r_k goes to `partial`."""
    g_weight, g_bias = tl.zeros((BR, BN), tl.float32), tl.zeros((BR, BN), tl.float32)
    g_rk = tl.zeros((BR, BN), tl.float32)
    for i in range(SPAN):
        c, at, inside, mask = _tile(tl.program_id(0) * SPAN + i, rows, H, N, BR, BN)
        normed, inverse = _normalise(y_ptr, at, mask, N, eps)
        weight = _load(weight_ptr, c, inside)[None, :]
        g = _load(g_ptr, at, mask)
        if BONUS:
            r, k, v = _load(r_ptr, at, mask), _load(k_ptr, at, mask), _load(v_ptr, at, mask)
            r_k = _load(rk_ptr, c, inside)[None, :]
            bonus = tl.sum(r * k * r_k, 1)[:, None]
        if GATE > 0:
            out = normed * weight + _load(bias_ptr, c, inside)[None, :]
            if BONUS:
                out += bonus * v
            gate = _load(gate_ptr, at, mask)
            if GATE == 2:
                s = tl.sigmoid(gate)
                _store(g_gate_ptr, at, g * out * s * (1.0 + gate * (1.0 - s)), mask)
                g *= gate * s
            else:
                _store(g_gate_ptr, at, g * out, mask)
                g *= gate
        if BONUS:
            g_bonus = tl.sum(g * v, 1)[:, None]
            _store(gv_ptr, at, g * bonus, mask)
            _store(gr_ptr, at, g_bonus * k * r_k, mask)
            _store(gk_ptr, at, g_bonus * r * r_k, mask)
            g_rk += g_bonus * r * k
        g_weight += g * normed
        g_bias += g
        g *= weight
        along = (tl.sum(g * normed, 1) / N)[:, None]
        _store(gy_ptr, at, (g - (tl.sum(g, 1) / N)[:, None] - normed * along) * inverse, mask)
    c, _, inside, _ = _tile(0, rows, H, N, BR, BN)
    partial_ptr += tl.program_id(0) * 3 * H * N + c
    tl.store(partial_ptr, tl.sum(g_weight, 0), mask=inside)
    tl.store(partial_ptr + H * N, tl.sum(g_bias, 0), mask=inside)
    tl.store(partial_ptr + 2 * H * N, tl.sum(g_rk, 0), mask=inside)


def _launch(y: Tensor, activation: str, bonus: bool) -> tuple[tuple[int, int], dict[str, int | bool]]:
    b, t, h, n = y.shape
    width = triton.next_power_of_2(n)
    height = max(1, TILE // width)
    meta = {"GATE": GATES[activation], "BONUS": bonus, "BR": height, "BN": width, "num_warps": WARPS}
    return (triton.cdiv(b * t, height), h), meta


@torch.library.custom_op("receptance::norm_and_gate", mutates_args=())
def _norm_and_gate(
    y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor,
    eps: float, activation: str, bonus: bool,
) -> Tensor:  # fmt: skip
    """gate, r, k, v, r_k stand for nothing (and may be any tensor) where activation and bonus say so."""
    b, t, h, n = y.shape
    out = torch.empty(b, t, h * n, dtype=y.dtype, device=y.device)
    grid, meta = _launch(y, activation, bonus)
    _gate_heads[grid](y, weight, bias, gate, r, k, v, r_k, out, b * t, h, n, eps, **meta)
    return out


@_norm_and_gate.register_fake
def _(y, weight, bias, gate, r, k, v, r_k, eps, activation, bonus):
    b, t, h, n = y.shape
    return torch.empty(b, t, h * n, dtype=y.dtype, device=y.device)


def _outputs(y: Tensor, gate: Tensor, r: Tensor, k: Tensor, v: Tensor, activation: str, bonus: bool) -> list[Tensor]:
    wanted = [(y, True), (gate, activation != "none"), (r, bonus), (k, bonus), (v, bonus)]
    return [torch.empty_like(x) if needed else x.new_empty(0) for x, needed in wanted]


@torch.library.custom_op("receptance::norm_and_gate_backward", mutates_args=())
def _norm_and_gate_backward(
    g: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor,
    eps: float, activation: str, bonus: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of y, gate, r, k, v (empty where unused), then [3, C]: of weight, bias and r_k."""
    b, t, h, n = y.shape
    outs = _outputs(y, gate, r, k, v, activation, bonus)
    (tiles, _), meta = _launch(y, activation, bonus)
    span = triton.cdiv(tiles, max(1, PROGRAMS // h))
    grid = triton.cdiv(tiles, span), h
    shares = torch.empty(grid[0], 3, h * n, dtype=torch.float32, device=y.device)
    _gate_heads_backward[grid](y, weight, bias, gate, r, k, v, r_k, g, *outs, shares, b * t, h, n, eps, span, **meta)
    return [*outs, shares.sum(0)]


@_norm_and_gate_backward.register_fake
def _(g, y, weight, bias, gate, r, k, v, r_k, eps, activation, bonus):
    shares = torch.empty(3, y.shape[2] * y.shape[3], dtype=torch.float32, device=y.device)
    return [*_outputs(y, gate, r, k, v, activation, bonus), shares]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _gradients(ctx, g):
    _, activation, bonus = ctx.options
    saved = ctx.saved_tensors  # may be asked for once: activation checkpointing makes them then
    _, weight, bias, *_, r_k = saved
    *tensors, shares = _norm_and_gate_backward(g.contiguous(), *saved, *ctx.options)
    gy, g_gate, *g_bonus = tensors
    gw, gb, g_rk = (share.view_as(p).to(p.dtype) if i < 2 or bonus else None
                    for i, (share, p) in enumerate(zip(shares.unbind(), (weight, bias, r_k))))  # fmt: skip
    g_bonus = g_bonus if bonus else [None] * 3
    return gy, gw, gb, g_gate if activation != "none" else None, *g_bonus, g_rk, None, None, None


_norm_and_gate.register_autograd(_gradients, setup_context=_keep)


def norm_and_gate(
    y: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None, activation: str = "plain",
    bonus: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Same contract as the plain form."""
    y = y.contiguous()
    unused = weight.detach()
    rest = [x.contiguous() for x in bonus] if bonus is not None else [unused] * 4
    if gate is None:
        gate, activation = unused, "none"
    return _norm_and_gate(y, weight, bias, gate.contiguous(), *rest, eps, activation, bonus is not None)


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    draw = lambda *shape: torch.ones(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y, v = draw(1, 2, 1, 64), draw(64)
    norm_and_gate(y, v, v, 1e-5, draw(1, 2, 64), "silu", (y, y, y, draw(1, 64))).sum().backward()
    torch.cuda.synchronize()
