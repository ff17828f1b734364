"""A training step of the embedded model's shape on the CPU: the trainer's against the naive autograd loop.

`python bench/train_cpu.py [--versions 4 5.2 6 7] [--out FILE]`: forward, loss, backward, clipping and AdamW in float32,
six layers of 256 channels, 5,120 tokens of vocabulary. "naive" computes every token's products
at once and loops over time in the recurrence, with all logits and their cross entropy; "chunk" has the chunked operator
in its place, "trainer" the loss in blocks as well: the step that `receptance train` takes. "stepwise" runs the whole
model token after token, as a recurrent network does that is not parallel in time.
Where flash-linear-attention is installed (`pip install fla-core einops`), "fla" has its plain torch form in the
operator's place: its loop for RWKV-6, for RWKV-7 its chunks, which are faster than its loop. Loss and gradients must
agree first, or there is no report. It ends in one line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import (
    Peaks,
    Row,
    Sample,
    lively_model,
    load,
    machine,
    matrix_elements,
    n_calm,
    rounded,
    timed,
    undisturbed,
)
from torch import Tensor

from receptance.models import RWKV, VERSIONS
from receptance.training.config import OptimConfig
from receptance.training.loss import language_model_loss
from receptance.training.optim import build_optimizer, set_learning_rate

VOCAB, LAYERS, WIDTH = 5_120, 6, 256
FORMS = ("trainer", "chunk", "naive", "stepwise")


class Fla:
    """The operators of flash-linear-attention in plain torch, whose states are key × value. See `receptance.ops`."""

    form = "chunk"
    versions = ("6", "7")

    def __init__(self) -> None:
        from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise
        from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

        self._dplr, self._rwkv6 = dplr_chunkwise, naive_recurrent_rwkv6

    def wkv6(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, *, resets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        heads = [x.transpose(1, 2) for x in (r, k, v, w)]
        y, after = self._rwkv6(*heads, u, 1.0, state.transpose(-1, -2), True)
        return y.transpose(1, 2), after.transpose(-1, -2)

    def wkv7(
        self,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        *,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        heads = [x.transpose(1, 2) for x in (r * r.shape[-1] ** 0.5, k, v, a, b, w)]
        y, after = self._dplr(*heads, state.transpose(-1, -2), True)
        return y.transpose(1, 2), after.transpose(-1, -2)


def fla() -> Fla | None:
    try:
        return Fla()
    except ModuleNotFoundError:
        return None


def forms_of(version: str) -> tuple[str, ...]:
    return (*FORMS, "fla") if version in Fla.versions and fla() else FORMS


TOLERANCE = 1e-4  # of the loss, and of each gradient by its norm


class Trainer:
    """One step after another on the same batch."""

    def __init__(self, version: str, batch: int, tokens: int):
        self.model: RWKV = lively_model(version, VOCAB, LAYERS, WIDTH).train()
        recipe = VERSIONS[version].recipe(self.model.config)
        self.optimizer = build_optimizer(self.model, recipe, OptimConfig())
        set_learning_rate(self.optimizer, 1e-4)
        text = torch.randint(VOCAB, (batch, tokens + 1), generator=torch.Generator().manual_seed(2))
        self.inputs, self.targets = text[:, :-1], text[:, 1:]

    def loss_and_gradients(self, form: str) -> tuple[float, dict[str, Tensor]]:
        self.optimizer.zero_grad(set_to_none=True)
        if form == "trainer":
            loss, _ = self.model.loss(self.inputs, self.targets, logit_penalty=1e-4)
        elif form == "stepwise":
            state, rows = None, []
            for token in self.inputs.split(1, dim=1):
                logits, state = self.model.forward(token, state, backend="naive")
                rows += [logits]
            loss = language_model_loss(torch.cat(rows, dim=1), self.targets, 1e-4)
        else:
            logits, _ = self.model.forward(self.inputs, backend=fla() if form == "fla" else form)  # type: ignore[arg-type]
            loss = language_model_loss(logits, self.targets, 1e-4)
        loss.backward()
        return loss.item(), {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def step(self, form: str) -> None:
        self.loss_and_gradients(form)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def check(trainer: Trainer, forms: tuple[str, ...]) -> Row:
    """How far loss and gradients of the forms differ; no report when too far."""
    expected_loss, expected = trainer.loss_and_gradients("naive")
    row = {"loss": 0.0, "gradients": 0.0}
    for form in forms:
        loss, gradients = trainer.loss_and_gradients(form)
        row["loss"] = max(row["loss"], abs(loss - expected_loss) / expected_loss)
        worst = max(float((gradients[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in expected.items())
        row["gradients"] = max(row["gradients"], worst)
    for name, difference in row.items():
        if not difference <= TOLERANCE or gradients.keys() != expected.keys():
            sys.exit(f"{name} of the two forms differ by {difference:.1e} of themselves; no report")
    return row


def measure(version: str, options: argparse.Namespace, peaks: Peaks) -> dict[str, Any]:
    trainer = Trainer(version, options.batch, options.tokens)
    forms = forms_of(version)
    result: dict[str, Any] = {"difference": check(trainer, forms)}
    samples: dict[str, list[Sample]] = {form: [] for form in forms}
    deadline = 0.0
    for i in range(1000):
        peaks.look()
        for form in forms:  # taking turns, so that all meet the same machine
            sample = timed(lambda f=form: trainer.step(f))  # type: ignore[misc]
            samples[form] += [sample] if i else []  # the first round warms up
        enough = min(map(n_calm, samples.values())) >= options.rounds
        if i > 1 and (enough or time.monotonic() > deadline):
            break
        deadline = deadline or time.monotonic() + options.seconds
    n = options.batch * options.tokens
    for form in forms:
        steps = undisturbed(samples[form])
        result[form] = {"median": n / statistics.median(steps), "best": n / min(steps)}
        result[form] |= {"taken": len(samples[form]), "undisturbed": n_calm(samples[form])}
    blocks, head = matrix_elements(trainer.model)
    return result | {"flops_per_token": 6 * (blocks + head)}  # a product forward and two backward


def table(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'tokens/s':16}{'trainer':>9}{'chunk':>9}{'naive':>8}{'ratio':>7}{'stepwise':>9}", end="")
    print(f"{'ratio':>7}{'limit':>8}{'reached':>8}")
    for version, result in results.items():
        for of in ("median", "best"):
            ours, chunk, naive, stepwise = (result[form][of] for form in FORMS)
            limit = result["limit"]["tokens_per_s"]
            print(
                f"RWKV-{version:4}{of:7}{ours:9.0f}{chunk:9.0f}{naive:8.0f}{ours / naive:6.1f}x"
                f"{stepwise:9.0f}{ours / stepwise:6.1f}x{limit:8.0f}{ours / limit:8.0%}"
            )
        if "fla" in result:
            ours, theirs = result["trainer"]["median"], result["fla"]["median"]
            print(f"RWKV-{version:4}fla in plain torch {theirs:.0f}; the trainer {ours / theirs:.1f}x")
        loss, gradients = result["difference"].values()
        counts = ", ".join(f"{form} {result[form]['undisturbed']} of {result[form]['taken']}" for form in FORMS)
        print(f"RWKV-{version:4}steps undisturbed by other processes: {counts}")
        print(f"RWKV-{version:4}trainer and naive differ by {loss:.1e} in the loss, {gradients:.1e} in the gradients")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--versions", nargs="+", default=["4", "7"], choices=["4", "5.0", "5.1", "5.2", "6", "7"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7, help="undisturbed rounds wanted")
    parser.add_argument("--seconds", type=float, default=60, help="a version's rounds end at the latest then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about: dict[str, object] = {**machine(), "load_before": load()}
    peaks = Peaks()
    results = {version: measure(version, options, peaks) for version in options.versions}
    for result in results.values():
        limit = peaks.flops_per_s / result["flops_per_token"]
        result["limit"] = {"tokens_per_s": limit, "fraction": result["trainer"]["best"] / limit}
    about |= {"load_after": load(), "flops_per_s": peaks.flops_per_s}
    table(results)
    print(f"best float32 product {peaks.flops_per_s / 1e9:.0f} GFLOP/s")
    shape = {"layers": LAYERS, "width": WIDTH, "vocab": VOCAB, "dtype": "float32"}
    protocol = {"tokens": options.tokens, "batch": options.batch}
    line = {"bench": "train_cpu", "unit": "tokens/s", "machine": about, "shape": shape, "protocol": protocol}
    text = json.dumps(rounded({**line, "results": results}))
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
