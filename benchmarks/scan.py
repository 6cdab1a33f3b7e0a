"""Signatures and `scan`: who is called a relative of whom, among independent models and among descendants of them.

    python -m benchmarks.scan                  # trains zoos that are missing; then an hour on two cores
    python -m benchmarks.scan --parts=large    # a thousand signatures against a model of Llama-2-7B's shape

The library holds the signatures of all models of four small zoos (gated, gated and narrower, without a gate, with
experts) and of random models of other sizes and vocabularies. Every model is scanned against those of other seeds, and
then descendants of the gated ones. What a row came to is kept in a file as it is found.
"""

import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from benchmarks import mixtures
from benchmarks.descendants import LIGHT_STEPS, Treatment, disguise, member, texts, trained
from benchmarks.environment import OUT_DIR, ZOO_DIR
from benchmarks.lineages import Lineages, Pairs
from benchmarks.seeds import RECIPES, Zoo, zoo
from tracing_jax.arch import Arch
from tracing_jax.library import (
    Scan,
    Signature,
    Suspect,
    Vocabulary,
    drawing,
    make_signature,
    read_suspect,
    scan,
    to_bytes,
)
from tracing_jax.library.heads import HEAD_FORMS, SampledHeads
from tracing_jax.library.readings import GATED, moment_names, moment_numbers
from tracing_jax.library.signature import SampledLayer
from tracing_jax.models import init_params
from tracing_jax.options import RunOptions
from tracing_jax.report import text_table
from tracing_jax.sources import InMemory, ParamSource
from tracing_jax.tree import Tree

_PARTS = flags.DEFINE_list("parts", ["unrelated", "descendants", "experts", "large"], "what is measured")
_BASES = flags.DEFINE_integer("bases", 3, "base models of which there are descendants")
_LARGE_LAYERS = flags.DEFINE_integer("large_layers", 32, "layers of the model of 7B width")
_SIGNATURES = flags.DEFINE_integer("signatures", 1000, "signatures that it is compared with")

SETS: Mapping[str, tuple[int, int]] = {"tiny": (24, 0), "narrow": (8, 1), "no_gate": (8, 2), "experts": (10, 3)}
"""Zoo -> its models, and the seed of their initialisations and windows of text.

Each zoo has a seed of its own. With one seed, model i of two zoos begins with the same embeddings and attention, and
the first expert of one with the very MLP of the other: such models are related, and `scan` says so.
"""

_RANDOM = ((3, 96, 200, 300), (5, 64, 96, 512), (2, 128, 320, 700), (8, 48, 64, 400))
"""Layers, width, MLP units and tokens of the random models, of each shape one with a gate and one without."""

_HEADS = 32  # of a layer of Llama-2-7B

_DESCENDANTS = (
    f"fine-tuned, {LIGHT_STEPS / 768:.2g} of its training", "fine-tuned, 1 of its training", "disguised: all at once",
    "disguised: permute", "disguised: rotate", "pruned in depth", "pruned in width", "rounded to 4 bits",
    "matrices of half the rank", "two layers swapped", "merged with another", "embeddings replaced, trained on",
    "embeddings replaced, trained on, permuted", "fine-tuned hard, 1 of its training",
    "fine-tuned hard, 1 of its training, permuted", "new vocabulary, a layer less, trained on, permuted",
    "upcycled to 4 experts, trained on", "upcycled to 4 experts, trained on, permuted",
)  # fmt: skip


@dataclass(frozen=True)
class _FewSeeds(Lineages):
    """The lineages on zoos of fewer seeds."""

    @cached_property
    def zoo(self) -> Zoo:
        return small_zoo("tiny")

    @cached_property
    def experts(self) -> Zoo:
        return small_zoo("experts")


def small_zoo(name: str) -> Zoo:
    """Returns a zoo with as many models as `SETS` says, from a seed of its own."""
    recipe, (count, seed) = RECIPES[name], SETS[name]
    return zoo(replace(recipe, models=replace(recipe.models, seed=seed), num_seeds=count), ZOO_DIR.value)


def vocabulary(size: int, new_ids: np.ndarray | None = None) -> Vocabulary:
    """Returns a vocabulary in which token i of all models is the same string, wherever its row went."""
    return Vocabulary({f"token {i}": i if new_ids is None else int(new_ids[i]) for i in range(size)}, known=True)


