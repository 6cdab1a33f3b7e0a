"""What every rewrite is: data that changes a model's weights, subtree by subtree, and keeps its function.

A rewrite acts on a model as subtrees: `embed/`, `layers/<i>/` and `head/`, each with its leaves by name. Values are
computed in float64 along a whole sequence of rewrites and rounded once, at its end, to the dtype they came in.
"""

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.tree import Tree, flatten, parsed_prefix, to_host, unflatten


@dataclass(frozen=True)
class Weight:
    """A leaf in the course of rewrites: its values, and the dtype that they are rounded to at the end."""

    values: jax.Array | np.ndarray
    dtype: Any

    @property
    def float64(self) -> Float[np.ndarray, "..."]:
        """The values in float64, which holds every value of the dtypes of checkpoints."""
        return np.asarray(self.values, np.float64)

    def with_values(self, values: jax.Array | np.ndarray) -> "Weight":
        """Returns other values that will have the same dtype."""
        return replace(self, values=values)

    @property
    def rounded(self) -> jax.Array | np.ndarray:
        """The values in the dtype they came in."""
        return self.values if self.values.dtype == self.dtype else np.asarray(self.values).astype(self.dtype)


Weights = dict[str, Weight]
"""The leaves of one subtree by their names in it."""

Read = Callable[[str], Weights]
"""Gives the subtree of a model that has a prefix."""


class Rewrite(ABC):
    """A change of weights that keeps the function of a model.

    Subclasses are frozen dataclasses of plain data, registered as pytrees: arrays are leaves, numbers and names static.

    Example:
      >>> import jax
      >>> arch = tj.open("demo:base").arch
      >>> rewrites = tj.draw_rewrites("all", jax.random.key(0), arch)
      >>> all(isinstance(rewrite, tj.Rewrite) and not rewrite.unsupported(arch) for rewrite in rewrites)
      True
    """

    name: ClassVar[str]
    """How it is called in a list such as `rotate,permute`."""

    reorders_only: ClassVar[bool] = False
    """Whether it changes leaf by leaf, and nothing but the order of units: no value is computed."""

    @classmethod
    @abstractmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        """Returns why a model supports no rewrite of this type; empty if it does."""

    @classmethod
    @abstractmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Rewrite":
        """Returns a random rewrite of this type for a model; every axis has its own random generator."""

    def data_problems(self, arch: Arch) -> list[str]:
        """Returns where the data of this rewrite do not fit a model that supports its type."""
        return []

    def problems(self, arch: Arch) -> list[str]:
        """Returns why this rewrite cannot be applied to a model; empty if it can."""
        return self.unsupported(arch) or self.data_problems(arch)

    def unties(self, arch: Arch) -> bool:
        """Returns whether a tied head must become a weight of its own before this rewrite."""
        return False

    def arch_after(self, arch: Arch) -> Arch:
        """Returns the facts of the model after this rewrite."""
        return replace(arch, tied=arch.tied and not self.unties(arch))

    @abstractmethod
    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        """Returns one subtree of the rewritten model; `read` gives those of the model before, `arch` its facts."""

    def inverse(self, arch: Arch) -> "Rewrite | None":
        """Returns the inverse of this rewrite of a model with the facts `arch`; None if its data do not give one."""
        return None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Untying(Rewrite):
    """The head becomes a weight of its own, equal to the embedding that it shared."""

    name: ClassVar[str] = "untie"

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return [] if arch.tied else ["the head is not tied to the embedding"]

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Untying":
        return cls()

    def unties(self, arch: Arch) -> bool:
        return True

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        weights = read(prefix)
        if prefix != "head/":
            return weights
        embedding = read("embed/")["embedding"]
        return weights | {"lm_head/kernel": embedding.with_values(embedding.values.T)}


def with_archs(rewrites: Iterable[Rewrite], arch: Arch) -> list[tuple[Rewrite, Arch]]:
    """Returns the rewrites, each with the facts of the model it is applied to; `Untying` is inserted where needed."""
    found: list[tuple[Rewrite, Arch]] = []
    for rewrite in rewrites:
        if arch.tied and rewrite.unties(arch) and not isinstance(rewrite, Untying):
            found.append((Untying(), arch))
            arch = replace(arch, tied=False)
        found.append((rewrite, arch))
        arch = rewrite.arch_after(arch)
    return found


def arch_after(rewrites: Iterable[Rewrite], arch: Arch) -> Arch:
    """Returns the facts of the model after the rewrites, from left to right."""
    for rewrite in rewrites:
        arch = rewrite.arch_after(arch)
    return arch


