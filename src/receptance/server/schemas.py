"""What clients send, every number and length bounded. Unknown fields are ignored, as OpenAI's clients expect.

A list is given up at its first wrong item, and a mapping that is too long before any: an error for each of a million
items would keep the server busy for half a minute.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from receptance.engine.params import MAX_STOP_CHARS, MAX_STOPS

MANY, ENTRIES = 65_536, 8192  # items of a list, of a mapping; the server's own limits are lower


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > ENTRIES:
        raise ValueError(f"there are {len(value):,} entries, at most {ENTRIES:,} are allowed")
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]{1,128}$")]
StateName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]{0,128}$")]
ModelName = Annotated[str, StringConstraints(max_length=512)]
Text = Annotated[str, StringConstraints(max_length=64 << 20)]  # the server's own limits are lower
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=1 << 24)]
Ids = Annotated[list[TokenId], Field(max_length=4 << 20, fail_fast=True)]
Prompts = (
    Text
    | Ids
    | Annotated[list[Text], Field(max_length=MANY, fail_fast=True)]
    | Annotated[list[Ids], Field(max_length=MANY, fail_fast=True)]
)
Objects = Annotated[list[dict[str, Any]], Field(max_length=MANY, fail_fast=True)]
Bias = Annotated[
    dict[Annotated[str, StringConstraints(max_length=12)], float], BeforeValidator(_few), Field(max_length=ENTRIES)
]
Tags = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=100)]], Field(max_length=100, fail_fast=True)
]


class Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Fields):
    include_usage: bool = False


class StructuredOutputs(Fields):
    """One of the four, as vLLM has them; grammar is Lark's form."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    grammar: str | None = None


class Sampling(Fields):
    """OpenAI's sampling fields, and ours beside them."""

    model: ModelName | None = None
    max_tokens: Annotated[int, Field(ge=0, le=10**9)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10**9)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    penalty_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    logit_bias: Bias | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31)] | None = None
    state: StateName | None = None
    state_data: Text | None = None
    return_state: bool | None = None
    grammar: Text | None = None
    regex: Text | None = None
    structured_outputs: StructuredOutputs | None = None


class FunctionCall(Fields):
    name: Annotated[str, StringConstraints(max_length=256)]
    arguments: Text = "{}"


class ToolCall(Fields):
    id: Annotated[str, StringConstraints(max_length=256)] = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Objects | None = None
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MANY, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    reasoning_content: Text | None = None


class Function(Fields):
    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    name: str


class ToolChoice(Fields):
    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Fields):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MANY, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=10**9)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MANY, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, StringConstraints(max_length=32)] | None = None
    thinking: Literal["off", "fast", "on"] | None = None
    session_id: Name | None = None


class CompletionRequest(Sampling):
    prompt: Prompts = ""
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None


class EmbeddingRequest(Fields):
    model: ModelName | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    user: str | None = None


class TokenizeRequest(Fields):
    model: ModelName | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(max_length=MANY, fail_fast=True)] | None = None
    add_generation_prompt: bool = True


class DetokenizeRequest(Fields):
    model: ModelName | None = None
    tokens: Ids


class SessionRequest(Fields):
    model: ModelName | None = None
    title: Annotated[str, StringConstraints(max_length=1000)] = ""
    tags: Tags = []
    system: Text | None = None
    state: StateName = ""


class SessionPatch(Fields):
    title: Annotated[str, StringConstraints(max_length=1000)] | None = None
    tags: Tags | None = None


class ForkRequest(Fields):
    turn: Annotated[int, Field(ge=0, le=1 << 40)] | None = None


class RewindRequest(Fields):
    turn: Annotated[int, Field(ge=0, le=1 << 40)]


class ImportedTurn(Fields):
    user: Text
    assistant: Text
    raw: Text
    reasoning: Text | None = None
    prompt_tokens: Annotated[int, Field(ge=0, le=1 << 40)]
    completion_tokens: Annotated[int, Field(ge=0, le=1 << 40)]
    finish_reason: Annotated[str, StringConstraints(max_length=32)]
    created: Annotated[float, Field(ge=0, le=1e12)]


class ImportedSession(SessionRequest):
    turns: Annotated[list[ImportedTurn], Field(max_length=1_000_000, fail_fast=True)]


class ResponsesText(Fields):
    format: dict[str, Any] | None = None


class Reasoning(Fields):
    effort: Annotated[str, StringConstraints(max_length=32)] | None = None


class ResponsesRequest(Fields):
    model: ModelName | None = None
    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MANY, fail_fast=True)]
    instructions: Text | None = None
    previous_response_id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]{1,128}$")] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    store: bool = True
    stream: bool | None = None
    text: ResponsesText | None = None
    reasoning: Reasoning | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few), Field(max_length=ENTRIES)] | None = None


class OllamaMessage(Fields):
    role: Literal["system", "user", "assistant", "tool"]
    content: Text = ""


class OllamaRequest(Fields):
    model: ModelName
    stream: bool = True
    options: dict[str, Any] | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    system: Text | None = None


class OllamaChat(OllamaRequest):
    messages: Annotated[list[OllamaMessage], Field(max_length=MANY, fail_fast=True)]
    think: bool | str | None = None


class OllamaGenerate(OllamaRequest):
    prompt: Text = ""
    raw: bool = False
