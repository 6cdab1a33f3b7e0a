"""Rewrites keep the function of every family for which they exist, undo, compose, and are refused where they do not."""

import jax
import numpy as np
import pytest
from parity_cases import CASES, FAMILIES
from reference64 import logits64

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table, check
from tracing_jax.forward import logits
from tracing_jax.source import InMemory, disguised, in_memory
from tracing_jax.symmetry import (
    GainScaling,
    GainSetting,
    IdentityLayer,
    Padding,
    Permutation,
    QueryKeyMaps,
    Renaming,
    Rewrite,
    Rotation,
    UnitScaling,
    Untying,
    ValueMixing,
    arch_after,
    gains_in,
    inverses,
)
from tracing_jax.tree import flatten

TOLERANCES = {
    np.float64: 1e-10,  # weights kept in float64: what the mathematics of a rewrite leaves, times 1e5
    np.float32: 1e-4,  # weights rounded once to float32, whose products and sums over some hundred terms remain
}
"""dtype of the weights -> the most that a rewrite moves float64 logit, relative to the larger of 1 and the largest."""

REWRITES: tuple[type[Rewrite], ...] = (
    Padding, IdentityLayer, Permutation, GainScaling, GainSetting, Rotation, UnitScaling, ValueMixing, QueryKeyMaps,
    Renaming,
)  # fmt: skip
LAYOUTS = [f"{family}-{heads}-default" for family in FAMILIES for heads in ("mha-tied", "gqa-untied", "mqa-tied")]
OPTIONS = ["llama-both_biases", "llama-narrow_heads", "llama-relu", "qwen2-layer_types", "qwen3-attention_bias",
           "gemma-attention_bias", "gemma2-attention_bias", "gemma3_text-scaled_local_rope", "olmo-no_clip",
           "olmo-attention_bias", "olmo2-attention_bias", "granite-biases"]  # fmt: skip


def model(name: str, dtype: type = np.float64) -> InMemory:
    source = CASES[name].source()
    return InMemory(source.arch, jax.tree.map(lambda leaf: np.asarray(leaf, dtype), source.params))


def moved(before: InMemory, after: InMemory, tokens: np.ndarray, rewrites) -> float:
    """Returns the greatest change of a float64 logit, relative to the larger of 1 and the largest."""
    expected = logits64(before.arch, before.params, tokens)
    new_ids = np.arange(before.arch.vocab_size)
    for rewrite in rewrites:
        if isinstance(rewrite, Renaming):
            new_ids = rewrite.new_ids[new_ids]
    found = logits64(after.arch, after.params, new_ids[tokens])[..., new_ids]
    return np.abs(found - expected).max() / max(1.0, np.abs(expected).max())


def draw(types, arch: Arch, seed: int = 0) -> list[Rewrite]:
    """Returns a random rewrite of each type, for the facts that those before it leave."""
    rewrites: list[Rewrite] = []
    for i, kind in enumerate(types):
        rewrites.append(kind.random(jax.random.key(seed + i), arch_after(rewrites, arch)))
    return rewrites


def existing(arch: Arch) -> list[type[Rewrite]]:
    return [kind for kind in REWRITES if not kind.absent(arch)]


def same(tree, other, tolerance: float) -> bool:
    a, b = flatten(tree), flatten(other)
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return False
    return all(np.abs(a[name] - b[name]).max() <= tolerance for name in a)


def test_the_reference_is_the_engine():
    for name in ("llama-both_biases", "gemma2-gqa-tied-linear", "gemma3_text-pattern_2", "olmo-gqa-tied-linear",
                 "olmo2-mqa-untied-llama3", "granite-biases"):  # fmt: skip
        case = CASES[name]
        found = logits(case.source(), case.tokens())
        expected = logits64(case.arch(), case.source().params, case.tokens())
        np.testing.assert_allclose(found, expected, atol=2e-4 * max(1.0, np.abs(expected).max()), err_msg=name)


@pytest.mark.parametrize("name", LAYOUTS + OPTIONS)
def test_each_rewrite_alone_keeps_the_logits(name):
    before, tokens = model(name), CASES[name].tokens()
    for kind in existing(before.arch):
        rewrite = kind.random(jax.random.key(3), before.arch)
        after = in_memory(disguised(before, [rewrite]))
        check(after.params, axis_table(after.arch))
        assert moved(before, after, tokens, [rewrite]) <= TOLERANCES[np.float64], kind.name
        assert not same(before.params, after.params, 1e-6), kind.name


@pytest.mark.parametrize("name", LAYOUTS + OPTIONS)
def test_all_of_them_together_keep_the_logits_in_any_order(name):
    before, tokens = model(name, np.float32), CASES[name].tokens()
    types = existing(before.arch)
    for order in (types, types[::-1]):
        rewrites = draw(order, before.arch)
        after = in_memory(disguised(before, rewrites))
        assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {np.dtype(np.float32)}
        assert moved(before, after, tokens, rewrites) <= TOLERANCES[np.float32]


@pytest.mark.parametrize("name", LAYOUTS + OPTIONS)
def test_inverses_bring_every_weight_back(name):
    before = model(name)
    if before.arch.tied:  # what is untied stays so
        before = in_memory(disguised(before, [Untying()]))
    types = [kind for kind in existing(before.arch) if kind is not GainSetting]
    rewrites = draw(types, before.arch, seed=7)
    undo = list(inverses(rewrites, before.arch))
    if Rotation in types:  # it has folded the gains
        undo.append(GainSetting(gains_in(lambda prefix: _leaves(before, prefix), before.arch)))
    after = in_memory(disguised(before, rewrites + undo))
    assert same(before.params, after.params, 1e-10)


def _leaves(source: InMemory, prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): leaf for n, leaf in flatten(source.params).items() if n.startswith(prefix)}


@pytest.mark.parametrize("name", LAYOUTS + OPTIONS)
def test_table_says_of_every_leaf_what_it_does_on_the_residual_stream(name):
    table = axis_table(CASES[name].arch())
    assert all(len(row.sides) == len(row.axes) for row in table.leaves.values())
    for leaf, row in table.touching("embed").items():
        side = row.sides[row.axes.index("embed")]
        assert (side is None) == leaf.endswith("norm/scale"), leaf
        assert row.fed_by is None or side == "reads"
    for kind in ("mlp", "v_dim", "qk_dim"):
        for axis in table.axes_of_kind([kind]):
            rows = table.touching(axis).values()
            assert {row.sides[row.axes.index(axis)] for row in rows} >= {"writes", "reads"}
