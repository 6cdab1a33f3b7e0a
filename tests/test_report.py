"""Figures show the data they were given; the page is whole, closed to the network, and escapes what it shows."""

import io
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tracing_jax.record import plain
from tracing_jax.report.figures import figure_of_run, images_of_run, pairs_figure, png, save_png
from tracing_jax.report.findings import SENTENCES
from tracing_jax.report.formatting import cell, outcome, p_cell, p_text, places_text, subject, text_table
from tracing_jax.report.maps import maps
from tracing_jax.report.page import html
from tracing_jax.report.pairs import figure_of_pairs, pairs_html
from tracing_jax.report.panels import _stack
from tracing_jax.report.printed import pair_names, summary
from tracing_jax.report.unit_maps import unit_maps

pytestmark = pytest.mark.usefixtures("drawn")
ROOT = Path(__file__).parents[1]
ALPHA = np.linspace(0, 1, 11)
LEVELS = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]


def curve(barrier, ends=2.0):
    return {"alpha": ALPHA.tolist(), "loss": (ends + barrier * np.sin(np.pi * ALPHA)).tolist()}


def result(headline=None, **parts):
    empty = dict.fromkeys(("log10_p", "p_reason", "per_layer", "curve", "distribution", "not_applicable"))
    return empty | {"headline": headline, "label": "a number"} | parts


def quantiles(layers, center):
    rows = [[center + 0.1 * layer + 0.1 * (level - 0.5) for level in LEVELS] for layer in range(layers)]
    return {"label": "cosine of matched units", "quantiles": {"layers": rows, "levels": LEVELS}}


def record(**changes):
    curves = [curve(5) | {"midpoint": 7.0, "barrier": 5.0, "groups": ["attn", "mlp"]}, curve(0.1)]
    model = {
        "id": "org/model",
        "revision": "0123456789abcdef" * 2 + "01234567",
        "family": "llama",
        "parameters": 1234567,
        "shape": {"layers": 3},
        "files": {"model.safetensors": "ab" * 32},
    }
    layers = {"label": "log10 p of a layer", "values": [-1.5, -20.0, -3.25]}
    base = {
        "format": 1,
        "args": {"base": "org/model", "alphas": 11},
        "commit": "not a git checkout",
        "versions": {"jax": "0.10.1"},
        "device": {"platform": "cpu", "mesh": {"data": 1, "model": 1}},
        "seed": 0,
        "models": {"base": model, "ft": model | {"id": "org/tuned"}},
        "tokens": {"dataset": "some/text", "num_tokens": 4096},
        "permuted": {"axes": ["embed", "mlp"], "seed": 3},
        "alignment": {"axes": ["embed"], "objective": [1.0, 2.0], "share_moved": {"embed": 0.9912}},
        "statistics": {
            "mode": {"non_aligned": result(7.0, curve=curves[0]), "aligned": result(2.1, curve=curves[1])},
            "cos": {"non_aligned": result(0.1, log10_p=-4312.7, per_layer=layers), "aligned": None},
            "emb": {"non_aligned": result(0.5, distribution=quantiles(3, 0.1)), "aligned": None},
            "l2": {"non_aligned": result(1.5), "aligned": result(0.25)},
            "glu": {"non_aligned": result(not_applicable="the MLP has no gate"), "aligned": None},
        },
        "perplexity": {"base": {"perplexity": 7.389, "tokens": 4096}, "ft": {"perplexity": 8.5, "tokens": 4096}},
        "seconds": {"load": 1.0, "statistic": 2.5},
        "notes": ["one note"],
    }
    return base | changes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def path_figure(curves, groups=(), base="base"):
    curves = {name: {**found, "groups": groups} for name, found in curves.items()}
    return pairs_figure(curves, {}, base=base, level=None)


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_path_figure_draws_each_curve_once(count):
    curves = {f"curve {i}": curve(i) for i in range(count)}
    (axes,) = path_figure(curves, groups=("attn", "mlp")).axes
    assert len(axes.lines) == count
    for line, (name, expected) in zip(axes.lines, curves.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xdata(), expected["alpha"])
        np.testing.assert_array_equal(line.get_ydata(), expected["loss"])
    assert len({(line.get_color(), str(line.get_linestyle())) for line in axes.lines}) == count
    assert axes.get_xlabel() == "α  (0: base, 1: fine-tuned); interpolated: attn, mlp"
    assert axes.get_ylabel() == "loss (nats per token)"


