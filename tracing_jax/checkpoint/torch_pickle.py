"""The tensors that a `torch.save` pickle describes, read without unpickling it.

A pickle is a program for a stack machine, and `pickle.Unpickler` can call whatever it names. This interpreter supports
only the opcodes that a flat state dict needs and calls nothing: names resolve to inert `_Global` markers, and the four
constructors of a state dict are patterns over plain data. What is not listed is refused.
"""

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tracing_jax.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class Storage:
    """A run of `numel` elements in the archive's record `data/<key>`."""

    dtype: np.dtype
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class SavedTensor:
    """A strided view of a storage; `offset` and `strides` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asked for: `module name`, as the opcode spells it."""

    name: str


_DTYPES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_ORDERED_DICT = "collections OrderedDict"
_SIZE = "torch Size"
_PARAMETER = "torch._utils _rebuild_parameter"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_ADMITTED = {*_DTYPES, _ORDERED_DICT, _SIZE, _PARAMETER, _TENSOR}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_MARK = object()
_MAX_DIMS = 16
_MAX_REPEATED = 1 << 20  # elements of an expanded tensor; a larger one would take memory that no file has


def saved_tensors(pickle: bytes) -> dict[str, SavedTensor]:
    """Tensors by name, as the state dict in `pickle` describes them; nothing is imported, called or executed.

    Raises:
        CheckpointError: The pickle asks for anything but tensors, or is no flat dict of them.
    """
    try:
        state = _run(pickle)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"its pickle is corrupt ({type(error).__name__}); download it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"holds a {type(state).__name__}, expected a state dict: names and their tensors")
    others = [f"{name!r} ({_kind(value)})" for name, value in state.items() if not isinstance(value, SavedTensor)]
    if others:
        raise CheckpointError(
            f"not a flat state dict, these entries are no tensors: {', '.join(others[:5])}; "
            "save only the model's state dict, as safetensors"
        )
    return state


def _kind(value: object) -> str:
    return "nested dict" if isinstance(value, dict) else type(value).__name__


def _run(pickle: bytes) -> object:
    """The object on top of the stack at STOP. Values are compared by type alone: shared nesting must cost nothing."""
    stack: list = []
    memo: dict[Any, Any] = {}  # a dict, so that a huge memo index allocates nothing
    reader = io.BytesIO(pickle)
    while True:
        code = reader.read(1)
        opcode = _OPCODES.get(code)
        match opcode.name if opcode else f"{code!r}":
            case "PROTO" | "FRAME":
                _argument(opcode, reader)
            case "STOP":
                return stack[-1]
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code == b"\x88")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(_argument(opcode, reader))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(_argument(opcode, reader))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, code[0] - 0x84)))
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "APPEND":
                (item,) = _pop(stack, 1)
                list.append(stack[-1], item)
            case "APPENDS":
                items = _pop_to_mark(stack)
                list.extend(stack[-1], items)
            case "SETITEM":
                _set_items(_pop(stack, 2), stack[-1])
            case "SETITEMS":
                _set_items(_pop_to_mark(stack), stack[-1])
            case "BINPUT" | "LONG_BINPUT":
                memo[_argument(opcode, reader)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[_argument(opcode, reader)])
            case "GLOBAL":
                stack.append(_admit(f"{_line(reader)} {_line(reader)}"))
            case "STACK_GLOBAL":
                stack.append(_admit("{} {}".format(*map(_text, _pop(stack, 2)))))
            case "BINPERSID":
                stack.append(_storage(*_pop(stack, 1)))
            case "REDUCE":
                stack.append(_construct(*_pop(stack, 2)))
            case "BUILD":
                (attributes,) = _pop(stack, 1)
                _check_attributes(stack[-1], attributes)
            case name:
                raise CheckpointError(f"its pickle uses the opcode {name}, which no state dict needs: do not trust it")


def _argument(opcode: pickletools.OpcodeInfo | None, reader: io.BytesIO) -> Any:
    """Read only once the opcode is known to be admitted."""
    return opcode.arg.reader(reader) if opcode and opcode.arg else None


def _line(reader: io.BytesIO) -> str:
    return reader.readline().decode("ascii").removesuffix("\n")


def _pop(stack: list, count: int) -> list:
    if len(stack) < count:
        raise IndexError("stack underflow")
    items = stack[-count:]
    del stack[-count:]
    return items


def _pop_to_mark(stack: list) -> list:
    for start in reversed(range(len(stack))):
        if stack[start] is _MARK:
            return _pop(stack, len(stack) - start)[1:]
    raise IndexError("no mark on the stack")


def _set_items(items: list, target: dict) -> None:
    """Keys must be text: hashing a deeply shared tuple would take for ever."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        dict.__setitem__(target, _text(key), value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    return value


def _admit(name: str) -> _Global:
    if name not in _ADMITTED:
        raise CheckpointError(
            f"its pickle asks for {name.replace(' ', '.', 1)!r}, which is no part of a plain tensor; nothing was "
            "executed. If you trust its author, load it with PyTorch and save it again as safetensors"
        )
    return _Global(name)


def _storage(persistent_id: object) -> Storage:
    match persistent_id:
        case ("storage", _Global(name), str(key), str(), int(numel)) if name in _DTYPES and numel >= 0:
            return Storage(_DTYPES[name], key, numel)
    raise TypeError("persistent id is no storage")


def _construct(function: object, args: object) -> object:
    """What one of the four constructors of a state dict would build, given plain data of the expected types only."""
    match function, args:
        case _Global(name), () if name == _ORDERED_DICT:
            return {}
        case _Global(name), (tuple(size),) if name == _SIZE:
            return size
        case _Global(name), (SavedTensor() as tensor, bool(), dict(hooks)) if name == _PARAMETER and not hooks:
            return tensor
        case _Global(name), (Storage() as storage, int(offset), tuple(size), tuple(strides), bool(), dict(hooks)) if (
            name == _TENSOR and not hooks
        ):
            return _tensor(storage, offset, size, strides)
        case _Global(name), _:
            raise CheckpointError(
                f"its pickle calls {name.replace(' ', '.', 1)!r} in a form that plain tensors do not need (hooks, or "
                "negated and conjugated views); save it again as safetensors"
            )
    raise TypeError("call of a value")


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple) -> SavedTensor:
    """A view whose every element is within its storage."""
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
        raise TypeError("offset, shape and strides must be non-negative integers")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMS:
        raise ValueError("shape and strides disagree")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if 0 not in shape and last >= storage.numel:
        raise CheckpointError(
            f"a tensor of shape {shape} reaches element {last} of storage {storage.key!r}, which has {storage.numel}; "
            "do not trust this file"
        )
    if math.prod(shape) > max(storage.numel, _MAX_REPEATED):
        raise CheckpointError(
            f"a tensor of shape {shape} repeats the {storage.numel} elements of storage {storage.key!r}; do not trust "
            "this file"
        )
    return SavedTensor(storage, offset, shape, strides)


def _check_attributes(target: object, attributes: object) -> None:
    """Attributes are dropped: PyTorch attaches version numbers (`_metadata`) to the state dict, and no weight."""
    if not isinstance(target, dict) or not isinstance(attributes, dict):
        raise CheckpointError("its pickle sets attributes on something that is no state dict; do not trust it")
