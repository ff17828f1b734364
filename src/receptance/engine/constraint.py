"""Texts that follow a grammar: which tokens may come next, through llguidance (the extra `grammar`)."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from receptance.engine.request import Grammar, GrammarError
from receptance.errors import ConfigError
from receptance.tokenizers import Tokenizer

MAX_GRAMMAR_CHARS = 200_000
COMPACT: Any = {"whitespace_flexible": False}  # JSON allows blanks without end, and a model may write nothing else


class _Words:
    """The tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text)


class Matcher:
    """The place in a grammar that one text has reached."""

    def __init__(self, matcher: Any, mask_words: int):
        self._matcher = matcher
        self._mask = np.zeros((1, mask_words), np.int32)

    def mask(self) -> NDArray[np.uint32]:
        """A bit for each token that may come next, [ceil(V / 32)]; valid until the next call."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        mask: NDArray[np.uint32] = self._mask[0].view(np.uint32)
        return mask

    def advance(self, token: int) -> bool:
        """Take a drawn token. Returns whether nothing can come after it."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> GrammarError | None:
        """Why it can go no further, after `mask` or `advance`: the grammar takes more work than is allowed."""
        if not self._matcher.is_error():
            return None
        why = self._matcher.get_error().strip().splitlines()[0]
        return GrammarError(f"the grammar cannot be followed any further: {why[:300]}")

    def fork(self) -> "Matcher":
        return Matcher(self._matcher.deep_copy(), self._mask.shape[1])


class Constraints:
    """Compiles grammars for one vocabulary; the last few are kept."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        try:
            import llguidance
        except ModuleNotFoundError:
            raise ConfigError("a grammar needs the package llguidance: pip install 'receptance[grammar]'") from None
        self._library = llguidance
        words = llguidance.TokenizerWrapper(_Words(tokenizer))
        self._tokenizer = llguidance.LLTokenizer(words, n_vocab=max(vocab, tokenizer.vocab_size))
        self._words = -(-max(vocab, tokenizer.vocab_size) // 32)
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the start of the grammar. Raises ConfigError for one that is wrong or too large."""
        return self._compiled(grammar).fork()

    def _compile(self, grammar: Grammar) -> Matcher:
        matcher = self._library.LLMatcher
        text = grammar.json_schema or grammar.regex or grammar.lark or ""
        if len(text) > MAX_GRAMMAR_CHARS:
            raise ConfigError(f"the grammar has {len(text):,} characters, at most {MAX_GRAMMAR_CHARS:,} are taken")
        try:
            if grammar.json_schema is not None:
                schema = '{"type": "object"}' if grammar.json_schema.strip() == "{}" else grammar.json_schema
                compiled = matcher.grammar_from_json_schema(schema, defaults=COMPACT)
            elif grammar.regex is not None:
                compiled = matcher.grammar_from_regex(text)
            else:
                compiled = matcher.grammar_from_lark(text)
        except ValueError as error:
            raise ConfigError(f"the grammar is not valid: {error}") from None
        made = matcher(self._tokenizer, compiled, log_level=0)
        if made.is_error():
            raise ConfigError(f"the grammar is not valid: {made.get_error().strip().splitlines()[0]}")
        return Matcher(made, self._words)
