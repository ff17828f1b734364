"""RWKV in GGUF files: every version, in both engines, exactly where the format allows; llama.cpp's peculiarities."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_helpers import CONFIGS, assert_same, changed, tiny_model

from receptance.checkpoint import load, open_checkpoint, save
from receptance.checkpoint.gguf import RECIPES, Rule, chosen_formats, recipe_named, rules, save_gguf, to_dtype
from receptance.checkpoint.load import verified_weights
from receptance.errors import CheckpointError, ConfigError
from receptance.gguf.formats import BLOCK_FORMATS
from receptance.gguf.quantise import quantise
from receptance.models import RWKV
from receptance.native import read_config
from receptance.native.blocks import Blocks

every_version = pytest.mark.parametrize("version", CONFIGS)


def wide_model(version: str, dtype: torch.dtype = torch.bfloat16, scale: float = 0.2) -> RWKV:
    """Rows of 256, so that every block format fits."""
    sizes = {"vocab_size": 23, "n_embd": 256, "dim_ffn": 512} | (
        {"dim_att": 256} if version == "4" else {"head_size": 64}
    )
    model = tiny_model(version, dtype, changed(version, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.eval()


def written(model: RWKV, path: Path, type: str | None) -> Path:
    save(model, path.with_suffix(".safetensors"))
    weights, config = verified_weights(open_checkpoint(path.with_suffix(".safetensors")))
    save_gguf(path, weights, config, recipe_named(type) if type else None, {"tokenizer.ggml.model": "none"})
    return path


@every_version
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float_file_is_exact(version, dtype, tmp_path):
    model = tiny_model(version, dtype)
    save(model, tmp_path / "m.gguf")
    found = load(tmp_path / "m.gguf")
    assert type(found) is type(model)
    expected = {name: x for name, x in model.state_dict().items() if not name.startswith("blocks.0.att.v")}
    expected |= {name: x for name, x in model.state_dict().items() if name == "blocks.0.att.value.weight"}
    # norms, mixes and decays are float32 there, and a model takes the type that holds all exactly
    assert_same(found.state_dict(), {name: x.float() for name, x in expected.items()})
    assert found.fingerprint == model.fingerprint
    assert load(tmp_path / "m.gguf", engine="native").fingerprint == model.fingerprint


@every_version
@pytest.mark.parametrize("type", [type for type in RECIPES if type in ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "int4")])
def test_both_engines_run_the_numbers_that_the_file_holds(version, type, tmp_path):
    path = written(wide_model(version), tmp_path / "m.gguf", type)
    tokens = list(range(20))
    torch_model, native = load(path, engine="torch"), load(path, engine="native", threads=1)
    assert native.fingerprint == torch_model.fingerprint
    with torch.no_grad():
        expected = torch_model.forward(tokens)[0].numpy()
    plain = native.forward(tokens)[0]
    # the native engine rounds the inputs of quantised products to 8 bits
    assert np.linalg.norm(plain - expected) <= 0.05 * np.linalg.norm(expected)
    stored = set(open_checkpoint(path).dtypes.values())
    assert stored & set(BLOCK_FORMATS)
    assert stored <= {"float32", "bfloat16", *BLOCK_FORMATS}


def test_the_numpy_engine_reads_blocks_too(tmp_path):
    from receptance.native import NativeModel

    path = written(wide_model("7"), tmp_path / "m.gguf", "q4_k")
    weights, config = verified_weights(open_checkpoint(path))
    model = NativeModel(weights, config, "", engine_name="numpy")
    with torch.no_grad():
        expected = load(path, engine="torch").forward([1, 2, 3])[0].numpy()
    assert np.abs(model.forward([1, 2, 3])[0] - expected).max() <= 1e-4 * np.abs(expected).max()


@every_version
def test_a_state_goes_from_one_engine_to_the_other(version, tmp_path):
    path = written(wide_model(version), tmp_path / "m.gguf", "q8_0")
    torch_model, native = load(path, engine="torch"), load(path, engine="native")
    _, state = native.forward([1, 2, 3])
    state.save(tmp_path / "s.state", native)
    with torch.no_grad():
        logits, _ = torch_model.forward([4, 5], torch_model.load_state(tmp_path / "s.state"))
    assert np.linalg.norm(native.forward([4, 5], state)[0] - logits.numpy()) <= 0.05 * np.linalg.norm(logits.numpy())


@every_version
def test_reading_a_header_leaves_the_weights_alone(version, tmp_path):
    path = written(wide_model(version), tmp_path / "m.gguf", "q4_0")
    content = path.read_bytes()
    model = load(path, engine="torch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == content


def test_a_file_with_the_whole_vocabulary_is_ready_in_milliseconds(tmp_path):
    save(tiny_model("7"), tmp_path / "m.safetensors")
    weights, config = verified_weights(open_checkpoint(tmp_path / "m.safetensors"))
    words = {"tokenizer.ggml.tokens": [b"token %d" % i for i in range(65536)]}
    save_gguf(tmp_path / "m.gguf", weights, config, None, words)
    times = []
    for _ in range(5):
        start = time.process_time()
        open_checkpoint(tmp_path / "m.gguf")
        times.append(time.process_time() - start)
    assert min(times) < 0.05  # 10 ms on an idle core


def test_small_rows_get_smaller_blocks():
    weights = {
        "emb.weight": np.zeros((4, 96), np.float32),
        "blocks.0.ffn.key.weight": np.zeros((4, 40), np.float32),
        "blocks.0.ffn.value.weight": np.zeros((4, 512), np.uint16),
        "blocks.0.att.w1": np.zeros((4, 96), np.float32),
        "blocks.0.att.w2": np.zeros((4, 96), np.uint16),
        "blocks.0.ln1.weight": np.zeros(96, np.uint16),
        "head.weight": np.zeros((4, 512), np.float32),
    }
    assert list(chosen_formats(weights, recipe_named("q4_k"), {}).values()) == [
        *("Q8_0", "float16", "Q4_K", "float16", "bfloat16", "float32", "Q6_K")
    ]
    assert list(chosen_formats(weights, None, {}).values()) == [
        *("float32", "float32", "bfloat16", "float32", "bfloat16", "float32", "float32")
    ]
    exceptions = {"blocks.*.ffn.*": "float16", "head.weight": "q8_0"}
    chosen = chosen_formats(weights, recipe_named("q4_k"), exceptions)
    assert [chosen[name] for name in ("blocks.0.ffn.value.weight", "head.weight", "emb.weight")] == [
        *("float16", "Q8_0", "Q8_0")
    ]
    with pytest.raises(ConfigError, match="no large matrix is called"):
        chosen_formats(weights, None, {"blocks.0.att.w1": "q8_0"})
    with pytest.raises(ConfigError, match="type 'q3_k' is unknown"):
        recipe_named("q3_k")


def test_rounding_to_bfloat16_is_that_of_torch():
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    x = np.concatenate([x, np.float32([0, -0.0, 1e-40, np.inf, 3.4e38, 1.00390625, 1.01171875])])
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_dtype(x, "bfloat16"), expected)


# What llama.cpp's files are like -------------------------------------------------------------------------------------


def fields_changed(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def uint32(name: bytes, value: int) -> bytes:
    return name + struct.pack("<II", 4, value)


@pytest.mark.parametrize("type", [None, "float32", "float16", "q8_0", "q4_k", "q6_k"])
def test_rescaled_layers_come_back(type, tmp_path):
    """llama.cpp's converter halves two matrices of every later layer and says so in the metadata."""
    model = wide_model("6", scale=4)  # no float16 scale so small that it has fewer digits
    expected = load(written(model, tmp_path / "plain.gguf", type)).state_dict()
    halved = dict(model.state_dict())
    for name in ("att.output", "ffn.value"):
        halved[f"blocks.1.{name}.weight"] = halved[f"blocks.1.{name}.weight"] / 2
    save(halved, tmp_path / "h.safetensors")
    weights, config = verified_weights(open_checkpoint(tmp_path / "h.safetensors"))
    path = tmp_path / "halved.gguf"
    save_gguf(path, weights, config, recipe_named(type) if type else None, {})
    fields_changed(path, uint32(b"rescale_every_n_layers", 0), uint32(b"rescale_every_n_layers", 1))
    found = load(path).state_dict()
    if type == "float16":  # numbers below 6e-5 have fewer digits there
        output = found.pop("blocks.1.att.output.weight"), expected.pop("blocks.1.att.output.weight")
        value = found.pop("blocks.1.ffn.value.weight"), expected.pop("blocks.1.ffn.value.weight")
        for one, two in (output, value):
            assert torch.allclose(one, two, rtol=0, atol=1e-7)
    assert_same(found, expected)


