import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Unpack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import receptance
from receptance.engine.params import SamplingFields
from receptance.errors import ConfigError
from receptance.generation import Generation, GenerationError, generate, generate_batch, generate_tokens, prefill
from receptance.models import RWKV, RWKV7, State
from receptance.tokenizers import Tokenizer, tokenizer

EOS = 0
TOLERANCE = 1e-9  # float64


class Pieces(Tokenizer):
    """A few tokens of several characters and all single bytes; encoded greedily."""

    PIECES = (b"\n\n", b".\n", b"\nUs", b"er:", b"Hello", b" world", b"\xe6\x97", b"a\xe6", b"\xa5x")

    def __init__(self) -> None:
        super().__init__("pieces", [b"", *self.PIECES, *(bytes([i]) for i in range(256))], EOS, {EOS: "<eos>"})

    def encode(self, text: str | bytes) -> list[int]:
        data, ids = text if isinstance(text, bytes) else text.encode(), []
        while data:
            best = max((t for t in self._table if t and data.startswith(t)), key=len)
            ids.append(self._table.index(best))
            data = data[len(best) :]
        return ids

    def save(self, folder: str | Path) -> Path:
        raise NotImplementedError


class Scripted(RWKV):
    """Stands in for a model: writes a given list of ids, and its state is simply the list of tokens it was fed."""

    ROOM = 200

    def __init__(self, script: list[int], vocab_size: int, scale: float = 1.0):
        torch.nn.Module.__init__(self)
        self.script = script
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.start: int | None = None
        self.scale = scale

    def forward(
        self,
        tokens: list[int] | torch.Tensor,
        state: State | None = None,
        *,
        lengths: torch.Tensor | None = None,
        last_only: bool = False,
        backend: str = "auto",
    ) -> tuple[torch.Tensor, State]:
        assert isinstance(tokens, torch.Tensor)
        fed = torch.zeros(tokens.shape[0], self.ROOM) if state is None else state["att_shift"][0].clone()
        for row, new in zip(fed, tokens):  # slot 0 is the length
            n = int(row[0])
            row[n + 1 : n + 1 + len(new)] = new
            row[0] = n + len(new)
        if self.start is None:
            self.start = int(fed[0, 0])
        position = int(fed[0, 0]) - self.start
        logits = torch.full((tokens.shape[0], self.config.vocab_size), -math.inf)
        logits[:, self.script[min(position, len(self.script) - 1)]] = 0.0
        return logits * self.scale, State({"att_shift": fed[None]})


def read_by(state: State) -> list[int]:
    row = state["att_shift"][0, 0]
    return [int(i) for i in row[1 : 1 + int(row[0])]]


PIECES = Pieces()
HI = PIECES.encode("Hi")


def write(script: Sequence[bytes | int], **fields: Unpack[SamplingFields]) -> Generation:
    ids = [piece if isinstance(piece, int) else PIECES._table.index(piece) for piece in script]
    generation = generate_tokens(Scripted(ids, PIECES.vocab_size), PIECES, "Hi", **fields)
    list(generation)
    return generation


@pytest.fixture(scope="module")
def model() -> RWKV7:
    generator = torch.Generator().manual_seed(1)
    tiny = RWKV7(RWKV7.Config.make(257, n_layer=2, n_embd=32, head_size=16))
    with torch.no_grad():
        for p in tiny.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.dim() < 2 else 0.5))
    return tiny.double().eval()


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizer("byte")


# --- where the text ends ---


def test_end_of_document_stops_and_is_not_in_the_state() -> None:
    g = write([b"Hello", b" world", EOS, b"Hello"])
    assert (g.text, g.finish_reason) == ("Hello world", "stop")
    assert g.ids[-1] == EOS
    assert read_by(g.state) == HI + PIECES.encode("Hello world")


def test_length_stops_and_the_state_has_all_of_the_text() -> None:
    g = write([b"Hello", b" world", b"Hello"], max_tokens=2)
    assert (g.text, g.finish_reason) == ("Hello world", "length")
    assert read_by(g.state) == HI + PIECES.encode("Hello world")


def test_a_stop_string_across_tokens_ends_the_text_and_leaves_no_trace_in_the_state() -> None:
    g = write([b"Hello", b".\n", b"\nUs", b"er:", b"Hello"], stop="\n\nUser:")
    assert (g.text, g.finish_reason) == ("Hello.", "stop")
    # the stop string began inside the token ".\n", so the full stop was read anew
    assert PIECES.decode(read_by(g.state)) == "HiHello."


def test_a_stop_string_at_a_token_boundary_takes_the_kept_state() -> None:
    g = write([b"Hello", b"\n\n", b"Hello"], stop=["\n\n", "zzz"])
    assert g.text == "Hello"
    assert read_by(g.state) == HI + PIECES.encode("Hello")


