"""Losses and tasks, judged by plain forward passes and by hand."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import receptance as rc
from receptance.baselines import Transformer, TransformerConfig, save_baseline
from receptance.cli import build
from receptance.errors import ConfigError
from receptance.evaluation import tasks
from receptance.evaluation.perplexity import text_loss, windows
from receptance.evaluation.score import PlainScorer, encode_pair, open_scorer
from receptance.models import RWKV7
from receptance.tokenizers import tokenizer

TOK = tokenizer("byte")
CLOSE = 1e-5  # of float32 sums in another order


@pytest.fixture(scope="module")
def model():
    model = RWKV7(RWKV7.Config.make(TOK.vocab_size, 2, 32, 16))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return model.eval()


@pytest.fixture(scope="module")
def engine(model):
    with rc.Engine(model, TOK, speculate=None) as engine:
        yield engine


@torch.no_grad()
def nats(model, ids, start=1):
    """Of ids[start:], token by token."""
    logits, _ = model(torch.tensor(ids[:-1]))
    chosen = logits.double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return -float(chosen[start - 1 :].sum())


def test_a_plain_pass_scores_as_the_engine_does(model, engine):
    pairs = [("the cat", " sat"), ("", "x"), ([5, 6, 7], [8]), ("the cat", " ran away"), ("a" * 100, "b" * 30)]
    for a, b in zip(engine.score(pairs), PlainScorer(model, TOK).score(pairs)):
        assert a.ids == b.ids
        assert a.logprobs == pytest.approx(b.logprobs, rel=CLOSE)
        assert a.greedy == b.greedy


def test_a_text_has_the_loss_of_one_pass_over_each_document(model, engine):
    documents = ["One day a cat.", "Grüße!", "x" * 700]
    found = text_loss(engine, TOK, documents)
    expected = sum(nats(model, [TOK.eos_id, *TOK.encode(d), TOK.eos_id]) for d in documents)
    assert found.nats == pytest.approx(expected, rel=CLOSE)
    n_bytes = sum(len(d.encode()) for d in documents)
    assert (found.n_bytes, found.tokens, found.words) == (n_bytes, n_bytes + 3, 6)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / n_bytes, rel=CLOSE)
    assert found.perplexity == pytest.approx(math.exp(expected / (n_bytes + 3)), rel=CLOSE)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (8, 1), (100, 50), (1, 1)])
def test_windows_score_each_token_once_and_see_no_further(window, stride):
    ids = list(range(30))
    pairs = windows(ids, window, stride)
    assert [i for _, part in pairs for i in part] == ids
    for context, part in pairs:
        assert len(context) + len(part) <= window
        assert part == ids[part[0] : part[-1] + 1]
        assert context == ids[max(0, part[-1] + 1 - window) : part[0]]


def test_a_window_costs_context(model, engine):
    text = "abcdefgh" * 4
    whole = text_loss(engine, TOK, [text], with_end=False)
    cut = text_loss(engine, TOK, [text], window=8, stride=4, with_end=False)
    expected = nats(model, [TOK.eos_id, *TOK.encode(text[:8])])
    for start in range(8, 32, 4):
        expected += nats(model, TOK.encode(text[start - 4 : start + 4]), 4)
    assert cut.nats == pytest.approx(expected, rel=CLOSE)
    assert cut.nats != pytest.approx(whole.nats, rel=1e-3)


def test_bad_windows_and_empty_texts_are_refused(engine):
    with pytest.raises(ConfigError, match="stride"):
        text_loss(engine, TOK, ["x"], window=4, stride=5)
    with pytest.raises(ConfigError, match="no text"):
        text_loss(engine, TOK, [])


@pytest.mark.parametrize("name", ["byte", "world"])
def test_a_pair_is_the_text_itself(name):
    tok = tokenizer(name)
    for context, text in [
        ("The cat", " sat"),
        ("The cat ", "sat"),
        ("The c", "at sat"),
        ("", "x"),
        ("a\n\n", "b"),
        ("ab", ""),
    ]:
        if not text:
            continue
        before, after = encode_pair(tok, context, text)
        assert tok.decode(before + after) == context + text
        assert after
        assert len(tok.decode(before)) <= len(context.rstrip())


def test_lambada_counts_last_words(model, engine):
    rows = [{"text": "the cat saw the dog"}, {"text": "one two three"}]
    found = tasks.lambada(engine, TOK, rows)
    parts = [nats(model, [*TOK.encode("the cat saw the dog")], 15), nats(model, TOK.encode("one two three"), 7)]
    assert found.perplexity == pytest.approx(math.exp(sum(parts) / 2), rel=CLOSE)
    best = rc.generate(model, TOK, "the cat saw the dog", max_tokens=4, temperature=0)
    word = "".join(best).replace(" ", "") or "x"
    assert tasks.lambada(engine, TOK, [{"text": "the cat saw the " + word}]).n == 1
    with pytest.raises(ConfigError, match="row 1"):
        tasks.lambada(engine, TOK, [{"txt": "a b"}])


def test_lambada_is_right_when_greedy_decoding_writes_the_word():
    class Certain:
        def score(self, pairs):
            from receptance.engine.request import Scored

            return [Scored(list(text), [math.log(0.5)] * len(text), len(text) == 4) for _, text in pairs]

    found = tasks.lambada(Certain(), TOK, [{"text": "the cat saw the dog"}, {"text": "a horse"}])
    assert found.accuracy == 0.5
    assert found.perplexity == pytest.approx(math.sqrt(2**4 * 2**6))


FORMS = [
    ({"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "verbs"}, ("", "He is."), ("", "He are."), 0),
    ({"goal": "Boil it", "sol1": "heat", "sol2": "cool", "label": 1}, ("Question: Boil it\nAnswer:", " heat"),
     ("Question: Boil it\nAnswer:", " cool"), 1),
    ({"sentence": "The _ is red.", "option1": "car", "option2": "sky", "answer": "1"}, ("The car", " is red."),
     ("The sky", " is red."), 0),
    ({"question": {"stem": "2+2?", "choices": [{"text": "3", "label": "A"}, {"text": "4", "label": "B"}]},
      "answerKey": "B"}, ("Question: 2+2?\nAnswer:", " 3"), ("Question: 2+2?\nAnswer:", " 4"), 1),
    ({"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"},
     ("Question: 2+2?\nAnswer:", " 3"), ("Question: 2+2?\nAnswer:", " 4"), 1),
    ({"ctx": "He runs", "endings": ["fast", "blue"], "label": "0"}, ("He runs", " fast"), ("He runs", " blue"), 0),
    ({"query": "q", "choices": ["x", "y"], "gold": "y"}, ("Question: q\nAnswer:", " x"),
     ("Question: q\nAnswer:", " y"), 1),
]  # fmt: skip


@pytest.mark.parametrize(("row", "first", "second", "gold"), FORMS, ids=lambda x: str(x)[:20])
def test_the_common_forms_of_multiple_choice_are_read(row, first, second, gold):
    choice = tasks.choice_of(row)
    assert list(zip(choice.contexts, choice.continuations)) == [first, second]
    assert choice.gold == gold


@pytest.mark.parametrize("row", [{"text": "x"}, {"question": "q", "choices": ["a"], "answer": 0},
                                 {"question": "q", "choices": ["a", "b"], "answer": 2},
                                 {"question": "q", "choices": ["a", "b"], "answer": "c d"}])  # fmt: skip
def test_other_rows_are_refused(row):
    with pytest.raises(ConfigError):
        tasks.choice_of(row)


def test_multiple_choice_takes_the_likelier_answer(model, engine):
    rows = [row for row, *_ in FORMS]
    found = tasks.multiple_choice(engine, TOK, [tasks.choice_of(row) for row in rows])
    right = 0
    for _, first, second, gold in FORMS:
        losses = [nats(model, [*(TOK.encode(c) or [TOK.eos_id]), *TOK.encode(a)], len(TOK.encode(c)) or 1)
                  for c, a in (first, second)]  # fmt: skip
        right += losses.index(min(losses)) == gold
    assert found.accuracy == right / len(rows)
    assert "verbs" in found.groups


def test_mmlu_is_asked_in_its_own_form():
    row = {"question": "What is 2+2?", "choices": ["3", "4"], "answer": 1, "subject": "small_sums"}
    (choice,) = tasks.mmlu([row], [row | {"question": "What is 1+3?"}, row | {"subject": "other"}])
    assert choice.contexts[0] == (
        "The following are multiple choice questions (with answers) about small sums.\n\n"
        "What is 1+3?\nA. 3\nB. 4\nAnswer: B\n\nWhat is 2+2?\nA. 3\nB. 4\nAnswer:"
    )
    assert (choice.continuations, choice.gold, choice.group) == ((" A", " B"), 1, "small_sums")


def test_the_order_of_a_prompt_is_all_that_differs():
    row = {"instruction": "Where is Bo?", "input": "Bo is in the hall.", "choices": ["hall", "yard"], "answer": "hall"}
    found = tasks.prompt_orders([row])
    assert found["before"][0].contexts[0] == "Where is Bo?\nBo is in the hall.\nAnswer:"
    assert found["after"][0].contexts[0] == "Bo is in the hall.\nWhere is Bo?\nAnswer:"
    assert found["before"][0].continuations == found["after"][0].continuations == (" hall", " yard")


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b"}\n[1]\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2"):
        list(tasks.read_rows(path))
    with pytest.raises(ConfigError, match="no such file"):
        list(tasks.read_rows(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("kind", ["rwkv", "transformer"])
def test_the_command_line_measures_files(model, tmp_path, kind):
    if kind == "rwkv":
        rc.save(model, tmp_path / "model")
    else:
        baseline = Transformer(TransformerConfig.make(TOK.vocab_size, 1, 32, 16))
        for x in baseline.parameters():  # left as memory was until a recipe fills them
            torch.nn.init.normal_(x, std=0.1)
        save_baseline(baseline.state_dict(), baseline.config, tmp_path / "model")
    TOK.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("One day a cat.\n")
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "the cat saw the dog"}) + "\n")
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row, *_ in FORMS))
    call = ["eval", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--lambada",
            str(tmp_path / "words.jsonl"), "--choice", str(tmp_path / "choice.jsonl"), "--json"]  # fmt: skip
    found = CliRunner().invoke(build("eval"), call, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    results = json.loads(found.stdout)["results"]
    loaded = rc.load(tmp_path / "model")
    expected = text_loss(open_scorer(loaded, TOK), TOK, ["One day a cat."])
    assert results[str(tmp_path / "text.txt")]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=0.05)
    assert results[str(tmp_path / "choice.jsonl")]["n"] == len(FORMS)
