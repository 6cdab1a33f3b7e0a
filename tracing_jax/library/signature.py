"""`Signature`: a sample of how a model's MLP units respond, in at most 256 KiB, whatever the size of the model.

A signature holds responses rounded to 8 bits, never weights: of three layers 64 units each, for at most 352 token
strings, of 128 units each how the weights of their own layer act on them, and of 16 query heads each how they attend to
24 of the strings and what they write. See docs/scan.md for what it reveals.

Letters: U units, S tokens, M moments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Int, Int8

from tracing_jax.error_messages import shortened
from tracing_jax.library import drawing
from tracing_jax.library.heads import SampledHeads, head_forms, heads_not_readable, sampled_head_layers, sampled_heads
from tracing_jax.library.readings import (
    Vocabulary,
    has_moments,
    ids_of,
    moment_readings,
    not_readable,
    reading_names,
    token_readings,
)
from tracing_jax.progress import tqdm
from tracing_jax.sources import MlpsAsLayers, ParamSource
from tracing_jax.statistics.distinct_units import distinct_units

SIGNATURE_FORMAT = 2
"""Version of the file format. Files of version 1 are read: they have no heads, and more tokens."""

MOST_LISTED_FILES = 16
"""Of more weight files than this, the header has their common hash alone."""

MOST_CHARACTERS = 200
"""Of the name of a model."""

_MOMENT_STEP = 1 / 16  # standard deviations
SHAPE = ("num_layers", "embed_dim", "mlp_dim", "num_experts", "vocab_size", "gated", "num_kv_heads", "q_group")
"""The facts of a model that the header has."""


@dataclass(frozen=True)
class SampledLayer:
    """The sampled units of one layer.

    Attributes:
      layer: its index; with experts that of an MLP, counted through all layers.
      units: U indices of units.
      readings: each of the two readings -> responses to the tokens, each row up to a positive factor.
      moments: each of two kinds of rows -> signatures of moments, in standard deviations of the layer's units, over
        `_MOMENT_STEP`; of the first of the same units and of more of them. Empty for models read by their weights.
      covariances: the same kinds of rows -> the correlations of the moments over the layer's units.
    """

    layer: int
    units: Int[np.ndarray, " U"]
    readings: Mapping[str, Int8[np.ndarray, "U S"]]
    moments: Mapping[str, Int8[np.ndarray, "V M"]]
    covariances: Mapping[str, Float16[np.ndarray, "M M"]]


@dataclass(frozen=True)
class Signature:
    """A signature, with the header of its file.

    Attributes:
      facts: format and rule, the model's id, revision, family and shape, the hashes of its files, and what was drawn.
      tokens: S token strings.
      layers: the sampled layers.
      heads: the sampled heads of layers with attention; empty where none can be read, and in files of version 1.
    """

    facts: Mapping[str, Any]
    tokens: tuple[str, ...]
    layers: tuple[SampledLayer, ...]
    heads: tuple[SampledHeads, ...] = ()

    @property
    def model(self) -> str:
        """The id of the model, as its owner gave it."""
        return str(self.facts["model"])

    @property
    def digest(self) -> str:
        """The hash that identifies the weight files."""
        return str(self.facts["digest"])

    @property
    def kinds(self) -> tuple[str, str]:
        """The names of the two readings."""
        one, other = self.facts["readings"]
        return one, other


def make_signature(
    model: ParamSource, vocabulary: Vocabulary, *, model_id: str, files: Mapping[str, str], revision: str | None = None
) -> Signature:
    """Returns the signature of a model; it is the same whenever it is made of the same files.

    Args:
      model: its weights; only the sampled layers and the embedding (without a gate, the head as well) are read.
      vocabulary: its token strings.
      model_id: what it is to be called.
      files: name -> SHA-256 of each weight file.
      revision: the commit, of a model on the Hub.

    Raises:
      ValueError: the units cannot be read, or none of a sampled layer counts as evidence.
    """
    if problems := not_readable(model.arch):
        raise ValueError(f"{model_id}: no signature can be made: {'; '.join(problems)}")
    digest = drawing.model_digest(files)
    key, arch = drawing.drawing_key(digest), model.arch
    mlps: ParamSource = MlpsAsLayers(model) if arch.num_experts else model
    tokens = drawing.sampled_tokens(vocabulary.ids, drawing.most_tokens(arch.embed_dim))
    read = token_readings(mlps, ids_of(tokens, vocabulary, arch.vocab_size))
    layers, obscured = [], 0
    sampled = drawing.sampled_layers(mlps.arch.num_layers)
    for i in tqdm(sampled, desc="signature", unit="layer", disable=None):
        units = distinct_units(mlps, i)
        obscured += units.is_obscured
        if len(units.kept) < 2:
            raise ValueError(f"{model_id}: layer {i} has {len(units.kept)} units that count as evidence, 2 are needed")
        layers.append(_sampled(mlps, i, units.kept, key, read(i)))
    if 2 * obscured > len(sampled):
        raise ValueError(
            f"{model_id}: in {obscured} of {len(sampled)} sampled layers most units carry no evidence: they share a "
            "gate with others, do nothing, or have two rows that are alike; a signature would miss its relatives"
        )
    heads = _sampled_heads(model, ids_of(tokens[: drawing.HEAD_TOKENS], vocabulary, arch.vocab_size), key)
    facts = {
        "format": SIGNATURE_FORMAT,
        "model": _shown(model_id),
        "revision": revision,
        "family": arch.family,
        "shape": {name: getattr(arch, name) for name in SHAPE},
        "digest": digest,
        "num_files": len(files),
        "files": dict(sorted(files.items())) if len(files) <= MOST_LISTED_FILES else {},
        "rule": drawing.RULE,
        "layers": sampled,
        "of_layers": mlps.arch.num_layers,
        "head_layers": [found.layer for found in heads],
        "readings": list(reading_names(arch)),
        "vocabulary_known": vocabulary.known,
    }
    return Signature(facts, tuple(tokens), tuple(layers), heads)


def _shown(model_id: str) -> str:
    return shortened("".join(c if c.isprintable() else "?" for c in model_id), MOST_CHARACTERS)


def _sampled(
    model: ParamSource,
    layer: int,
    kept: Int[np.ndarray, " K"],
    key: bytes,
    readings: Mapping[str, Any],
) -> SampledLayer:
    units = drawing.drawn_units(kept, key, layer, drawing.UNITS)
    moments, covariances = {}, {}
    if has_moments(model):
        more = drawing.drawn_units(kept, key, layer, drawing.MOMENT_UNITS)
        for name, (found, live) in moment_readings(model)(layer).items():
            standardised, covariance = standardised_moments(found, np.intersect1d(kept, np.flatnonzero(live)))
            steps = np.round(standardised[more] / _MOMENT_STEP)
            moments[name] = np.clip(steps, -127, 127).astype(np.int8)
            covariances[name] = covariance.astype(np.float16)
    return SampledLayer(
        layer,
        units.astype(np.int32),
        {name: as_int8(np.asarray(found)[units]) for name, found in readings.items()},
        moments,
        covariances,
    )


def _sampled_heads(model: ParamSource, ids: Int[np.ndarray, " T"], key: bytes) -> tuple[SampledHeads, ...]:
    if heads_not_readable(model):
        return ()
    read = head_forms(model, ids)
    found = (sampled_heads(i, read(i), key) for i in sampled_head_layers(model.arch))
    return tuple(heads for heads in found if heads is not None)


def as_int8(rows: Float[np.ndarray, "U S"]) -> Int8[np.ndarray, "U S"]:
    """Returns each row less its mean, times the factor that makes its largest number 127, in whole numbers."""
    if not rows.shape[1]:
        return np.zeros(rows.shape, np.int8)
    centred = rows - rows.mean(axis=1, keepdims=True)
    largest = np.abs(centred).max(axis=1, keepdims=True, initial=0.0)
    return np.round(centred * (127 / np.where(largest > 0, largest, 1.0))).astype(np.int8)


def standardised_moments(
    found: Float[np.ndarray, "F M"], kept: Int[np.ndarray, " K"]
) -> tuple[Float[np.ndarray, "F M"], Float[np.ndarray, "M M"]]:
    """Returns signatures in standard deviations from the mean of the kept units, and the kept units' covariance."""
    own = found[kept].astype(np.float64)
    scaled = (found - own.mean(axis=0)) / np.maximum(own.std(axis=0), 1e-9)
    return scaled.astype(np.float32), (scaled[kept].T @ scaled[kept] / len(kept)).astype(np.float32)


