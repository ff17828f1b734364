from array import array
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from receptance.engine.state_cache import Entry, StateCache, common_prefix

PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(lambda ids: array("i", ids))  # as the engine has them


def entry(tokens: "array[int]", *, logits: Any = "logits", nbytes: int = 1) -> Entry:
    return Entry(len(tokens), tuple(tokens), logits, nbytes)


@given(PATHS, PATHS)
def test_common_prefix_is_the_longest(a: "array[int]", b: "array[int]") -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, "persona"]), PATHS, st.booleans())), st.lists(PATHS))
def test_the_tree_finds_what_a_plain_search_finds(
    kept: list[tuple[str | None, "array[int]", bool]], asked: list["array[int]"]
) -> None:
    cache, plain = StateCache(10**6), dict[tuple[str | None, tuple[int, ...]], bool]()
    for root, tokens, has_logits in kept:
        cache.add(root, tokens, entry(tokens, logits="logits" if has_logits else None))
        plain[root, tuple(tokens)] = has_logits or plain.get((root, tuple(tokens)), False)
    assert len(cache) == cache.nbytes == len(plain)
    prefixes = {(root, tokens[:n]) for root, tokens in plain for n in range(1, len(tokens) + 1)}
    assert cache.tokens == len(prefixes)  # what is common is held once
    for tokens in asked + [tokens for _, tokens, _ in kept]:
        for root in (None, "persona"):
            fitting = [
                n for n in range(1, len(tokens) + 1)
                if (root, tuple(tokens[:n])) in plain and (n < len(tokens) or plain[root, tuple(tokens)])
            ]  # fmt: skip
            found = cache.find(root, tokens)
            assert (found.length if found else 0) == max(fitting, default=0)
            assert found is None or found.state == tuple(tokens[: found.length])


@settings(deadline=None)
@given(st.lists(PATHS, max_size=30))
def test_the_least_recently_used_go_first_and_the_tree_shrinks(paths: list["array[int]"]) -> None:
    cache = StateCache(5, token_bytes=0)
    order: list[tuple[int, ...]] = []
    for tokens in paths:
        cache.add(None, tokens, entry(tokens))
        order = [*(x for x in order if x != tuple(tokens)), tuple(tokens)][-5:]
    assert cache.nbytes <= 5
    assert {node.entry.state for node in cache._used if node.entry} == set(order)
    nodes = [cache._roots[None]] if cache._roots else []
    count = tokens = 0
    while nodes:
        node = nodes.pop()
        count += 1
        nodes += node.children.values()
        tokens += len(node.edge)
        assert node.parent is None or node.entry is not None or len(node.children) > 1
    assert count <= 2 * 5 + 1
    assert cache.tokens == tokens


def test_tokens_count_too() -> None:
    """A state of a byte after a thousand tokens is not small."""
    cache = StateCache(3 * 4 * 1000)
    for i in range(5):
        cache.add(None, [i] * 999, entry([i] * 999))
    assert [cache.find(None, [i] * 1000) is not None for i in range(5)] == [False, False, True, True, True]
    assert cache.tokens == 3 * 999
    cache.add(None, [9] * 3001, entry([9] * 3001))
    assert len(cache) == 3


def test_a_state_of_its_own_tree_can_be_dropped() -> None:
    cache = StateCache(1000)
    cache.add("persona", [1, 2], entry([1, 2]))
    cache.add(None, [1, 2], entry([1, 2]))
    cache.drop_root("persona")
    assert cache.find("persona", [1, 2, 3]) is None
    assert cache.find(None, [1, 2, 3]) is not None
    assert cache.nbytes == 1
    assert cache.tokens == 2


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    cache = StateCache(10)
    cache.add(None, [1], entry([1], nbytes=11))
    assert len(cache) == 0
