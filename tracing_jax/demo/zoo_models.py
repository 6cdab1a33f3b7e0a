"""The demo's zoo: three family trees of models, independent of one another.

In each tree the root is trained from its own initialisation; `tuned` is the root fine-tuned on another text;
`disguised` is the tuned model after every function-preserving rewrite; `pruned` is the root without one of its layers
and a quarter of the MLP units of the others, trained for some more steps.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from tracing_jax.arch import Arch, read_arch
from tracing_jax.checkpoint import save_checkpoint
from tracing_jax.demo.cache import cached_folder
from tracing_jax.demo.members import TrainingData, log_losses, training_data
from tracing_jax.demo.recipe import DEFAULT, DemoSizes
from tracing_jax.demo.training import Training, init, train
from tracing_jax.rewrites import Renaming, draw_rewrites
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.tree import Tree, map_named

ROOTS = ("ash", "birch", "cedar")
TREE: Mapping[str, str | None] = MappingProxyType(
    {
        name: parent
        for root in ROOTS
        for name, parent in {
            root: None, f"{root}-tuned": root, f"{root}-disguised": f"{root}-tuned", f"{root}-pruned": root
        }.items()
    }
)  # fmt: skip
"""Member -> the member it was made from."""

_SEEDS = 1000  # distance between the seeds of two trees
_PRUNED_STEPS = 120


def tree_member(name: str, seed: int) -> Path:
    """Returns the checkpoint folder of a member of the zoo with this seed; its tree is trained if it is not cached.

    Raises:
      ValueError: there is no such member.
    """
    if name not in TREE:
        raise ValueError(f"the demo's zoo has no {name!r}, it has {', '.join(TREE)}")
    root = name.split("-")[0]
    own = replace(DEFAULT, seed=(1 + ROOTS.index(root)) * _SEEDS + seed)
    return cached_folder(f"demo-{root}", own, None, lambda folder: _build(folder, root, own)) / name


def _build(folder: Path, root: str, recipe: DemoSizes) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as shared_files:
        data = training_data(recipe, Path(shared_files))
        for name, model in _members(read_arch(Path(shared_files)), root, recipe, data):
            log_losses(name, model, recipe, data)
            save_checkpoint(folder / name, model, Path(shared_files))


def _members(arch: Arch, root: str, recipe: DemoSizes, data: TrainingData) -> Iterator[tuple[str, InMemory]]:
    """Yields each member of a tree by name, parents first."""
    init_key, disguise_key = jax.random.split(jax.random.key(recipe.seed))
    first = Training(root, data.base, recipe.base_steps, recipe.base_learning_rate)
    params = train(arch, recipe, init(arch, init_key), first)
    yield root, InMemory(arch, params)
    pruned = _pruned(InMemory(arch, params), np.random.default_rng(recipe.seed))
    healing = Training(f"{root}-pruned", data.base, _PRUNED_STEPS, recipe.finetune_learning_rate)
    yield f"{root}-pruned", InMemory(pruned.arch, train(pruned.arch, recipe, pruned.params, healing))
    tuning = Training(f"{root}-tuned", data.finetune, recipe.finetune_steps, recipe.finetune_learning_rate)
    tuned = InMemory(arch, train(arch, recipe, params, tuning))
    yield f"{root}-tuned", tuned
    yield (
        f"{root}-disguised",
        in_memory(rewritten(tuned, draw_rewrites("all", disguise_key, arch, without=(Renaming.name,)))),
    )


def _pruned(model: InMemory, generator: np.random.Generator) -> InMemory:
    """Returns the model without one of its inner layers, and with three quarters of the units of each MLP."""
    arch, F = model.arch, model.arch.mlp_dim
    layers = [model.layer(i) for i in range(arch.num_layers)]
    del layers[int(generator.integers(1, arch.num_layers - 1))]
    remaining_units = [np.sort(generator.permutation(F)[: 3 * F // 4]) for _ in layers]

    def cut(name: str, leaf: np.ndarray) -> np.ndarray:
        if "/mlp/" not in name:
            return leaf
        return np.take(leaf, remaining_units[int(name.split("/")[1])], axis=0 if "down_proj" in name else 1)

    params: Tree = {**model.params, "layers": {str(i): layer for i, layer in enumerate(layers)}}
    shape = replace(
        arch,
        num_layers=len(layers),
        mlp_dim=3 * F // 4,
        layer_ropes=arch.layer_ropes[1:],
        layer_windows=arch.layer_windows[1:],
    )
    return InMemory(shape, map_named(cut, params))
