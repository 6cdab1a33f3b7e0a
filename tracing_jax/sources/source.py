"""What a source is, and reading one part after another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from tracing_jax.arch import Arch
from tracing_jax.tree import Tree, flatten, select


@runtime_checkable
class ParamSource(Protocol):
    """Gives a model's params in parts: the subtrees `embed`, `layers/<i>` and `head` of its tree."""

    @property
    def arch(self) -> Arch:
        """The facts of the model."""

    def embed(self) -> Tree:
        """Returns the subtree `embed`."""

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the subtree `layers/<index>`; of its leaves `only` those under these names, such as `mlp/up_proj`.

        What is not asked for need not be read.
        """

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

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the subtree `layers/<index>`, or its leaves under the names in `only`."""
        return select(self.params["layers"][str(index)], only)

    def head(self) -> Tree:
        """Returns the subtree `head`."""
        return self.params["head"]

    def cut(self, name: str, axis: int, span: slice) -> Any:
        """Returns the slice of a leaf on one of its axes."""
        return flatten(self.params)[name][(slice(None),) * axis + (span,)]


def prefixes(arch: Arch) -> list[str]:
    """Returns `embed/`, each `layers/<i>/` in order, and `head/`."""
    return ["embed/", *(f"layers/{i}/" for i in range(arch.num_layers)), "head/"]


def part(source: ParamSource, prefix: str) -> Tree:
    """Returns the subtree under `embed/`, `layers/<i>/` or `head/`."""
    name, _, index = prefix.strip("/").partition("/")
    if name == "layers":
        return source.layer(int(index))
    return source.embed() if name == "embed" else source.head()


def parts(source: ParamSource) -> Iterator[tuple[str, Tree]]:
    """Yields (prefix, subtree) for `embed/`, each `layers/<i>/` in order, and `head/`."""
    for prefix in prefixes(source.arch):
        yield prefix, part(source, prefix)


def is_resident(source: ParamSource) -> bool:
    """Returns whether all leaves are in memory, so that reading one costs nothing."""
    return isinstance(source, InMemory)


def in_memory(source: ParamSource, description: str = "reading") -> InMemory:
    """Returns the source with all its parts read once and kept, under a progress bar."""
    if isinstance(source, InMemory):
        return source
    params: Tree = {"layers": {}}
    for prefix, subtree in with_bar(source, description):
        put(params, prefix, subtree)
    return InMemory(source.arch, params)


def put(params: Tree, prefix: str, subtree: Tree) -> None:
    """Sets one part of a tree of params."""
    name, _, index = prefix.strip("/").partition("/")
    holder, key = (params["layers"], index) if name == "layers" else (params, name)
    holder[key] = subtree


def with_bar(source: ParamSource, description: str) -> Iterator[tuple[str, Tree]]:
    """Yields the parts as `parts` does, under a progress bar."""
    return iter(tqdm(parts(source), total=source.arch.num_layers + 2, desc=description, unit="part", disable=None))
