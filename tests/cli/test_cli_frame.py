"""The frame of the command line: help without torch, exit codes, one clear line for every error."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from receptance.cli import GROUPS, VERBS

Cli = Callable[..., Result]


RECEPTANCE = [sys.executable, "-m", "receptance"]
QUICK = 0.4  # seconds of processor time, which other work here hardly changes; measured 0.2


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, receptance.cli as c\n"
        "sys.argv = ['receptance', '--help']\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'huggingface_hub', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )

    def seconds() -> float:
        before = sum(os.times()[2:4])  # of children
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return sum(os.times()[2:4]) - before

    # on a busy machine even processor time stretches: one quick start is enough
    assert any(seconds() < QUICK for _ in range(12))


@pytest.mark.parametrize("group", ["", *GROUPS])
def test_no_line_of_a_list_of_verbs_is_cut(cli: Cli, group: str) -> None:
    _, listed = cli(*group.split(), "--help").stdout.split("Commands:")
    assert "..." not in listed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(cli: Cli, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"receptance {verb}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80  # or a terminal breaks examples in the middle of a word


def test_exit_codes_are_documented(cli: Cli) -> None:
    assert "130  interrupted" in cli("--help").stdout


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("receptance 0.")


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["run", "nowhere.pth", "x"], 1, "unknown model 'nowhere.pth'"),
        (["run", "TINY", "x", "-t", "-1"], 1, "temperature is -1.0, expected a number from 0 to 100"),
        (["run", "TINY", "x", "--dtype", "int3"], 1, "int3"),
        (["run", "TINY", "x", "--state", "no.state"], 1, "no.state"),
        (["run", "TINY", "x", "--logit-bias", "x"], 1, "--logit-bias is 'x'"),
        (["run", "TINY", "x", "--tokenizer", "nope"], 1, "no tokenizer 'nope'"),
        (["run", "TINY", "x", "--save-state", "no/such/folder/x"], 1, "no/such/folder"),
        (["run", "TINY", "x", "-n", "many"], 2, "--max-tokens"),
        (["chat", "TINY", "--template", "zzz"], 1, "unknown chat template 'zzz'"),
        (["convert", "TINY", "x.zip"], 1, "suffix .zip"),
        (["convert", "TINY", "x.pth", "--format", "zip"], 2, "--format is 'zip'"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    folder: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    arguments = [str(folder) if a == "TINY" else a for a in arguments]
    done = subprocess.run(
        [*RECEPTANCE, *arguments], capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")


def test_a_damaged_model_is_one_line(cli: Cli, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    result = cli("run", broken, "x")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {broken}")


def test_without_torch_the_line_says_what_to_install(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object, **_kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("receptance.cli.inspect.load_model", missing)
    result = cli("inspect", folder)
    assert result.exit_code == 1
    assert "pip install 'receptance[torch]'" in result.stderr


def test_python_m_is_the_command_line() -> None:
    done = subprocess.run([*RECEPTANCE, "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("receptance ")


def test_every_verb_is_one_short_file() -> None:
    for path in Path(__file__).resolve().parents[2].glob("src/receptance/cli/*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 220, path
