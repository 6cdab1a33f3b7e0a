"""Writes a pair of checkpoints, group of tensors by group, on all cores: `base`, and `ft`, its noisy, permuted copy."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.pairs.random_weights import Distribution, draw
from benchmarks.pairs.sparse_shards import TensorRange, allocate
from benchmarks.pairs.tokenizer import write_tokenizer
from tracing_jax.arch import Arch, read_arch
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.checkpoint.hf_layouts import LeafLayouts, leaf_layouts
from tracing_jax.checkpoint.tensor_layout import LeafLayout, tensor_shapes, to_tensors
from tracing_jax.checkpoint.whole_folder import whole_folder
from tracing_jax.rewrites import Permutations, random_permutations
from tracing_jax.rewrites.permutation import take_units, unit_moves

if TYPE_CHECKING:
    import transformers

_GAIN_STD = 0.1


@dataclass(frozen=True)
class PairSpec:
    """What a pair is made of besides its shape.

    Attributes:
      noise: standard deviation of what ft adds to each weight, in standard deviations of the weights.
      permute: axis kinds whose units ft has in another order; empty: none.
      random_layers: so many layers are random, the others are holes that read as zeros. None: all are random.
      std: standard deviation of the kernels and biases; gains have their neutral value give or take a tenth.
    """

    noise: float = 0.1
    permute: tuple[str, ...] = ("embed", "mlp")
    random_layers: int | None = None
    std: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class _Model:
    """What every group of tensors needs."""

    arch: Arch
    leaf_layouts: LeafLayouts
    table: AxisTable
    permutations: Permutations
    recipe: PairSpec


def planted_permutations(arch: Arch, recipe: PairSpec) -> dict[str, np.ndarray]:
    """Returns the permutations between base and ft; a pair is related unit by unit once they are undone."""
    return random_permutations(jax.random.key(recipe.seed), axis_table(arch), recipe.permute) if recipe.permute else {}


def write_pair(folder: Path, config: "transformers.PretrainedConfig", recipe: PairSpec) -> None:
    """Writes `folder/base` and `folder/ft`, which appear whole, and the recipe beside them as `pair.json`.

    Memory stays below the largest few tensors.

    Raises:
      FileExistsError: the folder is there already.
      OSError: the disk has not enough free space.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it or choose another place to write to")
    with whole_folder(folder) as work:
        for member in ("base", "ft"):
            (work / member).mkdir()
            config.save_pretrained(work / member)
            write_tokenizer(work / member, config.vocab_size)
        (work / "pair.json").write_text(json.dumps(asdict(recipe)), encoding="utf-8")
        _write_weights(work, recipe)


def _write_weights(folder: Path, recipe: PairSpec) -> None:
    arch = read_arch(folder / "base")
    model = _Model(arch, leaf_layouts(arch), axis_table(arch), planted_permutations(arch, recipe), recipe)
    shapes = tensor_shapes(model.leaf_layouts.values())
    groups = list(_groups(model))
    _check_room(folder, 4 * sum(_num_values(model.leaf_layouts[name]) for group in groups for name in group))
    base, ft = (allocate(folder / member, shapes) for member in ("base", "ft"))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        written = pool.map(lambda group: _write_group(model, group, base, ft), groups)
        for _ in tqdm(written, total=len(groups), desc="writing", unit="tensor", disable=None):
            pass


def _groups(model: _Model) -> Iterator[tuple[str, ...]]:
    """Yields the leaves to draw, those that share a tensor together."""
    groups: dict[str, list[str]] = {}
    for name, layout in model.leaf_layouts.items():
        if not _is_hole(name, model.recipe):
            groups.setdefault(layout.slices[0].tensor, []).append(name)
    yield from map(tuple, groups.values())


def _is_hole(name: str, recipe: PairSpec) -> bool:
    part, *rest = name.split("/")
    return recipe.random_layers is not None and part == "layers" and int(rest[0]) >= recipe.random_layers


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            f"{folder.parent}: the pair takes {num_bytes / 1e9:.0f} GB, the disk has {free / 1e9:.0f} GB free; "
            "take fewer layers, or a sparse pair"
        )


def _write_group(
    model: _Model, names: tuple[str, ...], base: Mapping[str, TensorRange], ft: Mapping[str, TensorRange]
) -> None:
    """Draws the leaves of one group of tensors and writes them to both models."""
    leaves: dict[str, np.ndarray] = {}
    noisy: dict[str, np.ndarray] = {}
    for name in names:
        layout = model.leaf_layouts[name]
        generator = np.random.Generator(np.random.SFC64([model.recipe.seed, zlib.crc32(name.encode())]))
        drawn, other = draw(layout.unfolded, _distribution(model, name), generator)
        leaves[name], noisy[name] = drawn.transpose(layout.order), other
    _fill(model, leaves, base)
    del drawn, other
    leaves.clear()
    for name in names:
        leaves[name] = _permuted(model, name, noisy.pop(name))
    _fill(model, leaves, ft)


def _fill(model: _Model, leaves: Mapping[str, np.ndarray], ranges: Mapping[str, TensorRange]) -> None:
    for tensor, values in to_tensors(model.leaf_layouts, leaves).items():
        ranges[tensor].fill(values)


def _permuted(model: _Model, name: str, unfolded: np.ndarray) -> np.ndarray:
    """Returns the leaf with its units permuted, moved as stored: transposing first would be slow."""
    order = model.leaf_layouts[name].order
    dims, indices = unit_moves(model.table.leaves[name], model.permutations, model.table.parent_axis)
    dims = tuple((order[dim], None if holder is None else order[holder]) for dim, holder in dims)
    return np.asarray(take_units(unfolded, dims, indices)).transpose(order)


def _distribution(model: _Model, name: str) -> Distribution:
    if not name.endswith("/scale"):
        return Distribution(0.0, model.recipe.std, model.recipe.noise)
    return Distribution(0.0 if model.arch.norm == "rms_unit_offset" else 1.0, _GAIN_STD, model.recipe.noise)


def _num_values(layout: LeafLayout) -> int:
    return int(np.prod(layout.unfolded, dtype=np.int64))
