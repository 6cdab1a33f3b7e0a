"""`mode`: mode connectivity: loss at the midpoint of the path between the models, barrier, and curves."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table, kind_of
from tracing_jax.forward import (
    INVERSE_TEMPERATURES,
    BezierTraining,
    calibrated,
    combination_losses,
    path_losses,
    scaled_path_losses,
    token_losses,
    trained_midpoint,
)
from tracing_jax.interpolation import interpolated_leaves, on_bezier, path_groups
from tracing_jax.rewrites import Permutations
from tracing_jax.statistics.permuted_copies import draw_permutations, permutation_result
from tracing_jax.statistics.pvalues import permutation_test
from tracing_jax.statistics.statistic import Curve, Pair, Result, Vocabularies, heads_not_applicable

_LABEL = "midpoint loss (nats per token)"

NO_DESCENT = (
    "a low loss path is no evidence of descent: independent models are joined by one too where an alignment is good "
    "enough, and a barrier does not exclude descent, since a rewrite that keeps the function makes one"
)
"""What the loss along a path does not show; in every result that has one."""


CONTROLS: Mapping[str, Mapping[str, tuple[int, float, float]]] = {
    "GPT-2 type": {
        "none": (3, 0.78, 0.87), "permutations": (3, 0.44, 0.82), "maps": (3, 0.39, 0.45), "states": (3, 0.24, 0.28),
        "learned": (3, 0.02, 0.08),
    },
    "Llama type": {
        "none": (3, 1.48, 1.73), "permutations": (3, 1.15, 1.37), "maps": (3, 0.85, 1.03), "states": (3, 0.74, 0.84),
        "learned": (3, 0.21, 0.32),
    },
    "mixture of experts": {
        "none": (3, 1.55, 1.80), "permutations": (3, 1.13, 1.49), "maps": (3, 1.01, 1.07), "states": (3, 0.86, 0.96),
        "learned": (3, 0.26, 0.38),
    },
}  # fmt: skip
"""Architecture -> how a pair is aligned -> number of control pairs, and their least and greatest barrier in nats per
token.

