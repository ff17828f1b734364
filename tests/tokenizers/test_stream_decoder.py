import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receptance.errors import TokenizerError
from receptance.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()
VALID = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�"), max_size=20)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [stream.push(token) for token in ids], stream.finish()


@settings(max_examples=300, deadline=None)
@given(VALID)
def test_valid_text_is_never_broken(text):
    pieces, rest = streamed(BYTE, BYTE.encode(text))  # every character is split as far as it can be
    assert "".join(pieces) == text
    assert rest == ""
    assert "�" not in "".join(pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=30))
def test_stream_of_any_ids_equals_decode(ids):
    pieces, rest = streamed(BYTE, ids)
    assert "".join(pieces) + rest == BYTE.decode(ids)


@pytest.mark.parametrize("name", ["world", "pile", "bpe"])
def test_stream_equals_decode_for_every_tokenizer(name, request, fuzzed):
    tokenizer, rng = request.getfixturevalue(name), random.Random(0)
    for text in fuzzed[:1000]:
        ids = tokenizer.encode(text)
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert rest == ""
        ids = rng.choices(range(tokenizer.vocab_size), k=8)
        pieces, rest = streamed(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(20))
def test_any_split_into_world_tokens_streams_whole_characters(world, seed):
    text, rng = "Fuchs 🦊 und 狐狸, naïve 한국어 👩‍👩‍👧 ", random.Random(seed)
    data, ids, ids_of = text.encode(), [], world._chunks.ids
    while data:
        fits = [n for n in range(1, len(data) + 1) if data[:n] in ids_of]
        size = rng.choice(fits)
        ids.append(ids_of[data[:size]])
        data = data[size:]
    pieces, rest = streamed(world, ids)
    assert "".join(pieces) == text
    assert rest == ""
    assert all("�" not in piece for piece in pieces)


def test_unfinished_character_shows_at_the_end():
    stream = BYTE.stream()
    assert [stream.push(0xF0 + 1), stream.push(0x9F + 1), stream.finish()] == ["", "", "�"]
    assert stream.push(ord("a") + 1) == "a"


def test_unknown_id_is_named():
    with pytest.raises(TokenizerError, match="token id 999"):
        BYTE.stream().push(999)
