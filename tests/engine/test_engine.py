import asyncio
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import receptance
from receptance.engine.core import Core, Watcher
from receptance.engine.engine import Engine, EngineError, make_runner
from receptance.engine.native_runner import NativeRunner
from receptance.engine.params import SamplingParams
from receptance.engine.request import Completion, GenerationError, Grammar, Request, Score, Token
from receptance.engine.scheduler import Limits, Phase, Scheduler, Sequence
from receptance.engine.speculation import Drafter, PromptLookup
from receptance.engine.state_pool import StatePool
from receptance.errors import CheckpointError, ConfigError
from receptance.generation import generate_tokens
from receptance.tokenizers import Tokenizer, tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return receptance.load("rwkv7-stories", engine="native", dtype="float32")


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer("rwkv7-stories")


def core_of(model: Any, tok: Tokenizer, slots: int = 4, **limits: int) -> Core:
    return Core(
        model, tok, make_runner(model, slots, tok), Limits(slots, **limits), cache_bytes=64 << 20, host_bytes=64 << 20
    )


def run(core: Core) -> None:
    while core.has_work:
        core.step()


# --- what is read once ---


def test_a_shared_prefix_is_read_once(model: Any, tok: Tokenizer) -> None:
    prefix = (tok.encode("Once upon a time there was a king. ") * 500)[:4000]
    core = core_of(model, tok, slots=8)
    ends = [tok.encode(f"His {word} was") for word in ("dog", "cat", "house", "son", "daughter", "wife")]
    jobs = [core.submit(Request(prefix + end, SamplingParams(max_tokens=2)))[0].job for end in ends]
    run(core)
    assert core.stats.read <= 4000 + sum(map(len, ends))
    assert [job.completion.cached_tokens >= 4000 for job in jobs].count(False) == 1


def test_n_texts_cost_one_reading(model: Any, tok: Tokenizer) -> None:
    core = core_of(model, tok, slots=4)
    ids = tok.encode("Once upon a time there was a king, and the king had a dog.")
    sequences = core.submit(Request(ids, SamplingParams(max_tokens=5, seed=3), n=6))
    run(core)
    assert core.stats.read == len(ids)
    assert [s.job.completion.seed for s in sequences] == [3, 4, 5, 6, 7, 8]


def test_a_chat_that_is_sent_again_reads_only_its_new_end(model: Any, tok: Tokenizer) -> None:
    core = core_of(model, tok)
    ids = tok.encode("Once upon a time")
    first = core.submit(Request(ids, SamplingParams(max_tokens=20, ignore_eos=True)))[0].job.completion
    run(core)
    core.submit(Request(ids + first.ids + tok.encode(" The end."), SamplingParams(max_tokens=1)))
    before = core.stats.read
    run(core)
    assert core.stats.read - before <= len(tok.encode(" The end.")) + 1


def test_texts_after_the_same_named_state_share_what_they_read(model: Any, tok: Tokenizer) -> None:
    _, state = model.forward(tok.encode("You are a pirate."))
    core = core_of(model, tok)
    for key in ("pirate", "pirate", None):
        core.submit(Request("Once upon a time", SamplingParams(max_tokens=1), state=state, state_key=key))
        run(core)
    assert core.stats.cached == len(tok.encode("Once upon a time"))


# --- who goes first ---


def test_a_short_prompt_does_not_wait_for_a_long_one(model: Any, tok: Tokenizer) -> None:
    core = core_of(model, tok, step_tokens=64)
    long = core.submit(Request([5] * 2000, SamplingParams(max_tokens=1)))[0]
    core.step()
    short = core.submit(Request([6] * 10, SamplingParams(max_tokens=1)))[0]
    core.step()
    assert short.job.completion.is_done
    assert not long.job.completion.is_done


