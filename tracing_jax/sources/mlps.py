"""A model whose layers are the MLPs of another, each expert one of its own: for comparisons of MLPs one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.sources.lazy_leaves import leaf, leaf_slice
from tracing_jax.sources.source import InMemory, ParamSource
from tracing_jax.tree import Tree, flatten, select, unflatten

_SHARED = "mlp/shared/"
_OF_MIXTURE = ("mlp/router", "mlp/output_gate")
_LATENT = ("mlp/latent_in/kernel", "mlp/latent_out/kernel")

# The facts of a model of which each layer is one MLP.
_DENSE: dict[str, Any] = {
    "num_experts": None, "experts_per_token": None, "layer_experts": (), "shared_mlp_dim": None, "shared_gate": False,
    "branch_norms": False, "expert_latent_dim": None,
}  # fmt: skip

_BRANCH_NORMS = ("shared_mlp_norm", "shared_mlp_post_norm", "expert_post_norm")

MlpIndex = tuple[int, int | None]
"""Layer and expert; -1 is the MLP beside the experts, None that of a layer without experts."""


def mlp_indices(arch: Arch) -> list[MlpIndex]:
    """Returns where the MLPs of a model are, layer by layer; in each the experts come first."""
    places: list[MlpIndex] = []
    for layer in range(arch.num_layers):
        if not arch.has_experts(layer):
            places.append((layer, None))
            continue
        places += [(layer, expert) for expert in range(arch.num_experts or 0)]
        places += [] if arch.shared_mlp_dim is None else [(layer, -1)]
    return places


@dataclass(frozen=True)
class OneMlp(InMemory):
    """A model whose only layer is an MLP of another.

    Attributes:
      source: the other model.
      place: of the MLP in it.
    """

    source: ParamSource
    place: MlpIndex


def origin(source: ParamSource, layer: int) -> tuple[ParamSource, MlpIndex]:
    """Returns the model that the MLP of a layer belongs to, and its place there; the source itself if it is no view."""
    if isinstance(source, OneMlp):
        return source.source, source.place
    if isinstance(source, MlpsAsLayers):
        return source.source, source.places[layer]
    return source, (layer, None)


def whole_model(source: ParamSource) -> ParamSource:
    """Returns the model of whose MLPs the source is a view; the source itself if it is none."""
    return source.source if isinstance(source, OneMlp | MlpsAsLayers) else source


def layer_of(source: ParamSource, index: int) -> int:
    """Returns the layer, in the `whole_model`, of the MLP of a layer of this source."""
    return origin(source, index)[1][0]


def one_mlp(source: ParamSource, layer: int, expert: int | None) -> OneMlp:
    """Returns a model whose only layer is one MLP of another, with the norms around it; it has no attention.

    Args:
      source: of the MLP; where it can read slices, no other expert is read.
      layer: of the MLP.
      expert: of that layer; None where it has no experts.
    """
    prefix = f"layers/{layer}/"
    arch = source.arch
    read = tuple(f"{name}/" for name in _leaves_of(arch))
    leaves = {}
    for name in (name for name in axis_table(arch).leaves if name.startswith(prefix)):
        own = name.removeprefix(prefix)
        own_name = _own_name(own, 0 if expert is None else expert) if own.startswith(read) else None
        if own_name is not None:
            is_stacked = own.startswith("mlp/") and own not in _LATENT
            leaves[own_name] = _of_expert(source, name, expert if is_stacked else None)
    if arch.branch_norms and expert is not None:
        leaves = _with_own_norms(leaves, expert)
    if arch.expert_latent_dim is not None:
        leaves = _without_latent(leaves, expert)
    width = arch.mlp_dim_of(layer)
    dense = replace(arch.with_layers([layer]), mlp_dim=width, layer_mlp_dims=(), **_DENSE)
    return OneMlp(dense, {"layers": {"0": unflatten(leaves)}}, source, (layer, expert))


def _of_expert(source: ParamSource, name: str, expert: int | None) -> Any:
    if expert is None:
        return leaf(source, name)
    found = leaf_slice(source, name, 0, slice(expert, expert + 1))
    return leaf(source, name)[expert] if found is None else found[0]


@dataclass(frozen=True)
class MlpsAsLayers:
    """A source with a layer for each MLP of another, in the order of layers and experts; it has no attention.

    Of a layer with experts all are read when one of them is asked for, and the last layer read is kept.

    Attributes:
      source: the other model.
      chosen: where the MLPs are, if not all.
    """

    source: ParamSource
    chosen: tuple[MlpIndex, ...] | None = None
    _kept: dict[int, Tree] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def places(self) -> list[MlpIndex]:
        """Where each MLP is in the model."""
        return mlp_indices(self.source.arch) if self.chosen is None else list(self.chosen)

    @cached_property
    def arch(self) -> Arch:
        """The facts of a dense model of so many layers."""
        arch = self.source.arch
        units = {-1: arch.shared_mlp_dim or 0}
        found = replace(
            arch.with_layers([layer for layer, _ in self.places]),
            **_DENSE,
            layer_windows=(None,) * len(self.places),
            layer_mlp_dims=tuple(units.get(e if e is not None else 0, arch.mlp_dim_of(i)) for i, e in self.places),
        )  # fmt: skip
        same = len(set(found.layer_mlp_dims)) == 1
        return replace(found, mlp_dim=found.layer_mlp_dims[0], layer_mlp_dims=()) if same else found

    def name(self, index: int) -> str:
        """Returns what the MLP at an index is called: `layer 3`, `layer 3 expert 1` or `layer 3 shared expert`."""
        layer, expert = self.places[index]
        if expert is None:
            return f"layer {layer}"
        return f"layer {layer} shared expert" if expert < 0 else f"layer {layer} expert {expert}"

    def embed(self) -> Tree:
        """Returns the subtree `embed`."""
        return self.source.embed()

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the MLP at an index with the norms around it, or its leaves under the names in `only`."""
        layer, expert = self.places[index]
        if expert is None:
            return select(self.source.layer(layer, only or _leaves_of(self.source.arch)), only)
        if layer not in self._kept:
            self._kept.clear()
            self._kept[layer] = self.source.layer(layer, _leaves_of(self.source.arch))
        leaves = {
            own: leaf if expert < 0 or not name.startswith("mlp/") or name in _LATENT else leaf[expert]
            for name, leaf in flatten(self._kept[layer]).items()
            if (own := _own_name(name, expert)) is not None
        }
        if self.source.arch.branch_norms:
            leaves = _with_own_norms(leaves, expert)
        if self.source.arch.expert_latent_dim is not None:
            leaves = _without_latent(leaves, expert)
        return select(unflatten(leaves), only)

    def head(self) -> Tree:
        """Returns the subtree `head`."""
        return self.source.head()


