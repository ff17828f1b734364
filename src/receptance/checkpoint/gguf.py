"""GGUF files: RWKV's tensors as llama.cpp names and shapes them (rwkv6, rwkv7), or in our own way (rwkv4, rwkv5).

The tables below hold what llama.cpp's convert_hf_to_gguf.py (conversion/rwkv.py) does and src/models/rwkv*.cpp expects:
low-rank maps transposed, vectors flat, the static mixes of the time mix in one tensor. Versions 4 and 5, which
llama.cpp does not have, keep their official names and shapes. All of it works on NumPy arrays and `Blocks`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from receptance.atomic import replacing
from receptance.errors import CheckpointError, ConfigError
from receptance.gguf.formats import FORMATS, row_pieces
from receptance.gguf.quantise import dequantise, pack, quantise, scaled
from receptance.gguf.reader import Scalar, StoredList, read_header
from receptance.gguf.writer import NewTensor, Value, write_gguf
from receptance.native import NativeConfig
from receptance.native.arrays import Weight, to_float
from receptance.native.blocks import Blocks
from receptance.native.model import available_cores

from .source import MappedFile, StoredTensor, TensorSource, show

Plain = NDArray[np.generic]
Stored = Weight
Move = Callable[[Plain], Plain]

NORM_EPS = 1e-5  # of RWKV's layer norms in every version
V6_MIXES, V7_MIXES = "wkvrg", "rwkvag"  # in the order of the fused tensor
FUSED = ".time_mix_lerp_fused.weight"


@dataclass
class GGUFSource(TensorSource):
    """A GGUF file's tensors, and its metadata fields with their types."""

    fields: dict[str, Scalar | StoredList | None] = field(default_factory=dict)

    def official(self) -> dict[str, Stored]:
        return read_official(self)

    @property
    def architecture(self) -> object:
        return self.fields.get("general.architecture")

    def number(self, name: str, default: float | None = None) -> float:
        """A metadata field that must be a number."""
        value = self.fields.get(name, default)
        if value is None:
            raise CheckpointError(f"the metadata field {name} is missing; convert the model again")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"the metadata field {name} is {show(value)}, expected a number")
        return value


def open_gguf(file: MappedFile) -> GGUFSource:
    """Reads the header only: some milliseconds, most of them for stepping over the vocabulary."""
    header = read_header(file.data, file.path)
    tensors = {x.name: StoredTensor(file, x.format.name, x.shape, x.offset) for x in header.tensors.values()}
    for name, tensor in tensors.items():
        tensor.check(name, header.start, file.size)
    return GGUFSource(file.path, tensors, fields=header.fields)


