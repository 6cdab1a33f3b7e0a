"""Parents whose MLPs have other shapes than the child's: no share, and what can be said all the same.

A child may be mixed with a model of another family by optimal transport: its units are then mixtures of that model's
units, on features that are mixtures of that model's features. No entry of one belongs to an entry of the other. What is
left of the child after the parents of its own shape is taken as a model, and its units are matched with those of the
other one by what they read from shared tokens that a text has. The harder the mixture, the more of them agree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tracing_jax.arch import Arch
from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.products import as_float32
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.match_mlps import MatchMlps
from tracing_jax.statistics.shared_tokens import with_unread_units
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies
from tracing_jax.tree import Tree, flatten, unflatten

VocabulariesOf = Callable[[str], Vocabularies]
"""Name of a parent -> how its tokens, first, and the child's correspond."""

LEVEL = 1e-3
_MIXED = ("embed/", "mlp/gate_proj", "mlp/up_proj")
"""Leaves of which the rest is taken: what the matching of units reads."""
_EXPLAINED = 1e-4
"""An embedding of which less is left, in squares, was not mixed: units then read the child's own."""
_TRIED = 2  # the child itself, and what is left of it


@dataclass(frozen=True)
class OtherShape:
    """What is known of a parent of other shapes.

    Attributes:
      name: of the parent.
      log10_p: of the agreement of units, after Bonferroni over these parents; None where nothing could be matched.
      effect: how many units agree, beside what independent models show; or why nothing could be matched.
      reservation: why the agreement is no evidence, and is not in the p-value; None where it is.
      of_rest: whether the rest of the child agrees more than the child itself.
    """

    name: str
    log10_p: float | None
    effect: str
    of_rest: bool = False
    reservation: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether units agree more than those of independent models."""
        return self.log10_p is not None and self.log10_p < math.log10(LEVEL)

    @property
    def reason(self) -> str:
        """What is said of the parent in the report."""
        shapes = "its MLPs have other shapes than the child's, so that it has no share"
        if self.log10_p is None:
            return f"{shapes}; its units could not be matched either: {self.effect}"
        whose = "what the other parents leave of the child" if self.of_rest else "the child"
        found = f"its units matched with those of {whose}: {self.effect}"
        if self.agrees:
            return f"{shapes}; {found}"
        if self.reservation:
            return f"{shapes}; {found}, which is no evidence: {self.reservation}"
        return f"{shapes}; {found}; units that are mixtures of many agree no more, so that this excludes nothing"

    @property
    def sentence(self) -> str:
        """What is said in the report's sentence."""
        if self.agrees:
            return f"{self.name} has other shapes and no share, and its units agree with the child's"
        return f"{self.name} has other shapes and no share, and no agreement of units was seen, which does not clear it"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for the record."""
        return asdict(self) | {"agrees": self.agrees}


def set_apart(models: MergeModels) -> tuple[MergeModels, tuple[str, ...]]:
    """Returns the models without the parents whose MLPs have other shapes than the child's, and their names.

    Where no model has them, none is set apart: a child that was padded has the shapes of no other model.
    """
    apart = tuple(name for name, parent in models.parents.items() if not _has_layers_of(models, parent))
    like = models.origin is not None and _has_layers_of(models, models.origin)
    if not apart or (len(apart) == len(models.names) and not like):
        return models, ()
    keep = [i for i, name in enumerate(models.names) if name not in apart]
    first = 1 if models.origin is None else 2
    read = [*range(first), *(first + i for i in keep)]
    parents = {name: parent for name, parent in models.parents.items() if name not in apart}
    tokens = None if models.tokens is None else tuple(models.tokens[i] for i in read)
    return replace(models, parents=parents, tokens=tokens), apart


def compared_by_units(
    given: MergeModels, kept: MergeModels, apart: Sequence[str], seed: int, vocabularies_of: VocabulariesOf | None
) -> list[OtherShape]:
    """Returns what is known of the parents that were set apart.

    Args:
      given: all models.
      kept: those of the child's shapes, the child aligned if it was.
      apart: names of the others.
      seed: of the tokens that are drawn.
      vocabularies_of: these parents; None if every token of `given` is one that the models read.
    """
    others = kept.read_together[1:] if kept.layers is None else ()
    rest = RestOfChild(kept.child, others, kept.tokens) if others else None
    vocabularies = {name: _vocabularies(given, name, vocabularies_of) for name in apart}
    return [_compared(given, name, rest, vocabularies[name], _TRIED * len(apart), seed) for name in apart]


@dataclass(frozen=True)
class RestOfChild:
    """What some models leave of a child in its embedding and its MLPs, leaf by leaf; the rest of it as it is.

    Attributes:
      child: the model.
      others: models of its shapes.
      tokens: ids of the tokens that all have, those of the child first; None where all vocabularies are the same.
    """

    child: ParamSource
    others: Sequence[ParamSource]
    tokens: Sequence[np.ndarray] | None = None

    @property
    def arch(self) -> Arch:
        """The facts of the child."""
        return self.child.arch

    def embed(self) -> Tree:
        """Returns the embedding, of which the rest is taken where more than rounding is left."""
        return self._rest(self.child.embed(), [model.embed() for model in self.others], "embed/")

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns a layer with what is left of its MLP."""
        same = [model for model in self.others if index < model.arch.num_layers]
        return self._rest(self.child.layer(index, only), [model.layer(index, only) for model in same], "")

    def head(self) -> Tree:
        """Returns the head of the child."""
        return self.child.head()

    def _rest(self, own: Tree, others: Sequence[Tree], prefix: str) -> Tree:
        leaves, theirs = flatten(own), [flatten(tree) for tree in others]
        return unflatten({
            name: self._left(np.asarray(leaf), [np.asarray(tree[name]) for tree in theirs if name in tree], prefix)
            if f"{prefix}{name}".startswith(_MIXED) else leaf
            for name, leaf in leaves.items()
        })  # fmt: skip

    def _left(self, leaf: np.ndarray, others: Sequence[np.ndarray], prefix: str) -> np.ndarray:
        """Returns the residual of a leaf by least squares; the leaf where shapes differ or hardly anything is left."""
        paired = self.tokens if prefix == "embed/" else None
        if paired is not None:
            others = [
                _at_tokens(other, ids, paired[0], leaf.shape)
                for other, ids in zip(others, paired[1:])
                if other.shape[1:] == leaf.shape[1:]
            ]
        x = [as_float32(other).ravel() for other in others if other.shape == leaf.shape]
        if not x:
            return leaf
        y, columns = as_float32(leaf).ravel(), np.stack(x, axis=1)
        squares = columns.T.astype(np.float64) @ columns
        rest = y - columns @ np.linalg.lstsq(squares, columns.T @ y, rcond=1e-10)[0].astype(np.float32)
        if prefix and np.square(rest).sum() < _EXPLAINED * np.square(y).sum():
            return leaf
        return rest.reshape(leaf.shape)


