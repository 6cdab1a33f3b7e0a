"""Are the exact p-values exact? `csu` and `csh` on pairs of independent models, against the uniform distribution.

    python -m benchmarks.exact_nulls

Four populations: random initialisations, no model in two pairs; models trained from different seeds; and both with
broken units planted. Broken units are dead (their gate is zero: never active), zero in every weight, or duplicates of
other units. In base they stand last, in ft anywhere: that one of the two models is exchangeable is all the tests ask.

Rank correlation is tested as it is reported; agreement, which is discrete, with its ties broken at random. Pairs of
trained models have models in common. Their p-values are independent two by two all the same: renumbering the units of
the model that two pairs do not share leaves one pair as it is.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

from benchmarks.environment import OUT_DIR, PUBLISH, ZOO_DIR, use_all_cores
from benchmarks.intervals import rounds
from benchmarks.seeds import RECIPES, model, zoo
from tracing_jax import demo
from tracing_jax.arch import Arch
from tracing_jax.report import save_png, text_table
from tracing_jax.report.panels import GREY, INK, PALETTE, style
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.statistics import Pair, Statistic, Vocabularies
from tracing_jax.statistics.csh import Csh
from tracing_jax.statistics.csu import Csu
from tracing_jax.statistics.nulls import randomised_agreement_log_p
from tracing_jax.statistics.pvalues import fisher, holm
from tracing_jax.tree import Tree

STATISTICS: Mapping[str, Statistic] = {"csu": Csu(), "csh": Csh(blocks=4, block_size=128)}
TESTS = ("rank correlation", "agreement")

_KS_95 = 1.358  # 95 % quantile of the Kolmogorov distribution: sqrt(n) sup |F_n - F| for large n

Models = Callable[[int], tuple[Tree, Tree]]
"""Number of a pair -> base and ft."""


@dataclasses.dataclass(frozen=True)
class PValues:
    """The p-values of one statistic and test on all pairs of a population: one a layer, and combined."""

    layers: Float[np.ndarray, "N L"]
    combined: Float[np.ndarray, " N"]

    def ks(self) -> list[float]:
        """Returns the Kolmogorov-Smirnov p-values against the uniform distribution: each layer, then combined."""
        return [float(stats.kstest(column, "uniform").pvalue) for column in (*self.layers.T, self.combined)]


def populations(init: Callable[[jax.Array], Tree], trained: Tree) -> Mapping[str, Models]:
    """Returns the four populations of pairs by name."""

    def fresh(i: int) -> tuple[Tree, Tree]:
        base, ft = (init(jax.random.fold_in(jax.random.key(1), 2 * i + side)) for side in (0, 1))
        return base, ft

    pairs = rounds(len(jax.tree.leaves(trained)[0]), np.random.default_rng(2)).reshape(-1, 2)

    def seeds(i: int) -> tuple[Tree, Tree]:
        base, ft = pairs[i]
        return model(trained, base), model(trained, ft)

    return {
        "random": fresh,
        "random, broken units": lambda i: broken(fresh(i), np.random.default_rng([3, i])),
        "trained": seeds,
        "trained, broken units": lambda i: broken(seeds(i), np.random.default_rng([4, i])),
    }


def broken(pair: tuple[Tree, Tree], generator: np.random.Generator) -> tuple[Tree, Tree]:
    """Returns the pair with dead, zero and duplicated units: the last of base's, and fewer, anywhere, of ft's."""
    base, ft = pair
    return (
        _with_broken_units(base, 0.1, np.arange, generator),
        _with_broken_units(ft, 0.06, generator.permutation, generator),
    )


def _with_broken_units(
    params: Tree, share: float, order: Callable[[int], np.ndarray], generator: np.random.Generator
) -> Tree:
    """Returns the params where this share of each layer's units is dead, as many zero, and as many copies of others."""
    layers = {}
    for name, layer in params["layers"].items():
        mlp = {leaf: np.array(weights["kernel"]) for leaf, weights in layer["mlp"].items()}
        F = mlp["down_proj"].shape[0]
        live, *groups = np.split(order(F), F - round(share * F) * np.arange(3, 0, -1))
        dead, zero, copies = groups
        originals = generator.choice(live, len(copies), replace=False)
        for leaf, weights in mlp.items():
            units = weights if leaf == "down_proj" else weights.T  # a view: units come first
            units[copies] = units[originals]
            units[zero] = 0
        mlp["gate_proj"][:, dead] = 0
        layers[name] = layer | {"mlp": {leaf: {"kernel": weights} for leaf, weights in mlp.items()}}
    return params | {"layers": layers}


def measure(arch: Arch, models: Models, num_pairs: int, description: str) -> dict[tuple[str, str], PValues]:
    """Returns the p-values by statistic and test."""
    compute = Compute(make_mesh())
    rows: dict[tuple[str, str], list[list[float]]] = {(s, test): [] for s in STATISTICS for test in TESTS}
    for i in tqdm(range(num_pairs), desc=description, unit="pair", disable=None):
        base, ft = jax.device_put(models(i))
        ids = np.arange(arch.vocab_size, dtype=np.int32)
        pair = Pair(InMemory(arch, base), InMemory(arch, ft), Vocabularies(True, ids, ids), None, compute, seed=i)
        for name, log_ps in log_p_values(pair):
            rows[name].append(log_ps)
    return {name: _p_values(np.exp(log_ps)) for name, log_ps in rows.items()}


