"""Panels of p-values: tests by layer, the layer map, and several pairs; readable from 1 to 10^-4000."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tracing_jax.report.panels import DASHES, GREY, INK, PALETTE, elided, label_axes, legend_below

_LAYER = re.compile(r"(?:layers?|base)[ /](\d+)")  # also of `base 3 : ft 4`
_LINEAR_TO = -10.0  # log10 p; the axis is linear if all values are above
_MANY = 24  # layers, above which markers would hide the line
_LEGEND_INCHES, _LETTER_INCHES, _HANDLE_INCHES = 6.1, 0.066, 0.54  # of a whole legend, and of a column of it
_ASSIGNED = "#00B4FF"
_WRITTEN = 10  # layers, up to which numbers are written in the cells of the map


def draw_tests(axes: Axes, data: Mapping[str, Any]) -> None:
    """Draws log10 p by layer, one line per test, thin and grey if it does not enter the verdict, and the level.

    A layer with several places (matrices, or pairs of layers) has the smallest of their p-values.
    """
    tests, level = data["tests"], data["level"]
    lines = [(test, *_by_layer(test)) for test in tests]
    places = sum(len(test["places"]) for test in tests if test["decides"])
    single = level - math.log10(max(1, places)) if level is not None else None
    rules = {} if level is None else {f"level {10**level:g}": level, f"level for one of {places} places": single}
    for i, (test, x, y) in enumerate(lines):
        _test_line(axes, i, test, x, y)
    for (name, at), dashes in zip(rules.items(), ("-", (0, (1, 2)))):
        axes.axhline(at, color=INK, linewidth=0.9, linestyle=dashes, label=name, zorder=1.5)
    _p_axis(axes, "y", [value for _, _, y in lines for value in y] + list(rules.values()), level)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    several = any(len(test["places"]) > len(x) for test, x, _ in lines)
    grey = "" if all(test["decides"] for test in tests) else "  (grey: not in the verdict)"
    label_axes(axes, f"layer{grey}", "log10 p, smallest in the layer" if several else "log10 p")
    _legend_below(axes, 2)


def has_layers(tests: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the tests have p-values by layer."""
    return any(test["log10_ps"] and _by_layer(test)[0].size for test in tests)


def draw_layer_map(axes: Axes, data: Mapping[str, Any]) -> None:
    """Draws log10 p of every layer of base (down) against every layer of ft (across); assigned pairs are framed."""
    table = np.array(data["log10_p"], np.float64)
    rows, columns = table.shape
    image = axes.imshow(table, cmap="magma", norm=_norm(table, data["level"]), aspect="equal", interpolation="nearest")
    axes.grid(visible=False)
    if max(rows, columns) <= _WRITTEN:
        _write_cells(axes, table, image)
    width = min(1.6, 36 / max(rows, columns))  # points: a frame thinner than the cell it marks
    for kind, dashes in (("pairs", "-"), ("copies", ":")):
        for pair in data.get(kind) or ():
            corner = (pair["ft"] - 0.5, pair["base"] - 0.5)
            look = {"edgecolor": _ASSIGNED, "linewidth": width, "linestyle": dashes}
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, **look))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    dotted = "; dotted: a copy" if data.get("copies") else ""
    label_axes(axes, f"layer of ft (blue frame: assigned to the layer of base{dotted})", "layer of base")
    bar = axes.figure.colorbar(image, cax=axes.figure.add_axes((0.0, 0.0, 1.0, 1.0)))
    bar.set_label("log10 p", fontsize=9.5, color=INK)
    bar.ax.tick_params(colors=GREY, labelsize=8.5, length=3)
    bar.ax.yaxis.set_major_locator(FixedLocator(_ticks(float(table.min()), data["level"])))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_tick_text))


def draw_pairs(axes: Axes, data: Mapping[str, Any]) -> None:
    """Draws log10 p of each statistic in the verdict of each pair, one row per pair, and the level."""
    pairs, level = data["log10_ps"], data["level"]
    names = list(dict.fromkeys(name for log10_ps in pairs.values() for name in log10_ps))
    for i, name in enumerate(names):
        found = [(float(log10_ps[name]), row) for row, log10_ps in enumerate(pairs.values()) if name in log10_ps]
        shift = 0.22 * (i - (len(names) - 1) / 2) / max(1, len(names) - 1)
        x, y = zip(*[(log10_p, row + shift) for log10_p, row in found])
        axes.plot(x, y, "osD^v"[i % 5], color=PALETTE[i % len(PALETTE)], markersize=6, label=name)
    axes.set_yticks(range(len(pairs)), list(map(elided, pairs)), parse_math=False)
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.axvline(level, color=INK, linewidth=0.9, label=f"level {10**level:g}", zorder=1.5)
    _p_axis(axes, "x", [float(p) for log10_ps in pairs.values() for p in log10_ps.values()] + [level], level)
    label_axes(axes, "log10 p of each statistic in the verdict, before Holm", "")
    _legend_below(axes, 4)


