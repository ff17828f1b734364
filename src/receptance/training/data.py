"""What a run trains on: texts tokenised once into its folder, token files as they are, mixed by weight."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path

import numpy as np

from receptance.data import (
    ORDERS,
    BinIdx,
    Contiguous,
    Documents,
    Mixture,
    Packing,
    Progress,
    Rows,
    prepare,
    read_manifest,
    tokenizer_identity,
)
from receptance.data.binidx import beside
from receptance.data.order import keyed
from receptance.errors import ConfigError
from receptance.tokenizers.base import Tokenizer
from receptance.training.config import DataConfig, TrainConfig

Message = Callable[[str], None]
LOOKED_AT, BLOCK = 64, 1 << 20  # blocks of tokens whose ids are checked, so many each
MESSAGE_SECONDS = 10.0  # between words about a long tokenisation


@dataclass(frozen=True)
class Source:
    """One part of the mixture."""

    name: str
    tokens: BinIdx
    packing: Packing


class TrainingData:
    """Rows by sample number. Sample i is the same whatever the batch size, the number of processes and the step that
    asks, so that rank r of n takes its own part of `range(step * batch_size, (step + 1) * batch_size)`."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[int]):
        self.sources, self.mixture = list(sources), Mixture(weights)

    @property
    def n_tokens(self) -> int:
        return sum(len(source.tokens.tokens) for source in self.sources)

    def rows(self, samples: Sequence[int]) -> Rows:
        """Inputs, targets and resets of some samples, in their order."""
        places = [self.mixture.locate(sample) for sample in samples]
        parts: dict[int, Rows] = {}
        for source in {source for source, _ in places}:
            mine = [sample for s, sample in places if s == source]
            parts[source] = self.sources[source].packing.rows(mine)
        if len(parts) == 1:
            return next(iter(parts.values()))
        taken = dict.fromkeys(parts, 0)
        order = []
        for source, _ in places:
            order.append((source, taken[source]))
            taken[source] += 1
        inputs = np.stack([parts[source].inputs[i] for source, i in order])
        targets = np.stack([parts[source].targets[i] for source, i in order])
        resets = [part[i] for source, i in order if (part := parts[source].resets) is not None]
        return Rows(inputs, targets, np.stack(resets) if resets else None)

    def report(self, samples: int) -> list[str]:
        """A line a source: its tokens, its share, and how often a run of so many samples passes over it."""
        lines = []
        for i, source in enumerate(self.sources):
            passes = self.mixture.count(i, samples) / source.packing.per_epoch
            share = self.mixture.weights[i] / sum(self.mixture.weights)
            line = f"{source.name}: {len(source.tokens.tokens):,} tokens, {share:.1%} of the rows, {passes:,.2f} passes"
            if isinstance(source.packing, Documents):
                line += f", rows {source.packing.filled:.2%} full"
            lines.append(line)
        return lines


def open_data(
    config: TrainConfig, out: Path, tokenizer: Tokenizer, message: Message
) -> tuple[TrainingData, dict[str, BinIdx]]:
    """The training data, and the validation sets by name. Texts are tokenised into `out`/data unless that was done."""
    data, folder = config.data, out / "data"
    found = _train_files(data, folder, tokenizer, message)
    sources = []
    for i, (name, tokens) in enumerate(found):
        seed = config.run.seed if len(found) == 1 else keyed(config.run.seed, i)
        sources.append(Source(name, tokens, _packing(config, name, tokens, tokenizer, seed)))
    if data.weights:
        shares = [Fraction(str(weight)) for weight in data.weights]
        scale = lcm(*(share.denominator for share in shares))
        weights = [int(share * scale) for share in shares]
    else:
        repeats = dict(zip(data.train, data.repeat))
        weights = [len(tokens.tokens) * repeats.get(name, 1) for name, tokens in found]
    valid = {name: _open([path], folder / name, (), data, tokenizer, message) for name, path in data.valid.items()}
    return TrainingData(sources, weights), valid


