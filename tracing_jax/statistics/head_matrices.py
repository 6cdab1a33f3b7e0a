"""The two matrices of a query head over pairs of tokens: how each token attends to each other, and what it writes."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax.arch import Arch
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.distinct_units import inactive_below
from tracing_jax.statistics.head_kernels import HEAD_LEAVES, head_kernels, inactive_attention, without_effect
from tracing_jax.statistics.mlp_rows import gain_of, unit_length
from tracing_jax.statistics.shared_tokens import TokenRows
from tracing_jax.tree import Tree, to_host

HeadMatrices = Mapping[str, Float[np.ndarray, "_ S2"]]
"""`attention`, `output` -> the matrix of each query head over pairs of tokens, centred both ways, of length one."""

_DEVIATIONS = 8.0  # standard deviations that the score of a head may come to
_SAME_ATTENTION = 0.99  # correlation of what two heads of a layer attend to, which are then one
_REPEATED = 0.9  # correlation of both matrices of two heads of a model, above which they are one
_EVEN_ATTENTION = 0.01  # deviation of scores between tokens, below which a head attends to all alike
_LOG_POSITIONS = 16.0  # of nine million positions, whose scores are summed against a sink


def head_matrices(model: ParamSource, layer: int, tokens: TokenRows) -> HeadMatrices:
    """Returns the two matrices of every query head of a layer, heads in the order of kv heads and queries.

    A head that writes next to nothing could be another model's, planted: its output is zero, so that it takes no part.
    So is that of heads of a layer that attend alike, which could cancel one another, and of those without an effect on
    the logits of a text.
    """
    found = head_matrices_of(model.layer(layer, HEAD_LEAVES), model.arch, tokens)
    takes_part = ~without_effect(model, layer) if layer not in inactive_attention(model) else np.zeros(1, bool)
    return {**found, "output": found["output"] * takes_part[:, None]}


def head_matrices_of(params: Tree, arch: Arch, tokens: TokenRows) -> HeadMatrices:
    """Returns the two matrices of every query head, as `head_matrices`, by the weights of the layer alone."""
    before, after = gain_of(params, "attn_norm", arch), gain_of(params, "attn_post_norm", arch)
    kernels = head_kernels(params, arch)
    scales = {name: params["attn"][f"{name}_norm"]["scale"] for name in "qk" if arch.qk_norm is not None}
    found = to_host(_head_matrices(tokens, kernels, (before, after), scales, arch.qk_norm, gain_offset(arch)))
    attention, output, written = found["attention"], np.array(found["output"]), found["written"]
    if arch.sinks:  # a head whose sink is above its scores writes nothing either
        sinks = np.asarray(to_host(params["attn"]["sinks"]), np.float64)
        written = written * (sinks < _largest_scores(kernels, before, arch)).ravel()
    output[written <= inactive_below(written)] = 0.0
    # Heads that attend alike can cancel one another, so that nothing is written: they could be another model's.
    alike = attention @ attention.T > _SAME_ATTENTION
    even = arch.attention_scale * found["scores"] < _EVEN_ATTENTION
    output[(alike.sum(axis=1) > 1) | even] = 0.0
    return {"attention": attention, "output": output}


def _largest_scores(
    kernels: Mapping[str, Array], gain: Float[Array, " D"] | float, arch: Arch
) -> Float[np.ndarray, "K G"]:
    """Returns what a sink must exceed to take all attention of a head, for inputs in random directions."""
    scaled = {
        name: kernels[name] * jnp.reshape(jnp.asarray(gain), (-1,) + (1,) * (kernels[name].ndim - 1)) for name in "qk"
    }
    queries = jnp.einsum("dkgh,dkgi->kghi", scaled["q"], scaled["q"], precision="highest")
    keys = jnp.einsum("dkh,dki->khi", scaled["k"], scaled["k"], precision="highest")
    variance = np.maximum(to_host(jnp.einsum("kghi,khi->kg", queries, keys, precision="highest")), 0)
    return np.asarray(_DEVIATIONS * arch.attention_scale * np.sqrt(variance) + _LOG_POSITIONS, np.float64)


@functools.partial(jax.jit, static_argnames=("qk_norm", "offset"))
def _head_matrices(
    tokens: TokenRows,
    kernels: Mapping[str, Float[Array, "..."]],
    gains: tuple[Float[Array, "..."], Float[Array, "..."]],
    scales: Mapping[str, Float[Array, "..."]],
    qk_norm: str | None,
    offset: float,
) -> dict[str, Float[Array, "..."]]:
    """Returns both matrices of the heads, each of length one, as `written` the length that the output had.

    And as `scores` the root mean square of those of inputs behind a norm, before they are scaled.
    """
    read, effect = tokens.read * gains[0], tokens.effect * gains[1]
    queries, keys = (jnp.tensordot(read, kernels[name], 1, precision="highest") for name in "qk")
    if qk_norm is not None:
        queries, keys = (
            _normalised(side, scales[name], qk_norm, offset) for name, side in (("q", queries), ("k", keys))
        )
    values = jnp.tensordot(read, kernels["v"], 1, precision="highest")
    outputs = jnp.einsum("sd,kghd->skgh", effect, kernels["o"], precision="highest")
    attention, output = _centred_products(queries, keys), _centred_products(outputs, values)
    # Rows have length one, and those that a norm gives the root of the number of features; after norms of queries and
    # keys that does not matter.
    size = read.shape[1] if qk_norm is None else 1
    scores = size * jnp.sqrt(jnp.square(attention).mean(axis=1))
    written = jnp.linalg.norm(output, axis=1)
    return {
        "attention": unit_length(attention),
        "output": unit_length(output),
        "written": written,
        "scores": scores,
    }


def _normalised(heads: Array, scale: Array, qk_norm: str, offset: float) -> Array:
    """Returns queries `[S, K, G, H]` or keys `[S, K, H]` after their norm."""
    axes = tuple(range(1, heads.ndim)) if qk_norm == "all" else (-1,)
    length = jnp.sqrt(jnp.square(heads).mean(axes, keepdims=True))
    return jnp.where(length > 0, heads / jnp.where(length > 0, length, 1.0), 0.0) * (scale.astype(jnp.float32) + offset)


def _centred_products(ours: Float[Array, "S K G H"], theirs: Float[Array, "T K H"]) -> Float[Array, "K*G S*T"]:
    """Returns for each query head the products of two sides, each centred over the tokens."""
    ours, theirs = ours - ours.mean(axis=0), theirs - theirs.mean(axis=0)
    products = jnp.einsum("skgh,tkh->kgst", ours, theirs, precision="highest")
    return products.reshape(products.shape[0] * products.shape[1], -1)


def without_repeats(layers: Mapping[int, HeadMatrices]) -> dict[int, HeadMatrices]:
    """Returns the matrices of layers, of heads that repeat one of an earlier layer in both with an output of zero.

    Where both models repeat layers, each of their pairs would count more than once.
    """
    found: dict[int, HeadMatrices] = {}
    for layer, own in layers.items():
        repeats = np.zeros(len(own["output"]), bool)
        for earlier in found.values():
            alike = np.minimum(*(own[name] @ earlier[name].T for name in ("attention", "output")))
            repeats |= (alike > _REPEATED).any(axis=1)
        found[layer] = {**own, "output": own["output"] * ~repeats[:, None]}
    return found
