"""inspect, convert, list, doctor, and what a MODEL argument means."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import receptance
from receptance.cli.model_source import (
    ModelSource,
    UnknownModel,
    find_model,
    guess_template,
    load_tokenizer,
    looks_like_model,
)
from receptance.errors import ReceptanceError
from receptance.models import RWKV

Cli = Callable[..., Result]


def test_inspect_counts_what_is_there(cli: Cli, folder: Path, model: RWKV) -> None:
    report = json.loads(cli("inspect", folder, "--json").stdout)
    assert report["version"] == "7"
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["parameters"] == sum(row["parameters"] for row in report["tensors"])
    assert report["state_bytes"] == model.zero_state().nbytes
    assert report["fingerprint"] == model.fingerprint
    assert {row["name"] for row in report["tensors"]} == set(model.state_dict())


def test_inspect_folds_the_blocks_unless_asked(cli: Cli, folder: Path, model: RWKV) -> None:
    folded, full = cli("inspect", folder).stdout, cli("inspect", folder, "--tensors").stdout
    assert "blocks.*.att.key.weight" in folded
    assert "RWKV-7" in folded
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in folded
    assert "blocks.1.att.key.weight" in full
    assert len(full.splitlines()) > len(folded.splitlines())


@pytest.mark.parametrize("target, format", [("x.pth", None), ("x.safetensors", None), ("x", "folder"), ("x", "hf")])
def test_convert_is_exact_both_ways(
    cli: Cli, folder: Path, model: RWKV, tmp_path: Path, target: str, format: str | None
) -> None:
    extra = ["--format", format] if format else []
    assert cli("convert", folder, tmp_path / target, *extra).exit_code == 0
    assert cli("convert", tmp_path / target, tmp_path / "back.pth").exit_code == 0
    back = receptance.load(tmp_path / "back.pth").state_dict()
    # RWKV-7's first layer has no use for a value residual, and the HF layout no place for its tensors
    unused = {f"blocks.0.att.v{i}" for i in range(3)} if format == "hf" else set()
    assert set(model.state_dict()) - set(back) == unused
    assert all(torch.equal(model.state_dict()[name], x) for name, x in back.items())


def test_the_embedded_model_keeps_its_type_like_any_other(cli: Cli, tmp_path: Path) -> None:
    assert cli("convert", "rwkv7-stories", tmp_path / "m.pth").exit_code == 0
    written, embedded = receptance.load(tmp_path / "m.pth"), receptance.load("rwkv7-stories")
    assert written.dtype == embedded.dtype == torch.bfloat16
    assert all(torch.equal(embedded.state_dict()[name], x) for name, x in written.state_dict().items())
    report = json.loads(cli("inspect", "rwkv7-stories", "--json").stdout)
    assert {row["dtype"] for row in report["tensors"]} == {"bfloat16"}


def test_convert_takes_the_tokenizer_along_and_the_folder_runs(cli: Cli, folder: Path, tmp_path: Path) -> None:
    cli("convert", folder, tmp_path / "hf", "--format", "hf")
    expected = cli("run", folder, "Once", "--seed", "1", "-n", "9").stdout
    assert cli("run", tmp_path / "hf", "Once", "--seed", "1", "-n", "9").stdout == expected


def test_convert_changes_the_type_when_asked(cli: Cli, folder: Path, tmp_path: Path) -> None:
    cli("convert", folder, tmp_path / "half.pth", "--dtype", "bfloat16")
    assert receptance.load(tmp_path / "half.pth").dtype == torch.bfloat16


def test_convert_overwrites_only_by_force(cli: Cli, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.pth"
    target.write_text("precious")
    refused = cli("convert", folder, target)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    assert target.read_text() == "precious"
    assert cli("convert", folder, target, "--force").exit_code == 0


def test_doctor_says_what_runs_and_why_not(cli: Cli) -> None:
    result = cli("doctor", "--json")
    checks = {check["what"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert checks["torch"]["result"] == "ok"
    assert checks["back end chunk"]["result"] == "ok"
    assert all(check["detail"] for check in checks.values() if check["result"] != "ok")
    assert checks.keys() >= {"receptance", "packages", "cpu", "embedded model", "model cache", "disk"}
    plain = cli("doctor")
    assert all(what in plain.stdout for what in checks)


def test_doctor_without_torch_says_what_that_costs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setattr("receptance.cli.doctor.find_spec", lambda _name: None)
    result = cli("doctor")
    assert result.exit_code == 0
    assert "pip install 'receptance[torch]'" in result.stdout


def test_doctor_tells_the_cpu_engine_or_why_it_is_slow(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from receptance.native import library

    def missing(name: str = "") -> library.Core:
        raise library.NoCoreError("it was not compiled at install time")

    monkeypatch.setattr("receptance.native.load_core", missing)
    checks = {check["what"]: check for check in json.loads(cli("doctor", "--json").stdout)}
    assert checks["CPU engine"]["result"] == "no"
    assert "NumPy" in checks["CPU engine"]["detail"]


def test_list_of_nothing_tells_how_to_get_something(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("receptance.embedded.embedded_models", lambda: [])
    assert json.loads(cli("list", "--json").stdout) == []
    assert "receptance pull" in cli("list").stderr


def test_embedded_models_are_listed_and_found(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receptance.embedded.ASSETS", folder.parent)
    (row,) = json.loads(cli("list", "--json").stdout)
    assert (row["name"], row["kind"]) == ("tiny", "embedded")
    assert row["bytes"] > 10_000
    assert str(folder) in cli("list").stdout  # on one line, however long: a pipe has no width
    assert find_model("tiny") == ModelSource("tiny", folder, "embedded")
    assert looks_like_model("tiny")
    assert not looks_like_model("Once upon a time")
    with pytest.raises(UnknownModel, match="Did you mean tiny"):
        find_model("tinny")


def test_a_missing_default_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("receptance.embedded.ASSETS", tmp_path)
    with pytest.raises(UnknownModel, match="missing from this installation"):
        find_model(None)


def test_a_near_miss_of_a_file_is_suggested(cli: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    result = cli("run", tmp_path / "modle.safetensors", "x")
    assert f"Did you mean {tmp_path / 'model.safetensors'}?" in result.stderr


def test_a_folder_with_one_weight_file_is_that_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes())
    assert find_model(str(tmp_path)).path == file
    (tmp_path / "other.pth").write_bytes(b"")
    with pytest.raises(UnknownModel, match=r"holds other\.pth, some\.safetensors; name one"):
        find_model(str(tmp_path))


def test_the_tokenizer_is_told_by_folder_then_vocabulary(folder: Path, tmp_path: Path) -> None:
    file = ModelSource("x", tmp_path / "x.pth", "path")
    assert load_tokenizer(ModelSource("x", folder, "path"), 257).vocab_size == 257
    assert load_tokenizer(file, 65536).name == "world"
    assert load_tokenizer(file, 123, "byte").name == "byte"
    with pytest.raises(ReceptanceError, match="123 ids"):
        load_tokenizer(file, 123)


@pytest.mark.parametrize(
    "name, template",
    [
        ("rwkv7-g1-0.4b.pth", "g1"),
        ("RWKV-x070-World-0.4B.pth", "world"),
        ("rwkv7-g1a-0.1b.pth", "g1"),
        ("RWKV-4-Raven-3B.pth", "raven"),
        ("big1.pth", "world"),
    ],
)
def test_the_template_is_told_by_the_name(tmp_path: Path, name: str, template: str) -> None:
    assert guess_template(ModelSource(name, tmp_path / name, "path")) == template


def test_train_takes_paths_of_any_characters(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / 'ü 😀 "q" \\t'
    folder.mkdir()
    (folder / "c.toml").write_text('[data]\ntrain = ["x.txt"]\n', encoding="utf-8-sig")  # as Windows' editors save it
    text, out = folder / "text.txt", folder / "run"
    shown = json.loads(cli("train", str(folder / "c.toml"), "--out", str(out), "--show").stdout)
    assert (shown["data"]["root"], shown["run"]["out"]) == (str(folder), str(out))
    shown = json.loads(cli("train", "--text", str(text), "--show").stdout)
    assert shown["data"]["train"] == [str(text)]


def test_train_plan_tells_the_memory_and_takes_no_step(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One two three. " * 200)
    settings = ["data.tokenizer=byte", "model.n_layer=1", "model.n_embd=64", "run.ctx_len=32", "run.device=cpu"]
    result = cli("train", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--plan", *settings)
    assert "memory: about" in result.output
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_bench_engine_measures_and_says_what_is_wrong(cli: Cli) -> None:
    done = cli("bench", "engine", "--batch", "1,4", "--prompt", "16", "--seconds", "0.05", "--json")
    report = json.loads(done.stdout)
    assert [point["batch"] for point in report["decode"]] == [1, 4]
    assert all(0 < point["reached"] < 1.5 and 0 <= point["own"] < 1 for point in report["decode"])
    assert report["mixed"]["requests"] > 0
    wrong = cli("bench", "engine", "--batch", "x")
    assert wrong.exit_code == 1
    assert "expected numbers like 1,4,16" in wrong.stderr
