"""Does `match_distilled` tell related from independent models where no gate can be matched, and at what cost?

    python -m benchmarks.distilled --out_dir=runs/distilled                    # trains, compares and prints
    python -m benchmarks.distilled --out_dir=runs/distilled --seeds=4          # students of independent models
    python -m benchmarks.distilled --out_dir=runs/distilled --study            # students by steps, width and decay

Tiny models learn the demo's text: a GPT-2, its fine-tune and another GPT-2; a dense gated model, a mixture of experts
upcycled from it (experts copied, a fresh router, all trained further), and another dense model. They are kept in
the output folder. The study is on one layer of the demo family: on how many of its 256 units do base's student and
another agree?
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Int
from tqdm import trange

from tracing_jax import demo
from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.checkpoint import load, open_checkpoint
from tracing_jax.data import load_tokenizer, paired_one_to_one, read_documents, token_blocks
from tracing_jax.forward import activations
from tracing_jax.matching import live_units, match_units
from tracing_jax.report import text_table
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.statistics import Pair, Vocabularies
from tracing_jax.statistics.comparison import against_each_other
from tracing_jax.statistics.match_distilled import MatchDistilled
from tracing_jax.statistics.students import Student, StudentTraining, fit_student, student_correlations
from tracing_jax.tree import Tree, flatten, unflatten

RECIPE = demo.DemoSizes(vocab_size=512, embed_dim=64, mlp_dim=192, block_size=64, base_steps=1200)
EXPERTS = 4

STUDY: list[Mapping[str, float]] = [
    {},
    *({"steps": steps} for steps in (250, 500, 1000, 4000)),
    *({"units": units} for units in (64, 128, 384)),
    *({"decay": decay} for decay in (0.0, 0.01, 0.1)),
    *({"rate": rate} for rate in (0.03, 0.1, 1.0)),
]
STUDENTS = {
    "base": ("base", 1), "base again": ("base", 1), "disguised": ("disguised", 1), "independent": ("independent", 1),
    "independent, other layer": ("independent", 3),
}  # fmt: skip
"""Student -> whose FFN it learns, of which layer of the demo family."""


class Text(NamedTuple):
    """Tokens to learn from, those of the fine-tuning text, and blocks that no model has seen."""

    seen: Int[np.ndarray, " N"]
    finetune: Int[np.ndarray, " M"]
    held_out: Int[np.ndarray, "K T"]


def text() -> Text:
    """Returns the demo's texts as tokens of a tokenizer learnt from the first."""
    seen, held_out = demo.split(demo.base_text(), RECIPE.base_pieces)
    others, _ = demo.split(demo.finetune_text(), RECIPE.finetune_pieces)
    tokenizer = demo.train_tokenizer(RECIPE, seen)
    tokens = [np.asarray(tokenizer.encode("".join(pieces)).ids, np.int32) for pieces in (seen, others, held_out)]
    T = RECIPE.block_size
    return Text(tokens[0], tokens[1], tokens[2][: len(tokens[2]) // T * T].reshape(-1, T))


def archs() -> dict[str, Arch]:
    """Returns the facts of the dense model, of the mixture and of the GPT-2, equal in depth and width."""
    from transformers import GPT2Config, MixtralConfig

    dense = demo.config(RECIPE)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")  # fmt: skip
    same = {name: getattr(dense, name) for name in names} | {"bos_token_id": None, "eos_token_id": None}
    mixture = MixtralConfig(**same, num_local_experts=EXPERTS, num_experts_per_tok=2, tie_word_embeddings=False)
    gpt2 = GPT2Config(
        vocab_size=RECIPE.vocab_size, n_embd=RECIPE.embed_dim, n_layer=RECIPE.num_layers, n_head=RECIPE.num_heads,
        n_inner=RECIPE.mlp_dim, n_positions=RECIPE.block_size, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return {name: arch_from_config(c) for name, c in (("dense", dense), ("mixture", mixture), ("gpt2", gpt2))}


def trained(arch: Arch, params: Tree, tokens: Int[np.ndarray, " N"], steps: int, peak: float, seed: int) -> Tree:
    """Returns the params after so many steps on random windows of the text."""
    state, T = demo.optimizer(RECIPE).init(params), RECIPE.block_size
    starts = np.random.default_rng(seed).integers(0, len(tokens) - T, (steps, RECIPE.batch_size, 1))
    rates = demo.learning_rates(peak, steps)
    for i in trange(steps, desc=f"training a {arch.family}", disable=None):
        params, state, _ = demo.train_step(arch, RECIPE, params, state, rates[i], tokens[starts[i] + np.arange(T)])
    return jax.device_get(params)


def upcycled(dense: Tree, seed: int) -> Tree:
    """Returns the params of a mixture whose experts are copies of the dense model's MLPs, with a fresh router."""
    rng = np.random.default_rng(seed)

    def layer(own: Tree) -> Tree:
        experts = jax.tree.map(lambda kernel: np.repeat(np.asarray(kernel)[None], EXPERTS, axis=0), own["mlp"])
        router = rng.normal(0, RECIPE.embed_dim**-0.5, (RECIPE.embed_dim, EXPERTS)).astype(np.float32)
        return own | {"mlp": experts | {"router": {"kernel": router}}}

    return dense | {"layers": {name: layer(own) for name, own in dense["layers"].items()}}


class ModelFolder:
    """Models of a folder, trained when they are first asked for."""

    def __init__(self, folder: Path, found: Text) -> None:
        self.folder, self.text, self.archs = folder, found, archs()
        folder.mkdir(parents=True, exist_ok=True)

    def seed(self, kind: str, seed: int) -> InMemory:
        """Returns a model of a kind trained from a seed, in an order of its own."""
        long = (RECIPE.base_steps, RECIPE.base_learning_rate)
        return self._kept(f"{kind}-{seed}", kind, self.text.seen, *long, seed)

    def descendant(self, kind: str) -> InMemory:
        """Returns the model of seed 0 after training on other text; a dense one becomes a mixture first."""
        start = self.seed(kind, 0).params
        short = (240, RECIPE.finetune_learning_rate)
        if kind == "dense":
            return self._kept("upcycled", "mixture", self.text.finetune, *short, 9, upcycled(start, 0))
        return self._kept(f"{kind}-finetune", kind, self.text.finetune, *short, 9, start)

    def _kept(
        self, name: str, kind: str, tokens: np.ndarray, steps: int, peak: float, seed: int, start: Tree | None = None
    ) -> InMemory:
        file, arch = self.folder / f"{name}.npz", self.archs[kind]
        if not file.exists():
            params = demo.init(arch, jax.random.key(seed)) if start is None else start
            np.savez(file, **flatten(trained(arch, params, tokens, steps, peak, seed)))
        with np.load(file) as leaves:
            params = unflatten({leaf: jnp.asarray(leaves[leaf]) for leaf in leaves.files})
        print(f"{name}: {demo.mean_loss(arch, params, self.text.held_out):.2f} nats per token held out", flush=True)
        return InMemory(arch, params)

    def pairs(self) -> Iterator[tuple[str, InMemory, InMemory]]:
        """Yields the pairs to be compared, by name."""
        gpt2, other, finetune = self.seed("gpt2", 0), self.seed("gpt2", 1), self.descendant("gpt2")
        yield "GPT-2 and its fine-tune", gpt2, finetune
        yield "GPT-2 and another", gpt2, other
        yield "a fine-tune and another", finetune, other
        dense, another, mixture = self.seed("dense", 0), self.seed("dense", 1), self.descendant("dense")
        yield "dense and its mixture", dense, mixture
        yield "another dense and the mixture", another, mixture
        yield "dense and another", dense, another


def pair_of(base: InMemory, ft: InMemory, tokens: Int[np.ndarray, "N T"], seed: int) -> Pair:
    """Returns a pair that reads the same tokens, as the statistic takes it."""
    ids, compute = np.arange(base.arch.vocab_size, dtype=np.int32), Compute(make_mesh(1, 1), 16)
    return Pair(base, ft, Vocabularies(True, ids, ids), tokens, compute, seed, blocks=paired_one_to_one(tokens, tokens))


def measured(statistic: MatchDistilled, pair: Pair) -> list[object]:
    """Returns the cells of one row: what agreed, its null and p-value, what students explain, and the seconds."""
    start = time.monotonic()
    result = statistic.compute(pair)
    assert result.null is not None
    cells: list[object] = []
    for side, column in (("whole", "agreeing"), ("rest", "agreeing, rest")):
        cells += [" ".join(map(str, result.tests[0].values[column])), result.null[side]["lambda"]]
    explained = min(min(values) for values in result.null["explained"].values())
    return [*cells, result.log10_p, explained, round(time.monotonic() - start)]


COLUMNS = ["agreeing by layer", "lambda", "rest", "lambda", "log10 p", "least explained", "seconds"]


def comparisons(models: ModelFolder) -> Iterator[list[object]]:
    """Yields a row for each pair."""
    for name, base, ft in models.pairs():
        yield [name, *measured(MatchDistilled(), pair_of(base, ft, models.text.held_out, seed=0))]


def student_agreement(models: ModelFolder, count: int) -> Iterator[list[object]]:
    """Yields a row for each kind and layer: units that students of independent models agree on, over all pairs."""
    for kind in ("gpt2", "dense"):
        by_model = []
        for seed in range(count):
            model = models.seed(kind, seed)
            ffns = _ffns(model, models.text.held_out)
            recipe = StudentTraining(model.arch.mlp_dim)
            by_model.append([(x, fit_student(x, y, recipe, 100 * seed + i)) for i, (x, y) in enumerate(ffns)])
        L = len(by_model[0])
        pairs = [(a, b) for i, a in enumerate(by_model) for b in by_model[:i]]
        apart = [(a[i], b[j]) for a, b in pairs for i in range(L) for j in range(L) if abs(i - j) > 1]
        off, off_rest = (
            (np.mean(found), max(found)) for found in ([_agreeing(*p, tap) for p in apart] for tap in ("up", "rest"))
        )
        for i in range(L):
            found = [_agreeing(a[i], b[i]) for a, b in pairs]
            rest = [_agreeing(a[i], b[i], "rest") for a, b in pairs]
            yield [
                kind,
                i,
                recipe.units,
                len(pairs),
                np.mean(found),
                max(found),
                *off,
                np.mean(rest),
                max(rest),
                *off_rest,
            ]


def _ffns(model: InMemory, tokens: Int[np.ndarray, "N T"]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns inputs and outputs of every FFN of a model at all tokens."""
    at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    taps, compute = ("mlp_input", "mlp_output"), Compute(make_mesh(1, 1), 16)
    layers = activations(model, tokens, at, np.ones(at.shape, bool), taps, compute)
    return [(found["mlp_input"], found["mlp_output"]) for _, found in layers]


def study() -> Iterator[list[object]]:
    """Yields a row for each setting, the defaults but for one: units on which base's student agrees with the others."""
    ffns = _demo_ffns()
    for changes in STUDY:
        start = time.monotonic()
        recipe = replace(StudentTraining(units=256), **changes)  # type: ignore[arg-type]
        fitted = {
            name: (ffns[teacher][0], fit_student(*ffns[teacher], recipe, seed))
            for seed, (name, teacher) in enumerate(STUDENTS.items())
        }
        found = [_agreeing(fitted["base"], fitted[name]) for name in list(STUDENTS)[1:]]
        name = ", ".join(f"{key} {value}" for key, value in changes.items()) or "defaults"
        yield [name, *found, fitted["base"][1].explained, round(time.monotonic() - start)]


def _demo_ffns() -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """Returns inputs and outputs of the FFNs of `STUDENTS` on the demo's held-out text."""
    family = demo.family()
    found: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
    for name in {model for model, _ in STUDENTS.values()}:
        checkpoint = open_checkpoint(str(family.member(name)))
        tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
        tokens = token_blocks(read_documents(str(family.text)), tokenizer, block_size=128, num_tokens=32768).tokens
        found |= {(name, i): ffn for i, ffn in enumerate(_ffns(load(checkpoint, make_mesh(1, 1)), tokens))}
    return found


def _agreeing(base: tuple[np.ndarray, Student], ft: tuple[np.ndarray, Student], tap: str = "up") -> int:
    by_tap, rng = student_correlations(base, ft), np.random.default_rng(0)
    gate, up = by_tap["gate"], np.abs(by_tap[tap])
    live = live_units(gate, up)
    return against_each_other(match_units(gate, rng, live), match_units(up, rng, live)).agreeing


_OUT_DIR = flags.DEFINE_string("out_dir", "runs/distilled", "folder that keeps the models")
_SEEDS = flags.DEFINE_integer("seeds", 0, "compare the students of so many independent models of each kind")
_STUDY = flags.DEFINE_bool("study", False, "students of the demo family by steps, width and decay")


def main(argv: list[str]) -> None:
    """Prints each row as it is measured, and then the table."""
    del argv
    if _STUDY.value:
        rows, headers = study(), ["setting", *list(STUDENTS)[1:], "explained", "seconds"]
    else:
        models = ModelFolder(Path(_OUT_DIR.value), text())
        rows, headers = comparisons(models), ["pair", *COLUMNS]
        if _SEEDS.value:
            rows = student_agreement(models, _SEEDS.value)
            headers = [
                "kind",
                "layer",
                "units",
                "pairs",
                "agreeing",
                "most",
                "other layers",
                "most",
                "rest",
                "most",
                "rest, other layers",
                "most",
            ]
    kept = []
    for row in rows:
        print(*row, sep="  ", flush=True)
        kept.append(row)
    print(text_table(kept, headers))


if __name__ == "__main__":
    app.run(main)
