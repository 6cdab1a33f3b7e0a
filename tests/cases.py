"""Which combinations of a test's values the quick run takes."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def diagonal(*axes: Iterable[Any]) -> list[Any]:
    """Returns all combinations of these values as parameters; those off a diagonal that has every value are slow."""
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    quick = [tuple(axis[i % len(axis)] for axis in values) for i in range(longest)]
    return [
        pytest.param(*found, id="-".join(map(str, found)), marks=() if found in quick else pytest.mark.slow)
        for found in itertools.product(*values)
    ]


def slow(*values: Any) -> Any:
    """Returns the values of one case as parameters that only the slow run takes."""
    return pytest.param(*values, marks=pytest.mark.slow)
