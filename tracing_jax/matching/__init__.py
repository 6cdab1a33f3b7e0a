"""Matching the units of two models: similarities, linear assignment, and coordinate descent over all axes."""

from tracing_jax.matching.assignment import Assignment, assign, optimal_assignment
from tracing_jax.matching.coordinate import (
    Coordinate,
    InnerSimilarity,
    Similarity,
    assign_in_groups,
    assign_nested,
    coordinates,
    solve,
    value,
)
from tracing_jax.matching.device_row_reducers import DeviceRowReducer, FactoredSimilarity, row_reducer
from tracing_jax.matching.row_reducers import HostRowReducer, RowReducer
from tracing_jax.matching.similarity import (
    Shared,
    WeightPairs,
    normalised_rows,
    scores,
    weight_pairs,
    weight_similarity,
)
from tracing_jax.matching.units import UnitMatching, live_units, match_units
from tracing_jax.matching.weights import WeightMatching, match_weights

__all__ = [
    "Assignment",
    "Coordinate",
    "DeviceRowReducer",
    "FactoredSimilarity",
    "HostRowReducer",
    "InnerSimilarity",
    "RowReducer",
    "Shared",
    "Similarity",
    "UnitMatching",
    "WeightMatching",
    "WeightPairs",
    "assign",
    "assign_in_groups",
    "assign_nested",
    "coordinates",
    "live_units",
    "match_units",
    "match_weights",
    "normalised_rows",
    "optimal_assignment",
    "row_reducer",
    "scores",
    "solve",
    "value",
    "weight_pairs",
    "weight_similarity",
]
