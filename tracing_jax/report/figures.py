"""Figures of a run and of several pairs.

They use `matplotlib.figure.Figure` without pyplot and its global state, so they can be made in any thread.
"""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tracing_jax.record import atomic_write
from tracing_jax.report import p_value_panels, panels
from tracing_jax.report.bounded_p_values import with_bounded_p_values
from tracing_jax.report.formatting import outcome, results_by_stage, subject
from tracing_jax.report.panel_arrangement import Area, Placed, arrange

_DOTS_PER_INCH = 160
_LETTERS = 80  # of a line of text that is as wide as a figure


@dataclass(frozen=True)
class _Panel:
    title: str
    draw: Callable[[Axes, Mapping[str, Any]], None]
    data: Mapping[str, Any]
    plot_inches: float


def pairs_figure(
    curves: Mapping[str, Mapping[str, Any]],
    log10_ps: Mapping[str, Mapping[str, Any]],
    *,
    base: str,
    level: float | None,
) -> Figure:
    """The loss along the path from one base to several models, and log10 p of every statistic in their verdicts.

    Args:
        curves: by label, `alpha` (0 is base, 1 is the fine-tuned model) and `loss` in nats per token, of equal length,
            and `groups`, what moves along the path; a loss may be None or not finite, and is left out of its line.
        log10_ps: by pair, log10 p of each statistic that entered its verdict.
        base: the name of the base.
        level: the decimal logarithm of the level, drawn as a rule; without it there is no panel of p-values.
    """
    found = []
    if curves:
        found.append(_Panel(f"Loss along the path from {base}", panels.draw_path, curves, 2.6))
    if log10_ps and level is not None:
        data = {"log10_ps": log10_ps, "level": level}
        plot_inches = 0.4 + 0.35 * len(log10_ps)
        found.append(_Panel(f"p-values against {base}", p_value_panels.draw_pairs, data, plot_inches))
    nothing = {"text": "No pair has a path or a p-value that enters a verdict."}
    return _figure([[panel] for panel in found or [_Panel("No figure", panels.draw_text, nothing, 0.5)]])


def figure_of_run(record: Mapping[str, Any]) -> Figure:
    """The figure of a run: for each statistic panels for its curve, its distribution, its layers and its layer map.

    Tests with p-values by layer, which exist for the pair as given only, replace the panel of one value per layer.
    A statistic with none of these shows its headline numbers; a run without any result shows the reasons.
    """
    found = _groups_of_run(record)
    if not found:
        statistics = record["statistics"]
        reasons = [f"{subject(name, stages)}: {outcome(stages)}" for name, stages in statistics.items()]
        lines = [line for reason in reasons for line in textwrap.wrap(reason, _LETTERS)]
        plot_inches = 0.3 + 0.17 * len(lines)
        text = {"text": "\n".join(lines)}
        nothing = _Panel("No statistic of this run has a figure", panels.draw_text, text, plot_inches)
        return _figure([[nothing]])
    return _figure(list(found.values()))


@dataclass(frozen=True)
class RunImages:
    """The figure of a run as a PNG of 160 dots per inch, and the part of each statistic that has one as another."""

    whole: bytes
    by_statistic: Mapping[str, bytes]


def images_of_run(record: Mapping[str, Any]) -> RunImages:
    """The images of a run; all is laid out and drawn once, and the parts are cut from the whole."""
    groups = _groups_of_run(record)
    figure, areas = _figure_and_areas(list(groups.values())) if groups else (figure_of_run(record), [])
    whole, parts = _drawn(figure), {}
    for name, area in zip(groups, areas):
        edges = (area.left, area.top, area.left + area.width, area.top + area.height)
        left, top, right, bottom = (round(edge * _DOTS_PER_INCH) for edge in edges)
        parts[name] = _encoded(whole[top:bottom, left:right])
    return RunImages(_encoded(whole), parts)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG of 160 dots per inch."""
    return _encoded(_drawn(figure))


def _drawn(figure: Figure) -> UInt8[np.ndarray, "H W 3"]:
    """The figure as pixels. `Figure.savefig` would draw all twice, the first time for the layout alone."""
    figure.set_dpi(_DOTS_PER_INCH)  # of figures made elsewhere
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]  # the background is not transparent


def _encoded(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    buffer = io.BytesIO()
    dots = (_DOTS_PER_INCH, _DOTS_PER_INCH)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="png", compress_level=2, dpi=dots)
    return buffer.getvalue()


def save_png(figure: Figure, path: str | PurePath) -> None:
    """Writes the figure as a PNG of 160 dots per inch, atomically."""
    atomic_write(path, png(figure))


def _groups_of_run(record: Mapping[str, Any]) -> dict[str, list[_Panel]]:
    """The panels of each statistic that has any."""
    statistics, level = with_bounded_p_values(record)["statistics"], _log10_level(record)
    found = {name: _panels(name, stages, level) for name, stages in statistics.items()}
    return {name: group for name, group in found.items() if group}


def _log10_level(record: Mapping[str, Any]) -> float | None:
    verdict = record.get("verdict")
    return math.log10(verdict["level"]) if verdict else None


def _panels(name: str, stages: Mapping[str, Any], level: float | None) -> list[_Panel]:
    results = results_by_stage(stages)
    found: list[_Panel] = []
    head = f"{subject(name, stages)}\n{outcome(stages)}"
    evidence = _evidence_panels(name, results, level)
    for part, draw, plot_inches in (
        ("curve", panels.draw_path, 2.6),
        ("distribution", panels.draw_distribution, 2.2),
        ("per_layer", panels.draw_per_layer, 2.0),
    ):
        data = {stage: result[part] for stage, result in results.items() if result.get(part)}
        if data and not (part == "per_layer" and evidence):
            title = f"{name}: each layer" if found else head
            found.append(_Panel(title, draw, data, plot_inches))
    found += evidence
    if evidence and found[0] is evidence[0]:
        found[0] = replace(found[0], title=head)
    if not found and any(result.get("headline") is not None for result in results.values()):
        found = [_Panel(head, panels.draw_headlines, results, 0.15 + 0.3 * len(results))]
    return found


def _evidence_panels(name: str, results: Mapping[str, Any], level: float | None) -> list[_Panel]:
    """The p-values of the first stage that has any, and the map of layers."""
    found = []
    tests = [[test for test in result.get("tests") or () if test["log10_ps"]] for result in results.values()]
    shown = next((stage for stage in tests if p_value_panels.has_layers(stage)), None)
    if shown:
        data = {"tests": shown, "level": level}
        found.append(_Panel(f"{name}: p-values by layer", p_value_panels.draw_tests, data, 1.8))
    if layer_map := next((result["layer_map"] for result in results.values() if result.get("layer_map")), None):
        data = {**layer_map, "level": level}
        found.append(_Panel(f"{name}: {layer_map['sentence']}", p_value_panels.draw_layer_map, data, 4.2))
    return found


def _figure(groups: Sequence[Sequence[_Panel]]) -> Figure:
    return _figure_and_areas(groups)[0]


def _figure_and_areas(groups: Sequence[Sequence[_Panel]]) -> tuple[Figure, list[Area]]:
    """The panels of a group below one another in an area of its own, and these areas; in several columns if high."""
    figure = Figure(facecolor="white", dpi=_DOTS_PER_INCH)
    placed = [
        [Placed(_drawn_panel(figure, panel), panel.title, panel.plot_inches) for panel in group] for group in groups
    ]
    return figure, arrange(figure, placed)


def _drawn_panel(figure: Figure, panel: _Panel) -> Axes:
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    panels.style(axes)
    panel.draw(axes, panel.data)
    return axes
