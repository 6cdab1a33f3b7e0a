"""Writes a disguised checkpoint: the same function in other weights."""

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np

from tracing_jax.arch import Arch, head_problem
from tracing_jax.checkpoint import Checkpoint, WeightsOnly, open_checkpoint, permutable_token_ids, save_checkpoint
from tracing_jax.forward import check_function
from tracing_jax.rewrites import DISGUISES, Renaming, Rewrite, arch_after, draw_rewrites, rewrite_names, takes_all
from tracing_jax.sources import rewritten


def write_disguised(
    model: str, disguise: str | Sequence[str], seed: int, save: str, download_dir: str | None = None
) -> list[str]:
    """Writes the disguised checkpoint to `save` and returns lines that say what was done.

    The written model is read again and its logits are compared with the original's.

    Args:
      model: a folder, a Hub id, or `org/name@revision`.
      disguise: see `draw_rewrites`; the tokenizer is renamed along with the weights.
      seed: every random draw follows from it.
      save: the folder to write.
      download_dir: where downloads are kept.

    Raises:
      ValueError: a rewrite that does not exist for the model, a model that cannot be read or written, or logits that
        are not the original's; nothing is left in `save`.
      FileExistsError: `save` is there already.
    """
    folder = Path(save).expanduser()
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it or choose another place to write to")
    if not rewrite_names(disguise):
        raise ValueError(f"no rewrite is asked for; there are {', '.join(DISGUISES)}, or all")
    original = open_checkpoint(model, download_dir, weights_only=WeightsOnly())
    if problem := head_problem(original.arch):
        raise ValueError(f"{model}: {problem}; that a disguise keeps the function is shown by predictions")
    token_ids = _token_ids(original, disguise)
    without = (Renaming.name,) if token_ids is None else ()
    rewrites = draw_rewrites(disguise, jax.random.key(seed), original.arch, token_ids=token_ids, without=without)
    new_ids = Renaming.composed(rewrites)
    source, tokenizer = rewritten(original, rewrites), original.tokenizer_folder
    save_checkpoint(folder, source, original.folder, tokenizer=tokenizer, new_ids=new_ids)
    try:
        moved = check_function(original, open_checkpoint(str(folder)), seed=seed, new_ids=new_ids)
    except ValueError:
        shutil.rmtree(folder)
        raise
    return _report(original, rewrites, folder, moved)


def _token_ids(original: Checkpoint, disguise: str | Sequence[str]) -> np.ndarray | None:
    """Returns the ids that a renaming may permute; None if no renaming is asked for, or `all` and it cannot be done."""
    if Renaming.name not in rewrite_names(disguise):
        return None
    if takes_all(disguise) and not (original.tokenizer_folder / "tokenizer.json").exists():
        return None
    return permutable_token_ids(original.tokenizer_folder)


def _report(original: Checkpoint, rewrites: Sequence[Rewrite], folder: Path, moved: float) -> list[str]:
    after = arch_after(rewrites, original.arch)
    return [
        f"{original.id} -> {folder}",
        f"rewrites: {', '.join(rewrite.name for rewrite in rewrites)}",
        *(f"{name}: {before} -> {now}" for name, before, now in _changes(original.arch, after)),
        f"logits moved by at most {moved:.1e} of the largest",
    ]


def _changes(before: Arch, after: Arch) -> list[tuple[str, object, object]]:
    values = [(field.name, getattr(before, field.name), getattr(after, field.name)) for field in fields(before)]
    return [(name, a, b) for name, a, b in values if a != b and not isinstance(a, tuple)]
