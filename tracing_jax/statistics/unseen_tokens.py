"""`unseen_tokens`: do embedding rows that training never reached stay in place, under a map learnt from other rows?

Every vocabulary has tokens that no text holds (`data.unseen_tokens`). Training leaves their rows as they were drawn,
but for weight decay and, in a head, a push that is common to all. So the rows of an independent model are
exchangeable, whereas a descendant has those of its base, however long it was trained.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.matching import match_units, normalised_rows
from tracing_jax.statistics.comparison import (
    Comparison,
    against_identity,
    bonferroni_log10,
    by_agreement,
    reserved,
    share_agreeing,
)
from tracing_jax.statistics.embedding_maps import TokenMatrix, feature_map, token_matrices, token_rows
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies

_TOKENS = 16384
"""The most shared tokens that the map of the features is learnt from."""

MOST_ROWS = 4096
"""The most rows of a group that are matched: a small tokenizer in a large embedding leaves tens of thousands."""

_TYPICAL = 2.0
"""Rows whose length is farther than this factor from the median of their group are left out: they may be trained."""

_MEANING = (
    "this is evidence on the embedding (and an untied head) alone: its initial rows are base's, by descent or by the "
    "same seed or initialisation"
)
_PLANTED = (
    "no text reads these rows, so that they can be copied into an independent model without changing what it does"
)


class UnseenTokens(options.UnseenTokens):
    """Constrained test on the embedding rows of unseen tokens; exact if either model was trained independently.

    A map of the features (orthogonal, or least squares where widths differ) is learnt from the rows of ordinary shared
    tokens. Unseen rows, centred in each group of them, are mapped, matched by cosine, and the matching is compared with
    the identity. Rows that repeat, or whose length is an outlier, are left out. Permutations and rotations of the
    residual stream change nothing, nor does anything that is done to the body of a model. Embedding and untied head,
    and groups of tokens, are tested apart and combined by Bonferroni: an untied head may have been a copy of the
    embedding once, and then the two are not independent.

    An adversary who has base can copy these rows into an independent model, whose function they do not touch: the
    p-value is reserved, and does not make a pair related by itself.

    Exact since the map uses other rows alone, so that permuting the unseen rows of one model permutes the matching.
    A group of n rows has a p-value of 1 / n! at least. A model that shares base's initialisation is related in this
    sense, whatever text it was trained on; a shuffled copy of base's own seed is no exception.

    Source: ours. Which tokens of public models are never trained: Land and Bartolo 2024 (arXiv 2405.05417).
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why there are no rows to compare, or to learn a map from; empty if there are."""
        if not vocabularies.known:
            return ["the tokenizer of a model is not known, and with it which tokens no text holds"]
        lines = []
        if max((len(ids) for ids, _ in vocabularies.unseen.values()), default=0) < 2:
            lines.append("the vocabularies share no two tokens that no text holds")
        if len(_ordinary(vocabularies)[0]) < 2:
            lines.append("the vocabularies share no ordinary tokens to learn a map from")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the p-values by part and group, by agreement, with rank correlation beside it; no forward pass."""
        found = dict(self._comparisons(pair))
        places, comparisons = list(found), list(found.values())
        made = by_agreement(comparisons, places, bonferroni, "Holm's minimum") if found else ()
        tests = [replace(test, firm_log10_p=0.0) for test in made]
        return Result(
            headline=share_agreeing(comparisons) if found else None,
            label="embedding ancestry: rows of unseen tokens that stay in place, share",
            log10_p=bonferroni_log10(tests),
            p_reason=None if found else "no group of unseen tokens has two rows that can be distinguished",
            tests=tests,
            notes=[*_notes(pair, found), _MEANING],
            effect=_effect(comparisons),
            **reserved(tests, _PLANTED),
        ).for_pair(pair)

    def _comparisons(self, pair: Pair) -> Iterator[tuple[str, Comparison]]:
        """Yields (place, comparison) for every part and group with two rows at least."""
        for part in token_matrices(pair.base.arch, pair.ft.arch):
            mapped = self._mapping(pair, part)
            for group in pair.vocabularies.unseen:
                make = functools.partial(_compare, mapped, part, group, pair)
                comparison = pair.run_cache.cached(Comparison, ("unseen_tokens", part, group), make)
                if comparison.units >= 2:
                    yield f"{part}, {group}", comparison

    def _mapping(self, pair: Pair, part: TokenMatrix) -> "_Mapping":
        """Returns the function that gives the rows of both models in the same features; the map is learnt at need."""
        ordinary = _ordinary(pair.vocabularies)
        drawn = np.sort(pair.generator("unseen_tokens", "tokens").permutation(len(ordinary[0]))[:_TOKENS])
        base_is_wide = pair.base.arch.embed_dim >= pair.ft.arch.embed_dim

        @functools.cache
        def matrix() -> Float[np.ndarray, "D D2"]:
            base, ft = (token_rows(m, part, ids[drawn]) for m, ids in zip((pair.base, pair.ft), ordinary))
            return feature_map(base, ft) if base_is_wide else feature_map(ft, base)

        def mapped(
            base: Float[np.ndarray, "n D"], ft: Float[np.ndarray, "n D2"]
        ) -> tuple[Float[np.ndarray, "n D3"], Float[np.ndarray, "n D3"]]:
            return (base @ matrix(), ft) if base_is_wide else (base, ft @ matrix())

        return mapped


