"""Which unit of ft belongs to which unit of base: similarity of units, assignment, and the descent over all axes."""

from tracing_jax.matching.assignment import Blocks, assign, assign_nested
from tracing_jax.matching.coordinate import Coordinate, Similarity, coordinates, solve, value
from tracing_jax.matching.similarity import Shared, WeightPairs, scores, weight_pairs, weight_similarity
from tracing_jax.matching.weights import WeightMatching, match_weights

__all__ = [
    "Blocks",
    "Coordinate",
    "Shared",
    "Similarity",
    "WeightMatching",
    "WeightPairs",
    "assign",
    "assign_nested",
    "coordinates",
    "match_weights",
    "scores",
    "solve",
    "value",
    "weight_pairs",
    "weight_similarity",
]