def models() -> Iterator[tuple[str, ParamSource]]:
    """Yields the independent models by name."""
    for name, (count, _) in SETS.items():
        found = small_zoo(name)
        params = found.models(1.0)
        for index in range(count):
            yield f"{name} {index}", member(found.arch, params, index)
    for index, (layers, width, units, tokens) in enumerate(_RANDOM):
        for seed, like in enumerate(("tiny", "no_gate"), 2 * index + len(SETS)):
            arch = _resized(small_zoo(like).arch, layers, width, units, tokens)
            yield f"random {like} {index}", InMemory(arch, init_params(arch, jax.random.key(seed)))


def _resized(arch: Arch, layers: int, width: int, units: int, tokens: int) -> Arch:
    ropes = arch.layer_ropes[:1] * layers
    return replace(arch, num_layers=layers, embed_dim=width, mlp_dim=units, vocab_size=tokens,
                   layer_ropes=ropes, layer_windows=arch.layer_windows[:1] * layers)  # fmt: skip


def signature(name: str, model: ParamSource) -> Signature:
    """Returns the signature of a model that has no files."""
    number = int.from_bytes(name.encode(), "big")
    return make_signature(model, vocabulary(model.arch.vocab_size), model_id=name, files={"model": f"{number:x}"})


def scanned(model: ParamSource, library: Mapping[str, Signature], new_ids: np.ndarray | None = None) -> Scan:
    """Returns the scan of a model."""
    strings = sorted({token for found in library.values() for token in found.tokens})
    suspect = read_suspect(model, vocabulary(len(new_ids) if new_ids is not None else model.arch.vocab_size, new_ids),
                           strings)  # fmt: skip
    return scan(suspect, library, RunOptions.level)


def line_of(found: Scan) -> dict[str, Any]:
    """Returns what a file keeps of a scan."""
    words = Counter(candidate.verdict for candidate in found.candidates)
    testable = [candidate for candidate in found.candidates if candidate.adjusted_log10_p is not None]
    raw = [candidate.match.log10_p for candidate in testable if candidate.match is not None]
    first = found.candidates[0]
    return {
        "verdicts": dict(words), "first": first.name, "share": first.share, "first_log10_p": first.adjusted_log10_p,
        "closest": list(found.closest), "margin": found.margin,
        "related": [candidate.name for candidate in found.related],
        "tests": {
            name: [evidence.agreeing, evidence.log10_p]
            for name, evidence in (first.match.tests.items() if first.match else ())
        },
        "raw_log10_ps": raw,
    }  # fmt: skip


def measured(file: Path, rows: Iterable[tuple[str, Callable[[], dict[str, Any]]]]) -> None:
    """Appends the rows that the file lacks."""
    done = {line["row"] for line in lines(file)}
    with file.open("a", encoding="utf-8") as out:
        for name, measure in rows:
            if name not in done:
                print(json.dumps({"row": name} | measure()), file=out, flush=True)


