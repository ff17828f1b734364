"""CUDA C++ kernels without a tool chain: NVRTC compiles them at run time, the driver launches them on torch's stream.

NVRTC comes with CUDA builds of torch, so nothing needs to be installed. A compiled program is kept in memory for each
device and on disk in the user's cache folder, under a name made from everything that it depends on.
"""

import ctypes
import hashlib
import importlib.util
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Argument = Tensor | int | float | None  # a pointer, an int, a float, a null pointer

_INVALID_CONTEXT = 201
_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FREE_SHARED_BYTES = 48 * 1024  # more needs asking for


class CudaError(RuntimeError):
    """Kernels could not be compiled, loaded or launched."""


def _nvrtc_files() -> Iterator[str]:
    """Where NVRTC may lie: in the wheels that torch depends on, in torch itself, where the system looks."""
    pattern = "nvrtc64_*.dll" if sys.platform == "win32" else "libnvrtc.so*"
    for package in ("nvidia", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for place in ("*/lib", "lib", "*/bin"):
                yield from (str(x) for x in sorted(Path(folder).glob(f"{place}/{pattern}"), reverse=True))
    major = (torch.version.cuda or "12").split(".")[0]
    yield from (f"libnvrtc.so.{major}", "libnvrtc.so")


@cache
def _nvrtc() -> ctypes.CDLL:
    for file in _nvrtc_files():
        try:
            return ctypes.CDLL(file)
        except OSError:
            continue
    raise CudaError("NVRTC, which compiles CUDA kernels, was not found; it comes with CUDA builds of torch")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the CUDA driver cannot be loaded: {error}") from error


def _check(code: int, function: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{function} failed: {(text.value or b'unknown error').decode()} ({code})")


def _call(function: str, *args: object) -> None:
    _check(getattr(_driver(), function)(*args), function)


def compile_program(source: Path, headers: dict[str, bytes], options: tuple[str, ...]) -> bytes:
    """The cubin of a source file; raises CudaError with the compiler's messages."""
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()

    def strings(x: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
        return (ctypes.c_char_p * len(x))(*x)

    names, texts = strings([x.encode() for x in headers]), strings(list(headers.values()))
    name = source.name.encode()
    code = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), name, len(headers), texts, names)
    if code:
        raise CudaError(f"{source.name}: NVRTC takes no program (code {code})")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), strings([x.encode() for x in options])):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaError(f"{source.name} does not compile with {' '.join(options)}: {log.value.decode().strip()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "receptance" / "cuda"


def cubin(source: Path, options: tuple[str, ...]) -> bytes:
    """The compiled program, from the disk if it is there; the headers (*.cuh) beside it, one folder up
    and in this folder belong to it.

    A file holds the SHA-256 of the program and the program: one that was damaged is compiled again.
    """
    folders = {source.parent, source.parent.parent, Path(__file__).parent}
    files = sorted(x for folder in folders for x in folder.glob("*.cuh"))
    headers = {x.name: x.read_bytes() for x in files}
    version = (ctypes.c_int * 2)()
    _nvrtc().nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, 4))
    key = hashlib.sha256(repr((source.read_bytes(), headers, options, *version)).encode()).hexdigest()
    file = cache_folder() / f"{source.stem}-{key[:32]}.cubin"
    kept = file.read_bytes() if file.is_file() else b""
    if kept and hashlib.sha256(kept[32:]).digest() == kept[:32]:
        return kept[32:]
    program = compile_program(source, headers, options)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part_file = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as out:
            out.write(hashlib.sha256(program).digest() + program)
        os.replace(part_file, file)
    except OSError:
        pass  # a folder that cannot be written costs the next process a compilation
    return program


def layout(args: tuple[Argument, ...]) -> struct.Struct:
    """How C lays out a kernel's parameters."""
    return struct.Struct("@" + "".join("i" if type(x) is int else "f" if type(x) is float else "P" for x in args))


