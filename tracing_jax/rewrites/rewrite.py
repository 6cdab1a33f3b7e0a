"""What every rewrite is: data that changes a model's weights, part by part, and keeps its function.

A rewrite sees a model as parts: the prefixes `embed/`, `layers/<i>/` and `head/`, each with its leaves by name. Values
are computed in float64 along a whole sequence of rewrites and rounded once, at its end, to the dtype they came in.
"""

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.tree import Tree, flatten, to_host, unflatten

table_of = functools.lru_cache(maxsize=64)(axis_table)
"""The axis table of a model, which every part asks for; do not change it."""


@dataclass(frozen=True)
class Weight:
    """A leaf on its way through rewrites: its values, and the dtype that they are rounded to at the end."""

    values: np.ndarray
    dtype: Any

    @property
    def exact(self) -> Float[np.ndarray, "..."]:
        """The values in float64, which holds every value of the dtypes of checkpoints."""
        return np.asarray(self.values, np.float64)

    def having(self, values: np.ndarray) -> "Weight":
        """Returns other values that will have the same dtype."""
        return replace(self, values=values)

    @property
    def rounded(self) -> np.ndarray:
        """The values in the dtype they came in."""
        return np.asarray(self.values).astype(self.dtype, copy=False)


Part = dict[str, Weight]
"""The leaves of one part by their names in it."""

Read = Callable[[str], Part]
"""Gives the part of a model that stands under a prefix."""


class Rewrite(ABC):
    """A change of weights that keeps the function of a model. Subclasses are frozen dataclasses of plain data."""

    name: ClassVar[str]
    """How it is called in a list such as `rotate,permute`."""

    @classmethod
    @abstractmethod
    def absent(cls, arch: Arch) -> list[str]:
        """Returns why no rewrite of this type exists for a model; empty if it does."""

    @classmethod
    @abstractmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Rewrite":
        """Returns a random rewrite of this type for a model; every axis has its own stream."""

    def misfits(self, arch: Arch) -> list[str]:
        """Returns where the data of this rewrite do not fit a model for which its type exists."""
        return []

    def problems(self, arch: Arch) -> list[str]:
        """Returns why this rewrite does not exist for a model; empty if it does."""
        return self.absent(arch) or self.misfits(arch)

    def unties(self, arch: Arch) -> bool:
        """Says whether the head must become a weight of its own first, in a model that ties it to the embedding."""
        return False

    def arch_after(self, arch: Arch) -> Arch:
        """Returns the facts of the model after this rewrite."""
        return replace(arch, tied=arch.tied and not self.unties(arch))

    @abstractmethod
    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        """Returns one part of the rewritten model; `read` gives the parts of the model before, `arch` its facts."""

    def inverse(self, arch: Arch) -> "Rewrite | None":
        """Returns what undoes this rewrite of a model with the facts `arch`; None where nothing can."""
        return None


@dataclass(frozen=True)
class Untying(Rewrite):
    """The head becomes a weight of its own, equal to the embedding that it shared."""

    name: ClassVar[str] = "untie"

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return [] if arch.tied else ["the head is not tied to the embedding"]

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Untying":
        return cls()

    def unties(self, arch: Arch) -> bool:
        return True

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        part = read(prefix)
        if prefix != "head/":
            return part
        embedding = read("embed/")["embedding"]
        return part | {"lm_head/kernel": embedding.having(embedding.values.T)}


def steps(rewrites: Iterable[Rewrite], arch: Arch) -> list[tuple[Rewrite, Arch]]:
    """Returns the rewrites, each with the facts of the model it meets, and untying put in where one needs it."""
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


def check_rewrites(rewrites: Sequence[Rewrite], arch: Arch) -> None:
    """Checks that each rewrite exists for the model that those before it leave.

    Raises:
      ValueError: every rewrite that does not, with the reasons.
    """
    lines = [f"{step.name}: {problem}" for step, met in steps(rewrites, arch) for problem in step.problems(met)]
    if lines:
        raise ValueError("\n  ".join([f"no such rewrite of this {arch.family} model:", *lines]))


def inverses(rewrites: Sequence[Rewrite], arch: Arch) -> tuple[Rewrite, ...]:
    """Returns the rewrites that undo these, the last one first; `arch` holds the facts of the model before them.

    A rotation and a setting of gains have folded gains into their readers; undoing leaves these folded.

    Raises:
      ValueError: one of them has no inverse.
    """
    found = []
    for rewrite in rewrites:
        found.append((rewrite.name, rewrite.inverse(arch)))
        arch = rewrite.arch_after(arch)
    if without := [name for name, inverse in found if inverse is None]:
        raise ValueError(f"cannot be undone from its data alone: {', '.join(without)}")
    return tuple(inverse for _, inverse in reversed(found) if inverse is not None)


def rewritten(prefix: str, read: Callable[[str], Tree], rewrites: Sequence[Rewrite], arch: Arch) -> Tree:
    """Returns one part of the model after the rewrites, in numpy; `read` gives the subtrees of the model before."""

    def wide(prefix: str) -> Part:
        leaves = {name: to_host(leaf) for name, leaf in flatten(read(prefix)).items()}
        return {name: Weight(leaf, leaf.dtype) for name, leaf in leaves.items()}

    reader: Read = wide
    for rewrite, met in steps(rewrites, arch):
        reader = functools.partial(rewrite.part, read=reader, arch=met)
    return unflatten({name: weight.rounded for name, weight in reader(prefix).items()})


def apply(params: Tree, rewrites: Sequence[Rewrite], arch: Arch) -> Tree:
    """Returns a whole tree of params after the rewrites, in numpy; `arch_after` gives the facts of that model.

    Raises:
      ValueError: as `check_rewrites`.
    """
    check_rewrites(rewrites, arch)

    def read(prefix: str) -> Tree:
        name, _, index = prefix.strip("/").partition("/")
        return params[name][index] if index else params[name]

    layers = range(arch_after(rewrites, arch).num_layers)
    tree = {name: rewritten(f"{name}/", read, rewrites, arch) for name in ("embed", "head")}
    return tree | {"layers": {str(i): rewritten(f"layers/{i}/", read, rewrites, arch) for i in layers}}


def rows_of(prefix: str, arch: Arch) -> AxisTable:
    """Returns the rows of one part by the names of its leaves in it."""
    return table_of(arch).restricted(prefix)


def stream(key: PRNGKeyArray, name: str) -> np.random.Generator:
    """Returns a generator of its own for a name: draws for one axis do not depend on which others are drawn."""
    return np.random.default_rng(np.asarray(jax.random.key_data(jax.random.fold_in(key, zlib.crc32(name.encode())))))
