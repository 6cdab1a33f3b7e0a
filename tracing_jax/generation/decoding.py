"""Batched decoding: prompts are prefilled at once, then tokens follow one by one, from a cache of keys and values.

The prompts of a batch are padded on the right to one length. Padding has position -1, which recurrences take no notice
of, and at which the cache keeps its keys in the last place: a row's own token overwrites them before any attends there.

Letters: B batch, T positions of the prompts, S positions of the cache, D embed, V vocab.
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
from tracing_jax.forward import forward, head_logits, head_of
from tracing_jax.generation.sampling import SamplingParams, sample
from tracing_jax.models import LayerCache, empty_cache
from tracing_jax.sharding import Compute
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree

_STEPS = 16
"""Tokens of a batch between two checks whether all its texts have ended."""
_PROMPT_MULTIPLE = 64
"""Prompts are padded to multiples of this, so that few shapes are compiled."""


class _State(NamedTuple):
    """A batch of unfinished texts."""

    caches: list[LayerCache]
    keys: Key[Array, " B"]
    """Random keys, one for each text."""
    tokens: Int[Array, " B"]
    """The newest of each text, not in the cache yet."""
    positions: Int[Array, " B"]
    """Of the newest tokens."""
    ended: Bool[Array, " B"]


@dataclass(frozen=True)
class Sampler:
    """Samples continuations of prompts from a model.

    Attributes:
      params: how tokens are sampled.
      ends: the tokens that end a text.
      seed: of all draws, in 0..2**32 - 1.
    """

    model: InMemory
    compute: Compute
    params: SamplingParams
    ends: tuple[int, ...] = ()
    seed: int = 0

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        on_tokens: Callable[[int], object] = lambda count: None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields the number of each prompt with the tokens that follow it, up to one that ends a text, included.

        What is drawn for a prompt follows from the seed and its number, whatever its batch.

        Args:
          prompts: token ids, one at least in each.
          max_new_tokens: the most that follow.
          on_tokens: is called with the number of new tokens whenever there are some.
        """
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(-(-len(prompt) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE, []).append(i)
        data = self.compute.mesh.shape["data"]
        size = -(-min(self.compute.batch_size, len(prompts)) // data) * data
        for length, numbers in sorted(by_length.items()):
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                found = self._batch([prompts[i] for i in batch], batch, (size, length), max_new_tokens, on_tokens)
                yield from zip(batch, found)

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        shape: tuple[int, int],
        max_new_tokens: int,
        on_tokens: Callable[[int], object],
    ) -> list[list[int]]:
        padded, lengths = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        of_rows = np.full(shape[0], -1, np.int32)  # rows without a prompt
        of_rows[: len(numbers)] = numbers
        arch, dtype, size = self.model.arch, self.compute.dtype, (shape[0], shape[1] + max_new_tokens)
        caches = [empty_cache(arch, layer, *size, dtype, self._place) for layer in range(arch.num_layers)]
        batch = map(self.compute.put, (padded, lengths, of_rows))
        model, seed = (self.model.arch, self._settings), np.uint32(self.seed)
        state = _prefill(*model, seed, self.model.params, caches, *batch)
        new_tokens, count = [self.compute.get(state.tokens)[:, None]], 1
        on_tokens(len(prompts))
        while count < max_new_tokens and not self.compute.get(state.ended).all():
            steps = min(_STEPS, max_new_tokens - count)
            state, tokens = _decode_steps(*model, steps, self.model.params, state)
            new_tokens.append(self.compute.get(tokens).T)
            count += steps
            on_tokens(steps * len(prompts))
        return [self._up_to_end(row) for row in np.concatenate(new_tokens, axis=1)[: len(prompts)].tolist()]

    def _place(self, kv_heads: int) -> NamedSharding:
        """Returns where a cache is: texts split over `data`, kv heads over `model` where that is even."""
        mesh = self.compute.mesh
        if not kv_heads:
            return NamedSharding(mesh, P("data"))
        return NamedSharding(mesh, P("data", None, "model" if kv_heads % mesh.shape["model"] == 0 else None, None))

    @property
    def _settings(self) -> "_Settings":
        return _Settings(self.params, self.ends, jnp.dtype(self.compute.dtype))

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        at = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: at + 1]


class _Settings(NamedTuple):
    """The static arguments of the compiled steps."""

    params: SamplingParams
    ends: tuple[int, ...]
    dtype: jnp.dtype


def _logits(model: InMemory, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
    return head_logits(model.arch, head_of(model), x[:, None])[:, 0]


def _hidden_and_caches(
    model: InMemory,
    settings: _Settings,
    caches: list[LayerCache],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], list[LayerCache]]:
    outputs = list(forward(model, [tokens], settings.dtype, positions=[positions], caches=[caches]))
    return outputs[-1].hidden, [output.cache for output in outputs if output.cache is not None]


def _next_tokens(
    settings: _Settings, logits: Float[Array, "B V"], keys: Key[Array, " B"], positions: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Returns the tokens at these positions, and whether they end their texts."""
    tokens = sample(logits, keys, positions, settings.params)
    return tokens, jnp.isin(tokens, jnp.asarray(settings.ends, jnp.int32))


@functools.partial(jax.jit, static_argnames=("arch", "settings"), donate_argnames="caches")
def _prefill(
    arch: Arch,
    settings: _Settings,
    seed: UInt[Array, ""] | np.uint32,
    params: Tree,
    caches: list[LayerCache],
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    numbers: Int[Array, " B"],
) -> _State:
    """Reads the prompts, and returns the texts with the first token after each; rows of number -1 have ended."""
    model = InMemory(arch, params)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers)
    positions = jnp.arange(prompts.shape[1])[None]
    positions = jnp.where(positions < lengths[:, None], positions, -1)
    x, caches = _hidden_and_caches(model, settings, caches, prompts, positions)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    tokens, ended = _next_tokens(settings, _logits(model, last), keys, lengths)
    return _State(caches, keys, tokens, lengths, ended | (numbers < 0))


@functools.partial(jax.jit, static_argnames=("arch", "settings", "steps"), donate_argnames="state")
def _decode_steps(
    arch: Arch, settings: _Settings, steps: int, params: Tree, state: _State
) -> tuple[_State, Int[Array, "N B"]]:
    """Returns the texts with so many more tokens, and these tokens."""
    model = InMemory(arch, params)

    def step(state: _State, _: None) -> tuple[_State, Int[Array, " B"]]:
        x, caches = _hidden_and_caches(
            model, settings, state.caches, state.tokens[:, None], state.positions[:, None]
        )  # fmt: skip
        tokens, ended = _next_tokens(settings, _logits(model, x[:, 0]), state.keys, state.positions + 1)
        return _State(caches, state.keys, tokens, state.positions + 1, state.ended | ended), tokens

    return jax.lax.scan(step, state, length=steps)
