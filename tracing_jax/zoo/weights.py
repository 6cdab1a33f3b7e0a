"""Measures of the weights of one model that show how far it was trained, for comparison with its relatives.

Random initialisation draws the entries of a matrix independently and alike. Training gives it structure: singular
outlying values, units of unequal length, heavy tails. What is measured here stays the same when units are
permuted.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table, kind_of
from tracing_jax.record import atomic_write, plain
from tracing_jax.sources import ParamSource, subtrees
from tracing_jax.tree import flatten, to_host

MODELS = "models"
MEASURES_FORMAT = 2  # raise when what is measured changes: older files are measured again

_RANKED = ("embed/embedding", "head/lm_head")
"""The matrices whose effective rank is measured: the two of which it always falls in training."""

_ROWS_AT_ONCE = 8192


def weight_measures(source: ParamSource) -> dict[str, Any]:
    """Returns measures of every norm and of every matrix on the residual stream; reads subtree by subtree, and no text.

    For each kind of matrix, such as `mlp/up_proj`, one value a layer (one for all where it belongs to no layer):

    * `effective_rank` of the embedding, and of the head: squared sum of the squares of the singular
      values over the sum of their fourth powers, in [1, rank]. Independent entries give 1 / (1/rows + 1/columns), and
      training concentrates them. Survives permutation, rotation, padding and redistributed gains.
    * `excess_kurtosis` of the entries: 0 for normal ones. Survives permutation; a rotation makes entries more normal.
    * `length_variation`: standard deviation over mean of the lengths of its units' rows. Survives permutation and
      rotation.
    * `rms` of the entries: depends on the scale of initialisation, so it distinguishes relatives only. Survives
      permutation.

    `length` is the mean Frobenius norm over all of its tensors, the unit for the distance of two models.
    For each norm, `distance`: root mean square of its gain's difference from 1. Survives permutation; gains that were
    redistributed, or folded into what reads them, destroy it.

    Source: excess kurtosis as a sign of the order of training, Horwitz et al. 2025, Unsupervised Model Tree Heritage
    Recovery (ICLR 2025, arXiv 2405.18432).
    """
    table = axis_table(source.arch)
    matrices: dict[str, dict[str, list[float]]] = {}
    norms: dict[str, list[float]] = {}
    lengths: list[float] = []
    for name, leaf in _leaves(source):
        lengths.append(float(np.sqrt(_sums_of_squares(leaf.reshape(-1, leaf.shape[-1])).sum())))
        kind = name.split("/", 2)[2] if name.startswith("layers/") else name
        kind = kind.rsplit("/", 1)[0] if kind.endswith(("/kernel", "/scale")) else kind
        if name.endswith("/scale"):
            norms.setdefault(kind, []).append(_distance_from_one(leaf, source.arch))
        elif leaf.ndim > 1 and "embed" in table.leaves[name].axes:
            found = _as_matrices(name, leaf, table)
            measures = _measures(found) | ({"effective_rank": effective_rank(found[0])} if kind in _RANKED else {})
            for measure, value in measures.items():
                matrices.setdefault(kind, {}).setdefault(measure, []).append(value)
    return {"matrices": matrices, "norms": norms, "length": float(np.mean(lengths))}


def model_measures_file(folder: Path, model_name: str) -> Path:
    """Returns the file of a model's measures in a zoo, by its short name in the plan."""
    return folder / MODELS / f"{model_name}.json"


def write_model_measures(
    folder: Path, model_name: str, model_id: str, source: ParamSource, stamps: Mapping[str, Any] | None = None
) -> Path:
    """Measures a model and writes the result, with the `stamps` of its files, atomically into the folder of a zoo.

    Returns:
      The file.
    """
    file = model_measures_file(folder, model_name)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": MEASURES_FORMAT,
        "id": model_id,
        "num_layers": source.arch.num_layers,
        "stamps": dict(stamps or {}),
        **weight_measures(source),
    }
    atomic_write(file, json.dumps(plain(content), indent=1).encode())
    return file


