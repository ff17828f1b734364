"""Matrices in GGUF's block formats in place, against their definition in NumPy, and that against another."""

import ctypes

import numpy as np
import pytest
import torch
from native_helpers import COMPILED, bfloat16, needs_core, random_model, tokens, version_of, weights_of

from receptance.models import RWKV
from receptance.native import NativeModel, load_core, read_config
from receptance.native.arrays import Array, Weights, aligned, fingerprint
from receptance.native.binding import PACKED_BLOCKS
from receptance.native.blocks import FORMATS, Blocks
from receptance.native.library import TYPES, Matrix

HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}  # where a block has its scales


def random_blocks(format: str, rows: int, cols: int, seed: int = 0) -> Blocks:
    """Any bytes, with scales that make numbers of about one."""
    numbers, size = FORMATS[format]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows * cols // numbers, size), np.uint8)
    for at in HALVES[format]:
        scale = np.float16(
            generator.uniform(-1, 1, (len(data), 1)) / {"Q8_0": 64, "Q4_0": 4, "Q6_K": 2000}.get(format, 400)
        )
        data[:, at : at + 2] = scale.view(np.uint8)
    return Blocks(format, (rows, cols), data)


def is_wide(format: str, engine: str) -> bool:
    """Whether the input has 16 bits: beside 8-bit weights where the processor has no dot products of bytes."""
    return format == "Q8_0" and engine in ("avx2", "portable")


def rounded_input(x: Array, steps: int = 127) -> Array:
    """The input of a product as the core rounds it: blocks of 32 with 8 bits, or 16 (127 * 256 steps)."""
    parts = x.astype(np.float64).reshape(len(x), -1, 32)
    scale = np.abs(parts).max(-1, keepdims=True) / steps
    return (np.rint(parts / np.where(scale > 0, scale, 1)) * scale).reshape(x.shape)


def is_halved(format: str, engine: str, rows: int) -> bool:
    """Whether so many rows of x, and w, are rounded to bfloat16."""
    return engine == "amx" and rows >= (12 if format == "Q6_K" else 32)


def products(engine: str, w: Blocks, x: Array) -> Array:
    """In float64, of the numbers that the core multiplies: x rounded, and with AMX w too, if there are many rows."""
    if is_halved(w.format, engine, len(x)):
        return bfloat16(x).astype(np.float64) @ bfloat16(w.to_float()).astype(np.float64).T
    rounded = rounded_input(x, 127 * 256 if is_wide(w.format, engine) else 127)
    return rounded @ w.to_float().astype(np.float64).T


