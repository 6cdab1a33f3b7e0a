"""Do intervals of shares cover where the child was in disguise? Errors and coverage at 95 %, by disguise and noise.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.merge_coverage    # 45 children in each disguise; ten minutes of a core

Children are two of three short fine-tunes of one base (`merge_nulls.py`) added with drawn weights, in turn without
noise, with noise of equal size everywhere and with noise of another size in each row; the third one has no part. Every
third is estimated without the base. What an alignment does to shares is measured in each report and is in the errors;
coverage by the jackknife alone is given beside.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import siblings
from benchmarks.environment import OUT_DIR, ZOO_DIR, use_all_cores
from benchmarks.merge_nulls import DISGUISES, Zoo
from benchmarks.merges import noisy, source
from tracing_jax.merges import MergeModels, estimate, read_sums
from tracing_jax.merges.aligning import AlignedModels, ModelsInOrder, read_in_one_order
from tracing_jax.merges.alignment_bias import AlignmentBias, shares_by
from tracing_jax.merges.shares import Shares
from tracing_jax.record import atomic_write
from tracing_jax.report import text_table
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sources import in_memory, rewritten

_CHILDREN = flags.DEFINE_integer("children", 45, "merges in each disguise", lower_bound=1)
_NOISES = ("none", "white", "rows")
_GROUPINGS = ("whole", "role", "layer", "tensor")
_PARENTS = 3  # the last of which has no part


def rows(zoo: Zoo, draw: int, aligned: AlignedModels) -> Iterator[dict[str, Any]]:
    """Yields what is found of the shares of a merge in each disguise."""
    rng = np.random.default_rng([draw, 2])
    at = rng.choice(len(zoo.tuned), _PARENTS, replace=False).tolist()
    truth = np.append(rng.uniform(0.15, 0.85, _PARENTS - 1), 0.0)
    if has_no_origin := draw % 3 == 0:
        truth /= truth.sum()
    noise = _NOISES[draw // 3 % 3]
    child = siblings.task_arithmetic(zoo.base, [zoo.tuned[i] for i in at], truth.tolist())
    own = source(zoo.arch, noisy(child, zoo.base, noise, rng), "float32")
    parents = {f"parent {i}": zoo.source("tuned", i, "float32") for i in at}
    models = MergeModels(own, parents, None if has_no_origin else zoo.source("base", 0, "float32"))
    plain = estimate(models, read_sums(models).tensors).values
    for disguise in DISGUISES:
        rewrites = draw_rewrites(disguise, jax.random.fold_in(jax.random.key(1), draw), zoo.arch)
        hidden = MergeModels(in_memory(rewritten(own, rewrites)), parents, models.origin)
        known = AlignedModels() if has_no_origin else aligned
        yield {
            "draw": draw, "disguise": disguise, "noise": noise, "base": not has_no_origin,
            "undisguised": np.abs(plain - truth).tolist(), **_found(hidden, truth, known),
        }  # fmt: skip


def _found(models: MergeModels, truth: np.ndarray, aligned: AlignedModels) -> dict[str, Any]:
    read = read_in_one_order(models, ("auto",), 0, known=aligned)
    if not read.aligned:
        return {"aligned": False}
    whole = _groups("whole", read, read.bias)[0]
    return {
        "aligned": True,
        "error": np.abs(whole.values - truth).tolist(),
        "se": whole.errors.tolist(),
        "bias": 0.0 if read.bias is None else read.bias.largest,
        "inside": {by: _inside(_groups(by, read, read.bias), truth) for by in _GROUPINGS},
        "inside_by_jackknife": {by: _inside(_groups(by, read, None), truth) for by in _GROUPINGS},
    }


def _groups(by: str, read: ModelsInOrder, bias: AlignmentBias | None) -> Sequence[Shares]:
    if by != "whole":
        return list(shares_by(by, read.models, read.sums, bias).values())
    whole = estimate(read.models, read.sums.tensors)
    return [whole if bias is None else whole.with_bias(bias.of("whole", None, read.models.names))]


def _inside(groups: Sequence[Shares], truth: np.ndarray) -> list[list[bool]]:
    """Returns for each group of tensors that has shares whether the interval of each has the true one."""
    intervals = [own.interval() for own in groups if own.undefined is None]
    return [((low <= truth) & (truth <= high)).tolist() for low, high in intervals]


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the errors, and the share of intervals that have the true share."""
    lines = []
    for disguise, noise in dict.fromkeys((row["disguise"], row["noise"]) for row in found):
        every = [row for row in found if (row["disguise"], row["noise"]) == (disguise, noise)]
        own = [row for row in every if row["aligned"]]
        covered = [_percent(own, "inside", by) for by in _GROUPINGS]
        alone = [_percent(own, "inside_by_jackknife", by) for by in _GROUPINGS]
        lines.append([
            disguise, noise, f"{len(own)} of {len(every)}",
            *(max((max(row[key]) for row in own), default=None) for key in ("error", "se", "undisguised")),
            max((row["bias"] for row in own), default=None), *(f"{a} ({b})" for a, b in zip(covered, alone)),
        ])  # fmt: skip
    headers = ["disguise", "noise", "aligned", "largest error", "largest s.e.", "error undisguised", "largest bias",
               "model (by jackknife)", "roles", "layers", "tensors"]  # fmt: skip
    return text_table(lines, headers)


def _percent(rows: Sequence[Mapping[str, Any]], key: str, by: str) -> str:
    inside = [np.ravel(row[key][by]) for row in rows]
    return f"{100 * float(np.mean(np.concatenate(inside))):.0f} %" if inside else "-"


def main(argv: list[str]) -> None:
    """Measures and prints a table."""
    del argv
    use_all_cores()
    zoo, start = Zoo(Path(ZOO_DIR.value)), time.monotonic()
    file = Path(OUT_DIR.value) / "merge_coverage.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    aligned, found = AlignedModels(), list[dict[str, Any]]()
    for draw in range(_CHILDREN.value):
        found += rows(zoo, draw, aligned)
        atomic_write(file, json.dumps(found).encode())
        if draw % 9 == 8 or draw == _CHILDREN.value - 1:
            print(table(found), f"\n{draw + 1} children, {time.monotonic() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    app.run(main)
