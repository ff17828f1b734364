"""RWKV on one GPU: many sequences decoded in place on a pool of states, by kernels that are chained and few.

A layer of a decoding step is norm + shift + mixes | the projections of the mixes | the rest of the time mix, state
included | its output | norm + shift + mixes | key (and receptance) | value. Only the time mix differs between versions:
`TimeMix`. Whose the products are (`gemv`'s, `gemm`'s, cuBLAS's) depends on the number of rows and is measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from receptance.engine.gpu.choices import CUBLAS, GEMM, GEMV, MIXED, Choice, Choices, fastest, versions
from receptance.engine.gpu.gemv import ADD, GATED, LOGITS, NONE, RELU_SQUARE, SIGMOID, WRITE, Matrix, Weights
from receptance.engine.gpu.layers import NOTHING, Added, Buffers, Cast, Layer, TimeMix
from receptance.engine.gpu.products import Part, Products, Projection
from receptance.models import RWKV
from receptance.ops import cuda
from receptance.ops.products import has_kernel, relu_square_product

if TYPE_CHECKING:
    from receptance.engine.gpu.prompts import Reader

HERE = Path(__file__).parent
NORM_ROWS, MANY_NORM_ROWS = 128, 512  # up to, a block for each row; from, blocks of several
STEP_THREADS = 768  # of a multiprocessor, that step states of many rows; their registers fill it
# Where nothing was measured: rows up to which the time mix applies low-rank maps itself, and products are `gemv`'s.
# What is measured: up to, and from, which rows these are tried.
FEW_ROWS, GEMV_ROWS = 16, 32
MOST_FEW_ROWS, MOST_GEMV_ROWS, LEAST_CUBLAS_ROWS = 64, 64, 16
LEAST_GEMM_ROWS, LEAST_MIXED_ROWS, MOST_GEMM_ROWS = 8, 128, 256
# Tiles a multiprocessor from which keys are squared within their product: as measured on an H100 in a graph; and
# without one, where the host takes long to launch it.
SQUARED_WAVES, SLOW_SQUARED_WAVES = 0.7, 8.0
MOST_TOKENS = 16384  # of one prefill call; offsets within a buffer are 32-bit


def bucket(rows: int, most: int) -> int:
    """The number of rows that is run for `rows`: a power of two, at most `most`."""
    return min(1 << (rows - 1).bit_length(), most)


class GpuModel:
    """A model on one GPU, decoding many sequences in place.

    model: on the device where this one shall run; its weights are copied to `dtype` (float16 or bfloat16).
    slots: rows of states. `state`: the pool, name → [L, slots + 1, …] with the fields of `receptance.models.State`; the
    last row takes what padding does. state_dtype: of "wkv", float32 or `dtype`.
    invariant: every row's logits are, bit by bit, those it would have alone, at the price of speed for many rows.
    weights: a step of few rows reads its large matrices in 8 bits, with a scale for each row, as integers ("int8") or
    numbers of type e4m3 ("float8"); others stay as they are, for prompts and many rows.
    Raises ValueError for a model that `misfit` has words for.
    """

    def __init__(
        self,
        model: RWKV,
        *,
        slots: int,
        dtype: torch.dtype = torch.float16,
        state_dtype: torch.dtype = torch.float32,
        most_rows: int = 1024,
        invariant: bool = False,
        weights: Weights = "full",
    ):
        from receptance.engine.gpu.versions import misfit, time_mix

        reason = misfit(model, dtype, state_dtype)
        if reason is not None:
            raise ValueError(f"this model does not fit the GPU kernels: {reason}")
        config: Any = model.config
        self.config = config
        self.device, self.dtype, self.slots, self.invariant, self.most_rows = (
            model.device, dtype, slots, invariant, most_rows,
        )  # fmt: skip
        self.c, self.f = config.n_embd, config.dim_ffn
        self.weights: Weights = weights
        if weights != "full" and (dtype != torch.float16 or self.c % 64 or self.f % 64):
            raise ValueError(
                f"weights={weights!r} needs float16 and sizes that are multiples of 64, found {dtype}, "
                f"n_embd {self.c} and dim_ffn {self.f}"
            )
        self.state_dtype = state_dtype
        first: Any = model.blocks[0]
        is_gated = hasattr(first.ffn, "receptance")
        gate = (Part(self.c, 1, 1, SIGMOID),) if is_gated else ()
        self.channel = Projection((Part(self.f, 0, 0, RELU_SQUARE), *gate), (self.f, *[self.c] * is_gated))
        self.time: TimeMix = time_mix(self, model)
        cast = Cast(dtype, weights)
        with torch.no_grad():
            self.layers = [self._layer(block, cast) for block in model.blocks]
            weight, bias = first.ln0.weight.float(), first.ln0.bias.float()
            table = torch.nn.functional.layer_norm(model.emb.weight.float(), (self.c,), weight, bias, first.ln0.eps)
            self.table = cast(table)
            self.ln_out = cast(model.ln_out.weight), cast(model.ln_out.bias)
            self.head = cast.matrix(model.head.weight)
        self.eps: float = model.ln_out.eps
        zero = model.zero_state()
        self.empty = {name: x.to(self._state_dtype(name, state_dtype)) for name, x in zero.items()}
        self.state = {name: x.repeat(1, slots + 1, *[1] * (x.dim() - 2)) for name, x in self.empty.items()}
        self.logits = torch.empty(most_rows, config.vocab_size, dtype=torch.float32, device=self.device)
        self.norm = self.load("norm.cu", WIDTH=self.c)
        on_gpu = self.device.type == "cuda"
        device: Any = torch.cuda.get_device_properties(self.device) if on_gpu else None
        self.processors: int = device.multi_processor_count if device else 1
        self.products = Products(self)
        self._side = torch.cuda.Stream(self.device) if on_gpu else None
        self._choices = Choices({**(versions(self.device) if on_gpu else {}), **self._shape(model)})

    def _layer(self, block: Any, cast: Cast) -> Layer:
        ffn, c = block.ffn, self.c
        channel, mixes = [ffn.key.weight], []
        if hasattr(ffn, "receptance"):
            channel.append(ffn.receptance.weight)
        for name in "kr"[: len(channel)]:
            if hasattr(ffn, f"time_mix_{name}"):  # of this token, not of the previous one
                mixes.append(1 - getattr(ffn, f"time_mix_{name}"))
            else:
                mixes.append(getattr(ffn, f"time_maa_{name}" if hasattr(ffn, f"time_maa_{name}") else f"x_{name}"))
        return Layer(
            ln1=(cast(block.ln1.weight), cast(block.ln1.bias)),
            ln2=(cast(block.ln2.weight), cast(block.ln2.bias)),
            time=self.time.layer(block, cast),
            channel_mixes=cast(torch.cat([x.reshape(1, c) for x in mixes])),
            channel=cast.matrix(torch.cat(channel)),
            value=cast.matrix(ffn.value.weight),
        )

    def _shape(self, model: RWKV) -> dict[str, str | int | bool]:
        """What choices depend on beside the GPU and the kernels."""
        sizes: dict[str, str | int] = {name: x for name, x in vars(self.config).items() if isinstance(x, int | str)}
        kinds = {"dtype": str(self.dtype), "state": str(self.state_dtype), "weights": str(self.weights)}
        name = f"{type(model).__name__}, {self.config.n_layer} x {self.c}, {self.weights}"
        return {"model": name, **sizes, **kinds}

    def load(self, source: str, **macros: int) -> cuda.Program:
        """Kernels for this model's weights."""
        return cuda.load(HERE / source, **macros, **({"BFLOAT16": 1} if self.dtype == torch.bfloat16 else {}))

    def _state_dtype(self, name: str, wkv: torch.dtype) -> torch.dtype:
        if name in ("num", "den", "exp"):
            return torch.float32
        return wkv if name == "wkv" else self.dtype

    @torch.inference_mode()
    def reset(self, slot: int) -> None:
        """The state before any token."""
        for name, x in self.state.items():
            x[:, slot] = self.empty[name][:, 0]

    @cached_property
    def rows(self) -> Buffers:
        return Buffers(self, self.most_rows)

    def shares(self, rows: int, heads: int, threads: int) -> int:
        """Into how many equal shares the rows go, so that blocks of `heads` times these fit on the GPU at once."""
        most = max(1, self.processors * (STEP_THREADS // threads) // heads)
        return -(-rows // -(-rows // most))

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside runs beside what comes after, until `join`."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def project(
        self, matrix: Matrix, x: Tensor, out: Tensor, mode: int, choice: Choice, *, activation: int = NONE,
        projection: Projection | None = None, gate: Tensor | None = None,
    ) -> None:  # fmt: skip
        """out [B, rows] of a matrix [rows, C] and x [B, C]; or what the projection says, B = len(x)."""
        if choice.has_gemm:
            pieces = None if projection is None else projection.pieces(self.c, self.most_rows)
            self.products.many(matrix.full, x, out, mode, activation=activation, pieces=pieces, gate=gate)
        else:
            self.products.few(matrix, x, out, mode, activation=activation, projection=projection, gate=gate)

    def normalise(
        self, x: Tensor, total: Tensor, norm: tuple[Tensor, Tensor], out: Tensor, *, added: Added = NOTHING,
        tokens: Tensor | None = None, mixes: Tensor | None = None, last: Tensor | None = None,
        after: Tensor | None = None, begins: Tensor | None = None, ends: Tensor | None = None, each: int | None = None,
    ) -> None:  # fmt: skip
        """norm_mix in norm.cu, `each` rows a block: total [B, C] = x and what is added, or embeddings of tokens; out:
        its norm and mixes."""
        rows = len(x)
        count, stride = (0, 0) if mixes is None else (len(mixes), out.stride(0))
        args = (
            x, total, None if tokens is None else self.table, tokens, added.delta, added.gate, *norm, self.eps, mixes,
            count, last, after, begins, ends, out, stride,
        )  # fmt: skip
        is_chained = tokens is None  # the first of a step: what comes after it may read states at once
        threads = min(256, -(-self.c // 256) * 32)  # of eight channels
        if each is None and rows <= NORM_ROWS:
            self.norm.norm_mix_row((rows,), threads, *args, chained=is_chained)
            return
        each = each or (4 if rows >= MANY_NORM_ROWS else 1)
        self.norm.norm_mix((-(-rows // each),), threads, *args, rows, each, chained=is_chained)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """One token for each row: logits [B, V], which the next call overwrites; the states of `slots` go on in place.

        tokens int64 [B], slots int32 [B], on the device, all of them different but for padding's. Can be captured.
        Logits are float32; for many rows, where not invariant, of the weights' type.
        """
        batch = len(tokens)
        if not 1 <= batch <= self.most_rows:
            raise ValueError(f"decode takes 1 to {self.most_rows} rows, found {batch}; GpuModel(most_rows=…) sets it")
        return self._decode(tokens, slots, self.choice(batch))

    def choice(self, rows: int) -> Choice:
        """How a step of so many rows is made: as measured, where `tune` was called, else by rule."""
        if self.invariant:  # the same products for all
            return Choice(GEMV, True)
        by_rule = Choice(GEMV if rows <= GEMV_ROWS else CUBLAS, rows <= FEW_ROWS)
        return self._choices.get(bucket(rows, self.most_rows)) or by_rule

    def tune(self, rows: int) -> None:
        """Measure how a step of so many rows, as `bucket` gives them, is made fastest, unless that is known.

        Takes about a second, and room for so many states. Kept in the user's cache folder, for this GPU and shape of
        model.
        """
        if self.device.type != "cuda" or self.invariant or self._choices.get(rows) is not None:
            return
        kinds = [GEMV] * (rows <= MOST_GEMV_ROWS) + [CUBLAS] * (rows >= LEAST_CUBLAS_ROWS)
        if self.products.has_gemm and LEAST_GEMM_ROWS <= rows <= MOST_GEMM_ROWS:
            kinds += [GEMM] + [MIXED] * (rows >= LEAST_MIXED_ROWS)
        few = [True, False] if rows <= MOST_FEW_ROWS else [False]
        candidates = [Choice(kind, x) for kind in kinds for x in few if not (x and kind == MIXED)]
        best = candidates[0]
        if len(candidates) > 1:
            tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
            slots = torch.arange(rows, dtype=torch.int32, device=self.device)
            pool = self.state
            try:  # states of its own: those of the pool are in use
                self.state = {name: x.repeat(1, rows, *[1] * (x.dim() - 2)) for name, x in self.empty.items()}
                best = fastest(candidates, lambda x: self._decode(tokens, slots, x))
            except torch.OutOfMemoryError:
                return
            finally:
                self.state = pool
        self._choices.put(rows, best)

    def _decode(self, tokens: Tensor, slots: Tensor, choice: Choice) -> Tensor:
        return (self._decode_own if choice.products in (GEMV, GEMM) else self._decode_many)(tokens, slots, choice)

    def _decode_own(self, tokens: Tensor, slots: Tensor, choice: Choice) -> Tensor:
        """With our products."""
        b, batch = self.rows, len(tokens)
        x, att, key = b.x[:batch], b.att[:batch], b.key[:batch]
        gate = None if b.gate is None else b.gate[:batch]
        att_shift, ffn_shift = self.state["att_shift"], self.state["ffn_shift"]
        for i, layer in enumerate(self.layers):
            self.normalise(
                x, x, layer.ln1, b.mixed, tokens=tokens if i == 0 else None, mixes=layer.time.mixes,
                last=att_shift[i], after=att_shift[i], begins=slots, ends=slots,
            )  # fmt: skip
            self.time.decode(i, layer, b, slots, choice)
            self.project(layer.time.output, att, x, ADD, choice)
            self.normalise(
                x, x, layer.ln2, b.mixed, mixes=layer.channel_mixes,
                last=ffn_shift[i], after=ffn_shift[i], begins=slots, ends=slots,
            )  # fmt: skip
            self.project(layer.channel, b.mixed[0, :batch], b.channel.flat, WRITE, choice, projection=self.channel)
            self.project(layer.value, key, x, ADD if gate is None else GATED, choice, gate=gate)
        normed, logits = b.normed[:batch], self.logits[:batch]
        self.normalise(x, x, self.ln_out, normed)
        if choice.products == GEMM:
            logits = self._half_logits(batch)
        self.project(self.head, normed, logits, LOGITS if choice.products == GEMV else WRITE, choice)
        return logits

    def _decode_many(self, tokens: Tensor, slots: Tensor, choice: Choice) -> Tensor:
        """With cuBLAS's products."""
        b, batch = self.rows, len(tokens)
        x, att, delta = b.x[:batch], b.att[:batch], b.delta[:batch]
        att_shift, ffn_shift = self.state["att_shift"], self.state["ffn_shift"]
        pending = NOTHING
        for i, layer in enumerate(self.layers):
            self.normalise(
                x, x, layer.ln1, b.mixed, added=pending, tokens=tokens if i == 0 else None, mixes=layer.time.mixes,
                last=att_shift[i], after=att_shift[i], begins=slots, ends=slots,
            )  # fmt: skip
            self.time.decode(i, layer, b, slots, choice)
            torch.mm(att, layer.time.output.full.T, out=delta)
            self.normalise(
                x, x, layer.ln2, b.mixed, added=Added(delta), mixes=layer.channel_mixes,
                last=ffn_shift[i], after=ffn_shift[i], begins=slots, ends=slots,
            )  # fmt: skip
            pending = self.channel_by_blas(layer, b, batch)
        normed = b.normed[:batch]
        self.normalise(x, x, self.ln_out, normed, added=pending)
        return torch.mm(normed, self.head.full.T, out=self._half_logits(batch))

    def _half_logits(self, rows: int) -> Tensor:
        logits = self.logits[:rows]
        return self.logits.view(-1).view(self.dtype)[: logits.numel()].view(logits.shape)

    def channel_by_blas(self, layer: Layer, b: Buffers, rows: int, waves: float = SQUARED_WAVES) -> Added:
        """The channel mix by cuBLAS: what is to be added to x. waves: see `has_kernel`."""
        key, delta = b.key[:rows], b.delta[:rows]
        x, weight = b.mixed[0, :rows], layer.channel.full[: self.f]
        if has_kernel(x, weight, waves=waves):
            relu_square_product(x, weight, key)
        else:
            torch.mm(x, weight.T, out=key)
            self.activate(key[None], [RELU_SQUARE])
        torch.mm(key, layer.value.full.T, out=delta)
        gate = None
        if b.gate is not None:
            gate = b.gate[:rows]
            torch.mm(b.mixed[1, :rows], layer.channel.full[self.f :].T, out=gate)
        return Added(delta, gate)

    def activate(self, x: Tensor, activations: Sequence[int]) -> None:
        """In place, one for each x[i]; they lie one behind the other, or x.stride(0) apart."""
        part = (x.stride(0) if len(x) > 1 else x.numel()) // 8
        kinds = sum(kind << 4 * i for i, kind in enumerate(activations))
        self.norm.activate((-(-part // 256), len(x)), 256, x, part, kinds, chained=True)

    @torch.inference_mode()
    def prefill(
        self, tokens: Tensor, starts: Sequence[int], slots: Sequence[int], *, all_logits: bool = False
    ) -> Tensor:
        """Prompts, packed: logits after each one's last token [n, V], of the weights' type; states go on in place.

        tokens int64 [total] on the device; starts, n + 1 numbers: prompt i is tokens[starts[i] : starts[i + 1]], not
        empty; slots: n different rows of the pool. Takes up to MOST_TOKENS tokens. all_logits: after every token.
        """
        lengths = [end - start for start, end in pairwise(starts)]
        total = len(tokens)
        if len(slots) != len(lengths) or min(lengths, default=0) < 1 or starts[0] != 0 or starts[-1] != total:
            raise ValueError(f"starts {list(starts)} do not cut {total} tokens into {len(slots)} prompts")
        if total > MOST_TOKENS:
            raise ValueError(f"{total} tokens to prefill at once; give at most {MOST_TOKENS} and go on from the states")
        return self.reader.read(tokens, lengths, slots, all_logits)

    @cached_property
    def reader(self) -> "Reader":
        from receptance.engine.gpu.prompts import Reader

        return Reader(self)
