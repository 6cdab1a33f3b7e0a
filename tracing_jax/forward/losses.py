"""The loss of every token, at every point of the path between two models."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.forward.path import Path
from tracing_jax.forward.walk import Walk, check_tokens, head_logits, slice_length
from tracing_jax.interpolation import interpolated_leaves
from tracing_jax.rewrites import Permutations
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource
from tracing_jax.tree import Tree


def path_losses(
    base: ParamSource,
    ft: ParamSource | None,
    tokens: Int[np.ndarray, "N T"],
    alphas: Sequence[float] | np.ndarray,
    groups: Sequence[str],
    compute: Compute,
    description: str = "losses along the path",
    copies: Sequence[Permutations] = (),
    run_cache: RunCache | None = None,
) -> Float[np.ndarray, "A N T1"]:
    """Returns the loss of every predicted token, in nats, at every alpha of the path from base (0) to ft (1).

    The model at alpha has base's facts (rope, norms, scales); only leaves in `groups` move. With no groups `ft` is not
    read. T1 = T - 1: the first token of a block is never predicted. Weights stay on the mesh, and no logits of a whole
    batch are kept.

    Args:
      base: the end at 0.
      ft: the end at 1; None where nothing moves.
      tokens: the blocks that every model on the path reads.
      alphas: the points.
      groups: which leaves move.
      compute: where and how.
      description: what the progress bar says.
      copies: one for each alpha, permutations of the same axes: ft is permuted by them before it is met. No permuted
        model is made; the units are taken where the layer is interpolated.
      run_cache: where finished work is kept, for a second start: losses, and of streamed models the hidden states after
        the last finished layer.

    Raises:
      ValueError: no tokens, blocks longer than base can read, ids outside its vocabulary, or not as many copies as
        alphas.
    """
    check_tokens(tokens, base.arch)
    if copies and len(copies) != len(alphas):
        raise ValueError(f"{len(copies)} permuted copies at {len(alphas)} alphas; give one for each, or none")
    moving = interpolated_leaves(axis_table(base.arch), groups)
    walk = Walk(base, ft, moving, jnp.asarray(alphas, jnp.float32), compute.dtype, copies)
    chunks = walk.chunks(compute.batches(tokens))
    run_cache, found = run_cache or RunCache(), []
    with tqdm(total=len(chunks) * base.arch.num_layers, desc=description, unit="layer", disable=None) as bar:

        def of_chunk(chunk: list[np.ndarray], scope: RunCache) -> dict[str, np.ndarray]:
            batches = [compute.put(batch) for batch in chunk]
            hidden = walk.hidden(batches, scope, bar.update)
            head = walk.head()
            steps = [_loss_step(walk.arch, head, x, batch) for x, batch in zip(hidden, batches, strict=True)]
            return {"losses": np.concatenate(compute.get(steps), axis=1)}

        for c, chunk in enumerate(chunks):
            scope = run_cache.scope(f"chunk {c}")
            done = scope.cached_arrays(("losses",), functools.partial(of_chunk, chunk, scope))
            scope.delete("hidden")
            found.append(done["losses"])
    return np.concatenate(found, axis=1)[:, : len(tokens)]


def token_losses(
    source: ParamSource,
    tokens: Int[np.ndarray, "N T"],
    compute: Compute,
    description: str = "losses",
    run_cache: RunCache | None = None,
) -> Float[np.ndarray, "N T1"]:
    """Returns the loss of every predicted token of one model, in nats."""
    return path_losses(source, None, tokens, (0.0,), (), compute, description, run_cache=run_cache)[0]


@functools.partial(jax.jit, static_argnames="arch")
def _loss_step(arch: Arch, path: Path, x: jax.Array, tokens: jax.Array) -> Float[Array, "A B T1"]:
    """Returns the losses of a batch; logits exist for a slice of the positions and one alpha at a time."""
    B, T = tokens.shape
    step = slice_length(T, B * arch.vocab_size * 4)
    targets = jnp.roll(tokens, -1, axis=1).reshape(B, T // step, step)

    def one(params: Tree, x: jax.Array) -> jax.Array:
        def positions(x_and_targets: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, wanted = x_and_targets
            scores = head_logits(arch, params, x)
            picked = jnp.take_along_axis(scores, wanted[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(scores, axis=-1) - picked

        slices = (x.reshape(B, T // step, step, -1).swapaxes(0, 1), targets.swapaxes(0, 1))
        return jax.lax.map(positions, slices).swapaxes(0, 1).reshape(B, T)[:, :-1]

    return path.each(one, x)
