"""One self-contained interactive HTML page of a recording: no network, no other file."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from receptance.atomic import replacing
from receptance.inspection.attribution import Attribution
from receptance.inspection.measures import Measured
from receptance.inspection.record import Recording

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: Path,
    recording: Recording,
    attribution: Attribution,
    measured: Measured,
    words: list[str],
    vocabulary: list[str],
    title: str,
) -> None:
    """words: the tokens as text; vocabulary: the text of every id."""
    data = page_data(recording, attribution, measured, words, vocabulary, title)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    with replacing(path) as file:
        file.write(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", text).encode())


def page_data(
    recording: Recording,
    attribution: Attribution,
    measured: Measured,
    words: list[str],
    vocabulary: list[str],
    title: str,
) -> dict[str, Any]:
    chances = recording.logits.float().softmax(-1)
    best = chances.topk(min(5, chances.shape[-1]))
    guesses = [
        [[vocabulary[i], _short(p)] for i, p in zip(ids, ps)]
        for ids, ps in zip(best.indices.tolist(), best.values.tolist())
    ]
    targets = [
        {"word": vocabulary[i], "chance": _short(p)}
        for i, p in zip(attribution.targets.tolist(), chances.gather(-1, attribution.targets[:, None])[:, 0].tolist())
    ]
    scale = attribution.past.abs().amax((1, 2)).clamp(min=1e-12)
    past = (attribution.past / scale[:, None, None] * 127).round().to(torch.int8).cpu()
    lens = measured.lens
    matrix = recording.layers[next(iter(measured.held))].matrix
    decays = [(i, x.exp().sort().values) for i, x in measured.decay.items()]
    return {
        "title": title,
        "facts": f"RWKV-{recording.model.config.version}, {len(recording.layers)} layers of width "
        f"{recording.model.config.n_embd}; {len(words)} tokens, read from an empty state",
        "layers": len(recording.layers),
        "words": words,
        "past": base64.b64encode(past.contiguous().numpy().tobytes()).decode(),
        "scale": _numbers(scale),
        "targets": targets,
        "guesses": guesses,
        "parts": [
            {
                "start": _short(attribution.start[t].sum()),
                "own": _short(attribution.own[t].sum()),
                "ffn": _short(attribution.ffn[t].sum()),
                "embedding": _short(attribution.embedding[t]),
                "constant": _short(attribution.constant[t]),
                "total": _short(attribution.total[t]),
            }
            for t in range(len(words))
        ],
        "lens": {
            "words": [[vocabulary[i] for i in row] for row in lens.tokens.tolist()],
            "chances": [_numbers(row) for row in lens.chances],
        },
        "maps": _maps(recording, measured, matrix),
        "decay": [(i, _numbers(x[:: max(1, len(x) // 128)])) for i, x in decays],
        "reach": [(i, _numbers(x.flatten()[:256])) for i, x in measured.reach.items()],
    }


def _maps(recording: Recording, measured: Measured, matrix: bool) -> dict[str, Any]:
    """Layer × position tables by name; a layer without a state has null."""
    found = measured.held
    positions = next(iter(found.values())).positions
    every = list(range(len(recording.tokens)))

    def table(rows: dict[int, Tensor], at: list[int]) -> dict[str, Any]:
        layers = range(len(recording.layers))
        return {"positions": at, "values": [_numbers(rows[i].mean(-1)) if i in rows else None for i in layers]}

    maps = {"norm of the state": table({i: x.norm for i, x in found.items()}, positions)}
    if matrix:
        ranks = {i: x.rank for i, x in found.items() if x.rank is not None}
        maps["effective rank of the state"] = table(ranks, positions)
    maps["written by each token"] = table(measured.written, every)
    if matrix:
        maps["removed at each token"] = table(measured.removed, every)
    return maps


def _short(x: float | Tensor) -> float:
    return float(f"{float(x):.4g}")


def _numbers(x: Tensor) -> list[float]:
    return [_short(value) for value in x.tolist()]
