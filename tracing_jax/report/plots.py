"""Figures of a run, and of the demo's path curves.

Built from `matplotlib.figure.Figure` alone: no pyplot, no global state, so figures can be made in any thread.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tracing_jax.record import atomic_write
from tracing_jax.report import panels
from tracing_jax.report.wording import outcome, results_by_side, subject

_WIDTH_INCHES = 6.4
_DOTS_PER_INCH = 160


@dataclass(frozen=True)
class _Panel:
    title: str
    draw: Callable[[Axes, Mapping[str, Any]], None]
    data: Mapping[str, Any]
    height_inches: float


def path_figure(
    curves: Mapping[str, Mapping[str, Any]], *, groups: Sequence[str] = (), title: str = "Loss along the path"
) -> Figure:
    """The loss along the path between two models, one line for each named curve.

    Args:
        curves: by label, `alpha` (0 is base, 1 is the fine-tuned model) and `loss` in nats per token, of equal length;
            a loss may be None or not finite, and is left out of its line.
        groups: the groups of weights that move along the path, where not all do.
        title: stands above the axes.
    """
    moving = {name: {**curve, "groups": list(groups)} for name, curve in curves.items()}
    return _figure([_Panel(title, panels.draw_path, moving, 3.5)])


def figure_of_run(record: Mapping[str, Any]) -> Figure:
    """The figure of a run: for each statistic a panel for its curve, its distribution and its values per layer.

    A statistic with none of these shows its headline numbers; a run without any result shows the reasons.
    """
    statistics = record["statistics"]
    found = [panel for name, sides in statistics.items() for panel in _panels(name, sides)]
    if not found:
        text = "\n".join(f"{subject(name, sides)}: {outcome(sides)}" for name, sides in statistics.items())
        found = [_Panel("No statistic of this run has a figure", panels.draw_text, {"text": text}, 1.5)]
    return _figure(found)


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG of 160 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def save_png(figure: Figure, path: str | PurePath) -> None:
    """Writes the figure as a PNG of 160 dots per inch, atomically."""
    atomic_write(path, png(figure))


def _panels(name: str, sides: Mapping[str, Any]) -> list[_Panel]:
    results = results_by_side(sides)
    found: list[_Panel] = []
    for part, draw, height_inches in (
        ("curve", panels.draw_path, 3.5),
        ("distribution", panels.draw_distribution, 3.3),
        ("per_layer", panels.draw_per_layer, 3.0),
    ):
        if data := {side: result[part] for side, result in results.items() if result.get(part)}:
            title = f"{name}: each layer" if found else f"{subject(name, sides)}\n{outcome(sides)}"
            found.append(_Panel(title, draw, data, height_inches))
    if not found and any(result.get("headline") is not None for result in results.values()):
        title = f"{subject(name, sides)}\n{outcome(sides)}"
        found = [_Panel(title, panels.draw_headlines, results, 1.2 + 0.3 * len(results))]
    return found


def _figure(found: Sequence[_Panel]) -> Figure:
    heights = [panel.height_inches for panel in found]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights)), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.1)
    grid = figure.subplots(len(found), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, panel in zip(grid[:, 0], found, strict=True):
        panels.style(axes)
        panel.draw(axes, panel.data)
        axes.set_title(panel.title, loc="left", pad=9, fontsize=10, color=panels.INK, wrap=True, parse_math=False)
    return figure
