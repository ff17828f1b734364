"""`return_state`: the client holds the state, and the server keeps nothing of the conversation."""

import base64
import json

import pytest

from receptance.server import codec

FIRST = [{"role": "user", "content": "The fox met a bear."}]
NEXT = [{"role": "user", "content": " Then"}]


def ask(client, messages, **fields):
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def text(choice):
    return choice["message"]["content"]


def whole(client, first, **fields):
    """The same conversation, sent as one text."""
    message = {"role": "user", "content": FIRST[0]["content"] + text(first) + NEXT[0]["content"]}
    return text(ask(client, [message], **fields)[0])


def test_a_chat_goes_on_from_the_state_that_the_client_holds(client):
    (first,) = ask(client, FIRST, return_state=True)
    (second,) = ask(client, NEXT, state_data=first["state_data"], return_state=True)
    assert text(second) == whole(client, first)
    assert second["state_data"] != first["state_data"]
    assert "state_data" not in ask(client, FIRST)[0]
    # the state was not changed by going on from it
    assert text(ask(client, NEXT, state_data=first["state_data"])[0]) == text(second)


def test_each_of_several_texts_has_its_state_and_a_stream_ends_with_it(client, served):
    (first,) = ask(client, FIRST, return_state=True)
    several = ask(client, FIRST, return_state=True, n=3, temperature=1.0, seed=5)
    for choice in several:
        assert text(ask(client, NEXT, state_data=choice["state_data"])[0]) == whole(client, choice)
    body = {"messages": FIRST, "max_tokens": 8, "temperature": 0, "return_state": True, "stream": True}
    lines = client.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    last = json.loads(lines[-2].removeprefix("data: "))["choices"][0]
    assert last["finish_reason"] == "length"
    one, other = (dict(codec.decode(base64.b64decode(x["state_data"]), served.model).items()) for x in (last, first))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_document_is_read_once_and_asked_many_times(client, served):
    """max_tokens 0: only the state is wanted. It holds all that was read, as a file that other verbs take too."""
    document = "The old king went to the sea with a fox. " * 20
    body = {"prompt": document, "max_tokens": 0, "echo": True, "return_state": True}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    for question in (" The fox said", " Then the king"):
        short = {"prompt": question, "max_tokens": 6, "temperature": 0}
        answer = client.post("/v1/completions", json={**short, "state_data": choice["state_data"]}).json()
        alone = client.post("/v1/completions", json={**short, "prompt": document + question}).json()
        assert answer["choices"][0]["text"] == alone["choices"][0]["text"]
        assert answer["usage"]["prompt_tokens"] == len(served.tokenizer.encode(question))
    assert codec.decode(base64.b64decode(choice["state_data"]), served.model).batch == 1


def test_what_is_none_of_this_models_states_is_refused(client, served):
    good = ask(client, FIRST, return_state=True)[0]["state_data"]
    data = bytearray(base64.b64decode(good))
    state = codec.decode(bytes(data), served.model)
    data[-1000] ^= 1

    class Other:
        fingerprint = "0" * 32

    def with_nan():
        arrays = {name: x.copy() for name, x in state.items()}
        arrays["wkv"][0, 0, 0, 0, 0] = float("nan")
        return arrays

    def coded(x):
        return base64.b64encode(x).decode()

    wrong = {
        "no base64": "?", "empty": "", "short": coded(b"x"), "cut": good[:-8], "flipped": coded(bytes(data)),
        "foreign": coded(codec.encode(state, Other)), "nan": coded(codec.encode(with_nan(), served.model)),
        "rows": coded(codec.encode({n: x.repeat(2, 1) for n, x in state.items()}, served.model)),
        "nothing": coded(codec.encode(None, served.model)), "text": "x" * 1000, "letters": "é",
    }  # fmt: skip
    for path, prompt in (("/v1/chat/completions", {"messages": NEXT}), ("/v1/completions", {"prompt": " Then"})):
        for name, value in wrong.items():
            answer = client.post(path, json={**prompt, "max_tokens": 2, "state_data": value})
            assert answer.status_code == 400, name
            assert answer.json()["error"]["param"] == "state_data", name


@pytest.mark.parametrize("with_session", [True, False])
def test_a_request_begins_with_one_state(client, with_session):
    good = ask(client, FIRST, return_state=True)[0]["state_data"]
    more = {"state": "fox"}
    if with_session:
        more = {"session_id": client.post("/v1/sessions", json={}).json()["id"]}
    answer = client.post("/v1/chat/completions", json={"messages": NEXT, "state_data": good, **more})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "state_data"
