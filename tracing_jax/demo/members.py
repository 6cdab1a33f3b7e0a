"""The demo family: a base model, its fine-tune, a disguised copy of the fine-tune, and an independent model."""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jaxtyping import PRNGKeyArray

from tracing_jax.arch import Arch, read_arch
from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.checkpoint import save_checkpoint
from tracing_jax.demo.cache import cached_folder
from tracing_jax.demo.recipe import DEFAULT, DemoSizes, train_tokenizer, write_config_and_tokenizer
from tracing_jax.demo.texts import base_text, finetune_text, split
from tracing_jax.demo.training import Training, init, train, unigram_entropy
from tracing_jax.forward import mean_loss
from tracing_jax.rewrites import permute, random_permutations
from tracing_jax.sharding import cpu_device
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree

MEMBERS = ("base", "finetune", "disguised", "independent")


@dataclass(frozen=True)
class DemoModels:
    """A trained family: a checkpoint folder for each member, and text that none of them was trained on."""

    folder: Path

    def member(self, name: str) -> Path:
        """Returns the checkpoint folder of a member.

        Raises:
          ValueError: there is no such member.
        """
        if name not in MEMBERS:
            raise ValueError(f"the demo family has no {name!r}, it has {', '.join(MEMBERS)}")
        return self.folder / name

    @property
    def text(self) -> Path:
        """A file of held-out text, pieces of base's and of the fine-tune's alternating."""
        return self.folder / "text.txt"


@dataclass(frozen=True)
class TrainingData:
    """The tokenised text of a recipe.

    Attributes:
      base: the training tokens of base.
      finetune: those of the fine-tune.
      held_out: the held-out tokens of both texts.
      held_out_text: the held-out pieces of both texts, alternating.
    """

    base: np.ndarray
    finetune: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray]
    held_out_text: str


def family(cache_dir: str | None = None, recipe: DemoSizes = DEFAULT) -> DemoModels:
    """Returns the family of a recipe, trained now if it is not in the cache (see `cached_folder`)."""
    return DemoModels(cached_folder("demo", recipe, cache_dir, lambda folder: _build(folder, recipe)))


def training_data(recipe: DemoSizes, shared_files: Path) -> TrainingData:
    """Returns the text of a recipe, and writes config and tokenizer of its models into `shared_files`."""
    seen, held_out = split(base_text(), recipe.base_pieces)
    ft_seen, ft_held_out = split(finetune_text(), recipe.finetune_pieces)
    tokenizer = train_tokenizer(recipe, seen)
    write_config_and_tokenizer(shared_files, recipe, tokenizer)
    base, finetune, *unseen = (
        np.asarray(tokenizer.encode("".join(pieces)).ids, np.int32) for pieces in (seen, ft_seen, held_out, ft_held_out)
    )
    return TrainingData(base, finetune, (unseen[0], unseen[1]), _alternating(held_out, ft_held_out))


def held_out_text() -> Path:
    """Returns a file with the held-out text of the demo; nothing is trained for it."""
    parts = (base_text, DEFAULT.base_pieces), (finetune_text, DEFAULT.finetune_pieces)
    return _text_file("demo-text", lambda: _alternating(*(split(text(), pieces)[1] for text, pieces in parts)))


def training_text() -> Path:
    """Returns a file with the text that the demo's base and independent model are trained on."""
    return _text_file("demo-training-text", lambda: "".join(split(base_text(), DEFAULT.base_pieces)[0]))


def _text_file(name: str, text: Callable[[], str]) -> Path:
    def build(folder: Path) -> None:
        (folder / "text.txt").write_bytes(text().encode())

    return cached_folder(name, DEFAULT, None, build) / "text.txt"


def _alternating(pieces: list[str], others: list[str]) -> str:
    return "".join(piece for pair in zip(pieces, others) for piece in pair)


def _build(folder: Path, recipe: DemoSizes) -> None:
    """Writes the members and the text into `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as shared_files:
        data = training_data(recipe, Path(shared_files))
        arch = read_arch(Path(shared_files))
        for name, params in _members(arch, recipe, data):
            log_losses(name, InMemory(arch, params), recipe, data)
            save_checkpoint(folder / name, InMemory(arch, params), Path(shared_files))
    (folder / "text.txt").write_bytes(data.held_out_text.encode())


def _members(arch: Arch, recipe: DemoSizes, data: TrainingData) -> Iterator[tuple[str, Tree]]:
    """Yields each member's name and params, in the order of `MEMBERS`."""
    init_key, other_init_key, disguise_key = jax.random.split(jax.random.key(recipe.seed), 3)

    def trained(name: str, key: PRNGKeyArray) -> Tree:
        training = Training(name, data.base, recipe.base_steps, recipe.base_learning_rate)
        with jax.default_device(cpu_device()):  # which is a thread's own
            return train(arch, recipe, init(arch, key), training)

    with ThreadPoolExecutor(1, "independent") as thread:  # models this small leave a core idle
        independent = thread.submit(trained, "independent", other_init_key)
        base = trained("base", init_key)
        yield "base", base
        finetuning = Training("finetune", data.finetune, recipe.finetune_steps, recipe.finetune_learning_rate)
        finetune = train(arch, recipe, base, finetuning)
        yield "finetune", finetune
        table = axis_table(arch)
        yield "disguised", permute(finetune, random_permutations(disguise_key, table, PERMUTABLE), table)
        yield "independent", independent.result()


def log_losses(name: str, model: InMemory, recipe: DemoSizes, data: TrainingData) -> None:
    """Logs the losses of a model on held-out text, beside the unigram entropy of that text."""
    for text, tokens in zip(("base's text", "the fine-tune's text"), data.held_out):
        blocks = tokens[: len(tokens) // recipe.block_size * recipe.block_size].reshape(-1, recipe.block_size)[:64]
        logging.info(
            "demo %s: %.2f nats per token on held-out tokens of %s, whose unigram entropy is %.2f",
            name, mean_loss(model.arch, model.params, blocks), text, unigram_entropy(blocks),
        )  # fmt: skip