def _test_line(axes: Axes, i: int, test: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> None:
    dashes = DASHES[i % len(DASHES)]
    thin = max(1.2, 3.2 - 0.5 * i)  # coinciding lines all remain visible
    look: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "linewidth": thin, "linestyle": "-", "zorder": 3}
    if not test["decides"]:
        look = {"color": "#8a8a8a", "linewidth": 0.9, "linestyle": dashes, "zorder": 2}
    marker = "o" if len(x) <= _MANY else ""
    axes.plot(x, y, label=test["name"], marker=marker, markersize=4.5 if test["decides"] else 2.5, **look)


def _legend_below(axes: Axes, columns: int) -> None:
    """A legend under the axes, in fewer columns where the names are too long for so many."""
    names = axes.get_legend_handles_labels()[1]
    fitting = int(_LEGEND_INCHES / (max(map(len, names)) * _LETTER_INCHES + _HANDLE_INCHES))
    look = {"fontsize": 8.5, "labelcolor": GREY, "handlelength": 2.6, "columnspacing": 1.2}
    legend_below(axes, max(1, min(columns, fitting)), **look)


def _by_layer(test: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The layers of a test, and the smallest log10 p in each; places outside the layers are left out."""
    least: dict[int, float] = {}
    for place, log10_p in zip(test["places"], test["log10_ps"] or ()):
        if found := _LAYER.match(place):
            layer = int(found[1])
            least[layer] = min(least.get(layer, 0.0), float(log10_p))
    layers = sorted(least)
    return np.array(layers, np.int64), np.array([least[layer] for layer in layers], np.float64)


def _p_axis(axes: Axes, which: str, values: Sequence[float], level: float | None) -> None:
    """An axis from 0 to the smallest value: linear down to the level, and logarithmic below if the range is large."""
    lowest = min([-1.0, *values])
    axis = axes.yaxis if which == "y" else axes.xaxis
    scale, limits = (axes.set_yscale, axes.set_ylim) if which == "y" else (axes.set_xscale, axes.set_xlim)
    if lowest < _LINEAR_TO:
        scale("symlog", linthresh=_linear_to(level), linscale=1.0)
        bottom, top = lowest * 1.7, 0.12 * _linear_to(level)
    else:
        bottom, top = lowest * 1.08, -0.04 * lowest
    limits(bottom, top)
    axis.set_major_locator(FixedLocator(_ticks(lowest, level)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_tick_text))


def _ticks(lowest: float, level: float | None) -> list[float]:
    """Round values of log10 p from 0 down: by equal steps, and beyond the level by factors of ten or about three."""
    if lowest >= _LINEAR_TO:
        step = next(step for step in (0.25, 0.5, 1.0, 2.0, 5.0) if -lowest / step <= 6)
        return [0.0 - step * i for i in range(int(-lowest / step) + 1)]
    decades = [-base * 10.0**power for power in range(1, 6) for base in (1, 3)]
    beyond = [value for value in decades if value >= lowest * 1.05]
    if len(beyond) > 5:
        beyond = [value for value in beyond if math.log10(-value).is_integer()]
    return [0.0, -_linear_to(level), *(value for value in beyond if value < -_linear_to(level) * 1.5)]


def _tick_text(value: float, _: int | None) -> str:
    return f"{value:g}"


def _linear_to(level: float | None) -> float:
    return 3.0 if level is None else max(1.0, -level)


def _norm(table: np.ndarray, level: float | None) -> Normalize:
    lowest = min(-1.0, float(table.min()))
    if lowest >= _LINEAR_TO:
        return Normalize(lowest, 0.0)
    return SymLogNorm(linthresh=_linear_to(level), linscale=1.0, vmin=lowest, vmax=0.0)


def _write_cells(axes: Axes, table: np.ndarray, image: Any) -> None:
    for (i, j), value in np.ndenumerate(table):
        pale = image.norm(value) > 0.6
        text = f"{value:.0f}" if value <= -10 else f"{round(value, 1) + 0.0:g}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="#222222" if pale else "white")
