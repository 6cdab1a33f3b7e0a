"""`heads_in_place`: are the attention heads in place? Matched by descriptors, which are invariant under rotations."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.matching import assign, match_units
from tracing_jax.progress import tqdm
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.comparison import LN10, bonferroni_log10, reserved
from tracing_jax.statistics.head_descriptors import (
    FactoredMoments,
    descriptor_cosines,
    head_descriptors,
    log_p_of_order,
    moments_of_layers,
)
from tracing_jax.statistics.head_kernels import gates_not_applicable, inactive_attention, inactive_heads
from tracing_jax.statistics.in_place import BY_ORDER, OUTSTANDING, layers_in_common, order_premises
from tracing_jax.statistics.match_moments import spread_layers
from tracing_jax.statistics.nulls import composite_agreement_log_sf, total_agreement_log_sf
from tracing_jax.statistics.repeated_layers import repetition_notes, without_repeats
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies
from tracing_jax.statistics.unwritten_features import with_unwritten_features

_SINGULAR_VALUES = 16
_LEAVES = ("attn", "attn_norm")
_MOMENTS_OF = 4  # the most layers, evenly spread, whose MLPs the descriptors refer to
_MOMENT_ROWS = 128  # the most MLP units, and shared tokens, that they refer to
_ORDERED_BELOW = 0.01
_ORDERED = (
    "in both models the order of the heads follows their weights, as if a tool had sorted them, so that heads of "
    "independent models could be in place as well"
)


_LABEL = "attention heads that stay in place (kv heads, and queries inside them), share"


@dataclass(frozen=True)
class _LayerPair:
    """Matchings at one place: of a layer's kv heads, or of the queries inside each kv head.

    Attributes:
      name: such as `layer 3, kv heads`.
      agreeing: heads that are matched to themselves, in all matchings together.
      sizes: the number of heads of each matching.
      matched: of every matched pair of heads its similarity, the greatest of the first with any other head, and 1 if
        it is one of a head with itself, else 0.
    """

    name: str
    agreeing: int
    sizes: Sequence[int]
    matched: Float[np.ndarray, "n 3"]


class HeadsInPlace(options.HeadsInPlace):
    """Constrained test on the attention heads; exact if either model was trained independently of the other.

    Query heads have descriptors that rotations of the residual stream, maps inside a head, gains, and anything done to
    the order of MLP units leave unchanged (`head_descriptors.py`). In each layer kv heads are matched with their
    queries, and the queries inside each kv head of equal index. Under the null all these matchings are independent and
    uniform, since in each layer by itself kv heads may be permuted, and the queries inside each. So the number of heads
    that stay in place has a known distribution, that of a sum over independent random permutations.

    The order of heads must not follow from the weights in both models; where it does, there is no p-value. With few
    heads the smallest possible p-value is not small; the notes state it. A 7B pair takes about two minutes on
    two cores.

    Source: ours; the exact null is that of Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why heads have no counterparts, or no order; empty if they have."""
        shapes = [(arch.num_kv_heads, arch.q_group) for arch in (base, ft)]
        if shapes[0] != shapes[1]:
            kv, queries = zip(*shapes)
            return [
                f"different heads ({kv[0]} and {kv[1]} kv heads, {queries[0]} and {queries[1]} queries for each): they "
                "have no counterparts"
            ]
        lines = ["a single head in each layer is always in place"] if shapes[0] == (1, 1) else []
        if base.alibi_slopes and ft.alibi_slopes:
            lines.append(
                "the slopes of ALiBi, the same in independent models, tell heads apart: none can change places"
            )
        return lines + gates_not_applicable(base, ft)

    def compute(self, pair: Pair) -> Result:
        """Returns the result of `_computed`, reserved where rows lie in directions that nothing writes."""
        return with_unwritten_features(self._computed(pair), pair)

    def _computed(self, pair: Pair) -> Result:
        """Returns the p-value of the number of heads in place; no forward pass."""
        every = _layers(pair)
        layers = without_repeats(pair.base, pair.ft, every)
        if not layers:
            return Result(None, _LABEL, p_reason="in no layer of equal index does the attention of both do something")
        run_cache = pair.run_cache.scope("heads_in_place")
        base, ft = (self._descriptors(pair, side, layers, run_cache) for side in ("base", "ft"))
        cosines = zip(layers, descriptor_cosines(base, ft))
        places = [place for i, found in cosines for place in _places(_between_active(found, i, pair), i, pair)]
        in_order = [log_p_of_order(side) < math.log(_ORDERED_BELOW) for side in (base, ft)]
        ordered = all(in_order)
        test = replace(_test(places), decides=not ordered)
        assert test.log10_p is not None
        test = replace(test, firm_log10_p=max(test.log10_p, _outstanding_log10_p(places)))
        agreeing, heads = (sum(test.values[name]) for name in ("agreeing", "units"))
        return Result(
            headline=agreeing / heads,
            label=_LABEL,
            log10_p=bonferroni_log10([test]),
            p_reason=_ORDERED if ordered else None,
            tests=(test,),
            notes=[*_notes(pair, places), *repetition_notes(every, layers)],
            premises=order_premises(in_order, "heads", "the entries of their descriptors"),
            effect=f"{agreeing} of {heads} heads are in place; by chance about {_by_chance(places)} are",
            **reserved([test], BY_ORDER),
        ).for_pair(pair)

    def _descriptors(
        self, pair: Pair, side: str, layers: Sequence[int], run_cache: RunCache
    ) -> list[Float[np.ndarray, "K G F"]]:
        """Returns the descriptors of these layers; what an interrupted run finished is kept."""
        model = pair.base if side == "base" else pair.ft
        count = min(_SINGULAR_VALUES, pair.base.arch.head_dim, pair.ft.arch.head_dim)
        moments = functools.cache(lambda: self._moments(pair, model, layers))

        def make(i: int) -> dict[str, np.ndarray]:
            return {"descriptors": head_descriptors(model.layer(i, _LEAVES), model.arch, moments(), count)}

        bar = tqdm(layers, desc=f"heads_in_place, {side}", unit="layer", disable=None)
        return [run_cache.cached_arrays((side, i), functools.partial(make, i))["descriptors"] for i in bar]

    def _moments(self, pair: Pair, model: ParamSource, layers: Sequence[int]) -> FactoredMoments:
        shared = pair.vocabularies.ids_base if model is pair.base else pair.vocabularies.ids_ft
        drawn = np.sort(pair.vocabularies.drawn(pair.generator("heads_in_place", "tokens"), _MOMENT_ROWS))
        return moments_of_layers(
            model, [layers[i] for i in spread_layers(len(layers), _MOMENTS_OF)], shared[drawn], _MOMENT_ROWS
        )


def _layers(pair: Pair) -> list[int]:
    """Returns the layers that both models have and in which some heads of both do something."""
    inactive = {*inactive_attention(pair.base), *inactive_attention(pair.ft)}
    archs = (pair.base.arch, pair.ft.arch)
    return [
        i
        for i in range(layers_in_common(pair))
        if i not in inactive
        and all(arch.has_attention(i) for arch in archs)
        and not any(inactive_heads(model, i).all() for model in (pair.base, pair.ft))
    ]


def _between_active(cosines: Float[np.ndarray, "K G K G"], layer: int, pair: Pair) -> Float[np.ndarray, "K G K G"]:
    """Returns the cosines of heads that do something; 0 for others, which are matched by lot.

    Which heads these are follows from each model by itself, so that matchings stay uniform under the null.
    """
    base, ft = (~inactive_heads(model, layer) for model in (pair.base, pair.ft))
    return np.where(base[:, :, None, None] & ft, cosines, 0.0)


def _places(cosines: Float[np.ndarray, "K G K G"], layer: int, pair: Pair) -> Iterator[_LayerPair]:
    """Yields how many kv heads of a layer are matched to themselves, and how many queries inside them."""
    K, G = cosines.shape[:2]
    if K > 1:
        values = np.array([[_best(cosines[k, :, j]) for j in range(K)] for k in range(K)])
        matched = _matched(values, pair, layer, "kv heads")
        yield _LayerPair(f"layer {layer}, kv heads", int(matched[:, 2].sum()), [K], matched)
    if G > 1:
        matched = np.concatenate([_matched(cosines[k, :, k], pair, layer, k) for k in range(K)])
        yield _LayerPair(f"layer {layer}, queries", int(matched[:, 2].sum()), [G] * K, matched)


def _best(similarity: Float[np.ndarray, "G G"]) -> float:
    """Returns the value of the best assignment of the queries of one kv head to those of another."""
    return float(similarity[np.arange(len(similarity)), assign(similarity)].sum())


def _matched(similarity: Float[np.ndarray, "n n"], pair: Pair, *names: str | int) -> Float[np.ndarray, "n 3"]:
    """Returns the pairs of matched heads, as `_LayerPair.matched`; all take part, those without a descriptor by lot."""
    everyone = np.arange(len(similarity))
    matching = match_units(similarity, pair.generator("heads_in_place", *names), (everyone, everyone))
    base, ft = matching.base, matching.ft
    own, others = similarity[base, ft], similarity[base].astype(np.float64)
    others[np.arange(len(base)), ft] = -np.inf
    return np.stack([own, others.max(axis=1), base == ft], axis=1)


def _outstanding_log10_p(places: Sequence[_LayerPair]) -> float:
    """Returns the p-value of the heads in place that are more similar than an order chosen afterwards makes them.

    As `placed_beyond_order`, for kv heads and queries apart: their similarities have different scales.
    """
    sampled = outstanding = 0
    for kind in ("kv heads", "queries"):
        rows = [place.matched for place in places if place.name.endswith(kind)]
        if rows:
            own, others, same = np.concatenate(rows).T
            sampled += len(own)
            outstanding += int(((same > 0) & (own > np.quantile(others, 0.99))).sum())
    return composite_agreement_log_sf(outstanding, sampled, OUTSTANDING, 1.0) / LN10


def _test(places: Sequence[_LayerPair]) -> Test:
    sizes = [size for place in places for size in place.sizes]
    log_p = total_agreement_log_sf(sum(place.agreeing for place in places), sizes)
    return Test(
        "agreement",
        log_p / LN10,
        "the total over all places, by its exact distribution",
        [place.name for place in places],
        [total_agreement_log_sf(place.agreeing, place.sizes) / LN10 for place in places],
        {"units": [sum(place.sizes) for place in places], "agreeing": [place.agreeing for place in places]},
    )


def _by_chance(places: Sequence[_LayerPair]) -> int:
    """Returns how many heads are in place on average under the null: one in each matching, of any size."""
    return sum(len(place.sizes) for place in places)


def _notes(pair: Pair, places: Sequence[_LayerPair]) -> list[str]:
    sizes = [size for place in places for size in place.sizes]
    least = -sum(math.lgamma(size + 1) for size in sizes) / LN10
    notes = [f"p is at least 10^{least:.1f}: that of {sum(sizes)} heads in place in {len(sizes)} matchings"]
    depths = [model.arch.num_layers for model in (pair.base, pair.ft)]
    if depths[0] != depths[1]:
        notes.append(f"{depths[0]} and {depths[1]} layers: the first {min(depths)} are compared")
    return notes
