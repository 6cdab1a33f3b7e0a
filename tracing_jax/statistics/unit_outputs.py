"""What MLP units add to the residual stream: nothing where a bias keeps them closed, their layer adds next to nothing,
or no token reaches their expert.

Whoever wants an independent model to look related can add another's units, layers or experts to it such that they do
nothing. Estimates are from weights alone, for inputs in random directions; they tell a thousandth from a tenth.

Letters: F units, D features, E experts, k experts of a token.
"""

import weakref
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from tracing_jax.arch import Arch
from tracing_jax.models.layers import ACTIVATIONS
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import ParamSource, Submodel, has_embeddings, one_mlp, origin
from tracing_jax.tree import Tree, to_host

NEGLIGIBLE = 1e-3
"""Share of the residual stream that a layer adds if it does next to nothing. In trained models the MLP of a layer adds
some hundredths and more."""

_SAMPLE = 64  # units of a layer, and tokens, from which sizes are estimated
_RANGE = 8.0  # standard deviations that the score of an expert may come to
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)

_OUTPUTS: dict[int, dict[int | str, float]] = {}
"""Id of a model -> layer -> what its MLP adds per feature, and `embed` -> the size of embeddings, while it exists."""


def opened(norms: Float[np.ndarray, " F"], constants: Float[np.ndarray, " F"], arch: Arch) -> Float[np.ndarray, " F"]:
    """Returns the norms of the rows that an activation function follows, less where constants keep it closed.

    Args:
      norms: of the rows, which are the standard deviations of what units read of normalised inputs.
      constants: what is added to that, by a bias and by the shift of the norm before.
      arch: of the model; `clamped_glu` goes before its activation.
    """
    both = np.stack([np.zeros_like(constants), constants]).astype(np.float32)
    inputs = both[..., None] + norms[:, None] * _NODES.astype(np.float32)
    if arch.clamped_glu is None:
        found = np.asarray(ACTIVATIONS[arch.activation](inputs), np.float64)
    else:
        limit, slope = arch.clamped_glu
        clamped = np.minimum(inputs, limit)
        found = clamped / (1 + np.exp(np.clip(-slope * clamped, -80, 80)))
    weights = _WEIGHTS / _WEIGHTS.sum()
    spread = np.sqrt(np.square(found - (found @ weights)[..., None]) @ weights)
    share = np.divide(spread[1], spread[0], out=np.ones(len(norms)), where=spread[0] > 0)
    return (norms * np.minimum(share, 1)).astype(np.float32)


def constants_of(projection: Tree, norm: Tree, name: str) -> list[Float[np.ndarray, " F"]]:
    """Returns what units read whatever the input: their bias, and the shift of the norm of this name, if there are."""
    found = [_float32(projection["bias"])] if "bias" in projection else []
    if (shift := norm.get(name, {}).get("bias")) is not None:
        kernel = jnp.asarray(projection["kernel"], jnp.float32)
        found.append(_float32(jnp.asarray(shift, jnp.float32) @ kernel))
    return found


def least_output(model: ParamSource, layer: int) -> float:
    """Returns how much a unit must write: were all like it, they would add `NEGLIGIBLE` of the stream before them.

    What a unit writes is the product of the norms of its rows, as in `distinct_units`. 0 where the model has no
    embeddings or its units are known by what they write alone; infinite if a norm makes the layer's output negligible.
    """
    model, (layer, _) = origin(model, layer)
    arch = model.arch
    if not _is_known(model):
        return 0.0
    added, stream = _added_and_stream(model, layer)
    if arch.post_norms:
        return np.inf if added < NEGLIGIBLE * stream else 0.0
    return float(2 * NEGLIGIBLE * stream * np.sqrt(arch.embed_dim / arch.mlp_dim_of(layer)))


def inactive_layers(model: ParamSource) -> list[int]:
    """Returns the layers whose MLP adds next to nothing to the stream; none where that cannot be known.

    Such a layer can be added anywhere, so that in models with one the layers need not correspond by their index.
    """
    if not _is_known(model):
        return []
    found = (_added_and_stream(model, i) for i in range(model.arch.num_layers))
    return [i for i, (added, stream) in enumerate(found) if added < NEGLIGIBLE * stream]


def _is_known(model: ParamSource) -> bool:
    return model.arch.has("mlp/up_proj") and model.arch.has("embed/embedding") and has_embeddings(model)


