"""A table of an evaluation as HTML for notebooks, without scripts and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from interp_models.report.text import Costs, table_cells


def html_table(rows: Sequence[Mapping[str, Any]], costs: Costs, answer: str) -> str:
    """The answer and the table of `text.markdown_table`; names are escaped.

    Args:
        rows: rows of one model, as in `results.json`.
        costs: costs of the explainers.
        answer: the answer in words, line by line.
    """
    heads, lines, note = table_cells(rows, costs)
    top = Markup("").join(Markup("<th>{}</th>").format(text) for text in heads)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(_cell(text, best) for text, best in line)) for line in lines
    )
    said = Markup("<br>").join(answer.splitlines())
    parts = Markup("<p>{}</p><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table><p>{}</p>")
    return str(parts.format(said, top, body, note))


def _cell(text: str, best: bool) -> Markup:
    return Markup("<td><b>{}</b></td>" if best else "<td>{}</td>").format(text)
