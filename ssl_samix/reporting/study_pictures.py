"""Figures of a study: accuracy by epochs, time and cost, and differences to the reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssl_samix.artifacts.run_folder import RunFolder, read_metrics
from ssl_samix.files import write_atomically
from ssl_samix.reporting.study_plan import Length, RunKey, Study
from ssl_samix.reporting.study_table import (
    ACCURACIES,
    Difference,
    Row,
    by_seed,
    clock_of,
    holds,
    key_of,
    paired,
    spread,
)

WIDTH, HEIGHT, LINE = 4.4, 3.4, 0.22  # inches: size of a panel, height of a line of text
DPI = 110
PER_ROW = 3  # panels per row
LETTER, HANDLE = 0.08, 0.6  # inches: width of a letter and of a line sample in the legend
GREY = "0.6"
# Colours of Okabe and Ito, safe for colour blindness; black last
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c564b", "#000000",
)  # fmt: skip
MARKS = "os^D"
MONITOR = {"pretrain": ("knn/top1", "kNN top-1 %"), "supervised": ("val/top1", "top-1 %")}
LEAST = 2.0  # minimum span of an accuracy axis in points: four times the error of a single run
Points = Sequence[tuple[float, float]]
Curve = dict[int, tuple[float, float]]  # epochs done -> CPU seconds of training, accuracy


@dataclass(frozen=True)
class Series:
    """A named series of points; a name has the same style in all panels."""

    name: str
    points: Points  # (x, y)
    errors: Sequence[float] = ()  # half length of each error bar, in units of y; empty for none
    joined: bool = True  # whether a line joins the points


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    series: Sequence[Series]
    front: Points = ()  # points joined by a dashed line; empty for none
    least: float = 0.0  # minimum span of the y axis, so that small differences look small


@dataclass(frozen=True)
class Gaps:
    """Differences to one reference, one line each, from top to bottom."""

    title: str
    lines: Sequence[tuple[str, Difference]]


def chart(panels: Sequence[Panel], x_label: str, y_label: str) -> Figure:
    """Return a figure of panels with a common legend below them.

    Args:
        panels: At least one, each with at least one point.
        x_label: Label below each panel.
        y_label: Label at the left of each row of panels.
    """
    columns = min(PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(s.name for panel in panels for s in panel.series))
    beside = max(1, int(columns * WIDTH / (LETTER * max(map(len, names)) + HANDLE)))
    height = rows * HEIGHT + math.ceil(len(names) / beside) * LINE
    figure = Figure((columns * WIDTH, height), DPI, layout="constrained")
    for place, panel in enumerate(panels):
        axes = _axes(figure.add_subplot(rows, columns, place + 1), panel.title)
        _draw(axes, panel, names)
        axes.set_xlabel(x_label)
        if place % columns == 0:
            axes.set_ylabel(y_label)
    labelled = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    samples = {name: sample for each in labelled for sample, name in each}
    figure.legend(
        [samples[name] for name in names],
        names,
        loc="outside lower center",
        ncols=beside,
        frameon=False,
        fontsize="small",
    )
    return figure


def _axes(axes: Axes, title: str) -> Axes:
    axes.set_title(title)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    return axes


def _draw(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    if panel.front:
        x, y = zip(*panel.front, strict=True)
        axes.plot(x, y, color=GREY, linestyle="--")
    for series in panel.series:
        style = names.index(series.name)
        x, y = zip(*series.points, strict=True)
        axes.errorbar(
            x,
            y,
            yerr=series.errors or None,
            label=series.name,
            color=COLOURS[style % len(COLOURS)],
            marker=MARKS[style // len(COLOURS) % len(MARKS)],
            markersize=4 if series.joined else 7,
            linestyle="-" if series.joined else "none",
            capsize=3,
        )
    low, high = axes.get_ylim()
    missing = max(0.0, panel.least - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def differences(rows: Sequence[Sequence[Gaps]], x_label: str) -> Figure:
    """Return a figure of differences with confidence intervals; hollow markers have one seed.

    Args:
        rows: Rows of panels, at least one. If all panels of a row have the same names, the names
            are shown once.
        x_label: Label below the last row.
    """
    columns = max(map(len, rows))
    lines = [max(len(gaps.lines) for gaps in row) for row in rows]
    height = sum(LINE * count + 0.7 for count in lines) + 0.5
    figure = Figure((columns * WIDTH, height), DPI, layout="constrained")
    grid = figure.subplots(
        len(rows), columns, sharex="col", squeeze=False, height_ratios=[n + 1 for n in lines]
    )
    for i, row in enumerate(rows):
        for unused in grid[i, len(row) :]:
            unused.remove()
        for j, gaps in enumerate(row):
            axes = _axes(grid[i, j], gaps.title)
            axes.tick_params(labelbottom=True)
            axes.axvline(0, color=GREY)
            for place, (_, gap) in enumerate(gaps.lines):
                axes.errorbar(
                    gap.mean,
                    place,
                    xerr=gap.half_width,
                    color=COLOURS[0],
                    marker="o",
                    fillstyle="full" if gap.seeds > 1 else "none",
                    capsize=3,
                )
            own, first = ([name for name, _ in shown.lines] for shown in (gaps, row[0]))
            axes.set_yticks(range(len(own)), own if j == 0 or own != first else [])
            axes.set_ylim(len(own) - 0.5, -0.5)
            if i == len(rows) - 1:
                axes.set_xlabel(x_label)
    return figure


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG.

    Raises:
        UserError: If the file cannot be written.
    """
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_study(study: Study, rows: Sequence[Row]) -> list[Path]:
    """Write the figures that the rows allow beside the table, and return their paths."""
    figures: dict[str, Figure] = {}
    monitor = MONITOR[study.command][1]
    done = {key_of(row) for row in rows}
    curves = {r.key: _curve(study, study.folder(r)) for r in study.runs() if r.key in done}
    for ending, label in (("epochs", "epochs"), ("time", "CPU seconds of training")):
        if panels := _curve_panels(study, curves, timed=ending == "time"):
            figures[ending] = chart(panels, label, monitor)
    accuracy = next((a for a in ACCURACIES if any(row.get(a) for row in rows)), None)
    if accuracy is not None:
        timed = study.lengths[0].kind == "cpu_seconds"
        cost = "cpu_seconds" if timed else "step_ratio"
        label = "CPU seconds of the run" if timed else f"step time, {study.reference} = 1"
        if panels := _cost_panels(study, rows, accuracy, cost):
            figures["front"] = chart(panels, label, ACCURACIES[accuracy])
    if gaps := _gaps(study, [row for row in rows if row["length"] == str(study.lengths[-1])]):
        figures["differences"] = differences(gaps, f"points of top-1 above {study.reference}")
    paths = {end: study.csv.with_name(f"{study.csv.stem}-{end}.png") for end in figures}
    for ending, figure in figures.items():
        write_figure(paths[ending], figure)
    return list(paths.values())


