"""Safetensors shards that are allocated first and filled in any order; what is never filled stays a hole.

A hole takes no space on disk and reads as zeros, so a model far larger than the disk can be opened and read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ITEM_BYTES = 2  # bfloat16
_ALIGN = 8  # a header is padded to this, as the format asks


@dataclass(frozen=True)
class TensorRange:
    """The bytes of one tensor in a shard."""

    path: Path
    offset: int

    def fill(self, tensor: np.ndarray) -> None:
        """Writes the tensor; several threads may fill one file."""
        with self.path.open("r+b") as file:
            file.seek(self.offset)
            file.write(np.ascontiguousarray(tensor).view(np.uint8).data)


def allocate(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], max_shard_bytes: int = 4 * 2**30
) -> Mapping[str, TensorRange]:
    """Writes shards of bfloat16 zeros, all holes, with their index, and returns the byte range of each tensor."""
    shards = _shards(shapes, max_shard_bytes)
    ranges: dict[str, TensorRange] = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        ranges |= _allocate_shard(folder / name, {tensor: shapes[tensor] for tensor in shard})
    if len(shards) > 1:
        total = sum(_num_bytes(shape) for shape in shapes.values())
        weight_map = {name: place.path.name for name, place in ranges.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return ranges


def _shards(shapes: Mapping[str, tuple[int, ...]], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + _num_bytes(shape) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _num_bytes(shape)
    return shards


def _allocate_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorRange]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name], end = end, end + _num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return {name: TensorRange(path, 8 + len(text) + start) for name, start in starts.items()}


def _num_bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * _ITEM_BYTES
