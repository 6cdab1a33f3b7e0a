"""The training texts of the demo's models, which every Python installation contains."""

import ast
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

_PIECE_CHARS = 2000
_HELD_OUT = 16  # one piece of so many is held out


def base_text() -> Iterator[str]:
    """Yields the texts that base learns from: the language reference and the docstrings of the standard library."""
    yield from topics()
    yield from _docstrings(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


def finetune_text() -> Iterator[str]:
    """Yields the texts that the fine-tune learns from: the docstrings of numpy."""
    folder = Path(np.__file__).parent
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.py"))
    yield from _docstrings(folder / file for file in files if "tests" not in file.parts)


def topics() -> list[str]:
    """Returns the language reference.

    Raises:
      ModuleNotFoundError: this Python does not contain it.
    """
    try:
        from pydoc_data.topics import topics as by_name
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo family learns from the module pydoc_data.topics of the standard library, which this Python "
            f"({platform.python_version()}) was stripped of; install the full standard library, or another Python"
        ) from error
    return list(by_name.values())


def _docstrings(files: Iterable[Path]) -> Iterator[str]:
    """Yields the docstrings of source files, which are parsed and never run."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files:
        with warnings.catch_warnings(action="ignore"):  # about the style of third-party source
            tree = ast.parse(file.read_bytes())
        yield from (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))


def split(texts: Iterable[str], num_pieces: int) -> tuple[list[str], list[str]]:
    """Returns the start of the texts as pieces of some 2000 characters: those to train on, and those held out.

    Repeated paragraphs are dropped: many occur in several topics or docstrings, and none may be in both parts.
    """
    pieces, seen = [""], {""}
    for paragraph in (paragraph.strip("\n") for text in texts for paragraph in text.split("\n\n")):
        if paragraph in seen:
            continue
        seen.add(paragraph)
        pieces[-1] += paragraph + "\n\n"
        if len(pieces[-1]) >= _PIECE_CHARS:
            if len(pieces) == num_pieces:
                break
            pieces.append("")
    return [piece for i, piece in enumerate(pieces) if (i + 1) % _HELD_OUT], pieces[_HELD_OUT - 1 :: _HELD_OUT]
