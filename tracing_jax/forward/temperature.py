"""The loss of models at their best temperature, the scalar by which all logits of a model are divided.

A model between two others may know as much as they do and be too sure of it, or not sure enough. What is left of a
barrier after one scalar was fitted at each point is not of this kind.

Source: Ito et al. 2025 (arXiv 2510.08023): wide independent models are connected once calibrated; Guo et al. 2017
(arXiv 1706.04599) for the temperature. We fit it on one half of the blocks, take the loss on the other, and both ways.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

INVERSE_TEMPERATURES = 2.0 ** np.arange(-3, 2.25, 0.25)
"""Factors of the logits at which losses are computed, equally spaced on a logarithmic scale; one of them is 1."""


class Calibrated(NamedTuple):
    """The loss at the best temperature, in nats, and that temperature, the geometric mean of those of both halves."""

    loss: Float[np.ndarray, " A"]
    temperature: Float[np.ndarray, " A"]


def calibrated(losses: Float[np.ndarray, "A N G"]) -> Calibrated:
    """Returns loss and temperature of A models, from the loss of each of N blocks at G `INVERSE_TEMPERATURES`.

    The minimum is that of the parabola through the lowest loss and its neighbours, over the logarithm.

    Raises:
      ValueError: fewer than two blocks.
    """
    if losses.shape[1] < 2:
        raise ValueError(f"{losses.shape[1]} block of text has no two halves to fit a temperature on one of them")
    halves = [losses[:, start::2].mean(axis=1, dtype=np.float64) for start in (0, 1)]
    fits = [best_scale(half) for half in halves]
    found = [at_scale(half, *fit) for half, fit in zip(halves, reversed(fits), strict=True)]
    step = np.log(INVERSE_TEMPERATURES[1] / INVERSE_TEMPERATURES[0])
    logs = [np.log(INVERSE_TEMPERATURES[center]) + step * offset for center, offset in fits]
    return Calibrated(np.mean(found, axis=0), np.exp(-np.mean(logs, axis=0)))


def best_scale(losses: Float[np.ndarray, "A G"]) -> tuple[Int[np.ndarray, " A"], Float[np.ndarray, " A"]]:
    """Returns where the loss is lowest: a point of the grid, and the way from there in steps, between -1 and 1."""
    lowest = losses.argmin(axis=1)
    center = lowest.clip(1, losses.shape[1] - 2)
    before, at, after = _around(losses, center)
    curvature = before - 2 * at + after
    vertex = np.divide(before - after, 2 * curvature, out=(lowest - center).astype(float), where=curvature > 0)
    return center, vertex.clip(-1, 1)


def at_scale(
    losses: Float[np.ndarray, "A G"], center: Int[np.ndarray, " A"], offset: Float[np.ndarray, " A"]
) -> Float[np.ndarray, " A"]:
    """Returns the loss between the points of the grid, by a parabola through three of them."""
    before, at, after = _around(losses, center)
    return at + offset * (after - before) / 2 + offset**2 * (before - 2 * at + after) / 2


def _around(losses: Float[np.ndarray, "A G"], center: Int[np.ndarray, " A"]) -> list[Float[np.ndarray, " A"]]:
    return [np.take_along_axis(losses, center[:, None] + k, axis=1)[:, 0] for k in (-1, 0, 1)]
