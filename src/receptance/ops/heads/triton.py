"""Group norm, bonus and gate in Triton: one kernel forward, one backward; statistics are made again, not kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.shares.triton import common_dtype, stages, sum_shares

TILE, WARPS = 1024, 4  # elements of a tile: 16 bytes of bfloat16 a thread
PROGRAMS = 528  # of the backward pass: each sums its tiles' share of the gradients of vectors before it writes them
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
def _rows(tile, rows, H, BR: tl.constexpr):
    """Offsets and mask in [rows, H] of a tile's head."""
    row = tile * BR + tl.arange(0, BR)
    return row * H + tl.program_id(1), row < rows


@triton.jit
def _gate_heads(y_ptr, weight_ptr, bias_ptr, gate_ptr, u_ptr, v_ptr, out_ptr, rows, H, N, eps,
                GATE: tl.constexpr, BONUS: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    c, at, inside, mask = _tile(tl.program_id(0), rows, H, N, BR, BN)
    normed, _ = _normalise(y_ptr, at, mask, N, eps)
    out = normed * _load(weight_ptr, c, inside)[None, :] + _load(bias_ptr, c, inside)[None, :]
    if BONUS:
        place, valid = _rows(tl.program_id(0), rows, H, BR)
        out += _load(u_ptr, place, valid)[:, None] * _load(v_ptr, at, mask)
    if GATE > 0:
        gate = _load(gate_ptr, at, mask)
        out *= gate * tl.sigmoid(gate) if GATE == 2 else gate
    _store(out_ptr, at, out, mask)


@triton.jit
def _gate_heads_backward(y_ptr, weight_ptr, bias_ptr, gate_ptr, u_ptr, v_ptr, g_ptr,
                         gy_ptr, g_gate_ptr, gu_ptr, gv_ptr, partial_ptr, rows, H, N, eps, SPAN,
                         GATE: tl.constexpr, BONUS: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
                         STAGES: tl.constexpr):  # fmt: skip
    """A program's share of the gradients of weight and bias goes to `partial`."""
    g_weight, g_bias = tl.zeros((BR, BN), tl.float32), tl.zeros((BR, BN), tl.float32)
    for i in tl.range(0, SPAN, num_stages=STAGES):
        c, at, inside, mask = _tile(tl.program_id(0) * SPAN + i, rows, H, N, BR, BN)
        normed, inverse = _normalise(y_ptr, at, mask, N, eps)
        weight = _load(weight_ptr, c, inside)[None, :]
        g = _load(g_ptr, at, mask)
        if BONUS:
            place, valid = _rows(tl.program_id(0) * SPAN + i, rows, H, BR)
            u, v = _load(u_ptr, place, valid)[:, None], _load(v_ptr, at, mask)
        if GATE > 0:
            out = normed * weight + _load(bias_ptr, c, inside)[None, :]
            if BONUS:
                out += u * v
            gate = _load(gate_ptr, at, mask)
            if GATE == 2:
                s = tl.sigmoid(gate)
                _store(g_gate_ptr, at, g * out * s * (1.0 + gate * (1.0 - s)), mask)
                g *= gate * s
            else:
                _store(g_gate_ptr, at, g * out, mask)
                g *= gate
        if BONUS:
            _store(gu_ptr, place, tl.sum(g * v, 1), valid)
            _store(gv_ptr, at, g * u, mask)
        g_weight += g * normed
        g_bias += g
        g *= weight
        along = (tl.sum(g * normed, 1) / N)[:, None]
        _store(gy_ptr, at, (g - (tl.sum(g, 1) / N)[:, None] - normed * along) * inverse, mask)
    c, _, inside, _ = _tile(0, rows, H, N, BR, BN)
    partial_ptr += tl.program_id(0) * 2 * H * N + c
    tl.store(partial_ptr, tl.sum(g_weight, 0), mask=inside)
    tl.store(partial_ptr + H * N, tl.sum(g_bias, 0), mask=inside)


def _launch(y: Tensor, activation: str, bonus: bool) -> tuple[tuple[int, int], dict[str, int | bool]]:
    b, t, h, n = y.shape
    width = triton.next_power_of_2(n)
    height = max(1, TILE // width)
    meta = {"GATE": GATES[activation], "BONUS": bonus, "BR": height, "BN": width, "num_warps": WARPS}
    return (triton.cdiv(b * t, height), h), meta


@torch.library.custom_op("receptance::norm_and_gate", mutates_args=())
def _norm_and_gate(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor,
    u: Tensor,
    v: Tensor,
    eps: float,
    activation: str,
    bonus: bool,
) -> Tensor:
    """gate, u, v stand for nothing (and may be any tensor) where activation and bonus say so."""
    b, t, h, n = y.shape
    out = torch.empty(b, t, h * n, dtype=y.dtype, device=y.device)
    grid, meta = _launch(y, activation, bonus)
    _gate_heads[grid](y, weight, bias, gate, u, v, out, b * t, h, n, eps, **meta)
    return out


@_norm_and_gate.register_fake
def _(y, weight, bias, gate, u, v, eps, activation, bonus):
    b, t, h, n = y.shape
    return torch.empty(b, t, h * n, dtype=y.dtype, device=y.device)


def _outputs(y: Tensor, gate: Tensor, u: Tensor, v: Tensor, activation: str, bonus: bool) -> list[Tensor]:
    wanted = [(y, True), (gate, activation != "none"), (u, bonus), (v, bonus)]
    return [torch.empty_like(x) if needed else x.new_empty(0) for x, needed in wanted]


@torch.library.custom_op("receptance::norm_and_gate_backward", mutates_args=())
def _norm_and_gate_backward(
    g: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, u: Tensor, v: Tensor, eps: float,
    activation: str, bonus: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of y, gate, u, v (empty where unused), then [2, C]: of weight and bias."""
    b, t, h, n = y.shape
    outs = _outputs(y, gate, u, v, activation, bonus)
    (tiles, _), meta = _launch(y, activation, bonus)
    span = triton.cdiv(tiles, max(1, PROGRAMS // h))
    grid = triton.cdiv(tiles, span), h
    shares = torch.empty(grid[0], 2, h * n, dtype=torch.float32, device=y.device)
    _gate_heads_backward[grid](y, weight, bias, gate, u, v, g, *outs, shares, b * t, h, n, eps, span,
                               STAGES=stages(4, int(meta["BR"] * meta["BN"]), y.element_size()), **meta)  # fmt: skip
    return [*outs, sum_shares(shares, common_dtype(weight, bias))]


@_norm_and_gate_backward.register_fake
def _(g, y, weight, bias, gate, u, v, eps, activation, bonus):
    shares = torch.empty(2, y.shape[2] * y.shape[3], dtype=common_dtype(weight, bias), device=y.device)
    return [*_outputs(y, gate, u, v, activation, bonus), shares]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _gradients(ctx, g):
    _, activation, bonus = ctx.options
    saved = ctx.saved_tensors  # may be asked for once: activation checkpointing makes them then
    _, weight, bias, *_ = saved
    *tensors, shares = _norm_and_gate_backward(g.contiguous(), *saved, *ctx.options)
    gy, g_gate, *g_bonus = tensors
    gw, gb = (share.view_as(p).to(p.dtype) for share, p in zip(shares.unbind(), (weight, bias)))
    g_bonus = g_bonus if bonus else [None] * 2
    return gy, gw, gb, g_gate if activation != "none" else None, *g_bonus, None, None, None


_norm_and_gate.register_autograd(_gradients, setup_context=_keep)


def norm_and_gate(
    y: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: Tensor | None, activation: str = "plain",
    bonus: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Same contract as the plain form."""
    y = y.contiguous()
    unused = weight.detach()
    rest = [x.contiguous() for x in bonus] if bonus is not None else [unused] * 2
    if gate is None:
        gate, activation = unused, "none"
    return _norm_and_gate(y, weight, bias, gate.contiguous(), *rest, eps, activation, bonus is not None)


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    draw = lambda *shape: torch.ones(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    y, v = draw(1, 2, 1, 64), draw(64)
    norm_and_gate(y, v, v, 1e-5, draw(1, 2, 64), "silu", (draw(1, 2, 1), y)).sum().backward()
    torch.cuda.synchronize()
