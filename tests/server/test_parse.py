"""Replies taken apart as they come."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receptance.server.parse import ReplyParser


def parsed(text, thinks=True, calls=True, cuts=()):
    parser = ReplyParser(thinks, calls)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [piece for a, b in itertools.pairwise(edges) for piece in parser.push(text[a:b])] + parser.finish()
    assert "".join(p.text for p in pieces if p.kind == "content") == parser.content
    assert "".join(p.text for p in pieces if p.kind == "reasoning") == parser.reasoning
    return parser


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    "text, reasoning, content, calls",
    [
        (" Hello", "", "Hello", 0),
        (" <think>so\n</think>\nHello", "so\n", "Hello", 0),
        (" <think>\n</think>\nHello", "", "Hello", 0),
        (" <think>never ends", "never ends", "", 0),
        (" <thin", "", "<thin", 0),
        (f" Well {CALL}", "", "Well ", 1),
        (f" <think>hm</think>{CALL}{CALL}", "hm", "", 2),
        (" <tool_call>not json</tool_call>", "", "<tool_call>not json</tool_call>", 0),
        (" <tool_call>cut", "", "<tool_call>cut", 0),
        (' <tool_call>{"name": "f", "arguments": {}}', "", "", 1),
        (" a < b", "", "a < b", 0),
        ("", "", "", 0),
    ],
)
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_any_cut_of_a_reply_is_parsed_alike(text, reasoning, content, calls, cuts):
    parser = parsed(text, cuts=cuts)
    assert parser.reasoning == reasoning
    assert parser.content == content
    assert len(parser.calls) == calls


def test_a_call_is_openais():
    (call,) = parsed(CALL).calls
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"]) == {"x": 1}
    assert call["id"].startswith("call-")


def test_without_tools_and_thoughts_text_is_text():
    assert parsed(f" <think>x</think>{CALL}", thinks=False, calls=False).content == f"<think>x</think>{CALL}"
