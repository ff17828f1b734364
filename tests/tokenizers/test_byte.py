import pytest

from receptance.errors import TokenizerError
from receptance.tokenizers import ByteTokenizer, tokenizer


def test_ids_are_bytes_plus_one_as_in_world(world):
    byte = tokenizer("byte")
    every = bytes(range(256))
    assert byte.encode(every) == list(range(1, 257)) == [world.encode(every[i : i + 1])[0] for i in range(256)]
    assert (byte.name, byte.vocab_size, byte.eos_id) == ("byte", 257, 0)
    assert byte.encode("é") == [0xC3 + 1, 0xA9 + 1]
    assert byte.decode([0]) == ""


def test_text_comes_back(fuzzed):
    byte = ByteTokenizer()
    for text in fuzzed:
        assert byte.decode(byte.encode(text)) == text


def test_invalid_utf8_is_replaced_and_bytes_are_kept():
    byte = ByteTokenizer()
    ids = byte.encode(b"a\xe4\xb8b")
    assert byte.decode(ids) == "a�b"
    assert byte.decode_bytes(ids) == b"a\xe4\xb8b"


def test_unknown_id_is_named():
    with pytest.raises(TokenizerError, match="token id 257 is not in the byte vocabulary, whose ids are 0 to 256"):
        ByteTokenizer().decode([257])


def test_save_and_load(tmp_path):
    ByteTokenizer().save(tmp_path)
    assert isinstance(tokenizer(tmp_path), ByteTokenizer)
