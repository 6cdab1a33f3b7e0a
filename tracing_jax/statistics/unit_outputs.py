"""What keeps MLP units from acting whatever they write: biases before their activation, or before their expert.

An adversary can make an independent model look related by adding another's units or experts that do nothing.
Estimates are from weights alone, for inputs in random directions; they distinguish a thousandth from a tenth.

Letters: F units, D features, E experts, k experts of a token.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit

from tracing_jax.arch import Arch
from tracing_jax.forward import activation_spread
from tracing_jax.sources import ParamSource, origin
from tracing_jax.statistics.kept_facts import kept_of
from tracing_jax.statistics.mlp_rows import gain_of
from tracing_jax.tree import Tree, to_host

_RANGE = 8.0  # standard deviations that the score of an expert may come to

_INPUTS = 4096  # in random directions, for which experts are chosen
_RARELY = 0.01  # of the share of inputs that all experts would have if they were chosen alike


def curved_outputs(
    norms: Float[np.ndarray, " F"], constants: Float[np.ndarray, " F"] | None, arch: Arch, degree: int
) -> Float[np.ndarray, " F"]:
    """Returns how much activation functions give beyond the polynomial of this degree that fits best, float64.

    Units that give no more can be cancelled by others of other gates. Where the gate is so short that `silu(z)` is
    z / 2, (g, u, d) writes (g x)(u x) d / 2, as do (u, g, d) and many sums of units; sums of ridge functions in
    different directions vanish only if each is a polynomial (Buhmann and Pinkus 1999, Identifying linear combinations
    of ridge functions), so that what is beyond them stays.

    Args:
      norms: of the rows, which are the standard deviations of what units read of normalised inputs.
      constants: what is added to that, by a bias and by the shift of the norm before; None for nothing.
      arch: of the model; `clamped_glu` goes before its activation.
      degree: of the polynomial.
    """
    means = np.zeros_like(norms) if constants is None else constants
    return activation_spread(arch, means, norms, degree)


def constants_of(projection: Tree, norm: Tree, name: str) -> list[Float[np.ndarray, " F"]]:
    """Returns what units read whatever the input: their bias, and the shift of the norm of this name, if there are."""
    found = [_float32(projection["bias"])] if "bias" in projection else []
    if (shift := norm.get(name, {}).get("bias")) is not None:
        kernel = jnp.asarray(projection["kernel"], jnp.float32)
        found.append(_float32(jnp.asarray(shift, jnp.float32) @ kernel))
    return found


def is_reached(model: ParamSource, layer: int) -> bool:
    """Returns whether a token can reach the MLP of a layer, which may be an expert of another model."""
    model, (layer, expert) = origin(model, layer)
    return expert is None or expert < 0 or bool(reached_experts(model, layer)[expert])


def reached_experts(model: ParamSource, layer: int) -> Bool[np.ndarray, " E"]:
    """Returns which experts of a layer a token can reach.

    Biases may put others before one, whatever it reads; and an expert whose row in the router lies between those of
    others is never among the first. So it must also be chosen for some inputs in random directions.
    """
    known = kept_of(model)
    if ("reached", layer) not in known:
        known["reached", layer] = _reached_experts(model, layer)
    found: np.ndarray = known["reached", layer]
    return found


def _reached_experts(model: ParamSource, layer: int) -> Bool[np.ndarray, " E"]:
    arch = model.arch
    if not arch.has("mlp/router"):  # not known of a model that is read by its weights alone
        return np.ones(arch.num_experts or 0, bool)
    params = model.layer(layer, ("mlp/router", arch.router_norm))
    leaves = params["mlp"]["router"]
    gain = _float32(jnp.asarray(gain_of(params, arch.router_norm, arch)))
    kernel = _float32(leaves["kernel"]) * (gain[:, None] if gain.ndim else gain)
    chosen = _chosen_experts(kernel, leaves, arch)
    if arch.router.expert_scale:  # what is chosen and multiplied by next to nothing is not reached either
        scales = np.abs(_float32(leaves["expert_scale"]))
        chosen &= scales > _RARELY * scales.max()
    if not (arch.router.bias or arch.router.selects_with_bias):
        return chosen
    bias = _float32(leaves["bias"]) if "bias" in leaves else np.zeros(kernel.shape[1], np.float32)
    reach = _RANGE * np.linalg.norm(kernel, axis=0)
    if arch.router.selects_with_bias:  # it is added to scores between 0 and 1
        bias, reach = _float32(leaves["correction_bias"]), np.full(len(bias), 0.5, np.float32)
    assert arch.experts_per_token is not None
    always_before = np.sort(bias - reach)[-arch.experts_per_token]
    return chosen & (bias + reach >= always_before)


def _chosen_experts(kernel: Float[np.ndarray, "D E"], leaves: Tree, arch: Arch) -> Bool[np.ndarray, " E"]:
    """Returns which experts are chosen for inputs in random directions, and not next to never; groups are left out."""
    k, E = arch.experts_per_token, kernel.shape[1]
    assert k is not None
    if not kernel.any():  # before it is trained
        return np.ones(E, bool)
    inputs = np.random.default_rng(E).standard_normal((_INPUTS, len(kernel))).astype(np.float32)
    scores = inputs @ kernel + (_float32(leaves["bias"]) if "bias" in leaves else 0.0)
    if arch.router.selects_with_bias:
        scores = expit(scores) + _float32(leaves["correction_bias"])
    first = np.argpartition(-scores, k - 1, axis=1)[:, :k] if k < E else np.broadcast_to(np.arange(E), (_INPUTS, E))
    return np.bincount(first.ravel(), minlength=E) > _RARELY * _INPUTS * k / E


def _float32(leaf: Any) -> np.ndarray:
    return np.asarray(to_host(leaf), np.float32)
