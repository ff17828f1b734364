"""`receptance data prepare` and `inspect`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Cli = Callable[..., Result]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "story {i}"}}\n' for i in range(30)) + "broken\n")
    return path


def test_prepare_and_inspect(cli: Cli, text: Path, tmp_path: Path) -> None:
    result = cli("data", "prepare", text, "--out", tmp_path / "t" / "x", "--tokenizer", "byte", "-p", 1, "--skip-bad")
    assert result.exit_code == 0, result.output
    assert "260 tokens in 30 documents" in result.stdout
    assert "left out 1 bad rows" in result.stdout
    result = cli("data", "inspect", tmp_path / "t" / "x", "--document", 12)
    assert "story 12" in result.stdout
    assert "tokenizer:          byte" in result.stdout
    facts = json.loads(cli("data", "inspect", tmp_path / "t" / "x", "--json").stdout)
    assert (facts["documents"], facts["tokens"], facts["longest_document"]) == (30, 260, 9)


def test_a_bad_row_ends_with_its_line_and_the_advice_works(cli: Cli, text: Path, tmp_path: Path) -> None:
    command = ["data", "prepare", text, "--out", tmp_path / "x", "--tokenizer", "byte", "-p", 1]
    result = cli(*command)
    assert result.exit_code == 1
    assert "a.jsonl, line 31: not JSON" in result.stderr
    assert cli(*command, "--skip-bad").exit_code == 0


def test_a_separator_may_be_escaped(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\nthree")
    result = cli("data", "prepare", tmp_path / "a.txt", "-o", tmp_path / "x", "-p", 1, "--separator", r"\n\n")
    assert "in 3 documents" in result.stdout


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["prepare", "nowhere.txt", "--out", "x"], "nowhere.txt: no such file"),
        (["prepare", "a.csv", "--out", "x"], "expected .txt or .jsonl"),
        (["prepare", "a.txt", "--out", "x", "--tokenizer", "klingon"], "no tokenizer 'klingon'"),
        (["inspect", "nothing"], "nothing.idx: no such file"),
    ],
)
def test_errors_are_one_line(cli: Cli, arguments: list[str], words: str) -> None:
    result = cli("data", *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["prepare", "inspect"])
def test_help_has_examples(cli: Cli, verb: str) -> None:
    assert f"receptance data {verb}" in cli("data", verb, "--help").stdout
    assert "Examples:" in cli("data", "--help").stdout
