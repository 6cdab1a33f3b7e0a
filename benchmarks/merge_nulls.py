"""Parents without a part, by the thousand: how often is one called a part of a merge?

    python -m benchmarks.merge_nulls                       # 1,000 merges, 5,000 parents; ten minutes on two cores
    python -m benchmarks.merge_nulls --merges=0 --disguised=0 --no_merges=96   # fine-tunes beside others on their text
    OPENBLAS_NUM_THREADS=1 python -m benchmarks.merge_nulls --merges=0 --disguised=200 --reports=2  # 2,000 in each

A base of 0.1 million weights is trained, and 192 short fine-tunes of it, many at a time; groups of four share their
text. Merges by every method are made of two or three of them. Four others that had no part, one of which learnt from
the text of a parent that had, and a model that was trained from its own initialisation, are given as parents beside.
In disguise there may be several reports on a child, each with other parents beside those that had a part. No word
depends on what an alignment does to shares, which is not measured here; of models that are given again and again the
alignment to the base is kept.
"""

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy import stats

from benchmarks import siblings
from benchmarks.environment import OUT_DIR, ZOO_DIR, use_all_cores
from benchmarks.merges import noisy, source
from benchmarks.siblings import Leaves
from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.demo.members import training_data
from tracing_jax.demo.recipe import DemoSizes, config
from tracing_jax.demo.training import Training, init, learning_rates, optimizer, train, train_step
from tracing_jax.merges import MergeModels, read_sums
from tracing_jax.merges.aligning import AlignedModels, read_in_one_order
from tracing_jax.merges.choice import choose, sampled_entries
from tracing_jax.merges.merge_report import compared
from tracing_jax.merges.methods import dare, ties
from tracing_jax.merges.parent_shares import with_reproduced_entries
from tracing_jax.merges.reproduced_entries import reproduced_entries
from tracing_jax.record import atomic_write
from tracing_jax.report import text_table
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sources import ParamSource, in_memory, rewritten
from tracing_jax.tree import flatten

_MERGES = flags.DEFINE_integer("merges", 1000, "merges without a disguise", lower_bound=0)
_FIRST = flags.DEFINE_integer("first", 0, "number of the first merge, to add to an earlier run", lower_bound=0)
_DISGUISED = flags.DEFINE_integer("disguised", 50, "merges in each disguise", lower_bound=0)
_NO_MERGES = flags.DEFINE_integer("no_merges", 0, "fine-tunes beside others on the same text", lower_bound=0)
_REPORTS = flags.DEFINE_integer("reports", 1, "reports on each of these, with other parents beside", lower_bound=1)

RECIPE = DemoSizes(embed_dim=32, num_layers=2, mlp_dim=64, num_heads=2, num_kv_heads=2, block_size=64, base_steps=400)
_GROUPS, _OF_A_TEXT, _STEPS, _RATE = 48, 4, 40, 2e-3
_FOREIGN = 4
_OTHERS = 4
_ORDERS = 100
_AT_ONCE = 50
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "stitched", "copy")
DISGUISES = ("permute", "rotate", "units,values,queries,gains", "rotate,permute,units,values,queries")


class Zoo:
    """The base, its fine-tunes in groups of the same text, and models of their own initialisation."""

    def __init__(self, folder: Path) -> None:
        file = folder / "merge_nulls.npz"
        self.arch: Arch = arch_from_config(config(RECIPE))
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(file, **_trained(self.arch))  # type: ignore[arg-type]
        with np.load(file) as found:
            stacks = {name: found[name] for name in found.files}
        self.base = _own(stacks, "base", 0)
        self.tuned = [_own(stacks, "tuned", i) for i in range(_GROUPS * _OF_A_TEXT)]
        self.foreign = [_own(stacks, "foreign", i) for i in range(_FOREIGN)]
        self._sources: dict[tuple[str, int, str], ParamSource] = {}

    def source(self, kind: str, at: int, dtype: str) -> ParamSource:
        """Returns the base, a fine-tune, or a model of its own initialisation as a checkpoint of this dtype.

        Models of their own initialisation have their units and features in a random order that the number decides.
        """
        key = (kind, at, dtype)
        if key not in self._sources:
            leaves = {"base": [self.base], "tuned": self.tuned}.get(kind, [])
            self._sources[key] = source(self.arch, leaves[at] if leaves else self._of_another_order(at), dtype)
        return self._sources[key]

    def _of_another_order(self, at: int) -> Leaves:
        model = source(self.arch, self.foreign[at % _FOREIGN], "float32")
        moved = in_memory(rewritten(model, draw_rewrites("permute", jax.random.key(at), self.arch)))
        return {name: np.asarray(leaf) for name, leaf in flatten(moved.params).items()}