def test_labels_stand_at_their_lines_where_they_fit():
    (axes,) = path_figure({"related": curve(0.01), "aligned": curve(0.02), "independent": curve(8)}).axes
    assert axes.get_legend() is None
    assert texts(axes) == ["related", "aligned", "independent"]
    assert [text.get_color() for text in axes.texts] == [line.get_color() for line in axes.lines]
    heights = [text.get_position()[1] for text in axes.texts]
    assert heights == sorted(heights)


def test_a_legend_names_lines_that_are_too_close_for_labels():
    (axes,) = path_figure({"a": curve(5.0), "b": curve(5.3), "c": curve(0.1)}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "c"]
    assert not axes.texts


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.1)), min_size=1, max_size=6))
def test_stacked_labels_never_touch(spans):
    spans = [np.array([low, low + extent]) for low, extent in spans]
    bottoms = _stack(spans)
    if bottoms is not None:
        assert all(bottom > high for bottom, (_, high) in zip(bottoms, spans, strict=True))
        assert np.diff(sorted(bottoms)).min(initial=1) > 0.07
        assert max(bottoms) < 1


def test_losses_that_are_not_finite_leave_a_gap_and_are_counted():
    broken = plain({**curve(1), "loss": [2.0, math.nan, math.inf, None, *[2.0] * 7]})
    (axes,) = path_figure({"broken": broken}).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2, np.nan, np.nan, np.nan, *[2] * 7])
    assert axes.lines[0].get_label() == "broken (3 of 11 not finite)"
    (axes,) = path_figure({"all": curve(math.nan)}).axes
    assert "11 of 11 not finite" in axes.lines[0].get_label()


def test_a_huge_curve_does_not_flatten_the_others():
    (axes,) = path_figure({"huge": curve(1000), "flat": curve(0.5)}).axes
    low, high = axes.get_ylim()
    assert low < 2
    assert 2.5 < high < 20
    assert "↑ up to 1e+03" in texts(axes)
    (axes,) = path_figure({"usual": curve(8), "flat": curve(0.5)}).axes
    assert axes.get_ylim()[1] > 10
    assert not any("up to" in text for text in texts(axes))


def test_figure_of_run_has_a_panel_for_each_statistic_with_a_result():
    mode, cos, emb, l2 = figure_of_run(record()).axes
    assert [axes.get_title(loc="left").split(":")[0] for axes in (mode, cos, emb, l2)] == ["mode", "cos", "emb", "l2"]
    assert mode.get_title(loc="left") == "mode: a number\n7 non-aligned, 2.1 aligned"
    assert all(axes.get_xlabel() for axes in (mode, cos, emb, l2))
    assert all(axes.get_ylabel() for axes in (mode, cos, emb))

    assert [line.get_label() for line in mode.lines] == ["non-aligned", "aligned"]
    np.testing.assert_array_equal(mode.lines[1].get_ydata(), curve(0.1)["loss"])
    np.testing.assert_array_equal(cos.lines[0].get_ydata(), [-1.5, -20, -3.25])
    assert (cos.get_xlabel(), cos.get_ylabel()) == ("layer", "log10 p of a layer")
    assert [bar.get_width() for bar in l2.patches] == [1.5, 0.25]


def test_boxes_are_the_quantiles():
    sides = {"non_aligned": result(0.1, distribution=quantiles(3, 0.1)), "aligned": None}
    (axes,) = figure_of_run({"statistics": {"emb": sides}}).axes
    rows = np.array(quantiles(3, 0.1)["quantiles"]["layers"])
    for outer, boxes in enumerate(axes.collections):
        ends = np.array([segment[:, 1] for segment in boxes.get_segments()])
        np.testing.assert_allclose(ends, rows[:, [outer, -1 - outer]])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), rows[:, 3])
    assert axes.get_ylabel() == "cosine of matched units"


def test_one_distribution_a_side_is_named_by_its_side():
    sides = {side: result(0.1, distribution=quantiles(1, 0.1)) for side in ("non_aligned", "aligned")}
    (axes,) = figure_of_run({"statistics": {"emb": sides}}).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["non-aligned", "aligned"]
    assert axes.get_legend() is None


def test_a_run_without_result_shows_why():
    (axes,) = figure_of_run({"statistics": {"glu": record()["statistics"]["glu"]}}).axes
    assert texts(axes) == ["glu: not applicable, the MLP has no gate"]


def test_png_has_160_dots_per_inch_and_takes_any_text(tmp_path):
    figure = path_figure({"$x_1 {": curve(1)}, base=r"50 $ \alpha %")
    save_png(figure, tmp_path / "f.png")
    content = (tmp_path / "f.png").read_bytes()
    assert content == png(figure)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20]) == 1024


