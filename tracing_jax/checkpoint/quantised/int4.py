"""Weights of 2 to 8 bits with a scale and a zero point for each group of inputs: GPTQ and AWQ.

Source: Frantar et al., GPTQ (arXiv 2210.17323), and the layout of AutoGPTQ; Lin et al., AWQ (arXiv 2306.00978), and the
layouts of its GEMM and GEMV kernels in AutoAWQ. A weight is `scale * (q - zero)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tracing_jax.checkpoint.quantised.found import Found, QuantisedError
from tracing_jax.checkpoint.quantised.left_over import method_of
from tracing_jax.checkpoint.quantised.packing import period, scale_bounds, scale_of_each, unpacked, words_of
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import listed_and

GPTQ_BITS, AWQ_VERSIONS = (2, 3, 4, 8), ("gemm", "gemv")
"""What is read of each format."""

_AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_round:gptqmodel": "gptq",
    "auto_round:auto_awq": "awq", "auto_round:awq": "awq",
}  # fmt: skip
"""Packing of AutoRound -> the method whose layout it is; of GPTQ the first version, with one less than a zero point."""

_FLOAT32 = np.dtype(np.float32)
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Place in a word of each of its eight columns: evens and odds are interleaved for the GPU."""


@dataclass(frozen=True)
class Gptq:
    """A weight `[out, in]`, stored as words `[in * bits / 32, out]` that hold inputs one after another.

    Attributes:
      store: the tensors of the file.
      stem: of the names `qweight`, `qzeros`, `scales` and `g_idx`.
      bits: of a weight.
      group_size: inputs that share a scale, where there is no `g_idx`.
      zero_offset: what is added to a stored zero point: 1 in the first version of the format, which stores one less.
      has_groups: whether `g_idx` gives the group of each input.
    """

    store: TensorStore
    stem: str
    bits: int
    group_size: int
    zero_offset: int
    has_groups: bool
    dtype: ClassVar[np.dtype] = _FLOAT32

    @property
    def shape(self) -> tuple[int, ...]:
        words, out = self.store.shape(f"{self.stem}qweight")
        return out, words * 32 // self.bits

    def read(self, index: Index = ()) -> np.ndarray:
        rows, inputs = bounds_of(index, self.shape)
        words, within = words_of(inputs, *period(self.bits))
        values = unpacked(self.store.read(f"{self.stem}qweight", (words, rows)), self.bits, 0)[within]
        groups = self._groups(inputs)
        zero_words, zeros_within = words_of(rows, *period(self.bits))
        zeros = unpacked(self.store.read(f"{self.stem}qzeros", (slice(None), zero_words)), self.bits, 1)
        zeros = (zeros[:, zeros_within] + self.zero_offset) & ((1 << self.bits) - 1)
        scales = self.store.read(f"{self.stem}scales", (slice(None), rows)).astype(np.float32)
        return np.ascontiguousarray((scales[groups] * (values - zeros[groups]).astype(np.float32)).T)

    def _groups(self, inputs: slice) -> np.ndarray:
        """Returns the group of each input, which `g_idx` gives where inputs were sorted by importance."""
        if self.has_groups:
            return groups_of(self.store, f"{self.stem}g_idx", inputs, self.store.shape(f"{self.stem}scales")[0])
        return np.arange(inputs.start, inputs.stop) // self.group_size


def groups_of(store: TensorStore, name: str, inputs: slice, count: int) -> np.ndarray:
    """Returns the stored group of each input, of so many groups.

    Raises:
      QuantisedError: there are no such groups.
    """
    found = store.read(name, (inputs,)).astype(np.int64)
    if found.size and not 0 <= found.min() <= found.max() < count:
        raise QuantisedError(f"{name} holds groups {found.min()} to {found.max()}, expected 0 to {count - 1}")
    return found


