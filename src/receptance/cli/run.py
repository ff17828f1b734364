"""`receptance run`: continue a prompt."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from receptance.cli import options, state_file
from receptance.cli.errors import INTERRUPTED, UsageError
from receptance.cli.model_source import find_model, load_runner, load_tokenizer, looks_like_model
from receptance.cli.preset import find_preset
from receptance.cli.terminal import interruptible, read_stdin, write, write_json
from receptance.engine.params import SamplingParams

if TYPE_CHECKING:
    from receptance.generation import Generation
    from receptance.tokenizers import Tokenizer

# the reference package's, for free text
DEFAULTS = SamplingParams(temperature=1.0, top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2)


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
) -> None:
    """Continue a prompt, streaming the text.

    A lone argument is the MODEL if it names one (an existing path, an embedded model, org/name, *.pth ...), else the
    PROMPT for the model inside the package. Without a PROMPT it is read from standard input. Sampling: flags win over
    the model's model.toml, which wins over temperature 1, top-p 0.85, presence and frequency penalty 0.2.

    \b
    Examples:
      receptance run "Once upon a time"
      receptance run model.pth "The Eiffel tower is in" -n 40 -t 0
      cat chapter.txt | receptance run model.pth --save-state chapter.state -n 0
      receptance run model.pth "What happened next? " --state chapter.state
      receptance run "Once" --json --logprobs 3
    """
    if prompt is None and model is not None and not looks_like_model(model):
        model, prompt = None, model
    if prompt is None and sys.stdin.isatty():
        raise UsageError("there is no PROMPT; give one, or pipe it into standard input")
    if save_state:
        state_file.check_target(save_state)
    source = find_model(model)
    preset = find_preset(source)
    flags = {
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
    params = options.sampling_params(DEFAULTS, preset.sampling, flags, logit_bias, stop)
    text = read_stdin() if prompt in (None, "-") else str(prompt)

    from receptance.generation import generate_tokens

    rwkv = load_runner(source, dtype, device, engine, threads)
    tok = load_tokenizer(source, rwkv.config.vocab_size, tokenizer)
    start = state or preset.state
    opened = preset.new_document and not start and text
    prompt_ids = [tok.eos_id, *tok.encode(text)] if opened else text
    before = rwkv.load_state(start) if start else None
    generation = generate_tokens(rwkv, tok, prompt_ids, params=params, state=before)
    if echo and not as_json:
        write(text)
    with interruptible() as interrupted:
        for token in generation:
            if not as_json:
                write(token.text)
            if interrupted():
                generation.cancel()
    if save_state and generation.finish_reason is not None:
        state_file.save_state(generation.state, save_state, rwkv)
    if as_json:
        write_json(_report(source.name, generation, tok))
    else:
        write("\n")
        if params.logprobs is not None:
            _print_logprobs(generation, tok)
    if stats:
        typer.echo(speed_line(generation), err=True)
    if generation.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def speed_line(generation: "Generation") -> str:
    return (
        f"prompt {len(generation.prompt_ids)} tokens, {generation.prefill_speed:.1f} tok/s · "
        f"text {len(generation.tokens)} tokens, {generation.decode_speed:.1f} tok/s · "
        f"{generation.finish_reason} · seed {generation.seed}"
    )


def _report(model: str, generation: "Generation", tokenizer: "Tokenizer") -> dict[str, object]:
    report: dict[str, object] = {
        "model": model,
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
        "prompt_tokens": len(generation.prompt_ids),
        "tokens": generation.ids,
        "prefill_tokens_per_second": round(generation.prefill_speed, 2),
        "decode_tokens_per_second": round(generation.decode_speed, 2),
    }
    if generation.params.logprobs is not None:
        report["logprobs"] = [
            {
                "id": token.id,
                "token": _shown(tokenizer, token.id),
                "logprob": token.logprob,
                "top": [{"id": i, "token": _shown(tokenizer, i), "logprob": p} for i, p in token.top],
            }
            for token in generation.tokens
        ]
    return report


def _print_logprobs(generation: "Generation", tokenizer: "Tokenizer") -> None:
    for token in generation.tokens:
        others = "  ".join(f"{_shown(tokenizer, i)!r} {p:.3f}" for i, p in token.top)
        typer.echo(f"{_shown(tokenizer, token.id)!r:<16} {token.logprob:8.3f}   {others}", err=True)


def _shown(tokenizer: "Tokenizer", token: int) -> str:
    return tokenizer.decode([token], keep_special=True) if token < tokenizer.vocab_size else f"<{token}>"
