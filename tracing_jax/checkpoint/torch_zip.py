"""PyTorch's `.bin` files (torch.save, zip format) as lazily read tensors, without PyTorch.

Such a file is a zip of `<top>/data.pkl`, which names the tensors, and of one uncompressed record per storage. Only the
pickle is read on opening (see `torch_pickle`); a tensor is then memory-mapped from its record.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tracing_jax.checkpoint.errors import CheckpointError, damaged
from tracing_jax.checkpoint.torch_pickle import Storage, saved_tensors

_MAX_PICKLE_BYTES = 256 << 20  # a hundred bytes a tensor are usual; a compressed one could unpack to anything
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of an entry: signature, ..., lengths of the name and extra field behind it
# What zipfile raises on damaged directories and entries; some are seeks to impossible places.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    OverflowError,
)
_ENCRYPTED = 0x1  # bit of an entry's flags


@dataclass(frozen=True)
class _Record:
    """The position of a storage in the file; `start_byte` is None where it is compressed."""

    entry: zipfile.ZipInfo
    start_byte: int | None


class TorchZip:
    """A lazy `TensorStore` over one zip file of torch.save."""

    def __init__(self, path: Path):
        """Reads the file's directory and pickle, and checks every tensor against its record.

        Raises:
            CheckpointError: The file is damaged, of the old format, or holds anything but a flat dict of tensors.
        """
        self._path = path
        if not zipfile.is_zipfile(path):
            raise CheckpointError(_why_no_zip(path))
        try:
            with zipfile.ZipFile(path) as archive:
                top = _top(archive)
                self._tensors = saved_tensors(_read_small(archive, f"{top}/data.pkl"))
                entries = {info.filename.removeprefix(f"{top}/data/"): info for info in archive.infolist()}
            self._records = _find_records(path, entries, [tensor.storage for tensor in self._tensors.values()])
        except CheckpointError as error:
            raise CheckpointError(*(f"{path}: {problem}" for problem in error.problems)) from error
        except _ZIP_ERRORS as error:
            raise CheckpointError(damaged(path, f"a zip file of torch.save ({error})")) from error

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of the tensor `name`."""
        return self._tensors[name].storage.dtype

    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self._path,)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A copy of the tensor `name`, or of its slice; other parts of the file are not touched."""
        return np.array(self._view(name)[index], order="C")

    def read_many(self, requests: Sequence[tuple[str, tuple[slice, ...]]]) -> list[np.ndarray]:
        """What `read` returns for each (name, index)."""
        return [self.read(name, index) for name, index in requests]

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...] = ()) -> None:
        """Writes what `read` returns into `out`."""
        out[...] = self._view(name)[index]

    def _view(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, tensor.storage.dtype)
        itemsize = tensor.storage.dtype.itemsize
        return np.ndarray(
            tensor.shape,
            tensor.storage.dtype,
            self._record(tensor.storage),
            tensor.offset * itemsize,
            tuple(stride * itemsize for stride in tensor.strides),
        )

    def _record(self, storage: Storage) -> np.ndarray:
        """Bytes of a storage: mapped where stored plain, unpacked where compressed."""
        record = self._records[storage.key]
        if record.start_byte is not None:
            return np.memmap(self._path, np.uint8, "r", record.start_byte, (storage.nbytes,))
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(record.entry) as file:
                content = file.read(storage.nbytes)
        except _ZIP_ERRORS as error:
            raise CheckpointError(damaged(self._path, f"an intact record {record.entry.filename!r}")) from error
        if len(content) < storage.nbytes:
            raise CheckpointError(damaged(self._path, f"{storage.nbytes} bytes in {record.entry.filename!r}"))
        return np.frombuffer(content, np.uint8)


def _why_no_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512)
    if start[:1] == b"\x80" or start[257:262] == b"ustar":
        return (
            f"{path}: the format of PyTorch before 1.6, which cannot be read without executing it; if you trust its "
            "author, load it with PyTorch and save it again as safetensors"
        )
    return damaged(path, "a zip file of torch.save")


def _top(archive: zipfile.ZipFile) -> str:
    """Name of the folder that holds everything, after checks of what concerns the archive as a whole."""
    for entry in archive.infolist():
        if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(
                f"its entry {entry.filename!r} is encrypted or of an unknown compression; do not trust it"
            )
    tops = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(tops) != 1:
        raise CheckpointError(f"holds {len(tops)} entries <top>/data.pkl, torch.save writes one")
    byteorder = f"{tops[0]}/byteorder"
    if byteorder in archive.namelist() and _read_small(archive, byteorder) != b"little":
        raise CheckpointError("not little-endian, which is all that is read here; save it again as safetensors")
    return tops[0]


def _read_small(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > _MAX_PICKLE_BYTES:
        raise CheckpointError(f"{name!r} would unpack to {size} bytes, where a state dict needs a hundred per tensor")
    return archive.read(name)


def _find_records(path: Path, entries: dict[str, zipfile.ZipInfo], storages: list[Storage]) -> dict[str, _Record]:
    """Record of every storage, known to be as long as the pickle says and to be within the file."""
    records: dict[str, _Record] = {}
    problems = set()
    with path.open("rb") as file:
        for storage in storages:
            entry = entries.get(storage.key)
            if entry is None:
                problems.add(f"its record 'data/{storage.key}' is missing; download it again")
            elif entry.file_size < storage.nbytes:
                problems.add(f"its record 'data/{storage.key}' has {entry.file_size} bytes, expected {storage.nbytes}")
            elif storage.key not in records:
                records[storage.key] = _locate(file, entry)
    if problems:
        raise CheckpointError(*sorted(problems))
    return records


def _locate(file: BinaryIO, entry: zipfile.ZipInfo) -> _Record:
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        return _Record(entry, None)
    file.seek(entry.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\3\4" or start + entry.file_size > file.seek(0, os.SEEK_END):
        raise CheckpointError(f"its record {entry.filename!r} is outside the file; download it again")
    return _Record(entry, start)
