"""`perm_mode_l2`: the permutation tests of `mode` and of `l2` on the same permuted copies."""

import math
from dataclasses import replace
from typing import ClassVar

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.statistics.l2 import distances
from tracing_jax.statistics.mode import Mode, midpoint_losses
from tracing_jax.statistics.permuted_copies import draw_permutations, permutation_result, shapes_not_applicable
from tracing_jax.statistics.pvalues import permutation_test
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies


class PermModeL2(options.PermModeL2):
    """Midpoint loss and distance, each ranked among the same permuted copies; the smaller p-value after Bonferroni.

    Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = True

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why the models cannot be interpolated or subtracted; empty if they can."""
        path = Mode(attn=self.attn, emb=self.emb).not_applicable(base, ft, vocabularies)
        return list(dict.fromkeys([*path, *shapes_not_applicable(base, ft)]))

    def compute(self, pair: Pair) -> Result:
        """Returns both tests; the headline is the midpoint loss."""
        permutations = draw_permutations(pair, self.num_perm)
        path = Mode(alphas=(0.5,), attn=self.attn, emb=self.emb)
        losses = midpoint_losses(pair, permutations, path.groups)
        found = path.compute(pair)
        curve = found.curve
        assert curve is not None
        distance, permuted = distances(pair, permutations)
        tests = []
        for name, observed, copies in (("mode", curve.midpoint, losses), ("l2", distance, permuted)):
            ties = pair.generator(name, "ties")
            log_p = permutation_test(observed, copies, generator=ties, larger_is_similar=False)
            log10_p = log_p / math.log(10)
            values = {"as given": [observed], "mean of the copies": [float(copies.mean())]}
            tests.append(Test(name, log10_p, "permuted copies", ["whole model"], [log10_p], values))
        both = min(0.0, math.log(2) + math.log(10) * min(test.log10_p for test in tests if test.log10_p is not None))
        label = "midpoint loss (nats per token); its test and that of l2 share their permuted copies"
        result = permutation_result(pair, label, curve.midpoint, losses, both)
        result = replace(result, notes=list(dict.fromkeys([*found.notes, *result.notes])))
        return result if pair.aligned else replace(result, tests=tests)