def lines(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def unrelated(library: Mapping[str, Signature]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields the scan of every independent model against the signatures of all others."""
    for name, model in models():
        others = {other: found for other, found in library.items() if other != name}
        yield f"unrelated: {name}", partial(_line, model, others)


def _line(model: ParamSource, library: Mapping[str, Signature], new_ids: np.ndarray | None = None) -> dict[str, Any]:
    return line_of(scanned(model, library, new_ids))


def descendants(library: Mapping[str, Signature]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields the scan of every descendant."""
    rows = _FewSeeds(ZOO_DIR.value, _BASES.value).rows()
    for name in _DESCENDANTS:
        made = cache(rows[name])

        def one(i: int, made: Callable[[], Pairs] = made) -> dict[str, Any]:
            descendant = made()[i][1]
            return _line(descendant.model, library, descendant.new_ids)

        for i in range(_BASES.value):
            yield f"{name}: tiny {i}", partial(one, i)


def with_experts(library: Mapping[str, Signature]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields the scan of models with experts, or made of one, that have another model's embeddings: moments alone tell.

    Each was trained for an eighth of a training after the embeddings were replaced, and permuted.
    """
    found = _FewSeeds(ZOO_DIR.value, _BASES.value)
    steps, (own, other) = found.steps // 8, texts(found.zoo)
    dense, arch = found.zoo, mixtures.upcycled_arch(found.zoo.arch, found.experts.arch)

    def swapped(models: Tree, others: Tree) -> Tree:
        return models | {part: others[part] for part in ("embed", "head")}

    @cache
    def upcycled() -> Tree:
        models = mixtures.upcycled(swapped(found.finetuned[LIGHT_STEPS], found.unrelated), arch, seed=0)
        return dict(trained(replace(dense, arch=arch), models, own, steps, 2e-3))[steps]

    @cache
    def mixture() -> Tree:
        both = found.experts.models(1.0)
        bases, others = (jax.tree.map(partial(_part, i), both) for i in range(2))
        tuned = dict(trained(found.experts, bases, other, steps, 2e-3))[steps]
        return dict(trained(found.experts, swapped(tuned, others), own, steps, 2e-3))[steps]

    def one(arch: Arch, made: Callable[[], Tree], treat: Treatment, i: int) -> dict[str, Any]:
        descendant = treat(member(arch, made(), i), 100 + i)
        return _line(descendant.model, library, descendant.new_ids)

    experts = partial(one, found.experts.arch, mixture)
    rows: dict[tuple[str, str], Callable[[int], dict[str, Any]]] = {
        ("upcycled, embeddings replaced", "tiny"): partial(one, arch, upcycled, disguise("permute")),
        ("experts, embeddings replaced", "experts"): partial(experts, mixtures.experts_permuted),
        ("one expert as the MLP, embeddings replaced", "experts"): partial(experts, mixtures.expert_as_mlp),
    }
    for (name, base), measure in rows.items():
        for i in range(_BASES.value):
            yield f"{name}: {base} {i}", partial(measure, i)


def _part(index: int, leaf: np.ndarray) -> np.ndarray:
    """Returns the first, or second, of as many stacked models as there are bases."""
    return leaf[index * _BASES.value : (index + 1) * _BASES.value]


def summary(strange: list[dict[str, Any]], related: list[dict[str, Any]]) -> str:
    """Returns both tables."""
    counts = Counter[str]()
    raw: list[float] = []
    for line in strange:
        counts.update(line["verdicts"])
        raw += line["raw_log10_ps"]
    values = np.array(raw)
    text = [
        f"{len(strange)} independent models scanned: {dict(counts)}; of {len(values)} pairs that could be tested, "
        f"{(values < -2).sum()} below 1e-2 and {(values < -3).sum()} below 1e-3; smallest log10 p {values.min():.1f}"
    ]
    by_row: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for line in related:
        row, _, base = line["row"].rpartition(": ")
        by_row.setdefault(row, []).append((base, line))
    table = []
    for row, found in by_row.items():
        at_first = sum(line["first"] == base and base in line["related"] for base, line in found)
        wrong = sum(len(set(line["related"]) - {base, _other_parent(row, base)}) for base, line in found)
        shares = [line["share"] for _, line in found]
        table.append([row, f"{at_first} of {len(found)}", wrong, f"{np.mean(shares):.2f}"])
    text.append(
        text_table(table, ["suspect", "its base at rank 1, related", "others called related", "units agreeing"])
    )
    return "\n\n".join(text)


def _other_parent(row: str, base: str) -> str | None:
    """Returns the second parent of a merged model: in `Lineages`, base i is merged with the model after all bases."""
    kind, index = base.split()
    return f"{kind} {int(index) + _BASES.value}" if row == "merged with another" else None


def large() -> dict[str, Any]:
    """Returns the cost of a thousand signatures against a model of Llama-2-7B's shape, after it was read.

    What is read of the model, and all signatures but one, are random numbers; that one is of units of the model.
    """
    rng, layers, units = np.random.default_rng(0), _LARGE_LAYERS.value, 11008
    tokens = tuple(f"token {i}" for i in range(drawing.TOKENS))
    arch = replace(_resized(RECIPES["tiny"].arch, layers, 4096, units, 32000), num_kv_heads=_HEADS, q_group=1)
    read = [{kind: _numbers(rng, (units, len(tokens))) for kind in GATED} for _ in range(layers)]
    sampled = drawing.sampled_layers(layers)
    square = np.eye(moment_numbers(True), dtype=np.float32)
    moments = {
        i: {kind: (rng.normal(size=(units, len(square))).astype(np.float32), square) for kind in moment_names(True)}
        for i in sampled
    }
    columns, names = {string: i for i, string in enumerate(tokens)}, [f"layer {i}" for i in range(layers)]
    T = drawing.HEAD_TOKENS
    forms = {i: {form: _numbers(rng, (_HEADS, (4 * T) ** 2)) for form in HEAD_FORMS} for i in range(layers)}
    head_columns = {string: i for i, string in enumerate(tokens[: 4 * T])}
    suspect = Suspect(arch, GATED, columns, read, moments, names, None, forms, head_columns, names)
    drawn = rng.permutation(units).astype(np.int32)
    of_moments = {i: {k: (f[drawn[: drawing.MOMENT_UNITS]] * 16) for k, (f, _) in moments[i].items()} for i in sampled}
    own = Signature(
        {"model": "own", "digest": "0" * 64, "readings": list(GATED), "shape": {"num_kv_heads": _HEADS, "q_group": 1}},
        tokens,
        tuple(
            SampledLayer(
                i,
                drawn[: drawing.UNITS],
                {kind: read[i][kind][drawn[: drawing.UNITS]] for kind in GATED},
                {kind: np.clip(np.round(f), -127, 127).astype(np.int8) for kind, f in of_moments[i].items()},
                dict.fromkeys(moment_names(True), square.astype(np.float16)),
            )
            for i in sampled
        ),
        tuple(_heads_of(i, forms[i], T) for i in sampled),
    )
    library = {f"{i}": _random_signature(own, rng) for i in range(_SIGNATURES.value - 1)} | {"own": own}
    start, used = time.monotonic(), time.process_time()
    found = scan(suspect, library, RunOptions.level)
    return {
        "layers": layers, "signatures": len(library), "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time() - used, "first": found.candidates[0].name, "related": len(found.related),
        "compared_in_full": found.compared, "readings_MiB": suspect.num_bytes / 2**20,
        "library_MiB": len(library) * len(to_bytes(own)) / 2**20,
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def _heads_of(layer: int, forms: Mapping[str, np.ndarray], tokens: int) -> SampledHeads:
    """Returns the first heads of a layer, with their forms on the first of the tokens."""
    heads = np.arange(drawing.HEADS, dtype=np.int32)
    size = 4 * tokens
    own = {form: found[heads].reshape(-1, size, size)[:, :tokens, :tokens] for form, found in forms.items()}
    return SampledHeads(layer, heads, {form: found.reshape(len(heads), -1) for form, found in own.items()})


def _numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns random whole numbers as readings have them."""
    return np.clip(np.round(rng.normal(0, 32, shape)), -127, 127).astype(np.int8)


def _random_signature(like: Signature, rng: np.random.Generator) -> Signature:
    """Returns a signature of the same shape whose numbers are random."""

    def drawn(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: _numbers(rng, found.shape) for name, found in arrays.items()}

    layers = tuple(replace(f, readings=drawn(f.readings), moments=drawn(f.moments)) for f in like.layers)
    return replace(like, layers=layers, heads=tuple(replace(h, forms=drawn(h.forms)) for h in like.heads))


def main(argv: list[str]) -> None:
    """Measures what is missing, and prints it."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    folder = Path(OUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"scan-{name}.jsonl" for name in ("unrelated", "descendants", "experts")}
    if files.keys() & set(_PARTS.value):
        library = {name: signature(name, model) for name, model in tqdm(models(), desc="signatures", disable=None)}
        if "unrelated" in _PARTS.value:
            measured(files["unrelated"], unrelated(library))
        if "descendants" in _PARTS.value:
            measured(files["descendants"], descendants(library))
        if "experts" in _PARTS.value:
            measured(files["experts"], with_experts(library))
        print(summary(lines(files["unrelated"]), lines(files["descendants"]) + lines(files["experts"])))
    if "large" in _PARTS.value:
        print(large())


if __name__ == "__main__":
    app.run(main)
