"""Merges that we make ourselves: are the shares right, do intervals cover, is a parent without a part left alone?

    python -m benchmarks.merges                  # every part, a quarter of an hour on two cores
    python -m benchmarks.merges --parts=shares   # of shares, methods, noisy_methods, further, disguises

Parents are fine-tunes of the demo's base (`siblings.py`), so that their differences from it are alike in part; `like_a`
learnt from the same text as `a`. Merges are made in numpy as mergekit makes them, and rounded as checkpoints are.
"""

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import app, flags

from benchmarks import siblings
from benchmarks.environment import OUT_DIR, ZOO_DIR, use_all_cores
from benchmarks.siblings import Leaves
from tracing_jax.arch import Arch
from tracing_jax.merges import MergeModels, NormalEquations, TensorSums, estimate, merge_report, read_sums
from tracing_jax.merges.merge_report import compared
from tracing_jax.record import atomic_write
from tracing_jax.report import text_table
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.tree import unflatten

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
NOISES = ("none", "white", "rows", "low rank")
"""Added to the child: nothing, or noise of a third of the size of the merged difference: of equal size everywhere, of
another size in each row, of rank two."""
DISGUISES = ("permute", "rotate", "units,values,queries,gains", "rotate,permute,units,values,queries", "pad,identity",
             "split,permute")  # fmt: skip
_PARTS = flags.DEFINE_list("parts", ["shares", "methods", "noisy_methods", "further", "disguises"], "what to measure")
_DRAWS = flags.DEFINE_integer("draws", 12, "merges of each kind of noise and dtype", lower_bound=1)


class MergeModelsOfZoo:
    """The base and its fine-tunes, and models as they would be read from a checkpoint of a dtype."""

    def __init__(self, folder: Path) -> None:
        self.arch, self.origin, self.parents = siblings.family(folder)

    def stored(self, leaves: Leaves, dtype: str) -> Leaves:
        """Returns the leaves as a checkpoint of this dtype gives them."""
        return {name: np.asarray(leaf).astype(_DTYPES[dtype]).astype(np.float32) for name, leaf in leaves.items()}

    def models(self, child: Leaves, names: Sequence[str], dtype: str, with_origin: bool) -> MergeModels:
        """Returns the models of a merge."""
        parents = {name: source(self.arch, self.parents[name], dtype) for name in names}
        origin = source(self.arch, self.origin, dtype) if with_origin else None
        return MergeModels(source(self.arch, child, dtype), parents, origin)


def source(arch: Arch, leaves: Leaves, dtype: str) -> InMemory:
    """Returns a model of these leaves."""
    return InMemory(arch, unflatten({name: np.asarray(leaf).astype(_DTYPES[dtype]) for name, leaf in leaves.items()}))


