"""Whether the layers, MLP units and heads of one model are a subset of those of another, unchanged."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.claims.claim import (
    SIZES,
    ClaimInputs,
    ClaimResult,
    identical_result,
    part_findings,
    result,
    size_names,
    verdict_sentence,
)
from tracing_jax.claims.tensor_pairs import TensorPair, coarser, is_rounded, tensor_pairs
from tracing_jax.tree import flatten

_PART_OF = {"mlp_dim": "MLPs", "num_experts": "MLPs", "num_kv_heads": "attention", "q_group": "attention"}
"""Size of a model -> the part of it that is smaller where the size is."""

_KINDS = ("mlp", "kv_heads")
"""Axis kinds whose units are matched."""


@dataclass(frozen=True)
class KeptLayer:
    """A layer of ft, and the layer of base that has its units.

    Attributes:
      ft, base: the indices of the layers; None if no layer of base has any of its units.
      found: axis kind -> how many units of ft's layer that of base has, bit for bit, of how many.
    """

    ft: int
    base: int | None
    found: Mapping[str, tuple[int, int]]

    @property
    def is_whole(self) -> bool:
        """Whether every unit of the layer was found."""
        return self.base is not None and all(kept == count for kept, count in self.found.values())


def kept_layers(base: Checkpoint, ft: Checkpoint) -> list[KeptLayer]:
    """Returns for each layer of ft the layer of base that has the most of its units, in the order of the layers.

    A unit is the row of numbers that all weights of the layer have for it; of models of unequal width none is found.
    """
    found: list[KeptLayer] = []
    units_base: dict[int, Mapping[str, frozenset[bytes]]] = {}
    for index in range(ft.arch.num_layers):
        ours = _units(ft, index)
        best = KeptLayer(index, None, {kind: (0, len(rows)) for kind, rows in ours.items()})
        for candidate in _candidates(base, found):
            if candidate not in units_base:
                units_base[candidate] = {kind: frozenset(rows) for kind, rows in _units(base, candidate).items()}
            counts = {
                kind: (sum(row in units_base[candidate].get(kind, ()) for row in rows), len(rows))
                for kind, rows in ours.items()
            }
            if sum(n for n, _ in counts.values()) > sum(n for n, _ in best.found.values()):
                best = KeptLayer(index, candidate, counts)
            if best.is_whole:
                break
        found.append(best)
    return found


def _candidates(base: Checkpoint, found: list[KeptLayer]) -> Iterator[int]:
    """Yields the layers of base, the one after the layer that was found last first."""
    first = next((layer.base + 1 for layer in reversed(found) if layer.base is not None), 0)
    yield from range(first, base.arch.num_layers)
    yield from range(first)


def _units(checkpoint: Checkpoint, index: int) -> dict[str, list[bytes]]:
    """Returns axis kind -> a digest of each unit's numbers, in float32, over all weights of one layer."""
    prefix = f"layers/{index}/"
    leaves, specs = flatten(checkpoint.layer(index)), axis_table(checkpoint.arch).leaves
    found: dict[str, list[bytes]] = {}
    for kind in _KINDS:
        rows = []
        for name in sorted(leaves):
            axes = specs[prefix + name].axes
            at = next((i for i, axis in enumerate(axes) if axis == f"{prefix}{kind}"), None)
            if at is not None and axes.count(axes[at]) == 1:
                rows.append(_by_unit(leaves[name], at))
        if rows:
            found[kind] = _digests(np.concatenate(rows, axis=1))
    return found


def _by_unit(leaf: Shaped[np.ndarray, "..."], axis: int) -> np.ndarray:
    return np.moveaxis(leaf, axis, 0).reshape(leaf.shape[axis], -1).astype(np.float32)


def _digests(rows: Shaped[np.ndarray, "n f"]) -> list[bytes]:
    rows = np.ascontiguousarray(rows + np.float32(0))  # of the two zeros one is taken
    return [row.tobytes() for row in rows] if rows.shape[1] < 64 else [_hash(row) for row in rows]


