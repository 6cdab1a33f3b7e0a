"""Panels of one pair of axes: loss along the path, distributions, values per layer, headline numbers."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tracing_jax.report.formatting import FURTHER_CURVES

# Okabe & Ito, "Color Universal Design" (2008): distinguishable with any colour vision. Its yellow is too pale on white.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GREY = "#222222", "#666666"
LABEL_INCHES = 0.48
"""Height of the tick labels and the label below axes."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

# The loss of unrelated models' midpoint is about ln(vocabulary), some five times the loss of a good model. A curve
# far above that is cut off, or the others would look flat.
_CLIP_AT_END_LOSSES = 6.0
_LABEL_HEIGHT = 0.075  # of the axes' height
_LONGEST_NAME = 30
_BOX_LEVELS = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def style(axes: Axes) -> None:
    """Removes the upper and right spine, and draws a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=9, length=3)


def draw_path(axes: Axes, curves: Mapping[str, Any]) -> None:
    """Draws the loss of each curve against alpha, labelled directly where the labels fit."""
    for i, (name, curve) in enumerate(curves.items()):
        loss = _floats(curve["loss"])
        missing = int(np.isnan(loss).sum())
        label = f"{elided(name)} ({missing} of {len(loss)} not finite)" if missing else elided(name)
        _line(axes, i, _floats(curve["alpha"]), loss, label)
        for kind, (further, more) in enumerate((curve.get("more") or {}).items()):
            called = f"{elided(name)}, {FURTHER_CURVES.get(further, further)}"
            look = {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[1 + kind], "linewidth": 1.3}
            axes.plot(_floats(more["alpha"]), _floats(more["loss"]), label=called, **look)
    interpolated = sorted({group for curve in curves.values() for group in curve.get("groups") or ()})
    note = f"; interpolated: {', '.join(interpolated)}" if interpolated else ""
    label_axes(axes, f"α  (0: base, 1: fine-tuned){note}", "loss (nats per token)")
    axes.set_xlim(-0.03, 1.03)
    _limit_losses(axes)
    _label_lines(axes)


def draw_distribution(axes: Axes, distributions: Mapping[str, Any]) -> None:
    """Draws the quantiles of each layer: range thin, 5 to 95 % wider, interquartile range widest, median as a dot."""
    rows = {stage: len(data["quantiles"]["layers"]) for stage, data in distributions.items()}
    single = set(rows.values()) == {1}
    for i, (stage, data) in enumerate(distributions.items()):
        shift = i if single else 0.4 * i - 0.2 * (len(rows) - 1)
        _boxes(axes, i, np.arange(rows[stage]) + shift, data["quantiles"], stage)
    label_axes(axes, "" if single else "layer", next(iter(distributions.values()))["label"])
    if single:
        axes.set_xticks(range(len(rows)), list(rows))
        axes.set_xlim(-0.8, len(rows) - 0.2)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes)


def draw_per_layer(axes: Axes, values: Mapping[str, Any]) -> None:
    """Draws one value per layer, one line per stage."""
    for i, (stage, data) in enumerate(values.items()):
        numbers = _floats(data["values"])
        _line(axes, i, np.arange(len(numbers)), numbers, stage)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_axes(axes, "layer", next(iter(values.values()))["label"])
    _legend(axes)


def draw_headlines(axes: Axes, results: Mapping[str, Any]) -> None:
    """Draws the headline number of each stage as a bar."""
    values = _floats([result.get("headline") for result in results.values()])
    axes.barh(range(len(values)), values, height=0.4, color=PALETTE[: len(values)])
    for i, stage in enumerate(results):
        axes.text(0, i - 0.25, f" {stage}", fontsize=9.5, color=PALETTE[i])
    axes.set_yticks([])
    axes.set_ylim(len(values) - 0.6, -0.75)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    label_axes(axes, next(iter(results.values()))["label"], "")


def draw_text(axes: Axes, data: Mapping[str, Any]) -> None:
    """Writes `data["text"]` instead of a plot."""
    axes.set_axis_off()
    place = axes.transAxes
    axes.text(0, 1, data["text"], transform=place, va="top", fontsize=9.5, color=GREY, wrap=True, parse_math=False)


def _floats(values: Sequence[Any]) -> np.ndarray:
    """Float64 with NaN for whatever is None or not finite (in a record, the strings "nan", "inf" and "-inf")."""
    array = np.array([np.nan if value is None else float(value) for value in values], np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _line(axes: Axes, i: int, x: np.ndarray, y: np.ndarray, label: str) -> None:
    color, dashes = PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]
    axes.plot(x, y, label=label, color=color, linestyle=dashes, linewidth=2, marker="o", markersize=3.5)


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Labels both axes, without math mode."""
    axes.set_xlabel(x, fontsize=9.5, color=INK, parse_math=False)
    axes.set_ylabel(y, fontsize=9.5, color=INK, parse_math=False)


