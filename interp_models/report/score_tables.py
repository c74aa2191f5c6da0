"""The tables of scores: their cells, headings and protocols, for the template of the page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from interp_models.metrics.base import owner_of
from interp_models.report.numbers import as_text, cost, in_percent, is_best, label, number
from interp_models.report.views import RunResults

FAMILIES = ("faithfulness", "localisation", "form")


def score_tables(results: Sequence[RunResults]) -> list[dict[str, Any]]:
    """A table for each preset, with the lines of every run.

    Raises:
        ValueError: for two rows with the same preset, run, explainer and metric.
    """
    presets: dict[str, list[tuple[RunResults, Mapping[str, Any]]]] = {}
    for one in results:
        for row in one.rows:
            presets.setdefault(as_text(row["preset"]), []).append((one, row))
    return [_table(preset, group) for preset, group in presets.items()]


def _table(preset: str, rows: Sequence[tuple[RunResults, Mapping[str, Any]]]) -> dict[str, Any]:
    """The table of one preset: lines by run and explainer, with a cell for each metric, grouped by family."""
    runs: dict[str, tuple[RunResults, dict[str, dict[str, Mapping[str, Any]]]]] = {}
    for one, row in rows:
        line = runs.setdefault(row["run"], (one, {}))[1].setdefault(row["explainer"], {})
        if row["metric"] in line:
            where = f"run {row['run']!r}, explainer {row['explainer']!r}, metric {row['metric']!r}"
            raise ValueError(f"two rows for preset {preset!r}, {where}")
        line[row["metric"]] = row
    directions: dict[str, bool] = {row["metric"]: bool(row["higher_is_better"]) for _, row in rows}
    keys = sorted(directions, key=lambda key: FAMILIES.index(_family(key)))
    headings = [heading(metric, directions) for metric in keys]
    groups = [(family, len(own)) for family in FAMILIES if (own := [h for h in headings if h["family"] == family])]
    bodies = []
    for run, (one, lines) in runs.items():
        body = [_line(one, explainer, line, keys) for explainer, line in lines.items()]
        bodies.append({"run": run, "lines": body})
    return {
        "preset": preset,
        "headings": headings,
        "groups": groups,
        "bodies": bodies,
        "protocols": _protocols([row for _, row in rows]),
    }


def _line(
    one: RunResults, explainer: str, line: Mapping[str, Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, Any]:
    costs, ranks = one.costs.get(explainer, {}), one.mean_ranks.get(explainer)
    return {
        "explainer": explainer,
        "control": explainer in one.controls,
        "cells": [_cell(key, line.get(key)) for key in keys],
        "n": _span(row["n"] for row in line.values()),
        "mean_rank": None if ranks is None else f"{ranks[0]:.1f} ± {ranks[1]:.1f}",
        "rank_value": None if ranks is None else ranks[0],
        "costs": [(costs.get(key), cost(costs.get(key))) for key in ("passes", "seconds")],
    }


def _cell(metric: str, row: Mapping[str, Any] | None) -> dict[str, Any]:
    if row is None:
        return {"mean": None, "why": "not computed", "low": None, "undefined": 0, "best": False, "value": None}
    mean, rank = number(metric, row["mean"]), row.get("rank")
    return {
        "mean": mean,
        "value": None if mean is None else row["mean"],
        "why": "undefined for every image",
        "low": None if mean is None else number(metric, row.get("low")),
        "high": number(metric, row.get("high")),
        "undefined": row["n_undefined"],
        "rank": None if rank is None else f"{rank}{'=' if row.get('tied') else ''}",
        "best": is_best(row),
    }


def _protocols(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The protocols of the scores; if there are several, each with its runs and metrics."""
    covered: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        settings = tuple(
            f"{name} {as_text(row[name])}" for name in ("grid", "steps", "fill", "target", "scorer") if _set(row[name])
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
            "settings": " · ".join((f"preset {as_text(rows[0]['preset'])}", *settings)),
        }
        for (settings, metrics), runs in groups.items()
    ]


def heading(metric: str, directions: Mapping[str, bool]) -> dict[str, Any]:
    """What a heading of a metric needs."""
    return {
        "key": metric,
        "label": label(metric),
        "percent": in_percent(metric),
        "higher": directions.get(metric),
        "family": _family(metric),
        "text": _legend(metric),
    }


def _family(metric: str) -> str:
    owner = owner_of(metric)
    return "faithfulness" if owner is None else owner.family


def _legend(metric: str) -> str:
    """What a metric means, in one sentence; empty if it is not registered."""
    owner = owner_of(metric)
    return "" if owner is None else owner.legend[metric]


def _span(counts: Iterable[int]) -> str:
    distinct = sorted(set(counts))
    return f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]}–{distinct[-1]}"


def _set(value: Any) -> bool:
    return value is not None and value == value  # an empty cell of a table may be NaN, which differs from itself
