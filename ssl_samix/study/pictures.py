"""The pictures of a study: accuracy over epochs, over time, against cost, and gaps. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from ssl_samix.run_folder import RunFolder, read_metrics
from ssl_samix.study.charts import Gaps, Panel, Series, chart, differences, write_figure
from ssl_samix.study.plan import Study
from ssl_samix.study.statistics import paired, spread
from ssl_samix.study.table import ACCURACIES, Row, by_seed, clock_of

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
