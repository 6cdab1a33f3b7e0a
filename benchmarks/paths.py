"""The loss between independently trained models of one recipe, as given and after every kind of alignment.

    python -m benchmarks.paths                          # three architectures and a larger model, three pairs each
    python -m benchmarks.paths --architectures=llama --path_pairs=1 --learned_steps=100

The models are those of `benchmarks.seeds` (four layers of 64 features, the larger ones six of 128), of which none has a
common origin: what is measured is how low a path an alignment alone can give. A learned alignment reads the text that
the models were trained on; losses are those of text that no model has seen. Finished pairs are kept in the output
folder. `--publish` writes table and figure into the docs. `--curves` measures further curves of pairs that are aligned
without learning (Bezier curves with a trained middle point, and calibrated losses) in place of alignments.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Int
from matplotlib.figure import Figure

from benchmarks.environment import OUT_DIR, PUBLISH, ZOO_DIR, machine
from benchmarks.results import replace_between
from benchmarks.seeds import RECIPES, Zoo, model, zoo
from tracing_jax import demo
from tracing_jax.alignment import Evidence, Learning, align, aligned, aligned_base
from tracing_jax.axes import PERMUTABLE
from tracing_jax.forward import (
    INVERSE_TEMPERATURES,
    BezierTraining,
    calibrated,
    combination_losses,
    path_losses,
    scaled_path_losses,
    trained_midpoint,
)
from tracing_jax.interpolation import on_bezier, path_groups
from tracing_jax.report.panels import INK
from tracing_jax.rewrites import Untying
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, ParamSource, in_memory, rewritten
from tracing_jax.statistics.mode import curve_of

FAMILIES: Mapping[str, tuple[str, str]] = {
    "gpt2": ("no_gate", "GPT-2 type"), "llama": ("tiny", "Llama type"), "experts": ("experts", "mixture of experts"),
    "larger": ("larger", "Llama type, larger"),
}  # fmt: skip
"""Name -> recipe of `benchmarks.seeds`, and title: a key of `statistics.mode.CONTROLS`."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to align two models: kinds of rewrites, what they are found from, and which ends a learned one maps."""

    name: str
    title: str
    kinds: tuple[str, ...] = ()
    evidence: Evidence = "weights"
    ends: Any = "ft"


METHODS = (
    Method("given", "as given"),
    Method("activations", "permutations, from activations", PERMUTABLE, "activations"),
    Method("permutations", "permutations, from weights", PERMUTABLE),
    Method("maps", "all maps, from weights", ("all",)),
    Method("states", "all maps, the features' from hidden states", ("all",), "activations"),
    Method("learned", "learned", ("all",), "learned"),
    Method("both", "learned, both ends", ("all",), "learned", "both"),
)

CONTROLS = {
    "none": ("as given",), "permutations": ("permutations, from weights", "permutations, from activations"),
    "maps": ("all maps, from weights",), "states": ("all maps, the features' from hidden states",),
    "learned": ("learned", "learned, both ends"),
}  # fmt: skip
"""Key of the entries of `statistics.mode.CONTROLS` -> the methods that it stands for."""

_CHEAP = ("given", "activations", "permutations", "maps")
"""The first methods, after which further curves are measured."""

CURVE_KINDS = {
    "straight": "straight path",
    "calibrated": "straight path, calibrated",
    "bezier": "Bézier curve, trained",
}
"""Name of a curve -> its title; but for the first, those of `statistics.mode.FURTHER_CONTROLS`."""

ALPHAS = np.linspace(0, 1, 11)

PAGE = Path(__file__).parents[1] / "docs" / "disguises.md"
FIGURE = PAGE.with_name("paths.png")

_BATCH = 16  # blocks of a step
_FAMILY_NAMES = flags.DEFINE_list("architectures", list(FAMILIES), "which architectures")
_METHOD_NAMES = flags.DEFINE_list("alignments", [method.name for method in METHODS], "which alignments")
_PAIRS = flags.DEFINE_integer("path_pairs", 3, "pairs of each; pair i is of the models 2 i and 2 i + 1")
_STEPS = flags.DEFINE_integer("learned_steps", 200, "steps of a learned alignment, and of a Bezier curve")
_CURVES = flags.DEFINE_bool("curves", False, "measure further curves in place of alignments")


