"""Checkpoint pairs with random weights, of the shape of any supported model; see `benchmarks.write_pair`."""

from benchmarks.pairs.shapes import SHAPES, config_of
from benchmarks.pairs.tokenizer import write_text
from benchmarks.pairs.writing import PairSpec, planted_permutations, write_pair

__all__ = ["SHAPES", "PairSpec", "config_of", "planted_permutations", "write_pair", "write_text"]
