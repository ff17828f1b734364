"""The real `openai` package against a real server."""

import asyncio
import json

import numpy as np
import openai
import pytest

import receptance as rc

STORY = [{"role": "user", "content": "Once upon a time, there was a fox."}]
MODEL = "rwkv7-stories"


@pytest.fixture(scope="module")
def api(server):
    with server.openai as api:
        yield api


def chat(api, **fields):
    return api.chat.completions.create(**{"model": MODEL, "messages": STORY, "max_tokens": 8, "seed": 1, **fields})


def test_models_are_listed(api):
    assert [model.id for model in api.models.list()] == [MODEL]
    assert api.models.retrieve(MODEL).owned_by == "receptance"


def test_a_chat_is_what_the_engine_writes(api, served):
    answer = chat(api, temperature=0.8, top_p=0.9)
    request = rc.Request(STORY[0]["content"], served.sampling)
    alone = served.engine.submit(request, max_tokens=8, seed=1, temperature=0.8, top_p=0.9).result()[0]
    choice = answer.choices[0]
    assert choice.message.content == alone.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens == len(alone.prompt_ids)
    assert answer.usage.total_tokens == 8 + len(alone.prompt_ids)


def test_a_stream_gives_the_role_first_then_the_same_text_then_the_reason_and_the_usage(api):
    whole = chat(api)
    chunks = list(chat(api, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_asking_a_stream_has_no_usage(api):
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chat(api, stream=True))


def test_streams_end_with_done(client):
    body = {"messages": STORY, "max_tokens": 1, "stream": True}
    text = client.post("/v1/chat/completions", json=body).text
    assert text.endswith("data: [DONE]\n\n")
    assert all(line.startswith("data: ") for line in text.split("\n") if line)


def test_several_choices_are_the_texts_of_following_seeds(api):
    three = chat(api, n=3, seed=5, temperature=1.0).choices
    assert [choice.index for choice in three] == [0, 1, 2]
    alone = [chat(api, seed=5 + i, temperature=1.0).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in three] == alone
    streamed = ["", "", ""]
    for chunk in chat(api, n=3, seed=5, temperature=1.0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == alone


def test_a_stop_string_ends_the_text_before_it(api):
    full = chat(api, max_tokens=12).choices[0].message.content
    word = full.split()[2]
    stopped = chat(api, max_tokens=12, stop=[word]).choices[0]
    assert stopped.message.content == full[: full.index(word)]
    assert stopped.finish_reason == "stop"


def test_log_probabilities_are_reported(api):
    found = chat(api, logprobs=True, top_logprobs=3, max_tokens=3, temperature=0).choices[0].logprobs.content
    assert len(found) == 3
    for token in found:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) >= 3
        assert token.logprob <= 0
    assert found[0].logprob == pytest.approx(max(top.logprob for top in found[0].top_logprobs), abs=3)


def test_a_biased_token_is_written_and_a_banned_one_is_not(api, served):
    token = served.tokenizer.encode(" fox")[0]
    biased = chat(api, logit_bias={str(token): 100}, max_tokens=2).choices[0].message.content
    assert biased == served.tokenizer.decode([token, token])
    first = served.tokenizer.encode(chat(api, temperature=0, max_tokens=1).choices[0].message.content)[0]
    other = chat(api, temperature=0, max_tokens=1, logit_bias={str(first): -100}).choices[0].message.content
    assert served.tokenizer.encode(other)[0] != first


def test_json_schema_is_followed(api):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    kind = {"type": "json_schema", "json_schema": {"name": "fox", "schema": schema, "strict": True}}
    choice = chat(api, response_format=kind, max_tokens=100).choices[0]
    value = json.loads(choice.message.content)
    assert set(value) == {"name", "age"}
    assert choice.finish_reason == "stop"


def test_json_object_begins_an_object(api):
    content = chat(api, response_format={"type": "json_object"}, max_tokens=10).choices[0].message.content
    assert content.startswith("{")


def test_regex_choice_and_lark_grammars(api):
    date = chat(api, extra_body={"regex": r"\d{4}-\d{2}"}).choices[0].message.content
    assert len(date) == 7
    assert date[4] == "-"
    one = chat(api, extra_body={"structured_outputs": {"choice": ["red fox", "blue owl"]}}).choices[0].message.content
    assert one in ("red fox", "blue owl")
    assert chat(api, extra_body={"grammar": 'start: "a" "b"'}).choices[0].message.content == "ab"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"hot": {"type": "boolean"}},
            "required": ["hot"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_tool_is_called_with_valid_arguments(api, choice):
    answer = chat(api, tools=[TOOL], tool_choice=choice, max_tokens=100).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    assert isinstance(json.loads(call.function.arguments)["hot"], bool)
    assert answer.message.content is None


def test_a_streamed_call_has_an_index_and_an_id(api):
    chunks = list(chat(api, tools=[TOOL], tool_choice="required", max_tokens=100, stream=True))
    calls = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert len(calls) == 1
    assert calls[0][0].index == 0
    assert calls[0][0].id
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_results_of_tools_are_read(api):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"hot": true}'}}
    messages = [
        *STORY,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "30 degrees"},
    ]
    short, long = chat(api).usage.prompt_tokens, chat(api, messages=messages, tools=[TOOL]).usage.prompt_tokens
    assert long > short + 20


