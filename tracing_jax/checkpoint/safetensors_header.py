"""The header of a safetensors file, checked: what it says of every tensor agrees with itself and with the others."""

import json
import math
from collections import Counter
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from tracing_jax.error_messages import counted, listed, shortened

MAX_HEADER_BYTES = 100_000_000  # the limit of the format

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_MAX_SIZE = 1 << 62
_MAX_TENSORS = 300_000  # of one file: three times as many as the largest mixtures of experts have in all


class HeaderError(ValueError):
    """What is wrong with a header; `is_unsupported` where the file may be whole, and holds what is not read."""

    def __init__(self, problem: str, is_unsupported: bool = False):
        super().__init__(problem)
        self.is_unsupported = is_unsupported


class StoredTensor(NamedTuple):
    """A tensor of a file; its bytes are those from `start` to `stop` behind the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(text: bytes) -> dict[str, StoredTensor]:
    """Returns the tensors of a header by name: each as long as its shape says, all side by side without gaps.

    Raises:
      HeaderError: it is no such header, or names a dtype that is not read.
    """
    if (count := text.count(b'"dtype"')) > _MAX_TENSORS:
        raise HeaderError(f"its header lists {count} tensors, more than {_MAX_TENSORS}", True)
    try:
        header = json.loads(text, object_pairs_hook=_compact)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is no JSON: {type(error).__name__}") from None
    if not isinstance(header, dict):
        raise HeaderError("its header is no JSON object")
    header.pop("__metadata__", None)
    others = [name for name, tensor in header.items() if not isinstance(tensor, _Entry)]
    if others:
        raise HeaderError(f"its header has no dtype, shape and offsets for {listed(map(repr, others), 3)}")
    unknown = {name: tensor.dtype for name, tensor in header.items() if tensor.dtype not in _DTYPES}
    if unknown:
        kinds, first = listed(sorted(set(unknown.values()))), shortened(repr(next(iter(unknown))))
        many = counted(len(unknown), "tensor", "tensors")
        raise HeaderError(f"{many} of dtype {kinds}, {first} first: not read; use the original checkpoint", True)
    tensors = {name: _stored(name, tensor) for name, tensor in header.items()}
    _check_side_by_side(tensors)
    return tensors


class _Entry(NamedTuple):
    dtype: str
    shape: list[Any]
    data_offsets: list[Any]


_KEYS = set(_Entry._fields)


def _compact(pairs: list[tuple[str, Any]]) -> Any:
    """Returns a JSON object as an entry, in a tenth of its memory, or as a dict; no key may be there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise HeaderError(f"its header has {shortened(repr(twice))} twice")
    if found.keys() == _KEYS and isinstance(found["dtype"], str):
        shape, offsets = found["shape"], found["data_offsets"]
        if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2:
            return _Entry(found["dtype"], shape, offsets)
    return found


def _stored(name: str, entry: _Entry) -> StoredTensor:
    dtype, sizes = _DTYPES[entry.dtype], (*entry.shape, *entry.data_offsets)
    if not all(type(size) is int and 0 <= size < _MAX_SIZE for size in sizes) or len(entry.shape) > 64:
        raise HeaderError(f"shape or offsets of {shortened(repr(name))} are no sizes")
    start, stop = entry.data_offsets
    if stop - start != math.prod(entry.shape) * dtype.itemsize:
        raise HeaderError(
            f"{shortened(repr(name))} has {stop - start} bytes, its shape {shortened(entry.shape)} and dtype "
            f"{entry.dtype} ask for {shortened(math.prod(entry.shape) * dtype.itemsize)}"
        )
    return StoredTensor(dtype, tuple(entry.shape), start, stop)


def _check_side_by_side(tensors: dict[str, StoredTensor]) -> None:
    end = 0
    for name in sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].stop)):
        if tensors[name].start != end:
            kind = "overlaps the one before it" if tensors[name].start < end else "leaves a gap before it"
            raise HeaderError(f"{shortened(repr(name))} {kind}")
        end = tensors[name].stop
