"""The page of evidence says what its results say."""

import importlib.util
import re
from pathlib import Path

import pytest

from receptance.data import IGNORE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def evidence():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "bench/evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_its_results(evidence):
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.page(text) == text, "run `python bench/evidence.py page`"


def test_its_pictures_are_there(evidence):
    for name in re.findall(r"\]\((pictures/[^)]+)\)", evidence.PAGE.read_text(encoding="utf-8")):
        assert (ROOT / "docs" / name).exists(), name


def test_results_are_collected_by_run_and_cell(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    for folder, accuracy in (("first", 0.1), ("second", 0.123456789)):
        cells = tmp_path / folder / "recall" / "cells"
        cells.mkdir(parents=True)
        (cells / "a.json").write_text(f'{{"name": "RWKV-7", "accuracy": {accuracy}}}')
    evidence.collect([tmp_path / "first", tmp_path / "second"], "a GPU")
    assert evidence.rows_of("recall") == [{"name": "RWKV-7", "accuracy": 0.123457, "gpu": "a GPU"}]


def test_a_law_is_that_of_a_family_not_of_a_run(evidence, monkeypatch):
    sizes = [(n, d) for n in (1_000_000, 4_000_000) for d in (2_000_000, 8_000_000, 32_000_000)]
    rows = [
        {"name": f"{family}, {n:,}, {d:,}", "parameters_without_embedding": n, "tokens": d,
         "validation": {"wiki": c * (n * d) ** -0.05}}
        for family, c in (("RWKV-7", 5.0), ("Transformer", 6.0)) for n, d in sizes
    ]  # fmt: skip
    monkeypatch.setattr(evidence, "rows_of", lambda name: rows)
    laws = evidence.scaling_laws("of this test")
    assert [law["family"] for law in laws] == ["RWKV-7", "Transformer"]
    assert [len(law["points"]) for law in laws] == [6, 6]


@pytest.mark.parametrize(("step", "longest"), [(0, 2), (49, 32), (99, 62), (100, 62), (199, 62)])
def test_a_curriculum_counts_longer_and_longer_rows(step, longest):
    import torch

    from receptance.evaluation.recall import Examples, Options
    from receptance.evaluation.synthetic import Group

    options = Options(steps=200, batch=2, shortest=2, curriculum=0.5)
    ends = set()
    for seed in range(40):
        examples = Examples(Group("Z2", 62), Options(**{**options.__dict__, "seed": seed}), torch.device("cpu"))
        targets = examples.batch(step).targets
        ends.add(int((targets != IGNORE).sum(1).max()))
    assert min(ends) >= 2
    assert 0.7 * longest < max(ends) <= longest
