"""The Markdown report of a study: a table per length of runs, and its pictures. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from ssl_samix.files import write_atomically
from ssl_samix.reporting.study_pictures import paint_study
from ssl_samix.reporting.study_plan import Length, Study
from ssl_samix.reporting.study_table import (
    ACCURACIES,
    Difference,
    Row,
    Spread,
    by_seed,
    key_of,
    paired,
    spread,
)
from ssl_samix.reporting.tables import MISSING, Table, markdown

NOTE = (
    "Mean ± standard deviation over n seeds. Difference to {reference} of the same method, paired "
    "by seed, with its 95% confidence interval (Student's t); {missing} for less than two. "
    "Step: processor time per training step in units of {reference}'s."
)
SIZES = ("epochs", "step_ratio", "cpu_seconds", "peak_mib")


def write_report(study: Study, rows: Sequence[Row]) -> None:
    """Write the tables beside the study's own as Markdown, and pictures as PNG.

    Args:
        study: The study.
        rows: Of its table; those that the study file does not ask for are left out.

    Raises:
        UserError: If a file cannot be written.
    """
    wanted = {run.key for run in study.runs()}
    rows = [row for row in rows if key_of(row) in wanted]
    pictures = paint_study(study, rows)
    text = "\n\n".join([*report(study, rows), *(f"![]({p.name})" for p in pictures)]) + "\n"
    path = study.csv.with_suffix(".md")
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def report(study: Study, rows: Sequence[Row]) -> list[str]:
    """Return the paragraphs of the report, without pictures."""
    planned = len(study.runs())
    parts = [f"# {study.path.stem}", f"{len(rows)} of {planned} runs."]
    if not rows:
        return parts
    parts.append(NOTE.format(reference=study.reference, missing=MISSING))
    for length in study.lengths:
        of_length = [row for row in rows if row["length"] == str(length)]
        if of_length:
            parts += [f"## {_title(length)}", markdown(_table(study, of_length))]
    return parts


def _title(length: Length) -> str:
    plural = "" if length.amount == 1 else "s"
    names = {"epochs": f"epoch{plural}", "cpu_seconds": f"CPU second{plural} of training"}
    return f"{length.amount} {names[length.kind]}"


def _table(study: Study, rows: Sequence[Row]) -> Table:
    shown = [name for name in ACCURACIES if any(row.get(name) for row in rows)]
    lines = []
    for method in study.methods:
        plain = [r for r in rows if (r["method"], r["policy"]) == (method, study.reference)]
        for policy in study.policies:
            own = [r for r in rows if (r["method"], r["policy"]) == (method, policy)]
            if own:
                lines.append([method, policy, str(len(own)), *_sizes(own)])
                for name in shown:
                    numbers = by_seed(own, name)
                    lines[-1].append(_mean(spread([*numbers.values()]) if numbers else None))
                    gap = paired(numbers, by_seed(plain, name))
                    lines[-1].append(MISSING if policy == study.reference else _gap(gap))
    header = [["method"], ["policy"], ["n"], ["epochs"], ["step"], ["CPU s"], ["MiB"]]
    for name in shown:
        header += [[ACCURACIES[name]], ["difference"]]
    return Table(header, lines, names=2)


def _sizes(rows: Sequence[Row]) -> list[str]:
    cells = []
    for name in SIZES:
        values = [*by_seed(rows, name).values()]
        decimals = 2 if name == "step_ratio" else 0
        cells.append(f"{spread(values).mean:.{decimals}f}" if values else MISSING)
    return cells


def _mean(found: Spread | None) -> str:
    if found is None:
        return MISSING
    deviation = MISSING if found.deviation is None else f"{found.deviation:.2f}"
    return f"{found.mean:.2f} ± {deviation}"


def _gap(found: Difference | None) -> str:
    if found is None:
        return MISSING
    if found.half_width is None:
        return f"{found.mean:+.2f} ({MISSING})"
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return f"{found.mean:+.2f} ({low:+.2f} to {high:+.2f})"