@dataclass(frozen=True)
class Awq:
    """A weight `[out, in]`, stored as words `[in, out / 8]` that hold outputs, in the order of the GEMM kernel."""

    store: TensorStore
    stem: str
    group_size: int
    dtype: ClassVar[np.dtype] = _FLOAT32

    @property
    def shape(self) -> tuple[int, ...]:
        inputs, words = self.store.shape(f"{self.stem}qweight")
        return words * 8, inputs

    def read(self, index: Index = ()) -> np.ndarray:
        rows, inputs = bounds_of(index, self.shape)
        words, within = words_of(rows, 8)
        values = _in_order(self.store.read(f"{self.stem}qweight", (inputs, words)))[:, within]
        groups = scale_bounds((inputs,), (self.group_size,))[0]
        zeros = _in_order(self.store.read(f"{self.stem}qzeros", (groups, words)))[:, within]
        scales = self.store.read(f"{self.stem}scales", (groups, rows)).astype(np.float32)
        zeros, scales = (scale_of_each(a, (inputs, rows), (self.group_size, 1)) for a in (zeros, scales))
        return np.ascontiguousarray((scales * (values - zeros).astype(np.float32)).T)


@dataclass(frozen=True)
class AwqGemv:
    """A weight `[out, in]`, stored as words `[out, in / 8]` that hold inputs in their order.

    Scales `[out, 8 Z]` and words of zero points `[out, Z]` are of groups of inputs, padded for the GPU.
    """

    store: TensorStore
    stem: str
    group_size: int
    dtype: ClassVar[np.dtype] = _FLOAT32

    @property
    def shape(self) -> tuple[int, ...]:
        out, words = self.store.shape(f"{self.stem}qweight")
        return out, words * 8

    def read(self, index: Index = ()) -> np.ndarray:
        rows, inputs = bounds_of(index, self.shape)
        words, within = words_of(inputs, 8)
        values = unpacked(self.store.read(f"{self.stem}qweight", (rows, words)), 4, 1)[:, within]
        groups = scale_bounds((inputs,), (self.group_size,))[0]
        zero_words, zeros_within = words_of(groups, 8)
        zeros = unpacked(self.store.read(f"{self.stem}qzeros", (rows, zero_words)), 4, 1)[:, zeros_within]
        scales = self.store.read(f"{self.stem}scales", (rows, groups)).astype(np.float32)
        # The group of each input; `scale_of_each` takes one scale for the whole axis, which one of padded ones is not.
        of_input = np.arange(inputs.start, inputs.stop) // self.group_size - groups.start
        return scales[:, of_input] * (values - zeros[:, of_input]).astype(np.float32)


