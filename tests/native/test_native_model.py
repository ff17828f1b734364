"""The CPU engine beside the torch engine and beside itself: sizes, batches, states, types."""

import copy
import math
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from native_helpers import COMPILED, bfloat16, engines, native, needs_core, random_model, tokens

from receptance.errors import CheckpointError, ConfigError
from receptance.models import RWKV, VERSIONS
from receptance.models import State as TorchState
from receptance.native import NativeModel, State, library, read_config, tensor_shapes
from receptance.native import model as model_module
from receptance.native.build import BuildError, build, find_compiler
from receptance.native.model import available_cores, cpu_quota

CLOSE = 2e-5  # float32 rounding, of logits around 1 to 10 after a few layers
ODD = {  # sizes that fill no vector, no block and no group
    "4": {"n_embd": 44, "dim_att": 36, "dim_ffn": 77, "vocab_size": 53},
    "5.0": {"n_embd": 36, "head_size": 12, "dim_ffn": 75, "vocab_size": 51},
    "5.1": {"n_embd": 36, "head_size": 12, "dim_ffn": 75, "vocab_size": 51},
    "5.2": {"n_embd": 40, "head_size": 8, "dim_ffn": 75, "vocab_size": 51},
    "6": {"n_embd": 36, "head_size": 12, "dim_ffn": 75, "vocab_size": 51, "mix_rank": 5, "decay_rank": 7},
    "7": {"n_embd": 36, "head_size": 12, "dim_ffn": 75, "vocab_size": 51, "decay_rank": 5, "gate_rank": 3},
}
WIDE = {"n_embd": 192, "head_size": 64, "dim_ffn": 320, "vocab_size": 300}


