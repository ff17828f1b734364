"""Several models in one server, and tuned states mixed in one batch."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from server_helpers import listening

from receptance.cli.model_source import find_model
from receptance.cli.serve_load import load
from receptance.server.config import ServedConfig
from receptance.tokenizers.chat import WORLD

WORDS = {"fox": "The fox ran into the wood. ", "sea": "The ship went over the sea. ", "": None}


def said(client, **fields):
    body = {"messages": [{"role": "user", "content": "Then he said"}], "temperature": 0, "max_tokens": 10, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    model = load("tiny", find_model(str(tiny_folder)), ServedConfig(threads=1, slots=8))
    yield model
    model.engine.close()


def test_two_models_answer_at_once_each_as_if_alone(config, served, tiny):
    with listening(config(), served) as running, running.client as client:
        first = said(client)
    with listening(config(), tiny) as running, running.client as client:
        second = said(client)
    assert first != second
    with listening(config(), served, tiny) as running, running.client as client, ThreadPoolExecutor(12) as pool:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [served.name, "tiny"]
        asked = [served.name, "tiny", None] * 8
        found = list(pool.map(lambda name: said(client, **({"model": name} if name else {})), asked))
        assert found == [second if name == "tiny" else first for name in asked]
        id = client.post("/v1/sessions", json={"model": "tiny"}).json()["id"]
        answer = client.post("/v1/chat/completions", json={
            "session_id": id, "model": served.name, "messages": [{"role": "user", "content": "x"}]})  # fmt: skip
        assert answer.status_code == 400  # a session belongs to its model


def test_stops_beyond_those_of_the_template_are_refused_not_dropped(config, served):
    chatty = replace(served, template=WORLD)
    with listening(config(), chatty) as running, running.client as client:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "stop": [f"x{i}" for i in range(32)]}
        error = client.post("/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == "stop"
        assert "at most 32" in error["message"]


def test_tuned_states_are_mixed_in_one_batch(config, served):
    """Requests with different states run together, each as alone; a session keeps the one it began with."""
    states = {}
    for name, words in WORDS.items():
        states[name] = None if words is None else served.model.forward(served.tokenizer.encode(words * 4))[1]
    model = replace(served, states={name: state for name, state in states.items() if name})
    with listening(config(), model) as running, running.client as client, ThreadPoolExecutor(12) as pool:
        (about,) = client.get("/v1/models").json()["data"]
        assert about["states"] == ["fox", "sea"]
        alone = {name: said(client, state=name) for name in WORDS}
        assert len(set(alone.values())) == 3
        asked = list(WORDS) * 10
        assert list(pool.map(lambda name: said(client, state=name), asked)) == [alone[name] for name in asked]
        id = client.post("/v1/sessions", json={"state": "sea"}).json()["id"]
        assert said(client, session_id=id) == alone["sea"]
        answer = client.post("/v1/chat/completions", json={
            "messages": [{"role": "user", "content": "x"}], "state": "moon"})  # fmt: skip
        assert answer.status_code == 404


def test_a_server_without_the_compiled_engine_says_so(tiny_folder, monkeypatch, caplog):
    from receptance import native

    def missing():
        raise native.NoCoreError("it was compiled from other sources")

    monkeypatch.setattr(native, "load_core", missing)
    monkeypatch.setattr(logging.getLogger("receptance.server"), "propagate", True)
    with caplog.at_level("WARNING", "receptance.server"):
        model = load("tiny", find_model(str(tiny_folder)), ServedConfig())
    model.engine.close()
    (record,) = [record for record in caplog.records if "compiled CPU engine" in record.message]
    assert record.why == "it was compiled from other sources"