def noisy(child: Leaves, origin: Leaves, kind: str, rng: np.random.Generator) -> Leaves:
    """Returns the child with noise of a third of the size of its difference from the origin."""

    def noise(difference: np.ndarray) -> np.ndarray:
        shape, size = difference.shape, float(difference.std()) / 3
        if kind == "none":
            return np.zeros(shape)
        flat = rng.normal(size=(shape[0], max(1, difference.size // shape[0])))
        if kind == "rows":
            flat *= rng.normal(size=(shape[0], 1))
        if kind == "low rank" and len(shape) > 1:
            flat = rng.normal(size=(len(flat), 2)) @ rng.normal(size=(2, flat.shape[1]))
        return size * (flat / max(flat.std(), 1e-9)).reshape(shape)

    return {name: leaf + noise(leaf - origin[name]) for name, leaf in child.items()}


def shares(family: MergeModelsOfZoo, draws: int) -> Iterator[dict[str, Any]]:
    """Yields merges with drawn shares: their errors, whether intervals cover, and the words for every parent."""
    for dtype in _DTYPES:
        origin = family.stored(family.origin, dtype)
        parents = {name: family.stored(leaves, dtype) for name, leaves in family.parents.items()}
        for noise in NOISES:
            for draw in range(draws):
                rng = np.random.default_rng([draw, NOISES.index(noise), len(dtype)])
                K = int(rng.integers(2, 4))
                order = [*rng.permutation(["a", "b", "c"])]
                names = [*order[:K], *order[K:], "like_a"]
                truth = dict.fromkeys(names, 0.0) | dict(zip(order, map(float, rng.dirichlet(np.full(K, 2.0)))))
                child = siblings.task_arithmetic(origin, [parents[n] for n in names], list(truth.values()))
                models = family.models(noisy(child, origin, noise, rng), names, dtype, bool(draw % 2))
                yield _row(models, truth, {"dtype": dtype, "noise": noise, "origin": bool(draw % 2)})


def _row(models: MergeModels, truth: Mapping[str, float], facts: Mapping[str, Any]) -> dict[str, Any]:
    sums = read_sums(models)
    found = compared(models, sums, seed=0, untested={})
    wanted = np.array([truth[name] for name in models.names])
    groups: dict[str, Callable[[TensorSums], Hashable]] = {
        "inside": lambda tensor: None,
        "inside_by_role": lambda tensor: tensor.place.role,
        "inside_by_layer": lambda tensor: tensor.place.layer,
        "inside_by_tensor": lambda tensor: tensor.place,
    }
    inside = {name: _covered(models, sums, key, wanted) for name, key in groups.items()}
    return {
        **facts,
        "error": np.abs(found.whole.values - wanted).tolist(),
        "se": found.whole.errors.tolist(),
        **inside,
        "truth": wanted.tolist(),
        "words": [part.word for part in found.parts],
    }


def _covered(
    models: MergeModels, sums: NormalEquations, key: Callable[[TensorSums], Hashable], wanted: np.ndarray
) -> list[list[bool]]:
    """Returns for each group of tensors whether the interval of each share has the true one."""
    groups: dict[Hashable, list[TensorSums]] = {}
    for tensor in sums.tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    intervals = [estimate(models, own).interval() for own in groups.values()]
    return [((low <= wanted) & (wanted <= high)).tolist() for low, high in intervals if np.isfinite(low).all()]


def further(family: MergeModelsOfZoo) -> Iterator[dict[str, Any]]:
    """Yields children that were trained further, after a merge or instead of one."""
    o, p = family.origin, family.parents
    merged = siblings.task_arithmetic(o, [p["a"], p["b"]], [0.6, 0.4])
    children = {
        "a, trained further": (p["a"], {"a": 1.0, "b": 0.0, "like_a": 0.0}),
        "0.6 a + 0.4 b, trained further": (merged, {"a": 0.6, "b": 0.4, "like_a": 0.0}),
    }
    for steps in (8, 32):
        for name, (child, truth) in children.items():
            models = family.models(siblings.tuned_further(family.arch, child, steps), list(truth), "float32", True)
            yield _row(models, truth, {"child": f"{name} for {steps} steps"})
    for name in ("a", "c"):  # a fine-tune that is no merge of the others, one of which learnt from the same text
        others = [other for other in siblings.NAMES if other != name]
        models = family.models(p[name], others, "float32", True)
        yield _row(models, dict.fromkeys(others, 0.0), {"child": f"{name}, which is no merge"})


def methods(family: MergeModelsOfZoo, draws: int, noise: str = "none") -> Iterator[dict[str, Any]]:
    """Yields the method that was made and the one that was named, of children with noise of this kind."""
    for dtype in _DTYPES:
        o, p = family.stored(family.origin, dtype), [family.stored(family.parents[n], dtype) for n in ("a", "b")]
        for draw in range(draws):
            for name, child in _made(o, p, draw):
                with_origin = bool(draw % 2) or name in _NEED_ORIGIN
                child = noisy(child, o, noise, np.random.default_rng([draw, 3]))
                record = merge_report(family.models(child, ["a", "b"], dtype, with_origin)).record
                method = record["method"]
                yield {"dtype": dtype, "made": name, "named": method["name"], "residual": method["residual"],
                       "recipe_residual": record["recipe_residual"], "nats": method["nats_per_entry"],
                       "words": [part["word"] for part in record["parts"]]}  # fmt: skip


_NEED_ORIGIN = ("linear, by tensor", "ties", "dare_linear", "dare_ties")


def _made(o: Leaves, p: Sequence[Leaves], draw: int) -> Iterator[tuple[str, Leaves]]:
    """Yields a merge by every method, with weights and densities of the draw."""
    rng = np.random.default_rng(draw)
    w, d = rng.uniform(0.2, 0.8, 2).tolist(), float(rng.uniform(0.2, 0.7))
    yield "copy", p[1]
    yield "stitched", siblings.stitched(p, _owner(rng))
    yield "linear", siblings.linear(p, w)
    yield "linear, by tensor", _by_layer(o, p, rng)
    yield "slerp", siblings.slerp(p[0], p[1], w[0])
    yield "ties", siblings.ties(o, p, w, d)
    yield "dare_linear", siblings.dare(o, p, w, d, False, draw)
    yield "dare_ties", siblings.dare(o, p, w, d, True, draw)


def disguises(family: MergeModelsOfZoo) -> Iterator[dict[str, Any]]:
    """Yields the shares of a merge in disguise beside those of the same merge without one."""
    o, p = family.origin, family.parents
    truth = np.array([0.6, 0.4])
    child = siblings.task_arithmetic(o, [p["a"], p["b"]], truth.tolist())
    for noise in ("none", "white"):
        models = family.models(noisy(child, o, noise, np.random.default_rng(0)), ["a", "b"], "float32", True)
        plain = estimate(models, read_sums(models).tensors).values
        for names in DISGUISES:
            rewrites = draw_rewrites(names, jax.random.key(1), family.arch)
            hidden = dataclasses.replace(models, child=in_memory(rewritten(models.child, rewrites)))
            start = time.monotonic()
            record = merge_report(hidden, align=("auto",)).record
            found = [part["share"] for part in record["parts"]]
            yield {"disguise": names, "noise": noise, "error": float(np.abs(np.array(found) - truth).max()),
                   "undisguised": float(np.abs(plain - truth).max()), "unexplained": record["unexplained"],
                   "se": max(part["se"] for part in record["parts"]),
                   "words": [part["word"] for part in record["parts"]],
                   "bias": (record["alignment_bias"] or {"largest": 0.0})["largest"], "aligned": record["aligned"],
                   "seconds": time.monotonic() - start}  # fmt: skip


def _owner(rng: np.random.Generator) -> Callable[[str], int]:
    owners = [0, 1, *rng.integers(0, 2, 2).tolist()]
    return lambda name: owners[int(name.split("/")[1])] if name.startswith("layers/") else 0


def _by_layer(o: Leaves, p: Sequence[Leaves], rng: np.random.Generator) -> Leaves:
    weights = {str(i): rng.uniform(0.2, 0.8, 2).tolist() for i in range(4)}
    layer = {name: name.split("/")[1] if name.startswith("layers/") else "0" for name in o}
    return {n: siblings.task_arithmetic({n: o[n]}, [{n: q[n]} for q in p], weights[layer[n]])[n] for n in o}


def tables(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """Returns what was measured, as text."""
    parts = []
    if rows := found.get("shares"):
        lines = []
        for dtype in _DTYPES:
            for noise in NOISES:
                own = [row for row in rows if (row["dtype"], row["noise"]) == (dtype, noise)]
                if not own:
                    continue
                words = [(t, w) for row in own for t, w in zip(row["truth"], row["words"])]
                involved, others = [w for t, w in words if t > 0], [w for t, w in words if t == 0]
                lines.append([
                    dtype, noise, len(own), max(max(row["error"]) for row in own), max(max(row["se"]) for row in own),
                    *(float(np.mean(np.concatenate([np.ravel(row[f"inside{by}"]) for row in own])))
                      for by in ("", "_by_role", "_by_layer", "_by_tensor")),
                    f"{involved.count('part')} of {len(involved)}", f"{others.count('part')} of {len(others)}",
                ])  # fmt: skip
        parts.append(text_table(lines, ["dtype", "noise", "merges", "largest error", "largest s.e.", "95 % covers",
                                        "by role", "by layer", "by tensor", "parts found", "false parts"]))  # fmt: skip
    if rows := found.get("further"):
        lines = [[row["child"], ", ".join(f"{t:g}" for t in row["truth"]), ", ".join(row["words"]),
                  max(row["error"])] for row in rows]  # fmt: skip
        parts.append(text_table(lines, ["child", "shares of a, b, like_a (the others)", "words", "largest error"]))
    for part in ("methods", "noisy_methods"):
        if rows := found.get(part):
            parts.append(_method_table(rows))
    if rows := found.get("disguises"):
        keys = ("disguise", "noise", "aligned", "error", "se", "undisguised", "bias", "unexplained", "seconds")
        headers = ["disguise", "noise", "aligned", "largest error", "s.e.", "undisguised", "bias by noise",
                   "unexplained", "seconds", "words"]  # fmt: skip
        parts.append(text_table([[*(row[key] for key in keys), ", ".join(row["words"])] for row in rows], headers))
    return "\n\n".join(parts)


def _method_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for made in dict.fromkeys(row["made"] for row in rows):
        own = [row for row in rows if row["made"] == made]
        wrong = sorted({row["named"] for row in own} - {made})
        right = f"{sum(row['named'] == made for row in own)} of {len(own)}"
        words = collections.Counter(word for row in own for word in row["words"])
        recipes = [row["recipe_residual"] for row in own if row["recipe_residual"] is not None]
        lines.append([
            made, right, ", ".join(wrong), float(np.median([row["residual"] for row in own])),
            float(np.median(recipes)) if recipes else None, ", ".join(f"{n} {word}" for word, n in words.items()),
        ])  # fmt: skip
    headers = ["made", "named right", "wrong names", "left of the difference", "left by the recipe", "words"]
    return text_table(lines, headers)


def main(argv: list[str]) -> None:
    """Measures the parts asked for and prints tables."""
    del argv
    use_all_cores()
    family, start = MergeModelsOfZoo(Path(ZOO_DIR.value) / "siblings"), time.monotonic()
    run: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "shares": lambda: shares(family, _DRAWS.value),
        "further": lambda: further(family),
        "methods": lambda: methods(family, max(1, _DRAWS.value // 3)),
        "noisy_methods": lambda: methods(family, max(1, _DRAWS.value // 6), "white"),
        "disguises": lambda: disguises(family),
    }
    file = Path(OUT_DIR.value) / "merges.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {}
    for name in _PARTS.value:
        if name in run:
            found[name] = list(run[name]())
            atomic_write(file, json.dumps(found).encode())
            print(tables({name: found[name]}), f"\n{time.monotonic() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    app.run(main)
