import ast
import json
import lzma
import random
import time
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receptance.errors import TokenizerError
from receptance.tokenizers import WorldTokenizer, tokenizer
from receptance.tokenizers import world as module
from receptance.tokenizers.world import parse_literal, read_vocabulary

SINGLE_BYTES = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)]


def vocabulary_path() -> Path:
    return Path(str(distribution("pyrwkv-tokenizer").locate_file(f"pyrwkv_tokenizer/{module.VOCABULARY_FILE}")))


@pytest.fixture(scope="session")
def reference():
    """The pip package's trie, the definition of the World tokenizer."""
    package = pytest.importorskip("rwkv.rwkv_tokenizer")
    return package.TRIE_TOKENIZER(str(Path(package.__file__).with_name(module.VOCABULARY_FILE)))


def write(folder: Path, lines: list[str]) -> Path:
    path = folder / "vocabulary.txt"
    path.write_bytes("\n".join([*lines, ""]).encode("utf-8"))
    return path


def test_ids_equal_the_oracle(world, shared):
    oracle = json.loads((shared / "oracles/misc/tokenizer_world.json").read_text(encoding="utf-8"))
    for case in oracle["texts"]:
        assert world.encode(case["text"]) == case["ids"]
        assert world.decode(case["ids"]) == case["text"]
    for case in oracle["raw_bytes"]:
        assert world.encode(bytes.fromhex(case["hex"])) == case["ids"]


def test_fuzzed_text_gives_the_ids_of_both_reference_packages(world, reference, fuzzed):
    compiled = pytest.importorskip("pyrwkv_tokenizer").RWKVTokenizer()
    for text in fuzzed:
        ids = world.encode(text)
        assert ids == reference.encode(text) == list(compiled.encode(text))
        assert world.decode(ids) == text


def test_any_bytes_give_the_ids_of_the_reference_trie(world, reference):
    rng = random.Random(1)
    for _ in range(10_000):
        # random bytes, and tokens glued together or cut short: the hardest cases for a longest match
        data = b"".join(
            rng.randbytes(rng.randrange(4)) + world.token_bytes(rng.randrange(1, 65530))[: rng.randrange(1, 130)]
            for _ in range(rng.randrange(8))
        )
        ids = world.encode(data)
        assert ids == reference.encodeBytes(data)
        assert world.decode_bytes(ids) == data


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_come_back(data):
    ids = SMALL.encode(data)
    assert SMALL.decode_bytes(ids) == data
    assert ids == SMALL._chunks.longest_match(data)


SMALL = WorldTokenizer(
    {i + 1: piece for i, piece in enumerate([bytes([b]) for b in range(256)] + [b"aa", b"aaaa", b"\0\0\0", b"ab\xff"])}
)


@pytest.mark.parametrize("block", [1, 2, 7])
def test_blocks_and_a_full_cache_change_nothing(world, monkeypatch, fuzzed, block):
    text = " ".join(fuzzed[:40]) + "a" * 300 + "我们发现" * 50
    expected = world.encode(text)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "CACHED_CHUNKS", 5)
    assert tokenizer("world").encode(text) == expected


def test_no_token_crosses_a_chunk_boundary(world):
    for token in range(1, 65530):
        piece = world.token_bytes(token)
        assert not any(world._is_boundary[a << 8 | b] for a, b in pairwise(piece))


def test_vocabulary_size_counts_the_padding_rows(world):
    assert world.vocab_size == 65536
    assert world.eos_id == 0
    assert world.decode([0, 65535]) == ""
    assert world.decode([33155, 0], keep_special=True) == "Hello<|endoftext|>"
    assert world.encode("") == []


@pytest.mark.parametrize("token", [-1, 65536])
def test_unknown_id_is_named(world, token):
    with pytest.raises(TokenizerError, match=f"token id {token} .* 0 to 65535"):
        world.decode([11, token])


def test_lone_surrogate_is_named(world):
    with pytest.raises(TokenizerError, match=r"lone surrogate \('\\ud83d'\) at character 2"):
        world.encode("ab\ud83d")


def test_loads_quickly():
    tokenizer("world")
    start = time.process_time()
    tokenizer("world")
    assert time.process_time() - start < 2.0  # 0.2 s on an idle core; room for a busy machine


def test_saved_file_is_the_official_one_byte_for_byte(world, tmp_path):
    path = world.save(tmp_path / "new")
    assert path.read_bytes() == vocabulary_path().read_bytes()
    assert tokenizer(tmp_path / "new").encode("Hello, world!") == [33155, 45, 40213, 34]


def test_windows_line_ends_are_read(tmp_path, world):
    text = vocabulary_path().read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "vocab.txt").write_bytes(text)
    assert tokenizer(tmp_path)._table == world._table


def test_fast_literals_equal_python_literals():
    for line in vocabulary_path().read_text(encoding="utf-8").split("\n")[:-1]:
        literal = line[line.index(" ") + 1 : line.rindex(" ")]
        value = ast.literal_eval(literal)
        assert parse_literal(literal) == (value.encode() if isinstance(value, str) else value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "found ''"),
        ("300", "found '300'"),
        ("x 'a' 1", "found \"x 'a' 1\""),
        ("-3 'aa' 2", "found"),
        ("0 'aa' 2", "id 0 is outside 1 to 65535"),
        ("65536 'aa' 2", "id 65536 is outside"),
        ("300 'aa' 3", "has 2 bytes, the line says 3"),
        ("300 '' 0", "has 0 bytes"),
        ("300 'é' 1", "has 2 bytes"),
        ("300 aa 2", "not a Python string literal"),
        ("300 __import__('os').getcwd() 2", "not a Python string literal"),
        ("300 'a'*9 9", "not a Python string literal"),
        ("300 'a 2", "not a Python string literal"),
        ("300 ' 1", "not a Python string literal"),
        ("300 12 2", "not a Python string literal"),
        (r"300 '\ud800' 3", "."),
        ("98 'aa' 2", "id 98 was already used in line 98"),
        ("300 'a' 1", "already stands in line 98"),
        ("300 " + "(" * 5000 + " 2", "found"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, problem):
    with pytest.raises(TokenizerError, match=r"vocabulary\.txt: line 257: .*expected '<id>") as caught:
        read_vocabulary(write(tmp_path, [*SINGLE_BYTES, line, "258 'bb' 2"]))
    assert problem in str(caught.value)


def test_missing_byte_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"vocabulary\.txt: .* lacks 2 of the 256 .*b'a' first"):
        tokenizer(write(tmp_path, SINGLE_BYTES[:97] + SINGLE_BYTES[99:]))


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"1 '\xff' 1\n")
    with pytest.raises(TokenizerError, match="not UTF-8 at byte 3"):
        tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(TokenizerError, match="lacks 256"):
        tokenizer(path)


@pytest.mark.slow
def test_english_is_encoded_at_five_megabytes_per_second(shared):
    with lzma.open(shared / "data/stories/children_stories_train.jsonl.xz", "rt", encoding="utf-8") as file:
        text = "\n".join(json.loads(line)["text"] for line in file)
    size = len(text.encode())
    assert size > 5_000_000
    seconds = []
    for _ in range(3):
        fresh = tokenizer("world")
        start = time.perf_counter()
        fresh.encode(text)
        seconds.append(time.perf_counter() - start)
    assert size / min(seconds) > 5_000_000