def reorders_only(rewrites: Iterable[Rewrite]) -> bool:
    """Returns whether the rewrites change nothing but the order of units."""
    return all(rewrite.reorders_only for rewrite in rewrites)


def check_rewrites(rewrites: Sequence[Rewrite], arch: Arch) -> None:
    """Checks that each rewrite can be applied to the model that those before it give.

    Raises:
      ValueError: every rewrite that cannot, with the reasons.
    """
    lines = [f"{step.name}: {problem}" for step, met in with_archs(rewrites, arch) for problem in step.problems(met)]
    if lines:
        raise ValueError("\n  ".join([f"no such rewrite of this {arch.family} model:", *lines]))


def inverses(rewrites: Sequence[Rewrite], arch: Arch) -> tuple[Rewrite, ...]:
    """Returns the inverses of the rewrites, the last one first; `arch` holds the facts of the model before them.

    A rotation and a setting of gains have folded gains into the leaves behind the norms; these stay folded.

    Raises:
      ValueError: one of them has no inverse.

    Example:
      >>> import jax
      >>> arch = tj.open("demo:base").arch
      >>> rewrites = tj.draw_rewrites("units,permute", jax.random.key(0), arch)
      >>> [rewrite.name for rewrite in tj.inverses(rewrites, arch)]
      ['permute', 'units']
    """
    found = []
    for rewrite in rewrites:
        found.append((rewrite.name, rewrite.inverse(arch)))
        arch = rewrite.arch_after(arch)
    if without := [name for name, inverse in found if inverse is None]:
        raise ValueError(f"cannot be undone from its data alone: {', '.join(without)}")
    return tuple(inverse for _, inverse in reversed(found) if inverse is not None)


def rewrite_subtree(prefix: str, read: Callable[[str], Tree], rewrites: Sequence[Rewrite], arch: Arch) -> Tree:
    """Returns one subtree of the model after the rewrites; `read` gives the subtrees of the model before.

    The leaves are numpy arrays, unless the rewrites only reorder units: then each is where and what it was.
    """
    load = (lambda leaf: leaf) if reorders_only(rewrites) else to_host

    def weights(prefix: str) -> Weights:
        leaves = {name: load(leaf) for name, leaf in flatten(read(prefix)).items()}
        return {name: Weight(leaf, leaf.dtype) for name, leaf in leaves.items()}

    reader: Read = weights
    for rewrite, met in with_archs(rewrites, arch):
        reader = functools.partial(rewrite.apply, read=reader, arch=met)
    return unflatten({name: weight.rounded for name, weight in reader(prefix).items()})


def apply(params: Tree, rewrites: Sequence[Rewrite], arch: Arch) -> Tree:
    """Returns a whole tree of params after the rewrites; `arch_after` gives the facts of that model.

    Raises:
      ValueError: as `check_rewrites`.
    """
    check_rewrites(rewrites, arch)

    def read(prefix: str) -> Tree:
        name, index = parsed_prefix(prefix)
        return params[name][index] if index else params[name]

    layers = range(arch_after(rewrites, arch).num_layers)
    tree = {name: rewrite_subtree(f"{name}/", read, rewrites, arch) for name in ("embed", "head")}
    return tree | {"layers": {str(i): rewrite_subtree(f"layers/{i}/", read, rewrites, arch) for i in layers}}


def subtable(prefix: str, arch: Arch) -> AxisTable:
    """Returns the axis table of one subtree, by the names of its leaves in it."""
    return axis_table(arch).restricted(prefix)


def generator(key: PRNGKeyArray, name: str) -> np.random.Generator:
    """Returns a generator of its own for a name: draws for one axis do not depend on which others are drawn."""
    return np.random.default_rng(np.asarray(jax.random.key_data(jax.random.fold_in(key, zlib.crc32(name.encode())))))


def random_factors(rng: np.random.Generator, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Returns factors between 1/4 and 4, uniform in their logarithm, of either sign."""
    return 4.0 ** rng.uniform(-1, 1, shape) * rng.choice([-1.0, 1.0], shape)


def array_problems(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], what: str) -> list[str]:
    """Returns where named arrays have other names or shapes than expected, or hold what is not finite."""
    lines = [
        f"{name}: no such place in this model; it has {', '.join(expected)}" for name in found if name not in expected
    ]
    for name in found.keys() & expected.keys():
        if found[name].shape != expected[name]:
            lines.append(f"{name}: expected {what}, {expected[name]}, found {found[name].shape}")
        elif not np.isfinite(found[name]).all():
            lines.append(f"{name}: holds NaN or infinity")
    return lines


def zero_problems(factors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns which factors cannot be divided by."""
    return [f"{name}: a factor of zero" for name, array in factors.items() if (array == 0).any()]
