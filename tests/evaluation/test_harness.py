"""lm-eval's own tasks, on files made here, through our adapter."""

import json
import math

import pytest
import torch

import receptance as rc
from receptance.errors import ConfigError
from receptance.evaluation import tasks
from receptance.evaluation.perplexity import text_loss
from receptance.models import RWKV7
from receptance.tokenizers import tokenizer

pytest.importorskip("lm_eval")
TOK = tokenizer("byte")
LAST_WORDS = [{"text": f"the cat number {i} saw the dog"} for i in range(6)]
QUESTIONS = [
    {"question": f"What is {i} plus {i}?", "choices": ["one", str(2 * i), "many"], "answer": 1} for i in range(5)
]

TASKS = {
    "last_words": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]
""",
    "questions": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "writing": """
output_type: generate_until
doc_to_text: text
doc_to_target: text
generation_kwargs: {until: ["q"], max_gen_toks: 9}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def engine():
    model = RWKV7(RWKV7.Config.make(TOK.vocab_size, 2, 32, 16))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    with rc.Engine(model.eval(), TOK, speculate=None) as engine:
        yield engine


@pytest.fixture(scope="module")
def results(engine, tmp_path_factory):
    from receptance.evaluation.harness import run_tasks

    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        rows = QUESTIONS if name == "questions" else LAST_WORDS
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(data + "test_split: test\n" + text.lstrip())
    found = run_tasks(engine, list(TASKS), str(folder))
    with pytest.raises(ConfigError, match="knows no task absent"):
        run_tasks(engine, ["absent"], str(folder))
    return found


def test_last_words_agree_with_our_own_scorer(engine, results):
    ours = tasks.lambada(engine, TOK, LAST_WORDS)
    assert math.log(results["last_words"]["perplexity,none"]) == pytest.approx(math.log(ours.perplexity), abs=1e-4)
    assert results["last_words"]["acc,none"] == ours.accuracy


def test_choices_agree_with_our_own_scorer(engine, results):
    ours = tasks.multiple_choice(engine, TOK, [tasks.choice_of(row) for row in QUESTIONS])
    assert results["questions"]["acc,none"] == ours.accuracy


def test_whole_texts_agree_with_our_own_scorer(engine, results):
    ours = text_loss(engine, TOK, [row["text"] for row in LAST_WORDS], with_end=False)
    assert results["whole"]["bits_per_byte,none"] == pytest.approx(ours.bits_per_byte, rel=1e-5)
    assert results["whole"]["word_perplexity,none"] == pytest.approx(ours.word_perplexity, rel=1e-4)


def test_writing_is_greedy_and_ends_at_its_stop(engine, results):
    from lm_eval.api.instance import Instance

    from receptance.evaluation.harness import HarnessModel

    assert results["writing"]["exact_match,none"] == 0
    request = Instance("generate_until", {}, ("the cat", {"until": ["q"], "max_gen_toks": 9}), 0)
    (text,) = HarnessModel(engine).generate_until([request])
    assert text == "".join(rc.generate(engine.model, TOK, "the cat", max_tokens=9, temperature=0, stop=("q",)))


def test_common_beginnings_are_read_once(engine):
    from lm_eval.api.instance import Instance

    from receptance.evaluation.harness import HarnessModel

    context = "Question: " + "long " * 200
    requests = [Instance("loglikelihood", {}, (context, f" {i}"), i) for i in range(8)]
    before = engine.stats.read
    HarnessModel(engine).loglikelihood(requests)
    assert engine.stats.read - before < 2 * len(context)


def test_unknown_settings_of_a_task_are_refused():
    from receptance.evaluation.harness import sampling

    with pytest.raises(ConfigError, match="num_beams"):
        sampling({"num_beams": 4})
    assert sampling({"until": "x", "do_sample": True, "temperature": 0.5}).temperature == 0.5
    assert sampling({"temperature": 0.5, "do_sample": False}).temperature == 0
