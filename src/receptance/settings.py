"""Configuration: frozen dataclasses from TOML tables, with errors that name the key, what was found and expected."""

import tomllib
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from receptance.errors import ConfigError

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError when there is none, or it cannot be read as one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def build(cls: type[T], raw: Mapping[str, object], where: str) -> T:
    """An instance of a dataclass from a TOML table; `where` is what its keys are called by, as in "model."."""
    hints = get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(f"unknown setting {where}{key}; there are {', '.join(sorted(hints))}")
        values[key] = _convert(hints[key], value, where + key)
    return cls(**values)


def put(raw: dict[str, Any], text: str, example: str) -> None:
    """`section.key=value` from a command line into the tables of a TOML file: a TOML value; a bare word is a string."""
    name, equals, value = text.removeprefix("--").partition("=")
    *path, key = name.split(".")
    if not (equals and path and all(path) and key):
        raise ConfigError(f"override {text!r}: expected section.key=value, for example {example}")
    for step in path:
        raw = raw.setdefault(step, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {text!r}: {step} is a value, not a section")
    try:
        raw[key] = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        raw[key] = value


def _convert(kind: object, value: object, where: str) -> object:
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table [{where}], found {value!r}")
        return build(kind, value, where + ".")
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(get_args(kind)[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(get_args(kind)[0], item, where) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # version = 7
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    examples: dict[object, str] = {tuple: 'a list, as in ["x"]', dict: 'a table, as in {name = "x"}'}
    expected = examples.get(origin) or getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{where}: expected {expected}, found {value!r}")
