"""A signature compared with a suspect: on how many of the sampled units do two matchings agree, and where?

Each sampled layer is compared with every layer of the suspect. Its units are matched to the suspect's by one reading,
and apart from that by the other; under every disguise both matchings change alike. The null is that of
`statistics.calibration`: layers that do not correspond show how often matchings of these two models agree by chance,
and an allowance of 5 % accounts for units that independent models share by convergence. So p-values are calibrated, not
exact. Query heads are matched in the same way by their two forms; they are few, so that their agreement is summed over
the sampled layers, each with the best layer of the suspect (`head_null.best_layers_log_sf`).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int8

from tracing_jax.library import drawing
from tracing_jax.library.heads import HEAD_FORMS, forms_on, without_repeats
from tracing_jax.library.signature import SampledLayer, Signature, stored_moments
from tracing_jax.library.suspect import MomentSignatures, Suspect
from tracing_jax.matching import UnitMatching, live_units, match_units
from tracing_jax.options import RunOptions
from tracing_jax.statistics.calibration import DEFAULT_ALLOWANCE, DEFAULT_SOURCE, MARGIN, Null, null_of
from tracing_jax.statistics.comparison import LN10, Comparison, against_each_other
from tracing_jax.statistics.head_null import best_layers_log_sf
from tracing_jax.statistics.match_all import assign_layers, unexplained
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.unit_descriptors import whitened_cosines
from tracing_jax.statistics.verdict import UNDECIDED_BELOW

FEW_TOKENS = 8
"""Fewer shared token strings than this distinguish units too badly."""

_SURE_TOKENS = 32
"""Power has been measured with so many shared token strings, or all of a signature's."""

_BEST_BY_CHANCE = 0.05
"""Layers of which more heads agree than chance gives one in a row, with this probability, are no controls of chance."""

RESPONSES, MOMENTS, HEADS = "responses to tokens", "moments of weights", "attention heads"
TESTED: Mapping[str, tuple[str, ...]] = {"MLPs": (RESPONSES, MOMENTS), "attention": (HEADS,)}
"""Part of a model -> the tests of it."""


@dataclass(frozen=True)
class LayerPairResult:
    """A sampled layer against a layer of the suspect.

    Attributes:
      found: the comparison of both matchings.
      distances: of each unit on which they agree, 1 less its correlation with its partner, the mean of both readings.
    """

    found: Comparison
    distances: Float[np.ndarray, " A"]


@dataclass(frozen=True)
class SignatureTest:
    """One test of a signature against a suspect.

    Attributes:
      log10_p: of the sampled layers against all layers of the suspect, after Bonferroni over these.
      firm_log10_p: of those alone whose agreement is several times the allowance. Of heads, which are few, the p-value
        if so many times the allowance agree by convergence.
      attainable_log10_p: what the first would be if all units agreed.
      agreeing, units: of each sampled layer, the units that agree with its closest layer of the suspect, of so many.
      places: (sampled layer, layer of the suspect, agreeing units) of the layers that correspond.
      distances: of the agreeing units in these.

    Of a test of heads, units are heads.
    """

    log10_p: float
    firm_log10_p: float
    attainable_log10_p: float
    agreeing: tuple[int, ...]
    units: tuple[int, ...]
    places: tuple[tuple[int, int, int], ...]
    distances: Float[np.ndarray, " A"] = field(repr=False)

    @property
    def share(self) -> float:
        """The share of all sampled units that agree."""
        return sum(self.agreeing) / max(1, sum(self.units))


@dataclass(frozen=True)
class SignatureMatch:
    """What a signature and a suspect have in common.

    Attributes:
      tests: name -> evidence, of the tests that apply.
      not_tested: name -> the reason why a test does not apply.
    """

    tests: Mapping[str, SignatureTest]
    not_tested: Mapping[str, str]

    @property
    def log10_p(self) -> float | None:
        """The smallest p-value after Bonferroni over the tests; None if none applies."""
        return _smallest([evidence.log10_p for evidence in self.tests.values()])

    @property
    def firm_log10_p(self) -> float | None:
        """The same of evidence beyond several times the allowance, which alone can call models related."""
        return _smallest([evidence.firm_log10_p for evidence in self.tests.values()])

    @property
    def best(self) -> SignatureTest | None:
        """The test with the smallest p-value."""
        return min(self.tests.values(), key=lambda evidence: evidence.log10_p, default=None)