def log_p_values(pair: Pair) -> Iterator[tuple[tuple[str, str], list[float]]]:
    """Yields (statistic, test) and the natural log p-values of the layers and of all together."""
    for name, statistic in STATISTICS.items():
        rank, agreement = statistic.compute(pair).tests[:2]
        assert rank.log10_ps is not None
        assert rank.log10_p is not None
        yield (name, TESTS[0]), [math.log(10) * log10_p for log10_p in (*rank.log10_ps, rank.log10_p)]
        ties = pair.generator(name, "ties")
        F = pair.base.arch.mlp_dim
        counts = zip(agreement.values["agreeing"], agreement.values["units"])
        layers = [randomised_agreement_log_p(int(k), int(h), F, generator=ties) for k, h in counts]
        yield (name, TESTS[1]), [*layers, fisher(layers)]


def _p_values(table: np.ndarray) -> PValues:
    return PValues(table[:, :-1], table[:, -1])


def figure(measured: Mapping[str, Mapping[tuple[str, str], PValues]]) -> Figure:
    """The distribution of p-values minus the uniform one: a panel for each population and statistic.

    Args:
        measured: population -> (statistic, test) -> p-values `layers` `[N, L]` and `combined` `[N]`.
    """
    names = list(measured)
    statistics = list(dict.fromkeys(statistic for statistic, _ in measured[names[0]]))
    drawn = Figure(figsize=(9.6, 2.1 * len(statistics) + 1.0), facecolor="white")
    drawn.set_layout_engine("constrained", h_pad=0.08, w_pad=0.06)
    grid = drawn.subplots(len(statistics), len(names), sharex=True, sharey=True, squeeze=False)
    for row, statistic in zip(grid, statistics, strict=True):
        for axes, name in zip(row, names, strict=True):
            tests = {test: values for (s, test), values in measured[name].items() if s == statistic}
            _panel(axes, tests)
            axes.set_title(f"{statistic}: {name}", loc="left", fontsize=9.5, color=INK)
        row[0].set_ylabel("share of p-values below p, minus p", fontsize=8.5, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("p", fontsize=9.5, color=INK)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=9)
    return drawn


def _panel(axes: Axes, tests: Mapping[str, PValues]) -> None:
    style(axes)
    N = len(next(iter(tests.values())).combined)
    axes.axhspan(
        -_KS_95 / N**0.5, _KS_95 / N**0.5, color="#eeeeee", zorder=0, label="95 % of uniform samples stay inside"
    )
    for color, dashes, (test, values) in zip(PALETTE, ("-", (0, (4, 1))), tests.items()):
        for column in values.layers.T:
            axes.plot(*_excess(column), color=color, linewidth=0.7, alpha=0.45)
        label = f"{test}, layers combined (thin: each)"
        axes.plot(*_excess(values.combined), color=color, linestyle=dashes, linewidth=2, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
    axes.set_ylim(-0.1, 0.1)


def _excess(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of the empirical distribution function minus the diagonal."""
    x = np.repeat(np.sort(p), 2)
    steps = np.repeat(np.arange(len(p) + 1) / len(p), 2)[1:-1]
    return x, steps - x


_PAIRS = flags.DEFINE_integer("pairs", 640, "pairs of each population")


def main(argv: list[str]) -> None:
    """Measures, prints the table of Kolmogorov-Smirnov p-values, and writes JSON and PNG."""
    del argv
    use_all_cores()
    found = zoo(RECIPES["tiny"], ZOO_DIR.value)
    init = jax.jit(lambda key: demo.init(found.arch, key))
    named = populations(init, found.models(1.0))
    measured = {name: measure(found.arch, models, _PAIRS.value, name) for name, models in named.items()}
    rows = [[name, *key, *values.ks()] for name, by_test in measured.items() for key, values in by_test.items()]
    adjusted = np.exp(holm(np.log([p for row in rows for p in row[3:]])))  # type: ignore[arg-type]
    layers = [f"layer {i}" for i in range(found.arch.num_layers)]
    print(text_table(rows, ["models", "statistic", "test", *layers, "combined"]))
    print(f"{_PAIRS.value} pairs each; the smallest of the {adjusted.size} p-values after Holm: {adjusted.min():.3g}")
    out = Path(OUT_DIR.value)
    out.mkdir(parents=True, exist_ok=True)
    drawn = figure(measured)
    for folder in (out, *([Path(__file__).parents[1] / "docs"] if PUBLISH.value else [])):
        save_png(drawn, folder / "exact_nulls.png")
    table = [{"models": r[0], "statistic": r[1], "test": r[2], "ks_p": r[3:]} for r in rows]
    (out / "exact_nulls.json").write_text(json.dumps({"pairs": _PAIRS.value, "rows": table}, indent=1))


if __name__ == "__main__":
    app.run(main)