def _added_and_stream(model: ParamSource, layer: int) -> tuple[float, float]:
    """Returns what the MLP of a layer adds per feature, and the size of the stream before it."""
    if id(model) not in _OUTPUTS:
        _OUTPUTS[id(model)] = {}
        weakref.finalize(model, _OUTPUTS.pop, id(model), None)  # models hold arrays and cannot be hashed
    known = _OUTPUTS[id(model)]
    if "embed" not in known:
        known["embed"] = _embedding_size(model)
    for i in range(layer + 1):
        if i not in known:
            known[i] = _added(model, i)
    return known[layer], float(np.sqrt(sum(known[i] ** 2 for i in ("embed", *range(layer)))))


def is_reached(model: ParamSource, layer: int) -> bool:
    """Returns whether a token can reach the MLP of a layer, which may be an expert of another model."""
    model, (layer, expert) = origin(model, layer)
    return expert is None or expert < 0 or bool(reached_experts(model, layer)[expert])


def reached_experts(model: ParamSource, layer: int) -> Bool[np.ndarray, " E"]:
    """Returns which experts of a layer a token can reach: biases may put others before one, whatever it reads."""
    arch = model.arch
    if not (arch.router.bias or arch.router.selects_with_bias):
        return np.ones(arch.num_experts or 0, bool)
    leaves = model.layer(layer, ("mlp/router",))["mlp"]["router"]
    kernel = _float32(leaves["kernel"])
    bias = _float32(leaves["bias"]) if "bias" in leaves else np.zeros(kernel.shape[1], np.float32)
    reach = _RANGE * np.linalg.norm(kernel, axis=0)
    if arch.router.selects_with_bias:  # it is added to scores between 0 and 1
        bias, reach = _float32(leaves["correction_bias"]), np.full(len(bias), 0.5, np.float32)
    assert arch.experts_per_token is not None
    always_before = np.sort(bias - reach)[-arch.experts_per_token]
    return bias + reach >= always_before


def _embedding_size(model: ParamSource) -> float:
    """Returns the root mean square of some embeddings as the first layer reads them."""
    arch = model.arch
    embed = Submodel(model, (), None, np.arange(min(_SAMPLE, arch.vocab_size))).embed()
    if "norm" in embed:
        return _gain_size(embed["norm"], arch)
    return arch.embed_scale * _rms(embed["embedding"])


def _added(model: ParamSource, layer: int) -> float:
    """Returns what the MLP of a layer, or its first expert, adds per feature, root mean square."""
    arch = model.arch
    if arch.post_norms:
        return _gain_size(model.layer(layer, ("mlp_post_norm",))["mlp_post_norm"], arch)
    if arch.has_experts(layer):
        model, layer = one_mlp(model, layer, 0), 0
    units = slice(0, min(_SAMPLE, model.arch.mlp_dim_of(layer)))
    params = Submodel(model, (layer,), units, np.zeros(0, np.int32)).layer(0, ("mlp", arch.mlp_norm))
    gain: np.ndarray = np.ones(1, np.float32)
    if "scale" in params.get(arch.mlp_norm, {}):
        gain = _float32(params[arch.mlp_norm]["scale"])[:, None] + np.float32(gain_offset(arch))
    mlp = params["mlp"]
    written = np.linalg.norm(_float32(mlp["down_proj"]["kernel"]), axis=1)
    names = ("gate_proj", "up_proj") if arch.gated else ("up_proj",)
    for at, name in enumerate(names):
        norms = np.linalg.norm(_float32(mlp[name]["kernel"]) * gain, axis=0)
        constants = constants_of(mlp[name], params, arch.mlp_norm)
        written *= opened(norms, np.sum(constants, axis=0), arch) if constants and at == 0 else norms
    return float(np.median(written)) / 2 * np.sqrt(model.arch.mlp_dim_of(layer) / arch.embed_dim)


def _gain_size(norm: Tree, arch: Arch) -> float:
    return _rms(_float32(norm["scale"]) + gain_offset(arch)) if "scale" in norm else 1.0


def _rms(values: Any) -> float:
    return float(np.sqrt(np.square(_float32(values)).mean()))


def _float32(leaf: Any) -> np.ndarray:
    return np.asarray(to_host(leaf), np.float32)
