"""Texts and tables to one token file: the same however many processes make it and however often they are killed."""

import gzip
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from receptance.data import BinIdx, documents, prepare, read_manifest
from receptance.errors import ConfigError
from receptance.tokenizers import tokenizer, train_bpe

FILES = (".bin", ".idx", ".json")


def write_texts(folder: Path, n: int = 300, seed: int = 0) -> list[Path]:
    """Three files of several pieces' worth of text once PIECE is small."""
    rng = random.Random(seed)
    words = ["one", "zwei", "três", "четыре", "五", "🐢", "\n", "a\u2028b"]
    rows = [" ".join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(n)]
    lines = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(rows))
    (folder / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    with lzma.open(folder / "b.jsonl.xz", "wb") as file:
        file.write(lines.encode()[: lines.encode().rindex(b"\n", 0, 20_000) + 1])
    with gzip.open(folder / "c.txt.gz", "wb") as file:
        file.write("\n\n".join(rows).encode())
    return [folder / name for name in ("a.jsonl", "b.jsonl.xz", "c.txt.gz")]


def contents(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in FILES]


@pytest.fixture
def small_pieces(monkeypatch):
    from receptance.data import prepare as module
    from receptance.data import sources

    monkeypatch.setattr(sources, "PIECE", 1000)
    monkeypatch.setattr(sources, "ROWS", 7)
    monkeypatch.setattr(sys.modules[module.__module__], "COMMIT_SECONDS", 0)


class Killed(BaseException):
    pass


def test_documents_come_out_as_they_went_in(tmp_path, small_pieces):
    paths = write_texts(tmp_path)
    tok = tokenizer("world")
    data = prepare(paths, tok, tmp_path / "out", separator="\n\n")
    rows = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    expected = [row for row in rows if row]
    found = [tok.decode(data[i][:-1].tolist()) for i in range(len(expected))]
    assert found == expected
    assert all(data[i][-1] == tok.eos_id for i in range(len(data)))
    assert found + found[: len(list(documents(paths[1])))] == [*expected, *documents(paths[1])]
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob("*.progress.json"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["os.truncate", "os.replace", "write_index", "_replace", "Path.unlink"])
def test_putting_the_files_in_place_can_be_interrupted_anywhere(tmp_path, small_pieces, monkeypatch, where, when):
    paths, tok = write_texts(tmp_path, 30), tokenizer("byte")
    prepare(paths, tok, tmp_path / "whole")
    owner = sys.modules[prepare.__module__]
    *outer, name = where.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def dies(*arguments, **rest):
        if any(str(argument).endswith(".progress.json") for argument in arguments) and name != "unlink":
            return real(*arguments, **rest)  # an ordinary commit
        if when == "before":
            raise Killed
        real(*arguments, **rest)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            prepare(paths, tok, tmp_path / "again")
    prepare(paths, tok, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.glob("again*")) == sorted(f"again{suffix}" for suffix in FILES)


@pytest.mark.parametrize("processes", [1, 3])
def test_interruptions_and_processes_leave_no_trace(tmp_path, small_pieces, processes):
    """Killed after every few pieces, which loses what was not committed."""
    paths, tok = write_texts(tmp_path), tokenizer("byte")
    settings = {"separator": "\n\n", "repeat": [1, 3, 2]}
    prepare(paths, tok, tmp_path / "whole", **settings)
    rng, attempts = random.Random(1), 0
    most = 25 if processes == 1 else 90  # starting processes takes time
    while True:
        attempts += 1
        left = rng.randint(most // 2, most)

        def count(_):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        try:
            prepare(paths, tok, tmp_path / "again", **settings, processes=processes, progress=count)
            break
        except Killed:
            with open(tmp_path / "again.bin.part", "ab") as file:  # written, but not committed
                file.write(b"torn")
            assert not (tmp_path / "again.idx").exists()
    assert attempts >= 3
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_a_full_disk_is_named_and_the_same_call_goes_on(tmp_path, small_pieces):
    sources = write_texts(tmp_path)
    prepare(sources, tokenizer("byte"), tmp_path / "whole")
    largest = (tmp_path / "whole.bin").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (largest // 2, largest - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(ConfigError, match=r"again\.bin\.part: could not be written .*goes on from here"):
                prepare(sources, tokenizer("byte"), tmp_path / "again")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    prepare(sources, tokenizer("byte"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_kill_minus_nine_and_the_command_again(tmp_path):
    """The whole program, in two processes, killed at random moments; its workers end with it."""
    rng = random.Random(2)
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
        for _ in range(30_000):
            file.write(json.dumps({"text": " ".join(str(rng.random()) for _ in range(30))}) + "\n")
    prepare([tmp_path / "a.jsonl"], tokenizer("byte"), tmp_path / "whole")
    command = [
        sys.executable, "-m", "receptance", "data", "prepare", "a.jsonl", "--out", "again", "--tokenizer", "byte",
    ]  # fmt: skip
    for attempt in range(4):
        process = subprocess.Popen([*command, "-p", str(1 + attempt % 2)], cwd=tmp_path, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(1.5, 4))
        except subprocess.TimeoutExpired:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            process.wait()
            deadline = time.monotonic() + 30
            while (alive := [c for c in children if Path(f"/proc/{c}/exe").exists()]) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not alive, "workers end with the program"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = contents(tmp_path / "again"), contents(tmp_path / "whole")
    assert a[:2] == b[:2]


def test_what_is_complete_is_not_done_again(tmp_path):
    paths, tok = write_texts(tmp_path, 10), tokenizer("byte")
    prepare(paths, tok, tmp_path / "out")
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    prepare(paths, tok, tmp_path / "out", progress=lambda _: pytest.fail("nothing is left to do"))
    os.utime(paths[0])  # touched, but not changed
    prepare(paths, tok, tmp_path / "out")
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("is_complete", [False, True])
def test_other_sources_or_settings_are_refused(tmp_path, small_pieces, is_complete):
    paths, tok = write_texts(tmp_path), tokenizer("byte")

    def stop(progress):
        if progress.documents > 50 and not is_complete:
            raise Killed

    try:
        prepare(paths, tok, tmp_path / "out", progress=stop)
    except Killed:
        assert not is_complete
    with pytest.raises(ConfigError, match=r"tokenizer\.name = 'byte', this is 'world'"):
        prepare(paths, tokenizer("world"), tmp_path / "out")
    with pytest.raises(ConfigError, match="column = 'text', this is 'body'"):
        prepare(paths, tok, tmp_path / "out", column="body")
    with pytest.raises(ConfigError, match="sources = "):
        prepare(paths[:2], tok, tmp_path / "out")
    with open(paths[0], "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match=r"sources\[0\]\.bytes"):
        prepare(paths, tok, tmp_path / "out")
    data = prepare(paths, tok, tmp_path / "out", restart=True)
    assert any(tok.decode(data[i][:-1].tolist()) == "one more" for i in range(len(data)))


@pytest.mark.parametrize("call", [lambda: prepare(["a.txt"], tokenizer("byte"), "."), lambda: BinIdx(".")])
def test_a_folder_is_no_name(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"^\.: is a folder; expected the NAME"):
        call()


def test_two_at_once_are_refused(tmp_path, small_pieces):
    paths, tok = write_texts(tmp_path), tokenizer("byte")

    def again(progress):
        with pytest.raises(ConfigError, match="another process is preparing"):
            prepare(paths, tok, tmp_path / "out")

    prepare(paths, tok, tmp_path / "out", progress=again)


def test_a_foreign_token_file_is_not_overwritten(tmp_path):
    paths, tok = write_texts(tmp_path, 10), tokenizer("byte")
    prepare(paths, tok, tmp_path / "out")
    (tmp_path / "out.json").unlink()
    with pytest.raises(ConfigError, match="does not say what it was made from"):
        prepare(paths, tok, tmp_path / "out")


BAD = b'{"text": "good"}\nnot json\n\n{"text": 3}\n["text"]\n{"text": "\\ud800"}\n\xff\n{"text": "end"}'


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_rows_are_named_or_skipped_and_counted(tmp_path, small_pieces, processes):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' * 200 + BAD)
    tok = tokenizer("byte")
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 202: not JSON"):
        prepare([tmp_path / "a.jsonl"], tok, tmp_path / "out", processes=processes)
    data = prepare([tmp_path / "a.jsonl"], tok, tmp_path / "out", skip_bad=True, processes=processes)
    assert len(data) == 202
    (counts,) = read_manifest(tmp_path / "out").sources
    assert (counts.documents, counts.skipped) == (202, 5)
    assert [reason.split(", ")[1].split(":")[0] for reason in counts.reasons] == [
        "line 202", "line 204", "line 205", "line 206", "line 207",
    ]  # fmt: skip
    assert "surrogate" in counts.reasons[3]
    assert "UTF-8" in counts.reasons[4]


def test_texts_without_a_document_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match="no text in"):
        prepare([tmp_path / "a.jsonl"], tokenizer("byte"), tmp_path / "out")


def test_every_kind_of_tokenizer_works_in_a_process(tmp_path, small_pieces):
    paths = write_texts(tmp_path)
    for tok in (tokenizer("world"), train_bpe(documents(paths[0]), 400)):
        prepare(paths, tok, tmp_path / f"{tok.name}1")
        prepare(paths, tok, tmp_path / f"{tok.name}2", processes=2)
        assert contents(tmp_path / f"{tok.name}1") == contents(tmp_path / f"{tok.name}2")


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_compressed_texts_equal_plain_ones(tmp_path, small_pieces, kind, suffix):
    plain, tok = write_texts(tmp_path)[0], tokenizer("byte")
    if kind == "txt":
        (tmp_path / "a.txt").write_text("<end>".join(documents(plain)) + "<end>\n", encoding="utf-8")
        plain = tmp_path / "a.txt"
    place = tmp_path / f"x.{kind}{suffix}"
    content = plain.read_bytes()
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2
        place.write_bytes(b"".join(zstandard.compress(part) for part in (content[:half], content[half:])))
    else:
        packed = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix](content)
        place.write_bytes(packed)
    one = prepare([plain], tok, tmp_path / "one", separator="<end>")
    two = prepare([place], tok, tmp_path / "two", separator="<end>")
    assert one.tokens.tolist() == two.tokens.tolist()
    assert len(one) == len(two) == len(list(documents(plain, separator="<end>")))
    place.write_bytes(place.read_bytes()[:-9])
    if suffix:
        with pytest.raises(ConfigError, match="cannot be read"):
            list(documents(place, separator="<end>"))


@pytest.mark.parametrize("separator", ["\n\n", "aa"])
def test_where_a_text_is_cut_does_not_depend_on_where_reading_stopped(tmp_path, monkeypatch, separator):
    """Separators that overlap themselves, pieces of a few bytes."""
    from receptance.data import sources

    rng = random.Random(5)
    (tmp_path / "a.txt").write_text("".join(rng.choices("a\nb", k=500)))
    for size in (3, 7, 64):
        monkeypatch.setattr(sources, "PIECE", size)
        source = sources.open_source(tmp_path / "a.txt", separator=separator)
        pieces = list(source.pieces())
        for i in range(0, len(pieces) - 1, 5):
            assert [piece.content for piece in source.pieces(pieces[i].after)] == [p.content for p in pieces[i + 1 :]]
        assert b"".join(piece.content for piece in pieces) == (tmp_path / "a.txt").read_bytes()


# Tables --------------------------------------------------------------------------------------------------------------


def test_parquet_and_datasets_equal_jsonl(tmp_path, small_pieces):
    parquet, datasets = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("datasets")
    import pyarrow

    plain, tok = write_texts(tmp_path)[0], tokenizer("byte")
    rows = [json.loads(line) for line in plain.read_text(encoding="utf-8").split("\n")[:-1]]
    table = pyarrow.table({"id": [row["id"] for row in rows], "body": [row["text"] for row in rows]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=33)
    split = datasets.Dataset.from_dict({"body": [row["text"] for row in rows]})
    split.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": split, "test": split.select([0])}).save_to_disk(tmp_path / "splits")
    expected = prepare([plain], tok, tmp_path / "plain")
    for i, source in enumerate([tmp_path / "x.parquet", tmp_path / "saved", tmp_path / "splits" / "train"]):
        for processes in (1, 2):
            data = prepare([source], tok, tmp_path / f"out{i}-{processes}", column="body", processes=processes)
            assert data.tokens.tolist() == expected.tokens.tolist()
        with pytest.raises(ConfigError, match=r"has no column 'text'; it has .*body"):
            list(documents(source))
    with pytest.raises(ConfigError, match=r"holds the splits train, test; choose one, as in .*splits/train"):
        list(documents(tmp_path / "splits"))


def test_bad_values_of_a_table_are_named_by_row(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet, row 2: expected a string 'text', found 'None'"):
        list(documents(tmp_path / "x.parquet"))
    (tmp_path / "y.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match=r"y\.parquet: not a readable parquet file"):
        list(documents(tmp_path / "y.parquet"))


def test_a_folder_that_is_no_data_set_is_named(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="cannot be opened as a data set"):
        list(documents(tmp_path))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'receptance\[data\]'"):
        list(documents(tmp_path / "x.parquet"))
