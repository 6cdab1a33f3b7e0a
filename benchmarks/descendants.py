"""What may be done to a model: trained further, disguised, pruned, retrained in part, rounded, merged.

Training acts on many seeds at once; everything else on one model after another.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from benchmarks.seeds import Zoo, sharding_of, step_of_all
from tracing_jax import demo
from tracing_jax.arch import Arch
from tracing_jax.forward import activations
from tracing_jax.models import apply_mlp
from tracing_jax.rewrites import Renaming, draw_rewrites
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.tree import Tree, map_named

LIGHT_STEPS, REDISTILLED_LAYER = 48, 1


@dataclass(frozen=True)
class Descendant:
    """A model and, where its tokens were renamed, the new id of each."""

    model: InMemory
    new_ids: Int[np.ndarray, " V"] | None = None


Treatment = Callable[[InMemory, int], Descendant]
"""Model and its number -> what becomes of it."""


def member(arch: Arch, models: Tree, index: int) -> InMemory:
    """Returns one of the models that are stacked on a leading axis."""
    return InMemory(arch, jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), models))


def texts(zoo: Zoo) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " M"]]:
    """Returns the tokens that the zoo has learnt from, and those of the fine-tuning text, which it has not."""
    seen, _ = demo.split(demo.base_text(), zoo.recipe.models.base_pieces)
    others, _ = demo.split(demo.finetune_text(), zoo.recipe.models.finetune_pieces)
    tokenizer = demo.train_tokenizer(zoo.recipe.models, seen)
    found = (np.asarray(tokenizer.encode("".join(pieces)).ids, np.int32) for pieces in (seen, others))
    return tuple(found)  # type: ignore[return-value]


def trained(
    zoo: Zoo, models: Tree, tokens: Int[np.ndarray, " N"], steps: int, peak: float, keep: Sequence[int] = ()
) -> Iterator[tuple[int, Tree]]:
    """Yields (steps, all models after so many more steps on a text), at `keep` and at the end."""
    recipe, count = zoo.recipe.models, len(jax.tree.leaves(models)[0])
    sharding = sharding_of(count)
    params = jax.device_put(models, sharding)
    state = jax.jit(jax.vmap(demo.optimizer(recipe).init), out_shardings=sharding)(params)
    step = step_of_all(zoo.arch, zoo.recipe, sharding)
    shape, end = (steps, count, recipe.batch_size, 1), len(tokens) - recipe.block_size
    starts = np.random.default_rng([recipe.seed, steps, end]).integers(0, end, shape)
    for i, rate in enumerate(tqdm(demo.learning_rates(peak, steps), desc=f"training {count} models", disable=None)):
        batch = jax.device_put(tokens[starts[i] + np.arange(recipe.block_size)], sharding)
        params, state, _ = step(params, state, rate, batch)
        if i + 1 in keep:
            yield i + 1, jax.device_get(params)
    yield steps, jax.device_get(params)


def disguise(names: str) -> Treatment:
    """Returns the treatment that draws these rewrites, `all` for every one that exists."""

    def apply(model: InMemory, index: int) -> Descendant:
        rewrites = draw_rewrites(names, jax.random.key(index), model.arch)
        after = in_memory(rewritten(model, rewrites))
        placed = InMemory(after.arch, jax.tree.map(jnp.asarray, after.params))
        return Descendant(placed, Renaming.composed(rewrites))

    return apply


def pruned_in_depth(model: InMemory, index: int) -> Descendant:
    """Returns the model without one of its inner layers."""
    layers = [model.layer(i) for i in range(model.arch.num_layers)]
    del layers[1 + index % (len(layers) - 2)]
    arch = replace(model.arch, num_layers=len(layers), layer_ropes=model.arch.layer_ropes[1:],
                   layer_windows=model.arch.layer_windows[1:])  # fmt: skip
    params = model.params | {"layers": {str(i): layer for i, layer in enumerate(layers)}}
    return Descendant(InMemory(arch, params))


def pruned_in_width(model: InMemory, index: int) -> Descendant:
    """Returns the model with three quarters of the units of each MLP, in their order."""
    F = model.arch.mlp_dim
    kept = [
        np.sort(np.random.default_rng([index, i]).permutation(F)[: 3 * F // 4]) for i in range(model.arch.num_layers)
    ]

    def cut(name: str, leaf: jax.Array) -> jax.Array:
        if "/mlp/" not in name:
            return leaf
        return jnp.take(leaf, kept[int(name.split("/")[1])], axis=0 if "down_proj" in name else 1)

    arch = replace(model.arch, mlp_dim=3 * F // 4)
    return Descendant(InMemory(arch, map_named(cut, model.params)))


def quantised(bits: int) -> Treatment:
    """Returns the treatment that rounds every matrix to integers of so many bits, one scale for each output."""

    def nearest(_: str, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        scale = jnp.abs(leaf).max(axis=0, keepdims=True) / (2 ** (bits - 1) - 1)
        return jnp.round(leaf / scale) * scale

    return lambda model, index: Descendant(InMemory(model.arch, map_named(nearest, model.params)))


def merged_with(others: Tree, count: int = 1) -> Treatment:
    """Returns the treatment that averages a model's weights with those of so many unrelated ones, in equal shares."""

    def merge(model: InMemory, index: int) -> Descendant:
        S = len(jax.tree.leaves(others)[0])
        parents = [model, *(member(model.arch, others, (index + i) % S) for i in range(count))]
        params = [parent.params for parent in parents]
        return Descendant(InMemory(model.arch, jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *params)))

    return merge


