"""What the query heads of a layer read and write on the residual stream, whatever the form of its attention."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tracing_jax.arch import Arch
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.distinct_units import NEGLIGIBLE, has_stream, inactive_below, stream_size
from tracing_jax.statistics.kept_facts import kept_of
from tracing_jax.statistics.mlp_rows import gain_of, without_mean
from tracing_jax.tree import Tree, to_host

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
    """Returns the query heads of a layer that write next to nothing beside the others; they may be another model's."""
    written = np.sqrt(_head_energies(model, layer))
    return written <= inactive_below(written.ravel())


def _head_energies(model: ParamSource, layer: int, params: Tree | None = None) -> Float[np.ndarray, "K G"]:
    """Returns the squared size of what each head of a layer writes of normalised inputs, summed over the features."""
    known = kept_of(model)
    if ("head energies", layer) not in known:
        params = model.layer(layer, HEAD_LEAVES) if params is None else params
        kernels, gain = head_kernels(params, model.arch), jnp.asarray(gain_of(params, "attn_norm", model.arch))
        known["head energies", layer] = to_host(_energy(kernels["v"] * gain.reshape(-1, 1, 1), kernels["o"]))
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
def _energy(values: Float[Array, "D K U"], outputs: Float[Array, "K G U D2"]) -> Float[Array, "K G"]:
    """Returns for each head the sum of the squared entries of the product of what it reads and writes."""
    read = jnp.einsum("dku,dkw->kuw", values, values, precision="highest")
    written = jnp.einsum("kgud,kgwd->kguw", outputs, outputs, precision="highest")
    return jnp.maximum((read[:, None] * written).sum((-2, -1)), 0)
