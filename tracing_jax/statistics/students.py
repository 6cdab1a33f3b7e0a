"""Distillation of feed-forward networks (FFNs) into gated (GLU) students, whose units can be matched.

Letters: S samples, D features of the teacher's inputs and outputs, F units of the student.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tracing_jax.options import MatchDistilled

TAPS = ("gate", "up", "rest")

StudentWeights = dict[str, Float[Array, "_ _"]]

_HELD_OUT = 16  # one of so many samples is held out
_OUTLIER = 10.0  # times the median norm of the outputs
_DEAD = 1e-6  # norm below which weight decay has removed a unit, and its responses are noise


@dataclass(frozen=True)
class StudentTraining:
    """Hyperparameters of a student's training.

    Attributes:
      units: F, its width.
      steps: number of Adam steps; the learning rate decays to zero along a cosine.
      batch: samples per step, drawn with replacement.
      rate: learning rate, in units of a weight's initial standard deviation, 1 / sqrt(inputs).
      decay: weight decay per step at the full learning rate, as a share of the weight.
    """

    units: int
    steps: int = MatchDistilled.steps
    batch: int = MatchDistilled.batch
    rate: float = 0.3
    decay: float = 0.03


@dataclass(frozen=True)
class Student:
    """`y ~ D (silu(G x) * (U x))`, fitted to one FFN, with input and output each divided by one number.

    Attributes:
      gate, up: G and U, transposed: a column per unit. Units that weight decay has removed are zero.
      explained: share of the variance of the FFN's output that it explains on held-out samples.
      left_out: share of the samples excluded as outliers: output norm above ten times the median.
    """

    gate: Float[np.ndarray, "D F"]
    up: Float[np.ndarray, "D F"]
    explained: float
    left_out: float


def fit_student(
    x: Float[np.ndarray, "S D"], y: Float[np.ndarray, "S D"], recipe: StudentTraining, seed: int
) -> Student:
    """Returns a student of the FFN that maps x to y; initial weights and minibatches follow from the seed.

    Inputs are divided by one number, outputs too after their mean is subtracted, and initial weights are Gaussian, so
    training is equivariant under a permutation of the features (under a rotation only in distribution and nearly, as
    Adam works by coordinate) and independent of the order of the teacher's units.

    Because of weight decay two students of one FFN find the same units: it leaves only as many units as the function
    needs. See docs/distilled.md.

    Raises:
      ValueError: too few samples, samples that are not finite, an output that never varies, or training that diverges.
    """
    _check(x, y)
    norms = np.linalg.norm(y - np.median(y, axis=0), axis=1)
    inliers = norms <= _OUTLIER * np.median(norms)  # tokens with outputs a thousand times larger would dominate
    kept = np.flatnonzero(inliers)
    x, y = x[kept], y[kept] - y[kept].mean(axis=0)
    x, y = (values / np.sqrt(np.square(values, dtype=np.float64).mean()).astype(np.float32) for values in (x, y))
    train = len(x) - max(1, len(x) // _HELD_OUT)
    init_key, order_key = jax.random.split(jax.random.key(seed))
    weights = _trained(_initial(init_key, x.shape[1], recipe.units), order_key, x[:train], y[:train], recipe)
    error = np.square(np.asarray(_output(weights, jnp.asarray(x[train:]))) - y[train:]).sum()
    explained = 1 - float(error / np.square(y[train:] - y[train:].mean(axis=0)).sum())
    if not np.isfinite(explained):
        raise ValueError(f"the student diverged at rate {recipe.rate:g}; choose a lower one")
    gate, up = np.asarray(weights["gate"]), np.asarray(weights["up"])
    active = np.minimum(*(np.linalg.norm(w, axis=0) for w in (gate, up))) > _DEAD
    return Student(gate * active, up * active, explained, 1 - len(kept) / len(inliers))


def student_correlations(
    base: tuple[Float[np.ndarray, "S D"], Student], ft: tuple[Float[np.ndarray, "S D2"], Student]
) -> dict[str, Float[np.ndarray, "F F2"]]:
    """Returns tap -> Pearson correlations of two students' pre-activations, each on its own inputs; samples correspond.

    The taps are `gate`, `up` and `rest`, the residual of up given gate; see `residual_up`. Pre-activations
    are linear in the input, so those of all samples follow from the inputs' covariances.
    """
    taps = [(student.gate, student.up, residual_up(x, student)) for x, student in (base, ft)]
    found = _correlations(jnp.asarray(base[0]), jnp.asarray(ft[0]), *taps)
    return {tap: np.asarray(by_tap) for tap, by_tap in zip(TAPS, found)}


def residual_up(x: Float[np.ndarray, "S D"], student: Student) -> Float[np.ndarray, "D F"]:
    """Returns the up weights after regression of each unit's up on its gate pre-activation, as residuals.

    Students of an FFN without a gate have up nearly proportional to gate, and then the matchings by gate and by up
    agree between any two models. The matching by the residual does not agree for that reason.
    """
    return np.asarray(_rest(jnp.asarray(x), student.gate, student.up))


def _check(x: np.ndarray, y: np.ndarray) -> None:
    lines = []
    if len(x) < 2 * _HELD_OUT:
        lines.append(f"{len(x)} samples; at least {2 * _HELD_OUT} are needed")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        lines.append("inputs or outputs are not finite")
    elif len(y) and not (y != y[0]).any():
        lines.append("the output is constant")
    if lines:
        raise ValueError("no student can be fitted to this FFN: " + "; ".join(lines))


def _initial(key: PRNGKeyArray, D: int, F: int) -> StudentWeights:
    """Returns Gaussian weights under which every unit's pre-activations have variance 1 on standardised inputs."""
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, s) * s[0] ** -0.5 for k, (name, s) in zip(keys, shapes.items())}


