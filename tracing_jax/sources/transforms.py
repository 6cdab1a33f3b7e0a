"""Sources over other sources: permuted, disguised, placed on devices; all are read when they are asked to be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from jax.sharding import Mesh

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.rewrites import (
    Permutations,
    Rewrite,
    arch_after,
    check_permutations,
    check_rewrites,
    permute,
    rewritten,
)
from tracing_jax.sharding import place
from tracing_jax.sources.prefetch import PrefetchingSource
from tracing_jax.sources.source import InMemory, ParamSource, part, put, with_bar
from tracing_jax.tree import Tree, select


@dataclass(frozen=True)
class Mapped:
    """A source whose parts are those of another, each passed through `function(part, table of the part)`.

    The function treats every leaf by itself: it may be handed a part of which only some leaves were asked for.
    """

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

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the transformed subtree `layers/<index>`, or its leaves under the names in `only`."""
        return self.function(self.source.layer(index, only), self._table.restricted(f"layers/{index}/"))

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


def permute_in_place(model: InMemory, permutations: Permutations) -> None:
    """Permutes the units of a model that nobody else holds, part by part: a second copy never lives.

    Raises:
      ValueError: the permutations do not fit the model; it is unchanged.
    """
    for prefix, subtree in with_bar(permuted(model, permutations), "permuting"):
        put(model.params, prefix, subtree)


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

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the rewritten subtree `layers/<index>`, or its leaves under the names in `only`.

        A leaf may depend on every other: the whole layer is read and rewritten in any case.
        """
        return select(self._part(f"layers/{index}/"), only)

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


def over(source: ParamSource, wrap: Callable[[ParamSource], ParamSource]) -> ParamSource:
    """Returns the wrapped source; of one that reads ahead, what it reads is wrapped, and done on its thread too."""
    return PrefetchingSource(wrap(source.source)) if isinstance(source, PrefetchingSource) else wrap(source)
