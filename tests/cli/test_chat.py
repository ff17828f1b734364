"""A chat's meaning is its state: every command leads to the state that the same words give when read in one piece."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from receptance.cli import chat_commands as commands
from receptance.cli import chat_session
from receptance.cli.chat_session import ChatSession, Position, Turn
from receptance.engine import numpy_rows
from receptance.engine.params import SamplingParams
from receptance.errors import ReceptanceError
from receptance.generation import prefill
from receptance.models import RWKV, State
from receptance.tokenizers import Tokenizer, chat_template

Cli = Callable[..., Result]


TOLERANCE = 1e-3  # float32; the tiny model's state values reach 100


@pytest.fixture
def session(model: RWKV, tok: Tokenizer) -> ChatSession:
    params = SamplingParams(max_tokens=12, seed=1, temperature=1.5)
    return ChatSession(model, tok, chat_template("world"), params)


def say(session: ChatSession, text: str) -> str:
    reply = session.ask(text)
    list(reply)
    session.accept(text, reply)
    return reply.text


def equal(a: State | None, b: State | None) -> bool:
    assert a is not None
    assert b is not None
    return all(bool((a[name] - b[name]).abs().max() <= TOLERANCE * (1 + b[name].abs().max())) for name in b)


def undone(session: ChatSession) -> Turn:
    turn = session.undo()
    assert turn is not None
    return turn


def is_at_the_start(session: ChatSession) -> bool:
    return session.position.state is None and not session.position.is_begun and not session.turns


def read_whole(session: ChatSession, text: str) -> State:
    return prefill(session.model, [session.tokenizer.encode(text)])[1]


def test_turns_feed_the_conversation_as_one_text(session: ChatSession) -> None:
    a, b = say(session, "hi"), say(session, "and\r\n\r\nthen?")
    text = f"User: hi\n\nAssistant:{a}\n\nUser: and\nthen?\n\nAssistant:{b}"
    assert equal(session.position.state, read_whole(session, text))


def test_each_turn_feeds_only_its_new_tokens(session: ChatSession) -> None:
    say(session, "hi " * 50)
    reply = session.ask("you")
    assert session.tokenizer.decode(reply.prompt_ids) == "\n\nUser: you\n\nAssistant:"


def test_the_system_prompt_comes_first_and_once(session: ChatSession) -> None:
    session.system = "Be brief."
    a, b = say(session, "hi"), say(session, "so")
    text = f"System: Be brief.\n\nUser: hi\n\nAssistant:{a}\n\nUser: so\n\nAssistant:{b}"
    assert equal(session.position.state, read_whole(session, text))


def test_undo_returns_to_the_very_state_before(session: ChatSession) -> None:
    say(session, "hi")
    before = session.position
    say(session, "more")
    assert undone(session).user == "more"
    assert session.position.state is before.state
    assert session.turns == before.turns
    session.undo()
    assert is_at_the_start(session)
    assert session.undo() is None


def test_regenerate_asks_again_from_the_same_place_with_another_draw(session: ChatSession) -> None:
    say(session, "hi")
    first = say(session, "more")
    place = session.turns[-1].before
    turn = undone(session)
    second = say(session, turn.user)
    assert second != first
    assert session.turns[-1].before.state is place.state
    assert len(session.turns) == 2


def test_the_same_seed_gives_the_same_chat(session: ChatSession, model: RWKV, tok: Tokenizer) -> None:
    other = ChatSession(model, tok, session.template, session.params)
    assert [say(session, x) for x in "abc"] == [say(other, x) for x in "abc"]


def test_a_fork_can_be_returned_to_any_number_of_times(session: ChatSession) -> None:
    say(session, "hi")
    commands.fork(session, "here")
    here = session.position
    for text in ("one way", "another way"):
        say(session, text)
        assert session.position is not here
        assert "back at 'here', 1 turns" in commands.load(session, "here")
        assert session.position is here


def test_save_and_load_go_on_in_another_session(
    session: ChatSession, model: RWKV, tok: Tokenizer, tmp_path: Path
) -> None:
    say(session, "hi")
    commands.save(session, str(tmp_path / "chat.state"))
    expected = session.ask("so?")
    list(expected)
    other = ChatSession(model, tok, session.template, session.params)
    commands.load(other, str(tmp_path / "chat.state"))
    other._asked = 1  # the seed counts the replies of a session
    reply = other.ask("so?")
    list(reply)
    assert reply.prompt_ids == expected.prompt_ids
    assert reply.ids == expected.ids
    assert equal(reply.state, expected.state)


def test_reset_leads_to_the_start(session: ChatSession, model: RWKV, tok: Tokenizer) -> None:
    say(session, "hi")
    commands.reset(session, "")
    assert is_at_the_start(session)
    start = Position(read_whole(session, "I am a fox."))
    fox = ChatSession(model, tok, session.template, session.params, start=start)
    say(fox, "hi")
    fox.reset()
    assert fox.position is start
    assert tok.decode(fox.ask("x").prompt_ids) == "User: x\n\nAssistant:"


def test_a_long_chat_keeps_few_states(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_session, "KEPT_TURNS", 3)
    for text in "abcdef":
        say(session, text)
    assert [turn.user for turn in session.turns] == ["d", "e", "f"]
    assert not any(turn.before.turns for turn in session.turns)


def test_a_cancelled_reply_stays_as_far_as_it_came(session: ChatSession) -> None:
    reply = session.ask("hi")
    for _ in range(4):
        next(reply)
    reply.cancel()
    session.accept("hi", reply)
    assert equal(session.position.state, read_whole(session, f"User: hi\n\nAssistant:{reply.text}"))


def test_a_reply_that_never_began_leaves_no_trace(session: ChatSession) -> None:
    session.accept("hi", session.ask("hi"))
    assert is_at_the_start(session)


def test_set_changes_and_refuses(session: ChatSession) -> None:
    assert commands.change(session, "temperature 0.5") == "temperature = 0.5"
    assert commands.change(session, "top-k 7") == "top_k = 7"
    assert commands.change(session, "seed none") == "seed = None"
    assert commands.change(session, "ignore_eos true") == "ignore_eos = True"
    commands.change(session, "stop \\nEnd")
    assert session.params.stop_strings == ("\nEnd",)
    commands.change(session, "template g1")
    commands.change(session, "thinking fast")
    assert session.reply_prefix == " <think>\n</think"
    for wrong in (
        "top_p 7",
        "top_p x",
        "colour red",
        "template zzz",
        "template world",
        "thinking maybe",
        "stop_tokens 3",
    ):
        with pytest.raises(ReceptanceError):
            commands.change(session, wrong)
    assert session.template.name == "g1"
    assert "temperature = 0.5" in commands.change(session, "")


# --- through the terminal ---


def test_a_piped_chat_runs_its_commands(cli: Cli, folder: Path, tmp_path: Path) -> None:
    script = f"""hi