def assert_products(found: Array, expected: Array, halved: bool, *, edges: int = 0) -> None:
    """edges: rows with an input at the edge between two steps, where float32 rounds to the other side.

    halved: a weight may lie there too (halfway between two numbers of 8 bits): then one output of all rows is off.
    """
    wrong = np.abs(found - expected) > 2e-5 * np.abs(expected).max()
    if halved:
        assert np.count_nonzero(wrong.any(0)) <= max(1, wrong.shape[1] // 50)
        assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    else:
        assert np.count_nonzero(wrong.any(1)) <= edges


def multiply(engine: str, w: Blocks, x: Array, threads: int = 1, *, packed: bool = False) -> Array:
    core = load_core(engine)
    matrix = Matrix(*w.shape, w.data.ctypes.data, TYPES[w.format])
    y = np.full((len(x), w.shape[0]), np.nan, np.float32)
    team = core.library.receptance_team_new(threads)
    if packed:
        size = w.shape[0] // 16 * (w.shape[1] // FORMATS[w.format][0]) * PACKED_BLOCKS[w.format]
        memory, kind = aligned(size + 64), TYPES[f"packed {w.format}"]
        memory[:] = 0x5A
        core.library.receptance_pack(core.engine, team, ctypes.byref(matrix), memory.ctypes.data, kind)
        assert (memory[size:] == 0x5A).all()
        matrix = Matrix(*w.shape, memory.ctypes.data, kind)
    scratch = aligned(core.library.receptance_multiply_bytes(core.engine, matrix, len(x), threads))
    core.library.receptance_multiply(
        core.engine, team, ctypes.byref(matrix), x.ctypes.data, len(x), y.ctypes.data, scratch.ctypes.data
    )
    core.library.receptance_team_free(team)
    return y


@pytest.mark.parametrize("format", FORMATS)
def test_the_definition_is_that_of_the_package_gguf(format):
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(format, 6, 768)
    expected = gguf.quants.dequantize(blocks.data.reshape(6, -1), getattr(gguf.GGMLQuantizationType, format))
    assert np.array_equal(blocks.to_float(), expected)


def test_a_block_by_hand():
    """One number of each kind that the bit fields could confuse, worked out on paper."""
    data = np.zeros(144, np.uint8)
    data[0:2] = np.float16(0.5).reshape(1).view(np.uint8)
    data[2:4] = np.float16(2).reshape(1).view(np.uint8)
    data[4 + 5 - 4] = 0b10_000000  # sub-block 5: its scale's upper bits lie in the byte of sub-block 1
    data[8 + 5] = 0b0000_0011  # and the lower four here: 0b100011 = 35
    data[8 + 5] |= 0b0001_0000  # its minimum's lower four: 1
    data[16 + 2 * 32 + 7] = 0b1001_0000  # number 7 of sub-block 5 is 9
    found = Blocks("Q4_K", (1, 256), data).to_float()[0]
    assert found[5 * 32 + 7] == 0.5 * 35 * 9 - 2 * 1
    assert found[5 * 32] == -2
    assert np.count_nonzero(found) == 32


@needs_core
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_widen_to_the_definition(format, engine):
    blocks, core = random_blocks(format, 5, 768), load_core(engine)
    matrix = Matrix(*blocks.shape, blocks.data.ctypes.data, TYPES[format])
    found = np.empty((3, 768), np.float32)
    core.library.receptance_widen(core.engine, ctypes.byref(matrix), 1, 4, found.ctypes.data)
    # a multiplication and a subtraction may be one instruction, with one rounding less
    assert np.abs(found - blocks.to_float()[1:4]).max() <= 1e-6


@needs_core
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize(
    "rows, tokens", [(1, 1), (7, 1), (70, 1), (70, 2), (70, 9), (64, 5), (64, 16), (64, 50), (33, 130)]
)
@pytest.mark.parametrize("format", FORMATS)
def test_products_are_those_of_the_definition(format, rows, tokens, engine):
    blocks = random_blocks(format, rows, 768)
    generator = np.random.default_rng(1)
    x = (generator.standard_normal((tokens, 768)) * generator.uniform(0.01, 5, 768)).astype(np.float32)
    x[0, 32:64] = 0  # a block without a scale
    expected = products(engine, blocks, x)
    for threads in (1, 3):
        assert_products(multiply(engine, blocks, x, threads), expected, is_halved(format, engine, tokens))


@needs_core
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("rows, cols", [(16, 256), (80, 768), (144, 512)])
@pytest.mark.parametrize("format", FORMATS)
def test_packed_blocks_give_the_same_products(format, rows, cols, engine):
    """Any number of tokens: tiles of 4, 2 and 1, and of 8 where there are more registers."""
    blocks = random_blocks(format, rows, cols)
    generator = np.random.default_rng(1)
    x = (generator.standard_normal((135, cols)) * generator.uniform(0.01, 5, cols)).astype(np.float32)
    x[0, 32:64] = 0
    x[1] = np.abs(x[1])  # sums of inputs that are far from zero
    for count in (1, 2, 3, 7, 12, 31, 135):
        found = multiply(engine, blocks, x[:count], 3 if count > 2 else 1, packed=True)
        expected = products(engine, blocks, x[:count])
        assert_products(found, expected, is_halved(format, engine, count), edges=count // 100)


@needs_core
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("format", FORMATS)
def test_sums_of_extreme_numbers_do_not_overflow(format, engine):
    """All bits of the weights set or none, and inputs of one size: the largest and least sums that there are."""
    for bits in (0xFF, 0x00, 0x7F, 0x80):
        blocks = random_blocks(format, 16, 256)
        blocks.data[:] = bits
        for at in HALVES[format]:
            blocks.data[:, at : at + 2] = np.float16(2**-10).reshape(1).view(np.uint8)
        x = np.ones((40, 256), np.float32)
        x[1], x[2, ::2], x[3, 16:] = -1, -1, -1
        exact = x.astype(np.float64) @ blocks.to_float().astype(np.float64).T
        size = np.abs(x.astype(np.float64)) @ np.abs(blocks.to_float().astype(np.float64)).T + 1e-6
        for packed in (False, True):
            for rows in (1, 6, 9, 16, 40):
                halved = is_halved(format, engine, rows)
                expected = products(engine, blocks, x) if halved else exact  # all inputs are exact
                found = multiply(engine, blocks, x[:rows], packed=packed)
                assert (np.abs(found - expected[:rows]) <= 1e-5 * size[:rows]).all()


@needs_core
@pytest.mark.parametrize("format", FORMATS)
def test_rows_may_lie_anywhere(format, tmp_path):
    """In a mapped file, at an odd address, up to its very last byte."""
    blocks = random_blocks(format, 9, 256)
    (tmp_path / "file").write_bytes(b"odd" + blocks.data.tobytes())
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")[3:]
    x = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    expected = multiply("", blocks, x)
    assert np.array_equal(multiply("", Blocks(format, (9, 256), mapped), x), expected)


def test_what_is_no_matrix_of_blocks_is_refused():
    data = np.zeros(144 * 3, np.uint8)
    for arguments, words in (
        (("Q3_K", (3, 256), data), "Q3_K.*not one of"),
        (("Q4_K", (3, 128), data), "rows of 128"),
        (("Q4_K", (4, 256), data), "576.*found 432"),
        (("Q4_K", (3, 256), data.view(np.int8)), "found 432 of int8"),
    ):
        with pytest.raises(ValueError, match=words):
            Blocks(*arguments)


# Whole models ---------------------------------------------------------------------------------------------------------

SIZES = {"n_layer": 2, "n_embd": 256, "head_size": 64, "dim_ffn": 512, "vocab_size": 300}


def to_blocks(weights: Weights, formats: list[str]) -> Weights:
    """The large matrices with random numbers in blocks; formats in turn."""
    replaced = dict(weights)
    large = [name for name, x in weights.items() if name.endswith(".weight") and len(x.shape) == 2]
    for i, name in enumerate(large):
        blocks = random_blocks(formats[i % len(formats)], *weights[name].shape, seed=i)
        data = blocks.data.copy()
        size = 0.05 * (4 if name == "head.weight" else 1) / np.sqrt(np.mean(blocks.to_float() ** 2))
        for at in HALVES[blocks.format]:
            scaled = data[:, at : at + 2].copy().view(np.float16).astype(np.float32) * size
            data[:, at : at + 2] = scaled.astype(np.float16).view(np.uint8)
        replaced[name] = Blocks(blocks.format, blocks.shape, data)
    return replaced


@needs_core
@pytest.mark.parametrize("engine", [*COMPILED, "numpy"])
@pytest.mark.parametrize("formats", [["Q8_0"], ["Q4_K", "Q6_K", "Q5_K", "Q4_0", "Q8_0"]])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("repack", [True, False])
def test_a_model_of_blocks_is_the_model_of_their_numbers(repack, version, formats, engine):
    sizes = {name: x for name, x in SIZES.items() if version != "4" or name != "head_size"}
    model = random_model(version, **sizes, **({"dim_att": 256} if version == "4" else {}))
    weights = to_blocks(weights_of(model), formats)
    plain = {name: torch.from_numpy(x.to_float()) for name, x in weights.items() if isinstance(x, Blocks)}
    model.load_state_dict(plain, strict=False)
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    fast = NativeModel(
        weights, read_config(version_of(model), shapes), "", engine_name=engine, threads=2, repack=repack
    )
    ids = tokens(40, 300)
    state, by_token = None, []
    for token in ids:
        logits, state = fast.forward([token], state)
        by_token.append(logits[0])
    for found, many in ((fast.forward(ids)[0], True), (np.stack(by_token), False)):
        sums_units = () if many or not repack else ("Q8_0", "Q4_0")
        expected = logits_of_rounded_inputs(model, weights, ids, engine, sums_units, many=many)
        # root mean square: an activation at the edge between two of its 255 steps may fall to either side
        assert np.sqrt(np.mean((found - expected) ** 2)) <= 0.01 * np.sqrt(np.mean(expected**2))


def logits_of_rounded_inputs(
    model: RWKV, weights: Weights, ids: list[int], engine: str, sums_units: tuple[str, ...], *, many: bool
) -> Array:
    """With the torch model, whose inputs of products are rounded as `engine` does; NumPy rounds nothing.

    many: tokens at once, of which AMX rounds the weights too.
    sums_units: formats of a channel mix's value matrix whose sum over hidden units takes them in float32.
    """
    hooks, exact = [], {name: x.clone() for name, x in model.state_dict().items()}
    by_halves = engine == "amx" and many
    for name, module in model.named_modules():
        blocks = weights.get(f"{name}.weight")
        if isinstance(blocks, Blocks) and engine != "numpy" and isinstance(module, torch.nn.Linear):
            if name.endswith("ffn.value") and blocks.format in sums_units:
                continue
            steps = 127 * 256 if is_wide(blocks.format, engine) else 127
            if by_halves:
                module.weight.data = torch.from_numpy(bfloat16(module.weight.detach().numpy()))

            def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor], steps: int = steps) -> torch.Tensor:
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).numpy()
                return (
                    torch.from_numpy(bfloat16(x) if by_halves else rounded_input(x, steps))
                    .float()
                    .reshape(inputs[0].shape)
                )

            hooks.append(module.register_forward_pre_hook(rounded))
    with torch.no_grad():
        logits = model.forward(ids)[0].numpy()
    for hook in hooks:
        hook.remove()
    model.load_state_dict(exact)
    return logits  # type: ignore[no-any-return]


