"""The demo family: four small models trained here, in minutes, on text that every Python installation carries.

`base` learns the language reference (`pydoc_data.topics`) and the docstrings of the standard library. `finetune` goes
on from it with numpy's docstrings. `disguised` is the fine-tune with all its units permuted, written as a checkpoint.
`independent` starts from another seed and sees base's text in base's order. All four are Hugging Face folders, opened
like any other checkpoint.

    base = open_checkpoint(str(family().member("base")))

Letters: B batch, T position, V vocab.
"""

import ast
import functools
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tqdm import tqdm

from tracing_jax.arch import Arch, read_arch
from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.checkpoint import save_checkpoint
from tracing_jax.models import apply_block, apply_embed, apply_head, init_params, layer_inputs
from tracing_jax.source import InMemory
from tracing_jax.symmetry import permute, random_permutations
from tracing_jax.tree import Tree

if TYPE_CHECKING:
    import tokenizers
    import transformers

MEMBERS = ("base", "finetune", "disguised", "independent")

_FORMAT = 1  # raise when the same recipe no longer gives the same family
_PIECE_CHARS = 2000
_HELD_OUT = 16  # one piece of so many is held out


@dataclass(frozen=True)
class Recipe:
    """What the family is made of: sizes of the models, of their texts (in pieces), and of their training.

    The defaults give models of 600,000 parameters that train in about two minutes on two cores.
    """

    vocab_size: int = 1024
    embed_dim: int = 96
    num_layers: int = 4
    mlp_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    block_size: int = 128
    batch_size: int = 4
    base_steps: int = 960
    finetune_steps: int = 240
    base_learning_rate: float = 6e-3
    finetune_learning_rate: float = 2e-3
    weight_decay: float = 0.1
    base_pieces: int = 600
    finetune_pieces: int = 300
    seed: int = 0


@dataclass(frozen=True)
class Family:
    """A trained family: a folder for each member, and text that none of them has seen."""

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
        """A file of held-out text, pieces of base's and of the fine-tune's in turn."""
        return self.folder / "text.txt"


def family(cache_dir: str | None = None, recipe: Recipe = Recipe()) -> Family:
    """Returns the family of a recipe, trained now if it is not in the cache.

    It is kept in `cache_dir`, by default `~/.cache/tracing_jax` (or under `XDG_CACHE_HOME`), and appears there whole:
    a killed run leaves nothing under its name, and of two runs at once the first to finish provides it.

    Raises:
      ModuleNotFoundError: this Python lacks `pydoc_data`.
    """
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tracing_jax").expanduser()
    folder = root / f"demo-{_key(recipe)}"
    if folder.exists():
        return Family(folder)
    logging.info("training the demo family, once, into %s", folder)
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}."))
    try:
        with jax.default_device(_device()):
            _build(work, recipe)
        work.chmod(0o755)
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Family(folder)


