"""Does `match_distilled` tell relatives from strangers where no gate can be matched, and at what cost?

    python -m benchmarks.distilled --out_dir=runs/distilled                    # trains, compares and prints
    python -m benchmarks.distilled --out_dir=runs/distilled --study            # students by steps, width and decay

Tiny models learn the demo's text: a GPT-2, its fine-tune and another GPT-2; a dense gated model, a mixture of experts
upcycled from it (experts copied, a fresh router, all trained further), and another dense model. They stay in the output
folder. The study is on one layer of the demo family: of its 256 units, on how many do base's student and another agree?
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
from tracing_jax.activations import activations
from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.checkpoint import load, open_checkpoint
from tracing_jax.data import load_tokenizer, paired_one_to_one, read_documents, token_blocks
from tracing_jax.matching import live_units, match_units
from tracing_jax.report import text_table
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.source import InMemory
from tracing_jax.statistics import Pair, Vocabularies
from tracing_jax.statistics.comparison import against_each_other
from tracing_jax.statistics.match_distilled import MatchDistilled
from tracing_jax.statistics.students import Recipe, Student, fit_student, student_correlations
from tracing_jax.tree import Tree, flatten, unflatten

RECIPE = demo.Recipe(vocab_size=512, embed_dim=64, mlp_dim=192, block_size=64, base_steps=1200)
EXPERTS = 4

PAIRS = {
    "GPT-2 and its fine-tune": ("gpt2", "gpt2 finetune"),
    "GPT-2 and another": ("gpt2", "gpt2 other"),
    "a fine-tune and another": ("gpt2 finetune", "gpt2 other"),
    "dense and its mixture": ("dense", "upcycled"),
    "another dense and the mixture": ("dense other", "upcycled"),
    "dense and another": ("dense", "dense other"),
}

STUDY: list[Mapping[str, float]] = [
    {},
    *({"steps": steps} for steps in (250, 500, 2000)),
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


def models(folder: Path, found: Text) -> dict[str, InMemory]:
    """Returns all models of `PAIRS`, trained now if the folder does not have them."""
    kinds = archs()
    kept: dict[str, InMemory] = {}

    def keep(name: str, kind: str, start: Tree | int, tokens: np.ndarray, steps: int, peak: float) -> Tree:
        file = folder / f"{name.replace(' ', '-')}.npz"
        if not file.exists():
            params = demo.init(kinds[kind], jax.random.key(start)) if isinstance(start, int) else start
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, **flatten(trained(kinds[kind], params, tokens, steps, peak, seed=len(kept))))
        with np.load(file) as leaves:
            params = unflatten({leaf: leaves[leaf] for leaf in leaves.files})
        loss = demo.mean_loss(kinds[kind], params, found.held_out)
        print(f"{name}: {loss:.2f} nats per token held out", flush=True)
        kept[name] = InMemory(kinds[kind], jax.tree.map(jnp.asarray, params))
        return params

    long, short = (RECIPE.base_steps, RECIPE.base_learning_rate), (240, RECIPE.finetune_learning_rate)
    for kind in ("gpt2", "dense"):
        base = keep(kind, kind, 0, found.seen, *long)
        keep(f"{kind} other", kind, 1, found.seen, *long)
        if kind == "gpt2":
            keep("gpt2 finetune", kind, base, found.finetune, *short)
        else:
            keep("upcycled", "mixture", upcycled(base, 0), found.finetune, *short)
    return kept


def pair_of(base: InMemory, ft: InMemory, tokens: Int[np.ndarray, "N T"], seed: int) -> Pair:
    """Returns a pair that reads the same tokens, as the statistic takes it."""
    ids, compute = np.arange(base.arch.vocab_size, dtype=np.int32), Compute(make_mesh(1, 1), 16)
    return Pair(base, ft, Vocabularies(True, ids, ids), tokens, compute, seed, blocks=paired_one_to_one(tokens, tokens))


def measured(statistic: MatchDistilled, pair: Pair) -> list[object]:
    """Returns the cells of one row: what agreed, its null and p-value, what students explain, and the seconds."""
    start = time.monotonic()
    result = statistic.compute(pair)
    assert result.null is not None
    null, agreeing = result.null["students"], result.tests[0].values["agreeing"]
    explained = min(min(values) for values in null["explained"].values())
    seconds = round(time.monotonic() - start)
    return [" ".join(map(str, agreeing)), null["lambda"], result.log10_p, explained, seconds]


COLUMNS = ["agreeing by layer", "lambda", "log10 p", "least explained", "seconds"]


def comparisons(found: Mapping[str, InMemory], tokens: Int[np.ndarray, "N T"]) -> Iterator[list[object]]:
    """Yields a row for each pair."""
    for name, (base, ft) in PAIRS.items():
        yield [name, *measured(MatchDistilled(), pair_of(found[base], found[ft], tokens, seed=0))]


def study() -> Iterator[list[object]]:
    """Yields a row for each setting, the defaults but for one: units on which base's student agrees with the others."""
    ffns = _demo_ffns()
    for changes in STUDY:
        start = time.monotonic()
        recipe = replace(Recipe(units=256), **changes)  # type: ignore[arg-type]
        fitted = {
            name: (ffns[teacher][0], fit_student(*ffns[teacher], recipe, seed))
            for seed, (name, teacher) in enumerate(STUDENTS.items())
        }
        found = [_agreeing(fitted["base"], fitted[name]) for name in list(STUDENTS)[1:]]
        name = ", ".join(f"{key} {value}" for key, value in changes.items()) or "defaults"
        yield [name, *found, fitted["base"][1].explained, round(time.monotonic() - start)]


def _demo_ffns() -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """Returns inputs and outputs of the FFNs of `STUDENTS` on the demo's held-out text."""
    family, found = demo.family(), {}
    for name in {model for model, _ in STUDENTS.values()}:
        checkpoint = open_checkpoint(str(family.member(name)))
        tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
        tokens = token_blocks(read_documents(str(family.text)), tokenizer, block_size=128, num_tokens=32768).tokens
        at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        compute, model = Compute(make_mesh(1, 1), 16), load(checkpoint, make_mesh(1, 1))
        for i, taps in activations(model, tokens, at, np.ones(at.shape, bool), ("mlp_input", "mlp_output"), compute):
            found[name, i] = (taps["mlp_input"], taps["mlp_output"])
    return found


def _agreeing(base: tuple[np.ndarray, Student], ft: tuple[np.ndarray, Student]) -> int:
    by_tap, rng = student_correlations(base, ft), np.random.default_rng(0)
    gate, up = by_tap["gate"], np.abs(by_tap["up"])
    live = live_units(gate, up)
    return against_each_other(match_units(gate, rng, live), match_units(up, rng, live)).agreeing


_OUT_DIR = flags.DEFINE_string("out_dir", "runs/distilled", "folder that keeps the models")
_STUDY = flags.DEFINE_bool("study", False, "students of the demo family by steps, width and decay")


def main(argv: list[str]) -> None:
    """Prints each row as it is measured, and then the table."""
    del argv
    if _STUDY.value:
        rows, headers = study(), ["setting", *list(STUDENTS)[1:], "explained", "seconds"]
    else:
        found = text()
        rows, headers = comparisons(models(Path(_OUT_DIR.value), found), found.held_out), ["pair", *COLUMNS]
    kept = []
    for row in rows:
        print(*row, sep="  ", flush=True)
        kept.append(row)
    print(text_table(kept, headers))


if __name__ == "__main__":
    app.run(main)
