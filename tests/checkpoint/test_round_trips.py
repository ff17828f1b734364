"""Every version through every layout: same names, shapes, types and bits."""

import json
from collections import OrderedDict

import pytest
import torch
from checkpoint_helpers import CONFIGS, assert_same, changed, saved_by_torch, tiny_model

from receptance.checkpoint import detect, fingerprint, load, open_checkpoint, save
from receptance.errors import CheckpointError, ConfigError

PLACES = {"pth": "model.pth", "safetensors": "model.safetensors", "folder": "model", "hf": "model-hf"}


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_layouts_keep_every_bit(version, dtype, tmp_path):
    model = tiny_model(version, dtype)
    source = model
    for format, name in [*PLACES.items(), ("pth", "again.pth")]:
        save(source, tmp_path / name, format=format)
        source = load(tmp_path / name)
        assert source.config == model.config
        assert source.fingerprint == model.fingerprint
        assert not source.training
        assert_same(source.state_dict(), model.state_dict())
    assert (tmp_path / "model.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()


@pytest.mark.parametrize("format", PLACES)
def test_same_weights_give_same_bytes(format, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(tiny_model("7"), tmp_path / folder / PLACES[format], format=format)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


@pytest.mark.parametrize("version", ["v4", "v50", "v51", "v52", "v6", "v7"])
def test_reference_weights_load_and_give_the_reference_logits(version, shared):
    from safetensors.torch import load_file

    folder = shared / "oracles" / f"{version}_dev"
    model = load(folder / "weights.safetensors", dtype="float64")
    meta = json.loads((folder / "meta.json").read_text())
    assert (model.config.n_layer, model.config.n_embd) == (meta["n_layer"], meta["n_embd"])
    assert model.config.dim_ffn == meta["dim_ffn"]
    outputs = load_file(folder / "outputs.safetensors")
    logits, _ = model(outputs["tokens_1"])
    assert (logits - outputs["logits_f64_1"]).abs().max() < 1e-9


def test_a_released_files_key_order_does_not_matter(shared):
    path = shared / "oracles" / "v7_tiny_released_key_order.pth"
    expected = json.loads(path.with_suffix(".json").read_text())
    assert load(path).dtype == torch.bfloat16
    logits, _ = load(path, dtype=torch.float64)(expected["tokens"])
    assert (logits[-1] - torch.tensor(expected["logits_f64_last"], dtype=torch.float64)).abs().max() < 1e-12


def test_pth_is_what_torch_itself_reads(tmp_path):
    model = tiny_model("6")
    save(model, tmp_path / "model.pth")
    assert_same(torch.load(tmp_path / "model.pth", weights_only=True), dict(model.state_dict()))


def test_safetensors_is_what_its_library_reads_and_every_tensor_is_aligned(tmp_path):
    from safetensors.torch import load_file

    weights = dict(tiny_model("4", torch.float32).state_dict())
    weights["emb.weight"] = weights["emb.weight"].double()
    save(weights, tmp_path / "model.safetensors")
    assert_same(load_file(tmp_path / "model.safetensors"), weights)
    source = open_checkpoint(tmp_path / "model.safetensors")
    assert min(tensor.offset for tensor in source.tensors.values()) % 64 == 0
    assert all(tensor.offset % weights[name].element_size() == 0 for name, tensor in source.tensors.items())


def test_the_rwkv_package_reads_our_pth(tmp_path):
    rwkv = pytest.importorskip("rwkv.model")
    model = tiny_model("4", torch.float32, changed("4", dim_att=8))
    save(model, tmp_path / "model.pth")
    theirs = rwkv.RWKV(model=str(tmp_path / "model"), strategy="cpu fp32", verbose=False)
    logits, _ = theirs.forward([1, 2, 3], None)
    torch.testing.assert_close(model([1, 2, 3])[0][-1], logits, rtol=1e-4, atol=1e-4)


def test_listing_needs_no_contents(tmp_path):
    model = tiny_model("5.2")
    save(model, tmp_path / "model.pth")
    source = open_checkpoint(tmp_path / "model.pth")
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert set(source.dtypes.values()) == {"bfloat16"}
    assert detect(source.shapes) == ("5.2", model.config)
    assert torch.equal(source.read("head.weight"), model.head.weight)


def test_listing_imports_no_torch_and_loading_not_its_compiler(tmp_path):
    import subprocess
    import sys

    save(tiny_model("7"), tmp_path / "model.pth")
    code = """if True:
        import sys
        from receptance.checkpoint import load, open_checkpoint
        assert open_checkpoint(sys.argv[1]).shapes["emb.weight"] == (11, 8)
        assert "torch" not in sys.modules
        load(sys.argv[1])
        assert "torch._dynamo" not in sys.modules  # one second
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pth")], check=True)


# Oddities of real files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_forward_module.", "module.", "model.", "_orig_mod.", "_forward_module.model."])
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_framework_prefixes_are_taken_off(prefix, name, weights, tmp_path):
    from safetensors.torch import save_file

    write = torch.save if name.endswith("pth") else save_file
    write({prefix + key: tensor for key, tensor in weights.items()}, tmp_path / name)
    assert_same(load(tmp_path / name).state_dict(), weights)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_a_dict_one_level_down_is_found(wrapper, weights, tmp_path):
    torch.save({"epoch": 3, "lr": 0.1, "note": None, wrapper: OrderedDict(weights)}, tmp_path / "model.pth")
    assert_same(load(tmp_path / "model.pth").state_dict(), weights)


def test_a_modules_own_state_dict_with_metadata_is_read(tmp_path):
    model = tiny_model("7")
    assert hasattr(model.state_dict(), "_metadata")  # pickled with BUILD
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert_same(load(tmp_path / "model.pth").state_dict(), model.state_dict())
    torch.save(dict(model.named_parameters()), tmp_path / "parameters.pth")  # pickled with _rebuild_parameter
    assert_same(load(tmp_path / "parameters.pth").state_dict(), model.state_dict())
    torch.save(model.state_dict(), tmp_path / "protocol4.pth", pickle_protocol=4)
    assert_same(load(tmp_path / "protocol4.pth").state_dict(), model.state_dict())


def test_strided_and_tied_tensors_are_read_and_saved_as_plain_ones(weights, tmp_path):
    weights["head.weight"] = weights["emb.weight"]
    weights["blocks.0.att.key.weight"] = weights["blocks.0.att.key.weight"].t()
    weights["blocks.0.att.w1"] = torch.randn(16, 6, dtype=torch.bfloat16)[::2, ::2]
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    torch.save(weights, tmp_path / "torch.pth")
    save(weights, tmp_path / "ours.pth")
    save(weights, tmp_path / "ours.safetensors")
    for name in ("torch.pth", "ours.pth", "ours.safetensors"):
        model = load(tmp_path / name)
        assert_same(model.state_dict(), expected)
        with torch.no_grad():
            model.emb.weight.zero_()  # must not reach the head, nor the file
        assert_same({"head": model.head.weight.detach()}, {"head": expected["head.weight"]})
        assert_same(load(tmp_path / name).state_dict(), expected)
    assert (tmp_path / "ours.pth").stat().st_size < 30_000  # no view dragged its base along


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_a_merged_tuned_state_is_kept(version, tmp_path):
    model = tiny_model(version, config=changed(version, time_state=True))
    save(model, tmp_path / "model.pth")
    again = load(tmp_path / "model.pth")
    assert again.config.time_state
    assert_same(again.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match=r"time_state has no place"):
        save(model, tmp_path / "hf", format="hf")


def test_rwkv4_with_pre_ffn(tmp_path):
    model = tiny_model("4", config=changed("4", pre_ffn=True))
    save(model, tmp_path / "model.safetensors")
    assert_same(load(tmp_path / "model.safetensors").state_dict(), model.state_dict())


def test_rwkv7_with_the_unused_first_value_maps(tmp_path):
    model = tiny_model("7", config=changed("7", first_value=True))
    save(model, tmp_path / "model.pth")
    assert_same(load(tmp_path / "model.pth").state_dict(), model.state_dict())
    save(model, tmp_path / "hf", format="hf")  # which has no place for them
    expected = {
        name: x for name, x in model.state_dict().items() if not name.startswith("blocks.0.att.v") or "value" in name
    }
    again = load(tmp_path / "hf")
    assert_same(again.state_dict(), expected)
    assert torch.equal(again([1, 2, 3])[0], model([1, 2, 3])[0])


@pytest.mark.parametrize("version", CONFIGS)
def test_one_layer_is_enough(version, tmp_path):
    model = tiny_model(version, config=changed(version, n_layer=1))
    save(model, tmp_path / "model.pth")
    assert load(tmp_path / "model.pth").config.n_layer == 1


def test_nan_and_infinity_are_content(weights, tmp_path):
    weights["emb.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])
    save(weights, tmp_path / "model.safetensors")
    assert_same(load(tmp_path / "model.safetensors").state_dict(), weights)


# Types, devices, engines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", torch.float32])
def test_dtype_casts_every_tensor(dtype, tmp_path):
    model = tiny_model("7")
    save(model, tmp_path / "model.pth")
    cast = load(tmp_path / "model.pth", dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert_same(cast.state_dict(), {name: tensor.to(wanted) for name, tensor in model.state_dict().items()})
    assert cast.fingerprint == model.fingerprint


def test_mixed_types_are_held_exactly(weights, tmp_path):
    weights["blocks.1.att.w0"] = weights["blocks.1.att.w0"].float() + 1e-6
    save(weights, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    assert_same(model.state_dict(), {name: tensor.float() for name, tensor in weights.items()})
    assert load(tmp_path / "model.safetensors", dtype="bfloat16").dtype == torch.bfloat16


def test_unknown_dtype_device_engine_and_format_are_named(tmp_path):
    save(tiny_model("7"), tmp_path / "model.pth")
    for options in ({"dtype": "int8"}, {"dtype": torch.int64}, {"device": "toaster"}, {"engine": "steam"}):
        with pytest.raises(ConfigError, match="unknown"):
            load(tmp_path / "model.pth", **options)
    for options in ({"engine": "native", "device": "cuda"}, {"engine": "torch", "threads": 2}):
        with pytest.raises(ConfigError, match="engine="):
            load(tmp_path / "model.pth", **options)
    with pytest.raises(ConfigError, match="dtype 'float64' is unknown to the native engine"):
        load(tmp_path / "model.pth", engine="native", dtype="float64")
    with pytest.raises(ConfigError, match="unknown"):
        save(tiny_model("7"), tmp_path / "model.pth", format="onnx")
    with pytest.raises(ConfigError, match="suffix"):
        save(tiny_model("7"), tmp_path / "model.onnx")
    save(tiny_model("7"), tmp_path / "rwkv7-0.4b")
    assert (tmp_path / "rwkv7-0.4b" / "config.json").exists()


# Fingerprints --------------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_weights_not_the_container():
    model = tiny_model("7")
    weights = dict(model.state_dict())
    digits = fingerprint(weights)
    assert digits == model.fingerprint
    assert len(digits) == 32
    assert int(digits, 16)
    assert fingerprint({name: weights[name].double() for name in reversed(list(weights))}) == digits
    assert fingerprint({f"module.{name}": tensor for name, tensor in weights.items()}) == digits
    weights["ln_out.bias"] = weights["ln_out.bias"] + 1
    assert fingerprint(weights) != digits


def test_saved_fingerprint_is_reused(weights, tmp_path):
    save(weights, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path / "model.safetensors").metadata["receptance.fingerprint"]
    assert stored == fingerprint(weights) == load(tmp_path / "model.safetensors", dtype="float16").fingerprint


def test_torch_can_save_without_checksums(weights, tmp_path):
    (tmp_path / "model.pth").write_bytes(saved_by_torch(weights, checksums=False))
    assert_same(load(tmp_path / "model.pth").state_dict(), weights)
