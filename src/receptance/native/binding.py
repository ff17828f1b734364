"""From a checkpoint's tensors to the core's `Model`: which numbers go where, in which type and order.

Matrices in the file's own type are used where they lie, in the mapped file. Copies are made of what the core wants
otherwise: quantised matrices, the transposed value matrix of the channel mix, transposed low-rank maps, vectors as
float32.

A weight is a NumPy array (float64, float32, float16; uint16 = the bits of bfloat16) or `Blocks(format, shape, data)`:
a matrix in one of GGUF's block formats, whose `data` (contiguous uint8, for instance a slice of np.memmap) is read
where it lies. Names, shapes and the order of dimensions are those of the official checkpoints in either case: a
matrix of a GGUF file, whose fastest dimension is its input, has the shape [out, in] of `head.weight` or
`att.key.weight` as it lies there. Blocks may stand for `emb.weight`, `head.weight`, `att.{receptance, key, value,
gate, output}.weight` and `{ffn, ffnPre}.{key, receptance, value}.weight`, in place, and for anything else at the
price of a float32 copy.

Low-rank maps are [in, out] in official checkpoints; the core wants them [out, in] in order, so give a map that a file
holds as [out, in] as the view `stored.T`, and no copy is made.
"""

import ctypes
import mmap
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from receptance.native.arrays import Array, Weight, Weights, aligned, to_float
from receptance.native.blocks import FORMATS, Blocks
from receptance.native.config import NativeConfig
from receptance.native.library import INPUTS, TYPES, ChannelMix, Core, Layer, Matrix, Model

