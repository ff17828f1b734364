"""`tokenizer(name_or_path)` finds the right file or says what is missing."""

import subprocess
import sys

import pytest

from receptance import tokenizers as room
from receptance.errors import TokenizerError
from receptance.tokenizers import tokenizer


def test_unknown_name_is_explained():
    with pytest.raises(TokenizerError, match="no tokenizer 'wrold': expected world, pile, byte, or an existing file"):
        tokenizer("wrold")


def test_empty_folder_is_explained(tmp_path):
    with pytest.raises(TokenizerError, match=r"holds no tokenizer; expected one of rwkv_vocab\*\.txt, vocab\.txt"):
        tokenizer(tmp_path)


def test_two_vocabularies_are_not_guessed_between(tmp_path):
    for name in ("rwkv_vocab_a.txt", "rwkv_vocab_b.txt"):
        (tmp_path / name).touch()
    with pytest.raises(TokenizerError, match=r"several vocabularies \(rwkv_vocab_a.txt, rwkv_vocab_b.txt\)"):
        tokenizer(tmp_path)


def test_other_file_is_explained(tmp_path):
    (tmp_path / "model.pth").touch()
    with pytest.raises(TokenizerError, match=r"model\.pth: expected a \.txt"):
        tokenizer(tmp_path / "model.pth")


def test_missing_pile_says_where_to_get_it(monkeypatch):
    monkeypatch.setattr(room, "PILE_FILE", "no such file")
    with pytest.raises(TokenizerError, match=r"huggingface\.co/EleutherAI/gpt-neox-20b and give its path"):
        tokenizer("pile")


def test_pile_in_a_folder_is_found(pile_file):
    assert tokenizer(pile_file.parent).name == "pile"


def test_import_loads_no_tokenizer_library_and_no_torch():
    code = (
        "import sys, receptance.tokenizers as room; room.tokenizer('world'); "
        "print({'tokenizers', 'torch', 'pyrwkv_tokenizer'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
