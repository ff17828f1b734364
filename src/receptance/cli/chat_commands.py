"""The slash commands of a chat. Each takes the session and the text after the command, and gives a line to show."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from receptance.cli.chat_session import ChatSession
from receptance.cli.state_file import save_state
from receptance.errors import ReceptanceError
from receptance.tokenizers import Thinking, chat_template

HELP = '''\
/save FILE         write the conversation's state; /load or --state goes on from it
/load FILE|NAME    go on from a saved state, or from a fork
/fork NAME         remember this point; /load NAME returns to it
/undo              take back the last turn
/regenerate        take back the last reply and ask again
/reset             start anew
/set               show the settings; /set NAME VALUE changes one (also system, template, thinking)
/show              show the conversation
/help              this list
/bye               leave (also Ctrl-D)
"""                begin and end a message of several lines
//text             a message that begins with a slash
Ctrl-C stops a reply; what was written so far stays.'''


class CommandError(ReceptanceError):
    """A slash command that cannot be done."""


def save(session: ChatSession, argument: str) -> str:
    path = Path(_needed(argument, "/save FILE")).expanduser()
    if session.position.state is None:
        raise CommandError("there is nothing to save yet")
    save_state(session.position.state, path, session.model)
    return f"saved to {path} ({path.stat().st_size / 1e6:.1f} MB)"


def load(session: ChatSession, argument: str) -> str:
    name = _needed(argument, "/load FILE or /load NAME of a fork")
    if name in session.forks:
        session.go_to(name)
        return f"back at '{name}', {len(session.turns)} turns"
    path = Path(name).expanduser()
    if not path.exists():
        forks = ", ".join(session.forks) or "there are none"
        raise CommandError(f"there is neither a file {path} nor a fork of that name ({forks})")
    session.resume(session.model.load_state(path))
    return f"went on from {path}; its turns are in the state, but cannot be shown or undone"


def fork(session: ChatSession, argument: str) -> str:
    name = _needed(argument, "/fork NAME")
    session.fork(name)
    return f"/load {name} returns here"


def undo(session: ChatSession, argument: str) -> str:
    turn = session.undo()
    if turn is None:
        raise CommandError("there is no turn to take back")
    return f"took back: {_short(turn.user)}"


def reset(session: ChatSession, argument: str) -> str:
    session.reset()
    return "started anew"


def change(session: ChatSession, argument: str) -> str:
    name, _, text = argument.partition(" ")
    text = text.strip()
    name = name.replace("-", "_")
    if not name:
        return settings(session)
    if name == "template":
        template = chat_template(text)
        template.reply_prefix(session.thinking)  # refuses a mode that the template lacks
        session.template = template
    elif name == "thinking":
        thinking = cast(Thinking, text)
        session.template.reply_prefix(thinking)  # refuses an unknown one
        session.thinking = thinking
    elif name == "system":
        session.system = text
        return "set" if not session.position.is_begun else "set; it counts from the next /reset on"
    elif name in {field.name for field in fields(session.params)}:
        changed: dict[str, Any] = {name: _value(text)}
        if name == "stop":
            changed["stop"] = [] if changed["stop"] is None else [text.replace("\\n", "\n")]
        session.params = replace(session.params, **changed)
        return f"{name} = {getattr(session.params, name)}"
    else:
        raise CommandError(f"there is no setting {name!r}; /set shows them all")
    return f"{name} = {text}"


def settings(session: ChatSession) -> str:
    lines = [f"{field.name} = {getattr(session.params, field.name)}" for field in fields(session.params)]
    lines += [f"template = {session.template.name}", f"thinking = {session.thinking}", f"system = {session.system!r}"]
    return "\n".join(lines)


def show(session: ChatSession, argument: str) -> str:
    turns = [f"> {turn.user}\n{turn.reply.strip()}" for turn in session.turns]
    return "\n\n".join(turns) or "no turns yet"


def _value(text: str) -> object:
    """Numbers, true, false and null (or none) as such; anything else as text, which the field then refuses."""
    if text.lower() in ("none", ""):
        return None
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _needed(argument: str, usage: str) -> str:
    if not argument:
        raise CommandError(f"expected {usage}")
    return argument


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


COMMANDS: dict[str, Callable[[ChatSession, str], str]] = {
    "/save": save,
    "/load": load,
    "/fork": fork,
    "/undo": undo,
    "/reset": reset,
    "/set": change,
    "/show": show,
    "/help": lambda session, argument: HELP,
}
LEAVE = ("/bye", "/exit", "/quit")
REGENERATE = "/regenerate"
