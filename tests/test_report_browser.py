"""The report in a browser: what axe-core finds, small screens, the viewer, print, no script."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browsers import DARK, Browser, find_axe, find_browser
from reports import add_maps, add_overview, add_studies, add_tokens, make_results

from neuromamba.report import report_path, run_report

READY = "document.querySelector('.viewer').dataset.ready"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with every section."""
    find_browser()
    config = make_results(tmp_path_factory.mktemp("made"), 24, test=10)
    add_tokens(config)
    add_maps(config)
    add_studies(config)
    add_overview(config)
    run_report(config)
    return report_path(config).read_text(encoding="utf-8")


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(find_browser(), tmp_path)


@pytest.mark.parametrize("options", [(), DARK], ids=["light", "dark"])
def test_axe_finds_nothing_wrong(page: str, browser: Browser, options: tuple[str, ...]) -> None:
    scripted = page.replace("</body>", f"<script>{find_axe()}</script></body>")
    opened = scripted.replace("<details>", "<details open>")
    run = (
        "axe.run(document, {resultTypes: ['violations']}).then(found => ({"
        "dark: matchMedia('(prefers-color-scheme: dark)').matches, rules: found.passes.length,"
        "wrong: found.violations.map(one => [one.id, one.nodes[0].failureSummary])}))"
    )
    found = browser.ask(opened, run, 1200, *options)
    assert found["wrong"] == []
    assert found["rules"] > 20
    assert found["dark"] == bool(options)


def test_colours_have_enough_contrast(page: str, browser: Browser) -> None:
    """Axe cannot tell where parts of a page scroll, so the colours themselves are looked at."""
    ratio = """(() => {
      const light = text => { const [r, g, b] = text.match(/\\d+/g).map(v => {
        const s = v / 255; return s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const probe = document.createElement('i'); document.body.append(probe);
      const named = name => { probe.style.color = `var(--${name})`; return light(getComputedStyle(probe).color); };
      const pair = (a, b) => { const [x, y] = [named(a), named(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
      return ['page', 'card'].flatMap(on => ['ink', 'soft', 'mark'].map(of => pair(of, on)));
    })()"""  # noqa: E501
    for options in ((), DARK):
        assert min(browser.ask(page, ratio, 1200, *options)) >= 4.5


@pytest.mark.parametrize("width", [360, 800])
def test_the_page_does_not_scroll_sideways(page: str, browser: Browser, width: int) -> None:
    opened = page.replace("<details>", "<details open>")
    sizes = "[innerWidth, document.documentElement.scrollWidth]"
    inside, needed = browser.ask(opened, sizes, width)
    assert (inside, needed <= inside) == (width, True)


def test_the_viewer_follows_its_sliders_and_its_list(page: str, browser: Browser) -> None:
    script = """(async () => {
      const root = document.querySelector('.viewer'), told = [];
      const status = () => root.querySelector('[data-status]').textContent;
      const set = (name, value) => { const one = root.querySelector(name); one.value = value;
        one.dispatchEvent(new Event('input', {bubbles: true})); };
      const pixel = () => [...root.querySelector('[data-plane=axial]').getContext('2d')
        .getImageData(29, 24, 1, 1).data].slice(0, 3);
      told.push(root.dataset.ready, status());
      set('[data-axis=x]', 8); set('[data-axis=y]', 5); set('[data-axis=z]', 5);
      told.push(status(), root.querySelector('[data-of=x]').textContent);
      set('[data-choice]', ''); told.push(status(), pixel());
      set('[data-choice]', '1'); told.push(status(), pixel(), root.querySelector('[data-scale]').hidden);
      root.querySelector('[data-axis=x]').focus();
      told.push(document.activeElement.dataset.axis, root.querySelectorAll('option').length);
      return told;
    })()"""  # noqa: E501
    ready, first, moved, x, alone, plain, mapped, coloured, hidden, focused, options = browser.ask(
        page, script
    )
    assert ready == "yes"
    assert first == "At x 4, y 4, z 4 mm: mean BOLD about 1,000; in no kept token."
    assert moved == "At x 20, y -4, z -4 mm: mean BOLD about 1,000; in a kept token."
    assert x == "20 mm"
    assert alone == "At x 20, y -4, z -4 mm: mean BOLD about 1,000."
    assert plain[0] == plain[1] == plain[2] > 200
    assert "what tells people apart: 2.2e+2 of the variance" in mapped
    assert coloured[0] > coloured[2] + 50
    assert (hidden, focused, options) == (False, "x", 5)


def shown(browser: Browser, page: str, *options: str) -> Any:
    kinds = "['.viewer', '.static', 'nav'].map(n => document.querySelector(n).offsetHeight > 0)"
    return browser.ask(page, kinds, 1200, *options)


def test_paper_and_pages_without_script_get_still_pictures(page: str, browser: Browser) -> None:
    assert shown(browser, page) == [True, False, True]
    printed = page.replace("@media print", "@media screen")
    assert shown(browser, printed) == [False, True, False]
    start = page.rindex("<script>")
    without = page[:start] + page[page.index("</script>", start) + len("</script>") :]
    assert shown(browser, without) == [False, True, True]
    broken = page.replace(
        '"anatomy": {"src": "data:image/png;base64,', '"anatomy": {"src": "data:,'
    )
    assert broken != page
    assert shown(browser, broken) == [False, True, True]


def test_headings_are_in_order(page: str, browser: Browser) -> None:
    levels = "[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])"
    found = browser.ask(page, levels)
    assert found[0] == 1
    assert found.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(found))
