"""Maps of where two models agree: by test and layer, and layer by layer; the numbers of a cell are its tooltip."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tracing_jax.report.formatting import p_cell

SHADES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Share of units that agree, from which on a cell has the next darker shade."""

_LAYER = re.compile(r"layer (\d+)")
_LAYERS = re.compile(r"base (\d+) : ft (\d+)")
_MOST_LAYERS = 64
"""Of rows and of columns of a map; of deeper models neighbouring layers share a cell, so that the page stays small."""


@dataclass(frozen=True)
class MapCell:
    """A cell: its shade, 0 to the number of `SHADES`, -1 where nothing was measured, and what it says in words.

    The share of units that agree decides which of several layers stands for all of a cell.
    """

    shade: int
    text: str
    share: float = -1.0


@dataclass(frozen=True)
class Map:
    """Rows of cells with a label each, under a title; `alt` says in words what is seen."""

    title: str
    alt: str
    rows: Sequence[tuple[str, Sequence[MapCell]]]


def maps(record: Mapping[str, Any]) -> list[Map]:
    """Returns the maps of a record: of the tests of units or heads by layer, and of every test of all pairs of layers.

    Of each statistic and form the test of agreement that may decide is shown; after an alignment there is none.
    """
    results = {
        name: stages["non_aligned"] for name, stages in record["statistics"].items() if stages.get("non_aligned")
    }
    tests = [(name, test) for name, result in results.items() for test in result.get("tests") or () if _counts(test)]
    found = [_by_layer(tests), *(_layer_by_layer(name, test, results[name]) for name, test in tests)]
    return [drawn for drawn in found if drawn is not None]


def _counts(test: Mapping[str, Any]) -> bool:
    """Returns whether a test counts agreeing units and is one of the verdict's."""
    return (
        bool(test["decides"]) and "agreement" in test["name"] and {"units", "agreeing"} <= (test["values"] or {}).keys()
    )


def _by_layer(tests: Sequence[tuple[str, Mapping[str, Any]]]) -> Map | None:
    rows: list[tuple[str, dict[int, MapCell]]] = []
    labels = []
    for name, test in tests:
        layers = [_LAYER.fullmatch(place) for place in test["places"]]
        if not all(layers):
            continue
        label = f"{name}{_form(test)}"
        cells = {int(found[1]): _cell(test, i, f"layer {found[1]}") for i, found in enumerate(layers) if found}
        rows.append((label, cells))
        labels.append(f"{label} {_share(test, range(len(layers))):.0%}")
    depth = max((layer + 1 for _, cells in rows for layer in cells), default=0)
    if depth < 2:
        return None
    missing = MapCell(-1, "not tested")
    drawn = [(label, _binned([cells.get(i, missing) for i in range(depth)])) for label, cells in rows]
    alt = f"Share of units or heads that agree, over all {depth} layers: {'; '.join(labels)}."
    return Map("By test and layer: first layer at the left", alt, drawn)


def _layer_by_layer(name: str, test: Mapping[str, Any], result: Mapping[str, Any]) -> Map | None:
    places = [_LAYERS.fullmatch(place) for place in test["places"]]
    if not places or not all(places):
        return _with_controls(name, test, result)
    cells = {
        (int(found[1]), int(found[2])): _cell(test, i, f"base {found[1]}, ft {found[2]}")
        for i, found in enumerate(places)
        if found
    }
    sentence = (result.get("layer_map") or {}).get("sentence") or ""
    return _square(f"{name}{_form(test)}", cells, "each pair", sentence)


def _with_controls(name: str, test: Mapping[str, Any], result: Mapping[str, Any]) -> Map | None:
    """The map of a test of layers of equal index, with the pairs of other layers that were compared as controls."""
    null = (result.get("null") or {}).get(_form(test).removeprefix(", "))
    controls = (null.get("controls") or {}).get("places") if isinstance(null, Mapping) else None
    layers = [_LAYER.fullmatch(place) for place in test["places"]]
    if not controls or not all(layers):
        return None
    cells = {(i, i): _cell(test, at, f"base {i}, ft {i}") for at, found in enumerate(layers) if found
             for i in [int(found[1])]}  # fmt: skip
    for i, j, units, agreeing in controls:
        cells[i, j] = _agreement_cell(f"base {i}, ft {j}", units, agreeing)
    share = sum(agreeing for *_, agreeing in controls) / max(1, sum(units for _, _, units, _ in controls))
    remark = (
        f"Beside the layers of equal index, {len(controls)} pairs of other layers were compared, on a part of their "
        f"units, to measure what agrees by chance: {share:.1%}."
    )
    return _square(f"{name}{_form(test)}", cells, "pairs", remark)


def _form(test: Mapping[str, Any]) -> str:
    """The form of a test, after a comma; empty if it has one only."""
    form = test["name"].partition(", agreement")[0].removeprefix("agreement")
    return f", {form}" if form else ""


def _square(name: str, cells: Mapping[tuple[int, int], MapCell], of: str, remark: str) -> Map:
    base, ft = (max(key[side] for key in cells) + 1 for side in (0, 1))
    missing = MapCell(-1, "not tested")
    across = [_binned([cells.get((i, j), missing) for j in range(ft)]) for i in range(base)]
    columns = [_binned(column) for column in zip(*across)]  # each from the first layer of base to the last
    rows = list(zip(_labels(base), map(list, zip(*columns))))
    title = f"{name}: layers of base by layers of ft, first at the top left"
    return Map(title, f"Share of units that agree in {of} of {base} and {ft} layers. {remark}".strip(), rows)


def _cell(test: Mapping[str, Any], index: int, place: str) -> MapCell:
    units, agreeing = test["values"]["units"][index], test["values"]["agreeing"][index]
    found, log10_ps = _agreement_cell(place, units, agreeing), test.get("log10_ps")
    if units and log10_ps is not None and log10_ps[index] is not None:
        return replace(found, text=f"{found.text}, p {p_cell(log10_ps[index])}")
    return found


def _agreement_cell(place: str, units: int, agreeing: int) -> MapCell:
    if not units:
        return MapCell(-1, f"{place}: no units that count as evidence")
    text = f"{place}: {agreeing:,} of {units:,} agree ({agreeing / units:.0%})"
    return MapCell(sum(agreeing / units >= shade for shade in SHADES), text, agreeing / units)


def _binned(cells: Sequence[MapCell]) -> list[MapCell]:
    """Returns at most `_MOST_LAYERS` cells: of neighbours the one in which most units agree, which says so."""
    width = -(-len(cells) // _MOST_LAYERS)
    if width < 2:
        return list(cells)
    groups = [cells[start : start + width] for start in range(0, len(cells), width)]
    return [_most(group) for group in groups]


def _most(cells: Sequence[MapCell]) -> MapCell:
    best = max(cells, key=lambda cell: cell.share)
    mark = ", the most of the layers in this cell"
    return best if best.shade < 0 or best.text.endswith(mark) else replace(best, text=f"{best.text}{mark}")


def _labels(depth: int) -> list[str]:
    """Returns the names of the rows of base's layers, several of which may share one."""
    width = -(-depth // _MOST_LAYERS)
    ends = [(start, min(start + width, depth) - 1) for start in range(0, depth, width)]
    return [f"base {start}" if start == end else f"base {start}-{end}" for start, end in ends]


def _share(test: Mapping[str, Any], indices: Sequence[int]) -> float:
    units = sum(test["values"]["units"][i] or 0 for i in indices)
    return sum(test["values"]["agreeing"][i] or 0 for i in indices) / max(1, units)
