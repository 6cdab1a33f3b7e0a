"""How often does `match_moments` call independent models related, and on how many units do such models agree?

python -m benchmarks.moments --zoo_dir=zoo --out_dir=runs/moments --zoos=tiny
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from tqdm import tqdm

from benchmarks.agreements import Agreements, compare_units, comparison_table
from benchmarks.convergence import print_alarms
from benchmarks.environment import OUT_DIR, ZOO_DIR, use_all_cores
from benchmarks.false_alarms import false_alarms
from benchmarks.seeds import RECIPES, Zoo, model, zoo
from tracing_jax.record import atomic_write
from tracing_jax.report import text_table
from tracing_jax.sources import InMemory
from tracing_jax.statistics.calibration import control_pairs
from tracing_jax.statistics.comparison import Comparison
from tracing_jax.statistics.match_moments import PROJECTIONS, descriptors
from tracing_jax.statistics.unit_descriptors import descriptor_correlations, spread_layers

_ZOOS = flags.DEFINE_list("zoos", list(RECIPES), f"of {', '.join(RECIPES)}")

Signed = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Gate and up: descriptors of one layer's units, and which of them are ever active."""


def agreements_of(found: Zoo, *, seed: int = 0) -> Agreements:
    """Returns what `match_moments` compares for every pair of a zoo's fully trained models."""
    models, L = found.models(1.0), found.arch.num_layers
    layers = spread_layers(L, 8)
    signed: list[list[Signed]] = [
        list(descriptors(InMemory(found.arch, model(models, i)), layers, range(L)))
        for i in range(found.recipe.num_seeds)
    ]
    places = [(i, i) for i in range(L)] + sorted(control_pairs(L, L, np.random.default_rng(seed)))

    def compared(i: int, j: int) -> list[tuple[float, ...]]:
        rng = np.random.default_rng([seed, i, j])
        return [dataclasses.astuple(_compare(signed[i][a], signed[j][b], rng)) for a, b in places]

    pairs = tqdm(range(len(signed)), desc="match_moments", unit="model", disable=None)
    return comparison_table({(i, j): compared(i, j) for i in pairs for j in range(i + 1, len(signed))}, L)


def _compare(base: Signed, ft: Signed, generator: np.random.Generator) -> Comparison:
    gate, up = (descriptor_correlations(base[side], ft[side]) for side in PROJECTIONS)
    return compare_units(gate, up, generator)


def print_agreements(found: Mapping[str, Agreements]) -> None:
    """Prints by zoo and layer how many units agree, and how many do in layers that do not correspond."""
    rows: list[Sequence[object]] = []
    for name, measured in found.items():
        above = np.triu_indices(len(measured.layers), 1)
        accident = float(measured.agreeing_controls[above].mean())
        for layer in range(measured.agreeing.shape[-1]):
            k = measured.agreeing[..., layer][above]
            rows.append([name, layer, len(k), float(k.mean()), float(k.var()), int(k.max()), accident])
    print(text_table(rows, ["zoo", "layer", "pairs", "agreeing", "variance", "most", "by accident"]))


def main(argv: list[str]) -> None:
    """Measures and prints both tables, and writes the alarms."""
    del argv
    use_all_cores()
    found = {name: agreements_of(zoo(RECIPES[name], ZOO_DIR.value)) for name in _ZOOS.value}
    print_agreements(found)
    alarms = false_alarms({name: {"moments": measured} for name, measured in found.items()})
    folder = Path(OUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "moments.json", json.dumps([dataclasses.asdict(a) for a in alarms], indent=1).encode())
    print_alarms(alarms)


if __name__ == "__main__":
    app.run(main)
