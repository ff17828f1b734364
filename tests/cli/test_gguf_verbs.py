"""GGUF files through the verbs: convert, quantize, inspect, run."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

import receptance
from receptance.checkpoint import open_checkpoint
from receptance.cli.model_source import warnings_as_notes
from receptance.cli.quantize import HELD_OUT
from receptance.engine.quality import compare, log_probabilities, sensitivities
from receptance.models import RWKV

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    command = [sys.executable, "-m", "receptance", "convert", "rwkv7-stories", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "llama.cpp cuts numbers of three and more digits" in done.stderr
    return path


def test_a_gguf_file_carries_tokenizer_and_preset(cli: Cli, embedded: Path) -> None:
    arguments = ("Once upon a time, 1234 cats", "--seed", "3", "-n", "12", "--engine", "native", "--threads", "1")
    assert cli("run", embedded, *arguments).stdout == cli("run", "rwkv7-stories", *arguments).stdout
    text = "It's 7,654 o'clock.\n\n  été"
    assert receptance.tokenizer(embedded).encode(text) == receptance.tokenizer("rwkv7-stories").encode(text)


def test_convert_to_gguf_and_back_is_exact(cli: Cli, folder: Path, model: RWKV, tmp_path: Path) -> None:
    assert cli("convert", folder, tmp_path / "m.gguf").exit_code == 0
    assert cli("convert", tmp_path / "m.gguf", tmp_path / "back").exit_code == 0
    back = receptance.load(tmp_path / "back").state_dict()
    assert set(model.state_dict()) - set(back) == {f"blocks.0.att.v{i}" for i in range(3)}
    assert all(np.array_equal(model.state_dict()[name], x) for name, x in back.items())
    expected = cli("run", folder, "Once", "--seed", "1", "-n", "9").stdout
    assert cli("run", tmp_path / "back", "Once", "--seed", "1", "-n", "9").stdout == expected
    assert cli("run", tmp_path / "m.gguf", "Once", "--seed", "1", "-n", "9").stdout == expected


def test_convert_to_gguf_takes_a_type(cli: Cli, folder: Path, tmp_path: Path) -> None:
    assert cli("convert", folder, tmp_path / "m.gguf", "--dtype", "q8_0").exit_code == 0
    assert open_checkpoint(tmp_path / "m.gguf").dtypes["output.weight"] == "Q8_0"
    refused = cli("convert", folder, tmp_path / "x.gguf", "--dtype", "q3_k")
    assert refused.exit_code == 1
    assert "q4_k" in refused.stderr
    assert "--force" in cli("convert", folder, tmp_path / "m.gguf").stderr


def test_a_model_without_a_known_tokenizer_is_written_without(cli: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    receptance.save(receptance.load("rwkv7-stories"), tmp_path / "bare" / "m.pth")
    done = cli("convert", tmp_path / "bare" / "m.pth", tmp_path / "m.gguf")
    assert done.exit_code == 0
    assert "has no tokenizer" in done.stderr
    assert cli("run", tmp_path / "m.gguf", "Once").exit_code == 1
    wrong = cli("convert", folder, tmp_path / "w.gguf", "--tokenizer", "rwkv7-stories")
    assert wrong.exit_code == 1
    assert "5120 ids, the model 257" in wrong.stderr


def test_inspect_shows_the_types_of_the_file(cli: Cli, embedded: Path, tmp_path: Path) -> None:
    whole = json.loads(cli("inspect", "rwkv7-stories", "--json").stdout)
    found = json.loads(cli("inspect", embedded, "--json").stdout)
    for key in ("version", "state", "state_bytes", "fingerprint"):
        assert found[key] == whole[key]
    assert found["metadata"]["general.architecture"] == "rwkv7"
    assert {row["dtype"] for row in found["tensors"]} == {"bfloat16", "float32"}
    cli("convert", embedded, tmp_path / "q.gguf", "--dtype", "q5_k")
    assert "Q5_K, Q6_K" in cli("inspect", tmp_path / "q.gguf").stdout


def test_quantize_reports_what_it_costs(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    options = ("--tokens", "200", "--sensitivity", "40", "--tensor", "blocks.0.ffn.*=q6_k", "--json", "--threads", "1")
    done = cli("quantize", "rwkv7-stories", target, "--type", "q4_k", *options)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["tokens"], report["bytes"]) == (200, target.stat().st_size)
    assert 0 < report["kl_divergence"] < 0.1
    assert 0.7 < report["same_top"] < 1
    assert abs(report["perplexity_change"]) < 0.1
    assert 5 < report["bits_per_weight"] < 7  # vectors and low-rank maps weigh in a model this small
    types = {name: row["type"] for name, row in report["tensors"].items()}
    assert (types["blocks.0.ffn.key.weight"], types["blocks.1.ffn.key.weight"]) == ("Q6_K", "Q4_K")
    assert len(types) == 6 * 6 + 2
    # more bits, less harm: the same matrix of another layer in 4 bits
    found = report["tensors"]
    assert found["blocks.0.ffn.key.weight"]["kl_divergence"] < found["blocks.1.ffn.key.weight"]["kl_divergence"]
    assert receptance.tokenizer(target).encode("fox") == receptance.tokenizer("rwkv7-stories").encode("fox")


def test_quantize_prints_a_table_and_uses_the_text_it_is_given(cli: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("A fox. " * 9)
    options = ("--text", tmp_path / "page.txt", "--sensitivity", "5", "--threads", "1")
    done = cli("quantize", folder, tmp_path / "q.gguf", *options)
    assert done.exit_code == 0, done.stderr
    assert "of 63" in done.stdout  # bytes: end of document, then 63 of them
    assert "perplexity" in done.stdout
    assert "head.weight" in done.stdout


def test_quantize_checks_its_threads_before_it_writes(cli: Cli, folder: Path, tmp_path: Path) -> None:
    done = cli("quantize", folder, tmp_path / "q.gguf", "--threads", "0")
    assert done.exit_code == 1
    assert "threads is 0" in done.stderr
    assert not (tmp_path / "q.gguf").exists()


def test_a_quantised_file_can_be_quantised_again(cli: Cli, tmp_path: Path) -> None:
    assert cli("convert", "rwkv7-stories", tmp_path / "8.gguf", "--dtype", "q8_0").exit_code == 0
    done = cli(
        "quantize", tmp_path / "8.gguf", tmp_path / "4.gguf", "--type", "q4_0", "--tokens", "50", "--sensitivity", "0"
    )
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "4.gguf").stat().st_size < (tmp_path / "8.gguf").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("q.gguf", "--type", "q3_k"), 2, "q4_k"),
        (("q.pth",), 2, "ends in .gguf"),
        (("q.gguf", "--tensor", "head.weight"), 2, "NAME=TYPE"),
        (("q.gguf", "--tensor", "head.weight=q9"), 2, "NAME=TYPE"),
        (("q.gguf", "--tensor", "heat.weight=q8_0"), 1, "no large matrix"),
        (("q.gguf", "--tokens", "1"), 2, "--tokens"),
        (("q.gguf", "--text", "missing.txt"), 1, "missing.txt"),
        (("there.gguf",), 1, "--force"),
    ],
)
def test_quantize_says_what_is_wrong_before_it_writes(
    cli: Cli,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_text("precious")
    done = cli("quantize", folder, *arguments)
    assert (done.exit_code, problem in done.stderr) == (code, True), done.stderr
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "precious"


def test_a_warning_is_one_note(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_as_notes():
        for text in ("no core", "no core", "slow"):
            warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err == "note: no core\nnote: slow\n"


def test_torch_is_not_needed(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from receptance.cli import build\n"
        f"build()(['quantize', 'rwkv7-stories', {str(tmp_path / 'q.gguf')!r}, '--tokens', '20', '--sensitivity', '0'],"
        " standalone_mode=False)\n"
        f"build()(['inspect', {str(tmp_path / 'q.gguf')!r}], standalone_mode=False)\n"
        f"build()(['run', {str(tmp_path / 'q.gguf')!r}, 'Once', '-n', '3'], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The measure ---------------------------------------------------------------------------------------------------------


def test_a_model_against_itself_costs_nothing_and_against_another_what_float64_says() -> None:
    model = receptance.load("rwkv7-stories", engine="native", threads=1)
    other = receptance.load("rwkv7-stories", engine="native", dtype="int4", threads=1)
    ids = receptance.tokenizer("rwkv7-stories").encode(HELD_OUT.read_text(encoding="utf-8"))[:301]  # several pieces
    same = compare(log_probabilities(model, ids[:-1]), model, ids)
    assert (same.kl_divergence, same.same_top, same.perplexity_change, same.tokens) == (0, 1, 0, 300)

    found = compare(log_probabilities(model, ids[:-1]), other, ids)
    p, q = (np.float64(m.forward(ids[:-1])[0]) for m in (model, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    assert found.kl_divergence == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    assert found.perplexity == pytest.approx(np.exp(-q[np.arange(300), ids[1:]].mean()), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(np.exp(-p[np.arange(300), ids[1:]].mean()), rel=1e-4)
    assert found.same_top == (p.argmax(-1) == q.argmax(-1)).mean()


def test_sensitivity_changes_one_tensor_at_a_time() -> None:
    model = receptance.load("rwkv7-stories", engine="native", threads=1)
    made: list[list[str]] = []

    def make(changed: dict[str, object]) -> object:
        made.append(list(changed))
        return model

    found = sensitivities(make, {"a": lambda: 1, "b": lambda: 2}, [1, 2, 3], lambda name: None)  # type: ignore[arg-type]
    assert made == [[], ["a"], ["b"]]
    assert found["a"].kl_divergence == 0
