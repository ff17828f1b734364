"""The page in a headless browser, against a server that misbehaves on demand and sends the strictest content policy."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from fake_server import FakeServer

expect: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright").expect
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def settled(page: Any, turns: int) -> None:
    expect(page.locator("section.turn[id]")).to_have_count(turns)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def chat_bodies(fake: FakeServer) -> list[dict[str, Any]]:
    return [body for method, path, body in fake.requests if path == "/v1/chat/completions"]


def calls(fake: FakeServer, method: str) -> list[str]:
    return [path for verb, path, _ in fake.requests if verb == method]


@pytest.fixture
def told(fake: FakeServer) -> dict[str, Any]:
    """A chat of three turns."""
    session = fake.session(title="Three turns")
    for i in range(3):
        fake.turn(session, f"question {i}", f"answer {i}")
    return session


def test_a_first_message_makes_a_chat_and_shows_the_answer_with_its_speed(fake: FakeServer, open_page: Any) -> None:
    page = open_page(fake.url)
    say(page, "Tell me about a fox")
    settled(page, 1)
    expect(page.get_by_role("article", name="Answer").locator("strong")).to_have_text("fixed")
    expect(page.get_by_role("button", name=re.compile(r"tok.s . first after \d+ ms . \d+ tokens"))).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_text("Tell me about a fox")
    (body,) = chat_bodies(fake)
    assert body["messages"] == [{"role": "user", "content": "Tell me about a fox"}]
    assert body["session_id"] == "s-0001"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    page.reload()
    settled(page, 1)
    expect(page.get_by_role("button", name=re.compile("tok.s"))).to_be_visible()  # the speed survives too


def test_a_second_message_sends_only_itself(fake: FakeServer, open_page: Any, told: dict[str, Any]) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    settled(page, 3)
    say(page, "and then?")
    settled(page, 4)
    assert chat_bodies(fake)[-1]["messages"] == [{"role": "user", "content": "and then?"}]


def test_text_appears_while_it_streams_and_stop_keeps_the_message(fake: FakeServer, open_page: Any) -> None:
    fake.default, fake.pause = "word " * 400, 0.02
    page = open_page(fake.url)
    say(page, "A long one")
    answer = page.get_by_role("article", name="Answer")
    expect(answer).to_contain_text("word word")
    expect(answer).to_contain_text(re.compile("tok.s"))
    page.keyboard.press("Escape")
    expect(answer).to_contain_text("Stopped. This turn is not part of the chat.")
    expect(answer).to_contain_text("word word")
    answer.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Message", exact=True)).to_have_value("A long one")


def test_answering_again_rewinds_the_last_turn_and_says_it_again(
    fake: FakeServer, open_page: Any, told: dict[str, Any]
) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    settled(page, 3)
    fake.answers["question 2"] = "quite another answer"
    page.get_by_role("button", name="Again").click()
    expect(page.locator("#turn-2")).to_contain_text("quite another answer")
    settled(page, 3)
    assert calls(fake, "POST")[-2:] == ["/v1/sessions/s-0001/rewind", "/v1/chat/completions"]
    assert [turn["user"] for turn in told["turns"]] == ["question 0", "question 1", "question 2"]


def test_an_edited_message_replaces_everything_after_it(fake: FakeServer, open_page: Any, told: dict[str, Any]) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    page.locator("#turn-1 .user").hover()
    page.locator("#turn-1").get_by_role("button", name="Edit").click()
    expect(page.locator(".editor")).to_contain_text("Sending forgets 1 later turn; a fork keeps it.")
    page.get_by_label("Edit the message").fill("a better question")
    page.locator(".editor").get_by_role("button", name="Send", exact=True).click()
    settled(page, 2)
    assert [turn["user"] for turn in told["turns"]] == ["question 0", "a better question"]


def test_an_edit_sent_in_a_fork_leaves_the_chat_as_it_was(
    fake: FakeServer, open_page: Any, told: dict[str, Any]
) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    page.locator("#turn-1 .user").hover()
    page.locator("#turn-1").get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("another way")
    page.get_by_role("button", name="Send in a fork").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("another way")
    settled(page, 2)
    assert len(told["turns"]) == 3
    fork = fake.sessions["s-0002"]
    assert [turn["user"] for turn in fork["turns"]] == ["question 0", "another way"]
    assert fork["parent"] == {"id": "s-0001", "turn": 1}


def test_branches_are_drawn_and_lead_to_their_turns(fake: FakeServer, open_page: Any, told: dict[str, Any]) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    page.locator("#turn-0 .answer").hover()
    page.locator("#turn-0").get_by_role("button", name="Fork here").click()
    expect(page.locator(".origin")).to_have_text("Forked after 1 turn of Three turns")
    say(page, "the other way")
    settled(page, 2)
    page.get_by_role("button", name="Branches").click()
    expect(page.locator(".tree")).to_contain_text("2 branches")
    expect(page.locator(".graph circle")).to_have_count(4)  # three turns and the fork's own one
    expect(page.locator(".graph circle.on")).to_have_count(2)  # what this chat holds
    page.locator(".graph").get_by_role("button", name="question 2").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Three turns")
    expect(page.locator("#turn-2")).to_be_in_viewport()


def test_a_branch_whose_parent_was_rewound_keeps_its_own_turns(
    fake: FakeServer, open_page: Any, told: dict[str, Any]
) -> None:
    fork = fake.session(title="Fork", parent={"id": told["id"], "turn": 3}, turns=json.loads(json.dumps(told["turns"])))
    del told["turns"][1:]
    fake.turn(told, "quite different", "yes")
    page = open_page(f"{fake.url}/#/s/{fork['id']}")
    page.get_by_role("button", name="Branches").click()
    expect(page.locator(".graph circle")).to_have_count(4)
    expect(page.locator(".graph circle.on")).to_have_count(3)


def test_chats_are_renamed_tagged_and_found(fake: FakeServer, open_page: Any, told: dict[str, Any]) -> None:
    fake.session(title="Something else")
    page = open_page(fake.url)
    row = page.get_by_role("listitem").filter(has_text="Three turns")
    row.hover()
    row.get_by_role("button", name="More about").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.get_by_label("Title").fill("The <b>best</b> chat")
    page.keyboard.press("Enter")
    row = page.get_by_role("listitem").filter(has_text="The <b>best</b> chat")
    row.hover()
    row.get_by_role("button", name="More about").click()
    page.get_by_role("menuitem", name="Tags").click()
    page.get_by_label("Tags, separated by commas").fill("sea, fox")
    page.keyboard.press("Enter")
    expect(row).to_contain_text("fox")
    assert told["title"] == "The <b>best</b> chat"
    assert told["tags"] == ["sea", "fox"]
    page.get_by_role("group", name="Filter by tag").get_by_role("button", name="fox").click()
    expect(page.locator(".session")).to_have_count(1)
    page.get_by_role("group", name="Filter by tag").get_by_role("button", name="fox").click()
    page.get_by_label("Find a chat").fill("some els")
    expect(page.locator(".session")).to_have_count(1)
    expect(page.locator(".session")).to_contain_text("Something else")


def test_a_deleted_chat_can_be_brought_back_for_a_while(fake: FakeServer, open_page: Any, told: dict[str, Any]) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    settled(page, 3)

    def delete() -> None:
        page.locator(".session").hover()
        page.get_by_role("button", name="More about").click()
        page.get_by_role("menuitem", name="Delete").click()
        expect(page.locator(".session")).to_have_count(0)

    delete()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".session")).to_have_count(1)
    assert told["id"] in fake.sessions
    delete()
    page.goto("about:blank")  # leaving the page does what was promised
    page.wait_for_timeout(300)
    assert told["id"] not in fake.sessions


def test_a_chat_is_saved_as_a_file_and_read_back(
    fake: FakeServer, open_page: Any, told: dict[str, Any], tmp_path: Any
) -> None:
    page = open_page(fake.url)
    page.locator(".session").hover()
    page.get_by_role("button", name="More about").click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="Export").click()
    assert download.value.suggested_filename.startswith("Three-turns.")
    download.value.save_as(tmp_path / "chat")
    page.get_by_label("Import a chat from a file").set_input_files(tmp_path / "chat")
    settled(page, 3)
    assert len(fake.sessions) == 2
    (tmp_path / "junk").write_text("{}")
    page.get_by_label("Import a chat from a file").set_input_files(tmp_path / "junk")
    expect(page.locator(".toast.error")).to_have_text("this file is not a saved chat")


def test_only_parameters_that_were_set_are_sent(fake: FakeServer, open_page: Any) -> None:
    fake.models = ["first", "second"]
    page = open_page(fake.url)
    page.get_by_label("Model").select_option("second")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt for new chats").fill("Be brief.")
    page.get_by_label("Temperature, as a number").fill("0.5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label(re.compile("Stop at")).fill("END\n###")
    say(page, "one")
    settled(page, 1)
    assert fake.sessions["s-0001"]["system"] == "Be brief."
    assert fake.sessions["s-0001"]["model"] == "second"
    body = chat_bodies(fake)[-1]
    assert {"temperature": 0.5, "seed": 7, "stop": ["END", "###"], "model": "second"}.items() <= body.items()
    assert body.keys() == {"temperature", "seed", "stop", "model", "session_id", "messages", "stream", "stream_options"}
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Temperature, as a number")).to_have_value("0.5")
    page.get_by_role("button", name="Model’s own", exact=True).click()
    say(page, "two")
    settled(page, 2)
    assert "temperature" not in chat_bodies(fake)[-1]
    assert chat_bodies(fake)[-1]["seed"] == 7


def test_reasoning_is_folded(fake: FakeServer, open_page: Any) -> None:
    fake.reasoning = "I wonder about foxes."
    page = open_page(fake.url)
    say(page, "Think")
    settled(page, 1)
    expect(page.get_by_text("I wonder about foxes.")).to_be_hidden()
    page.get_by_text("Thoughts").click()
    expect(page.get_by_text("I wonder about foxes.")).to_be_visible()


HOSTILE = """<img src=x onerror="window.hacked = 1"> <script>window.hacked = 2</script>

