"""Training in seconds to minutes: AdamW on random windows of a text, one compiled step for all models of a shape.

Letters: B batch, T position, V vocab.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.demo.recipe import DemoSizes
from tracing_jax.forward import mean_loss
from tracing_jax.models import init_params
from tracing_jax.progress import tqdm
from tracing_jax.tree import Tree

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True)
class Training:
    """The text of a training run, its number of steps and its learning rate; the name labels the progress bar."""

    name: str
    tokens: np.ndarray
    steps: int
    peak_learning_rate: float


@functools.partial(jax.jit, static_argnames="arch")  # op by op, every shape would be compiled on its own
def init(arch: Arch, key: PRNGKeyArray) -> Tree:
    """Returns fresh params whose kernels have standard deviation 1 / sqrt(D)."""
    # The default scale is meant for thousands of units; narrow models barely learn from it.
    std = arch.embed_dim**-0.5

    def scaled(leaf: jax.Array) -> jax.Array:
        return leaf * (std / jnp.maximum(leaf.std(), 1e-6)) if leaf.ndim > 1 else leaf  # biases stay zero

    return jax.tree.map(scaled, init_params(arch, key))


def train(arch: Arch, recipe: DemoSizes, params: Tree, training: Training) -> Tree:
    """Returns the params, as numpy, after AdamW on random windows of the text: a warm-up, then a cosine to zero."""
    tokens, steps, T = training.tokens, training.steps, recipe.block_size
    # Every run draws the same windows: base and independent see them in the same order.
    starts = np.random.default_rng(recipe.seed).integers(0, len(tokens) - T, size=(steps, recipe.batch_size, 1))
    rates = learning_rates(training.peak_learning_rate, steps)
    state = optimizer(recipe).init(params)
    with tqdm(total=steps, desc=f"training {training.name}", unit="step", disable=None) as bar:
        for rate, start in zip(rates, starts):
            params, state, loss = train_step(arch, recipe, params, state, rate, tokens[start + np.arange(T)])
            bar.set_postfix(loss_nats=f"{loss:.2f}", refresh=False)
            bar.update()
    return jax.device_get(params)


def learning_rates(peak: float, steps: int) -> Float[np.ndarray, " steps"]:
    """Returns the learning rate of each step: a warm-up over one step in twenty, then a cosine to zero."""
    import optax  # slow to import, and only training needs it

    return np.asarray(optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 20, 1), steps)(np.arange(steps)))


def optimizer(recipe: DemoSizes) -> "optax.GradientTransformation":
    """Returns AdamW, after clipping, at learning rate 1; norm gains, the only vectors, do not decay."""
    import optax

    kernels = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    adamw = optax.adamw(1.0, b2=0.95, weight_decay=recipe.weight_decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@functools.partial(jax.jit, static_argnames=("arch", "recipe"))
def train_step(
    arch: Arch, recipe: DemoSizes, params: Tree, state: Any, rate: Float[Array, ""], tokens: Int[Array, "B T"]
) -> tuple[Tree, Any, Float[Array, ""]]:
    """Returns params and optimizer state after one step at this learning rate, and the loss before it, in nats."""
    import optax

    # The learning rate comes in as data, so that all members share one compiled step.
    loss, gradients = jax.value_and_grad(functools.partial(mean_loss, arch))(params, tokens)
    updates, state = optimizer(recipe).update(gradients, state, params)
    return optax.apply_updates(params, jax.tree.map(lambda update: rate * update, updates)), state, loss


def unigram_entropy(tokens: Int[np.ndarray, "N T"]) -> float:
    """Returns the entropy of the tokens' own frequencies in nats: no context-free predictor has a lower loss."""
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(shares * np.log(shares)).sum())