# Names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One tensor: official name, name in the file, official shape with -1 for what the elements tell, shape in the file
    (None = as it is), and the axes that are exchanged between the two."""

    official: str
    theirs: str
    shape: tuple[int, ...] | None = None
    file_shape: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None

    def read(self, x: Plain) -> Plain:
        if self.axes:
            return x.transpose(self.axes)
        return x if self.shape is None else x.reshape(self.shape)

    def write(self, x: Plain) -> Plain:
        if self.axes:
            return x.transpose(self.axes)
        return x if self.file_shape is None else x.reshape(self.file_shape)


def flat(official: str, theirs: str) -> Rule:
    """[1, 1, C] here, [C] there."""
    return Rule(official, theirs, (1, 1, -1), (-1,))


def low_rank(official: str, theirs: str) -> Rule:
    return Rule(official, theirs, axes=(1, 0))


def norm(official: str, theirs: str) -> list[Rule]:
    return [Rule(f"{official}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def matrices(*names: str) -> list[Rule]:
    there = {"att": "time_mix_", "ffn": "channel_mix_"}
    parts = [name.split(".") for name in names]
    return [Rule(f"blocks.*.{part}.{name}.weight", f"blk.*.{there[part]}{name}.weight") for part, name in parts]


# "*" stands for the layer
COMMON = [
    Rule("emb.weight", "token_embd.weight"),
    *norm("blocks.0.ln0", "token_embd_norm"),
    *norm("blocks.*.ln1", "blk.*.attn_norm"),
    *norm("blocks.*.ln2", "blk.*.attn_norm_2"),
    *matrices("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"),
    *norm("blocks.*.att.ln_x", "blk.*.time_mix_ln"),
    flat("blocks.*.ffn.{mix}k", "blk.*.channel_mix_lerp_k.weight"),
    *norm("ln_out", "output_norm"),
    Rule("head.weight", "output.weight"),
]
V6 = [
    *matrices("att.gate", "ffn.receptance"),
    flat("blocks.*.ffn.{mix}r", "blk.*.channel_mix_lerp_r.weight"),
    *(flat(f"blocks.*.att.{{mix}}{j}", f"blk.*.time_mix_lerp_{j}.weight") for j in "xwkvrg"),
    low_rank("blocks.*.att.time_maa_w1", "blk.*.time_mix_w1.weight"),  # [C, 5R] here, [5R, C] there
    Rule("blocks.*.att.time_maa_w2", "blk.*.time_mix_w2.weight", axes=(0, 2, 1)),  # [5, R, C] here, [5, C, R] there
    Rule("blocks.*.att.time_faaaa", "blk.*.time_mix_first.weight"),
    flat("blocks.*.att.time_decay", "blk.*.time_mix_decay.weight"),
    low_rank("blocks.*.att.time_decay_w1", "blk.*.time_mix_decay_w1.weight"),
    low_rank("blocks.*.att.time_decay_w2", "blk.*.time_mix_decay_w2.weight"),
]
V7 = [
    *(flat(f"blocks.*.att.{{mix}}{j}", f"blk.*.time_mix_lerp_{j}.weight") for j in V7_MIXES),
    *(flat(f"blocks.*.att.{j}0", f"blk.*.time_mix_{j}0.weight") for j in "wav"),
    *(low_rank(f"blocks.*.att.{j}{i}", f"blk.*.time_mix_{j}{i}.weight") for j in "wavg" for i in "12"),
    *(flat(f"blocks.*.att.{name}", f"blk.*.time_mix_{name}.weight") for name in ("k_k", "k_a")),
    Rule("blocks.*.att.r_k", "blk.*.time_mix_r_k.weight", (-1, 0), (-1,)),  # [H, N] here; 0: the head size
]
MIX = {"6": "time_maa_", "7": "x_"}
MIXES = {"6": V6_MIXES, "7": V7_MIXES}
VERSIONS = {"rwkv6": "6", "rwkv7": "7"}  # llama.cpp's architectures; ours are rwkv4 and rwkv5

LARGE = re.compile(
    r"emb\.weight|head\.weight|blocks\.\d+\.(att|ffn|ffnPre)\.(receptance|key|value|gate|output)\.weight"
)
LOW_RANK = re.compile(r"blocks\.\d+\.att\.([wavg][12]|time_maa_w[12]|time_decay_w[12])")


def rules(version: str, layers: int) -> list[Rule]:
    """Of every tensor, for each layer."""
    found = []
    for rule in [*COMMON, *(V6 if version == "6" else V7)]:
        official = rule.official.replace("{mix}", MIX[version])
        for layer in map(str, range(layers if "*" in rule.theirs else 1)):
            names = (official.replace("*", layer), rule.theirs.replace("*", layer))
            found.append(Rule(*names, rule.shape, rule.file_shape, rule.axes))
    return found


# Reading ---------------------------------------------------------------------------------------------------------


def read_official(source: GGUFSource) -> dict[str, Stored]:
    """All tensors under official names and shapes, on the mapped file where they need no change.

    Large matrices may be `Blocks`; whatever else the file has in blocks becomes float32.
    """
    stored: dict[str, Stored] = {}
    for name, tensor in source.tensors.items():
        x = tensor.stored()
        is_matrix = name.endswith(MATRIX_ENDINGS) and len(tensor.shape) == 2
        stored[name] = dequantise(x).reshape(tensor.shape) if isinstance(x, Blocks) and not is_matrix else x
    architecture = source.architecture
    if architecture in ("rwkv4", "rwkv5"):
        return stored
    if architecture not in VERSIONS:
        raise CheckpointError(
            f"is a GGUF file of a model called {show(architecture)}; known are rwkv6 and rwkv7 as llama.cpp writes "
            "them, rwkv4 and rwkv5 as `receptance convert` does"
        )
    version = VERSIONS[str(architecture)]
    check_fields(source, str(architecture))
    split_mixes(stored, MIXES[version])
    layers = len({match[1] for name in stored if (match := re.match(r"blk\.(\d+)\.", name))})
    if version == "7":  # llama.cpp wants them in the first layer too, where nothing reads them
        for part in "012":
            stored.pop(f"blk.0.time_mix_v{part}.weight", None)
    official: dict[str, Stored] = {}
    for rule in rules(version, layers):
        if rule.theirs in stored:
            official[rule.official] = moved(source, rule, stored.pop(rule.theirs))
    undo_rescaling(official, source.number("rwkv6.rescale_every_n_layers") if version == "6" else 0)
    return {**official, **stored}  # what no rule knows keeps its name, to be reported by it


MATRIX_ENDINGS = (
    *("token_embd.weight", "output.weight", "emb.weight", "head.weight"),
    *(f"{part}{name}.weight" for part in ("time_mix_", "att.") for name in ("receptance", "key", "value", "gate")),
    *("time_mix_output.weight", "att.output.weight"),
    *(
        f"{part}{name}.weight"
        for part in ("channel_mix_", "ffn.", "ffnPre.")
        for name in ("receptance", "key", "value")
    ),
)


def check_fields(source: GGUFSource, architecture: str) -> None:
    eps = source.number(f"{architecture}.attention.layer_norm_epsilon", NORM_EPS)
    if abs(eps - NORM_EPS) > 1e-9:
        raise CheckpointError(f"its layer norms use an epsilon of {eps:g}; RWKV computes with {NORM_EPS:g}")


def split_mixes(stored: dict[str, Stored], letters: str) -> None:
    for name in [name for name in stored if name.endswith(FUSED)]:
        fused = stored.pop(name)
        if isinstance(fused, Blocks) or fused.size % len(letters):
            raise CheckpointError(f"tensor {show(name)} of shape {list(fused.shape)} holds no {len(letters)} mixes")
        for letter, mix in zip(letters, fused.reshape(len(letters), -1)):
            stored[name.replace(FUSED, f".time_mix_lerp_{letter}.weight")] = mix


def moved(source: GGUFSource, rule: Rule, x: Stored) -> Stored:
    if isinstance(x, Blocks):
        return x
    shape = rule.shape
    if shape is not None and 0 in shape:
        head_size = source.number("rwkv7.wkv.head_size")
        if not 0 < head_size <= x.size or head_size != int(head_size):
            raise CheckpointError(f"the metadata field rwkv7.wkv.head_size is {head_size!r}, expected the head size")
        shape = tuple(int(head_size) if size == 0 else size for size in shape)
    try:
        return Rule(rule.official, rule.theirs, shape, axes=rule.axes).read(x)
    except ValueError:
        raise CheckpointError(f"tensor {show(rule.theirs)} has an unexpected shape {list(x.shape)}") from None


def undo_rescaling(official: dict[str, Stored], every: float) -> None:
    """llama.cpp's converter halves two matrices of each layer for every `every` layers below it, against overflow in
    float16, and its graph halves the residual stream likewise; a power of two comes back exactly."""
    for name, x in official.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(att\.output|ffn\.value)\.weight", name)
        power = int(int(match[1]) // every) if match and every > 0 else 0
        if power and isinstance(x, Blocks):
            official[name] = scaled(x, 2.0**power)
        elif power and not isinstance(x, Blocks):
            official[name] = to_dtype(to_float(x) * np.float32(2**power), name_of(x))


def name_of(x: Plain) -> str:
    return "bfloat16" if x.dtype == np.uint16 else x.dtype.name


def to_dtype(x: NDArray[np.float32], dtype: str) -> Plain:
    """float32 rounded to nearest even; bfloat16 as its bits."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


# Writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Formats of the large matrices; `head` and `emb` None = as the rest. `file_type` is llama.cpp's number for it.

    The embedding is the most sensitive of them all, and one row of it is read for a token: more bits cost size alone.
    """

    matrices: str
    file_type: int
    head: str | None = None
    emb: str | None = None


RECIPES = {
    "float32": Recipe("float32", 0),
    "float16": Recipe("float16", 1),
    "bfloat16": Recipe("bfloat16", 32),
    "q8_0": Recipe("Q8_0", 7),
    "q6_k": Recipe("Q6_K", 18),
    "q5_k": Recipe("Q5_K", 17, head="Q6_K", emb="Q6_K"),
    "q4_k": Recipe("Q4_K", 15, head="Q6_K", emb="Q6_K"),
    "q4_0": Recipe("Q4_0", 2, head="Q6_K", emb="Q6_K"),
    "int8": Recipe("Q8_0", 7),
    "int4": Recipe("Q4_0", 2, head="Q8_0", emb="Q8_0"),
}
NARROWER = {"Q4_K": "Q4_0", "Q5_K": "Q8_0", "Q6_K": "Q8_0"}  # for rows that are no blocks of 256


def recipe_named(name: str) -> Recipe:
    """Raises ConfigError."""
    if name not in RECIPES:
        raise ConfigError(f"type {name!r} is unknown; use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def format_for(name: str, x: Stored, recipe: Recipe | None) -> str:
    """What a tensor with this official name is written in; None = matrices and low-rank maps as they are."""
    own = "float32" if isinstance(x, Blocks) else {"float64": "float32"}.get(name_of(x), name_of(x))
    if LOW_RANK.fullmatch(name):
        # in 16 bits even where the rest has fewer; exact if it came so
        if recipe is None or recipe.matrices == "float32":
            return "float32" if recipe else own
        return "float16" if own == "float32" else own
    if not LARGE.fullmatch(name):
        return "float32"
    if recipe is None:
        return x.format if isinstance(x, Blocks) else own
    wanted = {"head.weight": recipe.head, "emb.weight": recipe.emb}.get(name) or recipe.matrices
    if x.shape[-1] % FORMATS[wanted].elements and wanted in NARROWER:
        wanted = NARROWER[wanted]
    if x.shape[-1] % FORMATS[wanted].elements:
        wanted = "float16" if own == "float32" else own
    return wanted


def chosen_formats(
    weights: Mapping[str, Stored], recipe: Recipe | None, exceptions: Mapping[str, str]
) -> dict[str, str]:
    """{official name: format} of every tensor. exceptions: {pattern of large matrices' names: type}.

    Raises ConfigError for a pattern that fits none.
    """
    chosen = {name: format_for(name, x, recipe) for name, x in weights.items()}
    for pattern, type in exceptions.items():
        fitting = [name for name in weights if LARGE.fullmatch(name) and fnmatchcase(name, pattern)]
        if not fitting:
            raise ConfigError(
                f"no large matrix is called {pattern!r}; they are called blocks.0.att.key.weight and so on"
            )
        only = Recipe(recipe_named(type).matrices, 0)
        chosen |= {name: format_for(name, weights[name], only) for name in fitting}
    return chosen


def quantised(x: Stored, format: str) -> Stored:
    """A matrix as it will come back from the file."""
    y = dequantise(x) if isinstance(x, Blocks) else to_float(x)
    return to_dtype(y, format) if FORMATS[format].is_plain else quantise(y, format)


def save_gguf(
    path: Path,
    weights: Mapping[str, Stored],
    config: NativeConfig,
    recipe: Recipe | None,
    fields: Mapping[str, Value],
    *,
    formats: Mapping[str, str] | None = None,
    progress: Callable[[str, str], None] = lambda name, format: None,
) -> None:
    """Write official tensors as a GGUF file, whole or not at all; nothing of a matrix's size is held beside them.

    recipe: None = in the types that they have. formats: those of `chosen_formats`, if not the recipe's own.
    fields: more metadata, such as the tokenizer's. progress is told each tensor before it is written. Raises
    CheckpointError for what the format has no place for, for numbers that cannot be quantised, and when the file cannot
    be written.
    """
    chosen = formats or chosen_formats(weights, recipe, {})
    version = config.version
    if config.time_state and version in MIX:
        raise CheckpointError(
            "has a tuned initial state (time_state), for which llama.cpp's format has no place; save it as .safetensors"
        )
    if version not in MIX:
        placed = {name: (name, x, Rule(name, name)) for name, x in weights.items()}
    else:
        placed = {
            rule.theirs: (rule.official, weights[rule.official], rule)
            for rule in rules(version, config.n_layer)
            if rule.official in weights
        }
        fill_first_values(placed, version)
    mixes = fused_mixes(placed, version) if version in MIX else {}

    tensors, contents = [], []
    for theirs, (official, x, rule) in placed.items():
        y = x if isinstance(x, Blocks) else rule.write(x)
        tensors.append(NewTensor(theirs, chosen[official], tuple(y.shape)))
        contents.append((official, y))
    for theirs, mix in mixes.items():
        tensors.append(NewTensor(theirs, "float32", mix.shape))
        contents.append((theirs, mix))

    def written() -> Iterator[Iterator[bytes]]:
        for tensor, (official, x) in zip(tensors, contents):
            progress(official, tensor.format)
            yield named(official, in_format(x, tensor.format))

    with replacing(path) as file:
        write_gguf(file, {**model_fields(config, recipe, chosen), **fields}, tensors, written())


def fill_first_values(placed: dict[str, tuple[str, Stored, Rule]], version: str) -> None:
    """llama.cpp wants RWKV-7's v0, v1, v2 in the first layer too, of the sizes of a0, a1, a2; nothing reads them."""
    for part in "012" if version == "7" else "":
        placed[f"blk.0.time_mix_v{part}.weight"] = placed[f"blk.0.time_mix_a{part}.weight"]


def fused_mixes(placed: dict[str, tuple[str, Stored, Rule]], version: str) -> dict[str, Plain]:
    """The static mixes taken out of `placed`, a layer's in one tensor [mixes, 1, 1, C]."""
    fused: dict[str, Plain] = {}
    layer = 0
    while f"blk.{layer}.time_mix_lerp_r.weight" in placed:
        parts = [placed.pop(f"blk.{layer}.time_mix_lerp_{j}.weight")[1] for j in MIXES[version]]
        rows = [to_float(x).reshape(1, 1, -1) for x in parts if not isinstance(x, Blocks)]
        fused[f"blk.{layer}{FUSED}"] = np.stack(rows)
        layer += 1
    return fused


def in_format(x: Stored, format: str) -> Iterator[bytes]:
    """The bytes of a tensor, some rows at a time, made on all cores (NumPy works outside of Python's lock)."""
    if isinstance(x, Blocks) and x.format == format:
        yield np.ascontiguousarray(x.data).tobytes()
        return
    rows = x if isinstance(x, Blocks) else x.reshape(-1, x.shape[-1])

    def piece(ends: tuple[int, int]) -> bytes:
        first, last = ends
        part = rows.rows(first, last).to_float() if isinstance(rows, Blocks) else to_float(rows[first:last])
        return (to_dtype(part, format) if FORMATS[format].is_plain else pack(part, format)).tobytes()

    with ThreadPoolExecutor(available_cores()) as pool:
        yield from pool.map(piece, row_pieces(*rows.shape))


def named(official: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces; an error in making one tells the tensor."""
    try:
        yield from pieces
    except CheckpointError as error:
        raise CheckpointError(f"tensor {official}: {error}") from None


def model_fields(config: NativeConfig, recipe: Recipe | None, formats: Mapping[str, str]) -> dict[str, Value]:
    """What llama.cpp asks of a model of this kind; for versions 4 and 5 the same names, and our version beside them."""
    arch = f"rwkv{config.major}"
    file_type = (
        recipe.file_type if recipe else {"float32": 0, "float16": 1, "bfloat16": 32}.get(formats["head.weight"], 1)
    )
    fields: dict[str, Value] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.file_type": file_type,
        "general.quantization_version": 2,
        f"{arch}.context_length": 1048576,  # llama.cpp's word for: no limit
        f"{arch}.embedding_length": config.n_embd,
        f"{arch}.block_count": config.n_layer,
        f"{arch}.feed_forward_length": config.dim_ffn,
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.attention.head_count": 0,
        f"{arch}.attention.layer_norm_epsilon": NORM_EPS,
    }
    if config.head_size:
        fields[f"{arch}.wkv.head_size"] = config.head_size
    if config.major == 6:
        fields[f"{arch}.rescale_every_n_layers"] = 0
        fields[f"{arch}.time_mix_extra_dim"] = config.mix_rank
        fields[f"{arch}.time_decay_extra_dim"] = config.decay_rank
    elif config.major == 7:
        fields[f"{arch}.attention.decay_lora_rank"] = config.decay_rank
        fields[f"{arch}.attention.iclr_lora_rank"] = config.rate_rank
        fields[f"{arch}.attention.value_residual_mix_lora_rank"] = config.value_rank
        fields[f"{arch}.attention.gate_lora_rank"] = config.gate_rank
    else:
        fields[f"{arch}.attention.width"] = config.dim_att
        fields["receptance.version"] = config.version
    return fields
