"""A model that thinks: its thoughts come apart from its answer, on every route, whole and as a stream.

The model is the embedded one with the template of the g1 family. What it thinks is its own; a bias towards "<" makes it
end the thought some time, which a grammar then completes, and an answer of one of two words.
"""

import json
from dataclasses import replace

import pytest
from server_helpers import listening

from receptance.server.config import read_config
from receptance.tokenizers import chat_template

ASKED = [{"role": "user", "content": "Who met the fox?"}]
ANSWERS = ("bear", "owl")
SHAPE = {"structured_outputs": {"choice": list(ANSWERS)}}
BIAS = 8.0
LONG = {"max_tokens": 400, "temperature": 1.0, "seed": 3, "top_p": 0.5}


@pytest.fixture(scope="module")
def thinker(served, tmp_path_factory):
    (end,) = served.tokenizer.encode("<")
    sampling = replace(served.sampling, logit_bias={end: BIAS})
    model = replace(served, name="thinker", template=chat_template("g1"), thinking="on", sampling=sampling)
    config = read_config(None, [f"sessions.folder={tmp_path_factory.mktemp('thinker')}"])
    with listening(config, model) as running:
        yield running


@pytest.fixture(scope="module")
def api(thinker):
    with thinker.openai as api:
        yield api


def chat(api, body=None, **fields):
    return api.chat.completions.create(
        model="thinker", messages=ASKED, extra_body={**SHAPE, **(body or {})}, **LONG, **fields
    )


def test_thoughts_are_apart_from_the_answer(api):
    answer = chat(api)
    message = answer.choices[0].message
    assert message.content in ANSWERS
    assert message.reasoning_content.strip()
    assert "<" not in message.content + message.reasoning_content
    usage = answer.usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_a_stream_gives_the_thoughts_first_and_the_same_text(api):
    whole = chat(api).choices[0].message
    pieces = [chunk.choices[0].delta for chunk in chat(api, stream=True)]
    thoughts = [i for i, delta in enumerate(pieces) if getattr(delta, "reasoning_content", None)]
    words = [i for i, delta in enumerate(pieces) if delta.content]
    assert len(thoughts) > 3
    assert max(thoughts) < min(words)
    assert "".join(pieces[i].reasoning_content for i in thoughts).strip() == whole.reasoning_content
    assert "".join(pieces[i].content for i in words) == whole.content


@pytest.mark.parametrize(
    "fields", [{"reasoning_effort": "none"}, {"body": {"thinking": "off"}}, {"body": {"thinking": "fast"}}]
)
def test_thoughts_can_be_left_out(api, fields):
    answer = chat(api, **fields)
    assert answer.choices[0].message.content in ANSWERS
    assert getattr(answer.choices[0].message, "reasoning_content", None) is None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def respond(**fields):
    shape = {"format": {"type": "json_schema", "name": "who", "schema": {"enum": list(ANSWERS)}}}
    asked = {"model": "thinker", "input": "Who met the fox?", "max_output_tokens": 400, "temperature": 1.0}
    return {**asked, "text": shape, "top_p": 0.5, "extra_body": {"seed": 3}, **fields}


def test_a_response_has_an_item_for_the_thoughts_and_one_for_the_answer(api):
    answer = api.responses.create(**respond())
    thoughts, message = answer.output
    assert thoughts.type == "reasoning"
    assert thoughts.content[0].text.strip()
    assert json.loads(message.content[0].text) in ANSWERS
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    off = api.responses.create(**respond(reasoning={"effort": "none"}))
    assert [item.type for item in off.output] == ["message"]
    # what was thought is part of the state that the next response goes on from
    again = api.responses.create(**respond(previous_response_id=answer.id))
    assert again.usage.input_tokens_details.cached_tokens >= answer.usage.total_tokens


def test_a_response_streams_its_thoughts_then_its_answer(api):
    whole = api.responses.create(**respond())
    events = list(api.responses.create(**respond(), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    frame = [kind for kind in kinds if kind.count(".") == 1 or kind.startswith("response.output_item")]
    assert frame == [
        "response.created", "response.in_progress", "response.output_item.added", "response.output_item.done",
        "response.output_item.added", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    for number, word in enumerate(("reasoning_text", "output_text")):
        deltas = [event for event in events if event.type == f"response.{word}.delta"]
        (done,) = [event for event in events if event.type == f"response.{word}.done"]
        assert "".join(event.delta for event in deltas).strip() == done.text == whole.output[number].content[0].text
        assert {event.output_index for event in deltas} == {number}
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output_text == whole.output_text


def test_the_openai_package_gathers_a_streamed_response_with_thoughts(api):
    with api.responses.stream(**respond()) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert json.loads(final.output_text) in ANSWERS


def test_a_sessions_turn_keeps_both(thinker, api):
    with thinker.client as client:
        id = client.post("/v1/sessions", json={}).json()["id"]
        said = chat(api, {"session_id": id}).choices[0].message
        (turn,) = client.get(f"/v1/sessions/{id}").json()["turns"]
    assert turn["assistant"] == said.content
    assert turn["reasoning"] == said.reasoning_content


def test_ollamas_chat_has_thinking(thinker):
    options = {"num_predict": 400, "temperature": 1.0, "seed": 3, "top_p": 0.5}
    body = {"model": "thinker", "messages": ASKED, "options": options, "format": {"enum": list(ANSWERS)}}
    with thinker.client as client:
        message = client.post("/api/chat", json={**body, "stream": False}).json()["message"]
        assert json.loads(message["content"]) in ANSWERS
        assert message["thinking"].strip()
        lines = [json.loads(line)["message"] for line in client.post("/api/chat", json=body).text.splitlines()]
        assert "".join(line.get("thinking", "") for line in lines).strip() == message["thinking"]
        assert "".join(line["content"] for line in lines) == message["content"]
        off = client.post("/api/chat", json={**body, "stream": False, "think": False}).json()["message"]
        assert "thinking" not in off