def _hash(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


_FEWEST_LEFT = 0.01
"""Share of ft's weights that must not be zero for the claim that it is base, pruned."""


@dataclass(frozen=True)
class ZeroedWeights:
    """What became of the weights of all matrices of base.

    Attributes:
      weights: how many there are.
      zeros: how many ft has set to zero; those that base has too do not count.
      left: how many of ft are not zero.
      changed: how many of those are not base's, also once rounded to the coarser dtype.
    """

    weights: int
    zeros: int
    left: int
    changed: int


def zeroed_weights(pairs: list[TensorPair]) -> ZeroedWeights:
    """Returns what became of the weights of all matrices of base."""
    weights = zeros = left = changed = 0
    for pair in pairs:
        if not pair.is_matrix:
            continue
        coarse = coarser(pair.dtypes)
        for ours, theirs in pair.chunks():
            with np.errstate(over="ignore"):  # float16 ends at 65504
                differ = ours.astype(coarse) != theirs.astype(coarse)
            changed += int(np.count_nonzero(differ & (theirs != 0)))
            left += int(np.count_nonzero(theirs))
            zeros += int(np.count_nonzero((theirs == 0) & (ours != 0)))
            weights += theirs.size
    return ZeroedWeights(weights, zeros, left, changed)


def pruned_of(inputs: ClaimInputs) -> ClaimResult:
    """Tests the claim that ft is what is left of base."""
    base, ft, name = inputs.base.arch, inputs.ft.arch, "pruned-of"
    if inputs.is_identical:
        return identical_result(name, inputs)
    larger = [size for size in SIZES if (getattr(ft, size) or 0) > (getattr(base, size) or 0)]
    smaller = [size for size in SIZES if (getattr(ft, size) or 0) < (getattr(base, size) or 0)]
    if larger:
        return result(name, "contradicted", f"ft is larger than base in {size_names(larger)}", larger=larger)
    if not smaller:
        return _zeroed(inputs)
    kept = kept_layers(inputs.base, inputs.ft) if base.embed_dim == ft.embed_dim else []
    facts: dict[str, Any] = {"smaller": smaller, "layers": [asdict(layer) for layer in kept]}
    if kept and all(layer.is_whole for layer in kept) and _ascending([layer.base for layer in kept]):
        return result(name, "holds", f"ft is smaller in {size_names(smaller)}; {_kept_words(kept)}", **facts)
    found = inputs.verdict
    if found.verdict == "no_evidence":
        tests = "tests that find pruned models after every known rewrite"
        why = f"no sign of common weights was found, by {tests}"
        return result(name, "contradicted", why, **facts, verdict=found.verdict)
    if found.verdict != "related":
        return result(name, "not_testable", verdict_sentence(found), **facts)
    return _by_layer_map(inputs, smaller, facts)


def _by_layer_map(inputs: ClaimInputs, smaller: Sequence[str], facts: dict[str, Any]) -> ClaimResult:
    """Returns the outcome of a smaller model whose units are base's no longer bit for bit."""
    name, sizes = "pruned-of", size_names(smaller)
    parts = inputs.verdict.parts
    narrower = {_PART_OF[size] for size in smaller if size in _PART_OF}
    if open_parts := sorted(part for part in narrower if parts.get(part, {}).get("verdict") != "related"):
        why = f"the models are related and ft is smaller in {sizes}, but of the {' and '.join(open_parts)}, which are "
        why += f"smaller, this was not found: {part_findings(inputs.verdict)}"
        return result(name, "not_testable", why, **facts)
    if inputs.base.arch.num_layers == inputs.ft.arch.num_layers:
        why = f"ft is smaller in {sizes}, of the same depth, and its weights are not independent of base's"
        why += f"; by part: {part_findings(inputs.verdict)}; what is left was changed since"
        return result(name, "holds", why, **facts)
    maps = {name: found.layer_map for name, found in inputs.results.items() if found.layer_map}
    if not maps:
        why = (
            f"the models are related and ft is smaller in {sizes}, but no test that ran maps its layers: run match_all"
        )
        return result(name, "not_testable", why, **facts)
    best = min(maps.values(), key=lambda layer_map: len(layer_map["unmatched_ft"]))
    pairs = sorted((row["ft"], row["base"]) for row in best["pairs"])
    facts["layer_map"] = [list(pair) for pair in pairs]
    if best["unmatched_ft"] or not _ascending([base for _, base in pairs]):
        why = f"the models are related and ft is smaller in {sizes}, but not all of its layers follow base's in order"
        return result(name, "not_testable", f"{why}: {best['sentence']}", **facts)
    why = f"ft is smaller in {sizes}, and each of its layers corresponds to one of base's, in order"
    return result(name, "holds", f"{why}: {best['sentence']}; by part: {part_findings(inputs.verdict)}", **facts)


def _zeroed(inputs: ClaimInputs) -> ClaimResult:
    name = "pruned-of"
    pairs, others = tensor_pairs(inputs.base, inputs.ft)
    found = zeroed_weights(pairs)
    left, zeros = (count / max(found.weights, 1) for count in (found.left, found.zeros))
    vectors = [pair.leaf for pair in pairs if not pair.is_matrix and not is_rounded(pair)]
    facts = {**asdict(found), "vectors": vectors[:20]}
    if others:
        return result(name, "not_testable", f"{len(others)} tensors have no counterpart of the same shape", **facts)
    if left < _FEWEST_LEFT:
        why = f"{1 - left:.2%} of ft's weights are zero: too few are left to tell whose they were"
        return result(name, "not_testable", why, **facts)
    if zeros < 0.01:
        why = f"ft is smaller than base nowhere, and {zeros:.2%} of its weights were set to zero"
        return result(name, "contradicted", why, **facts)
    if not found.changed and not vectors:
        why = f"{zeros:.1%} of the weights of matrices were set to zero; all others, and all vectors, are base's"
        return result(name, "holds", why, **facts)
    if inputs.verdict.verdict == "no_evidence":
        return result(name, "contradicted", "no sign of common weights was found", **facts, verdict="no_evidence")
    why = f"{zeros:.1%} of the weights were set to zero, and of the others {found.changed:,} were changed"
    why += f", and {len(vectors)} vectors (norms, biases), such as {vectors[0]}" if vectors else ""
    return result(name, "not_testable", f"{why}: whether these were base's is a matter of finetune-of", **facts)


def _ascending(places: Sequence[int | None]) -> bool:
    known = [place for place in places if place is not None]
    return len(known) == len(places) and all(a < b for a, b in itertools.pairwise(known))


def _kept_words(kept: Sequence[KeptLayer]) -> str:
    places = ", ".join(str(layer.base) for layer in kept)
    units = {kind: sum(layer.found[kind][1] for layer in kept) for kind in kept[0].found}
    counted = " and ".join(
        f"{n:,} {'MLP units' if kind == 'mlp' else 'key and value heads'}" for kind, n in units.items()
    )
    return f"its layers are base's {places}, and all of their {counted} are base's, bit for bit"
