"""Pairs of a large zoo, proposed by signatures: each model is read twice, and only pairs with a trace are compared.

What was found of a model is kept in `models/NAME.scan.json`, so that a launch that is started again continues.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from scipy import stats

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.experiment.metadata import file_stamps
from tracing_jax.experiment.models import open_model
from tracing_jax.experiment.signing import signature_of, suspect_of
from tracing_jax.library import Signature, SignatureMatch, Suspect, scan
from tracing_jax.library.comparison import HEADS, MOMENTS, RESPONSES
from tracing_jax.library.drawing import RULE
from tracing_jax.library.signature import SIGNATURE_FORMAT
from tracing_jax.library.signature_file import SUFFIX, read_signature, write_signature
from tracing_jax.options import RunOptions
from tracing_jax.progress import tqdm
from tracing_jax.record import atomic_write, plain
from tracing_jax.zoo.plan import PlannedPair, Proposal, ZooPlan
from tracing_jax.zoo.weights import MODELS

LEFT_OUT = "left_out.csv"
"""The pairs that are not compared, in the folder of a zoo."""

PROPOSED_BELOW = 0.5
"""A pair is compared in full if one of two p-values of a signature is below this, before any adjustment over pairs.

One is that of `scan`, which allows for units that independent models share; the other allows for none: how often so
many units agree in matchings at random, in any layer. It proposes more pairs, merges among them, and decides nothing.
The second, and that of heads, are adjusted over the models first: chance then proposes at most half a pair for each
model, and not a part of all pairs.
"""

FEWEST_DIVIDED = 32
"""Models that are divided among processes: to start these takes as long as to scan dozens of small models."""

CLOSED_PER_MODEL = 10
"""Two models without a trace in each other, that both have a clear one in a third, are compared too: only by
that pair is a model merged from two unrelated ones distinguished from a common relative. At most so many a model."""

_VERSION = {"format": SIGNATURE_FORMAT, "rule": RULE, "adjusted": "over models"}
"""With what is kept of a model: a zoo of an earlier version is signed and scanned anew."""

_BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_Found = Mapping[str, float | None]
_Library = tuple[tuple[str, int], ...]  # names of models, and when their signatures were written
_Result = TypeVar("_Result")


def proposed(plan: ZooPlan, folder: Path, workers: int = 1) -> tuple[ZooPlan, list[tuple[PlannedPair, str]]]:
    """Returns the plan with the pairs in which a signature of one model shows a sign of a relation in the other.

    Pairs that close a triangle of such pairs stay as well, see `CLOSED_PER_MODEL`. Models of which no signature can be
    made keep all their pairs. The pairs that are left out are returned beside it, each with the reason.

    Args:
      plan: with all pairs that are asked for.
      folder: of the zoo, which is made if need be.
      workers: processes among which the models are divided; this one alone if 1.

    Raises:
      OSError: a model's files cannot be read.
      ValueError: a process was ended from outside.
    """
    place = _Models(folder / MODELS)
    place.folder.mkdir(parents=True, exist_ok=True)
    reasons = _for_each(functools.partial(_sign, place), plan.names, workers, "signatures")
    unsigned = {model: reason for model, reason in reasons.items() if reason is not None}
    signed = {model: name for model, name in plan.names.items() if model not in unsigned}
    library = tuple((name, place.signature(name).stat().st_mtime_ns) for name in signed.values())
    found = _for_each(functools.partial(_traces, place, library), signed, workers, "scan")
    kept, left_out, closing = selected(plan, found, unsigned)
    proposal = Proposal(
        len(plan.pairs),
        len(left_out),
        sum(reason == _NOT_TESTABLE for _, reason in left_out),
        sum(bool(pair.related) for pair, _ in left_out),
        unsigned,
        closing,
    )
    return replace(plan, pairs=tuple(kept), proposal=proposal), left_out


_NO_TRACE, _NOT_TESTABLE = "no trace in signatures", "no test of signatures applies"


class Selection(NamedTuple):
    """The pairs to be compared, those left out, each with the reason, and how many of the former close a triangle."""

    kept: list[PlannedPair]
    left_out: list[tuple[PlannedPair, str]]
    closing: int


def selected(plan: ZooPlan, found: Mapping[str, _Found], unsigned: Collection[str] = ()) -> Selection:
    """Returns which pairs of a plan are compared.

    Args:
      plan: with all pairs that are asked for.
      found: model id -> for the name of each other model the log10 p of its signature; None where no test applies.
      unsigned: ids of the models that keep all their pairs.
    """
    traces = {
        pair: _trace(pair, plan, found) for pair in plan.pairs if not (pair.base in unsigned or pair.ft in unsigned)
    }
    reasons = {
        pair: _NOT_TESTABLE if trace is None else _NO_TRACE
        for pair, trace in traces.items()
        if trace is None or trace >= math.log10(PROPOSED_BELOW)
    }
    closing = _closing(traces, reasons, len(plan.names))
    kept = [pair for pair in plan.pairs if pair not in reasons or pair in closing]
    return Selection(kept, [(pair, why) for pair, why in reasons.items() if pair not in closing], len(closing))


def _trace(pair: PlannedPair, plan: ZooPlan, found: Mapping[str, _Found]) -> float | None:
    """Returns the smaller log10 p of the signatures of a pair; None where no test applies to either."""
    values = [found[pair.base].get(plan.names[pair.ft]), found[pair.ft].get(plan.names[pair.base])]
    return min((value for value in values if value is not None), default=None)


def _closing(
    traces: Mapping[PlannedPair, float | None], open_pairs: Collection[PlannedPair], models: int
) -> set[PlannedPair]:
    """Returns the pairs without a trace of models that both have one in a third, the clearest, as many as are allowed.

    A trace counts if its p-value is so small that chance gives a model less than one in all others, so that chance
    alone closes few triangles.
    """
    clear = math.log10(PROPOSED_BELOW / models)
    traces_of: dict[str, dict[str, float]] = {}
    for pair, trace in traces.items():
        if trace is not None and trace < clear:
            traces_of.setdefault(pair.base, {})[pair.ft] = traces_of.setdefault(pair.ft, {})[pair.base] = trace
    found: dict[PlannedPair, float] = {}
    for pair in open_pairs:
        one, other = traces_of.get(pair.base, {}), traces_of.get(pair.ft, {})
        if shared := one.keys() & other.keys():
            found[pair] = min(max(one[third], other[third]) for third in shared)
    return {*sorted(found, key=lambda pair: found[pair])[: CLOSED_PER_MODEL * models]}


class _Models(NamedTuple):
    """Where what was found of each model is kept."""

    folder: Path

    def signature(self, name: str) -> Path:
        """Returns the file of the signature of a model of this name."""
        return self.folder / f"{name}{SUFFIX}"


def _for_each(
    function: Callable[[str, str], _Result], models: Mapping[str, str], workers: int, description: str
) -> dict[str, _Result]:
    """Returns model id -> what a function of id and name gives, computed here or by so many other processes."""
    bar = functools.partial(tqdm, total=len(models), desc=description, unit="model", disable=None)
    if workers < 2 or len(models) < FEWEST_DIVIDED:
        return dict(zip(models, bar(map(function, models, models.values())), strict=True))
    # Forked processes would share the locks of JAX's threads.
    with (
        _few_threads(workers),
        ProcessPoolExecutor(min(workers, len(models)), get_context("spawn")) as pool,
    ):
        try:
            return dict(zip(models, bar(pool.map(function, models, models.values())), strict=True))
        except BrokenProcessPool:
            raise ValueError(
                f"{description}: a process that read a model was ended from outside, as where memory runs out; the "
                "same launch, with fewer --workers, continues with what is done"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _few_threads(processes: int) -> Iterator[None]:
    """Lets processes that start meanwhile share the cores: more threads of BLAS than cores wait in loops."""
    names = [name for name in _BLAS_THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(names, str(max(1, (os.cpu_count() or 1) // processes))))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def _sign(place: _Models, model: str, name: str) -> str | None:
    """Makes the signature of a model, if there is none of the same files, and returns why it has none."""
    file, state = place.signature(name), place.folder / f"{name}.signed.json"
    try:
        current = {**_VERSION, "stamps": _stamps(open_model(model))}
        if _read(state) == current and file.exists():
            read_signature(file)
            return None
        signature = signature_of(model)
    except ValueError as error:
        return str(error).splitlines()[0]
    write_signature(signature, file)
    atomic_write(state, json.dumps(current).encode())
    return None


@functools.lru_cache(maxsize=1)
def _library(place: _Models, files: _Library) -> tuple[dict[str, Signature], str]:
    """Returns name -> signature, and a hash that identifies what a scan with these finds."""
    found = {name: read_signature(place.signature(name)) for name, _ in files}
    asked = [PROPOSED_BELOW, *(signature.digest for signature in found.values())]
    return found, hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _traces(place: _Models, files: _Library, model: str, name: str) -> _Found:
    """Returns for every other model's signature its log10 p against this model; None where no test applies."""
    signatures, library = _library(place, files)
    file, opened = place.folder / f"{name}.scan.json", open_model(model)
    state = {**_VERSION, "library": library, "stamps": _stamps(opened)}
    known = _read(file)
    if {key: known.get(key) for key in state} == state:
        return known["log10_p"]
    others = {other: signature for other, signature in signatures.items() if other != name}
    found: dict[str, float | None] = {}
    if others:
        suspect = suspect_of(opened, others.values())
        for candidate in scan(suspect, others, RunOptions.level).candidates:
            found[candidate.name] = 0.0 if candidate.match is None else _log10_p(candidate.match, suspect, len(others))
    atomic_write(file, json.dumps({**state, "log10_p": plain(found)}).encode())
    return found