/undo
/undo
/nonsense
/save {tmp_path}/nothing.state
\"\"\"several
lines\"\"\"
/show
/save {tmp_path}/one.state
/set top_p 7
//slash
/fork here
/load here
/load nowhere
/regenerate
/help
/bye
never read
"""
    result = cli("chat", folder, "-n", "8", "--seed", "4", "--stats", stdin=script)
    assert result.exit_code == 0, result.output
    assert "took back: hi" in result.stderr
    assert "error: there is no turn to take back" in result.stderr
    assert "error: there is no command /nonsense" in result.stderr
    assert "error: there is nothing to save yet" in result.stderr
    assert "> several\nlines" in result.stderr
    assert "error: top_p is 7" in result.stderr
    assert "error: there is neither a file nowhere nor a fork" in result.stderr
    assert "back at 'here', 2 turns" in result.stderr
    assert "/regenerate" in result.stderr
    assert "never read" not in result.stderr
    assert len(result.stdout.splitlines()) == 4, "one line for each reply"
    assert (tmp_path / "one.state").exists()
    assert not (tmp_path / "nothing.state").exists()
    resumed = cli("chat", folder, "-n", "8", "--state", tmp_path / "one.state", stdin="and?\n")
    assert resumed.exit_code == 0
    assert "error" not in resumed.stderr


def test_a_state_of_another_model_is_refused(cli: Cli, folder: Path, other_folder: Path, tmp_path: Path) -> None:
    cli("run", other_folder, "x", "-n", "0", "--save-state", tmp_path / "x.state")
    result = cli("chat", folder, "--state", tmp_path / "x.state", stdin="hi\n")
    assert result.exit_code == 1
    assert "belongs to another model" in result.stderr


class Terminal:
    """A program on a pseudo terminal, as a person sees it."""

    def __init__(self, home: Path, *arguments: str):
        self.screen = ""
        main, side = pty.openpty()
        self._main = main
        environment = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb"}
        command = [sys.executable, "-m", "receptance", *arguments]
        # a session of its own, with the terminal as its controlling one, so that Ctrl-C arrives as a signal; tests that
        # were started in the background ignore it, and so would what they start
        self.process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(side)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def wait_for(self, text: str, seconds: float = 20) -> str:
        """What was written up to and with `text`."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < end, f"no {text!r} in {self.screen!r}"
            if select.select([self._main], [], [], 0.1)[0]:
                self.screen += os.read(self._main, 65536).decode(errors="replace")
        seen, _, self.screen = self.screen.partition(text)
        return seen + text

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self._main)
        return code


