"""A first look at many signatures: which of them show any sign of agreement with a suspect, by a part of their units.

Units are looked for by the first of two readings among all units of a layer. By the second reading only the unit that
was found is looked up: whether it is closer than all of a thousand others. Chance passes one unit in a thousand so.
Where enough of a few units pass, all are looked for. Heads are few, so that both forms look among all of a layer.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from tracing_jax.library.comparison import FEW_TOKENS, head_groups, normalised, shared_columns, shared_head_tokens
from tracing_jax.library.heads import HEAD_FORMS, HeadForms, SampledHeads, forms_on
from tracing_jax.library.signature import Signature, stored_moments
from tracing_jax.library.suspect import Suspect
from tracing_jax.progress import tqdm
from tracing_jax.statistics.calibration import DEFAULT_ALLOWANCE, MARGIN
from tracing_jax.statistics.head_null import best_layers_log_sf
from tracing_jax.statistics.unit_descriptors import whitened

COMPARED_AT_ONCE, FILLED_UP_TO = 48, 12
"""Of libraries up to the first size all signatures are compared in full; of larger ones, at least the second number."""

_FIRST_UNITS, _FIRST_TOKENS, _FIRST_AGREEING = 16, 128, 2
"""Of each layer, so many units are matched at so many tokens; so many of them must agree in some layer."""
_SECOND_SHARE = MARGIN * DEFAULT_ALLOWANCE / 2
"""The share of all units of a layer that must agree then: half of what can call two models related."""
_OTHERS = 1024  # units that the one found is compared with by the second reading
_MOST_ROWS = 1024  # rows of signatures whose correlations with a layer are in memory at once
_HEADS_BELOW = 0.01  # p-value of the heads of a signature, of which that share is compared in full by chance
_ROUNDING = 1e-5  # of one correlation computed in two ways

Rows = tuple[Float[np.ndarray, "_ S"], ...]
"""Both readings of as many units, each row of length 1."""
Counts = list[tuple[int, int]]
"""For each sampled layer, how many units or heads agree with the layer of the suspect where most do, of how many."""


def shortlist(signatures: Mapping[str, Signature], suspect: Suspect) -> list[str]:
    """Returns the names of the signatures that are compared in full.

    All, if they are few. Of many, those of which two of 16 units of a layer agree with some layer and then a share of
    all its units, by responses or by moments; or more heads than chance is likely to give; those that have neither look
    at units; and the best of the others, up to `FILLED_UP_TO`.
    """
    if len(signatures) <= COMPARED_AT_ONCE:
        return list(signatures)
    chosen = first_look_at_heads(signatures, suspect)
    scores: dict[str, tuple[float, int]] = {}
    for look in (look_at_responses, look_at_moments):
        first = {name: max(most for most, _ in counts) for name, counts in look(signatures, suspect).items()}
        likely = {name: signatures[name] for name, most in first.items() if most >= _FIRST_AGREEING}
        second = {
            name: max(most / max(1, size) for most, size in counts)
            for name, counts in look(likely, suspect, every=True).items()
        }
        chosen |= {name for name, share in second.items() if share >= _SECOND_SHARE}
        for name, most in first.items():
            scores[name] = max(scores.get(name, (0.0, 0)), (second.get(name, 0.0), most))
    chosen |= signatures.keys() - scores.keys()
    for name in sorted(scores, key=lambda name: (-scores[name][0], -scores[name][1], name)):
        if len(chosen) >= FILLED_UP_TO:
            break
        chosen.add(name)
    return [name for name in signatures if name in chosen]


def look_at_responses(signatures: Mapping[str, Signature], suspect: Suspect, every: bool = False) -> dict[str, Counts]:
    """Returns for each signature that shares tokens how many units agree by both readings, in each sampled layer.

    Signatures with the same shared tokens are compared together, layer by layer of the suspect.

    Args:
      signatures: name -> signature.
      suspect: the model.
      every: all sampled units at all shared tokens, in place of a few.
    """
    units, tokens = (None, None) if every else (_FIRST_UNITS, _FIRST_TOKENS)
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, signature in signatures.items():
        ours, theirs = shared_columns(signature, suspect)
        if signature.kinds == suspect.kinds and len(ours) >= FEW_TOKENS:
            key = tuple(ours[:tokens]), tuple(theirs[:tokens])
            groups.setdefault(key, []).append(name)
    one, other = suspect.kinds
    found: dict[str, Counts] = {}
    for (own_columns, their_columns), names in groups.items():
        layers = [(name, layer) for name in names for layer in signatures[name].layers]
        parts = ([layer.readings[kind][:units, own_columns] for _, layer in layers] for kind in (one, other))
        rows = tuple(normalised(np.concatenate(part)) for part in parts)
        agreeing = (
            _agreeing(rows, tuple(normalised(layer[kind][:, their_columns]) for kind in (one, other)), one == "gate")
            for layer in tqdm(suspect.layers, desc="first look", unit="layer", disable=None)
            if len(layer[one])  # not an inserted layer that does nothing
        )
        found |= _most_agreeing([(name, len(layer.units[:units])) for name, layer in layers], agreeing)
    return found


def look_at_moments(signatures: Mapping[str, Signature], suspect: Suspect, every: bool = False) -> dict[str, Counts]:
    """Returns for each signature with moments how many units agree by those of both kinds of rows, in each layer.

    The suspect's covariances alone whiten the moments of all signatures together; those of a relative are alike.

    Args:
      signatures: name -> signature.
      suspect: the model.
      every: all sampled units, in place of a few.
    """
    units = None if every else _FIRST_UNITS
    layers = [
        (name, layer)
        for name, signature in signatures.items()
        if signature.kinds == suspect.kinds
        for layer in signature.layers
        if layer.moments
    ]
    if not layers or not suspect.moments:
        return {}
    kinds = tuple(layers[0][1].moments)
    stored = [{kind: stored_moments(layer, kind)[:units] for kind in kinds} for _, layer in layers]
    rows = {kind: np.concatenate([of_layer[kind] for of_layer in stored]) for kind in kinds}
    agreeing = (
        _agreeing(
            tuple(_whitened(rows[kind], theirs[kind][1]) for kind in kinds),
            tuple(_whitened(*theirs[kind]) for kind in kinds),
            True,
            True,
        )
        for theirs in suspect.moments.values()
        if len(theirs[kinds[0]][0])
    )
    return _most_agreeing([(name, len(own[kinds[0]])) for (name, _), own in zip(layers, stored, strict=True)], agreeing)


def first_look_at_heads(signatures: Mapping[str, Signature], suspect: Suspect) -> set[str]:
    """Returns the names of the signatures of which more heads agree by both forms than chance is likely to give."""
    groups: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, signature in signatures.items():
        ours, theirs = shared_head_tokens(signature, suspect)
        if signature.heads and suspect.heads and len(ours) >= FEW_TOKENS:
            size = signature.heads[0].forms[HEAD_FORMS[0]].shape[1]
            groups.setdefault((size, tuple(ours), tuple(theirs)), []).append(name)
    found = set()
    for (_, own_columns, their_columns), names in groups.items():
        best = _best_layers([(name, heads) for name in names for heads in signatures[name].heads], suspect,
                            own_columns, their_columns)  # fmt: skip
        for name, counts in best.items():
            shape, heads = head_groups(signatures[name], suspect), tuple(size for _, size in counts)
            log_p = _log_p_of_heads(sum(most for most, _ in counts), heads, *shape, len(suspect.heads))
            if log_p < math.log(_HEADS_BELOW):
                found.add(name)
    return found


@functools.lru_cache(maxsize=4096)
def _log_p_of_heads(agreeing: int, heads: tuple[int, ...], groups: int, queries: int, choices: int) -> float:
    """Returns the natural log p-value of so many agreeing heads in all; models of one shape ask the same again."""
    counts = [agreeing] + [0] * (len(heads) - 1)
    return best_layers_log_sf(counts, heads, groups, queries, DEFAULT_ALLOWANCE, 1.0, choices)


def _best_layers(
    layers: Sequence[tuple[str, SampledHeads]],
    suspect: Suspect,
    own_columns: Sequence[int],
    their_columns: Sequence[int],
) -> dict[str, Counts]:
    """Returns name -> for each sampled layer the most heads that agree with a layer of the suspect, of how many."""
    rows = [forms_on(np.concatenate([heads.forms[form] for _, heads in layers]), own_columns) for form in HEAD_FORMS]

    def agreeing(layer: HeadForms) -> Bool[np.ndarray, " _"]:
        one, other = (
            _closest(own, forms_on(layer[form], their_columns)) for own, form in zip(rows, HEAD_FORMS, strict=True)
        )
        return one == other

    sizes = [(name, len(heads.heads)) for name, heads in layers]
    return _most_agreeing(sizes, map(agreeing, suspect.heads.values()))


def _closest(rows: Float[np.ndarray, "N S"], layer: Float[np.ndarray, "H S"]) -> Int[np.ndarray, " N"]:
    """Returns for each row the index of the closest of a layer's."""
    return np.concatenate(
        [(rows[at : at + _MOST_ROWS] @ layer.T).argmax(axis=1) for at in range(0, len(rows), _MOST_ROWS)]
    )


