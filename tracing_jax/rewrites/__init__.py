"""Maps that keep the function of a model: data plus `apply`, `invert` and `compose`, driven by the axis table.

Permutations act on any pytree. Rewrites (`Rotation`, `UnitScaling`, ...) act on models, part by part, and may change
their facts; `source.disguised` applies a sequence of them.
"""

from tracing_jax.rewrites.draw import DRAWN, draw_rewrites, rewrite_names
from tracing_jax.rewrites.identity_layers import IdentityLayer, LayerRemoval
from tracing_jax.rewrites.linear_maps import QueryKeyMaps, UnitScaling, ValueMixing
from tracing_jax.rewrites.padding import Padding
from tracing_jax.rewrites.permutation import (
    Dims,
    Permutations,
    check_permutations,
    compose,
    identity,
    invert,
    permute,
    permute_leaf,
    random_permutations,
    share_moved,
    take_units,
    unit_moves,
)
from tracing_jax.rewrites.reordering import Permutation, Renaming
from tracing_jax.rewrites.residual_stream import (
    GainScaling,
    GainSetting,
    Rotation,
    feeding_norms,
    gain_offset,
    gains_in,
)
from tracing_jax.rewrites.rewrite import (
    Rewrite,
    Untying,
    apply,
    arch_after,
    check_rewrites,
    inverses,
    rewritten,
    steps,
)

__all__ = [
    "DRAWN",
    "Dims",
    "GainScaling",
    "GainSetting",
    "IdentityLayer",
    "LayerRemoval",
    "Padding",
    "Permutation",
    "Permutations",
    "QueryKeyMaps",
    "Renaming",
    "Rewrite",
    "Rotation",
    "UnitScaling",
    "Untying",
    "ValueMixing",
    "apply",
    "arch_after",
    "check_permutations",
    "check_rewrites",
    "compose",
    "draw_rewrites",
    "feeding_norms",
    "gain_offset",
    "gains_in",
    "identity",
    "inverses",
    "invert",
    "permute",
    "permute_leaf",
    "random_permutations",
    "rewrite_names",
    "rewritten",
    "share_moved",
    "steps",
    "take_units",
    "unit_moves",
]
