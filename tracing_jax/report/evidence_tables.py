"""Tables of the evidence behind a statistic, for the page: tests, their null, every place, and the layer map."""

from collections.abc import Mapping, Sequence
from typing import Any

from tracing_jax.report.formatting import cell, p_cell
from tracing_jax.report.html_elements import Block, Table, columns_table, table_of

_MOST_ROWS = 400  # of a table on the page; the record has them all
_NULL_WORDS = {
    "lambda": "λ: units that agree by chance, mean",
    "m": "m: location of z = r √(h − 1)",
    "s": "s: scale of z",
    "u": "u: share of units that may agree by convergence",
    "u from": "source of u",
    "pairs": "controls: pairs of layers that do not correspond",
    "k": "controls: agreeing units k",
    "z": "controls: z",
}
_EDGES = {0.0: "min", 0.5: "median", 1.0: "max"}


def tests_blocks(results: Mapping[str, Any]) -> list[Block]:
    """The tests of each stage with their combined p-values; open for the first stage that has any."""
    found: list[Block] = []
    for stage, result in results.items():
        rows = [
            [test["name"], p_cell(test["log10_p"]), f"{test['combined']} ({len(test['places'])})", test["decides"]]
            for test in _tests(result) if test["log10_p"] is not None
        ]  # fmt: skip
        if rows:
            table = table_of(("", "p", "combined (places)", "decides"), rows)
            found.append(Block(f"Tests, {stage}" if found else "Tests", table, folded=bool(found)))
    return found


def null_blocks(results: Mapping[str, Any]) -> list[Block]:
    """The null of the p-values, with the calibrated and parametric p-values; once if equal at both stages."""
    found: list[tuple[list[str], Mapping[str, Any]]] = []
    for stage, result in results.items():
        if null := result.get("null"):
            columns = _null_columns(null, _tests(result))
            same = next((stages for stages, known in found if known == columns), None)
            if same is None:
                found.append(([stage], columns))
            else:
                same.append(stage)
    return [
        Block("Null" if len(found) == 1 else f"Null, {' and '.join(stages)}", columns_table(columns), folded=i > 0)
        for i, (stages, columns) in enumerate(found)
    ]


def place_blocks(results: Mapping[str, Any]) -> list[Block]:
    """A table for every set of tests of the same units: place, measured values, p of each test."""
    return [
        Block(", ".join(filter(None, ("Each place", common, stage))), *_places(tests, common))
        for stage, result in results.items()
        for common, tests in _groups(_tests(result), _forms(result.get("null") or {}))
    ]


def map_blocks(results: Mapping[str, Any]) -> list[Block]:
    """Which layer of ft comes from which layer of base, as a sentence and a table; for the pair as given."""
    layer_map = next((result["layer_map"] for result in results.values() if result.get("layer_map")), None)
    if layer_map is None:
        return []
    rows = [_map_row(pair, "") for pair in layer_map["pairs"]]
    rows += [_map_row(pair, "copy") for pair in layer_map.get("copies") or ()]
    rows += [_map_row({"base": i}, "no partner") for i in layer_map["unmatched_base"]]
    rows += [_map_row({"ft": j}, "no partner") for j in layer_map["unmatched_ft"]]
    headers = ("base layer", "ft layer", "p", "units", "agreeing", "")
    return [Block("Layers assigned to each other", table_of(headers, rows), layer_map["sentence"], folded=False)]


def _map_row(pair: Mapping[str, Any], remark: str) -> list[Any]:
    return [
        pair.get("base"),
        pair.get("ft"),
        p_cell(pair.get("log10_p")),
        pair.get("units"),
        pair.get("agreeing"),
        remark,
    ]


def _tests(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return result.get("tests") or ()


def _null_columns(null: Mapping[str, Any], tests: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A column for each form of the test, with the p-values of its tests above the quantities of its null."""
    forms = {form: null[form] for form in _forms(null)} or {"": null}
    columns = {}
    for form, quantities in forms.items():
        of_form = {
            f"p: {test['name'].removeprefix(f'{form}, ')}": p_cell(test["log10_p"])
            for test in tests
            if test["log10_p"] is not None and (len(forms) == 1 or test["name"].startswith(f"{form}, "))
        }
        columns[form or "value"] = of_form | _quantities(quantities)
    return columns


def _forms(null: Mapping[str, Any]) -> list[str]:
    """The forms of a test that have a null of their own; empty if there is one null for all."""
    return list(null) if all(isinstance(value, Mapping) for value in null.values()) else []


def _quantities(null: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in null.items():
        if key == "controls" and isinstance(value, Mapping):
            levels = value.get("levels")
            for inner, item in value.items():
                if inner not in ("levels", "places"):  # places are a map
                    name = _NULL_WORDS.get(inner, f"controls: {inner}")
                    found[name] = _quantiles(levels, item) if levels and isinstance(item, list) else item
        elif isinstance(value, Mapping) and value and all(_is_number(level) for level in value):
            found[_NULL_WORDS.get(key, key)] = _quantiles(list(value), list(value.values()))
        elif key == "u" and isinstance(value, list):
            found[_NULL_WORDS[key]] = _by_layer(value)
        else:
            found[_NULL_WORDS.get(key, key)] = value
    return found


def _by_layer(values: Sequence[Any]) -> str:
    """One value if equal in all layers, else each with its layer."""
    if len({cell(value) for value in values}) == 1:
        return f"{cell(values[0])} in every layer"
    return ", ".join(f"layer {i} {cell(value)}" for i, value in enumerate(values))


def _quantiles(levels: Sequence[Any], values: Sequence[Any]) -> str:
    named = [_EDGES.get(float(level), f"{100 * float(level):g} %") for level in levels]
    return ", ".join(f"{name} {cell(value)}" for name, value in zip(named, values, strict=True))


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


def _groups(tests: Sequence[Mapping[str, Any]], forms: Sequence[str]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The tests of one form on the same values at the same places, with the common part of their names."""
    groups: list[tuple[Any, list[Mapping[str, Any]]]] = []
    for test in tests:
        form = next((form for form in forms if test["name"].startswith(f"{form}, ")), "")
        key = (form, test["places"], test["values"])
        same = next((group for known, group in groups if known == key), None)
        if same is None:
            groups.append((key, [test]))
        else:
            same.append(test)
    return [(_common([test["name"] for test in group]), group) for _, group in groups]


def _common(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [name.split(", ") for name in names]
    return ", ".join(part for part in parts[0] if all(part in other for other in parts[1:]))


def _places(tests: Sequence[Mapping[str, Any]], common: str) -> tuple[Table, str]:
    """The table, and a sentence if it is cut to the places of smallest p."""
    known = [test for test in tests if test["log10_ps"] is not None]
    shared = set(common.split(", "))
    names = [", ".join(part for part in test["name"].split(", ") if part not in shared) for test in known]
    headers = ("", *tests[0]["values"], *(f"p: {name}" if name else "p" for name in names))
    rows = [
        [place, *(column[i] for column in tests[0]["values"].values()), *(p_cell(t["log10_ps"][i]) for t in known)]
        for i, place in enumerate(tests[0]["places"])
    ]
    if len(rows) <= _MOST_ROWS:
        return table_of(headers, rows), ""
    least = [min((float(test["log10_ps"][i]) for test in known), default=0.0) for i in range(len(rows))]
    kept = sorted(sorted(range(len(rows)), key=least.__getitem__)[:_MOST_ROWS])
    text = f"The {_MOST_ROWS} places of {len(rows):,} with the smallest p-values; the record has all of them."
    return table_of(headers, [rows[i] for i in kept]), text
