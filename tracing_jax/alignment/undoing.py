"""Undoing a disguise: the sequence of rewrites that brings ft to base, estimated so that disguises change nothing.

Everything is estimated from quantities that a disguise leaves, or turns along with what is to be found. So aligning a
disguised model gives what aligning the model itself gives, up to rounding.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from tracing_jax.alignment.blocks import BlockMaps, block_maps
from tracing_jax.alignment.parts import after, exact, leaves, rows
from tracing_jax.alignment.residual_stream import as_rewrites, cross_products, nearest, order_of, token_products
from tracing_jax.matching import Shared
from tracing_jax.rewrites import GainScaling, GainSetting, Permutation, Rewrite, feeding_norms, gains_in
from tracing_jax.sources import Disguised, ParamSource

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
      AlignmentError: the residual streams cannot be compared.
    """
    moves, rotates = bool({"embed", "rotation"} & set(kinds)), "rotation" in kinds
    folds = "gains" in kinds
    base_view, ft_view = (exact(source, _folding(source) if folds else ()) for source in (base, ft))
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
    if folds:
        rewrites.append(setting(exact(ft, rewrites), _to_take_over(gains_of(base))))
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


def gains_of(source: ParamSource) -> dict[str, np.ndarray]:
    """Returns the gain of every norm that feeds leaves."""
    view = exact(source)
    return gains_in(lambda prefix: leaves(view, prefix), source.arch)


def setting(source: ParamSource, gains: Mapping[str, np.ndarray]) -> GainSetting | GainScaling:
    """Returns the rewrite that gives a model these gains. Norms with a bias keep those that are zero."""
    if not GainSetting.absent(source.arch):
        return GainSetting(gains)
    found = gains_of(source)
    return GainScaling({norm: np.where(found[norm] == 0, 1.0, new / found[norm]) for norm, new in gains.items()})


def _folding(source: ParamSource) -> list[Rewrite]:
    """Returns the rewrite that moves all gains into what reads behind them."""
    return [setting(source, {norm: np.ones(source.arch.embed_dim) for norm in feeding_norms(source.arch)})]


def _to_take_over(gains: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns base's gains; a one stands for each zero, which no reader could make up for."""
    return {norm: np.where(gain == 0, 1.0, gain) for norm, gain in gains.items()}
