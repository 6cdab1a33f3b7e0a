"""How many units of independently trained models agree by convergence? Why `match` allows for 0.05 of them.

    python -m benchmarks.convergence            # measures, prints and draws
    python -m benchmarks.convergence --publish  # and replaces the docs' figure

All pairs of models of each zoo are compared as `match` does, layer by layer, in both forms: on 1024 positions of
held-out text, and on the embeddings of all tokens. The share of units that agree by convergence is what agrees beyond
the pair's own layers that do not correspond; its upper bound allows for pairs that have models in common. Then the
tests themselves: how often does each call independent models related?

The comparisons are kept in the output folder; a second run with the same folder only draws and prints.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.agreements import Agreements, Units, agreements, forward_units, weight_units
from benchmarks.environment import OUT_DIR, PUBLISH, ZOO_DIR, use_all_cores
from benchmarks.false_alarms import CONFIDENCE, Alarms, false_alarms
from benchmarks.intervals import mean_over_pairs, upper_bound
from benchmarks.seeds import RECIPES, SNAPSHOTS, Zoo, zoo
from tracing_jax.options import MATCH_FORMS
from tracing_jax.record import atomic_write
from tracing_jax.report import save_png, text_table
from tracing_jax.report.panels import GREY, INK, PALETTE, style

POSITIONS = 1024
_EARLIER_SEEDS = 32  # of the 64, before the end of training


class Case(NamedTuple):
    """Models to be compared: a zoo after a share of its training, and the form of `match`."""

    zoo: str
    snapshot: float
    form: str


CASES = [
    Case(name, snapshot, form)
    for name in RECIPES
    for snapshot in (reversed(SNAPSHOTS) if name == "tiny" else (1.0,))
    for form in MATCH_FORMS
]


@dataclasses.dataclass(frozen=True)
class Share:
    """Units of one layer that agree, over all pairs of a case.

    Attributes:
      zoo, snapshot, form: the case.
      tokens: that each model had learnt from.
      units: of a layer.
      layer, relative_depth: the layer, from 0 to 1.
      models, pairs: how many were compared.
      agreeing: units that agree, mean over pairs.
      most: the same in the pair with most.
      by_accident: the same between layers that do not correspond.
      share: the difference, of all units: what convergence adds.
      upper: upper 99 % confidence bound of `share`; models, not pairs, are the sample.
    """

    zoo: str
    snapshot: float
    form: str
    tokens: int
    units: int
    layer: int
    relative_depth: float
    models: int
    pairs: int
    agreeing: float
    most: int
    by_accident: float
    share: float
    upper: float


def compare(case: Case, found: Zoo, folder: Path) -> Agreements:
    """Returns the comparisons of all pairs of a case, measured now if the folder does not have them."""
    file = folder / f"{case.zoo}-{case.snapshot:g}-{case.form}.npz"
    if not file.exists():
        count = found.recipe.num_seeds if case.snapshot == 1 else _EARLIER_SEEDS
        models = jax.tree.map(lambda leaf: leaf[:count], found.models(case.snapshot))
        measured = agreements(_units(case.form, found, models), " ".join(map(str, case)), seed=0)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **dataclasses.asdict(measured))
    with np.load(file) as arrays:
        return Agreements(arrays["layers"], arrays["controls"])


def _units(form: str, found: Zoo, models: Any) -> Units:
    if form == "weights":
        return weight_units(found.arch, models)
    at = np.random.default_rng(0).choice(found.held_out.size, POSITIONS, replace=False)
    return forward_units(found.arch, models, found.held_out, at)


def shares(case: Case, found: Zoo, measured: Agreements) -> Iterator[Share]:
    """Yields what was measured of each layer of a case."""
    S, F, L = len(measured.layers), found.arch.mlp_dim, found.arch.num_layers
    for layer in range(L):
        agreeing, accident = measured.agreeing[..., layer], measured.agreeing_controls
        excess = (agreeing - accident) / F
        yield Share(
            *case,
            tokens=round(case.snapshot * found.facts["training_tokens"]),
            units=F,
            layer=layer,
            relative_depth=layer / (L - 1),
            models=S,
            pairs=S * (S - 1) // 2,
            agreeing=mean_over_pairs(agreeing),
            most=int(agreeing.max()),
            by_accident=mean_over_pairs(accident),
            share=mean_over_pairs(excess),
            upper=upper_bound(excess, CONFIDENCE),
        )


def _rounded(row: Share) -> dict[str, Any]:
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()}


def _print_shares(rows: Sequence[Share]) -> None:
    headers = [
        "zoo",
        "trained",
        "form",
        "units",
        "layer",
        "pairs",
        "agreeing",
        "most",
        "by accident",
        "share %",
        "at most %",
    ]
    print(text_table(
        [[r.zoo, f"{r.snapshot:g}", r.form, r.units, r.layer, r.pairs, r.agreeing, r.most, r.by_accident, 100 * r.share,
          100 * r.upper] for r in rows],
        headers,
    ))  # fmt: skip


def print_alarms(alarms: Sequence[Alarms]) -> None:
    """Prints how often each test was wrong."""
    headers = ["zoo", "test", "u", "level", "pairs", "hits", "rate %", "95 % CP", "by models", "worst round"]
    print(text_table(
        [[a.zoo, a.test, a.u, f"{a.level:g}", a.pairs, a.hits, 100 * a.hits / a.pairs,
          f"{100 * a.low:.2f}-{100 * a.high:.2f}", f"{100 * a.high_models:.2f}", a.worst_round] for a in alarms],
        headers,
    ))  # fmt: skip


def figure(rows: Sequence[Share]) -> Figure:
    """The share of units that agree by convergence: by relative depth, by length of training, and by width."""
    drawn = Figure(figsize=(9.6, 3.4), facecolor="white")
    drawn.set_layout_engine("constrained", w_pad=0.08)
    depth, training, width = drawn.subplots(1, 3, sharey=True, width_ratios=(1.25, 1, 1))
    final = [row for row in rows if row.snapshot == 1]
    for i, (name, found) in enumerate(_groups([r for r in final if r.form == "forward"], "zoo").items()):
        label = f"{name}: {found[0].units} units, {found[0].models} seeds"
        _bounded(depth, i, [r.relative_depth for r in found], found, label, shift=0.012 * (i - 2))
    _panel(depth, "at the end of training, forward form", "relative depth of the layer")
    for axes, key in ((training, "snapshot"), (width, "units")):
        kept = final if key == "units" else rows
        zoos = ("narrow", "tiny", "wide") if key == "units" else ("tiny",)
        kept = sorted((r for r in kept if r.zoo in zoos and r.form == "forward"), key=lambda row: getattr(row, key))
        places = {value: at for at, value in enumerate(dict.fromkeys(getattr(row, key) for row in kept))}
        for i, (layer, found) in enumerate(_groups(kept, "layer").items()):
            at = [places[getattr(row, key)] for row in found]
            _bounded(axes, i, at, found, f"layer {layer}", shift=0.06 * (i - 1.5))
        axes.set_xticks(list(places.values()), [f"{value:g}" for value in places])
    _panel(training, "tiny, by length of training", "share of the training")
    _panel(width, "narrow, tiny and wide", "MLP units of a layer")
    depth.set_ylim(top=1.85)  # space above the curves for the legend
    depth.set_ylabel("units that agree by convergence, %", fontsize=9.5, color=INK)
    return drawn


def _groups(rows: Sequence[Share], key: str) -> dict[Any, list[Share]]:
    return {
        value: [row for row in rows if getattr(row, key) == value]
        for value in dict.fromkeys(getattr(row, key) for row in rows)
    }


def _bounded(axes: Axes, i: int, at: Sequence[float], rows: Sequence[Share], label: str, shift: float) -> None:
    """Draws the measured shares as a line, and above each a whisker up to its bound."""
    x = np.array(at) + shift
    share, upper = (100 * np.array([getattr(row, key) for row in rows]) for key in ("share", "upper"))
    axes.plot(x, share, marker="o", markersize=3.5, linewidth=1.6, color=PALETTE[i], label=label)
    axes.vlines(x, share, upper, color=PALETTE[i], linewidth=1)
    axes.plot(x, upper, "_", markersize=5, color=PALETTE[i])


def _panel(axes: Axes, title: str, label: str) -> None:
    style(axes)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel(label, fontsize=9.5, color=INK)
    axes.legend(loc="upper right", frameon=False, fontsize=8.5, borderpad=0, labelspacing=0.3)


def main(argv: list[str]) -> None:
    """Measures, prints both tables, and writes the measurements as JSON and a figure as PNG."""
    del argv
    use_all_cores()
    out, root = Path(OUT_DIR.value), Path(__file__).parents[1]
    zoos = {name: zoo(recipe, ZOO_DIR.value) for name, recipe in RECIPES.items()}
    measured = {case: compare(case, zoos[case.zoo], out / "comparisons") for case in CASES}
    rows = [row for case in CASES for row in shares(case, zoos[case.zoo], measured[case])]
    _print_shares(rows)
    drawn = figure(rows)
    save_png(drawn, out / "convergence.png")
    atomic_write(out / "convergence.json", json.dumps([_rounded(row) for row in rows], indent=1).encode())
    if PUBLISH.value:
        save_png(drawn, root / "docs/convergence.png")
    alarms = false_alarms({name: {form: measured[Case(name, 1.0, form)] for form in MATCH_FORMS} for name in RECIPES})
    atomic_write(out / "false_alarms.json", json.dumps([dataclasses.asdict(a) for a in alarms], indent=1).encode())
    print_alarms(alarms)


if __name__ == "__main__":
    app.run(main)
