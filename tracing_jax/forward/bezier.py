"""The middle point of a quadratic Bezier curve between two models, trained so that the loss along the curve is low.

Source: Garipov et al. 2018, Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs (arXiv 1802.10026), section
3. We differ in the optimizer, whose steps are shares of each leaf's own size, and in early stopping by held-out text.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.forward.descent import LEAST_BLOCKS, Descended, Descent, adam_step
from tracing_jax.forward.losses import mean_loss
from tracing_jax.interpolation import combine, interpolated_leaves, on_bezier
from tracing_jax.sharding import Compute
from tracing_jax.sources import InMemory, ParamSource, params_of
from tracing_jax.tree import Tree, flatten, unflatten

Leaves = dict[str, jax.Array]

_CHECKED = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Points at which the barrier on the held-out part is taken."""

_SMALLEST = 1e-3
"""What steps of a leaf of zeros, such as a bias, are shares of. Source: Adafactor (arXiv 1804.04235), section 8."""


@dataclass(frozen=True)
class BezierTraining:
    """How the middle point is trained: steps of Adam, blocks of each, and the share of a leaf's size that a step is."""

    steps: int = 600
    batch_size: int = 16
    rate: float = 0.02


def trained_midpoint(
    base: ParamSource,
    ft: ParamSource,
    tokens: Int[np.ndarray, "N T"],
    groups: Sequence[str],
    training: BezierTraining,
    compute: Compute,
    seed: int = 0,
) -> Descended[InMemory]:
    """Returns the middle point of a curve from base to ft, as a model that has the leaves in `groups` alone.

    It starts in the middle of the straight path, along which the curve then runs, and is trained on the loss at points
    drawn uniformly from the curve. Held in memory are eight models in float32: both ends, the middle point, the best
    one so far, the point of a step, its gradient, and two moments of gradients.

    Args:
      base: the end at 0, in memory, whose leaves outside `groups` all points have.
      ft: the end at 1, in memory.
      tokens: text to learn from; part of it is held out for early stopping.
      groups: which leaves the curve moves.
      training: see `BezierTraining`.
      compute: where the batches are.
      seed: draws batches and points.

    Raises:
      ValueError: too few blocks of text, or the loss between the models is not finite.
    """
    if len(tokens) < LEAST_BLOCKS:
        raise ValueError(f"{len(tokens)} blocks of text to train a curve on, expected at least {LEAST_BLOCKS}")
    arch, moved = base.arch, interpolated_leaves(axis_table(base.arch), groups)
    whole, other = params_of(base), flatten(params_of(ft))
    ends = whole, {name: other[name] for name in moved}
    middle: Leaves = {
        name: (leaf.astype(jnp.float32) + ends[1][name].astype(jnp.float32)) / 2
        for name, leaf in flatten(whole).items()
        if name in moved
    }
    sizes = {name: jnp.maximum(jnp.sqrt(jnp.mean(leaf**2)), _SMALLEST) for name, leaf in middle.items()}
    descent: Descent[Leaves] = Descent(
        "the curve",
        lambda leaves, state, rate, t, batch: training_step(arch, leaves, state, ends, sizes, rate, t, batch),
        lambda leaves, t, batch: loss_on_curve(arch, leaves, ends, t, batch),
        lambda generator: generator.uniform(),
        _CHECKED,
    )
    found = descent.run(middle, tokens, training, compute, seed)
    model = InMemory(arch, unflatten(found.parameters))
    return Descended(model, found.barriers, found.steps, found.best_step)


@functools.partial(jax.jit, static_argnames="arch")
def training_step(
    arch: Arch,
    middle: Leaves,
    state: Any,
    ends: tuple[Tree, Leaves],
    sizes: dict[str, Float[Array, ""]],
    rate: Float[Array, ""],
    t: Float[Array, ""],
    tokens: Int[Array, "B T"],
) -> tuple[Leaves, Any]:
    """Returns the middle point and the optimizer's state after one step."""
    found, state = adam_step(lambda leaves: loss_on_curve(arch, leaves, ends, t, tokens), middle, state)
    return {name: leaf - rate * sizes[name] * found[name] for name, leaf in middle.items()}, state


@functools.partial(jax.jit, static_argnames="arch")
def loss_on_curve(
    arch: Arch, middle: Leaves, ends: tuple[Tree, Leaves], t: Float[Array, ""], tokens: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Returns the loss of the model at a point of the curve, in nats."""
    base, ft = ends
    return mean_loss(arch, combine(base, [ft, middle], on_bezier(t), middle), tokens)