BLOCK, GROUP = 32, 16  # as in csrc/core.h
PACKED_BYTES = {"int8": GROUP * (2 + BLOCK), "int4": GROUP * (2 + BLOCK // 2)}
PACKED_BLOCKS = {
    "Q8_0": 544,
    "Q4_0": 288,
    "Q4_K": 2368,
    "Q5_K": 2880,
    "Q6_K": 3360,
}  # bytes of a block of 16 rows, packed
LINE_BLOCK_BYTES = {"int8": 2 + BLOCK, "int4": 2 + BLOCK // 2, "float32": 4 * BLOCK}  # the others: 2 * BLOCK
BANDS = {"int8": "band Q8_0", "int4": "band Q4_0", "Q8_0": "band Q8_0", "Q4_0": "band Q4_0"}
LARGE = 1 << 30  # bytes
TYPE_NAMES = {number: name for name, number in TYPES.items()}
MATRICES = ("receptance", "key", "value", "gate", "output", "w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2", "maa1")
DTYPE_NAMES = {np.dtype(np.float32): "float32", np.dtype(np.float64): "float32"}
DTYPE_NAMES |= {np.dtype(np.float16): "float16", np.dtype(np.uint16): "bfloat16"}
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def type_name(x: Weight) -> str:
    if isinstance(x, Blocks):
        return x.format
    return DTYPE_NAMES[x.dtype]  # `x.dtype.name` takes longer than all else that is done with a small tensor


def matrix_bytes(matrix: Matrix) -> int:
    """Of a matrix in any type; 0 when it is absent."""
    name = TYPE_NAMES[matrix.type].removeprefix("panel ").removeprefix("band ")
    if name.startswith("packed "):
        name = name.removeprefix("packed ")
        return int(matrix.rows * matrix.cols // FORMATS[name][0] * PACKED_BLOCKS[name] // GROUP)
    if name in FORMATS:
        numbers, size = FORMATS[name]
        return int(matrix.rows * matrix.cols // numbers * size)
    return int(matrix.rows * matrix.cols * LINE_BLOCK_BYTES.get(name, 2 * BLOCK) // BLOCK)


class Binding:
    """Owns everything that the `Model` points to.

    dtype: what the large matrices are stored as; None = as in the file. With int4 the head and the matrices of RWKV's
    smallest and most delicate part, the low-rank maps, keep more: int8 and the file's type.
    repack: of matrices in blocks, whether to make copies that hold the same numbers 16 rows side by side. None: of all
    but Q8_0 matrices of large models, which are read nearly as fast in place and would take seconds to copy.
    """

    def __init__(
        self,
        core: Core,
        team: int,
        weights: Weights,
        config: NativeConfig,
        dtype: str | None,
        *,
        repack: bool | None = None,
    ):
        self.core = core
        self.team = team
        self.weights = weights
        self.config = config
        self.dtype = dtype
        self.repack = repack
        blocks = sum(x.nbytes for x in weights.values() if isinstance(x, Blocks))
        in_place = () if blocks <= LARGE else ("Q8_0",)
        self.in_place = in_place if repack is None else () if repack else tuple(FORMATS)
        self.kept: list[object] = []
        self.layers = (Layer * config.n_layer)()
        self.model = self.frame()
        for index in range(config.n_layer):
            self.layer(index)
        del self.weights

    def frame(self) -> Model:
        c = self.config
        model = Model(c.major, c.n_layer, c.n_embd, c.dim_att, c.dim_ffn, c.vocab_size, c.head_size)
        model.has_gate, model.pre_ffn = c.has_gate, c.pre_ffn
        model.emb = self.plain("emb.weight")
        model.head = self.matrix("head.weight", "int8" if self.dtype == "int4" else self.dtype)
        for name, prefix in (("blocks.0.ln0", "ln0"), ("ln_out", "lnout")):
            setattr(model, prefix + "_weight", self.vector(self.weights[name + ".weight"]))
            setattr(model, prefix + "_bias", self.vector(self.weights[name + ".bias"]))
        model.layers = self.layers
        return model

    def layer(self, index: int) -> None:
        block, layer = f"blocks.{index}.", self.layers[index]
        for name in ("ln1", "ln2"):
            setattr(layer, name + "_weight", self.vector(self.weights[f"{block}{name}.weight"]))
            setattr(layer, name + "_bias", self.vector(self.weights[f"{block}{name}.bias"]))
        layer.ffn = self.channel_mix(block + "ffn.")
        if self.config.pre_ffn and index == 0:
            layer.ffn_pre = self.channel_mix(block + "ffnPre.")
            return
        att = block + "att."
        names = ["receptance", "key", "value", *(["gate"] if att + "gate.weight" in self.weights else []), "output"]
        for name in names:
            setattr(layer, name, self.matrix(f"{att}{name}.weight", self.dtype))
        if self.config.head_size % BLOCK and layer.output.type >= TYPES["int8"]:
            layer.output = self.stored(to_float(self.weights[att + "output.weight"]))  # a head quantises its own input
        if self.config.major > 4:
            layer.lnx_weight = self.vector(self.weights[att + "ln_x.weight"])
            layer.lnx_bias = self.vector(self.weights[att + "ln_x.bias"])
        (self.time_mix4_or_5, self.time_mix6, self.time_mix7)[max(self.config.major, 5) - 5](layer, att)

    def time_mix4_or_5(self, layer: Layer, att: str) -> None:
        for i, letter in enumerate(INPUTS):
            if (name := f"{att}time_mix_{letter}") in self.weights:
                layer.mix[i] = self.vector(1 - to_float(self.weights[name]))  # the core weighs the difference to before
        log_decay = -np.exp(to_float(self.weights[att + "time_decay"]))
        if self.config.major == 4:
            layer.decay = self.vector(log_decay)
            layer.bonus = self.vector(self.weights[att + "time_first"])
            return
        first = self.weights.get(att + "time_first")
        bonus = np.exp(to_float(first)) if first is not None else to_float(self.weights[att + "time_faaaa"])
        heads = self.config.dim_att // self.config.head_size
        per_channel = (heads, self.config.head_size)
        layer.decay = self.vector(np.broadcast_to(np.exp(log_decay).reshape(heads, -1), per_channel))
        layer.bonus = self.vector(np.broadcast_to(bonus.reshape(heads, -1), per_channel))

    def time_mix6(self, layer: Layer, att: str) -> None:
        for i, letter in enumerate(INPUTS):
            if letter != "a":
                layer.mix[i] = self.vector(self.weights[f"{att}time_maa_{letter}"])
        layer.mix_x = self.vector(self.weights[att + "time_maa_x"])
        layer.decay = self.vector(self.weights[att + "time_decay"])
        layer.bonus = self.vector(self.weights[att + "time_faaaa"])
        layer.maa1 = self.transposed(self.weights[att + "time_maa_w1"])
        stored = self.weights[att + "time_maa_w2"]
        outer = to_float(stored) if isinstance(stored, Blocks) else stored
        for i in range(5):
            layer.maa2[i] = self.transposed(outer[i])
        layer.w1 = self.transposed(self.weights[att + "time_decay_w1"])
        layer.w2 = self.transposed(self.weights[att + "time_decay_w2"])

    def time_mix7(self, layer: Layer, att: str) -> None:
        for i, letter in enumerate(INPUTS):
            layer.mix[i] = self.vector(self.weights[f"{att}x_{letter}"])
        names = {"w0": "decay", "r_k": "bonus", "a0": "a0", "k_k": "k_k", "k_a": "k_a"}
        has_value = att + "v0" in self.weights
        for name, field in names.items() | ({("v0", "v0")} if has_value else set()):
            setattr(layer, field, self.vector(self.weights[att + name]))
        for name in ("w1", "w2", "a1", "a2", "g1", "g2", *(("v1", "v2") if has_value else ())):
            setattr(layer, name, self.transposed(self.weights[att + name]))

    def channel_mix(self, prefix: str) -> ChannelMix:
        ffn = ChannelMix(key=self.matrix(prefix + "key.weight", self.dtype))
        if prefix + "receptance.weight" in self.weights:
            ffn.receptance = self.matrix(prefix + "receptance.weight", self.dtype)
        for letter in "kr":
            for name in ("x_", "time_maa_", "time_mix_"):
                if (stored := self.weights.get(prefix + name + letter)) is not None:
                    x = to_float(stored)
                    setattr(ffn, f"mix_{letter}", self.vector(1 - x if name == "time_mix_" else x))
        ffn.value = self.lines(prefix + "value.weight", self.dtype)
        return ffn

    def matrices(self) -> Iterator[Matrix]:
        """All that multiply a token's vector."""
        yield self.model.head
        for layer in self.layers:
            yield from (getattr(layer, name) for name in MATRICES)
            yield from layer.maa2
            for ffn in (layer.ffn, layer.ffn_pre):
                yield from (ffn.key, ffn.receptance, ffn.value)

    def is_exact(self) -> bool:
        """Whether every matrix meets float32 inputs as its own numbers: then sums have one order, whatever the rows."""
        plain = [TYPES[prefix + name] for prefix in ("", "panel ") for name in NUMPY_TYPES]
        return all(not m.data or (m.exact and m.type in plain) for m in self.matrices())

    def n_elements(self) -> int:
        return sum(int(matrix.rows * matrix.cols) for matrix in self.matrices())

    def bytes_per_token(self, active: float) -> int:
        """Of matrices that one token reads; `active`: the share of lines read of a transposed value matrix."""
        values = [ffn.value for layer in self.layers for ffn in (layer.ffn, layer.ffn_pre)]
        by_units = [TYPES[name] for name in (*NUMPY_TYPES, *BANDS.values())]
        lines = sum(matrix_bytes(value) for value in values if value.type in by_units)
        return sum(map(matrix_bytes, self.matrices())) - int(lines * (1 - active))

    # Where numbers come to lie ----------------------------------------------------------------------------------------

    def vector(self, x: Weight) -> int:
        """The address of these numbers as float32."""
        flat = np.ascontiguousarray(to_float(x)).reshape(-1)
        self.kept.append(flat)
        return flat.ctypes.data

    def stored(self, x: Weight) -> Matrix:
        """A matrix in one of the plain types or in blocks, where it lies if it lies in order."""
        if isinstance(x, Blocks):
            self.kept.append(x)
            return Matrix(*x.shape, x.data.ctypes.data, TYPES[x.format])
        if x.dtype == np.float64:
            x = to_float(x)
        x = np.ascontiguousarray(x)
        self.kept.append(x)
        return Matrix(x.shape[0], x.shape[1], x.ctypes.data, TYPES[type_name(x)], self.dtype == "float32")

    def plain(self, name: str) -> Matrix:
        return self.stored(self.weights[name])

    def transposed(self, x: Weight) -> Matrix:
        """A low-rank map [in, out] as [out, in], in its own type; in panels where a head's rows are whole ones."""
        x = (to_float(x) if isinstance(x, Blocks) else x).T
        rows, cols = x.shape
        if rows % GROUP or self.config.head_size % GROUP:
            return self.stored(x)
        source = self.temporary(x)
        memory = aligned(x.size * (4 if type_name(x) == "float32" else 2))
        kind = TYPES["panel " + type_name(x)]
        self.core.library.receptance_pack(self.core.engine, self.team, ctypes.byref(source), memory.ctypes.data, kind)
        self.kept.append(memory)
        return Matrix(rows, cols, memory.ctypes.data, kind, self.dtype == "float32")

    def matrix(self, name: str, dtype: str | None) -> Matrix:
        """[out, in] for dot products: in place, or repacked into `dtype` where that is narrower or quantised."""
        x = self.weights[name]
        rows, cols = x.shape
        if isinstance(x, Blocks) and dtype not in PACKED_BYTES:
            return self.stored(x) if x.format in self.in_place or rows % GROUP else self.packed_blocks(x)
        if dtype is None or dtype == type_name(x) or dtype == "float32" or (dtype in PACKED_BYTES and cols % BLOCK):
            return self.stored(x)  # to float32 every narrower type widens exactly, in the product
        if dtype not in PACKED_BYTES:
            return self.repacked(x, dtype, transpose=False)
        groups = -(-rows // GROUP)
        memory = aligned(groups * (cols // BLOCK) * PACKED_BYTES[dtype])
        source = self.temporary(x)
        self.core.library.receptance_pack(
            self.core.engine, self.team, ctypes.byref(source), memory.ctypes.data, TYPES[dtype]
        )
        self.kept.append(memory)
        let_go(x.data if isinstance(x, Blocks) else x)
        return Matrix(rows, cols, memory.ctypes.data, TYPES[dtype])

    def packed_blocks(self, x: Blocks) -> Matrix:
        """The same numbers and scales, 16 rows side by side; of the mapped file nothing is kept in memory."""
        rows, cols = x.shape
        memory = aligned(rows // GROUP * (cols // FORMATS[x.format][0]) * PACKED_BLOCKS[x.format])
        source, kind = Matrix(rows, cols, x.data.ctypes.data, TYPES[x.format]), TYPES["packed " + x.format]
        self.core.library.receptance_pack(self.core.engine, self.team, ctypes.byref(source), memory.ctypes.data, kind)
        self.kept.append(memory)
        let_go(x.data)
        return Matrix(rows, cols, memory.ctypes.data, kind)

    def lines(self, name: str, dtype: str | None) -> Matrix:
        """The value matrix of a channel mix, [C, F], transposed; in bands where it has blocks of 8 or 4 bits."""
        x = self.weights[name]
        channels, hidden = x.shape
        whole = not channels % BLOCK and not hidden % BLOCK
        if isinstance(x, Blocks) and dtype not in PACKED_BYTES:
            in_place = self.repack is False
            return (
                self.bands(x, BANDS[x.format])
                if x.format in BANDS and whole and not in_place
                else self.matrix(name, dtype)
            )
        if dtype in PACKED_BYTES and whole:
            return self.bands(x, BANDS[dtype])
        own = "float32" if isinstance(x, Blocks) else type_name(x)
        if dtype is None or dtype in PACKED_BYTES or (dtype == "float32" and own != "float32"):
            dtype = own
        return self.repacked(x, dtype, transpose=True)

    def bands(self, x: Weight, kind: str) -> Matrix:
        """[F, C]: 32 hidden units after the other, the same numbers as in blocks of 32 hidden units of each channel."""
        channels, hidden = x.shape
        if isinstance(x, Blocks) and BANDS.get(x.format) == kind:
            source = Matrix(channels, hidden, x.data.ctypes.data, TYPES[x.format])
        else:
            source = self.temporary(x)
        memory = aligned(channels * hidden // BLOCK * LINE_BLOCK_BYTES["int8" if kind == "band Q8_0" else "int4"])
        self.pack_lines(source, memory, TYPES[kind], transpose=True)
        let_go(x.data if isinstance(x, Blocks) else x)
        return Matrix(hidden, channels, memory.ctypes.data, TYPES[kind])

    def repacked(self, x: Weight, dtype: str, *, transpose: bool) -> Matrix:
        rows, cols = x.shape[::-1] if transpose else x.shape
        memory = aligned(rows * cols * LINE_BLOCK_BYTES.get(dtype, 2 * BLOCK) // BLOCK)
        self.pack_lines(self.temporary(x), memory, TYPES[dtype], transpose=transpose)
        if not isinstance(x, Blocks):
            let_go(x)
        return Matrix(rows, cols, memory.ctypes.data, TYPES[dtype], self.dtype == "float32")

    def pack_lines(self, source: Matrix, memory: NDArray[np.uint8], kind: int, *, transpose: bool) -> None:
        self.core.library.receptance_pack_lines(
            self.core.engine, self.team, ctypes.byref(source), transpose, memory.ctypes.data, kind
        )
        self.kept.append(memory)

    def temporary(self, x: Weight) -> Matrix:
        """A matrix that is only read now: nothing of it is kept."""
        x = np.ascontiguousarray(to_float(x) if isinstance(x, Blocks) or x.dtype == np.float64 else x)
        matrix = Matrix(x.shape[0], x.shape[1], x.ctypes.data, TYPES[type_name(x)])
        matrix.source = x  # type: ignore[attr-defined]  # lives as long as the call
        return matrix


def let_go(x: NDArray[np.generic]) -> None:
    """Pages of a mapped file that have been read leave this process's memory; they come back when they are read."""
    base: object = x
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = x.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        base.madvise(mmap.MADV_DONTNEED, first, length)


def addresses(arrays: Mapping[str, Array], fields: list[str]) -> list[int | None]:
    return [arrays[name].ctypes.data if name in arrays else None for name in fields]
