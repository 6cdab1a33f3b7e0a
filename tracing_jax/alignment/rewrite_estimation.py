"""Estimation of the rewrites that align ft to base, beyond permutations, so that a disguise of ft changes nothing.

Everything is estimated from quantities that are invariant under the disguise, or equivariant with the map to be found.
So aligning a disguised model gives what aligning the model itself gives, up to rounding.
"""

from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Float

from tracing_jax.alignment.applicability import AlignmentError
from tracing_jax.alignment.block_maps import BlockMaps, block_maps
from tracing_jax.alignment.float64_leaves import Leaves, after, in_float64, leaves, own_table, shared_units, units_first
from tracing_jax.alignment.procrustes import polar
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.matching import Shared, assign
from tracing_jax.progress import tqdm
from tracing_jax.rewrites import (
    GainScaling,
    GainSetting,
    MeanSetting,
    Permutation,
    ResidualGroup,
    Rewrite,
    Rotation,
    foldable_norms,
    gains_in,
    keeping_mean,
    mean_free_basis,
    means_in,
    residual_group,
)
from tracing_jax.sources import ParamSource, prefixes

_REFINEMENTS = 1
"""How often the map of the features, first found from the tokens' embeddings, is refined from all weights."""


def estimate_rewrites(
    base: ParamSource,
    ft: ParamSource,
    kinds: Collection[str],
    shared: Shared | None,
    states: Float[np.ndarray, "D D"] | None = None,
) -> tuple[tuple[Rewrite, ...], dict[str, str]]:
    """Returns the rewrites that align ft, of base's shape, to base, and what was left out -> why.

    Each kind that is named is estimated, whether or not ft seems to need it. Both models support all `kinds`.

    Args:
      base: the model that stays as it is.
      ft: the model to align.
      kinds: of rewrites that may be used.
      shared: pairs of ids of tokens that mean the same, if the vocabularies differ.
      states: cross products of the hidden states, see `residual_products`, from which the map of the features is found;
        by default from the rows of tokens.

    Raises:
      AlignmentError: the residual streams cannot be compared.
    """
    aligns_features, folds = bool({"embed", "rotation"} & set(kinds)), "gains" in kinds
    unturned = _not_rotated(base, ft) if "rotation" in kinds else {}
    group = residual_group(base.arch) if "rotation" in kinds and not unturned else None
    base_view, ft_view = (in_float64(source, canonical(source, kinds)) for source in (base, ft))
    R, maps = None, BlockMaps()
    for last in [False] * (_REFINEMENTS if aligns_features else 0) + [True]:
        if aligns_features and R is None:
            known = token_products(base_view, ft_view, shared) if states is None else states
            R = nearest(known, group)
        turned = in_float64(ft_view, as_rewrites(R, group))
        maps, products, count = _layers(base_view, turned, kinds, not last)
        if R is not None and not last:
            # Hidden states count as much as the mean leaf, embedding and head as much as any other.
            R = nearest(known + products @ R / (1 if states is None else count), group)
    rewrites, permutations = as_rewrites(R, group), dict(maps.permutations)
    if rewrites and isinstance(last_of_stream := rewrites[-1], Permutation):
        rewrites, permutations = rewrites[:-1], {**last_of_stream.permutations, **permutations}
    if permutations:
        rewrites.append(Permutation(permutations))
    rewrites += [rewrite for rewrite in maps.rewrites if not isinstance(rewrite, Permutation)]
    if folds:
        rewrites.append(setting(in_float64(ft, rewrites), without_zeros(gains_of(base))))
    if group == "keeps_mean":
        rewrites.append(MeanSetting(means_of(base)))
    return tuple(rewrites), unturned | maps.left_out


def _not_rotated(base: ParamSource, ft: ParamSource) -> dict[str, str]:
    """Returns why features are permuted where a rotation is asked for; empty if ft can be rotated."""
    if residual_group(base.arch) != residual_group(ft.arch):
        return {"rotation": "the norms of base and ft do not commute with the same maps of the residual stream"}
    norms = [*_unfoldable(base), *_unfoldable(ft)] if residual_group(ft.arch) == "keeps_mean" else []
    return {"rotation": f"{norms[0]}: a gain is zero and its bias is not, so that it cannot be folded"} if norms else {}


def _unfoldable(source: ParamSource) -> list[str]:
    """Returns the norms whose gains cannot be folded into their readers: a gain is zero, and its bias is not."""
    view, found = in_float64(source), []
    for norm, gain in gains_of(source).items():
        prefix, name = norm.rsplit("/", 1)
        bias = leaves(view, f"{prefix}/").get(f"{name}/bias")
        if bias is not None and ((gain == 0) & (bias != 0)).any():
            found.append(norm)
    return found


def _layers(
    base: ParamSource, ft: ParamSource, kinds: Collection[str], multiply: bool
) -> tuple[BlockMaps, Float[np.ndarray, "D D"], int]:
    """Returns the maps of all layers and, if asked for, the cross products of features after them and their number."""
    maps, count = BlockMaps(), 0
    D = base.arch.embed_dim
    products = np.zeros((D, D))
    for i in tqdm(range(base.arch.num_layers), desc="aligning", unit="layer", disable=None):
        prefix = f"layers/{i}/"
        of_base, of_ft = leaves(base, prefix), leaves(ft, prefix)
        found = block_maps(of_base, of_ft, prefix, base.arch, kinds)
        maps.add(found)
        if multiply:
            mapped = after(of_ft, prefix, found.rewrites, base.arch)
            table = own_table(base.arch, prefix)
            products += cross_products(of_base, mapped, table, None)
            count += sum("embed" in spec.axes and len(spec.axes) > 1 for spec in table.leaves.values())
    return maps, products, count


