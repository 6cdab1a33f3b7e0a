"""One table names every axis of every weight; loading, symmetry, matching, sharding and interpolation read it.

An axis name says how far the axis reaches: `embed` is shared by the whole model, `layers/3/mlp` belongs to one layer.
Leaves that carry the same axis name must move together when its units are permuted. The last part of an axis name is
its kind, and two small tables say what a kind allows: which symmetry it has (below) and which mesh axis splits it
(`sharding.py`). Nothing here knows an architecture but `axis_table`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tracing_jax.arch import Arch
from tracing_jax.tree import Tree, flatten

SYMMETRY = {
    "embed": "permutation, shared by the whole model",
    "mlp": "permutation, each layer its own",
    "kv_heads": "permutation, each layer its own",
    "q_group": "permutation, each layer and each kv head its own",
    "qk_dim": "rotations that commute with RoPE",
    "v_dim": "any invertible map per kv head",
    "expert": "permutation, each layer its own",
    "position": "none: every position means itself",
    "vocab": "renaming, the tokenizer with it",
}
"""Axis kind -> the group that keeps the function of the model."""

PERMUTABLE = ("embed", "mlp", "kv_heads", "q_group", "expert")
"""Axis kinds whose units may be permuted freely, in the models that have them."""

GROUPS = ("mlp", "norm", "attn", "emb")
"""Interpolation groups: MLPs, block norms, attention, and embeddings with head and final norm."""


MAPPED = {"embed": None, "v_dim": "kv_heads", "qk_dim": "kv_heads"}
"""Axis kinds on which a linear map may act -> the kind whose units have a map each; None: one for the whole model."""

Side = Literal["writes", "reads"]
"""What a leaf does on an axis: it makes the activations there, or takes them. Where the activations a become M a, the
leaves that write them are multiplied by M along the axis and those that read them by M^-T."""

_WRITERS = {"embed": "embed o_proj down_proj", "mlp": "up_proj", "v_dim": "v_proj", "qk_dim": "q_proj"}
_READERS = {
    "embed": "q_proj k_proj v_proj gate_proj up_proj router lm_head",
    "mlp": "down_proj", "v_dim": "o_proj", "qk_dim": "k_proj",
}  # fmt: skip
_SIDES: tuple[tuple[Side, Mapping[str, str]], ...] = (("writes", _WRITERS), ("reads", _READERS))
_FEEDING_NORM = {
    "q_proj": "attn_norm", "k_proj": "attn_norm", "v_proj": "attn_norm",
    "gate_proj": "mlp_norm", "up_proj": "mlp_norm", "router": "mlp_norm", "lm_head": "norm",
}  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """One row of the table.

    Attributes:
      axes: the axis names of a weight, one per dimension.
      group: its interpolation group.
      sides: for each dimension what the leaf does there, or None: the gains of a norm and the gate of an MLP belong to
        the units of an axis and neither make nor take their activations. Empty for trees with axes of their own.
      fed_by: the norm, such as `layers/3/attn_norm`, whose gain multiplies what the leaf reads on `embed`.
    """

    axes: tuple[str | None, ...]
    group: str = "mlp"
    sides: tuple[Side | None, ...] = ()
    fed_by: str | None = None


@dataclass(frozen=True)
class AxisTable:
    """Which axes every leaf of a pytree has.

    Attributes:
      leaves: leaf name -> its row. An axis named None belongs to nobody and never moves.
      sizes: axis name -> number of units.
      within: a nested axis -> the axis that indexes it. Units of `layers/0/q_group` are permuted inside each unit of
        `layers/0/kv_heads`, so its permutation is a matrix `[kv_heads, q_group]`.
    """

    leaves: Mapping[str, Leaf]
    sizes: Mapping[str, int] = field(default_factory=dict)
    within: Mapping[str, str] = field(default_factory=dict)

    def touching(self, axis: str) -> dict[str, Leaf]:
        """Returns the rows of the leaves that carry `axis`."""
        return {name: leaf for name, leaf in self.leaves.items() if axis in leaf.axes}

    def axes_of_kind(self, kinds: Iterable[str]) -> list[str]:
        """Returns the axis names whose kind is among `kinds`, in the order of the table.

        One list of kinds serves models of every family: a kind that only others have, such as `expert`, adds nothing.

        Raises:
          ValueError: a kind that no family has, or kinds of which the table has none.
        """
        kinds, known = set(kinds), {kind_of(axis) for axis in self.sizes}
        unknown = kinds - known - (set(SYMMETRY) if kinds & known else set())
        if unknown:
            listed = ", ".join(sorted(unknown))
            raise ValueError(f"no axis of kind {listed} in this model; it has {', '.join(sorted(known))}")
        return [axis for axis in self.sizes if kind_of(axis) in kinds]

    def restricted(self, prefix: str) -> "AxisTable":
        """Returns the table of the subtree under `prefix`: leaf names lose the prefix, axis names keep theirs."""
        inside = {name[len(prefix) :]: leaf for name, leaf in self.leaves.items() if name.startswith(prefix)}
        return AxisTable(inside, self.sizes, self.within)


def kind_of(axis: str) -> str:
    """Returns the kind of an axis, the last part of its name: `mlp` for `layers/3/mlp`."""
    return axis.rsplit("/", 1)[-1]


def table_from_axes(
    axes: Mapping[str, tuple[str | None, ...]], params: Tree, within: Mapping[str, str] | None = None
) -> AxisTable:
    """Returns the checked table of any pytree for which the caller names the axes, leaf by leaf.

    Raises:
      ValueError: leaves that the names do not cover, names without a leaf, wrong ranks, or unequal sizes of one axis;
        all at once.
    """
    table = AxisTable({name: Leaf(tuple(row)) for name, row in axes.items()}, {}, dict(within or {}))
    sizes = _sizes_in(params, table)
    table = AxisTable(table.leaves, sizes, table.within)
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
    for name, row in table.leaves.items():
        if name not in found:
            continue
        shape = found[name].shape
        if len(shape) != len(row.axes):
            lines.append(f"wrong rank: {name} is {shape}, expected axes {row.axes}")
            continue
        for axis, size in zip(row.axes, shape, strict=True):
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
    """Returns the table of a model of any supported family, for params `{embed, layers: {"0": ...}, head}`."""
    leaves = {"embed/embedding": Leaf(("vocab", "embed"), "emb")}
    sizes = {"embed": arch.embed_dim, "vocab": arch.vocab_size}
    if arch.num_positions is not None:
        leaves["embed/positions"] = Leaf(("position", "embed"), "emb")
        sizes["position"] = arch.num_positions
    within = {}
    for i in range(arch.num_layers):
        layer = f"layers/{i}/"
        leaves |= {layer + name: row for name, row in _block_rows(arch, layer).items()}
        sizes |= {layer + "mlp": arch.mlp_dim, layer + "kv_heads": arch.num_kv_heads, layer + "q_group": arch.q_group}
        sizes |= {layer + "qk_dim": arch.head_dim, layer + "v_dim": arch.head_dim}
        within[layer + "q_group"] = layer + "kv_heads"
        if arch.num_experts is not None:
            sizes[layer + "expert"] = arch.num_experts
            within[layer + "mlp"] = layer + "expert"
    if arch.norm != "layer_norm_plain":
        leaves["head/norm/scale"] = Leaf(("embed",), "emb")
    if arch.norm == "layer_norm":
        leaves["head/norm/bias"] = Leaf(("embed",), "emb")
    if not arch.tied:
        leaves["head/lm_head/kernel"] = Leaf(("embed", "vocab"), "emb")
    return AxisTable({name: _with_sides(name, row, leaves) for name, row in leaves.items()}, sizes, within)


def _with_sides(name: str, row: Leaf, leaves: Mapping[str, Leaf]) -> Leaf:
    """Returns the row with its sides and the norm that feeds it; a bias stands where its kernel writes or reads."""
    part, _, module = name.rsplit("/", 1)[0].rpartition("/")
    sides = tuple(
        next((side for side, modules in _SIDES if axis and module in modules.get(kind_of(axis), "").split()), None)
        for axis in row.axes
    )
    # A block's norms stand beside its attn and mlp, the final norm beside the head's kernel.
    norm = "/".join([*part.split("/")[: 2 if part.startswith("layers/") else 1], _FEEDING_NORM.get(module, "")])
    reads = "embed" in row.axes and sides[row.axes.index("embed")] == "reads"
    return replace(row, sides=sides, fed_by=norm if reads and f"{norm}/scale" in leaves else None)


def _block_rows(arch: Arch, layer: str) -> dict[str, Leaf]:
    """Returns the rows of one block; `layer` is the prefix of the axes that belong to it alone."""
    mlp, kv, group, qk, v = (layer + kind for kind in ("mlp", "kv_heads", "q_group", "qk_dim", "v_dim"))
    rows = {
        "attn/q_proj/kernel": Leaf(("embed", kv, group, qk), "attn"),
        "attn/k_proj/kernel": Leaf(("embed", kv, qk), "attn"),
        "attn/v_proj/kernel": Leaf(("embed", kv, v), "attn"),
        "attn/o_proj/kernel": Leaf((kv, group, v, "embed"), "attn"),
        "mlp/gate_proj/kernel": Leaf(("embed", mlp)),
        "mlp/up_proj/kernel": Leaf(("embed", mlp)),
        "mlp/down_proj/kernel": Leaf((mlp, "embed")),
    }
    if arch.qkv_bias:
        rows["attn/q_proj/bias"] = Leaf((kv, group, qk), "attn")
        rows["attn/k_proj/bias"] = Leaf((kv, qk), "attn")
        rows["attn/v_proj/bias"] = Leaf((kv, v), "attn")
    if arch.o_bias:
        rows["attn/o_proj/bias"] = Leaf(("embed",), "attn")
    if arch.mlp_bias:
        rows["mlp/gate_proj/bias"] = rows["mlp/up_proj/bias"] = Leaf((mlp,))
        rows["mlp/down_proj/bias"] = Leaf(("embed",))
    if arch.qk_norm == "head":
        rows["attn/q_norm/scale"] = rows["attn/k_norm/scale"] = Leaf((qk,), "attn")
    if arch.qk_norm == "all":
        rows["attn/q_norm/scale"] = Leaf((kv, group, qk), "attn")
        rows["attn/k_norm/scale"] = Leaf((kv, qk), "attn")
    for name, present in _norms(arch).items():
        if present:
            rows[f"{name}/scale"] = Leaf(("embed",), "norm")
        if present and arch.norm == "layer_norm":
            rows[f"{name}/bias"] = Leaf(("embed",), "norm")
    if arch.num_experts is not None:
        rows |= _expert_rows(layer)
    return {name: row for name, row in rows.items() if arch.gated or not name.startswith("mlp/gate_proj/")}


def _expert_rows(layer: str) -> dict[str, Leaf]:
    """Returns the rows of a router and its experts, which stand in place of those of one MLP."""
    expert, mlp = layer + "expert", layer + "mlp"
    return {
        "mlp/router/kernel": Leaf(("embed", expert)),
        "mlp/gate_proj/kernel": Leaf((expert, "embed", mlp)),
        "mlp/up_proj/kernel": Leaf((expert, "embed", mlp)),
        "mlp/down_proj/kernel": Leaf((expert, mlp, "embed")),
    }


def _norms(arch: Arch) -> dict[str, bool]:
    gains = arch.norm != "layer_norm_plain"
    return {
        "attn_norm": arch.pre_norms and gains,
        "attn_post_norm": arch.post_norms and gains,
        "mlp_norm": arch.pre_norms and gains,
        "mlp_post_norm": arch.post_norms and gains,
    }
