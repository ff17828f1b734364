from hypothesis import given
from hypothesis import strategies as st

from receptance.engine.speculation import LENGTHS, LONGEST, NGRAM, PROBE_EVERY, STEPS, PromptLookup, Record, Worth


def test_what_followed_before_is_guessed_again() -> None:
    drafts = PromptLookup().start([1, 2, 3, 4, 5, 6, 9, 2, 3, 4])
    assert drafts.evidence() == 3
    assert drafts.propose(2) == [5, 6]
    drafts.add(7)
    assert drafts.evidence() == 0


@given(st.lists(st.integers(0, 1), max_size=40), st.integers(1, 20))
def test_guesses_are_the_text_after_the_last_equal_place(tokens: list[int], limit: int) -> None:
    drafts = PromptLookup().start(tokens)
    places = [i for i in range(NGRAM, len(tokens)) if tokens[i - NGRAM : i] == tokens[-NGRAM:]]
    if not places:
        assert drafts.evidence() == 0
        return
    place, text = places[-1], list(tokens)
    for _ in range(limit):
        text.append(text[place])
        place += 1
    assert drafts.propose(limit) == text[len(tokens) :]
    same = next((n for n in range(1, places[-1] + 1) if tokens[places[-1] - n] != tokens[-n]), places[-1] + 1) - 1
    assert drafts.evidence() == max(step for step in STEPS if step <= same)


def test_a_draft_is_made_where_it_pays_and_only_there() -> None:
    worth = Worth()
    for rows, seconds in ((1, 1.0), (4, 1.6), (8, 2.4), (16, 4.0)):
        worth.measured(rows, seconds)
    assert worth.length(0.99, 1) == LENGTHS[-1]
    assert worth.length(0.6, 1) in LENGTHS[:2]
    assert worth.length(0.2, 1) == 0
    worth = Worth()
    for rows in (1, 4, 8, 16):
        worth.measured(rows, float(rows))  # rows cost as much as calls: nothing can pay
    assert worth.length(1.0, 1) == 0


def test_guesses_that_fail_stop_but_are_tried_now_and_then() -> None:
    worth, record = Worth(), Record()
    for rows, seconds in ((1, 1.0), (4, 1.6), (8, 2.4), (16, 4.0)):
        worth.measured(rows, seconds)
    drafted = 0
    for _ in range(20 * PROBE_EVERY):
        length = record.wanted(worth, LONGEST, 1)
        if length:
            record.checked(LONGEST, length, 0)
            drafted += 1
    assert 15 <= drafted <= 30
    for _ in range(10):
        record.checked(LONGEST, 3, 3)
    assert record.wanted(worth, LONGEST, 1) > 0
    assert record.wanted(worth, 0, 1) == 0
