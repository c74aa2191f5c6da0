"""Tables of an evaluation as text: for the terminal, in Markdown and in LaTeX."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from interp_models.report.numbers import in_percent, label, number


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of means by explainer (rows) and metric (columns) for the terminal, with a note on images and protocol.

    Args:
        rows: rows of one run, as in `results.json`.
    """
    heads = {
        row["metric"]: f"{label(row['metric'])}{' %' if in_percent(row['metric']) else ''} "
        f"{'↑' if row['higher_is_better'] else '↓'}"
        for row in rows
    }
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        mean = number(row["metric"], row["mean"]) or "–"
        few = f" ({row['n'] - row['n_undefined']})" if row["n_undefined"] else ""
        cells.setdefault(row["explainer"], {})[heads[row["metric"]]] = mean + few
    table = pd.DataFrame.from_dict(cells, orient="index", columns=list(heads.values()))
    first = rows[0]
    note = f"{first['run']}: means over {first['n']} images, class explained: {first['target']}, grid {first['grid']}"
    if any(row["n_undefined"] for row in rows):
        note += "; in brackets the number of images where the metric is defined, if it is not all"
    return f"{table.to_string()}\n{note}"


Costs = Mapping[str, Mapping[str, float | None]]
"""Costs of each explainer: `passes` and `seconds` per image."""


def markdown_table(rows: Sequence[Mapping[str, Any]], costs: Costs) -> str:
    """A table in Markdown with a row per explainer.

    Cells are means ± half the width of their 95 % interval; the best of each metric is bold. The last columns are the
    explainer's costs per image. A note on images and protocol follows.

    Args:
        rows: rows of one model, as in `results.json`.
        costs: costs of the explainers.
    """
    heads, lines, note = _cells(rows, costs)
    heads = [text.replace("|", r"\|") for text in heads]
    table = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for cells in lines:
        texts = [(text.replace("|", r"\|"), best) for text, best in cells]  # a bar would begin another cell
        shown = [f"**{text}**" if best else text for text, best in texts]
        table.append(f"| {' | '.join(shown)} |")
    return "\n".join([*table, "", note])


def latex_table(rows: Sequence[Mapping[str, Any]], costs: Costs) -> str:
    """The table of `markdown_table` as a LaTeX `tabular`; it needs the package booktabs."""
    heads, lines, note = _cells(rows, costs)
    body = []
    for cells in lines:
        shown = [rf"\textbf{{{_escaped(text)}}}" if best else _escaped(text) for text, best in cells]
        body.append(f"{' & '.join(shown)} {END}")
    top = f"{' & '.join(map(_escaped, heads))} {END}"
    table = [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", top, r"\midrule", *body]
    return "\n".join([*table, r"\bottomrule", r"\end{tabular}", f"% {note}"])


END = r"\\"
LATEX = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "$": r"\$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
LATEX |= {"±": r"$\pm$", "–": "--", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}", "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _cells(rows: Sequence[Mapping[str, Any]], costs: Costs) -> tuple[list[str], list[list[tuple[str, bool]]], str]:
    """Headings, rows of cells (each with whether it is the best of its column), and the note."""
    explainers = list(dict.fromkeys(row["explainer"] for row in rows))
    metrics = {row["metric"]: bool(row["higher_is_better"]) for row in rows}
    cell = {(row["explainer"], row["metric"]): row for row in rows}
    best = {}
    for metric, up in metrics.items():
        shown = [number(metric, row["mean"]) for row in rows if row["metric"] == metric]
        best[metric] = (max if up else min)((text for text in shown if text is not None), key=float, default=None)
    lines = []
    for explainer in explainers:
        line: list[tuple[str, bool]] = [(explainer, False)]
        for metric in metrics:
            row = cell[explainer, metric]
            mean = number(metric, row["mean"])
            half = None if row.get("low") is None else number(metric, (row["high"] - row["low"]) / 2)
            few = f" ({row['n'] - row['n_undefined']})" if row["n_undefined"] else ""
            text = "–" if mean is None else f"{mean}{'' if half is None else f' ± {half}'}{few}"
            line.append((text, mean is not None and mean == best[metric]))
        cost = costs.get(explainer, {})
        line += [(_short(cost.get(key)), False) for key in ("passes", "seconds")]
        lines.append(line)
    heads = [
        f"{label(metric)}{' %' if in_percent(metric) else ''} {'↑' if up else '↓'}" for metric, up in metrics.items()
    ]
    first = rows[0]
    note = (
        f"{first['run']}: mean ± half of the 95 % interval over {first['n']} images; class explained: "
        f"{first['target']}; preset {first['preset']}; grid {first['grid']}; passes and seconds per image"
    )
    if any(row["n_undefined"] for row in rows):
        note += "; in brackets the number of images where the metric is defined, if it is not all"
    return ["explainer", *heads, "passes", "s"], lines, note


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
