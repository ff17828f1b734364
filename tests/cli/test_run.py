import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import receptance
from receptance.cli import terminal
from receptance.generation import generate_tokens
from receptance.models import RWKV, State
from receptance.tokenizers import Tokenizer

Cli = Callable[..., Result]


FLAGS = ["--seed", "3", "-n", "30"]


def test_the_text_is_that_of_generate(cli: Cli, folder: Path, model: RWKV, tok: Tokenizer) -> None:
    expected = "".join(
        receptance.generate(
            model, tok, "Once", seed=3, max_tokens=30, top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2
        )
    )
    assert cli("run", folder, "Once", *FLAGS).stdout == expected + "\n"
    assert cli("run", folder, "Once", *FLAGS, "--echo").stdout == "Once" + expected + "\n"


def test_the_prompt_comes_from_standard_input_too(cli: Cli, folder: Path) -> None:
    given = cli("run", folder, "Once\nmore", *FLAGS).stdout
    assert cli("run", folder, *FLAGS, stdin="Once\nmore\n").stdout == given
    assert cli("run", folder, "-", *FLAGS, stdin=b"Once\nmore").stdout == given
    assert cli("run", folder, *FLAGS, stdin=b"\xff\xfe broken").exit_code == 0


def test_json_says_everything(cli: Cli, folder: Path, model: RWKV, tok: Tokenizer) -> None:
    report = json.loads(cli("run", folder, "Once", *FLAGS, "-t", "0.5", "--json", "--logprobs", "2").stdout)
    assert report["text"] == tok.decode(report["tokens"])
    assert report["seed"] == 3
    assert report["prompt_tokens"] == 4
    assert report["finish_reason"] in ("stop", "length")
    assert len(report["logprobs"]) == len(report["tokens"])
    assert [len(entry["top"]) for entry in report["logprobs"]] == [2] * len(report["tokens"])


def test_a_given_seed_is_optional_and_reported(cli: Cli, folder: Path) -> None:
    first = json.loads(cli("run", folder, "Once", "-n", "20", "--json").stdout)
    again = json.loads(cli("run", folder, "Once", "-n", "20", "--json", "--seed", first["seed"]).stdout)
    assert again["tokens"] == first["tokens"]


def test_a_saved_state_goes_on(cli: Cli, folder: Path, model: RWKV, tok: Tokenizer, tmp_path: Path) -> None:
    kept = tmp_path / "once.state"
    assert cli("run", folder, "Once", "-n", "0", "--save-state", kept).stdout == "\n"
    whole = cli("run", folder, "Once upon", *FLAGS).stdout
    assert cli("run", folder, " upon", *FLAGS, "--state", kept).stdout == whole


def test_the_state_saved_is_the_one_after_the_text(
    cli: Cli, folder: Path, model: RWKV, tok: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "end.state"
    text = cli("run", folder, "Once", *FLAGS, "--save-state", path).stdout.removesuffix("\n")
    saved = State.load(path, model)
    fresh = generate_tokens(model, tok, "Once" + text, max_tokens=0)
    list(fresh)
    assert all((saved[name] - fresh.state[name]).abs().max() < 1e-2 for name in saved)


def test_stop_strings_logit_bias_and_ignore_eos(cli: Cli, folder: Path) -> None:
    text = cli("run", folder, "Once", *FLAGS).stdout.removesuffix("\n")
    letter = next(c for c in text[1:] if c.isascii() and c.isprintable())
    stopped = cli("run", folder, "Once", *FLAGS, "--stop", letter).stdout.removesuffix("\n")
    assert text.startswith(stopped)
    assert letter not in stopped
    only_a = [f"--logit-bias={i}=-inf" for i in range(257) if i != ord("a") + 1]
    assert cli("run", folder, "Once", "-n", "5", *only_a).stdout == "aaaaa\n"
    assert cli("run", folder, "Once", "-n", "4", "--logit-bias", "11=300", "--stop", "\\n").stdout == "\n"
    forced = json.loads(
        cli("run", folder, "Once", "-n", "300", "-t", "3", "--ignore-eos", "--json", "--top-p", "1").stdout
    )
    assert len(forced["tokens"]) == 300
    assert 0 not in forced["tokens"]


def test_stats_and_logprobs_go_to_stderr(cli: Cli, folder: Path) -> None:
    plain = cli("run", folder, "Once", *FLAGS)
    spoken = cli("run", folder, "Once", *FLAGS, "--stats", "--logprobs", "1")
    assert spoken.stdout == plain.stdout
    assert "tok/s" in spoken.stderr
    assert "seed 3" in spoken.stderr
    assert plain.stderr == ""


def test_a_lone_argument_is_a_model_only_if_it_names_one(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receptance.embedded.ASSETS", folder.parent)
    monkeypatch.setattr("receptance.cli.model_source.DEFAULT_MODEL", "tiny")
    expected = cli("run", folder, "Once", *FLAGS).stdout
    assert cli("run", "Once", *FLAGS).stdout == expected
    assert cli("run", "tiny", *FLAGS, stdin="Once").stdout == expected
    assert cli("run", folder, *FLAGS, stdin="Once").stdout == expected
    long_prompt = "a very long prompt " * 300
    assert cli("run", long_prompt, "-n", "1").exit_code == 0
    assert cli("run", "typo.pth", "-n", "1").exit_code == 1


def test_no_prompt_on_a_terminal_is_a_usage_error(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from receptance.cli.run import command

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(receptance.errors.ReceptanceError, match="there is no PROMPT"):
        command(str(folder))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_run_takes_types_that_only_torch_has_or_that_round(cli: Cli, folder: Path, dtype: str) -> None:
    assert cli("run", folder, "Once", "-n", "3", "--dtype", dtype).exit_code == 0


def test_only_a_regular_file_is_replaced_by_a_state(cli: Cli, folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = cli("run", folder, "Once", "-n", "1", "--save-state", pipe)
    assert result.exit_code == 1
    assert "is not a regular file" in result.stderr
    assert pipe.is_fifo()


def test_a_terminal_gets_no_control_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal.write("a\x1b[2Jb\x9b1m\tc\n")
    assert capsys.readouterr().out == "a[2Jb1m\tc\n"


def test_ctrl_c_ends_a_text_in_order_and_a_prompt_at_once() -> None:
    with terminal.interruptible() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with terminal.interruptible(lambda: False), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
