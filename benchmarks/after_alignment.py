"""Why no p-value is given after an alignment: the exact tests on independent models, as given and aligned.

    python -m benchmarks.after_alignment

Pairs of models trained from different seeds; ft's features and MLP units are permuted to bring its weights as close to
base's as can be, and `csu` and `csh` are computed before and after.
"""

from collections.abc import Callable

import numpy as np
from absl import app, flags

from benchmarks.environment import ZOO_DIR, use_all_cores
from benchmarks.exact_nulls import measure
from benchmarks.intervals import rounds
from benchmarks.seeds import RECIPES, model, zoo
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.matching import match_weights
from tracing_jax.report import text_table
from tracing_jax.rewrites import permute
from tracing_jax.tree import Tree

_PAIRS = flags.DEFINE_integer("aligned_pairs", 32, "pairs of models")


def aligned(models: Callable[[int], tuple[Tree, Tree]], table: AxisTable) -> Callable[[int], tuple[Tree, Tree]]:
    """Returns the same pairs with ft's features and MLP units matched to base's."""

    def pair(i: int) -> tuple[Tree, Tree]:
        base, ft = models(i)
        axes = table.axes_of_kind(("embed", "mlp"))
        return base, permute(ft, match_weights(base, ft, table, axes).permutations, table)

    return pair


def main(argv: list[str]) -> None:
    """Prints how small the p-values of independent models are before and after."""
    del argv
    use_all_cores()
    found = zoo(RECIPES["tiny"], ZOO_DIR.value)
    trained, pairs = found.models(1.0), rounds(found.recipe.num_seeds, np.random.default_rng(0)).reshape(-1, 2)

    def given(i: int) -> tuple[Tree, Tree]:
        base, ft = pairs[i]
        return model(trained, base), model(trained, ft)

    rows = []
    for name, models in (("as given", given), ("aligned", aligned(given, axis_table(found.arch)))):
        for (statistic, test), values in measure(found.arch, models, _PAIRS.value, name).items():
            log10_ps = np.log10(values.combined)
            rows.append([name, statistic, test, len(log10_ps), float(np.median(log10_ps)), float(log10_ps.max()),
                         int((log10_ps < -3).sum())])  # fmt: skip
    print(text_table(rows, ["models", "statistic", "test", "pairs", "median log10 p", "largest", "below 1e-3"]))


if __name__ == "__main__":
    app.run(main)