def _device() -> jax.Device:
    """Returns the CPU: it gives the same bytes each time, while a GPU's scatters add in any order."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return jax.local_devices()[0]


def _publish(work: Path, folder: Path) -> None:
    try:
        work.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        logging.info("%s was finished by another run meanwhile", folder)


def _key(recipe: Recipe) -> str:
    """Returns a name that changes with the recipe and with the texts that are learnt."""
    topics = hashlib.sha256("".join(_topics()).encode()).hexdigest()
    facts = [_FORMAT, asdict(recipe), platform.python_version(), np.__version__, topics]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _build(folder: Path, recipe: Recipe) -> None:
    """Writes the members and the text into `folder`."""
    seen, held_out = split(base_text(), recipe.base_pieces)
    ft_seen, ft_held_out = split(finetune_text(), recipe.finetune_pieces)
    tokenizer = train_tokenizer(recipe, seen)
    tokens, ft_tokens, *held_out_tokens = (
        np.asarray(tokenizer.encode("".join(pieces)).ids, np.int32) for pieces in (seen, ft_seen, held_out, ft_held_out)
    )
    with tempfile.TemporaryDirectory(dir=folder) as companions:
        _write_companions(Path(companions), recipe, tokenizer)
        arch = read_arch(Path(companions))
        for name, params in _members(arch, recipe, tokens, ft_tokens):
            _log_losses(name, arch, recipe, params, *held_out_tokens)
            save_checkpoint(folder / name, InMemory(arch, params), Path(companions))
    text = "".join(piece for pair in zip(held_out, ft_held_out) for piece in pair)
    (folder / "text.txt").write_bytes(text.encode())


@dataclass(frozen=True)
class _Training:
    name: str
    tokens: np.ndarray
    steps: int
    peak_learning_rate: float


def _members(arch: Arch, recipe: Recipe, tokens: np.ndarray, ft_tokens: np.ndarray) -> Iterator[tuple[str, Tree]]:
    """Yields each member's name and params, in the order of `MEMBERS`."""
    init_key, other_init_key, disguise_key = jax.random.split(jax.random.key(recipe.seed), 3)
    base_training = _Training("base", tokens, recipe.base_steps, recipe.base_learning_rate)
    base = _train(arch, recipe, init(arch, init_key), base_training)
    yield "base", base
    finetuning = _Training("finetune", ft_tokens, recipe.finetune_steps, recipe.finetune_learning_rate)
    finetune = _train(arch, recipe, base, finetuning)
    yield "finetune", finetune
    table = axis_table(arch)
    yield "disguised", permute(finetune, random_permutations(disguise_key, table, PERMUTABLE), table)
    yield "independent", _train(arch, recipe, init(arch, other_init_key), base_training)


@functools.partial(jax.jit, static_argnames="arch")  # op by op, every shape would be compiled on its own
def init(arch: Arch, key: PRNGKeyArray) -> Tree:
    """Returns fresh params whose kernels have standard deviation 1 / sqrt(D)."""
    # The models' own scale is meant for thousands of units; narrow models barely learn from it.
    std = arch.embed_dim**-0.5

    def scaled(leaf: jax.Array) -> jax.Array:
        return leaf * (std / jnp.maximum(leaf.std(), 1e-6)) if leaf.ndim > 1 else leaf  # biases are zero and stay it

    return jax.tree.map(scaled, init_params(arch, key))


def _train(arch: Arch, recipe: Recipe, params: Tree, training: _Training) -> Tree:
    """Returns the params, as numpy, after AdamW on random windows of the text: a warm-up, then a cosine to zero."""
    tokens, steps, T = training.tokens, training.steps, recipe.block_size
    # Every training draws from the same stream: base and independent see the same windows in the same order.
    starts = np.random.default_rng(recipe.seed).integers(0, len(tokens) - T, size=(steps, recipe.batch_size, 1))
    rates = learning_rates(training.peak_learning_rate, steps)
    state = optimizer(recipe).init(params)
    with tqdm(total=steps, desc=f"training {training.name}", unit="step", disable=None) as bar:
        for rate, start in zip(rates, starts):
            params, state, loss = train_step(arch, recipe, params, state, rate, tokens[start + np.arange(T)])
            bar.set_postfix(loss_nats=f"{loss:.2f}", refresh=False)
            bar.update()
    return jax.device_get(params)


