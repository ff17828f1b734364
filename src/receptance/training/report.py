"""A run's news: rows for the log, the trackers and whoever listens; looks at validation texts and samples."""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from receptance.atomic import replacing
from receptance.errors import ConfigError
from receptance.models import RWKV
from receptance.tokenizers.base import Tokenizer
from receptance.training.evaluate import Loss, evaluate
from receptance.training.guard import verdict
from receptance.training.metrics import flops_per_token, peak_flops, peak_memory
from receptance.training.optim import averaged
from receptance.training.resume import folders
from receptance.training.step import rate
from receptance.training.track import Tracker

if TYPE_CHECKING:
    from receptance.training.loop import Run

Sampler = Callable[[RWKV, Tokenizer, str, int], str]  # (model, tokenizer, prompt, tokens) → continuation
Row = dict[str, float]


class Reporter(Protocol):
    """Where a run's news goes; the command line shows a progress bar, tests listen."""

    def message(self, text: str) -> None: ...
    def step(self, row: Row) -> None: ...


class Silent:
    """The reporter of all processes but the first."""

    def message(self, text: str) -> None:
        pass

    def step(self, row: Row) -> None:
        pass


class Log:
    """The run's history, one JSON object a line; rows beyond the step we resume from are dropped."""

    def __init__(
        self,
        path: Path | None,
        first: int,
        trackers: Sequence[Tracker] = (),
        message: Callable[[str], None] = lambda text: None,
    ):
        """path: None writes nothing, as all processes but the first do."""
        self.path = path
        self.rows: list[Row] = []
        self._trackers, self._message = trackers, message
        if path is None:
            return
        if first and path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line being written when the run was killed
                    continue
                if row["step"] <= first:
                    self.rows.append({name: math.nan if x is None else x for name, x in row.items()})
        with replacing(path) as file:
            file.write("".join(map(_line, self.rows)).encode())
        self._size, self._unwritten = path.stat().st_size, ""

    def write(self, row: Row) -> None:
        """Rows that find the disk full are written with a later one."""
        self.rows.append(row)
        if self.path is None:
            return
        told, self._unwritten = bool(self._unwritten), self._unwritten + _line(row)
        try:
            with open(self.path, "r+b") as file:
                file.truncate(self._size)  # part of a line, if the disk was full before
                file.seek(self._size)
                file.write(self._unwritten.encode())
            self._size, self._unwritten = self._size + len(self._unwritten), ""
        except OSError as error:
            if not told:
                self._message(f"{self.path}: could not be written ({error.strerror}), going on; its rows follow later")
        for tracker in self._trackers:
            tracker.write(row)


def _line(row: Row) -> str:
    """A number that is not finite becomes null: JSON knows no other."""
    return json.dumps({name: x if math.isfinite(x) else None for name, x in row.items()}) + "\n"


class Meter:
    """Speed since the last row, without the time that `pause` takes out."""

    def __init__(self, run: "Run", first: int):
        self._tokens = run.config.run.batch_size * run.config.run.ctx_len
        self._step, self._start = first, time.perf_counter()
        self._flops, self._peak = flops_per_token(run.model), peak_flops(run.device, run.precision)
        self._device = run.device

    def pause(self, seconds: float) -> None:
        self._start += seconds

    def read(self, done: int) -> Row:
        """Speed over the steps since the last reading, and the most memory so far. Call it with the device idle."""
        now = time.perf_counter()
        speed = (done - self._step) * self._tokens / (now - self._start)
        self._step, self._start = done, now
        row = {"tokens_per_second": speed, "memory_gib": peak_memory(self._device) / 2**30}
        if self._peak is not None:
            row["mfu"] = speed * self._flops / self._peak
        return row


def step_row(run: "Run", step: int, outcome: Tensor, meter: Meter) -> Row:
    """The numbers of step `step` (0-based). Raises ConfigError when the run has gone wrong for good."""
    seen = verdict(outcome)
    optim = run.config.optim
    good = last_checkpoint(run, step + 1 - seen.in_a_row)
    where = f"by step {step + 1}; {good}. Lower optim.lr or raise optim.warmup_steps"
    if seen.in_a_row >= optim.max_skips:
        numbers = f"loss {seen.loss:.4g}, gradient norm {seen.grad_norm:.4g}"
        raise ConfigError(f"{seen.in_a_row} updates in a row were skipped ({numbers}) {where}")
    if not math.isfinite(seen.loss) and not optim.skip_nonfinite:
        raise ConfigError(f"the loss became {seen.loss} {where}")
    row = {"step": step + 1, "loss": seen.loss, "bits": seen.loss / math.log(2), "lr": rate(run.config, step)}
    return row | {"grad_norm": seen.grad_norm, "skipped": seen.skipped} | meter.read(step + 1)


def last_checkpoint(run: "Run", taken: int) -> str:
    """Name the newest one whose weights gave a sound loss; those that update `taken`, the last, made did not."""
    found = folders(run.out / "checkpoints")
    if run.config.optim.skip_nonfinite:
        good = [folder for folder in found if int(folder.name.removeprefix("step-")) < taken]
    else:
        good = found[1:]  # which update came before the NaN is not known; the newest may be its
    return f"the last good checkpoint is {good[0]}" if good else "there is no good checkpoint yet"


def look(run: "Run", step: int, log: Log, reporter: Reporter, sampler: Sampler | None) -> dict[str, Loss]:
    """Validation losses, which are returned, with the averaged weights too if there are any, and sample texts."""
    results = validate(run, step, "", log, reporter)
    if run.config.optim.ema:
        with averaged(run.optimizer, run.config.optim.ema, step):
            validate(run, step, "_ema", log, reporter)
    samples(run, step, reporter, sampler)
    return results


def samples(run: "Run", step: int, reporter: Reporter, sampler: Sampler | None) -> None:
    if sampler is None or not run.config.run.sample:
        return
    model = run.parallel.whole_model(run.model)
    if model is not None:
        model.eval()
        for prompt in run.config.run.sample:
            text = sampler(model, run.tokenizer, prompt, run.config.run.sample_tokens)
            reporter.message(f"step {step}: {prompt}{text}")
    run.model.train()


def validate(run: "Run", step: int, suffix: str, log: Log, reporter: Reporter) -> dict[str, Loss]:
    """The loss on each validation text, in the log under its name and `suffix`."""
    results = {}
    for name, data in run.valid.items():
        with run.autocast() if step < run.config.steps else nullcontext():
            results[name] = loss = evaluate(run.model, run.tokenizer, data, run.config.run.valid_tokens, run.parallel)
        name += suffix
        log.write({"step": step, f"{name}_bits_per_byte": loss.bits_per_byte, f"{name}_loss": loss.per_token})
        reporter.message(
            f"step {step}: {name} {loss.bits_per_byte:.4f} bits per byte ({loss.per_token:.4f} nats per token)"
        )
    run.parallel.settle(run.model)
    return results


def should_stop(run: "Run", log: Log) -> bool:
    """Whether the mean bits per byte of the validation texts have not improved for `early_stop` looks."""
    patience = run.config.run.early_stop
    looks: dict[float, dict[str, float]] = {}
    for row in log.rows:
        for name in run.valid:
            if f"{name}_bits_per_byte" in row:  # a second one is the finished model's, rounded to save_dtype: no look
                looks.setdefault(row["step"], {}).setdefault(name, row[f"{name}_bits_per_byte"])
    means = [sum(values.values()) / len(values) for values in looks.values()]
    means = [mean if math.isfinite(mean) else math.inf for mean in means]
    return bool(patience) and len(means) > patience and min(means[-patience:]) >= min(means[:-patience])
