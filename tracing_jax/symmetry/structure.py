"""Rewrites that change what a model is made of: units and layers that do nothing, and other ids of its tokens."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import Leaf, kind_of
from tracing_jax.symmetry.permutation import take_units, unit_moves
from tracing_jax.symmetry.residual import gain_offset
from tracing_jax.symmetry.rewrite import Part, Read, Rewrite, Weight, rows_of, stream

# Axis kind -> the kind on which its units are silent where what writes it is zero.
_SILENT_ON = {"mlp": "mlp", "embed": "embed", "kv_heads": "v_dim"}

# Units that are taken away again may hold what rounding left in them, relative to the leaf's root mean square.
_NEGLIGIBLE = 1e-2


@dataclass(frozen=True)
class Padding(Rewrite):
    """Zero units are put at the end of an axis or, by a negative number, taken away from there.

    An RMS norm divides by the mean over all features: with D of D' used, gains are multiplied by sqrt(D / D') and eps
    by D / D'.

    Attributes:
      units: how many MLP units of each layer.
      features: how many features of the residual stream.
      kv_heads: how many kv heads of each layer, with their queries.
    """

    name: ClassVar[str] = "pad"
    units: int = 0
    features: int = 0
    kv_heads: int = 0

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Padding":
        """Returns some units, and features and kv heads where the model can have more of them."""
        rng = stream(key, "pad")
        units = int(rng.integers(1, max(1, arch.mlp_dim // 8) + 1))
        kv_heads = int(rng.integers(1, max(1, arch.num_kv_heads // 4) + 1))
        heads = [(arch.num_kv_heads + more) * arch.q_group for more in (0, kv_heads)]
        # Many classes of transformers refuse a width that is no multiple of the heads.
        if _feature_problems(arch):
            fitting = (n for n in range(1, arch.num_kv_heads + 1) if not arch.embed_dim % (heads[0] + n * arch.q_group))
            return cls(units, 0, 0 if _head_problems(arch) else next(fitting, 0))
        heads_after = heads[0] if _head_problems(arch) else heads[1]
        wider = heads_after * math.ceil((arch.embed_dim + arch.embed_dim // 16 + 1) / heads_after)
        return cls(units, wider - arch.embed_dim, (heads_after - heads[0]) // arch.q_group)

    def misfits(self, arch: Arch) -> list[str]:
        after = self.arch_after(arch)
        lines = [] if min(after.mlp_dim, after.embed_dim, after.num_kv_heads) > 0 else ["nothing would be left"]
        lines += _feature_problems(arch) if self.features else []
        return lines + (_head_problems(arch) if self.kv_heads else [])

    def arch_after(self, arch: Arch) -> Arch:
        return replace(
            arch,
            mlp_dim=arch.mlp_dim + self.units,
            embed_dim=arch.embed_dim + self.features,
            num_kv_heads=arch.num_kv_heads + self.kv_heads,
            norm_eps=arch.norm_eps * (arch.embed_dim / (arch.embed_dim + self.features)),
        )

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        before, after = rows_of(prefix, arch), rows_of(prefix, self.arch_after(arch))
        share = math.sqrt(arch.embed_dim / (arch.embed_dim + self.features))
        part = {}
        for name, weight in read(prefix).items():
            row = before.leaves[name]
            if self.features and _is_gain(name, row):
                gain = weight.exact + gain_offset(arch)
                # The feature is zero, so its gain is free; that of the first feature is as plausible as any.
                weight = weight.having(
                    _resized(gain, gain.size + self.features, 0, gain[0]) * share - gain_offset(arch)
                )
            else:
                weight = _with_sizes(weight, prefix + name, row, after.sizes)
            part[name] = weight
        return part

    def inverse(self, arch: Arch) -> "Padding":
        return Padding(-self.units, -self.features, -self.kv_heads)


def _with_sizes(weight: Weight, name: str, row: Leaf, sizes: Mapping[str, int]) -> Weight:
    """Returns the leaf with as many units on each axis: zeros at the end, or its own end taken away."""
    x = weight.values
    for dim, axis in enumerate(row.axes):
        if axis is None or sizes[axis] == x.shape[dim]:
            continue
        if sizes[axis] < x.shape[dim] and _silences(row, axis):
            _check_silent(x, sizes[axis], dim, f"{name} on {axis}")
        x = _resized(x, sizes[axis], dim, 0.0)
    return weight.having(x)


def _check_silent(x: np.ndarray, kept: int, dim: int, where: str) -> None:
    """Checks that a leaf holds next to nothing in the units that are taken away."""
    rest = np.abs(np.take(x, range(kept, x.shape[dim]), axis=dim).astype(np.float64)).max()
    size = math.sqrt(np.square(x.astype(np.float64)).mean())
    if rest > _NEGLIGIBLE * size:
        raise ValueError(
            f"cannot take away units of {where} from number {kept} on: they hold up to {rest:.2g}, at a root mean "
            f"square of {size:.2g}; expected zeros, which make a unit do nothing"
        )


def _silences(row: Leaf, axis: str) -> bool:
    """Says whether zeros in this leaf make a unit of the axis silent."""
    kind = _SILENT_ON.get(kind_of(axis))
    return any(
        side == "writes" and other is not None and kind_of(other) == kind
        for other, side in zip(row.axes, row.sides, strict=True)
    )


def _resized(x: np.ndarray, size: int, dim: int, fill: float) -> np.ndarray:
    """Returns x with so many units along a dimension: new ones hold `fill`, surplus ones are cut off."""
    if size <= x.shape[dim]:
        return np.take(x, range(size), axis=dim)
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return np.concatenate([x, np.full(shape, fill, x.dtype)], axis=dim)


def _is_gain(name: str, row: Leaf) -> bool:
    return name.endswith("norm/scale") and row.axes == ("embed",)


def _feature_problems(arch: Arch) -> list[str]:
    if arch.norm not in ("rms", "rms_unit_offset"):
        return ["features cannot be added: its LayerNorm subtracts the mean of the features, which zeros change"]
    lines = []
    if arch.qk_norm is not None:
        lines.append("features cannot be added: eps would have to change, and the norms of queries and keys share it")
    if math.isclose(arch.embed_scale, math.sqrt(arch.embed_dim), rel_tol=1e-6):
        lines.append("features cannot be added: the scale of its embedding is the root of their number")
    return lines


def _head_problems(arch: Arch) -> list[str]:
    if arch.qk_norm == "all":
        return ["kv heads cannot be added: queries and keys are normalised over all heads together"]
    return []


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
        return []

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
            layer_ropes=_inserted(arch.layer_ropes, self.at, arch.layer_ropes[like]),
            layer_windows=_inserted(arch.layer_windows, self.at, arch.layer_windows[like]),
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
        return [] if arch.num_layers > 1 else ["its only layer cannot be taken out"]

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
            layer_ropes=tuple(arch.layer_ropes[i] for i in without),
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


def _inserted(items: tuple[Any, ...], at: int, item: Any) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at:])


@dataclass(frozen=True, eq=False)
class Renaming(Rewrite):
    """Tokens have other ids; the files of the tokenizer and the ids in the configs must change with them.

    Attributes:
      ids: `new[i] = old[ids[i]]`: the row of the embedding that stands at i afterwards.
    """

    name: ClassVar[str] = "rename"
    ids: Int[np.ndarray, " V"]

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Renaming":
        return cls.among(key, arch, np.arange(arch.vocab_size))

    @classmethod
    def among(cls, key: PRNGKeyArray, arch: Arch, ids: Int[np.ndarray, " N"]) -> "Renaming":
        """Returns a renaming that permutes these ids at random and leaves the others."""
        renamed = np.arange(arch.vocab_size, dtype=np.int32)
        renamed[ids] = stream(key, "vocab").permutation(ids)
        return cls(renamed)

    @staticmethod
    def composed(rewrites: Iterable[Rewrite]) -> Int[np.ndarray, " V"] | None:
        """Returns the new id of each token after all renamings among the rewrites; None if there is none."""
        new_ids = None
        for renaming in (rewrite for rewrite in rewrites if isinstance(rewrite, Renaming)):
            new_ids = renaming.new_ids if new_ids is None else renaming.new_ids[new_ids]
        return new_ids

    @property
    def new_ids(self) -> Int[np.ndarray, " V"]:
        """For each id of before the id that its token has afterwards."""
        return np.argsort(self.ids).astype(np.int32)

    def misfits(self, arch: Arch) -> list[str]:
        fits = self.ids.shape == (arch.vocab_size,) and (np.sort(self.ids) == np.arange(arch.vocab_size)).all()
        return [] if fits else [f"ids are no permutation of the vocabulary's {arch.vocab_size}"]

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        rows, part = rows_of(prefix, arch).leaves, read(prefix)
        moves = {name: unit_moves(rows[name], {"vocab": self.ids}, {}) for name in part}
        return {name: w.having(np.asarray(take_units(w.values, *moves[name]))) for name, w in part.items()}

    def inverse(self, arch: Arch) -> "Renaming":
        return Renaming(self.new_ids)
