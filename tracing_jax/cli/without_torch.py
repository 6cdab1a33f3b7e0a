"""transformers as it is without PyTorch, for programs: it imports PyTorch along with a config, which takes seconds."""

import sys


def import_transformers_without_torch() -> None:
    """Imports transformers such that it takes PyTorch for absent, in this whole process.

    Nothing in this package needs PyTorch. Where it, or transformers, is imported already, nothing is changed. A program
    may call this, a library may not: others in the process may need models of transformers.
    """
    if {"torch", "transformers"} & set(sys.modules):
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, and a search finds nothing
    try:
        from transformers.utils.import_utils import is_torch_available

        is_torch_available()  # it remembers the answer
    finally:
        del sys.modules["torch"]
