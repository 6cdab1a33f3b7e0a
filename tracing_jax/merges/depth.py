"""Children whose layers are at another depth: repeated, moved or left out (passthrough merges, depth upscaling).

Each layer of the child belongs to the layer of the other models whose weights are most like its own. A kernel that was
copied, fine-tuned or merged has a cosine near one with where it comes from, and near zero with all other layers.

Letters: L layers of the child, J layers of another model, N entries.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from tracing_jax.axes import axis_table
from tracing_jax.merges.models import LayerSources, MergeModels
from tracing_jax.merges.products import as_float32
from tracing_jax.sources import ParamSource, leaf
from tracing_jax.sources.lazy_leaves import leaf_slice

LIKE = 0.3
"""A layer comes from another one if the cosine of their kernels is above; independent ones are near 0."""
_KERNEL = "mlp/up_proj/kernel"
_ENTRIES = 2**18  # of a kernel, that layers are compared by
_AS_GOOD = 1e-3  # a cosine this much below the best is as good: layers stay in their place if they can


def with_layers_mapped(models: MergeModels) -> tuple[MergeModels, str | None]:
    """Returns the models, each layer of the child beside the one it comes from; and a note where that is another place.

    The models are returned as they are where layers are in equal places, or where some layer of the child is like none:
    a child in disguise, or one that is no relative.
    """
    found = _layer_map(models)
    if found is None or found == tuple(range(len(found))):
        return models, None
    return replace(models, layers=(found,) * (len(models.read_together) - 1)), _note(found)


def _layer_map(models: MergeModels) -> LayerSources | None:
    child, *others = models.read_together
    same = [model for model in others if _kernel_shape(model) == _kernel_shape(child) is not None]
    if len(same) < len(others) or len({model.arch.num_layers for model in others}) > 1:
        return None
    own = _kernels(child)
    cosines = np.max([own @ _kernels(model).T for model in same], axis=0)
    best = cosines.max(axis=1)
    if not np.isfinite(best).all() or (best < LIKE).any():  # what is not finite is refused where it is summed
        return None
    stays = [i < cosines.shape[1] and cosines[i, i] >= best[i] - _AS_GOOD for i in range(len(own))]
    return tuple(i if stay else int(j) for i, (stay, j) in enumerate(zip(stays, cosines.argmax(axis=1))))


def _kernel_shape(model: ParamSource) -> tuple[int, ...] | None:
    table = axis_table(model.arch)
    spec = table.leaves.get(f"layers/0/{_KERNEL}")
    return None if spec is None else tuple(table.sizes[axis or ""] for axis in spec.axes)


def _kernels(model: ParamSource) -> Float[np.ndarray, "L N"]:
    """Returns entries of a kernel of every layer, of length one: the first units, or those of the first expert."""
    *experts, D, F = _kernel_shape(model) or (0, 0)
    axis, span = (0, slice(0, 1)) if experts else (1, slice(0, min(F, max(1, _ENTRIES // D))))
    rows = []
    for i in range(model.arch.num_layers):
        name = f"layers/{i}/{_KERNEL}"
        part = leaf_slice(model, name, axis, span)
        whole = np.asarray(leaf(model, name))[(slice(None),) * axis + (span,)] if part is None else np.asarray(part)
        rows.append(as_float32(whole).reshape(-1)[: _ENTRIES if experts else None])
    found = np.stack(rows).astype(np.float64)
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(lengths > 0, lengths, 1.0)


def _note(layers: Sequence[int]) -> str:
    """Returns where the child's layers come from, in ranges of neighbours."""
    starts = [i for i in range(len(layers)) if i == 0 or layers[i] != layers[i - 1] + 1]
    ranges = list(itertools.pairwise([*starts, len(layers)]))
    parts = [f"{_range(a, b)} from {_range(layers[a], layers[a] + b - a)}" for a, b in ranges]
    return f"layers of the child are at another depth in the others: {', '.join(parts)}"


def _range(start: int, stop: int) -> str:
    return f"{start}" if stop - start == 1 else f"{start}-{stop - 1}"
