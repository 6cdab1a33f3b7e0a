"""Directions of the residual stream that nothing writes, and how much of the rows of a model lies in them.

Rows may have anything there without a change of what the model does: another model's rows, for instance. Tests that
compare rows by themselves, and not what they read of tokens, see them all the same.

Letters: D features.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax.sources import ParamSource, Submodel, has_embeddings, is_resident
from tracing_jax.statistics.comparison import all_reserved
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.kept_facts import kept_of
from tracing_jax.statistics.mlp_rows import gain_of, mlp_rows, without_mean
from tracing_jax.statistics.statistic import Pair, Result
from tracing_jax.tree import Tree, taken, to_host

_UNWRITTEN = 1e-4
"""Of the mean of what is written to all directions, squared: what is less is next to nothing, a hundredth in size."""

_MOST = 0.02
"""Share of the squares of rows that may lie there: what rows in random directions have in one feature of fifty."""

_ROWS = 4
"""Embeddings that are taken, as a multiple of the features."""


def with_unwritten_features(result: Result, pair: Pair) -> Result:
    """Returns the result of a statistic on rows, reserved where rows lie in directions that nothing writes."""
    if pair.aligned or result.log10_p is None or result.log10_p > -1:
        return result
    sides = {side: share_unwritten(model) for side, model in (("base", pair.base), ("ft", pair.ft))}
    read = [f"{share:.0%} of those of {side}" for side, share in sides.items() if share > _MOST]
    if not read:
        return result
    return all_reserved(
        result,
        f"rows lie in directions of the residual stream that nothing writes, {' and '.join(read)}: they may be any",
    )


def share_unwritten(model: ParamSource) -> float:
    """Returns the share of the squares of rows that read the stream which lies in directions that nothing writes.

    The largest of all layers and kinds of rows, of each the mean. What writes are the embeddings, of tokens of a text
    where these are known, and in MLPs without experts the units that count as evidence. 0 where the embeddings are not
    known.
    """
    known = kept_of(model)
    if "share unwritten" not in known:
        has_tokens = model.arch.has("embed/embedding") and has_embeddings(model)
        known["share unwritten"] = _share(model) if has_tokens else 0.0
    found: float = known["share unwritten"]
    return found


def _share(model: ParamSource) -> float:
    arch = model.arch
    D = arch.embed_dim
    written, largest = _unit_trace(_embeddings(model)), 0.0
    if arch.norm_subtracts_mean:  # rows have nothing in the direction of ones, and it is none of those looked for
        written = written + np.full((D, D), 1 / D**2)
    for i in range(arch.num_layers):
        basis = _unwritten(written)
        if not basis.shape[1]:  # nor is there one in later layers
            break
        layer = model.layer(i)
        largest = max(largest, *(_mean_share(rows, basis) for rows in _reading(model, layer, i)), 0.0)
        if _has_mlp(model, i) and len(kept := distinct_units(model, i).kept):
            written = written + _unit_trace(to_host(mlp_rows(layer, arch)["down"])[kept])
    return largest


def _has_mlp(model: ParamSource, layer: int) -> bool:
    return model.arch.has("mlp/down_proj") and not model.arch.has_experts(layer)


def _reading(model: ParamSource, layer: Tree, index: int) -> Iterator[Float[np.ndarray, "N D"]]:
    """Yields the rows of a layer that read the stream: of heads, and of gate and up of the units that are kept."""
    for name in ("q_proj", "k_proj", "v_proj"):
        side = layer.get("attn", {}).get(name)
        if side is not None and side["kernel"].shape[0] == model.arch.embed_dim:
            kernel = jnp.asarray(side["kernel"], jnp.float32).reshape(model.arch.embed_dim, -1)
            yield to_host(without_mean(kernel.T * gain_of(layer, "attn_norm", model.arch), model.arch))
    if _has_mlp(model, index):
        kept, rows = distinct_units(model, index).kept, mlp_rows(layer, model.arch)
        yield from (to_host(rows[side])[kept] for side in ("gate", "up") if side in rows)


def _mean_share(rows: Float[np.ndarray, "N D"], basis: Float[np.ndarray, "D _"]) -> float:
    if not len(rows):
        return 0.0
    own = rows.astype(np.float64)
    return float(np.mean(np.square(own @ basis).sum(axis=1) / np.maximum(np.square(own).sum(axis=1), 1e-30)))


def _embeddings(model: ParamSource) -> Float[np.ndarray, "V D"]:
    arch = model.arch
    given = kept_of(model).get("tokens of a text")
    most = _ROWS * arch.embed_dim
    every = np.arange(arch.vocab_size) if given is None or len(given) < most else np.sort(given)
    ids = every[np.unique(np.linspace(0, len(every) - 1, min(most, len(every))).astype(int))].astype(np.int32)
    if is_resident(model):
        embed, tokens = model.embed(), taken(model.embed()["embedding"], ids)
    else:
        embed = Submodel(model, (), None, ids).embed()
        tokens = embed["embedding"]
    found = jnp.asarray(tokens, jnp.float32)
    if arch.embed_norm:
        found = without_mean(found, arch) * gain_of(embed, "norm", arch)
    rows = [to_host(without_mean(found, arch))]
    if "positions" in embed:
        rows.append(to_host(without_mean(jnp.asarray(embed["positions"], jnp.float32), arch)))
    return np.concatenate(rows)


def _unit_trace(rows: Float[Array | np.ndarray, "N D"]) -> Float[np.ndarray, "D D"]:
    own = np.asarray(rows, np.float64)
    gram = own.T @ own
    return gram / (np.trace(gram) or 1.0)


def _unwritten(written: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D _"]:
    """Returns an orthonormal basis of the directions to which next to nothing is written."""
    values, vectors = np.linalg.eigh(written)
    return vectors[:, values < _UNWRITTEN * values.mean()]
