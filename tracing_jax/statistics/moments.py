"""What weights alone say of an MLP unit in any basis: how its row answers to the weights of the model's other layers.

Gate and up projection read the residual stream and down writes to it. Over its units, each of them spans a second
moment `A = sum_f w_f w_f^T` of its rows, which are set to length one. A row w of a unit then has the numbers `w^T A w`,
one for each A: its signature. A rotation or permutation of the stream turns w and every A together, and units that are
reordered, scaled by either sign, or padded with zeros leave the sums alone: signatures stay as they are. Embeddings,
head and attention have no part in them.

Letters: F units of a layer, D features, M moments.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax.arch import Arch
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import ParamSource
from tracing_jax.tree import Tree

SIDES = ("gate", "up")

_RIDGE = 0.1  # of a standardised coordinate's variance, below which a direction of the signatures counts as noise
_TINY = 1e-12


def spread_layers(num_layers: int, at_most: int) -> list[int]:
    """Returns so many layers or fewer, evenly spread from the first to the last."""
    return sorted({round(x) for x in np.linspace(0, num_layers - 1, min(num_layers, at_most))})


def signatures(
    model: ParamSource, layers: Sequence[int], first: int = 0
) -> Iterator[dict[str, tuple[Float[np.ndarray, "F M"], np.ndarray]]]:
    """Yields for the layers from `first` on, for `gate` and `up`, the signatures of the units and which of them live.

    The moments are those of gate, up and down in the layers named. A unit lives if none of its three rows is zero.
    """
    if first == model.arch.num_layers:
        return
    moments = [_moment(rows) for i in layers for rows in _unit_rows(model.layer(i), model.arch).values()]
    for i in range(first, model.arch.num_layers):
        rows = _unit_rows(model.layer(i), model.arch)
        live = np.logical_and.reduce([np.asarray(jnp.abs(side).max(axis=1)) > 0 for side in rows.values()])
        yield {side: (_signatures(rows[side], moments), live) for side in SIDES}


def signature_correlations(
    base: tuple[Float[np.ndarray, "F M"], np.ndarray], ft: tuple[Float[np.ndarray, "F2 M"], np.ndarray]
) -> Float[np.ndarray, "F F2"]:
    """Returns the cosines between signatures of two layers, standardised and whitened; 0 for units that do not live.

    Each model's are standardised over its own living units, and both whitened with their mean covariance: numbers that
    all units share, or that go together, say little.
    """
    ours, theirs = _standardised(*base), _standardised(*ft)
    covariance = sum(side.T @ side / max(1, live.sum()) for side, (_, live) in ((ours, base), (theirs, ft))) / 2
    values, vectors = np.linalg.eigh(covariance + _RIDGE * np.eye(len(covariance)))
    ours, theirs = (_unit_length(side @ (vectors / np.sqrt(values))) for side in (ours, theirs))
    return ours @ theirs.T


def _unit_rows(layer: Tree, arch: Arch) -> dict[str, Float[Array, "F D"]]:
    """Returns a row of length one for each unit, or a zero row: what gate and up read, and what down writes."""
    mlp = layer["mlp"]
    scale = layer.get("mlp_norm", {}).get("scale")
    gain = 1.0 if scale is None else jnp.asarray(scale, jnp.float32) + gain_offset(arch)
    return {
        "gate": _normalised(jnp.asarray(mlp["gate_proj"]["kernel"], jnp.float32).T * gain),
        "up": _normalised(jnp.asarray(mlp["up_proj"]["kernel"], jnp.float32).T * gain),
        "down": _normalised(jnp.asarray(mlp["down_proj"]["kernel"], jnp.float32)),
    }


def _signatures(rows: Float[Array, "F D"], moments: Sequence[Float[Array, "D D"]]) -> Float[np.ndarray, "F M"]:
    values = [np.asarray(_quadratic(rows, moment), np.float64) for moment in moments]
    return np.log(np.maximum(np.stack(values, axis=1), _TINY))


def _standardised(signatures: Float[np.ndarray, "F M"], live: np.ndarray) -> Float[np.ndarray, "F M"]:
    living = signatures[live]
    if not len(living):
        return np.zeros_like(signatures)
    centred = (signatures - living.mean(axis=0)) / np.maximum(living.std(axis=0), 1e-9)
    return np.where(live[:, None], centred, 0.0)


def _unit_length(rows: Float[np.ndarray, "F M"]) -> Float[np.ndarray, "F M"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)


@jax.jit
def _normalised(rows: Float[Array, "F D"]) -> Float[Array, "F D"]:
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return jnp.where(length > 0, rows / jnp.where(length > 0, length, 1.0), 0.0)


@jax.jit
def _moment(rows: Float[Array, "F D"]) -> Float[Array, "D D"]:
    return jnp.einsum("fd,fe->de", rows, rows, precision="highest") / rows.shape[0]


@jax.jit
def _quadratic(rows: Float[Array, "F D"], moment: Float[Array, "D D"]) -> Float[Array, " F"]:
    return (jnp.einsum("fd,de->fe", rows, moment, precision="highest") * rows).sum(axis=1)