def test_figures_need_no_pyplot():
    code = "import sys, tracing_jax.report.page; print('matplotlib.pyplot' in sys.modules, 'jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]


@pytest.mark.slow
def test_page_is_one_closed_file():
    page = Page(html(record()))
    assert not page.tags & {"script", "link", "iframe", "object", "base", "form"}
    references = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert len(references) == 4
    assert all(value.startswith("data:image/png;base64,iVBOR") for value in references)
    assert "url(" not in html(record())
    assert "@import" not in html(record())


def test_page_shows_the_numbers_of_the_run():
    source = html(record())
    text = Page(source).text
    for shown in (
        "org/tuned against org/model",
        "7 non-aligned, 2.1 aligned",
        "0.1 (p = 10^-4312.7) non-aligned",
        "not applicable, the MLP has no gate",
        "layer 1 -20",
        "barrier (nats per token) 5 –",
        "perplexity (per token) 7.389 8.5",
        "share moved: embed 0.9912",
        "objective 1, 2",
        "parameters 1,234,567 1,234,567",
        "revision 0123456789ab… 0123456789ab…",
        "model.safetensors base abababababab…",
        "total 3.5",
        "one note",
        "device: mesh data 1, model 1",
        '"alphas": 11',
    ):
        assert shown in text
    assert f'title="{"ab" * 32}"' in source


def test_page_escapes_everything():
    evil = "<script>alert('x')</script>&\"><img src=http://x.example/y>"
    full = record(notes=[evil], args={evil: evil}, tokens={evil: evil}, commit=evil)
    full["models"]["base"] = full["models"]["base"] | {"id": evil, "shape": {evil: evil}, "files": {evil: evil}}
    named = result(1.0, label=evil, p_reason=evil, per_layer={"label": evil, "values": [1.0]})
    full["statistics"] = {evil: {"non_aligned": named, "aligned": None}}
    page = Page(html(full))
    assert "script" not in page.tags
    assert all(value.startswith("data:") for _, name, value in page.attributes if name in ("src", "href"))
    assert evil in page.text


def test_page_of_a_run_that_did_little():
    full = record(permuted=None, alignment=None, perplexity=None, notes=[], statistics={}, seconds={})
    text = Page(html(full)).text
    assert "org/tuned" in text
    assert "Alignment" not in text
    assert "Perplexity" not in text


def test_page_holds_no_token_and_takes_arrays():
    token = "hf_" + "Ab3" * 12
    page = html(record(args={"hf_token": "swordfish", "note": token}, notes=[token], seconds={"load": np.float32(1)}))
    assert token not in page
    assert "swordfish" not in page
    assert "[redacted]" in page


def test_text_table_aligns_its_columns():
    rows = [("related", 2.31234567, 12), ("independent", None, 12345), ("x", math.inf, 0)]
    assert text_table(rows, ("pair", "loss", "n")).splitlines() == [
        "pair           loss       n",
        "-----------  ------  ------",
        "related      2.3123      12",
        "independent       –  12,345",
        "x               inf       0",
    ]


def test_text_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match=r"rows \[1\] .* 2 cells"):
        text_table([(1, 2), (1,)], ("a", "b"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (True, "yes"), (6738415616, "6,738,415,616"), (-4312.7, "-4312.7"), (1.2e-5, "1.2e-05"), ("a", "a")],
)
def test_cells(value, shown):
    assert cell(value) == shown


def test_cells_of_lists_and_mappings():
    assert cell([1.0, None, "x"]) == "1, –, x"
    assert cell({"data": 1, "model": 8}) == "data 1, model 8"
    assert cell([]) == cell({}) == "–"


@pytest.mark.parametrize(("log10_p", "shown"), [(0.0, "p = 1"), (-1.5, "p = 0.032"), (-4312.7, "p = 10^-4312.7")])
def test_p_values(log10_p, shown):
    assert p_text(log10_p) == shown


def test_a_statistic_that_was_not_run_says_so():
    sides = {"non_aligned": None, "aligned": None}
    assert (subject("cos", sides), outcome(sides)) == ("cos", "not run")


PLACES = [f"layer {i}" for i in range(3)]


