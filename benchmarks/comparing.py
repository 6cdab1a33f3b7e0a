"""Every test on one pair of models of the zoos, as `--stat auto` and the other statistics run them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from benchmarks.descendants import Descendant, texts
from benchmarks.seeds import Zoo
from tracing_jax.arch import Arch
from tracing_jax.data import paired_one_to_one
from tracing_jax.options import MATCH_FORMS
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.statistics import (
    AUTO,
    AUTO_BY_DEPTH,
    AUTO_BY_EXPERTS,
    AUTO_WITH_TEXT,
    Pair,
    Result,
    Statistic,
    Vocabularies,
    hidden_by,
    verdict,
)
from tracing_jax.statistics.comparison import bonferroni_log10
from tracing_jax.statistics.csh import Csh
from tracing_jax.statistics.csu import Csu, CsuAll
from tracing_jax.statistics.csu_procrustes import CsuProcrustes
from tracing_jax.statistics.features_in_place import FeaturesInPlace
from tracing_jax.statistics.heads_in_place import HeadsInPlace
from tracing_jax.statistics.l2 import L2
from tracing_jax.statistics.match import Match
from tracing_jax.statistics.match_all import MatchAll
from tracing_jax.statistics.match_crossfit import MatchCrossfit
from tracing_jax.statistics.match_heads import MatchHeads
from tracing_jax.statistics.match_io import MatchIo
from tracing_jax.statistics.match_mlps import MatchMlps
from tracing_jax.statistics.match_moments import MatchMoments
from tracing_jax.statistics.unseen_tokens import UnseenTokens

LEVEL = 1e-3

STATISTICS: Mapping[str, Statistic] = {
    "csu": Csu(),
    "csu_all": CsuAll(),
    "csh": Csh(blocks=8, block_size=64),
    "l2": L2(num_perm=1199),
    "match": Match(),
    "match_all": MatchAll(),
    "match_mlps": MatchMlps(),
    "match_moments": MatchMoments(),
    "match_io": MatchIo(),
    "match_crossfit": MatchCrossfit(),
    "match_heads": MatchHeads(),
    "features_in_place": FeaturesInPlace(),
    "csu_procrustes": CsuProcrustes(),
    "heads_in_place": HeadsInPlace(),
    "unseen_tokens": UnseenTokens(),
}

Outcome = dict[str, float | None]
"""Statistic -> log10 p, None where it does not apply; and `verdict` -> 1 if `auto` says related, else 0."""


@dataclass(frozen=True)
class Text:
    """What the tests read beside the weights.

    Attributes:
      blocks: of text that no model of the zoo has seen.
      unseen: tokens that are in no text the models were trained on.
    """

    blocks: Int[np.ndarray, "N T"]
    unseen: Int[np.ndarray, " U"]

    @classmethod
    def of(cls, zoo: Zoo) -> "Text":
        """Returns the text of a zoo."""
        seen, _ = texts(zoo)
        return cls(zoo.held_out, np.setdiff1d(np.arange(zoo.arch.vocab_size), seen).astype(np.int32))


def auto(base: Arch, ft: Arch) -> list[str]:
    """Returns the statistics that `--stat auto` runs on models of these shapes, where a text is named."""
    names = [*AUTO, *AUTO_WITH_TEXT]
    if base.num_layers != ft.num_layers:
        names.append(AUTO_BY_DEPTH)
    if base.num_experts or ft.num_experts:
        names.append(AUTO_BY_EXPERTS)
    return names


def results(base: InMemory, ft: Descendant, text: Text, seed: int, names: Sequence[str]) -> dict[str, Result]:
    """Returns what those of the named statistics find that apply to the pair."""
    ids = np.arange(base.arch.vocab_size, dtype=np.int32)
    new_ids = ids if ft.new_ids is None else ft.new_ids
    rows = {"unseen": (text.unseen, new_ids[text.unseen])}
    in_text = ~np.isin(ids, text.unseen)
    text_ids = ids[in_text], new_ids[in_text]
    read = text.blocks[:4, :24]  # as much of a text as runs read
    vocabularies = Vocabularies(
        ft.new_ids is None,
        ids,
        new_ids,
        unseen=rows,
        in_text=in_text,
        text_ids=text_ids,
        text_blocks=paired_one_to_one(read, new_ids[read]),
    )
    paired = paired_one_to_one(text.blocks, new_ids[text.blocks])
    pair = Pair(base, ft.model, vocabularies, text.blocks, Compute(make_mesh(), 32), seed, blocks=paired)
    archs = base.arch, ft.model.arch
    applying = [name for name in names if not STATISTICS[name].not_applicable(*archs, vocabularies)]
    return {name: replace(STATISTICS[name].compute(pair), blind_to=hidden_by(name, *archs)) for name in applying}


def compare(base: InMemory, ft: Descendant, text: Text, seed: int, names: Sequence[str]) -> Outcome:
    """Returns the log p-values of the named statistics on one pair; the verdict of `auto` if its tests are among them.

    Where a reservation applies to a part of the evidence, the p-value is that of the rest: what makes a pair related.
    """
    found = results(base, ft, text, seed, names)
    ps: Outcome = {name: found[name].deciding_log10_p if name in found else None for name in names}
    for form in MATCH_FORMS if "match" in names else ():
        ps[f"match, {form}"] = _form_log10_p(found["match"], form) if "match" in found else None
    deciding = auto(base.arch, ft.model.arch)
    if set(deciding) <= set(names):
        judged = verdict({name: found[name] for name in deciding if name in found}, LEVEL)
        ps["verdict"] = float(judged.verdict == "related")
    return ps


def _form_log10_p(result: Result, form: str) -> float:
    """Returns the p-value, without what is reserved, that one form of `match` alone would have."""
    log10_p = bonferroni_log10([test for test in result.tests if test.name.startswith(form)], firm=True)
    assert log10_p is not None, f"no test of the form {form} enters the verdict"
    return log10_p
