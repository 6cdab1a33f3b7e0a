"""`csu_procrustes`: `csu` after ft's residual stream was rotated to base's, by a rotation learnt from shared tokens.

Letters: S tokens, D features, F MLP units.
"""

from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.progress import trange
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.comparison import Comparison, overlapped
from tracing_jax.statistics.cosine import similarities
from tracing_jax.statistics.csu import RowPair, unit_rows
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.embedding_maps import feature_map, token_matrices, token_rows
from tracing_jax.statistics.in_place import constrained_result, layers_in_common, rows_not_applicable
from tracing_jax.statistics.mlp_rows import without_mean
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies

_UP = "mlp/up_proj/kernel"
_TOKENS = 16384  # at most, that the rotation is learnt from


class CsuProcrustes(options.CsuProcrustes):
    """Constrained test on the up-projection, like `csu`, which is invariant under a rotation of the residual stream.

    The orthogonal map of the features that takes ft's embedding (and untied head) nearest to base's is found from the
    tokens that both and a text have, and ft's up-projection rows, with the gain of the norm before them, are turned by
    it. Then as `csu`: matched by |cos|, compared with the identity, layers combined by Fisher's method.

    As exact as `csu`: the map follows from features and tokens, and not from the order of the MLP units, so that
    permuting the units of one model permutes the matching. On a 7B pair it takes the time of `csu`, a third more for
    the rotation of the rows, and about a minute for the map.

    Source: Zhu et al. 2025 (arXiv 2502.12292) for `csu`; Schoenemann 1966 for the map; their combination is ours.
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why rows cannot be compared, or no map be learnt; empty if they can."""
        lines = rows_not_applicable(base, ft)
        if len(vocabularies.ids_base) < 2:
            lines.append("the vocabularies share no tokens to learn a rotation from")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the p-values per layer and combined; no forward pass."""
        run_cache = pair.run_cache.scope("csu_procrustes")
        layers, kept = layers_in_common(pair), run_cache.count(Comparison)

        def by_layer() -> Iterator[tuple[int, RowPair]]:
            if kept == layers:
                return
            found = run_cache.cached_arrays(("rotation",), lambda: {"rotation": self._rotation(pair)})
            rotation = jax.device_put(found["rotation"].astype(np.float32))
            bar = trange(kept, layers, desc="csu_procrustes", unit="layer", initial=kept, total=layers, disable=None)
            for i in bar:
                ft = jnp.einsum("fd,de->fe", _up_rows(pair.ft, i), rotation, precision="highest")
                similarity = similarities(_up_rows(pair.base, i), ft)
                yield i, RowPair(similarity, distinct_units(pair.base, i), distinct_units(pair.ft, i))

        def compare(item: tuple[int, RowPair]) -> Comparison:
            i, rows = item
            generator = pair.generator("csu_procrustes", i)
            return run_cache.cached(Comparison, (i,), lambda: rows.compared(generator))

        comparisons = [comparison for i in range(kept) if (comparison := run_cache.load(Comparison, i))]
        comparisons += overlapped(by_layer(), compare)
        label = "units whose up-projection stays in place in a rotated residual stream, share"
        return constrained_result(pair, comparisons, label, pair.base.arch.embed_dim)

    def _rotation(self, pair: Pair) -> Float[np.ndarray, "D D"]:
        """Returns the orthogonal matrix that takes ft's features to base's, from embedding and untied head together."""
        drawn = np.sort(pair.vocabularies.drawn(pair.generator("csu_procrustes", "tokens"), _TOKENS))
        sides = ((pair.base, pair.vocabularies.ids_base), (pair.ft, pair.vocabularies.ids_ft))
        parts = token_matrices(pair.base.arch, pair.ft.arch)
        base, ft = (np.concatenate([_scaled(token_rows(m, p, ids[drawn])) for p in parts]) for m, ids in sides)
        return feature_map(ft, base)


def _scaled(rows: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "S D"]:
    """Returns the rows centred over the tokens, all together of length one: embedding and head count alike."""
    centred = rows - rows.mean(axis=0)
    return centred / max(np.linalg.norm(centred), np.finfo(np.float64).tiny)


def _up_rows(model: ParamSource, index: int) -> Float[Array, "F D"]:
    """Returns the up-projection rows of a layer, times the gain of the norm before it, where there is one.

    Less their mean where the norm subtracts that of the features: nothing reads it.
    """
    norm = model.arch.mlp_norm
    layer = model.layer(index, (_UP, f"{norm}/scale"))
    rows, scale = jnp.asarray(unit_rows(layer, "up_proj"), jnp.float32), layer.get(norm, {}).get("scale")
    rows = rows if scale is None else rows * (jnp.asarray(scale, jnp.float32) + gain_offset(model.arch))
    return without_mean(rows, model.arch)