def elided(name: str) -> str:
    """The name of a model with at most 30 letters, its beginning and its end, which leaves space for the data."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 2]}…{name[1 - _LONGEST_NAME // 2 :]}"


def legend_below(axes: Axes, columns: int, **look: Any) -> None:
    """Draws a legend that `layout` puts under the label of the x axis."""
    axes.legend(loc="upper left", ncols=columns, borderaxespad=0, borderpad=0, frameon=False, **look)


def _legend(axes: Axes) -> None:
    legend_below(axes, 3, fontsize=9)


def _limit_losses(axes: Axes) -> None:
    """Fits the loss axis to the curves, and annotates those that are cut off."""
    losses = {line: np.asarray(line.get_ydata()) for line in axes.lines}
    finite = np.concatenate([loss[np.isfinite(loss)] for loss in losses.values()])
    if not finite.size:
        return
    ends = np.array([loss[i] for loss in losses.values() for i in (0, -1)])
    ends = ends[np.isfinite(ends)]
    top = min(finite.max(), _CLIP_AT_END_LOSSES * float(np.median(ends))) if ends.size else finite.max()
    margin = 0.08 * (top - finite.min()) or 0.1
    axes.set_ylim(finite.min() - margin, top + 2 * margin)
    for line, loss in losses.items():
        if (peak := np.nanmax(loss, initial=-np.inf)) > top:
            at = (np.asarray(line.get_xdata())[np.nanargmax(loss)], top + margin)
            axes.annotate(f"↑ up to {peak:.3g}", at, color=line.get_color(), fontsize=9, ha="center", va="center")


def _label_lines(axes: Axes) -> None:
    """Writes each line's name above its middle, stacked where lines coincide; a legend where they do not fit."""
    low, high = axes.get_ylim()
    bottoms = _stack([(_middle(*np.asarray(line.get_data())) - low) / (high - low) for line in axes.lines])
    if bottoms is None:
        _legend(axes)
        return
    for line, bottom in zip(axes.lines, bottoms, strict=True):
        text = axes.text(0.5, bottom, str(line.get_label()), fontsize=9.5, ha="center", parse_math=False)
        text.set(color=line.get_color(), transform=axes.get_xaxis_transform())


def _middle(alpha: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The lowest and the highest loss under a label at alpha = 1/2."""
    finite = np.isfinite(loss)
    if not finite.any():
        return np.full(2, np.nan)
    losses = np.interp(np.linspace(0.42, 0.58, 9), alpha[finite], loss[finite])
    return np.array([losses.min(), losses.max()])


def _stack(spans: Sequence[np.ndarray]) -> list[float] | None:
    """The heights of labels above lines of these height intervals; None if a label would touch another line."""
    order = sorted(range(len(spans)), key=lambda i: spans[i][0])
    bottoms = [0.0] * len(spans)
    free = -np.inf
    for i, after in itertools.zip_longest(order, order[1:]):
        low, high = spans[i]
        following = 1.0 if after is None else spans[after][0]
        bottoms[i] = max(high + 0.025, free)
        free = bottoms[i] + _LABEL_HEIGHT
        coincide = after is not None and following - low < 0.02
        if not (low >= 0 and (coincide or free <= following)):
            return None
    return bottoms


def _boxes(axes: Axes, i: int, at: np.ndarray, quantiles: Mapping[str, Any], label: str) -> None:
    levels = _floats(quantiles["levels"])
    table = np.stack([np.interp(_BOX_LEVELS, levels, _floats(row)) for row in quantiles["layers"]])
    width = min(11.0, 130 / len(at))  # points: the boxes of eighty layers do not touch
    for outer, thickness, opacity in ((0, 0.8, 0.6), (1, 0.4 * width, 0.45), (2, width, 1.0)):
        lines = axes.vlines(at, table[:, outer], table[:, -1 - outer], PALETTE[i], linewidth=thickness, alpha=opacity)
    lines.set_label(label)
    (dots,) = axes.plot(at, table[:, 3], "o", markersize=min(0.6 * width, 4.5), color="white")
    dots.set(markeredgecolor=PALETTE[i], markeredgewidth=min(0.12 * width, 1.0))
