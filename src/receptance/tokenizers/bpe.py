"""Byte-level BPE through the `tokenizers` library: the Pile's 20B vocabulary of RWKV-4, and home-made ones."""

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from receptance.errors import TokenizerError

from .base import END_OF_TEXT, Tokenizer, to_bytes

if TYPE_CHECKING:
    import tokenizers

PILE_SIZE = 50277

# The words of GPT-4's pre-tokeniser (openai/tiktoken, cl100k_base), with numbers cut into two digits instead of three:
# small vocabularies have better uses for a thousand numbers.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class BPETokenizer(Tokenizer):
    """A tokenizer.json with a byte-level vocabulary that contains `<|endoftext|>`.

    Special tokens are never produced from text: `<|endoftext|>` in a text is encoded as those 13 characters, unlike the
    `tokenizers` library's default. For a vocabulary trained here `decode(encode(x)) == x` for every str. The Pile's
    tokenizer normalises to NFC first: there it holds for text that is in NFC.
    """

    def __init__(self, inner: "tokenizers.Tokenizer"):
        """Raises TokenizerError when the vocabulary is not byte-level or has no `<|endoftext|>`."""
        eos_id = inner.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise TokenizerError(f"the vocabulary has no {END_OF_TEXT} token; RWKV needs one to separate documents")
        vocabulary = inner.get_vocab(with_added_tokens=True)
        added = inner.get_added_tokens_decoder()
        special = {token: entry.content for token, entry in added.items() if entry.special}
        alphabet = _byte_alphabet()
        table = [b""] * (max(vocabulary.values()) + 1)
        for text, token in vocabulary.items():
            if token in special:
                continue
            if token in added:
                table[token] = text.encode("utf-8")
                continue
            try:
                table[token] = codecs.charmap_encode(text, "strict", alphabet)[0]
            except UnicodeEncodeError:
                raise TokenizerError(
                    f"token {token} is {text!r}, expected letters that stand for bytes; "
                    "only byte-level BPE vocabularies (GPT-2 style) can be used"
                ) from None
        super().__init__("pile" if len(table) == PILE_SIZE else "bpe", table, eos_id, special)
        inner.encode_special_tokens = True
        self._inner = inner

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`. Raises TokenizerError for bytes that are not UTF-8: this kind works on characters."""
        # encode() would hold the interpreter's lock, for seconds where a text is long; encode_batch() lets go of it
        return self._inner.encode_batch([_to_str(text)], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Iterable[str | bytes]) -> list[list[int]]:
        """`encode` for many texts, on all processor cores."""
        encoded = self._inner.encode_batch([_to_str(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.json_text(), encoding="utf-8")
        return path

    def json_text(self) -> str:
        """The tokenizer.json."""
        return self._inner.to_str()  # type: ignore[no-any-return]


def read_bpe(path: str | Path) -> BPETokenizer:
    """A BPE tokenizer from a tokenizer.json. Raises TokenizerError when it is not one."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
    return parse_bpe(text, path)


def parse_bpe(text: str, path: Path) -> BPETokenizer:
    """`read_bpe` of text that came out of `path`."""
    import tokenizers

    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
    try:
        return BPETokenizer(inner)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> BPETokenizer:
    """Learn a byte-level BPE vocabulary: id 0 is `<|endoftext|>`, ids 1 to 256 the single bytes, then the merges.

    No normaliser and no added space. The same texts in the same order give the same file. `vocab_size` (at least 257;
    4,096 to 32,768 suit English) is an upper limit: a small corpus may hold fewer pairs seen `min_frequency` times, so
    take the model's size from the result.
    """
    if vocab_size < 257:
        raise TokenizerError(f"vocab_size is {vocab_size}, expected at least 257: end of document and the 256 bytes")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((_to_str(text) for text in texts), trainer)
    return BPETokenizer(inner)


def _to_str(text: str | bytes) -> str:
    try:
        return to_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"the bytes are not UTF-8 at byte {error.start} ({error.object[error.start : error.start + 4]!r}); a BPE "
            "tokenizer needs characters: decode them first, or use the world or byte tokenizer"
        ) from None


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's letter for each byte, reversed: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: byte for byte in plain} | {0x100 + i: byte for i, byte in enumerate(others)}
