"""Named tensors of a checkpoint folder, read lazily: opening reads headers, a slice reads the bytes of that slice."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tracing_jax.checkpoint.errors import CheckpointError, damaged
from tracing_jax.checkpoint.foreign_files import foreign_weights, original_format
from tracing_jax.checkpoint.name_patterns import may_be_absent
from tracing_jax.checkpoint.safetensors_file import Index, SafetensorsFile
from tracing_jax.checkpoint.torch_zip import TorchZip
from tracing_jax.error_messages import grouped, listed, shortened


@runtime_checkable
class TensorStore(Protocol):
    """Tensors by their Hugging Face name; arrays are numpy, in the file's layout and dtype (bfloat16 included)."""

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of the tensor `name`."""

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A copy of the tensor `name`, or of its slice (steps of one; missing axes are whole)."""

    def read_many(self, requests: Sequence[tuple[str, Index]]) -> list[np.ndarray]:
        """What `read` returns for each (name, index); from the Hub, with several requests at a time."""

    def read_into(self, out: np.ndarray, name: str, index: Index = ()) -> None:
        """Writes what `read` returns into `out`, a contiguous array of its shape and dtype."""

    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, sorted."""


@runtime_checkable
class PastCache(Protocol):
    """A `TensorStore` that can be read past the page cache."""

    def past_cache(self) -> TensorStore:
        """The same tensors, read past the page cache where that can be."""


def past_cache_of(store: TensorStore) -> TensorStore:
    """Returns the same tensors, read past the page cache where that can be; the store itself where it never can."""
    return store.past_cache() if isinstance(store, PastCache) else store


# The bits of a dtype's exponent, all of which are set in NaN and in the infinities alone.
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}
_CHUNK = 1 << 16  # weights at a time: what is made of them stays in the cache of a core
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(safetensors|bin)")
_PLAIN_NAME = re.compile(r"[\w-][\w.-]{0,200}\.(safetensors|bin)")


MissingFileOpener = Callable[[str], TensorStore | None]
"""Opens a weight file that is not in its folder, by name; None if it is nowhere else either."""


def open_tensors(folder: Path, open_missing: MissingFileOpener = lambda name: None) -> TensorStore:
    """The model weights in `folder`: the file that transformers would load, safetensors before PyTorch's `.bin`.

    A lone safetensors file of any other name is read where there is nothing else, and so is the only shard of a `.bin`.

    Args:
        folder: Of a checkpoint.
        open_missing: Opens safetensors files that the folder lacks.

    Raises:
        CheckpointError: Weights or shards are missing, damaged or contradict their index; all at once.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return open_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _open_sharded(folder / f"{name}.index.json", open_missing)
    loose = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if not loose and (remote := open_missing("model.safetensors")):
        return remote
    loose = loose or sorted(folder.glob("pytorch_model-*.bin"))
    loose = [path for path in loose if original_format(path) is None] or loose
    _refuse_lone_shards(loose)
    if len(loose) == 1:
        return open_file(loose[0])
    if loose:
        index = f"{'model.safetensors' if loose[0].suffix == '.safetensors' else 'pytorch_model.bin'}.index.json"
        raise CheckpointError(f"{folder}: several *{loose[0].suffix} but no {index}; download it too")
    found = foreign_weights(folder) or f"found {listing(folder)}"
    raise CheckpointError(f"{folder}: no weights; expected *.safetensors or pytorch_model*.bin, {found}")


def _refuse_lone_shards(paths: Sequence[Path]) -> None:
    """Raises if a file without an index is one of several by its name, and others are missing."""
    beside = {path.name for path in paths}
    for path, match in ((path, match) for path in paths if (match := _SHARD.fullmatch(path.name))):
        count = int(match["count"])
        shards = (f"{match['stem']}-{i:05d}-of-{count:05d}{path.suffix}" for i in range(1, count + 1))
        if missing := [name for name in shards if name not in beside]:
            raise CheckpointError(
                f"{path} is shard {int(match['number'])} of {count}: {listed(missing, 3)} and the index of the shards "
                f"(*{path.suffix}.index.json) are missing; download them"
            )


