"""Which method a merge was made by: the one that best predicts entries that no method was fitted to.

Among methods that predict them about equally well the simplest is named: one with fewer numbers of its own.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracing_jax.merges import methods
from tracing_jax.merges.methods import Entries, Method, entries_of, log_likelihood
from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.normal_equations import NormalEquations
from tracing_jax.merges.parent_shares import ROUNDING_TIMES
from tracing_jax.merges.reproduced_entries import ReproducedEntries, reproduced_entries

_TENSORS = 64
"""At most so many tensors are sampled, spread over the model."""
_FEWEST = 48
"""Tensors of fewer sampled entries say too little."""
_EQUALS = ("dare_linear", "dare_ties")
_BETTER_BY = 0.02
"""Nats per held-out entry by which a method must beat a simpler one, besides three standard errors."""


@dataclass(frozen=True)
class Choice:
    """The method that was named, and how well each one did.

    Attributes:
      method: None where there is nothing to choose.
      nats: method -> log likelihood per held-out entry, less that of the best.
      alike: methods that predict as well as the one named.
      residual: what the method leaves of the child's difference from the reference, in squares, on held-out entries.
      reproduced: of TIES and DARE, the held-out entries that are predicted to rounding.
    """

    method: Method | None
    nats: dict[str, float] = field(default_factory=dict)
    alike: tuple[str, ...] = ()
    residual: float | None = None
    reproduced: ReproducedEntries | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for the record."""
        method = self.method
        return {
            "name": None if method is None else method.name,
            "parameters": {} if method is None else method.parameters,
            "nats_per_entry": self.nats,
            "alike": list(self.alike),
            "residual": self.residual,
            "exact": None if self.reproduced is None else self.reproduced.as_dict(),
        }


def choose(models: MergeModels, sums: NormalEquations, seed: int = 0) -> Choice:
    """Returns the method that best predicts held-out entries; see the module."""
    entries = sampled_entries(models, sums, seed)
    if not entries:
        return Choice(None)
    # Simplest first.
    found = [
        methods.copy(entries, units_of(models)),
        methods.stitched(entries, units_of(models)),
        methods.linear(entries),
        *(_slerp(models, entries, *pair) for pair in _pairs(models)),
        methods.linear_by_tensor(entries),
    ]
    if models.origin is not None and not any(_leaves_rounding(method, entries) for method in found):
        found += [methods.ties(entries, True), methods.ties(entries, False)]
        if models.terms <= methods.MOST_DROPPED:
            found += [methods.dare(entries, elect) for elect in (False, True)[: models.terms]]
    nats = np.array([[log_likelihood(method, e)[~e.train].sum() for e in entries] for method in found])
    held_out = np.array([(~e.train).sum() for e in entries], float)
    best = int(np.argmax(nats.sum(1)))
    alike = [i for i in range(len(found)) if _as_good(nats[i], nats[best], held_out)]
    named = alike[0]
    if found[named].name in _EQUALS:  # of methods with equally many numbers the better one
        named = max((i for i in alike if found[i].name in _EQUALS), key=lambda i: float(nats[i].sum()))
    per_entry: dict[str, float] = {}
    for i, method in enumerate(found):
        value = float((nats[i] - nats[best]).sum() / held_out.sum())
        per_entry[method.name] = max(value, per_entry.get(method.name, -np.inf))
    others = dict.fromkeys(found[i].name for i in alike if found[i].name != found[named].name)
    reproduced = reproduced_entries(found[named], entries, sums.dtype)
    return Choice(found[named], per_entry, tuple(others), _residual(found[named], entries), reproduced)


def units_of(models: MergeModels) -> list[np.ndarray]:
    """Returns the coefficients that make each model: the reference, and every other parent."""
    return [np.zeros(models.terms), *np.eye(models.terms)]


def name_of_unit(models: MergeModels, unit: int) -> str | None:
    """Returns the name of the parent that one of the `units_of` is; None for the origin."""
    names = (None, *models.names) if models.origin is not None else models.names
    return names[unit]


def sampled_entries(models: MergeModels, sums: NormalEquations, seed: int = 0) -> list[Entries]:
    """Returns the entries that methods are compared on: of some tensors, spread over the model."""
    usable = [t for t in sums.tensors if len(t.sample) >= _FEWEST]
    step = max(1, math.ceil(len(usable) / _TENSORS))
    found = (entries_of(tensor, models.terms, seed) for tensor in usable[::step])
    return [e for e in found if np.abs(e.x[:, e.train]).max(1).all()]


def _pairs(models: MergeModels) -> list[tuple[int, int]]:
    """Returns which two models may have been interpolated on a sphere."""
    count = models.terms + 1
    return list(itertools.combinations(range(count), 2)) if count <= 5 else []


def _slerp(models: MergeModels, entries: Sequence[Entries], one: int, other: int) -> Method:
    units = units_of(models)
    found = methods.slerp(entries, units[one], units[other])
    return Method(found.name, {"between": [one, other], **found.parameters}, found.values)


def _leaves_rounding(method: Method, entries: Sequence[Entries]) -> bool:
    """Returns whether a method explains the child to the last digits, so that no other one can do better."""
    errors = (np.square(e.y - method.values(e)[0][0])[~e.train].mean() for e in entries)
    return all(error <= ROUNDING_TIMES * e.rounding for error, e in zip(errors, entries))


def _as_good(own: np.ndarray, best: np.ndarray, held_out: np.ndarray) -> bool:
    """Returns whether a method predicts as well as the best, by its sum over tensors or nearly so."""
    worse = best - own
    error = 3 * math.sqrt(len(worse) * float(worse.var()))
    return bool(worse.sum() <= max(_BETTER_BY * held_out.sum(), min(error, 5 * _BETTER_BY * held_out.sum())))


def _residual(method: Method, entries: Sequence[Entries]) -> float:
    """Returns the squares left of those of the child's difference, tensors by their size."""
    rest = total = 0.0
    for e in entries:
        values, log_weights = method.values(e)
        mean = np.exp(log_weights) @ values
        weight = e.size / max(1, (~e.train).sum())
        rest += weight * float(np.square(e.y - mean)[~e.train].sum())
        total += weight * float(np.square(e.y)[~e.train].sum())
    return rest / total if total else 0.0
