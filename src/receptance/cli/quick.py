"""`receptance run` without the library that reads command lines: importing it takes as long as the model's first token.

Only plain flags are understood here. Anything else, every mistake included, is left to that library: `read` gives None.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from receptance.cli.errors import USER_ERROR, exit_code

WHOLE, NUMBER = re.compile(r"-?[0-9]{1,18}"), re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")
INTEGERS = {
    "-n": "max_tokens",
    "--max-tokens": "max_tokens",
    "--top-k": "top_k",
    "--seed": "seed",
    "--logprobs": "logprobs",
}
FLOATS = {
    "-t": "temperature", "--temperature": "temperature", "--top-p": "top_p", "--min-p": "min_p",
    "--presence-penalty": "presence_penalty", "--frequency-penalty": "frequency_penalty",
    "--repetition-penalty": "repetition_penalty", "--penalty-decay": "penalty_decay",
}  # fmt: skip
SWITCHES = {"--echo": "echo", "--json": "as_json", "--stats": "stats"}
WORDS = {"--tokenizer": "tokenizer", "--dtype": "dtype", "--device": "device", "--engine": "engine"}
FILES = {"--state": "state", "--save-state": "save_state"}


@dataclass
class Request:
    """The arguments of `continue_prompt`."""

    model: str | None = None
    prompt: str | None = None
    sampling: dict[str, object] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def read(arguments: Sequence[str]) -> Request | None:
    """The request that these arguments of `receptance` make, if it is a plain `run`."""
    if not arguments or arguments[0] != "run" or any(name.endswith("_COMPLETE") for name in os.environ):
        return None
    request, texts = Request(), list[str]()
    words = iter(arguments[1:])
    for word in words:
        if word in SWITCHES:
            request.options[SWITCHES[word]] = True
        elif word == "--ignore-eos":
            request.sampling["ignore_eos"] = True
        elif not word.startswith("-") or word == "-":
            texts.append(word)
        else:
            value = next(words, "")
            if word in INTEGERS and WHOLE.fullmatch(value):
                request.sampling[INTEGERS[word]] = int(value)
            elif word in FLOATS and NUMBER.fullmatch(value):
                request.sampling[FLOATS[word]] = float(value)
            elif word == "--threads" and WHOLE.fullmatch(value):
                request.options["threads"] = int(value)
            elif word in WORDS and value and not value.startswith("-"):
                request.options[WORDS[word]] = value
            elif word in FILES and value and not value.startswith("-"):
                request.options[FILES[word]] = Path(value)
            else:
                return None
    if len(texts) > 2:
        return None
    request.model, request.prompt = [*texts, None, None][:2]
    return request


def run(request: Request) -> int:
    """The exit code."""
    from receptance.cli.continuation import continue_prompt

    try:
        return exit_code(continue_prompt, request.model, request.prompt, request.sampling, **request.options)
    except BrokenPipeError:  # the reader of our output has gone: what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USER_ERROR