def test_history_that_is_sent_again_is_not_read_again(api):
    first = chat(api, max_tokens=20)
    messages = [
        *STORY,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": " Then"},
    ]
    again = chat(api, messages=messages)
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_completions_take_text_and_ids_one_and_several(api, served):
    text = "The old king"
    one = api.completions.create(model=MODEL, prompt=text, max_tokens=6, seed=1)
    ids = [served.tokenizer.eos_id, *served.tokenizer.encode(text)]
    other = api.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=6, seed=1)
    assert one.choices[0].text == other.choices[0].text == other.choices[1].text
    assert [choice.index for choice in other.choices] == [0, 1]


def test_completions_echo_with_the_log_probabilities_of_the_prompt(api, served):
    text = "The old king went home."
    answer = api.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert answer.text == text
    ids = served.tokenizer.encode(text)
    scored = served.engine.score([([served.tokenizer.eos_id], ids)])[0]
    np.testing.assert_allclose(answer.logprobs.token_logprobs[1:], scored.logprobs, rtol=1e-5)


def test_completions_stream(api):
    whole = api.completions.create(model=MODEL, prompt=["The fox", "An owl"], max_tokens=6, seed=1)
    texts = ["", ""]
    for chunk in api.completions.create(model=MODEL, prompt=["The fox", "An owl"], max_tokens=6, seed=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_embeddings_are_the_engines(api, served):
    answer = api.embeddings.create(model=MODEL, input=["A dog ran.", "The king slept."])
    expected = served.engine.embed(["A dog ran.", "The king slept."])
    np.testing.assert_allclose([x.embedding for x in answer.data], expected, atol=1e-6)
    floats = api.embeddings.create(model=MODEL, input="A dog ran.", encoding_format="float")
    np.testing.assert_allclose(floats.data[0].embedding, expected[0], atol=1e-6)


def test_a_response_goes_on_from_an_earlier_one(api):
    first = api.responses.create(model=MODEL, input="The fox met a bear.", max_output_tokens=8)
    assert first.output_text
    second = api.responses.create(
        model=MODEL, input=" Then", max_output_tokens=4, previous_response_id=first.id, temperature=0
    )
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens
    text = "The fox met a bear." + first.output_text + " Then"
    whole = chat(api, messages=[{"role": "user", "content": text}], max_tokens=4, temperature=0)
    assert second.output_text == whole.choices[0].message.content
    assert api.responses.retrieve(first.id).output_text == first.output_text
    api.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        api.responses.create(model=MODEL, input=" Then", previous_response_id=first.id)
    # what went on from it still does
    assert api.responses.create(model=MODEL, input=" And", previous_response_id=second.id, max_output_tokens=2).id


def test_a_response_streams_as_named_events(api):
    with api.responses.stream(model=MODEL, input="The fox", max_output_tokens=5) as stream:
        kinds = [event.type for event in stream]
        final = stream._completed_response if hasattr(stream, "_completed_response") else None
    assert kinds[0] == "response.created"
    assert kinds.count("response.output_text.delta") >= 1
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert final is None or final.output_text


def test_the_async_client_runs_many_at_once(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
            asked = [
                api.chat.completions.create(model=MODEL, messages=STORY, max_tokens=6, seed=i, temperature=1.0)
                for i in range(24)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    together = asyncio.run(run())
    with server.openai as api:
        assert together[7] == chat(api, max_tokens=6, seed=7, temperature=1.0).choices[0].message.content
    assert len(set(together)) > 1


def test_errors_are_openais(api):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(api, model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(api, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="reads only text"):
        chat(api, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def test_tokenize_and_back(client, served):
    ids = client.post("/tokenize", json={"prompt": "The fox ran."}).json()["tokens"]
    assert ids == served.tokenizer.encode("The fox ran.")
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "The fox ran."


def test_ollama_chats_generates_and_lists(client):
    assert client.get("/api/tags").json()["models"][0]["name"] == MODEL
    options = {"num_predict": 5, "seed": 1}
    body = {"model": f"{MODEL}:latest", "messages": STORY, "options": options}
    lines = [json.loads(line) for line in client.post("/api/chat", json=body).text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    whole = client.post("/api/chat", json={**body, "stream": False}).json()
    assert whole["message"]["content"] == "".join(line["message"]["content"] for line in lines)
    assert whole["eval_count"] == 5
    body = {"model": MODEL, "prompt": "The fox", "stream": False, "options": options}
    assert client.post("/api/generate", json=body).json()["response"]
