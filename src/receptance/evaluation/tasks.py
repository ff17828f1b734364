"""Tasks with right answers, from JSON lines in the forms in which they are published."""

import gzip
import json
import lzma
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from receptance.errors import ConfigError
from receptance.evaluation.score import Scorer, encode_pair
from receptance.tokenizers import Tokenizer

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choice:
    """A context and a continuation for each answer; gold: the right one. group: such as the subject."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    group: str = ""


@dataclass(frozen=True)
class Result:
    """accuracy: of the answer with the highest log-likelihood; normed: of the highest per byte. error: standard error.

    groups: accuracy by group, if there are any. perplexity: of the right continuations, each counted as one word.
    """

    n: int
    accuracy: float
    normed: float
    perplexity: float
    groups: dict[str, float]

    @property
    def error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, self.n - 1))


def read_rows(path: str | Path, limit: int = 0) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, also .gz or .xz; limit 0: all. Raises ConfigError naming the line."""
    path = Path(path)
    opens: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}  # type: ignore[dict-item]
    try:
        with opens.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit and number > limit:
                    return
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"found a {type(row).__name__}")
                    yield row
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        where = f"{path}:{number}" if "number" in locals() else str(path)
        raise ConfigError(f"{where}: expected one JSON object a line: {error}") from None


# LAMBADA -------------------------------------------------------------------------------------------------------------


def lambada(scorer: Scorer, tokenizer: Tokenizer, rows: Sequence[Row]) -> Result:
    """Accuracy: the last word is what greedy decoding writes. Perplexity: of the last words (Radford et al., 2019)."""
    pairs = []
    for number, row in enumerate(rows, 1):
        text = row.get("text")
        if not isinstance(text, str) or " " not in text.strip():
            raise ConfigError(f"row {number}: LAMBADA needs a field 'text' of several words, found {sorted(row)}")
        context, word = text.strip().rsplit(" ", 1)
        pairs.append(encode_pair(tokenizer, context, f" {word}"))
    if not pairs:
        raise ConfigError("there is nothing to evaluate: the file has no rows")
    scored = scorer.score(pairs)
    right = sum(x.greedy for x in scored) / len(scored)
    return Result(len(scored), right, right, math.exp(-math.fsum(x.total for x in scored) / len(scored)), {})


# Multiple choice -----------------------------------------------------------------------------------------------------


def choice_of(row: Row) -> Choice:
    """The question in a row of one of the common forms. Raises ConfigError with the row's fields for another.

    BLiMP (sentence_good, sentence_bad); PIQA (goal, sol1, sol2, label); WinoGrande (sentence with _, option1, option2,
    answer); ARC and OpenBookQA (question, choices, answerKey); HellaSwag (ctx, endings, label); and any row with a
    question (question, query, prompt, context, ctx, input), answers (choices, endings, options) and the right one's
    number, letter or text (answer, label, gold, answerKey).
    """
    group = str(next((row[key] for key in ("subject", "UID", "group", "task") if row.get(key)), ""))
    if "sentence_good" in row:
        return Choice(("", ""), (str(row["sentence_good"]), str(row["sentence_bad"])), 0, group)
    if "sol1" in row:
        return _question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]), group)
    if "option1" in row and "_" in str(row.get("sentence", "")):
        before, after = str(row["sentence"]).split("_", 1)
        contexts = tuple(before + str(row[key]) for key in ("option1", "option2"))  # the same end after each
        return Choice(contexts, (" " + after.strip(),) * 2, int(row["answer"]) - 1, group)
    question = next(
        (row[key] for key in ("question", "query", "prompt", "context", "ctx", "input") if key in row), None
    )
    answers = next((row[key] for key in ("choices", "endings", "options") if key in row), None)
    labels: list[str] = []
    if isinstance(question, Mapping):  # ARC as it was first published
        stem: Row = question
        question, answers = stem.get("stem"), stem.get("choices")
    if isinstance(answers, Mapping):
        labels, answers = [str(x) for x in answers.get("label", [])], answers.get("text")
    elif isinstance(answers, list) and answers and isinstance(answers[0], Mapping):
        labels, answers = [str(x.get("label")) for x in answers], [x.get("text") for x in answers]
    gold = next((row[key] for key in ("answer", "label", "gold", "answerKey") if key in row), None)
    if not isinstance(question, str) or not isinstance(answers, list) or len(answers) < 2 or gold is None:
        raise ConfigError(
            f"a row with the fields {sorted(row)} is no multiple choice that is known: expected a question, a list "
            "'choices' and 'answer', or the form of BLiMP, PIQA, WinoGrande, ARC or HellaSwag"
        )
    context = question if "endings" in row else f"Question: {question}\nAnswer:"
    return _question(context, answers, number_of(gold, answers, labels), group)


