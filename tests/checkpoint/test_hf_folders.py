"""Folders in Hugging Face layouts: ours read by others, others' read by us, and what is refused."""

import json

import pytest
import torch
from checkpoint_helpers import assert_same, changed, tiny_model
from safetensors.torch import load_file, save_file

from receptance.checkpoint import load, save
from receptance.errors import CheckpointError


def test_transformers_loads_our_rwkv4_strictly_and_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")

    # its op mixes batches up and ignores dim_att != n_embd; eight layers exercise its rescaling
    model = tiny_model("4", torch.float32, changed("4", dim_att=8, n_layer=8))
    save(model, tmp_path, format="hf")
    theirs, info = transformers.RwkvForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([[1, 2, 3, 4]])).logits[0]
        torch.testing.assert_close(model([1, 2, 3, 4])[0], expected, rtol=1e-4, atol=1e-4)


def test_we_load_what_transformers_saves(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, intermediate_size=20)
    theirs = transformers.RwkvForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor([[1, 2, 3]])).logits[0]
        torch.testing.assert_close(load(tmp_path)([1, 2, 3])[0], expected, rtol=1e-4, atol=1e-4)


def test_fla_rwkv6_tensors_are_what_its_converter_makes(tmp_path):
    model = tiny_model("6")
    save(model, tmp_path, format="hf")
    theirs = load_file(tmp_path / "model.safetensors")
    ours = model.state_dict()
    att, attn = "blocks.1.att.", "model.layers.1.attn."
    # the low-rank mixes: five parts w k v r g here, r w k v g there, transposed
    w, k, v, r, g = ours[att + "time_maa_w1"].view(8, 5, 3).unbind(1)
    assert torch.equal(theirs[attn + "x_proj.0.linear.weight"], torch.cat([r, w, k, v, g], 1).t())
    w, k, v, r, g = ours[att + "time_maa_w2"].unbind(0)
    assert torch.equal(theirs[attn + "x_proj.2.weight"], torch.cat([r, w, k, v, g], 0).t())
    static = [ours[f"{att}time_maa_{letter}"].view(-1) for letter in "rwkvg"]
    assert torch.equal(theirs[attn + "x_bias"], torch.stack(static))
    assert torch.equal(theirs[attn + "x_proj.0.mu"], ours[att + "time_maa_x"].view(-1))
    assert torch.equal(theirs[attn + "w_proj.linear.lora.0.weight"], ours[att + "time_decay_w1"].t())
    assert torch.equal(theirs[attn + "w_proj.linear.lora.2.weight"], ours[att + "time_decay_w2"].t())
    assert torch.equal(theirs[attn + "w_proj.linear.lora.2.bias"], ours[att + "time_decay"].view(-1))
    assert torch.equal(theirs[attn + "bonus"], ours[att + "time_faaaa"])
    assert torch.equal(theirs["model.layers.1.ffn.receptance.mu"], ours["blocks.1.ffn.time_maa_r"].view(-1))
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {"model_type": "rwkv6", "num_heads": 2, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5, "expand_k": 1.0}
    assert {key: config[key] for key in expected} == expected


def test_fla_rwkv7_tensors_are_what_its_converter_makes(tmp_path):
    model = tiny_model("7")
    save(model, tmp_path, format="hf")
    theirs = load_file(tmp_path / "model.safetensors")
    ours = model.state_dict()
    att, attn = "blocks.1.att.", "model.layers.1.attn."
    for letter in "wav":
        assert torch.equal(theirs[f"{attn}{letter}_lora.lora.0.weight"], ours[f"{att}{letter}1"].t())
        assert torch.equal(theirs[f"{attn}{letter}_lora.lora.2.weight"], ours[f"{att}{letter}2"].t())
        assert torch.equal(theirs[f"{attn}{letter}_lora.lora.2.bias"], ours[f"{att}{letter}0"].view(-1))
    assert f"{attn}g_lora.lora.2.bias" not in theirs
    assert theirs[attn + "x_r"].shape == (1, 1, 8)
    assert theirs[attn + "k_k"].shape == (8,)
    assert torch.equal(theirs["model.layers.0.pre_norm.bias"], ours["blocks.0.ln0.bias"])
    config = json.loads((tmp_path / "config.json").read_text())
    ranks = {"decay_low_rank_dim": 3, "a_low_rank_dim": 5, "v_low_rank_dim": 2, "gate_low_rank_dim": 6, "head_dim": 4}
    assert {key: config[key] for key in ranks} == ranks


