"""The scan of a suspect for relatives in a library: candidates in order, and the closest of them.

p-values are adjusted by Holm over all signatures of the library. In a large library a part of the sampled units is
looked for first, and only signatures with a sign of agreement are compared in full; the others count as p = 1.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from tracing_jax.library.comparison import (
    HEADS,
    MOMENTS,
    RESPONSES,
    TESTED,
    SignatureMatch,
    compare,
    is_nearly_blind,
    not_tested,
)
from tracing_jax.library.shortlist import shortlist
from tracing_jax.library.signature import Signature
from tracing_jax.library.suspect import Suspect
from tracing_jax.progress import tqdm
from tracing_jax.statistics.comparison import LN10
from tracing_jax.statistics.pvalues import holm
from tracing_jax.statistics.verdict import UNDECIDED_BELOW

ScanVerdict = Literal["related", "undecided", "no_evidence", "not_compared", "not_testable"]

_COPIED = 0.01
"""Distance below which a model may be the very files of a signature, so that their hashes are worth comparing."""

STANDARD_ERRORS = 3.0
"""The closest of several relatives is named alone if the next one is so many standard errors farther away."""

AS_PARENTS = 3.0
"""A relative at up to so many times the distance of the closest is as near as the other parent of a merge would be.

Of unrelated parents, one with a share s, the distance is 1 less s / sqrt(s^2 + (1 - s)^2): at two fifths the ratio is
2.65. Of children of one base it is ((1 - s) / s)^2, 2.25. Siblings and ancestors can be as near: those that moved less
from the base than the suspect are.
"""

_SHOWN = 3
"""Of these so many are named in the sentence."""


class Distance(NamedTuple):
    """Mean of the agreeing units' distances, 1 less correlation, and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Candidate:
    """A signature of the library, and what it has in common with the suspect.

    Attributes:
      name: of the signature in the library.
      model: the id in its header.
      verdict: `related`: a p-value below the level after Holm, of agreement beyond several times the allowance.
        `undecided`: some p-value below 0.05, or only a part of the suspect was read, or few token strings are
        shared and no other test of units applies. `not_compared`: a first comparison of some units and heads
        showed no sign, and none was made in full. `not_testable`: no test applies.
      adjusted_log10_p: after Holm over the library; None if no test applies.
      match: the evidence; None if a first comparison showed no sign of it.
      distances: of a relative, by each test that shows it, how far the agreeing units are.
      not_tested: name -> the reason why a test does not apply.
      parts: part of the model -> what was found of it: a verdict as that of the whole, or `not_tested`.
    """

    name: str
    model: str
    verdict: ScanVerdict
    adjusted_log10_p: float | None
    match: SignatureMatch | None
    distances: Mapping[str, Distance] = field(default_factory=dict)
    not_tested: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of sampled units that agree, in the test that decides."""
        best = self.match.best if self.match else None
        return best.share if best else 0.0


@dataclass(frozen=True)
class Scan:
    """A scanned library.

    Attributes:
      candidates: all signatures, the closest relatives first.
      closest: names of the closest relative and of those that are not farther away by more than chance; empty if
        no model is related.
      as_near_as_parents: names of further relatives that are as near as the other parent of a merge in about equal
        shares would be (`AS_PARENTS`). Siblings and ancestors of the suspect can be so near, too.
      margin: standard errors between the first candidate and the first beyond these; None if there is none.
      compared: how many signatures were compared in full.
      part: the layers of the suspect that were read; None if all were.
      is_obscured: whether in most MLPs of the suspect few units carry evidence, so that a relation need not show.
      same_files: names of the relatives whose signatures name the hashes of the suspect's own weight files.
    """

    candidates: tuple[Candidate, ...]
    closest: tuple[str, ...]
    margin: float | None
    compared: int
    part: str | None = None
    is_obscured: bool = False
    same_files: tuple[str, ...] = ()
    as_near_as_parents: tuple[str, ...] = ()

    @property
    def related(self) -> tuple[Candidate, ...]:
        """The relatives, closest first."""
        return tuple(found for found in self.candidates if found.verdict == "related")

    def _unseen(self) -> str:
        """Returns what was not compared in full, or only by tests that miss some relatives, as sentences."""
        short = sum(found.verdict == "not_compared" for found in self.candidates)
        blind = sum(found.match is not None and set(found.match.tests) == {RESPONSES} for found in self.candidates)
        first = (
            f" {short} of them showed no sign in a first look at some units and heads, and were not compared in full."
        )
        embedded = (
            f" Of {blind} nothing but responses to embeddings could be compared: a child with new ones is not found."
        )
        return first * bool(short) + embedded * bool(blind)

    def sentence(self) -> str:
        """Returns what was found, in a sentence."""
        related, total = self.related, len(self.candidates)
        if not related:
            undecided = [found.name for found in self.candidates if found.verdict == "undecided"]
            testable = sum(found.verdict != "not_testable" for found in self.candidates)
            if not testable:
                return f"None of the {total} signatures can be compared with this model."
            if self.part:
                return (
                    f"No relative among the {testable} signatures that can be compared is seen in {self.part}, all "
                    "that was read: undecided. Without --screen every layer is read."
                )
            if self.is_obscured:
                return (
                    f"No relative was found among the {testable} signatures that can be compared, but in most layers "
                    "most units carry no evidence, since they share a gate with others, do nothing, or have two rows "
                    "that are alike: undecided."
                )
            doubt = f"; undecided: {', '.join(undecided)}" if undecided else ""
            return f"No relative was found among the {testable} signatures that can be compared{doubt}.{self._unseen()}"
        first = related[0]
        others = len(related) - max(1, len(self.same_files))
        if len(self.closest) > 1:
            text = f"One of these family members, or a merge: {', '.join(self.closest)}; they cannot be distinguished"
        else:
            text = f"Closest: {first.name}"
            if self.margin is not None:
                text += f", by {self.margin:.0f} standard errors"
        if self.as_near_as_parents:
            beyond = len(self.as_near_as_parents) - _SHOWN
            some = ", ".join(self.as_near_as_parents[:_SHOWN]) + (f" and {beyond} more" if beyond > 0 else "")
            text += (
                f"; {some}: as near as the other parent of a merge in equal parts would be, and as siblings and "
                "ancestors can be"
            )
        rest = total - max(1, len(self.same_files))
        more = f" {others} of the other {rest} signatures {'is' if others == 1 else 'are'} related too." * bool(others)
        if undecided := [found.name for found in self.candidates if found.verdict == "undecided" and not self.part]:
            more += f" Undecided: {', '.join(undecided)}."
        if self.same_files:
            return (
                f"Same files: {', '.join(self.same_files)}. The suspect's weight files have the SHA-256 that the "
                f"signature names, and its units.{more}"
            )
        return (
            f"{text}.{more} Whether the suspect descends from it, or both from a third model, cannot be decided from "
            "the weights."
        )


def scan(
    suspect: Suspect, signatures: Mapping[str, Signature], level: float, digest: Callable[[], str] | None = None
) -> Scan:
    """Returns the relatives of a suspect among named signatures.

    Args:
      suspect: the model, read once.
      signatures: name -> signature.
      level: after Holm over all signatures, below which one is called related.
      digest: returns the hash that identifies the suspect's weight files (`drawing.model_digest`); it is asked where a
        relative may be these files, since they are read whole for it.

    Raises:
      ValueError: there are no signatures.
    """
    if not signatures:
        raise ValueError("the library has no signatures")
    names = shortlist(signatures, suspect)
    found = {
        name: compare(signatures[name], suspect) for name in tqdm(names, desc="scan", unit="signature", disable=None)
    }
    log_ps = [(found[name].log10_p if name in found else 0.0) for name in signatures]
    firm = [(found[name].firm_log10_p if name in found else 0.0) for name in signatures]
    testable = [p is not None for p in log_ps]
    adjusted, firm_adjusted = (_adjusted([p or 0.0 for p in ps], testable) for ps in (log_ps, firm))
    ps = [(adjusted[i] if testable[i] else None, firm_adjusted[i]) for i in range(len(signatures))]
    candidates = [
        _candidate(name, signature, suspect, found.get(name), p, level, len(signatures))
        for p, (name, signature) in zip(ps, signatures.items())
    ]
    test = _ranking_test(candidates)
    candidates.sort(key=lambda candidate: _order(candidate, test))
    related = [c for c in candidates if c.verdict == "related"]
    closest, margin = _closest(related)
    copied = [c.name for c in related if c.distances and all(d.mean < _COPIED for d in c.distances.values())]
    own = digest() if copied and digest is not None else None
    same = tuple(name for name in copied if signatures[name].digest == own)
    near = () if same else _as_parents(related, closest)
    return Scan(tuple(candidates), closest, margin, len(names), suspect.part, suspect.is_obscured, same, near)


def _adjusted(log10_ps: Sequence[float], testable: Sequence[bool]) -> Float[np.ndarray, " N"]:
    """Returns decimal log p-values, Holm-adjusted over those that could be tested."""
    found = np.zeros(len(log10_ps))
    if any(testable):
        which = np.flatnonzero(testable)
        found[which] = holm(np.array(log10_ps)[which] * LN10) / LN10
    return found


def _candidate(
    name: str,
    signature: Signature,
    suspect: Suspect,
    match: SignatureMatch | None,
    p: tuple[float | None, float],
    level: float,
    count: int,
) -> Candidate:
    """Returns what was found of a signature.

    Args:
      name: of the signature.
      signature: the signature.
      suspect: the model.
      match: what they have in common, if it was compared in full.
      p: its p-value and that of firm evidence, adjusted over the library.
      level: below which it is related.
      count: the number of signatures.
    """
    adjusted, firm = p
    unseen: ScanVerdict = "no_evidence"
    if (
        suspect.part
        or suspect.is_obscured
        or (match is not None and is_nearly_blind(signature, suspect, match, count * max(1, len(match.tests))))
    ):
        unseen = "undecided"
    elif match is None:
        unseen = "not_compared"
    word = unseen
    if adjusted is None:
        word = "not_testable"
    elif firm < math.log10(level):
        word = "related"
    elif adjusted < math.log10(UNDECIDED_BELOW):
        word = "undecided"
    reasons = not_tested(signature, suspect) if match is None else match.not_tested
    tests = match.tests if match is not None else {}
    shows = [test for test, e in tests.items() if word == "related" and e.firm_log10_p < math.log10(level)]
    # What the tests and the library were adjusted for, of this signature.
    factor = adjusted - match.log10_p if adjusted is not None and match and match.log10_p is not None else 0.0
    factor += math.log10(max(1, len(tests)))
    doubtful = [test for test, e in tests.items() if e.log10_p + factor < math.log10(UNDECIDED_BELOW)]

    def of_part(names: Sequence[str]) -> str:
        if all(test in reasons for test in names):
            return "not_tested"
        if any(test in shows for test in names):
            return "related"
        return "undecided" if any(test in doubtful for test in names) else unseen

    distances = {
        test: Distance(float(d.mean()), float(d.std(ddof=1)) / math.sqrt(len(d)))
        for test, d in ((test, tests[test].distances) for test in shows)
        if len(d) > 1
    }
    parts = {part: of_part(names) for part, names in TESTED.items()}
    return Candidate(name, signature.model, word, adjusted, match, distances, reasons, parts)


def _ranking_test(candidates: Sequence[Candidate]) -> str:
    """Returns the test by which relatives are ordered: that which shows the most of them."""
    counts = Counter(test for candidate in candidates for test in candidate.distances)
    return max((RESPONSES, MOMENTS, HEADS), key=lambda test: counts[test])


def _order(candidate: Candidate, test: str) -> tuple[int, float, float, str]:
    """Returns the place of a candidate: relatives by their distance in a test, then by p-value."""
    ranks = {"related": 0, "undecided": 1, "no_evidence": 2, "not_compared": 3, "not_testable": 4}
    distance = candidate.distances.get(test, Distance(math.inf, 0.0)).mean
    return ranks[candidate.verdict], distance, candidate.adjusted_log10_p or 0.0, candidate.name


def _closest(related: Sequence[Candidate]) -> tuple[tuple[str, ...], float | None]:
    """Returns the closest relatives, and how many standard errors lie between the first and the next one."""
    if not related:
        return (), None
    gaps = [_gap(related[0], other) for other in related[1:]]
    near = [other.name for other, gap in zip(related[1:], gaps) if gap < STANDARD_ERRORS]
    far = [gap for gap in gaps if gap >= STANDARD_ERRORS]
    return (related[0].name, *near), min(far) if far else None


def _as_parents(related: Sequence[Candidate], closest: Sequence[str]) -> tuple[str, ...]:
    """Returns the relatives beyond the closest that are at a distance of a merge's other parent, by a test of both."""
    found = []
    for other in related[1:]:
        shared = [test for test in related[0].distances if test in other.distances]
        if other.name not in closest and shared:
            near, far = related[0].distances[shared[0]].mean, other.distances[shared[0]].mean
            if far <= AS_PARENTS * near:
                found.append(other.name)
    return tuple(found)


def _gap(one: Candidate, other: Candidate) -> float:
    """Returns how many standard errors the second is farther away, in the first test that shows both; 0 if none does.

    Distances of two tests do not compare.
    """
    for test, near in one.distances.items():
        if test in other.distances:
            far = other.distances[test]
            spread = math.hypot(near.error, far.error)
            return (far.mean - near.mean) / spread if spread > 0 else 0.0
    return 0.0
