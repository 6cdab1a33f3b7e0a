"""The report on a possible merge: plain data, a table for the terminal, and files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracing_jax.record import atomic_write, json_file, write_json
from tracing_jax.report import text_table
from tracing_jax.report.bounded_p_values import bounded
from tracing_jax.report.figures import png
from tracing_jax.report.formatting import p_cell

ROLES = ("embedding", "attention", "mlp", "expert", "router", "norm", "head")

_EXPERTS = 16
"""At most so many experts are shown; the record has all."""
_CORRELATED = -0.8
"""Parents whose shares have errors of a correlation below are named with the sum of the two."""
_NESTED = {"copy", "stitched", "linear", "linear, by tensor"}
"""Methods of which each one contains those before it."""


@dataclass(frozen=True)
class MergeReport:
    """What the weights say about the parents of a model; its text is the table that `tracing-jax merge` prints.

    Attributes:
      record: plain data: what was asked, shares of the whole, by role, layer and tensor, parts, method, recipe, notes.

    Example:
      >>> found = tj.merge_shares("demo:finetune", ["demo:finetune", "demo:independent"], base="demo:base")
      >>> round(found.shares["demo:finetune"], 3)
      1.0
      >>> found.parts
      {'demo:finetune': 'part', 'demo:independent': 'none'}
    """

    record: Mapping[str, Any]

    @property
    def shares(self) -> dict[str, float | None]:
        """Parent -> its share over the whole model; None where it is undefined."""
        return {part["name"]: part["share"] for part in self.record["parts"]}

    @property
    def parts(self) -> dict[str, str]:
        """Parent -> `part`, `none`, `reserved`, `one_of`, `not_testable` or `agrees`."""
        return {part["name"]: part["word"] for part in self.record["parts"]}

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        return str(self.record["sentence"])

    def save(self, path: str | Path) -> Path:
        """Writes the record to a `.json` file, the figure and mergekit's configuration beside it; returns the path.

        Raises:
          ValueError, OSError: the path does not end in .json, or cannot be written.
        """
        path = json_file(path)
        from tracing_jax.merges.figure import figure_of_shares

        write_json(path, self.record)
        if self.record["whole"] is not None:
            atomic_write(path.with_suffix(".png"), png(figure_of_shares(self.record)))
        if self.record["recipe"]:
            atomic_write(path.with_suffix(".yaml"), self.record["recipe"].encode())
        return path

    def __repr__(self) -> str:
        return text_of(self.record)


def text_of(record: Mapping[str, Any]) -> str:
    """Returns the report for the terminal."""
    lines = [record["sentence"], ""]
    rows = [
        [part["name"], part["word"], part["share"], part["se"], p_cell(bounded(part["adjusted_log10_p"])),
         part["alone"]]
        for part in record["parts"]
    ]  # fmt: skip
    lines += [text_table(rows, ["parent", "part", "share", "s.e.", "p (Holm)", "partial r²"]), ""]
    if record["whole"] is not None:
        lines += [_table_of_shares(record), *_method_lines(record)]
    if len(record["by_expert"]) > _EXPERTS:
        lines += [f"* of {len(record['by_expert'])} experts the first {_EXPERTS} are shown; the record has all"]
    lines += [f"* {part['name']}: {part['reason']}" for part in record["parts"] if part["reason"]]
    lines += [f"* {line}" for line in (*_together(record), *_bias(record), *record["notes"])]
    return "\n".join(lines)


def _table_of_shares(record: Mapping[str, Any]) -> str:
    names = list(record["whole"]["shares"])
    rows = [["all", *_cells(record["whole"], names)]]
    rows += [[role, *_cells(record["by_role"][role], names)] for role in ROLES if role in record["by_role"]]
    rows += [[f"expert {e}", *_cells(shares, names)] for e, shares in list(record["by_expert"].items())[:_EXPERTS]]
    rows += [[f"layer {layer}", *_cells(shares, names)] for layer, shares in record["by_layer"].items()]
    return text_table(rows, ["tensors", *names, "unexplained", "condition"])


def _together(record: Mapping[str, Any]) -> list[str]:
    """Returns the sums of shares that are known better than each of the two."""
    return [
        f"{' and '.join(region['parents'])} together: {region['together']['share']:.4f} ± "
        f"{region['together']['se']:.4f} (the errors of the two correlate by {region['correlation']:.2f})"
        for region in record["joint"]
        if region["correlation"] < _CORRELATED
    ]


def _bias(record: Mapping[str, Any]) -> list[str]:
    """Returns what the alignment does to shares."""
    bias = record["alignment_bias"]
    if bias is None:
        return []
    largest = {of: max(map(abs, bias[of].values())) for of in ("noise", "parents") if of in bias}
    merges = {"noise": "of independent noise of the same sizes", "parents": "of the parents themselves"}
    found = " and ".join(f"{size:.4f} (a merge {merges[of]})" for of, size in largest.items())
    return [
        f"the alignment by itself moves shares by up to {found}: measured on merges with the shares that were found, "
        "disguised and aligned likewise; standard errors contain it, those of each part its own"
    ]


def _method_lines(record: Mapping[str, Any]) -> list[str]:
    """Returns the method with the error of the second best, and the recipe."""
    method = record["method"]
    if method["name"] is None:
        return []
    rivals = {name: nats for name, nats in method["nats_per_entry"].items() if name not in _NESTED | {method["name"]}}
    own = method["nats_per_entry"][method["name"]]
    beaten = max(rivals, key=lambda name: float(rivals[name])) if rivals else None
    margin = "" if beaten is None else f", by {own - rivals[beaten]:.2f} nats per held-out entry over {beaten}"
    left = f"of what differs it leaves {100 * method['residual']:.3f} % (held-out entries)"
    lines = ["", f"method: {method['name']}{margin}; {left}"]
    if follows := method["parameters"].get("follows"):
        parents = list(record["whole"]["shares"])  # TIES and DARE have a base: every parent has a difference from it
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in zip(parents, follows))
        lines += [f"entries that follow each parent: {shares}"]
    if exact := method["exact"]:
        lines += [
            f"entries of the child that are predicted to rounding: {100 * exact['share']:.0f} % of {exact['count']}"
        ]
    if record["recipe"]:
        left = record["recipe_residual"]
        leaves = "" if left is None else f", which leaves {100 * left:.3f} % of what differs (all entries)"
        lines += [f"recipe for mergekit{leaves}:", *(f"  {line}" for line in record["recipe"].splitlines()), ""]
    return lines


def _cells(shares: Mapping[str, Any], names: list[str]) -> list[Any]:
    own = [shares["shares"][name] for name in names]
    texts = ["-" if one["share"] is None else f"{one['share']:.4f} ± {one['se']:.4f}" for one in own]
    condition = shares["condition"]
    return [*texts, f"{100 * shares['unexplained']:.3f} %", "-" if condition is None else f"{condition:.1f}"]
