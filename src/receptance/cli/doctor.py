"""`receptance doctor`: what this machine can run, and why not."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated, Literal

import typer

from receptance import __version__
from receptance.cli import hub
from receptance.cli.errors import USER_ERROR
from receptance.cli.model_source import DEFAULT_MODEL
from receptance.cli.terminal import write_json
from receptance.embedded import embedded_models

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "huggingface_hub", "transformers")


@dataclass(frozen=True)
class Check:
    """One line of the report. "no" is an absence that limits, "bad" one that stops everything."""

    what: str
    result: Literal["ok", "no", "bad"]
    detail: str


def command(as_json: Annotated[bool, typer.Option("--json", help="A JSON list of checks.")] = False) -> None:
    """Check this machine: Python, PyTorch, devices, back ends, cache, disk and the embedded model.

    Each line says ok, or no with the reason. Exit code 1 when no model can run at all.

    \b
    Examples:
      receptance doctor
      receptance doctor --json
    """
    checks = [*machine(), *cpu_engine(), *torch_and_devices(), *back_ends(), *training(), *models()]
    if as_json:
        write_json([asdict(check) for check in checks])
    else:
        for check in checks:
            colour = {"ok": "green", "no": "yellow", "bad": "red"}[check.result]
            typer.echo(f"{typer.style(check.result.ljust(4), fg=colour)} {check.what.ljust(18)} {check.detail}")
    if any(check.result == "bad" for check in checks):
        raise typer.Exit(USER_ERROR)


def machine() -> Iterator[Check]:
    yield Check("receptance", "ok", f"{__version__}, Python {platform.python_version()} at {sys.executable}")
    yield Check("machine", "ok", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    versions = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    yield Check("packages", "ok", ", ".join(versions))


def cpu_engine() -> Iterator[Check]:
    from receptance.native import DTYPES, NoCoreError, load_core
    from receptance.native.model import available_cores

    try:
        core = load_core()
    except NoCoreError as error:
        yield Check("CPU engine", "no", f"not compiled, so models run in NumPy, slowly: {error}")
        return
    yield Check("CPU engine", "ok", f"{core.name}, {available_cores()} threads; {', '.join(DTYPES)}")


def torch_and_devices() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of it is missing
        needs = "train, eval, inspect, convert (except to GGUF) and GPUs need it: pip install 'receptance[torch]'"
        yield Check("torch", "no", f"{error}; {needs}")
        return
    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    features = torch.backends.cpu.get_cpu_capability()
    yield Check("cpu", "ok", f"float32, bfloat16, float16, float64; {features}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(i).total_memory
            name = torch.cuda.get_device_name(i)
            yield Check(f"cuda:{i}", "ok", f"{name}, {memory / 2**30:.0f} GiB")
            yield tuned(f"cuda:{i} choices", name)
    elif torch.version.cuda is None and torch.version.hip is None:
        yield Check("cuda", "no", "this PyTorch is built without it; see pytorch.org for a build with CUDA or ROCm")
    else:
        yield Check("cuda", "no", "PyTorch is built with it, but finds no GPU or no driver (try nvidia-smi)")
    if platform.system() == "Darwin":
        has_mps = torch.backends.mps.is_available()
        yield Check("mps", "ok" if has_mps else "no", "" if has_mps else "this machine or PyTorch lacks it")


def tuned(what: str, gpu: str) -> Check:
    """What was measured on this GPU about how to decode fastest."""
    from receptance.engine.gpu.choices import kept
    from receptance.ops.cuda import cache_folder

    models = [f"{model} ({', '.join(map(str, rows))} rows)" for model, rows in kept(gpu).items()]
    none = "nothing measured yet; a model's first steps of each size do it"
    return Check(what, "ok", f"{cache_folder()}: {'; '.join(models) or none}")


def back_ends() -> Iterator[Check]:
    """The forms in which the WKV operators and the fused pieces around them can run here."""
    if find_spec("torch") is None:
        return
    import torch

    from receptance.ops import BACKENDS, GPU_BACKENDS
    from receptance.ops.pieces import PIECES

    tables = {op: {*BACKENDS[op], *GPU_BACKENDS[op]} for op in BACKENDS}
    names = sorted({name for table in tables.values() for name in table})
    for name in names:
        operators = ", ".join(op for op, table in tables.items() if name in table)
        operators += f"; fused: {', '.join(sorted(PIECES.keys() - tables.keys()))}" if name == "triton" else ""
        if name == "triton" and find_spec("triton") is None:
            yield Check(f"back end {name}", "no", "the package triton is not installed (it comes with CUDA PyTorch)")
        elif name in ("cuda", "triton") and not torch.cuda.is_available():
            yield Check(f"back end {name}", "no", "it needs a GPU")
        elif name == "cuda" and torch.version.cuda is None:
            yield Check(f"back end {name}", "no", "this torch is not built for CUDA")
        else:
            yield Check(f"back end {name}", "ok", operators)


def training() -> Iterator[Check]:
    """What a training run would use here."""
    if find_spec("torch") is None:
        return
    import torch

    from receptance.training.metrics import free_memory, peak_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = free_memory(device)
    memory = "" if free is None else f", {free / 2**30:.1f} GiB free"
    if device.type == "cuda":
        peak = peak_flops(device, "bfloat16")
        limit = "peak unknown: no MFU in the log" if peak is None else f"peak {peak / 1e12:.0f} TFLOP/s"
        yield Check("training", "ok", f"cuda, bfloat16 products, the step as a CUDA graph; {limit}{memory}")
    else:
        yield Check("training", "ok", f"cpu, float32, {torch.get_num_threads()} threads{memory}")
    for package in ("tensorboard", "wandb"):
        version = _version(package)
        hint = f"pip install 'receptance[{package}]' for run.{package}"
        yield Check(package, "ok" if version else "no", version or hint)


def models() -> Iterator[Check]:
    if DEFAULT_MODEL in embedded_models():
        yield Check("embedded model", "ok", ", ".join(embedded_models()))
    else:
        yield Check("embedded model", "no", f"'{DEFAULT_MODEL}' is missing from this installation; name a MODEL")
    folder = hub.cache_folder()
    cached = hub.cached_models()
    yield Check("model cache", "ok", f"{folder}, {len(cached)} models" + (", offline" if _is_offline() else ""))
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    yield Check(
        "disk", "ok" if writable else "no", f"{free / 1e9:.1f} GB free" + ("" if writable else ", not writable")
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