Models of one recipe from different seeds, so known to be independent; by `benchmarks.paths`.
"""

CONTROL_FEATURES = 64
"""Of all control pairs."""

FURTHER_CONTROLS: Mapping[str, Mapping[str, tuple[int, float, float]]] = {
    "calibrated": {"none": (3, 1.48, 1.74), "permutations": (3, 1.12, 1.31), "maps": (3, 0.84, 1.0)},
    "bezier": {"none": (3, 0.36, 0.45), "permutations": (3, 0.23, 0.33), "maps": (3, 0.08, 0.13)},
}
"""Kind of a curve -> the same of it, of the Llama type; by `benchmarks.paths --curves`."""

_FURTHER = {
    "calibrated": ("the calibrated curve is no evidence of descent either", "calibrated"),
    "bezier": (
        "a trained curve joins independent models too and is no evidence of descent",
        "in 200 steps, less in more",
    ),
}

_ALIGNED_BY = {
    "none": "as given", "permutations": "after permutations", "maps": "after all maps from weights",
    "states": "after all maps, the features' from hidden states",
    "learned": "after a learned alignment of one end or both, of 200 steps; less after more",
}  # fmt: skip


def control_note(alignment: str, arch: Arch, groups: tuple[str, ...]) -> str:
    """Returns the barriers of independent models of a kind that were aligned in the same way, as a sentence.

    Args:
      alignment: how the pair is aligned.
      arch: of base.
      groups: the leaves that are on the path.
    """
    kind = "mixture of experts" if arch.num_experts else "Llama type" if arch.gated else "GPT-2 type"
    pairs, least, greatest = CONTROLS[kind][alignment]
    measured = f"{pairs} pairs have barriers" if pairs > 1 else "one pair has barriers"
    text = (
        f"control, models of the {kind} of one recipe from different seeds, known to be independent "
        f"(docs/disguises.md): {measured} of {least:.2f} to {greatest:.2f} nats {_ALIGNED_BY[alignment]}"
    )
    others = []
    if arch.embed_dim != CONTROL_FEATURES:
        others.append(f"{CONTROL_FEATURES} features, not {arch.embed_dim}, and wider ones can have lower barriers")
    if set(groups) != set(path_groups(attn=True, emb=True)):
        others.append("every weight on the path, where here some are not")
    return f"{text}, with {'; with '.join(others)}" if others else text


def further_note(kind: str, alignment: str) -> str:
    """Returns how low further curves between independent models were, as a sentence."""
    begins, how = _FURTHER[kind]
    if alignment not in FURTHER_CONTROLS[kind]:
        return f"{begins}; no control pair that was aligned in this way was measured with one"
    pairs, least, greatest = FURTHER_CONTROLS[kind][alignment]
    return (
        f"{begins}: {pairs} control pairs of the Llama type, of {CONTROL_FEATURES} features, have barriers of "
        f"{least:.2f} to {greatest:.2f} nats {how}, {_ALIGNED_BY[alignment]}"
    )


class Mode(options.Mode):
    """Loss of the model at alpha between base and ft on base's tokens; head and embedding are base's unless `emb`.

    Its p-value, if permuted copies are asked for, is the rank of the midpoint loss among those of copies of ft with
    features and MLP units permuted. The barrier is the largest excess over the linear interpolation of the losses at
    the two ends.

    Source: Frankle et al. 2020 (arXiv 1912.05671) for the barrier; Zhu et al. 2025 (arXiv 2502.12292) for the midpoint
    loss as a test statistic.
    """

    needs_tokens: ClassVar[bool] = True

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of leaves that are interpolated."""
        return path_groups(self.attn, self.emb)

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why these groups cannot be interpolated between these models; empty if they can."""
        lines = heads_not_applicable(base, ft)
        if base.num_layers != ft.num_layers:
            lines.append(f"different depth: {base.num_layers} and {ft.num_layers} layers have no path between them")
        else:
            lines += _sizes_not_applicable(axis_table(base), axis_table(ft), self.groups)
        if self.emb and not vocabularies.same:
            lines.append("different tokenizers: the embeddings' rows are different tokens; leave emb off")
        if self.emb and base.tied != ft.tied:
            lines.append("one model ties its head to its embedding and the other does not; leave emb off")
        functions = (
            "activation", "norm", "pre_norms", "post_norms", "qk_norm", "parallel", "shared_norm", "rope_interleaved",
            "layer_experts", "experts_per_token", "router", "clamped_glu", "sinks", "latent", "layer_mixers",
            "head_gate", "value_norm", "global_attn", "branch_norms", "layer_scale", "per_layer_index",
        )  # fmt: skip
        different = [f"{name} {getattr(base, name)} / {getattr(ft, name)}" for name in functions
                     if getattr(base, name) != getattr(ft, name)]  # fmt: skip
        return lines + [f"different blocks: {line}" for line in different]

    def compute(self, pair: Pair) -> Result:
        """Returns midpoint loss (the headline), barrier and curve; one pass over the tokens for all alphas."""
        assert pair.tokens is not None
        alphas = np.array(sorted({0.0, 0.5, 1.0, *self.alphas}))
        run_cache = pair.run_cache.scope("path", "-".join(self.groups), f"{zlib.crc32(alphas.tobytes()):08x}")
        ends, way = (pair.base, pair.ft, pair.tokens), (self.groups, pair.compute)
        further: dict[str, dict[str, Any]] = {}
        has_halves = len(pair.tokens) > 1
        if self.calibrate and has_halves:
            losses, scaled = scaled_path_losses(
                *ends, alphas, *way, INVERSE_TEMPERATURES, run_cache.scope("temperatures")
            )  # fmt: skip
            found = calibrated(scaled)
            further["calibrated"] = numbers_of(alphas, found.loss) | {"temperature": found.temperature.tolist()}
        else:
            losses = path_losses(*ends, alphas, *way, run_cache=run_cache)
        own = None
        if pair.vocabularies.same:
            run_cache = pair.run_cache.scope("losses of ft")
            losses_ft = token_losses(pair.ft, pair.tokens, pair.compute, "losses of ft", run_cache)
            own = float(losses_ft.mean(dtype=np.float64))
        curve = curve_of(alphas, losses.mean(axis=(1, 2), dtype=np.float64), own, self.groups)
        if self.path == "bezier":
            further["bezier"] = self._bezier(pair, alphas)
        curve = replace(curve, more=further)
        control = control_note(pair.alignment, pair.base.arch, self.groups)
        notes = [NO_DESCENT, control, *(further_note(kind, pair.alignment) for kind in further)]
        if self.calibrate and not has_halves:
            notes.append("not calibrated: the text has one block, and a temperature is fitted on one half of them")
        permutations = draw_permutations(pair, self.num_perm)
        permuted = midpoint_losses(pair, permutations, self.groups)
        log_p = None
        if permutations:
            generator = pair.generator("mode", "ties")
            log_p = permutation_test(curve.midpoint, permuted, generator=generator, larger_is_similar=False)
        result = permutation_result(pair, _LABEL, curve.midpoint, permuted, log_p)
        if self.by_layer:
            result = replace(result, per_layer=self._by_layer(pair, curve.loss[0]))
        return replace(result, curve=curve, notes=[*notes, *result.notes])

    def _bezier(self, pair: Pair, t: np.ndarray) -> dict[str, Any]:
        """Returns the curve through a middle point that is trained on other text, with how it was trained."""
        assert pair.tokens is not None
        assert pair.learning_tokens is not None
        training = BezierTraining(pair.learning_steps)
        trained = trained_midpoint(
            pair.base, pair.ft, pair.learning_tokens, self.groups, training, pair.compute, pair.seed
        )  # fmt: skip
        models = [pair.base, pair.ft, trained.parameters]
        losses = combination_losses(models, on_bezier(t), pair.tokens, self.groups, pair.compute, "losses on the curve")
        facts = {"held_out_barriers": list(trained.barriers), "steps": trained.steps, "best_step": trained.best_step}
        return numbers_of(t, losses.mean(axis=(1, 2), dtype=np.float64)) | facts

    def _by_layer(self, pair: Pair, loss_base: float) -> dict[str, Any]:
        """Returns for each layer its barrier: excess at the midpoint if it alone moves from base to ft."""
        assert pair.tokens is not None
        values = []
        for layer in range(pair.base.arch.num_layers):
            run_cache = pair.run_cache.scope("path of a layer", layer, "-".join(self.groups))
            losses = path_losses(
                pair.base, pair.ft, pair.tokens, [0.5, 1.0], self.groups, pair.compute, f"path of layer {layer}",
                run_cache=run_cache, layer=layer,
            ).mean(axis=(1, 2), dtype=np.float64)  # fmt: skip
            values.append(float(losses[0] - (loss_base + losses[1]) / 2))
        return {"label": "barrier at the midpoint if one layer alone moves (nats per token)", "values": values}


def midpoint_losses(pair: Pair, permutations: Sequence[Permutations], groups: tuple[str, ...]) -> np.ndarray:
    """Returns the midpoint loss between base and each permuted copy of ft, nats per token; no copy is made."""
    assert pair.tokens is not None
    if not permutations:
        return np.zeros(0)
    halves = [0.5] * len(permutations)
    description = "midpoints of permuted copies"
    run_cache = pair.run_cache.scope("midpoints", "-".join(groups), len(permutations))
    losses = path_losses(
        pair.base, pair.ft, pair.tokens, halves, groups, pair.compute, description, permutations, run_cache
    )
    return losses.mean(axis=(1, 2), dtype=np.float64)


def curve_of(alphas: np.ndarray, loss: np.ndarray, own: float | None, groups: tuple[str, ...]) -> Curve:
    """Returns the curve with its midpoint and barrier; alphas are sorted and hold 0, 0.5 and 1."""
    return Curve(**numbers_of(alphas, loss), end_loss_ft_own=own, groups=list(groups))


def numbers_of(alphas: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    """Returns the points of a curve with its midpoint and its barrier, as fields of `Curve`."""
    excess = loss - ((1 - alphas) * loss[0] + alphas * loss[-1])
    highest = int(np.argmax(excess))
    return {
        "alpha": alphas.tolist(),
        "loss": loss.tolist(),
        "midpoint": float(loss[np.flatnonzero(alphas == 0.5)[0]]),
        "barrier": float(excess[highest]),
        "barrier_alpha": float(alphas[highest]),
    }


def _sizes_not_applicable(base: AxisTable, ft: AxisTable, groups: tuple[str, ...]) -> list[str]:
    """Returns one line per kind of leaf on the path that ft lacks or has in another size."""
    lines: dict[str, None] = {}
    for name in sorted(interpolated_leaves(base, groups) ^ interpolated_leaves(ft, groups)):
        lines[f"only one model has {_kind(name)}"] = None
    for name in sorted(interpolated_leaves(base, groups) & interpolated_leaves(ft, groups)):
        for axis in dict.fromkeys((*base.leaves[name].axes, *ft.leaves[name].axes)):
            size, size_ft = (table.sizes.get(axis or "", "no") for table in (base, ft))
            if size != size_ft:
                lines[f"different width: {kind_of(axis or '')} has {size} and {size_ft} units"] = None
    return list(lines)


def _kind(leaf: str) -> str:
    return leaf.split("/", 2)[2] if leaf.startswith("layers/") else leaf
