"""The sampler against the reference package: its distributions, and its generation with penalties on a stub model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from receptance.engine.sampling import Counts, ParamRows, SamplingParams, adjusted, digit_weight, distribution, sample

Oracle = dict[str, Any]

PROBABILITY_TOLERANCE = 2e-6  # the reference computes in float32


@pytest.fixture(scope="module")
def oracle(shared: Path) -> Oracle:
    return dict(json.loads((shared / "oracles/misc/sampling.json").read_text()))


@pytest.fixture(scope="module")
def stub(shared: Path) -> torch.Tensor:
    return load_file(shared / "oracles/misc/sampling_stub.safetensors")["stub_matrix"]


def test_every_distribution_of_the_reference_in_one_batch(oracle: Oracle) -> None:
    cases = oracle["distributions"]
    params = [SamplingParams(temperature=c["temperature"], top_p=c["top_p"], top_k=c["top_k"]) for c in cases]
    logits = torch.tensor([oracle["logits"][c["case"]] for c in cases])
    probs = distribution(logits, ParamRows.of(params, logits.shape[1], 0, "cpu"))
    for row, case in zip(probs, cases):
        expected = torch.zeros(logits.shape[1])
        for token, p in case["nonzero"].items():
            expected[int(token)] = p
        if case["temperature"] == 0:  # the reference draws among equal maxima; greedy here is the lowest id, always
            expected = (torch.arange(len(row)) == expected.nonzero()[0]).float()
        assert torch.equal(row > 0, expected > 0), case
        assert (row - expected).abs().max() <= PROBABILITY_TOLERANCE, case


def test_every_penalty_run_of_the_reference(oracle: Oracle, stub: torch.Tensor) -> None:
    letters = [bytes([97 + i]) for i in range(len(stub))]
    for run in oracle["penalty_runs"]:
        params = ParamRows.of(
            [
                SamplingParams(
                    top_p=0.0,
                    frequency_penalty=run["alpha_frequency"],
                    presence_penalty=run["alpha_presence"],
                    penalty_decay=run["alpha_decay"],
                    logit_bias=dict.fromkeys(run["token_ban"], -math.inf),
                )
            ],
            len(stub),
            0,
            "cpu",
        )
        prompt = [ord(c) - 97 for c in run["prompt"]]
        counts = Counts.start([prompt], digit_weight(letters))
        token, generated = prompt[-1], []
        for step in range(len(run["generated"])):
            drawn = sample(stub[token][None], params, [(step + 0.5) / 40], counts)
            token = int(drawn)
            assert token not in run["token_stop"]
            generated.append(token)
            counts = counts.after(drawn, params)
        assert "".join(chr(97 + t) for t in generated) == run["generated"]


def test_digits_are_not_counted_as_the_reference_does_not_count_them(stub: torch.Tensor) -> None:
    """A long-hand copy of the reference's bookkeeping, on ids 0 to 9 that are digits."""
    texts = [bytes([48 + i]) if i < 10 else bytes([87 + i]) for i in range(26)]
    asked = SamplingParams(temperature=0, frequency_penalty=0.7, presence_penalty=0.3, penalty_decay=0.9)
    params = ParamRows.of([asked], 26, 0, "cpu")
    counts = Counts.start([[3]], digit_weight(texts))
    occurrence: dict[int, float] = {}
    token = 3
    for _ in range(60):
        expected = stub[token].clone()
        for t, n in occurrence.items():
            expected[t] -= 0.3 + 0.7 * n
        assert (adjusted(stub[token][None], params, counts)[0] - expected).abs().max() < 1e-5
        drawn = sample(stub[token][None], params, [0.5], counts)
        counts = counts.after(drawn, params)
        token = int(drawn)
        occurrence = {t: n * 0.9 for t, n in occurrence.items()}
        occurrence[token] = occurrence.get(token, 0.0) + (token >= 10)
    assert any(t < 10 for t in occurrence)
    assert any(t >= 10 for t in occurrence)
