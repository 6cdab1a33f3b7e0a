"""Maps of the residual stream that norms commute with, and what a LayerNorm takes out of it.

An RMS norm without a gain commutes with every orthogonal matrix. A LayerNorm subtracts the mean over the features
first, so it commutes with those that keep the vector of ones; and what is added to all features alike is lost in it. A
norm between a block and the residual stream has a gain that no leaf can take over: only signs commute with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, LeafSpec, axis_table
from tracing_jax.rewrites.linear_maps import apply_maps, random_rotation
from tracing_jax.rewrites.norm_gains import GainSetting, foldable_norms
from tracing_jax.rewrites.rewrite import Read, Rewrite, Weights, array_problems, generator, subtable

ResidualGroup = Literal["orthogonal", "keeps_mean", "signs"]


def residual_group(arch: Arch) -> ResidualGroup | None:
    """Returns which matrices the norms of a model commute with once gains are folded; None: only with permutations.

    `orthogonal`: every orthogonal matrix. `keeps_mean`: those that keep the vector of ones. `signs`: diagonal ones.
    """
    if not _gains_in_the_stream(arch):
        return "keeps_mean" if arch.norm_subtracts_mean else "orthogonal"
    return None if arch.norm_subtracts_mean else "signs"


def _gains_in_the_stream(arch: Arch) -> list[str]:
    """Returns the names of norms that write to the residual stream, by the last part of their path."""
    feeding = foldable_norms(arch)
    scales = [name for name, spec in axis_table(arch).leaves.items() if spec.axes == ("embed",) and "scale" in name]
    norms = [name.removesuffix("/scale") for name in scales]
    return sorted({norm.rsplit("/", 1)[-1] for norm in norms if norm not in feeding})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Rotation(Rewrite):
    """The residual stream x becomes R x for an orthogonal R; norm gains are folded into their readers before.

    R is in the group of the model, see `residual_group`: with a LayerNorm it keeps the vector of ones, and where norms
    are between blocks and residual stream it is diagonal, and no gain is folded.

    Its inverse rotates the residual stream back and leaves the gains folded; a `GainSetting` to the original gains (see
    `gains_in`) restores these too.

    Attributes:
      matrix: R.

    Example:
      >>> import jax
      >>> arch = tj.open("demo:base").arch
      >>> rotation = tj.rewrites.Rotation.random(jax.random.key(0), arch)
      >>> bool(np.allclose(rotation.matrix @ rotation.inverse(arch).matrix, np.eye(arch.embed_dim)))
      True
    """

    name: ClassVar[str] = "rotate"
    matrix: Float[np.ndarray, "D D"]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        if residual_group(arch) is not None:
            return []
        return [
            f"the gains of {', '.join(_gains_in_the_stream(arch))} are between a LayerNorm's output and the residual "
            "stream, where they cannot be folded into another leaf, and neither a rotation nor signs commute with both"
        ]

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Rotation":
        rng, D = generator(key, "embed"), arch.embed_dim
        group = residual_group(arch)
        if group == "signs":
            return cls(np.diag(rng.choice([-1.0, 1.0], D)))
        if group == "keeps_mean":
            basis = mean_free_basis(D)
            return cls(keeping_mean(basis @ random_rotation(rng, D - 1) @ basis.T))
        return cls(random_rotation(rng, D))

    def data_problems(self, arch: Arch) -> list[str]:
        D, group = arch.embed_dim, residual_group(arch)
        if lines := array_problems({"embed": self.matrix}, {"embed": (D, D)}, "a matrix"):
            return lines
        if np.abs(self.matrix @ self.matrix.T - np.eye(D)).max() > 1e-8:
            return ["embed: the matrix is not orthogonal to 1e-8; take its polar factor"]
        if group == "keeps_mean" and np.abs(self.matrix.sum(1) - 1).max() > 1e-8 * D:
            return ["embed: the matrix does not keep the vector of ones, which the LayerNorms of the model need"]
        if group == "signs" and (self.matrix[~np.eye(D, dtype=bool)] != 0).any():
            return [
                "embed: the matrix is not diagonal, and the gains of norms behind the blocks commute with signs alone"
            ]
        return []

    def unties(self, arch: Arch) -> bool:
        return residual_group(arch) != "signs"

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        maps = {"embed": (self.matrix, self.matrix)}
        if residual_group(arch) == "signs":
            return apply_maps(read(prefix), subtable(prefix, arch), maps)
        folded = GainSetting.ones(arch, foldable_norms(arch)).apply(prefix, read, arch)
        table = subtable(prefix, arch)
        found = apply_maps(folded, table, maps)
        for name in [name for name in found if name.endswith("norm/bias") and table.leaves[name].axes == ("embed",)]:
            found[name] = found[name].with_values(self.matrix @ found[name].float64)  # added to what the readers get
        return found

    def inverse(self, arch: Arch) -> "Rotation":
        return Rotation(self.matrix.T)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MeanSetting(Rewrite):
    """The mean over the features of what is written to the residual stream is set: LayerNorms subtract it.

    So is that of rows that read the output of a LayerNorm, each times the norm's gain: the stream is orthogonal to the
    vector of ones there, so that a row may have any multiple of one over the gain added. What a bias of the norm gives
    with it moves to the bias of the row; rows without one are not changed behind such a norm. Nor are rows where a gain
    is zero.

    Attributes:
      values: leaf that writes the residual stream, such as `embed/embedding`, or reads it -> the means afterwards, an
        array over its other axes. A leaf that is not named keeps its own.

    Example:
      >>> tj.rewrites.MeanSetting.unsupported(tj.open("demo:base").arch)
      ['its norms do not subtract the mean over the features']
    """

    name: ClassVar[str] = "means"
    values: Mapping[str, Float[np.ndarray, "..."]]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        if not arch.norm_subtracts_mean:
            return ["its norms do not subtract the mean over the features"]
        return [] if arch.pre_norms else ["its blocks read the residual stream itself, not the output of a norm"]

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "MeanSetting":
        """Returns means of what is written, of the size of common weights.

        Not of rows that read: once features are padded, what they may have added is along the old features alone, which
        an alignment does not take out.
        """
        leaves = axis_table(arch).leaves
        shapes = {name: shape for name, shape in _means(arch).items() if writes_stream(leaves[name])}
        drawn = {name: generator(key, name).standard_normal(shape) for name, shape in shapes.items()}
        return cls({name: np.asarray(_SIZE * values) for name, values in drawn.items()})

    @classmethod
    def zeros(cls, arch: Arch) -> "MeanSetting":
        """Returns the setting of all means to zero."""
        return cls({name: np.zeros(shape) for name, shape in _means(arch).items()})

    def data_problems(self, arch: Arch) -> list[str]:
        return array_problems(self.values, _means(arch), "one mean per unit that writes")

    def unties(self, arch: Arch) -> bool:
        return "embed/embedding" in self.values

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        found, table = dict(read(prefix)), subtable(prefix, arch)
        for name, values in self.values.items():
            if (own := name.removeprefix(prefix)) == name or own not in found:
                continue
            spec, x = table.leaves[own], found[own].float64
            dim = spec.axes.index("embed")
            gain, added = (
                np.expand_dims(vector, [*range(1, x.ndim - dim)])
                for vector in _of_norm(prefix, spec.input_norm, {name: w.float64 for name, w in found.items()})
            )
            if not gain.all():
                continue
            new = (_without_mean(x * gain, dim) + np.expand_dims(values, dim)) / gain
            found[own] = found[own].with_values(new)
            if added.any():
                bias = own.replace("kernel", "bias")
                found[bias] = found[bias].with_values(found[bias].float64 + ((x - new) * added).sum(axis=dim))
        return found


_SIZE = 0.02
"""Standard deviation of random means: that with which most models are initialised."""


def mean_free_basis(size: int) -> Float[np.ndarray, "D D-1"]:
    """Returns an orthonormal basis of the vectors whose mean is zero.

    Columns of the Householder reflection that maps the first unit vector to the direction of ones.
    """
    normal = np.full(size, -1 / np.sqrt(size))
    normal[0] += 1
    reflection = np.eye(size) - 2 * np.outer(normal, normal) / max(normal @ normal, np.finfo(float).tiny)
    return reflection[:, 1:]


def keeping_mean(mean_free: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """Returns a map of vectors of mean zero as one of all vectors, which keeps the vector of ones."""
    return mean_free + 1 / len(mean_free)


def writes_stream(spec: LeafSpec) -> bool:
    """Returns whether a leaf writes the residual stream."""
    return "embed" in spec.axes and spec.roles[spec.axes.index("embed")] == "writes"


def _reads_stream(name: str, table: AxisTable, prefix: str = "") -> bool:
    """Returns whether a leaf reads the residual stream and has a bias, if the norm before it adds one."""
    spec = table.leaves[name]
    if "embed" not in spec.axes or spec.roles[spec.axes.index("embed")] != "reads":
        return False
    if spec.input_norm is None or f"{spec.input_norm.removeprefix(prefix)}/bias" not in table.leaves:
        return True
    bias = table.leaves.get(name.replace("kernel", "bias"))
    return bias is not None and bias.axes == tuple(axis for axis in spec.axes if axis != "embed")


def _of_norm(
    prefix: str, norm: str | None, leaves: Mapping[str, np.ndarray]
) -> tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]:
    """Returns gain and bias of a LayerNorm; of none, or of one that has none, one and zero."""
    own = "" if norm is None else norm.removeprefix(prefix)
    gain, bias = (leaves.get(f"{own}/{part}") for part in ("scale", "bias"))
    return np.ones(1) if gain is None else gain, np.zeros(1) if bias is None else bias


def _means(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Returns each leaf that writes or reads the residual stream, with the shape of its means over the features."""
    table = axis_table(arch)
    return {
        name: tuple(table.sizes[axis or ""] for axis in spec.axes if axis != "embed")
        for name, spec in table.leaves.items()
        if writes_stream(spec) or _reads_stream(name, table)
    }


