"""Embed, Block and Head of every supported family: they are decoders of one build, and differ by flags of `Arch`."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tracing_jax.arch import Arch, length_problem
from tracing_jax.models.experts import ExpertMlp
from tracing_jax.models.layers import Attention, Kernel, Mlp, Norm, scaled
from tracing_jax.models.taps import taps_problem
from tracing_jax.tree import Tree, name_of

_NO_WINDOW = jnp.iinfo(jnp.int32).max


class Embed(nn.Module):
    """Token ids to embedding features, scaled as the family asks, in the computing dtype; learned positions added."""

    arch: Arch
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], at: Int[Array, "#B T"] | None = None) -> Float[Array, "B T D"]:
        shape = (self.arch.vocab_size, self.arch.embed_dim)
        table = self.param("embedding", nn.initializers.normal(0.02), shape)
        # Gemma rounds its scale to the computing dtype; Granite's is a small integer.
        scale = float(np.asarray(self.arch.embed_scale, jnp.dtype(self.dtype)))
        x = scaled(table[tokens].astype(self.dtype), scale)
        if self.arch.num_positions is None:
            return x
        if at is None and (problem := length_problem(self.arch, tokens.shape[1])):
            raise ValueError(problem)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.arch.num_positions, shape[1]))
        return x + (positions[: tokens.shape[1]] if at is None else positions[at]).astype(self.dtype)


class Block(nn.Module):
    """One layer. Rope, window and scale come in as data, so that all layers of a model share one compiled program."""

    arch: Arch

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        frequencies: Float[Array, " H2"],
        window: Int[Array, ""],
        attention_scale: Float[Array, ""],
        positions: Int[Array, "#B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        self.sow("taps", "residual", x)
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        y = self._norm("attn_norm", self.arch.pre_norms, x)
        y = Attention(self.arch, name="attn")(y, frequencies, window, attention_scale, positions)
        x = x + scaled(self._norm("attn_post_norm", self.arch.post_norms, y), self.arch.residual_scale)
        y = self._norm("mlp_norm", self.arch.pre_norms, x)
        self.sow("taps", "mlp_input", y)
        y = (Mlp if self.arch.num_experts is None else ExpertMlp)(self.arch, name="mlp")(y)
        self.sow("taps", "mlp_output", y)
        return x + scaled(self._norm("mlp_post_norm", self.arch.post_norms, y), self.arch.residual_scale)

    def _norm(self, name: str, present: bool, x: jax.Array) -> jax.Array:
        return Norm(self.arch, (self.arch.embed_dim,), name=name)(x) if present else x


class Head(nn.Module):
    """Final norm and logits in float32; a tied model is handed its embedding table."""

    arch: Arch

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], embedding: Float[Array, "V D"] | None = None) -> Float[Array, "B T V"]:
        D, V = self.arch.embed_dim, self.arch.vocab_size
        x = Norm(self.arch, (D,), name="norm")(x)
        if self.arch.tied:
            assert embedding is not None, "a tied head needs the embedding table"
            logits = jnp.einsum("btd,vd->btv", x, embedding.astype(x.dtype), precision="highest")
        else:
            logits = Kernel((D, V), "btd,dv->btv", name="lm_head")(x)
        logits = scaled(logits.astype(jnp.float32), self.arch.logit_scale)
        cap = self.arch.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class LayerInputs(NamedTuple):
    """What a block takes beside the hidden state, and in which the layers of a model may differ."""

    frequencies: Float[Array, " H2"]  # of the rope; none without one
    window: Int[Array, ""]
    attention_scale: Float[Array, ""]


def layer_inputs(arch: Arch, layer: int) -> LayerInputs:
    """Returns what a block takes beside the hidden state."""
    window = arch.layer_windows[layer]
    rope = arch.rope_frequencies[arch.layer_ropes[layer]] if arch.rope_frequencies else ()
    return LayerInputs(
        jnp.asarray(rope, jnp.float32),
        jnp.asarray(_NO_WINDOW if window is None else window, jnp.int32),
        jnp.asarray(arch.attention_scale / (layer + 1 if arch.inverse_layer_scale else 1), jnp.float32),
    )


def init_params(arch: Arch, key: PRNGKeyArray) -> Tree:
    """Returns freshly initialised float32 params `{embed, layers: {"0": ...}, head}`: normal(0.02), unit gains."""
    embed_key, head_key, *layer_keys = jax.random.split(key, arch.num_layers + 2)
    tokens, x = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1, arch.embed_dim))
    embed = Embed(arch).init(embed_key, tokens)["params"]
    layers = {}
    for i, layer_key in enumerate(layer_keys):
        layers[str(i)] = Block(arch).init(layer_key, x, *layer_inputs(arch, i))["params"]
    head = Head(arch).init(head_key, x, embed["embedding"] if arch.tied else None).get("params", {})
    return {"embed": embed, "layers": layers, "head": head}


def apply_embed(
    arch: Arch, params: Tree, tokens: Int[Array, "B T"], dtype: DTypeLike, positions: Int[Array, "#B T"] | None = None
) -> Float[Array, "B T D"]:
    """Returns the first hidden state from the subtree `embed`, in the computing dtype; positions count from 0."""
    return _only_output(Embed(arch, dtype).apply({"params": params}, tokens, positions))


def apply_block(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    frequencies: Float[Array, " H2"],
    window: Int[Array, ""],
    attention_scale: Float[Array, ""],
) -> Float[Array, "B T D"]:
    """Returns the hidden state after the layer with the subtree `params`."""
    return _only_output(Block(arch).apply({"params": params}, x, frequencies, window, attention_scale))


def empty_cache(arch: Arch, batch: int, length: int, dtype: DTypeLike) -> Tree:
    """Returns what a layer remembers of texts of up to so many tokens, before it has read any: zeros `[B S K H]`."""
    zeros = jnp.zeros((batch, length, arch.num_kv_heads, arch.head_dim), dtype)
    return {"attn": {"keys": zeros, "values": zeros}}


def apply_block_with_cache(
    arch: Arch, params: Tree, cache: Tree, x: Float[Array, "B T D"], inputs: LayerInputs, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Tree]:
    """Returns the hidden state after a layer that remembers earlier tokens, and its cache with these tokens in it."""
    x, state = Block(arch).apply({"params": params, "cache": cache}, x, *inputs, positions, mutable=["cache"])
    return x, dict(state["cache"])


def apply_block_with_taps(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    frequencies: Float[Array, " H2"],
    window: Int[Array, ""],
    attention_scale: Float[Array, ""],
    taps: tuple[str, ...],
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T *units"]]]:
    """Returns the hidden state after a layer and the inner activations asked for, by tap name (see `taps_of`).

    Raises:
      ValueError: taps that this model does not have.
    """
    if problem := taps_problem(arch, taps):
        raise ValueError(problem)
    inputs = LayerInputs(frequencies, window, attention_scale)
    x, state = Block(arch).apply({"params": params}, x, *inputs, mutable=["taps"])
    found = {name_of(path).split("/")[-2]: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state["taps"])}
    return x, {tap: found[tap] for tap in taps}


def apply_mlp_with_taps(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], taps: tuple[str, ...]
) -> dict[str, Float[Array, "B T *units"]]:
    """Returns the inner activations of a layer's MLP that is handed a hidden state past the attention before it.

    Of the layer's params only those under `taps.mlp_leaves` need be there.
    """
    norm = Norm(arch, (arch.embed_dim,))
    y = _only_output(norm.apply({"params": params.get("mlp_norm", {})}, x)) if arch.pre_norms else x
    mlp = (Mlp if arch.num_experts is None else ExpertMlp)(arch)
    # linen asks for all of them, though of what follows from the others nothing is returned, or computed
    shapes = jax.eval_shape(mlp.init, jax.random.key(0), y)["params"]
    own = {name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, y.dtype), leaves) for name, leaves in shapes.items()}
    own |= params["mlp"]
    _, state = mlp.apply({"params": own}, y, mutable=["taps"])
    return {tap: state["taps"][tap][0] for tap in taps}


def apply_head(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], embedding: Float[Array, "V D"] | None
) -> Float[Array, "B T V"]:
    """Returns the logits from the subtree `head`, with the embedding table if the model is tied."""
    return _only_output(Head(arch).apply({"params": params}, x, embedding))


def _only_output(output: Any) -> jax.Array:
    # Linen types its result as (output, state) too; without mutable collections it is the output alone.
    return output
