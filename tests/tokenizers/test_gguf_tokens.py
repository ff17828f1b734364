import contextlib
import random
import struct
from pathlib import Path

import pytest

from receptance.errors import TokenizerError
from receptance.tokenizers import ByteTokenizer, tokenizer
from receptance.tokenizers.gguf import gguf_fields


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def field(key: str, kind: int, value: bytes) -> bytes:
    return string(key.encode()) + struct.pack("<I", kind) + value


def strings(items: list[bytes]) -> bytes:
    return struct.pack("<IQ", 8, len(items)) + b"".join(map(string, items))


def gguf(tokens: list[bytes], model: bytes = b"rwkv") -> bytes:
    """A file as llama.cpp writes it, with fields of several kinds around the tokenizer."""
    fields = [
        field("general.architecture", 8, string(b"rwkv7")),
        field("rwkv7.block_count", 4, struct.pack("<I", 12)),
        field("rwkv7.eps", 6, struct.pack("<f", 1e-5)),
        field("some.nested", 9, struct.pack("<IQ", 9, 2) + strings([b"x", b""]) + struct.pack("<IQ", 5, 1) + b"\0" * 4),
        field("tokenizer.ggml.model", 8, string(model)),
        field("tokenizer.ggml.tokens", 9, strings(tokens)),
        field("tokenizer.ggml.token_type", 9, struct.pack("<IQ", 5, len(tokens)) + b"\0" * 4 * len(tokens)),
        field("tokenizer.ggml.add_bos_token", 7, b"\0"),
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields) + b"\0" * 64


def escaped(pieces: list[bytes], size: int) -> list[bytes]:
    texts = [b"<s>", *(repr(piece)[2:-1].encode() for piece in pieces)]
    return texts + [b"[PAD%d]" % token for token in range(len(texts), size)]


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


BYTES = [bytes([byte]) for byte in range(256)]


def test_official_vocabulary_comes_back(world, tmp_path):
    texts = escaped([world.token_bytes(token) for token in range(1, 65530)], 65536)
    loaded = tokenizer(write(tmp_path, gguf(texts)))
    assert (loaded.name, loaded.vocab_size, loaded._table) == ("world", 65536, world._table)
    assert loaded.save(tmp_path).read_bytes() == world.save(tmp_path / "other").read_bytes()


def test_padding_counts_and_quotes_are_unescaped(tmp_path):
    loaded = tokenizer(write(tmp_path, gguf(escaped([*BYTES, b"'\"", b"'s", b"\\x41", b"[PAD7]"], 270))))
    assert loaded.vocab_size == 270
    assert [loaded.token_bytes(token) for token in range(257, 262)] == [b"'\"", b"'s", b"\\x41", b"[PAD7]", b""]


def test_byte_vocabulary_is_the_byte_tokenizer(tmp_path):
    assert isinstance(tokenizer(write(tmp_path, gguf(escaped(BYTES, 257)))), ByteTokenizer)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04" + b"\0" * 20, "expected b'GGUF'"),
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1"),
        (b"GGUF" + struct.pack(">I", 3), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "asks for 8 bytes at byte 24 of 24"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**64 - 1), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field("a", 77, b""), "unknown value type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field("a", 9, struct.pack("<IQ", 0, 2**60)), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field("a", 9, struct.pack("<IQ", 9, 1) * 9), "nested deeper"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no such field"),
        (gguf([b"<s>"], model=b"gpt2"), "is 'gpt2', expected 'rwkv'"),
        (gguf(escaped(BYTES[:-1], 300)), "lacks 1 of the 256"),
        (gguf([*escaped(BYTES, 257), b"a"]), "tokens 98 and 257 are both b'a'"),
        (gguf([*escaped(BYTES, 257), b"\\q"]), r"token 257 is b'\\q'"),
        (gguf([*escaped(BYTES, 257), b"\\x4"]), "token 257"),
        (gguf([*escaped(BYTES, 257), b"\\"]), "token 257"),
        (gguf([*escaped(BYTES, 257), b""]), "token 257"),
    ],
)
def test_damaged_file_is_named(tmp_path, content, problem):
    with pytest.raises(TokenizerError, match=r"model\.gguf: ") as caught:
        tokenizer(write(tmp_path, content))
    assert problem in str(caught.value)


def test_cut_or_corrupted_files_never_crash(tmp_path):
    content = gguf(escaped([*BYTES, b"ab"], 300))
    rng = random.Random(0)
    cases = [content[: rng.randrange(len(content))] for _ in range(150)]
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        cases.append(bytes(damaged))
    for case in cases:
        with contextlib.suppress(TokenizerError):
            tokenizer(write(tmp_path, case))


# Writing -------------------------------------------------------------------------------------------------------------


def written(tok, vocab_size, path):
    from receptance.gguf.writer import write_gguf

    fields, lost = gguf_fields(tok, vocab_size)
    with path.open("wb") as file:
        write_gguf(file, fields, [], [])
    return fields, lost


def test_every_tokenizer_comes_back(world, tmp_path):
    text = "It's 12345 o'clock.\n\n\tété 小さな  x"
    for tok, vocab_size in ((world, 65536), (ByteTokenizer(), 257), (tokenizer("rwkv7-stories"), 5120)):
        fields, lost = written(tok, vocab_size, tmp_path / "m.gguf")
        back = tokenizer(tmp_path / "m.gguf")
        assert type(back) is type(tok)
        assert (back.vocab_size, back.encode(text)) == (tok.vocab_size, tok.encode(text))
        assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == vocab_size
        assert bool(lost) == (tok.name == "bpe")
    assert fields["tokenizer.ggml.merges"][0] == "Ġ t".encode()


def test_padding_beyond_the_vocabulary_is_marked(tmp_path):
    fields, _ = written(ByteTokenizer(), 300, tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.tokens"][299] == b"[PAD299]"
    assert fields["tokenizer.ggml.token_type"][256:258] == [1, 5]
    with pytest.raises(TokenizerError, match="257 ids, the model 200"):
        gguf_fields(ByteTokenizer(), 200)


def test_a_bpe_that_llama_cpp_cannot_express_is_kept_whole(tmp_path):
    import json

    inner = json.loads(tokenizer("rwkv7-stories").json_text())
    inner["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\s+|[^\s\p{L}]+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner))
    tok = tokenizer(tmp_path)
    fields, lost = written(tok, 5120, tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.model"] == "none"
    assert "token ids only" in lost
    assert tokenizer(tmp_path / "m.gguf").encode("one, two") == tok.encode("one, two")
    inner["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner))
    fields, lost = gguf_fields(tokenizer(tmp_path), 5120)
    assert (fields["tokenizer.ggml.pre"], lost) == ("gpt-2", "")
