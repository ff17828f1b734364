"""Sampling parameters out of flags, a model's preset and a verb's defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from receptance.engine.params import SamplingParams
from receptance.errors import ConfigError


def sampling_params(
    defaults: SamplingParams,
    preset: Mapping[str, object],
    flags: Mapping[str, object],
    logit_bias: Sequence[str] | None,
    stop: Sequence[str] | None,
) -> SamplingParams:
    """Flags win over the model's preset, which wins over the verb's defaults. `flags` that are None were not given."""
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if logit_bias:
        given["logit_bias"] = dict(map(bias, logit_bias))
    if stop:
        given["stop"] = [text.replace("\\n", "\n").replace("\\t", "\t") for text in stop]
    # one step each, so that an error names a value as the user wrote it
    return replace(replace(defaults, **dict[str, Any](preset)), **given)


def bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise ConfigError(f"--logit-bias is {text!r}, expected ID=VALUE, such as 42=-3 or 42=-inf") from None
