"""The figure of a possible merge: shares by layer, one panel for each role, with 95 % intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tracing_jax.merges.report import ROLES


def figure_of_shares(record: Mapping[str, Any]) -> Figure:
    """Returns the figure of a record of `merge_report`."""
    names = [part["name"] for part in record["parts"]]
    by_place = record["by_role_and_layer"]
    in_layers = [role for role in ROLES if role in by_place]
    others = [role for role in ROLES if role in record["by_role"]]
    figure = Figure(figsize=(3.2 * (len(in_layers) + 1), 3.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(in_layers) + 1, sharey=True))
    for ax, role in zip(axes, in_layers):
        layers = sorted(map(int, by_place[role]))
        _draw(ax, layers, [by_place[role][str(layer)] for layer in layers], names)
        ax.set(title=role, xlabel="layer")
    _draw(axes[-1], range(len(others)), [record["by_role"][role] for role in others], names, line="")
    axes[-1].set_xticks(range(len(others)), others, rotation=40, ha="right")
    axes[-1].set_title("all layers")
    axes[0].set_ylabel("share")
    axes[0].legend(fontsize=8)
    return figure


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
