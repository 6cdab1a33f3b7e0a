"""Sources over other sources: rewritten, or with each subtree passed through a function; all are read when asked to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
from jax.sharding import Mesh

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.rewrites import Rewrite, arch_after, check_rewrites, reorders_only, rewrite_subtree
from tracing_jax.sharding import shard
from tracing_jax.sources.prefetch import read_through
from tracing_jax.sources.source import InMemory, ParamSource, assembled, subtree, with_bar
from tracing_jax.tree import Tree, select


@dataclass(frozen=True)
class MappedSource:
    """A source whose subtrees are those of another, each passed through `function(subtree, table of the subtree)`.

    The function treats every leaf by itself: it may be given a layer of which only some leaves were asked for.
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
        """Returns the mapped subtree `embed`."""
        return self.function(self.source.embed(), self._table.restricted("embed/"))

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the mapped subtree `layers/<index>`, or its leaves under the names in `only`."""
        return self.function(self.source.layer(index, only), self._table.restricted(f"layers/{index}/"))

    def head(self) -> Tree:
        """Returns the mapped subtree `head`."""
        return self.function(self.source.head(), self._table.restricted("head/"))


def sharded(source: ParamSource, mesh: Mesh) -> MappedSource:
    """Returns the source with its leaves on the devices of a mesh, split by the axis table."""
    return MappedSource(source, lambda subtree, table: shard(subtree, table, mesh))


@dataclass(frozen=True)
class RewrittenSource:
    """A source after rewrites, whose subtrees are computed when they are asked for; see `rewritten`."""

    source: ParamSource
    rewrites: tuple[Rewrite, ...]

    @cached_property
    def arch(self) -> Arch:
        """The facts of the model after the rewrites."""
        return arch_after(self.rewrites, self.source.arch)

    def embed(self) -> Tree:
        """Returns the rewritten subtree `embed`."""
        return self._subtree("embed/")

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the rewritten subtree `layers/<index>`, or its leaves under the names in `only`.

        A leaf may depend on every other: the whole layer is read, unless the rewrites only reorder units.
        """
        prefix = f"layers/{index}/"
        if reorders_only(self.rewrites):
            return rewrite_subtree(prefix, lambda _: self.source.layer(index, only), self.rewrites, self.source.arch)
        return select(self._subtree(prefix), only)

    def head(self) -> Tree:
        """Returns the rewritten subtree `head`."""
        return self._subtree("head/")

    def _subtree(self, prefix: str) -> Tree:
        return rewrite_subtree(prefix, lambda name: subtree(self.source, name), self.rewrites, self.source.arch)


def rewritten(source: ParamSource, rewrites: Sequence[Rewrite]) -> ParamSource:
    """Returns the source after the rewrites, from left to right, subtree by subtree as they are asked for.

    Where all rewrites only reorder units, each leaf keeps its type, dtype and sharding, and every value its bits. Else
    values are computed in float64 on the host and rounded once to the dtype of their leaf. A prefetching source
    remains one: what it reads is rewritten on its thread.

    Raises:
      ValueError: the model does not support a rewrite, with the reasons.

    Example:
      >>> model = tj.load("demo:base")
      >>> other = tj.rewritten(model, tj.draw_rewrites("units,permute", jax.random.key(0), model.arch))
      >>> tokens = np.arange(8, dtype=np.int32)[None]
      >>> np.allclose(tj.logits(other, tokens), tj.logits(model, tokens), atol=1e-3)
      True
    """
    check_rewrites(rewrites, source.arch)
    return read_through(source, lambda inner: RewrittenSource(inner, tuple(rewrites)))


def rewritten_donating(model: ParamSource, rewrites: Sequence[Rewrite], description: str) -> InMemory:
    """Returns a resident model after rewrites that only reorder units; the device buffers of `model` are donated.

    Each subtree's old buffers are freed as soon as the new ones are there: at most one subtree more than the model is
    in memory. `model` must not be used afterwards, nor may another model share its leaves.

    Raises:
      ValueError: a rewrite that does more than reorder, or that does not fit the model; nothing was donated.
    """
    if not reorders_only(rewrites):
        raise ValueError("only rewrites that reorder units, subtree by subtree, can take over a model's memory")
    after = rewritten(model, rewrites)

    def subtrees() -> Iterator[tuple[str, Tree]]:
        for prefix, new in with_bar(after, description):
            kept = {id(leaf) for leaf in jax.tree.leaves(jax.block_until_ready(new))}
            for old in jax.tree.leaves(subtree(model, prefix)):
                if isinstance(old, jax.Array) and id(old) not in kept:
                    old.delete()
            yield prefix, new

    return InMemory(after.arch, assembled(subtrees()))
