"""Data sets through the engine on a Ray cluster of this machine, where Ray is installed."""

import json
import sys

import pytest

from receptance.engine.ray_data import answer_dataset
from receptance.errors import ConfigError


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(ConfigError, match=r"pip install 'receptance\[ray\]'"):
        answer_dataset(None, "rwkv7-stories")  # type: ignore[arg-type]


@pytest.mark.slow
def test_rows_of_a_data_set_get_their_answers() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        rows = ray.data.from_items([{"prompt": f"Story {i}: Once", "number": i} for i in range(40)])
        done = answer_dataset(rows, "rwkv7-stories", concurrency=2, batch_size=10, max_tokens=5, seed=1).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["number"] for row in done) == list(range(40))
    answers = {row["number"]: json.loads(row["receptance"]) for row in done}
    assert all(answer["completion_tokens"] == 5 or answer["finish_reason"] == "stop" for answer in answers.values())

    from receptance.engine.engine import Engine

    with Engine("rwkv7-stories") as engine:
        alone = engine.generate("Story 7: Once", max_tokens=5, seed=1)[0]
    assert answers[7]["text"] == alone.text