def _train_files(data: DataConfig, folder: Path, tokenizer: Tokenizer, message: Message) -> list[tuple[str, BinIdx]]:
    """With weights, one for each entry of data.train; else one for all texts together and one for each token file."""
    if data.weights and data.repeat:
        raise ConfigError("data.weights and data.repeat both say how much of each file to take: give one of them")
    if data.repeat and len(data.repeat) != len(data.train):
        raise ConfigError(f"{len(data.repeat)} repeat counts for {len(data.train)} files")
    if data.weights:
        return [
            (name, _open([name], folder / f"train-{i}", (), data, tokenizer, message))
            for i, name in enumerate(data.train)
        ]
    texts = [name for name in data.train if not is_token_file(data, name)]
    repeat = [count for name, count in zip(data.train, data.repeat) if name in texts]
    found = [(name, _open([name], folder, (), data, tokenizer, message)) for name in data.train if name not in texts]
    if texts:
        found.insert(0, ("texts", _open(texts, folder / "train", repeat, data, tokenizer, message)))
    return found


def is_token_file(data: DataConfig, name: str) -> bool:
    return beside(Path(data.root) / name, ".idx").exists()


def source_path(data: DataConfig, name: str) -> str:
    return name if name.startswith("hf:") else str(Path(data.root) / name)


def _open(names: Sequence[str], prefix: Path, repeat: Sequence[int], data: DataConfig, tokenizer: Tokenizer,
          message: Message) -> BinIdx:  # fmt: skip
    """A token file as it is, or texts as tokens at `prefix`."""
    if is_token_file(data, names[0]):
        tokens = BinIdx(Path(data.root) / names[0])
        _require_tokenizer(tokens, tokenizer)
        return tokens
    paths = [source_path(data, name) for name in names]
    is_made = beside(prefix, ".idx").exists()
    is_gone = any(not path.startswith("hf:") and not Path(path).exists() for path in paths)
    if is_made and (is_gone or read_manifest(prefix) is None):
        return BinIdx(prefix)  # the tokens are all that a run needs
    if not is_made:
        message(f"tokenising {', '.join(names)}")
    return prepare(
        paths, tokenizer, prefix, repeat=repeat, column=data.column, separator=data.separator, skip_bad=data.skip_bad,
        processes=data.processes, progress=_teller(message),
    )  # fmt: skip


def _require_tokenizer(data: BinIdx, tokenizer: Tokenizer) -> None:
    """By the manifest, if there is one; else by the ids of some blocks of tokens, which must exist."""
    made_from = read_manifest(data.prefix)
    if made_from is not None and made_from.tokenizer != (mine := tokenizer_identity(tokenizer)):
        raise ConfigError(f"{data.prefix}: was made with the tokenizer {made_from.tokenizer}, data.tokenizer is {mine}")
    n = len(data.tokens)
    for start in range(0, n, max(n // LOOKED_AT, BLOCK)):
        block = data.tokens[start : start + BLOCK]
        for token in (int(block.min()), int(block.max())):
            if not 0 <= token < tokenizer.vocab_size:
                raise ConfigError(f"{data.prefix}: holds token {token}; the tokenizer has {tokenizer.vocab_size} ids")


def _teller(message: Message) -> Callable[[Progress], None]:
    told = time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told > MESSAGE_SECONDS:
            told = time.monotonic()
            message(f"tokenised {progress.read / max(progress.total, 1):.0%}: {progress.tokens:,} tokens")

    return tell


def _packing(config: TrainConfig, name: str, tokens: BinIdx, tokenizer: Tokenizer, seed: int) -> Packing:
    data, ctx_len = config.data, config.run.ctx_len
    if data.packing == "documents":
        return Documents(tokens, ctx_len, seed, tokenizer.eos_id)
    try:
        order = ORDERS[data.order](len(tokens.tokens), ctx_len, seed)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}; lower run.ctx_len, or set data.packing = 'documents'") from None
    return Contiguous(tokens, ctx_len, order, with_resets=data.packing == "resets")
