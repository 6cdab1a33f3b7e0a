"""How often does a test, or `--stat auto`, call two independent models related?

    python -m benchmarks.independent_pairs --zoo_dir=zoo --out_dir=runs/independent              # hours on two cores
    python -m benchmarks.independent_pairs --zoo_dir=zoo --out_dir=runs/independent --zoos=tiny  # one set of models
    python -m benchmarks.independent_pairs --out_dir=runs/independent --again=match_heads        # a test that changed
    python -m benchmarks.independent_pairs --out_dir=runs/independent --publish                  # puts it into the docs

Every pair of models of each set goes through every test of `auto`. What was measured is kept, one line
for each pair, so that several processes may each do some of the sets, and an interrupted one goes on.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from benchmarks.comparing import LEVEL, Text, auto, results
from benchmarks.descendants import Descendant, member
from benchmarks.environment import OUT_DIR, PUBLISH, ZOO_DIR
from benchmarks.intervals import clopper_pearson, rounds, upper_bound
from benchmarks.results import replace_between
from benchmarks.seeds import RECIPES, Zoo, zoo
from tracing_jax.record import atomic_write
from tracing_jax.report import text_table
from tracing_jax.statistics import verdict

SETS: Mapping[str, int] = {"tiny": 48, "no_gate": 32, "experts": 32}
"""Set of models -> how many of its seeds are paired: 2,120 pairs in all."""

LEVELS = (1e-2, LEVEL)
AUTO = "auto: related"
DOCS = Path(__file__).parents[1] / "docs" / "nulls.md"
HEADERS = (
    "models", "test", "pairs", "below 1e-2", "below 1e-3", "95 % interval, %", "by models, %", "smallest log10 p",
    "below 1e-3, not reserved",
)  # fmt: skip

_ZOOS = flags.DEFINE_list("zoos", list(SETS), f"sets of models, of {', '.join(SETS)}")
_AGAIN = flags.DEFINE_list("again", [], "tests that are computed anew on the pairs that were measured; verdicts stay")


@dataclass(frozen=True)
class Alarms:
    """What one test gave on the pairs of one set of independent models.

    Attributes:
      models, test: the set and the test.
      pairs: to which the test applies.
      below: for each of `LEVELS` the pairs with p below it; of `auto` the pairs that it calls related.
      interval: the 95 % Clopper-Pearson interval of the rate at the last level, as if the pairs were independent.
      by_models: a 97.5 % upper bound of the same rate that takes the models for the sample; None without an alarm, or
        if some pair lacks the test.
      smallest: log10 of the smallest p-value.
      firm: the pairs with p below the last level of evidence to which no reservation applies.
    """

    models: str
    test: str
    pairs: int
    below: tuple[int, ...]
    interval: tuple[float, float]
    by_models: float | None
    smallest: float | None
    firm: int

    @property
    def cells(self) -> list[object]:
        """The row of the table."""
        low, high = self.interval
        return [
            self.models, self.test, f"{self.pairs:,}", *self.below, f"{100 * low:.2f} to {100 * high:.2f}",
            "–" if self.by_models is None else f"{100 * self.by_models:.2f}",
            "–" if self.smallest is None else f"{self.smallest:.1f}", self.firm,
        ]  # fmt: skip


def measure(name: str, models: Zoo, file: Path) -> None:
    """Appends what is not yet in the file: a line for each pair, with the p-values of every test."""
    done = {(line["i"], line["j"]) for line in lines(file)}
    text, params = Text.of(models), models.models(1.0)
    seeds = [member(models.arch, params, index) for index in range(SETS[name])]
    order = rounds(SETS[name], np.random.default_rng(0)).reshape(-1, 2)
    todo = [pair for i, j in order if (pair := (int(min(i, j)), int(max(i, j)))) not in done]
    with file.open("a", encoding="utf-8") as out:
        for i, j in tqdm(todo, desc=name, unit="pair", disable=None):
            names = auto(models.arch, models.arch)
            found = results(seeds[i], Descendant(seeds[j]), text, seed=i * SETS[name] + j, names=names)
            judged = verdict(found, LEVEL)
            tests = {n: [result.log10_p, result.deciding_log10_p] for n, result in found.items()}
            effects = {n: result.effect for n, result in found.items() if result.effect}
            line = {"i": i, "j": j, "verdict": judged.verdict, "tests": tests, "effects": effects}
            print(json.dumps(line), file=out, flush=True)


def measure_again(name: str, models: Zoo, file: Path, tests: Sequence[str]) -> None:
    """Replaces what some tests gave on the pairs of a file; those that do not apply to them are left out."""
    text, params = Text.of(models), models.models(1.0)
    seeds = [member(models.arch, params, index) for index in range(SETS[name])]
    after = lines(file)
    for line in tqdm(after, desc=f"{name}, again", unit="pair", disable=None):
        i, j = line["i"], line["j"]
        found = results(seeds[i], Descendant(seeds[j]), text, seed=i * SETS[name] + j, names=tests)
        line["tests"] |= {n: [result.log10_p, result.deciding_log10_p] for n, result in found.items()}
        line["effects"] |= {n: result.effect for n, result in found.items() if result.effect}
    atomic_write(file, "".join(json.dumps(line) + "\n" for line in after).encode())


def lines(file: Path) -> list[dict[str, Any]]:
    """Returns the pairs that a file holds; a last line that was cut off counts as not measured."""
    if not file.exists():
        return []
    whole, _, _ = file.read_text("utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def alarms(models: str, found: Sequence[Mapping[str, Any]]) -> Iterator[Alarms]:
    """Yields the alarms of every test on one set of models, and how many pairs `auto` calls related."""
    for name in dict.fromkeys(name for line in found for name in line["tests"]):
        ps = {(line["i"], line["j"]): line["tests"][name] for line in found if name in line["tests"]}
        yield _alarms(models, name, ps)
    words = {(line["i"], line["j"]): -np.inf if line["verdict"] == "related" else 0.0 for line in found}
    yield _alarms(models, AUTO, {pair: [log10_p, log10_p] for pair, log10_p in words.items()})


def _alarms(models: str, test: str, log10_ps: Mapping[tuple[int, int], Sequence[float | None]]) -> Alarms:
    """Returns the alarms of a test, by pair its log10 p and that of what no reservation applies to."""
    raw, firm = np.array([[0.0 if p is None else p for p in ps] for ps in log10_ps.values()]).T
    below = tuple(int((raw < np.log10(level)).sum()) for level in LEVELS)
    S = 1 + max(j for _, j in log10_ps)
    table = np.zeros((S, S))
    for (i, j), value in zip(log10_ps, raw):
        table[i, j] = table[j, i] = value < np.log10(LEVEL)
    whole = below[-1] and len(log10_ps) == S * (S - 1) // 2
    return Alarms(
        models, test, len(raw), below, clopper_pearson(below[-1], len(raw)),
        upper_bound(table, 0.975) if whole else None, None if test == AUTO else float(raw.min()),
        int((firm < np.log10(LEVEL)).sum()),
    )  # fmt: skip


def over_all(found: Iterable[Alarms]) -> list[Alarms]:
    """Returns the alarms of each test over all sets of models together."""
    by_test: dict[str, list[Alarms]] = {}
    for one in found:
        by_test.setdefault(one.test, []).append(one)
    together = []
    for test, ones in by_test.items():
        pairs = sum(one.pairs for one in ones)
        below = tuple(sum(one.below[k] for one in ones) for k in range(len(LEVELS)))
        smallest = None if test == AUTO else min(one.smallest for one in ones if one.smallest is not None)
        interval, firm = clopper_pearson(below[-1], pairs), sum(one.firm for one in ones)
        together.append(Alarms("all", test, pairs, below, interval, None, smallest, firm))
    return together


def main(argv: list[str]) -> None:
    """Measures what is missing and prints the table of all that is there."""
    del argv
    jax.config.update("jax_platforms", "cpu")  # one device: of models this small most time is dispatch
    folder = Path(OUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ZOOS.value:
        models, file = zoo(RECIPES[name], ZOO_DIR.value), folder / f"{name}.jsonl"
        measure(name, models, file)
        if _AGAIN.value:
            measure_again(name, models, file, _AGAIN.value)
    found = [one for name in SETS for one in alarms(name, lines(folder / f"{name}.jsonl"))]
    rows = [one.cells for one in over_all(found) + found]
    print(text_table(rows, list(HEADERS)))
    if PUBLISH.value:
        markdown = ["| " + " | ".join(map(str, row)) + " |" for row in (HEADERS, ["---"] * len(HEADERS), *rows)]
        replace_between("independent pairs", "\n".join(markdown) + "\n", DOCS)


if __name__ == "__main__":
    app.run(main)
