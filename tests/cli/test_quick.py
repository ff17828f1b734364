"""`receptance run` read without typer is what typer reads."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from receptance.cli import quick

Cli = Callable[..., Result]

PLAIN = [
    ["Once upon a time"],
    ["model.pth", "Once", "-n", "5", "-t", "0.5", "--seed", "-3", "--stats"],
    ["-", "--top-p", "1", "--top-k", "7", "--min-p", "0.1", "--json", "--echo", "--logprobs", "2"],
    ["--ignore-eos", "--max-tokens", "5", "a", "b", "--dtype", "int8", "--engine", "native", "--device", "cpu"],
    ["x", "--state", "a.state", "--save-state", "b.state", "--tokenizer", "world", "--threads", "2"],
    ["--presence-penalty", "-0.5", "--frequency-penalty", "1", "--repetition-penalty", "1.5", "--penalty-decay", "0.9"],
    ["", "--temperature", "1"],
    ["-n", "3", "-n", "4", "later wins"],
]
LEFT_TO_TYPER = [
    ["--help"], ["-h"], ["Once", "-n5"], ["Once", "--seed=1"], ["Once", "-n", "five"], ["Once", "-n"], ["a", "b", "c"],
    ["Once", "--stop", "."], ["--", "-n"], ["Once", "-n", "1_000"], ["Once", "-t", "nan"], ["Once", "-n", "٣"],
    ["Once", "--engine", "--stats"], ["Once", "--unknown"],
]  # fmt: skip


def given(arguments: Mapping[str, Any]) -> dict[str, object]:
    return {name: value for name, value in arguments.items() if value is not None and value is not False}


@pytest.mark.parametrize("words", PLAIN)
def test_plain_arguments_are_read_as_typer_reads_them(
    words: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(model: object, prompt: object, sampling: Mapping[str, Any], **options: object) -> int:
        calls.append((model, prompt, given(sampling), given(options)))
        return 0

    monkeypatch.setattr("receptance.cli.run.continue_prompt", record)
    result = cli("run", *words)
    assert result.exit_code == 0, result.stderr
    request = quick.read(["run", *words])
    assert request is not None
    assert [(request.model, request.prompt, given(request.sampling), given(request.options))] == calls


@pytest.mark.parametrize("words", LEFT_TO_TYPER)
def test_anything_else_is_left_to_typer(words: list[str]) -> None:
    assert quick.read(["run", *words]) is None


def test_other_verbs_and_completion_are_left_to_typer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick.read([]) is None
    assert quick.read(["chat", "Once"]) is None
    monkeypatch.setenv("_RECEPTANCE_COMPLETE", "complete_bash")
    assert quick.read(["run", "Once"]) is None


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    code = "import sys; from receptance.cli import main; sys.argv[0] = 'receptance'\ntry:\n    main()\nfinally:\n"
    code += "    print(sorted({'typer', 'pydantic', 'torch', 'rich'} & set(sys.modules)), file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)


def test_the_first_token_waits_for_no_library_of_command_lines() -> None:
    done = run("run", "Once upon a time", "-n", "3", "--seed", "1")
    assert done.returncode == 0
    assert len(done.stdout) > 3
    assert done.stderr == "[]\n"


def test_the_first_token_takes_little_processor_time(tmp_path: Path) -> None:
    """With compiled bytecode, as an installed package has it: compiling the source takes 0.1 s more."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-m", "receptance", "run", "Once", "-n", "1"]
    seconds = []
    for _ in range(4):
        before = sum(os.times()[2:4])  # of children
        subprocess.run(command, capture_output=True, check=True, env=environment)
        seconds.append(sum(os.times()[2:4]) - before)
    assert min(seconds) < 0.5  # measured 0.3, of which NumPy's import is half


def test_mistakes_end_as_they_do_with_typer() -> None:
    done = run("run", "missing.pth", "Once", "-n", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: unknown model 'missing.pth'")


def test_a_reader_that_has_gone_ends_it_quietly() -> None:
    code = "import sys; from receptance.cli import main; sys.argv[0] = 'receptance'; main()"
    command = [sys.executable, "-c", code, "run", "Once", "-n", "400", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