def _own(stacks: Mapping[str, np.ndarray], kind: str, at: int) -> Leaves:
    return {name.removeprefix(f"{kind}/"): rows[at] for name, rows in stacks.items() if name.startswith(f"{kind}/")}


def _trained(arch: Arch) -> dict[str, np.ndarray]:
    """Returns all models, stacked by kind."""
    with tempfile.TemporaryDirectory() as folder:
        data = training_data(RECIPE, Path(folder))

    def trained(seed: int) -> Any:
        own = dataclasses.replace(RECIPE, seed=seed)
        params = init(arch, jax.random.key(seed))
        return train(arch, own, params, Training(f"seed {seed}", data.base, RECIPE.base_steps, 6e-3))

    base = trained(0)
    models = {"base": [base], "foreign": [trained(1 + i) for i in range(_FOREIGN)]}
    texts = np.array_split(np.concatenate([data.finetune, data.base]), _GROUPS)
    members = [text for text in texts for _ in range(_OF_A_TEXT)]
    models["tuned"] = [own for i in range(0, len(members), 32) for own in _tuned(arch, base, members[i : i + 32], i)]
    stacked = {
        f"{kind}/{name}": np.stack([np.asarray(flatten(own)[name], np.float32) for own in trees])
        for kind, trees in models.items()
        for name in flatten(trees[0])
    }
    return stacked


def _tuned(arch: Arch, base: Any, texts: Sequence[np.ndarray], seed: int) -> list[Any]:
    """Returns a fine-tune on each of these texts, all trained at once."""
    count, T = len(texts), RECIPE.block_size
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), base)
    state = jax.vmap(optimizer(RECIPE).init)(params)
    step = jax.jit(jax.vmap(functools.partial(train_step, arch, RECIPE), in_axes=(0, 0, None, 0)))
    rng = np.random.default_rng(seed)
    for rate in learning_rates(_RATE, _STEPS):
        starts = [rng.integers(0, len(text) - T, size=(RECIPE.batch_size, 1)) for text in texts]
        tokens = np.stack([text[start + np.arange(T)] for text, start in zip(texts, starts)])
        params, state, _ = step(params, state, rate, tokens)
    params = jax.device_get(params)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(count)]


def merged(zoo: Zoo, method: str, draw: int) -> tuple[Leaves, list[int], bool]:
    """Returns a child, the fine-tunes it was made of, and whether the method needs the base."""
    rng = np.random.default_rng([draw, METHODS.index(method)])
    count = 2 if method in ("slerp", "stitched") else 1 if method == "copy" else int(rng.integers(2, 4))
    groups = rng.choice(_GROUPS, count, replace=False)
    at = [int(g) * _OF_A_TEXT + int(rng.integers(_OF_A_TEXT)) for g in groups]
    p, o = [zoo.tuned[i] for i in at], zoo.base
    w, density = rng.dirichlet(np.full(count, 3.0)).tolist(), float(rng.uniform(0.3, 0.8))
    owners = rng.permutation(count).tolist()
    made: Leaves = {
        "copy": lambda: p[0],
        "linear": lambda: siblings.linear(p, w),
        "task_arithmetic": lambda: siblings.task_arithmetic(o, p, [1.2 * own for own in w]),
        "ties": lambda: siblings.ties(o, p, w, density),
        "dare_linear": lambda: siblings.dare(o, p, w, density, False, draw),
        "dare_ties": lambda: siblings.dare(o, p, w, density, True, draw),
        "slerp": lambda: siblings.slerp(p[0], p[1], w[0]),
        "stitched": lambda: siblings.stitched(p, lambda name: owners[_layer(name) % count]),
    }[method]()  # fmt: skip
    return made, at, method in ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def _layer(name: str) -> int:
    return int(name.split("/")[1]) if name.startswith("layers/") else 0


