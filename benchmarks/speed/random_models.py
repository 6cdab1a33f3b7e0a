"""Random models in memory whose layers are all the same arrays: any depth costs the memory of one layer."""

import dataclasses

import jax
import ml_dtypes
import numpy as np

from benchmarks.pairs.draws import Law, draw
from tracing_jax.arch import Arch
from tracing_jax.models import init_params
from tracing_jax.sources import InMemory
from tracing_jax.tree import map_named


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
    law = Law(1.0, 0.1, 0.0) if name.endswith("/scale") else Law(0.0, 0.02, 0.0)
    bits, _ = draw(shape, law, np.random.default_rng([seed, *name.encode()]))
    return jax.numpy.asarray(bits.view(ml_dtypes.bfloat16))
