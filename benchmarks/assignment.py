"""The linear assignment against scipy's, and against those of lapx and laprust, two packages for nothing else.

    python -m benchmarks.assignment --sizes=4096,11008 --kinds=related,independent,activation-like
    python -m benchmarks.assignment --sizes=512,1024,2048 --solvers=scipy,lapjvs,laprust   # pip install lapx laprust
    python -m benchmarks.assignment --sizes=28672 --kinds=independent --solvers=
    python -m benchmarks.assignment --sizes=8192x11008                       # rows by columns

Prints how many times longer each other solver takes, from one run, with the proved gap of ours, on the three kinds of
similarity that statistics meet.
"""

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from absl import app, flags
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from benchmarks.results import Row
from tracing_jax.matching import HostRowReducer, assign, optimal_assignment

_FEATURES = 256
_COMMON = 3.0  # size of the direction that all activations share, in standard deviations of the others
_RANK = 32


def related(units: int, generator: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Returns cosines of random rows with the same rows plus noise, shuffled: the plain maximum decides almost all."""
    rows = generator.standard_normal((units, _FEATURES), np.float32)
    noisy = rows + 0.3 * generator.standard_normal(rows.shape, np.float32)
    return _cosines(rows, noisy[generator.permutation(units)])


def independent(units: int, generator: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Returns cosines of random rows with others."""
    one, other = generator.standard_normal((2, units, _FEATURES), np.float32)
    return _cosines(one, other)


def activation_like(units: int, generator: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Returns cosines of units in a few strong common directions: low rank, and far from zero on average."""
    shared = generator.standard_normal((_RANK, _FEATURES), np.float32)
    sides = []
    for _ in range(2):
        weights = generator.standard_normal((units, _RANK), np.float32)
        weights[:, 0] += _COMMON
        sides.append(weights @ shared)
    return _cosines(sides[0], sides[1])


INPUTS: Mapping[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "related": related,
    "independent": independent,
    "activation-like": activation_like,
}
"""Kind of input -> how to make one."""


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return one @ other.T


def against_scipy(units: int) -> Iterator[Row]:
    """Yields the speed of `assign` as a multiple of scipy's at so many units, on each kind of input."""
    assign(INPUTS["related"](64, np.random.default_rng(0)))  # compiles, if the solver does
    for name, make in INPUTS.items():
        similarity = make(units, np.random.default_rng(1))
        ours, found = _timed(lambda: assign(similarity))  # noqa: B023
        theirs, best = _timed(lambda: _scipy(similarity))  # noqa: B023
        picked = [similarity[np.arange(units), columns].sum(dtype=np.float64) for columns in (found, best)]
        note = f"{units} units; objective less by {(picked[1] - picked[0]) / abs(picked[1]):.1e} of scipy's"
        yield Row("assignment", name, units / ours, units / theirs, "units/s", "scipy's linear_sum_assignment", note)


def main(argv: list[str]) -> None:
    """Prints one line for each size and kind."""
    del argv
    names = flags.FLAGS.solvers
    if unknown := sorted(set(names) - SOLVERS.keys()):
        raise ValueError(f"--solvers={','.join(unknown)}: expected some of {', '.join(SOLVERS)}")
    assign(INPUTS["related"](64, np.random.default_rng(0)))  # imports what it needs
    others = "".join(f" {name}, times ours |" for name in names)
    print(f"| rows x columns | input | ours, s | passes | proved gap |{others}")
    print("|---|---|---|---|---|" + "---|" * len(names))
    for size in flags.FLAGS.sizes:
        n, m = (int(side) for side in (size.split("x") * 2)[:2])
        for kind in flags.FLAGS.kinds:
            similarity = INPUTS[kind](max(n, m), np.random.default_rng(flags.FLAGS.seed))[:n]
            print(f"| {n} x {m} | {kind} | {_line(np.ascontiguousarray(similarity))} |", flush=True)


def _line(similarity: Float[np.ndarray, "n m"]) -> str:
    ours, columns = _best_timed(lambda: assign(similarity))
    found = optimal_assignment(HostRowReducer(similarity))
    others = [_times(SOLVERS[name], similarity, ours, columns) for name in flags.FLAGS.solvers]
    gap = (found.bound - found.value) / abs(found.value)
    return " | ".join([f"{ours:.3g}", str(found.passes), f"{gap:.1e}", *others])


def _times(
    solve: Callable[[np.ndarray], np.ndarray], similarity: Float[np.ndarray, "n m"], ours: float, columns: np.ndarray
) -> str:
    """Returns how many times longer a solver takes, and by how much its sum is less, relatively, if it is."""
    seconds, theirs = _best_timed(lambda: solve(similarity))
    sums = [np.take_along_axis(similarity, picked[:, None], 1).sum(dtype=np.float64) for picked in (columns, theirs)]
    less = (sums[0] - sums[1]) / abs(sums[0])
    assert less >= -1e-9, f"sums {sums}: ours is not the greatest"
    return f"{seconds / ours:.3g}" + (f" (sum less by {less:.0e})" if less > 1e-9 else "")


def _scipy(similarity: Float[np.ndarray, "n m"]) -> np.ndarray:
    return linear_sum_assignment(similarity, maximize=True)[1]


def _lapjvs(similarity: Float[np.ndarray, "n m"]) -> np.ndarray:
    import lap  # the module of the package lapx

    return lap.lapjvs(-similarity, return_cost=False, jvx_like=False)[0]


def _laprust(similarity: Float[np.ndarray, "n m"]) -> np.ndarray:
    import laprust

    return laprust.lapjv(-similarity, extend_cost=True, return_cost=False)[1]


SOLVERS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"scipy": _scipy, "lapjvs": _lapjvs, "laprust": _laprust}
"""Name of another solver -> it, as similarity -> the column of each row."""


def _best_timed(solve: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Returns the least seconds of `--rounds` runs, and what it found."""
    runs = [_timed(solve) for _ in range(flags.FLAGS.rounds)]
    return min(runs, key=lambda run: run[0])


def _timed(solve: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = solve()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["1024", "4096"], "units, or rows x columns")
    flags.DEFINE_list("kinds", list(INPUTS), f"of {', '.join(INPUTS)}")
    flags.DEFINE_list("solvers", ["scipy"], f"to compare with, of {', '.join(SOLVERS)}")
    flags.DEFINE_integer("rounds", 1, "runs of each solver, of which the fastest counts")
    flags.DEFINE_integer("seed", 1, "of the inputs")
    app.run(main)
