"""Text files to one token file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from receptance.data.binidx import BinIdx, BinIdxWriter
from receptance.data.text import documents
from receptance.errors import ConfigError
from receptance.tokenizers.base import Tokenizer

BATCH = 256  # documents tokenised at a time


def prepare(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    repeat: Sequence[int] = (),
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> BinIdx:
    """Tokenise every document of `paths` into `prefix.bin/.idx`, each followed by the end-of-document token.

    repeat[i]: how often paths[i] goes in (default once). `progress` is told the bytes of text read since last time.
    """
    writer = BinIdxWriter(prefix, tokenizer.vocab_size)
    counts = list(repeat) or [1] * len(paths)
    if len(counts) != len(paths):
        raise ConfigError(f"{len(counts)} repeat counts for {len(paths)} files")
    n_bytes = 0
    for path, count in zip(paths, counts):
        for batch in _batches(documents(path)):
            for text, tokens in zip(batch, tokenizer.encode_batch(batch)):
                for _ in range(count):
                    writer.add([*tokens, tokenizer.eos_id])
                n_bytes += len(text.encode())
            progress(sum(len(text.encode()) for text in batch))
    if not n_bytes:
        raise ConfigError(f"no text in {[str(path) for path in paths]}")
    writer.close()
    return BinIdx(prefix)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        yield batch
