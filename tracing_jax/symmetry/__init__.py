"""Maps that keep the function of a model: data plus `apply`, `invert` and `compose`, driven by the axis table."""

from tracing_jax.symmetry.permutation import (
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

__all__ = [
    "Dims",
    "Permutations",
    "check_permutations",
    "compose",
    "identity",
    "invert",
    "permute",
    "permute_leaf",
    "random_permutations",
    "share_moved",
    "take_units",
    "unit_moves",
]
