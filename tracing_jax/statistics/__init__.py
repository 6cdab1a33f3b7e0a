"""The statistics, one a file, by the name under which a config or `--stat` asks for them."""

from collections.abc import Callable, Mapping
from typing import Any

from tracing_jax.statistics.cos import Cos
from tracing_jax.statistics.csh import Csh
from tracing_jax.statistics.csu import Csu
from tracing_jax.statistics.csu_all import CsuAll
from tracing_jax.statistics.emb import Emb
from tracing_jax.statistics.jsd import Jsd
from tracing_jax.statistics.l2 import L2
from tracing_jax.statistics.match import Match
from tracing_jax.statistics.match_all import MatchAll
from tracing_jax.statistics.match_distilled import MatchDistilled
from tracing_jax.statistics.match_moments import MatchMoments
from tracing_jax.statistics.mode import Mode
from tracing_jax.statistics.perm_mode_l2 import PermModeL2
from tracing_jax.statistics.screen import Screen
from tracing_jax.statistics.statistic import Curve, Pair, Result, Statistic, Test, Vocabularies
from tracing_jax.statistics.verdict import Verdict, over_pairs, verdict

REGISTRY: Mapping[str, Callable[[Any], Statistic]] = {
    "mode": lambda config: Mode(tuple(config.alphas), config.attn, config.emb, config.mode_num_perm),
    "cos": lambda config: Cos(),
    "emb": lambda config: Emb(max_rows=config.emb_max_rows),
    "jsd": lambda config: Jsd(),
    "csu": lambda config: Csu(),
    "csu_all": lambda config: CsuAll(config.csu_all_pairs),
    "csh": lambda config: Csh(config.csh_blocks, config.csh_block_size, config.csh_activation),
    "match": lambda config: Match(tuple(config.match_forms.split(","))),
    "match_all": lambda config: MatchAll(
        tuple(config.match_forms.split(",")), max_gib=config.match_all_gib, level=config.level
    ),
    "match_moments": lambda config: MatchMoments(),
    "match_distilled": lambda config: MatchDistilled(
        config.distil_tokens,
        config.distil_steps,
        config.distil_batch,
        config.distil_units,
        config.distil_rate,
        config.distil_decay,
    ),
    "screen": lambda config: Screen(config.screen_share),
    "l2": lambda config: L2(config.num_perm),
    "perm_mode_l2": lambda config: PermModeL2(config.num_perm, config.attn, config.emb),
}
"""Name -> how the statistic is made from a run's config."""

COSTLY = frozenset({"match_distilled"})
"""Statistics that train something: asked for by name, and no part of `all`."""

LIGHT = frozenset({"screen"})
"""Statistics that look at a small part of the files, asked for by name: a run of these alone reads no more of them."""

__all__ = [
    "COSTLY",
    "LIGHT",
    "REGISTRY",
    "Curve",
    "Pair",
    "Result",
    "Statistic",
    "Test",
    "Verdict",
    "Vocabularies",
    "over_pairs",
    "verdict",
]