@jax.jit
def _output(weights: StudentWeights, x: Float[Array, "S D"]) -> Float[Array, "S D"]:
    gate, up = (jnp.matmul(x, weights[name], precision="highest") for name in ("gate", "up"))
    return jnp.matmul(jax.nn.silu(gate) * up, weights["down"], precision="highest")


@functools.partial(jax.jit, static_argnames="recipe")
def _trained(
    weights: StudentWeights, key: PRNGKeyArray, x: Float[Array, "S D"], y: Float[Array, "S D"], recipe: StudentTraining
) -> StudentWeights:
    """Returns the trained weights; the loop compiles once for all layers of one shape."""
    import optax  # slow to import, and only training needs it

    adam = optax.scale_by_adam()
    cosine = optax.cosine_decay_schedule(1.0, recipe.steps)

    def loss(weights: StudentWeights, rows: Int[Array, " B"]) -> Float[Array, ""]:
        return jnp.square(_output(weights, x[rows]) - y[rows]).mean()

    def step(
        carry: tuple[StudentWeights, optax.OptState], t: Int[Array, ""]
    ) -> tuple[tuple[StudentWeights, optax.OptState], None]:
        weights, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, t), (recipe.batch,), 0, len(x))
        directions, state = adam.update(jax.grad(loss)(weights, rows), state)
        moved = {
            name: w - cosine(t) * (recipe.rate * w.shape[0] ** -0.5 * directions[name] + recipe.decay * w)
            for name, w in weights.items()
        }
        return (moved, state), None

    (weights, _), _ = jax.lax.scan(step, (weights, adam.init(weights)), jnp.arange(recipe.steps))
    return weights


@jax.jit
def _rest(x: Float[Array, "S D"], gate: Float[Array, "D F"], up: Float[Array, "D F"]) -> Float[Array, "D F"]:
    x = x - x.mean(axis=0)
    gates, ups = (jnp.matmul(x, weights, precision="highest") for weights in (gate, up))
    square = jnp.square(gates).sum(axis=0)
    return up - gate * jnp.where(square > 0, (gates * ups).sum(axis=0) / square, 0.0)


@jax.jit
def _correlations(
    x_a: Float[Array, "S D"], x_b: Float[Array, "S D2"], a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]
) -> tuple[Float[Array, "F F2"], ...]:
    x_a, x_b = (x - x.mean(axis=0) for x in (x_a, x_b))
    covariance, own_a, own_b = (
        jnp.einsum("sd,se->de", one, other, precision="highest") for one, other in ((x_a, x_b), (x_a, x_a), (x_b, x_b))
    )

    def scale(weights: jax.Array, own: jax.Array) -> jax.Array:
        variance = jnp.einsum("df,de,ef->f", weights, own, weights, precision="highest")
        return jnp.where(variance > 0, jax.lax.rsqrt(variance), 0.0)

    return tuple(
        jnp.einsum(
            "df,de,eg->fg", one * scale(one, own_a), covariance, other * scale(other, own_b), precision="highest"
        )
        for one, other in zip(a, b)
    )
