"""The command line: one file per verb, each thin. Nothing here imports torch before a verb needs it."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

# What `receptance --help` lists. A verb is a module of this package with a function `command` whose docstring is the
# help text; a group is a module with `app`.
VERBS = {
    "run": "Continue a prompt, streaming the text.",
    "chat": "Chat with a model.",
    "serve": "Serve models over HTTP: OpenAI's API, Ollama's, and a page.",
    "batch": "Continue, score or embed all lines of a file, many at once.",
    "train": "Train a model from text.",
    "data": "Turn texts into token files for training, and look into them.",
    "eval": "Measure a model: losses, LAMBADA, multiple choice, lm-eval.",
    "inspect": "Show what a model is made of, or how it read a text.",
    "convert": "Write a model in another layout, bit for bit.",
    "quantize": "Write a quantised GGUF file, and measure what it costs.",
    "pull": "Download a model of the Hugging Face hub.",
    "list": "List the models that are here.",
    "doctor": "Say what this machine can run, and why not.",
    "bench": "Measure speed beside what the machine can do.",
    "compare": "Train several models on the same data, and report.",
    "scaling": "Train a ladder of sizes, and fit power laws to their losses.",
    "memory": "Train small models on tests of memory and reasoning.",
    "forecast": "Train forecasters of time series, and compare their errors.",
    "nodes": "Classify the nodes of a graph, and compare accuracies.",
}
GROUPS = ("data", "bench")


def build(verb: str | None = None) -> "typer.Typer":
    """The whole command line, or as much of it as this verb needs: importing all verbs takes a tenth of a second."""
    from receptance.cli.tree import build

    return build(verb)


def main() -> None:
    from receptance.cli import quick

    if (request := quick.read(sys.argv[1:])) is not None:
        sys.exit(quick.run(request))
    build(sys.argv[1] if len(sys.argv) > 1 else None)()