def stored_moments(layer: SampledLayer, name: str) -> Float[np.ndarray, "V M"]:
    """Returns the stored signatures of moments of a layer, in standard deviations."""
    return layer.moments[name].astype(np.float32) * np.float32(_MOMENT_STEP)


def is_same(one: Signature, other: Signature) -> bool:
    """Returns whether two signatures are of the same files: all but their names equal, and the numbers up to rounding.

    Another machine may round a number to the next one. Of two versions of the format, what both have is compared.
    """
    S = min(len(one.tokens), len(other.tokens))
    versions = one.facts["format"], other.facts["format"]
    if one.digest != other.digest or one.tokens[:S] != other.tokens[:S] or len(one.layers) != len(other.layers):
        return False
    if versions[0] == versions[1] and not (len(one.tokens) == len(other.tokens) and _same_heads(one, other)):
        return False
    return all(_same_layer(*layers, S) for layers in zip(one.layers, other.layers))


def _same_heads(one: Signature, other: Signature) -> bool:
    if [found.layer for found in one.heads] != [found.layer for found in other.heads]:
        return False
    pairs = list(zip(one.heads, other.heads))
    same = all(np.array_equal(a.heads, b.heads) for a, b in pairs)
    return same and all(_close(a.forms[name], b.forms[name]) for a, b in pairs for name in a.forms)


def _same_layer(one: SampledLayer, other: SampledLayer, S: int) -> bool:
    if one.layer != other.layer or not np.array_equal(one.units, other.units):
        return False
    if one.readings.keys() != other.readings.keys() or one.moments.keys() != other.moments.keys():
        return False
    pairs = [(found, other.readings[name]) for name, found in one.readings.items()]
    if any(a.shape != b.shape for a, b in pairs):  # of two versions: rows are scaled by the tokens that they have
        pairs = [(as_int8(a[:, :S].astype(float)), as_int8(b[:, :S].astype(float))) for a, b in pairs]
    pairs += [(found, other.moments[name]) for name, found in one.moments.items()]
    return all(_close(a, b) for a, b in pairs)


def _close(one: Int8[np.ndarray, "N M"], other: Int8[np.ndarray, "N M"]) -> bool:
    return one.shape == other.shape and bool(np.abs(one.astype(int) - other.astype(int)).max(initial=0) <= 2)
