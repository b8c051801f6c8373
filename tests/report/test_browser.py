"""The page in a browser: it draws, sorts, changes its theme, fits a phone, and needs no network."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlomae.report.command import main
from tests.report.made import Made, make_run

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install --no-install-recommends chromium")
    with sync_api.sync_playwright() as playwright:
        # As root, as in containers, Chromium starts without its sandbox only.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    # A name that is long, and one that is an attack.
    kinds = {
        "a-rather-long-name-of-a-run-with-a-learned-mask-and-no-spaces": Made(gain=0.02),
        "<img src=x onerror=document.title=1>": Made(policy="random"),
    }
    runs = [str(make_run(root / name, made)) for name, made in kinds.items()]
    out = root / "page.html"
    assert main([*runs, "--out", str(out)]) == 0
    return out


class Opened:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Any, file: Path, size: dict[str, int], scheme: str = "light") -> None:
        self.context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector(".plot path")

    def check(self) -> None:
        """Nothing complained, and nothing but the file itself was asked for."""
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith("data:")] == [
            self.page.url.partition("#")[0]
        ]


@pytest.fixture
def desk(browser: Any, file: Path) -> Iterator[Opened]:
    opened = Opened(browser, file, DESK)
    yield opened
    opened.check()
    opened.context.close()


def test_plots_are_drawn(desk: Opened) -> None:
    page = desk.page
    panels = page.locator(".panel").count()
    assert panels >= 18
    assert page.locator(".plot svg").count() == panels
    paths = page.eval_on_selector_all(".plot .line path", "all => all.map((path) => path.getAttribute('d'))")
    assert len(paths) >= panels
    assert all(path.count("L") > 1 for path in paths)
    assert page.locator(".plot text.level").all_text_contents() == ["chance 62.5\N{NO-BREAK SPACE}%"]
    # Axes have numbers.
    ticks = page.locator(".panel").first.locator(".plot text").all_text_contents()
    assert len(ticks) >= 5 and "1,000" in ticks and not any("NaN" in tick for tick in ticks)


def test_an_attack_stays_text(desk: Opened) -> None:
    assert "<img src=x onerror=document.title=1>" in desk.page.title()
    assert desk.page.locator("img[src=x]").count() == 0


def test_pointing_reads_all_plots_at_one_step(desk: Opened) -> None:
    page = desk.page
    plot = page.locator(".plot").first
    before = page.locator(".readout .step").all_text_contents()
    assert set(before) == {"last"}
    plot.scroll_into_view_if_needed()
    plot.hover(position={"x": 150, "y": 60})
    expect(page.locator(".readout .step").first).not_to_have_text("last")
    steps = set(page.locator(".readout .step").all_text_contents())
    assert len(steps) == 1 and steps.pop().startswith("step ")
    page.mouse.move(5, 5)
    expect(page.locator(".readout .step").first).to_have_text("last")


def test_arrow_keys_read_a_plot(desk: Opened) -> None:
    page = desk.page
    plot = page.locator(".plot").first
    plot.focus()
    page.keyboard.press("Home")
    expect(plot).to_have_attribute("aria-valuenow", "20")
    page.keyboard.press("ArrowRight")
    expect(plot).to_have_attribute("aria-valuenow", "40")
    words = plot.get_attribute("aria-valuetext")
    assert words.startswith("step 40: a-rather-long-name") and "<img src=x" in words
    page.keyboard.press("Escape")
    expect(plot).to_have_attribute("aria-valuetext", re.compile("^last: "))


def test_logarithmic_axis_smoothing_and_hidden_runs(desk: Opened) -> None:
    page = desk.page
    first = page.locator(".panel").first
    path = first.locator(".line path").first
    linear = path.get_attribute("d")
    first.locator(".log").click()
    assert first.locator(".log").get_attribute("aria-pressed") == "true"
    assert path.get_attribute("d") != linear
    first.locator(".log").click()
    assert path.get_attribute("d") == linear

    page.locator("#smoothing").fill("0.9")
    assert first.locator(".line.raw").count() == 2
    assert first.locator(".line:not(.raw) path").first.get_attribute("d") != linear
    page.locator("#smoothing").fill("0")

    page.locator(".legend [data-run='1']").click()
    assert first.locator(".line").count() == 1
    assert page.locator(".legend [data-run='1']").get_attribute("aria-pressed") == "false"


def test_headers_sort_their_table(desk: Opened) -> None:
    page = desk.page
    table = page.locator("#evaluations table").first
    head = table.locator("th", has_text="k-NN accuracy")

    def scores() -> list[float]:
        cells = table.locator("tbody tr td:nth-child(4)").evaluate_all(
            "all => all.map((td) => td.dataset.key)"
        )
        return [float(cell) for cell in cells]

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert scores() == sorted(scores(), reverse=True) and len(set(scores())) == 2
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert scores() == sorted(scores())
    table.locator("th", has_text="Mask").locator("button").click()
    assert head.get_attribute("aria-sort") is None
    assert table.locator("tbody tr td:nth-child(2)").all_text_contents() == ["learned", "random"]


def test_rows_without_a_value_stay_last(desk: Opened) -> None:
    page = desk.page
    details = page.locator("#evaluations details").first
    details.locator("summary").click()
    head = details.locator("thead th").nth(1)
    for order in ("descending", "ascending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert details.locator("tbody tr").last.locator("th").inner_text() == "sign"


def test_theme_is_changed_and_remembered(browser: Any, file: Path) -> None:
    opened = Opened(browser, file, DESK, scheme="dark")
    page = opened.page

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert ground() == "rgb(20, 22, 26)"
    assert page.locator("#theme").inner_text() == "Light theme"
    page.locator("#theme").click()
    assert ground() == "rgb(250, 250, 248)"
    assert page.locator("#theme").inner_text() == "Dark theme"
    page.reload()
    assert ground() == "rgb(250, 250, 248)"
    assert opened.complaints == []
    opened.context.close()


def test_the_film_moves(desk: Opened) -> None:
    page = desk.page
    shown = page.locator(".stage .shown .map").first
    last = shown.get_attribute("src")
    slider = page.locator("#moment")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator(".film .moment").first.inner_text() == "step 100"
    assert shown.get_attribute("src") != last
    assert page.locator(".strip thead .now").inner_text() == "100"
    page.locator("#play").click()
    expect(page.locator(".film .moment").first).to_have_text("step 1,200", timeout=15_000)
    assert shown.get_attribute("src") == last
    assert page.locator("#play").inner_text() == "Play"
    page.locator("[value=removed]").check()
    assert page.locator(".stage .shown .cover").first.is_visible() and not shown.is_visible()


@pytest.mark.parametrize("width", [360, 768, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_as_wide_as_the_screen(browser: Any, file: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, file, {"width": width, "height": 800}, scheme)
    opened.page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    outside = opened.page.evaluate(
        "[...document.querySelectorAll('main *')].filter((each) => !each.closest('.scroller, .hidden') && "
        "each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 80))"
    )
    assert outside == []
    opened.check()
    opened.context.close()
