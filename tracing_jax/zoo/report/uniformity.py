"""The p-values of the pairs called independent, held against the uniform distribution that exact tests give."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kstest

from tracing_jax.zoo.report.rows import PairRow

BINS = 10


@dataclass(frozen=True)
class Uniformity:
    """A histogram of p-values in [0, 1].

    Attributes:
      counts: pairs in each of the `BINS` bins of equal width.
      ks_p: p-value of the Kolmogorov-Smirnov test against the uniform, two-sided; None for fewer than two pairs.
      ones: how many are exactly 1, which a calibrated test says of every pair without a sign of descent.
      too_small: p-value of the one-sided test that they are smaller than uniform; None for fewer than two pairs.
    """

    counts: tuple[int, ...]
    ks_p: float | None
    ones: int
    too_small: float | None


def uniformity(rows: Sequence[PairRow]) -> Uniformity:
    """Returns the histogram of the unadjusted p-values of all pairs that are called independent."""
    p = np.array([10.0**row.log10_p for row in rows if row.verdict == "independent" and row.log10_p is not None])
    counts = tuple(int(count) for count in np.histogram(p, BINS, (0.0, 1.0))[0])
    enough = len(p) >= 2
    return Uniformity(
        counts,
        float(kstest(p, "uniform").pvalue) if enough else None,
        int((p >= 1.0).sum()),
        float(kstest(p, "uniform", alternative="greater").pvalue) if enough else None,
    )


def in_words(found: Uniformity) -> str:
    """Returns what the histogram says: conservative as it should be, or too many small p-values."""
    total = sum(found.counts)
    if found.ks_p is None or found.too_small is None:
        return f"{total} pair{'s' if total != 1 else ''}: too few to say anything."
    if found.too_small < 0.01:
        return (
            f"There are more small p-values than independent pairs give (one-sided Kolmogorov-Smirnov p = "
            f"{found.too_small:.2g}): some of these pairs may be related after all, or the tests are not calibrated "
            "for such models. Look at the smallest ones in the table of pairs."
        )
    text = (
        f"Kolmogorov-Smirnov p = {found.ks_p:.2g} against the uniform; not smaller than uniform "
        f"(p = {found.too_small:.2g})."
    )
    if found.ks_p < 0.01:
        text += (
            f" They lie above the uniform ({found.ones} of {total} are exactly 1), which is the safe side: the p-value "
            "of a pair pays for all statistics that were asked, and calibrated tests allow for units that independent "
            "models share."
        )
    return text
