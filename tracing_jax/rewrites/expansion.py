"""Function-preserving expansions, and their removal: zero units, and layers that add nothing to the residual stream."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from tracing_jax.arch import Arch, has_field
from tracing_jax.axes import LeafSpec, kind_of
from tracing_jax.rewrites.norm_gains import gain_offset
from tracing_jax.rewrites.rewrite import Read, Rewrite, Weight, Weights, generator, subtable

# Axis kind -> the kind whose writing leaves, where they are zero, make a unit inactive.
_ZEROED_ON = {"mlp": "mlp", "embed": "embed", "kv_heads": "v_dim"}

# Matrix products of experts want rows that are multiples of 16 bytes: 8 numbers of two bytes.
ALIGNED = 8

# The largest value that rounding may leave in a unit that is removed, relative to the leaf's root mean square.
_NEGLIGIBLE = 1e-2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Padding(Rewrite):
    """Zero units are appended to an axis or, for negative numbers, the last units, which must be zero, are removed.

    An RMS norm divides by the mean over all features: with D of D' used, gains are multiplied by sqrt(D / D') and eps
    by D / D'.

    Attributes:
      units: how many MLP units of each layer.
      features: how many features of the residual stream.
      kv_heads: how many kv heads of each layer, with their queries.

    Example:
      >>> arch = tj.open("demo:base").arch
      >>> tj.rewrites.Padding(units=8).arch_after(arch).mlp_dim - arch.mlp_dim
      8
    """

    name: ClassVar[str] = "pad"
    units: int = field(default=0, metadata={"static": True})
    features: int = field(default=0, metadata={"static": True})
    kv_heads: int = field(default=0, metadata={"static": True})

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        if not has_field(arch, "mlp_dim"):
            return ["its config has no field for the number of MLP units"]
        doubled = arch.shares_keys and arch.layer_mlp_dims
        return ["the MLPs of its layers that share keys are twice as wide as others"] if doubled else []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Padding":
        """Returns some units, and features and kv heads where the model can have more of them."""
        rng = generator(key, "pad")
        step = math.gcd(arch.mlp_dim, ALIGNED)
        units = step * int(rng.integers(1, max(1, arch.mlp_dim // (8 * step)) + 1))
        kv_heads = int(rng.integers(1, max(1, arch.num_kv_heads // 4) + 1))
        heads = [(arch.num_kv_heads + more) * arch.q_group for more in (0, kv_heads)]
        # Many classes of transformers refuse a width that is no multiple of the heads.
        if _feature_problems(arch):
            fitting = (n for n in range(1, arch.num_kv_heads + 1) if not arch.embed_dim % (heads[0] + n * arch.q_group))
            return cls(units, 0, 0 if _head_problems(arch) else next(fitting, 0))
        heads_after = heads[0] if _head_problems(arch) else heads[1]
        step = math.lcm(heads_after, math.gcd(arch.embed_dim, ALIGNED))
        wider = step * math.ceil((arch.embed_dim + arch.embed_dim // 16 + 1) / step)
        return cls(units, wider - arch.embed_dim, (heads_after - heads[0]) // arch.q_group)

    def data_problems(self, arch: Arch) -> list[str]:
        after = self.arch_after(arch)
        lines = [] if min(after.mlp_dim, after.embed_dim, after.num_kv_heads) > 0 else ["no unit would be left"]
        lines += _feature_problems(arch) if self.features else []
        return lines + (_head_problems(arch) if self.kv_heads else [])

    def arch_after(self, arch: Arch) -> Arch:
        shared = arch.shared_mlp_dim
        return replace(
            arch,
            mlp_dim=arch.mlp_dim + self.units,
            layer_mlp_dims=tuple(units + self.units for units in arch.layer_mlp_dims),
            # Configs give its units as a multiple of those of an expert, if they are one.
            shared_mlp_dim=shared and shared + self.units * max(1, shared // arch.mlp_dim),
            embed_dim=arch.embed_dim + self.features,
            num_kv_heads=arch.num_kv_heads + self.kv_heads,
            norm_eps=arch.norm_eps * (arch.embed_dim / (arch.embed_dim + self.features)),
        )

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        before, after = subtable(prefix, arch), subtable(prefix, self.arch_after(arch))
        share = math.sqrt(arch.embed_dim / (arch.embed_dim + self.features))
        resized = {}
        for name, weight in read(prefix).items():
            spec = before.leaves[name]
            if self.features and _is_gain(name, spec):
                gain = weight.float64 + gain_offset(arch)
                # The feature is zero, so its gain is free; that of the first feature is as plausible as any.
                weight = weight.with_values(
                    _resized(gain, gain.size + self.features, 0, gain[0]) * share - gain_offset(arch)
                )
            else:
                weight = _with_sizes(weight, prefix + name, spec, after.sizes)
            resized[name] = weight
        return resized

    def inverse(self, arch: Arch) -> "Padding":
        return Padding(-self.units, -self.features, -self.kv_heads)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IdentityLayer(Rewrite):
    """A layer that adds nothing to the residual stream: a copy of another whose outputs are zero.

    Attributes:
      at: its index; the layers from there on move up by one. It copies the one that was there, or the last.

    Example:
      >>> arch = tj.open("demo:base").arch
      >>> tj.rewrites.IdentityLayer(0).arch_after(arch).num_layers - arch.num_layers
      1
    """

    name: ClassVar[str] = "identity"
    at: int = field(metadata={"static": True})

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return _scale_problems(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "IdentityLayer":
        return cls(int(generator(key, "identity").integers(arch.num_layers + 1)))

    def data_problems(self, arch: Arch) -> list[str]:
        inside = 0 <= self.at <= arch.num_layers
        return [] if inside else [f"no place {self.at} among {arch.num_layers} layers; it is 0..{arch.num_layers}"]

    def arch_after(self, arch: Arch) -> Arch:
        layers = list(range(arch.num_layers))
        return arch.with_layers([*layers[: self.at], self._like(arch), *layers[self.at :]])

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        index = _layer_index(prefix)
        if index is None or index < self.at:
            return read(prefix)
        if index > self.at:
            return read(f"layers/{index - 1}/")
        prefix = f"layers/{self._like(arch)}/"
        specs, weights = subtable(prefix, arch).leaves, read(prefix)
        idle = {
            name: np.zeros_like(weight.values)
            for name, weight in weights.items()
            if _writes_residual_stream(specs[name])
        }
        idle |= {name: np.ones_like(w.values) for name, w in weights.items() if name.endswith("/multiplier")}
        return {name: w.with_values(idle[name]) if name in idle else w for name, w in weights.items()}

    def inverse(self, arch: Arch) -> "LayerRemoval":
        return LayerRemoval(self.at)

    def _like(self, arch: Arch) -> int:
        return min(self.at, arch.num_layers - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerRemoval(Rewrite):
    """A layer that adds nothing to the residual stream is taken out.

    Attributes:
      at: its index. Every weight that it writes to the residual stream with must be zero.
    """

    name: ClassVar[str] = "remove"
    at: int = field(metadata={"static": True})

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return _scale_problems(arch) + ([] if arch.num_layers > 1 else ["its only layer cannot be taken out"])

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "LayerRemoval":
        """Raises ValueError: which layer adds nothing depends on the weights."""
        raise ValueError("no layer removal can be drawn at random: which layer adds nothing depends on the weights")

    def data_problems(self, arch: Arch) -> list[str]:
        return [] if 0 <= self.at < arch.num_layers else [f"no layer {self.at} among {arch.num_layers}"]

    def arch_after(self, arch: Arch) -> Arch:
        return arch.with_layers([i for i in range(arch.num_layers) if i != self.at])

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        index = _layer_index(prefix)
        if index is None or index < self.at:
            if index is None and prefix == "embed/":
                self._check(read, arch)
            return read(prefix)
        return read(f"layers/{index + 1}/")

    def _check(self, read: Read, arch: Arch) -> None:
        prefix = f"layers/{self.at}/"
        specs = subtable(prefix, arch).leaves
        nonzero = [
            name
            for name, weight in read(prefix).items()
            if (_writes_residual_stream(specs[name]) and weight.values.any())
            or (name.endswith("/multiplier") and (np.asarray(weight.values) != 1).any())
        ]
        if nonzero:
            raise ValueError(
                f"cannot remove layer {self.at}: {', '.join(nonzero)} are not zero (or one, where they multiply), so "
                "it changes the residual stream"
            )


def _with_sizes(weight: Weight, name: str, spec: LeafSpec, sizes: Mapping[str, int]) -> Weight:
    """Returns the leaf with as many units on each axis: zeros are appended, or its last units removed."""
    x = np.asarray(weight.values)
    for dim, axis in enumerate(spec.axes):
        if axis is None or sizes[axis] == x.shape[dim]:
            continue
        if sizes[axis] < x.shape[dim] and _silences(spec, axis):
            _check_negligible(x, sizes[axis], dim, f"{name} on {axis}")
        x = _resized(x, sizes[axis], dim, 0.0)
    return weight.with_values(x)


def _check_negligible(x: np.ndarray, kept: int, dim: int, where: str) -> None:
    """Checks that the units of a leaf that are removed are zero up to rounding."""
    rest = np.abs(np.take(x, range(kept, x.shape[dim]), axis=dim).astype(np.float64)).max()
    size = math.sqrt(np.square(x.astype(np.float64)).mean())
    if rest > _NEGLIGIBLE * size:
        raise ValueError(
            f"cannot remove units of {where} from number {kept} on: they hold up to {rest:.2g}, at a root mean "
            f"square of {size:.2g}; expected zeros, so that the unit is inactive"
        )


def _silences(spec: LeafSpec, axis: str) -> bool:
    """Returns whether zeros in this leaf make a unit of the axis inactive."""
    kind = _ZEROED_ON.get(kind_of(axis))
    return any(
        role == "writes" and other is not None and kind_of(other) == kind
        for other, role in zip(spec.axes, spec.roles, strict=True)
    )


def _resized(x: np.ndarray, size: int, dim: int, fill: float) -> np.ndarray:
    """Returns x with so many units along a dimension: new ones hold `fill`, surplus ones are removed."""
    if size <= x.shape[dim]:
        return np.take(x, range(size), axis=dim)
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return np.concatenate([x, np.full(shape, fill, x.dtype)], axis=dim)


def _is_gain(name: str, spec: LeafSpec) -> bool:
    return name.endswith("norm/scale") and spec.axes == ("embed",)


def _feature_problems(arch: Arch) -> list[str]:
    if arch.norm not in ("rms", "rms_unit_offset"):
        return ["features cannot be added: its LayerNorm subtracts the mean of the features, which zeros change"]
    lines = []
    if not has_field(arch, "head_dim"):
        lines.append(
            "features cannot be added: its config has no field for the width of a head, which follows from them"
        )
    if arch.qk_norm is not None or arch.rotated_norm:
        lines.append("features cannot be added: eps would have to change, and the norms of queries and keys share it")
    if any(arch.state_mixer(name) for mixers in arch.layer_mixers for name in mixers):
        lines.append("features cannot be added: eps would have to change, and the norms of its recurrences share it")
    if math.isclose(arch.embed_scale, math.sqrt(arch.embed_dim), rel_tol=1e-6):
        lines.append("features cannot be added: the scale of its embedding is the root of their number")
    return lines


def _head_problems(arch: Arch) -> list[str]:
    if arch.alibi_slopes:
        return ["kv heads cannot be added: the slopes of its heads follow from their number (ALiBi)"]
    if arch.global_attn is not None:
        return ["kv heads cannot be added: its layers have heads of two sizes"]
    if arch.qk_norm == "all":
        return ["kv heads cannot be added: queries and keys are normalised over all heads together"]
    if not has_field(arch, "head_dim"):
        return ["kv heads cannot be added: its config has no field for the width of a head, which follows from them"]
    return []


def _layer_index(prefix: str) -> int | None:
    return int(prefix.split("/")[1]) if prefix.startswith("layers/") else None


def _writes_residual_stream(spec: LeafSpec) -> bool:
    return any(axis == "embed" and role == "writes" for axis, role in zip(spec.axes, spec.roles, strict=True))


def _scale_problems(arch: Arch) -> list[str]:
    lines = ["its layers scale their attention by their number"] if arch.inverse_layer_scale else []
    if arch.per_layer_dim is not None:
        lines.append("each of its layers has a part of a table of embeddings")
    return lines + (["its last layers read the keys of earlier ones"] if arch.shares_keys else [])