def learning_rates(peak: float, steps: int) -> Float[np.ndarray, " steps"]:
    """Returns the learning rate of each step: a warm-up over one step in twenty, then a cosine to zero."""
    return np.asarray(optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 20, 1), steps)(np.arange(steps)))


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns AdamW, after clipping, at learning rate 1; norm gains, the only vectors, do not decay."""
    kernels = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    adamw = optax.adamw(1.0, b2=0.95, weight_decay=recipe.weight_decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


@functools.partial(jax.jit, static_argnames=("arch", "recipe"))
def train_step(
    arch: Arch, recipe: Recipe, params: Tree, state: Any, rate: Float[Array, ""], tokens: Int[Array, "B T"]
) -> tuple[Tree, Any, Float[Array, ""]]:
    """Returns params and optimizer state after one step at this learning rate, and the loss before it, in nats."""
    # The learning rate comes in as data, so that all members share one compiled step.
    loss, gradients = jax.value_and_grad(functools.partial(mean_loss, arch))(params, tokens)
    updates, state = optimizer(recipe).update(gradients, state, params)
    return optax.apply_updates(params, jax.tree.map(lambda update: rate * update, updates)), state, loss


@functools.partial(jax.jit, static_argnames="arch")
def mean_loss(arch: Arch, params: Tree, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Returns the mean loss of the predicted tokens, in nats."""
    x = apply_embed(arch, params["embed"], tokens, jnp.float32)
    for i in range(arch.num_layers):
        x = apply_block(arch, params["layers"][str(i)], x, *layer_inputs(arch, i))
    logits = apply_head(arch, params["head"], x, None)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def _log_losses(
    name: str, arch: Arch, recipe: Recipe, params: Tree, held_out: np.ndarray, ft_held_out: np.ndarray
) -> None:
    for text, tokens in (("base's text", held_out), ("the fine-tune's text", ft_held_out)):
        blocks = tokens[: len(tokens) // recipe.block_size * recipe.block_size].reshape(-1, recipe.block_size)[:64]
        logging.info(
            "demo %s: %.2f nats per token on held-out tokens of %s, whose unigram entropy is %.2f",
            name, mean_loss(arch, params, blocks), text, unigram_entropy(blocks),
        )  # fmt: skip


def unigram_entropy(tokens: Int[np.ndarray, "N T"]) -> float:
    """Returns the entropy of the tokens' own frequencies in nats: no context-free predictor has a lower loss."""
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(shares * np.log(shares)).sum())


def train_tokenizer(recipe: Recipe, texts: Iterable[str]) -> "tokenizers.Tokenizer":
    """Returns a byte-level BPE tokenizer of the texts: any string goes in, and comes back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=recipe.vocab_size, initial_alphabet=bytes_, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write_companions(folder: Path, recipe: Recipe, tokenizer: "tokenizers.Tokenizer") -> None:
    """Writes the config and the tokenizer as transformers does."""
    from transformers import PreTrainedTokenizerFast

    config(recipe).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False).save_pretrained(folder)


def config(recipe: Recipe) -> "transformers.LlamaConfig":
    """Returns the config of the recipe's models, as transformers knows it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.embed_dim,
        intermediate_size=recipe.mlp_dim,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.block_size,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )


def base_text() -> Iterator[str]:
    """Yields the texts that base learns from: the language reference and the docstrings of the standard library."""
    yield from _topics()
    yield from _docstrings(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


def finetune_text() -> Iterator[str]:
    """Yields the texts that the fine-tune goes on with: the docstrings of numpy."""
    folder = Path(np.__file__).parent
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.py"))
    yield from _docstrings(folder / file for file in files if "tests" not in file.parts)


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo family learns from the module pydoc_data.topics of the standard library, which this Python "
            f"({platform.python_version()}) was stripped of; install the full standard library, or another Python"
        ) from error
    return list(topics.values())


def _docstrings(files: Iterable[Path]) -> Iterator[str]:
    """Yields the docstrings of source files, which are parsed and never run."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files:
        with warnings.catch_warnings(action="ignore"):  # about the style of other people's source
            tree = ast.parse(file.read_bytes())
        yield from (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))


def split(texts: Iterable[str], num_pieces: int) -> tuple[list[str], list[str]]:
    """Returns the start of the texts as pieces of some 2000 characters: those to train on, and those held out.

    A paragraph counts once: many stand in several topics or docstrings, and none may be on both sides.
    """
    pieces, known = [""], {""}
    for paragraph in (paragraph.strip("\n") for text in texts for paragraph in text.split("\n\n")):
        if paragraph in known:
            continue
        known.add(paragraph)
        pieces[-1] += paragraph + "\n\n"
        if len(pieces[-1]) >= _PIECE_CHARS:
            if len(pieces) == num_pieces:
                break
            pieces.append("")
    return [piece for i, piece in enumerate(pieces) if (i + 1) % _HELD_OUT], pieces[_HELD_OUT - 1 :: _HELD_OUT]
