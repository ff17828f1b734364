"""The World tokenizer of RWKV-5, 6 and 7: greedy longest match over UTF-8 bytes, exact for any bytes.

Vocabulary and algorithm: `rwkv_vocab_v20230424.txt` and `rwkv_tokenizer.py` of BlinkDL/ChatRWKV. Two facts make it fast
in plain Python. A token boundary lies wherever no token contains the two bytes around it (nearly always before the
space of the next word), so the text falls into independent chunks. And chunks repeat, so most are a dict look-up.
"""

import ast
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from receptance.errors import TokenizerError

from .base import END_OF_TEXT, Tokenizer, to_bytes

VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"  # the name under which every RWKV tool looks for it
OFFICIAL_TOKENS = 65529  # ids 1 to 65529; the published models have 65536 embedding rows
OFFICIAL_ROWS = 65536
MAX_ID = 65535  # token files store two bytes per id

BLOCK = 1 << 18  # bytes looked at together: bounds memory, stays in the processor's cache
CACHED_CHUNKS = 1 << 17  # about 25 MB when full
CACHED_LENGTH = 64


class WorldTokenizer(Tokenizer):
    """Every byte string can be encoded, `decode_bytes(encode(x)) == x`; id 0 is end of document and never encoded."""

    def __init__(self, tokens: dict[int, bytes], vocab_size: int | None = None):
        """`tokens` maps ids from 1 on to their bytes. `vocab_size` adds ids without text at the end, as the published
        models have: 65536 for the official vocabulary, else by default the highest id + 1."""
        ids = {piece: token for token, piece in tokens.items()}
        missing = [byte for byte in range(256) if bytes([byte]) not in ids]
        if missing:
            raise TokenizerError(
                f"the vocabulary lacks {len(missing)} of the 256 single-byte tokens, {bytes(missing[:1])!r} first; "
                "without them some text could not be encoded: is the file cut short?"
            )
        if vocab_size is None:
            vocab_size = OFFICIAL_ROWS if len(tokens) == OFFICIAL_TOKENS else max(tokens) + 1
        table = [b""] * vocab_size
        for token, piece in tokens.items():
            table[token] = piece
        super().__init__("world", table, eos_id=0, special={0: END_OF_TEXT})
        self._tokens = tokens
        self._is_boundary = _boundaries(tokens)
        self._chunks = _Chunks(ids)

    def encode(self, text: str | bytes) -> list[int]:
        data = to_bytes(text)
        values = np.frombuffer(data, np.uint8)
        ids: list[int] = []
        start = 0  # of the chunk that is not yet closed
        for low in range(0, len(data), BLOCK):
            block = values[low : low + BLOCK + 1].astype(np.uint16)  # one byte of the next block closes the last pair
            cuts = np.flatnonzero(self._is_boundary[block[:-1] << 8 | block[1:]]) + (low + 1)
            ends: list[int] = cuts.tolist()
            if low + BLOCK >= len(data):
                ends.append(len(data))
            chunks = [data[i:j] for i, j in zip([start, *ends], ends)]
            ids.extend(chain.from_iterable(map(self._chunks.__getitem__, chunks)))
            start = ends[-1] if ends else start
        return ids

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / VOCABULARY_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(vocabulary_text(self._tokens).encode("utf-8"))
        return path


def vocabulary_of(tokenizer: Tokenizer) -> dict[int, bytes] | None:
    """Tokens by id of a tokenizer that matches the longest token, the byte tokenizer among them; None for others."""
    if isinstance(tokenizer, WorldTokenizer):
        return tokenizer._tokens
    return {token: bytes([token - 1]) for token in range(1, 257)} if tokenizer.name == "byte" else None


