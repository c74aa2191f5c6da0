"""The table of an evaluation as text, for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from interp_models.report.page import in_percent, label, number


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means by explainer (rows) and metric (columns), and below them what they are means of.

    Args:
        rows: those of `results.json`, of one run.
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
