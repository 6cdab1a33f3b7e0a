"""The statistics, one a file, by the name under which a config or `--stat` asks for them."""

from collections.abc import Callable, Mapping
from typing import Any

from tracing_jax.statistics.cos import Cos
from tracing_jax.statistics.emb import Emb
from tracing_jax.statistics.mode import Mode
from tracing_jax.statistics.statistic import Curve, Pair, Result, Statistic, Vocabularies

REGISTRY: Mapping[str, Callable[[Any], Statistic]] = {
    "mode": lambda config: Mode(alphas=tuple(config.alphas), attn=config.attn, emb=config.emb),
    "cos": lambda config: Cos(),
    "emb": lambda config: Emb(max_rows=config.emb_max_rows),
}
"""Name -> how the statistic is made from a run's config."""

__all__ = ["REGISTRY", "Curve", "Pair", "Result", "Statistic", "Vocabularies"]