@pytest.mark.parametrize(
    ("limits", "cuts"),
    [
        (Limits(1, step_tokens=512), [256] * 4 + [76]),
        (Limits(1, step_tokens=4096), [1024, 76]),  # a device that takes many tokens in one call
        (Limits(1, step_tokens=4096, boundary=512), [512, 512, 76]),
    ],
)
def test_a_long_prompt_is_cut_where_its_states_are_kept(limits: Limits, cuts: list[int]) -> None:
    scheduler, sequence = Scheduler(limits), Sequence([1] * 1100, 0, None)
    scheduler.add(sequence)
    scheduler.admit(sequence, 0, Phase.READING)
    found = []
    while sequence.pending:
        ((_, count),) = scheduler.plan()
        found.append(count)
        sequence.fed += count
    assert found == cuts


def test_texts_go_on_while_a_long_prompt_is_read(model: Any, tok: Tokenizer) -> None:
    core = core_of(model, tok, step_tokens=64, busy_step_tokens=32)
    writer = core.submit(Request([7], SamplingParams(max_tokens=50, ignore_eos=True)))[0].job.completion
    core.step()
    core.submit(Request([5] * 500, SamplingParams(max_tokens=1)))
    for _ in range(10):
        before = len(writer.tokens)
        core.step()
        assert len(writer.tokens) == before + 1


class OverlappingRunner(NativeRunner):
    """Calls what waits for the device's work, as the GPU's runner does."""

    overlaps = True

    def step(self, works, rows, uniforms, masks, meanwhile):  # type: ignore[no-untyped-def]
        if any(len(work.tokens) > 1 for work in works):
            return None
        logits = self.run(works)
        drawn = self.sampler.draw(logits, rows, uniforms, masks)
        meanwhile()
        return drawn, logits


def listen(heard: list[list[str | None]], _: Completion) -> Watcher:
    heard.append([])
    mine = heard[-1]
    return lambda token: mine.append(None if token is None else token.text)


@pytest.mark.parametrize("drafter", [None, PromptLookup()])
def test_texts_made_during_the_next_step_are_the_same(model: Any, tok: Tokenizer, drafter: Drafter | None) -> None:
    found = []
    for kind in NativeRunner, OverlappingRunner:
        runner = kind(model, 6, tok.vocab_size, tok.token_bytes, tok.eos_id)
        core = Core(model, tok, runner, Limits(6), cache_bytes=0, host_bytes=1 << 24, drafter=drafter)
        heard: list[list[str | None]] = []
        jobs = []
        for i in range(30):
            more = {} if i % 3 else {"stop": ("a", "the cat")} if i % 2 else {"logprobs": 1}
            params = SamplingParams(max_tokens=3 + i, seed=i, top_p=0.9, temperature=0.8, **more)  # type: ignore[arg-type]
            prompt = "One, two, three, one, two, three, one" if i % 2 else f"The cat number {i} 中"
            asked = Request(prompt, params, priority=i % 2, keep_state=i % 7 == 0)
            jobs += [s.job for s in core.submit(asked, partial(listen, heard))]
            core.step()
        run(core)
        assert heard == [[*(t.text for t in job.completion.tokens), None] for job in jobs]
        assert core.stats.written == sum(len(job.completion.tokens) for job in jobs)
        found.append([(job.completion.ids, job.completion.text, job.completion.finish_reason) for job in jobs])
    assert found[0] == found[1]


def test_cancelling_brings_late_texts_first(model: Any, tok: Tokenizer) -> None:
    runner = OverlappingRunner(model, 2, tok.vocab_size, tok.token_bytes, tok.eos_id)
    core = Core(model, tok, runner, Limits(2), cache_bytes=0, host_bytes=1 << 24)
    heard: list[Token | None] = []
    (sequence,) = core.submit(Request("Once", SamplingParams(max_tokens=50)), lambda _: heard.append)
    for _ in range(5):
        core.step()
    job = sequence.job
    assert (job.drawn, len(job.completion.tokens), len(heard)) == (5, 4, 4)
    core.cancel(sequence)
    assert len(job.completion.tokens) == 5
    assert [token.id for token in heard[:-1] if token] == job.completion.ids
    assert heard[-1] is None


