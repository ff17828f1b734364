"""RWKV-4's WKV on a GPU: chunks of time in parallel, one register state per channel, nothing stored per token but y.

Forward: `_chunk_ends` (each chunk from an empty state), `_chain_ends` (every chunk's true start), `_outputs` (y).
Backward is plain backpropagation through the normalised recurrence: every factor e^{exp - top} is at most 1 and is
found again by re-running BLOCK tokens from a saved state, so the way back takes no exponential and no exponent of its
own: `_chunk_gradients` (what each chunk's outputs send to its start state), `_chain_gradients`, `_input_gradients`.
When batch x channels alone fill the GPU there is one chunk, and `_outputs` and `_input_gradients` do everything.

Bytes per element, 16-bit inputs (the floor is 6 forward, 12 backward with y re-read, which is not needed here):
    forward   _chunk_ends reads k, v: 4;  _outputs reads k, v, writes y: 6; for a backward pass it also saves the
              state before every 16th token: 0.75
    backward  _chunk_gradients reads k, v, gy: 6;  _input_gradients reads those and the states, writes gk, gv: 10.75
so 10.75 + 16.75 in chunks, 6.75 + 10.75 in one pass; the chunks' own states are below 0.2. Per element and kernel at
most two exponentials (of each pair relative to its maximum, one is e^0) and one reciprocal.

The decay's gradient needs no state per token either. With H_t = ∂L/∂num_t·num_t + ∂L/∂den_t·den_t and E_t the part of
gk_t that went through the state, gw = Σ (H_t - E_t) and H_{t-1} = H_t - gk_t; H restarts at every block's end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from receptance.ops.custom import custom_operator
from receptance.ops.wkv4.naive import State4

BLOCK = 16  # tokens whose rows are loaded together; the forward pass saves the state before each block
LANES = 1 << 18  # channels x chunks that keep an H200 (132 SMs) busy
LANES_ONE_PASS = 1 << 16  # from here on a second reading of the inputs costs more than idle lanes
GROUP = 8  # chunks whose states the chains load together
MIN_CHUNK = 64  # tokens; below, the chain over chunks weighs more than it saves
_EMPTY = tl.constexpr(-1e38)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _pair(a, b):
    """e^{a - max(a, b)} and e^{b - max(a, b)}, by one exponential."""
    d = a - b
    e = tl.exp2(tl.abs(d) * _MINUS_LOG2_E)  # exp would spend four more instructions on subnormal numbers
    return tl.where(d >= 0, 1.0, e), tl.where(d >= 0, e, 1.0)


@triton.jit
def _step(num, den, exp, w, k, v):
    """The state after a token, and the update's two factors."""
    faded = exp + w
    past, now = _pair(faded, k)
    return past * num + now * v, past * den + now, tl.maximum(faded, k), past, now


@triton.jit
def _place(chunks, C: tl.constexpr, BC: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Row of the batch, chunk and channels of this program; neighbours share a token's channels."""
    index = tl.program_id(0)
    if LAST_FIRST:  # the preceding kernel's last inputs may still be in the cache
        index = tl.num_programs(0) - 1 - index
    blocks: tl.constexpr = (C + BC - 1) // BC
    row = index // blocks
    c = (index % blocks) * BC + tl.arange(0, BC)
    return (row // chunks).to(tl.int64), row % chunks, c


@triton.jit
def _length(lengths_ptr, b, T):
    if lengths_ptr is None:
        return T
    else:
        return tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), T)


@triton.jit
def _load_rows(ptr, c, left, other, C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr):
    """S rows of channels from ptr on, as a tuple; only the first `left` exist and the rest is `other`."""
    rows = ()
    for s in tl.static_range(S):
        row = tl.load(ptr + s * C + c, mask=c < tl.where(s < left, C, 0), other=other)
        rows = rows + (row,)  # noqa: RUF005 - Triton unpacks no tuples
    return rows


@triton.jit
def _store_row(ptr, c, x, s, left, C: tl.constexpr, BC: tl.constexpr):
    tl.store(ptr + s * C + c, x.to(ptr.dtype.element_ty), mask=c < tl.where(s < left, C, 0))


