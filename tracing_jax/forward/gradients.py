"""What the logits of a model depend on: gradients at its residual stream, by one pass forward and one back.

Letters: N blocks, T position, D embed, V vocab, S selected positions, L layers, K kv heads, G queries of each, Q = KG.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.forward.forward_pass import carried_before, embed_step, forward, head_logits, head_of
from tracing_jax.models import Carried, LayerInputs, apply_block, layer_inputs
from tracing_jax.progress import tqdm
from tracing_jax.sharding import Compute, put_like
from tracing_jax.sources import ParamSource
from tracing_jax.tree import Tree, to_host


class StreamPass(NamedTuple):
    """What a model makes of a text at S positions, float32.

    Attributes:
      mlp_inputs: for each of L layers what its MLP reads.
      gradients: for each of L layers the gradient at the stream before it, and last the one behind all of them.
      head_effects: for each of L layers what each query head of its attention adds times the gradient along it: by how
        much the logits would change without the head, to first order (Michel et al. 2019, arXiv 1905.10650). None for
        layers without the mixer `attn`.
    """

    mlp_inputs: list[Float[np.ndarray, "S D"]]
    gradients: list[Float[np.ndarray, "S D"]]
    head_effects: list[Float[np.ndarray, "S Q"] | None]


def stream_pass(
    source: ParamSource,
    tokens: Int[np.ndarray, "N T"],
    valid: Bool[np.ndarray, "N T"],
    compute: Compute,
    description: str = "gradients",
) -> StreamPass:
    """Returns what MLPs read of a few blocks, on which directions of the stream the logits depend, and on which heads.

    The gradients are of log-probabilities times random numbers that have the covariance of a token's indicators: their
    second moment is the Fisher information of the stream, to which what moves all logits alike adds nothing. All blocks
    pass together. Each layer is read twice, and one is held at a time; held are the hidden states of all layers, and
    for a while some logits of all tokens.

    Args:
      source: a model, resident or streamed, that has a forward pass.
      tokens: the blocks.
      valid: the positions at which inputs and gradients are returned.
      compute: devices and dtype.
      description: of the progress bar.
    """
    arch = source.arch
    (blocks,) = replace(compute, batch_size=len(tokens)).batches(tokens)
    batch = compute.put(blocks)
    x = embed_step(arch, compute.dtype, source.embed(), batch)
    (carried,) = carried_before(source, [batch], [x])
    before, inputs = [(to_host(x), carried)], []
    with tqdm(total=2 * arch.num_layers, desc=description, unit="layer", disable=None) as bar:
        for output in forward(source, [batch], compute.dtype, taps=("mlp_input",)):
            before.append((to_host(output.hidden), output.carried))
            inputs.append(to_host(output.taps["mlp_input"])[: len(tokens)][valid])
            bar.update()
        x, carried = before.pop()
        noise = np.random.default_rng(0).standard_normal((*blocks.shape, arch.vocab_size), np.float32)
        gradient = _head_gradient(arch, head_of(source), put_like(x, batch), noise)
        del noise
        unread = jax.tree.map(jnp.zeros_like, carried)
        found, of_heads = [to_host(gradient)[: len(tokens)][valid]], list[Float[np.ndarray, "S Q"] | None]()
        for i in reversed(range(arch.num_layers)):
            x, carried = before.pop()
            layer = source.layer(i)
            gradient, unread, effects = _pull_back(
                arch, layer, layer_inputs(arch, i), put_like(x, batch), carried, gradient, unread
            )
            found.append(to_host(gradient)[: len(tokens)][valid])
            of_heads.append(None if effects is None else to_host(effects)[: len(tokens)][valid])
            del layer
            bar.update()
    return StreamPass(inputs, found[::-1], of_heads[::-1])


@functools.partial(jax.jit, static_argnames=("arch",))
def _head_gradient(
    arch: Arch, head: Tree, x: Float[Array, "N T D"], noise: Float[np.ndarray | Array, "N T V"]
) -> Float[Array, "N T D"]:
    """Returns the gradient at the stream behind all layers."""

    def log_probabilities(x: Float[Array, "N T D"]) -> Float[Array, "N T V"]:
        return jax.nn.log_softmax(head_logits(arch, head, x).astype(jnp.float32))

    found, pull = jax.vjp(log_probabilities, x)
    (gradient,) = pull(jnp.exp(found / 2) * noise)
    return gradient


@functools.partial(jax.jit, static_argnames=("arch",))
def _pull_back(
    arch: Arch,
    layer: Tree,
    inputs: LayerInputs,
    x: Float[Array, "N T D"],
    carried: Carried,
    gradient: Float[Array, "N T D"],
    of_carried: Carried,
) -> tuple[Float[Array, "N T D"], Carried, Float[Array, "N T Q"] | None]:
    """Returns the gradients at what a layer receives from those at what it gives, and at weights of its heads."""

    def block(
        x: Float[Array, "N T D"], carried: Carried, weights: Float[Array, "N T K G"] | None
    ) -> tuple[Float[Array, "N T D"], Carried]:
        output = apply_block(arch, layer, x, inputs, carried=carried, head_weights=weights)
        return output.hidden, output.carried

    shape = (*x.shape[:2], arch.num_kv_heads, arch.q_group)
    weights = jnp.ones(shape, x.dtype) if "attn" in inputs.mixers else None
    _, pull = jax.vjp(block, x, carried, weights)
    at_x, at_carried, effects = pull((gradient, of_carried))
    return at_x, at_carried, None if effects is None else effects.reshape(*shape[:2], -1)