def place_name(suspect: Suspect, test: str, index: int) -> str:
    """Returns what the place in a suspect is called at which a test of this name found a sampled layer."""
    return suspect.layer_names[index] if test == HEADS else suspect.names[index]


def _smallest(log10_ps: Sequence[float]) -> float | None:
    return min(0.0, min(log10_ps) + math.log10(len(log10_ps))) if log10_ps else None


def compare(signature: Signature, suspect: Suspect) -> SignatureMatch:
    """Returns what a signature and a suspect have in common, in every layer of the suspect."""
    reasons = not_tested(signature, suspect)
    every = {RESPONSES: _by_responses, MOMENTS: _by_moments, HEADS: _by_heads}
    tests = {name: test(signature, suspect) for name, test in every.items() if name not in reasons}
    return SignatureMatch(tests, reasons)


def not_tested(signature: Signature, suspect: Suspect) -> dict[str, str]:
    """Returns the names of the tests that do not apply to a signature and a suspect, each with the reason."""
    found = _units_not_tested(signature, suspect)
    tokens = len(shared_head_tokens(signature, suspect)[0])
    if not signature.heads or not suspect.heads:
        found[HEADS] = (
            "one of both has no heads: it was read by its weights alone, its attention is of another kind or adds next "
            "to nothing, or its signature was made by an earlier version"
        )
    elif tokens < FEW_TOKENS:
        strings = f"{tokens} of the {drawing.HEAD_TOKENS} token strings of its heads"
        found[HEADS] = f"{strings} are among those read of the suspect"
    elif not _different_heads(signature, suspect):
        found[HEADS] = "no layer of the signature has two heads that differ from others"
    return found


def is_nearly_blind(signature: Signature, suspect: Suspect, match: SignatureMatch, tests: int) -> bool:
    """Returns whether a relation need not have shown: units were compared by few shared token strings alone, or few.

    Args:
      signature: the signature.
      suspect: the model.
      match: what they have in common.
      tests: how many p-values those of this match are adjusted with.
    """
    tokens = len(shared_columns(signature, suspect)[0])
    if RESPONSES in match.tests and MOMENTS not in match.tests and tokens < min(_SURE_TOKENS, len(signature.tokens)):
        return True
    of_units = [match.tests[name].attainable_log10_p for name in TESTED["MLPs"] if name in match.tests]
    return bool(of_units) and min(of_units) + math.log10(tests) >= math.log10(UNDECIDED_BELOW)


def _units_not_tested(signature: Signature, suspect: Suspect) -> dict[str, str]:
    tokens = len(shared_columns(signature, suspect)[0])
    reason = None
    if signature.kinds != suspect.kinds:
        kinds = [" and ".join(kinds) for kinds in (signature.kinds, suspect.kinds)]
        reason = f"the signature has responses of {kinds[0]}, the suspect of {kinds[1]}"
    elif 2 * sum(_is_empty(layer) for layer in suspect.layers) > len(suspect.layers):
        reason = "in most layers of the suspect no unit does anything"
    if reason:
        return {RESPONSES: reason, MOMENTS: reason}
    found = {}
    if tokens < FEW_TOKENS:
        found[RESPONSES] = f"{tokens} of the {len(signature.tokens)} token strings are the suspect's too"
    if not suspect.moments or not all(layer.moments for layer in signature.layers):
        found[MOMENTS] = (
            "one of both has no moments: it was read by its weights alone, its units do nothing, or its signature was "
            "made by an earlier version"
        )
    return found


def _is_empty(layer: Mapping[str, Int8[np.ndarray, "U S"]]) -> bool:
    return all(len(rows) == 0 for rows in layer.values())


def shared_columns(signature: Signature, suspect: Suspect) -> tuple[list[int], list[int]]:
    """Returns the columns of the token strings that both have: in the signature, and in the suspect."""
    both = [(i, suspect.columns[string]) for i, string in enumerate(signature.tokens) if string in suspect.columns]
    return [i for i, _ in both], [j for _, j in both]