def _without_mean(x: Float[np.ndarray, "..."], dim: int) -> Float[np.ndarray, "..."]:
    """Returns an array less its mean along a dimension; zeros where it is constant there but for rounding."""
    first = x.take([0], axis=dim)
    rest = x - first
    mean = rest.mean(axis=dim, keepdims=True)
    constant = np.abs(rest).max(axis=dim, keepdims=True) <= _ROUNDING * np.abs(first)
    return np.where(constant, 0.0, rest - mean)


_ROUNDING = 1e-14


def means_in(prefix: str, leaves: Mapping[str, np.ndarray], table: AxisTable) -> dict[str, Float[np.ndarray, "..."]]:
    """Returns leaf -> the means over the features that `MeanSetting` sets, of those leaves of a subtree that have any.

    Behind a norm with a gain of zero rows have none.

    Args:
      prefix: of the subtree.
      leaves: by their names in it.
      table: of the subtree.
    """
    found = {}
    for name, spec in table.leaves.items():
        if name not in leaves or not (writes_stream(spec) or _reads_stream(name, table, prefix)):
            continue
        x, dim = np.asarray(leaves[name], np.float64), spec.axes.index("embed")
        gain = np.asarray(_of_norm(prefix, spec.input_norm, leaves)[0], np.float64)
        if gain.all():
            found[prefix + name] = (x * np.expand_dims(gain, [*range(1, x.ndim - dim)])).mean(axis=dim)
    return found
