"""Chat as the plain text that each model family was trained on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from receptance.errors import TokenizerError

Thinking = Literal["off", "fast", "on"]

REPLY_PREFIXES: Mapping[Thinking, str] = {"off": "", "fast": " <think>\n</think", "on": " <think"}


@dataclass(frozen=True)
class ChatTemplate:
    """How messages `{"role": "system" | "user" | "assistant", "content": text}` become a prompt.

    A turn is `label: content`, turns are joined by `separator`. System and user text is cleaned (line ends become \\n,
    runs of them one, no space around), because a blank line ends a turn; so is the assistant's where a blank line
    stops the reply. A template without labels passes all text through untouched.
    """

    name: str
    user: str
    assistant: str
    system: str  # "" = a paragraph without a label
    separator: str
    stop: tuple[str, ...]  # the reply ends before any of these; see StopMatcher
    thinks: bool = False  # trained on <think> ... </think> before the answer

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        thinking: Thinking = "off",
    ) -> str:
        """The whole conversation, ending where the assistant goes on (or with the last message).

        With `thinking`, the prompt ends with `reply_prefix(thinking)`. Length hints such as "(think a bit)" are user
        text. Raises TokenizerError for an unknown role, a missing content or a thinking mode the family lacks.
        """
        turns = [self._turn(message, number) for number, message in enumerate(messages)]
        if add_generation_prompt:
            turns.append(self._label(self.assistant) + self.reply_prefix(thinking))
        return self.separator.join(turns)

    def render_next(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        thinking: Thinking = "off",
    ) -> str:
        """What to feed a saved state that already holds the conversation up to the end of a reply (or of any message).

        `render(a, add_generation_prompt=False) + render_next(b)` equals `render(a + b)` for non-empty `a`. Feed a
        state the reply without the stop string that ended it: the separator comes from here.
        """
        rendered = self.render(messages, add_generation_prompt=add_generation_prompt, thinking=thinking)
        return self.separator + rendered if messages or add_generation_prompt else ""

    def reply_prefix(self, thinking: Thinking) -> str:
        """The beginning of the reply that the prompt already contains: show it before the generated text.

        "off": nothing. "on": ` <think`, the model goes on with `>`, its thoughts, `</think>` and the answer. "fast":
        an empty thought up to `</think`, so that the model goes on with `>` and the answer.
        """
        if thinking not in REPLY_PREFIXES:
            raise TokenizerError(f"thinking is {thinking!r}, expected one of {', '.join(REPLY_PREFIXES)}")
        if thinking != "off" and not self.thinks:
            raise TokenizerError(
                f"the chat template '{self.name}' has no thinking mode; use 'off' or the template 'g1'"
            )
        return REPLY_PREFIXES[thinking]

    def _turn(self, message: Mapping[str, str], number: int) -> str:
        labels = {"system": self.system, "user": self.user, "assistant": self.assistant}
        role, content = message.get("role"), message.get("content")
        if role not in labels:
            raise TokenizerError(f"message {number} has the role {role!r}, expected one of {', '.join(labels)}")
        if not isinstance(content, str):
            raise TokenizerError(f"message {number} has the content {content!r}, expected a string")
        if not self.separator:
            return content
        content = _one_line_end(content) if role != "assistant" or "\n\n" in self.stop else content.strip()
        return f"{self._label(labels[role])} {content}".strip()

    def _label(self, label: str) -> str:
        return f"{label}:" if label else ""


def _one_line_end(text: str) -> str:
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


# Sources: API_DEMO_CHAT.py and RWKV_v7 / G1 model cards of BlinkDL; "Raven" is the instruct-tuned RWKV-4 Pile family.
WORLD = ChatTemplate("world", "User", "Assistant", "System", "\n\n", stop=("\n\n", "User:"))
G1 = ChatTemplate("g1", "User", "Assistant", "System", "\n\n", stop=("\n\nUser", "\n\nSystem:"), thinks=True)
RAVEN = ChatTemplate("raven", "Bob", "Alice", "", "\n\n", stop=("\n\n", "Bob:"))
PLAIN = ChatTemplate("plain", "", "", "", "", stop=())

TEMPLATES: Mapping[str, ChatTemplate] = {template.name: template for template in (WORLD, G1, RAVEN, PLAIN)}


def chat_template(name: str) -> ChatTemplate:
    """A template by name: world, g1, raven or plain. Raises TokenizerError for another name."""
    if name not in TEMPLATES:
        raise TokenizerError(f"unknown chat template {name!r}; expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
