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
    for color, (test, values) in zip(PALETTE, tests.items()):
        for column in values.layers.T:
            axes.plot(*_excess(column), color=color, linewidth=0.7, alpha=0.45)
        axes.plot(*_excess(values.combined), color=color, linewidth=2, label=f"{test}, layers combined (thin: each)")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.13, 0.13)


def _excess(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of the empirical distribution function minus the diagonal."""
    x = np.repeat(np.sort(p), 2)
    steps = np.repeat(np.arange(len(p) + 1) / len(p), 2)[1:-1]
    return x, steps - x


def convergence(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The share of units that agree by convergence: by relative depth, by length of training, and by width."""
    raise NotImplementedError
