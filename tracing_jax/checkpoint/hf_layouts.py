"""Hugging Face tensor names and layouts <-> our leaves, in both directions and bit for bit.

A Hugging Face linear weight is `[out, in]` with heads flattened into `out`; ours is `[in, out]` with heads as axes.
Each leaf is the HF tensor, or a slice of it, reshaped (heads unfolded, query head `k * G + g` to `[k, g]`) and
transposed. Which leaves a model has, and their axes, is in the axis table; what their tensors are called in `hf_names`.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table, kind_of
from tracing_jax.checkpoint.hf_names import TensorNames, names_found
from tracing_jax.checkpoint.tensor_layout import LeafLayout, TensorSlice, tensor_shapes

LeafLayouts = Mapping[str, LeafLayout]
"""Leaf name -> its layout in the tensors of a checkpoint."""

_FUSED = (
    ("attn/q_proj", "attn/head_gate", "attn/q_rope_proj", "attn/k_proj", "attn/v_proj"),
    ("attn/kv_a_proj", "attn/k_rope_proj"),
    ("mlp/gate_proj", "mlp/up_proj"),
    tuple(f"delta_net/{name}_proj" for name in ("query", "key", "value", "z")),
    ("delta_net/beta_proj", "delta_net/decay_proj"),
    tuple(f"delta_net/{name}_conv" for name in ("query", "key", "value")),
    tuple(f"/{name}_proj" for name in ("z", "value", "key", "query", "decay")),  # of Mamba-2
    tuple(f"/{name}_conv" for name in ("value", "key", "query")),
)
"""Modules of ours that may share a tensor, in their order there."""

Sizes = tuple[int, ...]


def leaf_layouts(
    arch: Arch, names: Collection[str] | None = None, leaves: Collection[str] | None = None
) -> LeafLayouts:
    """Returns the layout of every leaf of a model: the one that transformers writes, or that of files with these names.

    Backbones saved without their head lack a prefix, and experts are one tensor each or one for all.

    Args:
      arch: the facts of the model.
      names: of the tensors in the files.
      leaves: those of which the layout is wanted; None: all.
    """
    table, candidates = axis_table(arch), names_found(arch)
    wanted = table.leaves if leaves is None else leaves
    if names is None:
        return _layouts(table, candidates[0], wanted)
    # Which names a model has shows in few layers; one with experts may have 70,000 tensors.
    stored, some = set(names), _of_some_layers(arch, table)
    missing = [len(tensor_shapes(_layouts(table, found, some).values()).keys() - stored) for found in candidates]
    return _layouts(table, candidates[missing.index(min(missing))], wanted)


def _of_some_layers(arch: Arch, table: AxisTable) -> list[str]:
    """Returns the leaves outside layers, and those of the first layer, the last, and the first with experts."""
    with_experts = next((i for i in range(arch.num_layers) if arch.has_experts(i)), 0)
    prefixes = tuple(f"layers/{i}/" for i in (0, with_experts, arch.num_layers - 1))
    return [leaf for leaf in table.leaves if leaf.startswith(prefixes) or not leaf.startswith("layers/")]


def _layouts(table: AxisTable, names: TensorNames, leaves: Collection[str]) -> LeafLayouts:
    return {leaf: _layout(leaf, table, names) for leaf in leaves}


def _layout(leaf: str, table: AxisTable, names: TensorNames) -> LeafLayout:
    experts, ins, outs = _sizes(leaf, table)
    part = leaf.rsplit("/", 1)[-1]
    if part in ("embedding", "positions"):
        return LeafLayout((TensorSlice(names.tensor(leaf, False), outs),), outs, (0, 1))
    slices, in_out = tuple(_slices(leaf, table, names)), names.is_in_out(leaf, bool(experts))
    unfolded = (*experts, *((*ins, *outs) if in_out else (*outs, *ins)))
    first, middle = len(experts), len(ins) if in_out else len(outs)
    halves = [tuple(range(first, first + middle)), tuple(range(first + middle, len(unfolded)))]
    order = (*range(first), *itertools.chain(*(halves if in_out else halves[::-1])))
    return LeafLayout(slices, unfolded, order)


def _sizes(leaf: str, table: AxisTable) -> tuple[Sizes, Sizes, Sizes]:
    """Returns the sizes of a leaf's axes: of experts, if it has a row for each, and of those of inputs and of outputs.

    A gain, a bias or an embedding has outputs only.
    """
    axes = [axis or "" for axis in table.leaves[leaf].axes]
    experts = [axis for axis in axes[:1] if kind_of(axis) == "expert" and len(axes) > 1]
    own = axes[len(experts) :]
    inputs = 0 if not leaf.endswith("/kernel") else len(own) - 1 if own[-1] == "embed" else 1
    experts_sizes, ins, outs = (
        tuple(table.sizes[axis] for axis in some) for some in (experts, own[:inputs], own[inputs:])
    )
    return experts_sizes, ins, outs


def _slices(leaf: str, table: AxisTable, names: TensorNames) -> Iterator[TensorSlice]:
    """Yields the slices that a leaf is stacked of."""
    experts, ins, outs = _sizes(leaf, table)
    tensor = names.tensor(leaf, bool(experts))
    if "{h}" in tensor:
        yield from (TensorSlice(tensor.format(h=head), outs[-1:]) for head in range(math.prod(outs[:-1])))
        return
    if leaf.split("/", 2)[-1].rpartition("/")[0] in names.two_axes:
        yield TensorSlice(tensor, (math.prod(outs[:-1]), outs[-1]))
        return
    together = [_sizes(other, table)[2] for other in _sharing(leaf, table, names)]
    before, rows = _rows_before(leaf, table, names), [math.prod(sizes) for sizes in together]
    in_out = names.is_in_out(leaf, bool(experts))
    columns = (math.prod(ins),) if ins else ()
    shape = (*columns, sum(rows)) if in_out else (sum(rows), *columns)
    if leaf.endswith("/taps"):  # a convolution of each channel by itself has an axis of size one before its taps
        taps = outs[-1]
        bounds = (before // taps, (before + math.prod(outs)) // taps) if len(rows) > 1 else (0, None)
        yield TensorSlice(tensor, (sum(rows) // taps, 1, taps), 0, *bounds)
        return
    if names.has_row_axis(leaf):
        yield TensorSlice(tensor, (1, *experts, *shape))
        return
    at = len(columns) if in_out and len(rows) > 1 else 0
    if experts and len(rows) > 1 and names.gate_up_order == "in turn":
        yield TensorSlice(tensor, (*experts, *shape), at + 1, before // rows[0], None, len(rows))
        return
    heads, own = _heads_in_turn(leaf, table, names), math.prod(outs)
    for head in range(heads):
        start = (head * sum(rows) + before) // heads
        bounds = (start, start + own // heads) if len(rows) > 1 else (0, None)
        if not experts:
            yield TensorSlice(tensor, shape, at, *bounds)
        elif "{e}" not in tensor:
            yield TensorSlice(tensor, (*experts, *shape), at + 1 if len(rows) > 1 else 0, *bounds)
        else:
            yield from (TensorSlice(tensor.format(e=e), shape, at, *bounds) for e in range(experts[0]))


def _heads_in_turn(leaf: str, table: AxisTable, names: TensorNames) -> int:
    """Returns how many heads follow one another in a leaf's tensor, each with the rows of all leaves that share it.

    They are the units of the axes that all of these leaves have in front; one, where leaves follow one another.
    """
    sharing = _sharing(leaf, table, names)
    if names.qkv_order != "by head" or len(sharing) == 1 or leaf.split("/", 2)[-1].rpartition("/")[0] in names.in_order:
        return 1
    outputs = [
        table.leaves[other].axes[len(table.leaves[other].axes) - len(_sizes(other, table)[2]) : -1] for other in sharing
    ]
    heads = itertools.takewhile(lambda axes: len(set(axes)) == 1, zip(*outputs))
    return math.prod(table.sizes[axes[0] or ""] for axes in heads)


def _sharing(leaf: str, table: AxisTable, names: TensorNames) -> list[str]:
    """Returns the leaves of a leaf's tensor in their order there; itself alone, where no other shares it."""
    tensor = names.tensor(leaf, bool(_sizes(leaf, table)[0]))
    module, part = leaf.rsplit("/", 1)
    for modules in _FUSED:
        if end := next((end for end in modules if module.endswith(end)), None):
            others = [f"{module.removesuffix(end)}{other}/{part}" for other in modules]
            return [
                other
                for other in others
                if other in table.leaves and names.tensor(other, bool(_sizes(other, table)[0])) == tensor
            ]
    return [leaf]


def _rows_before(leaf: str, table: AxisTable, names: TensorNames) -> int:
    """Returns how many rows of a leaf's tensor belong to leaves that come before it there."""
    before = itertools.takewhile(lambda other: other != leaf, _sharing(leaf, table, names))
    return sum(math.prod(_sizes(other, table)[2]) for other in before)
