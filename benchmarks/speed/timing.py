"""Seconds of several steps side by side, and the one thing that all steps are made of: products of matrices."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def best_seconds(functions: Sequence[Callable[[], Any]], rounds: int = 3) -> list[float]:
    """Returns the shortest time of each function; their first calls, which may compile, do not count.

    They take turns, so that a busy spell of the machine meets all of them, and the shortest time of each counts,
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
