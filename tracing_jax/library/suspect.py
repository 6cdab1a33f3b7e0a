"""`Suspect`: a model read once, so that any number of signatures can be compared with it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from jaxtyping import Float, Int, Int8

from tracing_jax.arch import Arch
from tracing_jax.library import drawing
from tracing_jax.library.drawing import sampled_layers
from tracing_jax.library.heads import HeadForms, head_forms, heads_not_readable, layers_with_heads, sampled_head_layers
from tracing_jax.library.readings import (
    MomentReadings,
    Vocabulary,
    has_moments,
    ids_of,
    moment_readings,
    not_readable,
    reading_names,
    token_readings,
)
from tracing_jax.library.signature import Signature, as_int8, standardised_moments
from tracing_jax.progress import trange
from tracing_jax.sources import MlpsAsLayers, ParamSource, Submodel, layer_of, mlp_indices, whole_model
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.head_kernels import is_activity_known
from tracing_jax.tree import Tree, select

FEW_LAYERS = 8
"""Up to so many layers, moments are read of all; of deeper models, of those that signatures would sample."""

HEAD_TOKENS = 8 * drawing.HEAD_TOKENS
"""The most tokens on which the forms of heads are read: 2 MiB a layer of 32 heads. One vocabulary has 24 of them."""

MomentSignatures = Mapping[str, tuple[Float[np.ndarray, "_ M"], Float[np.ndarray, "M M"]]]
"""Kind of rows -> signatures of the kept units in standard deviations, and their covariance."""


@dataclass(frozen=True)
class Suspect:
    """What signatures are compared with: of every MLP the units that count as evidence.

    Attributes:
      arch: of the model; with experts, `num_layers` counts MLPs.
      kinds: the names of the two readings.
      columns: token string -> its column in the readings.
      layers: for each MLP both readings, in whole numbers: each row up to a positive factor.
      moments: index of an MLP -> moments, of some layers; empty for models read by their weights alone.
      names: of each MLP, such as `layer 3`, or `layer 3 expert 1`.
      heads: layer -> the forms of its heads, of layers whose attention adds something to the residual stream; empty
        where they cannot be read.
      head_columns: token string -> its place in these.
      layer_names: of each layer, such as `layer 3`.
      part: what was read, such as `layers 5, 16, 26 of 32`; None if all layers were.
      heads_add: whether it is known of all layers whether their attention adds something. Else it may be another
        model's, planted where it does nothing, and calls no model related.
      is_obscured: whether in most MLPs few units carry evidence (`DistinctUnits.is_obscured`), so that a relation need
        not show.
    """

    arch: Arch
    kinds: tuple[str, str]
    columns: Mapping[str, int]
    layers: Sequence[Mapping[str, Int8[np.ndarray, "_ S"]]]
    moments: Mapping[int, MomentSignatures]
    names: Sequence[str]
    part: str | None = None
    heads: Mapping[int, HeadForms] = field(default_factory=dict)
    head_columns: Mapping[str, int] = field(default_factory=dict)
    layer_names: Sequence[str] = ()
    heads_add: bool = True
    is_obscured: bool = False

    @property
    def num_bytes(self) -> int:
        """The memory that the readings take."""
        parts = [*self.layers, *self.heads.values()]
        return sum(found.nbytes for part in parts for found in part.values())


def head_strings_of(signatures: Iterable[Signature]) -> list[str]:
    """Returns the token strings of the heads of all signatures, the first of each before the second of any."""
    ranks = zip_longest(*{found.tokens[: drawing.HEAD_TOKENS] for found in signatures if found.heads})
    return list(dict.fromkeys(string for rank in ranks for string in sorted(filter(None, rank))))


def read_suspect(
    model: ParamSource,
    vocabulary: Vocabulary,
    strings: Sequence[str],
    *,
    screen: bool = False,
    head_strings: Sequence[str] | None = None,
) -> Suspect:
    """Returns what signatures with these token strings are compared with; every MLP is read once.

    Args:
      model: the suspect.
      vocabulary: its token strings.
      strings: the token strings of all signatures.
      screen: whether only the layers are read that signatures of a model of this depth sample, and of the embeddings
        only the rows of these strings.
      head_strings: those of them on which heads are compared, of which the first `HEAD_TOKENS` that the model has are
        read (`head_strings_of`); by default those of smallest hash.

    Raises:
      ValueError: the units of the model cannot be read in two ways.
    """
    if problems := not_readable(model.arch):
        raise ValueError(f"the model cannot be scanned: {'; '.join(problems)}")
    ids = ids_of(strings, vocabulary, model.arch.vocab_size)
    columns = {string: i for i, string in enumerate(s for s, found in zip(strings, ids) if found >= 0)}
    ids, depth = ids[ids >= 0], model.arch.num_layers
    shared = drawing.sampled_tokens(columns, len(columns)) if head_strings is None else head_strings
    head_columns = {string: i for i, string in enumerate([s for s in shared if s in columns][:HEAD_TOKENS])}
    chosen = layers_with_samples(model.arch) if screen else list(range(depth))
    if screen:
        model, ids = _KeptLayer(Submodel(model, chosen, None, ids)), np.arange(len(ids))
    mlps = MlpsAsLayers(model) if model.arch.num_experts else None
    source: ParamSource = model if mlps is None else mlps
    read = token_readings(source, ids)
    layers, moments, heads, obscured = [], {}, {}, 0
    read_heads = head_forms(model, ids[[columns[string] for string in head_columns]])
    places = {} if heads_not_readable(model) else dict.fromkeys(layers_with_heads(model.arch))
    L = source.arch.num_layers
    read_moments, with_moments = moment_readings(source), _with_moments(source)
    for i in trange(L, desc="reading the suspect", unit="layer", disable=None):
        units = distinct_units(source, i)
        kept, obscured = units.kept, obscured + units.is_obscured
        layers.append({name: as_int8(np.asarray(found)[kept]) for name, found in read(i).items()})
        if i in with_moments and len(kept) > 1:
            moments[i] = _moments(read_moments(i), kept)
        if (layer := layer_of(source, i)) in places:
            del places[layer]  # of a layer with experts they are read once
            forms = read_heads(layer)
            if not head_columns or all(found.any() for found in forms.values()):
                heads[layer] = forms
    return Suspect(
        source.arch,
        reading_names(source.arch),
        columns,
        layers,
        moments,
        [_name(i, chosen, mlps) for i in range(L)],
        None if len(chosen) == depth else f"layers {', '.join(map(str, chosen))} of {depth}",
        heads,
        head_columns,
        [f"layer {i}" for i in chosen],
        len(chosen) == depth and is_activity_known(model),
        2 * obscured > L,
    )


@dataclass(frozen=True)
class _KeptLayer:
    """A source that keeps the last layer read, since what is read by ranges is downloaded each time."""

    source: ParamSource
    _kept: dict[int, Tree] = field(default_factory=dict, repr=False, compare=False)

    @property
    def arch(self) -> Arch:
        return self.source.arch

    def embed(self) -> Tree:
        return self.source.embed()

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        if index not in self._kept:
            self._kept.clear()
            self._kept[index] = self.source.layer(index)
        return select(self._kept[index], only)

    def head(self) -> Tree:
        return self.source.head()


def _name(index: int, layers: Sequence[int], mlps: MlpsAsLayers | None) -> str:
    """Returns what an MLP is called, by the number of its layer in the whole model."""
    if mlps is None:
        return f"layer {layers[index]}"
    own = mlps.places[index][0]
    return mlps.name(index).replace(f"layer {own}", f"layer {layers[own]}", 1)


def layers_with_samples(arch: Arch) -> list[int]:
    """Returns the layers in which signatures sample units or heads, of dense models as deep and of one of this shape.

    Those of models with experts sample MLPs: at the same parts of the depth, unless some layers have fewer.
    """
    places = mlp_indices(arch)
    of_units = {*sampled_layers(arch.num_layers), *(places[i][0] for i in sampled_layers(len(places)))}
    return sorted(of_units | {*sampled_head_layers(arch)})


def _with_moments(source: ParamSource) -> set[int]:
    """Returns the layers, or MLPs, of which moments are read: all experts of a layer, for their order is free."""
    if not has_moments(source):
        return set()
    arch = whole_model(source).arch
    if arch.num_layers <= FEW_LAYERS:
        return set(range(source.arch.num_layers))
    sampled = layers_with_samples(arch)
    return {i for i in range(source.arch.num_layers) if layer_of(source, i) in sampled}


def _moments(readings: MomentReadings, kept: Int[np.ndarray, " K"]) -> MomentSignatures:
    found = {}
    for name, (signatures, live) in readings.items():
        own = np.intersect1d(kept, np.flatnonzero(live))
        standardised, covariance = standardised_moments(signatures, own)
        found[name] = standardised[kept], covariance
    return found
