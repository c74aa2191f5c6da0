"""Mean curves of deletion and insertion with their bands, as SVG."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray

from interp_models.report.numbers import label

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 520, 320, 44, 40, 30, 10
COLOURS = 10
"""Number of colours in the style; further explainers have dashed lines in the same colours."""
PATCHES = "share of the patches dropped"
AXES = {"iauc": "share of the image shown again", "patch_dauc": PATCHES, "patch_iauc": PATCHES}
Curve = NDArray[np.float32]


def mean_band(curve: Curve, used: NDArray[np.bool_]) -> tuple[NDArray[np.float64], ...]:
    """Fractions, mean, and the ends of the 95 % interval of the mean at each step (Student's t), each (T,).

    Args:
        curve: fractions and scores of every image, (N, 2, T).
        used: images that count, bool (N,).
    """
    from scipy import special  # type: ignore[import-untyped]  # slow to import, and only needed here

    scores = curve[used, 1].astype(np.float64)
    n, mean = len(scores), scores.mean(axis=0)
    half = np.zeros_like(mean) if n < 2 else special.stdtrit(n - 1, 0.975) * scores.std(axis=0, ddof=1) / np.sqrt(n)
    return curve[used][0, 0].astype(np.float64), mean, mean - half, mean + half


def common(curves: Mapping[str, Curve]) -> NDArray[np.bool_]:
    """The maps that have a curve of every explainer, bool (N,).

    Args:
        curves: curves (N, 2, T) by explainer.
    """
    found: NDArray[np.bool_] = np.all([np.isfinite(own[:, 1]).all(axis=1) for own in curves.values()], axis=0)
    return found


def chart(key: str, curves: Mapping[str, Curve], order: Sequence[str]) -> tuple[str, int]:
    """The mean curves of all explainers by one metric.

    Args:
        key: key of the metric.
        curves: curves (N, 2, T) by explainer.
        order: all explainers; the place says the colour.

    Returns:
        The SVG, and the number of maps with a curve of every explainer, which alone count; no chart without one.
    """
    used = common(curves)
    if not used.any():
        return "", 0
    bands = {name: mean_band(own, used) for name, own in curves.items()}
    top = max(1e-6, min(1.0, max(float(high.max()) for _, _, _, high in bands.values())))
    last = max(float(at.max()) for at, *_ in bands.values())

    def x(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return LEFT + (WIDTH - LEFT - RIGHT) * values / last

    def y(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * np.clip(values, 0, top) / top

    title = f"{label(key)}: mean score of the explained class over {int(used.sum())} maps"
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="14" class="name">{escape(label(key))}</text>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" class="axis"/>',
    ]
    for name, (at, mean, low, high) in bands.items():
        place = order.index(name)
        style = f"c{place % COLOURS}{' dashed' if place >= COLOURS else ''}"
        edge = [*zip(x(at), y(high), strict=True), *zip(x(at)[::-1], y(low)[::-1], strict=True)]
        parts.append(f'<g class="curve {style}" data-explainer="{escape(name)}"><title>{escape(name)}</title>')
        parts.append(f'<path class="band" d="{_path(edge)}Z"/>')
        parts.append(f'<path class="mean" d="{_path([*zip(x(at), y(mean), strict=True)])}"/></g>')
    for value in (0.0, top):
        place_of = float(y(np.array([value]))[0])
        parts.append(f'<text x="{LEFT - 6}" y="{place_of + 4:.1f}" class="row">{value:.2f}</text>')
    for value in (0.0, last):
        place_of = float(x(np.array([value]))[0])
        parts.append(f'<text x="{place_of:.1f}" y="{HEIGHT - BOTTOM + 16}" class="tick">{value:.0%}</text>')
    axis = AXES.get(key, "share of the image removed")
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" class="tick">{axis}</text></svg>')
    return "".join(parts), int(used.sum())


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
