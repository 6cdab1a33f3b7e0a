"""Directions in the residual stream that a text has, or that its next tokens depend on, and what units do in them.

In an RMS norm's stream of D features a part can be added that no token ever has, or that nothing reads: rows that read
the first, and outputs that write to the second, are free, and an independent model can have another's there. So a unit
counts by what it reads of a text, and not by the norm of its row: of what the MLP of its layer gets in a forward pass
over some of the text of this package. And it counts by what it writes along gradients: of the logits at the stream
behind its layer, from the pass back.

The embeddings alone do not tell what is read: a first layer can remove features from them that all tokens have. They
are what is looked at where a model is read by its weights alone, or no text is known; what later layers write, and what
they read, is not looked at then (in trained models what units read of it lies in the span of the embeddings as well).

Letters: F units, D features, T tokens, N blocks, P tokens of a block.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.forward import stream_pass
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource, Submodel, has_embeddings, is_resident
from tracing_jax.statistics.kept_facts import kept_of
from tracing_jax.statistics.mlp_rows import gain_of, scaled_rows, without_mean
from tracing_jax.tree import to_host

LEAST_OF_TEXT = 0.2
"""Share of what a row in a random direction has of a text or its gradients, below which a unit reads, or writes, next
to nothing of it. In four small published models, some of whose tokens were hardly trained, 11 of 5,340 units read less
and none writes less than .6; in models of our own none reads less than .7."""

LEAST_OF_EMBEDDINGS = 0.4
"""The same of embeddings, which have more directions than a text has."""

_TOKENS = 256  # whose embeddings are read
_ALIKE = 0.9
"""Cosine of embeddings from which on they count once: tokens that were never trained may all have the same one."""
_LEAST, _MOST = 16, 128
"""With fewer directions nothing is known; more are not needed."""
_SETTLED = 4
"""The first tokens of a block, to which models may attend as to a sink, are left out."""


@dataclass(frozen=True)
class Directions:
    """Directions of tokens, and how little of them a unit has that is left out.

    Attributes:
      rows: their mean square is 1.
      least: share of what a row in a random direction has of them.
      size: of what was read, behind the norm and before its gain, where it varies; None where nothing was.
      middle: of what was read, with the gain and the shift of the norm, the median.
    """

    rows: Float[np.ndarray, "T D"]
    least: float
    size: float | None = None
    middle: Float[np.ndarray, " D"] | None = None


@dataclass(frozen=True)
class _OfText:
    """Of each layer the directions in which its MLP reads a text, and those that the logits read of the stream."""

    read: list[Directions]
    written: list[Directions]
    """Before each layer, and behind all of them."""


def remember_tokens(model: ParamSource, ids: Int[np.ndarray, " n"]) -> None:
    """Keeps of a model which tokens its tokenizer gives for a text: only those say what it reads.

    Rows of tokens that no text has can be added to an embedding, more of them than it had.
    """
    kept_of(model)["tokens of a text"] = ids[ids < model.arch.vocab_size]


def remember_text(model: ParamSource, blocks: Int[np.ndarray, "N P"], compute: Compute) -> None:
    """Keeps of a model some of a text in its tokens, which it reads when it is first asked what its units read."""
    kept_of(model)["text"] = blocks, compute


def is_enough(blocks: Int[np.ndarray, "N P"]) -> bool:
    """Returns whether so much of a text says what units read."""
    return blocks.shape[0] * (blocks.shape[1] - _SETTLED) >= _LEAST


def read_directions(model: ParamSource, layer: int) -> Directions | None:
    """Returns what the MLP of a layer reads of a text, before its gain, as differences; None if nothing is known.

    Where there is no text, or no forward pass, embeddings of tokens take its place. The mean square of those of a text
    is 1 in the features that vary over it, the fiftieth part that varies most left out: in large models a few features
    are a thousand times larger than others.
    """
    if (found := _of_text(model)) is not None:
        return found.read[layer]
    rows = token_directions(model)
    return None if rows is None else Directions(rows, LEAST_OF_EMBEDDINGS)


def written_directions(model: ParamSource, layer: int) -> Directions | None:
    """Returns gradients of the logits at the stream before a layer, or behind the last; None where they are not known.

    Their mean square is 1 as that of `read_directions` is.
    """
    found = _of_text(model)
    return None if found is None else found.written[layer]


def _of_text(model: ParamSource) -> _OfText | None:
    known = kept_of(model)
    if "text" not in known or model.arch.reading is not None:
        return None
    if "of the text" not in known:
        known["of the text"] = _read_and_written(model, *known["text"])
    found: _OfText = known["of the text"]
    return found


def _read_and_written(model: ParamSource, blocks: Int[np.ndarray, "N P"], compute: Compute) -> _OfText:
    """Returns the directions of all layers, by one pass forward and back in float32."""
    valid = np.broadcast_to(np.arange(blocks.shape[1]) >= _SETTLED, blocks.shape)
    found = stream_pass(
        model, blocks, valid, replace(compute, dtype=jnp.float32), "what units read and write of a text"
    )
    return _OfText(
        [_as_differences(rows, _gain(model, i)) for i, rows in enumerate(found.mlp_inputs)],
        [_as_differences(rows, np.ones(())) for rows in found.gradients],
    )


def _gain(model: ParamSource, layer: int) -> Float[np.ndarray, "..."]:
    norm = model.arch.mlp_norm
    return to_host(jnp.asarray(gain_of(model.layer(layer, (norm,)), norm, model.arch), jnp.float32))


def _as_differences(read: Float[np.ndarray, "T D"], gain: Float[np.ndarray, "..."]) -> Directions:
    """Returns inputs without gain and median, over the size of a feature that varies, in half precision.

    Zeros where no feature varies or an input is not finite: of what units read of zeros none is evidence.
    """
    gain = np.broadcast_to(np.asarray(gain, np.float64), read.shape[1:])
    inputs = np.divide(read, gain, out=np.zeros(read.shape), where=gain != 0)
    low, middle, high = np.quantile(inputs, [0.25, 0.5, 0.75], axis=0)
    sizes = np.sort((high - low) / _QUARTILES)
    size = np.sqrt(np.square(sizes[: len(sizes) - len(sizes) // 50]).mean())
    if not (np.isfinite(size) and size > 0):
        return Directions(np.zeros(read.shape, np.float16), LEAST_OF_TEXT)
    largest = float(np.finfo(np.float16).max)
    rows = np.clip((inputs - middle) / size, -largest, largest).astype(np.float16)
    return Directions(rows, LEAST_OF_TEXT, float(size), np.median(read, axis=0))


def sampled_embeddings(model: ParamSource) -> Float[np.ndarray, "T D"]:
    """Returns the embeddings of up to 256 tokens, float32, as they are stored: those of a text if they are known."""
    known = kept_of(model)
    if "sampled embeddings" not in known:
        given = known.get("tokens of a text")
        every = np.arange(model.arch.vocab_size) if given is None or len(given) < _LEAST else np.sort(given)
        ids = every[np.unique(np.linspace(0, len(every) - 1, _TOKENS).astype(int))].astype(np.int32)
        rows = (
            model.embed()["embedding"][ids]
            if is_resident(model)
            else Submodel(model, (), None, ids).embed()["embedding"]
        )
        known["sampled embeddings"] = to_host(jnp.asarray(rows, jnp.float32))
    found: Float[np.ndarray, "T D"] = known["sampled embeddings"]
    return found


def token_directions(model: ParamSource) -> Float[np.ndarray, "T D"] | None:
    """Returns embeddings of tokens, those much alike once, as a norm makes them; None where they are not known.

    Their mean square is 1. Directions are of tokens behind the norm of the embedding, if there is one.
    """
    if not (model.arch.has("embed/embedding") and has_embeddings(model)):
        return None
    known = kept_of(model)
    if "token directions" not in known:
        known["token directions"] = _directions(model)
    found: Float[np.ndarray, "T D"] | None = known["token directions"]
    return found


def _directions(model: ParamSource) -> Float[np.ndarray, "T D"] | None:
    rows = jnp.asarray(sampled_embeddings(model))
    if model.arch.embed_norm:
        rows = without_mean(rows, model.arch) * gain_of(model.embed(), "norm", model.arch)
    centred = np.asarray(without_mean(rows, model.arch), np.float64)
    lengths = np.linalg.norm(centred, axis=1)
    units = centred[lengths > 0] / lengths[lengths > 0, None]
    cosines, kept = units @ units.T, list[int]()
    for token, row in enumerate(cosines):
        if not kept or row[kept].max() < _ALIKE:
            kept.append(token)
    if len(kept) < _LEAST:
        return None
    some = np.unique(np.linspace(0, len(kept) - 1, _MOST).astype(int))
    return (units[kept][some] * np.sqrt(units.shape[1])).astype(np.float32)


def spread_of_units(
    rows: Float[Array, "D F"], norms: Float[np.ndarray, " F"], directions: Directions | None
) -> Float[np.ndarray, " F"]:
    """Returns how much each unit has of the tokens, as a share of what a row in a random direction has of noise.

    The spread is the distance of the quartiles over the tokens, so that a few of them do not decide: it is 1 for
    directions that are normal and equal in all features. It is 1 too where nothing is known of the tokens, and for rows
    of zeros, in which nothing can be hidden.

    Args:
      rows: columns are what units read, or write; see `scaled_rows`.
      norms: of these columns.
      directions: of the tokens, None if they are not known or are of another width.
    """
    if directions is None or directions.rows.shape[1] != rows.shape[0]:
        return np.ones(rows.shape[1], np.float32)
    read = to_host(_read(rows, jnp.asarray(directions.rows)))
    low, high = np.quantile(read, [0.25, 0.75], axis=0)  # by partition: XLA sorts, which takes ten times as long
    return np.divide(high - low, _QUARTILES * norms, out=np.ones_like(norms), where=norms > 0)


def are_read(
    rows: Float[Array | np.ndarray, "F D"],
    gain: Float[Array, " D"] | float,
    centred: bool,
    directions: Directions | None,
) -> Bool[np.ndarray, " F"]:
    """Returns for each unit whether the logits depend on what it writes; all do where that is not known.

    Args:
      rows: what units write.
      gain: of a norm behind them.
      centred: whether nothing reads their mean.
      directions: see `written_directions`.
    """
    if directions is None or directions.rows.shape[1] != rows.shape[1]:
        return np.ones(rows.shape[0], bool)
    columns, _, _ = scaled_rows(rows.T, jnp.broadcast_to(jnp.asarray(gain, jnp.float32), rows.shape[1:]), centred)
    return spread_of_units(columns, to_host(jnp.linalg.norm(columns, axis=0)), directions) >= directions.least


_QUARTILES = 1.349  # their distance in a standard normal distribution


@jax.jit
def _read(rows: Float[Array, "D F"], directions: Float[Array, "T D"]) -> Float[Array, "T F"]:
    return jnp.matmul(directions.astype(jnp.float32), rows, precision="highest")
