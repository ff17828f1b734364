"""`model.toml` in a model's folder: what its makers recommend.

template = "world"            # chat template: world, g1, raven, plain
thinking = "off"              # g1 alone: off, fast, on
system = "You are a fox."     # system prompt of a chat
state = "fox.state"           # initial state, a file in the same folder
new_document = true           # a text without a state begins with the end-of-document token, as documents in training
[sampling]                    # any field of SamplingParams
temperature = 0.8
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from receptance.cli.model_source import ModelSource, fields_of
from receptance.engine.params import SamplingParams
from receptance.errors import ConfigError

PRESET_FILE = "model.toml"
PRESET_FIELD = "receptance.preset"  # the same text in the metadata of a GGUF file
WORDS = ("template", "thinking", "system", "state")


@dataclass(frozen=True)
class Preset:
    template: str | None = None
    thinking: str | None = None
    system: str | None = None
    state: Path | None = None
    new_document: bool = False
    sampling: Mapping[str, object] = field(default_factory=dict)


def read_preset(folder: Path) -> Preset:
    """The folder's preset, empty when it has none. Raises ConfigError naming file, key and what was expected."""
    path = folder / PRESET_FILE
    return parse_preset(path, path.read_bytes()) if path.is_file() else Preset()


def find_preset(model: ModelSource) -> Preset:
    """The preset inside the model's file (.gguf), else its folder's."""
    text = fields_of(model).get(PRESET_FIELD)
    return parse_preset(model.path, text.encode()) if isinstance(text, str) else read_preset(model.folder)


def parse_preset(path: Path, text: bytes) -> Preset:
    """The text of a preset, which came out of `path`."""
    try:
        table = tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None
    if unknown := table.keys() - {*WORDS, "new_document", "sampling"}:
        raise ConfigError(
            f"{path}: unknown key {min(unknown)!r}; expected {', '.join(WORDS)}, new_document or [sampling]"
        )
    for word in WORDS:
        if not isinstance(table.get(word, ""), str):
            raise ConfigError(f"{path}: {word} is {table[word]!r}, expected a string")
    if not isinstance(table.get("new_document", False), bool):
        raise ConfigError(f"{path}: new_document is {table['new_document']!r}, expected true or false")
    return Preset(
        template=table.get("template"),
        thinking=table.get("thinking"),
        system=table.get("system"),
        state=_inside(path, table["state"]) if "state" in table else None,
        new_document=table.get("new_document", False),
        sampling=_checked_sampling(path, table.get("sampling", {})),
    )


def _inside(path: Path, name: str) -> Path:
    """A downloaded preset must not reach for other files of the user."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise ConfigError(f"{path}: state is {name!r}, expected the name of a file in the same folder")
    return path.parent / name


def _checked_sampling(path: Path, table: object) -> Mapping[str, object]:
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: sampling is {table!r}, expected a table")
    known = {f.name for f in fields(SamplingParams)}
    if unknown := table.keys() - known:
        raise ConfigError(
            f"{path}: unknown sampling field {min(unknown)!r}; expected one of {', '.join(sorted(known))}"
        )
    bias = table.get("logit_bias")
    try:
        if isinstance(bias, dict):  # keys are strings in TOML
            table = {**table, "logit_bias": {int(token): value for token, value in bias.items()}}
        SamplingParams(**table)
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return table
