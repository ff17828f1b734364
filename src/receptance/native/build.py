"""Compile the C++ core with the C++ compiler that is there. Needs nothing of this package: the build back end runs it.

`python -m receptance.native.build` builds it again, for instance after a compiler was installed.
"""

import hashlib
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc"
LIBRARY = HERE / ("_core.dll" if os.name == "nt" else "_core.so")

# -O3 takes twice as long; of what it adds, only unrolling short loops (of sums in registers) gains anything
FLAGS = ["-std=c++17", "-O2", "-fpeel-loops", "-fPIC", "-fopenmp-simd", "-fvisibility=hidden", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti", "-pthread", "-Wall"]
SANITIZERS = {
    "--sanitize": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"],
    "--sanitize-threads": ["-fsanitize=thread", "-g", "-O1"],
}

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
    "-mprefer-vector-width=512",
]
ISA_FLAGS = {  # by machine, by source file
    "x86_64": {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_amx": [*AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]},
    "aarch64": {"isa_neon": ["-march=armv8.2-a+dotprod+fp16"]},
}
UNKNOWN_FLAG = ("unrecognized command", "unknown argument")  # of GCC, of clang
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def sources_hash() -> str:
    """Of what the core is compiled from: a library knows its own, so that a stale one is noticed."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class BuildError(Exception):
    """There is no compiler, or it failed; the message says which and how."""


def find_compiler() -> list[str]:
    """$CXX as every build tool reads it, with arguments ("ccache g++"), else the first of the usual names."""
    import shutil

    given = os.environ.get("CXX", "")
    for words in [given], given.split(), ["c++"], ["g++"], ["clang++"]:
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def build(library: Path = LIBRARY, *, more_flags: tuple[str, ...] = (), jobs: int | None = None) -> Path:
    """Compile and link the core into `library`, which is replaced only when all is well. Raises BuildError."""
    compiler = find_compiler()
    machine = platform.machine().lower()
    # the team alone catches: threads that the system does not start
    own_flags = {"team": ["-fexceptions"], **ISA_FLAGS.get(MACHINES.get(machine, machine), {})}
    flags = [*FLAGS, f'-DSOURCES_HASH="{sources_hash()}"']
    import tempfile  # here, as others in this file: the library's loader imports this module too
    from concurrent.futures import ThreadPoolExecutor

    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            command = [*compiler, *flags, "-c", str(source), "-o", target]
            try:
                run([*command, *own_flags.get(source.stem, []), *more_flags])
            except BuildError as error:
                if source.stem != "isa_amx" or not any(words in str(error) for words in UNKNOWN_FLAG):
                    raise
                run([*command, *more_flags])  # a compiler that does not know AMX: then the file is empty
            return target

        with ThreadPoolExecutor(jobs or min(os.cpu_count() or 1, 4)) as pool:
            objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
        part = library.with_name(f".{library.name}.{os.getpid()}.part")
        try:
            run([*compiler, *flags, *more_flags, "-shared", *objects, "-o", str(part)])
            if not part.exists():
                raise BuildError(f"{compiler[0]} says that it succeeded, but wrote nothing; is it a C++ compiler?")
            os.replace(part, library)
        finally:
            part.unlink(missing_ok=True)
    return library


def run(command: list[str]) -> None:
    import subprocess

    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def main() -> None:
    try:
        print(build(more_flags=tuple(flag for word in sys.argv[1:] for flag in SANITIZERS[word])))
    except KeyError as error:
        sys.exit(f"error: {error.args[0]} is unknown; use {' or '.join(SANITIZERS)}, or nothing")
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