def halved_rank(model: InMemory, index: int) -> Descendant:
    """Returns the model with every matrix of its layers replaced by its best approximation of half the rank."""

    def leaf(name: str, weights: jax.Array) -> jax.Array:
        if not name.startswith("layers/") or weights.ndim < 2:
            return weights
        inputs = weights.ndim - 1 if "o_proj" in name else 1  # the output projection reads heads
        matrix = weights.reshape(int(np.prod(weights.shape[:inputs])), -1)
        u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
        kept = len(s) // 2
        return ((u[:, :kept] * s[:kept]) @ v[:kept]).reshape(weights.shape)

    return Descendant(InMemory(model.arch, map_named(leaf, model.params)))


def layers_swapped(model: InMemory, index: int) -> Descendant:
    """Returns the model with its two middle layers in each other's place."""
    order = list(range(model.arch.num_layers))
    middle = len(order) // 2
    order[middle - 1 : middle + 1] = order[middle], order[middle - 1]
    layers = {str(i): model.layer(source) for i, source in enumerate(order)}
    return Descendant(InMemory(model.arch, model.params | {"layers": layers}))


def redistilled(blocks: Int[np.ndarray, "N T"], steps: int = 600) -> Treatment:
    """Returns the treatment that replaces one MLP by a fresh one, trained to give its outputs on the model's inputs."""

    def apply(model: InMemory, index: int) -> Descendant:
        at = np.broadcast_to(np.arange(blocks.shape[1], dtype=np.int32), blocks.shape)
        layers = activations(
            model, blocks, at, np.ones(blocks.shape, bool), ("mlp_input", "mlp_output"), Compute(make_mesh(), 16)
        )
        found = next(by_tap for i, by_tap in layers if i == REDISTILLED_LAYER)
        layer = model.layer(REDISTILLED_LAYER)
        fresh = jax.tree.map(
            lambda leaf: jax.random.normal(jax.random.key(1000 + index), leaf.shape) * leaf.std(), layer["mlp"]
        )
        mlp = _distil(model.arch, fresh, found["mlp_input"], found["mlp_output"], steps)
        layers = model.params["layers"] | {str(REDISTILLED_LAYER): layer | {"mlp": mlp}}
        return Descendant(InMemory(model.arch, model.params | {"layers": layers}))

    return apply


@functools.partial(jax.jit, static_argnames=("arch", "steps"))
def _distil(arch: Arch, mlp: Tree, x: Float[Array, "S D"], y: Float[Array, "S D"], steps: int) -> Tree:
    plain = replace(arch, pre_norms=False)  # the inputs are normed already
    optimizer = optax.adam(3e-3)

    def loss(mlp: Tree, rows: Int[Array, " B"]) -> jax.Array:
        units = apply_mlp(plain, {"mlp": mlp}, x[rows][None], ("units",))["units"][0]
        return jnp.square(units @ mlp["down_proj"]["kernel"] - y[rows]).sum(-1).mean()

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        mlp, state = carry
        rows = jax.random.randint(key, (256,), 0, len(x))
        updates, state = optimizer.update(jax.grad(loss)(mlp, rows), state)
        return (optax.apply_updates(mlp, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (mlp, optimizer.init(mlp)), keys)[0][0]


def treatments(unrelated: Tree, blocks: Int[np.ndarray, "N T"]) -> Mapping[str, Treatment]:
    """Returns what is done, by name, to a lightly fine-tuned model."""
    names = ("permute", "rotate", "gains", "units", "values", "queries", "pad", "identity", "rename",
             "split", "cancel", "repeat")  # fmt: skip
    return {
        **{f"disguised: {name}": disguise(name) for name in names},
        "disguised: all at once": disguise("all"),
        "pruned in depth": pruned_in_depth,
        "pruned in width": pruned_in_width,
        "one MLP retrained": redistilled(blocks),
        "rounded to 8 bits": quantised(8),
        "rounded to 4 bits": quantised(4),
        "merged with another": merged_with(unrelated),
        "merged with two others": merged_with(unrelated, 2),
        "matrices of half the rank": halved_rank,
        "two layers swapped": layers_swapped,
    }
