"""Fine-tunes of one base, trained in a minute or two each, and merges of them made in numpy as mergekit makes them.

They are written apart from `tracing_jax/merges`, so that the benchmark is an independent check of it.

Source of the merges: arcee-ai/mergekit, merge_methods/{linear,slerp,generalized_task_arithmetic}.py and sparsify.py.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tracing_jax import demo
from tracing_jax.arch import Arch
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.demo.members import training_data
from tracing_jax.demo.recipe import DEFAULT
from tracing_jax.demo.training import Training, train
from tracing_jax.sources import in_memory
from tracing_jax.tree import flatten, unflatten

Leaves = Mapping[str, np.ndarray]

STEPS = 160
NAMES = ("a", "b", "c", "like_a")
"""Fine-tunes: on the first and on the second half of numpy's docstrings, further on base's text, and once more on the
first half with other windows of it."""


def family(folder: Path) -> tuple[Arch, Leaves, dict[str, Leaves]]:
    """Returns the demo's base and its fine-tunes, trained now where the folder does not have them."""
    base = in_memory(open_checkpoint(str(demo.member("base"))))
    found: dict[str, Leaves] = {}
    for name in NAMES:
        file = folder / f"{name}.npz"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(file, **dict(_trained(base.arch, base.params, name)))  # type: ignore[arg-type]
        with np.load(file) as leaves:
            found[name] = {leaf: leaves[leaf] for leaf in leaves.files}
    return base.arch, _leaves(base.params), found


def tuned_further(arch: Arch, leaves: Leaves, steps: int) -> Leaves:
    """Returns a model trained further, on base's text."""
    return _trained(arch, unflatten(dict(leaves)), "c", steps)


def _trained(arch: Arch, params: object, name: str, steps: int = STEPS) -> Leaves:
    with tempfile.TemporaryDirectory() as folder:
        data = training_data(DEFAULT, Path(folder))
    half = len(data.finetune) // 2
    tokens = {"a": data.finetune[:half], "like_a": data.finetune[:half], "b": data.finetune[half:], "c": data.base}
    recipe = dataclasses.replace(DEFAULT, seed=1 + NAMES.index(name))
    return _leaves(train(arch, recipe, params, Training(name, tokens[name], steps, 2e-3)))


def _leaves(params: object) -> Leaves:
    return {name: np.asarray(leaf, np.float32) for name, leaf in flatten(params).items()}


def linear(parents: Sequence[Leaves], weights: Sequence[float]) -> Leaves:
    """Returns the weighted mean."""
    return {name: _sum(weights, [p[name] for p in parents]) / sum(weights) for name in parents[0]}


def task_arithmetic(origin: Leaves, parents: Sequence[Leaves], weights: Sequence[float]) -> Leaves:
    """Returns the origin plus weighted differences from it."""
    return _mixed(origin, parents, lambda deltas: _sum(weights, deltas))


def slerp(a: Leaves, b: Leaves, t: float) -> Leaves:
    """Returns the spherical interpolation, tensor by tensor; linear where the cosine is above .9995."""

    def mixed(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        cosine = float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))
        if abs(cosine) > 0.9995:
            return (1 - t) * x + t * y
        angle = np.arccos(cosine)
        found: np.ndarray = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
        return found

    return {name: mixed(a[name].astype(np.float64), b[name].astype(np.float64)) for name in a}


def ties(origin: Leaves, parents: Sequence[Leaves], weights: Sequence[float], density: float) -> Leaves:
    """Returns the TIES merge: trim, elect signs, mean of those that agree."""

    def mix(deltas: list[np.ndarray]) -> np.ndarray:
        weighted = [w * _largest(d, density) for w, d in zip(weights, deltas)]
        masks = _agreeing(weighted)
        divisor = sum(w * mask for w, mask in zip(weights, masks))
        total: np.ndarray = sum(d * mask for d, mask in zip(weighted, masks)) / np.where(divisor == 0, 1, divisor)
        return total

    return _mixed(origin, parents, mix)


def dare(
    origin: Leaves, parents: Sequence[Leaves], weights: Sequence[float], density: float, elect: bool, seed: int = 0
) -> Leaves:
    """Returns the DARE merge: entries dropped at random, the rest rescaled; with signs elected as in TIES, or not."""
    rng = np.random.default_rng(seed)

    def mix(deltas: list[np.ndarray]) -> np.ndarray:
        weighted = [w * _rescaled(d, rng.random(d.shape) < density) for w, d in zip(weights, deltas)]
        masks = _agreeing(weighted) if elect else [np.ones(d.shape) for d in weighted]
        total: np.ndarray = sum(d * mask for d, mask in zip(weighted, masks))
        return total

    return _mixed(origin, parents, mix)


def stitched(parents: Sequence[Leaves], owner: Callable[[str], int]) -> Leaves:
    """Returns each leaf of the parent that `owner` names."""
    return {name: parents[owner(name)][name] for name in parents[0]}


def _mixed(origin: Leaves, parents: Sequence[Leaves], mix: Callable[[list[np.ndarray]], np.ndarray]) -> Leaves:
    wide = {name: leaf.astype(np.float64) for name, leaf in origin.items()}
    return {name: base + mix([p[name] - base for p in parents]) for name, base in wide.items()}


def _sum(weights: Sequence[float], arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.tensordot(np.asarray(weights, np.float64), np.stack(arrays), 1)


def _largest(delta: np.ndarray, density: float) -> np.ndarray:
    kept = np.zeros(delta.size, bool)
    kept[np.argsort(-np.abs(delta).ravel(), kind="stable")[: int(density * delta.size)]] = True
    return delta * kept.reshape(delta.shape)


def _rescaled(delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
    kept = np.abs(delta * mask).sum()
    return delta * mask * (np.abs(delta).sum() / kept if kept > 1e-7 else 1.0)


def _agreeing(weighted: Sequence[np.ndarray]) -> list[np.ndarray]:
    elected = np.where(sum(weighted) >= 0, 1, -1)
    return [np.sign(d) == elected for d in weighted]
