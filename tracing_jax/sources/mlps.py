"""A model whose layers are the MLPs of another, each expert one of its own: for what looks at MLPs one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tracing_jax.arch import Arch
from tracing_jax.sources.source import ParamSource
from tracing_jax.tree import Tree, flatten, select, unflatten


@dataclass(frozen=True)
class MlpsAsLayers:
    """A source with a layer for each MLP of another, in the order of layers and experts; it has no attention.

    Of a layer with experts all are read when one of them is asked for, and the last layer read is kept.
    """

    source: ParamSource
    _kept: dict[int, Tree] = field(default_factory=dict, repr=False, compare=False)

    @property
    def _leaves(self) -> tuple[str, ...]:
        return ("mlp", self.source.arch.mlp_norm, "mlp_post_norm")

    @property
    def experts(self) -> int:
        """The number of MLPs of each layer."""
        return self.source.arch.num_experts or 1

    @property
    def arch(self) -> Arch:
        """The facts of a dense model of so many layers."""
        arch = self.source.arch
        count = arch.num_layers * self.experts
        ropes = tuple(rope for rope in arch.layer_ropes for _ in range(self.experts))
        return replace(
            arch, num_layers=count, num_experts=None, experts_per_token=None, layer_ropes=ropes,
            layer_windows=(None,) * count,
        )  # fmt: skip

    def name(self, index: int) -> str:
        """Returns what the MLP at an index is called: `layer 3`, or `layer 3 expert 1`."""
        layer, expert = divmod(index, self.experts)
        return f"layer {layer} expert {expert}" if self.experts > 1 else f"layer {layer}"

    def embed(self) -> Tree:
        """Returns the subtree `embed`."""
        return self.source.embed()

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the MLP at an index with the norms around it, or its leaves under the names in `only`."""
        layer, expert = divmod(index, self.experts)
        if self.experts == 1:
            return select(self.source.layer(layer, only or self._leaves), only)
        if layer not in self._kept:
            self._kept.clear()
            self._kept[layer] = self.source.layer(layer, self._leaves)
        leaves = {
            name: leaf[expert] if name.startswith("mlp/") else leaf
            for name, leaf in flatten(self._kept[layer]).items()
            if not name.startswith("mlp/router")
        }
        return select(unflatten(leaves), only)

    def head(self) -> Tree:
        """Returns the subtree `head`."""
        return self.source.head()
