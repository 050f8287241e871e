"""A table as text for the screen, Markdown or LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MISSING = "–"
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$",
    MISSING: "--",
}  # fmt: skip


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

    def header_rows(self) -> list[list[str]]:
        """Return the header line by line; shorter names stand at the bottom."""
        height = max(map(len, self.header))
        columns = [[""] * (height - len(name)) + list(name) for name in self.header]
        return [list(row) for row in zip(*columns, strict=True)]


def text(table: Table) -> str:
    """Align the columns with spaces: names to the left, numbers to the right."""
    head = table.header_rows()
    rows = [[" ".join(cell.split()) for cell in row] for row in (*head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths, table.names) for row in rows]
    lines.insert(len(head), "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join([*lines, *(["", *table.notes] if table.notes else [])])


def _aligned(row: Sequence[str], widths: Sequence[int], names: int) -> str:
    cells = [
        cell.ljust(width) if i < names else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def markdown(table: Table) -> str:
    """Write a table of GitHub's Markdown; a name of several lines becomes one."""
    numbers = len(table.header) - table.names
    lines = [
        _piped(_in_markdown(" ".join(name)) for name in table.header),
        _piped([":---"] * table.names + ["---:"] * numbers),
        *(_piped(map(_in_markdown, row)) for row in table.rows),
    ]
    notes = [line for note in table.notes for line in ("", _in_markdown(note))]
    return "\n".join([*lines, *notes])


def _in_markdown(cell: str) -> str:
    return re.sub(r"([\\|`*_~$<\[\]])", r"\\\1", " ".join(cell.split()))


def _piped(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def latex(table: Table) -> str:
    """Write a tabular that needs the package booktabs; notes are comments above it."""
    numbers = len(table.header) - table.names
    comments = [r"needs \usepackage{booktabs}", *(" ".join(note.split()) for note in table.notes)]
    return "\n".join(
        [
            *(f"% {comment}" for comment in comments),
            rf"\begin{{tabular}}{{{'l' * table.names}{'r' * numbers}}}",
            r"\toprule",
            *map(_latex_row, table.header_rows()),
            r"\midrule",
            *map(_latex_row, table.rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_in_latex, cells)) + r" \\"


def _in_latex(cell: str) -> str:
    escaped = "".join(_LATEX.get(letter, letter) for letter in " ".join(cell.split()))
    escaped = re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)  # a minus, not a hyphen
    # The end of the row above would take a bracket or a star for its own argument.
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


FORMATS: dict[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex}