def one_test(name="agreement, calibrated", log10_ps=(-0.0, -20.0, -4000.0), decides=True, places=PLACES):
    log10_p = None if log10_ps is None else min(log10_ps) + 0.5
    values = {"units": [64] * len(places), "agreeing": [7] * len(places), "r": [0.25] * len(places)}
    log10_ps = None if log10_ps is None else list(log10_ps)
    return {
        "name": name, "log10_p": log10_p, "combined": "Holm's minimum over layers", "places": list(places),
        "log10_ps": log10_ps, "values": values, "decides": decides,
    }  # fmt: skip


def judged(word="related", log10_p=-41.25, **changes):
    meaning = {"related": "not independent", "undecided": "too weak", "no_evidence": "never proved"}[word]
    base = {
        "verdict": word, "meaning": meaning, "level": 1e-3, "statistic": "csu", "adjusted_log10_p": log10_p,
        "family": {"csu": log10_p - 0.5, "match": -0.0}, "layers": PLACES if word == "related" else [],
        "evidence": [{"statistic": "csu", "test": "agreement", "place": f"layer {i}", "log10_p": i - 320.5}
                     for i in range(12)],
    }  # fmt: skip
    return base | changes


NULL = {"lambda": 1.5, "m": 0.0, "s": 1.25, "u": [0.05, 0.0625, 0.05], "u from": "the table",
        "controls": {"pairs": 6, "levels": LEVELS, "k": LEVELS, "z": LEVELS}}  # fmt: skip


def layer_map(rows=5, columns=5):
    table = np.full((rows, columns), -0.25)
    np.fill_diagonal(table, -300.0)
    size = min(rows, columns)
    pairs = [{"base": i, "ft": i, "log10_p": -300.0, "units": 64, "agreeing": 48} for i in range(size)]
    return {
        "log10_p": table.tolist(), "pairs": pairs, "unmatched_base": list(range(size, rows)),
        "unmatched_ft": list(range(size, columns)), "sentence": f"{size} layers are <found> again.",
    }  # fmt: skip


def with_tests(**changes):
    """A record with a test on the pair as given, without p-value on the aligned pair, and a map of layers."""
    tests = [one_test(), one_test("agreement, parametric", (-1.0, -30.5, -4000.25), decides=False)]
    aligned = result(1.0, p_reason="after alignment nothing has a null", tests=[one_test(log10_ps=None)])
    given = result(0.5, log10_p=-3999.5, tests=tests, null=NULL, notes=["one remark"])
    statistics = {
        "csu": {"non_aligned": given, "aligned": aligned},
        "match_all": {"non_aligned": result(0.5, log10_p=-299.0, layer_map=layer_map()), "aligned": None},
    }
    return record(statistics=statistics, verdict=judged(), **changes)


def seen(source):
    """The words of a page before its configuration, which is quoted as it is."""
    return Page(source).text.partition(" Configuration ")[0]


@pytest.mark.parametrize("word", ["related", "undecided", "no_evidence"])
def test_page_opens_with_the_verdict_and_its_grounds(word):
    source = html(record(verdict=judged(word), statistics={}))
    page = Page(source)
    assert ("div", "class", f"verdict {word}") in page.attributes
    start = page.text.partition("Statistics in the verdict")[0]
    assert f"{word.replace('_', ' ')} {SENTENCES[word]} in detail {judged(word)['meaning']}" in start
    assert "p = 10^-41.2 after Holm over csu and match" in start
    assert ("layers 0-2" in start) is (word == "related")
    assert "csu 10^-41.8 match 1" in page.text
    assert "csu agreement layer 0 10^-320.5 csu agreement layer 1" in page.text


def test_a_verdict_without_a_test_says_what_to_ask_for():
    nothing = judged("undecided", statistic=None, adjusted_log10_p=None, family={}, evidence=[])
    page = Page(html(record(verdict=nothing, statistics={}))).text
    assert f"undecided {SENTENCES['undecided']} in detail too weak level 0.001" in page
    assert "Statistics in the verdict" not in page
    assert "UNDECIDED  model and tuned" in summary([with_tests() | {"verdict": nothing}])


def test_every_p_value_of_a_test_is_on_the_page():
    text = Page(html(with_tests())).text
    for shown in (
        "agreement, calibrated 10^-3999.5 Holm's minimum over layers (3) yes",
        "agreement, parametric 10^-3999.8 Holm's minimum over layers (3) no",
        "layer 0 64 7 0.25 1 0.1",
        "layer 2 64 7 0.25 10^-4000.0 10^-4000.2",
        "aligned: No p-value: after alignment nothing has a null",
        "one remark",
        "λ: units that agree by chance, mean 1.5",
        "layer 0 0.05, layer 1 0.0625, layer 2 0.05",
        "min 0, 5 % 0.05, 25 % 0.25, median 0.5, 75 % 0.75, 95 % 0.95, max 1",
        "5 layers are <found> again.",
        "4 4 10^-300.0 64 48",
    ):
        assert shown in text