def _leaves_of(arch: Arch) -> tuple[str, ...]:
    """Returns the names of the MLPs of a layer and of the norms around them."""
    return ("mlp", arch.mlp_norm, "mlp_post_norm", *(_BRANCH_NORMS if arch.branch_norms else ()))


def _with_own_norms(leaves: dict[str, Any], expert: int) -> dict[str, Any]:
    """Returns the leaves of an MLP with the norms of its own in place of those of its layer.

    What a norm after it, and then one after the sum of all MLPs, multiply is the product of their gains.
    """
    before, after = ("shared_mlp_norm", "shared_mlp_post_norm") if expert < 0 else ("mlp_norm", "expert_post_norm")
    gains = [jnp.asarray(leaves[f"{name}/scale"], jnp.float32) for name in (after, "mlp_post_norm")]
    own = {name: leaf for name, leaf in leaves.items() if not name.startswith(_BRANCH_NORMS)}
    return own | {"mlp_norm/scale": leaves[f"{before}/scale"], "mlp_post_norm/scale": gains[0] * gains[1]}


def _without_latent(leaves: dict[str, Any], expert: int | None) -> dict[str, Any]:
    """Returns the leaves of an expert with the projections around the experts in its kernels: it reads features."""
    own = {name: value for name, value in leaves.items() if name not in _LATENT}
    if expert is None or expert < 0:
        return own
    before, after = (leaves[name] for name in _LATENT)
    for name, kernel in own.items():
        if name.endswith(("gate_proj/kernel", "up_proj/kernel")):
            own[name] = _product(before, kernel)
        if name.endswith("down_proj/kernel"):
            own[name] = _product(kernel, after)
    return own


@jax.jit
def _product(first: Float[Array, "N C"], second: Float[Array, "C M"]) -> Float[Array, "N M"]:
    first, second = (jnp.asarray(kernel, jnp.float32) for kernel in (first, second))
    return jnp.matmul(first, second, precision="highest")


def _own_name(name: str, expert: int) -> str | None:
    """Returns the name in an MLP of a leaf of its layer; None if it belongs to others."""
    if not name.startswith("mlp/"):
        return name
    if name.startswith(_OF_MIXTURE) or name.startswith(_SHARED) != (expert < 0):
        return None
    return name.replace(_SHARED, "mlp/")
