"""The kinds of rewrites that alignment estimates, by name, and between which models it can."""

import re
from collections.abc import Sequence

from tracing_jax.arch import Arch, head_problem
from tracing_jax.axes import PERMUTABLE, axis_table, kind_of
from tracing_jax.rewrites import GainScaling, QueryKeyMaps, Rewrite, Rotation, UnitScaling, ValueMixing, residual_group

MAPS: dict[str, type[Rewrite]] = {
    "rotation": Rotation, "gains": GainScaling, "scaling": UnitScaling, "values": ValueMixing, "queries": QueryKeyMaps
}  # fmt: skip
"""Name -> the continuous maps that it means: a rotation of the residual stream, gains set to those of base, signed
scaling of MLP units, mixing of values, maps of queries and keys."""

EXPANSIONS = ("copies", "padding", "identity")
"""Copies of units and kv heads, which become one; inactive units and layers, which are removed."""

KINDS = (*PERMUTABLE, *MAPS, *EXPANSIONS)
"""Every kind by itself; those of `PERMUTABLE` mean permutations."""

WHOLE = ("all", "auto")
"""Names for many kinds: `all` is every one that the models support; `auto` uses maps only where permutations, after
padding and identity layers are removed, do not explain the weights about as well."""

_NEEDS = {"kv_heads": ("v_dim",), "q_group": ("v_dim",), "expert": ("mlp",)}
"""Axis kind -> the other kinds, besides its parent, that must be of one size in both models for its units to be
compared."""

_PADDED = ("embed", "mlp", "kv_heads")
"""Of these ft may have more than base, which then must be inactive."""

WIDTHS = ("mlp_dim", "layer_mlp_dims", "shared_mlp_dim", "embed_dim", "num_kv_heads")
"""Fields of `Arch` that padding changes."""


class AlignmentError(ValueError):
    """The weights of two models do not determine an alignment.

    Example:
      >>> issubclass(tj.AlignmentError, ValueError)
      True
    """


def kind_problems(kinds: Sequence[str]) -> list[str]:
    """Returns why these are no kinds to align; empty if they are."""
    if not kinds:
        return [f"kinds (none) cannot be aligned; choose from {', '.join(KINDS + WHOLE)}"]
    if unknown := sorted(set(kinds) - set(KINDS) - set(WHOLE)):
        return [f"kinds {', '.join(unknown)} cannot be aligned; choose from {', '.join(KINDS + WHOLE)}"]
    if len(kinds) > 1 and (whole := sorted(set(kinds) & set(WHOLE))):
        return [f"{whole[0]} cannot be combined with other names: it includes every kind"]
    return []