def gains_of(source: ParamSource) -> dict[str, np.ndarray]:
    """Returns the gain of every foldable norm."""
    view = in_float64(source)
    return gains_in(lambda prefix: leaves(view, prefix), source.arch)


def means_of(source: ParamSource) -> dict[str, np.ndarray]:
    """Returns the mean over the features of all that a model writes to the residual stream."""
    view, found = in_float64(source), dict[str, np.ndarray]()
    for prefix in prefixes(source.arch):
        found |= means_in(prefix, leaves(view, prefix), own_table(source.arch, prefix))
    return found


def setting(source: ParamSource, gains: Mapping[str, np.ndarray]) -> GainSetting | GainScaling:
    """Returns the rewrite that gives a model these gains. Norms with a bias keep those that are zero."""
    if not any(name.endswith("norm/bias") for name in axis_table(source.arch).leaves):
        return GainSetting(gains)
    found = gains_of(source)
    return GainScaling(
        {
            norm: np.divide(new, found[norm], out=np.ones(len(new)), where=found[norm] != 0)
            for norm, new in gains.items()
        }
    )


def folding(source: ParamSource) -> list[Rewrite]:
    """Returns the rewrite that folds all gains into the leaves behind their norms."""
    return [setting(source, {norm: np.ones(source.arch.embed_dim) for norm in foldable_norms(source.arch)})]


def canonical(source: ParamSource, kinds: Collection[str]) -> list[Rewrite]:
    """Returns the rewrites that take out what rewrites of these kinds leave free: gains, means that norms subtract."""
    folded = folding(source) if "gains" in kinds else []
    free = "rotation" in kinds and not MeanSetting.unsupported(source.arch)
    return [*folded, *([MeanSetting.zeros(source.arch)] if free else [])]


def without_zeros(gains: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the gains with ones in place of zeros, which no leaf behind the norm could make up for."""
    return {norm: np.where(gain == 0, 1.0, gain) for norm, gain in gains.items()}


def cross_products(base: Leaves, ft: Leaves, table: AxisTable, shared: Shared | None) -> Float[np.ndarray, "D D"]:
    """Returns the sum over the leaves of a subtree of `base @ ft.T`, `[features, n] [n, features]`, each normalised.

    Biases are left out: a single vector would determine one direction by itself.
    """
    D = table.sizes["embed"]
    total = np.zeros((D, D))
    for name, spec in table.leaves.items():
        if name not in base or name not in ft or "embed" not in spec.axes or len(spec.axes) < 2:
            continue
        pair = shared_units(base[name], ft[name], spec, shared)
        if pair is None:
            continue
        x, y = (units_first(leaf, spec, ("embed",)) for leaf in pair)
        norms = float(np.linalg.norm(x) * np.linalg.norm(y))
        if norms > 0:
            total += x @ y.T / norms
    return total


def token_products(base: ParamSource, ft: ParamSource, shared: Shared | None) -> Float[np.ndarray, "D D"]:
    """Returns the cross products of the embedding and the head, whose other axis, the tokens, is in the same order.

    Raises:
      AlignmentError: the models share no row of a token.
    """
    products = [
        cross_products(leaves(base, prefix), leaves(ft, prefix), own_table(base.arch, prefix), shared)
        for prefix in ("embed/", "head/")
    ]
    total = products[0] + products[1]
    if not total.any():
        raise AlignmentError(
            f"no embedding row of base ({base.arch.vocab_size} tokens) and ft ({ft.arch.vocab_size} tokens) stands for "
            "the same token, or they are zero: the residual streams cannot be compared"
        )
    return total


def nearest(products: Float[np.ndarray, "D D"], group: ResidualGroup | None) -> Float[np.ndarray, "D D"]:
    """Returns the matrix R of a group, of signs with permutations, for which `R @ ft` is closest to base.

    Without a group it is a permutation matrix.
    """
    D = len(products)
    match group:
        case "orthogonal":
            return polar(products)
        case "keeps_mean":
            basis = mean_free_basis(D)
            return keeping_mean(basis @ polar(basis.T @ products @ basis) @ basis.T)
        case "signs":
            order = assign(np.abs(products))
            return np.eye(D)[order] * np.where(products[range(D), order] < 0, -1.0, 1.0)[:, None]
    return np.eye(D)[assign(products)]


def as_rewrites(R: Float[np.ndarray, "D D"] | None, group: ResidualGroup | None) -> list[Rewrite]:
    """Returns the rewrites of the residual stream that are R, a permutation last; none without R."""
    if R is None:
        return []
    if group in ("orthogonal", "keeps_mean"):
        return [Rotation(R)]
    order = np.abs(R).argmax(axis=1).astype(np.int32)
    signs = np.empty(len(R))
    signs[order] = R[range(len(R)), order]  # of ft's features, before they are put in order
    return [*([Rotation(np.diag(signs))] if group == "signs" else []), Permutation({"embed": order})]
