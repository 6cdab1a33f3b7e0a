"""Random disguises of a model: from a list of names, such as `rotate,permute` or `all`, to rewrites."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.dataclass_options import comma_list
from tracing_jax.rewrites.copies import CancellingUnits, KvRepetition, UnitSplitting
from tracing_jax.rewrites.expansion import IdentityLayer, Padding
from tracing_jax.rewrites.linear_maps import QueryKeyMaps, UnitScaling, ValueMixing
from tracing_jax.rewrites.norm_gains import GainScaling
from tracing_jax.rewrites.permutation import Permutation, Renaming
from tracing_jax.rewrites.residual_stream import MeanSetting, Rotation
from tracing_jax.rewrites.rewrite import Rewrite

DISGUISES: dict[str, type[Rewrite]] = {
    kind.name: kind
    for kind in (
        Renaming, IdentityLayer, UnitSplitting, CancellingUnits, Padding, KvRepetition, GainScaling, UnitScaling,
        ValueMixing, QueryKeyMaps, Rotation, MeanSetting, Permutation,
    )
}  # fmt: skip
"""Name -> what can be drawn, in the order of `all`: what adds units, heads and layers comes first."""


def takes_all(names: str | Sequence[str]) -> bool:
    """Says whether these names of rewrites, or this text with commas between them, are `all` alone."""
    return _listed(names) == ("all",)


def rewrite_names(names: str | Sequence[str]) -> list[str]:
    """Returns the names of rewrites, given as such or as text with commas between; `all` means every one.

    Raises:
      ValueError: a name that is not one of `DISGUISES`.
    """
    listed = _listed(names)
    if unknown := [name for name in listed if name not in DISGUISES and name != "all"]:
        raise ValueError(f"unknown rewrites {', '.join(unknown)}; there are {', '.join(DISGUISES)}, or all")
    if "all" in listed and len(listed) > 1:
        raise ValueError("all cannot be combined with other names: it has every rewrite that exists for the model")
    return list(DISGUISES) if takes_all(listed) else list(listed)


def _listed(names: str | Sequence[str]) -> tuple[str, ...]:
    return comma_list(names) if isinstance(names, str) else tuple(names)


def draw_rewrites(
    names: str | Sequence[str],
    key: PRNGKeyArray,
    arch: Arch,
    *,
    token_ids: Int[np.ndarray, " N"] | None = None,
    without: Sequence[str] = (),
) -> tuple[Rewrite, ...]:
    """Returns a random rewrite for each name of a list, from left to right; `all` takes those that exist for the model.

    Args:
      names: of rewrites, in a sequence or as text with commas between; or `all`.
      key: every draw follows from it and from the place in the list.
      arch: the facts of the model.
      token_ids: the ids that a renaming may give to other tokens; by default all.
      without: names that `all` leaves out.

    Raises:
      ValueError: unknown names, or rewrites that do not exist for the model, with the reasons; all at once.

    Example:
      >>> import jax
      >>> arch = tj.open("demo:base").arch
      >>> [rewrite.name for rewrite in tj.draw_rewrites("rotate,permute", jax.random.key(0), arch)]
      ['rotate', 'permute']
    """
    lines: list[str] = []
    rewrites: list[Rewrite] = []
    for place, name in enumerate(rewrite_names(names)):
        kind, own_key = DISGUISES[name], jax.random.fold_in(key, place)
        if problems := kind.unsupported(arch):
            lines += [f"{name}: {line}" for line in problems]
            continue
        if takes_all(names) and name in without:
            continue
        rewrite: Rewrite
        if kind is Renaming and token_ids is not None:
            rewrite = Renaming.among(own_key, arch, token_ids)
        else:
            rewrite = kind.random(own_key, arch)
        if rewrite.unties(arch) and not arch.has_head:
            lines.append(f"{name}: it unties the head from the embedding, and the checkpoint has no head")
            continue
        rewrites.append(rewrite)
        arch = rewrite.arch_after(arch)
    if lines and not takes_all(names):
        raise ValueError("\n  ".join([f"no such rewrite of this {arch.family} model:", *lines]))
    return tuple(rewrites)