def test_ctrl_c_stops_the_reply_and_not_the_program(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "chat", str(folder), "-n", "1000000", "-t", "2", "--top-p", "1", "--seed", "5")
    terminal.wait_for("> ")
    terminal.type("hello fox\n")
    terminal.wait_for("hello fox\r\n")
    terminal.wait_for("a")  # the reply is being written
    terminal.interrupt()
    terminal.wait_for("\r\n> ")
    terminal.type("/show\n")
    terminal.wait_for("> hello fox")
    terminal.wait_for("\r\n> ")
    time.sleep(3)  # the prompt is drawn a moment before readline listens for signals
    terminal.interrupt()  # at the prompt it is only a hint
    terminal.type("\n")  # wakes a readline that was not listening yet
    terminal.wait_for("Ctrl-D to leave")
    terminal.type("/bye\n")
    assert terminal.close() == 0
    assert "hello fox" in (tmp_path / "receptance" / "chat_history").read_text()
    assert (tmp_path / "receptance" / "chat_history").stat().st_mode & 0o077 == 0


def test_ctrl_c_while_a_message_is_read_drops_it(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = numpy_rows.prefill

    def prefill(model: Any, prompts: Any, *rest: Any) -> Any:
        if len(prompts[0]) > 40:
            signal.raise_signal(signal.SIGINT)
        return true(model, prompts, *rest)

    monkeypatch.setattr(numpy_rows, "prefill", prefill)
    done = cli("chat", folder, "-n", "3", "--engine", "native", stdin="hi\n" + "a fox " * 30 + "\n/show\n")
    assert done.exit_code == 0
    assert "(dropped)" in done.stderr
    assert "hi" in done.stderr
    assert "a fox" not in done.stdout + done.stderr


def test_ctrl_c_ends_run_with_its_text_and_code_130(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "run", str(folder), "hello", "-n", "1000000", "--stats", "-t", "2", "--top-p", "1")
    terminal.wait_for("a")
    terminal.interrupt()
    terminal.wait_for("cancelled")
    assert terminal.close() == 130


def test_end_of_input_leaves(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "chat", str(folder))
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
