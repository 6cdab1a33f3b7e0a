"""Alignment: the rewrites that transform a fine-tuned model to base's gauge and order, proven to keep its function.

Permutations of units are estimated from weights or activations; other rewrites (a rotation of the residual stream,
scaling of units, mixing of values ...) from the weights: `align(base, ft, ("all",), evidence="weights")`.
"""

from tracing_jax.alignment.activation_matching import TAP
from tracing_jax.alignment.align_models import LOGITS_TOLERANCE, align
from tracing_jax.alignment.applicability import (
    KINDS,
    WHOLE,
    AlignmentError,
    alignment_problems,
    beyond_permutations,
    expected_shape,
    kind_problems,
)
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
    "expected_shape",
    "kind_problems",
]
