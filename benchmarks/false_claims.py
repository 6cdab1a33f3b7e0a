"""Can an independent model be made to look related, without changing what it computes? False alarms under forgery.

    python -m benchmarks.false_claims --zoo_dir=zoo --pairs=20
    python -m benchmarks.false_claims --zoo_dir=zoo --models=no_gate,experts --pairs=6

Independently trained models of a zoo are taken in pairs; every forgery of `forgeries.py` is made of each pair,
and every test and the verdict computed. None of the pairs is related: every alarm is false. Models that share a
tokenizer, a text and an architecture are the hard case.
"""

import collections
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.descendants import texts
from benchmarks.environment import OUT_DIR, ZOO_DIR, machine, use_all_cores
from benchmarks.feature_forgeries import feature_forgeries
from benchmarks.forgeries import forgeries, on_device, on_host
from benchmarks.intervals import clopper_pearson
from benchmarks.results import markdown_table
from benchmarks.seeds import RECIPES, Zoo, model, zoo
from tracing_jax import options
from tracing_jax.data import paired_one_to_one
from tracing_jax.options import RunOptions
from tracing_jax.record import write_json
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.statistics import (
    AUTO,
    AUTO_BY_DEPTH,
    AUTO_BY_EXPERTS,
    AUTO_WITH_TEXT,
    Pair,
    Result,
    Statistic,
    Vocabularies,
    hidden_by,
    inactive_layers,
    make_statistic,
    obscured_layers,
    verdict,
)

LEVEL = 1e-3
STATISTICS: Mapping[str, Statistic] = {
    name: make_statistic(name, RunOptions(csh=options.Csh(blocks=8, block_size=64)))
    for name in (*AUTO, *AUTO_WITH_TEXT, AUTO_BY_DEPTH, AUTO_BY_EXPERTS)
}

_PAIRS = flags.DEFINE_integer("pairs", 20, "pairs of models, no model in two of them")
_MODELS = flags.DEFINE_list("models", ["tiny"], f"zoos that the pairs come from, of {', '.join(RECIPES)}")
_ROWS = flags.DEFINE_multi_string("rows", [], "only forgeries with these words in their name; all by default")


def judge(base: InMemory, other: InMemory, blocks: np.ndarray, unused: np.ndarray, seed: int) -> dict[str, float | str]:
    """Returns statistic -> log10 p of what decides, and `verdict` -> its word."""
    ids = np.arange(base.arch.vocab_size, dtype=np.int32)
    in_text = ~np.isin(ids, unused)
    rows = {"unused": (unused, unused)}
    read = paired_one_to_one(blocks[:4, :24], blocks[:4, :24])  # as much of a text as runs read
    vocabularies = Vocabularies(
        True,
        ids,
        ids,
        unseen=rows,
        in_text=in_text,
        text_ids=(ids[in_text],) * 2,
        text_blocks=read,
    )
    pair = Pair(base, other, vocabularies, blocks, Compute(make_mesh(), 32), seed,
                blocks=paired_one_to_one(blocks, blocks))  # fmt: skip
    found: dict[str, float | str] = {}
    results: dict[str, Result] = {}
    may_be_moved = bool(inactive_layers(base) or inactive_layers(other))
    are_obscured = any(2 * len(obscured_layers(model)) > model.arch.num_layers for model in (base, other))
    needless = set() if may_be_moved or base.arch.num_layers != other.arch.num_layers else {AUTO_BY_DEPTH}
    needless |= set() if base.arch.num_experts else {AUTO_BY_EXPERTS}
    for name, statistic in STATISTICS.items():
        if name in needless or statistic.not_applicable(base.arch, other.arch, vocabularies):
            continue
        result = statistic.compute(pair)
        result = replace(result, blind_to=hidden_by(name, base.arch, other.arch, may_be_moved, are_obscured))
        results[name] = result
    for name, result in results.items():
        firm = result.log10_p if result.firm_log10_p is None else result.firm_log10_p
        found[name] = 0.0 if firm is None else firm
    return found | {"verdict": verdict(results, LEVEL).verdict}


def forged_pairs(models: Zoo) -> Iterator[tuple[str, list[dict[str, float | str]]]]:
    """Yields for each forgery, and for none, its name and what `judge` finds on every pair of models of a zoo."""
    params, blocks, unused = models.models(1.0), models.held_out, _unused_tokens(models)
    made = forgeries(models.arch, unused) | feature_forgeries(models.arch)
    named = {"none": lambda base, other, generator: (base, other), **made}
    for name, forge in named.items():
        if _ROWS.value and not any(word in name for word in _ROWS.value):
            continue
        found = []
        for i in range(_PAIRS.value):
            pair = [on_host(InMemory(models.arch, model(params, 2 * i + side))) for side in (0, 1)]
            forged = [on_device(m) for m in forge(pair[0], pair[1], np.random.default_rng([7, i]))]
            found.append(judge(forged[0], forged[1], blocks, unused, i))
        yield name, found


def main(argv: list[str]) -> None:
    """Measures, prints a table and writes it."""
    del argv
    use_all_cores()
    rows, related = [], 0
    for models in _MODELS.value:
        for name, found in forged_pairs(zoo(RECIPES[models], ZOO_DIR.value)):
            ps = [p for pair in found for test, p in pair.items() if test != "verdict"]
            alarms = sum(float(p) < np.log10(LEVEL) for p in ps)
            related += sum(pair["verdict"] == "related" for pair in found)
            verdicts = collections.Counter(str(pair["verdict"]).replace("_", " ") for pair in found)
            words = ", ".join(f"{word}: {count}" for word, count in sorted(verdicts.items()))
            rows.append([models, name, f"{alarms} of {len(ps)}", words, f"{min(map(float, ps)):.1f}"])
            print(rows[-1], flush=True)
    print(markdown_table(("models", "change", "alarms of all tests", "verdicts", "least log10 p"), rows))
    made = len(rows) * _PAIRS.value
    print(f"{related} of {made} pairs called related; {clopper_pearson(related, made)}; {machine()['summary']}")
    out = Path(OUT_DIR.value)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "false_claims.json", {"machine": machine(), "pairs": _PAIRS.value, "rows": rows})


def _unused_tokens(models: Zoo) -> np.ndarray:
    """Returns the tokens that neither the text that the models learnt from has, nor the held-out one."""
    seen, _ = texts(models)
    return np.setdiff1d(np.arange(models.arch.vocab_size), np.union1d(seen, models.held_out)).astype(np.int32)


if __name__ == "__main__":
    app.run(main)
