"""The statistics, registered by the name that configs and `--stat` use."""

from collections.abc import Callable, Mapping
from dataclasses import fields

from tracing_jax.options import RunOptions
from tracing_jax.statistics.cosine import Cos, Emb
from tracing_jax.statistics.csh import Csh
from tracing_jax.statistics.csu import Csu, CsuAll
from tracing_jax.statistics.csu_procrustes import CsuProcrustes
from tracing_jax.statistics.distinct_units import inactive_layers, obscured_layers
from tracing_jax.statistics.features_in_place import FeaturesInPlace
from tracing_jax.statistics.heads_in_place import HeadsInPlace
from tracing_jax.statistics.jsd import Jsd
from tracing_jax.statistics.l2 import L2
from tracing_jax.statistics.match import Match
from tracing_jax.statistics.match_all import MatchAll
from tracing_jax.statistics.match_crossfit import MatchCrossfit
from tracing_jax.statistics.match_distilled import MatchDistilled
from tracing_jax.statistics.match_heads import MatchHeads
from tracing_jax.statistics.match_io import MatchIo
from tracing_jax.statistics.match_mlps import MatchMlps
from tracing_jax.statistics.match_moments import MatchMoments
from tracing_jax.statistics.mode import Mode
from tracing_jax.statistics.needs import FORWARD, NEEDS, needs_not_applicable
from tracing_jax.statistics.perm_mode_l2 import PermModeL2
from tracing_jax.statistics.screen import Screen
from tracing_jax.statistics.shared_tokens import with_unread_units
from tracing_jax.statistics.statistic import Curve, Pair, Result, Statistic, Test, Vocabularies
from tracing_jax.statistics.token_directions import is_enough
from tracing_jax.statistics.unseen_tokens import UnseenTokens
from tracing_jax.statistics.verdict import (
    DECIDING,
    HIDING,
    Identity,
    Verdict,
    hidden_by,
    over_pairs,
    scope_of,
    verdict,
    word_of,
)

REGISTRY: Mapping[str, Callable[..., Statistic]] = {
    "mode": Mode, "cos": Cos, "emb": Emb, "jsd": Jsd, "csu": Csu, "csu_all": CsuAll, "csh": Csh, "match": Match,
    "match_all": MatchAll, "match_mlps": MatchMlps, "match_moments": MatchMoments, "match_io": MatchIo,
    "match_crossfit": MatchCrossfit, "match_heads": MatchHeads, "match_distilled": MatchDistilled, "screen": Screen,
    "unseen_tokens": UnseenTokens, "features_in_place": FeaturesInPlace, "csu_procrustes": CsuProcrustes,
    "heads_in_place": HeadsInPlace, "l2": L2,
    "perm_mode_l2": PermModeL2,
}  # fmt: skip
"""Name -> class, whose fields are the options of the section of that name."""

COSTLY = frozenset({"match_distilled"})
"""Statistics that train models: run only if named, not by `all`."""

LIGHT = frozenset({"screen"})
"""Statistics that read a small part of the files: run only if named; a run of these alone reads no more."""


AUTO = ("csu", "csu_procrustes", "features_in_place", "heads_in_place", "unseen_tokens", "match", "match_moments",
        "match_io", "match_crossfit", "match_heads")  # fmt: skip
"""The tests of `auto`: of bounded cost, and without a text."""

AUTO_WITH_TEXT = ("csh",)
"""Tests of activations, which `auto` runs beside those where a text is named; `match` then reads the text too."""

AUTO_SMALL = ("csu_procrustes", "features_in_place", "match_crossfit", "unseen_tokens")
"""Those of these tests that `auto` runs on models of at most `SMALL_WIDTH` features: their cost grows with its cube."""

AUTO_BOUNDS: Mapping[str, Mapping[str, int | tuple[str, ...]]] = {
    "csu": {"units": 1024},
    "match": {"units": 1024, "max_tokens": 1024},
    "match_all": {"units": 256, "positions": 1024},
    "match_io": {"max_tokens": 512},
    "match_moments": {"forms": ("layer",), "layers": 1, "units": 1024},
}
"""Options that bound the cost of tests where `auto` runs them on wider models, unless they are set otherwise."""

SMALL_WIDTH = 1024

AUTO_BY_DEPTH = "match_all"
"""What `auto` runs besides where layers must be assigned first: the models differ in depth, or one has layers that do
nothing."""

AUTO_BY_EXPERTS = "match_mlps"
"""What `auto` runs besides where a model has experts."""


def make_statistic(name: str, options: RunOptions) -> Statistic:
    """Returns a statistic with the options of its section; fields that the section lacks are options of the run."""
    kind, section = REGISTRY[name], getattr(options, name)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{field: getattr(section if hasattr(section, field) else options, field) for field in names})


__all__ = [
    "AUTO",
    "AUTO_BOUNDS",
    "AUTO_BY_DEPTH",
    "AUTO_BY_EXPERTS",
    "AUTO_SMALL",
    "AUTO_WITH_TEXT",
    "COSTLY",
    "DECIDING",
    "FORWARD",
    "HIDING",
    "LIGHT",
    "NEEDS",
    "REGISTRY",
    "SMALL_WIDTH",
    "Curve",
    "Identity",
    "Pair",
    "Result",
    "Statistic",
    "Test",
    "Verdict",
    "Vocabularies",
    "hidden_by",
    "inactive_layers",
    "is_enough",
    "make_statistic",
    "needs_not_applicable",
    "obscured_layers",
    "over_pairs",
    "scope_of",
    "verdict",
    "with_unread_units",
    "word_of",
]
