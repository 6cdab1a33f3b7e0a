"""The figures of the benchmarks, in the style of the reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tracing_jax.report.panels import GREY, INK, PALETTE, style

_KS_95 = 1.358  # 95 % quantile of the Kolmogorov distribution: sqrt(n) sup |F_n - F| for large n


def uniformity(measured: Mapping[str, Mapping[tuple[str, str], Any]]) -> Figure:
    """The distribution of p-values minus the uniform one: a panel for each population and statistic.

    Args:
        measured: population -> (statistic, test) -> p-values `layers` `[N, L]` and `combined` `[N]`.
    """
    names = list(measured)
    statistics = list(dict.fromkeys(statistic for statistic, _ in measured[names[0]]))
    figure = Figure(figsize=(9.6, 2.1 * len(statistics) + 1.0), facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.06)
    grid = figure.subplots(len(statistics), len(names), sharex=True, sharey=True, squeeze=False)
    for row, statistic in zip(grid, statistics, strict=True):
        for axes, name in zip(row, names, strict=True):
            tests = {test: values for (s, test), values in measured[name].items() if s == statistic}
            _draw_uniformity(axes, tests)
            axes.set_title(f"{statistic}: {name}", loc="left", fontsize=9.5, color=INK)
        row[0].set_ylabel("share of p-values below p, minus p", fontsize=8.5, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("p", fontsize=9.5, color=INK)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _draw_uniformity(axes: Axes, tests: Mapping[str, Any]) -> None:
    style(axes)
    N = len(next(iter(tests.values())).combined)
    axes.axhspan(
        -_KS_95 / N**0.5, _KS_95 / N**0.5, color="#eeeeee", zorder=0, label="95 % of uniform samples stay inside"
    )
    for color, dashes, (test, values) in zip(PALETTE, ("-", (0, (4, 1))), tests.items()):
        for column in values.layers.T:
            axes.plot(*_excess(column), color=color, linewidth=0.7, alpha=0.45)
        label = f"{test}, layers combined (thin: each)"
        axes.plot(*_excess(values.combined), color=color, linestyle=dashes, linewidth=2, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
    axes.set_ylim(-0.1, 0.1)


def _excess(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of the empirical distribution function minus the diagonal."""
    x = np.repeat(np.sort(p), 2)
    steps = np.repeat(np.arange(len(p) + 1) / len(p), 2)[1:-1]
    return x, steps - x


def convergence(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The share of units that agree by convergence: by relative depth, by length of training, and by width.

    Args:
        rows: the fields of `convergence.Share`, of every case and layer.
    """
    figure = Figure(figsize=(9.6, 3.4), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08)
    depth, training, width = figure.subplots(1, 3, sharey=True, width_ratios=(1.25, 1, 1))
    final = [row for row in rows if row["snapshot"] == 1]
    for i, (zoo, found) in enumerate(_groups([r for r in final if r["form"] == "forward"], "zoo").items()):
        label = f"{zoo}: {found[0]['units']} units, {found[0]['models']} seeds"
        _bounded(depth, i, [r["relative_depth"] for r in found], found, label, shift=0.012 * (i - 2))
    _panel(depth, "at the end of training, forward form", "relative depth of the layer")
    for axes, key in ((training, "snapshot"), (width, "units")):
        kept = final if key == "units" else rows
        zoos = ("narrow", "tiny", "wide") if key == "units" else ("tiny",)
        kept = sorted((r for r in kept if r["zoo"] in zoos and r["form"] == "forward"), key=lambda row: row[key])
        places = {value: at for at, value in enumerate(dict.fromkeys(row[key] for row in kept))}
        for i, (layer, found) in enumerate(_groups(kept, "layer").items()):
            at = [places[row[key]] for row in found]
            _bounded(axes, i, at, found, f"layer {layer}", shift=0.06 * (i - 1.5))
        axes.set_xticks(list(places.values()), [f"{value:g}" for value in places])
    _panel(training, "tiny, by length of training", "share of the training")
    _panel(width, "narrow, tiny and wide", "MLP units of a layer")
    depth.set_ylim(top=1.85)  # room for the names
    depth.set_ylabel("units that agree by convergence, %", fontsize=9.5, color=INK)
    return figure


def _groups(rows: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def _bounded(
    axes: Axes, i: int, at: Sequence[float], rows: Sequence[Mapping[str, Any]], label: str, shift: float
) -> None:
    """Draws the measured shares as a line, and above each a whisker up to its bound."""
    x = np.array(at) + shift
    share, upper = (100 * np.array([row[key] for row in rows]) for key in ("share", "upper"))
    axes.plot(x, share, marker="o", markersize=3.5, linewidth=1.6, color=PALETTE[i], label=label)
    axes.vlines(x, share, upper, color=PALETTE[i], linewidth=1)
    axes.plot(x, upper, "_", markersize=5, color=PALETTE[i])


def _panel(axes: Axes, title: str, label: str) -> None:
    style(axes)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel(label, fontsize=9.5, color=INK)
    axes.legend(loc="upper right", frameon=False, fontsize=8.5, borderpad=0, labelspacing=0.3)
