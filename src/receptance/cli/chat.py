"""`receptance chat`: a conversation in the terminal, or with a script through standard input."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from receptance.cli import options
from receptance.cli.errors import UsageError, complain
from receptance.cli.model_source import find_model, guess_template, load_runner, load_tokenizer
from receptance.cli.preset import find_preset
from receptance.cli.sampling_flags import bias, sampling_params
from receptance.cli.terminal import interruptible, write
from receptance.engine.params import SamplingParams
from receptance.errors import ReceptanceError

if TYPE_CHECKING:
    from receptance.cli.chat_session import ChatSession
    from receptance.tokenizers import Thinking

# the reference chat demo's
DEFAULTS = SamplingParams(max_tokens=1000, temperature=1.0, top_p=0.3, presence_penalty=0.5, frequency_penalty=0.5)


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Path, name or org/name[:file].")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="world, g1, raven or plain; default: told by model.toml or name.")
    ] = None,
    thinking: Annotated[str | None, typer.Option("--thinking", help="off, fast or on (template g1).")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    presence_penalty: options.Presence = None,
    frequency_penalty: options.Frequency = None,
    repetition_penalty: options.Repetition = None,
    penalty_decay: options.Decay = None,
    logit_bias: options.LogitBias = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    state: options.StateFile = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print the speed of each turn on stderr.")] = False,
    tokenizer: options.TokenizerName = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Chat with a server instead; MODEL is its name there.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="With --url: a file with the API key.")
    ] = None,
) -> None:
    """Chat with a model. /help lists the commands: save, load, fork, undo, regenerate, reset, set, show.

    Each turn feeds only its own text: the state is the whole memory, of fixed size, however long the chat. Ctrl-C stops
    a reply, not the program. From a pipe, each line is a message or a command. Sampling: flags win over the model's
    model.toml, which wins over 1000 tokens, temperature 1, top-p 0.3, presence and frequency penalty 0.5.

    \b
    Examples:
      receptance chat model.pth
      receptance chat org/name:file.pth --system "You are a helpful fox." -t 0.7
      receptance chat model.pth --state yesterday.state
      receptance chat --url http://127.0.0.1:8000
    """
    if url is not None:
        from receptance.cli.chat_url import RemoteChat, Server
        from receptance.cli.chat_url import converse as converse_with_server

        ours = {"state": state, "template": template, "tokenizer": tokenizer, "dtype": dtype, "device": device,
                "engine": engine, "threads": threads}  # fmt: skip
        for name, value in ours.items():
            if value is not None:
                raise UsageError(f"--{name} and --url exclude each other: the server has loaded its model")
        given = {
            "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
            "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty,
            "repetition_penalty": repetition_penalty, "penalty_decay": penalty_decay, "seed": seed, "stop": stop,
            "logit_bias": dict(map(bias, logit_bias)) if logit_bias else None, "thinking": thinking,
        }  # fmt: skip
        fields: dict[str, object] = {name: value for name, value in given.items() if value is not None}
        converse_with_server(RemoteChat(Server(url, options.read_key(key_file)), model, system, fields, stats))
        return
    source = find_model(model)
    preset = find_preset(source)
    flags = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "penalty_decay": penalty_decay,
        "seed": seed,
    }
    params = sampling_params(DEFAULTS, preset.sampling, flags, logit_bias, stop)

    from receptance.cli.chat_session import ChatSession, Position
    from receptance.tokenizers import chat_template

    layout = chat_template(template or preset.template or guess_template(source))
    think = cast("Thinking", thinking or preset.thinking or "off")
    layout.reply_prefix(think)  # an unknown mode is an error now, not at the first reply
    rwkv = load_runner(source, dtype, device, engine, threads)
    tok = load_tokenizer(source, rwkv.config.vocab_size, tokenizer)
    start = Position(rwkv.load_state(preset.state)) if preset.state else None
    session = ChatSession(rwkv, tok, layout, params, system=system or preset.system or "", thinking=think, start=start)
    if state:
        session.resume(rwkv.load_state(state))
    if sys.stdin.isatty():
        _keep_history()
        typer.echo(
            f"{source.name} (RWKV-{rwkv.config.version}, {layout.name}). /help for help, /bye to leave.", err=True
        )
    converse(session, stats)


def converse(session: "ChatSession", stats: bool) -> None:
    """Read messages and commands until there are no more."""
    from receptance.cli.chat_commands import COMMANDS, LEAVE, REGENERATE, CommandError

    while (line := read_message()) is not None:
        word, _, argument = line.partition(" ")
        position = session.position
        try:
            if word in LEAVE:
                return
            if word == REGENERATE:
                turn = session.undo()
                if turn is None:
                    raise CommandError("there is no reply to regenerate")
                answer(session, turn.user, stats)
            elif word in COMMANDS:
                typer.echo(COMMANDS[word](session, argument.strip()), err=True)
            elif line.startswith("/") and not line.startswith("//"):
                raise CommandError(f"there is no command {word}; /help lists them")
            elif line.strip():
                answer(session, line.removeprefix("/") if line.startswith("//") else line, stats)
        except (ReceptanceError, OSError) as error:  # the conversation goes on
            session.position = position
            complain(str(error))
        except KeyboardInterrupt:  # while the message was read, or a second one: as if nothing had been asked
            session.position = position
            typer.echo("\n(dropped)", err=True)


def answer(session: "ChatSession", text: str, stats: bool) -> None:
    """Stream the reply to a message; Ctrl-C ends it where it is, or drops the message while it is read."""
    from receptance.cli.continuation import speed_line

    reply = session.ask(text)
    shown = ""
    with interruptible(lambda: reply.prefill_seconds > 0) as interrupted:
        for token in reply:
            # a reply begins with the blank after "Assistant:"; nobody wants to see it
            piece = token.text if shown else (session.reply_prefix + token.text).lstrip()
            shown += piece
            write(piece)
            if interrupted():
                reply.cancel()
    write("\n")
    session.accept(text, reply)
    if stats:
        typer.echo(speed_line(reply), err=True)


def read_message() -> str | None:
    '''The next line, or the lines between two """; None at the end of input.'''
    line = _read_line("> ")
    if line is None or not line.startswith('"""'):
        return line
    lines = [line.removeprefix('"""')]
    while not lines[-1].rstrip().endswith('"""'):
        line = _read_line(". ")
        if line is None:
            break
        lines.append(line)
    lines[-1] = lines[-1].rstrip().removesuffix('"""')
    return "\n".join(lines).strip("\n")


def _read_line(prompt: str) -> str | None:
    while True:
        try:
            if sys.stdin.isatty():
                return input(prompt)
            line = sys.stdin.buffer.readline()
            return line.decode("utf-8", "replace").rstrip("\r\n") if line else None
        except EOFError:
            return None
        except KeyboardInterrupt:
            typer.echo("\n(/bye or Ctrl-D to leave)", err=True)


def _keep_history() -> None:
    """Line editing and a history that outlives the program, where readline exists."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "receptance"
    path = folder / "chat_history"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    except OSError:
        return  # a home that cannot be written: a history of this session alone
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, path)
