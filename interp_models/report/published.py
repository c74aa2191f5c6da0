"""Published numbers beside ours."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interp_models.core.errors import InputError, unknown
from interp_models.metrics.base import METRICS
from interp_models.report.numbers import in_percent, label
from interp_models.report.text import cell, markdown

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


@dataclass(frozen=True)
class Beside:
    """Published numbers beside ours, as text."""

    heads: Sequence[str]
    """Headings: explainer, then ours and published for each metric."""
    lines: Sequence[Sequence[str]]
    """The cells of each published row; a dash is what was not measured or not published."""
    source: str
    """Where the numbers were published."""

    def __str__(self) -> str:
        """As a table in Markdown."""
        return f"{markdown(self.heads, self.lines)}\n\npublished: {self.source}"


def beside(published: Published, results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> Beside:
    """For each published row and metric our mean with its interval, and the published number.

    Percentages are published as percent.

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
        line = [name]
        for key in keys:
            found = ours.get((name, key))
            line += ["–" if found is None else cell(found), f"{float(numbers[key]):g}" if key in numbers else "–"]
        lines.append(line)
    heads = [text for key in keys for text in (f"{label(key)}{' %' if in_percent(key) else ''}, ours", "published")]
    return Beside(["explainer", *heads], lines, published["source"])
