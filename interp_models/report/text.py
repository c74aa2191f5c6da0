"""Tables of an evaluation as text: for the terminal, in Markdown and in LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from interp_models.report.numbers import as_text, cost, in_percent, is_best, label, number


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table by explainer (rows) and metric (columns) for the terminal: means with 95 % intervals, and a note.

    Args:
        rows: rows of one run, as in `results.json`.
    """
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["explainer"], {})[_head(row)] = cell(row)
    table = pd.DataFrame.from_dict(cells, orient="index", columns=list(dict.fromkeys(map(_head, rows))))
    return f"{table.fillna('–').to_string()}\n{_note(rows)}"


Costs = Mapping[str, Mapping[str, float | None]]
"""Costs of each explainer: `passes` and `seconds` per image."""


def markdown_table(rows: Sequence[Mapping[str, Any]], costs: Costs) -> str:
    """A table in Markdown with a row per explainer.

    Cells are means with their 95 % intervals. An explainer that the tests tell from all others is bold. The last
    columns are the explainer's costs per image. A note on images and protocol follows.

    Args:
        rows: rows of one model, as in `results.json`.
        costs: costs of the explainers.
    """
    heads, lines, note = table_cells(rows, costs)
    shown = [[f"**{text}**" if best else text for text, best in cells] for cells in lines]
    return f"{markdown(heads, shown)}\n\n{note}"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers.

    >>> print(markdown(["what", "ms"], [["a|b", "17"]]))
    | what | ms |
    | --- | ---: |
    | a\\|b | 17 |
    """
    table = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    escaped = [[text.replace("|", r"\|") for text in line] for line in table]  # a bar would begin another cell
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def csv_table(rows: Sequence[Mapping[str, Any]], costs: Costs) -> str:
    """The rows as CSV: a line per explainer and metric, with all their numbers and the explainer's costs."""
    table = pd.DataFrame([{**row, **costs.get(row["explainer"], {})} for row in rows])
    return str(table.drop(columns="options", errors="ignore").to_csv(index=False))


def latex_table(rows: Sequence[Mapping[str, Any]], costs: Costs, *, deviations: bool = False) -> str:
    """The table of `markdown_table` as a LaTeX `tabular`; it needs the package booktabs.

    Args:
        rows: rows of one model, as in `results.json`.
        costs: costs of the explainers.
        deviations: whether cells are means ± standard deviation over images, as in the tutorial's tables, without
            costs.
    """
    heads, lines, note = table_cells(rows, {} if deviations else costs, deviations=deviations)
    body = []
    for cells in lines:
        shown = [rf"\textbf{{{_escaped(text)}}}" if best else _escaped(text) for text, best in cells]
        line = " & ".join(shown)
        line = f"{{[}}{line[1:]}" if line.startswith("[") else line  # it would be an option of the line's end before it
        body.append(f"{line} {END}")
    top = f"{' & '.join(map(_escaped, heads))} {END}"
    table = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", top, r"\midrule", *body]
    return "\n".join([*table, r"\bottomrule", r"\end{tabular}", f"% {note}"])


END = r"\\"
LATEX = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
LATEX |= {"±": r"$\pm$", "–": "--", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}", "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def table_cells(
    rows: Sequence[Mapping[str, Any]], costs: Costs, *, deviations: bool = False
) -> tuple[list[str], list[list[tuple[str, bool]]], str]:
    """The table of one model as text: headings, rows of cells (each with whether it is bold), and the note.

    Args:
        rows: rows of one model, as in `results.json`.
        costs: costs of the explainers.
        deviations: see `latex_table`.
    """
    explainers = list(dict.fromkeys(row["explainer"] for row in rows))
    heads = list(dict.fromkeys(map(_head, rows)))
    found = {(row["explainer"], _head(row)): row for row in rows}
    lines = []
    for explainer in explainers:
        line: list[tuple[str, bool]] = [(" ".join(explainer.split()), False)]
        for head in heads:
            row = found.get((explainer, head))
            line.append(("–", False) if row is None else (cell(row, deviations=deviations), is_best(row)))
        costs_of = costs.get(explainer, {})
        line += [(cost(costs_of.get(key)), False) for key in ("passes", "seconds") if not deviations]
        lines.append(line)
    note = _note(rows, deviations=deviations)
    if not deviations:
        note += "; passes and seconds per image"
    if any(is_best(row) for row in rows):
        note += "; bold where the images tell an explainer from all others"
    return ["explainer", *heads, *([] if deviations else ["passes", "s"])], lines, note


def _head(row: Mapping[str, Any]) -> str:
    """The heading of a metric's column."""
    metric = row["metric"]
    return f"{label(metric)}{' %' if in_percent(metric) else ''} {'↑' if row['higher_is_better'] else '↓'}"


def cell(row: Mapping[str, Any], *, deviations: bool = False) -> str:
    """A mean with its interval or ± its standard deviation, and the number of images if some are undefined."""
    metric, mean = row["metric"], number(row["metric"], row["mean"])
    if mean is None:
        return "–"
    few = f" ({row['n'] - row['n_undefined']})" if row["n_undefined"] else ""
    if deviations:
        std = number(metric, row["std"])
        return f"{mean}{'' if std is None else f' ± {std}'}{few}"
    low, high = number(metric, row.get("low")), number(metric, row.get("high"))
    return f"{mean}{'' if low is None else f' [{low}, {high}]'}{few}"


def _note(rows: Sequence[Mapping[str, Any]], *, deviations: bool = False) -> str:
    """What the cells of a table are."""
    first, grids = rows[0], ", ".join(dict.fromkeys(as_text(row["grid"]) for row in rows))
    run, what = " ".join(first["run"].split()), "± standard deviation" if deviations else "and its 95 % interval"
    note = (
        f"{run}: mean {what} over {first['n']} images; class explained: {first['target']}; preset {first['preset']}; "
        f"grid {grids}"
    )
    if any(row["n_undefined"] for row in rows):
        note += "; in brackets the number of images where the metric is defined, if it is not all"
    return note
