"""What follows from the predictions of models: the loss of every token along a path, and divergences between models."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.data import PairedBlocks
from tracing_jax.forward.forward_pass import (
    PathOrModel,
    SavedStates,
    Subtree,
    batches_at_once,
    check_tokens,
    final_hidden,
    head_logits,
    head_of,
    map_slices,
    points_at_once,
)
from tracing_jax.forward.interpolated_model import InterpolatedModel, map_points
from tracing_jax.interpolation import interpolated_leaves, on_line
from tracing_jax.progress import tqdm
from tracing_jax.rewrites import Permutations
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute
from tracing_jax.sources import InMemory, ParamSource
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
    layer: int | None = None,
) -> Float[np.ndarray, "A N T1"]:
    """Returns the loss of every predicted token, in nats, at every alpha of the path from base (0) to ft (1).

    The model at alpha has base's facts (rope, norms, scales); only leaves in `groups` are interpolated. With no groups
    `ft` is not read. T1 = T - 1: the first token of a block is never predicted. Weights stay on the mesh, and no logits
    of a whole batch are kept.

    Args:
      base: the end at 0.
      ft: the end at 1; None where nothing is interpolated.
      tokens: the blocks that every model on the path reads.
      alphas: the points.
      groups: which leaves are interpolated.
      compute: where and how.
      description: the label of the progress bar.
      copies: one for each alpha, permutations of the same axes by which ft is permuted there; see `InterpolatedModel`.
      run_cache: where finished losses are saved, and now and then the hidden states of an unfinished pass.
      layer: the one layer whose leaves are interpolated, of those in `groups`; None for every part of the model.

    Raises:
      ValueError: no tokens, blocks longer than base can read, ids outside its vocabulary, or not as many copies as
        alphas.
    """
    if copies and len(copies) != len(alphas):
        raise ValueError(f"{len(copies)} permuted copies at {len(alphas)} alphas; give one for each, or none")
    model = _path(base, ft, alphas, groups, copies, layer)
    return _losses(model, tokens, compute, description, run_cache or RunCache())


def scaled_path_losses(
    base: ParamSource,
    ft: ParamSource,
    tokens: Int[np.ndarray, "N T"],
    alphas: Sequence[float] | np.ndarray,
    groups: Sequence[str],
    compute: Compute,
    scales: Float[np.ndarray, " G"],
    run_cache: RunCache | None = None,
) -> tuple[Float[np.ndarray, "A N T1"], Float[np.ndarray, "A N G"]]:
    """Returns what `path_losses` does, and the mean loss of each block if all logits are multiplied by each scale.

    Logits are computed once; of a slice of positions those of one scale are held at a time.

    Raises:
      ValueError: as `path_losses`.
    """
    model = _path(base, ft, alphas, groups)
    found = _pass(model, tokens, compute, "losses along the path", run_cache or RunCache(), scales)
    return found["losses"], found["scaled"]


def _path(
    base: ParamSource,
    ft: ParamSource | None,
    alphas: Sequence[float] | np.ndarray,
    groups: Sequence[str],
    copies: Sequence[Permutations] = (),
    layer: int | None = None,
) -> InterpolatedModel:
    interpolated = interpolated_leaves(axis_table(base.arch), groups)
    if layer is not None:
        interpolated = frozenset(name for name in interpolated if name.startswith(f"layers/{layer}/"))
    return InterpolatedModel(
        base, [] if ft is None else [ft], interpolated, on_line(np.asarray(alphas, float)), copies
    )  # fmt: skip


def combination_losses(
    models: Sequence[ParamSource],
    coefficients: Float[np.ndarray | Array, "A K"],
    tokens: Int[np.ndarray, "N T"],
    groups: Sequence[str],
    compute: Compute,
    description: str = "losses of combinations",
) -> Float[np.ndarray, "A N T1"]:
    """Returns the loss of every predicted token, in nats, of linear combinations of K models of one shape.

    Leaves outside `groups`, and the facts of a model, are those of the first. As many points as fit in memory pass the
    layers together. Otherwise like `path_losses`.

    Raises:
      ValueError: no tokens, blocks longer than the models can read, or ids outside their vocabulary.
    """
    interpolated = interpolated_leaves(axis_table(models[0].arch), groups)
    (first, *_), rows = compute.batches(tokens), np.asarray(coefficients)
    size = min(len(rows), points_at_once(models[0].arch, first, compute.dtype))
    filled = np.concatenate([rows, np.repeat(rows[-1:], -len(rows) % size, axis=0)])  # so that all have one shape
    found = []
    for start in range(0, len(filled), size):
        points = jnp.asarray(filled[start : start + size], jnp.float32)
        model = InterpolatedModel(models[0], models[1:], interpolated, points)
        part = f"{description}, {start + 1} to {min(start + size, len(rows))} of {len(rows)}"
        found.append(_losses(model, tokens, compute, part if size < len(rows) else description, RunCache()))
    return np.concatenate(found)[: len(rows)]


def token_losses(
    source: ParamSource,
    tokens: Int[np.ndarray, "N T"],
    compute: Compute,
    description: str = "losses",
    run_cache: RunCache | None = None,
) -> Float[np.ndarray, "N T1"]:
    """Returns the loss of every predicted token of one model, in nats.

    Raises:
      ValueError: no tokens, blocks longer than the model can read, or ids outside its vocabulary.
    """
    return _losses(source, tokens, compute, description, run_cache or RunCache())


@functools.partial(jax.jit, static_argnames="arch")
def mean_loss(arch: Arch, params: Tree, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Returns the mean loss of the predicted tokens, in nats, through which gradients pass; all logits are held."""
    import optax  # slow to import, and only training needs it

    model = InMemory(arch, params)
    (hidden,) = final_hidden(model, [tokens], jnp.float32)
    logits = head_logits(arch, head_of(model), hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def _losses(
    model: PathOrModel, tokens: Int[np.ndarray, "N T"], compute: Compute, description: str, run_cache: RunCache
) -> Float[np.ndarray, "*A N T1"]:
    return _pass(model, tokens, compute, description, run_cache)["losses"]


def _pass(
    model: PathOrModel,
    tokens: Int[np.ndarray, "N T"],
    compute: Compute,
    description: str,
    run_cache: RunCache,
    scales: Float[np.ndarray, " G"] | None = None,
) -> dict[str, np.ndarray]:
    """Returns `losses` `[*A, N, T1]` and, with scales, `scaled`, the mean of each block at each scale `[*A, N, G]`."""
    names = ("losses",) if scales is None else ("losses", "scaled")
    check_tokens(tokens, model.arch)
    batched = compute.batches(tokens)
    size = batches_at_once(model, batched[0], compute.dtype)
    starts, found = range(0, len(batched), size), []
    with tqdm(total=len(starts) * model.arch.num_layers, desc=description, unit="layer", disable=None) as bar:

        def of_chunk(start: int, scope: RunCache) -> dict[str, np.ndarray]:
            batches = [compute.put(batch) for batch in batched[start : start + size]]
            hidden = final_hidden(model, batches, compute.dtype, scope, bar.update)
            head = head_of(model)
            steps = [_loss_step(model.arch, head, x, batch, scales) for x, batch in zip(hidden, batches, strict=True)]
            arrays = compute.get(steps)
            return {name: np.concatenate([step[name] for step in arrays], axis=-2) for name in names}

        for c, start in enumerate(starts):
            scope = run_cache.scope(f"chunk {c}")
            found.append(scope.cached_arrays(names, functools.partial(of_chunk, start, scope)))
            SavedStates(scope).delete()
    return {name: np.concatenate([done[name] for done in found], axis=-2)[..., : len(tokens), :] for name in names}


@functools.partial(jax.jit, static_argnames="arch")
def _loss_step(
    arch: Arch,
    head: Subtree,
    x: Float[Array, "*A B T D"],
    tokens: Int[Array, "B T"],
    scales: Float[np.ndarray | Array, " G"] | None = None,
) -> dict[str, jax.Array]:
    """Returns the losses of a batch; logits exist for a slice of the positions and one point at a time."""
    targets = jnp.roll(tokens, -1, axis=1)

    def at_point(params: Tree, x: jax.Array) -> dict[str, jax.Array]:
        def of_slice(x: jax.Array, targets: jax.Array) -> jax.Array:
            logits = head_logits(arch, params, x)
            of_targets = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            loss = jax.nn.logsumexp(logits, axis=-1) - of_targets
            if scales is None:
                return loss[..., None]
            scaled = jax.lax.map(lambda s: jax.nn.logsumexp(s * logits, axis=-1) - s * of_targets, scales)
            return jnp.concatenate([loss[..., None], jnp.moveaxis(scaled, 0, -1)], axis=-1)

        losses = map_slices(of_slice, (x, targets), tokens.shape[0] * arch.vocab_size * 4)[:, :-1]
        found = {"losses": losses[..., 0]}
        return found if scales is None else found | {"scaled": losses[..., 1:].mean(axis=1)}

    return map_points(head, at_point, x)


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

    Both are restricted to the tokens in `shared` (ids in base, ids in ft, paired) and normalised again. Each model
    makes one pass, and logits exist for a slice of a batch at a time.

    Raises:
      ValueError: no tokens, or ids outside a vocabulary.
    """
    models = (base, ft)
    check_tokens(blocks.base, base.arch)
    check_tokens(blocks.ft, ft.arch)
    batched = [compute.batches(rows) for rows in (blocks.base, blocks.ft, blocks.at_base, blocks.at_ft)]
    size = min(batches_at_once(model, batches[0], compute.dtype) for model, batches in zip(models, batched))
    run_cache = run_cache or RunCache()

    def of_chunk(start: int, scopes: Sequence[RunCache]) -> dict[str, np.ndarray]:
        rows = [[compute.put(batch) for batch in batches[start : start + size]] for batches in batched]
        hidden = [final_hidden(model, ids, compute.dtype, scope) for model, ids, scope in zip(models, rows, scopes)]
        heads = [head_of(model) for model in models]
        steps = [
            _divergence_step((base.arch, ft.arch), heads, (x_base, x_ft), tuple(at), shared)
            for x_base, x_ft, *at in zip(*hidden, *rows[2:], strict=True)
        ]
        return {"divergences": np.concatenate(compute.get(steps))}

    found = []
    for start in tqdm(range(0, len(batched[0]), size), desc=description, unit="chunk", disable=None):
        chunk = run_cache.scope(f"chunk {start}")
        scopes = (chunk.scope("base"), chunk.scope("ft"))
        done = chunk.cached_arrays(("divergences",), functools.partial(of_chunk, start, scopes))
        for scope in scopes:
            SavedStates(scope).delete()
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
    selected = [jnp.take_along_axis(x, positions[:, :, None], axis=1) for x, positions in zip(hidden, at)]

    def of_slice(*xs: jax.Array) -> jax.Array:
        one, other = (
            jax.nn.log_softmax(head_logits(arch, head, x)[..., ids], axis=-1)
            for arch, head, x, ids in zip(archs, heads, xs, shared)
        )
        middle = jnp.logaddexp(one, other) - math.log(2)
        return 0.5 * ((jnp.exp(one) * (one - middle)).sum(-1) + (jnp.exp(other) * (other - middle)).sum(-1))

    bytes_per_position = at[0].shape[0] * (archs[0].vocab_size + archs[1].vocab_size) * 4
    return map_slices(of_slice, selected, bytes_per_position)