@needs_core
def test_blocks_can_be_repacked():
    model = random_model("7", **SIZES)
    weights = to_blocks(weights_of(model), ["Q8_0"])
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    config = read_config("7", shapes)
    in_place, repacked = (NativeModel(weights, config, "", dtype=dtype) for dtype in (None, "int8"))
    assert in_place.dtype == "Q8_0"
    expected = in_place.forward(tokens(20, 300))[0]
    found = repacked.forward(tokens(20, 300))[0]
    assert np.sqrt(np.mean((found - expected) ** 2)) <= 0.05 * np.sqrt(np.mean(expected**2))


def test_the_fingerprint_of_blocks_is_that_of_their_numbers():
    weights = to_blocks(weights_of(random_model("7", **SIZES)), ["Q4_K"])
    plain = {name: x.to_float() if isinstance(x, Blocks) else x for name, x in weights.items()}
    assert fingerprint("7", weights) == fingerprint("7", plain)


@needs_core
def test_heads_that_are_no_whole_blocks_take_their_output_as_float32():
    model = random_model("7", **{**SIZES, "n_embd": 192, "head_size": 48})
    weights = {**weights_of(model), "blocks.1.att.output.weight": random_blocks("Q8_0", 192, 192)}
    plain = {name: x.to_float() if isinstance(x, Blocks) else x for name, x in weights.items()}
    config = read_config("7", {name: tuple(x.shape) for name, x in weights.items()})
    found, expected = (NativeModel(w, config, "").forward(tokens(9, 300))[0] for w in (weights, plain))
    assert np.array_equal(found, expected)
