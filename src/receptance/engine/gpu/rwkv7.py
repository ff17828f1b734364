"""RWKV-7 on one GPU: many sequences decoded in place on a pool of states, by kernels that are chained and few.

A layer of a decoding step is seven launches: norm + shift + mixes | r, k, v and the low-rank maps' inputs | the rest
of the time mix, state included | its output | norm + shift | key | value. Up to a few dozen rows the products are
`gemv`'s; beyond, they are cuBLAS's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.models.v7 import RWKV7, Block
from receptance.ops import cuda, wkv7

HERE = Path(__file__).parent
NONE, TANH, SIGMOID, RELU_SQUARE = range(4)
WRITE, ADD, LOGITS = range(3)
R, K, V, W, A, G = range(6)  # order of the mixes; the last four feed the low-rank maps
ACTIVATIONS = NONE, TANH, NONE, SIGMOID  # of the low-rank maps' inner vectors: v, w, a, g
SHARED_BYTES = 227 * 1024  # of a multiprocessor
NORM_THREADS, WARPS, DEPTH = 256, 16, 4
TOKENS = 8  # of a block around the operator on prompts
FEW_ROWS = 16  # for which the time mix applies the low-rank maps itself
GEMV_ROWS = 32  # up to which products are made by `gemv`
MOST_TOKENS = 16384  # of one prefill call; offsets within a buffer are 32-bit


def misfit(model: object, dtype: torch.dtype = torch.float16) -> str | None:
    """Why `GpuModel` cannot take this model, or None."""
    if not isinstance(model, RWKV7):
        return f"only RWKV-7 has GPU kernels for decoding, not {type(model).__name__}"
    c = model.config
    if c.wide_rate:
        return "the kernels have no wide_rate"
    ranks = c.decay_rank, c.rate_rank, c.value_rank, c.gate_rank
    if c.head_size not in (32, 64, 128):
        return f"heads of {c.head_size}; the kernels take 32, 64 or 128"
    if any(x % 32 for x in (c.n_embd, c.dim_ffn, *ranks)) or c.vocab_size % 16 or c.n_embd > 16384:
        return (
            f"sizes must be multiples of 32 and n_embd at most 16384: n_embd {c.n_embd}, dim_ffn {c.dim_ffn}, "
            f"ranks {ranks}; and vocab_size ({c.vocab_size}) a multiple of 16"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        return f"weights of {dtype}; the kernels take float16 or bfloat16"
    return None


@dataclass(frozen=True)
class Layer:
    """One block's weights as the kernels read them; vectors of C elements."""

    ln1: tuple[Tensor, Tensor]
    ln2: tuple[Tensor, Tensor]
    mixes: Tensor  # [6, C]: r, k, v, w, a, g
    ffn_mix: Tensor  # [1, C]
    inputs: Tensor  # [3C + 4P, C]: receptance, key, value and the low-rank maps' first halves v, w, a, g, zeros up to P
    low_rank: Tensor  # [4, P, C]: their second halves
    vectors: tuple[Tensor, ...]  # w0, a0, v0, k_k, k_a, r_k, ln_x weight and bias
    output: Tensor  # [C, C]
    key: Tensor  # [F, C]
    value: Tensor  # [C, F]

    @property
    def rkv(self) -> Tensor:
        """[3, C, C], in × out."""
        c = self.output.shape[0]
        return self.inputs[: 3 * c].view(3, c, c).transpose(1, 2)

    @property
    def first_halves(self) -> Tensor:
        """[4, C, P], in × out."""
        c = self.output.shape[0]
        return self.inputs[3 * c :].view(4, -1, c).transpose(1, 2)

    @staticmethod
    def of(block: Block, cast: "_Cast", value_rank: int) -> "Layer":
        att, ffn = block.att, block.ffn
        c = att.output.weight.shape[0]
        if hasattr(att, "v0"):
            v0, v1, v2 = att.v0.data, att.v1.data, att.v2.data
        else:  # the first layer's are never used
            zero = att.w0.new_zeros
            v0, v1, v2 = zero(1, 1, c), zero(c, value_rank), zero(value_rank, c)
        firsts, seconds = (v1, att.w1, att.a1, att.g1), (v2, att.w2, att.a2, att.g2)
        padded = max(x.shape[0] for x in seconds)
        pad = torch.nn.functional.pad
        rkv = att.receptance.weight, att.key.weight, att.value.weight
        mixes = att.x_r, att.x_k, att.x_v, att.x_w, att.x_a, att.x_g
        vectors = att.w0, att.a0, v0, att.k_k, att.k_a, att.r_k, att.ln_x.weight, att.ln_x.bias
        return Layer(
            ln1=(cast(block.ln1.weight), cast(block.ln1.bias)),
            ln2=(cast(block.ln2.weight), cast(block.ln2.bias)),
            mixes=cast(torch.cat([x.reshape(1, c) for x in mixes])),
            ffn_mix=cast(ffn.x_k.reshape(1, c)),
            inputs=cast(torch.cat([*rkv, *(pad(x.T, (0, 0, 0, padded - x.shape[1])) for x in firsts)])),
            low_rank=cast(torch.stack([pad(x, (0, 0, 0, padded - x.shape[0])) for x in seconds])),
            vectors=tuple(cast(x.flatten()) for x in vectors),
            output=cast(att.output.weight),
            key=cast(ffn.key.weight),
            value=cast(ffn.value.weight),
        )


