"""A table as text for the screen, Markdown or LaTeX; tabulate and pandas write it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Cells as they are read; what a format reserves is escaped when it is written.

    Attributes:
        header: The lines of each column's name, from top to bottom.
        rows: A text per column.
        names: How many columns, from the left, name a row; the others hold numbers.
        notes: Sentences below the table.
    """

    header: Sequence[Sequence[str]]
    rows: Sequence[Sequence[str]]
    names: int
    notes: Sequence[str] = ()

    def padded(self) -> list[list[str]]:
        """Return the columns' names with as many lines each; shorter names stand at the bottom."""
        height = max(map(len, self.header))
        return [[""] * (height - len(name)) + list(name) for name in self.header]


def text(table: Table) -> str:
    """Align the columns with spaces: names to the left, numbers to the right."""
    from tabulate import tabulate

    header = ["\n".join(name) for name in table.padded()]
    rows = [[*map(_one_line, row)] for row in table.rows]
    alignment = ["left"] * table.names + ["right"] * (len(header) - table.names)
    grid = tabulate(rows, header, disable_numparse=True, colalign=alignment)
    return "\n".join([grid, *(["", *table.notes] if table.notes else [])])


def markdown(table: Table) -> str:
    """Write a table of GitHub's Markdown; a name of several lines becomes one.

    Cells are not padded, so that a new row leaves the others as they are.
    """
    rule = [":---"] * table.names + ["---:"] * (len(table.header) - table.names)
    head, *rows = (
        [*map(_in_markdown, row)] for row in ([*map(" ".join, table.header)], *table.rows)
    )
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    return "\n".join([*lines, *(f"\n{_in_markdown(note)}" for note in table.notes)])


def latex(table: Table) -> str:
    """Write a tabular that needs the package booktabs; notes are comments above it."""
    from pandas import DataFrame, MultiIndex

    names = [tuple(name) for name in table.padded()]
    frame = DataFrame([[*map(_one_line, row)] for row in table.rows])
    frame.columns = MultiIndex.from_tuples(names) if len(names[0]) > 1 else [n for (n,) in names]
    alignment = "l" * table.names + "r" * (len(names) - table.names)
    tabular = frame.to_latex(
        index=False, escape=True, column_format=alignment, multicolumn_format="c"
    )
    tabular = re.sub(r"(?<![\w-])-(?=\d)", "$-$", tabular.strip())  # a minus, not a hyphen
    # The end of the row above would take a bracket or a star for its own argument.
    tabular = re.sub(r"^([\[*])", r"{}\1", tabular, flags=re.MULTILINE)
    comments = [r"needs \usepackage{booktabs}", *map(_one_line, table.notes)]
    return "\n".join([*(f"% {comment}" for comment in comments), tabular])


def _one_line(cell: str) -> str:
    return " ".join(cell.split())


def _in_markdown(cell: str) -> str:
    return re.sub(r"([\\|`*_~$<\[\]])", r"\\\1", _one_line(cell))


FORMATS: dict[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex}
