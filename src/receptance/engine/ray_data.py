"""The engine over Ray Data (the extra `ray`): a data set of prompts in, the same rows with answers out.

Each actor holds one engine. Rows are as the lines of `receptance batch`; what a row lacks comes from `fields`.
"""

import json
from typing import TYPE_CHECKING, Any

from receptance.engine.engine import Engine
from receptance.engine.offline import answer_all, parse_line
from receptance.engine.params import SamplingParams
from receptance.errors import ConfigError

if TYPE_CHECKING:
    import ray.data

KEPT = "receptance"  # the column of answers


class EngineActor:
    """Answers batches of rows with the model of this path or name."""

    def __init__(self, model: str, fields: dict[str, Any], columns: tuple[str, ...]):
        self._engine, self._fields, self._columns = Engine(model), fields, columns

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        count = len(next(iter(batch.values())))
        rows = [{name: batch[name][i] for name in self._columns if name in batch} for i in range(count)]
        answers: list[Any] = [None] * count

        def write(answer: dict[str, Any]) -> None:
            place = int(answer.pop("id"))
            answers[place] = json.dumps(answer, ensure_ascii=False)

        lines = [
            parse_line(i, json.dumps({**self._fields, **row, "id": str(i)}, default=_plain), SamplingParams())
            for i, row in enumerate(rows)
        ]
        answer_all(self._engine, lines, write)
        return {**batch, KEPT: answers}


def _plain(x: Any) -> Any:
    """NumPy's numbers and arrays, which Ray makes of rows."""
    return x.tolist()


def answer_dataset(
    dataset: "ray.data.Dataset",
    model: str,
    *,
    columns: tuple[str, ...] = ("prompt",),
    concurrency: int | tuple[int, int] = 1,
    num_gpus: float = 0,
    batch_size: int = 256,
    **fields: Any,
) -> "ray.data.Dataset":
    """The data set with a column "receptance" of answers, as JSON text; see `receptance.engine.offline`.

    model: a path or name that every node can load. columns: of the data set, those that are fields of a line ("prompt",
    "context", "max_tokens", …). fields: the same for all rows (max_tokens=100, temperature=0, …). concurrency: engines,
    or the least and the most of them. Raises ConfigError where Ray is not installed.
    """
    try:
        import ray.data
    except ModuleNotFoundError:
        raise ConfigError("this needs Ray: pip install 'receptance[ray]'") from None
    found: ray.data.Dataset = dataset.map_batches(
        EngineActor,
        fn_constructor_args=(model, fields, columns),
        concurrency=concurrency,
        num_gpus=num_gpus,
        batch_size=batch_size,
    )
    return found
