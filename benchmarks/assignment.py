"""The linear assignment against scipy's, and against the solver of `lap` where that is installed.

    python -m benchmarks.assignment --sizes=4096,11008 --kinds=related,independent,activation-like
    python -m benchmarks.assignment --sizes=28672 --kinds=independent --noscipy
    python -m benchmarks.assignment --sizes=8192x11008                       # rows by columns

Prints how many times longer each other solver takes, from one run, with the proved gap of ours. Inputs are those of
`benchmarks.speed.assigning`.
"""

import importlib.util
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from benchmarks.speed.assigning import INPUTS
from tracing_jax.matching import HostRowReducer, assign, optimal_assignment

_SIZES = flags.DEFINE_list("sizes", ["1024", "4096"], "units, or rows x columns")
_KINDS = flags.DEFINE_list("kinds", list(INPUTS), f"of {', '.join(INPUTS)}")
_SCIPY = flags.DEFINE_bool("scipy", True, "compare with scipy, which copies the matrix to float64")
_LAP = flags.DEFINE_bool("lap", False, "compare with lap.lapjv, which does too; it must be installed")
_SEED = flags.DEFINE_integer("seed", 1, "of the inputs")


def main(argv: list[str]) -> None:
    """Prints one line for each size and kind."""
    del argv
    print("| rows x columns | input | ours, s | passes | proved gap | scipy, times ours | lap, times ours |")
    print("|---|---|---|---|---|---|---|")
    for size in _SIZES.value:
        n, m = (int(side) for side in (size.split("x") * 2)[:2])
        for kind in _KINDS.value:
            similarity = INPUTS[kind](max(n, m), np.random.default_rng(_SEED.value))[:n]
            print(f"| {n} x {m} | {kind} | {_line(np.ascontiguousarray(similarity))} |", flush=True)


def _line(similarity: Float[np.ndarray, "n m"]) -> str:
    ours, columns = _timed(lambda: assign(similarity))
    found = optimal_assignment(HostRowReducer(similarity))
    others = [_times(asked, solve, similarity, ours, columns) for asked, solve in ((_SCIPY, _scipy), (_LAP, _lap))]
    gap = (found.bound - found.value) / abs(found.value)
    return " | ".join([f"{ours:.3g}", str(found.passes), f"{gap:.1e}", *others])


def _times(
    asked: flags.FlagHolder[bool],
    solve: Callable[[np.ndarray], np.ndarray],
    similarity: Float[np.ndarray, "n m"],
    ours: float,
    columns: np.ndarray,
) -> str:
    """Returns how many times longer a solver takes; it must find the same sum."""
    if not asked.value:
        return ""
    seconds, theirs = _timed(lambda: solve(similarity))
    sums = [np.take_along_axis(similarity, picked[:, None], 1).sum(dtype=np.float64) for picked in (columns, theirs)]
    assert abs(sums[0] - sums[1]) <= 1e-9 * abs(sums[1]), f"sums {sums}: one of the solvers is wrong"
    return f"{seconds / ours:.3g}"


def _scipy(similarity: Float[np.ndarray, "n m"]) -> np.ndarray:
    return linear_sum_assignment(similarity, maximize=True)[1]


def _lap(similarity: Float[np.ndarray, "n m"]) -> np.ndarray:
    assert importlib.util.find_spec("lap"), "lap is not installed: pip install lap"
    import lap

    return lap.lapjv(-similarity, extend_cost=similarity.shape[0] != similarity.shape[1])[1]


def _timed(solve: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = solve()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    app.run(main)
