"""A claim on a pair, and what became of it; `docs/claims.md` has the definitions for people."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.statistics import Pair, Result, Verdict

SIZES = ("num_layers", "embed_dim", "mlp_dim", "num_kv_heads", "q_group", "head_dim", "num_experts")
"""What of an `Arch` makes the shape of a model; the vocabulary is apart."""

ClaimOutcome = Literal["holds", "contradicted", "not_testable"]

ASSERTS: Mapping[str, str] = {
    "same-as": "both models hold the same numbers, or compute the same function by other weights",
    "finetune-of": "ft has the shape of base, and weights that are not independent of base's",
    "adapter-of": "as stored, every matrix of ft is base's plus one of low rank, and all else is base's",
    "quantised-of": "as stored, every weight of ft is base's, rounded to the values of a format",
    "pruned-of": "layers, units, heads or weights of ft are those of base, of which others were removed",
    "merge-of": "ft is an average or another mixture of base and further models",
    "from-scratch": "no weight of ft comes from base",
}
"""Claim of ft and base -> what it says. What is tested of it, and what of that makes it hold, is `checking`'s."""

UNTESTED: Mapping[str, str] = {
    "same-as": "which of the two was there first",
    "finetune-of": (
        "which of the two was there first; whether one descends from the other, or both from a third model or from one "
        "initialisation"
    ),
    "adapter-of": "which of the two was there first, and that an adapter was trained, not another change of low rank",
    "quantised-of": "which of the two was there first",
    "pruned-of": "which of the two was there first, as one may have been grown from the other; how parts were chosen",
    "merge-of": "whether there are further parents, and which",
    "from-scratch": (
        "that it is so: independence is never proved. Data, distillation and changes that the tests do not detect are "
        "outside of it"
    ),
}
"""Claim -> what is not tested of the pair where it holds."""


@dataclass(frozen=True)
class ClaimResult:
    """What became of a claim on a pair.

    Attributes:
      claim: its name.
      outcome: `holds`: what it says was tested and found. `contradicted`: tests that would have found it did not, or
        found something else. `not_testable`: neither, for the reason in `because`.
      because: the outcome in a sentence, with the numbers that decided it.
      asserts: what the claim says.
      not_said: what is not said about the pair where it holds.
      evidence: the numbers behind it, plain data.
    """

    claim: str
    outcome: ClaimOutcome
    because: str
    asserts: str = ""
    not_said: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        return asdict(self)


def result(claim: str, outcome: ClaimOutcome, because: str, **evidence: Any) -> ClaimResult:
    """Returns the result of a claim with what it asserts and what it leaves open."""
    return ClaimResult(claim, outcome, because, ASSERTS[claim], UNTESTED[claim], evidence)


@dataclass(frozen=True)
class ClaimInputs:
    """What claims are tested by.

    Attributes:
      base, ft: the two checkpoints.
      pair: the same models as they were traced.
      verdict: that of the tests.
      results: the results of the tests by their names.
      seed: of the run.
      scope: what was read of the models, where that is less than all.
      is_default: whether the default tests are among those that ran: their power was measured together.
    """

    base: Checkpoint
    ft: Checkpoint
    pair: Pair
    verdict: Verdict
    results: Mapping[str, Result]
    seed: int
    scope: str = ""
    is_default: bool = True

    @property
    def is_identical(self) -> bool:
        """Whether all tensors are identical."""
        return self.verdict.identical is not None and self.verdict.identical.is_whole

    @property
    def tensors(self) -> str:
        """How many tensors are identical, in words."""
        found = self.verdict.identical
        return "" if found is None else f"{found.equal} of {found.total} tensors are identical"


def identical_result(claim: str, inputs: ClaimInputs) -> ClaimResult:
    """Returns the result of a claim of some change where nothing was changed."""
    return result(claim, "contradicted", f"{inputs.tensors}: ft is base as it is, which is the claim same-as")


def size_names(names: Sequence[str]) -> str:
    """Returns names of sizes of a model as text."""
    return ", ".join(name.removeprefix("num_").replace("_", " ") for name in names)


def part_findings(verdict: Verdict) -> str:
    """Returns what was found of each part of the models that tests compared: `MLPs related, attention undecided`."""
    return ", ".join(f"{part} {found['verdict'].replace('_', ' ')}" for part, found in verdict.parts.items())


def verdict_sentence(verdict: Verdict) -> str:
    """Returns a verdict that decides no claim, as the reason why."""
    return f"the verdict is {verdict.verdict.replace('_', ' ')}: {verdict.meaning}"
