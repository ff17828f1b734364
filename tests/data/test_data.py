"""Text in, token files out, and the order in which a run reads them."""

import json
import lzma

import numpy as np
import pytest

from receptance.data import BinIdx, BinIdxWriter, CubicWindows, documents, prepare
from receptance.data.order import magic_prime
from receptance.errors import ConfigError
from receptance.tokenizers import tokenizer

MINI_EPOCH = 40320  # samples in one of the community trainer's mini-epochs


def test_the_community_file_and_order_match_the_reference(shared):
    reference = json.loads((shared / "oracles" / "misc" / "data_sampling.json").read_text())
    data = BinIdx(shared / "oracles" / "misc" / "sample")
    ctx = reference["ctx_len"]
    assert len(data.tokens) == reference["n_tokens"]
    assert len(data) == reference["n_docs"]
    assert data[0].tolist() == reference["first_doc"]
    order = CubicWindows(len(data.tokens), ctx)
    assert order.prime == reference["magic_prime"]
    assert len(reference["samples"]) > 10
    for sample in reference["samples"]:
        number = sample["epoch"] * MINI_EPOCH + sample["idx"] * sample["world_size"] + sample["rank"]
        (start,) = order.starts([number])
        assert data.tokens[start : start + ctx].tolist() == sample["x"]
        assert data.tokens[start + ctx] == sample["y_last"]


def test_known_magic_primes(shared):
    known = json.loads((shared / "oracles" / "misc" / "data_sampling.json").read_text())["known_magic_primes"]
    minipile, pile = 1_498_226_207, 332_115_325_534
    assert magic_prime(minipile, 512) == 2926181
    assert magic_prime(minipile, 4096) == 365759
    assert magic_prime(pile, 4096) == 81082817
    assert {2926181, 365759, 81082817} <= set(np.ravel([list(np.ravel(v)) for v in _leaves(known)]).astype(int))


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree] if isinstance(tree, int) else []


def test_prepare_writes_each_document_with_its_end(tmp_path):
    rows = [{"text": "one two"}, {"text": "três\n\nquatro"}]
    with lzma.open(tmp_path / "a.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "b.txt").write_text("five", encoding="utf-8")
    tok = tokenizer("byte")
    data = prepare([tmp_path / "a.jsonl.xz", tmp_path / "b.txt"], tok, tmp_path / "out", repeat=[1, 2])
    texts = [tok.decode(data[i][:-1].tolist()) for i in range(len(data))]
    assert texts == ["one two", "três\n\nquatro", "five", "five"]
    twice = prepare([tmp_path / "a.jsonl.xz"], tok, tmp_path / "twice", repeat=[2])
    assert [twice[i][0] for i in range(4)] == [data[i % 2][0] for i in range(4)], "a file repeats as a whole"
    with pytest.raises(ConfigError, match="at least 1"):
        prepare([tmp_path / "b.txt"], tok, tmp_path / "none", repeat=[0])
    assert all(data[i][-1] == tok.eos_id for i in range(len(data)))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.csv", "x", "expected .txt or .jsonl"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "line 2"),
        ("a.jsonl", '{"text": "a"}\nnot json\n', "line 2: not JSON"),
        ("a.txt.xz", "not compressed", "cannot be read"),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        list(documents(tmp_path / name))


def test_a_damaged_index_is_refused(tmp_path):
    writer = BinIdxWriter(tmp_path / "x", 300)
    writer.add([1, 2, 3, 0])
    writer.close()
    good = (tmp_path / "x.idx").read_bytes()
    assert BinIdx(tmp_path / "x")[0].tolist() == [1, 2, 3, 0]
    bad = [good[:-1], b"X" + good[1:], good[:34] + b"\xff\xff\xff\x7f" + good[38:], b""]
    bad += [good[:34] + bytes(4) + good[38:], good[:34] + b"\1\0\0\0\1" + good[39:]]  # no tokens; at half a token
    for content in bad:
        (tmp_path / "x.idx").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.idx"):
            BinIdx(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(good)
    with open(tmp_path / "x.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ConfigError, match="not whole tokens of 2 bytes"):
        BinIdx(tmp_path / "x")
