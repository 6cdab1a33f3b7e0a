"""Alignment undoes disguises: aligning a disguised model gives what aligning the model itself gives."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest
import tiny
from reference64 import logits64

from tracing_jax import experiment
from tracing_jax.alignment import KINDS, AlignmentError, align, aligned, alignment_problems, balance
from tracing_jax.alignment import aligning as module
from tracing_jax.alignment.balance import Sides, factors, matrices
from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import load, open_checkpoint
from tracing_jax.sharding import make_mesh
from tracing_jax.source import InMemory, disguised, in_memory
from tracing_jax.symmetry import (
    DRAWN,
    IdentityLayer,
    Padding,
    Permutation,
    Renaming,
    Rewrite,
    Rotation,
    UnitScaling,
    ValueMixing,
    draw_rewrites,
    random_permutations,
)
from tracing_jax.tree import flatten, map_named

EXACT = 1e-10
"""The most that float64 weights may differ between align(disguise(ft)) and align(ft); measured: at most 2e-13."""

ARCHS = {
    "mha_biases": tiny.llama_mha,
    "gqa": tiny.qwen3_gqa,
    "mqa_gains_minus_one": tiny.gemma_mqa,
    "norms_behind_blocks": tiny.olmo2_gqa,
    "layer_norm_biases": tiny.gpt2,
    "experts": tiny.mixtral,
}
DISGUISES = [name for name in DRAWN if name != Renaming.name]


def in_float64(arch: Arch, seed: int = 0) -> InMemory:
    return InMemory(arch, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny.params_of(arch, seed)))


def finetuned(base: InMemory, share: float = 0.1) -> InMemory:
    """Returns base with noise of `share` of each leaf's own standard deviation, in float64."""
    rng = np.random.default_rng(1)
    noisy = map_named(lambda _, w: w + share * w.std() * rng.normal(size=w.shape), base.params)
    return InMemory(base.arch, noisy)


def drawn(names: str, arch: Arch, seed: int = 3) -> tuple[Rewrite, ...]:
    return draw_rewrites(names, jax.random.key(seed), arch, without=(Renaming.name,))


def greatest_difference(one: InMemory, other: InMemory) -> float:
    a, b = flatten(one.params), flatten(other.params)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def logits_apart(one: InMemory, other: InMemory) -> float:
    tokens = np.random.default_rng(0).integers(one.arch.vocab_size, size=(1, 12))
    expected = logits64(one.arch, one.params, tokens)
    return float(np.abs(logits64(other.arch, other.params, tokens) - expected).max() / max(1, np.abs(expected).max()))


@pytest.fixture(autouse=True)
def proof_in_float64(monkeypatch, request):
    """The proof runs the engine, in float32, once per shape and compiled; here the float64 reference proves the same."""
    if "engine" in request.keywords:
        return

    def check(before, after, *, seed):
        moved = logits_apart(in_memory(before), in_memory(after))
        if not moved <= 1e-9:
            raise ValueError(f"logits move by {moved}")
        return moved

    monkeypatch.setattr(module, "check_function", check)
    monkeypatch.setattr(module, "_logits_moved", lambda ft, permutations, seed: 0.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_aligning_a_disguised_model_is_aligning_the_model(arch):
    base = in_float64(ARCHS[arch]())
    ft = finetuned(base)
    plain = in_memory(aligned(ft, align(base, ft, ("all",), evidence="weights")))
    assert plain.arch.num_layers == base.arch.num_layers
    names = [name for name in DISGUISES if not DRAWN[name].absent(base.arch)]
    for listed in [*names, ",".join(names), ",".join(names[::-1])]:
        hidden = in_memory(disguised(ft, drawn(listed, ft.arch)))
        found = align(base, hidden, ("all",), evidence="weights")
        assert found.logits_moved < 1e-9
        again = in_memory(aligned(hidden, found))
        assert dataclasses.replace(again.arch, norm_eps=0.0) == dataclasses.replace(plain.arch, norm_eps=0.0)
        assert again.arch.norm_eps == pytest.approx(base.arch.norm_eps, rel=1e-12)
        assert greatest_difference(again, plain) < EXACT, listed
        assert logits_apart(ft, again) < EXACT, listed
