import lzma
import random
from pathlib import Path

import pytest

from receptance.tokenizers import BPETokenizer, Tokenizer, tokenizer, train_bpe

STORY = (
    "Once upon a time there was a little fox who didn't like the 12 cold winters.\n\n"
    '"We\'ll see," said the owl — naïve café, 日本語 and 한국어 — "what 1984 brings!"\t  \r\n'
)


@pytest.fixture(scope="session")
def story() -> str:
    return STORY


@pytest.fixture(scope="session")
def world() -> Tokenizer:
    return tokenizer("world")


@pytest.fixture(scope="session")
def pile_file(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pile") / "20B_tokenizer.json"
    path.write_bytes(lzma.decompress((shared / "data/tokenizer/20B_tokenizer.json.xz").read_bytes()))
    return path


@pytest.fixture(scope="session")
def pile(pile_file: Path) -> Tokenizer:
    return tokenizer(pile_file)


@pytest.fixture(scope="session")
def bpe() -> BPETokenizer:
    return train_bpe([STORY] * 3, 400)


@pytest.fixture(scope="session")
def fuzzed() -> list[str]:
    """10,000 strings of words, spaces, code, every script, emoji sequences and control characters; no surrogates."""
    rng = random.Random(0)
    pieces = [
        *STORY.split(" "),
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\0",
        "<|endoftext|>",
        "<|padding|>",
        "é",
        "👨‍👩‍👧",
    ]

    def character() -> str:
        code = rng.randrange(rng.choice([0x80, 0x800, 0x3000, 0x10000, 0x110000]))
        return chr(code) if not 0xD800 <= code < 0xE000 else "�"

    return [
        "".join(rng.choice(pieces) if rng.random() < 0.5 else character() for _ in range(rng.randrange(24)))
        for _ in range(10_000)
    ]
