"""The page against the real server with the embedded model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_helpers import listening

from receptance.server.config import ServerConfig
from receptance.server.keys import new_key
from receptance.server.served import ServedModel

expect: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright").expect


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def settled(page: Any, turns: int) -> None:
    expect(page.locator("section.turn[id]")).to_have_count(turns, timeout=20_000)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


@pytest.fixture
def short(open_page: Any) -> Callable[[str, int], Any]:
    """A page whose answers have so many tokens at most, always the likeliest."""

    def open_it(url: str, tokens: int) -> Any:
        page = open_page(url)
        kept = json.dumps({"temperature": 0, "max_tokens": tokens, "stop": ""})
        page.evaluate("text => localStorage.setItem('receptance.sampling', text)", kept)
        page.reload()
        return page

    return open_it


def test_a_chat_is_said_again_edited_forked_saved_and_looked_into(
    served: ServedModel, config: Callable[..., ServerConfig], short: Any, tmp_path: Path
) -> None:
    with listening(config(), served) as running, running.client as client:
        page = short(running.url, 12)
        say(page, "Once upon a time, there was a fox")
        settled(page, 1)
        answer = page.get_by_role("article", name="Answer").inner_text()
        (session,) = client.get("/v1/sessions").json()["data"]
        here = f"/v1/sessions/{session['id']}"
        words = client.get(here).json()["turns"][0]["assistant"].split()
        assert len(words) > 3
        assert answer.split()[: len(words)] == words

        say(page, "The fox met a bear.")
        settled(page, 2)
        before = client.get(here).json()["turns"]
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("r")
        page.wait_for_timeout(300)
        settled(page, 2)
        after = client.get(here).json()["turns"]
        assert (
            after[1]["assistant"] == before[1]["assistant"]
        )  # the state was rewound: the likeliest answer is the same
        assert after[1]["created"] > before[1]["created"]

        page.keyboard.press("s")
        expect(page.get_by_role("heading", name="What is stored")).to_be_visible()
        expect(page.locator("table.fields tbody tr").first).to_be_visible()

        page.locator("#turn-0 .answer").hover()
        page.locator("#turn-0").get_by_role("button", name="Fork here").click()
        expect(page.locator(".origin")).to_contain_text("Forked after 1 turn of")
        say(page, "The fox went home.")
        settled(page, 2)
        page.get_by_role("button", name="Branches").click()
        expect(page.locator(".graph circle")).to_have_count(3)
        page.locator("#turn-1").get_by_role("button", name="Edit").click()
        field = page.locator("#turn-1 textarea")
        field.fill("The fox slept.")
        page.locator("#turn-1").get_by_role("button", name="Send", exact=True).click()
        expect(page.locator("#turn-1")).to_contain_text("The fox slept.")
        settled(page, 2)

        file = client.get(f"{here}/export")
        (tmp_path / "fox.session").write_bytes(file.content)
        page.locator("input[type=file]").first.set_input_files(tmp_path / "fox.session")
        expect(page.get_by_text("Imported.")).to_be_visible()
        settled(page, 2)
        assert len(client.get("/v1/sessions").json()["data"]) == 3


def test_a_stopped_answer_is_kept_as_far_as_it_came(
    served: ServedModel, config: Callable[..., ServerConfig], short: Any
) -> None:
    with listening(config(), served) as running, running.client as client:
        page = short(running.url, 4000)
        say(page, "Once upon a time, there was a fox")
        page.get_by_role("button", name=re.compile("^Stop")).first.click()
        settled(page, 1)
        (session,) = client.get("/v1/sessions").json()["data"]
        (turn,) = client.get(f"/v1/sessions/{session['id']}").json()["turns"]
        assert turn["finish_reason"] == "cancelled"
        page.reload()
        settled(page, 1)


def test_a_key_is_asked_for(
    served: ServedModel, config: Callable[..., ServerConfig], open_page: Any, tmp_path: Path
) -> None:
    new_key(tmp_path / "keys", "fox", tmp_path / "fox.key")
    with listening(config(f"auth.keys={tmp_path / 'keys'}"), served) as running:
        page = open_page(running.url)
        page.get_by_role("dialog", name="API key").get_by_label("API key", exact=True).fill(
            (tmp_path / "fox.key").read_text().strip()
        )
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog", name="API key")).to_be_hidden()
        expect(page.get_by_label("Message", exact=True)).to_be_enabled()


def test_a_busy_server_is_asked_again_until_it_has_room(
    served: ServedModel, config: Callable[..., ServerConfig], short: Any
) -> None:
    with listening(config("limits.texts=1"), served) as running, running.client as client:
        page = short(running.url, 8)
        with running.app.hub.models.admit(1):  # as if another text ran
            busy = []
            page.on("response", lambda answer: busy.append(answer.status) if answer.status == 429 else None)
            say(page, "The fox")
            for _ in range(200):
                if len(busy) >= 2:
                    break
                page.wait_for_timeout(50)
            assert len(busy) >= 2  # it came again, about as late as Retry-After says
        settled(page, 1)
        (session,) = client.get("/v1/sessions").json()["data"]
        assert len(client.get(f"/v1/sessions/{session['id']}").json()["turns"]) == 1
