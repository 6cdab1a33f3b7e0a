"""Linear assignment: which unit of ft belongs to which unit of base, for one axis or an axis with another inside it."""

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment


def assign(similarity: Float[np.ndarray, "n m"]) -> Int[np.ndarray, " n"]:
    """Returns for every row its own column, such that the similarities picked have the greatest possible sum.

    Raises:
      ValueError: more rows than columns, or similarities that are not finite.
    """
    n, m = similarity.shape
    if n > m:
        raise ValueError(f"cannot assign {n} rows to {m} columns one to one; transpose, or leave rows out first")
    _check_finite(similarity)
    _, columns = linear_sum_assignment(similarity, maximize=True)
    return columns.astype(np.int32)


def assign_nested(
    inner: Float[np.ndarray, "K G K2 G2"], outer: Float[np.ndarray, "K K2"]
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, "K G"]]:
    """Returns p and r of greatest `sum_k outer[k, p[k]] + sum_kg inner[k, g, p[k], r[k, g]]`, exactly.

    Once unit k is paired with k', the best order of the units inside the two no longer depends on the other pairs. So
    a pair is worth its outer part plus its best inner assignment, and the pairs themselves are one more assignment.

    Raises:
      ValueError: as `assign`.
    """
    K, _, K2, _ = inner.shape
    _check_finite(inner)
    pairs = [[assign(inner[k, :, other]) for other in range(K2)] for k in range(K)]
    orders = np.asarray(pairs, np.int32)  # [K K2 G]
    inside = np.take_along_axis(inner.transpose(0, 2, 1, 3), orders[..., None], axis=-1)[..., 0].sum(-1)
    p = assign(outer + inside)
    return p, orders[np.arange(K), p]


def _check_finite(similarity: Float[np.ndarray, "..."]) -> None:
    if bad := int((~np.isfinite(similarity)).sum()):
        raise ValueError(
            f"{bad} of {similarity.size} similarities are NaN or infinite; look for such values in the weights or "
            "activations they come from"
        )
