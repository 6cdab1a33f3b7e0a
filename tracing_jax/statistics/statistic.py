"""The interface of a statistic: the pair of models that it gets, the result that it returns, and its protocol."""

import functools
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from tracing_jax.arch import Arch, head_problem
from tracing_jax.data import IdPairs, PairedBlocks, paired_one_to_one
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.token_directions import remember_text, remember_tokens

_AFTER_ALIGNMENT = (
    "after alignment nothing has a null: aligning makes independent models look dependent; "
    "the verdict comes from the pair as given"
)
"""Why no result on an aligned pair has a p-value. Source: simulations in the setting of Zhu et al.; docs/nulls.md."""


_FEWEST_OF_TEXT = 64
"""By fewer tokens than this units are told apart too badly: where no more are known to be in a text, all are used."""


@dataclass(frozen=True)
class Vocabularies:
    """How the two models' tokens correspond.

    Attributes:
      same: both models have the same tokenizer, with equal token ids.
      ids_base, ids_ft: ids of the tokens that both vocabularies have, paired by string.
      known: both tokenizers could be read.
      unseen: group -> ids in base and in ft of tokens that neither tokenizer ever gives; see `data.unseen_tokens`.
      in_text: which of the shared tokens both tokenizers give for the text of this package; None if that is not known.
      text_ids: all ids that each tokenizer gives for it.
      text_blocks: some of it as each tokenizer reads it, which both models read; None if that is too little.
    """

    same: bool
    ids_base: Int[np.ndarray, " S"]
    ids_ft: Int[np.ndarray, " S"]
    known: bool = True
    unseen: Mapping[str, IdPairs] = field(default_factory=dict)
    in_text: Bool[np.ndarray, " S"] | None = None
    text_ids: tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T2"]] | None = None
    text_blocks: PairedBlocks | None = None

    @functools.cached_property
    def usable(self) -> Int[np.ndarray, " n"]:
        """Positions of the shared tokens that tests compare: those of the text, if 64 of them are known to be in it.

        A token that no text has can be given any embedding without a change of what the model does, and so what units
        make of it any value: it can be made to agree with another model's, or to hide that it does.
        """
        if self.in_text is None or self.in_text.sum() < _FEWEST_OF_TEXT:
            return np.arange(len(self.ids_base))
        return np.flatnonzero(self.in_text)

    @property
    def doubt(self) -> str:
        """Why the usable tokens are not known to be in a text; empty if they are, or if the caller chose them."""
        if not self.known:
            return "without a tokenizer of both models it is not known which tokens a text has"
        if self.in_text is not None and len(self.usable) > self.in_text.sum():
            return f"only {self.in_text.sum()} of the shared tokens are in the text of this package"
        return ""

    @property
    def unread(self) -> str:
        """Why the models read no text, though it is known which tokens it has; empty if they do."""
        if self.in_text is None or self.text_blocks is not None:
            return ""
        return "too little of the text of this package can be read by both models"

    def digest(self) -> str:
        """Returns a hash of which tokens correspond, and of which of them are compared and read."""
        unseen = (ids for pair in self.unseen.values() for ids in pair)
        blocks = self.text_blocks
        read = () if blocks is None else (blocks.base, blocks.ft, blocks.at_base, blocks.at_ft, blocks.valid)
        found = (self.ids_base, self.ids_ft, self.usable, *unseen, *(self.text_ids or ()), *read)
        hashed = hashlib.sha256(self.doubt.encode())
        for ids in found:
            hashed.update(b"|" + np.ascontiguousarray(ids, np.int64).tobytes())
        return hashed.hexdigest()

    def drawn(self, generator: np.random.Generator, most: int) -> Int[np.ndarray, " n"]:
        """Returns the positions of at most so many of the usable shared tokens, in the order drawn."""
        return self.usable[generator.permutation(len(self.usable))[:most]]


