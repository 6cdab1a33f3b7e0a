"""What MLP units do on a text, measured in a pass forward and back: beside what weights alone let one estimate.

A unit that is closed for every token writes nothing, however long its rows are, and what it writes can be far from all
that the logits depend on. So the activation of each unit at each token is multiplied by its down row times the gradient
of the logits there: by how much the logits would change without it.

Letters: F units, D features, T tokens.
"""

import numpy as np
from jaxtyping import Float

from tracing_jax.arch import Arch
from tracing_jax.forward import activation_values


def beyond_polynomial(gates: Float[np.ndarray, "T F"], arch: Arch, degree: int) -> Float[np.ndarray, "T F"]:
    """Returns what the activation gives at each token beyond the polynomial of this degree, 1 or 2, that fits best.

    Zeros for units whose input is not finite at some token.
    """
    known = np.isfinite(gates).all(axis=0)
    inputs = np.where(known, gates, 0.0).astype(np.float64)
    deviation = inputs.std(axis=0)
    known &= deviation > 0
    rest = activation_values(arch, inputs)
    standardised = np.divide(inputs - inputs.mean(axis=0), deviation, out=np.zeros_like(inputs), where=known)
    fitted = [standardised]
    if degree > 1:
        square = np.square(standardised)
        fitted.append(_without(square - square.mean(axis=0), standardised))
    rest -= rest.mean(axis=0)
    for column in fitted:
        rest = _without(rest, column)
    return np.where(known & np.isfinite(rest).all(axis=0), rest, 0.0)


def up_factors(ups: Float[np.ndarray, "T F"], arch: Arch) -> Float[np.ndarray, "T F"]:
    """Returns what the activation of each unit is multiplied by at each token; zeros where that is not finite."""
    factors = ups.astype(np.float64)
    if arch.clamped_glu is not None:
        factors = np.clip(factors, -arch.clamped_glu[0], arch.clamped_glu[0]) + 1
    return np.where(np.isfinite(factors).all(axis=0), factors, 0.0)


def shares_of_effect(outputs: Float[np.ndarray, "T F"], gradients: Float[np.ndarray, "T F"]) -> Float[np.ndarray, " F"]:
    """Returns the root of each unit's share of the squared effects of all on the logits, the mean over the tokens.

    Zeros where nothing has an effect, or effects are not finite.

    Args:
      outputs: by how much each unit's activation differs from a line.
      gradients: of the logits along what it writes.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        effects = np.square(outputs * gradients)
        total = effects.sum(axis=1, keepdims=True)
    usable = np.isfinite(total) & (total > 0)
    shares = np.divide(effects, total, out=np.zeros_like(effects), where=usable)
    return np.sqrt(shares.mean(axis=0))


def _without(columns: Float[np.ndarray, "T F"], direction: Float[np.ndarray, "T F"]) -> Float[np.ndarray, "T F"]:
    """Returns each column without what lies along a direction of its own."""
    energy = np.square(direction).sum(axis=0)
    along = (columns * direction).sum(axis=0)
    return columns - direction * np.divide(along, energy, out=np.zeros_like(energy), where=energy > 0)
