"""The engine without threads: requests go in, and each `step` runs the model once over all that have a turn.

Every sequence's tokens are those it would have alone: rows of a batch do not see each other, draws depend on the
request's seed and the number of tokens drawn, and a row that is given to a sequence is overwritten first.
"""

import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from receptance.engine.constraint import Constraints, Matcher
from receptance.engine.numpy_sampling import new_seed, uniform
from receptance.engine.params import SamplingParams
from receptance.engine.protocols import Model
from receptance.engine.request import (
    BAD_LOGITS,
    Completion,
    FinishReason,
    GenerationError,
    Prompt,
    Request,
    Score,
    Scored,
    Token,
    prompt_ids,
    token_ids,
)
from receptance.engine.runner import Logits, Report, Runner, Work
from receptance.engine.scheduler import Limits, Phase, Scheduler, Sequence
from receptance.engine.speculation import MOST_TEXTS, Drafter, Drafts, Record, Worth
from receptance.engine.state_cache import Entry, StateCache
from receptance.engine.state_pool import StatePool
from receptance.engine.text import Reader
from receptance.errors import CheckpointError
from receptance.tokenizers import Tokenizer

# what a draw needs: of each sequence the sampler's row, the random number, the grammar's mask
Points = tuple[list[int], list[float], list[NDArray[Any] | None] | None]
Watcher = Callable[[Token | None], None]  # called with each token as it is drawn, and with None at the end


@dataclass(eq=False)
class TextJob:
    """One text of a request: what the scheduler need not know."""

    request: Request
    params: SamplingParams
    completion: Completion
    reader: Reader
    row: int  # of the sampler
    watch: Watcher | None
    matcher: Matcher | None = None
    drafts: Drafts | None = None
    evidence: int = 0  # for the draft under way
    drawn: int = 0  # tokens; of them the completion may still lack the last one, see `Core._late`
    ahead: tuple[int, float] = (-1, 0.0)  # the number of a token to be drawn, and the number that draws it
    reason: FinishReason | None = None  # while it closes
    # With keep_state, where the text can still end: the characters of it at the reader's last mark, and the state there
    # unless the sequence's row holds it.
    marked_text: int = 0
    marked_state: Any = None

    def __post_init__(self) -> None:
        params = self.params
        waits = params.stop_strings or self.matcher or self.request.keep_state or params.logprobs is not None
        self.can_be_late = not waits  # a drawn id alone decides how the text goes on


@dataclass(eq=False)
class ScoreJob:
    """The log-likelihood of ids after a prompt."""

    scored: Scored
    watch: Callable[[Scored], None]


@dataclass(eq=False)
class EmbedJob:
    watch: Callable[[Any], None]


@dataclass
class Stats:
    """Since the start. Seconds: of the model's calls, and of drawing."""

    steps: int = 0
    read: int = 0  # tokens of prompts
    cached: int = 0  # tokens of prompts that were not read, because the state after them was at hand
    written: int = 0
    drafted: int = 0
    accepted: int = 0  # of drafted tokens
    preempted: int = 0
    run_seconds: float = 0.0
    draw_seconds: float = 0.0


