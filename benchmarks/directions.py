"""How often is the direction of an edge of a zoo's report right? Fine-tunes that were trained lightly, long and hard.

    python -m benchmarks.directions --zoo_dir=zoo --seeds=8

Bases are seeds of the zoo `tiny`. Light: a sixteenth of their training, on other text. Long: as many steps on other
text as the training had, at half of its peak rate or at all of it. The last rows have early bases, a quarter through
their training, trained on with its full rate on their own text. What is counted is the child that the report names.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from absl import app, flags

from benchmarks.descendants import LIGHT_STEPS, member, texts, trained
from benchmarks.environment import ZOO_DIR, machine, use_all_cores
from benchmarks.intervals import clopper_pearson
from benchmarks.lineages import Lineages
from tracing_jax.report import text_table
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree, flatten
from tracing_jax.zoo.report.direction import further_trained
from tracing_jax.zoo.report.families import WEIGHTS, Edge
from tracing_jax.zoo.report.pair_rows import PairRow
from tracing_jax.zoo.weights import weight_measures

_SEEDS = flags.DEFINE_integer("seeds", 8, "base models")


def named_child(parent: InMemory, child: InMemory) -> tuple[str | None, float]:
    """Returns which of the two is the child by training, at any distance; and the distance in their own length."""
    measures = {name: weight_measures(model) for name, model in (("parent", parent), ("child", child))}
    pairs = zip(flatten(parent.params).values(), flatten(child.params).values(), strict=True)
    l2 = float(np.mean([np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) for a, b in pairs]))
    row = PairRow("pair", "parent", "child", True, "done", l2=l2, level=1e-3, in_place_log10_p=-100.0)
    children = {name for name, _ in further_trained(Edge(row, WEIGHTS, l2), measures)}  # before the limit of distance
    named = children.pop() if len(children) == 1 else None
    return named, l2 / (sum(float(found["length"]) for found in measures.values()) / 2)


def counted(arch: object, bases: Tree, models: Tree, count: int) -> tuple[Counter[str], list[float]]:
    """Returns how many directions are right, wrong and open, and the relative distances."""
    counts: Counter[str] = Counter()
    distances = []
    for i in range(count):
        named, distance = named_child(member(arch, bases, i), member(arch, models, i))  # type: ignore[arg-type]
        counts[{"child": "right", "parent": "wrong", None: "open"}[named]] += 1
        distances.append(distance)
    return counts, distances


def main(argv: list[str]) -> None:
    """Measures and prints a table."""
    del argv
    use_all_cores()
    lineages = Lineages(ZOO_DIR.value, _SEEDS.value)
    arch = lineages.zoo.arch
    rows = []
    for name, bases, models in _kinds(lineages):
        counts, distances = counted(arch, bases, models, _SEEDS.value)
        drawn = counts["right"] + counts["wrong"]
        high = clopper_pearson(counts["wrong"], drawn)[1] if drawn else float("nan")
        rows.append(
            [name, *(counts[word] for word in ("right", "wrong", "open")), high, min(distances), max(distances)]
        )
        print(rows[-1], flush=True)
    headers = ["fine-tune", "right", "wrong", "open", "error at most (95 %)", "least distance", "greatest"]
    print(text_table(rows, headers))
    print(machine()["summary"])


def _kinds(lineages: Lineages) -> Iterable[tuple[str, Tree, Tree]]:
    tuned: Mapping[int, Tree] = lineages.finetuned
    yield "light", lineages.bases, tuned[LIGHT_STEPS]
    yield "long", lineages.bases, tuned[lineages.steps]
    rate = lineages.zoo.recipe.models.base_learning_rate
    _, other = texts(lineages.zoo)
    hard = dict(trained(lineages.zoo, lineages.bases, other, lineages.steps, rate))[lineages.steps]
    yield "long, at the rate of the base", lineages.bases, hard
    for factor, models in lineages.longer.items():
        yield f"early base, {factor} x its tokens more", lineages.early, jax.tree.map(np.asarray, models)


if __name__ == "__main__":
    app.run(main)
