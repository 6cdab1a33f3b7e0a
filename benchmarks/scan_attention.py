"""What `scan` finds by attention heads: independent models, models whose MLPs are all new, and merges of equal parts.

And what `match_heads` finds between models of unequal depth.

    python -m benchmarks.scan_attention      # trains its zoo; then ten minutes on two cores

The models have 16 query heads in each of 4 layers, two for each kv head, where those of `benchmarks.scan` have four.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np
from absl import app, flags

from benchmarks.comparing import Text, results
from benchmarks.descendants import Descendant, disguise, member, merged_with, pruned_in_depth, texts, trained
from benchmarks.environment import ZOO_DIR
from benchmarks.scan import scanned, signature, vocabulary
from benchmarks.seeds import RECIPES, Zoo, ZooRecipe, zoo
from tracing_jax import demo
from tracing_jax.library import Scan, Signature, compare, drawing, read_suspect
from tracing_jax.library.comparison import HEADS, MOMENTS, RESPONSES
from tracing_jax.library.heads import HEAD_FORMS, forms_on
from tracing_jax.library.signature import as_int8
from tracing_jax.report import text_table
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree

_BASES = flags.DEFINE_integer("attention_bases", 4, "base models of which there are descendants")

_ALIKE = 0.6  # correlation of two forms, of which the second is not taken

RECIPE = ZooRecipe(replace(RECIPES["tiny"].models, embed_dim=128, num_heads=16, num_kv_heads=8, seed=4), 10)


def new_mlps(found: Zoo, models: Tree) -> Tree:
    """Returns stacked models whose MLPs are initialised anew."""
    count = len(jax.tree.leaves(models)[0])
    keys = jax.random.split(jax.random.key(77), count)
    fresh = jax.device_get(jax.jit(jax.vmap(lambda key: demo.init(found.arch, key)))(keys))["layers"]
    layers = {i: layer | {"mlp": fresh[i]["mlp"]} for i, layer in models["layers"].items()}
    return models | {"layers": layers}


def suspects(found: Zoo, count: int) -> Mapping[str, Tree]:
    """Returns what was done to the first bases -> the models, stacked."""
    models = found.models(1.0)
    bases, others = (jax.tree.map(lambda leaf, i=i: leaf[i : i + count], models) for i in (0, count))
    own, other = texts(found)
    steps, rate = found.recipe.models.base_steps, found.recipe.models.base_learning_rate
    layers = {i: layer | {"mlp": others["layers"][i]["mlp"]} for i, layer in bases["layers"].items()}
    retrained = dict(trained(found, new_mlps(found, bases), other, steps // 2, rate / 2, keep=(steps // 8,)))
    halves = [dict(trained(found, bases, text, steps // 8, rate / 3))[steps // 8] for text in (own, other)]
    return {
        "MLPs of another model": bases | {"layers": layers},
        "MLPs initialised anew, an eighth of a training": retrained[steps // 8],
        "MLPs initialised anew, half a training": retrained[steps // 2],
        "child on its own text": halves[0],
        "child on other text": halves[1],
    }


def tests_of(found: Scan, name: str) -> list[str]:
    """Returns for each test of a signature what agrees, and the p-value."""
    match = next(candidate.match for candidate in found.candidates if candidate.name == name)
    tests = match.tests if match else {}
    return [
        f"{', '.join(map(str, tests[test].agreeing))} ({tests[test].log10_p:.1f})" if test in tests else "-"
        for test in (RESPONSES, MOMENTS, HEADS)
    ]


def independent(found: Zoo, library: Mapping[str, Signature]) -> str:
    """Returns how far the heads of independent models agree, at the end and half way of their training."""
    log_ps, shares, verdicts = [], [], []
    for snapshot in (0.5, 1.0):
        params = found.models(snapshot)
        for i, own in enumerate(library):
            others = {name: found for name, found in library.items() if name != own}
            for candidate in scanned(member(found.arch, params, i), others).candidates:
                verdicts.append(candidate.verdict)
                if candidate.match is not None:
                    log_ps.append(candidate.match.tests[HEADS].log10_p)
                    shares.append(sum(candidate.match.tests[HEADS].agreeing))
    below = {p: int((np.array(log_ps) < np.log10(p)).sum()) for p in (0.5, 0.1, 0.01, 0.001)}
    return (
        f"{len(log_ps)} pairs of independent models: {Counter(verdicts)}; of 48 heads {np.mean(shares):.1f} agree on "
        f"average, at most {max(shares)}; smallest log10 p {min(log_ps):.1f}; p-values below {below}"
    )


def main(argv: list[str]) -> None:
    """Prints both tables."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    found, count = zoo(RECIPE, ZOO_DIR.value), _BASES.value
    models = found.models(1.0)
    bases = {f"base {i}": member(found.arch, models, i) for i in range(found.recipe.num_seeds)}
    library = {name: signature(name, model) for name, model in bases.items()}
    print(independent(found, library), flush=True)
    made, table = suspects(found, count), []
    permuted = disguise("permute")
    for row, params in made.items():
        for i in range(count):
            descendant = permuted(member(found.arch, params, i), 50 + i)
            result = scanned(descendant.model, library, descendant.new_ids)
            named = ", ".join(candidate.name for candidate in result.related)
            table.append([row, i, named, *tests_of(result, f"base {i}")])
    print(text_table(table, ["suspect, permuted", "base", "related", RESPONSES, MOMENTS, HEADS]), flush=True)
    print(text_table(less_depth(found, made), ["a layer less", "pairs", "of 48 heads agree", "log10 p"]), flush=True)
    merges(found, library, made, count)
    print(made_up(found, library["base 0"], count))


