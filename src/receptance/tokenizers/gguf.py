"""The World vocabulary out of a GGUF file's metadata (format: ggml-org/ggml, docs/gguf.md, versions 2 and 3)."""

import mmap
import re
import struct
from pathlib import Path

from receptance.errors import TokenizerError

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
STRING, ARRAY = 8, 9
MAX_NESTING = 4

ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.?))", re.DOTALL)
NAMED = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\", b"'": b"'", b'"': b'"'}


def read_gguf_tokens(path: str | Path) -> tuple[dict[int, bytes], int]:
    """Tokens by id and the vocabulary's size (with padding) from a GGUF file with `tokenizer.ggml.model` = "rwkv".

    llama.cpp's converter stores each token as `repr` of its bytes without the quotes, id 0 as "<s>" and padding as
    "[PAD<id>]". Only metadata is read. Raises TokenizerError when the file is not such a file or is damaged.
    """
    path = Path(path)
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise TokenizerError(f"{path}: the file is empty; expected GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields = _Reader(data, path).tokenizer_fields()
    model, pieces = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if model != b"rwkv":
        found = repr(model.decode("utf-8", "replace")) if isinstance(model, bytes) else "no such field"
        raise TokenizerError(
            f"{path}: tokenizer.ggml.model is {found}, expected 'rwkv' (the World tokenizer); "
            "give the tokenizer separately, as a tokenizer.json or by name"
        )
    if not isinstance(pieces, list):
        raise TokenizerError(f"{path}: the list tokenizer.ggml.tokens is missing; convert the model again")
    tokens: dict[int, bytes] = {}
    id_of: dict[bytes, int] = {}
    for token, text in enumerate(pieces):
        if token == 0 or text == b"[PAD%d]" % token:
            continue
        piece = _unescape(text, path, token)
        if piece in id_of:
            raise TokenizerError(f"{path}: tokens {id_of[piece]} and {token} are both {piece!r}; the file is damaged")
        tokens[token] = piece
        id_of[piece] = token
    return tokens, len(pieces)


def _unescape(text: bytes, path: Path, token: int) -> bytes:
    def value(match: re.Match[bytes]) -> bytes:
        digits, name = match.groups()
        return bytes.fromhex(digits.decode()) if digits else NAMED[name]

    try:
        piece = ESCAPE.sub(value, text) if b"\\" in text else text
    except KeyError:
        piece = b""
    if not piece:
        raise TokenizerError(f"{path}: token {token} is {text!r}, expected escaped text such as '\\n' or '\\xe4'")
    return piece


class _Reader:
    """A position in the file that never leaves it."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data = data
        self.path = path
        self.position = 0

    def tokenizer_fields(self) -> dict[str, bytes | list[bytes]]:
        """The metadata fields whose names begin with `tokenizer.ggml.` and that are strings or lists of strings."""
        if self.take(4) != b"GGUF":
            raise TokenizerError(f"{self.path}: begins with {self.data[:4]!r}, expected b'GGUF'; is it a GGUF file?")
        version = self.number("<I")
        if version not in (2, 3):
            raise TokenizerError(
                f"{self.path}: GGUF version {version}, expected 2 or 3 (little-endian); convert the model again"
            )
        self.number("<Q")  # the number of tensors
        fields: dict[str, bytes | list[bytes]] = {}
        for _ in range(self.number("<Q")):  # each step reads on, so a false count ends at the end of the file
            key = self.string().decode("utf-8", "replace")
            value = self.value(self.number("<I"), keep=key.startswith("tokenizer.ggml."))
            if value is not None:
                fields[key] = value
        return fields

    def value(self, kind: int, keep: bool, depth: int = 0) -> bytes | list[bytes] | None:
        """Read a string or a list of strings; step over everything else."""
        if kind == STRING and keep:
            return self.string()
        if kind == STRING:
            self.skip(self.number("<Q"))
        elif kind == ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner == STRING and keep:
                return [self.string() for _ in range(count)]
            self.skip_list(inner, count, depth)
        else:
            self.skip(self.size_of(kind))
        return None

    def skip_list(self, inner: int, count: int, depth: int) -> None:
        if depth == MAX_NESTING:
            raise TokenizerError(f"{self.path}: lists nested deeper than {MAX_NESTING}; the file is damaged")
        if inner in (STRING, ARRAY):
            for _ in range(count):
                self.value(inner, keep=False, depth=depth + 1)
        else:
            self.skip(self.size_of(inner) * count)

    def string(self) -> bytes:
        return self.take(self.number("<Q"))

    def number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return int(value)

    def size_of(self, kind: int) -> int:
        if kind not in SIZES:
            raise TokenizerError(f"{self.path}: unknown value type {kind} at byte {self.position}; the file is damaged")
        return SIZES[kind]

    def take(self, size: int) -> bytes:
        start = self.position
        self.skip(size)
        return self.data[start : self.position]

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.position:
            raise TokenizerError(
                f"{self.path}: the metadata asks for {size} bytes at byte {self.position} of {len(self.data)}; "
                "the file is cut short or damaged, fetch it again"
            )
        self.position += size
