"""Clients of other libraries, where they are installed, and the commands of the documentation."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TEXT = "Once upon a time, there was a fox"
DOCS = Path(__file__).resolve().parents[2] / "docs/server.md"


def plain(client, **fields):
    body = {"messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": 8, **fields}
    return client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]


def test_langchain_chats_streams_and_reads_structured_answers(server, client):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="rwkv7-stories", temperature=0, max_tokens=8, max_retries=0
    )
    expected = plain(client)["content"]
    answer = chat.invoke(TEXT)
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in chat.stream(TEXT)) == expected
    schema = {"title": "Answer", "type": "object", "properties": {"who": {"enum": ["fox", "bear"]}},
              "required": ["who"], "additionalProperties": False}  # fmt: skip
    longer = chat.model_copy(update={"max_tokens": 60})
    assert longer.with_structured_output(schema, method="json_schema").invoke(TEXT)["who"] in ("fox", "bear")
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    (call,) = longer.bind_tools([tool], tool_choice="pick").invoke(TEXT).tool_calls
    assert call["name"] == "pick"
    assert call["args"]["who"] in ("fox", "bear")
    embeddings = langchain.OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="rwkv7-stories", check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_query("The fox")) == len(embeddings.embed_documents(["a", "b"])[1]) > 10


def test_litellm_chats_streams_and_embeds(server, client):
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch its list of prices
    litellm = pytest.importorskip("litellm")
    common = {
        "model": "openai/rwkv7-stories", "api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0,
        "max_tokens": 8, "messages": [{"role": "user", "content": TEXT}],
    }  # fmt: skip
    expected = plain(client)["content"]
    answer = litellm.completion(**common)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == 8
    streamed = litellm.completion(**common, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
    vector = litellm.embedding(
        model="openai/rwkv7-stories", input=["The fox"], api_base=f"{server.url}/v1", api_key="none"
    )
    assert len(vector.data[0]["embedding"]) > 10
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**common, "temperature": 0, "n": 99})


def test_ollamas_own_package_chats_streams_and_lists(server, client):
    ollama = pytest.importorskip("ollama", reason="needs ollama")
    api = ollama.Client(host=server.url)
    expected = plain(client)["content"]
    asked = {"model": "rwkv7-stories", "messages": [{"role": "user", "content": TEXT}]}
    options = {"temperature": 0, "num_predict": 8}
    answer = api.chat(**asked, options=options)
    assert answer.message.content == expected
    assert answer.eval_count == 8
    assert answer.done_reason == "length"
    streamed = list(api.chat(**asked, options=options, stream=True))
    assert "".join(part.message.content for part in streamed) == expected
    assert [part.done for part in streamed] == [False] * (len(streamed) - 1) + [True]
    schema = {"type": "object", "properties": {"who": {"enum": ["fox", "bear"]}}, "required": ["who"],
              "additionalProperties": False}  # fmt: skip
    shaped = api.chat(**asked, options={**options, "num_predict": 60}, format=schema)
    assert json.loads(shaped.message.content)["who"] in ("fox", "bear")
    body = {"prompt": TEXT, "temperature": 0, "max_tokens": 8}
    text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert api.generate(model="rwkv7-stories", prompt=TEXT, options=options).response == text
    assert [model.model for model in api.list().models] == ["rwkv7-stories"]
    with pytest.raises(ollama.ResponseError, match="there is no model"):
        api.chat(model="llama", messages=asked["messages"])


def test_the_curl_commands_of_the_documentation_work(server, client):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.S)
    commands = [c for block in blocks for c in re.findall(r"curl .*?(?:[^\\]\n|\Z)", block + "\n", re.S)]
    assert len(commands) >= 3
    for command in commands:
        id = client.post("/v1/sessions", json={}).json()["id"]
        here = command.replace("http://127.0.0.1:8000", server.url).replace("sess-…", id)
        done = subprocess.run(["sh", "-c", f"{here.strip()} --fail-with-body -sS"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"object":' in done.stdout
