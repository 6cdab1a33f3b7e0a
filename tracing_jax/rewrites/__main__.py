"""Writes a disguised checkpoint: the same function in other weights.

    python -m tracing_jax.rewrites --model=org/name --disguise=rotate,permute --seed=0 --save=disguised

The rewrites are drawn at random from the seed and applied from left to right; `all` takes every one that exists for
the model. The written model is read again and its logits are compared with the original's.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np

from tracing_jax.arch import Arch, head_problem
from tracing_jax.checkpoint import Checkpoint, open_checkpoint, permutable_token_ids, save_checkpoint
from tracing_jax.forward import check_function
from tracing_jax.rewrites import DISGUISES, Renaming, Rewrite, arch_after, draw_rewrites, rewrite_names
from tracing_jax.sources import rewritten


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; what a user can mend ends with one clear message."""
    asked = _parser().parse_args(argv)
    try:
        for line in disguise(asked.model, asked.disguise, asked.seed, asked.save, asked.cache_dir):
            print(line)
    except (ValueError, OSError, ModuleNotFoundError, jax.errors.JaxRuntimeError) as error:
        sys.exit(f"error: {error}")


def disguise(model: str, listed: str, seed: int, save: str, cache_dir: str | None = None) -> list[str]:
    """Writes the disguised checkpoint to `save` and returns lines that say what was done.

    Raises:
      ValueError: a rewrite that does not exist for the model, a model that cannot be read or written, or logits that
        are not the original's; nothing is left in `save`.
      FileExistsError: `save` is there already.
    """
    folder = Path(save).expanduser()
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it or choose another place to write to")
    names = rewrite_names(listed)
    if not names:
        raise ValueError(f"no rewrite is asked for; there are {', '.join(DISGUISES)}, or all")
    original = open_checkpoint(model, cache_dir)
    if problem := head_problem(original.arch):
        raise ValueError(f"{model}: {problem}; that a disguise keeps the function is shown by predictions")
    token_ids = _token_ids(original, listed)
    without = (Renaming.name,) if token_ids is None else ()
    rewrites = draw_rewrites(listed, jax.random.key(seed), original.arch, token_ids=token_ids, without=without)
    new_ids = Renaming.composed(rewrites)
    source, tokenizer = rewritten(original, rewrites), original.tokenizer_folder
    save_checkpoint(folder, source, original.folder, tokenizer=tokenizer, new_ids=new_ids)
    try:
        moved = check_function(original, open_checkpoint(str(folder)), seed=seed, new_ids=new_ids)
    except ValueError:
        shutil.rmtree(folder)
        raise
    return _report(original, rewrites, folder, moved)


def _token_ids(original: Checkpoint, listed: str) -> np.ndarray | None:
    """Returns the ids that a renaming may permute; None if no renaming is asked for, or `all` and it cannot be done."""
    if Renaming.name not in rewrite_names(listed):
        return None
    if listed.strip() == "all" and not (original.tokenizer_folder / "tokenizer.json").exists():
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tracing_jax.rewrites", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder, a Hub id, or org/name@revision")
    parser.add_argument(
        "--disguise", required=True, help=f"names with commas between, of {', '.join(DISGUISES)}; or all"
    )
    parser.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    parser.add_argument("--save", required=True, help="the folder to write")
    parser.add_argument("--cache_dir", help="where downloads are kept")
    return parser


if __name__ == "__main__":
    main()
