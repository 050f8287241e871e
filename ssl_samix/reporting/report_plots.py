"""The plots of ``samix report``, by Bokeh: curves of ``metrics.csv``, and maps of embeddings.

Plots are plain values for JSON, which ``Bokeh.embed.embed_item`` of the page draws.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.layouts import row
from bokeh.models import CDSView, ColumnDataSource, GroupFilter, HoverTool, Legend
from bokeh.palettes import Category10, Category20, Turbo256
from bokeh.plotting import figure
from bokeh.resources import INLINE
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

# Title -> the columns of metrics.csv that are drawn together.
CURVES = {
    "Loss": r"loss|loss/own|loss/mix",
    "Loss of the Mixer": r"loss/mixer|mixer/local|mixer/global",
    "Accuracy, %": r"(knn|val|probe)/top1|val/ema_top1",
    "RankMe (effective rank)": r"rankme",
    "Alignment and uniformity": r"alignment|uniformity",
    "Mixer: vital signs": r"mixer/(gain|ratio_slope|mask_std|mask_mean_error|one_sided)",
    "Learning rate": r"lr",
    "Images per second": r"images_per_second",
}
MOST_COLOURS = 20  # labels with a colour and an entry in the legend each; more share a colour map
COLOURS = Category10[10]
DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot")
REDUCED = 50  # principal components that t-SNE starts from
PERPLEXITY = 30
TIP = """
<div style="padding:4px;max-width:180px;font-family:system-ui,sans-serif;font-size:12px">
  <img src="@thumb" alt="" width="112" style="display:block;margin-bottom:4px">
  <div style="overflow-wrap:anywhere">@id</div><div style="font-weight:600">@label</div>
</div>"""


def bokeh_script() -> str:
    """Return Bokeh's script for a page, without a network."""
    # The core alone: no widgets, tables, WebGL or formulas.
    return "\n".join(INLINE.clone(components=["bokeh"]).js_raw)


def curves(metrics: Mapping[str, Sequence[Mapping[str, str]]]) -> list[tuple[str, Any]]:
    """Return title and plot of each group of curves of which a run has values.

    Args:
        metrics: Name of a run -> the rows of its metrics.csv.
    """
    drawn = []
    for title, pattern in CURVES.items():
        lines = [
            (name, column, values)
            for name, rows in metrics.items()
            for column in (rows[0] if rows else ())
            if re.fullmatch(pattern, column) and (values := _values(rows, column)) is not None
        ]
        if lines:
            drawn.append((title, json_item(_curve(lines, len(metrics) > 1))))
    return drawn


def _values(rows: Sequence[Mapping[str, str]], column: str) -> np.ndarray | None:
    """Return epochs, from 1, and values, (2, n); None if there are none."""
    found = [(int(row["epoch"]) + 1, float(row[column])) for row in rows if row[column]]
    return np.array(found).T if found else None


def _curve(lines: Sequence[tuple[str, str, np.ndarray]], several: bool) -> Any:
    """Return a plot of lines: one colour per run, or of one run per column."""
    plot = _figure(height=250, x_axis_label="epoch")
    names, columns = (list(dict.fromkeys(line[i] for line in lines)) for i in (0, 1))
    entries = []
    for name, column, (epochs, values) in lines:
        label = f"{name}: {column}" if several and len(columns) > 1 else name if several else column
        source = ColumnDataSource({"x": epochs, "y": values, "line": [label] * len(values)})
        number = names.index(name) if several else columns.index(column)
        look = {"color": COLOURS[number % len(COLOURS)], "source": source}
        dash = DASHES[columns.index(column) % len(DASHES)] if several else "solid"
        glyphs = [plot.line("x", "y", line_width=2, line_dash=dash, **look)]
        glyphs.append(plot.scatter("x", "y", size=5, **look))
        entries.append((label, glyphs))
    plot.add_tools(HoverTool(tooltips=[("", "@line"), ("epoch", "@x"), ("value", "@y{0.[0000]}")]))
    if len(entries) > 1:
        _legend(plot, entries, "below", ncols=2 if several else 3)
    return plot


def embedding_map(
    features: np.ndarray, points: Mapping[str, Sequence[str]], labels: Sequence[str] | None,
    seed: int,
) -> Any:  # fmt: skip
    """Return two maps of some images, by PCA and t-SNE of their L2-normalised features.

    Args:
        features: (P, D) features.
        points: ``id`` and ``thumb`` (the address of a thumbnail) of each.
        labels: P labels; None without labels.
        seed: Of t-SNE.
    """
    labelled = [""] * len(features) if labels is None else list(labels)
    columns: dict[str, Any] = {**points, "label": labelled}
    maps = projections(features, seed)
    for name, places in maps.items():
        columns[f"{name} x"], columns[f"{name} y"] = places.T
    source = ColumnDataSource(columns)
    plots = [_map(name, source, sorted({*labelled})) for name in maps]
    return json_item(row(*plots, sizing_mode="stretch_width"))


def projections(features: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return (P, 2) coordinates by PCA and, from five images on, by t-SNE.

    Args:
        features: (P, D) features, P at least 2.
        seed: Of t-SNE.
    """
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(length, 1e-12)
    reduced = PCA(min(REDUCED, *unit.shape), random_state=seed).fit_transform(unit)
    found = {"PCA": np.pad(reduced, ((0, 0), (0, 1)))[:, :2]}
    if len(unit) >= 5:
        perplexity = min(PERPLEXITY, (len(unit) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="random", random_state=seed)
        found["t-SNE"] = tsne.fit_transform(reduced)
    return found


def _map(name: str, source: ColumnDataSource, labels: Sequence[str]) -> Any:
    plot = _figure(height=460, title=name, tools="pan,wheel_zoom,box_zoom,lasso_select,reset")
    plot.grid.visible = plot.axis.visible = False
    where = {"x": f"{name} x", "y": f"{name} y", "source": source}
    look: dict[str, Any] = {"size": 6, "alpha": 0.75, "line_color": None}
    look["nonselection_fill_alpha"] = 0.1
    if len(labels) <= MOST_COLOURS:
        palette = COLOURS if len(labels) <= 10 else Category20[20]
        entries = [
            (label or "no label", [plot.scatter(
                **where, **look, color=palette[number],
                view=CDSView(filter=GroupFilter(column_name="label", group=label)),
            )])
            for number, label in enumerate(labels)
        ]  # fmt: skip
        if len(labels) > 1:
            _legend(plot, entries, "right")
    else:
        number = {label: i for i, label in enumerate(labels)}
        colours = [Turbo256[255 * number[v] // len(labels)] for v in source.data["label"]]
        source.data.setdefault("colour", colours)
        plot.scatter(**where, **look, color="colour")
    plot.add_tools(HoverTool(tooltips=TIP))
    return plot


def _legend(plot: Any, entries: Sequence[tuple[str, Any]], place: str, **look: Any) -> None:
    legend = Legend(items=list(entries), click_policy="hide", border_line_color=None, **look)
    legend.label_text_font_size, legend.padding = "11px", 2
    plot.add_layout(legend, place)


def _figure(**settings: Any) -> Any:
    settings = {"tools": "pan,box_zoom,wheel_zoom,reset", **settings}
    plot = figure(sizing_mode="stretch_width", **settings)
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.outline_line_color, plot.min_border_right = None, 12
    return plot
