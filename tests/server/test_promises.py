"""docs/reliability.md names tests and figures; they exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(test_\w+)`", PAGE)


def written():
    """All tests of the repository."""
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield node.name


def test_every_test_that_the_promises_name_exists():
    assert len(set(NAMED)) > 80
    assert set(NAMED) - set(written()) == set()


def test_every_promise_has_a_test_or_a_figure():
    """A row of a table with no empty right side; the figures have a date."""
    rows = [row for row in PAGE.splitlines() if row.startswith("| ") and not row.startswith("| promise")]
    assert len(rows) > 50
    for row in rows:
        _, promise, shown, *_ = row.split("|")
        assert promise.strip()
        assert "`test_" in shown or re.search(r"\d", shown) or shown.strip() == "figure", row
    assert re.search(r"20\d\d-\d\d-\d\d", PAGE)


def test_every_test_of_the_servers_security_is_a_promise():
    names = re.findall(r"^def (test_\w+)", (ROOT / "tests/server/test_security.py").read_text(encoding="utf-8"), re.M)
    assert set(names) - set(NAMED) == set()


def test_isolated_networks_are_asked_for():
    for page, words in (("distributed.md", "isolated networks only"), ("server.md", "network of trusted machines")):
        assert words in " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
