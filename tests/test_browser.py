"""The app in a real browser: features → inspector → steering on the tiny workspace.

Hostile tokens stay inert, nothing leaves this machine, and no page raises. Needs Chromium: $CHROMIUM or on the path.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.serve import Server, start

pytest_plugins = ("tests.workspaces",)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it, or set $CHROMIUM to its path"),
]
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
LOCAL = {"127.0.0.1", "localhost"}
# Streamlit asks for these below the page's path first, and then at the root
EXPECTED_404 = ("_stcore/health", "_stcore/host-config")


@pytest.fixture(scope="module")
def server(tiny_workspace, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("app") / "app.log"
    running = start(tiny_workspace.path, 8650, log=log)
    yield running
    running.stop()


class Watched:
    """A page with a record of everything that must not happen."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.outside: list[str] = []
        self.errors: list[str] = []
        page.on("request", self._request)
        page.on("response", self._response)
        page.on("pageerror", lambda e: self.errors.append(str(e)))

    def _request(self, request: Any) -> None:
        host = urlsplit(request.url).hostname
        if host is not None and host not in LOCAL:
            self.outside.append(request.url)

    def _response(self, response: Any) -> None:
        if response.status >= 400 and not response.url.endswith(EXPECTED_404):
            self.errors.append(f"{response.status} {response.url}")

    def open(self, path: str) -> Any:
        self.page.goto(f"{self.url}/{path}")
        return self.settled()

    def settled(self) -> Any:
        """The page, once the script has ended."""
        app = '[data-testid="stApp"]'
        self.page.wait_for_selector(f'{app}[data-test-connection-state="CONNECTED"]')
        self.page.wait_for_selector(f'{app}[data-test-script-state="notRunning"]')
        return self.page

    def assert_clean(self) -> None:
        assert self.page.evaluate("window.XSS") is None, "a token ran as a script"
        assert self.outside == [] and self.errors == []
        assert self.page.get_by_test_id("stException").count() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        # --no-sandbox: Chromium refuses its sandbox when it is run as root, as in a container
        args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        running = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=args)
        yield running
        running.close()


@pytest.fixture
def watched(browser, server) -> Iterator[Watched]:
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.set_default_timeout(30_000)
    watch = Watched(page, server.url)
    yield watch
    page.close()


def expect(locator: Any) -> Any:
    return playwright.expect(locator)


def test_from_features_to_inspector_to_steering(watched, tiny_workspace) -> None:
    w = watched
    page = w.open(f"features?sae={tiny_workspace.topk}&fid=14&sort=by%20id")
    expect(page.get_by_label("Feature id")).to_have_value("14")
    expect(page.get_by_text(tiny_workspace.hostile[0]).first).to_be_visible()
    second_row = {"x": 16, "y": 86}
    w.settled().get_by_test_id("stDataFrame").first.locator(".dvn-scroller").click(position=second_row)
    expect(page.get_by_label("Feature id")).to_have_value("1")
    w.settled().get_by_role("tab", name="Neighbours").click()
    page.get_by_role("tab", name="Activations").click()
    w.assert_clean()

    page.get_by_role("link", name="Prompt inspector").click()
    w.settled().get_by_label("Model", exact=True).fill(str(tiny_workspace.model_dir))
    page.get_by_role("button", name="Load the model").click()
    page.get_by_label("Text", exact=True).fill(
        f"The cat {tiny_workspace.hostile[0]} waited{tiny_workspace.hostile[1]} in the garden."
    )
    page.get_by_role("button", name="Run", exact=True).click()
    token = page.get_by_role("button", name="waited, activation")
    expect(token).to_be_visible()
    w.settled().get_by_role("button", name="waited, activation").click()
    expect(page.get_by_role("button", name="waited, activation")).to_have_attribute("aria-pressed", "true")
    w.settled().keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="token 5 <img␣src")).to_have_attribute("aria-pressed", "true")
    w.settled()
    w.assert_clean()

    page.get_by_role("link", name="Steer with it").click()
    expect(page.get_by_label("Feature id")).not_to_have_value("")
    w.settled().get_by_label("Prompt", exact=True).fill("The cat waited in the garden")
    page.get_by_label("Strength", exact=True).fill("3")
    page.get_by_label("Tokens").fill("12")
    page.get_by_label("Tokens").press("Tab")
    w.settled().get_by_role("button", name="Generate").click()
    expect(page.get_by_text("Edit size against the residual")).to_be_visible()
    expect(page.get_by_text("12 tokens, differs from token")).to_be_visible()
    w.settled()
    w.assert_clean()


def test_stop_keeps_what_was_generated(watched, tiny_workspace) -> None:
    w = watched
    w.open(f"steer?sae={tiny_workspace.topk}&fid=5&tokens=200&temp=1.5&prompt=The%20cat%20waited")
    page = w.settled()
    load, generate = (page.get_by_role("button", name=n) for n in ("Load the model", "Generate"))
    expect(load.or_(generate)).to_be_visible()
    if load.count():
        page.get_by_label("Model", exact=True).fill(str(tiny_workspace.model_dir))
        load.click()
    generate.click()
    expect(page.get_by_text("Steered", exact=True)).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Perplexity of the text")).to_be_visible()
    w.settled()
    w.assert_clean()


@pytest.mark.parametrize("path", ["", "features", "inspect", "steer"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_deep_link_opens_with_navigation_in_both_themes(
    browser, server, tiny_workspace, path, scheme
) -> None:
    page = browser.new_page(color_scheme=scheme)
    w = Watched(page, server.url)
    w.open(f"{path}?sae={tiny_workspace.abs_topk}")
    expect(page.get_by_role("link", name="Explorer")).to_be_visible()
    expect(page.get_by_role("combobox", name="SAE")).to_have_value(re.compile("^abs-topk"))
    ground = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert ground == {"light": "rgb(251, 250, 247)", "dark": "rgb(20, 23, 29)"}[scheme]
    w.assert_clean()
    page.close()


def test_ids_in_the_url_that_do_not_exist_are_named(watched) -> None:
    page = watched.open("features?sae=../../etc/passwd&fid=<script>window.XSS=1</script>")
    expect(page.get_by_text("No SAE with the id “../../etc/passwd”")).to_be_visible()
    expect(page.get_by_text("is not a feature of this SAE")).to_be_visible()
    watched.assert_clean()
