"""Places the panels of a figure below one another, in columns.

What stands around each pair of axes is measured once, in inches. A layout engine of matplotlib solves for it instead,
takes a third of the time of a figure for that, and neither keeps legends off labels nor wraps titles at the axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.transforms import ScaledTranslation

from tracing_jax.report.panels import INK, LABEL_INCHES

WIDTH_INCHES = 6.4
HIGHEST_INCHES = 10.0
"""1,600 pixels at 160 dots per inch."""

_LEGEND_ROW = 1.1  # font sizes, without the space between rows
_TITLE_POINTS, _LINE_SPACING, _TITLE_PAD_INCHES = 10.0, 1.2, 0.125
_POINTS_PER_INCH = 72
_GAP_INCHES = 0.1
_RIGHT_INCHES, _BAR_INCHES, _BAR_WIDTH_INCHES = 0.22, 0.85, 0.15
_LONGEST_LABEL = 1.1  # of an axis, over its length
_TICKS_INCHES = 0.3  # below the axes, where they have no label


@dataclass(frozen=True)
class Placed:
    """A panel whose axes are drawn but have no place yet.

    Attributes:
      axes: of the panel.
      title: words above them, which are wrapped.
      plot_inches: the height of the axes themselves.
    """

    axes: Axes
    title: str
    plot_inches: float


@dataclass(frozen=True)
class Area:
    """A part of a figure, in inches from its left and upper edge."""

    left: float
    top: float
    width: float
    height: float


def arrange(figure: Figure, groups: Sequence[Sequence[Placed]]) -> list[Area]:
    """Gives all axes their places and titles, and the figure its size; returns the area of each group.

    Groups keep their order. A figure of one column is as wide as a page, and no column is higher than `HIGHEST_INCHES`
    if no group is.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    measured = [[_Measured(placed, renderer) for placed in group] for group in groups]
    heights = [sum(panel.height for panel in group) for group in measured]
    columns = _columns(heights)
    width, height = WIDTH_INCHES * len(columns), max(sum(heights[at] for at in column) for column in columns)
    figure.set_size_inches(width, height)
    areas: dict[int, Area] = {}
    for number, column in enumerate(columns):
        left, top = WIDTH_INCHES * number, 0.0
        for at in column:
            areas[at] = Area(left, top, WIDTH_INCHES, heights[at])
            for panel in measured[at]:
                panel.place(left, top, width, height)
                top += panel.height
    return [areas[at] for at in range(len(groups))]


class _Measured:
    """A panel with the inches that it needs around its axes."""

    def __init__(self, placed: Placed, renderer: RendererBase) -> None:
        self.axes, self.plot = placed.axes, placed.plot_inches
        self.bar = next((image.colorbar for image in self.axes.get_images() if image.colorbar), None)
        figure = self.axes.get_figure(root=True)
        assert figure is not None
        figure.set_size_inches(WIDTH_INCHES, self.plot)  # ticks depend on the size of the axes
        self.axes.set_position((0.0, 0.0, 1.0, 1.0))
        label = self.axes.yaxis.label
        longest = _LONGEST_LABEL * self.plot * figure.dpi
        label.set_text(_wrapped(label.get_text(), longest, renderer, float(label.get_fontsize())))
        box = self.axes.yaxis.get_tightbbox(renderer)  # None of axes that are off
        self.left = _GAP_INCHES + (0.0 if box is None else max(0.0, -box.x0 / figure.dpi))
        if legend := self.axes.get_legend():  # from the edge of the panel, where there is most space for its columns
            shift = ScaledTranslation(_GAP_INCHES - self.left, -LABEL_INCHES, figure.dpi_scale_trans)
            legend.set_bbox_to_anchor((0, 0), self.axes.transAxes + shift)
        self.right = _BAR_INCHES if self.bar else _RIGHT_INCHES
        self.width = WIDTH_INCHES - self.left - self.right
        lines = [_wrapped(line, self.width * figure.dpi, renderer, _TITLE_POINTS) for line in placed.title.split("\n")]
        title = "\n".join(lines)
        self.axes.set_title(
            title, loc="left", pad=_TITLE_PAD_INCHES * _POINTS_PER_INCH, y=1.0, fontsize=_TITLE_POINTS, color=INK,
            linespacing=_LINE_SPACING, parse_math=False,
        )  # fmt: skip
        line_inches = _TITLE_POINTS * _LINE_SPACING / _POINTS_PER_INCH
        self.above = _GAP_INCHES + line_inches * (title.count("\n") + 1) + _TITLE_PAD_INCHES
        self.height = self.above + self.plot + _below(self.axes) + _GAP_INCHES

    def place(self, left: float, top: float, width: float, height: float) -> None:
        """Puts the panel into a figure of this width and height; all in inches, from the upper left."""
        x, y = left + self.left, height - top - self.above - self.plot
        self.axes.set_position((x / width, y / height, self.width / width, self.plot / height))
        if self.bar is not None:
            self.axes.set_anchor("W")
            self.axes.apply_aspect()
            drawn = self.axes.get_position()
            self.bar.ax.set_position((drawn.x1 + 0.1 / width, drawn.y0, _BAR_WIDTH_INCHES / width, drawn.height))


def _below(axes: Axes) -> float:
    """Returns the inches that the panel needs below its axes: for ticks, the label and a legend."""
    if not axes.axison:
        return 0.0
    legend = axes.get_legend()
    if legend is None:
        return LABEL_INCHES if axes.get_xlabel() else _TICKS_INCHES
    texts = legend.get_texts()
    rows = -(-len(texts) // legend._ncols)  # type: ignore[attr-defined]  # matplotlib has no public name for it
    row_points = float(texts[0].get_fontsize()) * (_LEGEND_ROW + legend.labelspacing)
    return LABEL_INCHES + rows * row_points / _POINTS_PER_INCH


def _wrapped(text: str, pixels: float, renderer: RendererBase, points: float) -> str:
    """Returns a line as several, none wider than this where its words allow."""
    font = FontProperties(size=points)
    words = text.split(" ")
    widths = [renderer.get_text_width_height_descent(word, font, False)[0] for word in words]
    apart, together = (renderer.get_text_width_height_descent(pair, font, False)[0] for pair in ("n n", "nn"))
    space = apart - together
    lines, used = [words[0]], widths[0]
    for word, width in zip(words[1:], widths[1:]):
        if used + space + width > pixels:
            lines.append(word)
            used = width
        else:
            lines[-1] += f" {word}"
            used += space + width
    return "\n".join(lines)


def _columns(heights: Sequence[float]) -> list[list[int]]:
    """Returns numbers of groups in their order, in columns of at most `HIGHEST_INCHES` but for one higher by itself."""
    columns: list[list[int]] = [[]]
    for at, height in enumerate(heights):
        if columns[-1] and np.sum([heights[before] for before in columns[-1]]) + height > HIGHEST_INCHES:
            columns.append([])
        columns[-1].append(at)
    return columns
