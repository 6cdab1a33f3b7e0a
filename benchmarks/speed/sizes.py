"""The sizes that the benchmark runs at: tiny models, and a few layers as wide as those of 1B and 7B models.

Random models in memory repeat the arrays of one layer, so that any depth costs the memory of one.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import ml_dtypes
import numpy as np

from benchmarks.pairs import PairSpec, config_of, write_pair
from benchmarks.pairs.random_weights import Distribution, draw
from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.models import init_params
from tracing_jax.sources import InMemory
from tracing_jax.tree import map_named

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
            write_pair(kept, self.config(), PairSpec())
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


def random_pair(arch: Arch, layers: int) -> tuple[InMemory, InMemory]:
    """Returns two independent random models of this shape, in bfloat16, with so many layers."""
    one, other = (with_depth(_one_layer(arch, seed), layers) for seed in (0, 1))
    return one, other


def with_depth(model: InMemory, layers: int) -> InMemory:
    """Returns the model with its first layer so many times."""
    arch = model.arch
    ropes, windows = arch.layer_ropes[:1] * layers, arch.layer_windows[:1] * layers
    arch = dataclasses.replace(arch, num_layers=layers, layer_ropes=ropes, layer_windows=windows)
    first = model.params["layers"]["0"]
    return InMemory(arch, {**model.params, "layers": {str(i): first for i in range(layers)}})


def _one_layer(arch: Arch, seed: int) -> InMemory:
    shapes = jax.eval_shape(lambda key: init_params(arch, key), jax.random.key(0))
    shapes = {**shapes, "layers": {"0": shapes["layers"]["0"]}}
    return InMemory(arch, map_named(lambda name, leaf: _random(leaf.shape, seed, name), shapes))


def _random(shape: tuple[int, ...], seed: int, name: str) -> jax.Array:
    distribution = Distribution(1.0, 0.1, 0.0) if name.endswith("/scale") else Distribution(0.0, 0.02, 0.0)
    bits, _ = draw(shape, distribution, np.random.default_rng([seed, *name.encode()]))
    return jax.numpy.asarray(bits.view(ml_dtypes.bfloat16))
