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
R, K, V, W, A, G = range(6)  # order of the mixes
NORM_THREADS, WARPS = 256, 8
FEW_ROWS = 16  # for which the time mix applies the low-rank maps itself
GEMV_ROWS = 32  # up to which products are made by `gemv`
LOW_RANK_ROWS = 64  # the same for the low-rank maps
MOST_TOKENS = 16384  # of one prefill call; offsets within a buffer are 32-bit


def misfit(model: object, dtype: torch.dtype = torch.float16) -> str | None:
    """Why `GpuModel` cannot take this model, or None."""
    if not isinstance(model, RWKV7):
        return f"only RWKV-7 has GPU kernels for decoding, not {type(model).__name__}"
    c = model.config
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
    inputs: Tensor  # [3C + ranks, C]: receptance, key, value and the low-rank maps' first halves w, a, v, g
    low_rank: Tensor  # [ranks, C]: their second halves
    low_rank_rows: Tensor  # the same, each transposed [C, rank] and flattened
    vectors: tuple[Tensor, ...]  # w0, a0, v0, k_k, k_a, r_k, ln_x weight and bias
    output: Tensor  # [C, C]
    key: Tensor  # [F, C]
    value: Tensor  # [C, F]

    @staticmethod
    def of(block: Block, cast: "_Cast", value_rank: int) -> "Layer":
        att, ffn = block.att, block.ffn
        c = att.output.weight.shape[0]
        if hasattr(att, "v0"):
            v0, v1, v2 = att.v0, att.v1, att.v2
        else:  # the first layer's are never used
            v0, v1, v2 = (att.w0.new_zeros(shape) for shape in ((1, 1, c), (c, value_rank), (value_rank, c)))
        firsts, seconds = (att.w1, att.a1, v1, att.g1), (att.w2, att.a2, v2, att.g2)
        rkv = att.receptance.weight, att.key.weight, att.value.weight
        mixes = att.x_r, att.x_k, att.x_v, att.x_w, att.x_a, att.x_g
        vectors = att.w0, att.a0, v0, att.k_k, att.k_a, att.r_k, att.ln_x.weight, att.ln_x.bias
        return Layer(
            ln1=(cast(block.ln1.weight), cast(block.ln1.bias)),
            ln2=(cast(block.ln2.weight), cast(block.ln2.bias)),
            mixes=cast(torch.cat([x.reshape(1, c) for x in mixes])),
            ffn_mix=cast(ffn.x_k.reshape(1, c)),
            inputs=cast(torch.cat([*rkv, *(x.T for x in firsts)])),
            low_rank=cast(torch.cat(seconds)),
            low_rank_rows=cast(torch.cat([x.T.reshape(-1) for x in seconds])),
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

    def __init__(self, rows: int, c: int, f: int, ranks: int, dtype: torch.dtype, device: torch.device):
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.rows = rows
        self.x, self.sum = empty(rows, c, dtype=torch.float32), empty(rows, c, dtype=torch.float32)
        self.normed, self.mixed = empty(rows, c), empty(6, rows, c)
        self.projected = empty(3 * rows * c + rows * ranks)  # one allocation: a launch writes both
        self.rkv = self.projected[: 3 * rows * c].view(3, rows, c)
        self.hidden = self.projected[3 * rows * c :].view(rows, ranks)
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
        self.ranks = (config.decay_rank, config.rate_rank, config.value_rank, config.gate_rank)
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
        names = "RANK_W", "RANK_A", "RANK_V", "RANK_G"
        half = {} if state_dtype == torch.float32 else {"HALF_STATE": 1}
        self._wkv = cuda.load(HERE / "wkv7.cu", HEAD=self.n, **dict(zip(names, self.ranks)), **macros, **half)
        self._gemv = {
            tiles: cuda.load(HERE / "gemv.cu", WARPS=WARPS, ROW_TILES=1, BATCH_TILES=tiles, DEPTH=8, **macros).gemv
            for tiles in (1, 2, 4, 8)
        }

    def _state_dtype(self, name: str, wkv: torch.dtype) -> torch.dtype:
        return wkv if name == "wkv" else self.dtype

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """The state before any token."""
        for name, x in self.state.items():
            x[:, slot] = self.empty[name][:, 0]

    @cached_property
    def _rows(self) -> Buffers:
        return Buffers(self.most_rows, self.c, self.config.dim_ffn, sum(self.ranks), self.dtype, self.device)

    @cached_property
    def _tasks(self) -> tuple[Tensor, Tensor]:
        """What each 16 rows of `Layer.inputs` do, and of `Layer.low_rank_rows`: see Task in gemv.cu."""
        c, rows, ranks = self.c, self.most_rows, sum(self.ranks)
        inputs: list[list[int]] = []
        outputs: list[list[int]] = []
        for part, mix in enumerate((R, K, V)):
            inputs += [[(part * c + i) * c, mix * rows * c, part * rows * c + i, c, NONE, c] for i in range(0, c, 16)]
        first = offset = 0
        kinds = zip(self.ranks, (W, A, V, G), (TANH, NONE, NONE, SIGMOID), range(4))
        for rank, mix, activation, part in kinds:
            inputs += [
                [(3 * c + i) * c, mix * rows * c, 3 * rows * c + i, c, activation, ranks]
                for i in range(first, first + rank, 16)
            ]
            outputs += [[offset + i * rank, first, part * rows * c + i, rank, NONE, c] for i in range(0, c, 16)]
            first, offset = first + rank, offset + rank * c
        return self._task_tensor(inputs), self._task_tensor(outputs)

    def _task_tensor(self, tasks: list[list[int]]) -> Tensor:
        """[tasks, 5] of 64 bits: three offsets, two pairs of 32-bit numbers."""
        x = torch.tensor(tasks)
        packed = torch.stack([*x[:, :3].unbind(1), x[:, 3] | x[:, 4] << 32, x[:, 5]], 1)
        return packed.to(self.device)

    def _project(
        self, weight: Tensor, x: Tensor, out: Tensor, mode: int, *, activation: int = NONE, tasks: Tensor | None = None
    ) -> None:
        """gemv: out [B, rows] of weight [rows, columns] and x [B, columns], or what the tasks say for B = len(x)."""
        batch = len(x)
        tiles = next((n for n in (1, 2, 4) if batch <= 8 * n), 8)
        blocks = weight.shape[0] // 16 if tasks is None else len(tasks)
        self._gemv[tiles](
            (blocks, -(-batch // (8 * tiles))), 32 * WARPS, weight, tasks, weight.shape[-1], activation, x, x.stride(0),
            out, out.stride(0), batch, mode, chained=True,
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
        pending: Tensor | None = None  # what the next norm adds to x
        for i, layer in enumerate(self.layers):
            self._normalise(
                x, x, layer.ln1, b.mixed, delta=pending, tokens=tokens if i == 0 else None, mixes=layer.mixes,
                last=att_shift[i], after=att_shift[i], begins=slots, ends=slots,
            )  # fmt: skip
            self._inputs(layer, batch, own)
            is_few = self.invariant or batch <= FEW_ROWS
            if not is_few:
                self._low_rank(layer, batch)
            self._wkv.wkv7_step(
                (self.h, batch), 4 * self.n, b.projected, b.rows * c, b.hidden if is_few else None, layer.low_rank,
                b.low, b.v_first, int(i == 0), wkv[i], slots, *layer.vectors, self.heads_eps, att, chained=True,
            )  # fmt: skip
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
                self._activate(key, RELU_SQUARE)
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

    def _inputs(self, layer: Layer, batch: int, own: bool) -> None:
        """r, k, v and the low-rank maps' first halves."""
        b, c = self._rows, self.c
        tasks = self._tasks[0]
        if not own:
            weights = layer.inputs[: 3 * c].view(3, c, c)
            torch.bmm(b.mixed[:3, :batch], weights.transpose(1, 2), out=b.rkv[:, :batch])
            if batch > LOW_RANK_ROWS:
                return
            tasks = tasks[3 * c // 16 :]
        self._project(layer.inputs, b.mixed[0, :batch], b.projected, WRITE, tasks=tasks)

    def _low_rank(self, layer: Layer, batch: int) -> None:
        """The low-rank maps' second halves; of many rows the first ones too."""
        b = self._rows
        if batch > LOW_RANK_ROWS:
            return self._low_rank_products(layer, b.mixed[:, :batch], b.low[:, :batch])
        self._project(layer.low_rank_rows, b.hidden[:batch], b.low, WRITE, tasks=self._tasks[1])

    def _low_rank_products(self, layer: Layer, mixed: Tensor, low: Tensor) -> None:
        """low [4, B, C] of mixed [6, B, C] by cuBLAS."""
        first = 0
        kinds = zip(self.ranks, (W, A, V, G), (TANH, NONE, NONE, SIGMOID), range(4))
        for rank, mix, activation, part in kinds:
            rows = slice(first, first + rank)
            hidden = torch.mm(mixed[mix], layer.inputs[3 * self.c :][rows].T)
            if activation != NONE:
                self._activate(hidden, activation)
            torch.mm(hidden, layer.low_rank[rows], out=low[part])
            first += rank

    def _activate(self, x: Tensor, activation: int) -> None:
        groups = x.numel() // 8
        self._norm.activate((-(-groups // 256),), 256, x, groups, activation, chained=True)

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
        self.b = Buffers(total, c, f, sum(model.ranks), model.dtype, model.device)
        self.carried = torch.empty(len(lengths), c, dtype=model.dtype, device=model.device)

    def run(self) -> Tensor:
        model, b = self.model, self.b
        x, spare = b.x, b.sum
        pending: Tensor | None = None
        n, t, h = len(self.lengths), self.t, model.h
        shape = n, t, h, model.n
        # padding is zeros, which leave the state alone: e^0, and nothing written
        inputs = torch.zeros(6, *shape, dtype=model.dtype, device=model.device)
        bonuses = torch.empty(b.rows, h, device=model.device)
        for i, layer in enumerate(model.layers):
            self._normalise(x, spare, layer.ln1, i, "att_shift", layer.mixes, pending, first=i == 0)
            x, spare = spare, x
            self._projections(layer)
            model._wkv.wkv7_prepare(
                (h, b.rows), model.n, b.rkv, b.rows * model.c, b.low, b.v_first, int(i == 0), *layer.vectors[:6],
                self.place, inputs, n * t * model.c, bonuses, chained=True,
            )  # fmt: skip
            pool = model.state["wkv"][i]
            r, w, k, v, erase, write = inputs.unbind(0)
            y, end = wkv7(r, w, k, v, erase, write, pool[self.slots].float())
            pool.index_copy_(0, self.slots, end.to(pool.dtype))
            model._wkv.wkv7_finish(
                (h, b.rows), model.n, y, v, b.low[3], bonuses, self.place, *layer.vectors[6:],
                model.heads_eps, b.att, chained=True,
            )  # fmt: skip
            torch.mm(b.att, layer.output.T, out=b.delta)
            self._normalise(x, spare, layer.ln2, i, "ffn_shift", layer.ffn_mix, b.delta)
            x, spare = spare, x
            torch.mm(b.mixed[0], layer.key.T, out=b.key)
            model._activate(b.key, RELU_SQUARE)
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

    def _projections(self, layer: Layer) -> None:
        model, b, c = self.model, self.b, self.model.c
        torch.bmm(b.mixed[:3], layer.inputs[: 3 * c].view(3, c, c).transpose(1, 2), out=b.rkv)
        model._low_rank_products(layer, b.mixed, b.low)
