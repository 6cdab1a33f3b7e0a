"""Agreement on every pair of layers of two models of unequal depth, and which layer comes from which."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tracing_jax import options
from tracing_jax.statistics.calibration import (
    BY_CONVERGENCE,
    DEFAULT_ALLOWANCE,
    DEFAULT_SOURCE,
    agreement_effect,
    null_of,
)
from tracing_jax.statistics.comparison import LN10, Comparison, one_test, reserved, share_agreeing
from tracing_jax.statistics.match_all import CORRESPOND, assign_layers, layer_map_sentence
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.statistic import Result


def mapped_result(table: Sequence[Sequence[Comparison]], name: str, label: str) -> Result:
    """Returns the test of all pairs of layers by agreement, and the layer map.

    Controls are all pairs but those that no number of pairs explains. The effect size is the share of agreeing units in
    the assigned pairs of layers.

    Args:
      table: the comparison of layer i of base with layer j of ft, at [i][j].
      name: of the test.
      label: of the effect size.
    """
    num_base, num_ft = len(table), len(table[0])
    cells = [cell for row in table for cell in row]
    least = math.log(CORRESPOND / len(cells))
    null = null_of([c for c in cells if c.log_p_agreement >= least], [DEFAULT_ALLOWANCE], DEFAULT_SOURCE)
    log_p = [null.log_p_agreement(0, cell) for cell in cells]
    places = [f"base {i} : ft {j}" for i in range(num_base) for j in range(num_ft)]
    how = "Holm's minimum over layer pairs"
    calibrated = one_test(f"{name}, agreement, calibrated", cells, log_p, places, bonferroni, how)
    firm = bonferroni([p if null.is_firm(0, share_agreeing([cell])) else 0.0 for p, cell in zip(log_p, cells)])
    calibrated = replace(calibrated, calibrated=True, firm_log10_p=firm / LN10)
    free = [cell.log_p_agreement for cell in cells]
    parametric = one_test(f"{name}, agreement, parametric", cells, free, places, bonferroni, how)
    found = assign_layers(np.array(log_p).reshape(num_base, num_ft), math.log(options.RunOptions.level / len(cells)))
    kept = [table[i][j] for i, j in found.pairs]
    shown = [
        {"base": i, "ft": j, "log10_p": float(log_p[i * num_ft + j] / LN10), "units": table[i][j].units,
         "agreeing": table[i][j].agreeing}
        for i, j in (*found.pairs, *found.copies)
    ]  # fmt: skip
    return Result(
        headline=share_agreeing(kept),
        label=label,
        log10_p=calibrated.log10_p,
        tests=[calibrated, replace(parametric, decides=False)],
        null={name: null.as_dict()},
        layer_map={
            "log10_p": (np.array(log_p).reshape(num_base, num_ft) / LN10).tolist(),
            "pairs": shown[: len(found.pairs)],
            "copies": shown[len(found.pairs) :],
            "unmatched_base": list(found.unmatched_base),
            "unmatched_ft": list(found.unmatched_ft),
            "sentence": layer_map_sentence(found, num_base, num_ft, [(cell.agreeing, cell.units) for cell in kept]),
        },
        notes=list(null.notes),
        effect=agreement_effect(cells, "match_moments", of_pairs=True),
        **reserved([calibrated], BY_CONVERGENCE),
    )
