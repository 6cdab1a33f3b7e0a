"""How the MLP units of a model respond to token strings, and to the weights of their own layer.

Both are invariant under every function-preserving rewrite: units in another order give the same numbers in that order.

Letters: F units, S tokens, M moments, D features.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.arch import Arch, head_problem
from tracing_jax.data import load_tokenizer
from tracing_jax.sources import ParamSource, layer_of, whole_model
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.head_kernels import HEAD_LEAVES
from tracing_jax.statistics.layer_moments import Moments, attention_moments, units_and_moments
from tracing_jax.statistics.mlp_rows import mlp_row_leaves, mlp_rows, unit_length
from tracing_jax.statistics.needs import needs_not_applicable
from tracing_jax.statistics.shared_tokens import TokenRows, rows_of_tokens

GATED, GATELESS = ("gate", "up"), ("up", "effect")
"""Two readings of a unit, which are matched apart: what its two projections give for a token; or, without a gate, what
it reads from the embedding of a token and what it writes to that token's logit."""

_TINY = 1e-12


@dataclass(frozen=True)
class Vocabulary:
    """The token strings of a model and their ids.

    Attributes:
      ids: string -> id, of the tokens that have a row of the embedding.
      known: whether the tokenizer could be read. If not, the strings are made of the ids and the number of rows.
    """

    ids: Mapping[str, int]
    known: bool


def vocabulary_of(folder: Path | None, vocab_size: int) -> Vocabulary:
    """Returns the vocabulary of the tokenizer in a folder; of ids alone where none can be read."""
    try:
        if folder is None:
            raise FileNotFoundError
        found = load_tokenizer(folder).get_vocab()
    except (FileNotFoundError, ValueError, OSError):
        return Vocabulary({_row_name(i, vocab_size): i for i in range(vocab_size)}, known=False)
    return Vocabulary({string: int(i) for string, i in found.items() if 0 <= i < vocab_size}, known=True)


def ids_of(strings: Sequence[str], vocabulary: Vocabulary, vocab_size: int) -> Int[np.ndarray, " S"]:
    """Returns the id of each string, -1 where the model has none.

    Strings made of ids are those of any model with as many rows, as nothing is known of how their tokens correspond.
    """
    rows = {_row_name(i, vocab_size): i for i in range(vocab_size)} if any(s.startswith("\0") for s in strings) else {}
    return np.array([vocabulary.ids.get(string, rows.get(string, -1)) for string in strings], np.int64)


def _row_name(row: int, vocab_size: int) -> str:
    return f"\0row {row} of {vocab_size}"


def reading_names(arch: Arch) -> tuple[str, str]:
    """Returns the names of the two readings of a model's units."""
    return GATED if arch.gated else GATELESS


def not_readable(arch: Arch) -> list[str]:
    """Returns the reasons why the units of a model cannot be read in two ways; empty if they can."""
    missing = [line.partition(": ")[2] for line in needs_not_applicable("match", arch, arch)] if arch.gated else []
    problem = head_problem(arch)
    return [f"its MLPs have no gate, and {problem}"] if not arch.gated and problem else missing


def token_readings(model: ParamSource, ids: Int[np.ndarray, " S"]) -> Callable[[int], dict[str, Float[Array, "F S"]]]:
    """Returns a function of the layer that gives both readings of all its units for these tokens.

    Every token's row counts with length one. Constants over the tokens are left in; correlations do not see them.
    """
    arch, tokens = model.arch, normalised_tokens(rows_of_tokens(model, ids, with_effect=not model.arch.gated))

    def read(layer: int) -> dict[str, Float[Array, "F S"]]:
        rows = mlp_rows(model.layer(layer, mlp_row_leaves(arch)), arch)
        if arch.gated:
            return {name: _products(rows[name], tokens.read) for name in GATED}
        written = distinct_units(model, layer).outputs(rows["down"])
        return {"up": _products(rows["up"], tokens.read), "effect": _products(written, tokens.effect)}

    return read


def normalised_tokens(rows: TokenRows) -> TokenRows:
    """Returns the rows, each of length one."""
    return TokenRows(unit_length(rows.read), unit_length(rows.effect))


@jax.jit
def _products(rows: Float[Array, "F D"], tokens: Float[Array, "S D"]) -> Float[Array, "F S"]:
    return jnp.einsum("fd,sd->fs", rows, tokens, precision="highest")


def moment_names(gated: bool) -> tuple[str, str]:
    """Returns the kinds of rows of which signatures of moments are taken, of MLPs with or without a gate."""
    return ("gate", "up") if gated else ("up", "down")


def moment_numbers(gated: bool) -> int:
    """Returns M: of the images of a row under the moments of its layer the lengths, and of all with it the cosines."""
    moments = 7 if gated else 6  # without a gate there is none of its rows
    return moments + (moments + 1) * moments // 2


def has_moments(model: ParamSource) -> bool:
    """Returns whether attention is known, whose moments beside those of an MLP describe its units.

    Where the model is read by its weights alone, it is not.
    """
    return model.arch.reading is None


MomentReadings = dict[str, tuple[Float[np.ndarray, "F M"], Bool[np.ndarray, " F"]]]
"""Kind of rows -> signatures of all units of an MLP, and which of them are live."""


def moment_readings(model: ParamSource) -> Callable[[int], MomentReadings]:
    """Returns a function of the layer, or MLP, that gives for both kinds of rows the signatures of its units.

    The signature of a row w are, for the seven moments A of `layer_moments`, the logarithms of `w^T A A w`, and the
    cosines between the vectors `A w`. No rotation of the features changes them, and neither embeddings nor head enter.
    Of an expert the moments are those of its own rows and of the attention of its layer, so that a copy of a dense
    model's MLP has the signatures that it has there.
    """
    attention = _attention_of(model)

    def read(i: int) -> MomentReadings:
        units, moments = units_and_moments(model.layer(i), model.arch, distinct_units(model, i), attention(i))
        return {name: (_signatures(units.rows[name], moments), units.live) for name in moment_names(model.arch.gated)}

    return read


def _attention_of(model: ParamSource) -> Callable[[int], Moments]:
    """Returns a function of the layer, or MLP, that gives the moments of its attention; those of the last are kept."""
    source = whole_model(model)

    @functools.lru_cache(maxsize=1)
    def of_layer(layer: int) -> Moments:
        return attention_moments(source.layer(layer, HEAD_LEAVES), source.arch)

    return lambda i: of_layer(layer_of(model, i))


def _signatures(rows: Float[Array, "F D"], moments: Sequence[Float[Array, "D D"]]) -> Float[np.ndarray, "F M"]:
    images = [rows, *(jnp.einsum("fd,de->fe", rows, moment, precision="highest") for moment in moments)]
    count = len(images)
    inner = {
        (a, b): np.asarray(_inner(images[a], images[b]), np.float64) for a in range(count) for b in range(a, count)
    }
    lengths = [np.sqrt(np.maximum(inner[a, a], _TINY)) for a in range(count)]
    logs = [2 * np.log(lengths[a]) for a in range(1, count)]
    cosines = [inner[a, b] / (lengths[a] * lengths[b]) for a in range(count) for b in range(a + 1, count)]
    return np.stack([*logs, *cosines], axis=1).astype(np.float32)


@jax.jit
def _inner(one: Float[Array, "F D"], other: Float[Array, "F D"]) -> Float[Array, " F"]:
    return (one * other).sum(axis=1)
