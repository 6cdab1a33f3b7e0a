"""The loss over the plane through three models: the models opened and checked, points of a grid, and what came out.

Source: Garipov et al. 2018 (arXiv 1802.10026), figure 1. Coordinates are orthonormal, with the first model as origin.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment import check_config
from tracing_jax.experiment.inputs import RunInputs, open_inputs
from tracing_jax.experiment.loading import loaded
from tracing_jax.experiment.memory import Placement, choose_memory
from tracing_jax.experiment.metadata import device_facts, model_facts, token_facts, versions
from tracing_jax.experiment.validation import DTYPES
from tracing_jax.forward import combination_losses
from tracing_jax.interpolation import interpolated_leaves, path_groups
from tracing_jax.options import Mode, RunOptions
from tracing_jax.record import atomic_write, commit, json_file, plain, write_json
from tracing_jax.report import text_table
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import ParamSource, prefixes, subtree
from tracing_jax.statistics.mode import NO_DESCENT, numbers_of
from tracing_jax.tree import flatten, to_host

NAMES = ("A", "B", "C")

_SLICE = 2**22  # elements of a leaf that are held in float64 at a time
_ON_EDGE = np.linspace(0, 1, 11)
_FLAT = 1e-6  # height over base of three models that are on one line


class Plane(NamedTuple):
    """Coordinates in a plane of weights: B at (`base`, 0), C at (`foot`, `height`), A at the origin; distances."""

    base: float
    foot: float
    height: float

    @property
    def corners(self) -> Float[np.ndarray, "3 2"]:
        """Where the three models are."""
        return np.array([[0, 0], [self.base, 0], [self.foot, self.height]])

    def coefficients(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 3"]:
        """Returns of which multiples of the three models a point is the sum; they sum to one."""
        c = points[..., 1] / self.height
        b = (points[..., 0] - c * self.foot) / self.base
        return np.stack([1 - b - c, b, c], axis=-1)


@dataclass(frozen=True)
class PlaneReport:
    """The loss over a plane; its text is what `tracing-jax plane` prints.

    Attributes:
      record: plain data: the models and where they are, the grid and its losses, the edges, and the lowest point.
    """

    record: Mapping[str, Any]

    def save(self, path: str | Path) -> Path:
        """Writes the record to a `.json` file and the figure beside it; returns the path.

        Raises:
          ValueError, OSError: the path does not end in .json, or cannot be written.
        """
        path = json_file(path)
        from tracing_jax.report.figures import png
        from tracing_jax.report.planes import plane_figure

        write_json(path, dict(self.record))
        atomic_write(path.with_suffix(".png"), png(plane_figure(self.record)))
        return path

    def __repr__(self) -> str:
        record = self.record
        at = {name: f"({x:.4g}, {y:.4g})" for name, (x, y) in record["corners"].items()}
        models = [[name, record["asked"][name], at[name], record["losses"][name]] for name in NAMES]
        edges = [
            [edge, found["distance"], found["midpoint"], found["barrier"]] for edge, found in record["edges"].items()
        ]
        lowest = record["lowest"]
        shares = ", ".join(f"{share:.2f} {name}" for name, share in lowest["coefficients"].items())
        lines = [
            text_table(models, ["", "model", "at", "loss (nats per token)"]),
            "",
            text_table(edges, ["edge", "distance", "midpoint", "barrier"]),
            "",
            f"lowest of {record['grid']} x {record['grid']} points: {float(lowest['loss']):.4f} at {shares}",
        ]
        return "\n".join([*lines, *(f"* {note}" for note in record["notes"])])


def plane_report(options: RunOptions, third: str, grid: int, margin: float) -> PlaneReport:
    """Returns the loss over the plane through base (A), ft (B) and a third model (C).

    Args:
      options: models, text, `mode.attn` and `mode.emb` (which weights move) and devices of a run.
      third: the third model, named as the others.
      grid: points along each side.
      margin: how far the grid reaches beyond the models, as a share of their longer extent.

    Raises:
      ConfigError: models of other shapes or tokenizers, or on one line; before any weight is read where shapes tell.
      CheckpointError, UnsupportedModelError, OSError, ValueError: a model or the text cannot be read.
    """
    start = time.perf_counter()
    inputs, placement = _opened(options, third)
    checkpoints = (inputs[0].base, inputs[0].ft, inputs[1].ft)
    assert inputs[0].text is not None
    models = [loaded(options, model, placement) for model in checkpoints]
    groups = path_groups(options.mode.attn, options.mode.emb)
    plane = plane_through(models, groups)
    axes = grid_axes(plane, grid, margin)
    inner = _ON_EDGE[1:-1, None]
    ends = np.eye(3)
    edges = [(1 - inner) * ends[i] + inner * ends[k] for i, k in _EDGES.values()]
    points = plane.coefficients(np.stack(np.meshgrid(*axes), axis=-1)).reshape(-1, 3)
    compute = Compute(placement.mesh, options.batch_size, DTYPES[options.dtype])
    losses = combination_losses(
        models, np.concatenate([ends, *edges, points]), inputs[0].text.base.tokens, groups, compute, "losses on a plane"
    )  # fmt: skip
    numbers = _numbers(plane, axes, losses.mean(axis=(1, 2), dtype=np.float64), points)
    notes = [NO_DESCENT, _LOWEST, *dict.fromkeys(note for of_pair in inputs for note in of_pair.notes)]
    return PlaneReport(
        plain(
            {
                "format": "plane 1", "commit": commit(), "versions": versions(), "device": device_facts(placement.mesh),
                "asked": dict(zip(NAMES, (options.base_model_id, options.ft_model_id, third))),
                "models": {name: model_facts(model) for name, model in zip(NAMES, checkpoints)},
                "tokens": token_facts(inputs[0]), "groups": list(groups), "grid": grid, "margin": margin,
                **numbers, "notes": notes, "seconds": round(time.perf_counter() - start, 3),
            }
        )
    )  # fmt: skip


_EDGES = {"A to B": (0, 1), "A to C": (0, 2), "B to C": (1, 2)}
_LOWEST = "the lowest point was chosen by its loss on this text; what it is worth is its loss on another"


def _opened(options: RunOptions, third: str) -> tuple[list[RunInputs], Placement]:
    """Returns A with each of the other two, checked as a path between them is, and where the three models will be."""
    mode = Mode(alphas=(), attn=options.mode.attn, emb=options.mode.emb)
    options = replace(options, stat=("mode",), mode=mode, save=None)
    inputs = [open_inputs(check_config(replace(options, ft_model_id=name))) for name in (options.ft_model_id, third)]
    lines = [
        f"no plane through A and {name}, {of_pair.ft.id}: {of_pair.not_applicable['mode']}"
        for name, of_pair in zip(NAMES[1:], inputs)
        if "mode" in of_pair.not_applicable
    ]
    if lines:
        raise ConfigError.of(f"A is {inputs[0].base.id}:", lines)
    mesh = make_mesh(options.mesh.data, options.mesh.model)
    checkpoints: Sequence[Checkpoint] = (inputs[0].base, *(of_pair.ft for of_pair in inputs))
    return inputs, Placement(mesh, choose_memory(options.memory, checkpoints, mesh)[0])


def plane_through(models: Sequence[ParamSource], groups: Sequence[str]) -> Plane:
    """Returns the coordinates of three models of one shape, by the leaves in `groups`; each leaf is read once.

    Raises:
      ConfigError: the models are on one line.
    """
    moved = interpolated_leaves(axis_table(models[0].arch), groups)
    bb = bc = cc = 0.0
    for prefix in prefixes(models[0].arch):
        if not any(name.startswith(prefix) for name in moved):
            continue
        trees = [flatten(subtree(model, prefix)) for model in models]
        for name in (name for name in trees[0] if prefix + name in moved):
            flat = [np.ravel(to_host(tree[name])) for tree in trees]
            for start in range(0, flat[0].size, _SLICE):
                a, b, c = (leaf[start : start + _SLICE].astype(np.float64) for leaf in flat)
                bb += float((b - a) @ (b - a))
                bc += float((b - a) @ (c - a))
                cc += float((c - a) @ (c - a))
    base = np.sqrt(bb)
    height = np.sqrt(max(cc - bc**2 / bb, 0.0)) if bb else 0.0
    if not height > _FLAT * base:
        raise ConfigError(
            f"the three models are on one line, where a plane has no second direction: B is {base:.3g} from A, C is "
            f"{height:.3g} from the line through both, by the weights that move ({', '.join(groups)}); choose three "
            "models that differ"
        )
    return Plane(float(base), float(bc / base), float(height))


def grid_axes(plane: Plane, grid: int, margin: float) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the coordinates of a grid around the three models."""
    low, high = plane.corners.min(axis=0), plane.corners.max(axis=0)
    beyond = margin * (high - low).max()
    x, y = (np.linspace(low[i] - beyond, high[i] + beyond, grid) for i in range(2))
    return x, y