def torch_logits(model: RWKV, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model.forward(ids)[0].numpy()


def assert_close(found: np.ndarray, expected: np.ndarray, bound: float = CLOSE) -> None:
    assert np.abs(found - expected).max() <= bound * max(1, np.abs(expected).max())


@pytest.mark.parametrize("version", VERSIONS)
def test_it_expects_the_tensors_that_the_torch_model_has(version):
    for model in (random_model(version), random_model(version, **ODD[version])):
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        config = read_config(version, shapes)
        assert tensor_shapes(config) == shapes
        assert config.state_shapes(3) == model.state_shapes(3)


@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("version", VERSIONS)
def test_odd_sizes_equal_torch(version, engine):
    model = random_model(version, **ODD[version])
    ids = tokens(23, 51)
    fast = native(model, engine_name=engine)
    logits, state = fast.forward(ids[:20])
    assert_close(logits, torch_logits(model, ids[:20]))
    more, _ = fast.forward(ids[20:], state)
    assert_close(more, torch_logits(model, ids)[20:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", engines())
def test_narrow_weights_are_used_exactly(dtype, engine):
    """Weights of 16 bits widen exactly: the logits are those of the same numbers in float32."""
    model = random_model("7", dtype=dtype, **WIDE)
    ids = tokens(300, 300)  # more than one chunk
    logits, _ = native(model, engine_name=engine, dtype="float32").forward(ids)
    fast, _ = native(model, engine_name=engine).forward(ids)
    expected = torch_logits(model.float(), ids)
    assert_close(logits, expected, 1e-4)
    # AVX-512 without AMX takes prompts as integers of 14 bits; inputs rounded to float16 would cost 1.6e-3
    assert_close(fast, expected, 1e-3 if engine == "avx512" else 1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_of_a_batch_equal_rows_alone(version):
    model = native(random_model(version))
    lengths = [30, 1, 17, 0, 9]
    ids = np.array([tokens(30, seed=i) for i in range(5)])
    _, start = model.forward(ids[:, :4])
    logits, state = model.forward(ids, start, lengths=lengths)
    last, _ = model.forward(ids, start, lengths=lengths, last_only=True)
    for row, n in enumerate(lengths):
        if n == 0:
            assert all(np.array_equal(state.select(row)[name], start.select(row)[name]) for name in state)
            continue
        alone, after = model.forward(ids[row, :n], start.select(row))
        assert_close(logits[row, :n], alone)
        assert_close(last[row], alone[-1])
        assert not logits[row, n:].any()
        for name, x in after.items():
            assert_close(state.select(row)[name], x, 1e-4)


@pytest.mark.parametrize("sizes", ["odd", "wide"])
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("version", VERSIONS)
def test_with_float32_a_row_has_its_bits_whatever_else_is_computed(version, engine, sizes):
    options = ODD[version] if sizes == "odd" else WIDE
    if version == "4" and sizes == "wide":
        options = {name: size for name, size in WIDE.items() if name != "head_size"} | {"dim_att": 192}
    for dtype in torch.float32, torch.bfloat16:
        model = native(random_model(version, dtype=dtype, **options), engine_name=engine, dtype="float32")
        ids = np.array([tokens(9, model.config.vocab_size, seed=i) for i in range(70)])
        alone = []
        for row in ids:
            after, one_by_one = None, []
            for token in row:
                logits, after = model.forward([token], after)
                one_by_one.append(logits[0])
            alone.append((np.stack(one_by_one), after))
        for count in 2, 5, 16, 70:
            logits, state = model.forward(ids[:count])  # in one chunk, or in three
            for row in range(count):
                assert np.array_equal(logits[row], alone[row][0])
                assert all(np.array_equal(x, alone[row][1][name]) for name, x in state.select(row).items())


def test_a_long_batch_is_cut_into_chunks():
    model = native(random_model("6"))
    ids = np.array([tokens(300, seed=i) for i in range(3)])
    logits, state = model.forward(ids, lengths=[300, 7, 211])
    alone, after = model.forward(ids[2, :211])
    assert_close(logits[2, :211], alone)
    for name, x in after.items():
        assert_close(state.select(2)[name], x, 1e-4)


@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("version", VERSIONS)
def test_states_change_engines_in_mid_sequence(version, engine):
    model = random_model(version)
    fast = native(model, engine_name=engine)
    ids = tokens(24)
    whole = torch_logits(model, ids)
    with torch.no_grad():
        _, theirs = model.forward(ids[:11])
        ours_after, ours = fast.forward(ids[11:17], theirs)
        theirs_after, _ = model.forward(ids[17:], ours)
    assert_close(ours_after, whole[11:17])
    assert_close(theirs_after.numpy(), whole[17:])


def test_state_files_change_engines(tmp_path):
    model = random_model("7", dtype=torch.bfloat16)
    fast = native(model)
    with torch.no_grad():
        _, theirs = model.forward(tokens(5))
    theirs.save(tmp_path / "theirs", model)
    read = State.load(tmp_path / "theirs", fast)
    assert all(np.array_equal(read[name], theirs[name].float().numpy()) for name in theirs)
    _, ours = fast.forward(tokens(5))
    ours.save(tmp_path / "ours", fast)
    back = TorchState.load(tmp_path / "ours", model)
    assert all(np.array_equal(ours[name], back[name].numpy()) for name in ours)
    other = native(random_model("7", seed=1))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        State.load(tmp_path / "ours", other)
    State({name: x.reshape(-1) for name, x in ours.items()}).save(tmp_path / "flat", fast)
    for load, reader in (State.load, fast), (TorchState.load, model):
        with pytest.raises(CheckpointError, match=r"flat: a state with .* needs"):
            load(tmp_path / "flat", reader)
    data = bytearray((tmp_path / "ours").read_bytes())
    data[-5] ^= 1
    (tmp_path / "ours").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        State.load(tmp_path / "ours", fast)


def test_a_state_is_never_changed_in_place():
    model = native(random_model("7"))
    _, state = model.forward(tokens(5))
    kept = state.clone()
    model.forward(tokens(3), state)
    assert all(np.array_equal(state[name], kept[name]) for name in state)
    merged = State.cat([state, model.zero_state()])
    assert merged.batch == 2
    assert all(np.array_equal(merged.put(1, state).select(1)[name], state[name]) for name in state)


@pytest.mark.parametrize("engine", engines())
def test_a_tuned_start_and_a_channel_mix_first(engine):
    tuned = random_model("7", time_state=True)
    assert_close(native(tuned, engine_name=engine).forward(tokens(9))[0], torch_logits(tuned, tokens(9)))
    pre = random_model("4", pre_ffn=True)
    assert_close(native(pre, engine_name=engine).forward(tokens(9))[0], torch_logits(pre, tokens(9)))


@needs_core
@pytest.mark.parametrize("version", VERSIONS)
def test_more_threads_than_work_change_nothing(version):
    model = random_model(version)
    one, many = native(model, threads=1), native(model, threads=7)
    for ids in (tokens(1), tokens(40)):
        assert_close(many.forward(ids)[0], one.forward(ids)[0])


@needs_core
def test_threads_agree_on_which_rows_end_in_which_chunk():
    """More threads than cores, so that some are late at every barrier."""
    model = native(random_model("7", n_layer=1), threads=5)
    ids = np.array([tokens(140, seed=i) for i in range(6)])
    lengths = [140, 3, 0, 139, 70, 2]
    expected, _ = model.forward(ids, lengths=lengths, last_only=True)
    for _ in range(20):
        assert np.array_equal(model.forward(ids, lengths=lengths, last_only=True)[0], expected)


def in_a_fork(call, seconds):
    """What a call gives in a forked process."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(call()))
    child.start()
    try:
        return queue.get(timeout=seconds)
    finally:
        child.kill()
        child.join()


@needs_core
def test_a_forked_process_gets_threads_of_its_own():
    model = native(random_model("7"), threads=3)
    expected = model.forward(tokens(9))[0]
    assert np.array_equal(in_a_fork(lambda: model.forward(tokens(9))[0], seconds=60), expected)


@needs_core
def test_a_process_that_forks_during_a_call_is_not_held_up():
    model = native(random_model("7"), threads=3)
    expected = model.forward(tokens(9))[0]
    with model.team():  # as another thread's call has it
        assert np.array_equal(in_a_fork(lambda: model.forward(tokens(9))[0], seconds=30), expected)


@needs_core
def test_threads_that_the_system_does_not_start_are_an_error():
    """Their stacks find no room; a Python of its own, as the limit is one of the process."""
    code = (
        "import resource, receptance as rc\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "rc.load('rwkv7-stories', engine='native', threads=1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError: the system lets this process start no 1000 threads" in done.stderr


def test_a_model_is_neither_copied_nor_pickled():
    model = native(random_model("7"))
    for make in copy.copy, copy.deepcopy, pickle.dumps:
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            make(model)


@needs_core
@pytest.mark.parametrize("scale", [0.0, 1e-40])
def test_extreme_activations_are_quantised_soundly(scale):
    """Nothing overflows where a block holds only zeros or only subnormal numbers."""
    model = wide_model("7")
    with torch.no_grad():
        model.blocks[0].ln2.weight.mul_(scale)
        model.blocks[0].ln2.bias.mul_(scale)
    found, _ = native(model, dtype="int8").forward(tokens(5, 300))
    expected = torch_logits(model, tokens(5, 300))
    assert np.sqrt(np.mean((found - expected) ** 2)) <= 0.1 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize(
    "name", ["emb.weight", "blocks.0.ln1.bias", "blocks.0.att.value.weight", "blocks.1.ffn.key.weight", "head.weight"]
)
def test_what_is_not_a_number_reaches_the_logits(name, engine, dtype):
    """Damaged weights are then reported and not sampled from, in blocks of 8 and 4 bits as well."""
    if engine == "numpy" and dtype:
        pytest.skip("not without the core")
    model = random_model("7")
    model.state_dict()[name].reshape(-1)[0] = float("nan")
    damaged = native(model, engine_name=engine, dtype=dtype)
    expected = np.isnan(torch_logits(model, [0]))
    for rows in 1, 5, 40:
        found, _ = damaged.forward([[0]] * rows)
        assert np.array_equal(np.isnan(found), np.broadcast_to(expected, found.shape))


# Quantised weights ---------------------------------------------------------------------------------------------------

# Root mean square, relative. Mostly 4e-7; but an activation at the edge between two of its 255 steps may fall to either
# side, which moves what follows. Rounding all of them moves it by 0.016 to 0.04.
ROUNDED = 0.01


def block_rounded(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """What the blocks of 32 numbers stand for; activations ("int8x", "int16x") have a scale in float32."""
    blocks = x.reshape(-1, x.shape[-1] // 32, 32)
    furthest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    high = {"int4": 7, "int16x": 127 * 256}.get(dtype, 127)
    scale = furthest / -8 if dtype == "int4" else furthest.abs() / high
    scale = scale if dtype.endswith("x") else scale.half().float()
    low = -8 if dtype == "int4" else -high
    return ((blocks / scale).round().clamp(low, high) * scale).reshape(x.shape)


def matrices(model: RWKV) -> dict[str, torch.Tensor]:
    """What is stored in another type when one is asked for."""
    return {
        name: x
        for name, x in model.state_dict().items()
        if name.endswith(".weight") and x.dim() == 2 and name != "emb.weight"
    }


def quantised(model: RWKV, dtype: str, engine: str, *, many: bool) -> RWKV:
    """The torch model with all matrices and their inputs rounded as the native engine does.

    many: tokens at once. A single token's sum over hidden units of the channel mix takes them in float32.
    """
    for name, x in matrices(model).items():
        bits = "int8" if name == "head.weight" else dtype
        x.copy_(block_rounded(x, bits))
        if engine == "amx" and many:
            x.copy_(torch.from_numpy(bfloat16(x.numpy())))
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if engine == "amx" and many:
            module.register_forward_pre_hook(lambda _, inputs: torch.from_numpy(bfloat16(inputs[0].numpy())))
        elif many or not name.endswith("ffn.value"):
            # beside weights of 8 bits; of the value matrix's only where the processor has no dot products of bytes
            is_wide = dtype == "int8" or name == "head"
            is_wide = is_wide and (engine in ("avx2", "portable") or not name.endswith("ffn.value"))
            bits = "int16x" if is_wide else "int8x"
            module.register_forward_pre_hook(lambda _, inputs, bits=bits: block_rounded(inputs[0], bits))
    return model


def wide_model(version: str) -> RWKV:
    sizes = {key: value for key, value in WIDE.items() if version != "4" or key != "head_size"}
    return random_model(version, n_layer=2, **sizes, **({"dim_att": 192} if version == "4" else {}))


def assert_rounded(found: np.ndarray, expected: np.ndarray, bound: float = ROUNDED) -> None:
    assert np.sqrt(np.mean((found - expected) ** 2)) <= bound * np.sqrt(np.mean(expected**2))


@needs_core
@pytest.mark.parametrize("engine", COMPILED)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_quantised_weights_are_those_of_their_blocks(version, dtype, engine):
    ids = tokens(40, 300)
    fast = native(wide_model(version), dtype=dtype, engine_name=engine)
    one, many = (torch_logits(quantised(wide_model(version), dtype, engine, many=x), ids) for x in (False, True))
    assert_rounded(fast.forward(ids)[0], many)
    if engine == "amx":  # fewer rows are multiplied as bytes, as AVX-512 does
        few = torch_logits(quantised(wide_model(version), dtype, "avx512", many=True), ids[:20])
        for count in (9, 14, 20):  # in vectors, in tiles of 16 rows, in vectors
            assert_rounded(fast.forward(ids[:count])[0], few[:count])
    state, by_token = None, []
    for token in ids:
        logits, state = fast.forward([token], state)
        by_token.append(logits[0])
    assert_rounded(np.stack(by_token), one)
    assert fast.active_fraction is not None
    assert 0.3 < fast.active_fraction < 0.7  # half of random hidden units


@needs_core
@pytest.mark.parametrize("version", VERSIONS)
def test_sizes_that_do_not_divide_into_blocks_stay_as_they_are(version):
    """Only matrices with whole blocks are quantised, so the others' part of the error is missing."""
    model = random_model(version, **ODD[version])
    expected = torch_logits(model, tokens(9, 51))
    assert_close(native(model, dtype="int8").forward(tokens(9, 51))[0], expected)


@needs_core
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_wide_weights_can_be_rounded_to_16_bits(dtype):
    fast = native(wide_model("6"), dtype=dtype)
    found, _ = fast.forward(tokens(9, 300))
    model = wide_model("6")
    for x in matrices(model).values():
        x.copy_(x.to(getattr(torch, dtype)))
    assert_close(found, torch_logits(model, tokens(9, 300)), 1e-3 if fast.engine_name == "avx512" else 1e-4)


# Without the core, and wrong input ------------------------------------------------------------------------------------


def test_without_the_core_numpy_takes_over_and_says_so(monkeypatch, tmp_path):
    model = random_model("7")

    def missing(name: str = "") -> library.Core:
        raise library.NoCoreError("it was not compiled")

    monkeypatch.setattr("receptance.native.model.load_core", missing)
    with pytest.warns(UserWarning, match=r"it was not compiled.*NumPy"):
        plain = native(model)
    assert plain.engine_name == "numpy"
    assert_close(plain.forward(tokens(9))[0], torch_logits(model, tokens(9)))
    with (
        pytest.warns(UserWarning, match="NumPy"),
        pytest.raises(ConfigError, match=r"int8.*receptance\.native\.build"),
    ):
        native(model, dtype="int8")


def test_a_library_of_another_version_is_refused(tmp_path):
    (tmp_path / "_core.so").write_bytes(b"not a library")
    with pytest.raises(library.NoCoreError, match="cannot be used"):
        library.load_library(tmp_path / "_core.so")
    with pytest.raises(library.NoCoreError, match="not compiled"):
        library.load_library(tmp_path / "missing.so")


def test_the_builder_says_in_one_line_what_is_wrong():
    command = [sys.executable, "-m", "receptance.native.build"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CXX": "", "PATH": ""})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["error: no C++ compiler found (looked for $CXX, c++, g++, clang++)"]


def test_a_compiler_that_writes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("true"))
    with pytest.raises(BuildError, match="wrote nothing"):
        build(tmp_path / "core.so")


def test_a_container_gets_no_more_threads_than_its_quota(tmp_path, monkeypatch):
    own, inner = tmp_path / "own", tmp_path / "groups" / "pod" / "box"
    assert cpu_quota(tmp_path, own) == math.inf
    own.write_text("1:cpu:/old\n0::/pod/box\n")
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path / "groups", own) == math.inf
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path / "groups", own) == 1.5

    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1000, 1001, 1002}, raising=False)
    for quota, threads in (math.inf, 3), (1.5, 2), (0.1, 1):
        monkeypatch.setattr(model_module, "cpu_quota", lambda quota=quota: quota)
        assert available_cores() == threads


