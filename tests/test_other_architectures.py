"""Models of other architectures are compared wherever a test exists; the other tests say why they do not apply."""

import dataclasses

import numpy as np
import pytest
import tiny
from parity_cases import CASES
from rewritten_pairs import SAME, changed, pair_of

from tracing_jax.sources import InMemory
from tracing_jax.statistics.csu import Csu
from tracing_jax.statistics.features_in_place import FeaturesInPlace
from tracing_jax.statistics.heads_in_place import HeadsInPlace
from tracing_jax.statistics.l2 import L2
from tracing_jax.statistics.match_io import MatchIo
from tracing_jax.statistics.match_mlps import MatchMlps
from tracing_jax.statistics.mode import Mode
from tracing_jax.tree import flatten, unflatten

GPT2 = tiny.model(tiny.gpt2(num_layers=3, mlp_dim=40, layer_windows=(None,) * 3), 0)
NEOX = tiny.model(
    dataclasses.replace(
        CASES["gpt_neox-sequential"].arch(), vocab_size=GPT2.arch.vocab_size, num_layers=3, mlp_dim=40,
        layer_ropes=(0,) * 3, layer_windows=(None,) * 3,
    ),
    1,
)  # fmt: skip


def with_parts_of_gpt2() -> InMemory:
    """Returns the GPT-NeoX model with MLPs and embedding of the GPT-2, which is its head, and attention of its own."""
    own, theirs = flatten(NEOX.params), flatten(tiny.noisy(GPT2.params, 0.02))
    taken = {name: leaf for name, leaf in theirs.items() if name in own and "/attn" not in name}
    taken["head/lm_head/kernel"] = theirs["embed/embedding"].T
    assert len(taken) > 18
    return InMemory(NEOX.arch, unflatten(own | taken))


@pytest.mark.parametrize(
    "statistic", [Csu(), FeaturesInPlace(), MatchIo(), MatchMlps()], ids=lambda s: type(s).__name__
)
def test_what_a_gpt_neox_has_of_a_gpt2_is_found(statistic):
    assert not statistic.not_applicable(GPT2.arch, NEOX.arch, SAME)
    assert statistic.compute(pair_of(GPT2, with_parts_of_gpt2())).log10_p < -4
    assert statistic.compute(pair_of(GPT2, NEOX)).log10_p > -2


@pytest.mark.slow
def test_permuted_mlps_of_a_gpt2_in_a_gpt_neox_are_found():
    found = MatchIo().compute(pair_of(GPT2, changed(with_parts_of_gpt2(), "permute")))
    assert found.log10_p < -4


def test_tests_that_need_equal_blocks_or_heads_say_so():
    for statistic, why in (
        (Mode(), "different blocks"), (HeadsInPlace(), "different heads"), (L2(), "different"),
    ):  # fmt: skip
        assert why in statistic.not_applicable(GPT2.arch, NEOX.arch, SAME)[0]
    assert np.isfinite(Csu().compute(pair_of(NEOX, GPT2)).log10_p)
