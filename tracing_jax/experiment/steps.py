"""The steps of a run on one pair, in order, and how long each takes."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from absl import logging

from tracing_jax.alignment import Alignment
from tracing_jax.claims import ClaimInputs, ClaimResult, check_claim
from tracing_jax.data import TokenBlocks
from tracing_jax.experiment.aligning import align_ft, write_aligned
from tracing_jax.experiment.identity import identical_tensors
from tracing_jax.experiment.inputs import RunInputs, inapplicable
from tracing_jax.experiment.loading import check_disguise, load_pair, permute_ft
from tracing_jax.experiment.memory import Placement
from tracing_jax.experiment.merge_step import shares_in_ft, with_merge
from tracing_jax.experiment.metadata import alignment_facts, model_facts_in_background
from tracing_jax.experiment.validation import asked_names, has_auto_beside, is_asked_by_name
from tracing_jax.forward import token_losses
from tracing_jax.options import RunOptions
from tracing_jax.progress import working
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import ParamSource
from tracing_jax.statistics import (
    AUTO_BY_DEPTH,
    DECIDING,
    HIDING,
    Identity,
    Pair,
    Result,
    Statistic,
    hidden_by,
    inactive_layers,
    obscured_layers,
    scope_of,
    verdict,
    with_unread_units,
)


@dataclass
class StepTimer:
    """Seconds per step of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measures one step, and logs that it begins."""
        logging.info("%s ...", name)
        start = time.perf_counter()
        with working(name):
            yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


IDENTICAL = "all tensors are identical, which is the answer before any statistic"
"""Why a statistic that was not asked for by name is not computed of identical models."""


@dataclass
class Findings:
    """What the steps of a run found; None / empty if the step was not requested.

    Attributes:
      models: the facts of every model.
      identical: how many tensors of the two models are identical; None if one was changed before it was traced.
      scope: what was read of the models, where that is less than all.
      before, after: the results of the statistics, before and after the alignment.
      claim: what became of the claim.
      merge: the shares of other models in ft.
    """

    models: Mapping[str, Any] = field(default_factory=dict)
    identical: Identity | None = None
    scope: str = ""
    before: Mapping[str, Result] = field(default_factory=dict)
    after: Mapping[str, Result] = field(default_factory=dict)
    claim: ClaimResult | None = None
    merge: Mapping[str, Any] | None = None
    disguise: Mapping[str, Any] | None = None
    permutation: Mapping[str, Any] | None = None
    alignment: Alignment | None = None
    perplexity: Mapping[str, Any] | None = None

    def as_dict(self, level: float) -> dict[str, Any]:
        """Returns the fields of the record, with the verdict at this level."""
        return {
            "models": self.models,
            "disguised": self.disguise,
            "permuted": self.permutation,
            "alignment": None if self.alignment is None else alignment_facts(self.alignment),
            "statistics": {
                name: {
                    "non_aligned": result.as_dict(),
                    "aligned": self.after[name].as_dict() if name in self.after else None,
                }
                for name, result in self.before.items()
            },
            "identical": None if self.identical is None else asdict(self.identical),
            "verdict": with_merge(verdict(self.before, level, self.identical, self.scope).as_dict(), self.merge),
            "claim": None if self.claim is None else self.claim.as_dict(),
            "merge": self.merge,
            "perplexity": self.perplexity,
        }


def run_steps(
    options: RunOptions, inputs: RunInputs, placement: Placement, run_cache: RunCache, timer: StepTimer
) -> Findings:
    """Runs all requested steps but saving. Replaced models are freed."""
    found = Findings(scope=_scope(options, inputs))
    if options.claim or not (inputs.disguise or options.permute or inputs.reads_few_weights):
        with timer.step("identical tensors"):
            found.identical = identical_tensors(inputs.base, inputs.ft)
    with timer.step("load"):
        pair = load_pair(options, inputs, placement, run_cache)
    hashed = not (inputs.reads_few_weights or options.max_layers)
    with model_facts_in_background(inputs.models(), hashed) as model_facts:
        if inputs.disguise:
            with timer.step("disguise"):
                found.disguise = check_disguise(options, inputs, pair)
        if options.permute:
            with timer.step("permute"):
                pair, found.permutation = permute_ft(options, pair)
        needless = _needless(options, inputs, found.identical)
        with timer.step("statistic"):
            inputs = _without_needless_layer_map(options, inputs, pair)
            found.before = _compute(inputs, pair, needless | inputs.not_applicable)
            if beyond := _layers_left_out(options, inputs):
                found.before = {name: _without_layers(name, result, beyond) for name, result in found.before.items()}
        if options.claim:
            with timer.step("claim"):
                found.claim = _judged(options, inputs, pair, found)
        if inputs.merge is not None:
            with timer.step("merge"):
                found.merge = shares_in_ft(inputs.merge, options.seed)
        if options.align and not inputs.not_alignable:
            with timer.step("align"):
                pair, found.alignment = align_ft(options, inputs, pair)
        if found.alignment is not None:
            with timer.step("statistic aligned"):
                # What is aligned has no p-value: tests that are there for the verdict alone are not computed again.
                asked = {n: s for n, s in inputs.statistics.items() if n in asked_names(options)}
                reasons = inapplicable(asked, pair.base.arch, pair.ft.arch, inputs.vocabularies)
                found.after = _compute(replace(inputs, statistics=asked), pair, needless | reasons)
        if options.eval:
            with timer.step("perplexity"):
                found.perplexity = _perplexities(inputs, pair)
        if options.save_aligned and found.alignment is not None:
            with timer.step("write aligned"):
                write_aligned(options, inputs, pair, found.alignment)
        with timer.step("hashes"):
            found.models = model_facts()
    return found


def _layers_left_out(options: RunOptions, inputs: RunInputs) -> str:
    """Returns which layers `max_layers` leaves out, as a noun; empty if it is not set, or no model has more."""
    most = options.max_layers
    if not most or max(model.arch.num_layers for model in (inputs.base, inputs.ft)) < most:
        return ""
    return f"what is in layers after the first {most}" if most > 1 else "what is in layers after the first"


def _scope(options: RunOptions, inputs: RunInputs) -> str:
    """Returns what is compared of the models, as a clause, where that is less than all; empty if all is."""
    clauses = [scope_of(inputs.base.arch, inputs.ft.arch, options.component)]
    if left_out := _layers_left_out(options, inputs):
        clauses.append(f"{left_out} was not compared (max_layers={options.max_layers})")
    return "; ".join(filter(None, clauses))


def _without_layers(name: str, result: Result, left_out: str) -> Result:
    if name not in HIDING or result.not_applicable:
        return result
    return replace(result, blind_to=(*(result.blind_to or ()), left_out))


def _needless(options: RunOptions, inputs: RunInputs, identical: Identity | None) -> dict[str, str]:
    """Returns why statistics that were not asked for by name are not computed of identical models."""
    if identical is None or not identical.is_whole:
        return {}
    return {name: IDENTICAL for name in inputs.statistics if not is_asked_by_name(options, name)}


def _judged(options: RunOptions, inputs: RunInputs, pair: Pair, found: Findings) -> ClaimResult:
    assert options.claim is not None
    said = verdict(found.before, options.level, found.identical, found.scope)
    is_default = bool({"auto", "all"} & set(options.stat)) or has_auto_beside(options)
    given = ClaimInputs(inputs.base, inputs.ft, pair, said, found.before, options.seed, found.scope, is_default)
    return check_claim(options.claim, given)


def _without_needless_layer_map(options: RunOptions, inputs: RunInputs, pair: Pair) -> RunInputs:
    """Returns the inputs without the statistic that maps layers, if `auto` alone asks for it and they keep their index.

    What decides is found in each model by itself: the tests stay fixed before the models are compared.
    """
    if (
        AUTO_BY_DEPTH not in inputs.statistics
        or is_asked_by_name(options, AUTO_BY_DEPTH)
        or pair.base.arch.num_layers != pair.ft.arch.num_layers
        or _layers_may_be_moved(pair)
    ):
        return inputs
    # In place: the record holds this list.
    inputs.notes[:] = [note for note in inputs.notes if not note.startswith(f"{AUTO_BY_DEPTH}: ")]
    return replace(inputs, statistics={n: s for n, s in inputs.statistics.items() if n != AUTO_BY_DEPTH})


def _layers_may_be_moved(pair: Pair) -> bool:
    return bool(inactive_layers(pair.base) or inactive_layers(pair.ft))


def _units_are_obscured(pair: Pair) -> bool:
    return any(2 * len(obscured_layers(model)) > model.arch.num_layers for model in (pair.base, pair.ft))


def _compute(inputs: RunInputs, pair: Pair, not_applicable: Mapping[str, str]) -> dict[str, Result]:
    """Steps 3 and 5: every statistic that applies; of the others the reason."""
    results = {}
    for i, (name, statistic) in enumerate(inputs.statistics.items()):
        if reason := not_applicable.get(name):
            results[name] = Result(None, name, not_applicable=reason)
        else:
            with working(f"{name} ({i + 1} of {len(inputs.statistics)})"):
                results[name] = _computed_or_restored(name, statistic, pair)
    return results


def _computed_or_restored(name: str, statistic: Statistic, pair: Pair) -> Result:
    """Returns the result of a statistic, kept from an interrupted run or computed now."""
    run_cache = pair.run_cache.scope("results")
    fields: dict[str, Any] | None = run_cache.load(dict, name)
    if fields is not None:
        return Result.restored(fields, run_cache.load_arrays(name) or {})
    result = statistic.compute(pair)
    if name in HIDING:  # of others nothing more is read
        facts = _layers_may_be_moved(pair), _units_are_obscured(pair)
        hidden = hidden_by(name, pair.base.arch, pair.ft.arch, *facts) or ()
        result = replace(result, blind_to=(*hidden, *(result.blind_to or ())))
    if name in DECIDING and not statistic.needs_tokens:
        result = with_unread_units(result, pair)
    if result.arrays:
        run_cache.save_arrays(lambda: result.arrays, name)
    run_cache.save(result.as_dict(), name)
    return result


def _perplexities(inputs: RunInputs, pair: Pair) -> dict[str, dict[str, float]]:
    """Step 6: perplexity of both models, each on its own tokens of the text."""
    assert inputs.text is not None
    sides = {"base": (pair.base, inputs.text.base), "ft": (pair.ft, inputs.text.ft)}
    return {side: _perplexity(pair, model, blocks, side) for side, (model, blocks) in sides.items()}


def _perplexity(pair: Pair, model: ParamSource, blocks: TokenBlocks, side: str) -> dict[str, float]:
    """Returns the perplexity of one model, per token and per byte."""
    run_cache = pair.run_cache.scope("perplexity", side)
    losses = token_losses(model, blocks.tokens, pair.compute, f"perplexity of {side}", run_cache)
    nats, num_bytes = float(losses.sum(dtype=np.float64)), int(blocks.num_bytes.sum())
    return {
        "loss_nats_per_token": nats / losses.size,
        "perplexity": float(np.exp(nats / losses.size)),
        "nats_per_byte": nats / num_bytes,
        "perplexity_per_byte": float(np.exp(nats / num_bytes)),
        "tokens": losses.size,
        "bytes": num_bytes,
    }
