"""What alignment can undo, by name, and between which models."""

from collections.abc import Sequence
from dataclasses import replace

from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE, kind_of
from tracing_jax.rewrites import GainScaling, QueryKeyMaps, Rewrite, Rotation, UnitScaling, ValueMixing
from tracing_jax.rewrites.rewrite import table_of

MAPS: dict[str, type[Rewrite]] = {
    "rotation": Rotation, "gains": GainScaling, "scaling": UnitScaling, "values": ValueMixing, "queries": QueryKeyMaps
}  # fmt: skip
"""Name -> the continuous maps that it stands for: a rotation of the residual stream, gains taken over from base, signed
scaling of MLP units, mixing of values, maps of queries and keys."""

STRUCTURE = ("padding", "identity")
"""Units that do nothing, which are dropped, and layers that do nothing, which are skipped."""

KINDS = (*PERMUTABLE, *MAPS, *STRUCTURE)
"""Every kind by itself; those of `PERMUTABLE` mean permutations."""

WHOLE = ("all", "auto")
"""Words for many kinds: `all` undoes every one that exists for the models; `auto` does so only where permutations of
what is left after padding and identity layers do not explain the weights about as well."""

_NEEDS = {"kv_heads": ("v_dim",), "q_group": ("v_dim",), "expert": ("mlp",)}
"""Axis kind -> the other kinds, beside the one that holds it, that must be of one size in both models for its units to
be compared."""

_PADDED = ("embed", "mlp", "kv_heads")


class AlignmentError(ValueError):
    """What the weights of two models show: nothing says how they belong together."""


def kinds_in(listed: str) -> tuple[str, ...]:
    """Returns the names in a list with commas."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def kind_problems(kinds: Sequence[str]) -> list[str]:
    """Returns why these words do not say what to undo; empty if they do."""
    if not kinds:
        return [f"kinds (none) cannot be aligned; choose from {', '.join(KINDS + WHOLE)}"]
    if unknown := sorted(set(kinds) - set(KINDS) - set(WHOLE)):
        return [f"kinds {', '.join(unknown)} cannot be aligned; choose from {', '.join(KINDS + WHOLE)}"]
    if len(kinds) > 1 and (whole := sorted(set(kinds) & set(WHOLE))):
        return [f"{whole[0]} stands alone: it decides on every kind"]
    return []


def expanded(kinds: Sequence[str]) -> tuple[str, ...]:
    """Returns every kind that the words stand for."""
    return KINDS if set(kinds) & set(WHOLE) else tuple(kinds)


def beyond_permutations(kinds: Sequence[str]) -> list[str]:
    """Returns the words that ask for more than permutations."""
    return [kind for kind in kinds if kind not in PERMUTABLE]


def existing(kinds: Sequence[str], arch: Arch) -> tuple[set[str], dict[str, str]]:
    """Returns the kinds that exist for a model, and of the maps that do not the reason.

    Where no rotation exists the features are permuted instead, and a rotation brings the gains with it.
    """
    found = set(expanded(kinds))
    found |= {"gains"} if "rotation" in found else set()
    left_out = {name: "; ".join(absent) for name in found & MAPS.keys() if (absent := MAPS[name].absent(arch))}
    if "rotation" in left_out:
        found.add("embed")
    return found - left_out.keys() - (set(PERMUTABLE) - unit_sizes(arch).keys()), left_out


def alignment_problems(base: Arch, ft: Arch, kinds: Sequence[str]) -> list[str]:
    """Returns why these kinds cannot be undone between models of these shapes; empty if they can.

    Whether surplus units and layers of ft do nothing is a matter of its weights, and is found out by `align`.
    """
    lines = kind_problems(kinds)
    asked = expanded(kinds)
    if base.num_layers != ft.num_layers and not ("identity" in asked and ft.num_layers > base.num_layers):
        lines.append(f"depth: {base.num_layers} layers in base, {ft.num_layers} in ft; layers are paired one to one")
    sizes, sizes_ft = (unit_sizes(arch) for arch in (base, ft))
    if asked and not lines and not set(asked) & (sizes.keys() | sizes_ft.keys() | set(KINDS) - set(PERMUTABLE)):
        lines.append(f"neither model has units of kind {', '.join(asked)}")
    for kind in _needed(asked, base, ft):
        size, size_ft = sizes.get(kind), sizes_ft.get(kind)
        padded = "padding" in asked and kind in _PADDED and size is not None and size < (size_ft or 0)
        if size != size_ft and not padded:
            shown = ["no" if n is None else n for n in (size, size_ft)]
            lines.append(f"{kind}: {shown[0]} units in base, {shown[1]} in ft; they are paired one to one")
    return lines


def shape_hoped_for(base: Arch, ft: Arch, kinds: Sequence[str]) -> Arch:
    """Returns the facts that ft has once it is aligned, if all that it has more than base does nothing.

    Its head counts as tied like base's: where alignment unties one of them, untying the other changes nothing.
    """
    asked = set(expanded(kinds))
    found = replace(ft, tied=base.tied) if beyond_permutations(kinds) else ft
    if "identity" in asked:
        layers = {name: getattr(base, name) for name in ("num_layers", "layer_ropes", "layer_windows")}
        found = replace(found, **layers)
    if "padding" in asked:
        widths = {name: getattr(base, name) for name in ("mlp_dim", "embed_dim", "num_kv_heads", "norm_eps")}
        found = replace(found, **widths)
    return found


def unit_sizes(arch: Arch) -> dict[str, int]:
    """Returns axis kind -> number of units, the same in all layers."""
    return {kind_of(axis): size for axis, size in table_of(arch).sizes.items()}


def _needed(kinds: Sequence[str], base: Arch, ft: Arch) -> list[str]:
    """Returns the axis kinds that must be of one size, or padded in ft."""
    if beyond_permutations(kinds):
        either = unit_sizes(base) | unit_sizes(ft)
        return [kind for kind in either if kind != "vocab"]
    tables = [table_of(arch) for arch in (base, ft)]
    holders = {kind_of(axis): kind_of(holder) for table in tables for axis, holder in table.within.items()}
    return list(dict.fromkeys(n for kind in kinds for n in (kind, *_NEEDS.get(kind, ()), holders.get(kind, kind))))
