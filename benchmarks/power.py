"""Which statistic detects what was done to a model? Detection rates at a level of 1e-3, and false alarms.

    python -m benchmarks.power --zoo_dir=zoo --out_dir=runs/power            # measures, prints and draws
    python -m benchmarks.power --zoo_dir=zoo --out_dir=runs/power --publish  # and replaces the table and the figure

Base models are seeds of the tiny zoo. All but the last rows of the table start from a lightly fine-tuned copy. For the
last, the base is a model after a quarter of its training, trained on to ten times as many tokens as it had seen.
A statistic detects where its p-value, exact or calibrated, is below the level; the verdict where it says related.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from benchmarks.descendants import LIGHT_STEPS, Descendant, member, texts, trained, treatments
from benchmarks.devices import use_all_cores
from benchmarks.folders import OUT_DIR, PUBLISH, ZOO_DIR
from benchmarks.intervals import clopper_pearson
from benchmarks.seeds import RECIPES, Zoo, zoo
from tracing_jax.data import paired_one_to_one
from tracing_jax.record import atomic_write
from tracing_jax.report import save_png, text_table
from tracing_jax.report.panels import INK
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.source import InMemory
from tracing_jax.statistics import Pair, Result, Statistic, Vocabularies, verdict
from tracing_jax.statistics.comparison import bonferroni_log10
from tracing_jax.statistics.csh import Csh
from tracing_jax.statistics.csu import Csu
from tracing_jax.statistics.csu_all import CsuAll
from tracing_jax.statistics.l2 import L2
from tracing_jax.statistics.match import FORMS, Match
from tracing_jax.statistics.match_all import MatchAll
from tracing_jax.tree import Tree

LEVEL = 1e-3
STATISTICS: Mapping[str, Statistic] = {
    "csu": Csu(),
    "csu_all": CsuAll(),
    "csh": Csh(blocks=8, block_size=64),
    "l2": L2(num_perm=1199),
    "match": Match(),
    "match_all": MatchAll(),
}
COLUMNS = ["csu", "csu_all", "csh", "l2", "match, forward", "match, weights", "match", "match_all", "verdict"]
_DECIDING = ("csu", "csh", "match", "match_all")
_EARLY = 0.25  # the share of training after which a model is the base of the long training

_SEEDS = flags.DEFINE_integer("seeds", 20, "base models, and as many unrelated ones")


def compare(base: InMemory, ft: Descendant, blocks: np.ndarray, seed: int) -> dict[str, float | None]:
    """Returns statistic -> log10 p (None where it does not apply), and `verdict` -> 1 if related, else 0."""
    V = base.arch.vocab_size
    ids = np.arange(V, dtype=np.int32)
    new_ids = ids if ft.new_ids is None else ft.new_ids
    vocabularies = Vocabularies(ft.new_ids is None, ids, new_ids)
    compute = Compute(make_mesh(), 32)
    paired = paired_one_to_one(blocks, new_ids[blocks])
    pair = Pair(base, ft.model, vocabularies, blocks, compute, seed, blocks=paired)
    found: dict[str, Result] = {}
    for name, statistic in STATISTICS.items():
        if not statistic.problems(base.arch, ft.model.arch, vocabularies):
            found[name] = statistic.compute(pair)
    ps: dict[str, float | None] = {name: found[name].log10_p if name in found else None for name in STATISTICS}
    for form in FORMS:
        ps[f"match, {form}"] = _form_log10_p(found["match"], form) if "match" in found else None
    judged = verdict({name: found[name] for name in _DECIDING if name in found}, LEVEL)
    return ps | {"verdict": float(judged.verdict == "related")}


def _form_log10_p(result: Result, form: str) -> float:
    """Returns the p-value that one form of `match` alone would have."""
    return bonferroni_log10([test for test in result.tests if test.decides and test.name.startswith(form)])


def rows(found: Zoo, count: int) -> Iterator[tuple[str, list[tuple[InMemory, Descendant]]]]:
    """Yields each row of the table: what was done, and the pairs that it was done to."""
    arch, blocks = found.arch, found.held_out
    everything = found.models(1.0)
    bases = jax.tree.map(lambda leaf: leaf[:count], everything)
    unrelated = jax.tree.map(lambda leaf: leaf[count : 2 * count], everything)
    own, other = texts(found)

    def pairs(models: Tree, base: Tree = bases) -> list[tuple[InMemory, Descendant]]:
        return [(member(arch, base, i), Descendant(member(arch, models, i))) for i in range(count)]

    yield "independent", pairs(unrelated)
    steps = found.recipe.models.base_steps
    after = dict(trained(found, bases, other, steps, 2e-3, keep=(LIGHT_STEPS,)))
    light = after[LIGHT_STEPS]
    yield f"fine-tuned, {LIGHT_STEPS / steps:.2g} of its training", pairs(light)
    yield "fine-tuned, 1 of its training", pairs(after[steps])
    for name, treatment in treatments(unrelated, blocks).items():
        yield name, [(member(arch, bases, i), treatment(member(arch, light, i), 100 + i)) for i in range(count)]
    swapped = light | {part: unrelated[part] for part in ("embed", "head")}
    yield "embeddings replaced, trained on", pairs(dict(trained(found, swapped, own, steps // 4, 2e-3))[steps // 4])
    early = jax.tree.map(lambda leaf: leaf[:count], found.models(_EARLY))
    seen = round(_EARLY * steps)
    longer = dict(trained(found, early, other, 10 * seen, 4e-3, keep=(seen, 3 * seen)))
    for factor in (1, 3, 10):
        yield f"trained on, {factor} x its tokens", pairs(longer[factor * seen], early)


def measured(found: Zoo, count: int, folder: Path) -> dict[str, list[dict[str, float | None]]]:
    """Returns row -> what each of its pairs gave; rows that the folder has are read from it."""
    file = folder / "power.json"
    done = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for name, pairs in rows(found, count):
        if name in done:
            continue
        start = time.monotonic()
        done[name] = [compare(base, ft, found.held_out, i) for i, (base, ft) in enumerate(pairs)]
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(done).encode())
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return done


def rates(found: Mapping[str, list[dict[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    """Returns row -> statistic -> the share of pairs detected; None where the statistic does not apply."""

    def rate(pairs: list[dict[str, float | None]], name: str) -> float | None:
        values = [pair[name] for pair in pairs]
        if any(value is None for value in values):
            return None
        if name == "verdict":
            return float(np.mean([value for value in values if value is not None]))
        return float(np.mean([value < np.log10(LEVEL) for value in values if value is not None]))

    return {row: {name: rate(pairs, name) for name in COLUMNS} for row, pairs in found.items()}


def figure(table: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """The rates as a map, a row for each thing done and a column for each statistic."""
    names = COLUMNS
    shown = np.array([[np.nan if table[row][name] is None else table[row][name] for name in names] for row in table],
                     np.float64)  # fmt: skip
    drawn = Figure(figsize=(8.6, 0.33 * len(table) + 1.7), facecolor="white")
    drawn.set_layout_engine("constrained")
    axes = drawn.subplots()
    axes.set_facecolor("#f0f0f0")
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for (i, j), value in np.ndenumerate(shown):
        text = "–" if np.isnan(value) else f"{100 * value:.0f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color="white" if value > 0.7 else INK)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="left", fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(table)), list(table), fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Pairs detected at {LEVEL:g}, per cent (–: does not apply)", loc="left", fontsize=10, color=INK)
    return drawn


def page(table: Mapping[str, Mapping[str, float | None]], found: Mapping[str, Any]) -> str:
    """Returns the table as Markdown, with the interval of the first row's rates."""
    names = COLUMNS
    lines = ["| what was done | pairs | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row, by_name in table.items():
        cells = ["–" if by_name[name] is None else f"{by_name[name]:.2f}" for name in names]
        lines.append(f"| {row} | {len(found[row])} | " + " | ".join(cells) + " |")
    count = len(found["independent"])
    low, high = clopper_pearson(0, count)
    some = clopper_pearson(count, count)
    lines += ["", f"With {count} pairs a rate of 0 has the 95 % interval {low:.2f} to {high:.2f}, a rate of 1 "
              f"{some[0]:.2f} to {some[1]:.2f} (Clopper-Pearson)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Measures what is missing, prints the table and draws it."""
    del argv
    use_all_cores()
    folder = Path(OUT_DIR.value)
    found = measured(zoo(RECIPES["tiny"], ZOO_DIR.value), _SEEDS.value, folder)
    table = rates(found)
    names = COLUMNS
    print(text_table([[row, *(by_name[name] for name in names)] for row, by_name in table.items()], ["done", *names]))
    save_png(figure(table), folder / "power.png")
    (folder / "power.md").write_text(page(table, found), encoding="utf-8")
    if PUBLISH.value:
        docs = Path(__file__).parents[1] / "docs"
        save_png(figure(table), docs / "power.png")
        text = (docs / "power.md").read_text("utf-8")
        head, _, rest = text.partition("<!-- table -->\n")
        tail = rest.partition("<!-- end of table -->\n")[2]
        made = f"{head}<!-- table -->\n{page(table, found)}<!-- end of table -->\n{tail}"
        (docs / "power.md").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
