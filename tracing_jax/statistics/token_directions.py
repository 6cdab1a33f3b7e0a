"""Directions in the residual stream that a text has, and how much of them units read.

In an RMS norm's stream of D features a part can be added that no token ever has: rows that read it are free, and an
independent model can have another's there. So a unit counts by what it reads of a text, and not by the norm of its row:
of what the MLP of its layer gets in a forward pass over some of the text of this package. What units do on that text is
measured as well, by a pass back (`unit_effects`).

The embeddings alone do not tell what is read: a first layer can remove features from them that all tokens have. They
are what is looked at where a model is read by its weights alone, or no text is known; what later layers write is not
looked at then (in trained models what units read of it lies in the span of the embeddings as well).

Letters: F units, D features, T tokens, N blocks, P tokens of a block.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.forward import StreamPass, stream_pass
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource, Submodel, has_embeddings, is_resident, origin
from tracing_jax.statistics.kept_facts import kept_of
from tracing_jax.statistics.mlp_rows import gain_of, without_mean
from tracing_jax.tree import taken, to_host

LEAST_OF_TEXT = 0.2
"""Share of what a row in a random direction reads of a text, below which a unit reads next to nothing of it. In four
small published models, some of whose tokens were hardly trained, 11 of 5,340 units are below it; in models of our own
none is below .6."""

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
      size: of inputs behind the norm and before its gain, where they vary; None where no text was read.
      inputs: what was read, with the gain and the shift of the norm; None where no text was read.
    """

    rows: Float[np.ndarray, "T D"]
    least: float
    size: float | None = None
    inputs: Float[np.ndarray, "T D"] | None = None


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
    if (found := _stream_pass(model)) is not None:
        return _as_differences(found.mlp_inputs[layer], _gain(model, layer))
    rows = token_directions(model)
    return None if rows is None else Directions(rows, LEAST_OF_EMBEDDINGS)


def inputs_on_text(model: ParamSource, layer: int) -> Float[np.ndarray, "N P D"] | None:
    """Returns what the MLP of a layer reads of each block of the text, but of its first tokens; None without a text."""
    model, (index, _) = origin(model, layer)
    if (found := _stream_pass(model)) is None:
        return None
    blocks, _ = kept_of(model)["text"]
    return found.mlp_inputs[index].reshape(len(blocks), -1, model.arch.embed_dim)


def output_gradients(model: ParamSource, layer: int) -> Float[np.ndarray, "T D"] | None:
    """Returns gradients of the logits at the stream behind a layer, for the same text; None where there is none."""
    found = _stream_pass(model)
    return None if found is None else found.gradients[layer + 1]


def head_effects(model: ParamSource) -> list[Float[np.ndarray, "T Q"] | None]:
    """Returns for each layer by how much the logits of the text depend on each head; see `StreamPass`.

    None for all layers where there is no text.
    """
    found = _stream_pass(model)
    return [None] * model.arch.num_layers if found is None else found.head_effects


def _stream_pass(model: ParamSource) -> StreamPass | None:
    """Returns what a model makes of the text, by one pass forward and back in float32."""
    known = kept_of(model)
    if "text" not in known or model.arch.reading is not None:
        return None
    if "stream pass" not in known:
        blocks, compute = known["text"]
        valid = np.broadcast_to(np.arange(blocks.shape[1]) >= _SETTLED, blocks.shape)
        known["stream pass"] = stream_pass(
            model, blocks, valid, replace(compute, dtype=jnp.float32), "what units do with a text"
        )
    found: StreamPass = known["stream pass"]
    return found


def _gain(model: ParamSource, layer: int) -> Float[np.ndarray, "..."]:
    norm = model.arch.mlp_norm
    return to_host(jnp.asarray(gain_of(model.layer(layer, (norm,)), norm, model.arch), jnp.float32))


def _as_differences(read: Float[np.ndarray, "T D"], gain: Float[np.ndarray, "..."]) -> Directions:
    """Returns inputs without gain and median, over the size of a feature that varies.

    Zeros where no feature varies or an input is not finite: of what units read of zeros none is evidence.
    """
    gain = np.broadcast_to(np.asarray(gain, np.float64), read.shape[1:])
    inputs = np.divide(read, gain, out=np.zeros(read.shape), where=gain != 0)
    low, middle, high = np.quantile(inputs, [0.25, 0.5, 0.75], axis=0)
    sizes = np.sort((high - low) / _QUARTILES)
    size = np.sqrt(np.square(sizes[: len(sizes) - len(sizes) // 50]).mean())
    if not (np.isfinite(size) and size > 0):
        return Directions(np.zeros(read.shape, np.float32), LEAST_OF_TEXT)
    return Directions(((inputs - middle) / size).astype(np.float32), LEAST_OF_TEXT, float(size), read)


def sampled_embeddings(model: ParamSource) -> Float[np.ndarray, "T D"]:
    """Returns the embeddings of up to 256 tokens, float32, as they are stored: those of a text if they are known."""
    known = kept_of(model)
    if "sampled embeddings" not in known:
        given = known.get("tokens of a text")
        every = np.arange(model.arch.vocab_size) if given is None or len(given) < _LEAST else np.sort(given)
        ids = every[np.unique(np.linspace(0, len(every) - 1, _TOKENS).astype(int))].astype(np.int32)
        rows = (
            taken(model.embed()["embedding"], ids)
            if is_resident(model)
            else Submodel(model, (), None, ids).embed()["embedding"]
        )
        known["sampled embeddings"] = np.asarray(to_host(rows), np.float32)
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
    """Returns how much each unit reads of the tokens, as a share of what a row in a random direction reads of noise.

    The spread is the distance of the quartiles over the tokens, so that a few of them do not decide: it is 1 for
    directions that are normal and equal in all features. It is 1 too where nothing is known of the tokens, and for rows
    of zeros, in which nothing can be hidden.

    Args:
      rows: columns are what units read; see `scaled_rows`.
      norms: of these columns.
      directions: of the tokens, None if they are not known or are of another width.
    """
    if directions is None or directions.rows.shape[1] != rows.shape[0]:
        return np.ones(rows.shape[1], np.float32)
    read = to_host(_read(rows, directions.rows))
    low, high = np.quantile(read, [0.25, 0.75], axis=0)  # by partition: XLA sorts, which takes ten times as long
    return np.divide(high - low, _QUARTILES * norms, out=np.ones_like(norms), where=norms > 0)


_QUARTILES = 1.349  # their distance in a standard normal distribution


@jax.jit
def _read(rows: Float[Array, "D F"], directions: Float[Array | np.ndarray, "T D"]) -> Float[Array, "T F"]:
    return jnp.matmul(directions, rows, precision="highest")
