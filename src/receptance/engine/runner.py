"""What the engine asks of whatever computes: rows of states, tokens through them, and draws. It decides nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from receptance.engine.params import SamplingParams

Report = tuple[float | None, tuple[tuple[int, float], ...]]  # a token's log-probability, and the most probable ones
Logits = Any  # [n, V], of the runner's own kind


@dataclass(slots=True)  # not frozen: one is made for each token that is written, and that would double its price
class Work:
    """Tokens to feed to the state in row `slot`; the state after them goes to row `target` (None: the same)."""

    slot: int
    tokens: Sequence[int]
    target: int | None = None


class Sampler(Protocol):
    """Parameters and counts of sequences, each known by a row number, from which tokens are drawn."""

    def admit(self, row: int, params: SamplingParams, prompt: Sequence[int]) -> None: ...

    def draw(
        self,
        logits: Logits,
        rows: Sequence[int],
        uniforms: Sequence[float],
        masks: Sequence[NDArray[Any] | None] | None,
    ) -> list[int]:
        """The next token of each row of logits, -1 where the logits are not numbers, and one more counted.

        masks: for rows with a grammar, a bit for each token that may come, uint32 [ceil(V / 32)].
        """

    def free(self, row: int) -> None: ...


class Runner(Protocol):
    """A model with `slots` rows of states."""

    slots: int
    vocab: int  # ids that can be drawn
    state_bytes: int  # of one row
    sampler: Sampler
    overlaps: bool = False  # whether `step` leaves the host free while the device works

    def reset(self, slot: int) -> None:
        """The state before any token."""

    def load(self, slot: int, state: Any) -> None:
        """From a State of one row, of any engine."""

    def save(self, slot: int) -> Any:
        """A copy, as the runner's own State of one row in host memory."""

    def run(self, works: Sequence[Work], *, all_logits: bool = False) -> Logits:
        """Logits after the last token of each work [n, V], or of all tokens of all works [sum of lengths, V]."""

    def step(
        self,
        works: Sequence[Work],
        rows: Sequence[int],
        uniforms: Sequence[float],
        masks: Sequence[NDArray[Any] | None] | None,
        meanwhile: Callable[[], None],
    ) -> tuple[list[int], Logits] | None:
        """`run` and the sampler's `draw` in one, where that saves time; None, and nothing done, where it does not.

        meanwhile: called once the device has its work, if `overlaps`.
        """
        return None

    def keep(self, logits: Logits, row: int) -> Any:
        """A copy of one row of logits."""

    def join(self, rows: Sequence[Any]) -> Logits:
        """Rows that were kept as logits [n, V]."""

    def pick(self, logits: Logits, rows: Sequence[int]) -> Logits:
        """Some rows of the logits."""

    def report(self, logits: Logits, row: int, token: int, n: int) -> Report:
        """The token's log-probability and the n most probable tokens, of the raw logits."""

    def score(self, logits: Logits, first: int, targets: Sequence[int]) -> tuple[list[float], bool]:
        """Log-probabilities of targets under rows first, first + 1, …, and whether each is the most probable token."""

    def embedding(self, slot: int) -> NDArray[Any]:
        """What the last layer's channel mix last read, [C], float32."""

    def pack(self, state: Any) -> bytes: ...

    def unpack(self, data: bytes) -> Any:
        """Raises ValueError for damaged bytes."""