def test_no_p_value_is_shown_as_zero():
    words = seen(html(with_tests())).split()
    assert "0.0" not in words
    assert "-0" not in words
    assert "-0.0" not in words
    assert p_cell(-1e5) == "10^-100000.0"
    assert p_cell(-320.0) == "10^-320.0"
    assert p_cell(-299.0) == "10^-299.0"
    assert (p_cell(-0.0), p_cell(-0.001), p_cell(None)) == ("1", "1", "–")


def test_tests_are_drawn_by_layer_with_the_level():
    csu, image, _ = figure_of_run(with_tests()).axes
    calibrated, parametric, level, single = csu.lines
    np.testing.assert_array_equal(calibrated.get_ydata(), [0, -20, -4000])
    np.testing.assert_array_equal(parametric.get_ydata(), [-1, -30.5, -4000.25])
    assert parametric.get_linewidth() < calibrated.get_linewidth()
    assert level.get_ydata()[0] == pytest.approx(-3)
    assert single.get_ydata()[0] == pytest.approx(-3 - math.log10(3))
    low, high = csu.get_ylim()
    assert low < -4000.25
    assert high > 0
    assert image.get_images()


def test_a_layer_of_several_places_shows_its_smallest_p():
    places = ["layers/0/mlp/up_proj", "layers/0/mlp/gate_proj", "layers/1/mlp/up_proj", "embed/embedding"]
    test = one_test("exact null", (-1.0, -2.0, -0.5, -9.0), places=places)
    sides = {"non_aligned": result(0.5, tests=[test]), "aligned": None}
    (axes,) = figure_of_run({"statistics": {"csu_all": sides}}).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [-2, -0.5])
    assert "smallest in the layer" in axes.get_ylabel()


@pytest.mark.parametrize("shape", [(5, 5), (5, 7), (80, 80)])
def test_the_map_of_layers_is_drawn_with_its_pairs_framed(shape):
    sides = {"non_aligned": result(0.5, log10_p=-9.0, layer_map=layer_map(*shape)), "aligned": None}
    figure = figure_of_run({"statistics": {"match_all": sides}, "verdict": judged()})
    axes, bar = figure.axes
    assert axes.get_images()[0].get_array().shape == shape
    assert len(axes.patches) == min(shape)
    assert bar.get_ylabel() == "log10 p"
    assert png(figure)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (PLACES, "layers 0-2"),
        (["layer 7", "layer 0", "layer 1"], "layers 0-1, 7"),
        (["layer 3"], "layer 3"),
        (["base 0 : ft 1", "base 1 : ft 2", "base 5 : ft 2"], "base 0-1 : ft 1-2, base 5 : ft 2"),
        (["{x} 1", "lm_head"], "(x) 1, lm_head"),
        ([*"abcdefgh"], "a, b, c, d, e, f, and 2 more"),
        ([], ""),
    ],
)
def test_places_are_ranges(places, words):
    assert places_text(places) == words


def test_page_names_what_was_asked_for():
    asked = {"base_model_id": "demo:base", "ft_model_id": "/some/folder/tuned/"}
    assert "<title>tuned against demo:base</title>" in html(record(args=asked))


def test_the_midpoint_stands_once():
    full = record()
    for side in full["statistics"]["mode"].values():
        side["label"] = "midpoint loss"
    text = Page(html(full)).text
    assert "loss at α = 0.5" not in text
    assert "midpoint loss 7 2.1" in text


def several():
    names = ("tuned", "b", "<i>c</i>")
    verdicts = (judged(over_pairs_log10_p=-40.75), judged("undecided", -2.0), judged("no_evidence", -0.0))
    pairs = zip(names, verdicts, strict=True)
    paths = {"non_aligned": result(7.0, curve=curve(5) | {"midpoint": 7.0, "barrier": 5.0, "groups": ["mlp"]})}
    found = {"mode": paths | {"aligned": None}, "csu": {"non_aligned": result(0.5, log10_p=-9.0), "aligned": None}}
    return [record(args={"ft_model_id": f"org/{name}"}, verdict=word, statistics=found) for name, word in pairs]


def test_what_a_path_does_not_show_stands_once_under_the_losses_of_all_pairs():
    records = several()
    for found in records:
        found["statistics"]["mode"]["non_aligned"]["notes"] = ["a low path is no evidence"]
    assert summary(records).count("a low path is no evidence") == 1
    assert "a low path is no evidence" in html(records[0])