def _whitened(rows: Float[np.ndarray, "N M"], covariance: Float[np.ndarray, "M M"]) -> Float[np.ndarray, "N M"]:
    return whitened(rows, covariance).astype(np.float32)


def _agreeing(rows: Rows, layer: Rows, signed: bool, second_signed: bool = False) -> Bool[np.ndarray, " N"]:
    """Returns for each unit whether the layer's closest one by the first reading is close by the second too.

    Args:
      rows: of the units.
      layer: of all units of a layer.
      signed: whether units correspond by correlations in the first reading, else by their absolute values.
      second_signed: the same of the second.
    """
    found = []
    others = layer[1][:: max(1, -(-len(layer[1]) // _OTHERS))]
    memory = np.empty((min(_MOST_ROWS, len(rows[0])), len(layer[0])), np.float32)
    for start in range(0, len(rows[0]), _MOST_ROWS):
        one, other = (part[start : start + _MOST_ROWS] for part in rows)
        # Into memory that is there: pages of new memory cost more than the product.
        similar = np.matmul(one, layer[0].T, out=memory[: len(one)])
        closest = _size(similar, signed).argmax(axis=1)
        own = _size(np.einsum("ns,ns->n", other, layer[1][closest]), second_signed)
        found.append(own >= _size(other @ others.T, second_signed).max(axis=1) - _ROUNDING)
    return np.concatenate(found)


def _size(found: np.ndarray, signed: bool) -> np.ndarray:
    return found if signed else np.abs(found, out=found)


def _most_agreeing(layers: Sequence[tuple[str, int]], agreeing: Iterable[Bool[np.ndarray, " N"]]) -> dict[str, Counts]:
    """Returns the most units of each sampled layer that agree with a layer of the suspect.

    Args:
      layers: the name of the signature of each sampled layer, and its number of units.
      agreeing: for each layer of the suspect, which of all these units agree.
    """
    ends = np.cumsum([size for _, size in layers])
    best = np.zeros(len(layers), int)
    for found in agreeing:
        sums = np.append(0, np.cumsum(found))
        best = np.maximum(best, sums[ends] - sums[ends - [size for _, size in layers]])
    counts: dict[str, Counts] = {}
    for (name, size), most in zip(layers, best.tolist(), strict=True):
        counts.setdefault(name, []).append((most, size))
    return counts
