"""Pairs of tiny models, one of them rewritten, for tests of what statistics do not see."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from tracing_jax.rewrites import Renaming, Rewrite, draw_rewrites
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.statistics import Pair, Result, Vocabularies

IDS = np.arange(61, dtype=np.int32)
"""All tokens of the tiny models."""

SAME = Vocabularies(True, IDS, IDS)
NO_TOKENS = Vocabularies(False, IDS[:0], IDS[:0])


def pair_of(base: InMemory, ft: InMemory, vocabularies: Vocabularies = SAME, **fields: object) -> Pair:
    """Returns a pair without text."""
    return Pair(base, ft, vocabularies, None, Compute(make_mesh(1, 1), 4), **{"seed": 0} | fields)


def changed(model: InMemory, names: str, seed: int = 7) -> InMemory:
    """Returns a random rewrite of a model, whose vocabulary stays."""
    return _applied(model, draw_rewrites(names, jax.random.key(seed), model.arch))


def pair_with_rewritten(base: InMemory, ft: InMemory, names: str, seed: int = 7) -> Pair:
    """Returns a pair of base and a random rewrite of ft, whose vocabulary may be renamed."""
    rewrites = draw_rewrites(names, jax.random.key(seed), ft.arch)
    renamed = any(isinstance(rewrite, Renaming) for rewrite in rewrites)
    vocabularies = Vocabularies(False, IDS, Renaming.composed(rewrites)) if renamed else SAME
    return pair_of(base, _applied(ft, rewrites), vocabularies)


def _applied(model: InMemory, rewrites: Sequence[Rewrite]) -> InMemory:
    found = in_memory(rewritten(model, rewrites))
    return InMemory(found.arch, jax.tree.map(jnp.asarray, found.params))


def related(base: InMemory, share: float, without: Sequence[str] = ()) -> InMemory:
    """Returns base with noise of this share; parts `without` are those of an unrelated model."""
    other = tiny.model(base.arch, 99).params
    params = tiny.noisy(base.params, share)
    return InMemory(base.arch, params | {part: other[part] for part in without})


def agreeing(result: Result) -> dict[str, list[int]]:
    """Returns the agreeing units of every test, place by place."""
    return {test.name: list(test.values["agreeing"]) for test in result.tests}