def test_mixes_may_be_apart_and_vectors_have_axes_of_one(tmp_path, monkeypatch):
    """Older files of RWKV-6 have a tensor for each static mix."""
    import receptance.checkpoint.gguf as module

    model = tiny_model("6")
    monkeypatch.setattr(module, "fused_mixes", lambda placed, version: {})
    monkeypatch.setattr(Rule, "write", apart(Rule.write))
    save(model, tmp_path / "m.gguf")
    names = open_checkpoint(tmp_path / "m.gguf").shapes
    assert names["blk.0.time_mix_lerp_w.weight"] == names["blk.1.channel_mix_lerp_r.weight"] == (1, 1, 8)
    assert_same(load(tmp_path / "m.gguf").state_dict(), {n: x.float() for n, x in model.state_dict().items()})


def apart(write: Callable[[Rule, np.ndarray], np.ndarray]) -> Callable[[Rule, np.ndarray], np.ndarray]:
    return lambda rule, x: x.reshape(1, 1, -1) if "lerp" in rule.theirs else write(rule, x)


def test_small_tensors_in_blocks_are_read(tmp_path):
    """llama.cpp's converter puts RWKV-7's low-rank maps into Q8_0."""
    model = wide_model("7", torch.float32)
    weights, config = arrays_of(model)
    recipe = recipe_named("q8_0")
    formats = chosen_formats(weights, recipe, {}) | {"blocks.1.att.a1": "Q8_0", "blocks.0.att.k_k": "Q8_0"}
    save_gguf(tmp_path / "m.gguf", weights, config, recipe, {}, formats=formats)
    found, _ = verified_weights(open_checkpoint(tmp_path / "m.gguf"))
    transposed = quantise(np.ascontiguousarray(weights["blocks.1.att.a1"].T), "Q8_0").to_float().T
    assert np.array_equal(found["blocks.1.att.a1"], transposed)
    assert found["blocks.0.att.k_k"].shape == (1, 1, 256)
    assert isinstance(found["head.weight"], Blocks)
    load(tmp_path / "m.gguf", engine="native").forward([1, 2])