def test_an_urgent_request_takes_a_place_and_nothing_is_lost(model: Any, tok: Tokenizer) -> None:
    core = core_of(model, tok, slots=1)
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    slow = core.submit(Request("Once", params, priority=5))[0].job.completion
    for _ in range(4):
        core.step()
    urgent = core.submit(Request("Stop", params, priority=0))[0].job.completion
    while not urgent.is_done:
        core.step()
    assert not slow.is_done
    assert core.stats.preempted == 1
    run(core)
    for completion, prompt in ((slow, "Once"), (urgent, "Stop")):
        alone = generate_tokens(model, tok, prompt, params=params)
        list(alone)
        assert completion.ids == alone.ids


def test_a_cancelled_request_frees_its_row_at_once(model: Any, tok: Tokenizer) -> None:
    core = core_of(model, tok, slots=1)
    sequence = core.submit(Request("Once", SamplingParams(max_tokens=1000)))[0]
    core.step()
    core.cancel(sequence)
    assert core.pool.free_slots == 1
    assert sequence.job.completion.finish_reason == "cancelled"
    core.cancel(sequence)  # once more does nothing


# --- states ---


def test_ten_thousand_states_spill_to_files_and_come_back(model: Any, tok: Tokenizer, tmp_path: Path) -> None:
    runner = make_runner(model, 2, tok)
    zero = model.zero_state()

    def state(i: int) -> Any:
        return type(zero)({name: np.full((1, 1, 4), i, np.float32) for name in zero})

    runner.model = type("Lax", (), {"check_state": lambda *_: None})()  # type: ignore[attr-defined]  # small states for speed
    pool = StatePool(runner, host_bytes=state(0).nbytes * 500, folder=tmp_path)
    parked = [pool.park(state(i)) for i in range(10_000)]
    assert pool.parked_bytes <= pool.host_bytes
    assert pool.spilled >= 9_500
    assert len(list(tmp_path.rglob("*.state"))) == 9_500
    for i in [0, 9_999, 1, *range(0, 10_000, 97)]:
        assert float(pool.get(parked[i])["att_shift"].max()) == i
    del parked
    assert not list(tmp_path.rglob("*.state"))
    pool.close()


def test_a_damaged_file_of_a_state_says_so(model: Any, tok: Tokenizer, tmp_path: Path) -> None:
    pool = StatePool(make_runner(model, 2, tok), host_bytes=0, folder=tmp_path)
    parked = pool.park(model.zero_state())
    next(tmp_path.rglob("*.state")).write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="cannot be read"):
        pool.get(parked)


# --- grammars ---


def test_a_text_follows_its_json_schema(model: Any, tok: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    core = core_of(model, tok)
    grammar = Grammar(json_schema=json.dumps(schema))
    sequences = core.submit(Request("A boy as JSON: ", SamplingParams(max_tokens=60, seed=1), n=4, grammar=grammar))
    core.submit(Request("A boy", SamplingParams(max_tokens=5)))
    run(core)
    for sequence in sequences:
        assert sequence.job.completion.finish_reason == "stop"
        boy = json.loads(sequence.job.completion.text)
        assert set(boy) == {"name", "age"}
        assert 0 <= boy["age"] <= 99


def test_a_text_follows_its_regular_expression(model: Any, tok: Tokenizer) -> None:
    pytest.importorskip("llguidance")
    core = core_of(model, tok)
    completion = core.submit(
        Request(
            "When? ", SamplingParams(max_tokens=60, temperature=0), grammar=Grammar(regex="[0-9]{4}-(0[1-9]|1[0-2])")
        )
    )[0].job.completion
    run(core)
    year, month = completion.text.split("-")
    assert len(year) == 4
    assert 1 <= int(month) <= 12


WRONG = Grammar(regex="("), Grammar(json_schema="[1"), Grammar(lark="start: missing"), Grammar(regex="a" * 300_000)


@pytest.mark.parametrize("grammar", WRONG)
def test_a_wrong_grammar_is_refused(model: Any, tok: Tokenizer, grammar: Grammar) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ConfigError, match="grammar"):
        core_of(model, tok).submit(Request("x", grammar=grammar))


# --- the engine with its thread ---


@pytest.fixture(scope="module")
def engine(model: Any, tok: Tokenizer) -> Any:
    with Engine(model, tok, slots=8) as engine:
        yield engine


