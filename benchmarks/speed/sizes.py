"""The sizes that the benchmark runs at: tiny models, and a few layers as wide as those of 1B and 7B models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.pairs import Recipe, config_of, write_pair
from tracing_jax.arch import Arch, arch_from_config

if TYPE_CHECKING:
    import transformers

_VOCABULARY = 4096
"""The most tokens that a size has: of a whole model's cost the head has a few per cent, of one layer's most."""


@dataclass(frozen=True)
class Size:
    """A shape and how much of everything the benchmark takes.

    Attributes:
      shape: name of a shape in `benchmarks.pairs`.
      layers: of the checkpoint pair.
      tokens: `(blocks, block size)` that pass the layers.
      batch_size: blocks in flight.
      alphas: points of the path that are timed and that the peers compute.
      matmul: side of the square matrices whose product is the peak.
      units: side of the matrices that are assigned.
      depths, widths, points: of the figure: layers, widths relative to the shape's, and numbers of alphas.
      num_perm: permuted copies of `l2`.
      rounds: times that each step is timed.
    """

    shape: str
    layers: int
    tokens: tuple[int, int]
    batch_size: int
    alphas: tuple[float, ...]
    matmul: int
    units: int
    depths: tuple[int, ...]
    widths: tuple[float, ...]
    points: tuple[int, ...]
    num_perm: int
    rounds: int

    def config(self) -> "transformers.PretrainedConfig":
        """Returns the config of the checkpoint pair."""
        config = config_of(self.shape, self.layers)
        config.vocab_size = min(config.vocab_size, _VOCABULARY)
        return config

    @property
    def arch(self) -> Arch:
        """The facts of the models of the pair."""
        return arch_from_config(self.config())

    def random_tokens(self) -> np.ndarray:
        """Returns blocks of random ids, the same in every run."""
        return np.random.default_rng(0).integers(self.arch.vocab_size, size=self.tokens, dtype=np.int32)

    def pair(self, folder: Path) -> tuple[Path, Path]:
        """Returns the checkpoints base and ft, written now if `folder` does not have them."""
        kept = folder / f"{self.shape}-{self.layers}"
        if not kept.exists():
            write_pair(kept, self.config(), Recipe())
        return kept / "base", kept / "ft"


SIZES: Mapping[str, Size] = {
    "tiny": Size("tiny", 4, (16, 128), 8, (0.0, 0.25, 0.5, 0.75, 1.0), 1024, 512, (2, 4, 8), (1, 2, 4), (1, 3, 6, 11),
                 99, 15),
    "1b-layer": Size("llama3.2-1b", 2, (2, 256), 2, (0.0, 0.5, 1.0), 2048, 1024, (1, 2, 4), (0.25, 0.5, 1), (1, 2, 4),
                     9, 3),
    "7b-layer": Size("llama2-7b", 1, (1, 512), 1, (0.0, 0.5, 1.0), 4096, 2048, (1, 2, 3), (0.25, 0.5, 1), (1, 2, 3),
                     4, 2),
}  # fmt: skip
"""Name -> size. On two cores they take about one, five and ten minutes."""
