"""The pictures of a study: accuracy over epochs, over time, against cost, and differences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssl_samix.artifacts.run_folder import RunFolder, read_metrics
from ssl_samix.files import write_atomically
from ssl_samix.reporting.study_plan import Study
from ssl_samix.reporting.study_table import (
    ACCURACIES,
    Difference,
    Row,
    by_seed,
    clock_of,
    paired,
    spread,
)

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


MONITOR = {"pretrain": ("knn/top1", "kNN top-1 %"), "supervised": ("val/top1", "top-1 %")}
LEAST = 2.0  # points of accuracy that an axis shows at least: a run's own error is a quarter of it
Curve = dict[int, tuple[float, float]]  # epochs done -> CPU seconds of training, accuracy


def paint_study(study: Study, rows: Sequence[Row]) -> list[Path]:
    """Write what can be painted of the rows beside the table, and return the files."""
    written = []
    stem = study.csv.with_suffix("")
    curves = {(r["method"], r["policy"], r["length"], r["seed"]): _curve(study, r) for r in rows}
    for name, x_label, column in (
        ("epochs", "epochs", None),
        ("time", "CPU seconds of training", 0),
    ):
        panels = _curve_panels(study, curves, column)
        if panels:
            written.append(stem.with_name(f"{stem.name}-{name}.png"))
            write_figure(written[-1], chart(panels, x_label, MONITOR[study.command][1]))
    accuracy = next((a for a in ACCURACIES if any(row.get(a) for row in rows)), None)
    if accuracy is not None:
        timed = study.lengths[0].kind == "cpu_seconds"
        cost = "cpu_seconds" if timed else "step_ratio"
        panels = _cost_panels(study, rows, accuracy, cost)
        if panels:
            label = "CPU seconds of the run" if timed else f"step time, {study.reference} = 1"
            written.append(stem.with_name(f"{stem.name}-front.png"))
            write_figure(written[-1], chart(panels, label, ACCURACIES[accuracy]))
    gaps = _gaps(study, [row for row in rows if row["length"] == str(study.lengths[-1])])
    if gaps:
        written.append(stem.with_name(f"{stem.name}-differences.png"))
        label = f"points of top-1 above {study.reference}"
        write_figure(written[-1], differences(gaps, label))
    return written


def _gaps(study: Study, rows: Sequence[Row]) -> list[list[Gaps]]:
    """Return a row of panels per method, a panel per accuracy, what is above the reference."""
    found = []
    for method in study.methods:
        panels = []
        for accuracy, name in ACCURACIES.items():
            numbers = {
                policy: by_seed(
                    [r for r in rows if (r["method"], r["policy"]) == (method, policy)], accuracy
                )
                for policy in study.policies
            }
            plain = numbers.pop(study.reference)
            gaps = {policy: paired(own, plain) for policy, own in numbers.items()}
            lines = [(policy, gap) for policy, gap in gaps.items() if gap is not None]
            if lines and accuracy != "knn_k200_top1":
                panels.append(Gaps(f"{method}, {name.removesuffix(' %')}", lines))
        if panels:
            found.append(panels)
    return found


def _curve(study: Study, row: Row) -> Curve:
    """Read what the monitor saw of a run; nothing if its folder is elsewhere."""
    name = "-".join([row["method"], row["policy"], row["length"], f"s{row['seed']}"])
    epochs = read_metrics(RunFolder(study.out / name).metrics)
    if not epochs or "cpu_seconds" not in epochs[0]:
        return {}
    column, _ = MONITOR[study.command]
    seconds = accumulate(float(epoch["cpu_seconds"]) for epoch in epochs)
    return {
        int(epoch["epoch"]) + 1: (spent, float(epoch[column]))
        for epoch, spent in zip(epochs, seconds, strict=True)
        if epoch.get(column)
    }


def _curve_panels(
    study: Study, curves: dict[tuple[str, str, str, str], Curve], column: int | None
) -> list[Panel]:
    """Return a panel per method, of the longest runs; over epochs if no column is named."""
    panels = []
    for method in study.methods:
        series = []
        for policy in study.policies:
            of_lengths = (
                [curve for k, curve in curves.items() if k[:3] == (method, policy, str(length))]
                for length in reversed(study.lengths)
            )
            seeds = next(([c for c in found if c] for found in of_lengths if any(found)), [])
            if seeds:
                series.append(Series(policy, _mean_curve(seeds, column)))
        series = [s for s in series if s.points]
        if series:
            panels.append(Panel(method, series, least=LEAST))
    return panels


def _mean_curve(seeds: Sequence[Curve], column: int | None) -> list[tuple[float, float]]:
    """Average over seeds where all of them were looked at."""
    common = sorted(set.intersection(*(set(curve) for curve in seeds)))
    return [
        (
            epoch if column is None else fmean(curve[epoch][column] for curve in seeds),
            fmean(curve[epoch][1] for curve in seeds),
        )
        for epoch in common
    ]


def _cost_panels(study: Study, rows: Sequence[Row], accuracy: str, cost: str) -> list[Panel]:
    """Return a panel per method: a point per policy and length.

    Points of different budgets are joined by lines; those of one length, by their front. What has
    seconds of another processor alone has no point.
    """
    panels, timed = [], cost == "cpu_seconds"
    for method in study.methods:
        clocks = Counter(clock_of(row) for row in rows if row["method"] == method)
        series: list[Series] = []
        for policy in study.policies:
            points, errors = [], []
            for length in study.lengths:
                own = [
                    row
                    for row in rows
                    if (row["method"], row["policy"], row["length"])
                    == (method, policy, str(length))
                    and row.get(accuracy)
                    and row.get(cost)
                ]
                # Seconds of different processors do not compare: those of most rows count.
                costs = [
                    float(row[cost])
                    for row in own
                    if not timed or clock_of(row) == clocks.most_common(1)[0][0]
                ]
                if costs:
                    found = spread([float(row[accuracy]) for row in own])
                    points.append((fmean(costs), found.mean))
                    errors.append(found.deviation or 0.0)
            if points:
                series.append(Series(policy, points, errors, joined=timed))
        best = [] if timed else front([p for s in series for p in s.points])
        if series:
            panels.append(Panel(method, series, best, LEAST))
    return panels


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, accuracy) that no cheaper one reaches, the cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best
