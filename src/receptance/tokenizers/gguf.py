"""Tokenizers in the metadata of GGUF files: the World vocabulary as llama.cpp keeps it, and a whole tokenizer.json.

Fields (ggml-org/ggml, docs/gguf.md): `tokenizer.ggml.model` and the lists beside it are what llama.cpp reads;
`tokenizer.huggingface.json` is a tokenizer.json in full, which says more than those can.
"""

import json
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from receptance.errors import CheckpointError, TokenizerError
from receptance.gguf.reader import STRING, Reader, StoredList, read_header

from .base import Tokenizer
from .world import vocabulary_of

if TYPE_CHECKING:
    from receptance.gguf.writer import Value

WORLD_MODEL = "rwkv"
JSON_FIELD = "tokenizer.huggingface.json"
NORMAL, CONTROL, UNUSED = 1, 3, 5  # tokenizer.ggml.token_type
WORLD_END_OF_TURN = 261  # "\n\n", with which a World model's turn ends

ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.?))", re.DOTALL)
NAMED = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\", b"'": b"'", b'"': b'"'}

# How llama.cpp cuts text into words before merging, by the pattern of a tokenizer.json. For the pattern of our own
# tokenizers, which cuts numbers into two digits, it has none: llama3's three digits are closest.
GPT2_WORDS, LLAMA3_WORDS = "gpt-2", "llama-bpe"


def read_gguf_tokens(path: str | Path) -> tuple[dict[int, bytes], int] | str:
    """Of a World vocabulary the tokens by id and its size (with padding); of another tokenizer its tokenizer.json.

    llama.cpp's converter stores each token as `repr` of its bytes without the quotes, id 0 as "<s>" and padding as
    "[PAD<id>]". Only metadata is read. Raises TokenizerError when the file has neither or is damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise TokenizerError(f"{path}: the file is empty; expected GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                fields = read_header(data, path).fields
                pieces = fields.get("tokenizer.ggml.tokens")
                is_list = isinstance(pieces, StoredList) and pieces.kind == STRING
                texts = Reader(data, path).strings(pieces) if is_list else None  # type: ignore[arg-type]
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    model, whole = fields.get("tokenizer.ggml.model"), fields.get(JSON_FIELD)
    if model != WORLD_MODEL and isinstance(whole, str):
        return whole
    if model != WORLD_MODEL:
        found = "no such field" if model is None else repr(model)
        raise TokenizerError(
            f"{path}: tokenizer.ggml.model is {found}, expected 'rwkv' (the World tokenizer), or a tokenizer.json in "
            f"{JSON_FIELD}; give the tokenizer separately, as a tokenizer.json or by name"
        )
    if texts is None:
        raise TokenizerError(f"{path}: the list tokenizer.ggml.tokens is missing; convert the model again")
    tokens: dict[int, bytes] = {}
    id_of: dict[bytes, int] = {}
    for token, text in enumerate(texts):
        if token == 0 or text == b"[PAD%d]" % token:
            continue
        piece = _unescape(text, path, token)
        if piece in id_of:
            raise TokenizerError(f"{path}: tokens {id_of[piece]} and {token} are both {piece!r}; the file is damaged")
        tokens[token] = piece
        id_of[piece] = token
    return tokens, len(texts)


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


def has_tokenizer(fields: Mapping[str, object]) -> bool:
    """Whether a GGUF file's metadata holds a tokenizer that `tokenizer` reads."""
    return fields.get("tokenizer.ggml.model") == WORLD_MODEL or isinstance(fields.get(JSON_FIELD), str)


# Writing -------------------------------------------------------------------------------------------------------------


def gguf_fields(tokenizer: Tokenizer | None, vocab_size: int) -> "tuple[dict[str, Value], str]":
    """The metadata for a model with so many embedding rows, and what llama.cpp will not do with it ("" = nothing).

    Raises TokenizerError for a tokenizer with more ids than the model.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}, "it has no tokenizer: llama.cpp takes and gives token ids only"
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model {vocab_size}: it is another's"
        )
    vocabulary = vocabulary_of(tokenizer)
    if vocabulary is not None:
        return _world_fields(vocabulary, vocab_size), ""
    return _bpe_fields(tokenizer.json_text(), vocab_size)  # type: ignore[attr-defined]


def _world_fields(vocabulary: dict[int, bytes], vocab_size: int) -> "dict[str, Value]":
    """As llama.cpp's converter writes them."""
    texts = [
        b"<s>" if token == 0 else repr(vocabulary[token])[2:-1].encode() if token in vocabulary else b"[PAD%d]" % token
        for token in range(vocab_size)
    ]
    kinds = [CONTROL if token == 0 else NORMAL if token in vocabulary else UNUSED for token in range(vocab_size)]
    fields: dict[str, Value] = {
        "tokenizer.ggml.model": WORLD_MODEL,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    if vocabulary.get(WORLD_END_OF_TURN) == b"\n\n":
        fields |= {"tokenizer.ggml.eot_token_id": WORLD_END_OF_TURN, "tokenizer.chat_template": "rwkv-world"}
    return fields


def _bpe_fields(text: str, vocab_size: int) -> "tuple[dict[str, Value], str]":
    """llama.cpp's own byte-level BPE where it can cut words as this tokenizer does, or nearly."""
    inner = json.loads(text)
    model, words = inner["model"], _words(inner.get("pre_tokenizer"))
    whole: dict[str, Value] = {JSON_FIELD: text}
    if words is None or inner.get("normalizer") is not None or model.get("type") != "BPE":
        return {"tokenizer.ggml.model": "none", **whole}, (
            "llama.cpp has no form of this tokenizer: there the model takes and gives token ids only"
        )
    texts = [b"[PAD%d]" % token for token in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for piece, token in model["vocab"].items():
        texts[token], kinds[token] = piece.encode(), NORMAL
    for entry in inner.get("added_tokens", []):
        texts[entry["id"]], kinds[entry["id"]] = entry["content"].encode(), CONTROL if entry["special"] else NORMAL
    end = next((entry["id"] for entry in inner.get("added_tokens", []) if entry["content"] == "<|endoftext|>"), 0)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    fields: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": words,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [merge.encode() for merge in merges],
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }
    is_exact = words == GPT2_WORDS
    return fields | whole, "" if is_exact else (
        "llama.cpp cuts numbers of three and more digits unlike this tokenizer; all else is the same there"
    )


def _words(pre_tokenizer: object) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts text into words."""
    from .bpe import WORDS

    parts = [pre_tokenizer] if isinstance(pre_tokenizer, dict) else []
    if parts and parts[0].get("type") == "Sequence":
        parts = parts[0].get("pretokenizers", [])
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    if len(parts) == 1 and parts[0].get("use_regex", True):
        return GPT2_WORDS
    if len(parts) == 2 and parts[0].get("pattern") == {"Regex": WORDS} and not parts[1].get("use_regex", True):
        return LLAMA3_WORDS
    return None
