"""One table names every axis of every weight; loading, rewrites, matching, sharding and interpolation read it.

An axis name says how far the axis reaches: `embed` is shared by the whole model, `layers/3/mlp` belongs to one layer.
Leaves with the same axis name must be permuted together. The last part of an axis name is its kind, and two small
tables say which rewrites a kind allows (below) and which mesh axis splits it (`sharding.py`). Only `axis_table` depends
on the architecture.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tracing_jax.arch import Arch, Reading, head_pairs, keys_of
from tracing_jax.tree import Tree, flatten

SYMMETRY = {
    "embed": "permutation, shared by the whole model",
    "mlp": "permutation, each layer its own",
    "kv_heads": "permutation, each layer its own",
    "q_group": "permutation, each layer and each kv head its own",
    "qk_dim": "rotations that commute with RoPE",
    "v_dim": "any invertible map per kv head",
    "expert": "permutation, each layer its own; of groups and inside them, where a router chooses among groups",
    "q_latent": "permutation, each layer its own; any rotation once the gain of its norm is folded into its readers",
    "kv_latent": "permutation, each layer its own; any rotation once the gain of its norm is folded into its readers",
    "qk_nope": "any invertible map per head: these dims have no positions",
    "qk_rope": "rotations that commute with RoPE, one for all heads, which share these dims of the keys",
    "state_groups": "permutation, each layer its own",
    "state_heads": "permutation, each layer and each group its own",
    "state_keys": "permutation, each group its own; convolution and activation act on each",
    "state_values": "permutation, alike in heads that share the gain of a norm; convolution and activation act on each",
    "tap": "none: each is a distance in tokens",
    "expert_latent": "any invertible map, each layer its own; it is not offered",
    "per_layer": "none: each belongs to the per-layer embedding of one layer",
    "per_layer_dim": "permutation, one for all layers, which share the gain of a norm; it is not offered",
    "scalar": "none",
    "position": "none: every position means itself",
    "vocab": "renaming, the tokenizer with it",
}
"""Axis kind -> the group that keeps the function of the model."""

PERMUTABLE = (
    "embed", "mlp", "kv_heads", "q_group", "expert", "q_latent", "kv_latent", "state_groups", "state_heads"
)  # fmt: skip
"""Axis kinds whose units may be permuted freely, in the models that have them."""

GROUPS = ("mlp", "norm", "attn", "emb")
"""Interpolation groups: MLPs, block norms, attention, and embeddings with head and final norm."""


MAP_PARENT = {"embed": None, "v_dim": "kv_heads", "qk_dim": "kv_heads"}
"""Axis kinds on which a linear map may act -> the kind whose units have a map each; None: one for the whole model."""

_HEADS_IN = {"q_group": "kv_heads", "state_heads": "state_groups"}
"""Axis kind -> the kind whose units hold its units."""

AxisRole = Literal["writes", "reads"]
"""Whether a leaf computes the activations on an axis or is multiplied by them. Where the activations a become M a, the
leaves that write them are multiplied by M along the axis and those that read them by M^-T."""

_WRITERS = {
    "embed": "embed o_proj down_proj out_proj latent_out", "mlp": "up_proj", "v_dim": "v_proj", "qk_dim": "q_proj",
    "q_latent": "q_a_proj", "kv_latent": "kv_a_proj", "qk_nope": "q_proj", "qk_rope": "q_rope_proj",
}  # fmt: skip
_READERS = {
    "embed": "q_proj q_rope_proj k_proj v_proj q_a_proj kv_a_proj k_rope_proj head_gate gate_proj up_proj router"
    " output_gate lm_head query_proj key_proj value_proj z_proj beta_proj decay_proj per_layer_proj"
    " latent_in",
    "mlp": "down_proj", "v_dim": "o_proj", "qk_dim": "k_proj", "q_latent": "q_proj q_rope_proj",
    "kv_latent": "k_proj v_proj", "qk_nope": "k_proj", "qk_rope": "k_rope_proj",
}  # fmt: skip
_BRANCH_NORMS = ("router_norm", "shared_mlp_norm", "shared_mlp_post_norm", "expert_post_norm")
_ROLES: tuple[tuple[AxisRole, Mapping[str, str]], ...] = (("writes", _WRITERS), ("reads", _READERS))


@dataclass(frozen=True)
class LeafSpec:
    """What the table says of one leaf.

    Attributes:
      axes: the axis names of a weight, one per dimension.
      group: its interpolation group.
      roles: for each dimension what the leaf does there, or None: the gains of a norm and the gate of an MLP belong to
        the units of an axis and neither write nor read their activations. Empty for trees with axes of their own.
      input_norm: the norm, such as `layers/3/attn_norm`, whose gain multiplies what the leaf reads on `embed`.
    """

    axes: tuple[str | None, ...]
    group: str = "mlp"
    roles: tuple[AxisRole | None, ...] = ()
    input_norm: str | None = None


_PER_LAYER_TABLE = {
    "embed/per_layer/embedding": LeafSpec(("vocab", "per_layer"), "emb"),
    "embed/per_layer_proj/kernel": LeafSpec(("embed", "per_layer"), "emb"),
    "embed/per_layer_norm/gain": LeafSpec(("per_layer_dim",), "emb"),
}


@dataclass(frozen=True)
class AxisTable:
    """Which axes every leaf of a pytree has.

    Attributes:
      leaves: leaf name -> its spec. An axis named None is independent of all others and never permuted.
      sizes: axis name -> number of units.
      parent_axis: a nested axis -> the axis whose units hold it. Units of `layers/0/q_group` are permuted inside each
        unit of `layers/0/kv_heads`, so its permutation is a matrix `[kv_heads, q_group]`.
      fixed: kinds of axes whose units are not alike in this model, so that they may not be permuted.
      pairs: the first and the second units of the pairs on `qk_dim` that rotary positions turn together, or that have
        no position; see `pairs_of` for heads of another width.
      groups: axis -> into how many groups of one size its units fall, in their order, where they do: a permutation
        keeps the units of a group together.

    Example:
      >>> table = tj.axis_table(tj.open("demo:base").arch)
      >>> table.leaves["layers/0/mlp/up_proj/kernel"].axes
      ('embed', 'layers/0/mlp')
      >>> table.parent_axis["layers/0/q_group"]
      'layers/0/kv_heads'
    """

    leaves: Mapping[str, LeafSpec]
    sizes: Mapping[str, int] = field(default_factory=dict)
    parent_axis: Mapping[str, str] = field(default_factory=dict)
    pairs: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    groups: Mapping[str, int] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    def leaves_with_axis(self, axis: str) -> dict[str, LeafSpec]:
        """Returns the specs of the leaves that have `axis`."""
        return {name: leaf for name, leaf in self.leaves.items() if axis in leaf.axes}

    def unit_shape(self, axis: str) -> tuple[int, ...]:
        """Returns the shape of an array with a value for each unit; a nested axis has a dimension for its parent."""
        parent = self.parent_axis.get(axis)
        return (self.sizes[axis],) if parent is None else (self.sizes[parent], self.sizes[axis])

    def axes_of_kind(self, kinds: Iterable[str]) -> list[str]:
        """Returns the axis names whose kind is among `kinds` and not fixed, in the order of the table.

        One list of kinds serves models of every family: a kind that only others have, such as `expert`, adds nothing.

        Raises:
          ValueError: a kind that no family has, or kinds of which the table has none.
        """
        kinds, known = set(kinds), {kind_of(axis) for axis in self.sizes} - set(self.fixed)
        unknown = kinds - known - (set(SYMMETRY) if kinds & known else set())
        if unknown:
            listed = ", ".join(sorted(unknown))
            fixed = f"; those of {', '.join(self.fixed)} are not alike" if self.fixed else ""
            raise ValueError(f"no axis of kind {listed} in this model; it has {', '.join(sorted(known))}{fixed}")
        return [axis for axis in self.sizes if kind_of(axis) in kinds & known]

    def pairs_of(self, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns `pairs` of heads of this width; those of another width than most are paired by halves."""
        if width == 2 * len(self.pairs[0]):
            return self.pairs
        return tuple(range(width // 2)), tuple(range(width // 2, 2 * (width // 2)))

    def restricted(self, prefix: str) -> "AxisTable":
        """Returns the table of the subtree under `prefix`: leaf names lose the prefix, axis names keep theirs."""
        inside = {name[len(prefix) :]: leaf for name, leaf in self.leaves.items() if name.startswith(prefix)}
        return replace(self, leaves=inside)


def kind_of(axis: str) -> str:
    """Returns the kind of an axis, the last part of its name: `mlp` for `layers/3/mlp`."""
    return axis.rsplit("/", 1)[-1]


def table_from_axes(
    axes: Mapping[str, tuple[str | None, ...]], params: Tree, parent_axis: Mapping[str, str] | None = None
) -> AxisTable:
    """Returns the checked table of any pytree for which the caller names the axes, leaf by leaf.

    Raises:
      ValueError: leaves that the names do not cover, names without a leaf, wrong ranks, or unequal sizes of one axis;
        all at once.

    Example:
      >>> params = {"in": np.ones((2, 3)), "out": np.ones((3, 2))}
      >>> table = tj.table_from_axes({"in": (None, "units"), "out": ("units", None)}, params)
      >>> table.sizes
      {'units': 3}
    """
    table = AxisTable({name: LeafSpec(tuple(spec)) for name, spec in axes.items()}, {}, dict(parent_axis or {}))
    sizes = _sizes_in(params, table)
    table = AxisTable(table.leaves, sizes, table.parent_axis)
    check(params, table)
    return table


def check(params: Tree, table: AxisTable) -> None:
    """Checks that every leaf is there, has the rank the table says, and has equal sizes wherever names are equal.

    Raises:
      ValueError: every disagreement, one line each.
    """
    found = flatten(params)
    lines = [f"missing: {name}" for name in table.leaves if name not in found]
    lines += [f"unexpected: {name} {leaf.shape}" for name, leaf in found.items() if name not in table.leaves]
    for name, spec in table.leaves.items():
        if name not in found:
            continue
        shape = found[name].shape
        if len(shape) != len(spec.axes):
            lines.append(f"wrong rank: {name} is {shape}, expected axes {spec.axes}")
            continue
        for axis, size in zip(spec.axes, shape, strict=True):
            if axis is not None and table.sizes.get(axis) != size:
                lines.append(f"wrong size: {name} has {size} units on {axis}, expected {table.sizes.get(axis)}")
    if lines:
        raise ValueError("params do not fit the axis table:\n  " + "\n  ".join(lines))


def _sizes_in(params: Tree, table: AxisTable) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, leaf in flatten(params).items():
        for axis, size in zip(table.leaves[name].axes if name in table.leaves else (), leaf.shape):
            if axis is not None:
                sizes.setdefault(axis, size)
    return sizes


def axis_table(arch: Arch) -> AxisTable:
    """Returns the table of a model of any supported family, for params `{embed, layers: {"0": ...}, head}`.

    It is made once for an architecture; do not change it.

    Example:
      >>> table = tj.axis_table(tj.open("demo:base").arch)
      >>> sorted(table.leaves_with_axis("layers/0/mlp"))[0]
      'layers/0/mlp/down_proj/kernel'
    """
    return _axis_table(arch)


@functools.lru_cache(maxsize=64)  # asked for by every reader of a leaf, and made from all leaves
def _axis_table(arch: Arch) -> AxisTable:
    if arch.reading is not None:
        return _table_of_reading(arch, arch.reading)
    leaves = {"embed/embedding": LeafSpec(("vocab", "embed"), "emb")}
    sizes = {"embed": arch.embed_dim, "vocab": arch.vocab_size}
    if arch.num_positions is not None:
        leaves["embed/positions"] = LeafSpec(("position", "embed"), "emb")
        sizes["position"] = arch.num_positions + arch.position_offset
    if arch.per_layer_dim is not None:
        leaves |= _PER_LAYER_TABLE
        sizes |= {"per_layer": arch.per_layer_count * arch.per_layer_dim, "per_layer_dim": arch.per_layer_dim}
    if arch.layer_scale:
        sizes["scalar"] = 1
    if arch.embed_norm:
        leaves |= _norm_specs(arch, "embed/norm", "emb")
    parent_axis: dict[str, str] = {}
    groups: dict[str, int] = {}
    for i in range(arch.num_layers):
        layer = f"layers/{i}/"
        leaves |= {layer + name: spec for name, spec in _block_specs(arch, i).items()}
        for mixer in arch.mixers_of(i):
            state = arch.state_mixer(mixer)
            at = layer if state is None else f"{layer}{mixer}/"
            kinds = _attention_sizes(arch, mixer) if state is None else state.sizes
            source = arch.keys_from(i, mixer)
            if source != i:  # the axes of keys and values are those of an earlier layer
                kinds = {"q_group": kinds["q_group"]}
            sizes |= {at + kind: size for kind, size in kinds.items()}
            above = at if source == i else f"layers/{source}/"
            parent_axis |= {at + kind: above + parent for kind, parent in _HEADS_IN.items() if kind in kinds}
        sizes[layer + "mlp"] = arch.mlp_dim_of(i)
        if arch.has_experts(i):
            assert arch.num_experts is not None
            sizes[layer + "expert"] = arch.num_experts
            if arch.expert_latent_dim is not None:
                sizes[layer + "expert_latent"] = arch.expert_latent_dim
            parent_axis[layer + "mlp"] = layer + "expert"
            if arch.router.groups > 1:
                groups[layer + "expert"] = arch.router.groups
            if arch.shared_mlp_dim is not None:
                sizes[layer + "shared/mlp"] = arch.shared_mlp_dim
    leaves |= _norm_specs(arch, "head/norm", "emb")
    if not arch.tied:
        leaves["head/lm_head/kernel"] = LeafSpec(("embed", "vocab"), "emb")
    if arch.head_bias:
        leaves["head/lm_head/bias"] = LeafSpec(("vocab",), "emb")
    leaves = {name: _with_roles(arch, name, spec, leaves) for name, spec in leaves.items()}
    # With ALiBi each head has a slope of its own, which is no weight and does not move with it. Heads of layers that
    # share keys move together, but permutations are looked for in one layer after another.
    fixed = ("kv_heads", "q_group") if arch.alibi_slopes or arch.shares_keys else ()
    return AxisTable(leaves, sizes, parent_axis, head_pairs(arch), groups, fixed)


def _norm_specs(arch: Arch, name: str, group: str) -> dict[str, LeafSpec]:
    """Returns the specs of what a norm of the residual stream has: a gain, a bias."""
    specs = {}
    if arch.norm != "layer_norm_plain":
        specs[f"{name}/scale"] = LeafSpec(("embed",), group)
    if arch.norm == "layer_norm":
        specs[f"{name}/bias"] = LeafSpec(("embed",), group)
    return specs


def _table_of_reading(arch: Arch, reading: Reading) -> AxisTable:
    """Returns the table of the leaves that were found in a model that is read by its weights alone."""

    def is_kept(name: str) -> bool:  # only the first layers may be used
        return not name.startswith("layers/") or int(name.split("/")[1]) < arch.num_layers

    leaves = {
        name: LeafSpec(axes, "emb" if name.startswith(("embed/", "head/")) else "mlp")
        for name, axes in reading.leaves
        if is_kept(name)
    }
    sizes = {axis: size for axis, size in reading.sizes if is_kept(axis)}
    experts = [axis for axis in sizes if kind_of(axis) == "expert"]
    parent_axis = {axis.removesuffix("expert") + "mlp": axis for axis in experts}
    leaves = {name: _with_roles(arch, name, spec, leaves) for name, spec in leaves.items()}
    return AxisTable(leaves, sizes, parent_axis)


def _attention_sizes(arch: Arch, mixer: str) -> dict[str, int]:
    """Returns kind of axis -> its size, for the axes of attention."""
    heads = arch.heads_of(mixer)
    sizes = {"kv_heads": heads.kv_heads, "q_group": heads.q_group}
    if (latent := arch.latent) is None:
        values = {} if heads.values_are_keys else {"v_dim": heads.head_dim}
        return sizes | values | {"qk_dim": heads.head_dim}
    sizes["v_dim"] = arch.v_dim
    if latent.q_rank is not None:
        sizes["q_latent"] = latent.q_rank
    return sizes | {"kv_latent": latent.kv_rank, "qk_nope": latent.nope_dim, "qk_rope": latent.rope_dim}


def _with_roles(arch: Arch, name: str, spec: LeafSpec, leaves: Mapping[str, LeafSpec]) -> LeafSpec:
    """Returns the spec with its roles and input norm; a bias has the roles of its kernel.

    A clamped GLU adds one to its up-projection: a unit is then zero where its gate is, and the gate writes.
    """
    part, _, module = name.rsplit("/", 1)[0].rpartition("/")
    swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"} if arch.clamped_glu else {}

    def role(axis: str | None) -> AxisRole | None:
        kind = kind_of(axis or "")
        acting = swapped.get(module, module) if kind == "mlp" else module
        return next((role for role, modules in _ROLES if acting in modules.get(kind, "").split()), None)

    roles = tuple(map(role, spec.axes))
    # The norms of a block are siblings of its attn and mlp, the final norm is one of the head's kernel.
    *above, own = [*part.split("/")[: 3 if part.startswith("layers/") else 1]]
    before = arch.mlp_norm if own == "mlp" else f"{own}_norm"
    if own == "mlp" and arch.branch_norms and module == "router":
        before = arch.router_norm
    if own == "mlp" and arch.branch_norms and part.endswith("/shared"):
        before = "shared_mlp_norm"
    norm = "head/norm" if own == "head" else "/".join([*above, before])
    reads = "embed" in spec.axes and roles[spec.axes.index("embed")] == "reads"
    return replace(spec, roles=roles, input_norm=norm if reads and f"{norm}/scale" in leaves else None)


def _block_specs(arch: Arch, index: int) -> dict[str, LeafSpec]:
    """Returns the specs of one block; the axes that belong to it alone have its prefix."""
    layer = f"layers/{index}/"
    specs: dict[str, LeafSpec] = {}
    for mixer in arch.mixers_of(index):
        specs |= _mixer_specs(arch, index, mixer)
    for name, present in _norms(arch, index).items():
        specs |= _norm_specs(arch, name, "norm") if present else {}
    if arch.per_layer_dim is not None:
        specs["per_layer/gate_proj/kernel"] = LeafSpec(("embed", "per_layer_dim"))
        specs["per_layer/out_proj/kernel"] = LeafSpec(("per_layer_dim", "embed"))
    if arch.layer_scale:
        specs["output/multiplier"] = LeafSpec(("scalar",), "norm")
    if arch.has_experts(index):
        specs |= _mixture_specs(arch, layer)
    else:
        specs |= _mlp_specs(arch, "mlp/", layer + "mlp")
    return specs


def _mixer_specs(arch: Arch, index: int, mixer: str) -> dict[str, LeafSpec]:
    """Returns the specs of what mixes the tokens of a layer."""
    layer = f"layers/{index}/"
    if (state := arch.state_mixer(mixer)) is None:
        if arch.latent is not None:
            return _latent_attention_specs(arch, layer)
        return _attention_specs(arch, index, mixer)
    return {
        f"{mixer}/{name}": LeafSpec(
            tuple(kind if kind == "embed" else f"{layer}{mixer}/{kind}" for kind in kinds), "attn"
        )
        for name, kinds in state.leaves.items()
    }


def _attention_specs(arch: Arch, index: int, mixer: str) -> dict[str, LeafSpec]:
    """Returns the specs of attention; where it reads the keys of an earlier layer, it has no keys and values."""
    above = f"layers/{arch.keys_from(index, mixer)}/"
    kv, qk, group = above + "kv_heads", above + "qk_dim", f"layers/{index}/q_group"
    v = qk if arch.heads_of(mixer).values_are_keys else above + "v_dim"
    axes = {"q": (kv, group, qk), "k": (kv, qk), "v": (kv, v)}
    if keys_of(mixer) is not None:
        axes = {"q": axes["q"]}
    elif v == qk:
        del axes["v"]
    specs = {f"{mixer}/{name}_proj/kernel": LeafSpec(("embed", *own), "attn") for name, own in axes.items()}
    specs[f"{mixer}/o_proj/kernel"] = LeafSpec((kv, group, v, "embed"), "attn")
    if arch.qkv_bias:
        specs |= {f"{mixer}/{name}_proj/bias": LeafSpec(own, "attn") for name, own in axes.items()}
    if arch.head_gate:
        specs[f"{mixer}/head_gate/kernel"] = LeafSpec(("embed", kv, group, v), "attn")
        if arch.qkv_bias:
            specs[f"{mixer}/head_gate/bias"] = LeafSpec((kv, group, v), "attn")
    if arch.o_bias:
        specs[f"{mixer}/o_proj/bias"] = LeafSpec(("embed",), "attn")
    for leaf in ("scale", "bias")[: 0 if arch.qk_norm is None else 1 + arch.qk_norm_bias]:
        specs |= {
            f"{mixer}/{name}_norm/{leaf}": LeafSpec((qk,) if arch.qk_norm == "head" else own, "attn")
            for name, own in axes.items()
            if name != "v"
        }
    if arch.sinks:
        specs[f"{mixer}/sinks"] = LeafSpec((kv, group), "attn")
    return specs


def _latent_attention_specs(arch: Arch, layer: str) -> dict[str, LeafSpec]:
    """Returns the specs of attention with latents; the parts of queries and keys with and without positions are leaves.

    Biases are those of the projections to the latents, and none where queries have no latent.
    """
    assert arch.latent is not None
    heads, group, nope, rope, v, kv_latent = (
        layer + kind for kind in ("kv_heads", "q_group", "qk_nope", "qk_rope", "v_dim", "kv_latent")
    )
    specs = {
        "attn/kv_a_proj/kernel": LeafSpec(("embed", kv_latent), "attn"),
        "attn/kv_a_norm/scale": LeafSpec((kv_latent,), "attn"),
        "attn/k_rope_proj/kernel": LeafSpec(("embed", rope), "attn"),
        "attn/k_proj/kernel": LeafSpec((kv_latent, heads, nope), "attn"),
        "attn/v_proj/kernel": LeafSpec((kv_latent, heads, v), "attn"),
        "attn/o_proj/kernel": LeafSpec((heads, group, v, "embed"), "attn"),
    }
    read = "embed"
    if arch.latent.q_rank is not None:
        read = layer + "q_latent"
        specs["attn/q_a_proj/kernel"] = LeafSpec(("embed", read), "attn")
        specs["attn/q_a_norm/scale"] = LeafSpec((read,), "attn")
    specs["attn/q_proj/kernel"] = LeafSpec((read, heads, group, nope), "attn")
    specs["attn/q_rope_proj/kernel"] = LeafSpec((read, heads, group, rope), "attn")
    if arch.qkv_bias:
        specs["attn/kv_a_proj/bias"] = LeafSpec((kv_latent,), "attn")
        specs["attn/k_rope_proj/bias"] = LeafSpec((rope,), "attn")
        if arch.latent.q_rank is not None:
            specs["attn/q_a_proj/bias"] = LeafSpec((read,), "attn")
    if arch.o_bias:
        specs["attn/o_proj/bias"] = LeafSpec(("embed",), "attn")
    return specs


def _mlp_specs(
    arch: Arch, at: str, mlp: str, expert: tuple[str, ...] = (), stream: str = "embed"
) -> dict[str, LeafSpec]:
    """Returns the specs of an MLP whose leaves begin with `at`; those of several experts are stacked."""
    specs = {
        f"{at}gate_proj/kernel": LeafSpec((*expert, stream, mlp)),
        f"{at}up_proj/kernel": LeafSpec((*expert, stream, mlp)),
        f"{at}down_proj/kernel": LeafSpec((*expert, mlp, stream)),
    }
    if arch.mlp_bias:
        specs[f"{at}gate_proj/bias"] = specs[f"{at}up_proj/bias"] = LeafSpec((*expert, mlp))
        specs[f"{at}down_proj/bias"] = LeafSpec((*expert, stream))
    return {name: spec for name, spec in specs.items() if arch.gated or not name.startswith(f"{at}gate_proj/")}


def _mixture_specs(arch: Arch, layer: str) -> dict[str, LeafSpec]:
    """Returns the specs of a router, its experts, and the MLP beside them that every token passes."""
    expert = layer + "expert"
    specs = {"mlp/router/kernel": LeafSpec(("embed", expert))}
    if arch.router.bias:
        specs["mlp/router/bias"] = LeafSpec((expert,))
    if arch.router.selects_with_bias:
        specs["mlp/router/correction_bias"] = LeafSpec((expert,))
    if arch.expert_latent_dim is None:
        specs |= _mlp_specs(arch, "mlp/", layer + "mlp", (expert,))
    else:
        latent = layer + "expert_latent"
        specs |= _mlp_specs(arch, "mlp/", layer + "mlp", (expert,), latent)
        specs |= {
            "mlp/latent_in/kernel": LeafSpec(("embed", latent)),
            "mlp/latent_out/kernel": LeafSpec((latent, "embed")),
        }
    if arch.shared_mlp_dim is not None:
        specs |= _mlp_specs(arch, "mlp/shared/", layer + "shared/mlp")
    if arch.shared_gate:
        specs["mlp/output_gate/kernel"] = LeafSpec(("embed",))
    if arch.router.expert_scale:
        specs["mlp/router/expert_scale"] = LeafSpec((expert,))
    return specs


def _norms(arch: Arch, index: int) -> dict[str, bool]:
    return (
        dict.fromkeys((f"{mixer}_norm" for mixer in arch.mixers_of(index)), arch.pre_norms)
        | {
            "attn_post_norm": arch.post_norms,
            "mlp_norm": arch.pre_norms and not arch.shared_norm,
            "mlp_post_norm": arch.post_norms,
            "per_layer_post_norm": arch.per_layer_dim is not None,
        }
        | dict.fromkeys(_BRANCH_NORMS, arch.branch_norms and arch.has_experts(index))
    )
