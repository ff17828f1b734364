"""Foreign, experimental, incomplete and inconsistent checkpoints are named for what they are."""

import pytest
import torch
from checkpoint_helpers import CONFIGS, tiny_model, tiny_weights

from receptance.checkpoint import detect, load, save
from receptance.errors import CheckpointError


def shapes_of(version: str = "7") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tiny_model(version).state_dict().items()}


@pytest.mark.parametrize("version", CONFIGS)
def test_version_and_config_are_read_from_shapes(version):
    assert detect(shapes_of(version)) == (version, CONFIGS[version])


@pytest.mark.parametrize("version", CONFIGS)
def test_any_missing_unexpected_or_misshapen_tensor_is_named(version):
    for name in shapes_of(version):
        shapes = shapes_of(version)
        shape = shapes.pop(name)
        with pytest.raises(CheckpointError) as missing:
            detect(shapes)
        shapes[name] = (*shape[:-1], shape[-1] + 1)
        with pytest.raises(CheckpointError) as misshapen:
            detect(shapes)
        # a tensor by which versions or sizes are told apart may be reported through the others
        if name.startswith("blocks.1.") and not name.endswith((".r_k", ".v1")):
            assert f"tensor {name}: missing, expected {list(shape)}" in str(missing.value)
            assert f"tensor {name}: found {list(shapes[name])}, expected {list(shape)}" in str(misshapen.value)
    with pytest.raises(CheckpointError, match=r"tensor 'blocks\.0\.att\.extra': found \[3\], unknown"):
        detect({**shapes_of(version), "blocks.0.att.extra": (3,)})


def test_only_the_first_differences_are_listed():
    shapes = {name: (*shape, 1) if "ln" in name else shape for name, shape in shapes_of().items()}
    with pytest.raises(CheckpointError, match="and 11 more") as error:
        detect(shapes)
    assert len(str(error.value).splitlines()) == 7


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.0.ffn.s_emb.weight"], "v7a"),
        (["blocks.0.qkv.qq.weight"], "v7b"),
        (["blocks.0.ffn.enn.weight"], "v8"),
        (["blocks.0.att.gate_w1"], r"6\.0a"),
        (["blocks.0.att.time_maa_rkvw_w1"], r"6\.0b/c"),
        (["head_q.weight", "head_k.weight"], "head-QK"),
        (["copy_mask"], "head-QK"),
        (["blocks.0.tiny_q.weight"], "tiny attention"),
        (["blocks.0.pos_emb_x"], "position"),
        (["blocks.0.att.key.lora_A"], "merge it"),
    ],
)
def test_experiments_are_named(names, message):
    with pytest.raises(CheckpointError, match=message):
        detect({**shapes_of(), **dict.fromkeys(names, (3,))})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer.h.0.attn.c_attn.weight", "GPT-2"),
        ("model.layers.0.self_attn.q_proj.weight", "LLaMA"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "NeoX"),
        ("backbone.layers.0.mixer.A_log", "Mamba"),
        ("bert.encoder.layer.0.attention.self.query.weight", "BERT"),
        ("model.layers.0.self_attn.r_k", "hybrid"),
        ("conv1.weight", r"no RWKV checkpoint.*'conv1.weight'"),
        ("blocks.0.att.time_state", "tuned state"),
    ],
)
def test_foreign_checkpoints_are_named(name, message, tmp_path):
    torch.save({name: torch.zeros(4, 4)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path / "foreign.pth")
    assert str(tmp_path / "foreign.pth") in str(error.value)


def test_missing_layers_and_mixed_versions():
    shapes = shapes_of()
    with pytest.raises(CheckpointError, match=r"blocks\.1 is missing although blocks\.2 is there"):
        detect({name.replace("blocks.1.", "blocks.2."): shape for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match="without a layer number"):
        detect({**shapes, "blocks.x.ln1.weight": (8,)})
    with pytest.raises(CheckpointError, match="unknown to RWKV-7"):
        detect(shapes | {name: shape for name, shape in shapes_of("6").items() if "maa" in name})
    with pytest.raises(CheckpointError, match=r"tensor blocks\.0\.att\.key\.weight"):
        detect({"emb.weight": (11, 8), "blocks.0.ln1.weight": (8,)})


@pytest.mark.parametrize("size", [0, -1, 3, 2**40, 2**62, 2**70])
@pytest.mark.parametrize("version", CONFIGS)
def test_absurd_sizes_build_nothing(version, size):
    shapes = shapes_of(version)
    for name in ("emb.weight", "blocks.0.att.key.weight", "blocks.0.ffn.key.weight", "blocks.1.att.time_decay"):
        if name in shapes:
            with pytest.raises(CheckpointError):
                detect({**shapes, name: (size, *shapes[name][1:])})
    with pytest.raises(CheckpointError):
        detect({name: (size,) * len(shape) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError):
        detect(dict.fromkeys(shapes, ()))


def test_absurd_numbers_of_layers_and_tensors_build_nothing():
    with pytest.raises(CheckpointError, match="layers, more than"):
        detect({**shapes_of(), **{f"blocks.{i}.ln1.weight": (8,) for i in range(2, 5000)}})
    with pytest.raises(CheckpointError, match="tensors, more than"):
        detect({f"blocks.{i}.ln1.weight": (8,) for i in range(60_000)})


def test_head_size_must_divide_the_width():
    shapes = shapes_of()
    shapes |= {"blocks.0.att.r_k": (2, 3), "blocks.1.att.r_k": (2, 3)}
    with pytest.raises(CheckpointError, match="head size of 3 does not divide the width 8"):
        detect(shapes)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_integer_tensors_are_refused(name, tmp_path):
    from safetensors.torch import save_file

    weights = tiny_weights()
    weights["blocks.1.att.w0"] = weights["blocks.1.att.w0"].to(torch.int32)
    (torch.save if name.endswith("pth") else save_file)(weights, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.att\.w0' is int32, expected one of float64"):
        load(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"int32"):
        save(weights, tmp_path / "again.pth")
