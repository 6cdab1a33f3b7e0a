"""The pages as a browser shows them, at the width of a telephone and of a desk: nothing is cut, and nothing sticks out.

Skipped where there is no playwright and no Chromium: `pip install playwright && playwright install chromium`, or
Chromium of the system.
"""

import shutil
from dataclasses import replace

import planted_zoo as zoos
import pytest
from test_findings import full
from test_report import with_counted_tests, with_tests

from tracing_jax.report.page import html
from tracing_jax.report.pairs import pairs_html
from tracing_jax.zoo.report import html as zoo_html
from tracing_jax.zoo.report import make_contents

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("drawn")]

_SCHEMES = ("light", "dark")
_STICKING_OUT = """() => [...document.querySelectorAll("main *, header *")].filter(element => {
  const box = element.getBoundingClientRect();
  if (!box.width || element.closest("pre")) return false;
  const scrolled = element.closest(".scroll");
  return box.right > document.documentElement.clientWidth + 1 && !(scrolled && window.innerWidth > 480);
}).map(element => element.outerHTML.slice(0, 80))"""
_CONTRAST = """selector => {
  const parse = color => color.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(
    x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  const light = color => { const [r, g, b] = parse(color); return .2126 * r + .7152 * g + .0722 * b; };
  const [a, b] = [getComputedStyle(document.querySelector(selector)).color,
                  getComputedStyle(document.body).backgroundColor].map(light);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
}"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        try:
            found = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()


def pages():
    long = "a_very_long_name_of_a_model_without_any_place_to_break_it" * 2
    named = full("no_evidence", args={"ft_model_id": f"org/{long}", "save": None})
    plan, records = zoos.planted([4, 3, 1, 1, 1, 1], 1, "an-organisation-some-model")
    few = replace(plan, pairs=tuple(pair for i, pair in enumerate(plan.pairs) if i % 3 == 0 or pair.related))
    merged = zoos.two_trees({("a", "b"): 1.4, ("a", "ab"): 0.7, ("ab", "b"): 0.7})
    return {
        "map": html(with_counted_tests()),
        "zoo": zoo_html(make_contents(plan, zoos.rows_of(plan, records), {}), "zoo"),
        "graph": zoo_html(make_contents(few, zoos.rows_of(few, records), {}), "graph"),
        "merged": zoo_html(make_contents(merged[0], zoos.rows_of(*merged), {}), "merged"),
        "pair": html(full()),
        "tests": html(with_tests()),
        "family": pairs_html([full(), named], ["a.html", "b.html"]),
    }


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", _SCHEMES)
def test_nothing_is_cut_and_all_can_be_read(browser, tmp_path, width, scheme):
    for name, source in pages().items():
        file = tmp_path / f"{name}.html"
        file.write_text(source)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.goto(file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(_STICKING_OUT) == [], name
        assert page.evaluate(_CONTRAST, ".verdict .word") >= 4.5, name
        page.close()
