"""The committed page is the one that its sources build, and it keeps the promises that need no browser."""

import hashlib
import importlib.machinery
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]


def page_script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("page_script", str(ROOT / "scripts/page"))
    spec = importlib.util.spec_from_loader("page_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_built_page_matches_its_sources() -> None:
    page = page_script()
    record = json.loads(page.RECORD.read_text())
    assert page.hashes(page.SOURCES) == record["sources"], "web/ has changed since the page was built: run `make page`"
    assert page.hashes(page.BUILT) == record["built"], "the built page was changed by hand: run `make page`"


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules/ignored").write_text("x")
    (tmp_path / "seen").write_text("x")
    found = page_script().hashes(tmp_path)
    assert found == {"seen": hashlib.sha256(b"x").hexdigest()}


def test_the_page_is_small_and_has_nothing_inline_or_foreign() -> None:
    built = page_script().BUILT
    files = [path for path in built.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    html = (built / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)", html) == []
    assert re.findall(r"\bon\w+=|style=|<style", html) == []
    for path in files:
        links = set(re.findall(r"https?://[\w.-]+", path.read_text()))
        assert links <= {"http://www.w3.org"}, path  # the names of SVG and MathML, which nobody fetches


def test_no_source_writes_markup() -> None:
    for path in (ROOT / "web/src").iterdir():
        found = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", path.read_text())
        assert found == [], path
