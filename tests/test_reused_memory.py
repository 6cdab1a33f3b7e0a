"""Memory of large arrays is used again once nothing has it, and never while something does."""

import gc

import jax
import numpy as np
import pytest

from tracing_jax.checkpoint import reused_memory
from tracing_jax.checkpoint.reused_memory import LARGE, empty


@pytest.fixture(autouse=True)
def nothing_idle(monkeypatch):
    monkeypatch.setattr(reused_memory, "_IDLE", reused_memory._Idle())


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_an_array_that_is_gone_gives_its_memory_to_the_next_of_its_size():
    first = empty((4, LARGE), np.uint8)
    where = address(first)
    del first
    assert address(other := empty((2, LARGE), np.float16)) == where
    assert address(another := empty((4, LARGE), np.uint8)) != where  # it is taken
    assert (other.shape, other.dtype, another.flags.c_contiguous) == ((2, LARGE), np.float16, True)
    assert address(empty((LARGE,), np.uint8)) != where


def test_a_view_keeps_the_memory():
    first = empty((4, LARGE), np.uint8)
    first[...] = 7
    view = first.view(np.uint16).T[::2, 1:]
    del first
    other = empty((4, LARGE), np.uint8)
    other[...] = 1
    assert (view == 7 * 257).all()
    del view
    gc.collect()
    assert reused_memory._IDLE.bytes == 4 * LARGE


def test_a_jax_array_that_shares_it_keeps_the_memory():
    first = empty((LARGE,), np.float32)
    first[...] = 3
    shared = jax.device_put(first)
    if shared.unsafe_buffer_pointer() != address(first):
        pytest.skip("this JAX copies what it is given")
    del first
    others = [empty((LARGE,), np.float32) for _ in range(3)]
    for other in others:
        other[...] = 1
    assert (np.asarray(shared) == 3).all()


def test_what_was_not_used_for_longest_is_given_up(monkeypatch):
    monkeypatch.setattr(reused_memory, "MOST_IDLE", 3 * LARGE)
    arrays = [empty((n * LARGE,), np.uint8) for n in (1, 2, 1)]
    for i in range(3):
        arrays[i] = None
    assert {size // LARGE: len(blocks) for size, blocks in reused_memory._IDLE._blocks.items()} == {2: 0, 1: 2}
    big = empty((4 * LARGE,), np.uint8)
    del big
    assert reused_memory._IDLE.bytes == 2 * LARGE  # what is too large to keep displaces nothing
    assert empty((3,), np.float64).shape == (3,)  # small ones are numpy's
