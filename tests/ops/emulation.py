"""Stands in for `receptance.ops.cuda.load` on a machine without a GPU: kernels run in emulation.h, on the CPU."""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from receptance.ops import cuda
from receptance.ops.cuda import layout

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


@cache
def _build(source: Path, macros: tuple[str, ...]) -> ctypes.CDLL:
    names = re.findall(
        r'extern "C" __global__ void(?:\s+__launch_bounds__\([^)]*(?:\([^)]*\)[^)]*)*\))?\s+(\w+)\(', source.read_text()
    )
    launchers = "\n".join(
        f'extern "C" void launch_{x}(unsigned x, unsigned y, unsigned z, unsigned n, const char* p) '
        f"{{ emulation::launch({x}, x, y, z, n, p); }}"
        for x in dict.fromkeys(names)
    )
    folder = Path(tempfile.gettempdir()) / "receptance-emulation"
    folder.mkdir(exist_ok=True)
    ops = Path(cuda.__file__).parent
    headers = [*source.parent.glob("*.cuh"), *ops.glob("*.cuh"), HERE / "emulation.h"]
    text = repr([launchers, macros, source.read_text(), [x.read_text() for x in headers]])
    library = folder / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            main = Path(work, "main.cpp")
            main.write_text(f'#include <tuple>\n#include "{HERE}/emulation.h"\n#include "{source}"\n{launchers}\n')
            flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off", f"-I{ops}"]
            done = subprocess.run(
                [COMPILER, *flags, *macros, "-o", f"{work}/x.so", main], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[:4000]
            Path(work, "x.so").replace(library)
    return ctypes.CDLL(str(library))


class Kernel:
    def __init__(self, launch):
        self._launch = launch

    def __call__(self, grid, threads, *args, shared=0, chained=False, cluster=1):
        assert shared <= 227 * 1024
        assert all(x.stride(-1) == 1 for x in args if isinstance(x, torch.Tensor) and x.numel() > 1)
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x or 0 for x in args]
        self._launch(*(*grid, 1, 1)[:3], threads, layout(args).pack(*values))


class Program:
    def __init__(self, library: ctypes.CDLL):
        self._library = library

    def __getattr__(self, name: str) -> Kernel:
        return Kernel(getattr(self._library, f"launch_{name}"))


def load(source: Path, **defines: int | str) -> Program:
    return Program(_build(source, tuple(f"-D{name}={value}" for name, value in defines.items())))
