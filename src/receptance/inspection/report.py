"""Everything about how a model reads one text, in a folder: pictures, numbers, one interactive page."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from receptance.atomic import replacing
from receptance.errors import ConfigError
from receptance.inspection import pictures
from receptance.inspection.attribution import attribute
from receptance.inspection.measures import Measured, measure
from receptance.inspection.page import write_page
from receptance.inspection.record import Recording, record
from receptance.inspection.trace import Trace, trace
from receptance.models import RWKV
from receptance.tokenizers import Tokenizer

LONGEST = 512  # tokens: attributions are T² numbers a layer


@dataclass(frozen=True)
class Fact:
    """A text that a model should complete with `answer`, and the words in it that the answer hangs on."""

    subject: str
    answer: str


def write_report(model: RWKV, tok: Tokenizer, text: str, out: Path, title: str, fact: Fact | None = None) -> list[Path]:
    """Pictures (PNG and SVG), report.json and report.html in `out`; the files, the page first.

    Raises ConfigError for a text of no tokens or of more than LONGEST, or without the subject.
    """
    tokens = tok.encode(text)
    if not 2 <= len(tokens) <= LONGEST:
        raise ConfigError(f"a text of 2 to {LONGEST} tokens is needed; this one has {len(tokens)}")
    subject = positions(tok, text, tokens, fact.subject) if fact else range(0)
    if fact and not tok.encode(fact.answer):
        raise ConfigError("the answer has no tokens")
    out.mkdir(parents=True, exist_ok=True)
    model = model if model.dtype in (torch.float32, torch.float64) else model.float()
    vocabulary = [shown(tok, i) for i in range(model.config.vocab_size)]
    words = [vocabulary[i] for i in tokens]
    recording = record(model, tokens)
    attribution = attribute(recording)
    measured = measure(recording, attribution)
    names = pictures.draw_all(recording, attribution, measured, words, out)
    found = None
    if fact:
        found = trace(model, tokens, tok.encode(fact.answer), subject)
        pictures.draw_trace(found, words, subject, out / "trace")
        names.append("trace")
    with replacing(out / "report.json") as file:
        file.write(json.dumps(numbers(recording, measured, words, found), indent=1, ensure_ascii=False).encode())
    write_page(out / "report.html", recording, attribution, measured, words, vocabulary, title)
    return [out / "report.html", out / "report.json", *(out / f"{name}.png" for name in names)]


def shown(tok: Tokenizer, token: int) -> str:
    """One token as text: what is no text alone, as bytes; one without text, as its number."""
    if token >= tok.vocab_size:
        return f"<{token}>"
    raw = tok.token_bytes(token)
    try:
        return raw.decode() or f"<{token}>"
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in raw)


def positions(tok: Tokenizer, text: str, tokens: list[int], part: str) -> range:
    """The tokens of `text` that hold any of `part`, at its first place."""
    first = text.encode().find(part.encode()) if part else -1
    if first < 0:
        raise ConfigError(f"the subject {part!r} does not stand in the text")
    last, at, held_by = first + len(part.encode()), 0, []
    for i, token in enumerate(tokens):
        size = len(tok.token_bytes(token))
        if at < last and at + size > first:
            held_by.append(i)
        at += size
    return range(held_by[0], held_by[-1] + 1)


def numbers(recording: Recording, measured: Measured, words: list[str], found: Trace | None) -> dict[str, object]:
    """What the pictures show, layer by layer."""
    layers: list[dict[str, object]] = []
    for i in range(len(recording.layers)):
        if i not in measured.held:
            layers.append({"layer": i, "time_mix": False})
            continue
        lives, state = measured.lives[i], measured.held[i]
        quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=lives.dtype, device=lives.device)
        layers.append(
            {
                "layer": i,
                "half_life_tokens_10_50_90_percent": [round(x, 3) for x in lives.quantile(quantiles).tolist()],
                "reach_tokens_mean": float(measured.reach[i].mean()),
                "state_norm_at_end": float(state.norm[-1].mean()),
                "state_rank_at_end": None if state.rank is None else float(state.rank[-1].mean()),
                "written_mean": float(measured.written[i].mean()),
                "removed_mean": float(measured.removed[i].mean()),
            }
        )
    report: dict[str, object] = {"tokens": words, "layers": layers}
    if found:
        report["trace"] = {
            "clean": found.clean,
            "corrupted": found.corrupted,
            "hidden": found.hidden.tolist(),
            "memory": found.memory.tolist(),
        }
    return report
