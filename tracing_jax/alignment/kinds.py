"""What alignment can undo, by name, and between which models."""

from collections.abc import Sequence

from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE, axis_table, kind_of
from tracing_jax.symmetry import GainSetting, QueryKeyMaps, Rewrite, Rotation, UnitScaling, ValueMixing

MAPS: dict[str, type[Rewrite]] = {
    "rotation": Rotation, "gains": GainSetting, "scaling": UnitScaling, "values": ValueMixing, "queries": QueryKeyMaps
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

_NEEDS = {"kv_heads": ("v_dim",), "q_group": ("kv_heads", "v_dim")}
"""Axis kind -> the other kinds that must be of one size in both models for its units to be compared."""

_PADDED = ("embed", "mlp", "kv_heads")


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
    """Returns the kinds that exist for a model, and of the others the reason.

    Where no rotation exists the features are permuted instead, and a rotation brings the gains with it.
    """
    found, left_out = set(expanded(kinds)), {}
    for name in found & MAPS.keys():
        if absent := MAPS[name].absent(arch):
            left_out[name] = "; ".join(absent)
    if "rotation" in found:
        found |= {"embed", "gains"} if "rotation" in left_out else {"gains"}
        if GainSetting.absent(arch):
            found.discard("gains")
    return found - left_out.keys(), left_out


def alignment_problems(base: Arch, ft: Arch, kinds: Sequence[str]) -> list[str]:
    """Returns why these kinds cannot be undone between models of these shapes; empty if they can.

    Whether surplus units and layers of ft do nothing is a matter of its weights, and is found out by `align`.
    """
    lines = kind_problems(kinds)
    asked = expanded(kinds)
    if base.num_layers != ft.num_layers and not ("identity" in asked and ft.num_layers > base.num_layers):
        lines.append(f"depth: {base.num_layers} layers in base, {ft.num_layers} in ft; layers are paired one to one")
    sizes, sizes_ft = ({kind_of(axis): size for axis, size in axis_table(arch).sizes.items()} for arch in (base, ft))
    for needed in _needed(asked):
        n, n_ft = sizes.get(needed), sizes_ft.get(needed)
        if n != n_ft and not ("padding" in asked and needed in _PADDED and n is not None and n < (n_ft or 0)):
            lines.append(f"{needed}: {n} units in base, {n_ft} in ft; they are paired one to one")
    return lines


def _needed(kinds: Sequence[str]) -> list[str]:
    """Returns the axis kinds that must be of one size, or padded in ft."""
    if beyond_permutations(kinds):
        return ["embed", "mlp", "kv_heads", "q_group", "v_dim", "qk_dim"]
    return list(dict.fromkeys(axis for kind in kinds for axis in (kind, *_NEEDS.get(kind, ()))))
