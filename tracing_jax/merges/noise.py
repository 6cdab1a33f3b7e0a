"""Merges with known shares, of independent noise and of the parents: what an alignment does to shares."""

import zlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.normal_equations import NormalEquations
from tracing_jax.sources import InMemory, in_memory
from tracing_jax.tree import flatten, unflatten

Leaves = Mapping[str, Float[np.ndarray, "..."]]


def merged_noise(
    models: MergeModels, sums: NormalEquations, shares: Float[np.ndarray, " K"], unexplained: float, seed: int
) -> MergeModels:
    """Returns a merge that is like another one in shares and sizes, and in nothing else.

    The reference stays. Every parent is the reference plus Gaussian noise of the size, leaf by leaf, of that parent's
    difference from it; the child is merged of these, with noise of its own.

    Args:
      models: of the merge that is imitated.
      sums: of it, for the sizes.
      shares: of its parents.
      unexplained: the share of the child's difference, in squares, that no parent explains.
      seed: of the noise.
    """
    reference = models.read_together[1]
    ref = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(in_memory(reference).params).items()}
    sizes = _sizes(sums)
    first = 0 if models.origin is not None else 1  # the reference is the first parent where there is no origin
    noises = [_noise(ref, {n: own[1 + k] for n, own in sizes.items()}, (seed, k)) for k in range(models.terms)]
    rest = _noise(ref, {n: own[0] * np.sqrt(unexplained) for n, own in sizes.items()}, (seed, models.terms))
    child = {
        n: leaf + rest[n] + sum(a * noise[n] for a, noise in zip(shares[first:], noises)) for n, leaf in ref.items()
    }

    def model(leaves: Leaves) -> InMemory:
        return InMemory(reference.arch, unflatten({name: leaf.astype(np.float32) for name, leaf in leaves.items()}))

    moved = {name: model({n: ref[n] + noise[n] for n in ref}) for name, noise in zip(models.names[first:], noises)}
    parents = moved if first == 0 else {models.names[0]: model(ref), **moved}
    return MergeModels(model(child), parents, model(ref) if first == 0 else None)


def merged_again(models: MergeModels, shares: Float[np.ndarray, " K"]) -> MergeModels:
    """Returns the models with a child that is merged of them with these shares, and of nothing else."""
    first = 0 if models.origin is not None else 1
    ref, *others = ({n: np.asarray(leaf, np.float32) for n, leaf in flatten(in_memory(model).params).items()}
                    for model in models.read_together[1:])  # fmt: skip
    child = {
        n: leaf + sum(a * (other[n] - leaf) for a, other in zip(shares[first:], others)) for n, leaf in ref.items()
    }
    leaves = unflatten({name: np.asarray(leaf, np.float32) for name, leaf in child.items()})
    return replace(models, child=InMemory(models.read_together[1].arch, leaves))


def _sizes(sums: NormalEquations) -> dict[str, Float[np.ndarray, " C"]]:
    """Returns the root mean square of each column, leaf by leaf; of experts, over all of them."""
    squares: dict[str, np.ndarray] = {}
    counts: dict[str, float] = {}
    for tensor in sums.tensors:
        name = tensor.place.name
        squares[name] = squares.get(name, 0.0) + np.diag(tensor.gram)
        counts[name] = counts.get(name, 0.0) + float(tensor.counts.sum())
    return {name: np.sqrt(np.maximum(own, 0.0) / counts[name]) for name, own in squares.items()}


def _noise(ref: Leaves, sizes: Mapping[str, float], seed: tuple[int, ...]) -> dict[str, np.ndarray]:
    found = {}
    for name, leaf in ref.items():
        generator = np.random.default_rng([*seed, zlib.crc32(name.encode())])
        found[name] = np.float32(sizes.get(name, 0.0)) * generator.standard_normal(leaf.shape, np.float32)
    return found
