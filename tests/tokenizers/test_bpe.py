import json
import random
import unicodedata

import pytest

from receptance.errors import TokenizerError
from receptance.tokenizers import tokenizer, train_bpe


def library(path):
    """The `tokenizers` library alone, told not to make special tokens from text."""
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(path))
    reference.encode_special_tokens = True
    return reference


def test_pile_ids_equal_the_oracle(pile, shared):
    for case in json.loads((shared / "oracles/misc/tokenizer_20B.json").read_text(encoding="utf-8"))["texts"]:
        assert pile.encode(case["text"]) == case["ids"]


def test_pile_gives_the_ids_of_the_library_and_the_text_in_nfc(pile, pile_file, fuzzed):
    reference = library(pile_file)
    for text, ids in zip(fuzzed, pile.encode_batch(fuzzed)):
        assert ids == reference.encode(text).ids
        decoded = pile.decode(ids)
        assert decoded == reference.decode(ids)
        assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)


def test_pile_decodes_any_ids_as_the_library_does(pile, pile_file):
    reference, rng = library(pile_file), random.Random(0)
    for _ in range(2000):
        ids = rng.choices(range(pile.vocab_size), k=rng.randrange(1, 9))
        assert pile.decode(ids) == reference.decode(ids)
        assert pile.decode(ids, keep_special=True) == reference.decode(ids, skip_special_tokens=False)


def test_pile_facts(pile):
    assert (pile.name, pile.vocab_size, pile.eos_id) == ("pile", 50277, 0)
    assert pile.encode("\n") == [187]
    assert pile.token_bytes(50254) == b" " * 24
    assert pile.decode([12092, 0, 1]) == "Hello"


def test_trained_bpe_gives_every_text_back_and_the_ids_of_the_library(bpe, fuzzed, tmp_path):
    reference = library(bpe.save(tmp_path))
    loaded = tokenizer(tmp_path)
    for text, ids in zip(fuzzed, bpe.encode_batch(fuzzed)):
        assert bpe.decode(ids) == text
        assert 0 not in ids
        assert ids == reference.encode(text).ids == loaded.encode(text) == bpe.encode(text)


def test_trained_bpe_layout(bpe, story):
    assert (bpe.name, bpe.eos_id) == ("bpe", 0)
    assert {bpe.token_bytes(token) for token in range(1, 257)} == {bytes([byte]) for byte in range(256)}
    assert len({bpe.token_bytes(token) for token in range(bpe.vocab_size)}) == bpe.vocab_size
    assert bpe.token_bytes(0) == b""
    assert bpe.decode([0], keep_special=True) == "<|endoftext|>"
    assert len(bpe.encode(story)) < len(story.encode()) / 2


def test_special_token_in_text_is_text(pile, bpe):
    for each in (pile, bpe):
        ids = each.encode("a<|endoftext|>b<|padding|>")
        assert not {0} & set(ids)
        assert each.decode(ids) == "a<|endoftext|>b<|padding|>"


def test_training_is_deterministic(story, tmp_path):
    texts = [story[i:] for i in range(len(story))]
    first, second = train_bpe(texts, 350), train_bpe(iter(texts), 350)
    assert first.vocab_size == 350
    assert first.save(tmp_path / "a").read_bytes() == second.save(tmp_path / "b").read_bytes()


def test_bytes_are_encoded_when_they_are_text(bpe):
    assert bpe.encode("naïve".encode()) == bpe.encode("naïve")
    with pytest.raises(TokenizerError, match=r"not UTF-8 at byte 1 \(b'\\xff'\)"):
        bpe.encode(b"a\xff")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        bpe.encode("\udc80")


def test_too_small_vocabulary_is_refused():
    with pytest.raises(TokenizerError, match="vocab_size is 100, expected at least 257"):
        train_bpe(["a"], 100)


def word_level(**vocabulary: int) -> str:
    end = {"id": 1, "content": "<|endoftext|>", "special": True}
    added = (
        [end | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)] if len(vocabulary) > 1 else []
    )
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": next(iter(vocabulary))}
    return json.dumps({"version": "1.0", "added_tokens": added, "model": model})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "not a tokenizer.json"),
        ("{}", "not a tokenizer.json"),
        (word_level(a=0), "no <|endoftext|> token"),
        (word_level(日=0, **{"<|endoftext|>": 1}), "token 0 is '日'"),
    ],
)
def test_foreign_json_is_refused(tmp_path, content, problem):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: ") as caught:
        tokenizer(path)
    assert problem in str(caught.value)
