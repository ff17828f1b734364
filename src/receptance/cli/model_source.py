"""What a MODEL argument means: a path, the name of an embedded model, or a model of the hub that is in the cache."""

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from receptance import embedded
from receptance.cli import hub
from receptance.cli.terminal import note
from receptance.embedded import embedded_models
from receptance.errors import ReceptanceError

if TYPE_CHECKING:
    from receptance.engine.protocols import Model
    from receptance.models import RWKV
    from receptance.tokenizers import Tokenizer

DEFAULT_MODEL = "rwkv7-stories"

PILE_ROWS = 50277  # embedding rows of the models trained on the Pile
WORLD_ROWS = 65536


class UnknownModel(ReceptanceError):
    """A MODEL argument names nothing that is here."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies. `folder` is where its tokenizer and preset are looked for."""

    name: str
    path: Path
    kind: Literal["path", "embedded", "hub"]

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def find_model(name: str | None) -> ModelSource:
    """The model that a MODEL argument means; None means the embedded default. Raises UnknownModel, with suggestions."""
    if name is None:
        if DEFAULT_MODEL not in embedded_models():
            raise UnknownModel(f"the embedded model '{DEFAULT_MODEL}' is missing from this installation; name a MODEL")
        return ModelSource(DEFAULT_MODEL, embedded.ASSETS / DEFAULT_MODEL, "embedded")
    if os.path.exists(name):  # Path.exists raises for a very long name
        return ModelSource(name, only_weights(Path(name), name), "path")
    if name in embedded_models():
        return ModelSource(name, embedded.ASSETS / name, "embedded")
    parsed = hub.parse(name)
    cached = {model.repo: model for model in hub.cached_models()}
    if parsed and parsed[0] in cached:
        repo, file = parsed
        model = cached[repo]
        if file is None:
            return ModelSource(name, only_weights(model.folder, repo), "hub")
        if file in model.weights:
            return ModelSource(name, model.folder / file, "hub")
        raise UnknownModel(f"{repo} is in the cache, but without {file!r}; receptance pull {name}")
    raise UnknownModel(_not_found(name, list(cached)))


def only_weights(path: Path, name: str) -> Path:
    """The file to load from a folder that holds one weight file but is no folder model; any other path as it is."""
    if not path.is_dir() or any((path / weights).exists() for weights in (*hub.FOLDER_WEIGHTS, "pytorch_model.bin")):
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in hub.WEIGHT_SUFFIXES)
    if len(files) == 1:
        return files[0]
    listing = ", ".join(file.name for file in files[:10]) or f"no {', '.join(hub.WEIGHT_SUFFIXES)} file"
    raise UnknownModel(f"{name} holds {listing}; name one weight file")


def looks_like_model(argument: str) -> bool:
    """Whether a lone argument of `run` is a MODEL and not a prompt: it names one, or is written as a path or hub id."""
    if argument in embedded_models() or argument.endswith(hub.WEIGHT_SUFFIXES) or hub.parse(argument):
        return True
    return os.path.exists(argument)


def _not_found(name: str, cached: list[str]) -> str:
    looked = [f"there is no file or folder {Path(name).absolute()!s}"]
    looked.append(f"no embedded model of that name ({', '.join(embedded_models()) or 'there are none'})")
    if hub.parse(name):
        looked.append(f"and it is not in the cache {hub.cache_folder()}; to download it: receptance pull {name}")
    folder = Path(name).parent
    files = [str(file) for file in folder.iterdir() if file.suffix in hub.WEIGHT_SUFFIXES] if folder.is_dir() else []
    close = difflib.get_close_matches(name, [*embedded_models(), *cached, *files], n=3)
    hint = f". Did you mean {' or '.join(close)}?" if close else ". `receptance list` shows the models that are here"
    return f"unknown model {name!r}: {', '.join(looked)}{hint}"


def load_model(source: ModelSource, dtype: str | None = None, device: str | None = None) -> "RWKV":
    from receptance.checkpoint import load

    return load(source.path, dtype=dtype, device=device, engine="torch")


def load_runner(
    source: ModelSource, dtype: str | None, device: str | None, engine: str | None, threads: int | None
) -> "Model":
    """The model in the engine that suits: on a CPU the native one, unless it is not compiled and torch is there."""
    from receptance.checkpoint import load

    if engine is None:
        engine = "native" if device in (None, "cpu") and dtype != "float64" and prefers_native() else "torch"
    if engine == "torch" and threads is None:
        if dtype is None and source.kind == "embedded" and device in (None, "cpu"):
            dtype = "float32"  # small, and half again as fast as bfloat16 on a CPU
        return load_model(source, dtype, device)
    with warnings_as_notes():
        model: Model = load(source.path, dtype=dtype, device=device, engine=engine, threads=threads)  # type: ignore[call-overload]
    return model


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """A person gets one line for each, not a place in our source."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        note(f"note: {text}")


def prefers_native() -> bool:
    from receptance.native import NoCoreError, load_core

    try:
        load_core()
    except NoCoreError:
        return find_spec("torch") is None
    return True


def load_tokenizer(source: ModelSource, vocab_size: int, name: str | None = None) -> "Tokenizer":
    """The tokenizer given by name or path, else the one in the model's file (.gguf) or folder, else the one that its
    vocabulary tells."""
    from receptance.tokenizers import IN_FOLDERS, tokenizer

    if name is not None:
        return tokenizer(name)
    if inside := tokenizer_inside(source):
        return inside
    if any(any(source.folder.glob(pattern)) for pattern in IN_FOLDERS):
        return tokenizer(source.folder)
    known = {WORLD_ROWS: "world", PILE_ROWS: "pile", 257: "byte"}
    if vocab_size not in known:
        raise ReceptanceError(
            f"{source.name}: nothing tells the tokenizer of a model with {vocab_size} ids; lay its tokenizer.json "
            "beside the weights, or use --tokenizer world, pile, byte or a file"
        )
    return tokenizer(known[vocab_size])


def fields_of(source: ModelSource) -> Mapping[str, object]:
    """The metadata of a GGUF file; empty for others."""
    if source.path.suffix != ".gguf":
        return {}
    from receptance.checkpoint import open_checkpoint
    from receptance.checkpoint.gguf import GGUFSource

    stored = open_checkpoint(source.path)
    return stored.fields if isinstance(stored, GGUFSource) else {}


def tokenizer_inside(source: ModelSource) -> "Tokenizer | None":
    """The tokenizer that a GGUF file holds."""
    if not (fields := fields_of(source)):
        return None
    from receptance.tokenizers import tokenizer
    from receptance.tokenizers.gguf import has_tokenizer

    return tokenizer(source.path) if has_tokenizer(fields) else None


def guess_template(source: ModelSource) -> str:
    """The chat template that the name of a released model tells."""
    name = source.path.name.lower()
    if re.search(r"(^|[-_])g[01][a-z]?([-_.]|$)", name):
        return "g1"
    return "raven" if "raven" in name else "world"
