"""The MLP units of a layer that count as evidence: copies merged, units that add nothing to the stream left out.

Two things can be done to a model without changing its function, and make tests of matched units call it a relative of
another. Units may be copied, their outputs shared among the copies: equal rows of one model are then matched to equal
rows of the other in clumps, and clumps agree with the identity, or with another matching, more often than single units
do. And rows of another model may be added with outputs that are zero, or that cancel among copies: they agree perfectly
and do nothing. So of each group of copies one unit is kept, if the group writes anything at all, and it counts as
writing what the group writes together: what each of the copies writes by itself is arbitrary.

Copies are found by the row that the activation function follows, the gate. Units of one gate compute `a(g x) M x` with
the sum M of their products of down and up rows, and any other rows with the sum M do the same: (g, u, d) is
(g, v, d) and (g, u - v, d) together, for any v. So where the up rows of such units differ, none of them is kept; nor
are units whose gates point in opposite directions, as a(z) - a(-z) is z for most activation functions.

Layers and experts can be added that do nothing as well; so a unit must also write something beside the residual stream
that its layer adds to. And a unit must read something of the stream: where features are added that no token has, rows
may have anything there (`token_directions`). Where a text is read, it must also do something on it: what it writes,
beyond a line of what its gate reads, must change the logits (`unit_effects`).

All this follows from the weights of one model, whatever the order of its units: a test on the units kept is as exact as
one on all.

Letters: F units, D features.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.matching import normalised_rows
from tracing_jax.progress import tqdm
from tracing_jax.sources import ParamSource, has_embeddings, one_mlp, origin
from tracing_jax.statistics.identity_starts import identity_p
from tracing_jax.statistics.kept_facts import kept_of
from tracing_jax.statistics.mlp_rows import gain_of, without_mean
from tracing_jax.statistics.nulls import spearman_log_sf
from tracing_jax.statistics.token_directions import output_gradients, read_directions, sampled_embeddings
from tracing_jax.statistics.unit_copies import (
    SharedOutputs,
    UnitReading,
    are_pure,
    leaders,
    norms_of,
    orthogonal_features,
    reading_of,
    reading_of_outputs,
    shared_outputs,
)
from tracing_jax.statistics.unit_effects import beyond_polynomial, shares_of_effect, up_factors
from tracing_jax.statistics.unit_outputs import curved_outputs, is_reached, reached_experts
from tracing_jax.tree import to_host

INACTIVE = 0.01
"""Share of a layer's output that the units which write least may make together, for them to write nothing that matters.

