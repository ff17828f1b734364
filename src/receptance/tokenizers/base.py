"""What every tokenizer does: text to ids and back, and a stream of ids to a stream of whole characters."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from receptance.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Ids in `range(vocab_size)`, each standing for some bytes; an id without text (end of document, padding) for none.

    `encode` never yields such an id: put `eos_id` between documents yourself.
    """

    name: str
    eos_id: int

    def __init__(self, name: str, table: list[bytes], eos_id: int, special: Mapping[int, str]):
        """`table[id]` is the id's bytes; `special` is the written form of ids that have no bytes."""
        self.name = name
        self.eos_id = eos_id
        self._table = table
        self._special = special

    @property
    def vocab_size(self) -> int:
        """The number of rows that a model's embedding needs."""
        return len(self._table)

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`. Raises TokenizerError for a str that UTF-8 cannot carry (a lone surrogate)."""

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write a file into `folder` (made if missing) from which `tokenizer(folder)` reads the same ids; its path."""

    def encode_batch(self, texts: Iterable[str | bytes]) -> list[list[int]]:
        """`encode` for many texts."""
        return [self.encode(text) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; empty for end of document and padding. Raises TokenizerError for an unknown id."""
        if not 0 <= token < len(self._table):
            raise TokenizerError(
                f"token id {token} is not in the {self.name} vocabulary, whose ids are 0 to {len(self._table) - 1}; "
                "does the model belong to another tokenizer?"
            )
        return self._table[token]

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of all ids, joined."""
        return b"".join(map(self.token_bytes, tokens))

    def decode(self, tokens: Iterable[int], *, keep_special: bool = False) -> str:
        """The text of the ids; bytes that are not valid UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`.

        `keep_special` writes end of document as `<|endoftext|>`; otherwise ids without text leave no trace.
        """
        if keep_special:
            pieces = (self._special[t].encode() if t in self._special else self.token_bytes(t) for t in tokens)
            return b"".join(pieces).decode("utf-8", "replace")
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def stream(self) -> "StreamDecoder":
        """A fresh decoder for ids that arrive one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns ids into text as they come and holds back the bytes of an unfinished character.

    The pieces joined, with `finish`, equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes, often "" in the middle of a character."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left: "" or U+FFFD for a character that never ended. The decoder is then fresh again."""
        return self._utf8.decode(b"", final=True)


def to_bytes(text: str | bytes) -> bytes:
    """UTF-8 of a str, bytes as they are. Raises TokenizerError for a lone surrogate, since no id sequence could give it
    back."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate ({text[error.start]!a}) at character {error.start}, which is not a "
            "character and has no UTF-8 form; remove it, or read the source with errors='replace'"
        ) from None
