"""Alignment: the rewrites that transform a fine-tuned model to base's gauge and order, proven to keep its function.

Permutations of units are estimated from weights or activations, a rotation of the residual stream from weights or
hidden states, other rewrites (scaling of units, mixing of values ...) from the weights: `align(base, ft, ("all",),
evidence="weights")`. With `evidence="learned"` gradient descent on the loss between the models continues from there.
"""

from tracing_jax.alignment.activation_matching import TAP
from tracing_jax.alignment.align_models import LOGITS_TOLERANCE, align
from tracing_jax.alignment.applicability import (
    KINDS,
    MAPS,
    WHOLE,
    AlignmentError,
    activations_problem,
    alignment_problems,
    beyond_permutations,
    expanded,
    kind_problems,
)
from tracing_jax.alignment.learning import Ends, Learning
from tracing_jax.alignment.result import Alignment, Evidence, aligned, aligned_base

__all__ = [
    "KINDS",
    "LOGITS_TOLERANCE",
    "MAPS",
    "TAP",
    "WHOLE",
    "Alignment",
    "AlignmentError",
    "Ends",
    "Evidence",
    "Learning",
    "activations_problem",
    "align",
    "aligned",
    "aligned_base",
    "alignment_problems",
    "beyond_permutations",
    "expanded",
    "kind_problems",
]
