"""Zoos of tiny models: many seeds of one recipe, trained side by side, kept in a folder with snapshots of the way.

    python -m benchmarks.seeds                         # every recipe, half an hour on two cores
    python -m benchmarks.seeds --recipes=tiny,wide

All models of a zoo learn the demo's text, each from its own initialisation and, unless the recipe says otherwise, in
its own order. One jitted step trains them all: they are stacked on a leading axis, which is divided among the CPU's
devices, and each device goes through its share one by one, since one model fits the cache and many do not.

Letters: S seeds, B batch, T position.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from absl import app, flags
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from benchmarks.environment import ZOO_DIR, use_all_cores
from tracing_jax import demo
from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.checkpoint.whole_folder import whole_folder
from tracing_jax.report import text_table
from tracing_jax.tree import Tree, flatten, unflatten

if TYPE_CHECKING:
    import transformers

SNAPSHOTS = (0.0, 0.125, 0.25, 0.5, 1.0)
"""The shares of the training after which all models are kept; 0 is the initialisation."""

_FORMAT = 1  # raise when the same recipe no longer gives the same zoo
_HELD_OUT_BLOCKS = 64


@dataclasses.dataclass(frozen=True)
class ZooRecipe:
    """A family recipe trained from many seeds.

    Attributes:
      models: the sizes, the text (`base_pieces`) and the training (`base_steps`, ...) of each model.
      num_seeds: the number of models.
      same_order: all models see the same windows of the text in the same order, else each its own.
      family: of the models: `llama`; `gpt2`, which has no gate; or `mixtral`, with experts.
    """

    models: demo.DemoSizes
    num_seeds: int
    same_order: bool = False
    family: Literal["llama", "gpt2", "mixtral"] = "llama"

    @property
    def arch(self) -> Arch:
        """The architecture that all models of the zoo share."""
        return arch_from_config(_CONFIGS[self.family](self.models))


def _gpt2_config(sizes: demo.DemoSizes) -> "transformers.GPT2Config":
    from transformers import GPT2Config

    return GPT2Config(vocab_size=sizes.vocab_size, n_embd=sizes.embed_dim, n_layer=sizes.num_layers,
                      n_head=sizes.num_heads, n_inner=sizes.mlp_dim, n_positions=sizes.block_size,
                      bos_token_id=None, eos_token_id=None)  # fmt: skip


def _mixtral_config(sizes: demo.DemoSizes) -> "transformers.MixtralConfig":
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.embed_dim,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )


_CONFIGS: Mapping[str, Callable[[demo.DemoSizes], Any]] = {
    "llama": demo.config, "gpt2": _gpt2_config, "mixtral": _mixtral_config
}  # fmt: skip

EXPERTS = 4
"""Experts of each layer of the models that have any."""


_TINY = demo.DemoSizes(vocab_size=512, embed_dim=64, mlp_dim=128, block_size=64, base_steps=768)

RECIPES: Mapping[str, ZooRecipe] = {
    "tiny": ZooRecipe(_TINY, 64),
    "narrow": ZooRecipe(dataclasses.replace(_TINY, mlp_dim=64), 16),
    "wide": ZooRecipe(dataclasses.replace(_TINY, mlp_dim=256), 16),
    "same_order": ZooRecipe(_TINY, 16, same_order=True),
    "larger": ZooRecipe(
        dataclasses.replace(
            _TINY, vocab_size=1024, embed_dim=128, num_layers=6, mlp_dim=384, base_steps=1200, base_learning_rate=4e-3
        ),
        8,
    ),
    "no_gate": ZooRecipe(dataclasses.replace(_TINY, base_learning_rate=3e-3), 32, family="gpt2"),
    "experts": ZooRecipe(dataclasses.replace(_TINY, mlp_dim=64), 32, family="mixtral"),
}
"""The zoos that the benchmarks measure: 64 seeds, two other widths, the same order of data, a larger model, models
without a gate, and models with experts.