def _numbers(
    plane: Plane, axes: tuple[np.ndarray, np.ndarray], losses: np.ndarray, points: np.ndarray
) -> dict[str, Any]:
    """Returns the fields of the record, from the losses of corners, of the edges between them, and of the grid."""
    inner = len(_ON_EDGE) - 2
    edges = {}
    for n, (edge, (i, k)) in enumerate(_EDGES.items()):
        between = losses[3 + n * inner : 3 + (n + 1) * inner]
        distance = float(np.linalg.norm(plane.corners[i] - plane.corners[k]))
        edges[edge] = {"distance": distance, **numbers_of(_ON_EDGE, np.array([losses[i], *between, losses[k]]))}
    over_grid = losses[3 + 3 * inner :]
    lowest = int(np.nanargmin(over_grid)) if np.isfinite(over_grid).any() else 0
    return {
        "corners": dict(zip(NAMES, plane.corners.tolist())),
        "losses": dict(zip(NAMES, losses[:3].tolist())),
        "edges": edges,
        "x": axes[0].tolist(),
        "y": axes[1].tolist(),
        "loss": over_grid.reshape(len(axes[1]), len(axes[0])).tolist(),
        "lowest": {
            "loss": float(over_grid[lowest]),
            "coefficients": dict(zip(NAMES, points[lowest].tolist())),
        },
    }
