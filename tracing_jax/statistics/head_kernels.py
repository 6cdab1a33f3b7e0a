"""What the query heads of a layer read and write on the residual stream, whatever the form of its attention."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tracing_jax.arch import Arch
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.distinct_units import NEGLIGIBLE, NO_EFFECT, has_stream, inactive_below, stream_size
from tracing_jax.statistics.kept_facts import kept_of
from tracing_jax.statistics.mlp_rows import gain_of, without_mean
from tracing_jax.statistics.token_directions import head_effects
from tracing_jax.tree import Tree, to_host

_CANCELLED = 0.98
"""Share of a head's effects that multiples of the others' make up, from which on they can cancel one another."""

_RIDGE = 1e-9

HEAD_LEAVES = ("attn", "attn_norm", "attn_post_norm")
"""The leaves of a layer that are needed, with the norms around them."""


def gates_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns why heads cannot be compared whose gates may be closed; empty if none may.

    A gate with a bias can be closed for every token, so that the head could be another model's, planted.
    """
    sides = {"base": base, "ft": ft}
    return [
        f"{side}: the gates of its heads have biases, which can close a head"
        for side, arch in sides.items()
        if arch.head_gate and arch.qkv_bias
    ]


def head_kernels(layer: Tree, arch: Arch) -> dict[str, Float[Array, "..."]]:
    """Returns `q` `[D, K, G, H]`, `k` `[D, K, H]`, `v` `[D, K, U]` and `o` `[K, G, U, D]`, float32.

    In attention by latents the two projections on either side of a latent are multiplied, with the gain of its norm
    between them; its norm itself, a positive number for each token, is left out. The dims of keys that its heads share
    are repeated for each. What is written to all features alike is taken out where norms subtract it.
    """
    attn = layer["attn"]
    if arch.latent is None:
        found = {name: jnp.asarray(attn[f"{name}_proj"]["kernel"], jnp.float32) for name in "qkvo"}
    else:
        found = _through_latents({name: leaves for name, leaves in attn.items() if name != "sinks"}, arch.num_kv_heads)
    return found | {"o": without_mean(found["o"], arch)}


def _through_latents(attn: Tree, heads: int) -> dict[str, Float[Array, "..."]]:
    def kernel(name: str) -> Float[Array, "..."]:
        return jnp.asarray(attn[name]["kernel"], jnp.float32)

    def through(latent: str, name: str) -> Float[Array, "..."]:
        if f"{latent}_proj" not in attn:
            return kernel(name)
        gain = jnp.asarray(attn[f"{latent}_norm"]["scale"], jnp.float32)
        return _product(kernel(f"{latent}_proj") * gain, kernel(name))

    k, rope = through("kv_a", "k_proj"), kernel("k_rope_proj")
    rope = jnp.broadcast_to(rope[:, None], (rope.shape[0], heads, rope.shape[1]))
    return {
        "q": jnp.concatenate([through("q_a", "q_proj"), through("q_a", "q_rope_proj")], axis=-1),
        "k": jnp.concatenate([k, rope], axis=-1),
        "v": through("kv_a", "v_proj"),
        "o": kernel("o_proj"),
    }


@jax.jit
def _product(first: Float[Array, "D C"], second: Float[Array, "C K *G H"]) -> Float[Array, "D K *G H"]:
    return jnp.tensordot(first, second, 1, precision="highest")


def inactive_attention(model: ParamSource) -> list[int]:
    """Returns the layers whose attention adds next to nothing to the residual stream; none where that cannot be known.

    An adversary can put another model's heads there, and the function stays as it is.
    """
    known = kept_of(model)
    if "inactive attention" not in known:
        layers = filter(model.arch.has_attention, range(model.arch.num_layers))
        known["inactive attention"] = [i for i in layers if adds_next_to_nothing(model, i)]
    found: list[int] = known["inactive attention"]
    return found


def is_activity_known(model: ParamSource) -> bool:
    """Returns whether it can be known what the attention of a layer adds to the residual stream, beside its size."""
    return model.arch.reading is None and has_stream(model)


def adds_next_to_nothing(model: ParamSource, layer: int, params: Tree | None = None) -> bool:
    """Returns whether the attention of a layer is one of `inactive_attention`; of a part of a model some of these.

    Args:
      model: whose size of the stream is a lower bound if layers are left out.
      layer: with attention.
      params: its `HEAD_LEAVES`, if they were read before.
    """
    return is_activity_known(model) and _added(model, layer, params) < NEGLIGIBLE * stream_size(model, layer)


