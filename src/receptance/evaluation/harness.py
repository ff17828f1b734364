"""lm-eval (EleutherAI's harness) on our models: every task that it knows, through the batched engine."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from receptance.engine.engine import Engine
from receptance.engine.params import SamplingParams
from receptance.engine.request import Request
from receptance.errors import ConfigError
from receptance.evaluation.score import encode_pair

MAX_TOKENS = 256  # of a text whose task names no bound


class HarnessModel(LM):  # type: ignore[misc]
    """An `lm_eval.api.model.LM` over an Engine: requests of a task run together, common beginnings are read once.

    Contexts are never cut: the state has one size whatever their length.
    """

    def __init__(self, engine: Engine):
        super().__init__()  # type: ignore[no-untyped-call]
        self.engine = engine

    @property
    def tokenizer_name(self) -> str:
        return self.engine.tokenizer.name

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would write it) of each continuation."""
        pairs = [encode_pair(self.engine.tokenizer, *request.args) for request in requests]
        found = [(scored.total, scored.greedy) for scored in self.engine.score(pairs)]
        for request, answer in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of whole texts, each read from the end-of-document token on in one piece."""
        texts = [self.engine.tokenizer.encode(request.args[0]) for request in requests]
        scored = self.engine.score([([], ids) for ids in texts])
        found = [x.total for x in scored]
        for request, answer in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Texts up to a stop string; greedy unless the task asks for more."""
        handles = [
            self.engine.submit(Request(context, sampling(kwargs))) for context, kwargs in (r.args for r in requests)
        ]
        found = [handle.result()[0].text for handle in handles]
        for request, answer in zip(requests, found):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found


def sampling(kwargs: Mapping[str, Any]) -> SamplingParams:
    """A task's generation_kwargs. Raises ConfigError for one that has no meaning here."""
    known = {"until", "max_gen_toks", "max_tokens", "do_sample", "temperature", "top_p", "top_k", "seed"}
    if unknown := set(kwargs) - known:
        raise ConfigError(f"generation_kwargs {sorted(unknown)} are unknown; there are {sorted(known)}")
    until = kwargs.get("until") or []
    bound = kwargs.get("max_gen_toks", kwargs.get("max_tokens"))
    is_greedy = not kwargs.get("do_sample", float(kwargs.get("temperature") or 0) > 0)
    fields: dict[str, Any] = {key: kwargs[key] for key in ("top_p", "top_k", "seed") if kwargs.get(key) is not None}
    return SamplingParams(
        max_tokens=int(MAX_TOKENS if bound is None else bound),
        temperature=0.0 if is_greedy else float(kwargs.get("temperature", 1.0)),
        stop=tuple([until] if isinstance(until, str) else until),
        **fields,
    )


def run_tasks(engine: Engine, names: Sequence[str], include: str | None = None, limit: int = 0) -> dict[str, Any]:
    """lm-eval's results by task. include: a folder of task files; then only these are known, and nothing is fetched."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include, include_defaults=include is None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(f"lm-eval knows no task {', '.join(unknown)}; there are {', '.join(manager.all_tasks[:40])}")
    found = simple_evaluate(
        HarnessModel(engine), tasks=list(names), task_manager=manager, limit=limit or None, bootstrap_iters=0
    )
    if found is None:
        raise ConfigError("lm-eval gave no results")
    results: dict[str, Any] = found["results"]
    return results
