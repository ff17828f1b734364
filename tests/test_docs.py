"""The documentation says what is there: settings, command lines, links, names and configurations."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

import receptance
from receptance.cli import build
from receptance.server.config import ServerConfig
from receptance.server.config import read_config as read_server_config
from receptance.training.config import TrainConfig, read_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
OUR_FOLDERS = ("src", "tests", "docs", "examples", "bench", "scripts", "models")

every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """Each call of `receptance` in the shell blocks, as its arguments; pipes and redirections are cut off."""
    for line in "\n".join(blocks(page, "sh")).splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|<>;&")
        words.whitespace_split = True
        call: list[str] | None = None
        for word in [*words, ";"]:
            if re.fullmatch(r"[|<>;&]+", word):
                if call is not None:
                    yield call
                call = None
            elif word == "receptance":
                call = []
            elif call is not None:
                call.append(word)


# Settings ------------------------------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """As TOML has it."""
    return list(value) if isinstance(value, tuple) else value


def defaults(config: Any = None, without: tuple[str, ...] = ()) -> dict[str, object]:
    config, found = config or TrainConfig(), {}
    for section in fields(config):
        if section.name in without:
            continue
        for entry in fields(getattr(config, section.name)):
            value = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            found[f"{section.name}.{entry.name}"] = plain(value)
    return found


def documented(page: str = "docs/training.md") -> dict[str, object]:
    rows = re.findall(r"^\| `(\w+\.\w+)` \| (\S+) \| \S", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert len(rows) == len(dict(rows)), "a setting is documented twice"
    return {name: None if cell == "none" else tomllib.loads(f"x = {cell.strip('`')}")["x"] for name, cell in rows}


def test_every_setting_is_documented_with_its_default():
    assert documented() == defaults()


def test_every_setting_of_the_server_is_documented_with_its_default():
    assert documented("docs/server.md") == defaults(ServerConfig(), without=("models",))


@every_page
def test_configurations_in_the_text_are_accepted(page, tmp_path):
    for text in blocks(page, "toml"):
        if "[data]" in text:
            (tmp_path / "config.toml").write_text(text, encoding="utf-8")
            read_config(tmp_path / "config.toml")
        else:
            tomllib.loads(text)


# Command lines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cli() -> Any:
    return typer.main.get_command(build())


@every_page
def test_command_lines_are_accepted(page, cli):
    """Parsed as by the program, not run."""
    for verb, *arguments in commands(page):
        command = cli.commands.get(verb)
        assert command is not None, f"{page.name}: there is no verb {verb!r}"
        while hasattr(command, "commands"):  # a verb of verbs
            verb, *arguments = arguments
            assert verb in command.commands, f"{page.name}: there is no {verb!r}"
            command = command.commands[verb]
        context = command.make_context(verb, list(arguments))  # raises, naming the option, for one that does not exist
        if "words" in context.params:
            read_server_config(None, [word for word in context.params["words"] or [] if "=" in word])
        if verb == "train":
            overrides = [word for word in context.params["overrides"] or [] if "=" in word]
            read_config(None, [*overrides, 'data.train=["x.txt"]'])


def test_the_command_lines_are_found():
    """Guards the tests above against passing for lack of anything to test."""
    verbs = {call[0] for page in PAGES for call in commands(page)}
    assert verbs >= {"run", "chat", "inspect", "convert", "pull", "list", "doctor", "train", "data"}
    assert ["list"] in commands(ROOT / "README.md")


def test_a_wrong_command_line_would_be_noticed(cli):
    with pytest.raises(Exception, match="--colour"):
        cli.commands["run"].make_context("run", ["text", "--colour"])


@every_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"`make ([\w-]+)`", text) + re.findall(r"^make ([\w-]+)", text, re.M)) <= targets


def scripts() -> dict[str, str]:
    """The benchmarks that can be called, and their source."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py")}
    return {name: text for name, text in texts.items() if "def main()" in text}


@every_page
def test_options_of_benchmarks_exist(page):
    for name, call in re.findall(r"bench/(\w+\.py)([^`#\n]*)", page.read_text(encoding="utf-8")):
        for option in re.findall(r"(?<=\s)--[a-z-]+", call):
            assert f'"{option}"' in scripts()[name], f"{page.name}: {name} {option}"


def test_every_benchmark_and_every_page_is_listed():
    listed = "".join(blocks(ROOT / "docs/benchmarks.md", "sh"))
    assert [name for name in scripts() if f"bench/{name}" not in listed] == []
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in index] == ["index.md"]


# Python and links ----------------------------------------------------------------------------------------------------


@every_page
def test_python_uses_names_that_exist(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("receptance"):
                module = import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rc":
                assert node.attr in receptance.__all__, ast.unparse(node)


def test_names_in_the_maths_are_those_of_the_code():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/receptance").rglob("*.py"))
    names = re.findall(r"`(\w+_\w+)`", (ROOT / "docs/maths.md").read_text(encoding="utf-8"))
    assert names
    assert [name for name in names if name not in code] == []


def anchors(page: Path) -> set[str]:
    """The fragments by which GitHub knows a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        if fragment:
            assert fragment in anchors(place), f"{page.name}: {target}"


@every_page
def test_files_named_in_the_text_exist(page):
    pattern = rf"`((?:{'|'.join(OUR_FOLDERS)})/[\w./-]*\.\w+)`"
    for name in re.findall(pattern, page.read_text(encoding="utf-8")):
        if "N" not in Path(name).stem:  # models/vN.py stands for any version
            assert (ROOT / name).exists() or (ROOT / "src/receptance" / name).exists(), f"{page.name}: {name}"
