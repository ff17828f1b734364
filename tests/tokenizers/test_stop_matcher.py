import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receptance.errors import TokenizerError
from receptance.tokenizers import StopMatcher

LETTERS = st.text("ab\n", max_size=12)


def run(stop, pieces):
    matcher = StopMatcher(stop)
    given_out = [matcher.push(piece) for piece in pieces]
    return given_out, matcher.finish(), matcher.matched


def expected(stop, text):
    """The definition, letter by letter: the first end of a stop string; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [each for each in stop if text[:end].endswith(each)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.lists(LETTERS, max_size=6))
def test_any_split_gives_the_text_before_the_first_stop(stop, pieces):
    given_out, rest, matched = run(stop, pieces)
    text, first = expected(stop, "".join(pieces))
    assert "".join(given_out) + rest == text
    assert matched == first
    shown = ""
    for n, piece in enumerate(
        given_out, 1
    ):  # what was shown never has to be taken back, and no more is held than needed
        shown += piece
        seen, _ = expected(stop, "".join(pieces[:n]))
        assert seen.startswith(shown)
        held = seen[len(shown) :]
        assert not held or any(each.startswith(held) for each in stop)


def test_beginning_of_a_stop_string_is_held_until_it_is_clear():
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(piece) for piece in [" Hi.", "\n", "\nUs", "ual.", "\n\nUser", ": x"]] == [
        " Hi.", "", "", "\n\nUsual.", "", "",
    ]  # fmt: skip
    assert matcher.matched == "\n\nUser:"
    assert matcher.push("more") == matcher.finish() == ""


def test_the_end_of_the_stream_releases_what_was_held():
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("done\n") == "done"
    assert matcher.finish() == "\n"
    assert matcher.matched is None


def test_without_stop_strings_everything_passes():
    assert run([], ["a", "", "b"]) == (["a", "", "b"], "", None)


def test_empty_stop_string_is_refused():
    with pytest.raises(TokenizerError, match="stop string is empty"):
        StopMatcher(["x", ""])
