"""Activations to return beside the sums: a few sampled positions and units of every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from tracing_jax.data import PairedBlocks
from tracing_jax.sharding import Compute

ArrayPair = tuple[jax.Array, jax.Array]
"""Base's and ft's."""

HostPair = tuple[np.ndarray, np.ndarray]
"""The same on the host."""


@dataclass(frozen=True)
class Sample:
    """Which activations to return of every layer: of at most so many paired positions and units of each tap.

    Attributes:
      positions: the most paired positions.
      units: the most units of each tap.
      seed: both are drawn from it.
    """

    positions: int
    units: int
    seed: int


def sampled_units(sample: Sample, widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sampled units of base and of ft, in increasing order; one draw for all taps of equal width."""
    draws = np.random.default_rng(sample.seed).spawn(2)
    base, ft = (
        np.sort(draw.permutation(width)[: sample.units]).astype(np.int32)
        for draw, width in zip(draws, widths, strict=True)
    )
    return base, ft


class UnitSampler:
    """Selects the sampled positions and units of each batch, and concatenates what was selected."""

    def __init__(self, sample: Sample | None, blocks: PairedBlocks, compute: Compute) -> None:
        self.sample = sample
        if sample is None:
            return
        sampled = blocks.sampled(sample.positions, np.random.default_rng(sample.seed))
        self.at = list(zip(*(map(compute.put, compute.batches(at)) for at in (sampled.at_base, sampled.at_ft))))
        self.valid = sampled.valid

    def selection(self, batch: int, widths: Sequence[tuple[int, int]]) -> tuple[ArrayPair, list[HostPair]] | None:
        """Returns the positions of a batch and, for each tap, the units; one draw for all taps of equal width."""
        if self.sample is None:
            return None
        units = [sampled_units(self.sample, width) for width in widths]
        return self.at[batch], units

    def concatenated(self, batches: Sequence[Mapping[str, HostPair]]) -> dict[str, HostPair]:
        """Returns the rows of all batches at the sampled positions, without padding."""
        if self.sample is None:
            return {}
        count = len(self.valid)
        return {
            tap: tuple(np.concatenate([found[tap][m] for found in batches])[:count][self.valid] for m in (0, 1))
            for tap in batches[0]
        }  # type: ignore[misc]
