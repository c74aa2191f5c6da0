"""The report: one self-contained HTML page that says which explanations can be told apart, and shows them.

The page loads nothing: its style and script are inline, and its pictures are data: URIs. Scores are passed as
fractions. They are shown as percent (drops, increases, gains) or as decimals (curves and correlations).
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex

from interp_models.core.files import whole
from interp_models.report import visual
from interp_models.report.agreement import of_metrics
from interp_models.report.curves import chart
from interp_models.report.forest import panels, sentence
from interp_models.report.numbers import in_percent, label, percent
from interp_models.report.pictures import data_of
from interp_models.report.published import Beside
from interp_models.report.score_tables import heading, score_tables
from interp_models.report.text import Costs, csv_table, latex_table, markdown_table
from interp_models.report.views import ImageView, PrototypeView, RunResults, RunSummary

OPEN = 8
"""So many panels of the forest plot are open; the others are behind a summary."""
SIGNS = {"better": "▲", "worse": "▼", "unclear": "·", "same": "="}


def write_report(
    path: Path,
    *,
    title: str,
    runs: Sequence[RunSummary],
    results: Sequence[RunResults],
    images: Iterable[ImageView],
    prototypes: Sequence[PrototypeView] = (),
    published: Beside | None = None,
) -> None:
    """Write the page. The file is written whole or not at all: an error leaves an older file unchanged.

    Args:
        path: the file.
        title: title of the page.
        runs: the judged models.
        results: what was measured of each of them. Each preset gets a table; runs, explainers and metrics keep their
            order. In rows, `mean` and `std` are fractions; None and NaN mean undefined.
        images: images with maps. They are written one by one, so an iterator need not hold them all.
        prototypes: the prototypes of runs that have some.
        published: published numbers beside those of the runs.

    Raises:
        ValueError: for two rows with the same preset, run, explainer and metric, and for arrays of a wrong shape.
        OSError: if the page cannot be written.
    """
    here = files("interp_models.report")
    template = environment().from_string(here.joinpath("page.html.j2").read_text("utf-8"))
    rows = [row for one in results for row in one.rows]
    directions: dict[str, bool] = {row["metric"]: bool(row["higher_is_better"]) for row in rows}
    page = template.generate(
        title=title,
        style=Markup(here.joinpath("page.css").read_text("utf-8")),
        code=Markup(here.joinpath("page.js").read_text("utf-8")),
        runs=[(run, percent(run.accuracy), percent(run.accuracy_judged)) for run in runs],
        answers=[_answer(one, directions) for one in results if one.differences],
        tables=score_tables(results),
        exports=[_export(one) for one in results if one.rows],
        charts=[found for one in results if (found := _charts(one))["charts"]],
        matrices=[found for one in results if (found := _matrix(one, directions))["keys"]],
        published=published,
        left_out={one.run: one.left_out for one in results if one.left_out},
        legend=[heading(metric, directions) for metric in directions],
        scales=[[to_hex(matplotlib.colormaps[name](i / 8)) for i in range(9)] for name in (visual.CMAP, visual.SIGNED)],
        prototypes=[_prototypes(view) for view in prototypes],
        shared=_shared(directions, results),
        images=(data_of(view, runs, directions) for view in images),
    )
    # The name of an image may not be valid UTF-8; this must not stop the page.
    with whole(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(page)


def environment() -> jinja2.Environment:
    """The environment of the templates of pages."""
    found = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"script": _for_script, "attribute": json.dumps}
    return found


def _for_script(value: Any) -> Markup:
    """A value as JSON inside a script element, which `</` would end and `<!--` would confuse."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _shared(directions: Mapping[str, bool], results: Sequence[RunResults]) -> dict[str, Any]:
    """What the script needs once: metrics, explainers and colours."""
    colours = {}
    for name in (visual.CMAP, visual.SIGNED):
        table = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
        colours[name] = base64.b64encode(np.ascontiguousarray(table).tobytes()).decode()
    metrics = [
        {"key": key, "label": label(key), "percent": in_percent(key), "higher": higher}
        for key, higher in directions.items()
    ]
    explainers = list(dict.fromkeys(row["explainer"] for one in results for row in one.rows))
    return {"metrics": metrics, "explainers": explainers, "colours": colours}