[a link](javascript:window.hacked=3) ![pixel](https://evil.example/pixel.png) <b>not bold</b>

[data](data:text/html,<script>window.hacked=4</script>) [ok](https://good.example/?a=1&b="><i>)

| <u>cell</u> | b |
|---|---|
| <img src=y> | 2 |

```html
<iframe src="javascript:window.hacked=5"></iframe>
```
"""


def test_what_a_model_writes_never_becomes_markup(fake: FakeServer, open_page: Any) -> None:
    fake.default = HOSTILE
    page = open_page(fake.url)
    say(page, "<img src=z onerror='window.hacked=6'>")
    settled(page, 1)
    thread = page.get_by_role("log")
    assert page.evaluate("window.hacked") is None
    assert thread.locator("img, script, iframe, b, u, .prose i:not([class])").count() == 0
    links = thread.locator("a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert links == ["https://evil.example/pixel.png", 'https://good.example/?a=1&b="><i>']
    assert thread.locator("a").first.get_attribute("rel") == "noopener noreferrer nofollow"
    expect(thread).to_contain_text("<b>not bold</b>")


RICH = """# Title

Some *slanted*, **bold**, `code`, ~~gone~~ and snake_case_name text with 2 * 3 * 4.

- one
  - inner
- two

3. three
4. four

> quoted

```py
x = "<b>"  # note
```

| a | b |
|:--|--:|
| 1 | 2 |

---

```
never closed"""


def test_markdown_becomes_elements(fake: FakeServer, open_page: Any) -> None:
    fake.default = RICH
    page = open_page(fake.url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "Show me")
    settled(page, 1)
    prose = page.get_by_role("article", name="Answer").locator(".prose")
    expect(prose.locator("h3")).to_have_text("Title")
    expect(prose.locator("em")).to_have_text("slanted")
    expect(prose.locator("p > strong")).to_have_text("bold")
    expect(prose.locator("del")).to_have_text("gone")
    expect(prose.get_by_text("snake_case_name text with 2 * 3 * 4.")).to_be_visible()
    expect(prose.locator("ul ul li")).to_have_text("inner")
    expect(prose.locator("ol[start='3'] > li")).to_have_count(2)
    expect(prose.locator("blockquote")).to_have_text("quoted")
    expect(prose.locator("td.right")).to_have_text("2")
    expect(prose.locator("hr")).to_have_count(1)
    expect(prose.locator("pre").nth(1)).to_have_text("never closed")
    prose.get_by_role("button", name="Copy code").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == 'x = "<b>"  # note'


def test_long_and_wicked_answers_are_drawn_quickly(fake: FakeServer, open_page: Any) -> None:
    session = fake.session(title="Wicked")
    for text in (
        "[" * 20_000,
        "**a " * 8_000,
        "`" * 20_000,
        "> " * 5_000,
        "- " * 5_000,
        "|" * 20_000,
        "_a" * 10_000,
        "word " * 40_000,
    ):
        fake.turn(session, "go", text)
    page = open_page(f"{fake.url}/#/s/{session['id']}")
    settled(page, 8)
    before = page.evaluate("performance.now()")
    assert before < 8000  # milliseconds since the page began to load


def test_a_server_with_a_key_asks_for_it_and_the_tab_keeps_it(
    fake: FakeServer, open_page: Any, told: dict[str, Any]
) -> None:
    fake.key = "right"
    page = open_page(fake.url)
    dialog = page.get_by_role("dialog", name="API key")
    dialog.get_by_label("API key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("did not accept")
    dialog.get_by_label("API key", exact=True).fill("right")
    page.keyboard.press("Enter")
    expect(page.locator(".session")).to_have_count(1)
    expect(dialog).to_be_hidden()
    assert "right" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    expect(page.locator(".session")).to_have_count(1)
    fake.key = "changed"  # in the middle of a chat: the message is kept, the key is asked for
    say(page, "hello?")
    expect(dialog).to_contain_text("did not accept")
    dialog.get_by_label("API key", exact=True).fill("changed")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_have_value("hello?")


def test_a_busy_server_is_tried_again_when_it_says(fake: FakeServer, open_page: Any) -> None:
    fake.busy, fake.retry_after = 1, 2
    page = open_page(fake.url)
    say(page, "Are you there?")
    expect(page.get_by_text("The server is busy. Trying again in")).to_be_visible()
    settled(page, 1)
    assert len(chat_bodies(fake)) == 2


def test_waiting_for_a_busy_server_can_be_given_up(fake: FakeServer, open_page: Any) -> None:
    fake.busy, fake.retry_after = 9, 30
    page = open_page(fake.url)
    say(page, "Are you there?")
    expect(page.get_by_text("Trying again in 30 s")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    fake.busy = 0
    page.get_by_role("button", name="Try again").click()
    settled(page, 1)


def test_a_broken_connection_loses_neither_message_nor_text(fake: FakeServer, open_page: Any) -> None:
    fake.break_after = 5
    page = open_page(fake.url)
    say(page, "Hold on")
    answer = page.get_by_role("article", name="Answer")
    expect(answer).to_contain_text("The connection broke off in the middle of the answer.")
    expect(answer).to_contain_text("Once there was")
    page.reload()
    expect(page.get_by_text("This message was not answered.")).to_be_visible()
    expect(page.get_by_role("article", name="You")).to_have_text("Hold on")
    fake.break_after = 0
    page.get_by_role("button", name="Try again").click()
    settled(page, 1)


def test_a_lost_server_is_reported_and_found_again(fake: FakeServer, open_page: Any) -> None:
    page = open_page(fake.url)
    expect(page.get_by_role("heading", name="A chat whose memory")).to_be_visible()
    page.context.set_offline(True)
    say(page, "Anybody?")
    expect(page.get_by_role("alert")).to_contain_text("Connection lost")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Anybody?")
    page.context.set_offline(False)
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_role("button", name="Send", exact=True).click()
    settled(page, 1)


def test_drafts_survive_a_reload_each_in_its_chat(fake: FakeServer, open_page: Any, told: dict[str, Any]) -> None:
    page = open_page(fake.url)
    page.get_by_label("Message", exact=True).fill("for a new one")
    page.locator(".session-open").click()
    settled(page, 3)
    page.get_by_label("Message", exact=True).fill("for the old one")
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("for the old one")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_label("Message", exact=True)).to_have_value("for a new one")


def test_two_chats_answer_at_once_and_do_not_mix(fake: FakeServer, open_page: Any) -> None:
    fake.pause = 0.02
    fake.answers = {"first": "apple " * 60, "second": "pear " * 60}
    page = open_page(fake.url)
    say(page, "first")
    expect(page.get_by_role("article", name="Answer")).to_contain_text("apple")
    page.get_by_role("button", name="New chat").click()
    say(page, "second")
    expect(page.get_by_role("article", name="Answer")).to_contain_text("pear")
    settled(page, 1)
    expect(page.get_by_role("log")).not_to_contain_text("apple")
    page.locator(".session-open").filter(has_text="first").click()
    settled(page, 1)
    expect(page.get_by_role("log")).not_to_contain_text("pear")


def test_the_state_view_shows_what_is_stored_and_how_it_moved(
    fake: FakeServer, open_page: Any, told: dict[str, Any]
) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    page.get_by_role("button", name=re.compile("^State: 1.35 MB")).click()
    panel = page.get_by_role("tabpanel", name="State")
    expect(panel).to_contain_text("1.35 MB hold the whole chat")
    expect(panel.get_by_role("row", name="wkv 12 × 8 × 64 × 64 1.57 MB")).to_be_visible()
    expect(panel).to_contain_text("30°")  # cosine 1 - 0.4 / 3
    chart = panel.get_by_role("slider", name="Size of each layer’s state, and how far this turn moved it")
    expect(chart.locator("path.fill-amber")).to_have_count(12)
    chart.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(panel.locator(".readout")).to_have_text("Layer 1: size 6.64, moved 3.51 (53 %), half-life 2.55 tokens")
    assert chart.get_attribute("aria-valuetext") == panel.locator(".readout").text_content()
    panel.get_by_label(re.compile("After turn 3 of 3")).fill("1")
    expect(panel).to_contain_text("After turn 1 of 3")
    expect(panel).to_contain_text("53°")  # cosine 1 - 0.4
    assert [path for path in calls(fake, "GET") if "state" in path] == [
        f"/v1/sessions/s-0001/state?turn={turn}" for turn in (3, 1)
    ]


def test_a_panel_that_opens_leaves_a_reader_at_the_end_of_the_chat(fake: FakeServer, open_page: Any) -> None:
    session = fake.session(title="Long")
    for i in range(6):
        fake.turn(session, f"question {i}", "many words that fill their line and more, " * 20)
    page = open_page(f"{fake.url}/#/s/{session['id']}")
    expect(page.get_by_role("article", name="Answer")).to_have_count(6)
    chat = page.locator(".scroll")

    def left() -> float:
        return float(chat.evaluate("x => x.scrollHeight - x.scrollTop - x.clientHeight"))

    def until(true: Callable[[], bool]) -> None:
        for _ in range(200):
            if true():
                return
            page.wait_for_timeout(50)
        raise AssertionError(f"{left()} pixels are left")

    until(lambda: left() < 2)
    height = chat.evaluate("x => x.scrollHeight")
    page.get_by_role("button", name="Settings").first.click()
    until(lambda: chat.evaluate("x => x.scrollHeight") > height and left() < 2)


def test_a_phone_shows_everything_without_scrolling_sideways(fake: FakeServer, open_page: Any) -> None:
    session = fake.session(title="A rather long title for such a narrow screen, is it not?", tags=["one", "two"])
    fake.turn(session, "x" * 300, RICH + "y" * 300)
    fake.turn(session, "more", "```\n" + "z" * 300 + "\n```\n\n" + "| wide |" * 20 + "\n" + "|---|" * 20)
    page = open_page(f"{fake.url}/#/s/{session['id']}", **PHONE)

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        wide = "all => all.filter(e => e.clientWidth < e.scrollWidth - 1 && /auto|scroll/.test(getComputedStyle(e).overflowX)).map(e => e.className)"  # noqa: E501
        assert set(page.locator(".scroll, .panel-body, .sessions, .dialog").evaluate_all(wide)) == set()

    settled(page, 2)
    fits()
    page.get_by_role("button", name="Show the chats").tap()
    expect(page.get_by_role("button", name="Import")).to_be_in_viewport()
    fits()
    page.locator(".session-open").tap()
    expect(page.get_by_role("button", name="Import")).not_to_be_in_viewport()
    page.get_by_role("button", name=re.compile("^State")).tap()
    for tab in ("State", "Branches", "Settings"):
        page.get_by_role("tab", name=tab).tap()
        expect(page.get_by_role("tabpanel", name=tab)).to_be_visible()
        fits()
    page.get_by_role("button", name="Close details").tap()
    say(page, "from the phone")
    settled(page, 3)


def test_the_keyboard_reaches_everything(fake: FakeServer, open_page: Any, told: dict[str, Any]) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    settled(page, 3)
    composer = page.get_by_label("Message", exact=True)
    expect(composer).to_be_focused()
    page.keyboard.type("a? b")  # no shortcut while typing
    expect(composer).to_have_value("a? b")
    composer.fill("")
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".editor")).to_have_count(0)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_contain_text("Answer again")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    for key, tab in (("s", "State"), ("b", "Branches"), (",", "Settings")):
        page.keyboard.press(key)
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
    page.keyboard.press(",")
    expect(page.get_by_role("tab")).to_have_count(0)
    page.keyboard.press("k")
    expect(page.locator("#turn-2 .answer")).to_be_focused()
    page.keyboard.press("k")
    expect(page.locator("#turn-2 .user")).to_be_focused()
    page.keyboard.press("f")
    expect(page.get_by_label("Find a chat")).to_be_focused()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("n")
    expect(composer).to_be_focused()
    expect(page.get_by_role("heading", level=1)).to_have_text("New chat")


