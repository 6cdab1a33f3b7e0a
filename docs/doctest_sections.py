"""An extension of griffe, which reads docstrings for the site: `Example:` is shown as code, as `Examples:` is."""

from typing import Any

import griffe


class DoctestSections(griffe.Extension):
    """Renames the heading that Google's style guide uses to the one that griffe parses as doctests."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of one object as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