def _in_order(words: np.ndarray) -> np.ndarray:
    values = unpacked(words, 4, -1)
    by_word = values.reshape(*values.shape[:-1], values.shape[-1] // 8, 8)
    return by_word[..., _AWQ_ORDER].reshape(values.shape)


def find_gptq_or_awq(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the weights that are stored as `qweight`, `qzeros` and `scales`.

    Raises:
      QuantisedError: the config does not say of which kind, or a kind that is not read.
    """
    stems = [name.removesuffix("qweight") for name in store.names() if name.endswith(".qweight")]
    if not stems:
        return Found("GPTQ")
    method = str(settings.get("quant_method") or "").lower()
    if method == "auto-round":
        method = _AUTO_ROUND.get(str(settings.get("packing_format")), method_of(settings) or method)
    if method not in ("gptq", "awq"):
        raise QuantisedError(f"qweight by the method {method!r}: GPTQ and AWQ are read; use the original checkpoint")
    return _find_awq(store, settings, stems) if method == "awq" else _find_gptq(store, settings, stems)


def _find_gptq(store: TensorStore, settings: Mapping[str, Any], stems: list[str]) -> Found:
    found, names = Found("GPTQ"), set(store.names())
    bits = settings.get("bits")
    if bits not in GPTQ_BITS:
        raise QuantisedError(f"GPTQ with {bits} bits: {listed_and(GPTQ_BITS)} are read; use the original checkpoint")
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    for stem in stems:
        require(names, stem, ("qzeros", "scales"))
        words, out = store.shape(f"{stem}qweight")
        if words % period(bits)[1]:
            raise QuantisedError(f"{stem}qweight has {words} rows of words, expected a multiple of {period(bits)[1]}")
        inputs, groups = words * 32 // bits, store.shape(f"{stem}scales")[0]
        tensor = Gptq(store, stem, bits, -(-inputs // max(groups, 1)), offset, f"{stem}g_idx" in names)
        expect_shape(store, f"{stem}scales", (groups, out))
        expect_shape(store, f"{stem}qzeros", (groups, out * bits // 32))
        if f"{stem}g_idx" in names:
            expect_shape(store, f"{stem}g_idx", (inputs,))
        found.add(f"{stem}weight", tensor, *({stem + part for part in _GPTQ_PARTS} & names))
        if f"{stem}bias" in names:
            _drop_empty_bias(store, f"{stem}bias", found)
    return found


_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _drop_empty_bias(store: TensorStore, bias: str, found: Found) -> None:
    """Leaves out a bias of zeros, which AutoGPTQ writes for layers that have none."""
    if len(store.shape(bias)) == 1 and not store.read(bias).astype(np.float32).any():
        found.used.add(bias)


def _find_awq(store: TensorStore, settings: Mapping[str, Any], stems: list[str]) -> Found:
    found, names = Found("AWQ"), set(store.names())
    version, bits = str(settings.get("version") or "gemm").lower(), settings.get("bits", 4)
    if version not in AWQ_VERSIONS or bits != 4:
        raise QuantisedError(f"AWQ of version {version} with {bits} bits: {listed_and(AWQ_VERSIONS)} with 4 are read")
    for stem in stems:
        require(names, stem, ("qzeros", "scales"))
        if version == "gemv":
            found.add(f"{stem}weight", _awq_gemv(store, settings, stem), *(stem + part for part in _AWQ_PARTS))
            continue
        inputs, words = store.shape(f"{stem}qweight")
        groups = store.shape(f"{stem}scales")[0]
        if not groups or inputs % groups:
            raise QuantisedError(f"{stem}scales has {groups} groups of {inputs} inputs")
        expect_shape(store, f"{stem}scales", (groups, words * 8))
        expect_shape(store, f"{stem}qzeros", (groups, words))
        tensor = Awq(store, stem, inputs // groups)
        found.add(f"{stem}weight", tensor, *(stem + part for part in _AWQ_PARTS))
    return found


_AWQ_PARTS = ("qweight", "qzeros", "scales")


def _awq_gemv(store: TensorStore, settings: Mapping[str, Any], stem: str) -> AwqGemv:
    """Returns a weight in the layout of the GEMV kernel, whose scales do not determine the size of a group."""
    (out, words), given = store.shape(f"{stem}qweight"), settings.get("group_size")
    size = 8 * words if given == -1 else given
    if not isinstance(size, int) or size < 1 or 8 * words % size:
        raise QuantisedError(f"group_size {given!r} does not divide the {8 * words} inputs of {stem}qweight")
    padded = store.shape(f"{stem}qzeros")[1]
    if 8 * padded < 8 * words // size:
        raise QuantisedError(f"{stem}qzeros holds {8 * padded} zero points of {8 * words // size} groups")
    expect_shape(store, f"{stem}qzeros", (out, padded))
    expect_shape(store, f"{stem}scales", (out, 8 * padded))
    return AwqGemv(store, stem, size)


def require(names: set[str], stem: str, parts: tuple[str, ...]) -> None:
    """Raises a `QuantisedError` if parts of a weight are missing."""
    if missing := [stem + part for part in parts if stem + part not in names]:
        raise QuantisedError(f"missing {', '.join(missing)}, without which {stem} cannot be dequantised")


def expect_shape(store: TensorStore, name: str, shape: tuple[int, ...]) -> None:
    """Raises a `QuantisedError` if a part of a weight has another shape."""
    if store.shape(name) != shape:
        raise QuantisedError(f"{name} has shape {store.shape(name)}, expected {shape}")
