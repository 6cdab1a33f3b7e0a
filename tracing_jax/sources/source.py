"""`ParamSource`: a model's params, read subtree by subtree; `InMemory` holds all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tracing_jax.arch import Arch
from tracing_jax.progress import tqdm
from tracing_jax.tree import Tree, flatten, parsed_prefix, select


@runtime_checkable
class ParamSource(Protocol):
    """Gives a model's params in subtrees: `embed`, each `layers/<i>`, and `head`.

    Example:
      >>> model = tj.open("demo:base")
      >>> isinstance(model, tj.ParamSource)
      True
      >>> sorted(model.layer(0, ["mlp"])["mlp"])
      ['down_proj', 'gate_proj', 'up_proj']
    """

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


@runtime_checkable
class SliceReader(Protocol):
    """What a `ParamSource` may offer besides: a slice of a leaf without reading the rest of it."""

    def leaf_slice(self, name: str, axis: int, *spans: slice) -> Any:
        """Returns slices of a leaf on one of its axes, joined; None if the leaf can only be read whole."""


@dataclass(frozen=True)
class InMemory:
    """A source over a whole tree of params.

    Example:
      >>> import jax
      >>> model = tj.load("demo:base")
      >>> halved = tj.InMemory(model.arch, jax.tree.map(lambda leaf: leaf / 2, model.params))
    """

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

    def leaf_slice(self, name: str, axis: int, *spans: slice) -> Any:
        """Returns slices of a leaf on one of its axes, joined."""
        leaf = flatten(self.params)[name]
        parts = [leaf[(slice(None),) * axis + (span,)] for span in spans]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def prefixes(arch: Arch) -> list[str]:
    """Returns `embed/`, each `layers/<i>/` in order, and `head/`."""
    return ["embed/", *(f"layers/{i}/" for i in range(arch.num_layers)), "head/"]


def subtree(source: ParamSource, prefix: str) -> Tree:
    """Returns the subtree under one of the `prefixes`."""
    name, index = parsed_prefix(prefix)
    if name == "layers":
        return source.layer(int(index))
    return source.embed() if name == "embed" else source.head()


def subtrees(source: ParamSource) -> Iterator[tuple[str, Tree]]:
    """Yields (prefix, subtree) for each of the `prefixes`."""
    for prefix in prefixes(source.arch):
        yield prefix, subtree(source, prefix)


def resident_params(source: ParamSource) -> Tree | None:
    """Returns the tree of params if it is in memory."""
    return source.params if isinstance(source, InMemory) else None


def is_resident(source: ParamSource) -> bool:
    """Returns whether all leaves are in memory, so that reading one costs nothing."""
    return isinstance(source, InMemory)


def has_embeddings(source: ParamSource) -> bool:
    """Returns whether embeddings can be read, which submodels in memory may lack."""
    return not isinstance(source, InMemory) or bool(source.params.get("embed"))


def in_memory(source: ParamSource, description: str = "reading") -> InMemory:
    """Returns the source with all its subtrees read once and kept, under a progress bar."""
    if isinstance(source, InMemory):
        return source
    return InMemory(source.arch, assembled(with_bar(source, description)))


def assembled(named_subtrees: Iterator[tuple[str, Tree]]) -> Tree:
    """Returns the whole tree of params from (prefix, subtree) pairs."""
    params: Tree = {"layers": {}}
    for prefix, subtree in named_subtrees:
        name, index = parsed_prefix(prefix)
        parent, key = (params["layers"], index) if name == "layers" else (params, name)
        parent[key] = subtree
    return params


def with_bar(source: ParamSource, description: str) -> Iterator[tuple[str, Tree]]:
    """Yields the subtrees as `subtrees` does, under a progress bar."""
    return iter(
        tqdm(subtrees(source), total=source.arch.num_layers + 2, desc=description, unit="subtree", disable=None)
    )
