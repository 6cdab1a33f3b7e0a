"""Token batches on their way through the layers of all models along a path."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch, length_problem
from tracing_jax.forward.path import Path, path_of, stacked
from tracing_jax.models import apply_block, apply_embed, apply_head, layer_inputs
from tracing_jax.rewrites import Permutations
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import put_over
from tracing_jax.sources import ParamSource, is_resident
from tracing_jax.tree import Tree, to_host

_HIDDEN_BYTES = 2**30
"""The most that the hidden states of streamed models may take: what is more is computed in a second reading."""

LOGITS_BYTES = 256 * 2**20
"""The most that the logits of one head slice may take."""


class Walk:
    """The parts of a path in the order in which a batch passes them: kept if in memory, else read when needed."""

    def __init__(
        self,
        base: ParamSource,
        ft: ParamSource | None,
        moving: frozenset[str],
        alphas: jax.Array,
        dtype: DTypeLike,
        copies: Sequence[Permutations] = (),
    ) -> None:
        self.arch, self.dtype, self.num_points = base.arch, dtype, len(alphas)
        self.resident = is_resident(base) and (ft is None or not moving or is_resident(ft))
        self.part: Callable[[str], Path] = functools.partial(path_of, base, ft, moving, alphas, stacked(copies))
        if self.resident:
            self.part = functools.cache(self.part)

    def hidden(
        self,
        batches: Sequence[jax.Array],
        run_cache: RunCache | None = None,
        each_layer: Callable[[], object] = lambda: None,
    ) -> list[Float[Array, "A B T D"]]:
        """Returns what the last layer gives for each batch.

        With `run_cache` the hidden states after each layer are kept, and an interrupted walk goes on from there.
        """
        run_cache = run_cache or RunCache()
        first, x = _kept(run_cache, self.dtype, batches)
        x = x or [_embed_step(self.arch, self.dtype, self.part("embed/"), tokens) for tokens in batches]
        for i in range(self.arch.num_layers):
            if i >= first:
                layer = self.part(f"layers/{i}/")
                x = [_block_step(self.arch, layer, y, *layer_inputs(self.arch, i)) for y in x]
                if not self.resident:
                    jax.block_until_ready(x)  # or the host runs ahead, and layers pile up
                    _keep(run_cache, i + 1, x)
                del layer  # before the next one is asked for
            each_layer()
        return x

    def head(self) -> Path:
        """Returns the head, with the embedding that a tied head shares."""
        head = self.part("head/")
        return head.with_embedding(self.part("embed/")) if self.arch.tied else head

    def chunks(self, batches: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Returns the batches that pass a layer together: one in memory, as many as fit if each layer must be read."""
        size = 1
        if not self.resident:
            state_bytes = self.num_points * batches[0].size * self.arch.embed_dim * jnp.dtype(self.dtype).itemsize
            size = max(1, _HIDDEN_BYTES // state_bytes)
        return [list(batches[start : start + size]) for start in range(0, len(batches), size)]


def _keep(run_cache: RunCache, layer: int, x: Sequence[jax.Array]) -> None:
    def arrays() -> dict[str, np.ndarray]:
        states = {f"state {b}": to_host(y).astype(np.float32) for b, y in enumerate(x)}
        return {"layer": np.asarray(layer), **states}

    run_cache.save_arrays(arrays, "hidden")


def _kept(run_cache: RunCache, dtype: DTypeLike, batches: Sequence[jax.Array]) -> tuple[int, list[jax.Array]]:
    arrays = run_cache.load_arrays("hidden")
    if arrays is None:
        return 0, []
    states = (arrays[f"state {b}"].astype(jnp.dtype(dtype)) for b in range(len(batches)))
    return int(arrays["layer"]), [put_over(x, batch) for x, batch in zip(states, batches)]


@functools.partial(jax.jit, static_argnames=("arch", "dtype"))
def _embed_step(arch: Arch, dtype: DTypeLike, path: Path, tokens: jax.Array) -> Float[Array, "A B T D"]:
    return path.each(lambda params: apply_embed(arch, params, tokens, dtype))


@functools.partial(jax.jit, static_argnames="arch", donate_argnames="x")
def _block_step(
    arch: Arch,
    path: Path,
    x: Float[Array, "A B T D"],
    frequencies: jax.Array,
    window: jax.Array,
    attention_scale: jax.Array,
) -> Float[Array, "A B T D"]:
    return path.each(lambda params, x: apply_block(arch, params, x, frequencies, window, attention_scale), x)


def head_logits(arch: Arch, params: Tree, x: Float[Array, "*B T D"]) -> Float[Array, "*B T V"]:
    """Returns the logits from the subtree `head`, which holds the embedding as `embed` if the model is tied."""
    own = {name: leaf for name, leaf in params.items() if name != "embed"}
    return apply_head(arch, own, x, params["embed"]["embedding"] if arch.tied else None)


def slice_length(length: int, bytes_per_position: int) -> int:
    """Returns the largest divisor of the block length whose logits fit the limit."""
    most = max(1, LOGITS_BYTES // bytes_per_position)
    return max(n for n in range(1, length + 1) if length % n == 0 and n <= most)


def check_tokens(tokens: Int[np.ndarray, "N T"], arch: Arch) -> None:
    """Checks that a model can read these blocks.

    Raises:
      ValueError: no tokens, blocks longer than the model can read, or ids outside its vocabulary.
    """
    if tokens.size == 0:
        raise ValueError("no token blocks to score")
    if problem := length_problem(arch, tokens.shape[-1]):
        raise ValueError(problem)
    # An index out of range gives NaN or the last row on a device, never an error.
    if tokens.min() < 0 or tokens.max() >= arch.vocab_size:
        raise ValueError(
            f"token ids run from {tokens.min()} to {tokens.max()}, the vocabulary has {arch.vocab_size}; "
            "tokenizer and model do not belong together"
        )
