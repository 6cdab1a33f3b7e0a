"""Joint regions of the shares of two parents: what is known of them together where it is little of each by itself.

Siblings differ from their base in nearly the same way. Then the sum of their shares is known well and how it is divided
is not: the region is a long narrow ellipse, of which the two intervals show the sides of the box around it only.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from tracing_jax.merges.shares import Shares

LEVEL = 0.95
MOST_PARENTS = 4
"""Of more parents there are too many pairs to show."""


@dataclass(frozen=True)
class JointRegion:
    """The 95 % confidence region of the shares of two parents, an ellipse.

    Attributes:
      parents: their indices.
      center: their shares.
      axes: the half axes as vectors, the longer one first.
      correlation: of the errors of the two shares.
      together: the sum of the two shares, and its standard error.
    """

    parents: tuple[int, int]
    center: Float[np.ndarray, " 2"]
    axes: Float[np.ndarray, "2 2"]
    correlation: float
    together: tuple[float, float]

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns plain data for the record."""
        return {
            "parents": [names[k] for k in self.parents],
            "center": self.center.tolist(),
            "half_axes": self.axes.tolist(),
            "level": LEVEL,
            "correlation": self.correlation,
            "together": {"share": self.together[0], "se": self.together[1]},
        }


def joint_regions(shares: Shares) -> list[JointRegion]:
    """Returns the region of each pair of parents; none where shares are undefined or parents are many.

    Nor is there one of two parents alone whose shares sum to one: the interval of the first says all.

    Source: Hotelling's T squared, with the degrees of freedom of the jackknife.
    """
    K = len(shares.values)
    if shares.undefined or not 2 <= K <= MOST_PARENTS or not np.isfinite(shares.covariance).all():
        return []
    found = [_region(shares, pair) for pair in itertools.combinations(range(K), 2)]
    return [region for region in found if K > 2 or region.correlation > -1 + 1e-9]


def _region(shares: Shares, pair: tuple[int, int]) -> JointRegion:
    covariance = shares.covariance[np.ix_(pair, pair)]
    sizes, directions = np.linalg.eigh(covariance)
    sizes = np.maximum(sizes, 0.0)
    degrees = max(shares.degrees, 2.0)
    reach = np.sqrt(2 * degrees / (degrees - 1) * stats.f.ppf(LEVEL, 2, degrees - 1) * sizes)
    scale = float(np.sqrt(covariance[0, 0] * covariance[1, 1]))
    return JointRegion(
        pair,
        shares.values[list(pair)],
        (reach * directions).T[::-1],
        float(covariance[0, 1] / scale) if scale > 0 else 0.0,
        (float(shares.values[list(pair)].sum()), float(np.sqrt(max(covariance.sum(), 0.0)))),
    )
