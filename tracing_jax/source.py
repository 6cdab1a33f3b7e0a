"""`ParamSource`: a model's params, part by part. Sources wrap one another lazily."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from jax.sharding import Mesh
from tqdm import tqdm

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.sharding import place
from tracing_jax.symmetry import (
    Permutations,
    Rewrite,
    arch_after,
    check_permutations,
    check_rewrites,
    permute,
    rewritten,
)
from tracing_jax.tree import Tree


@runtime_checkable
class ParamSource(Protocol):
    """Gives a model's params in parts: the subtrees `embed`, `layers/<i>` and `head` of its tree."""

    @property
    def arch(self) -> Arch:
        """The facts of the model."""

    def embed(self) -> Tree:
        """Returns the subtree `embed`."""

    def layer(self, index: int) -> Tree:
        """Returns the subtree `layers/<index>`."""

    def head(self) -> Tree:
        """Returns the subtree `head`, without the embedding that a tied head shares."""


@dataclass(frozen=True)
class InMemory:
    """A source over a whole tree of params."""

    arch: Arch
    params: Tree

    def embed(self) -> Tree:
        """Returns the subtree `embed`."""
        return self.params["embed"]

    def layer(self, index: int) -> Tree:
        """Returns the subtree `layers/<index>`."""
        return self.params["layers"][str(index)]

    def head(self) -> Tree:
        """Returns the subtree `head`."""
        return self.params["head"]


@dataclass(frozen=True)
class Mapped:
    """A source whose parts are those of another, each passed through `function(part, table of the part)`."""

    source: ParamSource
    function: Callable[[Tree, AxisTable], Tree]

    @property
    def arch(self) -> Arch:
        """The facts of the wrapped model."""
        return self.source.arch

    @cached_property
    def _table(self) -> AxisTable:
        return axis_table(self.arch)

    def embed(self) -> Tree:
        """Returns the transformed subtree `embed`."""
        return self.function(self.source.embed(), self._table.restricted("embed/"))

    def layer(self, index: int) -> Tree:
        """Returns the transformed subtree `layers/<index>`."""
        return self.function(self.source.layer(index), self._table.restricted(f"layers/{index}/"))

    def head(self) -> Tree:
        """Returns the transformed subtree `head`."""
        return self.function(self.source.head(), self._table.restricted("head/"))


def permuted(source: ParamSource, permutations: Permutations) -> Mapped:
    """Returns the source with its units permuted, part by part as they are asked for.

    Raises:
      ValueError: the permutations do not fit the model.
    """
    check_permutations(permutations, axis_table(source.arch))
    return Mapped(source, lambda part, table: permute(part, permutations, table))


@dataclass(frozen=True)
class Disguised:
    """A source after rewrites that keep its function, in numpy; the facts of the model may change with them."""

    source: ParamSource
    rewrites: Sequence[Rewrite]

    @cached_property
    def arch(self) -> Arch:
        """The facts of the model after the rewrites."""
        return arch_after(self.rewrites, self.source.arch)

    def embed(self) -> Tree:
        """Returns the rewritten subtree `embed`."""
        return self._part("embed/")

    def layer(self, index: int) -> Tree:
        """Returns the rewritten subtree `layers/<index>`."""
        return self._part(f"layers/{index}/")

    def head(self) -> Tree:
        """Returns the rewritten subtree `head`."""
        return self._part("head/")

    def _part(self, prefix: str) -> Tree:
        return rewritten(prefix, lambda prefix: part(self.source, prefix), self.rewrites, self.source.arch)


def disguised(source: ParamSource, rewrites: Sequence[Rewrite]) -> Disguised:
    """Returns the source after the rewrites, from left to right, part by part as they are asked for.

    Values are computed in float64 on the host and rounded once to the dtype of their leaf.

    Raises:
      ValueError: a rewrite does not exist for the model it meets, with the reasons.
    """
    check_rewrites(rewrites, source.arch)
    return Disguised(source, tuple(rewrites))


def placed(source: ParamSource, mesh: Mesh) -> Mapped:
    """Returns the source with its parts on the devices of a mesh, split by the axis table."""
    return Mapped(source, lambda part, table: place(part, table, mesh))


def part(source: ParamSource, prefix: str) -> Tree:
    """Returns the subtree under `embed/`, `layers/<i>/` or `head/`."""
    name, _, index = prefix.strip("/").partition("/")
    if name == "layers":
        return source.layer(int(index))
    return source.embed() if name == "embed" else source.head()


def parts(source: ParamSource) -> Iterator[tuple[str, Tree]]:
    """Yields (prefix, subtree) for `embed/`, each `layers/<i>/` in order, and `head/`."""
    for prefix in ("embed/", *(f"layers/{i}/" for i in range(source.arch.num_layers)), "head/"):
        yield prefix, part(source, prefix)


def in_memory(source: ParamSource, description: str = "reading") -> InMemory:
    """Returns the source with all its parts read once and kept, under a progress bar."""
    if isinstance(source, InMemory):
        return source
    params: Tree = {"layers": {}}
    for prefix, subtree in _with_bar(source, description):
        _put(params, prefix, subtree)
    return InMemory(source.arch, params)


def permute_in_place(model: InMemory, permutations: Permutations) -> None:
    """Permutes the units of a model that nobody else holds, part by part: a second copy never lives.

    Raises:
      ValueError: the permutations do not fit the model; it is unchanged.
    """
    for prefix, subtree in _with_bar(permuted(model, permutations), "permuting"):
        _put(model.params, prefix, subtree)


def _put(params: Tree, prefix: str, subtree: Tree) -> None:
    """Sets one part of a tree of params."""
    name, _, index = prefix.strip("/").partition("/")
    holder, key = (params["layers"], index) if name == "layers" else (params, name)
    holder[key] = subtree


def _with_bar(source: ParamSource, description: str) -> Iterator[tuple[str, Tree]]:
    return iter(tqdm(parts(source), total=source.arch.num_layers + 2, desc=description, unit="part", disable=None))
