"""Who runs next, and how many tokens of whom: decided from numbers alone, without a tensor.

A sequence waits, reads (its prompt, in chunks), then writes (one token a step) or is scored, perhaps closes (reads what
its final state lacks), and is gone. One that a more urgent one displaces waits again, with its state put aside.
"""

import itertools
from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from receptance.engine.state_cache import common_prefix

LEAST_BOUNDARY = 256
PIECE = 64  # tokens of a prompt in one call, where results must not depend on what else is read


class Phase(Enum):
    WAITING = "waiting"
    READING = "reading"
    WRITING = "writing"
    SCORING = "scoring"
    CLOSING = "closing"
    DONE = "done"


@dataclass(eq=False)
class Sequence:
    """What the scheduler knows of one text. `job`: what the engine knows of it.

    tokens: all that are to be fed, of the prompt and then of the text; fed: how many of them the state has read.
    prompt_length: of them, those whose reading may be shared.
    root: of its prefixes in the cache; shares: whether prefixes are shared at all.
    cuts: positions in the prompt at which a chunk must end, because another sequence goes on from there.
    """

    tokens: "array[int]"
    priority: int
    job: Any
    root: str | None = None
    shares: bool = True
    phase: Phase = Phase.WAITING
    prompt_length: int = 0
    fed: int = 0
    slot: int | None = None
    parked: Any = None  # its state, while it waits after having run
    resumes: Phase = Phase.READING  # after that
    cuts: set[int] = field(default_factory=set)
    leader: "Sequence | None" = None  # whose reading it waits for, up to `shared` tokens
    shared: int = 0
    known: Any = None  # the cache's entry that a leader left for it
    arrival: int = 0
    turn: int = 0

    def __post_init__(self) -> None:
        self.prompt_length = self.prompt_length or len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens still to be fed."""
        return len(self.tokens) - self.fed


@dataclass(frozen=True)
class Limits:
    """slots: sequences with a row. step_tokens: fed in one step; where sequences are writing, busy_step_tokens.

    boundary: prompts are cut at its multiples, where states are kept for others (None: of 256, or of a quarter of
    step_tokens where that is more: what takes so many at once reads a short piece hardly faster).
    least_shared: a prefix that is being read by another sequence is waited for if it is at least this much longer than
    what is kept. align: prompts are cut at its multiples alone, so that a prompt is cut alike whatever else is read.
    """

    slots: int
    step_tokens: int = 512
    busy_step_tokens: int = 128
    boundary: int | None = None
    least_shared: int = 32
    align: int = 1

    @property
    def every(self) -> int:
        """Tokens between two places at which a prompt is cut."""
        return max(LEAST_BOUNDARY, self.step_tokens // 4) if self.boundary is None else self.boundary


class Scheduler:
    def __init__(self, limits: Limits):
        self.limits = limits
        self.waiting: list[Sequence] = []  # by priority, then by arrival
        self.running: list[Sequence] = []
        self._numbers = itertools.count()

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = next(self._numbers)
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: (s.priority, s.arrival))

    def remove(self, sequence: Sequence) -> None:
        """It is done, or cancelled."""
        (self.waiting if sequence.phase is Phase.WAITING else self.running).remove(sequence)
        sequence.phase = Phase.DONE
        self.unblock(sequence)

    def unblock(self, leader: Sequence) -> None:
        """Nobody waits for this one any more."""
        for other in self.waiting:
            if other.leader is leader:
                other.leader = None

    def candidate(self) -> Sequence | None:
        """The next to be admitted: the first that does not wait for another's prefix."""
        return next((s for s in self.waiting if s.leader is None), None)

    def find_leader(self, sequence: Sequence, known: int) -> tuple[Sequence, int] | None:
        """A running sequence that is reading what this one must read too, and how much they share.

        known: how many tokens of it need not be read, because the state after them is kept.
        """
        best: tuple[Sequence, int] | None = None
        for other in self.running:
            if other.phase is not Phase.READING or not other.shares or other.root != sequence.root:
                continue
            shared = common_prefix(other.tokens[: other.prompt_length], sequence.tokens[: sequence.prompt_length])
            if shared < sequence.prompt_length or shared < other.prompt_length:
                shared -= shared % self.limits.align
            least = max(known + min(self.limits.least_shared, sequence.prompt_length - known), other.fed + 1)
            if shared >= least and (best is None or shared > best[1]):
                best = other, shared
        return best

    def follow(self, sequence: Sequence, leader: Sequence, shared: int) -> None:
        """Let it wait until the leader has read what they share."""
        sequence.leader, sequence.shared = leader, shared
        leader.cuts.add(shared)

    def followers(self, leader: Sequence) -> list[Sequence]:
        """Those that wait for what it has just read."""
        return [s for s in self.waiting if s.leader is leader and s.shared == leader.fed]

    def admit(self, sequence: Sequence, slot: int, phase: Phase) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.slot, sequence.phase, sequence.turn = slot, phase, next(self._numbers)

    def victim(self, newcomer: Sequence) -> Sequence | None:
        """The running sequence that gives its place to a more urgent one: the least urgent, youngest."""
        able = [s for s in self.running if s.pending and s.phase is not Phase.CLOSING]
        last = max(able, key=lambda s: (s.priority, s.arrival), default=None)
        return last if last is not None and last.priority > newcomer.priority else None

    def preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.slot, sequence.resumes = None, sequence.phase
        self.unblock(sequence)
        self._wait(sequence)

    def plan(self) -> list[tuple[Sequence, int]]:
        """Sequences and how many tokens to feed to each: all that write, and as much reading as there is room for.

        Those that read take turns, the more urgent first, so that a short prompt does not wait for a long one.
        """
        works: list[tuple[Sequence, int]] = []
        readers: list[Sequence] = []
        for s in self.running:
            if pending := len(s.tokens) - s.fed:  # `pending` itself, a call a token, would be felt
                works.append((s, pending)) if s.phase is Phase.WRITING else readers.append(s)
        if not readers:
            return works
        limits = self.limits
        left = max(limits.busy_step_tokens - len(works), 16) if works else limits.step_tokens
        readers.sort(key=lambda s: (s.priority, s.turn))
        share = max(left // len(readers), min(left, 16))
        for sequence in readers:
            most = self._to_cut(sequence)
            count = min(most, share, left)
            if count < most:
                count = min(most, max(count // limits.align, 1) * limits.align)
            works.append((sequence, count))
            sequence.turn = next(self._numbers)
            left -= count
            if left <= 0:
                break
        return works

    def _to_cut(self, sequence: Sequence) -> int:
        """Tokens up to the next place in the prompt where the state is wanted, by others or for the cache."""
        if sequence.fed >= sequence.prompt_length or not sequence.shares:
            return sequence.pending
        every = self.limits.every
        after_boundary = (sequence.fed // every + 1) * every
        cuts = [cut for cut in sequence.cuts if cut > sequence.fed]
        return min([after_boundary, sequence.prompt_length, *cuts]) - sequence.fed
