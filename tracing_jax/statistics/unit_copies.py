"""Which MLP units of a layer repeat another: how units read the residual stream, compared in random features.

Letters: F units, D features, S random features.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.matching import normalised_rows
from tracing_jax.statistics.identity_starts import diagonal_ranks
from tracing_jax.statistics.mlp_rows import gain_of, scaled_rows
from tracing_jax.statistics.token_directions import Directions, spread_of_units
from tracing_jax.statistics.unit_outputs import constants_of
from tracing_jax.tree import Tree, to_host

COPY = 0.98
"""|cosine| of the rows of two units from which on they are copies: below that of rounding to 4 bits (about .995), and
above that of any two units that training has separated."""

_SKETCH = 64
"""Random features in which rows are compared: the error of a cosine near 1 is about (1 - cosine^2) / sqrt(64), and
rows in random directions reach .98 with a chance of 1e-16."""

_BLOCK = 1024  # units compared at a time with all before them


@dataclass(frozen=True)
class UnitReading:
    """How units read the residual stream by one projection: random features of their rows, of length one, and norms."""

    sketch: Float[np.ndarray, "F S"]
    norms: Float[np.ndarray, " F"]
    diagonal: Float[np.ndarray, " F"]
    """See `identity_starts.diagonal_ranks`."""
    spread: Float[np.ndarray, " F"] | float = 1.0
    """How much of the tokens they read, as a share of what rows in random directions would; see `token_directions`."""
    least: float = 0.0
    """The share below which it is next to nothing."""
    with_bias: Float[np.ndarray, "F S"] | None = None
    """Random features of rows and biases, where there are any: copies are equal with and without them."""
    constants: Float[np.ndarray, " F"] | None = None
    """What units read whatever the input: bias and shift of the norm, and the median over a text where one was read."""
    size: float = 1.0
    """Of the inputs where they vary."""
    values: Float[np.ndarray, "T F"] | None = None
    """What they read of each token of a text, with all constants, where one was read."""

    @property
    def is_free(self) -> Bool[np.ndarray, " F"]:
        """For each unit whether it reads next to nothing of the tokens: its row may then be any."""
        return np.broadcast_to(np.asarray(self.spread) < self.least, self.norms.shape)

    @property
    def sizes(self) -> Float[np.ndarray, " F"]:
        """The norms times the size of the inputs, and of units that are free no more than what they read."""
        return self.size * np.where(self.is_free, self.norms * self.spread, self.norms)

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

    def cosine(
        self, units: Int[np.ndarray, " f"], others: Int[np.ndarray, " f"], by: "UnitReading | None" = None
    ) -> Float[np.ndarray, " f"]:
        """Returns the cosine of each unit with another, without biases; `by` another reading of that one if given."""
        return np.einsum("fs,fs->f", self.sketch[units], (by or self).sketch[others])


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


def reading_of(projection: Tree, norm: Tree, arch: Arch, directions: Directions | None) -> UnitReading:
    """Returns how units read by one projection, behind the norm before it."""
    kernel = jnp.asarray(projection["kernel"])
    gain = jnp.broadcast_to(jnp.asarray(gain_of(norm, arch.mlp_norm, arch), jnp.float32), kernel.shape[:1])
    rows, largest, most = scaled_rows(kernel, gain, arch.norm_subtracts_mean)
    sketch, lengths = map(to_host, _sketch_and_norms(rows, _random_features(kernel.shape[0])))
    factors = to_host(largest).astype(np.float64) * float(most)
    norms = factors * lengths
    diagonal = to_host(diagonal_ranks(kernel, axis=0))
    found = UnitReading(normalised_rows(sketch), norms, diagonal)
    if directions is not None:
        found = replace(found, spread=spread_of_units(rows, lengths, directions), least=directions.least)
    constants = constants_of(projection, norm, arch.mlp_norm)
    if constants:
        direction = np.random.default_rng(0).standard_normal(_SKETCH).astype(np.float32)  # a feature that all rows read
        constant = np.sum(constants, axis=0)
        with_bias = normalised_rows(factors[:, None] * sketch + constant[:, None] * direction).astype(np.float32)
        found = replace(found, with_bias=with_bias, constants=constant)
    if (
        directions is None
        or directions.size is None
        or directions.inputs is None
        or kernel.shape[0] != directions.inputs.shape[1]
    ):
        return found
    values = to_host(_read_by(directions.inputs, kernel))
    values = values + to_host(projection["bias"]) if "bias" in projection else values
    with np.errstate(invalid="ignore"):
        median = np.median(values, axis=0)
    return replace(found, size=directions.size, constants=np.nan_to_num(median), values=values)


def reading_of_outputs(down: Float[Array, "F D"]) -> UnitReading:
    """Returns what units write in place of what they read, of a model of which only that is known."""
    sketch = normalised_rows(to_host(_sketch(down, _random_features(down.shape[1]))))
    return UnitReading(sketch, norms_of(down), to_host(diagonal_ranks(down)))


def leaders(reading: UnitReading) -> Int[np.ndarray, " F"]:
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


def are_pure(readings: list[UnitReading], leader: Int[np.ndarray, " F"]) -> Bool[np.ndarray, " F"]:
    """Returns for each unit whether all of its group are copies of the first: alike in every row, gates of one sign."""
    units = np.arange(len(leader))
    alike = readings[0].cosine(units, leader) >= 0
    for reading in readings:
        for side in reading.sides:
            alike &= np.abs(np.einsum("fs,fs->f", side, side[leader])) >= COPY
    others = np.zeros(len(leader), np.int64)
    np.add.at(others, leader, ~alike & (leader != units))
    return others[leader] == 0


def shared_outputs(leader: Int[np.ndarray, " F"], up: UnitReading | None) -> SharedOutputs | None:
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


def norms_of(rows: Float[Array | np.ndarray, "F D"]) -> Float[np.ndarray, " F"]:
    """Returns the norms of the rows, float64: those of large entries too, and 0 where an entry is not finite."""
    largest, relative = map(to_host, _relative_norms(jnp.asarray(rows)))
    norms = largest.astype(np.float64) * relative
    return np.where(np.isfinite(norms), norms, 0.0)


@functools.cache
def _random_features(width: int) -> Float[np.ndarray, "D S"]:
    return np.random.default_rng(width).standard_normal((width, _SKETCH)).astype(np.float32)


@functools.cache
def orthogonal_features(width: int) -> Float[np.ndarray, "S S"]:
    """Returns the map that makes the random features of this width orthogonal and of one size."""
    values, vectors = np.linalg.eigh(_random_features(width).astype(np.float64).T @ _random_features(width))
    roots = np.where(values > 1e-6 * values[-1], values, np.inf) ** -0.5
    return vectors * roots @ vectors.T


@jax.jit
def _read_by(inputs: Float[Array | np.ndarray, "T D"], kernel: Float[Array, "D F"]) -> Float[Array, "T F"]:
    return jnp.matmul(inputs, kernel.astype(jnp.float32), precision="highest")


@jax.jit
def _sketch(rows: Float[Array, "F D"], projection: Float[np.ndarray | Array, "D S"]) -> Float[Array, "F S"]:
    return jnp.einsum("fd,ds->fs", rows, projection, precision="highest")


@jax.jit
def _sketch_and_norms(
    rows: Float[Array, "D F"], projection: Float[np.ndarray | Array, "D S"]
) -> tuple[Float[Array, "F S"], Float[Array, " F"]]:
    """Returns the sketch and the norms of what units read, a column for each."""
    return jnp.einsum("df,ds->fs", rows, projection, precision="highest"), jnp.sqrt(jnp.square(rows).sum(axis=0))


@jax.jit
def _relative_norms(rows: Float[Array, "F D"]) -> tuple[Float[Array, " F"], Float[Array, " F"]]:
    """Returns the largest entry of each row, and the norm of the row over it, whose squares do not overflow."""
    largest = jnp.abs(rows.astype(jnp.float32)).max(axis=1)
    scaled = rows.astype(jnp.float32) / jnp.where(largest > 0, largest, 1.0)[:, None]
    return largest, jnp.sqrt(jnp.square(scaled).sum(axis=1))
