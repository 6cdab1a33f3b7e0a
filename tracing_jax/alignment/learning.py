"""Alignment learnt by gradient descent on the loss between the models, from an alignment by weights.

The parameters are those of maps that keep the function (`learned_maps.py`), so that the loss at both ends stays as it
is and only that of the points between them falls. Gains may differ between the ends: where base has a gain g and ft
r g, and their readers are the same, the midpoint has `(2 + r + 1 / r) / 4` times the product, a scale that no map with
equal gains has. Factors of units, values and queries act likewise.

Source: Theus et al. 2025, Generalized Linear Mode Connectivity for Transformers (arXiv 2506.22712), for learning an
alignment by the loss near the midpoint. We differ in the gains, in starting values, and in early stopping.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from tracing_jax.alignment.float64_leaves import in_float64
from tracing_jax.alignment.learned_maps import Values, initial_values, mapped, rewrites_of
from tracing_jax.alignment.rewrite_estimation import folding, gains_of, setting, without_zeros
from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.forward import mean_loss
from tracing_jax.progress import tqdm
from tracing_jax.rewrites import Rewrite, Untying, gain_offset
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource, in_memory, rewritten
from tracing_jax.tree import flatten, unflatten

Ends = Literal["ft", "both"]

LEAST_BLOCKS = 32
"""Blocks of text without which nothing can be learnt and held out."""

_CHECKED = (0.25, 0.4, 0.5, 0.6, 0.75)
"""Points at which the barrier on the held-out part is taken."""

_HELD_OUT = (16, 32)
"""One block in so many is held out, and at most so many blocks."""

_CHECKS, _PATIENCE = 12, 4
"""How often the held-out barrier is taken, and after how many checks without a better one the descent ends."""

_CLIP, _B2 = 1.0, 0.98
"""Global norm that gradients are clipped to, and Adam's decay of their squares."""

_WARM_UP = 20
"""Steps over which the learning rate rises."""


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
    descent = _Descent(base.arch, ends, tokens, settings, compute, seed)
    best, barriers, steps, best_step = descent.run(parameters)
    rewrites = {side: _rewrites(source, best.get(side), ends[side]) for side, source in (("base", base), ("ft", ft))}
    return Learned(rewrites["ft"], rewrites["base"], tuple(barriers), steps, best_step)


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
    rewrites = rewrites_of(values)
    if end.gains:
        logs = {norm: np.asarray(x, np.float64) for norm, x in values["gains"].items()}
        gains = {norm: np.asarray(end.gains[norm], np.float64) * np.exp(x) for norm, x in logs.items()}
        rewrites.append(setting(in_float64(source, rewrites), gains))
    return tuple(rewrites)


