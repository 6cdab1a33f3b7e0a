"""What each part of the program costs, as a share of what this machine can do or beside another program: one table.

    python -m benchmarks                                   # tiny models, one or two minutes
    python -m benchmarks --size=7b-layer                   # a layer as wide as those of 7B models: ten minutes
    python -m benchmarks --size=all --publish              # every size, and replaces the tables of RESULTS.md
    python -m benchmarks --parts=assignment,peer           # some parts only

Every ratio comes from one run, in which both of its sides were measured one after the other. The figures beside it are
for the record: they belong to one machine. JSON and figure are written to `--out_dir`; `RESULTS.md` says what the parts
mean. Other benchmarks are programs of their own:

    python -m benchmarks.assignment         # the linear assignment against other solvers
    python -m benchmarks.write_pair         # large checkpoints with random weights
    python -m benchmarks.memory_limits      # peak memory of runs on them, against limits
    python -m benchmarks.estimates           # what pairs of very large models cost, from their shapes
    python -m benchmarks.zoos               # whole zoos, killed and started again
    python -m benchmarks.seeds              # trains the models that the following compare
    python -m benchmarks.exact_nulls        # are the exact p-values of independent models uniform?
    python -m benchmarks.after_alignment    # and after an alignment?
    python -m benchmarks.moments            # false alarms of match_moments
    python -m benchmarks.power              # detection rates by what was done to a model
    python -m benchmarks.fuzz               # do damaged checkpoints end in one clear error?
    python -m benchmarks.distilled          # match_distilled on models without gates

Each prints its own options with `--help`. `benchmarks/gpu.sh` runs what only an accelerator can show.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks import environment
from benchmarks.assignment import against_scipy
from benchmarks.environment import OUT_DIR, PUBLISH, machine
from benchmarks.results import Row, publish, table
from benchmarks.speed import peer
from benchmarks.speed.reading import reading
from benchmarks.speed.scaling import figure, scaling
from benchmarks.speed.sizes import SIZES
from benchmarks.speed.steps import steps
from benchmarks.speed.whole_runs import whole_runs
from tracing_jax.dataclass_options import comma_list
from tracing_jax.record import atomic_write
from tracing_jax.report import save_png


def _scaling(name: str, folder: Path) -> Iterator[Row]:
    lines = list(scaling(SIZES[name]))
    title = f"Cost of the steps at {name}, float32, the shortest of {SIZES[name].rounds} times"
    save_png(figure(lines, title), Path(OUT_DIR.value) / f"scaling-{name}.png")
    yield from (line.row for line in lines)


PARTS: Mapping[str, Callable[[str, Path], Iterable[Row]]] = {
    "reading": lambda name, folder: reading(SIZES[name].pair(folder)[0]),
    "steps": lambda name, folder: steps(SIZES[name]),
    "assignment": lambda name, folder: against_scipy(SIZES[name].units),
    "peer": peer.path,
    "generation": peer.generation,
    "runs": lambda name, folder: whole_runs(SIZES[name], folder),
    "scaling": _scaling,
}
"""Part -> what measures it, given the name of a size and the folder of the checkpoint pairs."""

_SIZE = flags.DEFINE_string("size", "tiny", f"of {', '.join(SIZES)}; several with commas, or all")
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"of {', '.join(PARTS)}")
_PAIRS = flags.DEFINE_string("pairs_dir", "runs/pairs", "folder that keeps the checkpoint pairs")


def measured(name: str, parts: Iterable[str]) -> dict[str, Any]:
    """Returns the rows of one size, with what they were measured on."""
    start = time.monotonic()
    rows: list[Row] = []
    for part in parts:
        began = time.monotonic()
        rows += PARTS[part](name, Path(_PAIRS.value))
        print(f"{name}, {part}: {time.monotonic() - began:.0f} s", flush=True)
    print(table(rows), flush=True)
    return {
        "size": name,
        "machine": machine(),
        "seconds": round(time.monotonic() - start),
        "rows": [row.as_dict() for row in rows],
    }


def main(argv: list[str]) -> None:
    """Measures, prints the tables and writes them."""
    del argv
    names = list(SIZES) if _SIZE.value == "all" else comma_list(_SIZE.value)
    unknown = [name for name in names if name not in SIZES] + [part for part in _PARTS.value if part not in PARTS]
    if unknown:
        raise app.UsageError(f"unknown {', '.join(unknown)}: sizes are {', '.join(SIZES)}, parts {', '.join(PARTS)}")
    folder = Path(OUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = measured(name, _PARTS.value)
        atomic_write(folder / f"speed-{name}.json", json.dumps(found, indent=1).encode())
        if PUBLISH.value:
            publish(found, folder / f"scaling-{name}.png")


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):  # absl would exit with status 1
        flags.FLAGS(sys.argv[:1])
        print(__doc__, flags.FLAGS.module_help("__main__"), flags.FLAGS.module_help(environment), sep="\n")
        sys.exit()
    app.run(main)