def shared_head_tokens(signature: Signature, suspect: Suspect) -> tuple[list[int], list[int]]:
    """Returns the places of the token strings on which both have forms of heads: in the signature, in the suspect."""
    strings, found = signature.tokens[: drawing.HEAD_TOKENS], suspect.head_columns
    both = [(i, found[string]) for i, string in enumerate(strings) if string in found]
    return [i for i, _ in both], [j for _, j in both]


def head_groups(signature: Signature, suspect: Suspect) -> tuple[int, int]:
    """Returns the number of kv heads and of queries in each, as few kv heads as either model has."""
    shape, arch = signature.facts["shape"], suspect.arch
    K = min(shape["num_kv_heads"], arch.num_kv_heads)
    heads = min(shape["num_kv_heads"] * shape["q_group"], arch.num_kv_heads * arch.q_group)
    return K, -(-heads // K)


def normalised(rows: Int8[np.ndarray, "U S"] | Float[np.ndarray, "U S"]) -> Float[np.ndarray, "U S"]:
    """Returns rows of mean 0 and length 1; rows that do not vary are 0."""
    found = rows.astype(np.float32)
    found -= found.mean(axis=1, keepdims=True)
    length = np.sqrt(np.einsum("us,us->u", found, found))[:, None]
    found /= np.where(length > 0, length, 1.0)
    return found


def _by_responses(signature: Signature, suspect: Suspect) -> SignatureTest:
    shared = shared_columns(signature, suspect)
    # All sampled layers in one product: what it costs is mostly to read the suspect's.
    ours = {
        name: normalised(np.concatenate([layer.readings[name][:, shared[0]] for layer in signature.layers]))
        for name in signature.kinds
    }
    ends = np.cumsum([len(layer.units) for layer in signature.layers])
    table: list[list[LayerPairResult]] = [[] for _ in ends]
    for j, layer in enumerate(suspect.layers):
        found = {name: rows @ normalised(layer[name][:, shared[1]]).T for name, rows in ours.items()}
        for name in found.keys() - {"gate"}:
            np.abs(found[name], out=found[name])
        for i, (end, sampled) in enumerate(zip(ends, signature.layers)):
            rows = slice(end - len(sampled.units), end)
            names = (signature.digest, "responses", i, j)
            table[i].append(_cell({name: values[rows] for name, values in found.items()}, names))
    return _evidence(table, list(range(len(suspect.layers))), signature)


def _by_moments(signature: Signature, suspect: Suspect) -> SignatureTest:
    table: list[list[LayerPairResult]] = []
    for i, sampled in enumerate(signature.layers):
        names = (signature.digest, "moments", i)
        table.append([_moment_cell(sampled, theirs, (*names, j)) for j, theirs in suspect.moments.items()])
    return _evidence(table, list(suspect.moments), signature)


def _moment_cell(sampled: SampledLayer, theirs: MomentSignatures, names: Sequence[str | int]) -> LayerPairResult:
    found = {}
    for name, (standardised, covariance) in theirs.items():
        mean = (sampled.covariances[name].astype(np.float64) + covariance) / 2
        found[name] = whitened_cosines(stored_moments(sampled, name), standardised, mean).astype(np.float32)
    return _cell(found, names)


def _different_heads(signature: Signature, suspect: Suspect) -> dict[int, dict[str, Float[np.ndarray, "_ S2"]]]:
    """Returns the sampled layers with their forms on the shared tokens, of heads that occur twice one."""
    ours, _ = shared_head_tokens(signature, suspect)
    return without_repeats(
        {found.layer: {name: forms_on(found.forms[name], ours) for name in HEAD_FORMS} for found in signature.heads}
    )


def _by_heads(signature: Signature, suspect: Suspect) -> SignatureTest:
    sampled, (_, theirs) = _different_heads(signature, suspect), shared_head_tokens(signature, suspect)
    table: dict[int, list[LayerPairResult]] = {i: [] for i in sampled}
    for j, layer in suspect.heads.items():
        forms = {name: forms_on(layer[name], theirs) for name in HEAD_FORMS}
        for i, own in sampled.items():
            names = (signature.digest, "heads", i, j)
            table[i].append(_cell({name: own[name] @ forms[name].T for name in HEAD_FORMS}, names))
    found = _evidence_of_heads(table, list(suspect.heads), head_groups(signature, suspect))
    return found if suspect.heads_add else replace(found, firm_log10_p=0.0)


def _evidence_of_heads(
    table: Mapping[int, Sequence[LayerPairResult]], columns: Sequence[int], groups: tuple[int, int]
) -> SignatureTest:
    """Returns the evidence of the best layer of each sampled one, together.

    The best of many layers exceeds several times the allowance by chance. So evidence is firm if its p-value is small
    even where several times the allowance agree by convergence in each pair of layers.
    """
    controls = unexplained([[cell.found for cell in row] for row in table.values()], _BEST_BY_CHANCE / len(columns))
    lam = null_of(controls, [DEFAULT_ALLOWANCE], DEFAULT_SOURCE).lam
    closest = {i: int(np.argmax([cell.found.agreeing for cell in row])) for i, row in table.items()}
    agreeing = [table[i][j].found.agreeing for i, j in closest.items()]
    heads = [max(cell.found.units for cell in row) for row in table.values()]
    log_p, firm, attainable = (
        best_layers_log_sf(found, heads, *groups, u, lam, len(columns))
        for found, u in (
            (agreeing, DEFAULT_ALLOWANCE), (agreeing, MARGIN * DEFAULT_ALLOWANCE), (heads, DEFAULT_ALLOWANCE)
        )
    )  # fmt: skip
    found = log_p < math.log(RunOptions.level)
    places = [(i, j) for i, j in closest.items() if found and table[i][j].found.agreeing]
    return SignatureTest(
        log_p / LN10,
        firm / LN10,
        attainable / LN10,
        tuple(agreeing),
        tuple(heads),
        tuple((i, columns[j], table[i][j].found.agreeing) for i, j in places),
        np.concatenate([table[i][j].distances for i, j in places]) if places else np.zeros(0, np.float32),
    )


def _cell(similarities: Mapping[str, Float[np.ndarray, "U K"]], names: Sequence[str | int]) -> LayerPairResult:
    """Returns the agreement of the matchings by two similarities."""
    live = live_units(*similarities.values())
    one, other = (match_units(found, _generator(*names, kind), live) for kind, found in similarities.items())
    return LayerPairResult(against_each_other(one, other), _distances(one, other, similarities))


def _distances(
    one: UnitMatching, other: UnitMatching, similarities: Mapping[str, Float[np.ndarray, "U K"]]
) -> Float[np.ndarray, " A"]:
    same = (one.base == other.base) & (one.ft == other.ft)
    pairs = one.base[same], one.ft[same]
    return 1.0 - np.mean([found[pairs] for found in similarities.values()], axis=0)


def _evidence(
    table: Sequence[Sequence[LayerPairResult]], columns: Sequence[int], signature: Signature
) -> SignatureTest:
    """Returns the evidence of all cells; controls are those of `match_all.unexplained`."""
    rows = [[cell.found for cell in row] for row in table]
    cells, width = [cell for row in rows for cell in row], len(columns)
    null: Null = null_of(unexplained(rows), [DEFAULT_ALLOWANCE], DEFAULT_SOURCE)
    log_p = [null.log_p_agreement(0, cell) for cell in cells]
    attainable = [null.log_p_agreement(0, replace(cell, agreeing=cell.units)) for cell in cells]
    firm = [p if null.is_firm(0, c.agreeing / max(1, c.units)) else 0.0 for p, c in zip(log_p, cells)]
    square = np.array(log_p).reshape(len(table), width)
    found = assign_layers(square, math.log(RunOptions.level / len(cells)))
    closest = [row[int(square[i].argmin())].found for i, row in enumerate(table)]
    places = sorted({*found.pairs, *found.copies})
    distances = [table[i][j].distances for i, j in places]
    return SignatureTest(
        bonferroni(log_p) / LN10,
        bonferroni(firm) / LN10,
        bonferroni(attainable) / LN10,
        tuple(cell.agreeing for cell in closest),
        tuple(cell.units for cell in closest),
        tuple((signature.layers[i].layer, columns[j], table[i][j].found.agreeing) for i, j in places),
        np.concatenate(distances) if distances else np.zeros(0, np.float32),
    )


def _generator(*names: str | int) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
