"""The compiled core, through ctypes: the structures of csrc/core.h and the functions of csrc/api.cpp.

Where it could not be compiled, `load_library` says why, and the NumPy form (`plain.py`) takes its place.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from receptance.errors import ConfigError

TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}  # enum Type
TYPES |= {"Q8_0": 5, "Q4_0": 6, "Q4_K": 7, "Q5_K": 8, "Q6_K": 9}
TYPES |= {"packed Q8_0": 10, "packed Q4_0": 11, "packed Q4_K": 12, "packed Q5_K": 13, "packed Q6_K": 14}
TYPES |= {"panel float32": 15, "panel float16": 16, "panel bfloat16": 17}
TYPES |= {"band Q8_0": 18, "band Q4_0": 19}
INPUTS = ("r", "w", "k", "v", "a", "g")  # enum Mix
FLOATS = POINTER(c_float)


def _floats(*names: str) -> list[tuple[str, type]]:
    return [(name, c_void_p) for name in names]


class Matrix(ctypes.Structure):
    _fields_ = [("rows", c_int64), ("cols", c_int64), ("data", c_void_p), ("type", c_int32), ("exact", c_int32)]


class ChannelMix(ctypes.Structure):
    _fields_ = [*_floats("mix_k", "mix_r"), ("key", Matrix), ("receptance", Matrix), ("value", Matrix)]


class Layer(ctypes.Structure):
    _fields_ = [
        *_floats("ln1_weight", "ln1_bias", "ln2_weight", "ln2_bias"),
        ("mix", c_void_p * len(INPUTS)),
        *_floats("lnx_weight", "lnx_bias", "decay", "bonus", "a0", "v0", "k_k", "k_a", "mix_x"),
        *((name, Matrix) for name in ("receptance", "key", "value", "gate", "output")),
        *((name, Matrix) for name in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2", "maa1")),
        ("maa2", Matrix * 5),
        ("ffn", ChannelMix),
        ("ffn_pre", ChannelMix),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("version", "n_layer", "n_embd", "dim_att", "dim_ffn", "vocab", "head_size")),
        *((name, c_int32) for name in ("has_gate", "pre_ffn")),
        ("emb", Matrix),
        ("head", Matrix),
        *_floats("ln0_weight", "ln0_bias", "lnout_weight", "lnout_bias"),
        ("layers", POINTER(Layer)),
    ]


class CState(ctypes.Structure):
    _fields_ = _floats("att_shift", "ffn_shift", "wkv", "num", "den", "exp")


class Request(ctypes.Structure):
    _fields_ = [
        ("model", POINTER(Model)),
        ("team", c_void_p),
        ("tokens", c_void_p),
        ("lengths", c_void_p),
        ("batch", c_int32),
        ("state_in", POINTER(CState)),
        ("state_out", POINTER(CState)),
        ("logits", c_void_p),
        ("last_only", c_int32),
        ("scratch", c_void_p),
        ("chunk_rows", c_int64),
        ("active", c_int64),
        ("hidden", c_int64),
        ("from_rows", c_void_p),
        ("to_rows", c_void_p),
        ("pool", c_int64),
    ]


class SampleRow(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logits", "mask", "occurrence", "seen", "weight", "bias_ids", "bias_values")),
        *((name, c_double) for name in ("top_p", "uniform")),
        *((name, c_float) for name in ("temperature", "min_p", "presence", "frequency", "repetition", "decay")),
        *((name, c_int32) for name in ("biases", "top_k", "count_digits", "token")),
    ]


STRUCTURES = (Matrix, ChannelMix, Layer, Model, CState, Request, SampleRow)


@dataclass(frozen=True, eq=False)
class Core:
    """The library and the engine chosen for this machine: amx, avx512, avx2, neon or portable."""

    library: ctypes.CDLL
    engine: int
    name: str


class NoCoreError(Exception):
    """The compiled core is not there or not usable; the message says why."""


@cache
def load_library(path: Path | None = None) -> ctypes.CDLL:
    """None: the package's own. Raises NoCoreError."""
    from receptance.native.build import LIBRARY, sources_hash  # only here: `python -m` runs that module as its main one

    path = path or LIBRARY
    if not path.exists():
        raise NoCoreError("it was not compiled at install time; python -m receptance.native.build")
    try:
        library = ctypes.CDLL(str(path))
        declare(library)
        sources = library.receptance_sources().decode()
        sizes = [library.receptance_size(i) for i in range(len(STRUCTURES))]
    except (OSError, AttributeError) as error:
        raise NoCoreError(f"{path} cannot be used ({error}); python -m receptance.native.build") from None
    if sources != sources_hash() or sizes != [ctypes.sizeof(structure) for structure in STRUCTURES]:
        raise NoCoreError(f"{path} was compiled from other sources; python -m receptance.native.build")
    return library


def declare(library: ctypes.CDLL) -> None:
    functions = {
        "engine": (c_void_p, [c_char_p]),
        "engine_name": (c_char_p, [c_void_p]),
        "sources": (c_char_p, []),
        "size": (c_int64, [c_int32]),
        "team_new": (c_void_p, [c_int32]),
        "team_free": (None, [c_void_p]),
        "scratch_bytes": (c_int64, [c_void_p, POINTER(Model), c_int64, c_int32]),
        "forward": (None, [c_void_p, POINTER(Request)]),
        "pack": (None, [c_void_p, c_void_p, POINTER(Matrix), c_void_p, c_int32]),
        "pack_lines": (None, [c_void_p, c_void_p, POINTER(Matrix), c_int32, c_void_p, c_int32]),
        "widen": (None, [c_void_p, POINTER(Matrix), c_int64, c_int64, c_void_p]),
        "multiply": (None, [c_void_p, c_void_p, POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p]),
        "multiply_bytes": (c_int64, [c_void_p, POINTER(Matrix), c_int64, c_int32]),
        "sample": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, f"receptance_{name}")
        function.restype, function.argtypes = result, arguments


@cache
def load_core(name: str = "") -> Core:
    """The best engine for this machine, or the one of this name. Raises NoCoreError."""
    library = load_library()
    engine = library.receptance_engine(name.encode())
    if not engine:
        raise NoCoreError(f"this machine cannot run the engine {name!r}")
    return Core(library, engine, library.receptance_engine_name(engine).decode())


def new_team(core: Core, threads: int) -> int:
    """Threads of the core, for its functions that take them. Raises ConfigError where the system starts no so many."""
    team = core.library.receptance_team_new(threads)
    if not team:
        raise ConfigError(f"the system lets this process start no {threads} threads; give fewer, such as threads=1")
    return int(team)
