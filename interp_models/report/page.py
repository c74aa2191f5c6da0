"""The report: one self-contained HTML page that compares runs and their explanations in tables and pictures.

The page loads nothing: its style is inline, and its pictures are data: URIs. Scores are passed as fractions. They are
shown as percent (drops, increases, gains) or as decimals (curves and correlations).
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from interp_models.core.files import whole
from interp_models.metrics.base import owner_of
from interp_models.report import visual
from interp_models.report.numbers import in_percent, label, number, percent
from interp_models.report.views import ImageView, PrototypeView, RunSummary

SIDE = 224  # maximum side of every picture in pixels; it keeps the page small


def write_report(
    path: Path,
    *,
    title: str,
    runs: Sequence[RunSummary],
    rows: Sequence[Mapping[str, Any]],
    images: Iterable[ImageView],
    prototypes: Sequence[PrototypeView] = (),
    left_out: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> None:
    """Write the page. The file is written whole or not at all: an error leaves an older file unchanged.

    Args:
        path: the file.
        title: title of the page.
        runs: the judged models.
        rows: means, one per run, explainer and metric, with the keys run, explainer, metric, mean, std, n,
            n_undefined, preset, grid, steps, fill, target, scorer and higher_is_better. `mean` and `std` are fractions;
            None and NaN mean undefined. Each preset gets a table; runs, explainers and metrics keep their order.
        images: images with maps. They are written one by one, so an iterator need not hold them all.
        prototypes: the prototypes of runs that have some.
        left_out: for each run, explainers and metrics that do not apply and the reasons.

    Raises:
        ValueError: for two rows with the same preset, run, explainer and metric, and for arrays of a wrong shape.
        OSError: if the page cannot be written.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    here = files("interp_models.report")
    template = environment.from_string(here.joinpath("page.html.j2").read_text("utf-8"))
    directions: dict[str, bool] = {row["metric"]: bool(row["higher_is_better"]) for row in rows}
    page = template.generate(
        title=title,
        style=Markup(here.joinpath("page.css").read_text("utf-8")),
        runs=[(run, percent(run.accuracy), percent(run.accuracy_judged)) for run in runs],
        tables=_tables(rows),
        left_out={run: why for run, why in left_out.items() if why},
        legend=[_heading(metric, directions) | {"text": _legend(metric)} for metric in directions],
        scales=[[to_hex(matplotlib.colormaps[name](i / 8)) for i in range(9)] for name in (visual.CMAP, visual.SIGNED)],
        prototypes=[_prototypes(view) for view in prototypes],
        images=(_image(view, runs, directions) for view in images),
    )
    # The name of an image may not be valid UTF-8; this must not stop the page.
    with whole(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(page)


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    presets: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        presets.setdefault(_as_text(row["preset"]), []).append(row)
    return [_table(preset, group) for preset, group in presets.items()]


def _table(preset: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of one preset: lines by run and explainer, with a cell for each metric."""
    runs: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        line = runs.setdefault(row["run"], {}).setdefault(row["explainer"], {})
        if row["metric"] in line:
            where = f"run {row['run']!r}, explainer {row['explainer']!r}, metric {row['metric']!r}"
            raise ValueError(f"two rows for preset {preset!r}, {where}")
        line[row["metric"]] = row
    directions: dict[str, bool] = {row["metric"]: bool(row["higher_is_better"]) for row in rows}
    bodies = []
    for run, lines in runs.items():
        best = {metric: _best(metric, lines.values(), up) for metric, up in directions.items()}
        body = [
            {
                "explainer": explainer,
                "cells": [_cell(metric, line.get(metric), best[metric]) for metric in directions],
                "n": _span(row["n"] for row in line.values()),
            }
            for explainer, line in lines.items()
        ]
        bodies.append({"run": run, "lines": body})
    headings = [_heading(metric, directions) for metric in directions]
    return {"preset": preset, "headings": headings, "bodies": bodies, "protocols": _protocols(rows)}


def _cell(metric: str, row: Mapping[str, Any] | None, best: str | None) -> dict[str, Any]:
    if row is None:
        return {"mean": None, "why": "not computed", "std": None, "undefined": 0, "best": False}
    mean = number(metric, row["mean"])
    return {
        "mean": mean,
        "why": "undefined for every image",
        "std": None if mean is None else number(metric, row["std"]),
        "undefined": row["n_undefined"],
        "best": mean is not None and mean == best,
    }


def _best(metric: str, lines: Iterable[Mapping[str, Mapping[str, Any]]], higher: bool) -> str | None:
    """The best mean of a metric, rounded as shown, so that means which look equal are all marked."""
    shown = [number(metric, line[metric]["mean"]) for line in lines if metric in line]
    return (max if higher else min)((text for text in shown if text is not None), key=float, default=None)


def _protocols(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The protocols of the scores; if there are several, each with its runs and metrics."""
    covered: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        settings = tuple(
            f"{name} {_as_text(row[name])}" for name in ("grid", "steps", "fill", "target", "scorer") if _set(row[name])
        )
        metrics = covered.setdefault(settings, {}).setdefault(row["run"], [])
        if row["metric"] not in metrics:
            metrics.append(row["metric"])
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for settings, by_run in covered.items():
        for run, metrics in by_run.items():
            groups.setdefault((settings, tuple(metrics)), []).append(run)
    return [
        {
            "scope": "" if len(groups) == 1 else f"{', '.join(runs)} ({', '.join(map(label, metrics))})",
            "settings": " · ".join((f"preset {_as_text(rows[0]['preset'])}", *settings)),
        }
        for (settings, metrics), runs in groups.items()
    ]


UNKNOWN = "?"
"""Label of an image whose class is unknown."""


def _image(view: ImageView, summaries: Sequence[RunSummary], directions: Mapping[str, bool]) -> dict[str, Any]:
    """The data of one image for the template, with its pictures encoded.

    A prediction is right or wrong only if the label is known, and is one of the model's classes. Of several labels, it
    is right if it is one of them; for an image without a label, it is neither.
    """
    unknown = view.label == UNKNOWN if view.labels is None else not view.labels
    names = [run.name for run in summaries]
    without_labels = {run.name for run in summaries if run.accuracy_judged is None}
    first = visual.shrunk(view.image, SIDE)
    present = [*view.predictions, *(shown.run for shown in view.maps), *view.parts]
    runs = []
    for run in sorted(dict.fromkeys(present), key=lambda run: names.index(run) if run in names else len(names)):
        image = visual.shrunk(view.own[run], SIDE) if run in view.own else first
        maps = [shown for shown in view.maps if shown.run == run]
        metrics = list(dict.fromkeys(metric for shown in maps for metric in shown.scores))
        pictures = [{"name": shown.explainer, **_drawn(image, shown.heatmap)} for shown in maps]
        if run in view.parts:
            several = _drawn(image, view.parts[run])
            pictures.append({"name": "attention maps", **several, "remark": several["remark"] or "red, green, blue"})
        for panel in view.reasons.get(run, ()):
            uri = visual.jpeg_uri(visual.shrunk(panel.picture, SIDE))
            pictures.append({"name": f"{panel.kind} {panel.number}", "uri": uri, "remark": panel.remark})
        predicted, probability = view.predictions.get(run, (None, None))
        runs.append(
            {
                "name": run,
                "predicted": predicted,
                "probability": percent(probability),
                "right": None if run in without_labels or unknown or predicted is None else view.is_right(predicted),
                "pictures": pictures,
                "total": view.totals.get(run, ""),
                "headings": [_heading(metric, directions) for metric in metrics],
                "scores": [(shown.explainer, [_score(metric, shown.scores) for metric in metrics]) for shown in maps],
            }
        )
    return {
        "id": view.image_id,
        "label": view.label,
        "several": view.labels is not None,
        "explained": view.explained,
        "uri": visual.jpeg_uri(first),
        "runs": runs,
    }


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


def _score(metric: str, scores: Mapping[str, float | None]) -> tuple[str | None, str]:
    return number(metric, scores.get(metric)), "undefined for this image" if metric in scores else "not computed"


def _drawn(image: NDArray[np.uint8], maps: NDArray[np.floating]) -> dict[str, str]:
    picture, remark = visual.drawn(image, maps)
    return {"uri": visual.jpeg_uri(picture), "remark": remark}


def _heading(metric: str, directions: Mapping[str, bool]) -> dict[str, Any]:
    return {"label": label(metric), "percent": in_percent(metric), "higher": directions.get(metric)}


def _legend(metric: str) -> str:
    owner = owner_of(metric)
    return "" if owner is None else owner.legend[metric]


def _span(counts: Iterable[int]) -> str:
    distinct = sorted(set(counts))
    return f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]}–{distinct[-1]}"


def _set(value: Any) -> bool:
    return value is not None and value == value  # an empty cell of a table may be NaN, which differs from itself


def _as_text(value: Any) -> str:
    """A setting as text: 14×14 for a pair, and 196 for 196.0, as tables with empty cells hold floats."""
    if isinstance(value, (tuple, list)):
        return "×".join(map(_as_text, value))
    return f"{value:g}" if isinstance(value, float) else f"{value}"
