"""What `csu` and `csh` share: one comparison with the identity per layer, combined by Fisher."""

from collections.abc import Sequence

from tracing_jax.arch import Arch
from tracing_jax.statistics.comparison import Comparison, bonferroni_log10, share_agreeing, share_by_layer, tests_of
from tracing_jax.statistics.pvalues import fisher
from tracing_jax.statistics.statistic import AFTER_ALIGNMENT, Pair, Result


def unit_problems(base: Arch, ft: Arch) -> list[str]:
    """Returns why the MLP units of these models have no exact null."""
    experts = [getattr(arch, "num_experts", None) for arch in (base, ft)]
    if any(experts):
        return ["experts: units move freely only inside their expert, so no exact null; see match_distilled"]
    return []


def row_problems(base: Arch, ft: Arch) -> list[str]:
    """Returns why the weights of units, rows over the features, cannot be compared between these models."""
    lines = unit_problems(base, ft)
    if base.embed_dim != ft.embed_dim:
        lines.append(f"different width ({base.embed_dim} and {ft.embed_dim} features): rows have no cosine")
    return lines


def layers_in_common(pair: Pair) -> int:
    """Returns how many layers have a counterpart of equal index."""
    return min(pair.base.arch.num_layers, pair.ft.arch.num_layers)


def constrained_result(pair: Pair, comparisons: Sequence[Comparison], label: str) -> Result:
    """Returns the result of one comparison a layer; a decision may use either test, and pays for two."""
    places = [f"layer {i}" for i in range(len(comparisons))]
    tests = tests_of(comparisons, places, fisher, "Fisher over layers")
    notes = []
    depths = [model.arch.num_layers for model in (pair.base, pair.ft)]
    if depths[0] != depths[1]:
        notes.append(f"{depths[0]} and {depths[1]} layers: the first {min(depths)} are compared; see match_all")
    if dead := sum(_left_out(pair, comparisons)):
        notes.append(f"{dead} units are zero or never vary, or have no partner, and were left out")
    result = Result(
        headline=share_agreeing(comparisons),
        label=label,
        log10_p=bonferroni_log10(tests),
        tests=tests,
        per_layer=share_by_layer(comparisons),
        notes=notes,
    )
    return result.without_p(AFTER_ALIGNMENT) if pair.aligned else result


def _left_out(pair: Pair, comparisons: Sequence[Comparison]) -> list[int]:
    smaller = min(pair.base.arch.mlp_dim, pair.ft.arch.mlp_dim)
    return [smaller - comparison.units for comparison in comparisons]