_Mapping = Callable[
    [Float[np.ndarray, "n D"], Float[np.ndarray, "n D2"]], tuple[Float[np.ndarray, "n D3"], Float[np.ndarray, "n D3"]]
]


def _compare(mapped: _Mapping, part: TokenMatrix, group: str, pair: Pair) -> Comparison:
    """Returns the comparison with the identity of the matching of one group's rows, of those that count in both models.

    Exact if the rows that count in one model are exchangeable among themselves: which these are decides, in both models
    alike, where their matching is compared, and not how it comes out.
    """
    sides = pair.vocabularies.unseen[group]
    drawn = np.sort(pair.generator("unseen_tokens", "drawn", group).permutation(len(sides[0]))[:MOST_ROWS])
    base, ft = (token_rows(model, part, ids[drawn]) for model, ids in zip((pair.base, pair.ft), sides))
    compared = _as_initialised(base) & _as_initialised(ft)
    if compared.sum() < 2:
        return Comparison(int(compared.sum()), len(compared), 0.0, 0, 0.0, 0.0)
    base, ft = (normalised_rows(x) for x in mapped(*(x[compared] - x[compared].mean(axis=0) for x in (base, ft))))
    matching = match_units(base @ ft.T, pair.generator("unseen_tokens", part, group))
    return against_identity(matching, len(base), len(ft))


def _effect(comparisons: Sequence[Comparison]) -> str:
    units, agreeing = sum(c.units for c in comparisons), sum(c.agreeing for c in comparisons)
    return f"{agreeing} of {units} rows of unseen tokens are in place; of independent models about one in each group is"


def _as_initialised(rows: Float[np.ndarray, "n D"]) -> Bool[np.ndarray, " n"]:
    """Returns which rows are as an initialisation leaves them: unlike any other row, and of typical length."""
    _, where, times = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    single = times[where.ravel()] == 1
    if not single.any():
        return single
    length = np.linalg.norm(rows - np.median(rows[single], axis=0), axis=1)
    typical = np.median(length[single])
    return single & (length <= _TYPICAL * typical) & (length >= typical / _TYPICAL)


def _ordinary(vocabularies: Vocabularies) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """Returns the ids of shared tokens that are not among the unseen ones."""
    unseen = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in vocabularies.unseen.values())])
    kept = ~np.isin(vocabularies.ids_base, unseen)
    return vocabularies.ids_base[kept], vocabularies.ids_ft[kept]


def _notes(pair: Pair, found: dict[str, Comparison]) -> Iterator[str]:
    """Yields for each place how many rows there are, and the smallest p-value that so many can give."""
    for place, comparison in found.items():
        group = place.split(", ")[1]
        num = len(pair.vocabularies.unseen[group][0])
        least = -math.lgamma(comparison.units + 1) / math.log(10)
        drawn = f"{MOST_ROWS} drawn from {num}" if num > MOST_ROWS else str(num)
        left_out = f" of {drawn}, the others repeat or are outliers" if comparison.units < min(num, MOST_ROWS) else ""
        yield f"{place}: {comparison.units} rows{left_out}; p is at least 10^{least:.1f}"