def _gaps(study: Study, rows: Sequence[Row]) -> list[list[Gaps]]:
    """Return differences to the reference: a row per method, a panel per accuracy."""
    found = []
    for method in study.methods:
        panels = []
        for accuracy, title in ACCURACIES.items():
            plain = by_seed(rows, accuracy, method=method, policy=study.reference)
            gaps = {
                policy: paired(by_seed(rows, accuracy, method=method, policy=policy), plain)
                for policy in study.policies
                if policy != study.reference
            }
            lines = [(policy, gap) for policy, gap in gaps.items() if gap is not None]
            if lines and accuracy != "knn_k200_top1":
                panels.append(Gaps(f"{method}, {title.removesuffix(' %')}", lines))
        if panels:
            found.append(panels)
    return found


def _curve(study: Study, folder: Path) -> Curve:
    """Return the monitored accuracies of a run; empty if its folder is not on this machine."""
    epochs = read_metrics(RunFolder(folder).metrics)
    if not epochs or "cpu_seconds" not in epochs[0]:
        return {}
    column, _ = MONITOR[study.command]
    seconds = accumulate(float(epoch["cpu_seconds"]) for epoch in epochs)
    return {
        int(epoch["epoch"]) + 1: (spent, float(epoch[column]))
        for epoch, spent in zip(epochs, seconds, strict=True)
        if epoch.get(column)
    }


def _curve_panels(study: Study, curves: dict[RunKey, Curve], timed: bool) -> list[Panel]:
    """Return a panel per method with the mean over seeds of each policy's longest runs."""

    def mean(method: str, policy: str, length: Length) -> Points:
        cell = (method, policy, str(length))
        seeds = [curve for key, curve in curves.items() if key[:3] == cell and curve]
        common = sorted(set.intersection(*map(set, seeds))) if seeds else []
        return [
            (
                fmean(curve[epoch][0] for curve in seeds) if timed else epoch,
                fmean(curve[epoch][1] for curve in seeds),
            )
            for epoch in common
        ]

    panels = []
    for method in study.methods:
        series = []
        for policy in study.policies:
            found = (mean(method, policy, length) for length in reversed(study.lengths))
            if points := next(filter(None, found), None):
                series.append(Series(policy, points))
        if series:
            panels.append(Panel(method, series, least=LEAST))
    return panels


def _cost_panels(study: Study, rows: Sequence[Row], accuracy: str, cost: str) -> list[Panel]:
    """Return a panel per method, with a point per policy and length.

    For CPU seconds, lines join the points of each policy, and measurements from other processors
    than the most frequent one are left out. For other costs, the Pareto front is drawn.
    """
    panels, timed = [], cost == "cpu_seconds"
    for method in study.methods:
        # Times of different processors are not comparable: use the most frequent processor.
        clocks = Counter(clock_of(row) for row in rows if row["method"] == method).most_common(1)
        series: list[Series] = []
        for policy in study.policies:
            points, errors = [], []
            for length in study.lengths:
                of = {"method": method, "policy": policy, "length": str(length)}
                own = [r for r in rows if holds(r, **of) and r.get(accuracy) and r.get(cost)]
                costs = [float(r[cost]) for r in own if not timed or clock_of(r) == clocks[0][0]]
                if costs:
                    mean, deviation = spread([float(row[accuracy]) for row in own])
                    points.append((fmean(costs), mean))
                    errors.append(deviation or 0.0)
            if points:
                series.append(Series(policy, points, errors, joined=timed))
        best = [] if timed else front([p for s in series for p in s.points])
        if series:
            panels.append(Panel(method, series, best, LEAST))
    return panels


def front(points: Points) -> list[tuple[float, float]]:
    """Return the Pareto front of (cost, accuracy) points, cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best
