"""Names of metrics and their values as text."""

import math
from collections.abc import Mapping
from typing import Any

from interp_models.metrics.base import owner_of


def label(metric: str) -> str:
    """The name of a metric in tables."""
    return metric if owner_of(metric) is None else metric.upper()


def in_percent(metric: str) -> bool:
    """Whether tables show a metric as percent."""
    owner = owner_of(metric)
    return owner is not None and owner.percent


def number(metric: str, value: float | None) -> str | None:
    """A mean or score as text: percent with one digit, or a decimal with three digits; None if it is undefined."""
    if in_percent(metric):
        return percent(value)
    return f"{value:z.3f}" if value is not None and math.isfinite(value) else None  # z: no minus sign before zero


def percent(fraction: float | None) -> str | None:
    """A fraction as percent with one digit; None if it is undefined."""
    return f"{100 * fraction:z.1f}" if fraction is not None and math.isfinite(fraction) else None


def is_best(row: Mapping[str, Any]) -> bool:
    """Whether the images tell this explainer from all others: it alone has the first rank."""
    return row.get("rank") == 1 and not row.get("tied")
