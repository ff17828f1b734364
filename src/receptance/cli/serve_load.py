"""A served model, with all that its files and the configuration say of it."""

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from receptance.cli.chat import DEFAULTS
from receptance.cli.model_source import ModelSource, guess_template, load_runner, load_tokenizer
from receptance.cli.preset import find_preset
from receptance.cli.sampling_flags import sampling_params
from receptance.engine.params import SamplingParams
from receptance.errors import ReceptanceError

if TYPE_CHECKING:
    from receptance.server.config import ServedConfig
    from receptance.server.served import ServedModel
    from receptance.tokenizers import Thinking


def load(name: str, source: ModelSource, wanted: "ServedConfig") -> "ServedModel":
    """A model with all that its files and the configuration say of it."""
    from receptance.engine.engine import Engine
    from receptance.server.hub import log
    from receptance.server.served import ServedModel
    from receptance.tokenizers import chat_template

    preset = find_preset(source)
    template = chat_template(wanted.template or preset.template or guess_template(source))
    thinking = cast("Thinking", wanted.thinking or preset.thinking or "off")
    template.reply_prefix(thinking)
    rwkv = load_runner(source, wanted.dtype, wanted.device, wanted.engine, wanted.threads)
    if (
        rwkv.engine == "torch"
        and wanted.engine is None
        and wanted.device in (None, "cpu")
        and wanted.dtype != "float64"
    ):
        log.warning("the compiled CPU engine cannot be used; torch is slower", extra={"model": name, "why": why_not()})
    tok = load_tokenizer(source, rwkv.config.vocab_size, wanted.tokenizer)
    states = {state: rwkv.load_state(file) for state, file in wanted.states.items()}
    if preset.state:
        states.setdefault("", rwkv.load_state(preset.state))
    return ServedModel(
        name=name,
        engine=Engine(rwkv, tok, slots=wanted.slots, cache_bytes=wanted.cache_bytes, weights=wanted.weights),
        template=template,
        thinking=thinking,
        system=wanted.system or preset.system,
        new_document=preset.new_document,
        sampling=sampling_params(DEFAULTS, preset.sampling, {}, None, None),
        completion_sampling=SamplingParams(max_tokens=16),
        states=states,
        decays=partial(log_decays, source, str(rwkv.config.version), rwkv.config.n_layer),
    )


def why_not() -> str:
    """Why the compiled engine is not there."""
    from receptance.native import NoCoreError, load_core

    try:
        load_core()
    except NoCoreError as error:
        return str(error)
    return ""


def log_decays(source: ModelSource, version: str, n_layer: int) -> Any:
    """The log-decay of each layer's channels where the input adds nothing; None for files with other names."""
    import numpy as np

    from receptance.checkpoint import open_checkpoint
    from receptance.native.arrays import to_float

    key = "w0" if version == "7" else "time_decay"
    rows = []
    try:
        stored = open_checkpoint(source.path)
        for layer in range(n_layer):
            x = to_float(stored.array(f"blocks.{layer}.att.{key}")).ravel()
            rows.append(-np.exp(-0.5) / (1 + np.exp(-x)) if version == "7" else -np.exp(x))
    except (ReceptanceError, KeyError, TypeError, ValueError):
        return None
    return rows