def _at_tokens(other: np.ndarray, ids: np.ndarray, own: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns the rows of another embedding in the places of the child's; tokens that it does not have are zero."""
    found = np.zeros(shape, np.float32)
    found[own] = as_float32(other[ids])
    return found


def _compared(
    given: MergeModels, name: str, rest: RestOfChild | None, vocabularies: Vocabularies, tried: int, seed: int
) -> OtherShape:
    parent, test = given.parents[name], MatchMlps()
    if problems := test.not_applicable(parent.arch, given.child.arch, vocabularies):
        return OtherShape(name, None, "; ".join(problems))
    found: list[tuple[float, Result, bool]] = []
    for of_rest, child in enumerate([given.child, *([rest] if rest is not None else [])]):
        pair = Pair(parent, child, vocabularies, None, Compute(make_mesh()), seed, of_mixture=True)
        result = with_unread_units(test.compute(pair), pair)
        log10_p = result.log10_p if result.reservation is None else result.firm_log10_p
        found.append((0.0 if log10_p is None else log10_p, result, bool(of_rest)))
    log10_p, result, of_rest = min(found, key=lambda one: (one[0], one[1].log10_p or 0.0))
    after = min(0.0, log10_p + math.log10(tried))
    return OtherShape(name, after, str(result.effect), of_rest, result.reservation)


def _vocabularies(given: MergeModels, name: str, vocabularies_of: VocabulariesOf | None) -> Vocabularies:
    """Returns how the tokens of a parent and of the child correspond, of those that all models have."""
    if vocabularies_of is not None:
        found = vocabularies_of(name)
        return found if given.tokens is None else _among(found, given.tokens[0])
    at = given.names.index(name) + (1 if given.origin is None else 2)
    if given.tokens is not None:
        return Vocabularies(False, given.tokens[at], given.tokens[0])
    sizes = {given.child.arch.vocab_size, given.read_together[at].arch.vocab_size}
    ids = np.arange(min(sizes) if len(sizes) == 1 else 0, dtype=np.int32)
    return Vocabularies(len(sizes) == 1, ids, ids)


def _among(found: Vocabularies, ids_of_child: np.ndarray) -> Vocabularies:
    """Returns the vocabularies with those of their shared tokens that are among these."""
    kept = np.isin(found.ids_ft, ids_of_child)
    in_text = None if found.in_text is None else found.in_text[kept]
    return replace(found, ids_base=found.ids_base[kept], ids_ft=found.ids_ft[kept], in_text=in_text)


def _has_layers_of(models: MergeModels, other: ParamSource) -> bool:
    """Returns whether the MLPs of a model have the shapes of the child's, or are such as its experts are made of."""
    pair = MergeModels(models.child, {"other": other})
    return any(place.name.endswith("mlp/up_proj/kernel") for place in pair.places())