def _log10_p(match: SignatureMatch, suspect: Suspect, models: int) -> float | None:
    """Returns the smallest of the p-values; None where no test applies.

    Those without an allowance, and of heads, are multiplied by the number of models: of unrelated pairs a part has a
    small one, which would be proposed. With an allowance the p-values of units are mostly 1 where nothing is related.
    """
    if match.log10_p is None:
        return None
    columns = {RESPONSES: len(suspect.layers), MOMENTS: len(suspect.moments)}
    of_units = {name: evidence for name, evidence in match.tests.items() if name in columns}
    by_heads = match.tests[HEADS].log10_p + math.log10(models) if HEADS in match.tests else 0.0
    if not of_units:
        return min(by_heads, 0.0)
    cells = sum(len(evidence.units) * columns[name] for name, evidence in of_units.items())
    most = max(max(evidence.agreeing) for evidence in of_units.values())
    # The number of fixed points of a random permutation is close to Poisson(1), whatever its size.
    by_chance = (float(stats.poisson.logsf(most - 1, 1.0)) + math.log(cells * models)) / math.log(10)
    least = min(evidence.log10_p for evidence in of_units.values()) + math.log10(len(of_units))
    return min(least, by_chance, by_heads, 0.0)


def _stamps(model: Checkpoint) -> Any:
    return json.loads(json.dumps(plain(file_stamps(model.tensors.files()))))


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write_left_out(folder: Path, left_out: Sequence[tuple[PlannedPair, str]], plan: ZooPlan) -> None:
    """Writes the pairs that a plan leaves out into the folder of a zoo; without a proposal there is no such file."""
    file = folder / LEFT_OUT
    if plan.proposal is None:
        file.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("base", "ft", "reason", "known_related"))
    writer.writerows((plan.names[pair.base], plan.names[pair.ft], why, pair.related) for pair, why in left_out)
    atomic_write(file, text.getvalue().encode())
