"""Descriptors of MLP units: numbers that no rotation of the residual stream changes; and matching by them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tracing_jax.matching import normalised_rows

Descriptors = dict[str, tuple[Float[np.ndarray, "_ _"], Bool[np.ndarray, " _"]]]
"""`gate`, `up` -> descriptors `[F, M]` of a layer's units, and which units are live `[F]`."""

_RIDGE = 0.1  # of a standardised coordinate's variance, below which a direction of the descriptors counts as noise
_TINY = 1e-12


def spread_layers(num_layers: int, at_most: int) -> list[int]:
    """Returns at most `at_most` layers, evenly spread from the first to the last."""
    return sorted({round(x) for x in np.linspace(0, num_layers - 1, min(num_layers, at_most))})


def descriptor_correlations(
    base: tuple[Float[np.ndarray, "F M"], np.ndarray], ft: tuple[Float[np.ndarray, "F2 M"], np.ndarray]
) -> Float[np.ndarray, "F F2"]:
    """Returns the cosines between standardised and whitened descriptors of two layers; 0 for units that are not live.

    Each model's descriptors are standardised over its own live units, and both are whitened with their mean covariance,
    so that coordinates which are shared by all units, or correlated, get little weight.
    """
    ours, theirs = _standardised(*base), _standardised(*ft)
    covariance = sum(side.T @ side / max(1, live.sum()) for side, (_, live) in ((ours, base), (theirs, ft))) / 2
    return whitened_cosines(ours, theirs, covariance)


def whitened_cosines(
    base: Float[np.ndarray, "F M"], ft: Float[np.ndarray, "F2 M"], covariance: Float[np.ndarray, "M M"]
) -> Float[np.ndarray, "F F2"]:
    """Returns the cosines between standardised descriptors, whitened with the mean covariance of both models."""
    whitening = _whitening(covariance)
    return normalised_rows(base @ whitening) @ normalised_rows(ft @ whitening).T


def whitened(rows: Float[np.ndarray, "F M"], covariance: Float[np.ndarray, "M M"]) -> Float[np.ndarray, "F M"]:
    """Returns standardised descriptors whitened with a covariance, each of length 1."""
    return normalised_rows(rows @ _whitening(covariance))


def _whitening(covariance: Float[np.ndarray, "M M"]) -> Float[np.ndarray, "M M"]:
    values, vectors = np.linalg.eigh(covariance + _RIDGE * np.eye(len(covariance)))
    return vectors / np.sqrt(values)


def log_quadratic_forms(rows: Float[Array, "F D"], moments: Sequence[Float[Array, "D D"]]) -> Float[np.ndarray, "F M"]:
    """Returns the logarithms of `w^T A w` for each row w and each moment A."""
    values = [np.asarray(_quadratic(rows, moment), np.float64) for moment in moments]
    return np.log(np.maximum(np.stack(values, axis=1), _TINY))


def _standardised(descriptors: Float[np.ndarray, "F M"], live: np.ndarray) -> Float[np.ndarray, "F M"]:
    active = descriptors[live]
    if not len(active):
        return np.zeros_like(descriptors)
    centred = (descriptors - active.mean(axis=0)) / np.maximum(active.std(axis=0), 1e-9)
    return np.where(live[:, None], centred, 0.0)


@jax.jit
def _quadratic(rows: Float[Array, "F D"], moment: Float[Array, "D D"]) -> Float[Array, " F"]:
    return (jnp.einsum("fd,de->fe", rows, moment, precision="highest") * rows).sum(axis=1)
