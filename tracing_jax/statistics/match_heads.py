"""`match_heads`: do the matchings of query heads, by how they attend to tokens and by what they write, agree?"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.progress import tqdm
from tracing_jax.statistics.agreement import PairAgreements, agreements, nulls_of
from tracing_jax.statistics.calibration import (
    BY_CONVERGENCE,
    DEFAULT_ALLOWANCE,
    DEFAULT_SOURCE,
    FEW_PAIRS,
    MARGIN,
    WIDE_LAMBDA,
    Null,
    control_pairs,
    null_of,
)
from tracing_jax.statistics.comparison import (
    LN10,
    Comparison,
    all_reserved,
    bonferroni_log10,
    one_test,
    reserved,
    share_agreeing,
    share_by_layer,
)
from tracing_jax.statistics.head_kernels import gates_not_applicable
from tracing_jax.statistics.head_matrices import HeadMatrices, head_matrices, without_repeats
from tracing_jax.statistics.head_null import best_ordered_map, heads_log_sf, ordered_maps_log_sf
from tracing_jax.statistics.mlp_rows import centred_directions
from tracing_jax.statistics.shared_tokens import TokenRows, shared_token_rows, tokens_not_applicable, with_doubts
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies

_PAIRS = [("attention", "output")]
_NAME = "attention and output"
_SUM = "agreement summed over layers"
_SUM_OF_BEST = "agreement summed over the best map of the layers, Bonferroni over maps"
_TOKENS = 192  # at most; time grows with their square
_MOST_CONTROLS = 256


@dataclass(frozen=True)
class MatchHeads(options.MatchHeads):
    """Unconstrained test on attention: do the matchings of heads by their QK and by their OV products agree?

    A query head has two matrices on shared tokens: `A = E W_Q^T W_K E^T`, how each token attends to each other at one
    position, and `B = W_U W_O W_V E^T`, what it then writes to the head of the model. E are the input embeddings, W_U
    the rows of the head with the gain of the final norm, both centred over the tokens and of length one; query, key and
    value have the gain of the norm before them. The heads of layers of equal index are matched by A and apart by B, and
    agreement is summed over all layers.

    The null is calibrated as in `calibration.py`; its chance part is the agreement of random matchings that keep the
    queries of a kv head together, which is more variable than that of free ones (`head_null`). The number of heads
    bounds how small the p-value can be.

    Of models of unequal depth each layer of the shallower is compared with one of the deeper, in order: the map is the
    one on which most heads agree, and the p-value is after Bonferroni over all such maps. A pair whose p-value could
    not fall below the level is refused.

    Unchanged under every rewrite of the residual stream, permutations of kv heads and of the queries of one, mixing of
    values, and maps of queries and keys that commute with RoPE. MLPs do not enter. Costs less than reading the weights.

    Attributes:
      level: of the verdict; the allowance that control models give is a bound for it.

    Source: ours. The products are the QK and OV circuits of Elhage et al. 2021, A Mathematical Framework for
    Transformer Circuits.
    """

    level: float = options.RunOptions.level

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why heads of layers of equal index cannot be matched; empty if they can."""
        lines = tokens_not_applicable(base, ft, vocabularies)
        for side, arch in (("base", base), ("ft", ft)):
            if arch.num_kv_heads * arch.q_group < 2:
                lines.append(f"{side} has one head per layer: there is nothing to match")
        lines += gates_not_applicable(base, ft)
        depths = [len(found) for found in _layers(base, ft)]
        if not lines and min(depths) < 2:
            lines.append("fewer than two layers have attention in both models")
        if not lines and base.num_layers != ft.num_layers:
            layers, heads = min(depths), math.prod(groups_of(base, ft))
            # Few pairs of layers say little of chance, which is taken to be as large as it may then be.
            controls = control_pairs(depths[0], depths[1], np.random.default_rng(0), _MOST_CONTROLS)
            lam = 1.0 if len(controls) >= FEW_PAIRS else WIDE_LAMBDA
            least = ordered_maps_log_sf(layers * [heads], groups_of(base, ft), depths, MARGIN * DEFAULT_ALLOWANCE, lam)
            if least > math.log(self.level):
                lines.append(
                    f"different depth ({base.num_layers} and {ft.num_layers} layers), and too few heads: if all of "
                    f"{layers} x {heads} agreed, p would be {math.exp(least):.2g}; see match_all"
                )
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the calibrated and the parametric test; no forward pass."""
        if pair.base.arch.num_layers == pair.ft.arch.num_layers:
            compared = self._compared(pair, "pair")
            null = nulls_of(compared, pair, self._compared, self.level)[_NAME]
            layers = compared.of(_NAME)[0]
            places = [f"layer {i}" for i in _layers(pair.base.arch, pair.ft.arch)[0]]
            tests = _tests(layers, null, groups_of(pair.base.arch, pair.ft.arch), places)
            notes = [*null.notes]
        else:
            layers, null, tests, notes = self._mapped(pair)
        if pair.base.arch.qk_norm or pair.ft.arch.qk_norm:
            notes.append(
                "queries and keys are normalised in each head: their product is approximate on centred embeddings"
            )
        if pair.base.arch.head_gate or pair.ft.arch.head_gate:
            notes.append("what heads write is gated, token by token: the gates are left out")
        if pair.base.arch.latent or pair.ft.arch.latent:
            notes.append("heads read latents: the norms of these, a number for each token, are left out")
        result = Result(
            headline=share_agreeing(layers),
            label="heads on which attention and output agree, share",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null={_NAME: null.as_dict()},
            per_layer=share_by_layer(layers),
            notes=notes,
            effect=_effect(layers),
            **reserved(tests, BY_CONVERGENCE),
        )
        if pair.base.arch.alibi_slopes and pair.ft.arch.alibi_slopes:
            result = all_reserved(result, "heads of one slope of ALiBi may do alike in independent models")
        return with_doubts(result, pair).for_pair(pair)

    def _compared(self, pair: Pair, name: str) -> PairAgreements:
        """Returns the agreement of the heads of each layer, and of control pairs of layers."""
        base, ft = ([*side.values()] for side in _matrices(pair))

        def compare(i: int, j: int) -> dict[str, Comparison]:
            return _agreements(base[i], ft[j], pair, (name, i, j))

        places = control_places(len(base), pair.generator("match_heads", "controls"))
        return PairAgreements([compare(i, i) for i in range(len(base))], [compare(i, j) for i, j in places])

    def _mapped(self, pair: Pair) -> tuple[list[Comparison], Null, list[Test], list[str]]:
        """Returns the comparisons of the layers of the best map, their null, the tests and notes.

        The best of many maps exceeds several times the allowance by chance. So evidence is firm if its p-value is small
        even where several times the allowance agree by convergence.
        """
        base, ft = _matrices(pair)
        ours, theirs = ([i for i, found in side.items() if _can_be_matched(found)] for side in (base, ft))
        table = {
            (i, j): _agreements(base[i], ft[j], pair, ("map", i, j))[_NAME] for i, j in itertools.product(ours, theirs)
        }
        chosen = control_pairs(len(ours), len(theirs), pair.generator("match_heads", "controls"), _MOST_CONTROLS)
        null = null_of([table[ours[i], theirs[j]] for i, j in chosen], [DEFAULT_ALLOWANCE], DEFAULT_SOURCE)
        counts = np.array([found.agreeing for found in table.values()], int).reshape(len(ours), len(theirs))
        places = [(ours[i], theirs[j]) for i, j in best_ordered_map(counts)]
        layers, groups = [table[place] for place in places], groups_of(pair.base.arch, pair.ft.arch)
        agreeing, depths = [found.agreeing for found in layers], (len(ours), len(theirs))
        names = [f"base {i} : ft {j}" for i, j in places]
        tests = []
        for name, u, lam in (("calibrated", DEFAULT_ALLOWANCE, null.lam), ("parametric", 0.0, 1.0)):
            single = [min(0.0, heads_log_sf([k], *groups, [u], lam) + math.log(max(depths))) for k in agreeing]
            combine = functools.partial(_constant, ordered_maps_log_sf(agreeing, groups, depths, u, lam))
            test = one_test(f"{_NAME}, agreement, {name}", layers, single, names, combine, _SUM_OF_BEST)
            tests.append(replace(test, decides=name == "calibrated"))
        firm = ordered_maps_log_sf(agreeing, groups, depths, MARGIN * DEFAULT_ALLOWANCE, null.lam)
        notes = list(null.notes)
        if pair.controls:
            notes.append(
                "match_heads: control models have base's depth; the default allowance is used at unequal depth"
            )
        return layers, null, [replace(tests[0], firm_log10_p=firm / LN10, calibrated=True), *tests[1:]], notes


def _matrices(pair: Pair) -> tuple[dict[int, HeadMatrices], dict[int, HeadMatrices]]:
    """Returns for either model, by layer, the two matrices of the query heads of the layers that are compared."""
    rows = shared_token_rows(pair, _TOKENS, "match_heads")
    tokens = [TokenRows(*map(centred_directions, side)) for side in rows]
    found = []
    for model, own, layers in zip((pair.base, pair.ft), tokens, _layers(pair.base.arch, pair.ft.arch)):
        bar = tqdm(layers, desc="match_heads", unit="layer", disable=None)
        found.append(without_repeats({i: head_matrices(model, i, own) for i in bar}))
    return found[0], found[1]


def _can_be_matched(layer: HeadMatrices) -> bool:
    """Returns whether a layer has two heads or more that can be matched."""
    return int(np.logical_and.reduce([found.any(axis=1) for found in layer.values()]).sum()) > 1


def _agreements(base: HeadMatrices, ft: HeadMatrices, pair: Pair, names: Sequence[str | int]) -> dict[str, Comparison]:
    """Returns the agreement of the heads of two layers."""
    return agreements({side: base[side] @ ft[side].T for side in base}, _PAIRS, pair, ("match_heads", *names))


def _effect(layers: Sequence[Comparison]) -> str:
    return (
        f"{sum(c.agreeing for c in layers)} of {sum(c.units for c in layers)} heads agree; in 2,120 pairs "
        "of independent models at most 14 of 16 did, 4.4 on average (docs/nulls.md)"
    )


def control_places(num_layers: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Returns up to 256 pairs of different layers: with their few heads, few layers say little about chance."""
    every = [(i, j) for i in range(num_layers) for j in range(num_layers) if i != j]
    return [every[at] for at in generator.permutation(len(every))[:_MOST_CONTROLS]]


