"""How much the values of an MLP's activation function vary over inputs in random directions."""

import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float
from scipy import special

from tracing_jax.arch import Arch

FLOAT64_ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda z: z * special.expit(z),
    "gelu_tanh": lambda z: z * special.expit(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)),
    "gelu": lambda z: z * special.ndtr(z),
    "relu": lambda z: np.maximum(z, 0),
    "relu2": lambda z: np.square(np.maximum(z, 0)),
}
"""The activations of the models in float64: what is beyond a parabola can be less than the error of float32."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)


def activation_values(arch: Arch, inputs: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Returns what an MLP's activation function gives, float64; where a model has `clamped_glu`, the gate of that."""
    if arch.clamped_glu is None:
        return FLOAT64_ACTIVATIONS[arch.activation](inputs)
    limit, slope = arch.clamped_glu
    clamped = np.minimum(inputs, limit)
    return clamped * special.expit(slope * clamped)


def activation_spread(
    arch: Arch, means: Float[np.ndarray, " F"], deviations: Float[np.ndarray, " F"], degree: int = 0
) -> Float[np.ndarray, " F"]:
    """Returns the standard deviation of what an MLP's activation function gives, float64, by Gauss-Hermite quadrature.

    Args:
      arch: of the model; where it has `clamped_glu`, the gate of that.
      means: of each unit's input to the function, taken for normally distributed.
      deviations: standard deviations of these inputs.
      degree: of the polynomial of the input that fits best, which is subtracted: 0 for the mean.
    """
    inputs = means.astype(np.float64)[:, None] + deviations.astype(np.float64)[:, None] * _NODES
    found = activation_values(arch, inputs)
    roots = np.sqrt(_WEIGHTS / _WEIGHTS.sum())
    polynomials, _ = np.linalg.qr(roots[:, None] * np.polynomial.hermite_e.hermevander(_NODES, degree))
    rest = found * roots
    return np.linalg.norm(rest - (rest @ polynomials) @ polynomials.T, axis=1)