All have one seed, from which model i of each draws: models of two zoos with the same number share their embeddings, and
more of their initialisation where shapes allow it, so that they are not independent. `benchmarks/scan.py`, which
compares across zoos, gives each another seed."""


@dataclasses.dataclass(frozen=True)
class Zoo:
    """A trained zoo.

    Attributes:
      arch: the facts that all its models share.
      held_out: blocks of text that no model has seen.
      facts: the recipe, the loss in nats per held-out token of each model at each snapshot, the entropy of the tokens'
        own frequencies, and the seconds that the training took.
    """

    recipe: ZooRecipe
    arch: Arch
    folder: Path

    @property
    def held_out(self) -> Int[np.ndarray, "N T"]:
        return np.load(self.folder / "held_out.npy")

    @property
    def facts(self) -> Mapping[str, Any]:
        return json.loads((self.folder / "facts.json").read_text())

    def models(self, snapshot: float) -> Tree:
        """Returns the params of all models at one of `SNAPSHOTS`, stacked on a leading axis."""
        with np.load(self.folder / f"{snapshot}.npz") as leaves:
            return unflatten({name: leaves[name] for name in leaves.files})


def zoo(recipe: ZooRecipe, zoo_dir: str | Path) -> Zoo:
    """Returns the zoo of a recipe, trained now if the folder does not have it."""
    facts = [_FORMAT, dataclasses.asdict(recipe)]
    folder = Path(zoo_dir) / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    found = Zoo(recipe, recipe.arch, folder)
    if not folder.exists():
        with whole_folder(folder) as work:
            _build(dataclasses.replace(found, folder=work))
    return found


def model(models: Tree, seed: int) -> Tree:
    """Returns the params of one of the stacked models."""
    return jax.tree.map(lambda leaf: leaf[seed], models)


def _build(found: Zoo) -> None:
    """Trains the zoo into its folder."""
    seen, held_out = demo.split(demo.base_text(), found.recipe.models.base_pieces)
    tokenizer = demo.train_tokenizer(found.recipe.models, seen)
    tokens, held_out_tokens = (np.asarray(tokenizer.encode("".join(p)).ids, np.int32) for p in (seen, held_out))
    T = found.recipe.models.block_size
    blocks = held_out_tokens[: T * _HELD_OUT_BLOCKS].reshape(-1, T)
    np.save(found.folder / "held_out.npy", blocks)
    losses, start = {}, time.monotonic()
    for snapshot, params in _train(found.arch, found.recipe, tokens):
        np.savez(found.folder / f"{snapshot}.npz", **flatten(params))
        losses[str(snapshot)] = np.asarray(_losses(found.arch, params, blocks)).tolist()
    facts = {
        "recipe": dataclasses.asdict(found.recipe),
        "loss_nats_per_token": losses,
        "unigram_entropy_nats": demo.unigram_entropy(blocks),
        "training_tokens": found.recipe.models.base_steps * found.recipe.models.batch_size * T,
        "training_seconds": time.monotonic() - start,
    }
    (found.folder / "facts.json").write_text(json.dumps(facts, indent=1))


def _train(arch: Arch, recipe: ZooRecipe, tokens: Int[np.ndarray, " N"]) -> Any:
    """Yields (snapshot, params of all models as numpy)."""
    steps, sharding = recipe.models.base_steps, sharding_of(recipe.num_seeds)
    keys = jax.random.split(jax.random.key(recipe.models.seed), recipe.num_seeds)
    params = jax.device_put(jax.jit(jax.vmap(functools.partial(demo.init, arch)))(keys), sharding)
    state = jax.jit(jax.vmap(demo.optimizer(recipe.models).init), out_shardings=sharding)(params)
    step, starts = step_of_all(arch, recipe, sharding), _starts(recipe, len(tokens))
    due = {round(share * steps): share for share in SNAPSHOTS}
    with tqdm(total=steps, desc=f"training {recipe.num_seeds} models", unit="step", disable=None) as bar:
        for i, rate in enumerate(demo.learning_rates(recipe.models.base_learning_rate, steps)):
            if i in due:
                yield due[i], jax.device_get(params)
            batch = jax.device_put(tokens[starts[i] + np.arange(recipe.models.block_size)], sharding)
            params, state, losses = step(params, state, rate, batch)
            bar.set_postfix(loss_nats=f"{losses.mean():.2f}", refresh=False)
            bar.update()
    yield due[steps], jax.device_get(params)


def step_of_all(arch: Arch, recipe: ZooRecipe, sharding: NamedSharding) -> Callable[..., Any]:
    """Returns `demo.train_step` over the leading axis of params, state and tokens."""

    def shard(params: Tree, state: Any, rate: jax.Array, tokens: jax.Array) -> Any:
        one = functools.partial(demo.train_step, arch, recipe.models)
        return jax.lax.map(lambda model: one(model[0], model[1], rate, model[2]), (params, state, tokens))

    split = sharding.spec
    mapped = jax.shard_map(
        shard, mesh=sharding.mesh, in_specs=(split, split, P(), split), out_specs=split, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=(0, 1))


def sharding_of(num_seeds: int) -> NamedSharding:
    """Returns the division of the leading axis among as many devices as divide it."""
    count = max(n for n in range(1, len(jax.devices()) + 1) if num_seeds % n == 0)
    mesh = jax.make_mesh((count,), ("seed",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    return NamedSharding(mesh, P("seed"))


def _starts(recipe: ZooRecipe, num_tokens: int) -> Int[np.ndarray, "steps S B 1"]:
    """Returns where in the text each window begins."""
    models = recipe.models
    shape, end = (models.base_steps, models.batch_size, 1), num_tokens - models.block_size
    orders = range(recipe.num_seeds) if not recipe.same_order else [0] * recipe.num_seeds
    return np.stack([np.random.default_rng([models.seed, order]).integers(0, end, shape) for order in orders], axis=1)


@functools.partial(jax.jit, static_argnames="arch")
def _losses(arch: Arch, params: Tree, blocks: Int[Array, "N T"]) -> Float[Array, " S"]:
    """Returns the loss in nats per token of every model."""
    return jax.lax.map(lambda model: demo.mean_loss(arch, model, blocks), params)


_RECIPES = flags.DEFINE_list("recipes", list(RECIPES), f"zoos to train, of {', '.join(RECIPES)}")


def main(argv: list[str]) -> None:
    """Trains what is missing and prints a table of all zoos asked for."""
    del argv
    use_all_cores()
    rows = []
    for name in _RECIPES.value:
        facts = zoo(RECIPES[name], ZOO_DIR.value).facts
        sizes, losses = facts["recipe"]["models"], facts["loss_nats_per_token"]
        means = [float(np.mean(losses[str(snapshot)])) for snapshot in SNAPSHOTS]
        spread = float(np.std(losses["1.0"]))
        shape = f"{sizes['num_layers']} x {sizes['embed_dim']}, {sizes['mlp_dim']} units"
        rows.append([name, shape, len(losses["1.0"]), facts["training_tokens"], *means, spread,
                     facts["unigram_entropy_nats"], facts["training_seconds"]])  # fmt: skip
    headers = ["zoo", "layers x width", "seeds", "tokens each", *(f"loss at {s:g}" for s in SNAPSHOTS), "sd at 1"]
    print(text_table(rows, [*headers, "unigram entropy", "seconds"]))


if __name__ == "__main__":
    app.run(main)
