"""Files of requests: one JSON object a line in, one a line out, resumed after a kill without repeating or losing any.

A line in: {"prompt": "…" or [ids], and any sampling fields, "n", "json_schema", "regex", "lark"}, or
{"context": …, "continuation": …} to be scored, or {"embed": …}. "id" names it; without one its number does, from 0.
A line out has the id and "text", "finish_reason" (or "texts" for n > 1), or "logprob" and "greedy", or "embedding"; or
"error".
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from receptance.engine.engine import Engine
from receptance.engine.params import SamplingParams
from receptance.engine.request import Completion, Grammar, Prompt, Request, Score, Scored
from receptance.errors import ConfigError, ReceptanceError

SAMPLING = frozenset(field.name for field in fields(SamplingParams))
GRAMMARS = frozenset(field.name for field in fields(Grammar))
OTHER = frozenset({"id", "prompt", "context", "continuation", "embed", "n"})
SYNC_SECONDS = 1.0  # what was written longer ago has reached the disk


@dataclass(frozen=True)
class Line:
    """One line of the input. asked: a Request, a Score, or a prompt to be embedded; or why it is none of them."""

    id: str
    asked: Request | Score | Prompt | ReceptanceError


def read_lines(path: Path, defaults: SamplingParams, skip: set[str]) -> Iterator[Line]:
    """The lines of a file whose ids are not in `skip`. A default seed is added to a line's number.

    Raises ConfigError for a file that is not UTF-8; what is wrong with a single line is in that line.
    """
    with open(path, encoding="utf-8") as file:
        try:
            for number, text in enumerate(file):
                if not text.strip():
                    continue
                line = parse_line(number, text, defaults)
                if line.id not in skip:
                    yield line
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: is not UTF-8 ({error})") from None


def parse_line(number: int, text: str, defaults: SamplingParams) -> Line:
    name = str(number)
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ConfigError(f"expected a JSON object, found {type(found).__name__}")
        name = str(found.get("id", number))
        unknown = found.keys() - SAMPLING - GRAMMARS - OTHER
        if unknown:
            raise ConfigError(f"unknown fields {', '.join(sorted(unknown))}")
        return Line(name, _asked(found, number, defaults))
    except ReceptanceError as error:
        return Line(name, ConfigError(f"line {number + 1}: {error}"))
    except json.JSONDecodeError as error:
        return Line(name, ConfigError(f"line {number + 1}: not JSON ({error})"))


def _asked(found: dict[str, Any], number: int, defaults: SamplingParams) -> Request | Score | Prompt:
    kinds = [kind for kind in ("prompt", "context", "embed") if kind in found]
    if len(kinds) != 1:
        raise ConfigError(f"expected one of prompt, context, embed, found {' and '.join(kinds) or 'none'}")
    prompt = _prompt(found, kinds[0])
    if kinds[0] == "embed":
        return prompt
    if kinds[0] == "context":
        return Score(prompt, _prompt(found, "continuation"))
    given = {name: found[name] for name in SAMPLING & found.keys()}
    if isinstance(given.get("logit_bias"), dict):  # JSON's keys are text
        try:
            given["logit_bias"] = {int(token): value for token, value in given["logit_bias"].items()}
        except ValueError:
            raise ConfigError(f"logit_bias has keys that are no token ids: {list(given['logit_bias'])[:3]}") from None
    if defaults.seed is not None and "seed" not in given:
        given["seed"] = (defaults.seed + number) % 2**64
    grammar = {name: found[name] for name in GRAMMARS & found.keys()}
    if isinstance(grammar.get("json_schema"), dict):
        grammar["json_schema"] = json.dumps(grammar["json_schema"])
    return Request(
        prompt, replace(defaults, **given), n=found.get("n", 1), grammar=Grammar(**grammar) if grammar else None
    )


def _prompt(found: dict[str, Any], name: str) -> Prompt:
    value = found.get(name)
    is_ids = isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    if not isinstance(value, str) and not is_ids:
        raise ConfigError(f"{name} is {value!r:.60}, expected text or a list of token ids")
    return value  # type: ignore[return-value]


class Results:
    """The file of answers. What it holds already is kept; a last line that was torn by a kill is cut off."""

    def __init__(self, path: Path):
        self.done: set[str] = set()
        self.failed = 0
        end = 0
        if path.exists():
            with open(path, "rb") as file:
                for number, text in enumerate(file):
                    if not text.endswith(b"\n"):
                        break
                    self._remember(path, number, text)
                    end += len(text)
        self._file = open(path, "ab")  # noqa: SIM115
        if self._file.tell() != end:
            self._file.truncate(end)
        self._synced = time.monotonic()

    def _remember(self, path: Path, number: int, text: bytes) -> None:
        try:
            answer = json.loads(text)
            self.done.add(answer["id"])
            self.failed += "error" in answer
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{path}: line {number + 1} is no answer of this verb; give the name of another file"
            ) from None

    def write(self, answer: dict[str, Any]) -> None:
        self.done.add(answer["id"])
        self.failed += "error" in answer
        self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def answer_all(
    engine: Engine, lines: Iterable[Line], write: Callable[[dict[str, Any]], None], *, window: int = 256
) -> None:
    """Answer each line as soon as it is ready, with at most `window` of them in the engine at once."""
    pending: dict[Future[Any], Line] = {}

    def collect(least: int) -> None:
        while len(pending) > least:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                write(_answer(pending.pop(future), future))

    for line in lines:
        if isinstance(line.asked, ReceptanceError):
            write({"id": line.id, "error": str(line.asked)})
            continue
        pending[_submit(engine, line.asked)] = line
        collect(window - 1)
    collect(0)


def _submit(engine: Engine, asked: Request | Score | Prompt) -> Future[Any]:
    if isinstance(asked, Request):
        return engine.submit_unchecked(asked).future
    return engine.submit_score(asked) if isinstance(asked, Score) else engine.submit_embedding(asked)


def _answer(line: Line, future: Future[Any]) -> dict[str, Any]:
    error = future.exception()
    if isinstance(error, ReceptanceError):
        return {"id": line.id, "error": str(error)}
    result = future.result()
    if isinstance(result, Scored):
        return {"id": line.id, "logprob": result.total, "tokens": len(result.ids), "greedy": result.greedy}
    if isinstance(result, list):
        texts = [_text(completion) for completion in result]
        return {"id": line.id, **texts[0]} if len(texts) == 1 else {"id": line.id, "texts": texts}
    return {"id": line.id, "embedding": [round(float(x), 7) for x in result]}


def _text(completion: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt_ids),
        "completion_tokens": len(completion.tokens),
        "seed": completion.seed,
    }
    if completion.tokens and completion.tokens[0].logprob is not None:
        found["logprobs"] = [token.logprob for token in completion.tokens]
    return found