@dataclass(frozen=True)
class Pair:
    """Two models, in memory or streamed, with the text, the devices and the seed of a run."""

    base: ParamSource
    ft: ParamSource
    vocabularies: Vocabularies
    tokens: Int[np.ndarray, "N T"] | None
    """Token blocks of base's tokenizer; None when no statistic of the run needs text."""
    compute: Compute
    seed: int
    aligned: bool = False
    alignment: Literal["none", "permutations", "maps", "states", "learned"] = "none"
    """How ft was aligned to base, if it was: what control pairs must be aligned by as well."""
    blocks: PairedBlocks | None = None
    """The text in both models' tokens, with the positions at which both have read the same bytes."""
    controls: Sequence[ParamSource] = ()
    """Models known to be independent of both, of base's shape and tokenizer, for nulls that are measured."""
    learning_tokens: Int[np.ndarray, "M T"] | None = None
    """Token blocks that statistics do not read, for what is trained; None when nothing is."""
    learning_steps: int = 0
    """Of what is trained, at most."""
    of_mixture: bool = False
    """Whether ft is taken to be a mixture of several models: on a text its units do what the mixture does, and are
    compared with those of one of these models on embeddings alone."""
    run_cache: RunCache = field(default_factory=RunCache)
    """Intermediate results of an interrupted run."""

    def __post_init__(self) -> None:
        """Has what is found out about each model by itself look at what a text has."""
        models = ((self.base, 0), (self.ft, 1), *((control, 0) for control in self.controls))
        for model, side in models:
            if self.vocabularies.text_ids is not None:
                remember_tokens(model, self.vocabularies.text_ids[side])
            if (blocks := self.vocabularies.text_blocks) is not None and not self.aligned:
                remember_text(model, (blocks.base, blocks.ft)[side], self.compute)

    def of_base(self) -> "Pair":
        """Returns base paired with itself, both with base's tokens; a control model then replaces the first."""
        ids, known = self.vocabularies.ids_base, self.vocabularies
        blocks, text_blocks = (
            None if found is None else paired_one_to_one(found.base, found.base)
            for found in (self.blocks, known.text_blocks)
        )
        text_ids = None if known.text_ids is None else (known.text_ids[0], known.text_ids[0])
        vocabularies = replace(known, same=True, ids_ft=ids, unseen={}, text_ids=text_ids, text_blocks=text_blocks)
        return replace(self, ft=self.base, vocabularies=vocabularies, blocks=blocks)

    def generator(self, *names: str | int) -> np.random.Generator:
        """Returns a random generator of its own for every sequence of names, from the seed of the run."""
        return np.random.default_rng([self.seed, *(zlib.crc32(str(name).encode()) for name in names)])


@dataclass(frozen=True)
class Curve:
    """Loss along the path from base (alpha 0) to ft (alpha 1), in nats per token.

    Attributes:
      alpha, loss: of each point.
      midpoint: the loss at 0.5.
      barrier: the greatest excess over the line between the losses of the ends.
      barrier_alpha: where it is.
      end_loss_ft_own: the loss of ft itself, with all its own weights; None if it cannot read base's tokens.
      groups: of the leaves that move.
      more: by name, further curves with the same ends, with `alpha`, `loss`, `midpoint`, `barrier`, `barrier_alpha` and
        facts of their own.
    """

    alpha: Sequence[float]
    loss: Sequence[float]
    midpoint: float
    barrier: float
    barrier_alpha: float
    end_loss_ft_own: float | None
    groups: Sequence[str]
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Test:
    """One test: a p-value at each place (layer, matrix or pair of layers), and the combined p-value.

    Attributes:
      name: what is tested, such as `rank correlation`.
      log10_p: decimal logarithm of the combined p-value; None on an aligned pair.
      combined: how the p-values of the places were combined.
      places: names of the layers, matrices or pairs of layers.
      log10_ps: decimal logarithms, one per place.
      values: column -> measured values, one per place.
      decides: whether it enters the verdict; a test without a valid null is reported only.
      firm_log10_p: the p-value of the evidence to which no reservation applies; None where none applies to any.
      calibrated: whether its null rests on a measured allowance; otherwise it is exact, or does not decide.
    """

    __test__ = False  # not a test class of pytest

    name: str
    log10_p: float | None
    combined: str
    places: Sequence[str]
    log10_ps: Sequence[float] | None
    values: Mapping[str, Sequence[float | int]]
    decides: bool = True
    firm_log10_p: float | None = None
    calibrated: bool = False


