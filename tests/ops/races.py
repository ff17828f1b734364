"""Emulated launches, repeated by a program under the thread sanitizer: who touches what without a barrier between."""

import re
import struct
import subprocess
from pathlib import Path

import torch
from tests.ops import emulation

from receptance.ops import cuda
from receptance.ops.cuda import layout

MAIN = """
#define RACES
#include <tuple>
#include <cstdio>
#include "{here}/emulation.h"
#include "{source}"
typedef void Launch(unsigned, unsigned, unsigned, unsigned, const char*);
{launchers}
template <class T> UNSEEN T next(FILE* f) {{ T x; if (fread(&x, sizeof x, 1, f) != 1) exit(3); return x; }}
UNSEEN int main(int, char** files) {{
    FILE* f = fopen(files[1], "rb");
    for (unsigned launches = next<unsigned>(f); launches--;) {{
        unsigned which = next<unsigned>(f), sizes[4];
        for (unsigned& x : sizes) x = next<unsigned>(f);
        std::vector<char*> buffers(next<unsigned>(f));
        for (char*& p : buffers) {{
            unsigned long long size = next<unsigned long long>(f);
            p = (char*)aligned_alloc(256, (size + 511) / 256 * 256);
            if (fread(p, 1, size, f) != size) exit(3);
        }}
        std::vector<char> parameters(next<unsigned>(f));
        if (fread(parameters.data(), 1, parameters.size(), f) != parameters.size()) exit(3);
        for (unsigned pointers = next<unsigned>(f); pointers--;) {{
            unsigned at = next<unsigned>(f), buffer = next<unsigned>(f);
            char* p = buffers[buffer] + next<unsigned long long>(f);
            memcpy(parameters.data() + at, &p, 8);
        }}
        fprintf(stderr, "launch %s\\n", names[which]);
        table[which](sizes[0], sizes[1], sizes[2], sizes[3], parameters.data());
    }}
}}
"""


class Recorder:
    """Stands in for `receptance.ops.cuda.load`: kernels run in the emulation, their launches are noted down."""

    def __init__(self) -> None:
        self.launches: dict[tuple[Path, tuple[str, ...]], list[tuple[str, bytes]]] = {}

    def load(self, source: Path, **defines: int | str) -> "_Program":
        macros = tuple(f"-D{name}={value}" for name, value in defines.items())
        notes = self.launches.setdefault((source, macros), [])
        return _Program(emulation.load(source, **defines), notes)

    def reports(self, folder: Path) -> dict[str, list[str]]:
        """Kernel → what the thread sanitizer says about its launches."""
        found: dict[str, list[str]] = {}
        for i, ((source, macros), notes) in enumerate(self.launches.items()):
            names = list(dict.fromkeys(name for name, _ in notes))
            launchers = "\n".join(
                f"UNSEEN void launch_{x}(unsigned x, unsigned y, unsigned z, unsigned n, const char* p) "
                f"{{ emulation::launch({x}, x, y, z, n, p); }}"
                for x in names
            )
            launchers += "\nLaunch* table[] = {" + ", ".join(f"launch_{x}" for x in names) + "};"
            launchers += "\nconst char* names[] = {" + ", ".join(f'"{x}"' for x in names) + "};"
            main, program, data = folder / f"{i}.cpp", folder / f"{i}", folder / f"{i}.bin"
            main.write_text(MAIN.format(here=emulation.HERE, source=source, launchers=launchers))
            ops = Path(cuda.__file__).parent
            flags = ["-std=c++17", "-O1", "-g", "-w", "-fsanitize=thread", "-ffp-contract=off", f"-I{ops}", *macros]
            built = subprocess.run([emulation.COMPILER, *flags, "-o", program, main], capture_output=True, text=True)
            assert built.returncode == 0, built.stderr[:4000]
            launches = (struct.pack("I", names.index(name)) + note for name, note in notes)
            data.write_bytes(struct.pack("I", len(notes)) + b"".join(launches))
            done = subprocess.run(
                ["setarch", "-R", program, data], capture_output=True, text=True,
                env={"TSAN_OPTIONS": "halt_on_error=0 exitcode=0 history_size=7 suppress_equal_addresses=0"},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
            for part in re.split(r"^launch ", done.stderr, flags=re.MULTILINE)[1:]:
                name, _, text = part.partition("\n")
                found.setdefault(name, []).extend(
                    re.findall(r"WARNING: ThreadSanitizer.*?(?=\n={10})", text, re.DOTALL)
                )
        return found


class _Program:
    def __init__(self, program: emulation.Program, notes: list[tuple[str, bytes]]):
        self._program, self._notes = program, notes

    def __getattr__(self, name: str):
        kernel = getattr(self._program, name)

        def call(grid, threads, *args, **options):
            self._notes.append((name, _note(grid, threads, args)))
            kernel(grid, threads, *args, **options)

        return call


def _note(grid: tuple[int, ...], threads: int, args: tuple[object, ...]) -> bytes:
    storages: dict[int, int] = {}
    buffers, pointers, values = [], [], []
    fields = layout(args)
    for i, x in enumerate(args):
        if not isinstance(x, torch.Tensor):
            values.append(x or 0)
            continue
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = len(buffers)
            content = _bytes(x)
            buffers.append(struct.pack("Q", len(content)) + content)
        at = len(layout(args[: i + 1]).pack(*([0] * (i + 1)))) - 8
        pointers.append(struct.pack("IIQ", at, storages[storage.data_ptr()], x.data_ptr() - storage.data_ptr()))
        values.append(0)
    packed = fields.pack(*values)
    return (
        struct.pack("5I", *(*grid, 1, 1)[:3], threads, len(buffers)) + b"".join(buffers)
        + struct.pack("I", len(packed)) + packed + struct.pack("I", len(pointers)) + b"".join(pointers)
    )  # fmt: skip


def _bytes(x: torch.Tensor) -> bytes:
    """The whole of the memory that x lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy().tobytes()
