"""Cost against depth, width and number of alphas: each is a straight line in what it is drawn against, or should be."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from benchmarks.results import Row
from benchmarks.speed.sizes import Size, random_pair, with_depth
from benchmarks.speed.steps import TAPS, block_steps, gram_step
from benchmarks.speed.timing import best_seconds, block_flops_per_token, gram_flops_per_token
from tracing_jax.arch import Arch
from tracing_jax.report.panels import INK
from tracing_jax.sources import InMemory

_STEP, _GRAM = "block step", "cross-Gram step"


@dataclass(frozen=True)
class Line:
    """Seconds of one step against one thing that makes it longer.

    Attributes:
      against: depth, width or alphas.
      label: of the axis, with its unit.
      step: whose seconds.
      x: what is drawn on the axis: by theory the seconds are affine in it.
      seconds: at each.
    """

    against: str
    label: str
    step: str
    x: Sequence[float]
    seconds: Sequence[float]

    @property
    def fit(self) -> tuple[float, float]:
        """Slope and intercept of the straight line of least relative squares."""
        weights = 1 / np.asarray(self.seconds)
        design = np.stack([np.asarray(self.x, np.float64), np.ones(len(self.x))], axis=1)
        slope, intercept = np.linalg.lstsq(design * weights[:, None], np.ones(len(self.x)), rcond=None)[0]
        return float(slope), float(intercept)

    @property
    def bend(self) -> float:
        """The largest distance of a point from that line, relative to the point."""
        slope, intercept = self.fit
        line = slope * np.asarray(self.x) + intercept
        return float(np.abs(line / np.asarray(self.seconds) - 1).max())

    @property
    def row(self) -> Row:
        """The last stretch's slope over the first one's: 1 on a straight line."""
        first, *_, last = np.diff(self.seconds) / np.diff(self.x)
        note = f"{_listed(self.seconds)} s at {_listed(self.x)}; within {self.bend:.0%} of a straight line"
        of = "its first stretch"
        return Row("scaling", f"{self.step} against {self.against}, last stretch", last, first, "s each", of, note)


def scaling(size: Size) -> Iterator[Line]:
    """Yields the lines of the figure; dtype float32. The points of a line are timed in turns."""
    pair = random_pair(size.arch, 1)
    one_point = dataclasses.replace(size, alphas=(0.5,))
    deep = [_deeper(pair, depth) for depth in size.depths]
    depth_seconds = best_seconds([block_steps(*models, one_point, np.float32) for models in deep], size.rounds)
    yield Line("depth", "layers", _STEP, size.depths, depth_seconds)
    yield from _width(one_point)
    points = [dataclasses.replace(size, alphas=tuple(np.linspace(0, 1, count))) for count in size.points]
    point_seconds = best_seconds([block_steps(*pair, point, np.float32) for point in points], size.rounds)
    yield Line("alphas", "alphas", _STEP, size.points, point_seconds)


def _width(size: Size) -> Iterator[Line]:
    archs = [_wide(size.arch, factor) for factor in size.widths]
    pairs = [random_pair(arch, 1) for arch in archs]
    steps = best_seconds([block_steps(*pair, size, np.float32) for pair in pairs], size.rounds)
    flops = [block_flops_per_token(arch, size.tokens[1]) / 1e6 for arch in archs]
    yield Line("width", "operations per token, millions", _STEP, flops, steps)
    grams = best_seconds([gram_step(*_deeper(pair, size.rounds + 1), size) for pair in pairs], size.rounds)
    flops = [(2 * block_flops_per_token(arch, size.tokens[1]) + gram_flops_per_token(arch, len(TAPS))) / 1e6
             for arch in archs]  # fmt: skip
    yield Line("width", "operations per token, millions", _GRAM, flops, grams)


def _deeper(pair: tuple[InMemory, InMemory], layers: int) -> tuple[InMemory, InMemory]:
    return with_depth(pair[0], layers), with_depth(pair[1], layers)


def _wide(arch: Arch, factor: float) -> Arch:
    """Returns the facts of a model with so many times the features, MLP units and kv heads."""
    sizes = {name: round(factor * getattr(arch, name)) for name in ("embed_dim", "mlp_dim", "num_kv_heads")}
    return dataclasses.replace(arch, **sizes)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def figure(lines: Sequence[Line], title: str) -> Figure:
    """The lines, each in a panel with the straight line through it."""
    drawn = Figure(figsize=(3.1 * len(lines), 3.0), facecolor="white")
    drawn.set_layout_engine("constrained")
    for axes, line in zip(np.atleast_1d(drawn.subplots(1, len(lines))), lines, strict=True):
        slope, intercept = line.fit
        reach = np.array([0, 1.05 * max(line.x)])
        axes.plot(reach, slope * reach + intercept, color="#b0b0b0", linewidth=1)
        axes.plot(line.x, line.seconds, "o", color="#1f5fa8", markersize=5)
        axes.set(xlabel=line.label, ylabel="seconds", xlim=(0, None), ylim=(0, None))
        axes.set_title(f"{line.step}\nwithin {line.bend:.0%} of a line", loc="left", fontsize=9.5, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    drawn.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    return drawn
