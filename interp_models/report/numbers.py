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


def cost(value: float | None) -> str:
    """Passes or seconds as text, with three digits if it is below 1000.

    >>> cost(0.01234), cost(1961.0), cost(None)
    ('0.0123', '1961', '–')
    """
    return "–" if value is None else f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def is_best(row: Mapping[str, Any]) -> bool:
    """Whether the images tell this explainer from all others, as the better one."""
    return bool(row.get("best"))


def as_text(value: Any) -> str:
    """A setting as text: 14×14 for a pair, and 196 for 196.0, as tables with empty cells hold floats."""
    if isinstance(value, (tuple, list)):
        return "×".join(map(as_text, value))
    return f"{value:g}" if isinstance(value, float) else f"{value}"
