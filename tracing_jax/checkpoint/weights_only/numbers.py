"""Doubts about a model that its numbers can settle: which half of a fused matrix is the gate, how gains are stored.

Letters: n units, D features.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_FLIPS = 64
_CLEAR, _NONE = 8.0, 4.0
"""Standard deviations of random signs: from the first on rows have a direction in common, up to the second they have
none that is seen."""

_PLAIN, _OFFSET = 0.002, 0.02
"""Shares of negative gains: fewer than the first where gains multiply, more than the second where 1 is added first.
Gains that multiply begin at 1 and hardly ever change their sign; those that are stored minus one begin at 0."""


def common_direction(rows: Float[np.ndarray, "n D"]) -> float:
    """Returns how much the rows have a direction in common, in standard deviations of what random signs give.

    The up row of a unit may change its sign together with its down row, and nothing in training prefers a sign: up rows
    have no direction in common. Gate rows have one, as a gate is shut for most of its inputs.
    """
    rows = np.asarray(rows, np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    signs = np.random.default_rng(len(rows)).choice([-1.0, 1.0], size=(_FLIPS, len(rows)))
    null = np.square(signs @ rows).sum(axis=1)
    return float((np.square(rows.sum(axis=0)).sum() - null.mean()) / max(null.std(), 1e-30))


def which_is_gate(first: Sequence[float], second: Sequence[float]) -> int | None:
    """Returns which of two kinds of rows, by their common direction in some layers, is the gate; None if unclear."""
    for gate, up in ((first, second), (second, first)):
        if np.median(gate) > _CLEAR and np.median(up) < _NONE:
            return 0 if gate is first else 1
    return None


def guess_gain_offset(gains: Sequence[np.ndarray]) -> float | None:
    """Returns what is added to stored gains before they multiply, 0 or 1; None if their signs do not determine it."""
    values = np.concatenate([np.ravel(gain).astype(np.float64) for gain in gains])
    negative = float((values < 0).mean())
    if negative < _PLAIN:
        return 0.0 if np.median(values) > 0 else None
    return 1.0 if negative > _OFFSET and np.median(1 + values) > 0 else None


def is_rule(table: Float[np.ndarray, "P D"]) -> bool:
    """Returns whether a table of positions follows a rule such as that of sines: its rows have one length."""
    lengths = np.linalg.norm(np.asarray(table, np.float64), axis=1)
    return bool(lengths.std() < 1e-3 * max(lengths.mean(), 1e-30))


def is_near_identity(rows: Float[np.ndarray, "n D"]) -> bool:
    """Returns whether the first rows of a square matrix have outliers on the diagonal."""
    diagonal = np.abs(np.diagonal(rows)).mean()
    return bool(diagonal > 3 * np.sqrt(np.square(np.asarray(rows, np.float64)).mean()))
