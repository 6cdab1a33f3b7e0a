"""Layers that add nothing to the residual stream: put in, or taken out."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import Leaf
from tracing_jax.rewrites.rewrite import Part, Read, Rewrite, rows_of, stream


@dataclass(frozen=True)
class IdentityLayer(Rewrite):
    """A layer that adds nothing to the residual stream: a copy of another whose outputs are zero.

    Attributes:
      at: its index; the layers from there on move up by one. It copies the one that stood there, or the last.
    """

    name: ClassVar[str] = "identity"
    at: int

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return _scale_problems(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "IdentityLayer":
        return cls(int(stream(key, "identity").integers(arch.num_layers + 1)))

    def misfits(self, arch: Arch) -> list[str]:
        inside = 0 <= self.at <= arch.num_layers
        return [] if inside else [f"no place {self.at} among {arch.num_layers} layers; it is 0..{arch.num_layers}"]

    def arch_after(self, arch: Arch) -> Arch:
        like = self._like(arch)
        return replace(
            arch,
            num_layers=arch.num_layers + 1,
            layer_ropes=_with_copy(arch.layer_ropes, self.at, like),
            layer_windows=_with_copy(arch.layer_windows, self.at, like),
        )

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        index = _layer_index(prefix)
        if index is None or index < self.at:
            return read(prefix)
        if index > self.at:
            return read(f"layers/{index - 1}/")
        prefix = f"layers/{self._like(arch)}/"
        rows, part = rows_of(prefix, arch).leaves, read(prefix)
        silent = {name for name in part if _writes_stream(rows[name])}
        return {name: w.having(np.zeros_like(w.values)) if name in silent else w for name, w in part.items()}

    def inverse(self, arch: Arch) -> "LayerRemoval":
        return LayerRemoval(self.at)

    def _like(self, arch: Arch) -> int:
        return min(self.at, arch.num_layers - 1)


@dataclass(frozen=True)
class LayerRemoval(Rewrite):
    """A layer that adds nothing to the residual stream is taken out.

    Attributes:
      at: its index. Every weight that it writes to the residual stream with must be zero.
    """

    name: ClassVar[str] = "remove"
    at: int

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return _scale_problems(arch) + ([] if arch.num_layers > 1 else ["its only layer cannot be taken out"])

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "LayerRemoval":
        """Raises ValueError: which layer does nothing is a matter of the weights."""
        raise ValueError("which layer can be taken out is not to be drawn; it is the one that adds nothing")

    def misfits(self, arch: Arch) -> list[str]:
        return [] if 0 <= self.at < arch.num_layers else [f"no layer {self.at} among {arch.num_layers}"]

    def arch_after(self, arch: Arch) -> Arch:
        without = [i for i in range(arch.num_layers) if i != self.at]
        return replace(
            arch,
            num_layers=len(without),
            layer_ropes=tuple(arch.layer_ropes[i] for i in without if arch.layer_ropes),
            layer_windows=tuple(arch.layer_windows[i] for i in without),
        )

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        index = _layer_index(prefix)
        if index is None or index < self.at:
            if index is None and prefix == "embed/":
                self._check(read, arch)
            return read(prefix)
        return read(f"layers/{index + 1}/")

    def _check(self, read: Read, arch: Arch) -> None:
        prefix = f"layers/{self.at}/"
        rows = rows_of(prefix, arch).leaves
        loud = [name for name, weight in read(prefix).items() if _writes_stream(rows[name]) and weight.values.any()]
        if loud:
            raise ValueError(
                f"cannot take out layer {self.at}: {', '.join(loud)} are not zero, so that it adds to the stream"
            )


def _layer_index(prefix: str) -> int | None:
    return int(prefix.split("/")[1]) if prefix.startswith("layers/") else None


def _writes_stream(row: Leaf) -> bool:
    return any(axis == "embed" and side == "writes" for axis, side in zip(row.axes, row.sides, strict=True))


def _with_copy(items: tuple[Any, ...], at: int, like: int) -> tuple[Any, ...]:
    """Returns the facts of layers with a copy of one of them put in; a model without ropes has none of these."""
    return (*items[:at], items[like], *items[at:]) if items else ()


def _scale_problems(arch: Arch) -> list[str]:
    return ["its layers scale their attention by their number"] if arch.inverse_layer_scale else []
