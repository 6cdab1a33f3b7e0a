"""The figure of the loss over the plane through three models."""

from collections.abc import Mapping
from typing import Any

import matplotlib.patheffects
import numpy as np
from matplotlib.figure import Figure

from tracing_jax.report.panels import GREY, INK, elided, label_axes

_HEIGHT = 5.0  # inches of the heatmap, if it is no wider than ten

_ABOVE = 1.5
"""Losses are told apart up to this multiple of the highest one at a model or on an edge; far away they grow fast."""


def plane_figure(record: Mapping[str, Any]) -> Figure:
    """The loss over the plane of a record of `tracing-jax plane` as a heatmap, with the three models."""
    x, y = np.array(record["x"]), np.array(record["y"])
    loss = np.array(record["loss"], dtype=float)  # which reads "nan" and "inf" of a record
    corners = {name: (float(x), float(y)) for name, (x, y) in record["corners"].items()}
    width = np.ptp(x) / np.ptp(y) * _HEIGHT + 1.6  # with tick labels and the colour bar
    figure = Figure(figsize=(min(max(width, 4.2), 10.0), _HEIGHT + 0.9), facecolor="white", layout="constrained")
    axes = figure.subplots()
    known = [value for edge in record["edges"].values() for value in np.array(edge["loss"], dtype=float)]
    finite = loss[np.isfinite(loss)]
    top = min(finite.max(initial=-np.inf), _ABOVE * np.nanmax(known))
    low = min(finite.min(initial=np.inf), np.nanmin(known))
    shown = np.where(np.isfinite(loss), loss, np.inf).clip(low, top)
    levels = np.linspace(low, top if top > low else low + 1e-6, 25)
    drawn = axes.contourf(x, y, shown, levels=levels, cmap="viridis_r")
    axes.contour(x, y, shown, levels=levels[2:-1:3], colors="white", linewidths=0.5, alpha=0.6)
    bar = figure.colorbar(drawn, ax=axes, format="%.2f")
    above = f"; darkest: {top:.3g} and above" if finite.max(initial=-np.inf) > top else ""
    bar.set_label(f"loss (nats per token){above}", fontsize=9.5, color=INK)
    outline = np.array([*corners.values(), next(iter(corners.values()))])
    axes.plot(*outline.T, color="white", linewidth=1, linestyle=(0, (4, 3)))
    halo = matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")
    for name, at in corners.items():
        model = record["asked"][name].rstrip("/").split("/")[-1]
        axes.plot(*at, "o", color="white", markeredgecolor=INK, markersize=7)
        left = name == "A"  # B is on its right
        text = axes.annotate(
            f"{name}: {elided(model)}\n{float(record['losses'][name]):.3f}", at, xytext=(-6 if left else 6, 6),
            textcoords="offset points", fontsize=9, color=INK, ha="right" if left else "left", parse_math=False,
        )  # fmt: skip
        text.set_path_effects([halo])
    label_axes(axes, "distance along A to B, in weights", "distance from that line")
    figure.suptitle("Loss over the plane through three models", x=0.02, ha="left", fontsize=10.5, color=INK)
    axes.set_aspect("equal")
    axes.tick_params(colors=GREY, labelsize=9, length=3)
    return figure
