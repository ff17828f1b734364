"""A chat request as what the engine is asked: prompt, sampling, grammar."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from receptance.engine.params import SamplingParams
from receptance.engine.request import Grammar
from receptance.errors import ReceptanceError
from receptance.server.config import LimitConfig
from receptance.server.errors import bad
from receptance.server.parse import CLOSE_CALL, OPEN_CALL
from receptance.server.schemas import ChatRequest, Message, ResponseFormat, Sampling, Tool
from receptance.server.served import ServedModel
from receptance.tokenizers import Thinking

EFFORTS: Mapping[str, Thinking] = {"none": "off", "minimal": "fast", "low": "on", "medium": "on", "high": "on"}
SAMPLER_FIELDS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "penalty_decay",
    "ignore_eos",
)  # fmt: skip


# Sampling -------------------------------------------------------------------------------------------------------------


def sampling(
    request: Sampling,
    defaults: SamplingParams,
    limits: LimitConfig,
    vocab: int,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """Raises ApiError naming the field."""
    given: dict[str, Any] = {name: getattr(request, name) for name in SAMPLER_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if request.top_k is not None:
        given["top_k"] = max(request.top_k, 0)  # -1 means all, for vLLM's clients
    if request.seed is not None:
        given["seed"] = request.seed % 2**64
    if request.stop is not None:
        given["stop"] = request.stop
    if request.logit_bias:
        given["logit_bias"] = _bias(request.logit_bias, limits.logit_bias, vocab)
    if max_tokens is not None:
        if max_tokens > limits.max_tokens:
            raise bad(f"max_tokens is {max_tokens}, at most {limits.max_tokens} are allowed", "max_tokens")
        given["max_tokens"] = max_tokens
    else:
        given["max_tokens"] = min(defaults.max_tokens, limits.max_tokens)
    if request.n is not None and request.n > limits.n:
        raise bad(f"n is {request.n}, at most {limits.n} is allowed", "n")
    try:
        return replace(defaults, logprobs=logprobs, **given)
    except ReceptanceError as error:
        raise bad(str(error)) from None


def _bias(bias: Mapping[str, float], most: int, vocab: int) -> dict[int, float]:
    if len(bias) > most:
        raise bad(f"logit_bias has {len(bias)} entries, at most {most} are allowed", "logit_bias")
    values = {}
    for token, value in bias.items():
        if not token.isascii() or not token.isdigit() or int(token) >= vocab:
            raise bad(f"logit_bias has the key {token!r}, expected a token id from 0 to {vocab - 1}", "logit_bias")
        values[int(token)] = float("-inf") if value <= -100 else value  # OpenAI: -100 bans a token
    return values


# Grammars -------------------------------------------------------------------------------------------------------------


def check_schema(schema: object, limits: LimitConfig, param: str) -> str:
    """The JSON text of a schema of tolerable size and depth."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise bad("the JSON schema is not valid JSON", param) from None
    if not isinstance(schema, dict | bool):
        raise bad("a JSON schema is an object", param)
    level: list[Any] = [schema]
    for _ in range(limits.schema_depth):
        level = [x for value in level for x in _children(value)]
        if not level:
            break
    else:
        raise bad(f"the JSON schema is nested more than {limits.schema_depth} deep", param)
    text = json.dumps(schema)
    if len(text) > limits.schema_bytes:
        raise bad(f"the JSON schema has {len(text):,} bytes, at most {limits.schema_bytes:,} are allowed", param)
    return text


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


@dataclass(frozen=True)
class Form:
    """What a reply must be: the right side of a rule in Lark's form, with the rules it needs."""

    body: str
    rules: str = ""
    plain: Grammar | None = None  # the same, where nothing comes before or after it

    def after(self, prefix: str) -> Grammar:
        """The grammar of the reply, whose first part is `prefix` (in Lark's form, or empty)."""
        if not prefix and self.plain is not None:
            return self.plain
        return Grammar(lark=f"start: {prefix} {self.body}\n{self.rules}")


def form_of(request: Sampling, response_format: ResponseFormat | None, limits: LimitConfig) -> Form | None:
    """From response_format, structured_outputs, grammar or regex; at most one of them. Raises ApiError."""
    found: list[Form] = []
    if response_format is not None and response_format.type != "text":
        schema: object = {"type": "object"}
        if response_format.type == "json_schema":
            if response_format.json_schema is None or response_format.json_schema.schema_ is None:
                raise bad("response_format.json_schema needs a schema", "response_format")
            schema = response_format.json_schema.schema_
        found.append(json_form(schema, limits, "response_format"))
    asked = request.structured_outputs
    if asked is not None and asked.json_ is not None:
        found.append(json_form(asked.json_, limits, "structured_outputs"))
    if asked is not None and asked.choice is not None:
        body = " | ".join(json.dumps(choice) for choice in asked.choice)
        found.append(Form("choice", f"choice: {_small(body, limits)}"))
    for regex in (request.regex, asked.regex if asked else None):
        if regex is not None:
            found.append(Form(f"/{_small(regex, limits).replace('/', chr(92) + '/')}/", plain=Grammar(regex=regex)))
    for lark in (request.grammar, asked.grammar if asked else None):
        if lark is not None:
            found.append(Form("", plain=Grammar(lark=_small(lark, limits))))
    if len(found) > 1:
        raise bad("give one of response_format, structured_outputs, grammar and regex")
    return found[0] if found else None


def _small(text: str, limits: LimitConfig) -> str:
    if not text or len(text) > limits.schema_bytes:
        raise bad(f"a grammar has {len(text):,} characters, expected 1 to {limits.schema_bytes:,}")
    return text


