"""The compilation, cache and launch of CUDA kernels, as far as a machine without a GPU shows them."""

import warnings

import pytest
import torch

from receptance.ops import cuda, pieces
from receptance.ops.cuda import CudaError

OPTIONS = ("--gpu-architecture=sm_90a",)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source file with a header, a compiler that takes notes, and a cache of its own."""
    folder = tmp_path / "ops" / "some"
    folder.mkdir(parents=True)
    file = folder / "some.cu"
    file.write_text('#include "common.cuh"\n')
    (folder.parent / "common.cuh").write_text("// a header\n")
    runs = []

    def compile_program(file, headers, options):
        runs.append((file.read_text(), dict(headers), options))
        return b"program %d" % len(runs)

    class Nvrtc:
        @staticmethod
        def nvrtcVersion(major, minor):
            return 0

    monkeypatch.setattr(cuda, "compile_program", compile_program)
    monkeypatch.setattr(cuda, "_nvrtc", Nvrtc)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return file, runs


def test_a_program_is_compiled_once(source):
    file, runs = source
    assert cuda.cubin(file, OPTIONS) == cuda.cubin(file, OPTIONS) == b"program 1"
    assert len(runs) == 1
    assert runs[0][1]["common.cuh"] == b"// a header\n"
    assert "device.cuh" in runs[0][1]  # what all kernels share
    assert [x.suffix for x in cuda.cache_folder().iterdir()] == [".cubin"]  # no temporary file stays


def test_a_changed_source_header_or_option_is_compiled_again(source):
    file, runs = source
    cuda.cubin(file, OPTIONS)
    cuda.cubin(file, (*OPTIONS, "-DX=1"))
    file.write_text("// changed\n")
    cuda.cubin(file, OPTIONS)
    (file.parent.parent / "common.cuh").write_text("// changed too\n")
    cuda.cubin(file, OPTIONS)
    assert len(runs) == 4


def test_a_damaged_program_is_compiled_again(source):
    file, runs = source
    cuda.cubin(file, OPTIONS)
    (kept,) = cuda.cache_folder().iterdir()
    for damaged in (b"", kept.read_bytes()[:-1], b"x" + kept.read_bytes()[1:]):
        kept.write_bytes(damaged)
        count = len(runs)
        assert cuda.cubin(file, OPTIONS) == b"program %d" % (count + 1)
    assert cuda.cubin(file, OPTIONS) == b"program 4"


def test_without_a_writable_cache_the_program_is_still_there(source, tmp_path, monkeypatch):
    file, _ = source
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cuda.cubin(file, OPTIONS) == b"program 1"


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(cuda, "_nvrtc_files", lambda: iter(["/nowhere/libnvrtc.so"]))
    with pytest.raises(CudaError, match="NVRTC"):
        cuda._nvrtc.__wrapped__()


def test_arguments_lie_as_c_lays_them_out():
    x = torch.zeros(1)
    data = cuda.layout((x, 7, None, 0.5)).pack(x.data_ptr(), 7, 0, 0.5)
    assert len(data) == 8 + 4 + 4 + 8 + 4  # the null pointer is aligned
    assert data[16:24] == bytes(8)


def test_kernels_that_do_not_build_cost_one_warning(monkeypatch):
    """The next form runs instead."""

    def fail() -> None:
        raise CudaError("wkv4.cu does not compile")

    from receptance.ops.wkv4 import cuda as module

    class OnGpu:
        is_cuda, dtype, shape = True, torch.bfloat16, (1, 2, 32)

    monkeypatch.setattr(module, "probe", fail)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    pieces._builds.cache_clear()
    try:
        with pytest.warns(
            RuntimeWarning, match=r"wkv4: the CUDA kernel cannot be built .*does not compile.*Triton form"
        ):
            assert not pieces.uses_cuda("wkv4", OnGpu())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not pieces.uses_cuda("wkv4", OnGpu())
    finally:
        pieces._builds.cache_clear()
