"""What `receptance run` does, once its command line is read."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from receptance.cli import state_file
from receptance.cli.errors import INTERRUPTED, UsageError
from receptance.cli.model_source import find_model, load_runner, load_tokenizer, looks_like_model
from receptance.cli.preset import find_preset
from receptance.cli.sampling_flags import sampling_params
from receptance.cli.terminal import interruptible, note, read_stdin, write, write_json
from receptance.engine.params import SamplingParams

if TYPE_CHECKING:
    from receptance.generation import Generation
    from receptance.tokenizers import Tokenizer

# the reference package's, for free text
DEFAULTS = SamplingParams(temperature=1.0, top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2)


def continue_prompt(
    model: str | None,
    prompt: str | None,
    sampling: Mapping[str, object],
    *,
    logit_bias: Sequence[str] | None = None,
    stop: Sequence[str] | None = None,
    state: Path | None = None,
    save_state: Path | None = None,
    echo: bool = False,
    as_json: bool = False,
    stats: bool = False,
    tokenizer: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
) -> int:
    """Write the continuation, as cli/run.py says. `sampling`: fields of SamplingParams. Returns the exit code."""
    if prompt is None and model is not None and not looks_like_model(model):
        model, prompt = None, model
    if prompt is None and sys.stdin.isatty():
        raise UsageError("there is no PROMPT; give one, or pipe it into standard input")
    if save_state:
        state_file.check_target(save_state)
    source = find_model(model)
    preset = find_preset(source)
    params = sampling_params(DEFAULTS, preset.sampling, sampling, logit_bias, stop)
    text = read_stdin() if prompt in (None, "-") else str(prompt)

    from receptance.generation import generate_tokens

    rwkv = load_runner(source, dtype, device, engine, threads)
    tok = load_tokenizer(source, rwkv.config.vocab_size, tokenizer)
    start = state or preset.state
    opened = preset.new_document and not start and text
    prompt_ids = [tok.eos_id, *tok.encode(text)] if opened else text
    before = rwkv.load_state(start) if start else None
    keep = as_json or params.logprobs is not None
    generation = generate_tokens(rwkv, tok, prompt_ids, params=params, state=before, keep=keep)
    if echo and not as_json:
        write(text)
    try:
        with interruptible(lambda: generation.prefill_seconds > 0) as interrupted:
            for token in generation:
                if not as_json:
                    write(token.text)
                if interrupted():
                    generation.cancel()
    finally:
        if not as_json:
            write("\n")
    if save_state and generation.finish_reason is not None:
        state_file.save_state(generation.state, save_state, rwkv)
    if as_json:
        write_json(_report(source.name, generation, tok))
    elif params.logprobs is not None:
        _print_logprobs(generation, tok)
    if stats:
        note(speed_line(generation))
    return INTERRUPTED if generation.finish_reason == "cancelled" else 0


def speed_line(generation: "Generation") -> str:
    return (
        f"prompt {len(generation.prompt_ids)} tokens, {generation.prefill_speed:.1f} tok/s · "
        f"text {generation.n_tokens} tokens, {generation.decode_speed:.1f} tok/s · "
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
        note(f"{_shown(tokenizer, token.id)!r:<16} {token.logprob:8.3f}   {others}")


def _shown(tokenizer: "Tokenizer", token: int) -> str:
    return tokenizer.decode([token], keep_special=True) if token < tokenizer.vocab_size else f"<{token}>"
