"""Text from the CPU engine: the same as from torch, resumable, batched; and the command line without torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from native_helpers import needs_core

import receptance as rc
from receptance.generation import generate_batch, generate_tokens, prefill
from receptance.native import NativeModel
from receptance.tokenizers import Tokenizer

PROMPT = "Once upon a time, there was a little"


@pytest.fixture(scope="module")
def model() -> NativeModel:
    return rc.load("rwkv7-stories", engine="native", dtype="float32", threads=2)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return rc.tokenizer("rwkv7-stories")


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.8}, {"presence_penalty": 0.5, "top_k": 40}])
def test_the_same_seed_gives_the_text_of_torch(model, tok, options):
    """Both engines round differently, by about 1e-6 of a logit: a draw on such an edge is rare."""
    theirs = rc.load("rwkv7-stories", engine="torch", dtype="float32")
    texts = ["".join(rc.generate(m, tok, PROMPT, max_tokens=60, seed=5, **options)) for m in (model, theirs)]
    assert texts[0] == texts[1]


def test_a_text_goes_on_from_its_state(model, tok):
    whole = generate_tokens(model, tok, PROMPT, max_tokens=30, temperature=0)
    text = "".join(token.text for token in whole)
    first = generate_tokens(model, tok, PROMPT, max_tokens=10, temperature=0)
    head = "".join(token.text for token in first)
    rest = text.removeprefix(head)
    go_on = tok.encode(rest)[0]
    logits, _ = model.forward([go_on], first.state)
    again = generate_tokens(model, tok, PROMPT + head + tok.decode([go_on]), max_tokens=1, temperature=0)
    next(again)
    assert int(logits[0].argmax()) == again.ids[0]


def test_a_long_prompt_is_read_in_pieces_between_which_ctrl_c_is_heard(model, tok, monkeypatch):
    prompts = [[5 + i % 90 for i in range(n)] for n in (25, 7, 10)]
    expected = [model.forward(prompt, last_only=True) for prompt in prompts]
    true, lengths = model.forward, []

    def forward(tokens, state, **options):
        lengths.append(options["lengths"].tolist())
        return true(tokens, state, **options)

    monkeypatch.setattr(model, "forward", forward)
    logits, state = prefill(model, prompts, chunk=10)
    assert lengths == [[10, 7, 10], [10, 0, 0], [5, 0, 0]]
    for row, (alone, after) in enumerate(expected):
        assert np.array_equal(logits[row], alone)
        assert all(np.array_equal(state.select(row)[name], x) for name, x in after.items())


def test_rows_of_a_batch_write_what_they_write_alone(model, tok):
    prompts = ["The fox", "A long time ago, the bear", "She"]
    params = rc.SamplingParams(max_tokens=20, temperature=0, logprobs=2)
    for row, prompt in zip(generate_batch(model, tok, prompts, params), prompts):
        alone = generate_tokens(model, tok, prompt, params=params)
        assert row.ids == [token.id for token in alone]
        assert [t.logprob for t in row.tokens] == [t.logprob for t in alone.tokens]


def without_torch(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line where torch cannot be imported."""
    code = (
        "import sys, importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
        "sys.modules['torch'] = None\n"
        "from receptance.cli import main\n"
        "sys.argv = ['receptance', *sys.argv[1:]]\n"
        "main()\n"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder)


def test_run_needs_no_torch(tmp_path):
    done = without_torch("run", PROMPT, "-n", "12", "--seed", "1", "--save-state", "a.state", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.split()) > 3
    more = without_torch("run", " The", "-n", "5", "--state", "a.state", "--json", "--logprobs", "1", folder=tmp_path)
    assert more.returncode == 0, more.stderr
    refused = without_torch("run", PROMPT, "-n", "1", "--engine", "torch", folder=tmp_path)
    assert refused.returncode == 1
    assert "pip install 'receptance[torch]'" in refused.stderr


@needs_core
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_run_quantises_on_demand(dtype, tmp_path):
    done = without_torch("run", PROMPT, "-n", "12", "--dtype", dtype, "-t", "0", "--threads", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3