@pytest.mark.parametrize("shape", [(6, 8), (6, 1, 1, 8), (1, 1, 6, 8)])
def test_older_fla_rwkv7_with_fused_mixes(shape, tmp_path):
    model = tiny_model("7")
    save(model, tmp_path, format="hf")
    theirs = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        parts = [theirs.pop(f"model.layers.{layer}.attn.x_{letter}").reshape(-1) for letter in "rwkvag"]
        theirs[f"model.layers.{layer}.attn.x_x"] = torch.stack(parts).reshape(shape)
    save_file(theirs, tmp_path / "model.safetensors")
    assert_same(load(tmp_path).state_dict(), model.state_dict())


def test_rwkv6_remote_code_layout(tmp_path):
    model = tiny_model("6")
    renamed = {
        ("rwkv." if not name.startswith("head") else "")
        + name.replace("emb.", "embeddings.")
        .replace(".att.", ".attention.")
        .replace(".ffn.", ".feed_forward.")
        .replace(".ln0.", ".pre_ln."): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_sharded_folders(ending, weights, tmp_path):
    names = sorted(weights)
    parts = {f"model-{i}-of-3.{ending}": names[i - 1 :: 3] for i in (1, 2, 3)}
    for shard, part in parts.items():
        (save_file if ending == "safetensors" else torch.save)({name: weights[name] for name in part}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, part in parts.items() for name in part}}
    stem = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
    (tmp_path / f"{stem}.index.json").write_text(json.dumps(index))
    assert_same(load(tmp_path).state_dict(), weights)
    (tmp_path / f"model-2-of-3.{ending}").unlink()
    with pytest.raises(CheckpointError, match=rf"model-2-of-3.{ending}' is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "..\\x", "c:x", "a\0b", 7, None]
)
def test_a_shard_outside_the_folder_is_refused(shard, weights, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights, tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"stay inside the folder|no weight_map"):
        load(folder)


def test_a_tensor_in_two_shards_or_in_none_is_named(weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    save_file({"emb.weight": weights["emb.weight"]}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"emb.weight": "a.safetensors", "x": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'emb.weight' is in more than one shard"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"emb.weight": "a.safetensors", "x": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match="'x' is not in its shard"):
        load(tmp_path)


def test_nothing_beside_the_weights_is_imported_or_run(tmp_path):
    canary = tmp_path / "canary"
    folder = tmp_path / "model"
    save(tiny_model("7"), folder, format="hf")
    planted = f"open({str(canary)!r}, 'w').close()\n"
    for name in ("modeling_rwkv7.py", "configuration_rwkv7.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(planted)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    load(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("7", {"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ("7", {"group_norm_eps": None}, "head_dim of 4"),
        ("7", {"quantization_config": {"bits": 4}}, "quantised"),
        ("4", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ],
)
def test_a_config_that_means_other_maths_is_refused(version, change, message, tmp_path):
    save(tiny_model(version), tmp_path, format="hf")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_our_own_folders_config_must_match_its_weights(tmp_path):
    save(tiny_model("7"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["n_embd"] == 8
    for change in ({"version": "6"}, {"config": {"n_layer": 3}}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=r"config\.json says (version|n_layer)"):
            load(tmp_path)
    for text in ("[]", "{", "null", "[" * 100_000, '{"model_type": "receptance", "config": 7}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(tmp_path)


def test_wrong_shapes_in_a_foreign_layout_are_named(tmp_path):
    save(tiny_model("6"), tmp_path, format="hf")
    theirs = load_file(tmp_path / "model.safetensors")
    theirs["model.layers.0.attn.x_proj.0.linear.weight"] = torch.zeros(7, 8, dtype=torch.bfloat16)
    save_file(theirs, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.x_proj\.0\.linear\.weight .*\[7, 8\]"):
        load(tmp_path)


def test_folders_without_weights_say_what_is_there(weights, tmp_path):
    with pytest.raises(CheckpointError, match=r"has none of model\.safetensors"):
        load(tmp_path)
    save(weights, tmp_path / "rwkv7.pth")
    with pytest.raises(CheckpointError, match=r"give one of its files instead: 'rwkv7\.pth'"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "absent.pth")
