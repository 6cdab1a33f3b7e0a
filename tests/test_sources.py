"""Sources: what is asked for part by part, or ahead of time, is what the whole tree holds."""

import threading

import numpy as np
import pytest
import tiny

from tracing_jax.rewrites import Permutation
from tracing_jax.sources import PrefetchingSource, in_memory, leaf, params_of, rewritten
from tracing_jax.tree import flatten, select

ARCHS = [tiny.llama_mha(), tiny.qwen3_gqa(), tiny.gemma_mqa(), tiny.gpt2(), tiny.mixtral()]


class Recording:
    """A source that says which layers were read, by which thread."""

    def __init__(self, model):
        self.model, self.read, self.threads = model, [], set()

    @property
    def arch(self):
        return self.model.arch

    def embed(self):
        return self.model.embed()

    def layer(self, index, only=()):
        self.read.append((index, tuple(only)))
        self.threads.add(threading.get_ident())
        return self.model.layer(index, only)

    def head(self):
        return self.model.head()


def equal(one, other):
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.family)
def test_reading_ahead_changes_nothing_and_reads_each_layer_once(arch):
    model = tiny.model(arch)
    source = Recording(model)
    assert equal(in_memory(PrefetchingSource(source)).params, model.params)
    assert source.read == [(i, ()) for i in range(arch.num_layers)]
    assert threading.get_ident() not in source.threads


def test_another_question_drops_what_was_read_ahead():
    model = tiny.model(tiny.llama_mha(num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3))
    ahead = PrefetchingSource(Recording(model))
    for index, only in ((0, ()), (0, ("mlp",)), (2, ("mlp/up_proj",)), (1, ("attn", "mlp_norm")), (2, ())):
        assert equal(ahead.layer(index, only), select(model.layer(index), only))


def test_what_is_asked_for_in_turns_is_read_ahead_in_turns():
    depth, turns = 4, (("mlp/gate_proj",), ("mlp/up_proj",))
    source = Recording(tiny.model(tiny.llama_mha(num_layers=depth, layer_ropes=(0,) * 4, layer_windows=(None,) * 4)))
    ahead = PrefetchingSource(source)
    asked = [(index, only) for index in range(depth) for only in turns]
    for index, only in asked:
        ahead.layer(index, only)
    # Each of the two first was followed by a guess, which is dropped if it was begun: their turns were not known yet.
    assert [one for one in source.read if one[0] >= 2] == asked[4:]
    assert len(source.read) <= len(asked) + 2


def test_an_error_of_the_thread_reaches_whoever_asks():
    class Broken(Recording):
        def layer(self, index, only=()):
            if index == 1:
                raise OSError("unplugged")
            return super().layer(index, only)

    ahead = PrefetchingSource(Broken(tiny.model(tiny.llama_mha())))
    ahead.layer(0)
    with pytest.raises(OSError, match="unplugged"):
        ahead.layer(1)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.family)
def test_lazy_leaves_have_the_shapes_and_values_of_the_tree(arch):
    model = tiny.model(arch)
    source = Recording(model)
    lazy, real = flatten(params_of(PrefetchingSource(source))), flatten(model.params)
    assert {name: found.shape for name, found in lazy.items()} == {name: own.shape for name, own in real.items()}
    assert not source.read
    for name, own in real.items():
        assert np.array_equal(np.asarray(lazy[name]), own)
        assert np.array_equal(leaf(model, name), own)
    assert len(source.read) == len([name for name in real if name.startswith("layers/")])


def test_a_leaf_of_a_permuted_source_is_that_of_the_permuted_tree():
    model = tiny.model(tiny.llama_mha())
    order = np.random.default_rng(0).permutation(model.arch.mlp_dim).astype(np.int32)
    source = rewritten(model, [Permutation({"layers/0/mlp": order})])
    up = "layers/0/mlp/up_proj/kernel"
    assert np.array_equal(leaf(source, up), np.asarray(flatten(model.params)[up])[:, order])