def json_form(schema: object, limits: LimitConfig, param: str) -> Form:
    text = check_schema(schema, limits, param)
    return Form("value", f"value: %json {_compact(text)}", Grammar(json_schema=text))


def _compact(schema: str) -> str:
    """The schema for use inside a grammar, without blanks that JSON allows without end."""
    value = json.loads(schema)
    if not isinstance(value, dict):
        return schema
    return json.dumps({"x-guidance": {"whitespace_flexible": False}, **value})


# Chats ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """messages: with the template's three roles. prefix: of the reply, already in the prompt."""

    messages: list[dict[str, str]]
    user: str
    thinking: Thinking
    calls: bool
    prefix: str
    grammar: Grammar | None


def content_text(content: str | Sequence[Mapping[str, Any]] | None, param: str = "messages") -> str:
    """The text of a message's content. Raises ApiError for pictures and sound."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise bad(f"a message has content of type {str(kind)[:100]!r}; this model reads only text", param)
        parts.append(text)
    return "\n".join(parts)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """With the roles that templates have; calls and results of tools as text."""
    plain = []
    for message in messages:
        text = content_text(message.content)
        if message.role in ("system", "developer"):
            plain.append({"role": "system", "content": text})
        elif message.role in ("tool", "function"):
            plain.append({"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"})
        elif message.role == "assistant":
            calls = [
                f"{OPEN_CALL}\n{call_text(c.function.model_dump())}\n{CLOSE_CALL}" for c in message.tool_calls or []
            ]
            plain.append({"role": "assistant", "content": "\n".join(x for x in (text, *calls) if x)})
        else:
            plain.append({"role": "user", "content": text})
    return plain


def call_text(function: Mapping[str, str]) -> str:
    """A call as the model writes it. function: OpenAI's, whose arguments are JSON in a string."""
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = function["arguments"]
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def tool_prompt(tools: Sequence[Tool]) -> str:
    """As Hermes and Qwen models were taught. That released RWKV chat models know this form is not checked."""
    listing = "\n".join(
        json.dumps({"type": "function", "function": tool.function.model_dump(exclude_none=True)}, ensure_ascii=False)
        for tool in tools
    )
    return (
        "You may call one or more functions to assist with the user query.\n"
        f"You are provided with function signatures within <tools></tools> tags:\n<tools>\n{listing}\n</tools>\n"
        "For each function call, return a json object with function name and arguments within "
        f'{OPEN_CALL}{CLOSE_CALL} tags:\n{OPEN_CALL}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n'
        f"{CLOSE_CALL}"
    )


def make_chat(request: ChatRequest, model: ServedModel, limits: LimitConfig, system: str | None) -> Chat:
    """system: put first unless the request has a system message. Raises ApiError."""
    if len(request.messages) > limits.messages:
        raise bad(f"there are {len(request.messages)} messages, at most {limits.messages} are allowed", "messages")
    messages = plain_messages(request.messages)
    user = "\n".join(
        content_text(m.content) for m in request.messages if m.role not in ("system", "developer", "assistant")
    )
    if system and not any(m["role"] == "system" for m in messages):
        messages.insert(0, {"role": "system", "content": system})
    tools = request.tools or []
    choice = request.tool_choice or ("auto" if tools else "none")
    form = form_of(request, request.response_format, limits)
    if len(tools) > limits.tools:
        raise bad(f"there are {len(tools)} tools, at most {limits.tools} are allowed", "tools")
    if choice != "none" and tools:
        for tool in tools:
            check_schema(tool.function.parameters or {}, limits, "tools")
        described = tool_prompt(tools)
        if messages and messages[0]["role"] == "system":
            messages[0] = {"role": "system", "content": f"{messages[0]['content']}\n{described}"}
        else:
            messages.insert(0, {"role": "system", "content": described})
    if choice not in ("none", "auto"):
        if form is not None:
            raise bad("a forced call of a tool and a grammar exclude each other", "tool_choice")
        form = forced_call(tools, None if choice == "required" else choice.function.name, limits)  # type: ignore[union-attr]
    thinking = thinking_of(request, model)
    prefix = model.template.reply_prefix(thinking)
    grammar = None
    if form is not None and not form.body:
        grammar = form.plain
    elif form is not None:
        blank = '" "' if model.template.assistant else ""
        before = {"off": blank, "fast": r'">\n"', "on": r"/>[^<]*<\/think>\n*/"}[thinking]
        grammar = form.after(before)
    return Chat(messages, user, thinking, bool(tools) and choice != "none", prefix, grammar)


def thinking_of(request: ChatRequest, model: ServedModel) -> Thinking:
    if request.thinking is not None:
        if request.thinking != "off" and not model.template.thinks:
            raise bad(f"the model's template {model.template.name!r} has no thinking mode", "thinking")
        return request.thinking
    if request.reasoning_effort is not None and model.template.thinks:
        return EFFORTS.get(request.reasoning_effort, "on")
    return model.thinking


def forced_call(tools: Sequence[Tool], name: str | None, limits: LimitConfig) -> Form:
    """A reply that is the call of one of the tools."""
    chosen = [tool for tool in tools if name in (None, tool.function.name)]
    if not chosen:
        what = (
            f"names {name[:200]!r}, which is not among the tools" if name else "is 'required', but there are no tools"
        )
        raise bad(f"tool_choice {what}", "tool_choice")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in chosen
    ]
    rules = [f"call{i}: %json {_compact(json.dumps(call))}" for i, call in enumerate(calls)]
    for rule in rules:
        _small(rule, limits)
    names = " | ".join(f"call{i}" for i in range(len(calls)))
    body = f"{json.dumps(OPEN_CALL + chr(10))} call {json.dumps(chr(10) + CLOSE_CALL)}"
    return Form(body, "\n".join([f"call: {names}", *rules]))