def test_the_compiler_may_have_arguments(monkeypatch):
    for given, words in (sys.executable, []), (f"{sys.executable} -m cc", ["-m", "cc"]):
        monkeypatch.setenv("CXX", given)
        assert find_compiler() == [sys.executable, *words]


@pytest.mark.parametrize(
    "ids, options, words",
    [
        ([], {}, "at least one token"),
        ([61], {}, r"token ids must be in \[0, 61\)"),
        ([-1], {}, r"token ids must be in \[0, 61\)"),
        ([[1, 2]], {"lengths": [3]}, "lengths must be"),
        ([[1], [2]], {"state": "one row"}, "a state of 1 rows for 2 rows"),
        ([1], {"state": {}}, "a state with {}"),
    ],
)
def test_wrong_input_is_refused(ids, options, words):
    model: NativeModel = native(random_model("7"))
    if options.get("state") == "one row":
        options = {"state": model.zero_state()}
    with pytest.raises(ValueError, match=words):
        model.forward(ids, **options)


def test_a_state_of_another_shape_is_refused():
    model, other = native(random_model("7")), native(random_model("7", n_layer=2))
    with pytest.raises(ValueError, match="needs"):
        model.forward([1], other.zero_state())
    with pytest.raises(ConfigError, match="dtype 'int3'"):
        native(random_model("7"), dtype="int3")


