"""Alignment learnt by gradient descent on the loss between the models, from an alignment by weights.

The parameters are those of maps that keep the function (`learned_maps.py`), so that the loss at both ends stays as it
is and only that of the points between them falls. Gains may differ between the ends: where base has a gain g and ft
r g, and their readers are the same, the midpoint has `(2 + r + 1 / r) / 4` times the product, a scale that no map with
equal gains has. Factors of units, values and queries act likewise.

Source: Theus et al. 2025, Generalized Linear Mode Connectivity for Transformers (arXiv 2506.22712), for learning an
alignment by the loss near the midpoint. We differ in the gains, in starting values, and in early stopping.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.alignment.float64_leaves import in_float64
from tracing_jax.alignment.learned_maps import Values, initial_values, mapped, rewrites_of
from tracing_jax.alignment.rewrite_estimation import folding, gains_of, setting, without_zeros
from tracing_jax.arch import Arch
from tracing_jax.forward import Descent, adam_step, mean_loss
from tracing_jax.rewrites import Rewrite, Untying
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource, in_memory, rewritten
from tracing_jax.tree import flatten, unflatten

Ends = Literal["ft", "both"]

_CHECKED = (0.25, 0.4, 0.5, 0.6, 0.75)
"""Points at which the barrier on the held-out part is taken."""


@dataclass(frozen=True)
class Learning:
    """How an alignment is learnt.

    Attributes:
      steps: of Adam, at most.
      batch_size: blocks of each step.
      rate: learning rate; it rises over a few steps and falls to zero along a cosine.
      spread: the point of each step is drawn between 0.5 - spread and 0.5 + spread.
      ends: which models are mapped: ft, or both.
      before_pairing: the share of the steps after which MLP units are paired anew, by activations; 0 keeps the pairs
        that the weights gave.

    Example:
      >>> tj.Learning(steps=200, ends="both").ends
      'both'
    """

    steps: int = 600
    batch_size: int = 16
    rate: float = 0.01
    spread: float = 0.15
    ends: Ends = "ft"
    before_pairing: float = 0.2


@dataclass(frozen=True)
class Learned:
    """What was learnt.

    Attributes:
      rewrites: of the model that was aligned by weights before.
      base_rewrites: of base; empty if ft alone was mapped.
      barriers: barrier on the held-out blocks, nats per token: at the start, then at each check.
      steps: of the descent, until it ended.
      best_step: the step whose parameters were taken.
    """

    rewrites: tuple[Rewrite, ...]
    base_rewrites: tuple[Rewrite, ...]
    barriers: tuple[float, ...]
    steps: int
    best_step: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaves", "gains"], meta_fields=[])
@dataclass(frozen=True)
class _End:
    """The leaves of a model by name, with foldable gains of one, and the gains; none if the model is not mapped."""

    leaves: dict[str, Any]
    gains: dict[str, Any]


Parameters = dict[str, Values]
"""`ft` and, if both ends are mapped, `base` -> the parameters of its maps."""


def learn(
    base: ParamSource,
    ft: ParamSource,
    kinds: Collection[str],
    tokens: Int[np.ndarray, "N T"],
    settings: Learning,
    compute: Compute,
    seed: int = 0,
) -> Learned:
    """Returns the maps of ft, aligned by weights already, after which the loss between the models is low.

    Args:
      base: the end at 0.
      ft: the end at 1, of base's shape.
      kinds: of maps that may be used and that both models support.
      tokens: text to learn from; part of it is held out for early stopping.
      settings: see `Learning`.
      compute: where the batches are.
      seed: draws batches and points.

    Raises:
      ValueError: the loss between the models is not finite.
    """
    if {"gains", "rotation"} & set(kinds):  # which act on an embedding and on a head of its own
        base, ft = (rewritten(source, [Untying()]) if source.arch.tied else source for source in (base, ft))
    both = settings.ends == "both"
    ends = {"base": _end(base, kinds if both else ()), "ft": _end(ft, kinds)}
    parameters = {side: initial_values(ft.arch, kinds) for side in (("base", "ft") if both else ("ft",))}
    descent = Descent(
        "the alignment",
        lambda p, state, rate, point, batch: learning_step(base.arch, p, state, ends, rate, point, batch),
        lambda p, point, batch: between(base.arch, p, ends, point, batch),
        lambda generator: 0.5 + settings.spread * generator.uniform(-1, 1),
        _CHECKED,
    )
    found = descent.run(parameters, tokens, settings, compute, seed)
    best = found.parameters
    rewrites = {side: _rewrites(source, best.get(side), ends[side]) for side, source in (("base", base), ("ft", ft))}
    return Learned(rewrites["ft"], rewrites["base"], found.barriers, found.steps, found.best_step)


def _end(source: ParamSource, kinds: Collection[str]) -> _End:
    folds = "gains" in kinds
    gains = without_zeros(gains_of(source)) if folds else {}
    model = in_memory(rewritten(source, folding(source)) if folds else source, "folding gains")
    leaves = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in flatten(model.params).items()}
    return _End(leaves, {norm: jnp.asarray(gain, jnp.float32) for norm, gain in gains.items()})


def _rewrites(source: ParamSource, values: Values | None, end: _End) -> tuple[Rewrite, ...]:
    """Returns the maps of one model as rewrites, with its gains last."""
    if values is None:
        return ()
    rewrites = rewrites_of(values, source.arch)
    if end.gains:
        logs = {norm: np.asarray(x, np.float64) for norm, x in values["gains"].items()}
        gains = {norm: np.asarray(end.gains[norm], np.float64) * np.exp(x) for norm, x in logs.items()}
        rewrites.append(setting(in_float64(source, rewrites), gains))
    return tuple(rewrites)


@functools.partial(jax.jit, static_argnames="arch")
def learning_step(
    arch: Arch,
    parameters: Parameters,
    state: Any,
    ends: dict[str, _End],
    rate: Float[Array, ""],
    point: Float[Array, ""],
    tokens: Int[Array, "B T"],
) -> tuple[Parameters, Any]:
    """Returns parameters and optimizer state after one step."""
    found, state = adam_step(lambda p: between(arch, p, ends, point, tokens), parameters, state)

    def moved(path: Sequence[Any], x: jax.Array, update: jax.Array) -> jax.Array:
        # So that a step turns vectors by an angle that does not grow with the width.
        turns = any(getattr(key, "key", None) == "rotation" for key in path)
        return x - rate * update * (min(1.0, 10 / len(x) ** 0.5) if turns else 1.0)

    return jax.tree_util.tree_map_with_path(moved, parameters, found), state


@functools.partial(jax.jit, static_argnames="arch")
def between(
    arch: Arch, parameters: Parameters, ends: dict[str, _End], point: Float[Array, ""], tokens: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the loss of the model at a point between both ends after their maps, in nats."""
    base, ft = (
        mapped(ends[side].leaves, parameters[side], ends[side].gains, arch) if side in parameters else ends[side].leaves
        for side in ("base", "ft")
    )
    return mean_loss(arch, unflatten({name: (1 - point) * x + point * ft[name] for name, x in base.items()}), tokens)