def test_summary_has_the_verdict_on_each_pair_and_tables_of_all():
    lines = summary(several()).splitlines()
    words = [line.strip().split("  ")[0] for line in lines if re.match(r"  (RELATED|UNDECIDED|NO EVIDENCE)", line)]
    assert words == ["RELATED", "UNDECIDED", "NO EVIDENCE"]
    assert any(line.split() == ["tuned", "related", "csu", "10^-41.2", "10^-40.8", "layers", "0-2"] for line in lines)
    assert "after Holm over the 3 pairs" in " ".join(" ".join(lines).split())
    assert "csu, p = 10^-41.2 after Holm over csu and match; level 0.001; layers 0-2" in " ".join(
        " ".join(lines).split()
    )
    assert max(map(len, lines)) <= 80
    assert "p (all pairs)" not in summary(several()[:1])


def test_family_page_links_each_pair_and_escapes():
    page = Page(pairs_html(several(), ["f/tuned.html", "f/b.html", "f/%3Ci%3E.html"]))
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links == ["f/tuned.html", "f/b.html", "f/%3Ci%3E.html"]
    assert not page.tags & {"script", "i", "link"}
    assert "tuned related csu 10^-41.2 10^-40.8 layers 0-2" in page.text
    assert "no evidence csu 1" in page.text
    for word in ("related", "undecided", "no_evidence"):
        assert ("div", "class", f"verdict {word}") in page.attributes  # a box for each pair
        assert any(value.endswith(f"tone {word}") for _, name, value in page.attributes if name == "class")


def test_figure_of_a_family_shows_paths_and_p_values_of_those_that_have_them():
    path, ps = figure_of_pairs(several()).axes
    assert len(path.lines) > 0
    assert [tick.get_text() for tick in ps.get_yticklabels()] == ["tuned", "b", "i>"]
    without = [record(statistics={}, verdict=None)]
    assert texts(figure_of_pairs(without).axes[0]) == ["No pair has a path or a p-value that enters a verdict."]


def test_the_text_of_a_familys_figure_says_what_it_shows():
    def alt(records):
        page = Page(pairs_html(records, [f"{i}.html" for i in range(len(records))]))
        (found,) = (value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
        return found

    found = alt(several())
    assert found.startswith("Loss in nats per token along the path from ")
    assert "tuned from 2.00 to 2.00, at most 7.00" in found
    assert "where the level is 0.001: tuned 10^-41.8 by csu; b 0.0032 by csu; " in found
    assert alt([record(statistics={}, verdict=None)]) == "No pair has a path or a p-value that enters a verdict."


def test_models_of_one_name_are_told_apart():
    assert pair_names([record(), record(), record()]) == ["tuned", "tuned-2", "tuned-3"]


def test_page_of_tests_escapes_everything():
    evil = "<script>alert('x')</script>"
    full = with_tests()
    csu = full["statistics"]["csu"]["non_aligned"]
    csu |= {"tests": [one_test(evil, places=[evil] * 3)], "notes": [evil], "null": {evil: evil}}
    row = {"statistic": evil, "test": evil, "place": evil, "log10_p": -5.0}
    full["verdict"] = judged(statistic=evil, family={evil: -9.0}, layers=[evil], evidence=[row], meaning=evil)
    assert "script" not in Page(html(full)).tags
    assert "script" not in Page(pairs_html([full, full], ["a.html", "b.html"])).tags


def test_a_calibrated_p_value_is_shown_no_smaller_than_its_assumption_bears():
    tests = [{"decides": True, "calibrated": True, "log10_p": -273.2}]
    shown = outcome({"non_aligned": result(1.0, log10_p=-273.2, tests=tests), "aligned": None})
    assert shown == "1 (p < 10^-12) non-aligned"
    assert "10^-273.2" in outcome({"non_aligned": result(1.0, log10_p=-273.2), "aligned": None})


def test_nothing_on_a_page_shows_a_calibrated_p_value_below_what_its_assumption_bears():
    exact, calibrated = one_test("in place", (-0.5, -20.0, -345.25)), one_test("matched", (-0.5, -20.0, -678.25))
    calibrated["calibrated"] = True
    matched = result(0.5, log10_p=-678.0, firm_log10_p=-677.0, tests=[calibrated], layer_map=layer_map())
    given = result(0.5, log10_p=-345.0, tests=[exact])
    statistics = {
        name: {"non_aligned": found, "aligned": None} for name, found in {"csu": given, "match": matched}.items()
    }
    evidence = [{"statistic": name, "test": test["name"], "place": "layer 2", "log10_p": test["log10_ps"][2]}
                for name, test in {"csu": exact, "match": calibrated}.items()]  # fmt: skip
    verdict = judged(family={"csu": -345.0, "match": -678.0}, evidence=evidence)
    original = record(statistics=statistics, verdict=verdict)
    source = html(original)
    text = seen(source)
    assert "csu 10^-345.0 match < 10^-12" in text
    assert "csu in place layer 2 10^-345.2 match matched layer 2 < 10^-12" in text
    assert not re.search(r"-67[78]|-300", text)
    panels = figure_of_run(original).axes
    assert min(line.get_ydata().min() for axes in panels for line in axes.lines if line.get_label() == "matched") == -12
    assert original["verdict"]["family"]["match"] == -678.0
    assert original["statistics"]["match"]["non_aligned"]["tests"][0]["log10_ps"][2] == -678.25


@given(st.floats(-5000, 0))
def test_a_p_value_is_written_one_way(log10_p):
    """Sentences, tables and the page write the same digits."""
    shown = p_cell(log10_p)
    assert p_text(log10_p) == f"p = {shown}"
    assert outcome({"non_aligned": result(1.0, log10_p=log10_p), "aligned": None}) == f"1 (p = {shown}) non-aligned"
    assert shown == "< 10^-12" or (shown.startswith("10^-") == (log10_p <= -4))


def test_a_figure_of_many_statistics_is_no_higher_than_its_limit():
    many = {
        f"s{i}": {"non_aligned": result(7.0, curve=curve(5) | {"groups": ["mlp"]}), "aligned": None} for i in range(7)
    }
    images = images_of_run(record(statistics=many))
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in images.by_statistic.items()}
    width, height = Image.open(io.BytesIO(images.whole)).size
    assert list(sizes) == list(many)
    assert max(h for _, h in sizes.values()) < height <= 1600
    assert width > 3 * 1024 - 1
    assert all(0.97 * 1024 <= w <= 1024 for w, _ in sizes.values())


