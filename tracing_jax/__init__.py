"""Were two language models trained independently, or does one descend from the other?

    import tracing_jax as tj

    report = tj.trace("./base", "./theirs")
    report.verdict  # 'related', 'no_evidence', 'undecided', ...

Checkpoints are opened and loaded as Flax param pytrees (`open`, `load`, `save`); pairs are traced (`trace`), aligned
(`align`) and interpolated (`path_losses`). The transforms (`permute`, the rewrites, `match_weights`, `interpolate`) are
pure functions of any pytree and an `AxisTable`, which names the axes of each leaf. `rewrites` has a class for each kind
of rewrite of a model.

Every public name is imported when it is first used: `import tracing_jax` itself takes milliseconds.
"""

import importlib
from typing import Any

_MODULES = {
    "api": (
        "Report",
        "align",
        "generate",
        "load",
        "logits",
        "merge_shares",
        "open",
        "path_losses",
        "save",
        "token_losses",
        "tokenize",
        "trace",
    ),
    "alignment": ("Alignment", "AlignmentError", "Learning", "aligned", "aligned_base"),
    "axes": ("AxisTable", "axis_table", "table_from_axes"),
    "checkpoint": ("Checkpoint", "CheckpointError"),
    "interpolation": ("interpolate",),
    "matching": ("match_units", "match_weights"),
    "merges": ("MergeReport",),
    "options": ("RunOptions",),
    "rewrites": (
        "Permutation",
        "Rewrite",
        "compose",
        "draw_rewrites",
        "inverses",
        "invert",
        "permute",
        "random_permutations",
    ),
    "sharding": ("Compute", "make_mesh"),
    "sources": ("InMemory", "ParamSource", "rewritten"),
    "statistics": ("Result", "verdict"),
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = ("rewrites",)
"""Public as `tj.rewrites.Rotation`: the kinds of rewrites."""

__all__ = [*sorted((*_EXPORTS, *_SUBMODULES)), "__version__"]


def __getattr__(name: str) -> Any:
    """Returns a public name, importing the module that holds it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("tracing_jax")
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *(name for name in __all__ if name not in globals())]