def expanded(kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns every kind that the names mean."""
    return KINDS if set(kinds) & set(WHOLE) else tuple(kinds)


def beyond_permutations(kinds: Sequence[str]) -> list[str]:
    """Returns the names among these that ask for more than permutations."""
    return [kind for kind in kinds if kind not in PERMUTABLE]


def activations_problem(kinds: Sequence[str]) -> str | None:
    """Returns why activations tell nothing of these kinds; None if they do.

    Of rewrites beyond permutations they determine the map of the features; the others follow by weights.
    """
    if (beyond := beyond_permutations(kinds)) and not {"embed", "rotation"} & set(expanded(kinds)):
        return f"{', '.join(beyond)}: estimated from weights alone; add rotation, or choose weights as evidence"
    return None


def supported(kinds: Sequence[str], arch: Arch) -> tuple[set[str], dict[str, str]]:
    """Returns the kinds that a model supports, and the reason for each map that it does not.

    Where it supports no rotation the features are permuted instead, and where its norms commute with signs alone they
    are permuted too; a rotation includes the gains.
    """
    found = set(expanded(kinds))
    found |= {"gains"} if "rotation" in found else set()
    left_out = {name: "; ".join(problems) for name in found & MAPS.keys() if (problems := MAPS[name].unsupported(arch))}
    if "rotation" in found and residual_group(arch) in ("signs", None):
        found.add("embed")
    free = unit_kinds(arch) - set(axis_table(arch).fixed)
    return found - left_out.keys() - (set(PERMUTABLE) - free), left_out


def alignment_problems(base: Arch, ft: Arch, kinds: Sequence[str]) -> list[str]:
    """Returns why these kinds cannot be aligned between models of these shapes; empty if they can.

    Whether surplus units and layers of ft are inactive depends on its weights, and is checked by `align`.
    """
    heads = {"base": head_problem(base), "ft": head_problem(ft)}  # the logits prove an alignment
    lines = kind_problems(kinds) + [f"{side}: {problem}" for side, problem in heads.items() if problem]
    if any(arch.reading is not None for arch in (base, ft)):
        return lines  # of heads nothing is known
    asked = expanded(kinds)
    if base.num_layers != ft.num_layers and not ("identity" in asked and ft.num_layers > base.num_layers):
        lines.append(f"depth: {base.num_layers} layers in base, {ft.num_layers} in ft; layers are paired one to one")
    sizes, sizes_ft = (_sizes_by_kind(arch, base.num_layers == ft.num_layers) for arch in (base, ft))
    if asked and not lines and not set(asked) & (sizes.keys() | sizes_ft.keys() | set(KINDS) - set(PERMUTABLE)):
        lines.append(f"neither model has units of kind {', '.join(asked)}")
    if "copies" in asked and _repeated(base, ft):
        times = base.q_group // ft.q_group
        sizes_ft["kv_heads"] = dict.fromkeys(sizes_ft["kv_heads"], ft.num_kv_heads // times)
        sizes_ft["q_group"] = dict.fromkeys(sizes_ft["q_group"], base.q_group)
    for kind in _needed(asked, base, ft):
        size, size_ft = sizes.get(kind, {}), sizes_ft.get(kind, {})
        of_both = [(n, size_ft[axis]) for axis, n in size.items() if axis in size_ft]
        dropped = "padding" in asked or ("copies" in asked and kind == "mlp")
        padded = dropped and kind in _PADDED and all(n <= n_ft for n, n_ft in of_both)
        if size != size_ft and not (padded and size.keys() == size_ft.keys()):
            shown = [" or ".join(map(str, sorted(set(n.values())))) or "no" for n in (size, size_ft)]
            where = " in other layers" if shown[0] == shown[1] else ""
            lines.append(f"{kind}: {shown[0]} units in base, {shown[1]} in ft{where}; they are paired one to one")
    if not lines and beyond_permutations(kinds) and (without := sorted(_leaves(ft) - _leaves(base))):
        lines.append(f"base has no {', '.join(without)}, which ft has: only permutations can be aligned")
    return lines


def _leaves(arch: Arch) -> set[str]:
    """Returns the names of the leaves of a model, those of layers without their number; a head can be untied."""
    names = {re.sub("^layers/[0-9]+/", "layers/", name) for name in axis_table(arch).leaves}
    return names - {"head/lm_head/kernel"}


def _repeated(base: Arch, ft: Arch) -> bool:
    """Returns whether ft can have every kv head several times, each for some of the queries that it has in base."""
    times = base.q_group // ft.q_group
    return times > 1 and base.q_group == times * ft.q_group


def unit_kinds(arch: Arch) -> set[str]:
    """Returns the kinds of the axes of a model."""
    return {kind_of(axis) for axis in axis_table(arch).sizes}


def _sizes_by_kind(arch: Arch, by_layer: bool) -> dict[str, dict[str, int]]:
    """Returns axis kind -> its axes with their numbers of units; without layers, each number that occurs, in order."""
    found: dict[str, dict[str, int]] = {}
    for axis, size in axis_table(arch).sizes.items():
        found.setdefault(kind_of(axis), {})[axis] = size
    if by_layer:
        return found
    return {kind: {str(i): n for i, n in enumerate(sorted(set(sizes.values())))} for kind, sizes in found.items()}


def _needed(kinds: Sequence[str], base: Arch, ft: Arch) -> list[str]:
    """Returns the axis kinds that must be of one size, or padded in ft."""
    if beyond_permutations(kinds):
        either = dict.fromkeys(kind_of(axis) for arch in (base, ft) for axis in axis_table(arch).sizes)
        return [kind for kind in either if kind != "vocab"]
    tables = [axis_table(arch) for arch in (base, ft)]
    parents = {kind_of(axis): kind_of(parent) for table in tables for axis, parent in table.parent_axis.items()}
    return list(dict.fromkeys(n for kind in kinds for n in (kind, *_NEEDS.get(kind, ()), parents.get(kind, kind))))
