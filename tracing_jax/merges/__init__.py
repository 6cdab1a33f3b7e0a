"""Merges: which parents a model has, in what shares, with standard errors, layer by layer.

The child is compared with all its possible parents at once, leaf by leaf, in one pass over their files.
"""

from tracing_jax.merges.merge_report import merge_report
from tracing_jax.merges.models import MergeError, MergeModels
from tracing_jax.merges.normal_equations import NormalEquations, TensorSums, read_sums
from tracing_jax.merges.opening import not_comparable, opened_models, same_files
from tracing_jax.merges.parent_shares import ParentShare
from tracing_jax.merges.report import MergeReport
from tracing_jax.merges.shares import Shares, estimate, grouped_shares

__all__ = [
    "MergeError",
    "MergeModels",
    "MergeReport",
    "NormalEquations",
    "ParentShare",
    "Shares",
    "TensorSums",
    "estimate",
    "grouped_shares",
    "merge_report",
    "not_comparable",
    "opened_models",
    "read_sums",
    "same_files",
]
