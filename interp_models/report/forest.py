"""The forest plot: paired differences from the reference with their intervals, a panel per metric, as SVG."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from markupsafe import escape

from interp_models.report.numbers import in_percent, label, number

WIDTH, ROW, TOP, LEFT, RIGHT = 440, 20, 30, 170, 24
"""Sizes in pixels of a panel, of its rows, and of its margins."""
WORDS = {
    "better": "better than {reference}", "worse": "worse than {reference}", "unclear": "not told apart",
    "same": "the same map",
}  # fmt: skip


def panels(
    differences: Sequence[Mapping[str, Any]], higher_is_better: Mapping[str, bool], controls: Collection[str]
) -> dict[str, str]:
    """A panel per metric, as SVG by its key. In every panel, right is better than the reference.

    Args:
        differences: paired differences, see `evaluation.differences.Difference`, as in `results.json`.
        higher_is_better: direction of each metric.
        controls: labels of explainers that are controls.
    """
    by_metric: dict[str, list[Mapping[str, Any]]] = {}
    for one in differences:
        by_metric.setdefault(one["metric"], []).append(one)
    return {key: _panel(key, own, higher_is_better[key], controls) for key, own in by_metric.items()}


def sentence(one: Mapping[str, Any]) -> str:
    """A difference in words, with its numbers."""
    if one["n"] == 0:
        return f"{one['explainer']}: no common image"
    ends = "" if one["low"] is None else f" [{_signed(one, 'low')}, {_signed(one, 'high')}]"
    verdict = WORDS[one["verdict"]].format(reference=one["reference"])
    return f"{one['explainer']}: {_signed(one, 'mean')}{ends}, p = {one['p']:.2g}, n = {one['n']}; {verdict}"


def _signed(one: Mapping[str, Any], key: str) -> str:
    text = number(one["metric"], one[key]) or "–"
    return f"+{text}" if one[key] > 0 else text


def _panel(key: str, differences: Sequence[Mapping[str, Any]], higher: bool, controls: Collection[str]) -> str:
    known = [one for one in differences if one["mean"] is not None]
    ends = [one[end] for one in known for end in ("low", "mean", "high") if one[end] is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    spread = (high - low) or 1.0
    low, high = low - 0.05 * spread, high + 0.05 * spread
    width = WIDTH - LEFT - RIGHT

    def at(value: float) -> float:
        share = float((value - low) / (high - low))
        return LEFT + width * (share if higher else 1 - share)

    height = TOP + ROW * len(differences) + 22
    reference, zero = differences[0]["reference"], at(0.0)
    unit = "percentage points" if in_percent(key) else ""
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label(key))}: differences '
        f'from {escape(reference)}">',
        f'<text x="{LEFT}" y="14" class="name">{escape(label(key))}</text>',
        f'<text x="{WIDTH - RIGHT}" y="14" class="end">better than {escape(_cut(reference, 16))} →</text>',
        f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="{TOP - 8}" y2="{height - 20}" class="zero"/>',
    ]
    for place, one in enumerate(differences):
        y = TOP + ROW * place + ROW / 2
        name, control = escape(_cut(one["explainer"], 20)), one["explainer"] in controls
        parts.append(f'<g class="{one["verdict"]}"><title>{escape(sentence(one))}</title>')
        parts.append(f'<rect x="0" y="{y - ROW / 2}" width="{WIDTH}" height="{ROW}" class="hit"/>')
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" class="row{" control" if control else ""}">{name}</text>')
        if one["mean"] is not None:
            if one["low"] is not None:
                ends_at = sorted((at(one["low"]), at(one["high"])))
                parts.append(f'<line x1="{ends_at[0]:.1f}" x2="{ends_at[1]:.1f}" y1="{y}" y2="{y}" class="interval"/>')
            parts.append(f'<circle cx="{at(one["mean"]):.1f}" cy="{y}" r="4"/>')
        parts.append("</g>")
    parts += _ticks(key, low, high, at, height, unit)
    return "".join([*parts, "</svg>"])


def _ticks(key: str, low: float, high: float, at: Any, height: float, unit: str) -> list[str]:
    """The ends of the scale, and 0."""
    marks = [0.0] + [end for end in (low, high) if abs(at(end) - at(0.0)) > 40]
    texts = {value: number(key, value) or "0" for value in marks}
    found = [f'<text x="{at(value):.1f}" y="{height - 6}" class="tick">{text}</text>' for value, text in texts.items()]
    return [*found, f'<text x="4" y="{height - 6}" class="unit">{unit}</text>'] if unit else found


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
