"""`receptance run`: continue a prompt."""

from pathlib import Path
from typing import Annotated

import typer

from receptance.cli import options
from receptance.cli.continuation import continue_prompt


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Path, name or org/name[:file].")] = None,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text to go on from; - = stdin.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    presence_penalty: options.Presence = None,
    frequency_penalty: options.Frequency = None,
    repetition_penalty: options.Repetition = None,
    penalty_decay: options.Decay = None,
    logit_bias: options.LogitBias = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", metavar="N", help="Report each token and the N most probable ones.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Never end the document before --max-tokens.")
    ] = False,
    state: options.StateFile = None,
    save_state: Annotated[
        Path | None, typer.Option("--save-state", metavar="FILE", help="Write the state after prompt and text.")
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before the text.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a stream.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and seed on stderr.")] = False,
    tokenizer: options.TokenizerName = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
) -> int:
    """Continue a prompt, streaming the text.

    A lone argument is the MODEL if it names one (an existing path, an embedded model, org/name, *.pth ...), else the
    PROMPT for the model inside the package. Without a PROMPT it is read from standard input. Sampling: flags win over
    the model's model.toml, which wins over 256 tokens, temperature 1, top-p 0.85, presence and frequency penalty 0.2.

    \b
    Examples:
      receptance run "Once upon a time"
      receptance run model.pth "The Eiffel tower is in" -n 40 -t 0
      cat chapter.txt | receptance run model.pth --save-state chapter.state -n 0
      receptance run model.pth "What happened next? " --state chapter.state
      receptance run "Once" --json --logprobs 3
    """
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "penalty_decay": penalty_decay,
        "seed": seed,
        "logprobs": logprobs,
        "ignore_eos": ignore_eos or None,
    }
    return continue_prompt(
        model, prompt, sampling, logit_bias=logit_bias, stop=stop, state=state, save_state=save_state, echo=echo,
        as_json=as_json, stats=stats, tokenizer=tokenizer, dtype=dtype, device=device, engine=engine, threads=threads,
    )  # fmt: skip
