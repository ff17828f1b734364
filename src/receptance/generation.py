"""Text from a model: the plain generator. One request or a list of them, streamed, with nothing hidden.

It runs every row to its end without ever admitting a new one; the batched engine is judged by it.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Unpack

from receptance.engine.numpy_sampling import new_seed, uniform
from receptance.engine.params import SamplingFields, SamplingParams
from receptance.engine.protocols import Model, State
from receptance.engine.request import BAD_LOGITS, FinishReason, GenerationError, Prompt, Token, Tokens, prompt_ids
from receptance.engine.text import Reader
from receptance.tokenizers import Tokenizer

__all__ = [
    "Generation",
    "GenerationError",
    "SamplingParams",
    "Token",
    "generate",
    "generate_batch",
    "generate_tokens",
    "prefill",
]

PREFILL_CHUNK = 512  # tokens fed at once: bounds the memory of a long prompt


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    params: SamplingParams | None = None,
    state: State | None = None,
    **fields: Unpack[SamplingFields],
) -> Iterator[str]:
    """Stream the continuation of `prompt` in pieces of whole characters, none of them empty.

    `fields` override `params`, e.g. `generate(model, tok, "Once", max_tokens=200, temperature=0.8)`. It ends before a
    stop string, at the end of document, or after max_tokens. `state` continues what it has read; it is not changed.
    An empty prompt without a state starts a new document. Memory does not grow with the text, however long. Raises
    ConfigError and GenerationError.
    """
    tokens = generate_tokens(model, tokenizer, prompt, params=params, state=state, keep=False, **fields)
    return (token.text for token in tokens if token.text)


def generate_tokens(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    params: SamplingParams | None = None,
    state: State | None = None,
    chunk: int = PREFILL_CHUNK,
    keep: bool = True,
    **fields: Unpack[SamplingFields],
) -> "Generation":
    """As `generate`, but iterate over `Token`s and find text, finish reason, final state and speed in the result.

    keep: False for a text without end: the result's `tokens` and `text` stay empty.
    """
    return Generation(model, tokenizer, prompt, replace(params or SamplingParams(), **fields), state, chunk, keep)


def generate_batch(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    state: State | None = None,
    chunk: int = PREFILL_CHUNK,
) -> list["Generation"]:
    """Run all prompts at once; each row's result is that of running it alone (up to rounding in the matrix products).

    params: one for all (each row then uses the same seed) or one per prompt. state: one row per prompt, or a single row
    that all continue.
    """
    if not prompts:
        return []
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise GenerationError(
            f"{len(params)} sampling parameters for {len(prompts)} prompts; give one, or one for each"
        )
    if state is not None and state.batch == 1:
        state = state.select([0] * len(prompts))
    if state is not None and state.batch != len(prompts):
        raise GenerationError(
            f"a state of {state.batch} rows for {len(prompts)} prompts; give one row, or one for each"
        )
    of_row = [None if state is None else state.select([i]) for i in range(len(prompts))]
    rows = [Generation(model, tokenizer, *of, chunk) for of in zip(prompts, params, of_row)]
    for _ in _decode(model, tokenizer, rows, state, chunk):
        pass
    return rows


class Generation:
    """A request and what has come of it so far: an iterator over its tokens.

    tokens: all drawn, with the one that ended it. text: the pieces so far. Both stay empty unless `keep`.
    n_tokens: how many were drawn. finish_reason: None while it runs. seed: the one used, also when none was given.
    prompt_ids: what was fed.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompt: Prompt,
        params: SamplingParams,
        state: State | None,
        chunk: int = PREFILL_CHUNK,
        keep: bool = True,
    ):
        if state is not None and state.batch != 1:
            raise GenerationError(f"the state has {state.batch} rows, expected one")
        self.params = params
        self.prompt_ids = prompt_ids(model, tokenizer, prompt, state is not None)
        self.seed = new_seed() if params.seed is None else params.seed
        self.tokens = Tokens()
        self.n_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._model = model
        self._tokenizer = tokenizer
        self._keep = keep
        self._reader = Reader(tokenizer, params)
        self._end: State | None = None
        self._marks: list[tuple[int, State]] = []  # (characters of text, state) at ends of tokens; see _mark
        self._recent = ""  # the text since the first of them
        self._steps = _decode(model, tokenizer, [self], state, chunk)

    @property
    def text(self) -> str:
        return self.tokens.text

    @property
    def ids(self) -> list[int]:
        return self.tokens.ids

    @property
    def state(self) -> State:
        """The state after exactly the prompt and `text`, to go on from with any further text.

        A stop string or end of document that ended the text has left no trace. Raises GenerationError before the end.
        """
        if self._end is None:
            raise GenerationError("the text is not finished, so there is no final state yet; iterate to its end")
        return self._end

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second."""
        return len(self.prompt_ids) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Generated tokens per second."""
        return self.n_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        if self.finish_reason is not None:
            raise StopIteration
        return next(self._steps)

    def cancel(self) -> None:
        """End here: the finish reason is "cancelled", and the state is the one after `text`. Between tokens only."""
        self._steps.close()
        if self.finish_reason is None and self._marks:
            self._finish("cancelled")

    def _accept(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> Token:
        """Take a drawn token; decide whether the text ends with it."""
        text, reason = self._reader.accept(token)
        drawn = Token(token, text, logprob, top)
        self.n_tokens += 1
        if self._keep:
            self.tokens.append(drawn)
        self._recent += text
        if reason:
            self._finish(reason)
        return drawn

    def _mark(self, state: State) -> None:
        """Remember the state after all tokens so far, and forget those that the text can no longer be cut back to."""
        if self._reader.is_whole:
            self._marks.append((self._reader.decoded, state))
            self._reader.mark()
        while len(self._marks) > 1 and self._marks[1][0] <= self._reader.passed:
            self._recent = self._recent[self._marks[1][0] - self._marks[0][0] :]
            del self._marks[0]

    def _finish(self, reason: FinishReason) -> None:
        """Set the state: the last one within the text, fed with what the text has beyond it."""
        self.finish_reason = reason
        first = self._marks[0][0]
        while self._marks[-1][0] > self._reader.passed:
            self._marks.pop()
        characters, state = self._marks[-1]
        if self._reader.is_clean:
            missing = self._reader.unmarked
        else:  # the text ends within a token
            missing = self._tokenizer.encode(self._recent[characters - first :])
        if missing:
            _, state = prefill(self._model, [missing], state)
        self._end = state.clone()
        self._marks, self._recent = [], ""


def prefill(
    model: Model, prompts: Sequence[Sequence[int]], state: State | None = None, *, chunk: int = PREFILL_CHUNK
) -> tuple[Any, Any]:
    """Feed each row its own non-empty prompt, `chunk` tokens at a time: logits after the last token [B, V], state."""
    if not any(prompts):
        raise GenerationError("there is nothing to feed: every prompt is empty")
    return _rows_of(model).prefill(model, prompts, state, chunk)  # type: ignore[no-any-return]


def _rows_of(model: Model) -> Any:
    """The module that feeds, steps and draws in this model's engine: `torch_rows` or `numpy_rows`."""
    return import_module(f"receptance.engine.{'numpy' if model.engine == 'native' else 'torch'}_rows")


def _decode(
    model: Model, tokenizer: Tokenizer, rows: list[Generation], state: State | None, chunk: int
) -> Generator[Token, None, None]:
    """Run all rows to their ends in lockstep, giving each token as it is drawn.

    The model's calls alone run under inference mode: a mode around a `yield` would leak into the caller.
    """
    clock = time.perf_counter()
    engine = _rows_of(model)
    logits, state = prefill(model, [row.prompt_ids for row in rows], state, chunk=chunk)
    vocab = min(tokenizer.vocab_size, logits.shape[1])  # ids above are padding of the embedding
    draws = engine.Draws(
        [row.params for row in rows],
        [row.prompt_ids for row in rows],
        vocab,
        tokenizer.token_bytes,
        tokenizer.eos_id,
        logits,
    )
    for i, row in enumerate(rows):
        row.prefill_seconds = time.perf_counter() - clock
        row._mark(state.select([i]))
        if row.params.max_tokens == 0:
            row._finish("length")
    tokens: list[int] = []
    while True:
        clock = time.perf_counter()
        alive = [i for i, row in enumerate(rows) if row.finish_reason is None]
        if not alive:
            return
        if len(alive) < len(rows):
            rows, tokens = [rows[i] for i in alive], [tokens[i] for i in alive if tokens]
            logits, state = logits[alive], state.select(alive)
            draws.keep(alive, [row.params for row in rows])
        if tokens:
            logits, state = engine.step(model, tokens, state)
            for i, row in enumerate(rows):
                row._mark(state.select([i]))
        if engine.are_broken(logits[:, :vocab]):
            raise GenerationError(BAD_LOGITS)
        tokens, reports = draws.draw(logits, [uniform(row.seed, row.n_tokens) for row in rows])
        seconds = time.perf_counter() - clock
        for row, token, report in zip(rows, tokens, reports):
            row.decode_seconds += seconds
            yield row._accept(token, *report)
