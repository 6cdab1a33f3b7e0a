"""Function-preserving rewrites of a model's weights: data with `apply` and `inverse`, driven by the axis table.

`permute` and the other functions of permutations act on any pytree. A `Rewrite` acts on a model, subtree by subtree,
and may change its facts; a disguise, an alignment and the inverse of either are tuples of rewrites, applied from left
to right: `apply` to a whole tree, `sources.rewritten` to a source.
"""

from tracing_jax.rewrites.copies import (
    CancellingUnits,
    KvGrouping,
    KvRepetition,
    UnitGrouping,
    UnitSplitting,
)
from tracing_jax.rewrites.disguises import DISGUISES, draw_rewrites, rewrite_names, takes_all
from tracing_jax.rewrites.expansion import IdentityLayer, LayerRemoval, Padding
from tracing_jax.rewrites.linear_maps import QueryKeyMaps, Rotation, UnitScaling, ValueMixing
from tracing_jax.rewrites.norm_gains import GainScaling, GainSetting, foldable_norms, gain_offset, gains_in
from tracing_jax.rewrites.permutation import (
    Dims,
    Permutation,
    Permutations,
    Renaming,
    check_permutations,
    compose,
    identity,
    invert,
    permute,
    permute_leaf,
    random_permutations,
    several_random_permutations,
    share_moved,
    take_units,
    unit_moves,
)
from tracing_jax.rewrites.rewrite import (
    Rewrite,
    Untying,
    apply,
    arch_after,
    check_rewrites,
    inverses,
    reorders_only,
    rewrite_part,
    steps,
)

__all__ = [
    "DISGUISES",
    "CancellingUnits",
    "Dims",
    "GainScaling",
    "GainSetting",
    "IdentityLayer",
    "KvGrouping",
    "KvRepetition",
    "LayerRemoval",
    "Padding",
    "Permutation",
    "Permutations",
    "QueryKeyMaps",
    "Renaming",
    "Rewrite",
    "Rotation",
    "UnitGrouping",
    "UnitScaling",
    "UnitSplitting",
    "Untying",
    "ValueMixing",
    "apply",
    "arch_after",
    "check_permutations",
    "check_rewrites",
    "compose",
    "draw_rewrites",
    "foldable_norms",
    "gain_offset",
    "gains_in",
    "identity",
    "inverses",
    "invert",
    "permute",
    "permute_leaf",
    "random_permutations",
    "reorders_only",
    "rewrite_names",
    "rewrite_part",
    "several_random_permutations",
    "share_moved",
    "steps",
    "take_units",
    "takes_all",
    "unit_moves",
]
