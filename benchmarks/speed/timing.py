"""Seconds of several steps side by side, and the floating-point operations of each step, from the shapes.

Two operations are counted for each weight that a token is multiplied with. Norms, rotary embeddings, softmax and the
interpolation itself are left out, as is usual; of a mixture of experts only the experts that process a token count.
Letters: T positions per block.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tracing_jax.arch import Arch


def best_seconds(functions: Sequence[Callable[[], Any]], rounds: int = 3) -> list[float]:
    """Returns the shortest time of each function; their first calls, which may compile, do not count.

    They take turns, so that load from other programs affects all of them, and the shortest time of each counts,
    because whatever else the machine does only ever adds.
    """
    for function in functions:
        jax.block_until_ready(function())
    return [min(found) for found in zip(*([seconds(function) for function in functions] for _ in range(rounds)))]


def seconds(function: Callable[[], Any]) -> float:
    """Returns the time of one call, until what it gives has been computed."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def matmul(size: int, dtype: DTypeLike) -> Callable[[], jax.Array]:
    """Returns a jitted product of two square matrices, of `matmul_flops` operations, ready to be timed."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.float32).astype(dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, b)


def matmul_flops(size: int) -> float:
    """Returns the floating-point operations of the product of two square matrices."""
    return 2.0 * size**3


def block_flops_per_token(arch: Arch, block_size: int) -> float:
    """Returns the operations of one layer for one token in a block of this length, attention to all T positions."""
    heads = arch.num_kv_heads * arch.q_group
    projections = 2 * arch.embed_dim * arch.head_dim * (heads + arch.num_kv_heads)
    matrices = 3 if arch.gated else 2
    mlp = matrices * arch.embed_dim * arch.mlp_dim * (arch.experts_per_token or 1)
    scores = 2 * block_size * heads * arch.head_dim
    return 2.0 * (projections + mlp + scores)


def head_flops_per_token(arch: Arch) -> float:
    """Returns the operations of the logits of one token."""
    return 2.0 * arch.embed_dim * arch.vocab_size


def gram_flops_per_token(arch: Arch, taps: int) -> float:
    """Returns what one token adds to the cross-Grams of the MLP units of one layer, for so many taps."""
    return 2.0 * taps * arch.mlp_dim**2


def match_flops_per_token(arch: Arch, taps: int) -> float:
    """Returns what one shared token adds to `match` on the weights of a layer: responses of both models, and Grams."""
    return 2 * taps * 2.0 * arch.embed_dim * arch.mlp_dim + gram_flops_per_token(arch, taps)


def row_gram_flops(arch: Arch) -> float:
    """Returns the operations of all inner products between the rows of an MLP matrix of base and of ft."""
    return 2.0 * arch.embed_dim * arch.mlp_dim**2
