"""A grid of small runs that processes share."""

import fcntl
import json

import pytest

from receptance.evaluation.grid import Cell, fill, finished


def silent(text: str) -> None:
    del text


def cells(made: list[str], *names: str, key: str = "k") -> list[Cell]:
    def make(name: str) -> dict[str, str]:
        made.append(name)
        return {"of": name}

    return [Cell(name, key + name, lambda name=name: make(name)) for name in names]


def test_a_cell_is_made_once_and_told_of(tmp_path):
    made: list[str] = []
    told: list[str] = []
    rows = fill(tmp_path, cells(made, "a", "b"), told.append)
    assert rows == [{"cell": "a", "of": "a"}, {"cell": "b", "of": "b"}]
    assert fill(tmp_path, cells(made, "b", "a", "c"), told.append) == [rows[1], rows[0], {"cell": "c", "of": "c"}]
    assert made == ["a", "b", "c"]
    assert told == ["— a", "— b", "— c"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 3


def test_another_key_is_another_result_under_the_same_name(tmp_path):
    made: list[str] = []
    fill(tmp_path, cells(made, "a"), silent)
    fill(tmp_path, cells(made, "a", key="other"), silent)
    assert made == ["a", "a"]
    assert len(list(tmp_path.glob("a-*.json"))) == 2


def test_names_that_are_no_file_names_are_kept_apart(tmp_path):
    made: list[str] = []
    both = cells(made, "x/../y: 1 %", "x/../y; 1 %", "long" * 100)
    assert [row["of"] for row in fill(tmp_path, both, silent)] == [cell.name for cell in both]
    assert {path.parent for path in tmp_path.rglob("*.json")} == {tmp_path}
    assert max(len(path.name) for path in tmp_path.iterdir()) < 100


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path):
    made: list[str] = []
    a, b = cells(made, "a", "b")
    with open(a.file(tmp_path).with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another open file is as good as another process
        assert fill(tmp_path, [a, b], silent) == [None, {"cell": "b", "of": "b"}]
        assert finished(tmp_path, [a, b]) == [{"cell": "b", "of": "b"}]
    assert made == ["b"]
    assert fill(tmp_path, [a, b], silent)[0] == {"cell": "a", "of": "a"}  # its process has gone


def test_a_cell_that_fails_is_free_again(tmp_path):
    def broken() -> dict[str, str]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fill(tmp_path, [Cell("a", "ka", broken)], silent)
    assert finished(tmp_path, [Cell("a", "ka", broken)]) == []
    made: list[str] = []
    assert fill(tmp_path, cells(made, "a"), silent) == [{"cell": "a", "of": "a"}]
    assert json.loads(next(tmp_path.glob("*.json")).read_text()) == {"cell": "a", "of": "a"}