@triton.jit
def _load_state(num_ptr, den_ptr, exp_ptr, at, c, C: tl.constexpr):
    num = tl.load(num_ptr + at * C + c, mask=c < C, other=0.0)
    den = tl.load(den_ptr + at * C + c, mask=c < C, other=0.0)
    exp = tl.load(exp_ptr + at * C + c, mask=c < C, other=0.0)
    return num, den, exp


@triton.jit
def _store_state(num_ptr, den_ptr, exp_ptr, at, c, num, den, exp, C: tl.constexpr):
    tl.store(num_ptr + at * C + c, num, mask=c < C)
    tl.store(den_ptr + at * C + c, den, mask=c < C)
    tl.store(exp_ptr + at * C + c, exp, mask=c < C)


@triton.jit
def _emptied(exp, resets_ptr, token, s, left):
    """The exponent of the state that token + s finds: that of an empty state where a document begins."""
    if resets_ptr is None:
        return exp
    else:
        begins = tl.load(resets_ptr + token + s, mask=s < left, other=0).to(tl.int32) != 0
        return tl.where(begins, _EMPTY, exp)


# Every kernel walks its chunk in blocks of S tokens. A token past the row's length has k = -∞, v = 0 and no decay: it
# changes no state, and its y and gradients are written as 0. (An unmasked copy of each block for the full ones takes
# the compiler four times as long.)


