"""Tests of claims: those of descent by the verdict of the tests, all others by the two checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import replace

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
from tracing_jax.claims.kept_units import pruned_of
from tracing_jax.claims.low_rank import adapter_of
from tracing_jax.claims.quantised_of import quantised_of
from tracing_jax.claims.same_function import same_as


def check_claim(claim: str, inputs: ClaimInputs) -> ClaimResult:
    """Returns what became of a claim on a pair.

    Raises:
      KeyError: there is no such claim.
    """
    found = _JUDGES[claim](inputs)
    rests_on_nothing_found = found.outcome != "not_testable" and found.evidence.get("verdict") == "no_evidence"
    if rests_on_nothing_found and not inputs.is_default:
        why = "nothing was found, by tests of which only the default ones together have a measured power: run auto"
        return result(claim, "not_testable", why, **found.evidence)
    if rests_on_nothing_found and inputs.scope:  # other parts may decide
        return result(claim, "not_testable", verdict_sentence(inputs.verdict), **found.evidence)
    return replace(found, because=f"{found.because}; {inputs.scope}") if inputs.scope else found


def _finetune_of(inputs: ClaimInputs) -> ClaimResult:
    if inputs.is_identical:
        return identical_result("finetune-of", inputs)
    found = inputs.verdict
    differing = [size for size in SIZES if getattr(inputs.base.arch, size) != getattr(inputs.ft.arch, size)]
    if found.verdict == "no_evidence":
        tests = "tests that find fine-tunes after every known rewrite"
        why = f"no sign of common weights was found, by {tests}"
        return result("finetune-of", "contradicted", why, verdict=found.verdict)
    if found.verdict == "related" and differing:
        why = f"the models are related, but not of one shape: they differ in {size_names(differing)}"
        return result("finetune-of", "contradicted", why, verdict=found.verdict, differing=differing)
    if found.verdict == "related":
        why = f"the weights are not independent, and the shapes are the same; {inputs.tensors}; direction is not tested"
        if parts := part_findings(found):
            why += f"; by part: {parts}"
        return result("finetune-of", "holds", why, verdict=found.verdict)
    return result("finetune-of", "not_testable", verdict_sentence(found), verdict=found.verdict)


def _merge_of(inputs: ClaimInputs) -> ClaimResult:
    if inputs.is_identical:
        return identical_result("merge-of", inputs)
    found = inputs.verdict
    if found.verdict == "no_evidence":
        why = "no sign of common weights was found, by tests that find averages of up to three models"
        return result("merge-of", "contradicted", why, verdict=found.verdict)
    why = "from base alone a further parent does not show: name the parents to tracing-jax merge"
    return result("merge-of", "not_testable", f"{why}; {verdict_sentence(found)}", verdict=found.verdict)


def _from_scratch(inputs: ClaimInputs) -> ClaimResult:
    found = inputs.verdict
    if found.verdict == "identical":
        return result("from-scratch", "contradicted", found.meaning, verdict=found.verdict)
    if found.verdict == "related":
        why = f"{found.meaning}; models that started from one initialisation, such as that of one random seed, are too"
        return result("from-scratch", "contradicted", why, verdict=found.verdict)
    if found.verdict == "no_evidence":
        why = f"no evidence against it was found: {found.meaning}"
        return result("from-scratch", "holds", why, verdict=found.verdict, limits=dict(found.limits))
    return result("from-scratch", "not_testable", verdict_sentence(found), verdict=found.verdict)


_JUDGES: Mapping[str, Callable[[ClaimInputs], ClaimResult]] = {
    "same-as": same_as, "finetune-of": _finetune_of, "adapter-of": adapter_of, "quantised-of": quantised_of,
    "pruned-of": pruned_of, "merge-of": _merge_of, "from-scratch": _from_scratch,
}  # fmt: skip
