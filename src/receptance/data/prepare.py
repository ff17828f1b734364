"""Text files to one token file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

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

    repeat[i]: how often paths[i] goes in (default once), the whole file each time: a document beside its own copy would
    teach copying. `progress` is told the bytes of text read since last time.
    """
    counts = list(repeat) or [1] * len(paths)
    if len(counts) != len(paths):
        raise ConfigError(f"{len(counts)} repeat counts for {len(paths)} files")
    if any(count < 1 for count in counts):
        raise ConfigError(f"repeat = {counts}: each count must be at least 1; leave a file out instead")
    writer = BinIdxWriter(prefix, tokenizer.vocab_size)
    n_bytes = 0
    for path, count in zip(paths, counts):
        again: list[np.ndarray] = []
        for batch in _batches(documents(path)):
            for tokens in tokenizer.encode_batch(batch):
                document: np.ndarray = np.array([*tokens, tokenizer.eos_id], writer.dtype)
                writer.add(document)
                if count > 1:
                    again.append(document)
            n_bytes += (size := sum(len(text.encode()) for text in batch))
            progress(size)
        for _ in range(count - 1):
            for document in again:
                writer.add(document)
    if not n_bytes:
        raise ConfigError(f"no text in {[str(path) for path in paths]}")
    writer.close()
    return BinIdx(prefix)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        yield batch