def read_model_measures(
    folder: Path, model_name: str, stamps: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Returns the measures of a model; None where they were not measured, by another version, or of other files.

    Args:
      folder: of the zoo.
      model_name: of the model in it.
      stamps: of the files that they must be of, if not None.
    """
    try:
        content = json.loads(model_measures_file(folder, model_name).read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    is_current = stamps is None or content.get("stamps") == dict(stamps)
    return content if content.get("format") == MEASURES_FORMAT and is_current else None


def _leaves(source: ParamSource) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the leaves in float32; the head as it acts, with the gain of the final norm in it."""
    for prefix, subtree in subtrees(source):
        leaves = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(to_host(subtree)).items()}
        if prefix == "head/" and leaves.keys() >= {"lm_head/kernel", "norm/scale"}:
            leaves["lm_head/kernel"] = _gain(leaves["norm/scale"], source.arch)[:, None] * leaves["lm_head/kernel"]
        yield from ((prefix + name, leaf) for name, leaf in leaves.items())


def _gain(stored: np.ndarray, arch: Arch) -> np.ndarray:
    return 1 + stored if arch.norm == "rms_unit_offset" else stored


def _distance_from_one(stored: np.ndarray, arch: Arch) -> float:
    return float(np.sqrt(np.mean(np.square(_gain(stored, arch) - 1), dtype=np.float64)))


def _as_matrices(name: str, leaf: np.ndarray, table: AxisTable) -> list[Float[np.ndarray, "units embed"]]:
    """Returns a leaf as one matrix, or one for each expert, whose rows are its units and columns the residual's."""
    axes = [axis and kind_of(axis) for axis in table.leaves[name].axes]
    if axes[0] == "expert":
        return [np.moveaxis(expert, axes.index("embed") - 1, -1) for expert in leaf]
    turned = np.moveaxis(leaf, axes.index("embed"), -1)
    return [turned.reshape(-1, turned.shape[-1])]


def _measures(found: list[Float[np.ndarray, "units embed"]]) -> dict[str, float]:
    """Returns the measures of a matrix, or their means over the experts."""
    each = [measures_of(matrix) for matrix in found]
    return {measure: float(np.mean([values[measure] for values in each])) for measure in each[0]}


def measures_of(matrix: Float[np.ndarray, "units embed"]) -> dict[str, float]:
    """Returns excess kurtosis and root mean square of the entries, and how much the lengths of the rows vary."""
    squares = _sums_of_squares(matrix)
    mean_square = float(squares.sum()) / matrix.size
    if mean_square == 0.0:
        return {"excess_kurtosis": 0.0, "length_variation": 0.0, "rms": 0.0}
    fourth = float(_sums_of_squares(np.square(matrix)).sum()) / matrix.size
    lengths = np.sqrt(squares)
    variation = float(lengths.std() / lengths.mean())
    return {"excess_kurtosis": fourth / mean_square**2 - 3.0, "length_variation": variation, "rms": mean_square**0.5}


def effective_rank(matrix: Float[np.ndarray, "units embed"]) -> float:
    """Returns the effective rank of a matrix: (tr W^T W)^2 / tr (W^T W)^2, 0 for a matrix of zeros."""
    gram = np.zeros((matrix.shape[1],) * 2, np.float32)
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        gram = _plus_gram(gram, matrix[start : start + _ROWS_AT_ONCE])
    gram = np.asarray(gram)
    total = float(_sums_of_squares(gram).sum())
    return float(np.trace(gram, dtype=np.float64)) ** 2 / total if total else 0.0


@jax.jit
def _plus_gram(gram: Float[Array, "embed embed"], rows: Float[Array, "rows embed"]) -> Float[Array, "embed embed"]:
    return gram + jnp.einsum("rd,re->de", rows, rows, precision="highest")


def _sums_of_squares(matrix: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, " rows"]:
    return np.einsum("rc,rc->r", matrix, matrix).astype(np.float64)
