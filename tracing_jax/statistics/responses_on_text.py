"""Whether the units of two layers that agree on embeddings of tokens agree on a text as well.

Tests that give every MLP the embeddings to read take them for what its layer reads. But an independent model can have
another's embeddings on features that its first layer removes, and the other's rows there: on embeddings its units then
agree with the other's, one by one, and on a text they do what they did before. So units are matched once more by what
their gates, and their up projections, read of some of the text of this package, known from the passes in which units
that do nothing are found. These matchings are made anew: those of gate and up projection of an independent model do not
agree, whichever of its units the other's rows were given to.

Letters: N blocks, P positions, F units, S paired positions.
"""

from collections.abc import Iterable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tracing_jax.data import PairedBlocks
from tracing_jax.sources import ParamSource, whole_model
from tracing_jax.statistics.agreement import matchings, some_units
from tracing_jax.statistics.calibration import BY_CONVERGENCE, DEFAULT_ALLOWANCE, null_of
from tracing_jax.statistics.comparison import LN10, Comparison, against_each_other
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.statistic import Pair
from tracing_jax.statistics.token_directions import inputs_on_text
from tracing_jax.tree import taken, to_host

_NOT_ON_TEXT = (
    "units that agree on embeddings of tokens are not found to agree on a text, and embeddings that a first layer "
    "removes can be another model's"
)

_MOST_UNITS = 512
"""Of a layer of base, matched to all of ft's."""

_FEWEST_POSITIONS = 16
_ASKED_BELOW = -2.0 * LN10
"""Natural log p-values of a layer by embeddings, and by the text, below which units agree."""


def asked_on_text(found: Comparison, pair: Pair, layers: tuple[int, int]) -> Comparison:
    """Returns the comparison of two layers on embeddings, with whether their units agree on a text as well.

    It is asked where a p-value is small. They count as agreeing where it cannot be asked: of models that are read by
    their weights alone, of which the verdict says so, of mixtures, or where the caller gave no text. Without a gate
    there is nothing to ask: what units write takes the place of a second thing that they read, and nothing that a
    layer removes.

    Args:
      found: the comparison.
      pair: the models, with the blocks that both read.
      layers: of base and of ft.
    """
    if pair.of_mixture or pair.aligned or not pair.base.arch.gated:
        return found
    if min(found.log_p_agreement, found.log_p_rank) > _ASKED_BELOW:
        return found
    return replace(found, agrees_on_text=_agree(pair, layers))


def reservations(compared: Iterable[Comparison]) -> str:
    """Returns how else than by descent the p-values of layers compared by embeddings can be as small as they are."""
    return BY_CONVERGENCE if all(found.agrees_on_text for found in compared) else _NOT_ON_TEXT


def _agree(pair: Pair, layers: tuple[int, int]) -> bool:
    blocks = pair.vocabularies.text_blocks
    models = pair.base, pair.ft
    if blocks is None:
        return not pair.vocabularies.unread or any(whole_model(model).arch.reading is not None for model in models)
    inputs = [inputs_on_text(model, layer) for model, layer in zip(models, layers)]
    if inputs[0] is None or inputs[1] is None:
        return True
    read = _paired(inputs[0], inputs[1], blocks)
    if len(read[0]) < _FEWEST_POSITIONS:
        return False
    units = [distinct_units(model, layer).kept for model, layer in zip(models, layers)]
    units[0] = units[0][some_units(len(units[0]), _MOST_UNITS, pair, "responses on a text", layers[0])]
    similarities = {}
    for name in ("gate_proj", "up_proj"):
        ours, theirs = (_responses(*side, name) for side in zip(models, layers, read, units))
        similarities[name] = ours.T @ theirs
    places = np.arange(len(units[0])), np.arange(len(units[1]))
    found = matchings(similarities, pair, ("responses on a text", *layers), places, absolute=("up_proj",))
    on_text = against_each_other(found["gate_proj"], found["up_proj"])
    null = null_of([], [DEFAULT_ALLOWANCE], "")
    return null.is_firm(0, on_text.agreeing / max(1, on_text.units)) and (
        null.log_p_agreement(0, on_text) < _ASKED_BELOW
    )


def _paired(
    ours: Float[np.ndarray, "N P D"], theirs: Float[np.ndarray, "N P D2"], blocks: PairedBlocks
) -> tuple[Float[np.ndarray, "S D"], Float[np.ndarray, "S D2"]]:
    """Returns what both read at the paired positions that are among the last P of each block."""
    first = blocks.base.shape[1] - ours.shape[1], blocks.ft.shape[1] - theirs.shape[1]
    at = blocks.at_base - first[0], blocks.at_ft - first[1]
    block, place = np.nonzero(blocks.valid & (at[0] >= 0) & (at[1] >= 0))
    return ours[block, at[0][block, place]], theirs[block, at[1][block, place]]


def _responses(
    model: ParamSource, layer: int, read: Float[np.ndarray, "S D"], units: Int[np.ndarray, " n"], name: str
) -> Float[np.ndarray, "S n"]:
    """Returns what these units read at each position, centred and of length one; zeros for those that never vary."""
    kernel = model.layer(layer, (f"mlp/{name}/kernel",))["mlp"][name]["kernel"]
    values = read.astype(np.float32) @ to_host(jnp.asarray(taken(kernel, units, axis=1), jnp.float32))
    values -= values.mean(axis=0)
    lengths = np.linalg.norm(values, axis=0)
    return np.divide(values, lengths, out=np.zeros_like(values), where=np.isfinite(lengths) & (lengths > 0))
