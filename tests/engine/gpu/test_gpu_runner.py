"""The engine on a GPU: each request beside itself alone, with the invariant kernels and with the fastest ones."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.gpu.test_model import make, older

import receptance
from receptance.engine.core import Core
from receptance.engine.gpu_runner import GpuRunner
from receptance.engine.params import SamplingParams
from receptance.engine.request import Completion, Request
from receptance.engine.runner import Work
from receptance.engine.scheduler import PIECE, Limits, Sequence
from receptance.generation import generate_tokens
from receptance.tokenizers import Tokenizer, tokenizer

on_gpu = pytest.mark.gpu
LENGTHS = [1, 2, 10, 65, 130, 300]  # characters of prompts
TEXT = "Once upon a time the cat sat on a mat, and then it went to see what was there and came home in the rain. "


@pytest.fixture(scope="module")
def model() -> Any:
    return receptance.load("rwkv7-stories", engine="torch", device="cuda", dtype="float16")


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer("rwkv7-stories")


def runner_of(model: Any, tok: Tokenizer, slots: int, **options: bool) -> GpuRunner:
    return GpuRunner(model, slots, tok.vocab_size, tok.token_bytes, tok.eos_id, **options)


def core_of(runner: GpuRunner, tok: Tokenizer, slots: int) -> Core:
    align = PIECE if runner.gpu.invariant else 1
    limits = Limits(slots, step_tokens=512, busy_step_tokens=192, boundary=128, align=align)
    return Core(runner.model, tok, runner, limits, cache_bytes=1 << 26, host_bytes=1 << 28)


def request(rng: random.Random, temperatures: tuple[float, ...], lengths: list[int], most: int) -> Request:
    prompt = TEXT * 3
    params = SamplingParams(
        max_tokens=rng.randrange(1, most),
        temperature=rng.choice(temperatures),
        top_p=rng.choice([1.0, 0.9]),
        presence_penalty=rng.choice([0, 0.4]),
        seed=rng.randrange(2**32),
        ignore_eos=True,
    )
    return Request(prompt[: rng.choice(lengths)], params, priority=rng.choice([0, 0, 1]))


def together_and_alone(
    runner: GpuRunner,
    tok: Tokenizer,
    count: int,
    slots: int,
    temperatures: tuple[float, ...],
    lengths: list[int] = LENGTHS,
    most: int = 32,
) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(1)
    core = core_of(runner, tok, slots)
    asked: list[tuple[Request, Sequence]] = []
    while len(asked) < count or core.has_work:
        for _ in range(rng.choice([0, 1, 3]) if len(asked) < count else 0):
            asked.append((one := request(rng, temperatures, lengths, most), core.submit(one)[0]))
        core.step()
        if asked and rng.random() < 0.03:
            core.cancel(rng.choice(asked)[1])
    pairs = []
    for one, sequence in asked:
        single = core_of(runner, tok, slots)
        alone: Completion = single.submit(one)[0].job.completion
        while single.has_work:
            single.step()
        ids = sequence.job.completion.ids
        pairs.append((ids, alone.ids[: len(ids)]))
    return pairs


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.usefixtures("kernels")
def test_small_models_write_the_same_together_and_alone(version: str) -> None:
    """With the kernels emulated where there is no GPU: steps that draw, prompts beside them, preemption, cancelling."""
    tok = tokenizer("byte")
    small = make(layers=1, vocab=272) if version == "7" else older(version, layers=1, vocab=272)
    runner = runner_of(small.half(), tok, 2, invariant=True)
    for x in runner.pool.values():
        x.fill_(torch.nan)
    pairs = together_and_alone(runner, tok, 3, 2, (0, 1.0), [1, 2, 6], 5)
    assert sum(len(together) for together, _ in pairs) >= 3
    assert all(together == alone for together, alone in pairs)


@pytest.mark.usefixtures("kernels")
def test_a_draft_is_checked_in_one_call_and_a_grammar_rules_a_step() -> None:
    tok = tokenizer("byte")
    runner = runner_of(make(layers=1, vocab=272).half(), tok, 4)
    runner.reset(0)
    runner.reset(1)
    all_rows = runner.run([Work(0, [3, 4, 5], 2), Work(1, [6])], all_logits=True)
    assert len(all_rows) == 4
    one_by_one = [runner.run([Work(0, [token])])[0].clone() for token in (3, 4, 5)]
    torch.testing.assert_close(all_rows[:3].float(), torch.stack(one_by_one).float(), rtol=2e-2, atol=2e-2)
    for name, x in runner.pool.items():  # the draft's own row, beside the one that it began from
        torch.testing.assert_close(x[:, 2], x[:, 0], rtol=2e-2, atol=2e-2, msg=name)
    mask = np.zeros(-(-272 // 32), np.uint32)
    mask[2] = 1 << 5
    runner.sampler.admit(0, SamplingParams(), [])
    runner.sampler.admit(1, SamplingParams(temperature=0), [])
    called: list[int] = []
    done = runner.step([Work(0, [7]), Work(1, [8])], [0, 1], [0.3, 0.3], [mask, None], lambda: called.append(1))
    assert done is not None
    assert called == [1]
    assert done[0] == [69, int(done[1][1].argmax())]


@on_gpu
def test_with_invariant_kernels_every_token_is_the_same_as_alone(model: Any, tok: Tokenizer) -> None:
    runner = runner_of(model, tok, 40, invariant=True)
    pairs = together_and_alone(runner, tok, 1000, 40, (0, 1.0, 0.7))
    assert len(pairs) >= 1000
    assert all(together == alone for together, alone in pairs)


@on_gpu
def test_with_the_fastest_kernels_nearly_every_greedy_token_is(model: Any, tok: Tokenizer) -> None:
    """A draw at temperature 1 differs more often: a boundary among thousands of improbable tokens moves with each."""
    runner = runner_of(model, tok, 40)
    same = different = 0
    for together, alone in together_and_alone(runner, tok, 400, 40, (0,)):
        first = next((i for i, (a, b) in enumerate(zip(together, alone)) if a != b), len(together))
        same, different = same + first, different + (first < len(together))
    print(f"{different} of {same + different} draws differ")
    assert different <= 0.001 * (same + different)


@on_gpu
def test_a_graph_gives_what_the_kernels_give(model: Any, tok: Tokenizer) -> None:
    runner, twin = runner_of(model, tok, 9), runner_of(model, tok, 9)
    twin.gpu._choices = runner.gpu._choices  # which are measured at the first step
    for x in runner.pool.values():
        x.fill_(torch.nan)  # free rows, and padding's: nothing of them may leak
    for step in range(5):
        works = [Work(slot, [7 * slot + step]) for slot in (3, 8, 0, 5, 1)]
        if step == 0:
            for work in works:
                runner.reset(work.slot)
                twin.reset(work.slot)
        eager = twin.gpu.decode(
            torch.tensor([w.tokens[0] for w in works], device="cuda"),
            torch.tensor([w.slot for w in works], device="cuda", dtype=torch.int32),
        )
        torch.testing.assert_close(runner.run(works), eager, rtol=0, atol=0)


@on_gpu
@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_the_engine_writes_what_its_runner_does_with_weights_of_8_bits(
    model: Any, tok: Tokenizer, weights: Any
) -> None:
    prompts = [TEXT[: 9 * i + 1] for i in range(6)]
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    with receptance.Engine(model, tok, weights=weights) as engine:
        texts = engine.generate([Request(x, params) for x in prompts])
    runner = GpuRunner(model, 6, tok.vocab_size, tok.token_bytes, tok.eos_id, weights=weights)
    assert runner.gpu.head.numbers is not None
    core = core_of(runner, tok, 6)
    jobs = [core.submit(Request(x, params))[0].job for x in prompts]
    while core.has_work:
        core.step()
    assert [len(x.ids) for x in texts] == [30] * 6
    assert sum(x.ids != job.completion.ids for x, job in zip(texts, jobs)) <= 1  # other sizes of batches: ties
    full = core_of(runner_of(model, tok, 6), tok, 6)
    plain = [full.submit(Request(x, params))[0].job for x in prompts]
    while full.has_work:
        full.step()
    first = [x.ids[:3] == job.completion.ids[:3] for x, job in zip(texts, plain)]
    assert sum(first) >= 4  # rounded weights, but the same model


@on_gpu
def test_tokens_are_those_of_the_plain_generator_up_to_rounding(model: Any, tok: Tokenizer) -> None:
    core = core_of(runner_of(model, tok, 8), tok, 8)
    params = [SamplingParams(max_tokens=24, temperature=0, ignore_eos=True) for _ in range(8)]
    jobs = [core.submit(Request(TEXT[: 9 * i + 1], p))[0].job for i, p in enumerate(params)]
    while core.has_work:
        core.step()
    plain = receptance.load("rwkv7-stories", engine="native", dtype="float32")
    differ = 0
    for i, (p, job) in enumerate(zip(params, jobs)):
        alone = generate_tokens(plain, tok, TEXT[: 9 * i + 1], params=p)
        list(alone)
        differ += alone.ids != job.completion.ids
    assert differ <= 2
