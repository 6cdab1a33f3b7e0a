"""Units that do nothing, at the end of an axis: put there, or taken away."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import PRNGKeyArray

from tracing_jax.arch import Arch, has_field
from tracing_jax.axes import Leaf, kind_of
from tracing_jax.rewrites.residual_stream import gain_offset
from tracing_jax.rewrites.rewrite import Part, Read, Rewrite, Weight, rows_of, stream

# Axis kind -> the kind on which its units are silent where what writes it is zero.
_SILENT_ON = {"mlp": "mlp", "embed": "embed", "kv_heads": "v_dim"}

# Matrix products of experts want rows that are multiples of 16 bytes: 8 numbers of two bytes.
_ALIGNED = 8

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
        step = math.gcd(arch.mlp_dim, _ALIGNED)
        units = step * int(rng.integers(1, max(1, arch.mlp_dim // (8 * step)) + 1))
        kv_heads = int(rng.integers(1, max(1, arch.num_kv_heads // 4) + 1))
        heads = [(arch.num_kv_heads + more) * arch.q_group for more in (0, kv_heads)]
        # Many classes of transformers refuse a width that is no multiple of the heads.
        if _feature_problems(arch):
            fitting = (n for n in range(1, arch.num_kv_heads + 1) if not arch.embed_dim % (heads[0] + n * arch.q_group))
            return cls(units, 0, 0 if _head_problems(arch) else next(fitting, 0))
        heads_after = heads[0] if _head_problems(arch) else heads[1]
        step = math.lcm(heads_after, math.gcd(arch.embed_dim, _ALIGNED))
        wider = step * math.ceil((arch.embed_dim + arch.embed_dim // 16 + 1) / step)
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
    if not has_field(arch, "head_dim"):
        return ["kv heads cannot be added: its config has no field for the width of a head, which follows from them"]
    return []