def open_file(path: Path) -> TensorStore:
    """The tensors of one file, `*.safetensors` or `*.bin`.

    Raises:
        CheckpointError: The file is damaged, or holds what is not a plain tensor.
    """
    return TorchZip(path) if path.suffix == ".bin" else SafetensorsFile(path)


def all_finite(weights: np.ndarray) -> bool:
    """Returns whether a floating array holds neither NaN nor infinities, in memory that does not grow with it."""
    bits = np.ravel(weights, order="K").view(f"u{weights.dtype.itemsize}")
    mask = bits.dtype.type(_EXPONENT[weights.dtype.name])
    buffer = np.empty(min(_CHUNK, bits.size), bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if np.bitwise_and(chunk, mask, out=buffer[: chunk.size]).max() == mask:
            return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(damaged(path, f"JSON ({type(error).__name__})")) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def listing(folder: Path) -> str:
    """Names of the files in `folder`, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(map(shortened, names[:12])) + more if names else "nothing"


def joined_stores(stores: Sequence[TensorStore]) -> TensorStore:
    """Several stores of tensors of different names as one."""
    return stores[0] if len(stores) == 1 else _Sharded(stores)


class _Sharded:
    """Several files as one store."""

    def __init__(self, shards: Sequence[TensorStore]):
        self._owner: Mapping[str, TensorStore] = {name: shard for shard in shards for name in shard.names()}
        self._files = tuple(sorted(path for shard in shards for path in shard.files()))

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._owner))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owner[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._owner[name].dtype(name)

    def files(self) -> tuple[Path, ...]:
        return self._files

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._owner[name].read(name, index)

    def read_many(self, requests: Sequence[tuple[str, Index]]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for shard in {id(self._owner[name]): self._owner[name] for name, _ in requests}.values():
            places = [i for i, (name, _) in enumerate(requests) if self._owner[name] is shard]
            found |= zip(places, shard.read_many([requests[i] for i in places]), strict=True)
        return [found[i] for i in range(len(requests))]

    def read_into(self, out: np.ndarray, name: str, index: Index = ()) -> None:
        self._owner[name].read_into(out, name, index)

    def past_cache(self) -> TensorStore:
        shards = {id(shard): shard for shard in self._owner.values()}.values()
        return _Sharded([past_cache_of(shard) for shard in shards])


def _open_sharded(index_path: Path, open_missing: MissingFileOpener = lambda name: None) -> TensorStore:
    """All shards that an index names, with exactly the tensors it lists, where it lists them."""
    listed_in = weight_map(index_path)
    shards: list[TensorStore] = []
    problems = []
    for file_name in sorted(set(listed_in.values())):
        path = index_path.parent / file_name
        try:
            shard = open_file(path) if path.is_file() else open_missing(file_name)
            if shard is None:
                problems.append(f"{path}: missing, though {index_path.name} names it; download it")
                continue
            shards.append(shard)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        absent = sorted({name for name, owner in listed_in.items() if owner == file_name} - set(shards[-1].names()))
        problems.extend(
            f"{path}: lacks {name!r}, which {index_path.name} lists; download both"
            for name in absent
            if not may_be_absent(name)  # what cannot be derived after all is missed when the model is put together
        )
    held = Counter(name for shard in shards for name in shard.names())
    problems.extend(f"{index_path.parent}: {name!r} is in {n} shards" for name, n in held.items() if n > 1)
    if problems:
        raise CheckpointError(*grouped(problems))
    return joined_stores(shards)


def names_in_index(folder: Path) -> frozenset[str]:
    """The tensors that the index of a folder's weights names; none if the weights are one file."""
    indices = (folder / f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin"))
    return frozenset(name for index in indices if index.is_file() for name in weight_map(index))


def weight_map(index_path: Path) -> dict[str, str]:
    """File of every tensor. Only plain names are followed: an index must not lead out of its folder.

    Raises:
        CheckpointError: The index is no such file, or names one that is not plain.
    """
    found = read_json(index_path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index_path}: no weight_map from tensor to file; download it again")
    strange = [file for file in found.values() if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file)]
    if strange:
        raise CheckpointError(f"{index_path}: {shortened(repr(strange[0]))} is no name of a weight file in this folder")
    return found