def less_depth(found: Zoo, made: Mapping[str, Tree]) -> list[list[object]]:
    """Returns rows of what `match_heads` finds of models with a layer less: independent ones, and permuted suspects."""
    models, text = found.models(1.0), Text.of(found)
    bases = [member(found.arch, models, i) for i in range(found.recipe.num_seeds)]
    count = len(jax.tree.leaves(next(iter(made.values())))[0])
    every = itertools.permutations(range(len(bases)), 2)
    pairs = {"independent": [(bases[i], Descendant(pruned_in_depth(bases[j], i).model)) for i, j in every]}
    for row, params in made.items():
        cut = [pruned_in_depth(member(found.arch, params, i), i).model for i in range(count)]
        pairs[row] = [(bases[i], disguise("permute")(model, i)) for i, model in enumerate(cut)]
    rows: list[list[object]] = []
    for row, both in pairs.items():
        tests = [results(base, ft, text, i, ["match_heads"])["match_heads"] for i, (base, ft) in enumerate(both)]
        agreeing = [sum(result.tests[0].values["agreeing"]) for result in tests]
        log_ps = [result.deciding_log10_p for result in tests if result.deciding_log10_p is not None]
        counts = f"{min(agreeing)} to {max(agreeing)}, mean {np.mean(agreeing):.1f}"
        rows.append([row, len(both), counts, f"{min(log_ps):.1f} to {max(log_ps):.1f}"])
    return rows


def merges(found: Zoo, library: Mapping[str, Signature], made: Mapping[str, Tree], count: int) -> None:
    """Prints what is said of merges in equal parts: of two unrelated models, and of two children of one base."""
    models, table = found.models(1.0), []
    others = jax.tree.map(lambda leaf: leaf[count : 2 * count], models)
    for i in range(count):
        unrelated = merged_with(others)(member(found.arch, models, i), i).model
        table.append(["two unrelated", f"base {i}, base {count + i}", *_said(scanned(unrelated, library))])
        children = {f"child {k}": member(found.arch, made[name], i) for k, name in
                    enumerate(("child on its own text", "child on other text"))}  # fmt: skip
        one, other = (child.params for child in children.values())
        merged = InMemory(found.arch, jax.tree.map(lambda a, b: (a + b) / 2, one, other))
        family = {**library} | {name: signature(f"{name} {i}", child) for name, child in children.items()}
        table.append(["two siblings", "child 0, child 1", *_said(scanned(merged, family))])
    print(text_table(table, ["merge of", "parents", "related", "undecided", "said"]), flush=True)


def made_up(found: Zoo, like: Signature, count: int) -> str:
    """Returns what a signature gains whose heads are those of public models that most often have a double in others.

    Of each layer it has the 16 heads of public models whose two forms most often have the same closest head in a layer
    of another public model, and no two alike; the targets are models that the adversary has not seen.
    """
    params, words = found.models(1.0), vocabulary(found.arch.vocab_size)
    models = [read_suspect(member(found.arch, params, i), words, like.tokens) for i in range(found.recipe.num_seeds)]
    targets, public = models[:count], models[count:]
    tokens = [models[0].head_columns[string] for string in like.tokens[: drawing.HEAD_TOKENS]]
    layers = [[{f: forms_on(layer[f], tokens) for f in HEAD_FORMS} for layer in m.heads.values()] for m in public]
    votes, forms = [], {f: np.concatenate([layer[f] for model in layers for layer in model]) for f in HEAD_FORMS}
    for i, model in enumerate(layers):
        for own in model:
            closest = [{f: (own[f] @ other[f].T).argmax(axis=1) for f in HEAD_FORMS}
                       for k, others in enumerate(layers) if k != i for other in others]  # fmt: skip
            votes.append(np.mean([c["attention"] == c["output"] for c in closest], axis=0))
    order = np.argsort(-np.concatenate(votes), kind="stable")
    taken: list[int] = []
    for at in order.tolist():
        alike = [np.abs(forms[f][taken] @ forms[f][at]).max(initial=0) for f in HEAD_FORMS]
        if max(alike) < _ALIKE and len(taken) < drawing.HEADS:
            taken.append(at)
    chosen = {f: as_int8(forms[f][taken]) for f in HEAD_FORMS}
    heads = tuple(replace(sampled, heads=np.arange(len(taken), dtype=np.int32), forms=chosen) for sampled in like.heads)
    gained = [compare(replace(like, heads=heads), target).tests[HEADS] for target in targets]
    return (
        f"made-up heads, {len(taken)} in each layer, which agree in {np.concatenate(votes)[taken].mean():.2f} of the "
        f"layers of public models: {[found.agreeing for found in gained]} agree, log10 p "
        f"{[round(found.log10_p, 1) for found in gained]}"
    )


def _said(found: Scan) -> list[str]:
    words = [", ".join(c.name for c in found.candidates if c.verdict == word) for word in ("related", "undecided")]
    return [*words, found.sentence()[:160]]


if __name__ == "__main__":
    app.run(main)
