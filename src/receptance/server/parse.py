"""A reply taken apart as it comes: the thoughts, the answer, the calls of tools."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from receptance.server.names import new_id

OPEN_THOUGHT, CLOSE_THOUGHT = "<think>", "</think>"
OPEN_CALL, CLOSE_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Piece:
    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: dict[str, Any] = field(default_factory=dict)


class ReplyParser:
    """Feed it the text after the assistant's label; `finish` gives what was held back.

    thinks: the template has thoughts, between <think> and </think> at the beginning. calls: tools may be called.
    Blanks before thoughts and before the answer are not part of either.
    """

    def __init__(self, thinks: bool, calls: bool, *, strip: bool = True):
        self._thinks, self._calls, self._strip = thinks, calls, strip
        self._held = ""
        self._where: Literal["start", "thought", "answer", "call"] = "start" if strip or thinks or calls else "answer"
        self._began = False  # something of the present part was given
        self.reasoning, self.content, self.calls = "", "", list[dict[str, Any]]()

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next belongs to the thoughts."""
        return self._where == "thought"

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces, final=False):
            pass
        return self._kept(pieces)

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        while self._step(pieces, final=True):
            pass
        return self._kept(pieces)

    def _kept(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            if piece.kind == "reasoning":
                self.reasoning += piece.text
            elif piece.kind == "content":
                self.content += piece.text
            else:
                self.calls.append(piece.call)
        return pieces

    def _step(self, pieces: list[Piece], final: bool) -> bool:
        """One move; whether another may be possible."""
        if self._where == "start":
            return self._start(final)
        if self._where == "thought":
            return self._until(CLOSE_THOUGHT, "reasoning", "answer", pieces, final)
        if self._where == "answer":
            if not self._calls:
                self._give("content", self._held, pieces)
                self._held = ""
                return False
            return self._until(OPEN_CALL, "content", "call", pieces, final)
        return self._call(pieces, final)

    def _start(self, final: bool) -> bool:
        text = self._held.lstrip()
        if self._thinks and OPEN_THOUGHT.startswith(text[: len(OPEN_THOUGHT)]):
            if len(text) < len(OPEN_THOUGHT):
                if not final:
                    return False
            else:
                self._held, self._where = text[len(OPEN_THOUGHT) :], "thought"
                return True
        if not text and not final and self._strip:
            return False
        self._where = "answer"
        return True

    def _until(
        self, mark: str, kind: Literal["reasoning", "content"], then: Any, pieces: list[Piece], final: bool
    ) -> bool:
        before, found, after = self._held.partition(mark)
        if found:
            self._give(kind, before, pieces)
            self._held, self._where, self._began = after, then, False
            return True
        keep = 0 if final else next((i for i in range(len(mark) - 1, 0, -1) if self._held.endswith(mark[:i])), 0)
        cut = len(self._held) - keep
        self._give(kind, self._held[:cut], pieces)
        self._held = self._held[cut:]
        return False

    def _give(self, kind: Literal["reasoning", "content"], text: str, pieces: list[Piece]) -> None:
        if not self._began and (self._strip or kind == "reasoning"):
            text = text.lstrip()
        if text:
            self._began = True
            pieces.append(Piece(kind, text))

    def _call(self, pieces: list[Piece], final: bool) -> bool:
        text, found, after = self._held.partition(CLOSE_CALL)
        if not found and not final:
            return False
        call = parse_call(text)
        if call is not None:
            pieces.append(Piece("call", call=call))
        elif found or text.strip():  # not a call after all
            pieces.append(Piece("content", OPEN_CALL + text + found))
        self._held, self._where, self._began = after, "answer", False
        return bool(after)


def parse_call(text: str) -> dict[str, Any] | None:
    """`{"name": ..., "arguments": {...}}` as OpenAI's call of a tool."""
    try:
        value = json.loads(text)
        name, arguments = value["name"], value.get("arguments", {})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"id": new_id("call"), "type": "function", "function": {"name": name, "arguments": arguments}}
