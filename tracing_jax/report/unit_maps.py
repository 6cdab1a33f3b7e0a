"""The map of units: where in ft the partners of units of one layer of base are, as points of a square."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIDE = 100.0
"""Of the square, in its own unit."""


@dataclass(frozen=True)
class Point:
    """A unit of base, from left to right, and its partner in ft, from top to bottom; firm where both readings agree."""

    x: float
    y: float
    firm: bool
    text: str


@dataclass(frozen=True)
class UnitMap:
    """Points under a title; `alt` says in words what is seen."""

    title: str
    alt: str
    points: Sequence[Point]


def unit_maps(record: Mapping[str, Any]) -> list[UnitMap]:
    """Returns the map of each statistic of a record that has partners of units, on the pair as given."""
    found = ((name, (stages.get("non_aligned") or {}).get("unit_map")) for name, stages in record["statistics"].items())
    return [_drawn(name, kept) for name, kept in found if kept and kept["partners"]]


def _drawn(name: str, found: Mapping[str, Any]) -> UnitMap:
    one, other = found["readings"]
    points = []
    for base, by_one, by_other in found["partners"]:
        firm = by_one == by_other
        partner = f"{by_one:,} of ft by {one} and {other}" if firm else f"{by_one:,} by {one}, {by_other:,} by {other}"
        points.append(Point(_place(base, found["units"][0]), _place(by_one, found["units"][1]), firm,
                            f"unit {base:,} of base: {partner}"))  # fmt: skip
    agreeing = [(base, ft) for base, ft, by_other in found["partners"] if ft == by_other]
    in_place = sum(base == ft for base, ft in agreeing)
    widths = [f"{units:,}" for units in found["units"]]
    alt = (
        f"Of {len(points)} units of layer {found['layer']} of base, {len(agreeing)} have one partner in ft by {one} "
        f"and by {other}; {in_place} of these are in the same place. Across: the unit of base, of {widths[0]}; down: "
        f"its partner by {one}, of {widths[1]}. Filled where both readings agree."
    )
    return UnitMap(f"{name}: partners of units in layer {found['layer']}", alt, points)


def _place(unit: int, units: int) -> float:
    return round(SIDE * (unit + 0.5) / max(1, units), 2)
