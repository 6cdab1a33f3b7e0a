"""Which unit of ft belongs to which unit of base: similarity of units, assignment, and the descent over all axes."""

from tracing_jax.matching.assignment import Blocks, assign, assign_nested
from tracing_jax.matching.coordinate import Coordinate, Similarity, coordinates, solve, value
from tracing_jax.matching.device_row_reducers import DeviceView, Product, view_of
from tracing_jax.matching.row_reducers import HostView, View
from tracing_jax.matching.similarity import Shared, WeightPairs, scores, weight_pairs, weight_similarity
from tracing_jax.matching.sparse_assignment import Assignment, optimal_assignment
from tracing_jax.matching.units import UnitMatching, live_units, match_units
from tracing_jax.matching.weights import WeightMatching, match_weights

__all__ = [
    "Assignment",
    "Blocks",
    "Coordinate",
    "DeviceView",
    "HostView",
    "Product",
    "Shared",
    "Similarity",
    "UnitMatching",
    "View",
    "WeightMatching",
    "WeightPairs",
    "assign",
    "assign_nested",
    "coordinates",
    "live_units",
    "match_units",
    "match_weights",
    "optimal_assignment",
    "scores",
    "solve",
    "value",
    "view_of",
    "weight_pairs",
    "weight_similarity",
]
