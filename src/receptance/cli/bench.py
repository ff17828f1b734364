"""`receptance bench`: how fast a model is on this machine, and how near to what the machine can do."""

import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from receptance.cli import bench_engine, bench_serve, options
from receptance.cli.errors import guarded
from receptance.cli.model_source import find_model, load_runner
from receptance.cli.terminal import doing, write_json
from receptance.errors import ConfigError, ReceptanceError

if TYPE_CHECKING:
    from receptance.native.measure import Limits, Speeds
    from receptance.native.model import NativeModel

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
STARTS = 3  # processes started, of which the fastest counts


@app.callback()
def group() -> None:
    """Measure speed beside what the machine can do.

    \b
    Examples:
      receptance bench cpu
      receptance bench engine model.pth
      receptance bench serve --help
    """


@app.command("cpu", short_help="The CPU engine: one text, prompts, batches, memory.")
@guarded
def cpu(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Path, name or org/name[:file].")] = None,
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", help="Tokens of the prompt.")] = 256,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Sequences at once.")] = 16,
    seconds: Annotated[float, typer.Option("--seconds", help="For each measurement.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Measure the CPU engine: decode, prefill, batch, memory and start-up, and this machine's own limits.

    Each speed is the fastest of as many calls as fit into --seconds, after a check that the model's logits do not
    depend on how a prompt is cut. "reached" is the share of the limit beside it: for decode, of the bytes a second that
    this machine reads; for prefill and batch, of the operations a second of its products. Close other programs first.

    \b
    Examples:
      receptance bench cpu
      receptance bench cpu model.gguf --threads 2
      receptance bench cpu model.pth --dtype int8 --json
    """
    if prompt < 2 or batch < 1 or not seconds > 0:
        raise ConfigError("--prompt must be at least 2, --batch at least 1, and --seconds above 0")
    from receptance.native.measure import UnsoundError, limits, speeds
    from receptance.native.model import NativeModel

    source = find_model(model)
    with doing("measuring the first token"):
        first_token = first_token_seconds(model or source.name, dtype, threads)
    started = time.perf_counter()
    rwkv = load_runner(source, dtype, "cpu", "native", threads)
    loaded = time.perf_counter() - started
    if not isinstance(rwkv, NativeModel) or rwkv.engine_name == "numpy":
        raise ConfigError("the compiled CPU engine is not there; python -m receptance.native.build")
    try:
        with doing("measuring speeds"):
            found = speeds(rwkv, prompt, batch, seconds)
    except UnsoundError as error:
        raise ReceptanceError(f"no speed is reported: {error}") from None
    peak = peak_memory()  # before more is taken for the limits
    with doing("measuring what this machine can do"):
        machine = limits(rwkv.threads, seconds)
    report = Report(source.name, rwkv, found, machine, prompt, batch, loaded, first_token, peak)
    if as_json:
        write_json(report.as_json())
    else:
        typer.echo(report.as_table())


app.command("engine", short_help="The batched engine: many texts at once.")(bench_engine.command)
app.command("serve", short_help="A server under a given rate of requests.")(bench_serve.command)


def first_token_seconds(model: str, dtype: str | None, threads: int | None) -> float:
    """From the start of a process of `receptance run` to its first byte of text; the fastest of STARTS."""
    command = [sys.executable, "-m", "receptance", "run", model, "The", "--max-tokens", "1", "--engine", "native"]
    command += ["--dtype", dtype] if dtype else []
    command += ["--threads", str(threads)] if threads else []
    least = float("inf")
    for _ in range(STARTS):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            first = process.stdout.read(1)
            taken = time.perf_counter() - start
            complaint = process.stderr.read().decode("utf-8", "replace") if not first else ""
        if not first:
            raise ReceptanceError(f"receptance run gave no text: {complaint.strip()}")
        least = min(least, taken)
    return least


def peak_memory() -> int | None:
    """Bytes that this process has had in memory at most; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Report:
    """Everything measured; seconds, bytes, and the units of `Speeds` and `Limits`."""

    name: str
    model: "NativeModel"
    speeds: "Speeds"
    limits: "Limits"
    prompt: int
    batch: int
    load: float
    first_token: float
    peak_memory: int | None

    @property
    def reached(self) -> dict[str, float]:
        """The share of the limit that binds each speed. A prompt takes the head's product for its last token only."""
        is_plain = self.model.dtype in ("float32", "float16", "bfloat16")
        rate = self.limits.float32 if is_plain else self.limits.int8
        elements, config = self.model.n_matrix_elements, self.model.config
        return {
            "decode": self.speeds.decode * self.speeds.decode_bytes / self.limits.read,
            "prefill": self.speeds.prefill * 2 * (elements - config.vocab_size * config.n_embd) / rate,
            "batch": self.speeds.batch * 2 * elements / rate,
        }

    def as_json(self) -> dict[str, object]:
        config, speeds = self.model.config, self.speeds
        sizes = {"prompt": self.prompt, "batch": self.batch, "bytes_per_token": speeds.decode_bytes}
        shape = {"version": config.version, "n_layer": config.n_layer, "n_embd": config.n_embd}
        engine = {"engine": self.model.engine_name, "threads": self.model.threads}
        return {
            "bench": "cpu",
            "model": {"name": self.name, **shape, "dtype": self.model.dtype},
            "machine": {"system": f"{platform.system()} {platform.machine()}", **engine},
            "limits": asdict(self.limits),
            "tokens_per_s": {"decode": speeds.decode, "prefill": speeds.prefill, "batch": speeds.batch},
            "sizes": {**sizes, "active": speeds.active},
            "reached": self.reached,
            "seconds": {"load": self.load, "first_token": self.first_token},
            "peak_memory_bytes": self.peak_memory,
        }

    def as_table(self) -> str:
        config, speeds, limits, reached = self.model.config, self.speeds, self.limits, self.reached
        active = "" if speeds.active is None else f"; {speeds.active:.0%} of the hidden units are active"
        peak = "" if self.peak_memory is None else f"; peak memory {self.peak_memory / 1e6:.0f} MB"
        prefill, together = f"prefill of {self.prompt}", f"{self.batch} sequences at once"
        rates = f"{limits.float32 / 1e9:.0f} (float32) and {limits.int8 / 1e9:.0f} (int8) G operations/s"
        lines = [
            f"RWKV-{config.version} {self.name}: {config.n_layer} layers of {config.n_embd}, {self.model.dtype}",
            f"engine {self.model.engine_name}, threads {self.model.threads}",
            "",
            f"{'':26}{'tokens/s':>10}{'reached':>10}",
            f"{'decode':26}{speeds.decode:10.1f}{reached['decode']:10.0%}   of the read bandwidth",
            f"{prefill:26}{speeds.prefill:10.1f}{reached['prefill']:10.0%}   of the product rate",
            f"{together:26}{speeds.batch:10.1f}{reached['batch']:10.0%}   of the product rate",
            "",
            f"this machine reads {limits.read / 1e9:.1f} GB/s and multiplies at {rates}",
            f"a token reads {speeds.decode_bytes / 1e6:.1f} MB of weights{active}",
            f"load {self.load:.2f} s; first token of `receptance run` after {self.first_token:.2f} s{peak}",
        ]
        return "\n".join(lines)
