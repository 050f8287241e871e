"""Tables as plain text, Markdown or LaTeX, formatted by tabulate and pandas."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A table of unescaped cells; special characters are escaped on output.

    Attributes:
        header: The lines of each column's name, from top to bottom.
        rows: One text per column.
        names: Number of leading columns that name a row; the others hold numbers.
        notes: Sentences below the table.
    """

    header: Sequence[Sequence[str]]
    rows: Sequence[Sequence[str]]
    names: int
    notes: Sequence[str] = ()

    def padded(self) -> list[list[str]]:
        """Return the column names, padded at the top to the same number of lines."""
        height = max(map(len, self.header))
        return [[""] * (height - len(name)) + list(name) for name in self.header]


def text(table: Table) -> str:
    """Return a table as plain text: names left-aligned, numbers right-aligned."""
    from tabulate import tabulate

    header = ["\n".join(name) for name in table.padded()]
    rows = [[*map(_one_line, row)] for row in table.rows]
    alignment = ["left"] * table.names + ["right"] * (len(header) - table.names)
    grid = tabulate(rows, header, disable_numparse=True, colalign=alignment)
    return "\n".join([grid, *(["", *table.notes] if table.notes else [])])


def markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown; column names of several lines are joined.

    Cells are not padded, so that adding a row does not change other rows.
    """
    rule = [":---"] * table.names + ["---:"] * (len(table.header) - table.names)
    head, *rows = (
        [*map(_in_markdown, row)] for row in ([*map(" ".join, table.header)], *table.rows)
    )
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]
    return "\n".join([*lines, *(f"\n{_in_markdown(note)}" for note in table.notes)])


def latex(table: Table) -> str:
    """Return a LaTeX tabular, which needs booktabs; notes become comments above it."""
    from pandas import DataFrame, MultiIndex

    names = [tuple(name) for name in table.padded()]
    frame = DataFrame([[*map(_one_line, row)] for row in table.rows])
    frame.columns = MultiIndex.from_tuples(names) if len(names[0]) > 1 else [n for (n,) in names]
    alignment = "l" * table.names + "r" * (len(names) - table.names)
    tabular = frame.to_latex(
        index=False, escape=True, column_format=alignment, multicolumn_format="c"
    )
    tabular = re.sub(r"(?<![\w-])-(?=\d)", "$-$", tabular.strip())  # minus signs, not hyphens
    # After a row end, LaTeX would parse a bracket or a star as an argument.
    tabular = re.sub(r"^([\[*])", r"{}\1", tabular, flags=re.MULTILINE)
    comments = [r"needs \usepackage{booktabs}", *map(_one_line, table.notes)]
    return "\n".join([*(f"% {comment}" for comment in comments), tabular])


def _one_line(cell: str) -> str:
    return " ".join(cell.split())


def _in_markdown(cell: str) -> str:
    return re.sub(r"([\\|`*_~$<\[\]])", r"\\\1", _one_line(cell))


FORMATS: dict[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex}
