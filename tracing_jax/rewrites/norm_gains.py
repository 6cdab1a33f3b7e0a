"""Norm gains: scaled, or folded into the leaves that read the output of the norm."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.rewrites.rewrite import (
    Read,
    Rewrite,
    Weights,
    array_problems,
    generator,
    random_factors,
    subtable,
    zero_problems,
)

Gains = Mapping[str, Float[np.ndarray, " D"]]
"""Norm, such as `layers/3/attn_norm` or `head/norm` -> a vector for its gain."""


def foldable_norms(arch: Arch) -> list[str]:
    """Returns the norms whose gains can be folded into the leaves that read their output, in the order of the model.

    The head of a tied model is such a leaf: it can be untied.
    """
    table = axis_table(arch)
    norms = dict.fromkeys(spec.input_norm for spec in table.leaves.values() if spec.input_norm is not None)
    final = ["head/norm"] if arch.tied and "head/norm/scale" in table.leaves else []
    return [*norms, *final]


def gain_offset(arch: Arch) -> float:
    """Returns what is added to a stored gain before it multiplies: 1 where it is stored minus one."""
    return 1.0 if arch.norm == "rms_unit_offset" else 0.0


def gains_in(read: Callable[[str], Mapping[str, np.ndarray]], arch: Arch) -> dict[str, Float[np.ndarray, " D"]]:
    """Returns the gain of every foldable norm, in float64; `read` gives the leaves of a subtree by name."""
    gains, leaves = {}, {}
    for norm in foldable_norms(arch):
        prefix, name = norm.rsplit("/", 1)
        if prefix not in leaves:
            leaves = {prefix: read(prefix + "/")}
        gains[norm] = np.asarray(leaves[prefix][f"{name}/scale"], np.float64) + gain_offset(arch)
    return gains


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GainScaling(Rewrite):
    """Norm gains are multiplied by factors of either sign, and the leaves that read their output are divided by them.

    Attributes:
      factors: norm -> one factor per feature. A norm that is not named keeps its gain.

    Example:
      >>> arch = tj.open("demo:base").arch
      >>> scaling = tj.rewrites.GainScaling({"layers/0/attn_norm": np.full(arch.embed_dim, 4.0)})
      >>> float(scaling.inverse(arch).factors["layers/0/attn_norm"][0])
      0.25
    """

    name: ClassVar[str] = "gains"
    factors: Gains

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return _without_gains(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "GainScaling":
        return cls({norm: random_factors(generator(key, norm), (arch.embed_dim,)) for norm in foldable_norms(arch)})

    def data_problems(self, arch: Arch) -> list[str]:
        return _gain_problems(self.factors, arch, "one factor per feature")

    def unties(self, arch: Arch) -> bool:
        return "head/norm" in self.factors

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        return _with_gains(read(prefix), prefix, arch, self.factors, lambda gain, c: (gain * c, 1 / c))

    def inverse(self, arch: Arch) -> "GainScaling":
        return GainScaling({norm: 1 / factors for norm, factors in self.factors.items()})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GainSetting(Rewrite):
    """Norm gains are set to given values, and the leaves that read their output are scaled to make up for it.

    Where a gain is zero and the bias that the norm adds is not, that cannot be done, and `apply` raises ValueError.

    Attributes:
      values: norm -> its gain afterwards, without zeros. A norm that is not named keeps its gain.
    """

    name: ClassVar[str] = "fold"
    values: Gains

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return _without_gains(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "GainSetting":
        """Returns the setting of every gain to one; there is nothing to draw."""
        return cls.ones(arch, foldable_norms(arch))

    @classmethod
    def ones(cls, arch: Arch, norms: Iterable[str]) -> "GainSetting":
        """Returns the setting of these norms' gains to one: they are folded into their readers."""
        return cls({norm: np.ones(arch.embed_dim) for norm in norms})

    def data_problems(self, arch: Arch) -> list[str]:
        return _gain_problems(self.values, arch, "one gain per feature")

    def unties(self, arch: Arch) -> bool:
        return "head/norm" in self.values

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        return _with_gains(read(prefix), prefix, arch, self.values, lambda gain, new: (new, gain / new))


def _without_gains(arch: Arch) -> list[str]:
    return [] if foldable_norms(arch) else ["none of its norms has a gain that a leaf reads"]


def _gain_problems(gains: Gains, arch: Arch, what: str) -> list[str]:
    return array_problems(gains, dict.fromkeys(foldable_norms(arch), (arch.embed_dim,)), what) + zero_problems(gains)


def _with_gains(
    weights: Weights,
    prefix: str,
    arch: Arch,
    values: Gains,
    function: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Weights:
    """Returns a subtree with `function(gain, value) -> (new gain, factor of its readers)` for each norm in `values`."""
    specs, offset, result = subtable(prefix, arch).leaves, gain_offset(arch), dict(weights)
    for norm in (norm for norm in values if norm.rpartition("/")[0] + "/" == prefix):
        name = norm.removeprefix(prefix)
        scale = weights[f"{name}/scale"]
        new, factor = function(scale.float64 + offset, values[norm])
        result[f"{name}/scale"] = scale.with_values(new - offset)
        if bias := weights.get(f"{name}/bias"):  # a LayerNorm adds it after the gain, and its readers are divided too
            if (lost := np.flatnonzero((factor == 0) & (bias.float64 != 0))).size:
                raise ValueError(
                    f"{norm}: the gain of feature {lost[0]} is zero and its bias is not, so that the gain cannot be "
                    "folded into the leaves behind the norm; such a model has no rotation of its residual stream"
                )
            result[f"{name}/bias"] = bias.with_values(bias.float64 / np.where(factor == 0, 1.0, factor))
        for reader in (reader for reader, spec in specs.items() if spec.input_norm == norm):
            along = [-1 if axis == "embed" else 1 for axis in specs[reader].axes]
            result[reader] = result[reader].with_values(result[reader].float64 * factor.reshape(along))
    return result
