"""The agreement of two matchings when a share of the units of independent models may agree by convergence."""

import math

import numpy as np
from scipy import special


def composite_agreement_log_sf(k: int, h: int, u: float, lam: float) -> float:
    """Returns log P(K >= k) for the sum K of Binomial(h, u) and Poisson(lam).

    Each of h units agrees by convergence with chance u, and lam more by accident. Both tails of the convolution are
    sums of positive terms, taken in log space; where the upper one is close to 1 the lower one gives its logarithm. The
    relative error of the logarithm is below 1e-12 up to h = 30,000.

    Args:
      k: the units that agree.
      h: all units.
      u: the share that may agree by convergence, in [0, 1).
      lam: the mean number of accidental agreements, in (0, h]; 1 for a uniformly random matching.

    Raises:
      ValueError: an argument outside its range.
    Source: Gurnee et al. 2024, Universal Neurons in GPT2 Language Models (arXiv 2401.12181), for convergent units.
    """
    if not (0 <= k <= h and h >= 1 and 0 <= u < 1 and 0 < lam <= h):
        raise ValueError(
            f"k = {k}, h = {h}, u = {u}, lambda = {lam}: 0 <= k <= h, 1 <= h, 0 <= u < 1 and 0 < lambda <= h must hold"
        )
    if k == 0:
        return 0.0
    converged, accidental = _log_binomial(h, u), _log_poisson(lam, k)
    log_at_least = np.logaddexp.accumulate(accidental[::-1])[::-1]
    needed = np.maximum(k - np.arange(h + 1), 0)
    log_sf = float(special.logsumexp(converged + log_at_least[needed]))
    if log_sf < math.log(0.5):
        return log_sf
    log_at_most = np.logaddexp.accumulate(accidental)
    return math.log1p(-math.exp(special.logsumexp(converged[:k] + log_at_most[k - 1 :: -1])))


def _log_binomial(h: int, u: float) -> np.ndarray:
    """Returns the log probabilities of 0, ..., h."""
    b = np.arange(h)
    return _log_probabilities(np.log((h - b) / (b + 1)) + special.logit(u), int((h + 1) * u))


def _log_poisson(lam: float, k: int) -> np.ndarray:
    """Returns the log probabilities of 0, 1, ..., until the rest is below 1e-19 of what lies at k and above."""
    last = max(k, math.ceil(lam)) + math.ceil(10 * math.sqrt(lam)) + 40
    return _log_probabilities(math.log(lam) - np.log(np.arange(1, last + 1)), int(lam))


def _log_probabilities(log_ratios: np.ndarray, mode: int) -> np.ndarray:
    """Returns the log probabilities whose successive differences these are.

    They are summed up from the mode outwards: differences of log-gammas would lose five digits where it counts.
    """
    up, down = np.cumsum(log_ratios[mode:]), np.cumsum(-log_ratios[:mode][::-1])
    weights = np.concatenate([down[::-1], [0.0], up])
    return weights - special.logsumexp(weights)