def test_generate_gives_texts_in_order(engine: Engine, model: Any, tok: Tokenizer) -> None:
    texts = engine.generate(["Once upon", "The cat"], max_tokens=6, temperature=0)
    for prompt, completion in zip(("Once upon", "The cat"), texts):
        alone = generate_tokens(model, tok, prompt, max_tokens=6, temperature=0)
        assert completion.text == "".join(token.text for token in alone)


def test_a_request_streams(engine: Engine) -> None:
    handle = engine.submit("Once upon a time", max_tokens=20, seed=1)
    assert "".join(handle) == handle.completions[0].text


def test_an_event_loop_takes_many_streams_at_once(engine: Engine) -> None:
    async def one(i: int) -> str:
        handle = await asyncio.to_thread(engine.submit, "Once upon a time", max_tokens=10, seed=i)
        return "".join([piece async for piece in handle])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one(i % 5) for i in range(20)))

    texts = asyncio.run(all_of_them())
    assert texts[:5] * 4 == texts
    assert len(set(texts)) == 5


def test_an_event_loop_waits_for_whole_texts(engine: Engine) -> None:
    (alone,) = engine.generate("Once upon a time", max_tokens=10, seed=1)
    (awaited,) = asyncio.run(engine.agenerate("Once upon a time", max_tokens=10, seed=1))
    assert awaited.text == alone.text


def test_leaving_a_stream_cancels_it(engine: Engine) -> None:
    async def leave() -> Any:
        handle = await asyncio.to_thread(engine.submit, "Once", max_tokens=100_000, ignore_eos=True)
        events = handle.aevents()
        await anext(events)
        await events.aclose()
        return handle

    handle = asyncio.run(leave())
    assert handle.result(timeout=10)[0].finish_reason == "cancelled"
    assert engine.load == (0, 0)


def test_a_task_that_is_cancelled_before_its_request_began_cancels_it(engine: Engine) -> None:
    async def leave() -> None:
        busy = threading.Event()
        engine._do(busy.wait)  # the engine's thread is in the midst of something
        task = asyncio.ensure_future(engine.agenerate("Once", max_tokens=10**6, ignore_eos=True))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        busy.set()

    asyncio.run(leave())
    engine._do(lambda: None).result(timeout=10)
    assert engine.load == (0, 0)


def test_a_list_with_a_wrong_prompt_leaves_nothing_running(engine: Engine) -> None:
    with pytest.raises(GenerationError, match="token id 999999"):
        engine.generate(["Once", [999_999]], max_tokens=10**6, ignore_eos=True)
    engine._do(lambda: None).result(timeout=10)
    assert engine.load == (0, 0)


def test_scores_are_log_probabilities(engine: Engine, model: Any, tok: Tokenizer) -> None:
    pairs = [("Once upon a", " time there was"), ("Once upon a", " dog"), ("", "The end"), ("The", "")]
    for (context, continuation), scored in zip(pairs, engine.score(pairs)):
        before, after = tok.encode(context) or [tok.eos_id], tok.encode(continuation)
        logits, _ = model.forward([*before, *after])
        x = logits - logits.max(-1, keepdims=True)
        x -= np.log(np.exp(x).sum(-1, keepdims=True))
        rows = range(len(before) - 1, len(before) - 1 + len(after))
        np.testing.assert_allclose(scored.logprobs, [x[r, t] for r, t in zip(rows, after)], atol=1e-3)
        assert scored.greedy == all(x[r].argmax() == t for r, t in zip(rows, after))


def test_choices_read_their_context_once(engine: Engine, tok: Tokenizer) -> None:
    before, context = engine.stats.read, "Lily went to the park with her mother and a big red ball"
    engine.score([Score(context, choice) for choice in (" today.", " at night.", " and fell.")])
    assert engine.stats.read - before <= len(tok.encode(context)) + sum(
        len(tok.encode(x)) for x in (" today.", " at night.", " and fell.")
    )


