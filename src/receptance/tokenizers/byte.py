"""The byte tokenizer: no vocabulary to train or ship, and nothing that it cannot encode."""

from pathlib import Path

import numpy as np

from .base import END_OF_TEXT, Tokenizer, to_bytes
from .world import VOCABULARY_FILE, vocabulary_text

BYTE_TOKENS = {byte + 1: bytes([byte]) for byte in range(256)}


class ByteTokenizer(Tokenizer):
    """257 ids: a byte's id is its value + 1, as in the World vocabulary, and 0 is end of document."""

    def __init__(self) -> None:
        super().__init__("byte", [b"", *BYTE_TOKENS.values()], eos_id=0, special={0: END_OF_TEXT})

    def encode(self, text: str | bytes) -> list[int]:
        ids: list[int] = (np.frombuffer(to_bytes(text), np.uint8).astype(np.int32) + 1).tolist()
        return ids

    def save(self, folder: str | Path) -> Path:
        """Written as a World vocabulary of the 256 single bytes, which any World tokenizer reads to the same ids."""
        path = Path(folder) / VOCABULARY_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(vocabulary_text(BYTE_TOKENS).encode("utf-8"))
        return path
