"""Writing a model in Hugging Face format: safetensors shards, index, config and tokenizer files."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int
from safetensors.numpy import save_file

from tracing_jax.arch import change_config
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import to_tensors
from tracing_jax.checkpoint.token_ids import permute_token_ids
from tracing_jax.checkpoint.whole_folder import whole_folder
from tracing_jax.sources import ParamSource, subtrees
from tracing_jax.tree import flatten

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


_TOKENIZER = tuple(pattern for pattern in _COMPANIONS if "config.json" not in pattern)


def save_checkpoint(
    folder: str | Path,
    source: ParamSource,
    companions: str | Path,
    max_shard_bytes: int = 4 * 2**30,
    *,
    tokenizer: str | Path | None = None,
    new_ids: Int[np.ndarray, " V"] | None = None,
) -> None:
    """Writes a model that transformers can load.

    Weights keep the dtype of their leaves; reading them back gives the same bits. The folder appears whole: a killed
    run leaves nothing under its name.

    Args:
      folder: where to write.
      source: the model.
      companions: the folder that config and tokenizer files are copied from. Where the model has other facts than that
        config says, the copy is changed.
      max_shard_bytes: the most that a file of weights holds.
      tokenizer: another folder to take the tokenizer from.
      new_ids: for each id of the companions' tokens its id in this model, if it has others.

    Raises:
      FileExistsError: `folder` is there already.
      UnsupportedModelError: the config cannot describe this model.
      CheckpointError: the tokens cannot be renamed.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it or choose another place to write to")
    with whole_folder(folder) as work:
        _copy(_COMPANIONS, Path(companions), work)
        if tokenizer is not None:
            _copy(_TOKENIZER, Path(tokenizer), work)
        change_config(work, source.arch)
        if new_ids is not None:
            permute_token_ids(work, new_ids)
        _write_shards(work, source, max_shard_bytes)


def _copy(patterns: Iterable[str], folder: Path, to: Path) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            shutil.copyfile(file, to / file.name)


def _write_shards(folder: Path, source: ParamSource, max_shard_bytes: int) -> None:
    shards: list[dict[str, int]] = []
    for i, shard in enumerate(_shards(source, max_shard_bytes)):
        save_file(shard, folder / f"{i}.part", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, sizes in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        weight_map |= dict.fromkeys(sizes, file)
    total = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(source: ParamSource, max_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields groups of tensors of at most `max_bytes` (or one larger tensor), reading the source part by part."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in _tensors(source):
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _tensors(source: ParamSource) -> Iterator[tuple[str, np.ndarray]]:
    layouts = leaf_layouts(source.arch)
    for prefix, subtree in subtrees(source):
        leaves = {prefix + name: np.asarray(leaf) for name, leaf in flatten(subtree).items()}
        yield from to_tensors(layouts, leaves).items()
