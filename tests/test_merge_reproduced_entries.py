"""Parts of parents that explain little by least squares: by entries that are theirs, not by what training shares."""

import ml_dtypes
import numpy as np
import pytest

from tests.test_merges import leaves, model
from tracing_jax.merges import MergeModels, read_sums
from tracing_jax.merges.merge_report import compared
from tracing_jax.merges.methods import Entries, copy, dare
from tracing_jax.merges.models import TensorKey
from tracing_jax.merges.reproduced_entries import reproduced_entries


def tensor_of(y, x, ref, layer):
    """Entries of a tensor as they would be drawn of it: the child, the origin and the parents in bfloat16."""
    child, origin, *parents = ((ref + own).astype(ml_dtypes.bfloat16).astype(float) for own in (y, 0 * y, *x))
    y, x = child - origin, np.stack(parents) - origin
    columns = np.stack([y, *x, origin])
    rank = np.argsort(np.argsort(-np.abs(x), axis=1), axis=1) / len(y)
    train = np.arange(len(y)) % 2 == 0
    place, gram = TensorKey(f"layers/{layer}", layer, "mlp"), columns @ columns.T
    return Entries(place, float(len(y)), y, x, origin, rank, train, gram, 1e-9)


@pytest.mark.parametrize(("made", "wanted"), [("dare", [True, True, False]), ("on the same text", [False] * 3)])
def test_training_reproduces_no_entries(made, wanted):
    """Of a child with half of what a parent has in squares, however many of the other half are dropped at random."""
    rng, entries = np.random.default_rng(0), []
    for layer in range(4):
        x, ref = 0.02 * rng.normal(size=(3, 1024)), 0.1 * rng.normal(size=1024)
        kept = rng.random((2, 1024)) < 0.4
        own = 0.02 * rng.normal(size=1024)
        y = (kept * x[:2]).T @ [1.5, 1.0] if made == "dare" else (x[0] + own) / np.sqrt(2)
        entries.append(tensor_of(y, x, ref, layer))
    found = reproduced_entries(dare(entries, elect=False), entries, "bfloat16")
    assert [found.shows(k) for k in range(3)] == wanted
    assert (found.share > 0.8) is (made == "dare")
    if made == "dare":  # both are in a quarter of the entries that have one
        np.testing.assert_allclose(found.needs, [0.4 / 0.64, 0.4 / 0.64, 0], atol=0.06)
    assert reproduced_entries(copy(entries, [np.zeros(3), *np.eye(3)]), entries, "bfloat16") is None


def test_differences_of_one_step_of_the_grid_are_not_rounding():
    """What two fine-tunes have in common is no part, though all that differs is of the size of rounding."""
    rng = np.random.default_rng(1)
    origin = {name: leaf.astype(ml_dtypes.bfloat16).astype(float) for name, leaf in leaves(0).items()}
    steps = {name: 2.0 ** (np.floor(np.log2(np.abs(leaf) + 1e-9)) - 7) for name, leaf in origin.items()}
    common = {name: 0.5 * rng.normal(size=leaf.shape) for name, leaf in origin.items()}

    def tuned(share):
        return {
            n: leaf + steps[n] * (share * common[n] + 0.5 * rng.normal(size=leaf.shape)) for n, leaf in origin.items()
        }

    child, like, other = (model(tuned(share), ml_dtypes.bfloat16) for share in (1, 1, 0))
    models = MergeModels(child, {"like": like, "other": other}, model(origin, ml_dtypes.bfloat16))
    found = compared(models, read_sums(models), 0, {})
    assert [part.word for part in found.parts] == ["reserved", "none"]
    assert found.parts[0].adjusted_log10_p < -3 < -1 < found.parts[1].adjusted_log10_p
    assert 0.15 < found.parts[0].alone < 0.5
    assert found.whole.fit.rest < 8 * found.whole.fit.rounding
