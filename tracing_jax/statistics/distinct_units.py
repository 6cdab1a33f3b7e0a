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
may have anything there (`token_directions`).

All this follows from the weights of one model, whatever the order of its units: a test on the units kept is as exact as
one on all.

Letters: F units, D features.
"""

import functools
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
from tracing_jax.statistics.identity_starts import diagonal_ranks, identity_p
from tracing_jax.statistics.kept_facts import kept_of
from tracing_jax.statistics.mlp_rows import gain_of, scaled_rows
from tracing_jax.statistics.nulls import spearman_log_sf
from tracing_jax.statistics.token_directions import UNREAD, sampled_embeddings, spread_of_units, token_directions
from tracing_jax.statistics.unit_outputs import constants_of, curved_outputs, is_reached, reached_experts
from tracing_jax.tree import Tree, to_host

COPY = 0.98
"""|cosine| of the rows of two units from which on they are copies: below that of rounding to 4 bits (about .995), and
above that of any two units that training has separated."""

INACTIVE = 0.01
"""Share of a layer's output that the units which write least may make together, for them to write nothing that matters.

Not a share of the median unit's output: most units of a layer may have been added.
"""

NEGLIGIBLE = 1e-3
"""Share of the residual stream that a layer adds if it does next to nothing. In four small published models the MLP of
a layer adds, beyond a line of what its gates read, three thousandths and more."""

_SKETCH = 64
"""Random features in which rows are compared: the error of a cosine near 1 is about (1 - cosine^2) / sqrt(64), and
rows in random directions reach .98 with a chance of 1e-16."""
_BLOCK = 1024  # units compared at a time with all before them


@dataclass(frozen=True)
class DistinctUnits:
    """The units of one layer of one model.

    Attributes:
      kept: the units that count as evidence, in increasing order.
      total: F, the number of all units.
      copies: how many units repeat another.
      inactive: how many distinct units write nothing, or read nothing of the tokens, and are not kept.
      mixed: how many units share the gate of another and not its up row, and are not kept.
      order_p: two-sided p-values of the rank correlation of a kept unit's index with the norms of its rows; small where
        units were put in an order that depends on their weights.
      identity_p: the p-value of kept units whose rows do not begin at the identity; see `identity_starts`.
      shared: the outputs that are added to those of kept units.
      moments: second moments of the up rows of kept units, each of length one, in random features; None if the up
        projection is not known. No order, scale or sign of units changes them.
      added: what all units together add to the stream, root mean square over the features, for inputs in random
        directions, by what their activation gives beyond a line; nan if that is not known.
    """

    kept: Int[np.ndarray, " K"]
    total: int
    copies: int
    inactive: int
    order_p: tuple[float, ...]
    identity_p: float = 1.0
    shared: "SharedOutputs | None" = None
    added: float = math.nan
    mixed: int = 0
    moments: Float[np.ndarray, " P"] | None = None

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


@dataclass(frozen=True)
class SharedOutputs:
    """What copies of units write, as an addition to what the first of each group writes.

    Attributes:
      copies: units that repeat another.
      first: the unit that each repeats.
      factors: how many times the response of the first that of each copy is.
    """

    copies: Int[np.ndarray, " C"]
    first: Int[np.ndarray, " C"]
    factors: Float[np.ndarray, " C"]

    def added(self, down: Float[Array | np.ndarray, "F D"]) -> Float[Array, "F D"]:
        """Returns the rows with those of the copies added to the first of their group."""
        rows = jnp.asarray(down, jnp.float32)
        return rows.at[self.first].add(self.factors[:, None].astype(np.float32) * rows[self.copies])


def all_units(count: int, identity_p: float = 1.0) -> DistinctUnits:
    """Returns so many units, or rows of any kind, none of which is left out."""
    return DistinctUnits(np.arange(count), count, 0, 0, (), identity_p)


@dataclass(frozen=True)
class _Reading:
    """How units read the residual stream by one projection: random features of their rows, of length one, and norms."""

    sketch: Float[np.ndarray, "F S"]
    norms: Float[np.ndarray, " F"]
    diagonal: Float[np.ndarray, " F"]
    """See `identity_starts.diagonal_ranks`."""
    spread: Float[np.ndarray, " F"] | float = 1.0
    """How much of the tokens they read, as a share of what rows in random directions would; see `token_directions`."""
    with_bias: Float[np.ndarray, "F S"] | None = None
    """Random features of rows and biases, where there are any: copies are equal with and without them."""
    constants: Float[np.ndarray, " F"] | None = None
    """What units read whatever the input: bias and shift of the norm."""

    @property
    def is_free(self) -> Bool[np.ndarray, " F"]:
        """For each unit whether it reads next to nothing of the tokens: its row may then be any."""
        return np.broadcast_to(np.asarray(self.spread) < UNREAD, self.norms.shape)

    @property
    def sizes(self) -> Float[np.ndarray, " F"]:
        """The norms, and of units that are free no more than what they read."""
        return np.where(self.is_free, self.norms * self.spread, self.norms)

    @property
    def sides(self) -> list[Float[np.ndarray, "F S"]]:
        """The random features without biases, and with them where there are any."""
        return [self.sketch, *([] if self.with_bias is None else [self.with_bias])]

    def are_alike(self, units: Int[np.ndarray, " f"], others: Int[np.ndarray, " g"]) -> Bool[np.ndarray, "f g"]:
        """Returns which of some units have |cosine| >= COPY with which of some others, with and without bias."""
        cosines = self.sketch[units] @ self.sketch[others].T
        alike = np.zeros(cosines.shape, bool)
        if not cosines.size:
            return alike
        # Few units have copies: whole rows are asked first, which makes no array of their size.
        some = np.flatnonzero(np.maximum(cosines.max(axis=1), -cosines.min(axis=1)) >= COPY)
        alike[some] = np.abs(cosines[some]) >= COPY
        for side in self.sides[1:]:
            alike[some] &= np.abs(side[units[some]] @ side[others].T) >= COPY
        return alike

    def cosine(self, units: Int[np.ndarray, " f"], others: Int[np.ndarray, " f"]) -> Float[np.ndarray, " f"]:
        """Returns the cosine of each unit with another, without biases."""
        return np.einsum("fs,fs->f", self.sketch[units], self.sketch[others])


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
    directions = token_directions(origin(model, layer)[0])
    readings = [
        _reading(model.layer(layer, (f"mlp/{name}",))["mlp"][name], norm, model.arch, directions) for name in names
    ]
    leader = _leaders(readings[0])
    pure = _are_pure(readings, leader)
    first = np.unique(leader)
    down = model.layer(layer, ("mlp/down_proj/kernel",))["mlp"]["down_proj"]["kernel"]
    # With a clamped GLU a unit still writes its gate where up is zero.
    proportional = model.arch.clamped_glu is None
    shared = _shared(leader, readings[-1] if model.arch.gated and proportional else None)
    own = _norms(down)
    summed = own if shared is None else _norms(shared.added(down))
    size = _input_size(model, layer)

    def written(degree: int) -> Float[np.ndarray, " G"]:
        curved = curved_outputs(size * readings[0].sizes, readings[0].constants, model.arch, degree)
        ups = np.prod([reading.sizes for reading in readings[1:]], axis=0) * np.ones_like(curved)
        found = (curved * (ups if proportional else 1) * summed)[first]
        if pure.all():
            return found
        # What such a group may write at most: what it writes decides nothing but whether others matter.
        return np.where(pure[first], found, np.bincount(leader, curved * ups * own, len(leader))[first])

    beyond_line, beyond_parabola = written(1), written(2)
    least = max(inactive_below(beyond_line), _least_output(model, layer))
    does_something = (beyond_line > least) & (beyond_parabola > inactive_below(beyond_parabola))
    is_free = np.any([reading.is_free for reading in readings], axis=0)
    kept = first[pure[first] & does_something & ~is_free[first]] if is_reached(model, layer) else first[:0]
    norms = [*(reading.norms for reading in readings), own]
    return DistinctUnits(
        kept,
        total=len(leader),
        copies=int((pure & (leader != np.arange(len(leader)))).sum()),
        inactive=int(pure[first].sum()) - len(kept),
        order_p=tuple(_order_p(column[kept]) for column in norms),
        identity_p=min(1.0, len(readings) * min(identity_p(reading.diagonal[kept]) for reading in readings)),
        shared=shared,
        added=float(np.sqrt(np.square(beyond_line, dtype=np.float64).sum() / down.shape[1])),
        mixed=int((~pure).sum()),
        moments=_moments(readings[-1].sketch[kept], down.shape[1]),
    )


def _moments(sketch: Float[np.ndarray, "K S"], width: int) -> Float[np.ndarray, " P"]:
    """Returns the second moments of pairs of random features, a vector of length one, or of zeros.

    The features are made orthogonal, else what they share would be common to all layers. Rows have length one: neither
    the order of units nor their scale or sign matters.
    """
    rows = normalised_rows(sketch @ _orthogonal(width))
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
    """Returns the layers of whose MLP, or first expert, so few units carry evidence that little can be found there.

    Those are layers where most units that write something share a gate with others, or where three quarters of all
    units, copies counted once, carry none.
    """
    if not model.arch.has("mlp/down_proj"):
        return []

    def is_obscured(units: DistinctUnits) -> bool:
        return len(units.kept) < max(units.mixed, (units.total - units.copies) / 4)

    return [i for i in range(model.arch.num_layers) if is_obscured(_first_mlp(model, i))]


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
    """Returns the size of embeddings as the first layer reads them: the median of the rows of tokens of all ids."""
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
    norms, diagonal = _norms(down), to_host(diagonal_ranks(down))
    leader = _leaders(_Reading(normalised_rows(to_host(_sketch(down, _projection(down.shape[1])))), norms, diagonal))
    first = np.unique(leader)
    kept = first[norms[first] > inactive_below(norms[first])]
    copies = len(leader) - len(first)
    in_order = (_order_p(norms[kept]),)
    return DistinctUnits(kept, len(leader), copies, len(first) - len(kept), in_order, identity_p(diagonal[kept]))


def _reading(projection: Tree, norm: Tree, arch: Arch, directions: Float[np.ndarray, "T D"] | None) -> _Reading:
    """Returns how units read by one projection, behind the norm before it."""
    kernel = jnp.asarray(projection["kernel"])
    gain = jnp.broadcast_to(jnp.asarray(gain_of(norm, arch.mlp_norm, arch), jnp.float32), kernel.shape[:1])
    rows, largest, most = scaled_rows(kernel, gain, arch.norm_subtracts_mean)
    sketch, lengths = map(to_host, _sketch_and_norms(rows, _projection(kernel.shape[0])))
    factors = to_host(largest).astype(np.float64) * float(most)
    norms = factors * lengths
    diagonal = to_host(diagonal_ranks(kernel.T))
    spread = spread_of_units(rows, lengths, directions)
    constants = constants_of(projection, norm, arch.mlp_norm)
    if not constants:
        return _Reading(normalised_rows(sketch), norms, diagonal, spread)
    direction = np.random.default_rng(0).standard_normal(_SKETCH).astype(np.float32)  # a feature that all rows read
    constant = np.sum(constants, axis=0)
    with_bias = normalised_rows(factors[:, None] * sketch + constant[:, None] * direction).astype(np.float32)
    return _Reading(normalised_rows(sketch), norms, diagonal, spread, with_bias, constant)


def _leaders(reading: _Reading) -> Int[np.ndarray, " F"]:
    """Returns for each unit the first unit that it is alike, itself if there is none before it.

    Units are alike that first unit, and not only one another: else units that do nothing could link any two.
    """
    F = len(reading.norms)
    leader, found = np.arange(F), np.zeros(0, np.int64)
    for start in range(0, F, _BLOCK):
        units = np.arange(start, min(start + _BLOCK, F))
        if len(found):
            alike = reading.are_alike(units, found)
            leader[units] = np.where(alike.any(axis=1), found[alike.argmax(axis=1)], units)
        left = units[leader[units] == units]
        alike = reading.are_alike(left, left)
        for i in np.flatnonzero(np.triu(alike, 1).any(axis=1)):
            if leader[left[i]] == left[i]:
                later = left[i + 1 :][alike[i, i + 1 :]]
                leader[later[leader[later] == later]] = left[i]
        found = np.concatenate([found, left[leader[left] == left]])
    return leader


def _are_pure(readings: list[_Reading], leader: Int[np.ndarray, " F"]) -> Bool[np.ndarray, " F"]:
    """Returns for each unit whether all of its group are copies of the first: alike in every row, gates of one sign."""
    units = np.arange(len(leader))
    alike = readings[0].cosine(units, leader) >= 0
    for reading in readings:
        for side in reading.sides:
            alike &= np.abs(np.einsum("fs,fs->f", side, side[leader])) >= COPY
    others = np.zeros(len(leader), np.int64)
    np.add.at(others, leader, ~alike & (leader != units))
    return others[leader] == 0


def inactive_below(written: Float[np.ndarray, " G"]) -> float:
    """Returns what units write at most that together change the output of the layer by `INACTIVE` of it."""
    ordered = np.sort(written.astype(np.float64))
    if not len(ordered) or not ordered[-1] > 0:
        return 0.0
    energy = np.cumsum(np.square(ordered / ordered[-1]))
    count = int((energy <= INACTIVE**2 * energy[-1]).sum())
    return float(ordered[count - 1]) if count else 0.0


def _shared(leader: Int[np.ndarray, " F"], up: _Reading | None) -> SharedOutputs | None:
    """Returns the outputs of copies; None if there are none.

    Args:
      leader: of each unit, the first of its group.
      up: of the projection beside the gate, if the output of a unit grows in proportion to its row, which may then be
        any multiple of the first's.
    """
    copies = np.flatnonzero(leader != np.arange(len(leader)))
    if not len(copies):
        return None
    of = leader[copies]
    if up is None:
        return SharedOutputs(copies, of, np.ones(len(copies)))
    sign = np.sign(up.cosine(copies, of))
    return SharedOutputs(copies, of, sign * up.norms[copies] / np.where(up.norms[of] == 0, 1, up.norms[of]))


@functools.cache
def _projection(width: int) -> Float[np.ndarray, "D S"]:
    return np.random.default_rng(width).standard_normal((width, _SKETCH)).astype(np.float32)


@functools.cache
def _orthogonal(width: int) -> Float[np.ndarray, "S S"]:
    """Returns the map that makes the random features of this width orthogonal and of one size."""
    values, vectors = np.linalg.eigh(_projection(width).astype(np.float64).T @ _projection(width))
    roots = np.where(values > 1e-6 * values[-1], values, np.inf) ** -0.5
    return vectors * roots @ vectors.T


@jax.jit
def _sketch(rows: Float[Array, "F D"], projection: Float[np.ndarray | Array, "D S"]) -> Float[Array, "F S"]:
    return jnp.einsum("fd,ds->fs", rows, projection, precision="highest")


@jax.jit
def _sketch_and_norms(
    rows: Float[Array, "D F"], projection: Float[np.ndarray | Array, "D S"]
) -> tuple[Float[Array, "F S"], Float[Array, " F"]]:
    """Returns the sketch and the norms of what units read, a column for each."""
    return jnp.einsum("df,ds->fs", rows, projection, precision="highest"), jnp.sqrt(jnp.square(rows).sum(axis=0))


def _norms(rows: Float[Array | np.ndarray, "F D"]) -> Float[np.ndarray, " F"]:
    """Returns the norms of the rows, float64: those of large entries too, and 0 where an entry is not finite."""
    largest, relative = map(to_host, _relative_norms(jnp.asarray(rows)))
    norms = largest.astype(np.float64) * relative
    return np.where(np.isfinite(norms), norms, 0.0)


@jax.jit
def _relative_norms(rows: Float[Array, "F D"]) -> tuple[Float[Array, " F"], Float[Array, " F"]]:
    """Returns the largest entry of each row, and the norm of the row over it, whose squares do not overflow."""
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=1)
    scaled = rows.astype(jnp.float32) / jnp.where(largest > 0, largest, 1.0)[:, None]
    return largest, jnp.sqrt(jnp.square(scaled).sum(axis=1))


def _order_p(norms: Float[np.ndarray, " K"]) -> float:
    if len(norms) < 3 or np.ptp(norms) == 0:
        return 1.0
    ranks = np.argsort(np.argsort(norms))
    differences = (ranks - np.arange(len(norms))).astype(np.int64)
    one_minus_r = 6 * float((differences**2).sum()) / (len(norms) * (len(norms) ** 2 - 1))
    return min(1.0, 2 * math.exp(spearman_log_sf(min(one_minus_r, 2 - one_minus_r), len(norms))))
