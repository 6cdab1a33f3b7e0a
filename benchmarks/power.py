"""Which statistic detects what was done to a model? Detection rates at a level of 1e-3, and false alarms.

    python -m benchmarks.power --zoo_dir=zoo --out_dir=runs/power            # measures, prints and draws
    python -m benchmarks.power --zoo_dir=zoo --out_dir=runs/power --publish  # and puts it into the docs
    python -m benchmarks.power --rows="trained on" --rows=merged ...         # only rows with these words in their name
    python -m benchmarks.power --statistics=match_moments ...                # only these, and then no verdict

What is done to the models is in `lineages.py`. A statistic detects where its p-value, exact or calibrated, is below the
level; the verdict where it says related. What was published and is not measured now stays in the docs as it is.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.comparing import LEVEL, STATISTICS, Outcome, Text, compare
from benchmarks.environment import OUT_DIR, PUBLISH, ZOO_DIR, use_all_cores
from benchmarks.lineages import Lineages
from benchmarks.power_table import Rates, figure, from_markdown, to_markdown
from tracing_jax.record import atomic_write
from tracing_jax.report import save_png, text_table

COLUMNS = ["csu", "csu_all", "csh", "l2", "match, forward", "match, weights", "match", "match_all", "match_mlps",
           "match_moments", "match_io", "match_crossfit", "match_heads", "features_in_place", "csu_procrustes",
           "heads_in_place", "unseen_tokens", "verdict"]  # fmt: skip
_TITLE = f"Pairs detected at {LEVEL:g}, per cent (–: does not apply)"

_SEEDS = flags.DEFINE_integer("seeds", 20, "base models, and as many unrelated ones")
_ROWS = flags.DEFINE_multi_string("rows", [], "measure only rows with these words in their name; all by default")
_STATISTICS = flags.DEFINE_list("statistics", list(STATISTICS), f"what to measure, of {', '.join(STATISTICS)}")


def measured(
    lineages: Lineages, names: Sequence[str], statistics: Sequence[str], folder: Path
) -> dict[str, list[Outcome]]:
    """Returns row -> what each of its pairs gave, for the rows named; rows that the folder has are read from it."""
    file = folder / "power.json"
    done: dict[str, list[Outcome]] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    rows, text = lineages.rows(), Text.of(lineages.zoo)
    for name in names:
        if name in done:
            continue
        start = time.monotonic()
        pairs = enumerate(rows[name]())
        done[name] = [compare(base, ft, text, i, statistics) for i, (base, ft) in pairs]
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(done).encode())
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return {name: done[name] for name in names}


def rates(pairs: Sequence[Outcome]) -> Rates:
    """Returns the share of pairs detected by each statistic; None where it does not apply."""

    def rate(name: str) -> float | None:
        values = [value for pair in pairs if (value := pair[name]) is not None]
        if len(values) < len(pairs):
            return None
        return float(np.mean(values if name == "verdict" else np.array(values) < np.log10(LEVEL)))

    return Rates(len(pairs), {name: rate(name) for name in COLUMNS if name in pairs[0]})


def chosen(rows: Iterable[str], words: Sequence[str]) -> list[str]:
    """Returns the rows that have any of these words in their name; all rows where no words are given.

    Raises:
      ValueError: words that no row has.
    """
    names = list(rows)
    if unknown := [word for word in words if not any(word in name for name in names)]:
        raise ValueError(f"--rows={', '.join(unknown)}: no row is called so; there are {'; '.join(names)}")
    return [name for name in names if not words or any(word in name for word in words)]


def publish(table: Mapping[str, Rates], order: Iterable[str]) -> None:
    """Puts these rows among those that the docs hold, and draws all of them."""
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "power.md").read_text("utf-8")
    head, begin, rest = text.partition("<!-- table -->\n")
    old, end, tail = rest.partition("<!-- end of table -->\n")
    known = from_markdown(old)
    for row, rates in table.items():
        shares = known[row].shares if row in known else {}
        known[row] = Rates(rates.pairs, {**shares, **rates.shares})
    merged = {row: known[row] for row in order if row in known}
    (docs / "power.md").write_text(head + begin + to_markdown(merged, COLUMNS) + end + tail, encoding="utf-8")
    save_png(figure(merged, COLUMNS, _TITLE), docs / "power.png")


def main(argv: list[str]) -> None:
    """Measures what is missing, prints the table and draws it."""
    del argv
    use_all_cores()
    folder = Path(OUT_DIR.value)
    lineages = Lineages(ZOO_DIR.value, _SEEDS.value)
    names = list(lineages.rows())
    found = measured(lineages, chosen(names, _ROWS.value), _STATISTICS.value, folder)
    table = {row: rates(pairs) for row, pairs in found.items()}
    shown = [[row, *(rates.shares.get(name) for name in COLUMNS)] for row, rates in table.items()]
    print(text_table(shown, ["done", *COLUMNS]))
    save_png(figure(table, COLUMNS, _TITLE), folder / "power.png")
    (folder / "power.md").write_text(to_markdown(table, COLUMNS), encoding="utf-8")
    if PUBLISH.value:
        publish(table, names)


if __name__ == "__main__":
    app.run(main)
