"""`receptance eval`: what a model knows, on files of yours."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from receptance.cli import options
from receptance.cli.model_source import find_model, load_runner, load_tokenizer
from receptance.cli.terminal import doing, write_json
from receptance.errors import ConfigError

if TYPE_CHECKING:
    from receptance.evaluation.perplexity import TextLoss
    from receptance.evaluation.tasks import Result

Files = list[Path] | None


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Path, name or org/name[:file].")] = None,
    text: Annotated[Files, typer.Option("--text", metavar="FILE", help="Loss on a text or jsonl file.")] = None,
    window: Annotated[int, typer.Option("--window", metavar="N", help="See no further back; 0 = whole document.")] = 0,
    stride: Annotated[int, typer.Option("--stride", metavar="N", help="Tokens scored per window; 0 = half.")] = 0,
    lambada: Annotated[Files, typer.Option("--lambada", metavar="FILE", help="Last words; jsonl with text.")] = None,
    choice: Annotated[Files, typer.Option("--choice", metavar="FILE", help="Multiple choice; jsonl.")] = None,
    mmlu: Annotated[Files, typer.Option("--mmlu", metavar="FILE", help="MMLU's form; jsonl.")] = None,
    shots: Annotated[
        Path | None, typer.Option("--shots", metavar="FILE", help="Solved questions to put before those of --mmlu.")
    ] = None,
    order: Annotated[
        Files, typer.Option("--order", metavar="FILE", help="Instruction before and after the input; jsonl.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="A task of lm-eval (extra [eval]).")
    ] = None,
    include: Annotated[
        Path | None, typer.Option("--include", metavar="FOLDER", help="lm-eval: only the task files of this folder.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="At most so many of each file; 0 = all.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    tokenizer: options.TokenizerName = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
) -> None:
    """Measure a model: losses on texts, LAMBADA, multiple choice, lm-eval.

    Documents and questions are scored together, and what they have in common at their beginning is read once.

    \b
    Examples:
      receptance eval model.pth --text book.txt --text news.jsonl
      receptance eval model.pth --lambada last.jsonl --choice qa.jsonl --limit 99
      receptance eval model.pth --mmlu test.jsonl --shots dev.jsonl --json
      receptance eval model.pth --task lambada_openai --task piqa
    """
    if not any((text, lambada, choice, mmlu, order, tasks)):
        raise ConfigError("nothing to measure: give --text, --lambada, --choice, --mmlu, --order or --task")
    from receptance.baselines.files import is_baseline

    source = find_model(model)
    if is_baseline(source.path):
        engine = "torch"
    runner: Any = load_runner(source, dtype, device, engine, threads)
    known = load_tokenizer(source, runner.config.vocab_size, tokenizer)

    from receptance.engine.engine import Engine
    from receptance.evaluation.score import open_scorer

    scorer = open_scorer(runner, known)
    try:
        with doing("measuring"):
            results = measure(scorer, known, text, lambada, choice, mmlu, order, window, stride, shots, limit)
        if tasks:
            if not isinstance(scorer, Engine):
                raise ConfigError("lm-eval runs RWKV models only; this is a baseline")
            try:
                from receptance.evaluation.harness import run_tasks
            except ImportError as error:
                raise ConfigError(f"--task needs lm-eval: pip install 'receptance[eval]' ({error})") from None
            found = run_tasks(scorer, tasks, None if include is None else str(include), limit)
            results |= {
                name: {k: v for k, v in row.items() if isinstance(v, int | float)} for name, row in found.items()
            }
    finally:
        if isinstance(scorer, Engine):
            scorer.close()
    if as_json:
        write_json({"model": source.name, "results": results})
        return
    for name, row in results.items():
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, int | float))
        typer.echo(f"{name}: {numbers}")


def measure(
    scorer: Any, tokenizer: Any, text: Files, lambada: Files, choice: Files, mmlu: Files, order: Files,
    window: int, stride: int, shots: Path | None, limit: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Numbers by file."""
    from itertools import islice

    from receptance.data import documents
    from receptance.evaluation import tasks as t
    from receptance.evaluation.perplexity import text_loss

    results: dict[str, dict[str, Any]] = {}
    for path in text or ():
        if not path.exists():
            raise ConfigError(f"{path}: no such file")
        texts = islice(documents(path), limit or None)
        results[str(path)] = of_text(text_loss(scorer, tokenizer, texts, window=window, stride=stride))

    def questions(path: Path, make: Callable[[list[Any]], list[t.Choice]]) -> "Result":
        return t.multiple_choice(scorer, tokenizer, make(t.sample(list(t.read_rows(path)), limit)))

    for path in lambada or ():
        results[str(path)] = of_task(t.lambada(scorer, tokenizer, t.sample(list(t.read_rows(path)), limit)))
    for path in choice or ():
        results[str(path)] = of_task(questions(path, lambda rows: [t.choice_of(row) for row in rows]))
    solved = list(t.read_rows(shots)) if shots is not None else []
    for path in mmlu or ():
        results[str(path)] = of_task(questions(path, lambda rows: t.mmlu(rows, solved)))
    for path in order or ():
        for name in ("before", "after"):
            found = questions(path, lambda rows, name=name: t.prompt_orders(rows)[name])  # type: ignore[misc]
            results[f"{path}, instruction {name} the input"] = of_task(found)
    return results


def of_text(loss: "TextLoss") -> dict[str, Any]:
    return {
        "bits_per_byte": loss.bits_per_byte, "perplexity": loss.perplexity, "word_perplexity": loss.word_perplexity,
        "documents": loss.documents, "tokens": loss.tokens, "bytes": loss.n_bytes,
    }  # fmt: skip


def of_task(found: "Result") -> dict[str, Any]:
    row: dict[str, Any] = {"accuracy": found.accuracy, "error": found.error, "accuracy_per_byte": found.normed}
    row |= {"perplexity": found.perplexity, "n": found.n}
    return row | ({"groups": found.groups} if found.groups else {})