@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("version", VERSIONS)
def test_rows_of_a_pool_are_stepped_in_place(version, engine):
    """Any rows in any order, of any lengths; one row forked into another; the rest of the pool is not touched."""
    model = native(random_model(version, **ODD[version]), engine_name=engine)
    ids = np.array(tokens(12, 51), np.int32)
    counts, rows, targets = np.array([5, 1, 6], np.int32), np.array([4, 0, 2], np.int32), np.array([4, 3, 2], np.int32)
    _, before = model.forward(np.arange(14).reshape(7, 2))
    pool = before.clone()
    for name, x in pool.items():
        x[:, 1] = np.nan  # a row that nobody uses
        before[name][:, 1] = np.nan
    logits = model.forward_rows(ids, counts, pool, rows, targets)
    every = before.clone()
    all_logits = model.forward_rows(ids, counts, every, rows, targets, last_only=False)
    for i, (end, count) in enumerate(zip(np.cumsum(counts), counts)):
        expected, after = model.forward(ids[end - count : end], before.select(int(rows[i])))
        assert_close(logits[i], expected[-1])
        assert_close(all_logits[end - count : end], expected)
        for name, x in after.items():
            assert_close(pool[name][:, targets[i] : targets[i] + 1], x)
    for name, x in before.items():
        for row in {0, 1, 5, 6}:
            np.testing.assert_array_equal(pool[name][:, row], x[:, row])
