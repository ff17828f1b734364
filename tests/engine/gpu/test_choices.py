"""What is measured about a GPU and kept: on a machine without one, all but the measuring itself."""

import json

import pytest
import torch
from tests.engine.gpu.test_model import DEVICE, error, make, older, put, start

from receptance.cli import doctor
from receptance.engine.gpu.choices import CUBLAS, GEMM, GEMV, KINDS, MIXED, Choice, Choices, fastest, kept, kernels
from receptance.engine.gpu.model import GpuModel

OWN, BLAS = Choice(GEMV, True), Choice(CUBLAS, False)
KEY = {"gpu": "NVIDIA Test", "kernels": kernels(), "model": "RWKV7, 2 x 128, full", "rows": 8}


def test_choices_are_found_again_by_their_key():
    Choices(KEY).put(8, BLAS)
    assert Choices(KEY).get(8) == BLAS
    assert Choices(KEY).get(4) is None
    assert Choices({**KEY, "rows": 9}).get(8) is None


def test_what_another_process_measured_meanwhile_stays():
    one, other = Choices(KEY), Choices(KEY)
    one.put(8, BLAS)
    other.put(1, OWN)
    found = Choices(KEY)
    assert (found.get(8), found.get(1)) == (BLAS, OWN)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"key": {}, "steps": {"8": {"speed": 1}}}',
        '{"key": 1, "steps": {"x": {}}}',
        '{"key": {}, "steps": {"8": {"products": "none", "few": true}}}',
        '{"key": {}, "steps": {"8": {"products": "gemm", "few": 1}}}',
    ],
)
def test_a_damaged_file_counts_as_none_and_is_written_anew(text, choices_folder):
    made = Choices(KEY)
    made.put(8, BLAS)
    made.file.write_text(text)
    assert Choices(KEY).get(8) is None
    Choices(KEY).put(1, OWN)
    assert Choices(KEY).get(1) == OWN
    assert [x.name for x in choices_folder.iterdir()] == [made.file.name]  # no temporary file


def test_a_folder_that_cannot_be_written_costs_nothing(choices_folder):
    choices_folder.write_text("a file where the folder belongs")
    made = Choices(KEY)
    made.put(8, BLAS)
    assert made.get(8) == BLAS


def test_doctor_names_what_was_measured_on_this_gpu_by_these_kernels():
    assert "nothing measured yet" in doctor.tuned("choices", "NVIDIA Test").detail
    for rows in 8, 1:
        Choices(KEY).put(rows, OWN)
    Choices({**KEY, "gpu": "another"}).put(64, OWN)
    Choices({**KEY, "kernels": "older"}).put(64, OWN)
    assert kept("NVIDIA Test") == {"RWKV7, 2 x 128, full": [1, 8]}
    assert doctor.tuned("choices", "NVIDIA Test").detail.endswith("RWKV7, 2 x 128, full (1, 8 rows)")


def test_files_are_plain_json(choices_folder):
    Choices(KEY).put(8, BLAS)
    (file,) = choices_folder.iterdir()
    assert json.loads(file.read_text()) == {"key": KEY, "steps": {"8": {"products": "cublas", "few": False}}}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("version", ["7", "6", "5.2", "4"])
def test_every_choice_gives_the_same_logits_but_for_rounding(version):
    model = make() if version == "7" else older(version)
    fast = GpuModel(model, slots=3, most_rows=8)
    slots, tokens = torch.arange(3, dtype=torch.int32, device=DEVICE), torch.tensor([5, 90, 7], device=DEVICE)
    results: dict[str, list[torch.Tensor]] = {}
    for kind in KINDS:
        for few in (True, False) if kind not in (GEMM, MIXED) or fast.products.has_gemm else ():
            put(fast, [0, 1, 2], start(model, 3))
            fast._choices._made = {4: Choice(kind, few)}
            results.setdefault(kind, []).append(fast.decode(tokens, slots).double())
    first = results[GEMV][0]
    for kind, (few, many) in results.items():
        assert error(few, first) < 3e-3
        assert error(many, first) < 3e-3
        assert kind in (GEMV, MIXED) or not torch.equal(few, first)  # other products, which add in another order


@pytest.mark.gpu
def test_the_fastest_is_measured_and_kept():
    fast = GpuModel(make(), slots=3, most_rows=64)
    fast.tune(64)
    made = fast._choices.get(64)
    assert made is not None
    assert Choices(fast._choices.key).get(64) == made
    x = torch.ones(4096, 4096, device="cuda")
    slow = lambda choice: [x @ x for _ in range(2 if choice is OWN else 1)]
    assert fastest([OWN, BLAS], slow) is BLAS
    assert fastest([BLAS, OWN], slow) is BLAS
    again = GpuModel(make(), slots=3, most_rows=64)
    again._decode = None  # type: ignore[assignment, method-assign]
    again.tune(64)  # which is not measured again