@dataclass(frozen=True)
class Result:
    """The outcome of one statistic on one pair, as written to the record.

    Attributes:
      headline: the effect size; `label` names it, with its unit.
      log10_p: decimal logarithm of the p-value where one exists, else None with the reason in `p_reason`.
      per_layer: `{"label", "values"}`, one value per layer; p-values are in `tests`.
      distribution: `{"label", "quantiles": {"levels", "layers"}}`, the quantiles at the levels for each layer, or once.
      not_applicable: the reason why the statistic has no value on this pair.
      tests: the tests behind `log10_p`, place by place.
      null: parameters of the null of the p-values.
      layer_map: which layer of ft comes from which layer of base, by their p-values; see `match_all`.
      notes: caveats for a reader of the numbers.
      arrays: what is too large for the record; saved in the folder of the run.
      read: side -> bytes read and their share of all weights, if not all are read; see `screen`.
      effect: the effect size in a sentence, beside what independent models show.
      reservation: how else than by descent the p-value can be as small as it is; None if there is no such way.
      firm_log10_p: with a reservation, the p-value that holds all the same; it decides whether a pair is related.
      blind_to: rewrites of unchanged function that make the statistic miss a relation; None if that is not known.
      premises: what the null presupposes, and whether that was found to hold: `{"premise", "holds", "needed"}`.
      unit_map: of some units of one layer of base the partners in ft by both readings: `{"layer", "units": widths of
        base and ft, "readings", "partners": [[unit of base, of ft by one, of ft by the other], ...]}`.

    Example:
      >>> tj.trace("demo:base", "demo:finetune", "cos")["cos"]["label"]
      'best-match cosine of MLP units, mean over layers of the median'
    """

    headline: float | None
    label: str
    log10_p: float | None = None
    p_reason: str | None = None
    per_layer: Mapping[str, Any] | None = None
    curve: Curve | None = None
    distribution: Mapping[str, Any] | None = None
    not_applicable: str | None = None
    tests: Sequence[Test] = ()
    null: Mapping[str, Any] | None = None
    layer_map: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    read: Mapping[str, Any] | None = None
    effect: str | None = None
    reservation: str | None = None
    firm_log10_p: float | None = None
    blind_to: tuple[str, ...] | None = None
    premises: Sequence[Mapping[str, Any]] = ()
    unit_map: Mapping[str, Any] | None = None

    @property
    def deciding_log10_p(self) -> float | None:
        """The p-value that can make a pair related: that of the evidence to which no reservation applies."""
        return self.log10_p if self.firm_log10_p is None else self.firm_log10_p

    def for_pair(self, pair: Pair) -> "Result":
        """Returns the result as it is; of an aligned pair without p-values and what is derived from them."""
        if not pair.aligned:
            return self
        tests = tuple(replace(test, log10_p=None, log10_ps=None, firm_log10_p=None) for test in self.tests)
        return replace(
            self, log10_p=None, p_reason=_AFTER_ALIGNMENT, tests=tests, layer_map=None, reservation=None,
            firm_log10_p=None, premises=(),
        )  # fmt: skip

    @classmethod
    def restored(cls, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "Result":
        """Returns the result from the fields of its `as_dict` and its arrays."""
        curve = None if fields["curve"] is None else Curve(**fields["curve"])
        blind_to = None if fields["blind_to"] is None else tuple(fields["blind_to"])
        tests = [Test(**test) for test in fields["tests"]]
        return cls(**{**fields, "curve": curve, "tests": tests, "arrays": arrays, "blind_to": blind_to})

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as plain data, without its arrays."""
        return asdict(replace(self, arrays={})) | {"arrays": sorted(self.arrays)}


@runtime_checkable
class Statistic(Protocol):
    """One statistic; its fields are its options, its section of the config."""

    @property
    def needs_tokens(self) -> bool:
        """Whether it needs text."""

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why the statistic cannot be computed on models of these shapes; empty if it can."""

    def compute(self, pair: Pair) -> Result:
        """Returns the statistic of the pair."""


def heads_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns the reasons why predictions cannot be compared; empty if both models predict tokens."""
    found = {"base": head_problem(base), "ft": head_problem(ft)}
    return [f"{side}: {problem}" for side, problem in found.items() if problem]


def depths_not_applicable(base: Arch, ft: Arch, reason: str) -> list[str]:
    """Returns the reason why models of different depth cannot be compared; empty if their depths are equal."""
    if base.num_layers == ft.num_layers:
        return []
    return [f"different depth ({base.num_layers} and {ft.num_layers} layers): {reason}"]


def widths_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns the reason why rows over the features cannot be compared; empty if their numbers are equal."""
    if base.embed_dim == ft.embed_dim:
        return []
    return [f"different width ({base.embed_dim} and {ft.embed_dim} features): rows have no cosine"]


QUANTILE_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def quantiles(values: np.ndarray) -> list[float]:
    """Returns the quantiles of the values at `QUANTILE_LEVELS`."""
    return [float(q) for q in np.quantile(values, QUANTILE_LEVELS)]
