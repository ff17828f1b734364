"""lm-eval's own tasks, on files made here, through our adapter."""

import json
import math
from pathlib import Path

import pytest
import torch

import receptance as rc
from receptance.embedded import resolve
from receptance.errors import ConfigError
from receptance.evaluation import tasks
from receptance.evaluation.perplexity import text_loss
from receptance.evaluation.score import PlainScorer, encode_pair
from receptance.models import RWKV7
from receptance.tokenizers import tokenizer

pytest.importorskip("lm_eval")
TOK = tokenizer("byte")
EMBEDDED = resolve("rwkv7-stories")
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


# Published tasks -----------------------------------------------------------------------------------------------------

LIKE_LAMBADA = [
    "The dog ran to the old tree and sat down under the tree",
    "Lily had a red ball. She gave it to Tom, and Tom said thank you for the ball",
    '"Where is the key?" asked Ben. His mother looked in her bag, on the table, and behind the door for the key',
    "It was raining. Sam put on his boots, took his umbrella and went out into the rain",
]
LIKE_BLIMP = [
    ("The cats are sleeping.", "The cats is sleeping."),
    ("Who did the boy see?", "Who did the boy see the girl?"),
    ("The girl hurt herself.", "The girl hurt himself."),
    ("No dog that I know has ever barked.", "Any dog that I know has ever barked."),
]
CLOSE = 1e-4  # nats, of a whole continuation


def published(folder, kind, rows):
    """A task of lm-eval's own configuration, with its data from a file here instead of a hub."""
    import lm_eval
    import yaml

    shipped = Path(lm_eval.__file__).parent / "tasks" / {"lambada": "lambada/lambada_openai.yaml",
                                                         "blimp": "blimp/_template_yaml"}[kind]  # fmt: skip
    task = yaml.safe_load(shipped.read_text())
    task |= {"task": kind, "dataset_path": "json", "dataset_name": None}
    split = task.get("test_split") or task["validation_split"]
    task["dataset_kwargs"] = {"data_files": {split: str(folder / f"{kind}.jsonl")}}
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(task))


def rows_of(request, kind):
    """A few made up, or a sample of the published ones."""
    if request.param == "ours":
        rows = {"lambada": [{"text": text} for text in LIKE_LAMBADA],
                "blimp": [{"sentence_good": good, "sentence_bad": bad} for good, bad in LIKE_BLIMP]}[kind]  # fmt: skip
        return rows
    folder = request.getfixturevalue("shared") / "data/eval"
    file = folder / {"lambada": "lambada_test.jsonl.xz", "blimp": "blimp.jsonl.xz"}[kind]
    return tasks.sample(list(tasks.read_rows(file)), {"lambada": 40, "blimp": 134}[kind])


@pytest.fixture(scope="module", params=["ours", "published"])
def answers(request, tmp_path_factory):
    """What lm-eval recorded of every question, the rows, and a plain forward pass of the same model to judge it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from receptance.evaluation.harness import HarnessModel

    folder = tmp_path_factory.mktemp("published")
    rows = {kind: rows_of(request, kind) for kind in ("lambada", "blimp")}
    for kind in rows:
        published(folder, kind, rows[kind])
    known, model = tokenizer(EMBEDDED), rc.load(EMBEDDED, dtype="float32")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with rc.Engine(model, known, speculate=None) as engine:
        found = simple_evaluate(HarnessModel(engine), tasks=list(rows), task_manager=manager, bootstrap_iters=0,
                                log_samples=True)  # fmt: skip
    return rows, found, PlainScorer(model, known), known


def samples(found, kind):
    return sorted(found["samples"][kind], key=lambda sample: sample["doc_id"])


def test_lambada_by_lm_eval_is_lambada_by_us(answers):
    rows, found, plain, known = answers
    contexts = [row["text"].strip().rsplit(" ", 1) for row in rows["lambada"]]
    ours = plain.score([encode_pair(known, context, f" {word}") for context, word in contexts])
    theirs = [sample["filtered_resps"][0] for sample in samples(found, "lambada")]
    assert [x for x, _ in theirs] == pytest.approx([x.total for x in ours], abs=CLOSE)
    assert [is_greedy for _, is_greedy in theirs] == [x.greedy for x in ours]
    result = tasks.lambada(plain, known, rows["lambada"])
    assert found["results"]["lambada"]["acc,none"] == pytest.approx(result.accuracy)
    perplexity = found["results"]["lambada"]["perplexity,none"]
    assert math.log(perplexity) == pytest.approx(math.log(result.perplexity), abs=CLOSE)


def test_blimp_by_lm_eval_is_blimp_by_us(answers):
    """Its configuration puts a space before each sentence; ours does not."""
    rows, found, plain, known = answers
    questions = [
        tasks.Choice(("", ""), (f" {row['sentence_good']}", f" {row['sentence_bad']}"), 0) for row in rows["blimp"]
    ]
    ours = plain.score([encode_pair(known, "", text) for question in questions for text in question.continuations])
    theirs = [x for sample in samples(found, "blimp") for x, _ in sample["filtered_resps"]]
    assert theirs == pytest.approx([x.total for x in ours], abs=CLOSE)
    result = tasks.multiple_choice(plain, known, questions)
    assert found["results"]["blimp"]["acc,none"] == pytest.approx(result.accuracy)
    assert result.accuracy > 0.6  # the story model knows some grammar; chance is 0.5
