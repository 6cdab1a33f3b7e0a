"""Alignment: brings a fine-tuned model to base's gauge and order, and proves that its function is unchanged.

Permutations of units are found from weights or activations. Disguises beyond them (a rotated residual stream, scaled
units, mixed values ...) are undone from the weights: `align(base, ft, ("all",), evidence="weights")`.
"""

from tracing_jax.alignment.align_models import LOGITS_TOLERANCE, align
from tracing_jax.alignment.kinds import (
    KINDS,
    WHOLE,
    AlignmentError,
    alignment_problems,
    beyond_permutations,
    kind_problems,
    kinds_in,
    shape_hoped_for,
)
from tracing_jax.alignment.permuting import TAP
from tracing_jax.alignment.result import Alignment, Evidence, aligned

__all__ = [
    "KINDS",
    "LOGITS_TOLERANCE",
    "TAP",
    "WHOLE",
    "Alignment",
    "AlignmentError",
    "Evidence",
    "align",
    "aligned",
    "alignment_problems",
    "beyond_permutations",
    "kind_problems",
    "kinds_in",
    "shape_hoped_for",
]
