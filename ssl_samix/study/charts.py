"""Charts with several panels, painted with Pillow alone. Imports no torch.

Everything is painted ``SCALE`` times as large and made small again, which smooths lines and text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ssl_samix.files import write_atomically

SCALE = 2
WIDTH, HEIGHT = 400, 300  # px of a panel's axes
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 48  # px around them
FONT, LINE = 13, 19  # px, size of the text and height of a line
SAMPLE = 26  # px of a line in the legend
PER_ROW = 3  # panels
TICKS = 6  # at most about as many per axis
ROOM = 0.05  # between the data and the ends of an axis, as a share of the data's range
PAPER, INK, GRID = (255, 255, 255), (50, 50, 50), (228, 228, 228)
# Okabe and Ito's, which colour-blind eyes tell apart too; black last
COLOURS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233),
    (140, 86, 75), (0, 0, 0),
)  # fmt: skip
MARKS = ("circle", "square", "triangle", "diamond")


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


def write_chart(path: Path, panels: Sequence[Panel], x_label: str, y_label: str) -> None:
    """Write panels with a common legend as PNG.

    Raises:
        UserError: If the file cannot be written.
    """
    picture = paint_chart(panels, x_label, y_label)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def paint_chart(panels: Sequence[Panel], x_label: str, y_label: str) -> Image.Image:
    """Paint panels with a common legend below them.

    Args:
        panels: At least one, each with at least one point.
        x_label: Below each panel.
        y_label: Above the panels at the left.
    """
    columns = min(PER_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(s.name for panel in panels for s in panel.series))
    whole = columns * (LEFT + WIDTH + RIGHT)
    legend = _Legend(names, whole)
    size = (whole, rows * (TOP + HEIGHT + BOTTOM) + legend.height)
    picture = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    brush = _Brush(ImageDraw.Draw(picture))
    for place, panel in enumerate(panels):
        x = LEFT + (place % columns) * (LEFT + WIDTH + RIGHT)
        y = TOP + (place // columns) * (TOP + HEIGHT + BOTTOM)
        _Axes(brush, x, y, panel, names).paint(x_label, y_label if x == LEFT else "")
    legend.paint(brush, rows * (TOP + HEIGHT + BOTTOM))
    return picture.resize(size, Image.Resampling.LANCZOS)


class _Brush:
    """Paints in pixels of the small picture."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw, self.font = draw, ImageFont.load_default(FONT * SCALE)

    def line(
        self, points: Sequence[tuple[float, float]], colour: tuple[int, ...], width: float = 1
    ) -> None:
        large = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(large, fill=colour, width=round(width * SCALE), joint="curve")

    def text(self, x: float, y: float, words: str, anchor: str) -> None:
        self.draw.text((x * SCALE, y * SCALE), words, fill=INK, font=self.font, anchor=anchor)

    def mark(self, x: float, y: float, look: int, radius: float = 3.5) -> None:
        colour, kind = COLOURS[look % len(COLOURS)], MARKS[look // len(COLOURS) % len(MARKS)]
        r = radius * (1.2 if kind in ("triangle", "diamond") else 1)
        shapes = {
            "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
            "triangle": [(0, -r), (r, r), (-r, r)],
            "diamond": [(0, -r), (r, 0), (0, r), (-r, 0)],
        }
        if kind == "circle":
            box = [(x - r) * SCALE, (y - r) * SCALE, (x + r) * SCALE, (y + r) * SCALE]
            self.draw.ellipse(box, fill=colour)
        else:
            corners = [((x + dx) * SCALE, (y + dy) * SCALE) for dx, dy in shapes[kind]]
            self.draw.polygon(corners, fill=colour)


class _Legend:
    """Names and their looks in as many lines as are needed."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        font = ImageFont.load_default(FONT)
        self.entries: list[tuple[str, float, float]] = []
        x, y = float(LEFT), 0.0
        for name in names:
            needed = SAMPLE + 6 + font.getlength(name) + 18
            if x + needed > width and x > LEFT:
                x, y = float(LEFT), y + LINE
            self.entries.append((name, x, y))
            x += needed
        self.height = math.ceil(y + LINE + 8)

    def paint(self, brush: _Brush, top: float) -> None:
        for look, (name, x, y) in enumerate(self.entries):
            middle = top + y + LINE / 2
            brush.line([(x, middle), (x + SAMPLE, middle)], COLOURS[look % len(COLOURS)], 2)
            brush.mark(x + SAMPLE / 2, middle, look)
            brush.text(x + SAMPLE + 6, middle, name, "lm")


class _Axes:
    """A panel whose axes begin at (x, y), its upper left corner."""

    def __init__(
        self, brush: _Brush, x: float, y: float, panel: Panel, names: Sequence[str]
    ) -> None:
        self.brush, self.x, self.y, self.panel, self.names = brush, x, y, panel, names
        drawn = [
            (px, py + sign * error)
            for series in panel.series
            for (px, py), error in zip(
                series.points, series.errors or [0.0] * len(series.points), strict=True
            )
            for sign in (-1, 1)
        ]
        self.width = _padded([px for px, _ in drawn])
        self.height = _padded([py for _, py in drawn], panel.least)

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """Return where a point is in the picture."""
        (left, right), (low, high) = self.width, self.height
        return (
            self.x + (point[0] - left) / (right - left) * WIDTH,
            self.y + HEIGHT - (point[1] - low) / (high - low) * HEIGHT,
        )

    def paint(self, x_label: str, y_label: str) -> None:
        self._grid()
        self.brush.text(self.x + WIDTH / 2, self.y - 8, self.panel.title, "md")
        self.brush.text(self.x + WIDTH / 2, self.y + HEIGHT + 26, x_label, "ma")
        self.brush.text(self.x - LEFT + 8, self.y - 8, y_label, "ld")
        self._broken(self.panel.front)
        for series in self.panel.series:
            look = self.names.index(series.name)
            colour = COLOURS[look % len(COLOURS)]
            points = [self.place(point) for point in series.points]
            if series.joined and len(points) > 1:
                self.brush.line(points, colour, 2)
            for (x, y), (px, py), error in zip(
                points, series.points, series.errors or [0.0] * len(points), strict=True
            ):
                if error:
                    ends = [self.place((px, py + sign * error)) for sign in (-1, 1)]
                    self.brush.line(ends, colour, 1.5)
                    for _, end in ends:
                        self.brush.line([(x - 4, end), (x + 4, end)], colour, 1.5)
                self.brush.mark(x, y, look, 2.5 if series.joined else 4.5)

    def _grid(self) -> None:
        (left, right), (low, high) = self.width, self.height
        for value in ticks(left, right):
            self.brush.line([self.place((value, low)), self.place((value, high))], GRID)
            x, y = self.place((value, low))
            self.brush.text(x, y + 6, f"{value:g}", "ma")
        for value in ticks(low, high):
            self.brush.line([self.place((left, value)), self.place((right, value))], GRID)
            x, y = self.place((left, value))
            self.brush.text(x - 6, y, f"{value:g}", "rm")
        corners = [(left, low), (right, low), (right, high), (left, high), (left, low)]
        self.brush.line([self.place(corner) for corner in corners], (150, 150, 150))

    def _broken(self, points: Sequence[tuple[float, float]]) -> None:
        for first, second in pairwise(points):
            (x0, y0), (x1, y1) = self.place(first), self.place(second)
            parts = max(1, round(math.hypot(x1 - x0, y1 - y0) / 5))
            for part in range(0, parts, 2):
                ends = [
                    (x0 + (x1 - x0) * t, y0 + (y1 - y0) * t)
                    for t in (part / parts, min(1.0, (part + 1) / parts))
                ]
                self.brush.line(ends, (150, 150, 150), 1.5)


def _padded(values: Sequence[float], least: float = 0.0) -> tuple[float, float]:
    """Return ends between which all values have some room, this far apart at least."""
    low, high = min(values), max(values)
    room = ROOM * (high - low) or max(0.5, ROOM * abs(high))
    room = max(room, (least - (high - low)) / 2)
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Return the round numbers at equal distances from ``low`` to the larger ``high``."""
    raw = (high - low) / TICKS
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(f for f in (1, 2, 5, 10) if f * unit >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