def test_embeddings_have_length_one_and_tell_texts_apart(engine: Engine) -> None:
    a, again, b = engine.embed(["A dog ran.", "A dog ran.", "The king was angry."])
    assert float((a * a).sum()) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(a, again, atol=1e-4)
    assert float((a * b).sum()) < 0.99


def test_rows_that_others_would_round_are_refused_as_invariant(model, tok):
    eight_bits = receptance.load("rwkv7-stories", engine="native", dtype="int8")
    assert model.is_invariant
    assert not eight_bits.is_invariant
    make_runner(model, 2, tok, invariant=True)
    with pytest.raises(ConfigError, match="dtype='float32'"):
        make_runner(eight_bits, 2, tok, invariant=True)


def test_what_only_a_gpu_has_is_refused_elsewhere(model, tok):
    with pytest.raises(ConfigError, match="weights='int8' needs a model with kernels for a GPU"):
        Engine(model, tok, weights="int8")
    with pytest.raises(ConfigError, match="weights is 'int3', expected full, int8 or float8"):
        Engine(model, tok, weights="int3")


def test_what_cannot_run_is_refused_at_once(engine: Engine, model: Any) -> None:
    with pytest.raises(GenerationError, match="token id 999999"):
        engine.submit([999_999])
    with pytest.raises(GenerationError, match="empty"):
        engine.submit(Request("", state=model.zero_state()))
    with pytest.raises(ConfigError, match="n is 0"):
        Request("x", n=0)
    with pytest.raises(ConfigError, match="vocabulary"):
        engine.submit("x", logit_bias={10**6: 1.0})
    with pytest.raises(ConfigError, match="priority is 'high'"):
        Request("x", priority="high")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="state_key"):
        Request("x", state_key=["a"])  # type: ignore[arg-type]
    assert engine.generate("Once", max_tokens=1)[0].finish_reason == "length"


@pytest.mark.parametrize("wrong", [[1.5], ["a"], [[1]], 5])
def test_what_is_neither_text_nor_ids_takes_nothing_down(engine: Engine, wrong: Any) -> None:
    beside = engine.submit("Once", max_tokens=300, ignore_eos=True)
    for ask in (
        lambda: engine.score([("a", wrong)]),
        lambda: engine.embed([wrong]),
        lambda: engine.submit(Request(wrong)),
    ):
        with pytest.raises((GenerationError, ConfigError), match="ids"):
            ask()
    assert beside.result(timeout=30)[0].finish_reason == "length"


def test_a_lost_file_of_a_state_ends_its_text_alone(model: Any, tok: Tokenizer, tmp_path: Path) -> None:
    runner = make_runner(model, 1, tok)
    core = Core(model, tok, runner, Limits(1), cache_bytes=0, host_bytes=0, folder=str(tmp_path))
    lost = core.submit(Request("Once", SamplingParams(max_tokens=50, ignore_eos=True), priority=1))[0]
    core.step()
    urgent = core.submit(Request("The", SamplingParams(max_tokens=5, ignore_eos=True)))[0]
    core.step()
    next(tmp_path.rglob("*.state")).unlink()
    later = core.submit(Request("A", SamplingParams(max_tokens=5, ignore_eos=True), priority=2))[0]
    run(core)
    assert isinstance(lost.job.completion.error, CheckpointError)
    assert urgent.job.completion.finish_reason == later.job.completion.finish_reason == "length"


def test_a_closed_engine_fails_what_it_had(model: Any, tok: Tokenizer) -> None:
    engine = Engine(model, tok, slots=1)
    handle = engine.submit("Once", max_tokens=10**6, ignore_eos=True)
    engine.close()
    with pytest.raises(EngineError, match="closed before"):
        handle.result(timeout=5)
    with pytest.raises(EngineError, match="closed"):
        engine.submit("Once")


def test_a_failing_step_ends_its_requests_and_not_the_engine(model: Any, tok: Tokenizer) -> None:
    with Engine(model, tok, slots=2) as engine:
        runner = engine._core.runner
        run, runner.run = runner.run, lambda *_, **__: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            engine.generate("Once", max_tokens=3)
        runner.run = run  # type: ignore[method-assign]
        assert engine.generate("Once", max_tokens=3)[0].finish_reason is not None
