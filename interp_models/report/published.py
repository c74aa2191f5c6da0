"""Published numbers beside ours."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from interp_models.core.errors import InputError, unknown
from interp_models.metrics.base import METRICS
from interp_models.report.numbers import in_percent, label, number

Published = Mapping[str, Any]
"""`source`, and `explainers`: the published number of each metric by explainer, or by MODEL/EXPLAINER."""


def check_published(published: Published) -> None:
    """Raise `InputError` unless published numbers have a source, and are numbers of known metrics.

    >>> check_published({"source": "a paper", "explainers": {"gradcam": {"ad": 12.2}}})
    """
    if not published:
        return
    if set(published) != {"source", "explainers"}:
        raise InputError(f"published must have `source` and `explainers`; got {', '.join(published)}")
    if not isinstance(published["explainers"], Mapping) or not published["explainers"]:
        raise InputError(f"published.explainers must hold numbers by explainer; got {published['explainers']!r}")
    every = {key for name in METRICS.names() for key in METRICS.get(name).keys}
    for explainer, numbers in published["explainers"].items():
        if not isinstance(numbers, Mapping):
            raise InputError(f"published.explainers.{explainer} must hold a number by metric; got {numbers!r}")
        for key, value in numbers.items():
            if key not in every:
                raise unknown("metric", key, every)
            try:
                finite = math.isfinite(float(value))
            except (TypeError, ValueError):
                finite = False
            if not finite:
                raise InputError(f"published.explainers.{explainer}.{key} must be a number; got {value!r}")


def beside(published: Published, results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> str:
    """A table in Markdown: for each published row and metric our mean with its interval, and the published number.

    Percentages are published as percent. A dash is what was not measured or not published.

    Args:
        published: the published numbers.
        results: rows of `results.json` by name and kind of model. A published name without a model is that of the first
            model.
    """
    (first, _), *_ = results
    ours: dict[tuple[str, str], Mapping[str, Any]] = {}
    for (run, kind), rows in results.items():
        for row in rows:
            for name in (f"{kind}/{row['explainer']}", *([row["explainer"]] if run == first else [])):
                ours.setdefault((name, row["metric"]), row)
    measured = [row["metric"] for rows in results.values() for row in rows]
    known = {key for numbers in published["explainers"].values() for key in numbers}
    keys = [key for key in dict.fromkeys([*measured, *sorted(known)]) if key in known]
    lines = []
    for name, numbers in published["explainers"].items():
        line = {"explainer": name}
        for key in keys:
            unit = " %" if in_percent(key) else ""
            found = ours.get((name, key))
            line[f"{label(key)}{unit}, ours"] = "–" if found is None else _cell(found)
            line["published" + " " * keys.index(key)] = f"{float(numbers[key]):g}" if key in numbers else "–"
        lines.append(line)
    heads = list(lines[0])
    table = [f"| {' | '.join(head.strip() for head in heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    table += [f"| {' | '.join(line.values())} |" for line in lines]
    return "\n".join([*table, "", f"published: {published['source']}"])


def _cell(row: Mapping[str, Any]) -> str:
    mean = number(row["metric"], row["mean"])
    low, high = number(row["metric"], row.get("low")), number(row["metric"], row.get("high"))
    return "–" if mean is None else mean if low is None else f"{mean} [{low}, {high}]"
