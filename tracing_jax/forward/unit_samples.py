"""Activations to keep beside the sums: a few sampled positions and units of every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tracing_jax.data import PairedBlocks
from tracing_jax.sharding import Compute

Side = tuple[jax.Array, jax.Array]
"""Base's and ft's."""


@dataclass(frozen=True)
class Sample:
    """Activations to keep of every layer: at most so many paired positions and units of each tap, drawn from a seed."""

    positions: int
    units: int
    seed: int


def sampled_units(sample: Sample, widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the units of base and of ft to keep, in increasing order; one draw for all taps of equal width."""
    draws = np.random.default_rng(sample.seed).spawn(2)
    base, ft = (
        np.sort(draw.permutation(width)[: sample.units]).astype(np.int32)
        for draw, width in zip(draws, widths, strict=True)
    )
    return base, ft


class Keeper:
    """Picks the sampled positions and units of each batch, and joins what was picked."""

    def __init__(self, sample: Sample | None, blocks: PairedBlocks, compute: Compute) -> None:
        self.sample = sample
        if sample is None:
            return
        chosen = blocks.sampled(sample.positions, np.random.default_rng(sample.seed))
        self.at = list(zip(*(map(compute.put, compute.batches(at)) for at in (chosen.at_base, chosen.at_ft))))
        self.valid = chosen.valid

    def picks(self, batch: int, widths: Mapping[str, tuple[int, int]]) -> tuple[Side, dict[str, Side]] | None:
        """Returns the positions of a batch and, for each tap, the units; one draw for all taps of equal width."""
        if self.sample is None:
            return None
        units = {tap: sampled_units(self.sample, width) for tap, width in widths.items()}
        return self.at[batch], jax.tree.map(jnp.asarray, units)

    def joined(
        self, kept: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns the rows of all batches at the sampled positions, without those that only fill up."""
        if self.sample is None:
            return {}
        count = len(self.valid)
        return {
            tap: tuple(np.concatenate([found[tap][side] for found in kept])[:count][self.valid] for side in (0, 1))
            for tap in kept[0]
        }  # type: ignore[misc]