def test_what_only_looked_like_a_stop_string_is_given_in_the_end() -> None:
    g = write([b"Hello", b".\n", b"\nUs", EOS], stop="\n\nUser:")
    assert (g.text, g.finish_reason) == ("Hello.\n\nUs", "stop")
    assert PIECES.decode(read_by(g.state)) == "HiHello.\n\nUs"
    g = write([b"Hello", b".\n", b"\nUs"], stop="\n\nUser:", max_tokens=3)
    assert (g.text, g.finish_reason) == ("Hello.\n\nUs", "length")
    assert PIECES.decode(read_by(g.state)) == "HiHello.\n\nUs"


def test_stop_tokens_end_like_end_of_document() -> None:
    g = write([b"Hello", b".\n", b"Hello"], stop_tokens=[PIECES._table.index(b".\n")])
    assert (g.text, g.finish_reason) == ("Hello", "stop")


def test_no_piece_has_half_a_character() -> None:
    g = write([b"a\xe6", b"\x97", b"\xa5x", b"\xe6\x97", b"\xa5", EOS])
    assert [t.text for t in g.tokens] == ["a", "", "日x", "", "日", ""]
    assert PIECES.decode(read_by(g.state)) == "Hia日x日"


def test_a_character_cut_by_the_length_is_left_out_of_text_and_state() -> None:
    g = write([b"Hello", b"a\xe6", b"\x97"], max_tokens=3)
    assert g.text == "Helloa"
    assert PIECES.decode_bytes(read_by(g.state)) == b"HiHelloa"


@given(st.lists(st.integers(0, PIECES.vocab_size - 1), min_size=1, max_size=25), st.integers(1, 25))
@settings(deadline=None, max_examples=150)
def test_the_state_holds_exactly_prompt_and_text_whatever_is_drawn(script: list[int], max_tokens: int) -> None:
    g = write(script, stop=["\n\n", "er", "日x"], max_tokens=max_tokens)
    assert "\n\n" not in g.text
    assert PIECES.decode_bytes(read_by(g.state)).decode(errors="replace") == "Hi" + g.text


def test_zero_tokens_reads_the_prompt_and_writes_nothing() -> None:
    g = write([b"Hello"], max_tokens=0)
    assert (g.text, g.tokens, g.finish_reason) == ("", [], "length")
    assert read_by(g.state) == HI


def test_cancel_keeps_what_was_written() -> None:
    ids = [PIECES._table.index(p) for p in (b"Hello", b".\n", b"\nUs", b"er:")]
    g = generate_tokens(Scripted(ids, PIECES.vocab_size), PIECES, "Hi", stop="\n\nUser:")
    next(g), next(g)
    g.cancel()
    assert (g.text, g.finish_reason) == ("Hello.", "cancelled")
    assert PIECES.decode(read_by(g.state)) == "HiHello."
    assert list(g) == []


def test_the_state_is_there_at_the_end_and_not_before() -> None:
    g = generate_tokens(Scripted([PIECES._table.index(b"Hello")], PIECES.vocab_size), PIECES, "Hi", max_tokens=2)
    next(g)
    with pytest.raises(GenerationError, match="not finished"):
        _ = g.state
    next(g)
    assert PIECES.decode(read_by(g.state)) == "HiHelloHello"


# --- a real model ---


def test_generate_streams_the_text_of_generate_tokens(model: RWKV, tok: Tokenizer) -> None:
    pieces = list(generate(model, tok, "Once", seed=3, max_tokens=60))
    assert all(pieces)
    assert "".join(pieces) == finished(generate_tokens(model, tok, "Once", seed=3, max_tokens=60)).text


def test_the_public_names_lead_here() -> None:
    assert receptance.generate is generate


def finished(generation: Generation) -> Generation:
    list(generation)
    return generation


def test_same_seed_same_text_and_none_is_reported(model: RWKV, tok: Tokenizer) -> None:
    first, again = (finished(generate_tokens(model, tok, "a", seed=5, max_tokens=30)) for _ in range(2))
    assert first.ids == again.ids
    fresh = finished(generate_tokens(model, tok, "a", max_tokens=30))
    assert finished(generate_tokens(model, tok, "a", seed=fresh.seed, max_tokens=30)).ids == fresh.ids
    assert finished(generate_tokens(model, tok, "a", max_tokens=30)).seed != fresh.seed


def test_a_ragged_batch_equals_its_rows_alone(model: RWKV, tok: Tokenizer) -> None:
    prompts = ["Once upon a time", "x", "", "The end. " * 9, "日本"]
    params = [
        receptance.SamplingParams(seed=1, max_tokens=25, temperature=1.5),
        receptance.SamplingParams(seed=2, max_tokens=3, top_k=5),
        receptance.SamplingParams(seed=3, max_tokens=40, top_p=0.8, frequency_penalty=0.5, stop=["e", "q"]),
        receptance.SamplingParams(seed=4, max_tokens=0),
        receptance.SamplingParams(seed=5, max_tokens=30, repetition_penalty=1.3, logprobs=2, ignore_eos=True),
    ]
    together = generate_batch(model, tok, prompts, params, chunk=7)
    for prompt, p, row in zip(prompts, params, together):
        alone = finished(generate_tokens(model, tok, prompt, params=p))
        assert (row.ids, row.text, row.finish_reason) == (alone.ids, alone.text, alone.finish_reason)
        for name in alone.state:
            assert (row.state[name] - alone.state[name]).abs().max() < TOLERANCE
        assert [t.logprob is None for t in row.tokens] == [p.logprobs is None] * len(row.tokens)
    order = [3, 1, 4, 2, 0]
    moved = generate_batch(model, tok, [prompts[i] for i in order], [params[i] for i in order])
    assert [row.ids for row in moved] == [together[i].ids for i in order]