class _Cast:
    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype, copy=True).contiguous()


class Buffers:
    """Activations of up to `rows` tokens."""

    def __init__(self, rows: int, c: int, f: int, ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.rows = rows
        self.x, self.sum = empty(rows, c, dtype=torch.float32), empty(rows, c, dtype=torch.float32)
        self.normed, self.mixed = empty(rows, c), empty(6, rows, c)
        self.projected = empty(3 * rows * c + rows * sum(ranks))  # one allocation: a launch writes both
        self.rkv = self.projected[: 3 * rows * c].view(3, rows, c)
        self.hidden = self.projected[3 * rows * c :].view(rows, sum(ranks))
        self.inner = empty(4, rows, max(ranks))  # the same, padded
        self.low = empty(4, rows, c)
        self.v_first, self.att, self.delta = empty(rows, c), empty(rows, c), empty(rows, c)
        self.key = empty(rows, f)


class GpuModel:
    """An RWKV-7 on one GPU, decoding many sequences in place.

    model: on the device where this one shall run; its weights are copied to `dtype` (float16 or bfloat16).
    slots: rows of states. `state`: the pool, name → [L, slots + 1, …] with the fields of `receptance.models.State`; the
    last row takes what padding does. state_dtype: of "wkv", float32 or `dtype`.
    invariant: every row's logits are, bit by bit, those it would have alone, at the price of speed for many rows.
    Raises ValueError for a model that `misfit` has words for.
    """

    def __init__(
        self,
        model: RWKV7,
        *,
        slots: int,
        dtype: torch.dtype = torch.float16,
        state_dtype: torch.dtype = torch.float32,
        most_rows: int = 1024,
        invariant: bool = False,
    ):
        reason = misfit(model, dtype)
        if reason is None and state_dtype not in (torch.float32, dtype):
            reason = f"a state of {state_dtype}; with weights of {dtype} it can be that or float32"
        if reason is not None:
            raise ValueError(f"this model does not fit the GPU kernels: {reason}")
        config = self.config = model.config
        self.device, self.dtype, self.slots, self.invariant, self.most_rows = (
            model.device, dtype, slots, invariant, most_rows,
        )  # fmt: skip
        cast = _Cast(dtype)
        self.c, self.n, self.h = config.n_embd, config.head_size, config.n_embd // config.head_size
        self.ranks = (config.value_rank, config.decay_rank, config.rate_rank, config.gate_rank)
        first: Any = model.blocks[0]
        with torch.no_grad():
            self.layers = [Layer.of(block, cast, config.value_rank) for block in model.blocks]  # type: ignore[arg-type]
            weight, bias = first.ln0.weight.float(), first.ln0.bias.float()
            table = torch.nn.functional.layer_norm(model.emb.weight.float(), (self.c,), weight, bias, first.ln0.eps)
            self.table = cast(table)
            self.ln_out = cast(model.ln_out.weight), cast(model.ln_out.bias)
            self.head = cast(model.head.weight)
        self.eps: float = model.ln_out.eps
        self.heads_eps: float = first.att.ln_x.eps
        zero = model.zero_state()
        self.empty = {name: x.to(self._state_dtype(name, state_dtype)) for name, x in zero.items()}
        self.state = {name: x.repeat(1, slots + 1, *[1] * (x.dim() - 2)) for name, x in self.empty.items()}
        self.logits = torch.empty(most_rows, config.vocab_size, dtype=torch.float32, device=self.device)

        macros = {"BFLOAT16": 1} if dtype == torch.bfloat16 else {}
        self._norm = cuda.load(HERE / "norm.cu", WIDTH=self.c, **macros)
        names = "RANK_V", "RANK_W", "RANK_A", "RANK_G", "RANK_ROWS"
        half = {} if state_dtype == torch.float32 else {"HALF_STATE": 1}
        self._wkv = cuda.load(
            HERE / "wkv7.cu", HEAD=self.n, **dict(zip(names, (*self.ranks, max(self.ranks)))), **macros, **half
        )
        self._gemv = {x: self._load_gemv(*x, macros) for x in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4))}
        on_gpu = self.device.type == "cuda"
        self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 1

    def _load_gemv(self, row_tiles: int, batch_tiles: int, macros: dict[str, int]) -> tuple[cuda.Kernel, int]:
        """The kernel and the bytes of shared memory that it needs."""
        ring, sums = WARPS * DEPTH * row_tiles * 1024, WARPS * row_tiles * 16 * (8 * batch_tiles + 1) * 4
        program = cuda.load(
            HERE / "gemv.cu", WARPS=WARPS, ROW_TILES=row_tiles, BATCH_TILES=batch_tiles, DEPTH=DEPTH,
            SHARED_BYTES=ring + sums, **macros,
        )  # fmt: skip
        return program.gemv, ring + sums

    def _state_dtype(self, name: str, wkv: torch.dtype) -> torch.dtype:
        return wkv if name == "wkv" else self.dtype

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """The state before any token."""
        for name, x in self.state.items():
            x[:, slot] = self.empty[name][:, 0]

    @cached_property
    def _rows(self) -> Buffers:
        return Buffers(self.most_rows, self.c, self.config.dim_ffn, self.ranks, self.dtype, self.device)

    @cached_property
    def _tasks(self) -> dict[int, Tensor]:
        """For tiles of 16 and 32 rows: what each tile of `Layer.inputs` does, see Task in gemv.cu."""
        c, rows, ranks = self.c, self.most_rows, sum(self.ranks)
        tables = {}
        for tile in (16, 32):
            tasks: list[list[int]] = []
            for part, mix in enumerate((R, K, V)):
                tasks += [
                    [(part * c + i) * c, mix * rows * c, part * rows * c + i, c, NONE, c] for i in range(0, c, tile)
                ]
            first = 0
            for part, (rank, mix) in enumerate(zip(self.ranks, (V, W, A, G))):
                from_row = 3 * c + part * max(self.ranks)
                tasks += [
                    [(from_row + i) * c, mix * rows * c, 3 * rows * c + first + i, c, ACTIVATIONS[part], ranks]
                    for i in range(0, rank, tile)
                ]
                first += rank
            tables[tile] = self._task_tensor(tasks)
        return tables

    def _task_tensor(self, tasks: list[list[int]]) -> Tensor:
        """[tasks, 5] of 64 bits: three offsets, two pairs of 32-bit numbers."""
        x = torch.tensor(tasks)
        packed = torch.stack([*x[:, :3].unbind(1), x[:, 3] | x[:, 4] << 32, x[:, 5]], 1)
        return packed.to(self.device)

    def _project(
        self, weight: Tensor, x: Tensor, out: Tensor, mode: int, *, activation: int = NONE, with_tasks: bool = False
    ) -> None:
        """gemv: out [B, rows] of weight [rows, columns] and x [B, columns]; or what the tasks say, for B = len(x)."""
        batch, rows = len(x), weight.shape[0]
        batch_tiles = next((n for n in (1, 2, 4) if batch <= 8 * n), 8)
        row_tiles = 2 if batch_tiles in (2, 4) and rows % 32 == 0 and rows // 32 >= 2 * self._processors else 1
        kernel, shared = self._gemv[row_tiles, batch_tiles]
        tasks = self._tasks[16 * row_tiles] if with_tasks else None
        tiles = rows // (16 * row_tiles) if tasks is None else len(tasks)
        blocks = min(tiles, self._processors * (SHARED_BYTES // (shared + 1024)))
        kernel(
            (blocks, -(-batch // (8 * batch_tiles))), 32 * WARPS, weight, tasks, weight.shape[-1], activation, x,
            x.stride(0), out, out.stride(0), batch, mode, tiles, shared=shared, chained=True,
        )  # fmt: skip

    def _normalise(
        self, x: Tensor, total: Tensor, norm: tuple[Tensor, Tensor], out: Tensor, *, delta: Tensor | None = None,
        tokens: Tensor | None = None, mixes: Tensor | None = None, last: Tensor | None = None,
        after: Tensor | None = None, begins: Tensor | None = None, ends: Tensor | None = None, each: int = 1,
    ) -> None:  # fmt: skip
        """norm_mix in norm.cu: total [B, C] = x + delta, or the embeddings of tokens; out: its norm and mixes."""
        rows = len(x)
        count, stride = (0, 0) if mixes is None else (len(mixes), out.stride(0))
        self._norm.norm_mix(
            (-(-rows // each),), NORM_THREADS, x, total, None if tokens is None else self.table, tokens, delta, *norm,
            self.eps, mixes, count, last, after, begins, ends, out, stride, rows, each, chained=True,
        )  # fmt: skip

    @torch.inference_mode()
    def decode(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """One token for each row: logits [B, V], which the next call overwrites; the states of `slots` go on in place.

        tokens int64 [B], slots int32 [B], on the device, all of them different but for padding's. Can be captured.
        Logits are float32; for many rows, where not invariant, of the weights' type.
        """
        batch = len(tokens)
        if not 1 <= batch <= self.most_rows:
            raise ValueError(f"decode takes 1 to {self.most_rows} rows, found {batch}; GpuModel(most_rows=…) sets it")
        b, c = self._rows, self.c
        own = self.invariant or batch <= GEMV_ROWS  # our products; else cuBLAS
        x, att, delta, key = b.x[:batch], b.att[:batch], b.delta[:batch], b.key[:batch]
        att_shift, wkv, ffn_shift = (self.state[name] for name in ("att_shift", "wkv", "ffn_shift"))
        inner = b.inner.flatten()[: 4 * batch * b.inner.shape[2]].view(4, batch, -1)
        pending: Tensor | None = None  # what the next norm adds to x
        for i, layer in enumerate(self.layers):
            self._normalise(
                x, x, layer.ln1, b.mixed, delta=pending, tokens=tokens if i == 0 else None, mixes=layer.mixes,
                last=att_shift[i], after=att_shift[i], begins=slots, ends=slots,
            )  # fmt: skip
            is_few = self.invariant or batch <= FEW_ROWS
            if is_few:
                self._project(layer.inputs, b.mixed[0, :batch], b.projected, WRITE, with_tasks=True)
            else:
                torch.bmm(b.mixed[: V + 1, :batch], layer.rkv, out=b.rkv[:, :batch])
            rest: tuple[cuda.Argument, ...] = b.v_first, int(i == 0), wkv[i], slots, *layer.vectors, self.heads_eps, att
            grid, threads = (self.h, batch), 4 * self.n
            if is_few:
                self._wkv.wkv7_step(grid, threads, b.rkv, b.rows * c, b.hidden, layer.low_rank, *rest, chained=True)
            else:
                self._low_rank(layer, b.mixed[V:, :batch], inner, b.low[:, :batch])
                self._wkv.wkv7_step_many(grid, threads, b.rkv, b.rows * c, b.low, b.rows * c, *rest, chained=True)
            if own:
                self._project(layer.output, att, x, ADD)
            else:
                torch.mm(att, layer.output.T, out=delta)
            mixed = b.mixed[0, :batch]
            self._normalise(
                x, x, layer.ln2, b.mixed, delta=None if own else delta, mixes=layer.ffn_mix,
                last=ffn_shift[i], after=ffn_shift[i], begins=slots, ends=slots,
            )  # fmt: skip
            if own:
                self._project(layer.key, mixed, key, WRITE, activation=RELU_SQUARE)
                self._project(layer.value, key, x, ADD)
            else:
                torch.mm(mixed, layer.key.T, out=key)
                self._activate(key[None], [RELU_SQUARE])
                torch.mm(key, layer.value.T, out=delta)
                pending = delta
        normed = b.normed[:batch]
        self._normalise(x, x, self.ln_out, normed, delta=pending)
        return self._head(normed, own)

    def _head(self, normed: Tensor, own: bool) -> Tensor:
        logits = self.logits[: len(normed)]
        if own:
            self._project(self.head, normed, logits, LOGITS)
            return logits
        half = self.logits.view(-1).view(self.dtype)[: logits.numel()].view(logits.shape)
        torch.mm(normed, self.head.T, out=half)
        return half

    def _low_rank(self, layer: Layer, mixed: Tensor, inner: Tensor, low: Tensor) -> None:
        """low [4, B, C]: the low-rank maps of mixed [4, B, C]."""
        torch.bmm(mixed, layer.first_halves, out=inner)
        self._activate(inner, ACTIVATIONS)
        torch.bmm(inner, layer.low_rank, out=low)

    def _activate(self, x: Tensor, activations: Sequence[int]) -> None:
        """In place, one for each x[i]; they lie one behind the other, or x.stride(0) apart."""
        part = (x.stride(0) if len(x) > 1 else x.numel()) // 8
        kinds = sum(kind << 4 * i for i, kind in enumerate(activations))
        self._norm.activate((-(-part // 256), len(x)), 256, x, part, kinds, chained=True)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, starts: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Prompts, packed: logits after each one's last token [n, V], of the weights' type; states go on in place.

        tokens int64 [total] on the device; starts, n + 1 numbers: prompt i is tokens[starts[i] : starts[i + 1]], not
        empty; slots: n different rows of the pool. Takes up to MOST_TOKENS tokens.
        """
        lengths = [end - start for start, end in pairwise(starts)]
        total = len(tokens)
        if len(slots) != len(lengths) or min(lengths, default=0) < 1 or starts[0] != 0 or starts[-1] != total:
            raise ValueError(f"starts {list(starts)} do not cut {total} tokens into {len(slots)} prompts")
        if total > MOST_TOKENS:
            raise ValueError(f"{total} tokens to prefill at once; give at most {MOST_TOKENS} and go on from the states")
        return Prompts(self, tokens, lengths, slots).run()


class Prompts:
    """One prefill call: rows are tokens, but for the operator, which takes padded rows [n, T] where lengths differ."""

    def __init__(self, model: GpuModel, tokens: Tensor, lengths: list[int], slots: Sequence[int]):
        self.model, self.tokens, self.lengths = model, tokens, lengths
        self.t, total = max(lengths), len(tokens)
        begins: list[int] = []
        ends: list[int] = []
        place: list[int] = []
        for i, (length, slot) in enumerate(zip(lengths, slots)):
            begins += [slot] + [-1] * (length - 1)
            ends += [-1] * (length - 1) + [i]
            place += range(i * self.t, i * self.t + length)
        table = torch.tensor([begins, ends, place], dtype=torch.int32).to(model.device)
        self.begins, self.ends, self.place = table
        self.slots = torch.tensor(slots, device=model.device)
        self.last_rows = torch.tensor(lengths).cumsum(0).sub(1).to(model.device)
        c, f = model.c, model.config.dim_ffn
        self.b = Buffers(total, c, f, model.ranks, model.dtype, model.device)
        self.carried = torch.empty(len(lengths), c, dtype=model.dtype, device=model.device)

    def run(self) -> Tensor:
        model, b = self.model, self.b
        x, spare = b.x, b.sum
        pending: Tensor | None = None
        n, t, h = len(self.lengths), self.t, model.h
        shape, grid = (n, t, h, model.n), (h, -(-b.rows // TOKENS))
        # padding is zeros, which leave the state alone: e^0, and nothing written
        inputs = torch.zeros(6, *shape, dtype=model.dtype, device=model.device)
        bonuses = torch.empty(b.rows, h, device=model.device)
        for i, layer in enumerate(model.layers):
            self._normalise(x, spare, layer.ln1, i, "att_shift", layer.mixes, pending, first=i == 0)
            x, spare = spare, x
            torch.bmm(b.mixed[: V + 1], layer.rkv, out=b.rkv)
            model._low_rank(layer, b.mixed[V:], b.inner, b.low)
            model._wkv.wkv7_prepare(
                grid, 32 * TOKENS, b.rkv, b.rows * model.c, b.low, b.v_first, int(i == 0), *layer.vectors[:6],
                self.place, inputs, n * t * model.c, bonuses, b.rows, chained=True,
            )  # fmt: skip
            pool = model.state["wkv"][i]
            r, w, k, v, erase, write = inputs.unbind(0)
            y, end = wkv7(r, w, k, v, erase, write, pool[self.slots].float())
            pool.index_copy_(0, self.slots, end.to(pool.dtype))
            model._wkv.wkv7_finish(
                grid, 32 * TOKENS, y, v, b.low[3], bonuses, self.place, *layer.vectors[6:],
                model.heads_eps, b.att, b.rows, chained=True,
            )  # fmt: skip
            torch.mm(b.att, layer.output.T, out=b.delta)
            self._normalise(x, spare, layer.ln2, i, "ffn_shift", layer.ffn_mix, b.delta)
            x, spare = spare, x
            torch.mm(b.mixed[0], layer.key.T, out=b.key)
            model._activate(b.key[None], [RELU_SQUARE])
            torch.mm(b.key, layer.value.T, out=b.delta)
            pending = b.delta
        last = x[self.last_rows]
        normed = torch.empty_like(last, dtype=model.dtype)
        model._normalise(last, last, model.ln_out, normed, delta=b.delta[self.last_rows])
        return normed @ model.head.T

    def _normalise(
        self, x: Tensor, total: Tensor, norm: tuple[Tensor, Tensor], layer: int, name: str, mixes: Tensor,
        delta: Tensor | None, first: bool = False,
    ) -> None:  # fmt: skip
        """total = x + delta and its mixes; the pool gets each prompt's last row only once all have read theirs."""
        pool = self.model.state[name][layer]
        self.model._normalise(
            x, total, norm, self.b.mixed, delta=delta, tokens=self.tokens if first else None, mixes=mixes,
            last=pool, after=self.carried, begins=self.begins, ends=self.ends, each=8 if len(x) > 2048 else 2,
        )  # fmt: skip
        pool.index_copy_(0, self.slots, self.carried)
