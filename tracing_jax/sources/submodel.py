"""A model of some layers of another, some of their MLP units, and the embeddings of some tokens.

Other weights are not read, where a source can read slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table, kind_of
from tracing_jax.sources.lazy_leaves import leaf, leaf_slice
from tracing_jax.sources.source import ParamSource
from tracing_jax.tree import Tree, flatten, select, unflatten


@dataclass(frozen=True)
class Submodel:
    """A source of some layers of another, with a range of their units and some of its tokens, renumbered from 0.

    Attributes:
      layers: which layers, in this order.
      units: the range of MLP units in them; None for all.
      tokens: ids of the tokens.
      read: [weights, bytes] read from the source so far, in its own dtype.
    """

    source: ParamSource
    layers: Sequence[int]
    units: slice | None
    tokens: Int[np.ndarray, " S"]
    read: list[int] = field(default_factory=lambda: [0, 0])

    @cached_property
    def arch(self) -> Arch:
        """The facts of the small model."""
        arch = replace(self.source.arch.with_layers(self.layers), vocab_size=len(self.tokens))
        if self.units is None:
            return arch
        units = self.units.stop - self.units.start
        widths = (units,) * len(arch.layer_mlp_dims)
        shared = None if arch.shared_mlp_dim is None else units
        return replace(arch, mlp_dim=units, layer_mlp_dims=widths, shared_mlp_dim=shared)

    def embed(self) -> Tree:
        """Returns the subtree `embed`, with rows of the chosen tokens."""
        return self._subtree("embed/")

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the subtree of the chosen layer at this index, or its leaves under the names in `only`."""
        return self._subtree(f"layers/{self.layers[index]}/", only)

    def head(self) -> Tree:
        """Returns the subtree `head`, with rows of the chosen tokens."""
        return self._subtree("head/")

    @cached_property
    def _table(self) -> AxisTable:
        return axis_table(self.source.arch)

    def _subtree(self, prefix: str, only: Sequence[str] = ()) -> Tree:
        names = {name.removeprefix(prefix): name for name in self._table.leaves if name.startswith(prefix)}
        return unflatten({short: self._leaf(name) for short, name in flatten(select(unflatten(names), only)).items()})

    def _leaf(self, name: str) -> Any:
        for axis, of in enumerate(self._table.leaves[name].axes):
            if of == "vocab":
                return self._rows(name, axis)
            if of is not None and kind_of(of) == "mlp" and self.units is not None:
                return self._slice(name, axis, self.units)
        return self._tallied(leaf(self.source, name))

    def _rows(self, name: str, axis: int) -> np.ndarray:
        """Returns the chosen tokens of a leaf; consecutive ones are read together."""
        ids, at = np.unique(self.tokens, return_inverse=True)
        runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
        spans = [slice(int(run[0]), int(run[-1]) + 1) for run in runs] if len(ids) else [slice(0, 1)]
        return np.take(np.asarray(self._slice(name, axis, *spans)), at, axis=axis)

    def _slice(self, name: str, axis: int, *spans: slice) -> Any:
        found = leaf_slice(self.source, name, axis, *spans)
        if found is not None:
            return self._tallied(found)
        whole = self._tallied(leaf(self.source, name))
        parts = [whole[(slice(None),) * axis + (span,)] for span in spans]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)

    def _tallied(self, weights: Any) -> Any:
        self.read[0] += weights.size
        self.read[1] += weights.nbytes
        return weights
