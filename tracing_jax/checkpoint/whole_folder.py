"""Folders that appear whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import logging


@contextlib.contextmanager
def whole_folder(folder: Path, *, is_cache: bool = False) -> Iterator[Path]:
    """Yields a new folder to write into, which takes this name at the end of the block, or is removed by an error.

    Args:
      folder: not there yet; the folders above it are made.
      is_cache: whether a folder of this name that another process has finished in the meantime serves as well.

    Raises:
      OSError: the name is taken, and it is no cache.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield work
        work.chmod(0o755)
        try:
            work.rename(folder)
        except OSError:
            if not (is_cache and folder.exists()):
                raise
            logging.info("%s was finished by another process in the meantime", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
