"""What a statistic may look at, what it gives back, and what it must answer before it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from tracing_jax.arch import Arch
from tracing_jax.sharding import Compute
from tracing_jax.source import InMemory


@dataclass(frozen=True)
class Vocabularies:
    """How the two models' tokens correspond.

    Attributes:
      same: both models have the same tokenizer, so that one's token ids mean the same to the other.
      ids_base, ids_ft: ids of the tokens that both vocabularies have, paired by string.
      known: both tokenizers could be read; without them nothing is known of the tokens.
    """

    same: bool
    ids_base: Int[np.ndarray, " S"]
    ids_ft: Int[np.ndarray, " S"]
    known: bool = True


@dataclass(frozen=True)
class Pair:
    """Two loaded models, the text to look at them with, and where to compute."""

    base: InMemory
    ft: InMemory
    vocabularies: Vocabularies
    tokens: Int[np.ndarray, "N T"] | None
    """Token blocks of base's tokenizer; None when no statistic of the run needs text."""
    compute: Compute
    seed: int
    aligned: bool = False


@dataclass(frozen=True)
class Curve:
    """Loss along the path from base (alpha 0) to ft (alpha 1), in nats per token."""

    alpha: Sequence[float]
    loss: Sequence[float]
    midpoint: float
    barrier: float
    barrier_alpha: float
    end_loss_ft_own: float | None
    """The loss of ft itself, with all its own weights; None if it cannot read base's tokens."""
    groups: Sequence[str]


@dataclass(frozen=True)
class Result:
    """The outcome of one statistic on one pair, as it goes into the record.

    Attributes:
      headline: the number to quote; `label` says what it is, with its unit.
      log10_p: the p-value where one exists, else None with the reason in `p_reason`.
      per_layer: `{"label", "values"}`, one value per layer.
      distribution: `{"label", "quantiles": {"levels", "layers"}}`, the quantiles at the levels for each layer, or once.
      not_applicable: why the statistic has no value on this pair.
    """

    headline: float | None
    label: str
    log10_p: float | None = None
    p_reason: str | None = None
    per_layer: Mapping[str, Any] | None = None
    curve: Curve | None = None
    distribution: Mapping[str, Any] | None = None
    not_applicable: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        return asdict(self)


@runtime_checkable
class Statistic(Protocol):
    """One statistic. Its options are its fields, filled from the config."""

    needs_tokens: ClassVar[bool]

    def problems(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why the statistic cannot be computed on models of these shapes; empty if it can."""

    def compute(self, pair: Pair) -> Result:
        """Returns the statistic of the pair as it is given."""


QUANTILE_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def quantiles(values: np.ndarray) -> list[float]:
    """Returns the quantiles of the values at `QUANTILE_LEVELS`."""
    return [float(q) for q in np.quantile(values, QUANTILE_LEVELS)]
