"""Laws of the assignment: the optimum and its proof, whatever the matrix; equivariance; one answer on all devices."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tracing_jax.matching import DeviceRowReducer, HostRowReducer, assign, match_units, optimal_assignment

F = np.float32


def gaussian(rng, n, m):
    return rng.standard_normal((n, m), F)


def integers(rng, n, m):
    return rng.integers(0, 4, (n, m)).astype(F)


def constant(rng, n, m):
    return np.full((n, m), rng.choice([-1, 0, 1]), F)


def zero_units(rng, n, m):
    found = gaussian(rng, n, m)
    found[rng.permutation(n)[: n // 3]] = 0
    found[:, rng.permutation(m)[: m // 3]] = 0
    return found


def duplicates(rng, n, m):
    return gaussian(rng, n, m)[rng.integers(0, n, n)][:, rng.integers(0, m, m)]


def low_rank(rng, n, m):
    d = int(rng.integers(1, 4))
    return gaussian(rng, n, d) @ gaussian(rng, d, m)


def badly_scaled(rng, n, m):
    return (gaussian(rng, n, m) * 10.0 ** rng.uniform(-30, 30, (n, m))).astype(F)


def badly_scaled_units(rng, n, m):
    return (gaussian(rng, n, m) * 10.0 ** rng.uniform(-14, 14, (n, 1)) * 10.0 ** rng.uniform(-14, 14, m)).astype(F)


def related(rng, n, m):
    return 0.1 * gaussian(rng, n, m) + np.eye(n, m, dtype=F)[rng.permutation(n)]


def common_directions(rng, n, m):
    common = gaussian(rng, 3, 40)
    x, y = (gaussian(rng, size, 3) @ common + gaussian(rng, size, 40) for size in (n, m))
    return np.corrcoef(x, y)[:n, n:].astype(F)


KINDS = (
    gaussian, integers, constant, zero_units, duplicates, low_rank, badly_scaled, badly_scaled_units, related,
    common_directions,
)  # fmt: skip


def on_device(matrix, rows=None, columns=None, absolute=False):
    n, m = matrix.shape
    rows, columns = (np.arange(size) if one is None else one for one, size in ((rows, n), (columns, m)))
    return DeviceRowReducer((jnp.asarray(matrix),), rows, columns, absolute)


def check_proof(matrix, found, rounding=1e-12):
    n = len(matrix)
    assert found.columns.dtype == np.int32
    assert len(set(found.columns.tolist())) == n
    assigned = matrix[np.arange(n), found.columns].astype(float)
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    best = matrix[rows, columns].sum(dtype=float)
    size, lost = float(np.abs(assigned).sum()), rounding * n * float(np.abs(matrix).max()) + 1e-35
    assert found.value == pytest.approx(assigned.sum(), rel=rounding, abs=lost)
    assert found.value == pytest.approx(best, rel=rounding, abs=lost)
    assert best - lost <= found.bound <= found.value + 1e-6 * size + lost


def rounding_of(kind):
    """Over dozens of decades prices in float32 lose the smaller similarities, and the bound says how much."""
    return 1e-8 if kind in (badly_scaled, badly_scaled_units) else 1e-12


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 90), st.integers(0, 60), st.integers(0, 2**32 - 1))
@example(badly_scaled_units, 87, 0, 992795)  # 4e-10 less than the optimum, and the bound allows for 2e-7
def test_assignment_is_scipys_optimum_and_proved(kind, n, spare, seed):
    matrix = kind(np.random.default_rng(seed), n, n + spare)
    check_proof(matrix, optimal_assignment(HostRowReducer(matrix)), rounding_of(kind))


@pytest.mark.parametrize("view", [lambda matrix: matrix, HostRowReducer, on_device], ids=["numpy", "host", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_small_matrices_are_assigned_as_scipy_assigns_them(kind, view, monkeypatch):
    """In float64, over dozens of decades as well; the matrix stays as it is."""
    monkeypatch.setattr("tracing_jax.matching.assignment._SMALL", 2**24)
    for seed, shape in enumerate([(1, 1), (1, 7), (40, 40), (33, 61), (61, 61)]):
        matrix = kind(np.random.default_rng(seed), *shape)
        kept = matrix.copy()
        columns, rows = assign(view(matrix)), np.arange(len(matrix))
        assert columns.dtype == np.int32
        assert len(set(columns.tolist())) == len(matrix)
        best = matrix[linear_sum_assignment(matrix, maximize=True)].sum(dtype=float)
        lost = 1e-13 * float(np.abs(matrix).max()) * len(matrix)
        assert matrix[rows, columns].sum(dtype=float) == pytest.approx(best, rel=1e-13, abs=lost)
        np.testing.assert_array_equal(matrix, kept)
    with pytest.raises(ValueError, match="1 of 9 similarities are NaN"):
        assign(view(np.array([[0, 1, 2], [3, np.nan, 1], [1, 1, 1]], F)))
    with pytest.raises(ValueError, match="cannot assign 3 rows to 2 columns"):
        assign(view(np.zeros((3, 2), F)))


@pytest.mark.parametrize("reach", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_paths_that_are_given_up_are_found_together(kind, reach, monkeypatch):
    monkeypatch.setattr("tracing_jax.matching.augmenting_paths._REACH", reach)
    for seed in range(4):
        matrix = kind(np.random.default_rng(seed), 80, 85)
        check_proof(matrix, optimal_assignment(HostRowReducer(matrix)), rounding_of(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 40), (30, 45)])
def test_device_finds_what_numpy_finds(kind, shape):
    rng = np.random.default_rng(0)
    matrix = kind(rng, *shape)
    found = optimal_assignment(on_device(matrix))
    check_proof(matrix, found)
    assert found.value == pytest.approx(optimal_assignment(HostRowReducer(matrix)).value, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("view", [HostRowReducer, on_device])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", [gaussian, low_rank, common_directions])
def test_large_matrix_seen_in_part_and_in_another_order(view, absolute, kind):
    rng = np.random.default_rng(0)
    matrix = kind(rng, 700, 650)
    rows, columns = rng.permutation(700)[:600], rng.permutation(650)[:620]
    shown = matrix[np.ix_(rows, columns)]
    found = optimal_assignment(view(matrix, rows, columns, absolute))
    check_proof(np.abs(shown) if absolute else shown, found)
    assert found.passes > 2


@pytest.mark.slow
def test_product_of_factors_is_never_whole():
    rng = np.random.default_rng(0)
    x, y = gaussian(rng, 600, 8), gaussian(rng, 620, 8)
    rows, columns = rng.permutation(600), rng.permutation(620)
    found = optimal_assignment(DeviceRowReducer((jnp.asarray(x), jnp.asarray(y)), rows, columns, absolute=True))
    check_proof(np.abs(x[rows] @ y[columns].T), found, rounding=1e-6)


@pytest.fixture(autouse=True, scope="module")
def no_matrix_is_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tracing_jax.matching.assignment._SMALL", 2**10)
        yield


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.sampled_from([gaussian, low_rank, related, common_directions]), st.integers(0, 2**32 - 1))
def test_matching_moves_with_its_units(kind, seed):
    rng = np.random.default_rng(seed)
    matrix = kind(rng, 520, 520)
    p, q = rng.permutation(520), rng.permutation(520)
    found = match_units(matrix, np.random.default_rng(1))
    moved = match_units(matrix[np.ix_(p, q)], np.random.default_rng(2))
    pairs, others = set(zip(found.base, found.ft)), set(zip(p[moved.base], q[moved.ft]))
    # A matrix of rank one can have exact ties: the sums of what differs are then equal to the last bit.
    sums = [sum(float(matrix[i, j]) for i, j in some) for some in (pairs - others, others - pairs)]
    assert sums[0] == sums[1]
    again = match_units(matrix, np.random.default_rng(1))
    np.testing.assert_array_equal(found.ft, again.ft)


def test_matching_reads_absolute_values_and_tall_matrices_without_a_copy():
    matrix = gaussian(np.random.default_rng(0), 560, 530)
    tall = match_units(matrix, np.random.default_rng(1), absolute=True)
    wide = match_units(np.abs(matrix.T), np.random.default_rng(2))
    assert set(zip(tall.base, tall.ft)) == set(zip(wide.ft, wide.base))


@pytest.mark.parametrize("view", [HostRowReducer, on_device])
def test_what_cannot_be_assigned_is_refused(view):
    matrix = gaussian(np.random.default_rng(0), 20, 30)
    matrix[3, 4], matrix[5, 6] = np.nan, -np.inf
    for solve in (optimal_assignment, assign):
        with pytest.raises(ValueError, match="2 of 600 similarities are NaN or infinite"):
            solve(view(matrix))
        with pytest.raises(ValueError, match="30 rows to 20 columns"):
            solve(view(matrix.T))
    unseen = optimal_assignment(view(matrix, np.arange(6, 20), np.arange(7, 30)))
    assert np.isfinite(unseen.bound)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_whichever_solver_it_takes_the_sum_is_the_same(kind, n, spare, seed):
    matrix = kind(np.random.default_rng(seed), n, n + spare)
    _, columns = linear_sum_assignment(matrix, maximize=True)
    found = [matrix[np.arange(n), picked].sum(dtype=float) for picked in (assign(matrix), columns)]
    assert found[0] == pytest.approx(found[1], rel=1e-12, abs=1e-12 * n * float(np.abs(matrix).max()))


def test_nothing_and_one():
    assert assign(np.empty((0, 3), F)).shape == (0,)
    empty = optimal_assignment(HostRowReducer(np.empty((0, 0), F)))
    assert (empty.columns.shape, empty.value, empty.bound) == ((0,), 0.0, 0.0)
    one = optimal_assignment(HostRowReducer(np.asarray([[-2.0, 3.0]], F)))
    assert (one.columns.tolist(), one.value, one.bound) == ([1], 3.0, 3.0)
