"""`Suspect`: a model read once, so that any number of signatures can be compared with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int8

from tracing_jax.arch import Arch
from tracing_jax.library.drawing import sampled_layers
from tracing_jax.library.readings import (
    Vocabulary,
    has_moments,
    ids_of,
    moment_readings,
    not_readable,
    reading_names,
    token_readings,
)
from tracing_jax.library.signature import rounded, standardised_moments
from tracing_jax.progress import trange
from tracing_jax.sources import MlpsAsLayers, ParamSource
from tracing_jax.statistics.distinct_units import distinct_units

FEW_LAYERS = 8
"""Up to so many layers, moments are read of all; of deeper models, of those that a signature would sample."""

Moments = Mapping[str, tuple[Float[np.ndarray, "_ M"], Float[np.ndarray, "M M"]]]
"""Kind of rows -> signatures of the kept units in standard deviations, and their covariance."""


@dataclass(frozen=True)
class Suspect:
    """What signatures are compared with: of every MLP the units that carry evidence.

    Attributes:
      arch: of the model; with experts, `num_layers` counts MLPs.
      kinds: the names of the two readings.
      columns: token string -> its column in the readings.
      layers: for each MLP both readings, in whole numbers: each row up to a positive factor.
      moments: layer -> moments, of some layers; empty for models with experts.
      names: of each MLP, such as `layer 3`, or `layer 3 expert 1`.
    """

    arch: Arch
    kinds: tuple[str, str]
    columns: Mapping[str, int]
    layers: Sequence[Mapping[str, Int8[np.ndarray, "_ S"]]]
    moments: Mapping[int, Moments]
    names: Sequence[str]

    @property
    def num_bytes(self) -> int:
        """The memory that the readings take."""
        return sum(found.nbytes for layer in self.layers for found in layer.values())


def read_suspect(model: ParamSource, vocabulary: Vocabulary, strings: Sequence[str]) -> Suspect:
    """Returns what signatures with these token strings are compared with; every MLP is read once.

    Raises:
      ValueError: the units of the model cannot be read in two ways.
    """
    if problems := not_readable(model.arch):
        raise ValueError(f"the model cannot be scanned: {'; '.join(problems)}")
    mlps = MlpsAsLayers(model) if model.arch.num_experts else None
    source: ParamSource = model if mlps is None else mlps
    ids = ids_of(strings, vocabulary, model.arch.vocab_size)
    columns = {string: i for i, string in enumerate(s for s, found in zip(strings, ids) if found >= 0)}
    read = token_readings(source, ids[ids >= 0])
    layers, moments = [], {}
    L = source.arch.num_layers
    with_moments = set(range(L) if L <= FEW_LAYERS else sampled_layers(L)) if has_moments(source) else set[int]()
    for i in trange(L, desc="reading the suspect", unit="layer", disable=None):
        kept = distinct_units(source, i).kept
        layers.append({name: rounded(np.asarray(found)[kept]) for name, found in read(i).items()})
        if i in with_moments and len(kept) > 1:
            moments[i] = _moments(source, i, kept)
    return Suspect(
        source.arch,
        reading_names(source.arch),
        columns,
        layers,
        moments,
        [f"layer {i}" if mlps is None else mlps.name(i) for i in range(L)],
    )


def _moments(model: ParamSource, layer: int, kept: Int[np.ndarray, " K"]) -> Moments:
    found = {}
    for name, (signatures, live) in moment_readings(model, layer).items():
        own = np.intersect1d(kept, np.flatnonzero(live))
        standardised, covariance = standardised_moments(signatures, own)
        found[name] = standardised[kept], covariance
    return found