def _answer(one: RunResults, directions: Mapping[str, bool]) -> dict[str, Any]:
    """The answer of one run: its sentences, the verdicts by explainer and metric, and the forest plot."""
    keys = list(dict.fromkeys(difference["metric"] for difference in one.differences))
    verdicts: dict[str, dict[str, Mapping[str, Any]]] = {}
    for difference in one.differences:
        verdicts.setdefault(difference["explainer"], {})[difference["metric"]] = difference
    drawn = panels(one.differences, directions, one.controls)
    svgs = [Markup(svg) for svg in drawn.values()]
    return {
        "run": one.run,
        "reference": one.differences[0]["reference"],
        "headline": _with_code(one.headline),
        "groups": [_with_code(line) for line in one.groups],
        "notes": [_with_code(note) for note in one.notes],
        "headings": [heading(key, directions) for key in keys],
        "lines": [
            {
                "explainer": explainer,
                "control": explainer in one.controls,
                "cells": [_verdict(of_metric.get(key)) for key in keys],
            }
            for explainer, of_metric in verdicts.items()
        ],
        "panels": svgs[:OPEN],
        "more": svgs[OPEN:],
        "numbers": [_sentence(difference) for difference in one.differences],
    }


def _sentence(difference: Mapping[str, Any]) -> str:
    """A difference with its metric in words."""
    return f"{label(difference['metric'])}, {sentence(difference)}"


def _verdict(difference: Mapping[str, Any] | None) -> dict[str, str]:
    if difference is None:
        return {"sign": "", "verdict": "none", "words": "not computed"}
    verdict = difference["verdict"]
    return {"sign": SIGNS[verdict], "verdict": verdict, "words": _sentence(difference)}


def _with_code(text: str) -> Markup:
    """Text with names in backticks as code."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


def _export(one: RunResults) -> dict[str, Any]:
    """The table of one run as files to save: name and text by format."""
    costs: Costs = one.costs
    texts = {
        "CSV": ("csv", csv_table(one.rows, costs)),
        "Markdown": ("md", markdown_table(one.rows, costs)),
        "LaTeX with intervals": ("intervals.tex", latex_table(one.rows, costs)),
        "LaTeX with ± std": ("std.tex", latex_table(one.rows, costs, deviations=True)),
    }
    return {"run": one.run, "files": [{"name": name, "ending": e, "text": t} for name, (e, t) in texts.items()]}


def _charts(one: RunResults) -> dict[str, Any]:
    """The mean curves of one run, a chart per metric, and the explainers that are shown at first."""
    order = list(one.curves)
    keys = list(dict.fromkeys(key for own in one.curves.values() for key in own))
    found = []
    for key in keys:
        svg, n = chart(key, {name: own[key] for name, own in one.curves.items() if key in own}, order)
        if n:
            found.append(Markup(svg))
    ranked = sorted(one.mean_ranks, key=lambda name: one.mean_ranks[name][0])
    reference = one.differences[0]["reference"] if one.differences else None
    first = [name for name in dict.fromkeys([reference, *one.controls, *ranked, *order]) if name in order][:5]
    return {"run": one.run, "charts": found, "explainers": order, "shown": first}


def _matrix(one: RunResults, directions: Mapping[str, bool]) -> dict[str, Any]:
    """How alike metrics rank the explainers: Spearman's correlation of their means, without controls."""
    means: dict[str, dict[str, float | None]] = {}
    for row in one.rows:
        if row["explainer"] not in one.controls:
            means.setdefault(row["metric"], {})[row["explainer"]] = row["mean"]
    means = {key: own for key, own in means.items() if any(mean is not None for mean in own.values())}
    found = of_metrics(means, directions)
    known = [place for place in range(len(means)) if np.isfinite(found[place, place])]
    keys = [list(means)[place] for place in known]
    cells = [[_tinted(float(found[i, j])) for j in known] for i in known]
    return {"run": one.run, "keys": [label(key) for key in keys] if len(keys) > 1 else [], "cells": cells}


def _tinted(value: float) -> dict[str, str]:
    """A correlation as text, with the strength of its tint."""
    return {"text": f"{value:z.2f}", "side": "for" if value >= 0 else "against", "tint": f"{abs(value) * 60:.0f}%"}


def _prototypes(view: PrototypeView) -> dict[str, Any]:
    """The data of the prototypes of one run for the template; fractions are in percent with one digit."""
    cells = [
        {
            "label": row["metric"],
            "percent": row["percent"],
            "higher": row["higher_is_better"],
            "mean": percent(row["mean"]) if row["percent"] else row["mean"] and f"{row['mean']:.3f}",
            "n": row["n"],
            "text": row["legend"],
        }
        for row in view.rows
    ]
    nearest = [(number, visual.jpeg_uri(visual.shrunk(row, 960))) for number, row in view.nearest.items()]
    return {"run": view.run, "cells": cells, "nearest": nearest, "tree": Markup(view.tree)}