class _Parameters(threading.local):
    """The memory from which the driver copies a kernel's parameters, one for each thread."""

    def __init__(self, fields_of: struct.Struct):
        size = fields_of.size
        self.buffer, self._size = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
        fields = 1, ctypes.addressof(self.buffer), 2, ctypes.addressof(self._size), 0  # "buffer", "its size", end
        self.extra = (ctypes.c_void_p * 5)(*fields)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which at most three ints are used."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 3), ("rest", ctypes.c_char * 52)]


class _Config(ctypes.Structure):
    """CUlaunchConfig: grid, threads, bytes of shared memory, stream, attributes."""

    _fields_ = [
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_CLUSTER, _PROGRAMMATIC = 4, 6  # CU_LAUNCH_ATTRIBUTE_…


class Kernel:
    """One kernel on one device. Parameters: pointers (tensors or None), int, float, each of one kind in all calls."""

    def __init__(self, module: ctypes.c_void_p, name: str, device: int, context: ctypes.c_void_p):
        self._function, self._device, self._context = ctypes.c_void_p(), device, context
        self._shared = _FREE_SHARED_BYTES
        self._layout: struct.Struct | None = None
        _call("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
        self._launch = _driver().cuLaunchKernel
        self._can_chain = torch.cuda.get_device_capability(device)[0] >= 9

    def __call__(
        self,
        grid: tuple[int, ...],
        threads: int,
        *args: Argument,
        shared: int = 0,
        chained: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch on the current stream of the kernel's device, which must be the current one.

        grid: up to three numbers of blocks; shared: bytes of dynamic shared memory per block; chained: the kernel waits
        for the one before it by itself (griddepcontrol.wait), so that it may start earlier; cluster: so many neighbours
        see each other's shared memory.
        """
        if shared > self._shared:
            _call("cuFuncSetAttribute", self._function, _SHARED_BYTES, shared)
            self._shared = shared
        if self._layout is None:
            fresh = layout(args)
            self._parameters = _Parameters(fresh)
            self._layout = fresh
        parameters = self._parameters
        self._layout.pack_into(parameters.buffer, 0, *[x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in args])
        x, y, z = (*grid, 1, 1)[:3]
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))  # the public way takes 3 µs more
        launch: tuple[object, ...] = self._function, x, y, z, threads, 1, 1, shared, stream, None, parameters.extra
        function = self._launch
        attributes = [(_PROGRAMMATIC, 1)] if chained and self._can_chain else []
        attributes += [(_CLUSTER, cluster)] if cluster > 1 else []
        if attributes:
            sizes = (ctypes.c_uint * 7)(x, y, z, threads, 1, 1, shared)
            array = (_Attribute * len(attributes))(*(_Attribute(i, 0, (n, 1, 1)) for i, n in attributes))
            config = _Config(sizes, stream, array, len(attributes))
            function = _driver().cuLaunchKernelEx
            launch = ctypes.byref(config), self._function, None, parameters.extra
        code = function(*launch)
        if code == _INVALID_CONTEXT:  # a thread that has not used the device yet
            _call("cuCtxSetCurrent", self._context)
            code = function(*launch)
        _check(code, "cuLaunchKernel")


class Program:
    """The kernels of one source file on one device, by name."""

    def __init__(self, image: bytes, device: int):
        self._module, self._context, self._device = ctypes.c_void_p(), ctypes.c_void_p(), device
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)  # torch's own
        _call("cuCtxSetCurrent", self._context)
        _call("cuModuleLoadData", ctypes.byref(self._module), image)

    def __getattr__(self, name: str) -> Kernel:
        kernel = self.__dict__[name] = Kernel(self._module, name, self._device, self._context)
        return kernel


def aligned(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on, by which kernels copy."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@cache
def _load(source: Path, device: int, defines: tuple[tuple[str, object], ...]) -> Program:
    major, minor = torch.cuda.get_device_capability(device)
    architecture = f"--gpu-architecture=sm_{major}{minor}" + ("a" if major >= 9 else "")
    macros = tuple(f"-D{name}={value}" for name, value in defines)
    return Program(cubin(source, (architecture, "--std=c++17", *macros)), device)


def load(source: Path, **defines: int | str) -> Program:
    """The kernels of a source file for the current device; defines: its macros. Compiled once, then kept."""
    return _load(source, torch.cuda.current_device(), tuple(defines.items()))
