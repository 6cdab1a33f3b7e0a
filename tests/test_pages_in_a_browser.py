"""The pages as a browser shows them, at the width of a telephone and of a desk: nothing is cut, and nothing sticks out.

Skipped where there is no Chromium or Chrome. It is run as a program that prints the document after its scripts: each
page stands in a frame of the width asked for, and a script beside the frames measures them.
"""

import functools
import html as html_text
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import planted_zoo as zoos
import pytest
from test_findings import full
from test_report import with_counted_tests, with_partners, with_tests

from tracing_jax.report.page import html
from tracing_jax.report.pairs import pairs_html
from tracing_jax.zoo.report import html as zoo_html
from tracing_jax.zoo.report import make_contents

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("drawn")]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SCHEMES = {"dark": 0, "light": 1}
"""Blink's numbers of the color schemes that a user may prefer."""
_WIDTHS = (375, 1280)
_FRAMES = """<!doctype html><meta charset="utf-8"><body>FRAMES<script>
function faults(frame) {
  const view = frame.contentWindow, page = frame.contentDocument, found = [];
  page.querySelectorAll("details").forEach(folded => folded.open = true);
  const width = page.documentElement.clientWidth;
  if (!page.querySelector("main *")) found.push("the page is empty");
  if (page.documentElement.scrollWidth > view.innerWidth) found.push("wider than its window");
  for (const element of page.querySelectorAll("main *, header *")) {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest("pre")) continue;
    const scrolled = element.closest(".scroll") && view.innerWidth > 480;
    if (box.right > width + 1 && !scrolled) found.push("sticks out: " + element.outerHTML.slice(0, 80));
  }
  const linear = color => color.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(
    x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  const light = color => { const [r, g, b] = linear(color); return .2126 * r + .7152 * g + .0722 * b; };
  const paper = light(view.getComputedStyle(page.body).backgroundColor);
  const ink = light(view.getComputedStyle(page.querySelector(".verdict .word")).color);
  if ((Math.max(paper, ink) + .05) / (Math.min(paper, ink) + .05) < 4.5) found.push("the verdict is hard to read");
  return {faults: found, width: view.innerWidth, dark: paper < .2};
}
addEventListener("load", () => {
  const found = Object.fromEntries([...document.querySelectorAll("iframe")].map(frame => [frame.id, faults(frame)]));
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(found);
});
</script>"""


def browser():
    """The path of a browser of the system; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    return found or pytest.skip("no Chromium on this machine")


def shown(source, folder, scheme):
    """The document that a browser makes of a page, after its scripts."""
    file = Path(folder) / "page.html"
    file.write_text(source, "utf-8")
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
               f"--blink-settings=preferredColorScheme={_SCHEMES[scheme]}", "--virtual-time-budget=20000", "--dump-dom",
               file.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@functools.cache
def pages():
    long = "a_very_long_name_of_a_model_without_any_place_to_break_it" * 2
    named = full("no_evidence", args={"ft_model_id": f"org/{long}", "save": None})
    plan, records = zoos.planted([4, 3, 1, 1, 1, 1], 1, "an-organisation-some-model")
    few = replace(plan, pairs=tuple(pair for i, pair in enumerate(plan.pairs) if i % 3 == 0 or pair.related))
    merged = zoos.two_trees({("a", "b"): 1.4, ("a", "ab"): 0.7, ("ab", "b"): 0.7})
    return {
        "map": html(with_counted_tests()),
        "units": html(with_partners() | {"verdict": with_tests()["verdict"]}),
        "zoo": zoo_html(make_contents(plan, zoos.rows_of(plan, records), {}), "zoo"),
        "graph": zoo_html(make_contents(few, zoos.rows_of(few, records), {}), "graph"),
        "merged": zoo_html(make_contents(merged[0], zoos.rows_of(*merged), {}), "merged"),
        "pair": html(full()),
        "tests": html(with_tests()),
        "family": pairs_html([full(), named], ["a.html", "b.html"]),
    }


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_nothing_is_cut_and_all_can_be_read(tmp_path, scheme):
    frames = "".join(
        f'<iframe id="{name} {width}" style="width:{width}px;height:900px;border:0" srcdoc="{html_text.escape(page)}">'
        "</iframe>"
        for name, page in pages().items()
        for width in _WIDTHS
    )
    measured = re.search(r"<pre>(.*)</pre>", shown(_FRAMES.replace("FRAMES", frames), tmp_path, scheme), re.S)
    found = json.loads(html_text.unescape(measured[1]))
    assert len(found) == len(_WIDTHS) * len(pages())
    for name, page in found.items():
        assert page["faults"] == [], name
        assert (page["width"], page["dark"]) == (int(name.split()[1]), scheme == "dark"), name


def test_a_page_that_is_too_wide_or_cannot_be_read_is_found(tmp_path):
    """What the script above finds, on a page with each fault."""
    pale = '<p class="verdict"><b class="word" style="color:#eee">z</b></p>'
    bad = f'<body style="background:#fff"><main style="width:2000px">x<p>y</p></main>{pale}'
    page = f'<iframe id="bad" style="width:375px" srcdoc="{html_text.escape(bad)}"></iframe>'
    found = shown(_FRAMES.replace("FRAMES", page), tmp_path, "light")
    assert all(fault in found for fault in ("wider than its window", "sticks out", "hard to read"))