class Core:
    """See `Engine` for the parameters. One thread at a time."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        runner: Runner,
        limits: Limits,
        *,
        cache_bytes: int,
        host_bytes: int,
        folder: str | None = None,
        drafter: Drafter | None = None,
    ):
        self.model, self.tokenizer, self.runner = model, tokenizer, runner
        self.scheduler = Scheduler(limits)
        self.pool = StatePool(runner, host_bytes=host_bytes, folder=folder)
        self.cache = StateCache(cache_bytes)
        self.stats = Stats()
        self.drafter, self.worth, self.record = drafter, Worth(), Record()
        self._constraints: Constraints | None = None
        self._constraints_lock = threading.Lock()
        self._free_rows: list[int] = []
        self._rows = 0
        self._ready: list[tuple[Sequence, Logits]] = []  # whose prompt others had read, with the logits after it
        self._late: list[tuple[TextJob, int]] = []  # tokens whose text is made while the device does the next step

    # What is asked ----------------------------------------------------------------------------------------------------

    def submit(self, request: Request, watch: Callable[[Completion], Watcher] | None = None) -> list[Sequence]:
        """Put a request in line: one sequence for each of its n texts.

        watch: makes the watcher of each text. Raises ConfigError and GenerationError.
        """
        ids = prompt_ids(self.model, self.tokenizer, request.prompt, request.state is not None)
        if request.state is not None:
            try:
                self.model.check_state(request.state)
            except ValueError as error:
                raise GenerationError(str(error)) from None
        matcher = None if request.grammar is None else self.constraint().matcher(request.grammar)
        seed = new_seed() if request.params.seed is None else request.params.seed
        made = []
        for i in range(request.n):
            completion = Completion(ids, (seed + i) % 2**64, i)
            job = TextJob(
                request,
                request.params,
                completion,
                Reader(self.tokenizer, request.params, request.keep_state),
                self._take_row(request.params, ids),
                watch(completion) if watch else None,
                matcher=matcher.fork() if matcher else None,
                drafts=self.drafter.start(ids) if self.drafter and not matcher else None,
            )
            shares = request.state is None or request.state_key is not None
            root = None if request.state is None else request.state_key
            made.append(Sequence(array("i", ids), request.priority, job, root=root, shares=shares))
        for sequence in made:
            self.scheduler.add(sequence)
        return made

    def submit_score(self, score: Score, watch: Callable[[Scored], None]) -> Sequence:
        """Put the scoring of a continuation in line. Raises GenerationError."""
        context = prompt_ids(self.model, self.tokenizer, score.context, False)
        ids = token_ids(self.model, self.tokenizer, score.continuation)
        job = ScoreJob(Scored(ids, [], True), watch)
        sequence = Sequence(array("i", [*context, *ids[:-1]]), score.priority, job, prompt_length=len(context))
        self.scheduler.add(sequence)
        return sequence

    def submit_embedding(self, prompt: Prompt, watch: Callable[[Any], None], priority: int = 0) -> Sequence:
        ids = prompt_ids(self.model, self.tokenizer, prompt, False)
        sequence = Sequence(array("i", ids), priority, EmbedJob(watch))
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End it now: its place is free at once. With keep_state its state is the one after the text so far."""
        self._catch_up()
        job = sequence.job
        if sequence.phase is Phase.DONE:
            return
        if not isinstance(job, TextJob):
            self._leave(sequence)
        elif sequence.phase is Phase.CLOSING:
            pass  # its text is complete
        elif sequence.phase is Phase.WRITING:
            self._finish(sequence, "cancelled")
        else:
            self._end(sequence, "cancelled")

    def fail_all(self, error: Exception) -> None:
        """Nothing that is under way can go on."""
        self._catch_up()
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            self._fail(sequence, error)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def constraint(self) -> Constraints:
        """From any thread."""
        with self._constraints_lock:
            if self._constraints is None:
                self._constraints = Constraints(self.tokenizer, self.runner.vocab)
            return self._constraints

    def _take_row(self, params: SamplingParams, ids: list[int]) -> int:
        if not self._free_rows:
            self._free_rows, self._rows = [self._rows], self._rows + 1
        self.runner.sampler.admit(self._free_rows[-1], params, ids)
        return self._free_rows.pop()

    # A step -----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        if self.scheduler.waiting:
            self._admit()
        if self._ready:
            ready, self._ready = self._ready, []
            self._draw([sequence for sequence, _ in ready], self.runner.join([logits for _, logits in ready]))
        plan = self.scheduler.plan()
        drafting = self.drafter is not None and len(plan) <= MOST_TEXTS
        if self._late and (drafting or any(s.phase is not Phase.WRITING for s, _ in plan)):
            self._catch_up()  # this will not be a step of writing alone
        scoring = [(s, n) for s, n in plan if s.phase is Phase.SCORING]
        if scoring:
            self._score(scoring)
            plan = [x for x in plan if x[0].phase is not Phase.SCORING and x[0].phase is not Phase.DONE]
        drafts = self._drafts(plan) if self.drafter else None
        if drafts:
            self._verify([s for s, _ in plan], drafts)
        elif plan:
            self._run(plan)
        self.stats.steps += 1

    def _admit(self) -> None:
        while (sequence := self.scheduler.candidate()) is not None:
            if sequence.parked is None and sequence.shares and self._follows(sequence):
                continue
            if not self.pool.free_slots:
                victim = self.scheduler.victim(sequence)
                if victim is None:
                    return
                self._preempt(victim)
            if sequence.parked is None:
                entry = self._entry(sequence)
                if sequence.shares:
                    self.cache.count(entry is not None)
                self._begin(sequence, entry)
                continue
            try:
                state = self.pool.get(sequence.parked)
            except CheckpointError as error:  # its file is lost: the others go on
                self._fail(sequence, error)
                continue
            slot = self.pool.take()
            self.runner.load(slot, state)
            sequence.parked = None
            self.scheduler.admit(sequence, slot, sequence.resumes)

    def _entry(self, sequence: Sequence) -> Entry | None:
        """The longest known prefix of what it must read."""
        if not sequence.shares:
            return None
        align = self.scheduler.limits.align
        kept = self.cache.find(sequence.root, sequence.tokens[: sequence.prompt_length], align)
        left: Entry | None = sequence.known
        return left if kept is None or (left is not None and left.length >= kept.length) else kept

    def _follows(self, sequence: Sequence) -> bool:
        """Whether it waits for another that is reading the same."""
        reading = any(other.phase is Phase.READING for other in self.scheduler.running)
        if not reading:
            return False
        entry = self._entry(sequence)
        found = self.scheduler.find_leader(sequence, entry.length if entry else 0)
        if found is not None:
            self.scheduler.follow(sequence, *found)
        return found is not None

    def _begin(self, sequence: Sequence, entry: Entry | None) -> None:
        """Give it a row that holds the state it starts from."""
        slot, job = self.pool.take(), sequence.job
        if entry is not None:
            self.runner.load(slot, entry.state)
            sequence.fed = entry.length
            self.stats.cached += entry.length
        elif isinstance(job, TextJob) and job.request.state is not None:
            self.runner.load(slot, job.request.state)
        else:
            self.runner.reset(slot)
        if isinstance(job, TextJob):
            job.completion.cached_tokens = sequence.fed
        sequence.known = None
        self.scheduler.admit(sequence, slot, Phase.READING)
        if sequence.fed == sequence.prompt_length:
            assert entry is not None
            logits = self.runner.join([entry.logits])
            if self._prompt_is_read(sequence, logits, 0):
                self._ready.append((sequence, entry.logits))

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        sequence.parked = self.pool.park(self.runner.save(sequence.slot))
        self.pool.release(sequence.slot)
        self.scheduler.preempt(sequence)
        self.stats.preempted += 1

    def _run(self, plan: list[tuple[Sequence, int]]) -> None:
        works = []
        for sequence, count in plan:
            assert sequence.slot is not None
            if sequence.phase is Phase.WRITING and sequence.job.request.keep_state:
                self._mark_state(sequence)
            works.append(Work(sequence.slot, sequence.tokens[sequence.fed : sequence.fed + count]))
        if all(sequence.phase is Phase.WRITING for sequence, _ in plan):
            self._write([sequence for sequence, _ in plan], works)
            return
        logits = self._forward(works)
        drawing = []
        for i, (sequence, count) in enumerate(plan):
            sequence.fed += count
            if sequence.phase is Phase.WRITING:
                drawing.append(i)
            elif sequence.phase is Phase.READING:
                self.stats.read += count
                if self._after_reading(sequence, logits, i):
                    drawing.append(i)
            elif sequence.pending == 0:
                self._end(sequence, sequence.job.reason)
        if drawing:
            picked = logits if len(drawing) == len(plan) else self.runner.pick(logits, drawing)
            self._draw([plan[i][0] for i in drawing], picked)

    def _write(self, sequences: list[Sequence], works: list[Work]) -> None:
        """A step of texts that all write: in one call of the runner where it has one, or in two."""
        points = self._points(sequences)

        def meanwhile() -> None:
            self._catch_up()
            for sequence in sequences:
                job: TextJob = sequence.job
                job.ahead = job.drawn + 1, uniform(job.completion.seed, job.drawn + 1)

        clock = time.perf_counter()
        done = self.runner.step(works, *points, meanwhile)
        if done is None:
            meanwhile()
            logits = self._forward(works)
            drawn = self._drawn(logits, points)
        else:
            drawn, logits = done
            self.stats.run_seconds += time.perf_counter() - clock
        self.worth.measured(len(works), time.perf_counter() - clock)
        for sequence, work in zip(sequences, works):
            sequence.fed += len(work.tokens)
        self._take(sequences, drawn, logits, may_be_late=self.runner.overlaps)

    def _forward(self, works: list[Work], *, all_logits: bool = False) -> Logits:
        clock = time.perf_counter()
        logits = self.runner.run(works, all_logits=all_logits)
        self.stats.run_seconds += time.perf_counter() - clock
        return logits

    # Reading ----------------------------------------------------------------------------------------------------------

    def _after_reading(self, sequence: Sequence, logits: Logits, row: int) -> bool:
        """A chunk of the prompt was read; row: of the logits after it. Returns whether a token is to be drawn."""
        is_read = sequence.fed == sequence.prompt_length
        if sequence.shares:
            wanted = sequence.fed in sequence.cuts
            at_boundary = is_read or sequence.fed % self.scheduler.limits.every == 0
            if wanted or (at_boundary and self.cache.max_bytes):
                self._keep(sequence, self.runner.keep(logits, row) if is_read or wanted else None)
        return is_read and self._prompt_is_read(sequence, logits, row)

    def _prompt_is_read(self, sequence: Sequence, logits: Logits, row: int) -> bool:
        job = sequence.job
        assert sequence.slot is not None
        if isinstance(job, EmbedJob):
            vector = self.runner.embedding(sequence.slot)
            self._leave(sequence)
            job.watch(vector / max(float((vector * vector).sum()) ** 0.5, 1e-12))
        elif isinstance(job, ScoreJob):
            if job.scored.ids:
                self._add_scores(job.scored, logits, row, job.scored.ids[:1])
            sequence.phase = Phase.SCORING
            if sequence.pending == 0:
                self._leave(sequence)
                job.watch(job.scored)
        else:
            sequence.phase = Phase.WRITING
            if job.params.max_tokens > 0:
                return True
            self._finish(sequence, "length")
        return False

    def _keep(self, sequence: Sequence, logits: Any) -> None:
        """The state after what was read so far: into the cache, and to those that wait for it."""
        assert sequence.slot is not None
        state = self.runner.save(sequence.slot)
        size = state.nbytes + (0 if logits is None else logits.nbytes)
        entry = Entry(sequence.fed, state, logits, size)
        self.cache.add(sequence.root, sequence.tokens[: sequence.fed], entry)
        for other in self.scheduler.followers(sequence):
            other.leader, other.known = None, entry
            if self.pool.free_slots:
                self.cache.count(True)
                self._begin(other, entry)

    def _score(self, plan: list[tuple[Sequence, int]]) -> None:
        works = []
        for sequence, count in plan:
            assert sequence.slot is not None
            works.append(Work(sequence.slot, sequence.tokens[sequence.fed : sequence.fed + count]))
        logits = self._forward(works, all_logits=True)
        row = 0
        for sequence, count in plan:
            scored: Scored = sequence.job.scored
            done = len(scored.logprobs)
            self._add_scores(scored, logits, row, scored.ids[done : done + count])
            row += count
            sequence.fed += count
            self.stats.read += count
            if sequence.pending == 0:
                self._leave(sequence)
                sequence.job.watch(scored)

    def _add_scores(self, scored: Scored, logits: Logits, row: int, targets: list[int]) -> None:
        logprobs, greedy = self.runner.score(logits, row, targets)
        scored.logprobs += logprobs
        scored.greedy = scored.greedy and greedy

    # Drafts -----------------------------------------------------------------------------------------------------------

    def _drafts(self, plan: list[tuple[Sequence, int]]) -> list[list[int]] | None:
        """Guesses for each sequence of a plan in which all write; None: no draft pays."""
        if not 0 < len(plan) <= MOST_TEXTS or self.pool.free_slots < len(plan):
            return None
        is_hopeful = False
        for sequence, _ in plan:
            if sequence.phase is not Phase.WRITING:
                return None
            job: TextJob = sequence.job
            job.evidence = job.drafts.evidence() if job.drafts else 0
            is_hopeful |= job.evidence > 0
        if not is_hopeful:
            return None
        drafts = []
        for sequence, _ in plan:
            job = sequence.job
            left = job.params.max_tokens - len(job.completion.tokens) - 1
            length = min(self.record.wanted(self.worth, job.evidence, len(plan)), left)
            drafts.append(job.drafts.propose(length) if job.drafts and length > 0 else [])
        return drafts if any(drafts) else None

    def _verify(self, sequences: list[Sequence], drafts: list[list[int]]) -> None:
        """One call over what each has to read and its draft, then draws for as long as they are the guesses."""
        works, spares, first, rows = [], [], [], 0
        for sequence, draft in zip(sequences, drafts):
            assert sequence.slot is not None
            if sequence.job.request.keep_state:
                self._mark_state(sequence)
            spares.append(self.pool.take())
            unread = sequence.tokens[sequence.fed :]
            works.append(Work(sequence.slot, [*unread, *draft], spares[-1]))
            first.append(rows + len(unread) - 1)
            rows += len(unread) + len(draft)
        clock = time.perf_counter()
        logits = self._forward(works, all_logits=True)
        ended = {id(sequence): len(sequence.tokens) for sequence in sequences}
        right = self._check(sequences, drafts, logits, first)
        self.worth.measured(rows, time.perf_counter() - clock)
        for sequence, draft, spare, count in zip(sequences, drafts, spares, right):
            job: TextJob = sequence.job
            if draft:
                self.record.checked(job.evidence, len(draft), count)
                self.stats.drafted += len(draft)
                self.stats.accepted += count
            if sequence.phase is Phase.WRITING and count == len(
                draft
            ):  # the row beside holds the state after all of it
                assert sequence.slot is not None
                if job.request.keep_state and job.marked_state is None:
                    job.marked_state = self.runner.save(sequence.slot)
                sequence.fed = ended[id(sequence)] + len(draft)
                sequence.slot, spare = spare, sequence.slot
            self.pool.release(spare)

    def _check(self, sequences: list[Sequence], drafts: list[list[int]], logits: Logits, first: list[int]) -> list[int]:
        """Draw for as long as draws are the guesses. Returns how many guesses of each draft were right.

        first: of the logits of each sequence, the row after which its draft begins.
        """
        jobs: list[TextJob] = [sequence.job for sequence in sequences]
        ahead: list[list[int]] | None = None
        if not any(job.matcher or job.params.has_penalties or job.params.logprobs is not None for job in jobs):
            ahead = self._drawn_ahead(jobs, drafts, logits, first)  # a draw depends on nothing that others decide
        right = [0] * len(sequences)
        going = list(range(len(sequences)))
        while going:
            chosen = [sequences[i] for i in going]
            if ahead is None:
                on = self._draw(chosen, self.runner.pick(logits, [first[i] + right[i] for i in going]))
            else:
                on = self._take(chosen, [ahead[i][right[i]] for i in going], logits)
            still = set(map(id, on))
            held = []
            for i in going:
                draft = drafts[i]
                if id(sequences[i]) in still and right[i] < len(draft) and sequences[i].tokens[-1] == draft[right[i]]:
                    right[i] += 1
                    held.append(i)
            going = held
        return right

    def _drawn_ahead(
        self, jobs: list[TextJob], drafts: list[list[int]], logits: Logits, first: list[int]
    ) -> list[list[int]]:
        """The tokens that each text has if its draft holds, drawn in one call."""
        where, rows, uniforms = [], [], []
        for job, draft, row in zip(jobs, drafts, first):
            for i in range(len(draft) + 1):
                where.append(row + i)
                rows.append(job.row)
                uniforms.append(uniform(job.completion.seed, job.drawn + i))
        picked = logits if len(where) == len(logits) else self.runner.pick(logits, where)
        drawn = iter(self._drawn(picked, (rows, uniforms, None)))
        return [[next(drawn) for _ in range(len(draft) + 1)] for draft in drafts]

    # Drawing ----------------------------------------------------------------------------------------------------------

    def _points(self, sequences: list[Sequence]) -> Points:
        jobs: list[TextJob] = [sequence.job for sequence in sequences]
        uniforms = [
            job.ahead[1] if job.ahead[0] == job.drawn else uniform(job.completion.seed, job.drawn) for job in jobs
        ]
        masks = [job.matcher.mask() if job.matcher else None for job in jobs] if any(j.matcher for j in jobs) else None
        return [job.row for job in jobs], uniforms, masks

    def _drawn(self, logits: Logits, points: Points) -> list[int]:
        clock = time.perf_counter()
        drawn = self.runner.sampler.draw(logits, *points)
        self.stats.draw_seconds += time.perf_counter() - clock
        return drawn

    def _draw(self, sequences: list[Sequence], logits: Logits) -> list[Sequence]:
        """The next token of each sequence. Returns those that go on."""
        return self._take(sequences, self._drawn(logits, self._points(sequences)), logits)

    def _take(
        self, sequences: list[Sequence], drawn: list[int], logits: Logits, *, may_be_late: bool = False
    ) -> list[Sequence]:
        """Their next tokens, -1 where logits were not numbers. Returns those that go on.

        may_be_late: texts of tokens may be made during the next step, where nothing but the token decides what follows.
        """
        going = []
        for i, (sequence, token) in enumerate(zip(sequences, drawn)):
            job: TextJob = sequence.job
            if token < 0:
                self._fail(sequence, GenerationError(BAD_LOGITS))
                continue
            if may_be_late and job.can_be_late and not job.reader.is_last(token, job.drawn + 1):
                job.drawn += 1
                sequence.tokens.append(token)
                self._late.append((job, token))
                going.append(sequence)
                continue
            wanted = job.params.logprobs
            report = (None, ()) if wanted is None else self.runner.report(logits, i, token, wanted)
            if self._accept(sequence, token, report):
                going.append(sequence)
        return going

    def _catch_up(self) -> None:
        """Make the texts of tokens that were drawn, and tell who watches."""
        late, self._late = self._late, []
        for job, token in late:
            text, _ = job.reader.accept(token)
            self._record(job, Token(token, text))

    def _record(self, job: TextJob, drawn: Token) -> None:
        """A token with its text: for the completion, the guesses to come and who watches."""
        job.completion.tokens.append(drawn)
        self.stats.written += 1
        if job.drafts:
            job.drafts.add(drawn.id)
        if job.watch:
            job.watch(drawn)

    def _accept(self, sequence: Sequence, token: int, report: Report) -> bool:
        """Take a drawn token. Returns whether the text goes on."""
        job: TextJob = sequence.job
        if job.matcher and (error := job.matcher.error) is not None:
            self._fail(sequence, error)
            return False
        if job.request.keep_state and sequence.pending == 0 and job.reader.is_clean:
            job.reader.mark()
            job.marked_text, job.marked_state = job.reader.passed, None
        text, reason = job.reader.accept(token)
        if job.matcher and reason is None and job.matcher.advance(token):
            if (error := job.matcher.error) is not None:
                self._fail(sequence, error)
                return False
            reason, text = "stop", text + job.reader.finish()
        job.drawn += 1
        self._record(job, Token(token, text, *report))
        if reason is None:
            sequence.tokens.append(token)
            return True
        self._finish(sequence, reason)
        return False

    def _mark_state(self, sequence: Sequence) -> None:
        """Keep the state at the last mark, when the row goes on from there and the text can still end there."""
        job: TextJob = sequence.job
        assert sequence.slot is not None
        if job.marked_state is None and not job.reader.is_clean:
            job.marked_state = self.runner.save(sequence.slot)

    # Ends -------------------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """The text is complete. With keep_state, go back to the last mark and read what the text has beyond it."""
        job: TextJob = sequence.job
        if not job.request.keep_state:
            self._end(sequence, reason)
            return
        assert sequence.slot is not None
        self._ready = [x for x in self._ready if x[0] is not sequence]
        if job.marked_state is not None:
            self.runner.load(sequence.slot, job.marked_state)
        if job.reader.is_clean:
            missing = job.reader.unmarked
        else:  # the text ends within a token
            missing = self.tokenizer.encode(job.completion.text[job.marked_text :])
        sequence.tokens[sequence.fed :] = array("i", missing)
        sequence.phase, job.reason = Phase.CLOSING, reason
        if not missing:
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        job: TextJob = sequence.job
        is_closed, keeps = sequence.phase is Phase.CLOSING, self.cache.max_bytes and sequence.shares
        if sequence.slot is not None and (is_closed or (keeps and sequence.phase is Phase.WRITING)):
            state = self.runner.save(sequence.slot)
            if is_closed:
                job.completion.state = state
            if keeps:  # a chat that is sent again goes on from here
                entry = Entry(sequence.fed, state, None, state.nbytes)
                self.cache.add(sequence.root, sequence.tokens[: sequence.fed], entry)
        job.completion.finish_reason = reason
        self._leave(sequence)
        if job.watch:
            job.watch(None)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        job = sequence.job
        self._leave(sequence)
        if isinstance(job, TextJob):
            job.completion.error = error
            if job.watch:
                job.watch(None)
        else:
            job.watch(error)

    def _leave(self, sequence: Sequence) -> None:
        """Free all that the sequence holds."""
        self._ready = [x for x in self._ready if x[0] is not sequence]
        self.scheduler.remove(sequence)
        if sequence.slot is not None:
            self.pool.release(sequence.slot)
        sequence.slot = sequence.parked = sequence.known = None
        if isinstance(sequence.job, TextJob):
            self.runner.sampler.free(sequence.job.row)
            self._free_rows.append(sequence.job.row)
            if sequence.job.drafts:
                sequence.job.drafts.close()
