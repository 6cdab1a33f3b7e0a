"""Adam on a loss between two models, with text held out to stop early: for maps and for points of curves alike."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from tracing_jax.progress import tqdm
from tracing_jax.sharding import Compute

P = TypeVar("P")

LEAST_BLOCKS = 32
"""Blocks of text without which nothing can be learnt and held out."""

_HELD_OUT = (16, 32)
"""One block in so many is held out, and at most so many blocks."""

_CHECKS, _PATIENCE = 12, 4
"""How often the held-out barrier is taken, and after how many checks without a better one the descent ends."""

_CLIP, _B2 = 1.0, 0.98
"""Global norm that gradients are clipped to, and Adam's decay of their squares."""

_WARM_UP = 20
"""Steps over which the learning rate rises."""


@runtime_checkable
class Settings(Protocol):
    """How long and how fast a descent is."""

    @property
    def steps(self) -> int:
        """Of Adam, at most."""

    @property
    def batch_size(self) -> int:
        """Blocks of each step."""

    @property
    def rate(self) -> float:
        """The highest learning rate; it rises over a few steps and falls to zero along a cosine."""


@dataclass(frozen=True)
class Descended(Generic[P]):
    """Where a descent ended.

    Attributes:
      parameters: of the lowest barrier on the held-out blocks.
      barriers: on the held-out blocks, nats per token: at the start, then at each check.
      steps: that were made.
      best_step: the step whose parameters were taken; 0 for those at the start.
    """

    parameters: P
    barriers: tuple[float, ...]
    steps: int
    best_step: int


@dataclass(frozen=True)
class Descent(Generic[P]):
    """What is descended.

    Attributes:
      name: of what is learnt, for the progress bar and the log.
      step: from parameters, the optimizer's state, a learning rate, a point and a batch to parameters and state.
      loss: in nats, from parameters, a point and a batch.
      draw_point: of a step, between 0 and 1.
      checked: points at which the barrier on the held-out blocks is taken.
    """

    name: str
    step: Callable[[P, Any, Float[np.ndarray, ""], np.float32, Int[Array, "B T"]], tuple[P, Any]]
    loss: Callable[[P, np.float32, Int[Array, "B T"]], Float[Array, ""]]
    draw_point: Callable[[np.random.Generator], float]
    checked: tuple[float, ...]

    def run(
        self, start: P, tokens: Int[np.ndarray, "N T"], settings: Settings, compute: Compute, seed: int = 0
    ) -> Descended[P]:
        """Returns the parameters of the lowest held-out barrier.

        Raises:
          ValueError: the loss is not finite.
        """
        held_out = min(max(len(tokens) // _HELD_OUT[0], 1), _HELD_OUT[1])
        generator = np.random.default_rng([seed, len(tokens)])
        order = generator.permutation(len(tokens))
        batches = _Batches(tokens[order[held_out:]], settings.batch_size, generator)
        barrier = functools.partial(self._barrier, tokens[order[:held_out]], compute)
        rates, every = _rates(settings), max(1, -(-settings.steps // _CHECKS))
        parameters, state, step = start, optimizer().init(start), 0
        best, best_step, barriers = start, 0, [barrier(start)]
        with tqdm(total=settings.steps, desc=f"learning {self.name}", unit="step", disable=None) as bar:
            for step in range(1, settings.steps + 1):
                point = np.float32(self.draw_point(generator))
                parameters, state = self.step(parameters, state, rates[step - 1], point, compute.put(batches.next()))
                bar.update()
                if step % every and step != settings.steps:
                    continue
                barriers.append(barrier(parameters))
                logging.info("%s, step %d: held-out barrier %.3f nats", self.name, step, barriers[-1])
                if barriers[-1] <= min(barriers):
                    best, best_step = parameters, step
                elif len(barriers) - 1 - int(np.argmin(barriers)) >= _PATIENCE:
                    break
        return Descended(best, tuple(barriers), step, best_step)

    def _barrier(self, tokens: Int[np.ndarray, "N T"], compute: Compute, parameters: P) -> float:
        """Returns the greatest excess of the loss over the ends', nats per token; may be negative."""
        points = np.array([0.0, *self.checked, 1.0])
        batches = [compute.put(batch) for batch in compute.batches(tokens)]
        losses = [
            np.mean([self.loss(parameters, np.float32(point), batch) for batch in batches], dtype=float)
            for point in points
        ]
        excess = np.asarray(losses) - ((1 - points) * losses[0] + points * losses[-1])
        if not np.isfinite(excess).all():
            raise ValueError(
                f"{self.name}: the loss between the models is not finite; the weights hold NaN, or the rate is high"
            )
        return float(excess[1:-1].max())


class _Batches:
    """Blocks in an order drawn anew for every pass over them."""

    def __init__(self, tokens: Int[np.ndarray, "N T"], size: int, generator: np.random.Generator) -> None:
        self.tokens, self.size, self.generator = tokens, size, generator
        self.waiting: list[int] = []

    def next(self) -> Int[np.ndarray, "B T"]:
        while len(self.waiting) < self.size:
            self.waiting += list(self.generator.permutation(len(self.tokens)))
        taken, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        return self.tokens[np.asarray(taken)]


def _rates(settings: Settings) -> Float[np.ndarray, " steps"]:
    step = np.arange(1, settings.steps + 1)
    warm_up = min(_WARM_UP, max(1, settings.steps // 10))
    falling = 0.5 + 0.5 * np.cos(np.pi * step / settings.steps)
    return (settings.rate * np.minimum(step / warm_up, 1) * falling).astype(np.float32)


def optimizer() -> Any:
    """Returns Adam of unit learning rate, its gradients clipped."""
    import optax  # slow to import, and only training needs it

    return optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam(b2=_B2))


def adam_step(loss: Callable[[Any], jax.Array], parameters: Any, state: Any) -> tuple[Any, Any]:
    """Returns the step of Adam at unit learning rate, to be subtracted, and the optimizer's state behind it."""
    found: tuple[Any, Any] = optimizer().update(jax.grad(loss)(parameters), state)
    return found