def crowded_figure():
    names = [f"gate and {side}, even and odd layers, agreement, {kind}" for side in ("up", "down") for kind in "ab"]
    tests = [one_test(name) for name in (*names, "short")]
    long = result(0.5, log10_p=-9.0, tests=tests) | {"label": "units whose up-projection stays in place, " * 4}
    statistics = {f"s{i}": {"non_aligned": long, "aligned": None} for i in range(4)} | with_tests()["statistics"]
    return figure_of_run(record(statistics=statistics, verdict=judged()))


def crowded_figure_of_pairs():
    family = {f"features_in_plac{'e' * i}": -10.0 * i for i in range(11)}
    return figure_of_pairs([found | {"verdict": judged(family=family)} for found in several()])


@pytest.mark.parametrize("make", [crowded_figure, crowded_figure_of_pairs])
def test_nothing_in_a_figure_is_cut_or_overlaps(make):
    figure = make()
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    parts = [axes.get_tightbbox(renderer) for axes in figure.axes]
    width, height = figure.get_size_inches() * figure.dpi
    assert all(part.x0 >= 0 and part.y0 >= 0 and part.x1 <= width and part.y1 <= height for part in parts)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(parts, 2))
    legends = [axes for axes in figure.axes if axes.get_legend()]
    assert legends
    for axes in legends:
        words = [axes.xaxis.label, *axes.get_xticklabels()]
        assert (
            not axes.get_legend()
            .get_window_extent(renderer)
            .count_overlaps([word.get_window_extent(renderer) for word in words])
        )


def test_what_a_figure_shows_is_said_to_those_who_do_not_see_it():
    alts = [value for tag, name, value in Page(html(with_tests())).attributes if (tag, name) == ("img", "alt")]
    assert alts[0] == "csu: a number: 0.5 (p = 10^-3999.5) non-aligned, 1 aligned"


# Maps.


def test_a_test_of_layers_of_equal_index_is_shown_among_the_controls_of_other_layers():
    test = counted([f"layer {i}" for i in range(3)], [64, 60, 0])
    null = {"weights": {"lambda": 1.0, "controls": {"pairs": 2, "places": [[0, 2, 32, 1], [2, 0, 32, 16]]}}}
    found = record(statistics={"match": {"non_aligned": result(0.5, tests=[test], null=null), "aligned": None}})
    _, square = maps(found)
    assert [[cell.shade for cell in cells] for _, cells in square.rows] == [[5, -1, 0], [-1, 4, -1], [3, -1, 0]]
    assert square.rows[2][1][0].text == "base 2, ft 0: 16 of 32 agree (50%)"
    assert (
        "2 pairs of other layers were compared, on a part of their units, to measure what agrees by chance: 26.6%"
        in (square.alt)
    )
    assert "controls: places" not in Page(html(found)).text