class _Chunks(dict[bytes, tuple[int, ...]]):
    """The ids of every chunk met lately; a missing chunk is matched and, when short, remembered."""

    def __init__(self, ids: dict[bytes, int]):
        super().__init__()
        self.ids = ids
        self.lengths: dict[bytes, tuple[int, ...]] = {}  # first three bytes -> lengths to try, longest first
        for length, piece in sorted({(len(piece), piece[:3]) for piece in ids if len(piece) > 2}):
            self.lengths[piece] = (length, *self.lengths.get(piece, (2, 1)))

    def __missing__(self, chunk: bytes) -> tuple[int, ...]:
        ids = (self.ids[chunk],) if chunk in self.ids else tuple(self.longest_match(chunk))
        if len(chunk) <= CACHED_LENGTH:
            if len(self) >= CACHED_CHUNKS:
                self.clear()  # the words of now come back at once; those of another language need not
            self[chunk] = ids
        return ids

    def longest_match(self, data: bytes) -> list[int]:
        """The tokenizer's definition: at each position the longest token that fits."""
        token_of, lengths_of = self.ids.get, self.lengths.get
        ids: list[int] = []
        position, end = 0, len(data)
        while position < end:
            for length in lengths_of(data[position : position + 3], (2, 1)):
                token = token_of(data[position : position + length])
                if token is not None and position + length <= end:
                    ids.append(token)
                    position += length
                    break
        return ids


def _boundaries(tokens: dict[int, bytes]) -> npt.NDArray[np.bool_]:
    """[65536], index 256 * a + b: whether every text is cut between a byte a and a byte b, as no token contains ab."""
    data = np.frombuffer(b"".join(tokens.values()), np.uint8).astype(np.uint16)
    pairs = data[:-1] << 8 | data[1:]
    lengths = np.fromiter(map(len, tokens.values()), np.int64, len(tokens))
    is_inside = np.ones(len(pairs), np.bool_)
    is_inside[np.cumsum(lengths)[:-1] - 1] = False  # the pair of one token's last and the next one's first byte
    is_boundary = np.ones(65536, np.bool_)
    is_boundary[pairs[is_inside]] = False
    return is_boundary


def read_vocabulary(path: str | Path) -> dict[int, bytes]:
    """Tokens by id from a World vocabulary file: one `<id> <Python str or bytes literal> <length in bytes>` per line.

    Nothing in the file is executed. Raises TokenizerError with the line number when a line is malformed or repeats an
    id or a token.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # not splitlines: a token may be U+2028
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 at byte {error.start}; expected a World vocabulary (.txt)") from None
    if lines[-1] == "":
        del lines[-1]
    tokens: dict[int, bytes] = {}
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            token, piece = _parse_line(line)
            if token in tokens:
                raise ValueError(f"id {token} was already used in line {line_of[tokens[token]]}")
            if piece in line_of:
                raise ValueError(f"the token {piece!r} already stands in line {line_of[piece]}")
        except ValueError as error:
            raise TokenizerError(
                f"{path}: line {number}: {error}; expected '<id> <Python string literal> <length in bytes>', "
                f"as in {VOCABULARY_FILE}"
            ) from None
        tokens[token] = piece
        line_of[piece] = number
    return tokens


def _parse_line(line: str) -> tuple[int, bytes]:
    head, _, rest = line.partition(" ")
    literal, _, tail = rest.rpartition(" ")
    if not (head.isdecimal() and tail.rstrip("\r").isdecimal() and len(line) < 4096):
        raise ValueError(f"found {line[:60]!r}")
    piece = parse_literal(literal)
    if not 1 <= int(head) <= MAX_ID:
        raise ValueError(f"id {head} is outside 1 to {MAX_ID}")
    if len(piece) != int(tail) or not piece:
        raise ValueError(f"the token {piece!r} has {len(piece)} bytes, the line says {int(tail)}")
    return int(head), piece


def parse_literal(literal: str) -> bytes:
    """The bytes of a Python str literal (as UTF-8) or bytes literal. Raises ValueError for anything else.

    Most literals are plain text between quotes; `ast.literal_eval` on all of them would take four times as long.
    """
    inner = literal[1:-1]
    quote = literal[:1]
    if quote in ("'", '"') and literal[1:].endswith(quote) and quote not in inner and "\\" not in inner:
        return inner.encode("utf-8")
    try:
        value = ast.literal_eval(literal)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        value = None
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, bytes):
        return value
    raise ValueError(f"{literal[:60]!r} is not a Python string literal")


def vocabulary_text(tokens: dict[int, bytes]) -> str:
    """The vocabulary in the file format that `read_vocabulary` reads."""
    lines = []
    for token, piece in sorted(tokens.items()):
        try:
            literal = repr(piece.decode("utf-8"))
        except UnicodeDecodeError:
            literal = repr(piece)
        lines.append(f"{token} {literal} {len(piece)}\n")
    return "".join(lines)
