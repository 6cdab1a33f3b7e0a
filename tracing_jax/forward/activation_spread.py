"""How much the values of an MLP's activation function vary over inputs in random directions."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tracing_jax.arch import Arch
from tracing_jax.models.layers import ACTIVATIONS

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)


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
    inputs = (means[:, None] + deviations[:, None] * _NODES).astype(np.float32)
    if arch.clamped_glu is None:
        found = np.asarray(ACTIVATIONS[arch.activation](jnp.asarray(inputs)), np.float64)
    else:
        limit, slope = arch.clamped_glu
        clamped = np.minimum(inputs, limit).astype(np.float64)
        found = clamped / (1 + np.exp(np.clip(-slope * clamped, -80, 80)))
    roots = np.sqrt(_WEIGHTS / _WEIGHTS.sum())
    polynomials, _ = np.linalg.qr(roots[:, None] * np.polynomial.hermite_e.hermevander(_NODES, degree))
    rest = found * roots
    return np.linalg.norm(rest - (rest @ polynomials) @ polynomials.T, axis=1)
