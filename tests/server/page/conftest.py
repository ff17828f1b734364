"""A headless browser for the page's tests. Where none can be found they are skipped; scripts/browser installs one."""

import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_server import FakeServer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser on a busy machine may be late by more than any patience: three failures in a row are one."""
    for item in items:
        if "page" in item.path.parts:
            item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # ends with the module: while Playwright runs, no other test of this process could start an event loop
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    playwright.expect.set_options(timeout=15_000)  # the machine may be busy
    with playwright.sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, NAMES)), None)
        try:
            # no sandbox: containers seldom allow one, and the pages opened are our own
            found = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        except playwright.Error as error:
            pytest.skip(f"no browser that starts: {str(error).splitlines()[0]}; try scripts/browser")
        yield found
        found.close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """open_page(url, **context options) → a page. By the end it must have complained of nothing, and called nobody else."""  # noqa: E501
    troubles: list[str] = []
    contexts = []

    def open_it(url: str, **options: Any) -> Any:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "accept_downloads": True, **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        origin = "/".join(url.split("/")[:3])

        def heard(message: Any) -> None:
            # that a request failed is what several tests are about
            if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
                troubles.append(message.text)

        def asked(request: Any) -> None:
            if not request.url.startswith((origin, "blob:", "data:")):
                troubles.append(f"request to {request.url}")

        page.on("console", heard)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", asked)
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not troubles
