"""Writing text: prompts are read at once, then tokens follow one by one, each layer remembering keys and values.

Prompts of a batch lie in rows of one length, filled up behind. What stands behind a prompt is never seen: the row's own
tokens take its places, one by one, before any token looks there.

Letters: B batch, T positions of the prompts, S positions in all, D embed, V vocab.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from tracing_jax.arch import Arch
from tracing_jax.generation.sampling import Choice, chosen
from tracing_jax.models import apply_block_with_cache, apply_embed, apply_head, empty_cache, layer_inputs
from tracing_jax.sharding import Compute
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree

_CHUNK = 16
"""Tokens of a batch between two looks at whether all its texts have ended."""
_WIDTHS = 64
"""Rows of prompts are filled up to multiples of this, so that few shapes are compiled."""


class _State(NamedTuple):
    """A batch of texts under way."""

    caches: list[Tree]
    keys: Key[Array, " B"]
    """What each text is drawn with."""
    tokens: Int[Array, " B"]
    """The newest of each text, not read yet."""
    positions: Int[Array, " B"]
    """Where it stands."""
    ended: Bool[Array, " B"]


@dataclass(frozen=True)
class Writer:
    """A model that goes on with texts.

    Attributes:
      ends: the tokens that end a text.
      seed: of all draws, in 0..2**32 - 1.
    """

    model: InMemory
    compute: Compute
    choice: Choice
    ends: tuple[int, ...] = ()
    seed: int = 0

    def write(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, told: Callable[[int], object] = lambda tokens: None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields the number of each prompt with the tokens that follow it, up to one that ends a text, and that too.

        What is drawn for a prompt follows from the seed and its number; not from the batch that it fell into.

        Args:
          prompts: token ids, one at least in each.
          max_new_tokens: the most that follow.
          told: is called with the number of tokens that were written, as they are.
        """
        by_width: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_width.setdefault(-(-len(prompt) // _WIDTHS) * _WIDTHS, []).append(i)
        data = self.compute.mesh.shape["data"]
        size = -(-min(self.compute.batch_size, len(prompts)) // data) * data
        for width, numbers in sorted(by_width.items()):
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                found = self._batch([prompts[i] for i in batch], batch, (size, width), max_new_tokens, told)
                yield from zip(batch, found)

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        shape: tuple[int, int],
        max_new_tokens: int,
        told: Callable[[int], object],
    ) -> list[list[int]]:
        rows, lengths = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)
        for row, prompt in enumerate(prompts):
            rows[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        of_rows = np.full(shape[0], -1, np.int32)
        of_rows[: len(numbers)] = numbers
        state = self._read(rows, lengths, of_rows, shape[1] + max_new_tokens)
        written = [self.compute.get(state.tokens)[:, None]]
        told(len(prompts))
        count = 1
        while count < max_new_tokens and not self.compute.get(state.ended).all():
            steps = min(_CHUNK, max_new_tokens - count)
            state, tokens = _go_on(self.model.arch, self._settings, steps, self.model.params, state)
            written.append(self.compute.get(tokens).T)
            count += steps
            told(steps * len(prompts))
        return [self._up_to_end(row) for row in np.concatenate(written, axis=1)[: len(prompts)].tolist()]

    def _read(
        self,
        rows: Int[np.ndarray, "B T"],
        lengths: Int[np.ndarray, " B"],
        numbers: Int[np.ndarray, " B"],
        length: int,
    ) -> _State:
        """Returns the texts after their prompts, with room for so many positions; rows of number -1 hold none."""
        arch, batch = self.model.arch, map(self.compute.put, (rows, lengths, numbers))
        caches = [self._cache(len(rows), length) for _ in range(arch.num_layers)]
        return _start(arch, self._settings, np.uint32(self.seed), self.model.params, caches, *batch)

    def _cache(self, batch: int, length: int) -> Tree:
        """Returns the empty cache of a layer: texts split over `data`, kv heads over `model` where that is even."""
        mesh, heads = self.compute.mesh, self.model.arch.num_kv_heads
        lies = NamedSharding(mesh, P("data", None, "model" if heads % mesh.shape["model"] == 0 else None, None))
        empty = jax.jit(empty_cache, static_argnums=(0, 1, 2, 3), out_shardings=lies)
        return empty(self.model.arch, batch, length, jnp.dtype(self.compute.dtype))

    @property
    def _settings(self) -> "_Settings":
        return _Settings(self.choice, self.ends, jnp.dtype(self.compute.dtype))

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        at = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: at + 1]


class _Settings(NamedTuple):
    """What programs are compiled for."""

    choice: Choice
    ends: tuple[int, ...]
    dtype: jnp.dtype


def _logits(arch: Arch, params: Tree, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
    return apply_head(arch, params["head"], x[:, None], params["embed"]["embedding"] if arch.tied else None)[:, 0]


def _through_layers(
    arch: Arch,
    settings: _Settings,
    params: Tree,
    caches: list[Tree],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], list[Tree]]:
    x, kept = apply_embed(arch, params["embed"], tokens, settings.dtype, positions), []
    for i, cache in enumerate(caches):
        x, cache = apply_block_with_cache(arch, params["layers"][str(i)], cache, x, layer_inputs(arch, i), positions)
        kept.append(cache)
    return x, kept


def _next(
    settings: _Settings, logits: Float[Array, "B V"], keys: Key[Array, " B"], positions: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    tokens = chosen(logits, keys, positions, settings.choice)
    return tokens, jnp.isin(tokens, jnp.asarray(settings.ends, jnp.int32))


@functools.partial(jax.jit, static_argnames=("arch", "settings"), donate_argnames="caches")
def _start(
    arch: Arch,
    settings: _Settings,
    seed: UInt[Array, ""] | np.uint32,
    params: Tree,
    caches: list[Tree],
    rows: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    numbers: Int[Array, " B"],
) -> _State:
    """Reads the prompts, and returns the texts with the first token after each."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    x, caches = _through_layers(arch, settings, params, caches, rows, positions)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    tokens, ended = _next(settings, _logits(arch, params, last), keys, lengths)
    return _State(caches, keys, tokens, lengths, ended | (numbers < 0))


@functools.partial(jax.jit, static_argnames=("arch", "settings", "steps"), donate_argnames="state")
def _go_on(
    arch: Arch, settings: _Settings, steps: int, params: Tree, state: _State
) -> tuple[_State, Int[Array, "N B"]]:
    """Returns the texts with so many more tokens, and these."""

    def step(state: _State, _: None) -> tuple[_State, Int[Array, " B"]]:
        x, caches = _through_layers(
            arch, settings, params, state.caches, state.tokens[:, None], state.positions[:, None]
        )
        tokens, ended = _next(settings, _logits(arch, params, x[:, 0]), state.keys, state.positions + 1)
        return state._replace(
            caches=caches, tokens=tokens, positions=state.positions + 1, ended=state.ended | ended
        ), tokens

    return jax.lax.scan(step, state, length=steps)