@triton.jit
def _ends_block(
    resets_ptr, k_ptr, v_ptr, token, left, c, w, num, den, exp,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    first = token * C
    ks = _load_rows(k_ptr + first, c, left, float("-inf"), C, BC, S)
    vs = _load_rows(v_ptr + first, c, left, 0.0, C, BC, S)
    for s in tl.static_range(S):
        exp = _emptied(exp, resets_ptr, token, s, left)
        decay = tl.where(s < left, w, 0.0)
        num, den, exp, _, _ = _step(num, den, exp, decay, ks[s].to(tl.float32), vs[s].to(tl.float32))
    return num, den, exp


@triton.jit
def _chunk_ends(
    w_ptr, k_ptr, v_ptr, lengths_ptr, resets_ptr, num_ptr, den_ptr, exp_ptr, T, L, chunks,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The state after each chunk that began empty."""
    b, chunk, c = _place(chunks, C, BC, False)
    start = chunk * L
    alive = tl.minimum(_length(lengths_ptr, b, T) - start, L)  # tokens of this chunk inside the row
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    num = tl.zeros([BC], tl.float32)
    den = tl.zeros([BC], tl.float32)
    exp = tl.zeros([BC], tl.float32) + _EMPTY
    token = b * T + start
    for i in range(0, alive, S):
        num, den, exp = _ends_block(resets_ptr, k_ptr, v_ptr, token, alive - i, c, w, num, den, exp, C, BC, S)
        token += S
    _store_state(num_ptr, den_ptr, exp_ptr, b * chunks + chunk, c, num, den, exp, C)


@triton.jit
def _chain_ends(
    w_ptr, lengths_ptr, fresh_ptr, num_ptr, den_ptr, exp_ptr, nums_ptr, dens_ptr, exps_ptr,
    end_num_ptr, end_den_ptr, end_exp_ptr, T, L, chunks,
    C: tl.constexpr, BC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Every chunk's true start state over the end it has from an empty one; the final state."""
    b, _, c = _place(1, C, BC, False)
    length = _length(lengths_ptr, b, T)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    num, den, exp = _load_state(num_ptr, den_ptr, exp_ptr, b, c, C)
    for group in range(0, chunks, G):
        first = (b * chunks + group) * C
        ns = _load_rows(nums_ptr + first, c, chunks - group, 0.0, C, BC, G)
        ds = _load_rows(dens_ptr + first, c, chunks - group, 0.0, C, BC, G)
        es = _load_rows(exps_ptr + first, c, chunks - group, _EMPTY, C, BC, G)
        for i in tl.static_range(G):
            _store_row(nums_ptr + first, c, num, i, chunks - group, C, BC)
            _store_row(dens_ptr + first, c, den, i, chunks - group, C, BC)
            _store_row(exps_ptr + first, c, exp, i, chunks - group, C, BC)
            tokens = tl.maximum(tl.minimum(length - (group + i) * L, L), 0)
            if fresh_ptr is not None:  # a document begins inside the chunk: nothing of its start is left
                fresh = tl.load(fresh_ptr + b * chunks + group + i, mask=group + i < chunks, other=0).to(tl.int32) != 0
                exp = tl.where(fresh, _EMPTY, exp)
            faded = exp + tokens.to(tl.float32) * w
            past, now = _pair(faded, es[i])
            num, den, exp = past * num + now * ns[i], past * den + now * ds[i], tl.maximum(faded, es[i])
    _store_state(end_num_ptr, end_den_ptr, end_exp_ptr, b, c, num, den, exp, C)


@triton.jit
def _outputs_block(
    resets_ptr, k_ptr, v_ptr, y_ptr, token, left, rest, c, w, u, num, den, exp,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    first = token * C
    ks = _load_rows(k_ptr + first, c, left, float("-inf"), C, BC, S)
    vs = _load_rows(v_ptr + first, c, left, 0.0, C, BC, S)
    for s in tl.static_range(S):
        k, v = ks[s].to(tl.float32), vs[s].to(tl.float32)
        exp = _emptied(exp, resets_ptr, token, s, left)
        past, now = _pair(exp, u + k)
        y = (past * num + now * v) / (past * den + now)
        y = tl.where(s < left, y, 0.0)
        _store_row(y_ptr + first, c, y, s, rest, C, BC)
        decay = tl.where(s < left, w, 0.0)
        num, den, exp, _, _ = _step(num, den, exp, decay, k, v)
    return num, den, exp


@triton.jit
def _outputs(
    w_ptr, k_ptr, v_ptr, u_ptr, lengths_ptr, resets_ptr, num_ptr, den_ptr, exp_ptr, y_ptr,
    saved_num_ptr, saved_den_ptr, saved_exp_ptr, end_num_ptr, end_den_ptr, end_exp_ptr, T, L, chunks,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, SAVE: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """y from each chunk's start state; with SAVE the state before each block; with END the final state (one chunk)."""
    b, chunk, c = _place(chunks, C, BC, not END)
    start = chunk * L
    stop = tl.minimum(L, T - start)
    alive = tl.minimum(_length(lengths_ptr, b, T) - start, L)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    u = tl.load(u_ptr + c, mask=c < C, other=0.0)
    num, den, exp = _load_state(num_ptr, den_ptr, exp_ptr, b * chunks + chunk, c, C)
    token = b * T + start
    at = b * tl.cdiv(T, S) + start // S
    for i in range(0, stop, S):
        if SAVE:
            _store_state(saved_num_ptr, saved_den_ptr, saved_exp_ptr, at, c, num, den, exp, C)
        num, den, exp = _outputs_block(
            resets_ptr, k_ptr, v_ptr, y_ptr, token, alive - i, stop - i, c, w, u, num, den, exp, C, BC, S
        )
        token += S
        at += 1
    if END:
        _store_state(end_num_ptr, end_den_ptr, end_exp_ptr, b, c, num, den, exp, C)


@triton.jit
def _chunk_gradients_block(
    resets_ptr, k_ptr, v_ptr, gy_ptr, token, left, c, w, u, num, den, exp, p, r, through,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    first = token * C
    ks = _load_rows(k_ptr + first, c, left, float("-inf"), C, BC, S)
    vs = _load_rows(v_ptr + first, c, left, 0.0, C, BC, S)
    gs = _load_rows(gy_ptr + first, c, left, 0.0, C, BC, S)
    for s in tl.static_range(S):
        k, v = ks[s].to(tl.float32), vs[s].to(tl.float32)
        exp = _emptied(exp, resets_ptr, token, s, left)
        past, now = _pair(exp, u + k)
        norm = 1.0 / (past * den + now)
        share = gs[s].to(tl.float32) * norm * past * through
        p += share
        r -= share * ((past * num + now * v) * norm)
        decay = tl.where(s < left, w, 0.0)
        num, den, exp, past, now = _step(num, den, exp, decay, k, v)
        through *= past
    return num, den, exp, p, r, through


@triton.jit
def _chunk_gradients(
    w_ptr, k_ptr, v_ptr, u_ptr, gy_ptr, lengths_ptr, resets_ptr, saved_num_ptr, saved_den_ptr, saved_exp_ptr,
    ps_ptr, rs_ptr, throughs_ptr, T, L, chunks, C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """What each chunk's outputs send to (num, den) at its start, and the factor that its end's gradient passes with.

    The sum over the chunk's tokens is taken forwards, weighted by how much of the start state is left.
    """
    b, chunk, c = _place(chunks, C, BC, False)
    start = chunk * L
    alive = tl.minimum(_length(lengths_ptr, b, T) - start, L)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    u = tl.load(u_ptr + c, mask=c < C, other=0.0)
    at = b * tl.cdiv(T, S) + start // S
    num, den, exp = _load_state(saved_num_ptr, saved_den_ptr, saved_exp_ptr, at, c, C)
    p = tl.zeros([BC], tl.float32)
    r = tl.zeros([BC], tl.float32)
    through = tl.zeros([BC], tl.float32) + 1.0
    token = b * T + start
    for i in range(0, alive, S):
        num, den, exp, p, r, through = _chunk_gradients_block(
            resets_ptr, k_ptr, v_ptr, gy_ptr, token, alive - i, c, w, u, num, den, exp, p, r, through, C, BC, S
        )
        token += S
    _store_state(ps_ptr, rs_ptr, throughs_ptr, b * chunks + chunk, c, p, r, through, C)


@triton.jit
def _chain_gradients(
    gnum_ptr, gden_ptr, ps_ptr, rs_ptr, throughs_ptr, gnum0_ptr, gden0_ptr, chunks,
    C: tl.constexpr, BC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: the gradient at every chunk's end over its share p, r; the initial state's."""
    b, _, c = _place(1, C, BC, False)
    p = tl.load(gnum_ptr + b * C + c, mask=c < C, other=0.0)
    r = tl.load(gden_ptr + b * C + c, mask=c < C, other=0.0)
    groups = tl.cdiv(chunks, G)
    for step in range(groups):
        group = (groups - 1 - step) * G
        first = (b * chunks + group) * C
        ps = _load_rows(ps_ptr + first, c, chunks - group, 0.0, C, BC, G)
        rs = _load_rows(rs_ptr + first, c, chunks - group, 0.0, C, BC, G)
        fs = _load_rows(throughs_ptr + first, c, chunks - group, 1.0, C, BC, G)
        for i in tl.static_range(G - 1, -1, -1):
            _store_row(ps_ptr + first, c, p, i, chunks - group, C, BC)
            _store_row(rs_ptr + first, c, r, i, chunks - group, C, BC)
            p, r = fs[i] * p + ps[i], fs[i] * r + rs[i]
    tl.store(gnum0_ptr + b * C + c, p, mask=c < C)
    tl.store(gden0_ptr + b * C + c, r, mask=c < C)


@triton.jit
def _input_gradients_block(
    resets_ptr, k_ptr, v_ptr, gy_ptr, gk_ptr, gv_ptr, token, left, rest, c, w, u, num, den, exp, p, r, gw, gu,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    first = token * C
    ks = _load_rows(k_ptr + first, c, left, float("-inf"), C, BC, S)
    vs = _load_rows(v_ptr + first, c, left, 0.0, C, BC, S)
    gs = _load_rows(gy_ptr + first, c, left, 0.0, C, BC, S)
    ys, to_past, to_now, pasts, nows = (), (), (), (), ()
    for s in tl.static_range(S):
        k, v = ks[s].to(tl.float32), vs[s].to(tl.float32)
        exp = _emptied(exp, resets_ptr, token, s, left)
        past, now = _pair(exp, u + k)
        norm = 1.0 / (past * den + now)
        y = (past * num + now * v) * norm
        q = gs[s].to(tl.float32) * norm
        y, q = tl.where(s < left, y, 0.0), tl.where(s < left, q, 0.0)
        decay = tl.where(s < left, w, 0.0)
        ys, to_past, to_now = ys + (y,), to_past + (q * past,), to_now + (q * now,)  # noqa: RUF005
        num, den, exp, past, now = _step(num, den, exp, decay, k, v)
        pasts, nows = pasts + (past,), nows + (now,)  # noqa: RUF005
    h = p * num + r * den
    for s in tl.static_range(S - 1, -1, -1):
        v = vs[s].to(tl.float32)
        direct = to_now[s] * (v - ys[s])
        stored = nows[s] * (p * v + r)
        gk = direct + stored
        _store_row(gk_ptr + first, c, gk, s, rest, C, BC)
        _store_row(gv_ptr + first, c, to_now[s] + nows[s] * p, s, rest, C, BC)
        gu += direct
        gw += tl.where(s < left, h - stored, 0.0)
        h -= gk
        p = pasts[s] * p + to_past[s]
        r = pasts[s] * r - to_past[s] * ys[s]
    return p, r, gw, gu


@triton.jit
def _input_gradients(
    w_ptr, k_ptr, v_ptr, u_ptr, gy_ptr, lengths_ptr, resets_ptr, saved_num_ptr, saved_den_ptr, saved_exp_ptr,
    ps_ptr, rs_ptr, gk_ptr, gv_ptr, gws_ptr, gus_ptr, gnum0_ptr, gden0_ptr, T, L, chunks,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v, this chunk's share of w's and u's; with START the initial state's (one chunk)."""
    b, chunk, c = _place(chunks, C, BC, not START)
    start = chunk * L
    stop = tl.minimum(L, T - start)
    alive = tl.minimum(_length(lengths_ptr, b, T) - start, L)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    u = tl.load(u_ptr + c, mask=c < C, other=0.0)
    where = (b * chunks + chunk) * C + c
    p = tl.load(ps_ptr + where, mask=c < C, other=0.0)
    r = tl.load(rs_ptr + where, mask=c < C, other=0.0)
    gw = tl.zeros([BC], tl.float32)
    gu = tl.zeros([BC], tl.float32)
    blocks = tl.cdiv(stop, S)
    at = b * tl.cdiv(T, S) + start // S + blocks - 1
    token = b * T + start + (blocks - 1) * S
    for step in range(blocks):
        i = (blocks - 1 - step) * S
        num, den, exp = _load_state(saved_num_ptr, saved_den_ptr, saved_exp_ptr, at, c, C)
        p, r, gw, gu = _input_gradients_block(
            resets_ptr, k_ptr, v_ptr, gy_ptr, gk_ptr, gv_ptr, token, alive - i, stop - i, c, w, u, num, den, exp, p, r,
            gw, gu, C, BC, S,
        )  # fmt: skip
        token -= S
        at -= 1
    tl.store(gws_ptr + where, gw, mask=c < C)
    tl.store(gus_ptr + where, gu, mask=c < C)
    if START:
        tl.store(gnum0_ptr + b * C + c, p, mask=c < C)
        tl.store(gden0_ptr + b * C + c, r, mask=c < C)


def _plan(k: Tensor, v: Tensor, backward: bool) -> tuple[int, int, dict[str, int], dict[str, int]]:
    """Tokens per chunk, chunks, and the launch settings of the kernels over chunks and of the chains.

    The one place to tune: as many chunks as fill the GPU, none below MIN_CHUNK. Without a limit on registers the
    compiler hoists conversions, takes twice as many and halves the threads in flight.
    """
    batch, t, c = k.shape
    wanted = 1 if batch * c >= LANES_ONE_PASS else triton.cdiv(LANES, batch * c)
    length = max(MIN_CHUNK, triton.cdiv(triton.cdiv(t, wanted), BLOCK) * BLOCK)
    width = min(max(32, triton.next_power_of_2(c)), 128)
    is_packed = c % 2 == 0 and k.element_size() == v.element_size() == 2  # two channels to a 32-bit load
    threads = width // 2 if is_packed and not backward else width
    over_chunks = {"C": c, "BC": width, "S": BLOCK, "num_warps": max(1, threads // 32), "num_stages": 1}
    over_chunks["maxnreg"] = 80 if is_packed else 96
    chains = {"C": c, "BC": 32, "G": GROUP, "num_warps": 1, "num_stages": 1}
    return length, triton.cdiv(t, length), over_chunks, chains


def _any(resets: Tensor | None, length: int) -> Tensor | None:
    """[B, chunks]: whether a document begins inside each chunk."""
    if resets is None:
        return None
    return torch.nn.functional.pad(resets, (0, -resets.shape[1] % length)).view(len(resets), -1, length).any(-1)


def _buffers(n: int, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(shape, dtype=torch.float32, device=like.device) for _ in range(n))


def _saved(k: Tensor, is_saving: bool) -> tuple[Tensor, ...]:
    """Room for the state before every block of tokens."""
    batch, t, c = k.shape
    return _buffers(3, (batch if is_saving else 0, triton.cdiv(t, BLOCK), c), k)


def _forward(
    w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor,
    exp: Tensor, lengths: Tensor | None, resets: Tensor | None, is_saving: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final num, den and exp, and for the backward pass the states before blocks of tokens."""
    batch, t, c = k.shape
    length, chunks, meta, chain = _plan(k, v, backward=False)
    blocks = triton.cdiv(c, meta["BC"])
    y = torch.empty_like(v)
    end = _buffers(3, (batch, c), k)
    starts = num, den, exp
    if chunks > 1:
        starts = _buffers(3, (batch, chunks, c), k)  # type: ignore[assignment]
        _chunk_ends[(batch * chunks * blocks,)](w, k, v, lengths, resets, *starts, t, length, chunks, **meta)
        grid = (batch * triton.cdiv(c, chain["BC"]),)
        _chain_ends[grid](w, lengths, _any(resets, length), num, den, exp, *starts, *end, t, length, chunks, **chain)
    saved = _saved(k, is_saving)
    _outputs[(batch * chunks * blocks,)](
        w, k, v, u, lengths, resets, *starts, y, *(saved if is_saving else end), *end, t, length, chunks,
        SAVE=is_saving, END=chunks == 1, **meta,
    )  # fmt: skip
    return y, *end, *saved  # type: ignore[return-value]


def _fake(w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor, exp: Tensor,
          lengths: Tensor | None, resets: Tensor | None, is_saving: bool) -> tuple[Tensor, ...]:  # fmt: skip
    return torch.empty_like(v), *_buffers(3, num.shape, k), *_saved(k, is_saving)


def _backward(
    gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...], others: tuple[Any, ...], kept: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    gy, gnum, gden = gradients
    w, k, v, u, _, _ = inputs
    _, lengths, resets = others
    _, *saved = kept
    batch, t, c = k.shape
    length, chunks, meta, chain = _plan(k, v, backward=True)
    grid = (batch * chunks * triton.cdiv(c, meta["BC"]),)
    gnum0, gden0 = _buffers(2, (batch, c), k)
    ends = gnum, gden
    if chunks > 1:
        ends = p, r = _buffers(2, (batch, chunks, c), k)
        (through,) = _buffers(1, (batch, chunks, c), k)
        _chunk_gradients[grid](w, k, v, u, gy, lengths, resets, *saved, p, r, through, t, length, chunks, **meta)
        small = (batch * triton.cdiv(c, chain["BC"]),)
        _chain_gradients[small](gnum, gden, p, r, through, gnum0, gden0, chunks, **chain)
    gk, gv = torch.empty_like(k), torch.empty_like(v)
    (shares,) = _buffers(1, (2, batch * chunks, c), k)
    _input_gradients[grid](
        w, k, v, u, gy, lengths, resets, *saved, *ends, gk, gv, shares[0], shares[1], gnum0, gden0, t, length,
        chunks, START=chunks == 1, **{**meta, "maxnreg": 128},
    )  # fmt: skip
    return shares[0].sum(0), gk, gv, shares[1].sum(0), gnum0, gden0


_wkv4 = custom_operator("wkv4_triton", _forward, _backward, _fake, n_inputs=6, n_outputs=3)


def wkv4(
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: State4,
    lengths: Tensor | None,
    resets: Tensor | None = None,
) -> tuple[Tensor, State4]:
    """Same contract as the naive form, but k and v may stay in half precision; everything else is float32.

    y and the gradients past a row's length are 0. float64 is refused: the other forms compute in it.
    """
    if torch.float64 in (k.dtype, v.dtype):
        raise TypeError('the Triton form of wkv4 computes in float32; for float64 inputs use backend="chunk"')
    w, u, num, den, exp = (x.float().contiguous() for x in (w, u, *state))
    y, num, den, exp, *_ = _wkv4(w, k.contiguous(), v.contiguous(), u, num, den, exp.detach(), lengths, resets)
    return y, (num, den, exp)


def probe() -> None:
    """Build and run the kernels; raises whatever goes wrong."""
    x = torch.zeros(1, 2, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    w = torch.zeros(32, device="cuda")
    zero = torch.zeros(1, 32, device="cuda")
    wkv4(w, x, x, w, (zero, zero, zero), None)[0].sum().backward()
    torch.cuda.synchronize()