def rows(
    zoo: Zoo, draws: Iterable[int], disguise: str | None, reports: int, aligned: AlignedModels
) -> Iterator[dict[str, Any]]:
    """Yields for each report what is said of the parents that had a part, and of those that had none.

    Args:
      zoo: all models.
      draws: numbers of merges.
      disguise: names of rewrites of the child; None for none.
      reports: on each child, with other parents that had no part.
      aligned: models of the zoo that were aligned to its base before.
    """
    for draw in draws:
        method = METHODS[draw % len(METHODS)]
        child, at, needs_origin = merged(zoo, method, draw)
        rng = np.random.default_rng([draw, 1])
        noise, dtype = str(rng.choice(["none", "white", "rows"])), str(rng.choice(["float32", "bfloat16"]))
        child = noisy(child, zoo.base, noise, rng)
        like = [i for i in range(at[0] // _OF_A_TEXT * _OF_A_TEXT, len(zoo.tuned)) if i not in at]
        origin = zoo.source("base", 0, dtype) if needs_origin or draw % 3 else None
        model = source(zoo.arch, child, dtype)
        if disguise is not None:
            key = jax.random.fold_in(jax.random.key(0), draw)
            model = in_memory(rewritten(model, draw_rewrites(disguise, key, zoo.arch)))
        for report in range(reports):
            free = [i for i in range(len(zoo.tuned)) if i not in (*at, *like[:reports])]
            others = [like[report], *map(int, rng.choice(free, _OTHERS - 1, replace=False))]
            parents = {f"part {i}": zoo.source("tuned", i, dtype) for i in at}
            parents |= {f"none {i}": zoo.source("tuned", i, dtype) for i in others}
            parents["foreign"] = zoo.source("foreign", (draw * reports + report) % _ORDERS, dtype)
            models = MergeModels(model, parents, origin)
            # Without the base the models are aligned to one of the parents, to another one in every merge.
            kept = AlignedModels() if origin is None else aligned
            read = read_in_one_order(models, ("auto",), 0, known=kept, measures_bias=False)
            found = compared(read.models, read.sums, draw, read.untested, None, read.exchanged)
            if any(part.word == "reserved" and not part.name.startswith("part") for part in found.parts):
                choice = choose(read.models, read.sums)  # by which such a parent may yet have a part
                found = found._replace(parts=with_reproduced_entries(found.parts, choice.reproduced))
            parts = [[part.name.split()[0], part.word, part.log10_p] for part in found.parts]
            yield {"draw": draw, "method": method, "noise": noise, "dtype": dtype, "disguise": disguise,
                   "aligned": read.aligned, "parts": parts}  # fmt: skip


def no_merges(zoo: Zoo, draws: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yields what is said of parents of a fine-tune that is no merge: those on its text, and one on another.

    In one of three, differences from the base are a tenth of what they were, so that they are a few steps of bfloat16.
    """
    for draw in draws:
        at, kind = draw % len(zoo.tuned), draw % 3
        dtype, size = ("float32", "bfloat16", "bfloat16")[kind], (1.0, 1.0, 0.1)[kind]
        first = at // _OF_A_TEXT * _OF_A_TEXT
        others = {f"like {i}": i for i in range(first, first + _OF_A_TEXT) if i != at}
        others["none"] = (first + _OF_A_TEXT + draw) % len(zoo.tuned)
        near = {i: siblings.task_arithmetic(zoo.base, [zoo.tuned[i]], [size]) for i in (at, *others.values())}
        parents = {name: source(zoo.arch, near[i], dtype) for name, i in others.items()}
        models = MergeModels(source(zoo.arch, near[at], dtype), parents, zoo.source("base", 0, dtype))
        sums = read_sums(models)
        found = compared(models, sums, draw, {})
        entries = sampled_entries(models, sums)
        # As if they had been made by one of these, whichever method would be named.
        fits = [reproduced_entries(method, entries, dtype) for method in (dare(entries, False), ties(entries, True))]
        parts = max(
            (with_reproduced_entries(found.parts, fit) for fit in fits), key=lambda own: str(own).count("'part'")
        )
        yield {
            "draw": draw, "disguise": f"no merge, {dtype}, {size:g}",
            "parts": [[part.name.split()[0], part.word, part.log10_p] for part in parts],
            "alone": max(part.alone or 0.0 for part in parts), "unexplained": found.in_tensors.unexplained,
            "exact": [fit.as_dict() for fit in fits if fit is not None],
            "shown": any(fit is not None and fit.shows(k) for fit in fits for k in range(len(parts))),
        }  # fmt: skip


def exact_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns how near fine-tunes that are no merges come to what is a part by exact entries."""
    lines = []
    for label in dict.fromkeys(row["disguise"] for row in found if "exact" in row):
        rows = [row for row in found if row["disguise"] == label]
        own = [fit for row in rows for fit in row["exact"]]
        times = [n / max(c, 1 / e["count"]) for e in own for n, c in zip(e["needs"], e["by_chance"]) if n >= 0.05]
        lines.append([
            label, len(rows), max(row["alone"] for row in rows), min(row["unexplained"] for row in rows),
            max((e["share"] for e in own), default=0.0), max(times, default=0.0), sum(row["shown"] for row in rows),
        ])  # fmt: skip
    headers = ["children", "number", "most partial r²", "least unexplained", "most exact", "most times chance", "shown"]
    return text_table(lines, headers) if lines else ""


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns how often parents were called a part, with the bounds of Clopper and Pearson."""
    lines = []
    for disguise in dict.fromkeys(row["disguise"] for row in found):
        own = [row for row in found if row["disguise"] == disguise]
        for kind, shown in {
            "none": "fine-tunes", "like": "on its text", "foreign": "of their own", "part": "with a part"
        }.items():  # fmt: skip
            parts = [part for row in own for part in row["parts"] if part[0] == kind]
            if not parts:
                continue
            words = [word for _, word, _ in parts]
            ps = [p for _, _, p in parts if p is not None]
            lines.append([
                disguise or "-", len(own), shown, len(parts), len(ps),
                words.count("part"), upper(words.count("part"), len(parts)), words.count("reserved"),
                *(sum(p <= level for p in ps) for level in (-1, -2, -3)),
            ])  # fmt: skip
    headers = ["disguise", "merges", "parents", "number", "tested", "part", "rate below (97.5 %)", "reserved",
               "p <= .1", "p <= .01", "p <= .001"]  # fmt: skip
    return text_table(lines, headers)


def upper(count: int, number: int) -> float:
    """Returns the upper end of the 95 % interval of Clopper and Pearson."""
    return 1.0 if count >= number else float(stats.beta.ppf(0.975, count + 1, number - count))


def main(argv: list[str]) -> None:
    """Measures and prints tables."""
    del argv
    use_all_cores()
    zoo, start = Zoo(Path(ZOO_DIR.value)), time.monotonic()
    file = Path(OUT_DIR.value) / "merge_nulls.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    aligned = AlignedModels()
    for first in range(_FIRST.value, _FIRST.value + max(_MERGES.value, _DISGUISED.value), _AT_ONCE):
        for disguise in (None, *DISGUISES):
            count = _MERGES.value if disguise is None else _DISGUISED.value
            draws = range(first, min(first + _AT_ONCE, _FIRST.value + count))
            found += rows(zoo, draws, disguise, 1 if disguise is None else _REPORTS.value, aligned)
        atomic_write(file, json.dumps(found).encode())
        print(table(found), f"\n{time.monotonic() - start:.0f} s\n", flush=True)
    found += no_merges(zoo, range(_NO_MERGES.value))
    atomic_write(file, json.dumps(found).encode())
    print(table(found), exact_table(found), f"{time.monotonic() - start:.0f} s", sep="\n\n")


if __name__ == "__main__":
    app.run(main)