def main(argv: list[str]) -> None:
    """Prints the table, and writes it with the figure."""
    del argv
    if unknown := sorted(set(_FAMILY_NAMES.value) - FAMILIES.keys()):
        raise app.UsageError(f"--architectures={','.join(unknown)}: expected some of {', '.join(FAMILIES)}")
    if unknown := sorted(set(_METHOD_NAMES.value) - {method.name for method in METHODS}):
        raise app.UsageError(f"--alignments={','.join(unknown)}: expected some of {_METHOD_NAMES.default}")
    folder = Path(OUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    if _CURVES.value:
        _measure_curves()
        return
    file = folder / f"paths-{_STEPS.value}.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for pair in range(_PAIRS.value):
        for family in _FAMILY_NAMES.value:
            for method in (method for method in METHODS if method.name in _METHOD_NAMES.value):
                name = f"{family}/{pair}/{method.title}"
                if name not in found:
                    found[name] = _measured(_zoo(family), pair, method)
                    file.write_text(json.dumps(found))
                    print(f"{name}: barrier {found[name]['barrier']:.3f}, {found[name]['seconds']:.0f} s", flush=True)
    text, drawn = table(found, _STEPS.value), figure(found)
    print(text)
    drawn.savefig(folder / "paths.png", dpi=130)
    for family, (_, title) in FAMILIES.items():
        print(title, {how: _control(found, family, titles) for how, titles in CONTROLS.items()})
    if PUBLISH.value:
        replace_between("paths", text, PAGE)
        drawn.savefig(FIGURE, dpi=130)


def _measure_curves() -> None:
    """Prints the barriers of further curves of pairs of the Llama type, and writes the table."""
    llama, found = _zoo("llama"), {}
    for method in (method for method in METHODS if method.name in _CHEAP):
        pairs = [_barriers_of_curves(llama, pair, method) for pair in range(_PAIRS.value)]
        found[method] = {kind: [barriers[kind] for barriers in pairs] for kind in CURVE_KINDS}
        print(method.title, found[method], flush=True)
    text = _table_of_curves(found)
    print(text)
    for kind in list(CURVE_KINDS)[1:]:
        by_title = {method.title: barriers[kind] for method, barriers in found.items()}
        controls = {how: _rounded([by_title[title] for title in titles]) for how, titles in CONTROLS.items()
                    if set(titles) <= by_title.keys()}  # fmt: skip
        print(f"mode.FURTHER_CONTROLS[{kind!r}]:", controls)
    if PUBLISH.value:
        replace_between("curves", text, PAGE)


def _barriers_of_curves(llama: Zoo, pair: int, method: Method) -> dict[str, float]:
    params, text, groups = _models(llama), _training_blocks(llama.recipe.models), path_groups(True, True)
    base, ft = (InMemory(llama.arch, model(params, 2 * pair + i)) for i in range(2))
    ends = _aligned(base, ft, method, text)
    where = (groups, Compute(make_mesh(), len(llama.held_out)))
    losses, scaled = scaled_path_losses(*ends, llama.held_out, ALPHAS, *where, INVERSE_TEMPERATURES)
    middle = trained_midpoint(*ends, text, groups, BezierTraining(_STEPS.value, _BATCH), where[1]).parameters
    curved = combination_losses([*ends, middle], on_bezier(ALPHAS), llama.held_out, *where)
    curves = (losses.mean((1, 2)), calibrated(scaled).loss, curved.mean((1, 2)))
    return {kind: curve_of(ALPHAS, np.asarray(loss, np.float64), None, groups).barrier
            for kind, loss in zip(CURVE_KINDS, curves, strict=True)}  # fmt: skip


def _table_of_curves(found: Mapping[Method, Mapping[str, Sequence[float]]]) -> str:
    lines = ["| barrier by curve, nats per token | " + " | ".join(method.title for method in found) + " |"]
    lines.append("|---" * (1 + len(found)) + "|")
    lines += [f"| {title} | " + " | ".join(_cell(kinds[kind]) for kinds in found.values()) + " |"
              for kind, title in CURVE_KINDS.items()]  # fmt: skip
    note = (
        f"`python -m benchmarks.paths --curves --learned_steps={_STEPS.value}`: pairs of the Llama type of the next "
        "table, on the same held-out text. The curve reads the text that the models were trained on, in "
        f"{_STEPS.value} steps of {_BATCH} blocks of 64 tokens."
    )
    return "\n".join([*lines, "", note]) + "\n"


@functools.cache
def _zoo(family: str) -> Zoo:
    return zoo(RECIPES[FAMILIES[family][0]], ZOO_DIR.value)


@functools.cache
def _models(family_zoo: Zoo) -> Any:
    return family_zoo.models(1.0)


@functools.cache
def _training_blocks(sizes: demo.DemoSizes) -> Int[np.ndarray, "N T"]:
    seen, _ = demo.split(demo.base_text(), sizes.base_pieces)
    tokens = np.asarray(demo.train_tokenizer(sizes, seen).encode("".join(seen)).ids, np.int32)
    return tokens[: len(tokens) // sizes.block_size * sizes.block_size].reshape(-1, sizes.block_size)


def _measured(family_zoo: Zoo, pair: int, method: Method) -> dict[str, Any]:
    """Returns the curve of a pair after an alignment, its barrier, and the seconds that the alignment took."""
    params = _models(family_zoo)
    base, ft = (InMemory(family_zoo.arch, model(params, 2 * pair + i)) for i in range(2))
    start = time.perf_counter()
    ends = _aligned(base, ft, method, _training_blocks(family_zoo.recipe.models))
    seconds = time.perf_counter() - start
    compute, groups = Compute(make_mesh(), len(family_zoo.held_out)), path_groups(True, True)
    losses = path_losses(*ends, family_zoo.held_out, ALPHAS, groups, compute).mean((1, 2), dtype=np.float64)
    curve = curve_of(ALPHAS, losses, None, groups)
    return {"loss": list(curve.loss), "barrier": curve.barrier, "seconds": seconds}


def _aligned(
    base: InMemory, ft: InMemory, method: Method, text: Int[np.ndarray, "N T"]
) -> tuple[ParamSource, ParamSource]:
    ends: list[ParamSource] = [base, ft]
    if method.kinds:
        tokens = {"weights": None, "activations": text[:: max(1, len(text) // 64)][:64], "learned": text}
        settings = Learning(_STEPS.value, _BATCH, ends=method.ends)
        found = align(
            base, ft, method.kinds, evidence=method.evidence, tokens=tokens[method.evidence], learning=settings
        )  # fmt: skip
        ends = [aligned_base(base, found), aligned(ft, found)]
    untied = any(not end.arch.tied for end in ends)
    ends = [rewritten(end, [Untying()]) if untied and end.arch.tied else end for end in ends]
    first, second = (InMemory(end.arch, jax.tree.map(jnp.asarray, in_memory(end).params)) for end in ends)
    return first, second


def table(found: Mapping[str, Mapping[str, Any]], steps: int) -> str:
    """Returns the barriers as Markdown, with how they were measured."""
    families = [family for family in FAMILIES if any(name.startswith(f"{family}/") for name in found)]
    lines = ["| barrier, nats per token | " + " | ".join(FAMILIES[family][1] for family in families) + " |"]
    lines.append("|---" * (len(families) + 1) + "|")
    for method in METHODS:
        cells = [_cell([entry["barrier"] for entry in _of(found, family, method)]) for family in families]
        lines.append(f"| {method.title} | " + " | ".join(cells) + " |")
    larger = " (the larger ones: 6 layers of 128 features, 0.3 million tokens)" if "larger" in families else ""
    minutes = sum(entry["seconds"] for entry in found.values()) / 60
    note = (
        f"`python -m benchmarks.paths --learned_steps={steps}`: mean (least to greatest) over pairs of independently "
        f"trained models with 4 layers of 64 features, trained on 0.2 million tokens each{larger}; held-out text of "
        "4,096 tokens; every weight is on the path. Learned alignments read the text that the models were trained on, "
        f"in {steps} steps of {_BATCH} blocks of 64 tokens. All alignments took {minutes:.0f} minutes on a busy "
        f"machine with two cores ({machine()['date']})."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _control(found: Mapping[str, Mapping[str, Any]], family: str, titles: Sequence[str]) -> tuple[int, float, float]:
    """Returns number of pairs, least and greatest barrier of a family, rounded outwards."""
    entries = [_of(found, family, method) for method in METHODS if method.title in titles]
    return _rounded([[entry["barrier"] for entry in of_method] for of_method in entries])


def _rounded(by_method: Sequence[Sequence[float]]) -> tuple[int, float, float]:
    barriers = [barrier for of_method in by_method for barrier in of_method] or [float("nan")]
    least, greatest = np.floor(100 * min(barriers)) / 100, np.ceil(100 * max(barriers)) / 100
    return max(map(len, by_method)), float(least), float(greatest)


def _of(found: Mapping[str, Mapping[str, Any]], family: str, method: Method) -> list[Mapping[str, Any]]:
    return [
        found[name] for name in sorted(found) if name.startswith(f"{family}/") and name.endswith(f"/{method.title}")
    ]


def _cell(barriers: Sequence[float]) -> str:
    if not barriers:
        return "–"
    ranged = f"{np.mean(barriers):.2f} ({min(barriers):.2f} to {max(barriers):.2f}"
    return f"{ranged}; {len(barriers)} pair{'s' if len(barriers) > 1 else ''})"


def figure(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The loss along the path of the first pair for each method, a panel for each architecture."""
    families = [family for family in FAMILIES if any(name.startswith(f"{family}/") for name in found)]
    drawn = Figure(figsize=(3.4 * len(families) + 0.4, 3.4), facecolor="white")
    drawn.set_layout_engine("constrained")
    panels = drawn.subplots(1, len(families), sharey=True, squeeze=False)[0]
    colours = ("#9a9a9a", "#c9a227", "#e07b39", "#b5446e", "#7d5ba6", "#2a6f97", "#1b3a57")
    for family, axes in zip(families, panels):
        for method, colour in zip(METHODS, colours, strict=True):
            if entries := _of(found, family, method):
                axes.plot(ALPHAS, entries[0]["loss"], color=colour, linewidth=1.8, label=method.title)
        axes.set_title(FAMILIES[family][1], loc="left", fontsize=10, color=INK)
        axes.set_xlabel("alpha", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss, nats per token", fontsize=9)
    labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1]))
    drawn.legend(*labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return drawn


if __name__ == "__main__":
    app.run(main)
