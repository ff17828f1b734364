"""Whatever else is in the batch, every request gets the tokens that it gets alone from the plain generator."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import receptance
from receptance.engine.core import Core
from receptance.engine.engine import make_runner
from receptance.engine.params import SamplingParams
from receptance.engine.request import Completion, Request
from receptance.engine.scheduler import Limits, Sequence
from receptance.engine.speculation import DraftModel, PromptLookup, Worth
from receptance.generation import Generation, generate_tokens
from receptance.models import RWKV4, RWKV6, RWKV7
from receptance.tokenizers import Tokenizer, tokenizer

TOLERANCE = 1e-9  # of states: other splits of the prompt, in float64

STARTS = ("Once upon a time, there was", "The old man and", "A list: 1, 2, 3, 1, 2, 3, 1, 2,", "\n\n", "")
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "went",
    "to",
    "see",
    "what",
    "was",
    "there",
    "12",
    "times",
    "中文",
    "ok",
]


def small_torch(version: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    sizes = {} if version is RWKV4 else {"head_size": 16}
    model = version(version.Config.make(257, n_layer=2, n_embd=32, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.dim() < 2 else 0.4))
    return model.double().eval()


@pytest.fixture(scope="module", params=["torch-7", "native"])
def model(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    if request.param == "native":
        native = receptance.load("rwkv7-stories", engine="native", dtype="float32")
        assert native.is_invariant
        return native, tokenizer("rwkv7-stories")
    return small_torch(RWKV7), tokenizer("byte")


def random_params(rng: random.Random, n_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randrange(0, n_tokens),
        temperature=rng.choice([0, 0, 0.7, 1.0, 1.3]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        top_k=rng.choice([0, 0, 5, 40]),
        min_p=rng.choice([0, 0, 0.05]),
        presence_penalty=rng.choice([0, 0, 0.4]),
        frequency_penalty=rng.choice([0, 0, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logit_bias={rng.randrange(200): rng.choice([-1.0, 2.0])} if rng.random() < 0.2 else (),
        stop=rng.choice([(), (), (".",), (" the", "a m")]),
        seed=rng.randrange(2**32),
        logprobs=rng.choice([None, None, 2]),
    )


def random_prompt(rng: random.Random, longest: int) -> str:
    return rng.choice(STARTS) + " ".join(rng.choice(WORDS) for _ in range(rng.choice([0, 1, 5, longest])))


def engine(model: Any, tok: Tokenizer, slots: int, **options: Any) -> Core:
    limits = Limits(slots, step_tokens=64, busy_step_tokens=24, boundary=16, least_shared=4)
    return Core(model, tok, make_runner(model, slots, tok), limits, cache_bytes=1 << 20, host_bytes=1 << 20, **options)


def meaning(state: Any) -> dict[str, Any]:
    """RWKV-4 may write the same numbers with other exponents."""
    fields = {name: np.asarray(x) for name, x in state.items()}
    if "exp" in fields:
        exponent = fields.pop("exp")
        fields["num"] = fields["num"] / fields["den"]
        fields["den"] = np.log(fields["den"]) + exponent
    return fields


def check(completion: Completion, alone: Generation, request: Request) -> None:
    """Every token is the same, and what is reported with it."""
    found = completion.tokens
    expected = alone.tokens[: len(found)]
    assert [t.id for t in found] == [t.id for t in expected]
    if completion.finish_reason == "cancelled":
        return
    assert completion.error is None
    assert (completion.text, completion.finish_reason) == (alone.text, alone.finish_reason)
    for token, other in zip(found, expected):
        if other.logprob is not None:
            assert token.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert len(token.top) == 2
    if request.keep_state:
        expected_state = meaning(alone.state)
        for name, x in meaning(completion.state).items():
            error = np.linalg.norm(x - expected_state[name])
            assert error <= TOLERANCE * np.linalg.norm(x) + 1e-6, name


class AlwaysPays(Worth):
    def length(self, held: float, batch: int) -> int:
        return 7 if held > 0.2 else 3


def run_random(
    model: Any,
    tok: Tokenizer,
    *,
    count: int,
    seed: int,
    slots: int,
    n_tokens: int,
    temperature: float | None = None,
    **options: Any,
) -> Core:
    """Requests of all kinds that arrive at random steps; some are cancelled at random steps."""
    rng = random.Random(seed)
    core = engine(model, tok, slots, **options)
    core.worth = AlwaysPays()
    alive: list[tuple[Request, Sequence]] = []
    done: list[tuple[Request, Completion]] = []
    left = count
    while left or core.has_work:
        if left and (rng.random() < 0.5 or not core.has_work):
            n = min(left, rng.choice([1, 1, 1, 2, 6]))
            for _ in range(n):
                params = random_params(rng, n_tokens)
                request = Request(
                    random_prompt(rng, 40),
                    params if temperature is None else replace(params, temperature=temperature),
                    n=rng.choice([1, 1, 1, 3]),
                    priority=rng.choice([0, 0, 1, 2]),
                    keep_state=rng.random() < 0.3,
                )
                alive += [(request, sequence) for sequence in core.submit(request)]
            left -= n
        core.step()
        if alive and rng.random() < 0.05:
            core.cancel(rng.choice(alive)[1])
        done += [(r, s.job.completion) for r, s in alive if s.job.completion.is_done]
        alive = [(r, s) for r, s in alive if not s.job.completion.is_done]
    assert not alive
    assert core.pool.free_slots == slots
    for request, completion in done:
        alone = generate_tokens(model, tok, request.prompt, params=request.params, seed=completion.seed)
        list(alone)
        check(completion, alone, request)
    return core


def test_random_requests_equal_those_alone(model: tuple[Any, Tokenizer]) -> None:
    core = run_random(*model, count=60, seed=1, slots=7, n_tokens=20)
    assert core.stats.cached > 0  # prefixes were shared
    assert core.stats.preempted > 0


@pytest.mark.parametrize("version", [RWKV4, RWKV6])
def test_older_versions_too(version: Any) -> None:
    run_random(small_torch(version), tokenizer("byte"), count=25, seed=5, slots=7, n_tokens=16)


def test_drafts_change_no_token(model: tuple[Any, Tokenizer]) -> None:
    core = run_random(*model, count=30, seed=2, slots=20, n_tokens=50, temperature=0, drafter=PromptLookup())
    assert core.stats.drafted > 0


def test_a_draft_model_changes_no_token(model: tuple[Any, Tokenizer]) -> None:
    rwkv, tok = model
    drafter = DraftModel(make_runner(rwkv, 8, tok))
    core = run_random(rwkv, tok, count=15, seed=3, slots=20, n_tokens=30, drafter=drafter)
    assert core.stats.accepted > 0
    assert len(drafter.free) == 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5, 6, 7])  # in four parts, which processes can share
def test_a_thousand_requests_equal_those_alone(model: tuple[Any, Tokenizer], seed: int) -> None:
    run_random(*model, count=250, seed=seed, slots=24, n_tokens=40, drafter=PromptLookup())


def test_a_free_row_of_nan_never_leaks(model: tuple[Any, Tokenizer]) -> None:
    rwkv, tok = model
    core = engine(rwkv, tok, 6)
    for x in core.runner.pool.values():  # type: ignore[attr-defined]
        x[:] = float("nan")
    requests = [Request(f"Number {i}", SamplingParams(max_tokens=5, seed=i)) for i in range(9)]
    sequences = [core.submit(request)[0] for request in requests]
    while core.has_work:
        core.step()
    for request, sequence in zip(requests, sequences):
        alone = generate_tokens(rwkv, tok, request.prompt, params=request.params)
        list(alone)
        check(sequence.job.completion, alone, request)


def test_bad_logits_fail_their_own_request_alone(model: tuple[Any, Tokenizer]) -> None:
    rwkv, tok = model
    core = engine(rwkv, tok, 4)
    bad = rwkv.zero_state()
    bad = type(bad)({name: np.asarray(x) * float("nan") for name, x in bad.items()})
    params = SamplingParams(max_tokens=6, seed=1)
    broken = core.submit(Request("x", params, state=bad))[0].job.completion
    fine = core.submit(Request("Once", params))[0].job.completion
    while core.has_work:
        core.step()
    assert "NaN" in str(broken.error)
    alone = generate_tokens(rwkv, tok, "Once", params=params)
    list(alone)
    assert fine.ids == alone.ids
