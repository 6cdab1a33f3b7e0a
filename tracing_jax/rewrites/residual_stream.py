"""Rewrites of the residual stream: redistribution of norm gains, and rotation.

RMS norms divide by the length of a vector, which a rotation keeps, and multiply by gains, which it does not commute
with: gains go into the leaves that read behind the norm first.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.rewrites.linear_maps import mapped, misfits, random_factors, random_rotation, zeros
from tracing_jax.rewrites.rewrite import Part, Read, Rewrite, rows_of, stream, table_of

Gains = Mapping[str, Float[np.ndarray, " D"]]
"""Norm, such as `layers/3/attn_norm` or `head/norm` -> a vector for its gain."""


def feeding_norms(arch: Arch) -> list[str]:
    """Returns the norms whose gains can go into the leaves that they feed, in the order of the model.

    The head of a tied model counts as such a leaf: it can be untied.
    """
    table = table_of(arch)
    norms = dict.fromkeys(row.fed_by for row in table.leaves.values() if row.fed_by is not None)
    final = ["head/norm"] if arch.tied and "head/norm/scale" in table.leaves else []
    return [*norms, *final]


def gain_offset(arch: Arch) -> float:
    """Returns what is added to a stored gain before it multiplies: 1 where it is stored minus one."""
    return 1.0 if arch.norm == "rms_unit_offset" else 0.0


def gains_in(read: Callable[[str], Mapping[str, np.ndarray]], arch: Arch) -> dict[str, Float[np.ndarray, " D"]]:
    """Returns the gain of every norm that feeds leaves, in float64; `read` gives the leaves of a part by name."""
    gains, leaves = {}, {}
    for norm in feeding_norms(arch):
        prefix, name = norm.rsplit("/", 1)
        if prefix not in leaves:
            leaves = {prefix: read(prefix + "/")}
        gains[norm] = np.asarray(leaves[prefix][f"{name}/scale"], np.float64) + gain_offset(arch)
    return gains


def _without_gains(arch: Arch) -> list[str]:
    return [] if feeding_norms(arch) else ["none of its norms has a gain in front of what reads it"]


@dataclass(frozen=True, eq=False)
class GainScaling(Rewrite):
    """Norm gains are multiplied by factors of either sign, and the leaves that read behind them divided by these.

    Attributes:
      factors: norm -> one factor per feature. A norm that is not named keeps its gain.
    """

    name: ClassVar[str] = "gains"
    factors: Gains

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return _without_gains(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "GainScaling":
        return cls({norm: random_factors(stream(key, norm), (arch.embed_dim,)) for norm in feeding_norms(arch)})

    def misfits(self, arch: Arch) -> list[str]:
        return _gain_misfits(self.factors, arch, "one factor per feature")

    def unties(self, arch: Arch) -> bool:
        return "head/norm" in self.factors

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        return _regained(read(prefix), prefix, arch, self.factors, lambda gain, c: (gain * c, 1 / c))

    def inverse(self, arch: Arch) -> "GainScaling":
        return GainScaling({norm: 1 / factors for norm, factors in self.factors.items()})


@dataclass(frozen=True, eq=False)
class GainSetting(Rewrite):
    """Norm gains are set to given values, whatever they are, and the leaves that read behind them take the rest.

    Attributes:
      values: norm -> its gain afterwards, without zeros. A norm that is not named keeps its gain.
    """

    name: ClassVar[str] = "fold"
    values: Gains

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        if any(name.endswith("norm/bias") for name in table_of(arch).leaves):
            return ["its norms add a bias behind the gain, which is lost where a gain is zero; scale the gains instead"]
        return _without_gains(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "GainSetting":
        """Returns the setting of every gain to one; there is nothing to draw."""
        return cls.ones(arch, feeding_norms(arch))

    @classmethod
    def ones(cls, arch: Arch, norms: Iterable[str]) -> "GainSetting":
        """Returns the setting of these norms' gains to one: they are folded into their readers."""
        return cls({norm: np.ones(arch.embed_dim) for norm in norms})

    def misfits(self, arch: Arch) -> list[str]:
        return _gain_misfits(self.values, arch, "one gain per feature")

    def unties(self, arch: Arch) -> bool:
        return "head/norm" in self.values

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        return _regained(read(prefix), prefix, arch, self.values, lambda gain, new: (new, gain / new))


@dataclass(frozen=True, eq=False)
class Rotation(Rewrite):
    """The residual stream x becomes R x for an orthogonal R; norm gains are folded into their readers before.

    Its inverse turns the stream back and leaves the gains folded; a `GainSetting` to the gains of before (see
    `gains_in`) brings these back too.

    Attributes:
      matrix: R.
    """

    name: ClassVar[str] = "rotate"
    matrix: Float[np.ndarray, "D D"]

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        if lines := _not_rms(arch):
            return lines
        feeding = feeding_norms(arch)
        scales = [name for name, row in table_of(arch).leaves.items() if row.axes == ("embed",) and "scale" in name]
        norms = [name.removesuffix("/scale") for name in scales]
        after = sorted({norm.rsplit("/", 1)[-1] for norm in norms if norm not in feeding})
        if not after:
            return []
        return [
            f"the gains of {', '.join(after)} stand between a block's output and the residual stream, where nothing "
            "can take them over, and a rotation does not commute with them"
        ]

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Rotation":
        return cls(random_rotation(stream(key, "embed"), arch.embed_dim))

    def misfits(self, arch: Arch) -> list[str]:
        lines = misfits({"embed": self.matrix}, {"embed": (arch.embed_dim,) * 2}, "a matrix")
        if not lines and np.abs(self.matrix @ self.matrix.T - np.eye(arch.embed_dim)).max() > 1e-8:
            lines.append("embed: the matrix is not orthogonal to 1e-8; take its polar factor")
        return lines

    def unties(self, arch: Arch) -> bool:
        return True

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        folded = GainSetting.ones(arch, feeding_norms(arch)).part(prefix, read, arch)
        return mapped(folded, rows_of(prefix, arch), {"embed": (self.matrix, self.matrix)})

    def inverse(self, arch: Arch) -> "Rotation":
        return Rotation(self.matrix.T)


def _not_rms(arch: Arch) -> list[str]:
    if arch.norm in ("rms", "rms_unit_offset"):
        return []
    return ["its LayerNorm subtracts the mean of the features, which is not the same after a rotation"]


def _gain_misfits(gains: Gains, arch: Arch, what: str) -> list[str]:
    return misfits(gains, dict.fromkeys(feeding_norms(arch), (arch.embed_dim,)), what) + zeros(gains)


def _regained(
    part: Part,
    prefix: str,
    arch: Arch,
    given: Gains,
    function: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Part:
    """Returns a part with `function(gain, given) -> (new gain, factor of its readers)` for each norm that is given."""
    rows, offset, result = rows_of(prefix, arch).leaves, gain_offset(arch), dict(part)
    for norm in (norm for norm in given if norm.rpartition("/")[0] + "/" == prefix):
        name = norm.removeprefix(prefix)
        scale = part[f"{name}/scale"]
        new, factor = function(scale.exact + offset, given[norm])
        result[f"{name}/scale"] = scale.having(new - offset)
        if bias := part.get(f"{name}/bias"):  # what a LayerNorm adds behind its gain is read too
            result[f"{name}/bias"] = bias.having(bias.exact / factor)
        for reader in (reader for reader, row in rows.items() if row.fed_by == norm):
            along = [-1 if axis == "embed" else 1 for axis in rows[reader].axes]
            result[reader] = result[reader].having(result[reader].exact * factor.reshape(along))
    return result
