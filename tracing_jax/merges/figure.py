"""The figure of a possible merge: shares by layer, one panel for each role, with 95 % intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tracing_jax.merges.report import ROLES

_CORRELATED = 0.5
"""Regions are drawn of parents whose shares have errors of a correlation above: of others the intervals say all."""


_LONGEST = 16


def figure_of_shares(record: Mapping[str, Any]) -> Figure:
    """Returns the figure of a record of `merge_report`."""
    names = list(record["whole"]["shares"])
    by_place = record["by_role_and_layer"]
    in_layers = [role for role in ROLES if role in by_place]
    others = [role for role in ROLES if role in record["by_role"]]
    regions = [region for region in record["joint"] if abs(region["correlation"]) > _CORRELATED]
    panels = len(in_layers) + 1 + bool(regions)
    figure = Figure(figsize=(3.2 * panels, 3.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, panels))
    for ax in axes[1 : len(in_layers) + 1]:
        ax.sharey(axes[0])
        ax.tick_params(labelleft=False)
    for ax, role in zip(axes, in_layers):
        layers = sorted(map(int, by_place[role]))
        _draw(ax, layers, [by_place[role][str(layer)] for layer in layers], names)
        ax.set(title=role, xlabel="layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    whole = axes[len(in_layers)]
    _draw(whole, range(len(others)), [record["by_role"][role] for role in others], names, line="")
    whole.set_xticks(range(len(others)), others, rotation=40, ha="right")
    whole.set_title("all layers")
    axes[0].set_ylabel("share")
    axes[0].legend(fontsize=8)
    if regions:
        _draw_regions(axes[-1], regions)
    return figure


def _draw_regions(ax: Any, regions: list[Mapping[str, Any]]) -> None:
    """Draws the joint region of each pair of parents whose shares are known together better than each by itself."""
    angle = np.linspace(0, 2 * np.pi, 200)
    for region in regions:
        one, other = region["parents"]
        outline = np.array(region["center"])[:, None] + np.array(region["half_axes"]).T @ [np.cos(angle), np.sin(angle)]
        (line,) = ax.plot(*outline, linewidth=1, label=f"{_short(one)} (x), {_short(other)} (y)")
        ax.plot(*region["center"], "+", color=line.get_color())
    ax.set(title="both shares, 95 % regions", xlabel="share of the first (x)", ylabel="share of the second (y)")
    ax.legend(fontsize=7).set_in_layout(False)


def _short(name: str) -> str:
    """Returns the last part of a path, in at most so many characters."""
    return name.rstrip("/").rsplit("/", 1)[-1][:_LONGEST]


def _draw(ax: Any, at: Any, shares: list[Mapping[str, Any]], names: list[str], line: str = "-") -> None:
    ax.axhline(0, color="0.8", linewidth=0.8)
    ax.axhline(1, color="0.8", linewidth=0.8)
    for k, name in enumerate(names):
        found = [(x, own) for x, part in zip(at, shares) if (own := part["shares"][name])["share"] is not None]
        if not found:
            continue
        places = [x + 0.06 * (k - (len(names) - 1) / 2) for x, _ in found]
        values = np.array([[own["share"], own["low"], own["high"]] for _, own in found]).T
        reach = np.abs(values[1:] - values[0])
        ax.errorbar(places, values[0], reach, fmt=f"o{line}", markersize=3, linewidth=1, capsize=2, label=name)