def arrays_of(model: RWKV) -> tuple[dict[str, np.ndarray], object]:
    weights = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    return weights, read_config(str(model.config.version), {name: x.shape for name, x in weights.items()})


@pytest.mark.parametrize("version", ["6", "7"])
def test_every_tensor_has_the_name_and_shape_that_llama_cpp_expects(version, tmp_path):
    """As in its src/models/rwkv6.cpp and rwkv7.cpp, innermost size last."""
    save(tiny_model(version), tmp_path / "m.gguf")
    shapes = open_checkpoint(tmp_path / "m.gguf").shapes
    c, f, layer = 8, 20, "blk.1."
    expected = {"token_embd.weight": (11, c), "output.weight": (11, c), f"{layer}channel_mix_key.weight": (f, c)}
    expected |= {f"{layer}channel_mix_value.weight": (c, f), f"{layer}attn_norm_2.bias": (c,)}
    if version == "6":
        expected |= {f"{layer}time_mix_w1.weight": (15, c), f"{layer}time_mix_w2.weight": (5, c, 3)}
        expected |= {f"{layer}time_mix_decay_w1.weight": (5, c), f"{layer}time_mix_decay_w2.weight": (c, 5)}
        expected |= {f"{layer}time_mix_lerp_fused.weight": (5, 1, 1, c), f"{layer}time_mix_first.weight": (2, 4)}
    else:
        expected |= {f"{layer}time_mix_v1.weight": (2, c), "blk.0.time_mix_v1.weight": (5, c)}
        expected |= {f"{layer}time_mix_lerp_fused.weight": (6, 1, 1, c), f"{layer}time_mix_r_k.weight": (c,)}
    assert {name: shapes.get(name) for name in expected} == expected
    assert not [name for name in shapes if name.startswith("blocks.")]
    assert len({rule.theirs for rule in rules(version, 2)}) == len(rules(version, 2))


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"\x05\0\0\0\0\0\0\0rwkv7", b"\x05\0\0\0\0\0\0\0llama", "a model called 'llama'"),
        (b"\x05\0\0\0\0\0\0\0rwkv7", b"\x05\0\0\0\0\0\0\0rwkv6", "holds no 5 mixes"),
        (uint32(b"wkv.head_size", 4), uint32(b"wkv.head_size", 3), "unexpected shape"),
        (uint32(b"wkv.head_size", 4), uint32(b"wkv.head_size", 0), "expected the head size"),
        (uint32(b"wkv.head_size", 4), uint32(b"wkv.head_sizf", 4), "rwkv7.wkv.head_size is missing"),
        (struct.pack("<If", 6, 1e-5), struct.pack("<If", 6, 1e-6), "epsilon of 1e-06"),
        (struct.pack("<If", 6, 1e-5), struct.pack("<If", 6, float("nan")), "expected a number"),
        (b"blk.1.time_mix_a1.", b"blk.1.time_mix_b1.", "a1: missing"),
        (b"blk.1.attn_norm.w", b"blk.9.attn_norm.w", "missing"),
    ],
)
def test_another_model_is_refused(old, new, problem, tmp_path):
    save(tiny_model("7"), tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    assert old in content
    (tmp_path / "m.gguf").write_bytes(content.replace(old, new, 1))
    for engine in ("torch", "native"):
        with pytest.raises(CheckpointError, match=problem):
            load(tmp_path / "m.gguf", engine=engine)


def test_a_tuned_state_is_refused_where_llama_cpp_has_no_place(tmp_path):
    for version in ("5.2", "6", "7"):
        model = tiny_model(version, config=changed(version, time_state=True))
        if version == "5.2":
            save(model, tmp_path / "m.gguf")
            assert "blocks.1.att.time_state" in load(tmp_path / "m.gguf").state_dict()
        else:
            with pytest.raises(CheckpointError, match="time_state"):
                save(model, tmp_path / "m.gguf")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    save(tiny_model("7"), tmp_path / "m.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    weights, config = arrays_of(wide_model("7", torch.float32))
    weights["blocks.1.ffn.value.weight"][3, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.value\.weight: the number nan cannot be quantised"):
        save_gguf(tmp_path / "m.gguf", weights, config, recipe_named("q4_k"), {})
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