def groups_of(base: Arch, ft: Arch) -> tuple[int, int]:
    """Returns the number of kv heads and of queries in each, as few kv heads as either model has."""
    K, heads = min(base.num_kv_heads, ft.num_kv_heads), min(a.num_kv_heads * a.q_group for a in (base, ft))
    return K, -(-heads // K)


def _layers(base: Arch, ft: Arch) -> tuple[list[int], list[int]]:
    """Returns the layers of base and of ft that have attention; at equal depth those in which both have."""
    ours, theirs = ([i for i in range(arch.num_layers) if arch.has_attention(i)] for arch in (base, ft))
    if base.num_layers != ft.num_layers:
        return ours, theirs
    both = [i for i in ours if i in theirs]
    return both, both


def _tests(layers: Sequence[Comparison], null: Null, groups: tuple[int, int], places: Sequence[str]) -> list[Test]:
    """Returns the calibrated test, which enters the verdict, and one without allowance and controls."""
    tests = []
    for name, u, lam in (("calibrated", null.u, null.lam), ("parametric", [0.0] * len(layers), 1.0)):
        single = [heads_log_sf([found.agreeing], *groups, [share], lam) for found, share in zip(layers, u)]
        total = heads_log_sf([found.agreeing for found in layers], *groups, u, lam)
        combine = functools.partial(_constant, total)
        test = one_test(f"{_NAME}, agreement, {name}", layers, single, places, combine, _SUM)
        tests.append(replace(test, decides=name == "calibrated"))
    firm = tests[0].log10_p if share_agreeing(layers) > MARGIN * max(null.u) else 0.0
    return [replace(tests[0], firm_log10_p=firm, calibrated=True), *tests[1:]]


def _constant(value: float, _: object) -> float:
    return value