def _question(context: str, answers: Sequence[Any], gold: int, group: str) -> Choice:
    if not 0 <= gold < len(answers):
        raise ConfigError(f"the right answer is number {gold} of {len(answers)} answers")
    return Choice((context,) * len(answers), tuple(f" {str(x).strip()}" for x in answers), gold, group)


def number_of(gold: object, answers: Sequence[object], labels: Sequence[str]) -> int:
    """The right answer's place: by its label, its text, its letter or its number from 0."""
    if str(gold) in labels:
        return labels.index(str(gold))
    if gold in answers:
        return list(answers).index(gold)
    if isinstance(gold, str) and len(gold) == 1 and gold in LETTERS:
        return LETTERS.index(gold)
    try:
        return int(str(gold))
    except ValueError:
        raise ConfigError(f"the right answer {gold!r} is none of {list(answers)!r}") from None


def multiple_choice(scorer: Scorer, tokenizer: Tokenizer, questions: Sequence[Choice]) -> Result:
    """Every answer's log-likelihood after its context; contexts that begin alike are read once."""
    if not questions:
        raise ConfigError("there is nothing to evaluate: the file has no rows")
    pairs = [encode_pair(tokenizer, c, a) for q in questions for c, a in zip(q.contexts, q.continuations)]
    scored = iter(scorer.score(pairs))
    right = normed = 0
    nats = 0.0
    groups: dict[str, list[int]] = defaultdict(list)
    for q in questions:
        totals = [next(scored).total for _ in q.continuations]
        best = max(range(len(totals)), key=totals.__getitem__)
        per_byte = [x / max(1, len(text.encode())) for x, text in zip(totals, q.continuations)]
        right += best == q.gold
        normed += max(range(len(totals)), key=per_byte.__getitem__) == q.gold
        nats -= totals[q.gold]
        groups[q.group].append(best == q.gold)
    n = len(questions)
    by_group = {name: sum(x) / len(x) for name, x in sorted(groups.items())} if set(groups) != {""} else {}
    return Result(n, right / n, normed / n, math.exp(min(700.0, nats / n)), by_group)


def mmlu(rows: Sequence[Row], shots: Sequence[Row] = (), n_shots: int = 5) -> list[Choice]:
    """Questions in MMLU's own form, answered with a letter, after up to n_shots solved ones of the same subject."""
    examples: dict[str, list[str]] = defaultdict(list)
    for row in shots:
        answer = number_of(row["answer"], row["choices"], ())
        examples[str(row.get("subject", ""))].append(f"{_listed(row)} {LETTERS[answer]}\n\n")
    found = []
    for number, row in enumerate(rows, 1):
        if not {"question", "choices", "answer"} <= row.keys():
            raise ConfigError(f"row {number}: MMLU needs question, choices and answer, found {sorted(row)}")
        subject = str(row.get("subject", ""))
        about = f" about {subject.replace('_', ' ')}" if subject else ""
        head = f"The following are multiple choice questions (with answers){about}.\n\n"
        context = head + "".join(examples[subject][:n_shots]) + _listed(row)
        gold = number_of(row["answer"], row["choices"], ())
        found.append(_question(context, LETTERS[: len(row["choices"])], gold, subject))
    return found


def _listed(row: Row) -> str:
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, row["choices"]))
    return f"{str(row['question']).strip()}\n{options}Answer:"


# The order of a prompt -----------------------------------------------------------------------------------------------


def prompt_orders(rows: Sequence[Row]) -> dict[str, list[Choice]]:
    """One task in two orders: "before", the instruction before the input, and "after" (RWKV paper, appendix L).

    Rows have instruction, input, choices and answer. A model that must decide while it reads what to keep is better
    off with the instruction first; one that can look back is not.
    """
    found: dict[str, list[Choice]] = {"before": [], "after": []}
    for number, row in enumerate(rows, 1):
        if not {"instruction", "input", "choices", "answer"} <= row.keys():
            raise ConfigError(f"row {number}: needs instruction, input, choices and answer, found {sorted(row)}")
        gold, group = number_of(row["answer"], row["choices"], ()), str(row.get("task", ""))
        for name, parts in (("before", ("instruction", "input")), ("after", ("input", "instruction"))):
            context = "\n".join(str(row[part]).strip() for part in parts) + "\nAnswer:"
            found[name].append(_question(context, row["choices"], gold, group))
    return found


def sample(rows: Sequence[Row], limit: int, seed: int = 0) -> list[Row]:
    """At most `limit` of the rows (0: all), drawn and in their order."""
    if not limit or len(rows) <= limit:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