Not a share of the median unit's output: most units of a layer may have been added.
"""

NO_EFFECT = 0.02
"""The same of its effect on the logits, which is measured on a text. Planted units that do nothing are far below it; of
the units of four small published models 3 to 20 per cent are, most in the first layers."""

ALIKE = 0.7
"""|cosine| of the two rows of a unit from which on they say the same. Independent models of 256 units whose rows have a
cosine of .8 in each agree on 17 of them, and of .95 on 63. So are up to a sixth of the units of a layer in four small
published models, and below a hundredth in our own."""

NEGLIGIBLE = 1e-3
"""Share of the residual stream that a layer adds if it does next to nothing. In four small published models the MLP of
a layer adds, beyond a line of what its gates read, three thousandths and more."""


@dataclass(frozen=True)
class DistinctUnits:
    """The units of one layer of one model.

    Attributes:
      kept: the units that count as evidence, in increasing order.
      total: F, the number of all units.
      copies: how many units repeat another.
      inactive: how many distinct units write nothing, or read nothing of the tokens, and are not kept.
      mixed: how many units share the gate of another and not its up row, and are not kept.
      alike: how many units have rows that resemble each other, gate and up, or up and down without a gate, and are not
        kept: two matchings by rows that say the same agree by themselves.
      order_p: two-sided p-values of the rank correlation of a kept unit's index with the norms of its rows; small where
        units were put in an order that depends on their weights.
      identity_p: the p-value of kept units whose rows do not begin at the identity; see `identity_starts`.
      shared: the outputs that are added to those of kept units.
      moments: second moments of the gate rows and of the up rows of kept units, each of length one, in random features;
        none if these are not known. No order, scale or sign of units changes them.
      added: what all units together add to the stream, root mean square over the features, for inputs in random
        directions, by what their activation gives beyond a line; nan if that is not known.
    """

    kept: Int[np.ndarray, " K"]
    total: int
    copies: int
    inactive: int
    order_p: tuple[float, ...]
    identity_p: float = 1.0
    shared: SharedOutputs | None = None
    added: float = math.nan
    mixed: int = 0
    alike: int = 0
    moments: tuple[Float[np.ndarray, " P"], ...] = ()

    @property
    def is_obscured(self) -> bool:
        """Whether so few units carry evidence that little can be found in this layer.

        So it is where most units that write something share a gate with others or have rows that are alike, or where
        three quarters of all units, copies counted once, carry none.
        """
        return len(self.kept) < max(self.mixed + self.alike, (self.total - self.copies) / 4)

    @property
    def is_kept(self) -> Bool[np.ndarray, " F"]:
        """For each unit whether it is kept."""
        return np.isin(np.arange(self.total), self.kept)

    def among(self, drawn: Int[np.ndarray, " n"]) -> Int[np.ndarray, " _"]:
        """Returns which of the units drawn, as positions among them, are kept."""
        return np.flatnonzero(self.is_kept[drawn])

    def outputs(self, down: Float[Array | np.ndarray, "F D"]) -> Float[Array | np.ndarray, "F D"]:
        """Returns what units write, a row for each: that of a kept unit and its copies together."""
        return down if self.shared is None else self.shared.added(down)


def all_units(count: int, identity_p: float = 1.0) -> DistinctUnits:
    """Returns so many units, or rows of any kind, none of which is left out."""
    return DistinctUnits(np.arange(count), count, 0, 0, (), identity_p)


def distinct_units(model: ParamSource, layer: int) -> DistinctUnits:
    """Returns the distinct units of a layer that write something.

    Its gate, up and down projections are read, one after another, when the layer is first asked for: several statistics
    of a run need the same. Two units are copies if their rows of gate are equal up to a positive factor, and those of
    up up to a factor of either sign; the output of a group is the sum of its units' outputs, each times its factor.
    Without a gate up takes its place.
    """
    kept = kept_of(model)
    if layer not in kept:
        kept[layer] = _found(model, layer)
    found: DistinctUnits = kept[layer]
    return found


def _found(model: ParamSource, layer: int) -> DistinctUnits:
    norm = model.layer(layer, (model.arch.mlp_norm,))
    names = [name for name in ("gate_proj", "up_proj") if model.arch.has(f"mlp/{name}")]
    if not names:
        return _by_output(model, layer)
    whole, (index, _) = origin(model, layer)
    directions = read_directions(whole, index)
    readings = [
        reading_of(model.layer(layer, (f"mlp/{name}",))["mlp"][name], norm, model.arch, directions) for name in names
    ]
    leader = leaders(readings[0])
    pure = are_pure(readings, leader)
    first = np.unique(leader)
    down = model.layer(layer, ("mlp/down_proj/kernel",))["mlp"]["down_proj"]["kernel"]
    if model.arch.norm_subtracts_mean:  # what a unit writes to all features alike is nothing, however much it is
        down = without_mean(jnp.asarray(down, jnp.float32), model.arch)
    # With a clamped GLU a unit still writes its gate where up is zero.
    proportional = model.arch.clamped_glu is None
    shared = shared_outputs(leader, readings[-1] if model.arch.gated and proportional else None)
    own = norms_of(down)
    summed = own if shared is None else norms_of(shared.added(down))
    size = 1.0 if directions is not None and directions.size is not None else _input_size(model, layer)

    outputs = _outputs_on_text(readings, model.arch)

    def written(degree: int) -> Float[np.ndarray, " G"]:
        curved = curved_outputs(size * readings[0].sizes, readings[0].constants, model.arch, degree)
        ups = np.prod([reading.sizes for reading in readings[1:]], axis=0) * np.ones_like(curved)
        found = curved * (ups if proportional else 1)
        if outputs is not None:  # inputs are not normally distributed: a gate may be closed for each of them
            found = np.minimum(found, np.sqrt(np.square(outputs[degree]).mean(axis=0)))
        if pure.all():
            return (found * summed)[first]
        # What such a group may write at most: what it writes decides nothing but whether others matter.
        return np.where(pure[first], (found * summed)[first], np.bincount(leader, found * own, len(leader))[first])

    beyond_line, beyond_parabola = written(1), written(2)
    least = max(inactive_below(beyond_line), _least_output(model, layer))
    does_something = (beyond_line > least) & (beyond_parabola > inactive_below(beyond_parabola))
    if outputs is not None:
        does_something &= _have_effect(model, layer, outputs[1], down if shared is None else shared.added(down), first)
    is_free = np.any([reading.is_free for reading in readings], axis=0)
    second = readings[1] if len(readings) > 1 else reading_of_outputs(down)
    is_alike = np.abs(readings[0].cosine(first, first, second)) >= _alike_from(down.shape[1])
    is_active = pure[first] & does_something & ~is_free[first] & is_reached(model, layer)
    kept = first[is_active & ~is_alike]
    norms = [*(reading.norms for reading in readings), own]
    return DistinctUnits(
        kept,
        total=len(leader),
        copies=int((pure & (leader != np.arange(len(leader)))).sum()),
        inactive=int((pure[first] & ~is_active).sum()),
        order_p=tuple(_order_p(column[kept]) for column in norms),
        identity_p=min(1.0, len(readings) * min(identity_p(reading.diagonal[kept]) for reading in readings)),
        shared=shared,
        added=float(np.sqrt(np.square(beyond_line, dtype=np.float64).sum() / down.shape[1])),
        mixed=int((~pure).sum()),
        alike=int((is_active & is_alike).sum()),
        moments=tuple(_moments(reading.sketch[kept], down.shape[1]) for reading in readings),
    )


def _alike_from(width: int) -> float:
    """Returns `ALIKE`, or more where rows are so short that they have such a cosine by chance: four standard errors."""
    return min(max(ALIKE, 4 / math.sqrt(width)), 0.95)


def _outputs_on_text(readings: list[UnitReading], arch: Arch) -> dict[int, Float[np.ndarray, "T F"]] | None:
    """Returns for degrees 1 and 2 what units give at each token of a text beyond a polynomial; None without a text."""
    gates, *others = [reading.values for reading in readings]
    if gates is None:
        return None
    factors = [up_factors(ups, arch) for ups in others if ups is not None]
    return {degree: np.prod([beyond_polynomial(gates, arch, degree), *factors], axis=0) for degree in (1, 2)}


def _have_effect(
    model: ParamSource,
    layer: int,
    outputs: Float[np.ndarray, "T F"],
    down: Float[Array | np.ndarray, "F D"],
    units: Int[np.ndarray, " G"],
) -> Bool[np.ndarray, " G"]:
    """Returns which of these units change the logits on the text, beside one another."""
    norm, (whole, (index, _)) = "mlp_post_norm", origin(model, layer)
    gradients = output_gradients(whole, index)
    if gradients is None or gradients.shape[1] != down.shape[1]:
        return np.ones(len(units), bool)
    gain = gain_of(model.layer(layer, (norm,)), norm, model.arch)
    along = to_host(_products(gradients, gain, down))[:, units]
    shares = shares_of_effect(outputs[:, units], along)
    return shares > inactive_below(shares, NO_EFFECT)


@jax.jit
def _products(
    gradients: Float[Array | np.ndarray, "T D"],
    gain: Float[Array, "..."] | float,
    down: Float[Array | np.ndarray, "F D"],
) -> Float[Array, "T F"]:
    return jnp.matmul(gradients * gain, down.astype(jnp.float32).T, precision="highest")


def _moments(sketch: Float[np.ndarray, "K S"], width: int) -> Float[np.ndarray, " P"]:
    """Returns the second moments of pairs of random features, a vector of length one, or of zeros.

    The features are made orthogonal, else what they share would be common to all layers. Rows have length one: neither
    the order of units nor their scale or sign matters.
    """
    rows = normalised_rows(sketch @ orthogonal_features(width))
    found = rows.T @ rows
    above = found[np.triu_indices(len(found), 1)]
    return above / (np.linalg.norm(above) or 1.0)


def inactive_layers(model: ParamSource) -> list[int]:
    """Returns the layers whose MLP adds next to nothing to the residual stream; none where that cannot be known.

    Such a layer can be added anywhere, so that in models with one the layers need not correspond by their index.
    """
    if not has_stream(model):
        return []
    layers = tqdm(range(model.arch.num_layers), desc="units that count as evidence", unit="layer", disable=None)
    return [i for i in layers if _added(model, i) < NEGLIGIBLE * stream_size(model, i)]


def obscured_layers(model: ParamSource) -> list[int]:
    """Returns the layers of whose MLP, or first expert, so few units carry evidence that little can be found there."""
    if not model.arch.has("mlp/down_proj"):
        return []
    return [i for i in range(model.arch.num_layers) if _first_mlp(model, i).is_obscured]


def _first_mlp(model: ParamSource, layer: int) -> DistinctUnits:
    """Returns the distinct units of the MLP of a layer, or of its first expert that inputs reach."""
    if not model.arch.has_experts(layer):
        return distinct_units(model, layer)
    known = kept_of(model)
    if (layer, "expert") not in known:
        first = int(np.argmax(reached_experts(model, layer)))
        known[layer, "expert"] = distinct_units(one_mlp(model, layer, first), 0)
    found: DistinctUnits = known[layer, "expert"]
    return found


def _least_output(model: ParamSource, layer: int) -> float:
    """Returns how much a unit must write: were all like it, they would add `NEGLIGIBLE` of the stream before them.

    0 where the stream is not known; infinite if a norm after the MLP makes all that the layer writes negligible.
    """
    model, (layer, expert) = origin(model, layer)
    if not has_stream(model):
        return 0.0
    arch, least = model.arch, NEGLIGIBLE * stream_size(model, layer)
    if arch.post_norms:
        return np.inf if _added(model, layer) * _share(model, layer, expert) < least else 0.0
    return float(least * np.sqrt(arch.embed_dim / arch.mlp_dim_of(layer)))


def _input_size(model: ParamSource, layer: int) -> float:
    """Returns the root mean square of what the MLP of a layer reads: 1 behind a norm, else that of the stream."""
    model, (layer, _) = origin(model, layer)
    return 1.0 if model.arch.pre_norms or not has_stream(model) else stream_size(model, layer)


def has_stream(model: ParamSource) -> bool:
    """Returns whether the size of the residual stream can be estimated: embeddings and all rows of units are known."""
    known = ("mlp/up_proj", "mlp/down_proj", "embed/embedding")
    return all(map(model.arch.has, known)) and has_embeddings(model)


def stream_size(model: ParamSource, layer: int) -> float:
    """Returns the size of the residual stream before a layer, from the embeddings and what MLPs add to them.

    What per-layer embeddings add is counted too, and each layer may multiply the stream.
    """
    size = _embedding_size(model)
    for i in range(layer):
        size = math.hypot(size, _added(model, i))
        if model.arch.per_layer_dim is not None:
            size = math.hypot(size, _size_of_gain(model, i, "per_layer_post_norm"))
        if model.arch.layer_scale:
            size *= abs(float(to_host(model.layer(i, ("output",))["output"]["multiplier"])[0]))
    return size


def _share(model: ParamSource, layer: int, expert: int | None) -> float:
    """Returns how much of what the experts and the MLP beside them give comes from one side, by the gains behind each.

    1 where they have no norms of their own.
    """
    if expert is None or not model.arch.branch_norms:
        return 1.0
    sides = ("shared_mlp_post_norm", "expert_post_norm")
    sizes = [_size_of_gain(model, layer, name) for name in sides]
    return sizes[0 if expert < 0 else 1] / (math.hypot(*sizes) or 1.0)


def _size_of_gain(model: ParamSource, layer: int, norm: str) -> float:
    """Returns the root mean square of the gain of a norm, which is the size of what it returns."""
    gain = gain_of(model.layer(layer, (norm,)), norm, model.arch)
    return float(np.sqrt(np.square(to_host(jnp.asarray(gain))).mean()))


def _added(model: ParamSource, layer: int) -> float:
    """Returns what the MLP of a layer, or its first expert, adds per feature; where a norm follows it, by its gain."""
    arch = model.arch
    if arch.post_norms:
        return _size_of_gain(model, layer, "mlp_post_norm")
    return _first_mlp(model, layer).added


def _embedding_size(model: ParamSource) -> float:
    """Returns the size of embeddings as the first layer reads them: the median of the rows of sampled tokens."""
    arch, known = model.arch, kept_of(model)
    if arch.embed_norm:
        gain = gain_of(model.embed(), "norm", arch)
        return float(np.sqrt(np.square(to_host(jnp.asarray(gain))).mean()))
    if "embed" not in known:
        rows = sampled_embeddings(model)
        sizes = np.sqrt(np.square(rows, dtype=np.float64).mean(axis=1))
        known["embed"] = float(arch.embed_scale * np.median(sizes[sizes > 0])) if (sizes > 0).any() else 0.0
    return known["embed"]


def _by_output(model: ParamSource, layer: int) -> DistinctUnits:
    """Returns the distinct units of a layer of which only what they write is known: copies write in one direction."""
    down = jnp.asarray(model.layer(layer, ("mlp/down_proj/kernel",))["mlp"]["down_proj"]["kernel"], jnp.float32)
    reading = reading_of_outputs(down)
    leader, norms, diagonal = leaders(reading), reading.norms, reading.diagonal
    first = np.unique(leader)
    kept = first[norms[first] > inactive_below(norms[first])]
    copies = len(leader) - len(first)
    in_order = (_order_p(norms[kept]),)
    return DistinctUnits(kept, len(leader), copies, len(first) - len(kept), in_order, identity_p(diagonal[kept]))


def inactive_below(written: Float[np.ndarray, " G"], share: float = INACTIVE) -> float:
    """Returns what units write at most that together change the output of the layer by this share of it."""
    ordered = np.sort(written.astype(np.float64))
    if not len(ordered) or not ordered[-1] > 0:
        return 0.0
    energy = np.cumsum(np.square(ordered / ordered[-1]))
    count = int((energy <= share**2 * energy[-1]).sum())
    return float(ordered[count - 1]) if count else 0.0


def _order_p(norms: Float[np.ndarray, " K"]) -> float:
    if len(norms) < 3 or np.ptp(norms) == 0:
        return 1.0
    ranks = np.argsort(np.argsort(norms))
    differences = (ranks - np.arange(len(norms))).astype(np.int64)
    one_minus_r = 6 * float((differences**2).sum()) / (len(norms) * (len(norms) ** 2 - 1))
    return min(1.0, 2 * math.exp(spearman_log_sf(min(one_minus_r, 2 - one_minus_r), len(norms))))
