"""torch.save files written opcode by opcode, without torch: sound ones, and ones that torch would never write."""

import zipfile
from pathlib import Path

import numpy as np

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def pack(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(kind: str, key: str, numel: int) -> bytes:
    return pack(text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(stored: bytes, offset: bytes, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    sizes, steps = pack(*map(number, shape)), pack(*map(number, strides))
    hooks = name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + pack(stored, offset, sizes, steps, b"\x89", hooks) + b"R"


def state_dict(entries: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u."


def array(key: str, values: np.ndarray) -> bytes:
    """A contiguous tensor that fills the storage `key`."""
    strides = tuple(step // values.itemsize for step in values.strides)
    return tensor(storage(KINDS[values.dtype.name], key, values.size), number(0), values.shape, strides)


def write(
    path: Path, pickle: bytes, records: dict[str, bytes], byteorder: str = "little", compress: bool = False
) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", pickle)
        archive.writestr("model/byteorder", byteorder)
        for key, content in records.items():
            archive.writestr(f"model/data/{key}", content)
    return path


def write_arrays(path: Path, arrays: dict[str, np.ndarray], **options: bool) -> Path:
    pickle = state_dict({name: array(str(i), values) for i, (name, values) in enumerate(arrays.items())})
    return write(path, pickle, {str(i): values.tobytes() for i, values in enumerate(arrays.values())}, **options)
