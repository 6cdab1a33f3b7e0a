"""Undoing a disguise: the sequence of rewrites that brings ft to base, estimated so that disguises change nothing.

Everything is estimated from quantities that a disguise leaves, or turns along with what is to be found. So aligning a
disguised model gives what aligning the model itself gives, up to rounding.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from tracing_jax.alignment.blocks import BlockMaps, block_maps
from tracing_jax.alignment.parts import after, exact, leaves, rows
from tracing_jax.alignment.stream import as_rewrites, cross_products, nearest, order_of, token_products
from tracing_jax.matching import Shared
from tracing_jax.source import Disguised, ParamSource
from tracing_jax.symmetry import GainSetting, Permutation, Rewrite, feeding_norms, gains_in

_REFINEMENTS = 1
"""How often all weights correct the map that the tokens' rows gave."""


@dataclass(frozen=True)
class Undoing:
    """What brings ft to base.

    Attributes:
      rewrites: from left to right.
      permutations: those among them, by axis.
      left_out: what was not undone -> why.
    """

    rewrites: tuple[Rewrite, ...]
    permutations: dict[str, np.ndarray]
    left_out: dict[str, str]


def undo(base: ParamSource, ft: ParamSource, kinds: Collection[str], shared: Shared | None) -> Undoing:
    """Returns the rewrites that bring a model of base's shape to base, as far as these kinds of maps can.

    Each kind that is named is estimated, whether or not ft seems to need it. `kinds` exist for both models.

    Raises:
      ValueError: the residual streams cannot be compared.
    """
    moves, rotates = bool({"embed", "rotation"} & set(kinds)), "rotation" in kinds
    folded = [GainSetting.ones(base.arch, feeding_norms(base.arch))] if "gains" in kinds else []
    base_view, ft_view = exact(base, folded), exact(ft, folded)
    R, maps = None, BlockMaps()
    for last in [False] * (_REFINEMENTS if moves else 0) + [True]:
        if moves and R is None:
            tokens = token_products(base_view, ft_view, shared)
            R = nearest(tokens, rotates)
        turned = exact(ft_view, as_rewrites(R, rotates))
        maps, products = _layers(base_view, turned, kinds, not last)
        if R is not None and not last:
            R = nearest(tokens + products @ R, rotates)
    permutations = ({} if R is None or rotates else {"embed": order_of(R)}) | maps.permutations
    rewrites: list[Rewrite] = as_rewrites(R, rotates) if rotates else []
    rewrites += [Permutation(permutations)] if permutations else []
    rewrites += [rewrite for rewrite in maps.rewrites if not isinstance(rewrite, Permutation)]
    if folded:
        rewrites.append(GainSetting(_gains_to_take_over(base)))
    return Undoing(tuple(rewrites), permutations, maps.left_out)


def _layers(
    base: Disguised, ft: Disguised, kinds: Collection[str], multiply: bool
) -> tuple[BlockMaps, Float[np.ndarray, "D D"]]:
    """Returns the maps of all layers and, if asked for, the cross products of the features after these maps."""
    maps = BlockMaps()
    D = base.arch.embed_dim
    products = np.zeros((D, D))
    for i in tqdm(range(base.arch.num_layers), desc="undoing", unit="layer", disable=None):
        prefix = f"layers/{i}/"
        of_base, of_ft = leaves(base, prefix), leaves(ft, prefix)
        found = block_maps(of_base, of_ft, prefix, base.arch, kinds)
        maps.add(found)
        if multiply:
            mapped = after(of_ft, prefix, found.rewrites, base.arch)
            products += cross_products(of_base, mapped, rows(base.arch, prefix), None)
    return maps, products


def _gains_to_take_over(base: ParamSource) -> dict[str, np.ndarray]:
    """Returns base's gains; a one stands for each zero, which no reader could make up for."""
    view = exact(base)
    gains = gains_in(lambda prefix: leaves(view, prefix), base.arch)
    return {norm: np.where(gain == 0, 1.0, gain) for norm, gain in gains.items()}