def test_chunked_prefill_equals_one_piece(model: RWKV, tok: Tokenizer) -> None:
    ids = [tok.encode("a long prompt " * 5), tok.encode("short"), tok.encode("x" * 21)]
    whole, state = prefill(model, ids, chunk=1000)
    for chunk in (1, 7, 21):
        logits, other = prefill(model, ids, chunk=chunk)
        assert (logits - whole).abs().max() < TOLERANCE
        assert all((state[name] - other[name]).abs().max() < TOLERANCE for name in state)


def test_a_state_goes_on_where_it_was_saved(model: RWKV, tok: Tokenizer, tmp_path: Path) -> None:
    whole = finished(generate_tokens(model, tok, "Once upon", seed=1, max_tokens=20))
    start = finished(generate_tokens(model, tok, "Once", max_tokens=0))
    start.state.save(tmp_path / "once.state", model)
    kept = start.state.clone()
    loaded = State.load(tmp_path / "once.state", model)
    assert finished(generate_tokens(model, tok, " upon", seed=1, max_tokens=20, state=loaded)).ids == whole.ids
    assert all(torch.equal(loaded[name], kept[name]) for name in kept), "the given state was changed"
    two = generate_batch(
        model, tok, [" upon", " a"], receptance.SamplingParams(seed=1, max_tokens=20), state=start.state
    )
    assert two[0].ids == whole.ids


def test_the_state_can_be_trained_on(model: RWKV, tok: Tokenizer) -> None:
    state = finished(generate_tokens(model, tok, "Once", max_tokens=3)).state
    logits, _ = model.forward([1, 2, 3], state)
    logits.sum().backward()
    model.zero_grad()


def test_logprobs_are_the_models_own(model: RWKV, tok: Tokenizer) -> None:
    g = finished(generate_tokens(model, tok, "Once", seed=1, max_tokens=5, logprobs=3, temperature=0.2, top_k=2))
    logits, _ = model.forward(tok.encode("Once") + g.ids[:4])
    expected = logits[-5:].log_softmax(-1)
    for row, token in zip(expected, g.tokens):
        assert abs(row[token.id].item() - token.logprob) < 1e-5  # computed in float32
        best = row.sort(descending=True)
        assert [i for i, _ in token.top] == best.indices[:3].tolist()


def test_an_empty_prompt_starts_a_document(model: RWKV, tok: Tokenizer) -> None:
    assert finished(generate_tokens(model, tok, "", max_tokens=1)).prompt_ids == [EOS]
    state = finished(generate_tokens(model, tok, "x", max_tokens=0)).state
    with pytest.raises(GenerationError, match="prompt is empty"):
        generate_tokens(model, tok, "", state=state)


def test_user_errors_are_named(model: RWKV, tok: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="temperature is -1"):
        generate(model, tok, "x", temperature=-1)
    with pytest.raises(GenerationError, match=r"token id 9999.*belong to this model"):
        generate(model, tok, [9999])
    with pytest.raises(GenerationError, match="2 sampling parameters for 1 prompts"):
        generate_batch(model, tok, ["x"], [receptance.SamplingParams()] * 2)
    with pytest.raises(GenerationError, match="a state of 2 rows for 3 prompts"):
        generate_batch(model, tok, ["x"] * 3, state=model.zero_state(2))
    with pytest.raises(GenerationError, match="the state has 2 rows, expected one"):
        generate(model, tok, "x", state=model.zero_state(2))
    assert generate_batch(model, tok, []) == []


def test_damaged_weights_are_reported_and_not_sampled(tok: Tokenizer) -> None:
    broken = Scripted([1], 257, scale=math.nan)
    with pytest.raises(GenerationError, match="NaN"):
        next(generate(broken, tok, "x"))


def test_keywords_override_params(model: RWKV, tok: Tokenizer) -> None:
    params = receptance.SamplingParams(seed=1, max_tokens=9)
    assert generate_tokens(model, tok, "x", params=params, max_tokens=2).params == replace(params, max_tokens=2)


def test_speed_is_measured(model: RWKV, tok: Tokenizer) -> None:
    g = finished(generate_tokens(model, tok, "Once upon", max_tokens=4, ignore_eos=True))
    assert g.prefill_speed > 0
    assert g.decode_speed > 0
