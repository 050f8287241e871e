"""Charts of a study with matplotlib: panels of points and lines, and of differences. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssl_samix.files import write_atomically
from ssl_samix.study.statistics import Difference

WIDTH, HEIGHT, ROW = 4.4, 3.4, 0.22  # inches: a panel, a line of text
DPI = 110
PER_ROW = 3  # panels
LETTER, HANDLE = 0.08, 0.6  # inches of the legend: a letter, what stands before a name
GREY = "0.6"
# Okabe and Ito's, which colour-blind eyes tell apart too; black last
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c564b", "#000000",
)  # fmt: skip
MARKS = "os^D"


@dataclass(frozen=True)
class Series:
    """Points of one name; the same name has the same look in all panels.

    Attributes:
        name: For the legend.
        points: (x, y).
        errors: Half the length of each point's error bar in units of y; none if empty.
        joined: Whether a line goes through them.
    """

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Above it.
        series: What is in it.
        front: Points that a broken line joins; none if empty.
        least: What the y axis spans at least, so that small differences look small.
    """

    title: str
    series: Sequence[Series]
    front: Sequence[tuple[float, float]] = field(default=())
    least: float = 0.0


@dataclass(frozen=True)
class Gaps:
    """Differences to one reference, a line each.

    Attributes:
        title: Above them.
        lines: (name, difference), from top to bottom.
    """

    title: str
    lines: Sequence[tuple[str, Difference]]


def chart(panels: Sequence[Panel], x_label: str, y_label: str) -> Figure:
    """Draw panels with a common legend below them.

    Args:
        panels: At least one, each with at least one point.
        x_label: Below each panel.
        y_label: At the left of each row of panels.
    """
    columns = min(PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(s.name for panel in panels for s in panel.series))
    beside = max(1, int(columns * WIDTH / (LETTER * max(map(len, names)) + HANDLE)))
    legend = math.ceil(len(names) / beside)
    figure = Figure((columns * WIDTH, rows * HEIGHT + legend * ROW), DPI, layout="constrained")
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw(axes, panel, names)
        axes.set_xlabel(x_label)
        if place % columns == 0:
            axes.set_ylabel(y_label)
    shown = {
        name: handle
        for axes in figure.axes
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [shown[name] for name in names],
        names,
        loc="outside lower center",
        ncols=beside,
        frameon=False,
        fontsize="small",
    )
    return figure


def _draw(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    axes.set_title(panel.title)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    if panel.front:
        x, y = zip(*panel.front, strict=True)
        axes.plot(x, y, color=GREY, linestyle="--")
    for series in panel.series:
        look = names.index(series.name)
        axes.errorbar(
            [x for x, _ in series.points],
            [y for _, y in series.points],
            yerr=series.errors or None,
            label=series.name,
            color=COLOURS[look % len(COLOURS)],
            marker=MARKS[look // len(COLOURS) % len(MARKS)],
            markersize=4 if series.joined else 7,
            linestyle="-" if series.joined else "none",
            capsize=3,
        )
    low, high = axes.get_ylim()
    missing = max(0.0, panel.least - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def differences(rows: Sequence[Sequence[Gaps]], x_label: str) -> Figure:
    """Draw differences and their confidence intervals; those of one seed are hollow.

    Args:
        rows: Rows of panels, at least one; a row whose panels have the same names shows them once.
        x_label: Below the last row.
    """
    columns = max(len(row) for row in rows)
    names = sum(ROW * max(len(gaps.lines) for gaps in row) + 0.7 for row in rows)
    figure = Figure((columns * WIDTH, names + 0.5), DPI, layout="constrained")
    heights = [max(len(gaps.lines) for gaps in row) + 1 for row in rows]
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    tops: dict[int, Axes] = {}
    for i, row in enumerate(rows):
        for j, gaps in enumerate(row):
            axes = figure.add_subplot(grid[i, j], sharex=tops.get(j))
            tops.setdefault(j, axes)
            axes.set_title(gaps.title)
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
            axes.axvline(0, color=GREY)
            for place, (_, gap) in enumerate(gaps.lines):
                axes.errorbar(
                    gap.mean,
                    place,
                    xerr=gap.half_width,
                    color=COLOURS[0],
                    marker="o",
                    fillstyle="full" if gap.count > 1 else "none",
                    capsize=3,
                )
            own, first = ([name for name, _ in shown.lines] for shown in (gaps, row[0]))
            axes.set_yticks(range(len(own)), own if j == 0 or own != first else [])
            axes.set_ylim(len(gaps.lines) - 0.5, -0.5)
            if i == len(rows) - 1:
                axes.set_xlabel(x_label)
    return figure


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG.

    Raises:
        UserError: If the file cannot be written.
    """
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
