"""How far the predictions of two models are apart."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tracing_jax.arch import Arch
from tracing_jax.data import PairedBlocks
from tracing_jax.forward.walk import Walk, check_tokens, head_logits, slice_length
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource
from tracing_jax.tree import Tree


def divergences(
    base: ParamSource,
    ft: ParamSource,
    blocks: PairedBlocks,
    shared: tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]],
    compute: Compute,
    description: str = "divergences",
    run_cache: RunCache | None = None,
) -> Float[np.ndarray, " M"]:
    """Returns the Jensen-Shannon divergence of the two predictions at every paired position, in nats.

    Both are cut to the tokens in `shared` (ids in base, ids in ft, paired) and normalised again. Each model makes one
    pass, and logits exist for a slice of a batch at a time.

    Raises:
      ValueError: no tokens, or ids outside a vocabulary.
    """
    check_tokens(blocks.base, base.arch)
    check_tokens(blocks.ft, ft.arch)
    walks = [Walk(source, None, frozenset(), jnp.zeros(1), compute.dtype) for source in (base, ft)]
    batched = [compute.batches(rows) for rows in (blocks.base, blocks.ft, blocks.at_base, blocks.at_ft)]
    size = min(len(walk.chunks(batches)[0]) for walk, batches in zip(walks, batched))
    run_cache = run_cache or RunCache()

    def of_chunk(start: int, scopes: Sequence[RunCache]) -> dict[str, np.ndarray]:
        rows = [[compute.put(batch) for batch in batches[start : start + size]] for batches in batched]
        hidden = [walk.hidden(ids, scope) for walk, ids, scope in zip(walks, rows[:2], scopes)]
        heads = [walk.head().base for walk in walks]
        steps = [
            _divergence_step((base.arch, ft.arch), heads, (x_base[0], x_ft[0]), tuple(at), shared)
            for x_base, x_ft, *at in zip(*hidden, *rows[2:], strict=True)
        ]
        return {"divergences": np.concatenate(compute.get(steps))}

    found = []
    for start in tqdm(range(0, len(batched[0]), size), desc=description, unit="chunk", disable=None):
        chunk = run_cache.scope(f"chunk {start}")
        scopes = (chunk.scope("base"), chunk.scope("ft"))
        done = chunk.cached_arrays(("divergences",), functools.partial(of_chunk, start, scopes))
        for scope in scopes:
            scope.delete("hidden")
        found.append(done["divergences"])
    return np.concatenate(found)[: len(blocks.valid)][blocks.valid]


@functools.partial(jax.jit, static_argnames="archs")
def _divergence_step(
    archs: tuple[Arch, Arch],
    heads: Sequence[Tree],
    hidden: Sequence[Float[Array, "B _ _"]],
    at: tuple[Int[Array, "B P"], Int[Array, "B P"]],
    shared: tuple[Int[Array, " S"], Int[Array, " S"]],
) -> Float[Array, "B P"]:
    """Returns the divergences of a batch; logits exist for a slice of the positions at a time."""
    B, P = at[0].shape
    step = slice_length(P, B * (archs[0].vocab_size + archs[1].vocab_size) * 4)
    slices = [
        jnp.take_along_axis(x, place[:, :, None], axis=1).reshape(B, P // step, step, -1).swapaxes(0, 1)
        for x, place in zip(hidden, at)
    ]

    def positions(xs: list[jax.Array]) -> jax.Array:
        one, other = (
            jax.nn.log_softmax(head_logits(arch, head, x)[..., ids], axis=-1)
            for arch, head, x, ids in zip(archs, heads, xs, shared)
        )
        middle = jnp.logaddexp(one, other) - math.log(2)
        return 0.5 * ((jnp.exp(one) * (one - middle)).sum(-1) + (jnp.exp(other) * (other - middle)).sum(-1))

    return jax.lax.map(positions, slices).swapaxes(0, 1).reshape(B, P)
