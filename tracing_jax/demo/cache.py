"""The cache of trained demo checkpoints: a folder appears in it whole, or not at all."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from absl import logging

from tracing_jax.checkpoint.whole_folder import whole_folder
from tracing_jax.demo.recipe import DemoSizes
from tracing_jax.demo.texts import topics
from tracing_jax.sharding import cpu_device

_FORMAT = 1  # raise when the same recipe no longer gives the same family


def cached_folder(name: str, recipe: DemoSizes, cache_dir: str | None, build: Callable[[Path], None]) -> Path:
    """Returns a folder of the cache; `build` fills it, on the CPU, if it is not there yet.

    The cache is `cache_dir`, by default `~/.cache/tracing_jax` (or under `XDG_CACHE_HOME`). A killed run leaves no
    folder of this name, and of two concurrent runs the first to finish provides it.

    Raises:
      ModuleNotFoundError: this Python lacks `pydoc_data`.
    """
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tracing_jax").expanduser()
    folder = root / f"{name}-{_key(recipe)}"
    if folder.exists():
        return folder
    logging.info("training a demo family, once, into %s", folder)
    # A CPU gives the same bytes each time, while a GPU adds in scatters in any order.
    with whole_folder(folder, is_cache=True) as work, jax.default_device(cpu_device()):
        build(work)
    return folder


def _key(recipe: DemoSizes) -> str:
    """Returns a key that changes with the recipe and with the texts that are learned."""
    texts = hashlib.sha256("".join(topics()).encode()).hexdigest()
    facts = [_FORMAT, asdict(recipe), platform.python_version(), np.__version__, texts]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
