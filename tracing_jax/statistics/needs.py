"""What each statistic needs of a model that is read by its weights alone: the one place where that is asked."""

from collections.abc import Mapping

from tracing_jax.arch import WEIGHTS_ONLY, Arch

FORWARD = "forward"

_UNITS = ("mlp/up_proj", "mlp/down_proj", "norm")
_GATED = ("mlp/gate_proj", *_UNITS)
_ON_TOKENS = ("embed/embedding", *_GATED)

NEEDS: Mapping[str, tuple[str, ...]] = {
    "mode": (FORWARD,), "jsd": (FORWARD,), "csh": (FORWARD,), "perm_mode_l2": (FORWARD,), "screen": (FORWARD,),
    "match_distilled": (FORWARD,), "match_heads": ("heads",), "heads_in_place": ("heads",),
    "csu": ("mlp/down_proj",), "csu_all": (), "l2": (), "features_in_place": ("features",),
    "csu_procrustes": ("embed/embedding", "mlp/up_proj", "norm"), "unseen_tokens": ("embed/embedding",),
    "emb": ("embed/embedding",), "cos": ("mlp/gate_proj",),
    "match": _ON_TOKENS, "match_all": _ON_TOKENS, "match_mlps": _ON_TOKENS, "match_moments": _GATED,
    "match_io": ("embed/embedding", "head", *_UNITS), "match_crossfit": _UNITS,
}  # fmt: skip
"""Statistic -> the leaves that it reads, and the facts that it depends on."""

_CALLED = {
    "mlp/gate_proj": "the gate of the MLPs was not found",
    "mlp/up_proj": "what the MLPs read was not found, matrix by matrix",
    "mlp/down_proj": "what the MLPs write was not found",
    "embed/embedding": "no embedding was found",
    "head": "neither a head nor an embedding that is tied to it was found",
    "norm": "the norm before the MLP",
    "heads": "attention heads",
    "features": "features",
}


def needs_not_applicable(statistic: str, base: Arch, ft: Arch) -> list[str]:
    """Returns what a statistic needs of these models and what was not found in them; empty if nothing is missing.

    Models of supported families have everything; what else they lack, such as a gate, the statistic checks itself.
    """
    sides: dict[str, list[str]] = {}
    for side, arch in (("base", base), ("ft", ft)):
        for need in NEEDS[statistic] if arch.reading is not None else ():
            if problem := _problem(need, arch):
                sides.setdefault(problem, []).append(side)
    return [f"{' and '.join(found)}: {problem}" for problem, found in sides.items()]


def _problem(need: str, arch: Arch) -> str | None:
    if need == FORWARD:
        return WEIGHTS_ONLY
    if why := arch.unknown(need):
        return f"{_CALLED[need]}: {why}"
    if need == "head":
        return None if arch.has_head else _CALLED[need]
    if "/" in need and not arch.has(need):
        why = arch.unknown("embedding" if need.startswith("embed/") else "units")
        return _CALLED[need] + (f": {why}" if why else "")
    return None