def with_partners():
    """A record of a statistic that kept partners of four units of one layer."""
    kept = {"layer": 2, "units": [1000, 2000], "readings": ["gate", "up"],
            "partners": [[0, 0, 0], [250, 1999, 1999], [500, 10, 1200], [999, 1500, 1500]]}  # fmt: skip
    return record(statistics={"match": {"non_aligned": result(0.5) | {"unit_map": kept}, "aligned": None}})


def test_the_map_of_units_shows_where_their_partners_are():
    (drawn,) = unit_maps(with_partners())
    assert [(p.x, p.y, p.firm) for p in drawn.points] == [
        (0.05, 0.03, True), (25.05, 99.97, True), (50.05, 0.53, False), (99.95, 75.03, True),
    ]  # fmt: skip
    assert drawn.points[2].text == "unit 500 of base: 10 by gate, 1,200 by up"
    assert "Of 4 units of layer 2 of base, 3 have one partner in ft by gate and by up; 1 of these are in" in drawn.alt
    page = Page(html(with_partners()))
    assert [name for tag, name, value in page.attributes if tag == "circle" and value == "firm"] == ["class"] * 3
    assert drawn.alt in page.text


def counted(places, agreeing, units=64, name="weights, agreement, calibrated", **changes):
    return (
        one_test(name, [-1.0 - i for i in range(len(places))], places=places)
        | {"values": {"units": [units] * len(places), "agreeing": agreeing}}
        | changes
    )


def with_counted_tests():
    """A record whose tests count agreeing units: by layer, and in each pair of layers."""
    layers = [f"layer {i}" for i in range(3)]
    square = [f"base {i} : ft {j}" for i in range(2) for j in range(3)]
    given = {
        "match": counted(layers, [64, 16, 0]),
        "csu": counted(layers[:2], [3, 4], name="agreement"),
        "match_all": counted(square, [0, 64, 0, 1, 2, 62]),
        "cos": counted(layers, [1, 1, 1], decides=False),
    }
    found = {name: {"non_aligned": result(0.5, tests=[test]), "aligned": None} for name, test in given.items()}
    return record(statistics={**found, "l2": {"non_aligned": result(0.5), "aligned": None}}, verdict=judged())


def test_maps_of_deep_models_show_of_neighbouring_layers_the_most_that_agree():
    """Nothing is dropped, the map stays small, and what agrees anywhere is seen."""
    L, M = 130, 70
    agreeing = np.zeros((L, M), int)
    agreeing[129, 69] = agreeing[1, 3] = 63
    places = [f"base {i} : ft {j}" for i in range(L) for j in range(M)]
    test = counted(places, agreeing.ravel().tolist(), log10_ps=None)
    found = record(statistics={"match_all": {"non_aligned": result(0.5, tests=[test]), "aligned": None}})
    (drawn,) = maps(found)
    assert (len(drawn.rows), len(drawn.rows[0][1])) == (44, 35)
    dark = {(i, j) for i, (_, cells) in enumerate(drawn.rows) for j, cell in enumerate(cells) if cell.shade > 0}
    assert dark == {(0, 1), (43, 34)}
    assert drawn.rows[0][0] == "base 0-2"
    assert drawn.rows[43][0] == "base 129"
    assert drawn.rows[0][1][1].text == "base 1, ft 3: 63 of 64 agree (98%), the most of the layers in this cell"


def test_maps_show_what_agrees_by_layer_and_layer_by_layer():
    found = with_counted_tests()
    by_layer, pairs = maps(found)
    assert [[cell.shade for cell in cells] for _, cells in by_layer.rows] == [[5, 2, 0], [0, 1, -1]]
    assert by_layer.rows[0][1][1].text == "layer 1: 16 of 64 agree (25%), p 0.01"
    assert "match, weights 42%; csu 5%" in by_layer.alt
    assert [[cell.shade for cell in cells] for _, cells in pairs.rows] == [[0, 5, 0], [0, 0, 5]]
    page = Page(html(found))
    assert by_layer.alt in [value for _, name, value in page.attributes if name == "aria-label"]