def test_every_control_has_a_name(fake: FakeServer, open_page: Any, told: dict[str, Any]) -> None:
    page = open_page(f"{fake.url}/#/s/{told['id']}")
    settled(page, 3)
    nameless = """all => all.filter(e => e.checkVisibility() && !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length))
        .map(e => e.outerHTML)"""  # noqa: E501
    for key in ("s", "b", ",", "?"):
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press(key)
        page.wait_for_timeout(100)
        assert page.locator("button, input, textarea, select, [role=slider], [role=img]").evaluate_all(nameless) == []


def test_text_has_contrast_in_both_themes(fake: FakeServer, open_page: Any) -> None:
    """WCAG AA: 4.5 to 1 for text, 3 to 1 for marks."""
    ratio = """pairs => {
      const probe = document.body.appendChild(document.createElement('i'));
      const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
      const light = name => {
        probe.style.color = `var(--${name})`;
        canvas.fillStyle = getComputedStyle(probe).color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      return pairs.map(([a, b]) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); });
    }"""  # noqa: E501
    text = [(ink, ground) for ink in ("ink", "soft", "accent") for ground in ("bg", "surface", "sunken", "raised")]
    text += [("accent-ink", "accent"), ("ink", "accent-soft"), ("accent", "accent-soft"), ("danger", "danger-soft")]
    text += [
        ("amber-ink", "amber-soft"),
        ("amber-ink", "surface"),
        ("violet", "surface"),
        ("rose", "surface"),
        ("blue", "surface"),
    ]
    for scheme in ("light", "dark"):
        page = open_page(fake.url, color_scheme=scheme)
        found = dict(zip(text, page.evaluate(ratio, text), strict=True))
        assert {pair: value for pair, value in found.items() if value < 4.5} == {}


def test_the_theme_follows_the_system_until_one_is_chosen(fake: FakeServer, open_page: Any) -> None:
    page = open_page(fake.url, color_scheme="dark")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert light != dark
    page.get_by_role("button", name="Theme: as the system").click()
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark
