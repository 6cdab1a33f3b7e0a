"""The steps that forward passes are made of: one layer at every alpha, one of both models with Grams, and experts."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from benchmarks.results import Row
from benchmarks.speed.sizes import Size, random_pair, with_depth
from benchmarks.speed.timing import best_seconds, block_flops_per_token, gram_flops_per_token, matmul, matmul_flops
from tracing_jax.arch import Router
from tracing_jax.axes import axis_table
from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import InterpolatedModel, correlations, final_hidden
from tracing_jax.interpolation import interpolated_leaves, on_line, path_groups
from tracing_jax.models.mlp import mlp
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory

DTYPES: Mapping[str, DTypeLike] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
TAPS = ("gate", "up")
EXPERTS, SELECTED = 32, 4


def steps(size: Size) -> Iterator[Row]:
    """Yields tokens per second and the share of the matmul peak of the block step and of the cross-Gram step."""
    arch = size.arch
    base, ft = random_pair(arch, size.layers)
    tokens = size.tokens[0] * size.tokens[1]
    per_token = block_flops_per_token(arch, size.tokens[1])
    for name, dtype in DTYPES.items():
        timed = best_seconds([block_steps(base, ft, size, dtype), matmul(size.matmul, dtype)], size.rounds)
        passes, note = len(size.alphas) * tokens * size.layers, "through one layer of one model"
        yield _against_peak("block step", f"{len(size.alphas)} alphas, {name}", passes, per_token, timed, size, note)
    deeper = with_depth(base, size.rounds + 1), with_depth(ft, size.rounds + 1)
    timed = best_seconds([gram_step(*deeper, size), matmul(size.matmul, jnp.float32)], size.rounds)
    per_token = 2 * per_token + gram_flops_per_token(arch, len(TAPS))
    what, note = "gate and up, both models, float32", "through one layer of both models"
    yield _against_peak("cross-Gram step", what, tokens, per_token, timed, size, note)
    own, every = best_seconds([experts_step(size, grouped) for grouped in (True, False)], size.rounds)
    note = f"{SELECTED} of {EXPERTS} are selected: {SELECTED / EXPERTS:g} of the operations"
    yield Row("experts", "own tokens alone, float32", own, every, "s", "every expert for every token", note)


def block_steps(base: InMemory, ft: InMemory, size: Size, dtype: DTypeLike) -> Callable[[], object]:
    """Returns what takes all tokens through all layers, at every alpha, embedding included."""
    compute = Compute(make_mesh(), size.batch_size, dtype)
    interpolated = interpolated_leaves(axis_table(base.arch), path_groups(attn=True, emb=True))
    model = InterpolatedModel(base, [ft], interpolated, on_line(np.asarray(size.alphas)))
    batches = [compute.put(batch) for batch in compute.batches(size.random_tokens())]
    # Batch after batch, as in a run of models in memory: their hidden states need not all be in memory at once.
    return lambda: [jax.block_until_ready(final_hidden(model, [batch], dtype)) for batch in batches][-1]


def gram_step(base: InMemory, ft: InMemory, size: Size) -> Callable[[], object]:
    """Returns what takes all tokens through one layer, from hidden states to the correlations on the host.

    Every call takes the next layer; the models must have one for each.
    """
    tokens, compute = size.random_tokens(), Compute(make_mesh(), size.batch_size, jnp.float32)
    layers = correlations(base, ft, paired_one_to_one(tokens, tokens), TAPS, compute)
    return lambda: next(layers).by_tap


def experts_step(size: Size, grouped: bool) -> Callable[[], object]:
    """Returns what takes all tokens through a mixture of experts, which have as many units together as the MLP."""
    arch, rng = size.arch, np.random.default_rng(0)
    D, F = arch.embed_dim, max(1, arch.mlp_dim // EXPERTS)
    router = Router()
    arch = dataclasses.replace(arch, num_experts=EXPERTS, experts_per_token=SELECTED, mlp_dim=F, router=router)
    shapes = {"gate_proj": (EXPERTS, D, F), "up_proj": (EXPERTS, D, F), "down_proj": (EXPERTS, F, D),
              "router": (D, EXPERTS)}  # fmt: skip
    params = {
        name: {"kernel": jnp.asarray(0.02 * rng.normal(size=shape), jnp.float32)} for name, shape in shapes.items()
    }
    x = jnp.asarray(rng.normal(size=(*size.tokens, D)), jnp.float32)
    step = jax.jit(lambda params, x: mlp(arch, params, x, grouped=grouped)[0])
    return lambda: step(params, x).block_until_ready()


def _against_peak(
    part: str, what: str, passes: int, per_token: float, timed: list[float], size: Size, note: str
) -> Row:
    """Returns the line of a step that took `timed[0]` seconds for so many tokens; the peak's took `timed[1]`."""
    rate, peak = passes * per_token / timed[0], matmul_flops(size.matmul) / timed[1]
    note = f"{passes / timed[0]:,.0f} tokens/s, each {note}"
    return Row(part, what, rate / 1e9, peak / 1e9, "GFLOP/s", "the matmul peak", note)