def inactive_heads(model: ParamSource, layer: int) -> Bool[np.ndarray, "K G"]:
    """Returns the query heads of a layer that may be another model's.

    Those write next to nothing beside the others, or are `without_effect` on a text.
    """
    written = np.sqrt(_head_energies(model, layer))
    return (written <= inactive_below(written.ravel())) | without_effect(model, layer).reshape(written.shape)


def without_effect(model: ParamSource, layer: int) -> Bool[np.ndarray, " H"]:
    """Returns the query heads of a layer with attention that do nothing on a text, or whose effects others can cancel.

    A head may read features that an earlier layer removes, or write to some that nothing reads. So what it adds at each
    token is multiplied by the gradient of the logits there. A head counts if this is not negligible beside the other
    heads', nor its layer's beside all layers', and is no sum of multiples of the others', as where heads cancel one
    another. None is returned where there is no text.
    """
    known = kept_of(model)
    if "heads without effect" not in known:
        known["heads without effect"] = _without_effect(head_effects(model))
    found: dict[int, np.ndarray] = known["heads without effect"]
    return found[layer] if layer in found else np.zeros(model.arch.num_kv_heads * model.arch.q_group, bool)


def _without_effect(effects: Sequence[Float[np.ndarray, "T H"] | None]) -> dict[int, Bool[np.ndarray, " H"]]:
    """Returns for each layer that has effects of its heads which of them are no evidence."""
    layers = {i: found.astype(np.float64) for i, found in enumerate(effects) if found is not None}
    if not layers:
        return {}
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sqrt(sum(np.square(found).sum(axis=1) for found in layers.values()))
        scaled = {i: found / np.where(total > 0, total, 1.0)[:, None] for i, found in layers.items()}
    shares = {i: np.sqrt(np.square(found).mean(axis=0)) for i, found in scaled.items()}
    return {
        i: ~(own > inactive_below(own, NO_EFFECT))
        | (np.linalg.norm(own) < NEGLIGIBLE)
        | (explained_by_others(scaled[i]) > _CANCELLED)
        if np.isfinite(own).all()
        else np.ones(len(own), bool)
        for i, own in shares.items()
    }


def explained_by_others(columns: Float[np.ndarray, "T H"]) -> Float[np.ndarray, " H"]:
    """Returns the share of each column that multiples of the others make up, corrected for their number.

    Of more columns than half the rows each is compared with single others.
    """
    T, H = columns.shape
    lengths = np.linalg.norm(columns, axis=0)
    unit = np.divide(columns, lengths, out=np.zeros_like(columns), where=lengths > 0)
    cosines = unit.T @ unit
    if H < 2:
        return np.zeros(H)
    if 2 * H > T:
        np.fill_diagonal(cosines, 0.0)
        return np.square(cosines).max(axis=0)
    precision = np.diag(np.linalg.inv(cosines + _RIDGE * np.eye(H)))
    return np.asarray(1 - (1 / precision) * T / (T - H + 1))


def _head_energies(model: ParamSource, layer: int, params: Tree | None = None) -> Float[np.ndarray, "K G"]:
    """Returns the squared size of what each head of a layer writes of normalised inputs, summed over the features."""
    known = kept_of(model)
    if ("head energies", layer) not in known:
        params = model.layer(layer, HEAD_LEAVES) if params is None else params
        kernels, gain = head_kernels(params, model.arch), jnp.asarray(gain_of(params, "attn_norm", model.arch))
        known["head energies", layer] = to_host(_energy(kernels["v"], gain, kernels["o"]))
    found: np.ndarray = known["head energies", layer]
    return found


def _added(model: ParamSource, layer: int, params: Tree | None = None) -> float:
    """Returns what all heads add per feature where each attends to one input in a random direction."""
    arch = model.arch
    if arch.post_norms:
        params = model.layer(layer, ("attn_post_norm",)) if params is None else params
        return math.sqrt(float(jnp.square(jnp.asarray(gain_of(params, "attn_post_norm", arch))).mean()))
    return math.sqrt(float(_head_energies(model, layer, params).sum()) / arch.embed_dim)


@jax.jit
def _energy(
    values: Float[Array, "D K U"], gain: Float[Array, "..."], outputs: Float[Array, "K G U D2"]
) -> Float[Array, "K G"]:
    """Returns for each head the sum of the squared entries of the product of what it reads and writes."""
    values = values * gain.reshape(-1, 1, 1)
    read = jnp.einsum("dku,dkw->kuw", values, values, precision="highest")
    written = jnp.einsum("kgud,kgwd->kguw", outputs, outputs, precision="highest")
    return jnp.maximum((read[:, None] * written).sum((-2, -1)), 0)