class _Descent:
    """Adam on the loss between two models."""

    def __init__(
        self,
        arch: Arch,
        ends: Mapping[str, _End],
        tokens: Int[np.ndarray, "N T"],
        settings: Learning,
        compute: Compute,
        seed: int,
    ) -> None:
        self.arch, self.ends, self.settings, self.compute = arch, dict(ends), settings, compute
        held_out = min(max(len(tokens) // _HELD_OUT[0], 1), _HELD_OUT[1])
        self.generator = np.random.default_rng([seed, len(tokens)])
        order = self.generator.permutation(len(tokens))
        self.tokens, self.held_out = tokens[order[held_out:]], tokens[order[:held_out]]
        self.batch: list[np.ndarray] = []

    def run(self, parameters: Parameters) -> tuple[Parameters, list[float], int, int]:
        """Returns the parameters of the lowest held-out barrier, all barriers, the steps made, and the best step."""
        settings, rates = self.settings, self._rates()
        state = _optimizer().init(parameters)
        best, best_step, step, barriers = parameters, 0, 0, [self.barrier(parameters)]
        every = max(1, -(-settings.steps // _CHECKS))
        with tqdm(total=settings.steps, desc="learning the alignment", unit="step", disable=None) as bar:
            for step in range(1, settings.steps + 1):
                point = 0.5 + settings.spread * self.generator.uniform(-1, 1)
                batch = self.compute.put(self._next_batch())
                parameters, state, _ = learning_step(
                    self.arch, parameters, state, self.ends, rates[step - 1], np.float32(point), batch
                )
                bar.update()
                if step % every and step != settings.steps:
                    continue
                barriers.append(self.barrier(parameters))
                logging.info("alignment, step %d: held-out barrier %.3f nats", step, barriers[-1])
                if barriers[-1] <= min(barriers):
                    best, best_step = parameters, step
                elif len(barriers) - 1 - int(np.argmin(barriers)) >= _PATIENCE:
                    break
        return best, barriers, step, best_step

    def barrier(self, parameters: Parameters) -> float:
        """Returns the greatest excess of the held-out loss over the ends', nats per token; may be negative."""
        points = np.array([0.0, *_CHECKED, 1.0])
        batches = [self.compute.put(batch) for batch in self.compute.batches(self.held_out)]
        losses = [
            np.mean([between(self.arch, parameters, self.ends, np.float32(a), batch) for batch in batches], dtype=float)
            for a in points
        ]
        excess = np.asarray(losses) - ((1 - points) * losses[0] + points * losses[-1])
        if not np.isfinite(excess).all():
            raise ValueError(
                "the loss between the models is not finite; the weights hold NaN, or learning.rate is high"
            )
        return float(excess[1:-1].max())

    def _next_batch(self) -> Int[np.ndarray, "B T"]:
        """Returns blocks in an order drawn anew for every pass over them."""
        while len(self.batch) < self.settings.batch_size:
            self.batch += list(self.generator.permutation(len(self.tokens)))
        taken, self.batch = self.batch[: self.settings.batch_size], self.batch[self.settings.batch_size :]
        return self.tokens[np.asarray(taken)]

    def _rates(self) -> Float[np.ndarray, " steps"]:
        step = np.arange(1, self.settings.steps + 1)
        warm_up = min(_WARM_UP, max(1, self.settings.steps // 10))
        falling = 0.5 + 0.5 * np.cos(np.pi * step / self.settings.steps)
        return (self.settings.rate * np.minimum(step / warm_up, 1) * falling).astype(np.float32)


def _optimizer() -> Any:
    import optax  # slow to import, and only training needs it

    return optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam(b2=_B2))


@functools.partial(jax.jit, static_argnames="arch")
def learning_step(
    arch: Arch,
    parameters: Parameters,
    state: Any,
    ends: dict[str, _End],
    rate: Float[Array, ""],
    point: Float[Array, ""],
    tokens: Int[Array, "B T"],
) -> tuple[Parameters, Any, Float[Array, ""]]:
    """Returns parameters and optimizer state after one step, and the loss before it, in nats."""
    loss, gradients = jax.value_and_grad(lambda p: between(arch, p, ends, point, tokens))(parameters)
    updates, state = _optimizer().update(gradients, state)

    def moved(path: Sequence[Any], x: jax.Array, update: jax.Array) -> jax.Array:
        # So that a step turns vectors by an angle that does not grow with the width.
        turns = any(getattr(key, "key", None) == "rotation" for key in path)
        return x - rate * update * (min(1.0, 10 / len(x) ** 0.5) if turns else 1.0)

    return jax.tree_util.tree_map_with_path(moved, parameters, updates), state, loss


@functools.partial(jax.jit, static_argnames="arch")
def between(
    arch: Arch, parameters: Parameters, ends: dict[str, _End], point: Float[Array, ""], tokens: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the loss of the model at a point between both ends after their maps, in nats."""
    table, offset = axis_table(arch), gain_offset(arch)
    base, ft = (
        mapped(ends[side].leaves, parameters[side], ends[side].gains, table, offset)
        if side in parameters
        else ends[side].leaves
        for side in ("base", "ft")
    )
    return mean_loss(arch, unflatten({name: (1 - point) * x + point * ft[name] for name, x in base.items()}), tokens)
