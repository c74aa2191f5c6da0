"""The plots of the page: positions of points and intervals, bands of curves, and correlations, by hand."""

import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from interp_models.report.agreement import of_maps, of_metrics, spearman
from interp_models.report.curves import chart, mean_band
from interp_models.report.forest import LEFT, RIGHT, WIDTH, panels, sentence


def difference(
    explainer: str, mean: float | None, low: float | None, high: float | None, **other: Any
) -> dict[str, Any]:
    base = {"metric": "dauc", "reference": "own", "n": 50, "p": 0.01, "superiority": 0.5, "verdict": "unclear"}
    return {"explainer": explainer, "mean": mean, "low": low, "high": high, **base, **other}


def numbers(svg: str, element: str, attribute: str) -> list[float]:
    return [float(found) for found in re.findall(rf'<{element} [^>]*?{attribute}="([-\d.]+)"', svg)]


EACH = [
    difference("a", -0.1, -0.2, 0.0, verdict="better"),
    difference("b", 0.2, 0.1, 0.3),
    difference("c", None, None, None, n=0),
]


@pytest.mark.parametrize("higher", [True, False])
def test_points_lie_where_their_numbers_are_and_right_is_better(higher: bool) -> None:
    (svg,) = panels(EACH, {"dauc": higher}, controls=["b"]).values()
    low, high = -0.2 - 0.05 * 0.5, 0.3 + 0.05 * 0.5

    def at(value: float) -> float:
        share = (value - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * (share if higher else 1 - share)

    zero, *intervals = zip(numbers(svg, "line", "x1"), numbers(svg, "line", "x2"), strict=True)
    assert zero == pytest.approx((at(0), at(0)), abs=0.1)
    assert numbers(svg, "circle", "cx") == pytest.approx([at(-0.1), at(0.2)], abs=0.1)
    assert intervals[0] == pytest.approx(sorted((at(-0.2), at(0.0))), abs=0.1)
    assert intervals[1] == pytest.approx(sorted((at(0.1), at(0.3))), abs=0.1)
    assert (numbers(svg, "circle", "cx")[0] > zero[0]) == (not higher)  # a lower DAUC is better
    assert re.findall(r'<g class="(\w+)">', svg) == ["better", "unclear", "unclear"]
    assert svg.count("row control") == 1


def test_the_words_of_a_point() -> None:
    one, other, none = map(sentence, EACH)
    assert one == "a: -0.100 [-0.200, 0.000], p = 0.01, n = 50; better than own"
    assert other == "b: +0.200 [+0.100, +0.300], p = 0.01, n = 50; not told apart"
    assert none == "c: no common image"
    in_percent = sentence(difference("a", 0.25, None, None, metric="ad", verdict="worse"))
    assert in_percent == "a: +25.0, p = 0.01, n = 50; worse than own"


def test_names_in_plots_are_escaped() -> None:
    nasty = '<b>"x"&'
    (svg,) = panels([difference(nasty, 0.1, 0.0, 0.2, reference=nasty)], {"dauc": True}, ()).values()
    drawn, _ = chart(nasty, {nasty: curves(3)}, [nasty])
    assert "<b>" not in svg + drawn
    assert 'data-explainer="&lt;b&gt;&#34;x&#34;&amp;"' in drawn


def curves(n: int, steps: int = 5) -> np.ndarray:
    scores = np.random.default_rng(n).random((n, steps))
    return np.stack([np.broadcast_to(np.linspace(0, 1, steps), scores.shape), scores], axis=1).astype(np.float32)


def test_the_band_is_the_interval_of_t_at_each_step() -> None:
    own = curves(7)
    used = np.array([True] * 6 + [False])
    at, mean, low, high = mean_band(own, used)
    scores = own[:6, 1].astype(float)
    np.testing.assert_allclose(at, np.linspace(0, 1, 5))
    expected = stats.t.interval(0.95, 5, scores.mean(axis=0), stats.sem(scores, axis=0))
    np.testing.assert_allclose([low, mean, high], [expected[0], scores.mean(axis=0), expected[1]])


def test_a_chart_is_of_the_common_images() -> None:
    first, second = curves(4), curves(4) / 2
    second[0, 1] = np.nan
    svg, n = chart("dauc", {"a": first, "b": second}, ["a", "x", "b"])
    assert n == 3
    assert re.findall(r'class="curve (\w+)" data-explainer="(\w)"', svg) == [("c0", "a"), ("c2", "b")]
    path = re.findall(r'<path class="mean" d="M([^"]+)"', svg)[0]
    heights = np.array([float(point.split()[1]) for point in path.split("L")])
    mean = first[1:, 1].mean(axis=0)
    top = max(mean_band(own, np.array([False, True, True, True]))[3].max() for own in (first, second))
    slope = np.polyfit(mean, heights, 1)
    np.testing.assert_allclose(np.polyval(slope, mean), heights, atol=0.1)  # heights are linear in the mean scores
    assert slope[0] == pytest.approx(-(320 - 40 - 30) / min(1.0, top), rel=0.01)
    assert chart("dauc", {"a": np.full_like(first, np.nan)}, ["a"]) == ("", 0)


def test_correlations_of_ranks_are_those_of_scipy() -> None:
    values = np.random.default_rng(0).integers(0, 5, (4, 30)).astype(float)
    np.testing.assert_allclose(spearman(values), stats.spearmanr(values, axis=1).statistic)
    values[1] = 3.0
    values[2, 0] = np.nan
    found = spearman(values)
    assert np.isnan(found[[1, 2]]).all()
    assert found[0, 3] == pytest.approx(stats.spearmanr(values[0], values[3]).statistic)


def test_maps_are_compared_on_the_coarsest_grid() -> None:
    coarse = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    fine = coarse.repeat(8, 0).repeat(8, 1)
    found = of_maps([coarse, fine, -fine])
    np.testing.assert_allclose(found, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-6)


def test_metrics_agree_if_they_rank_the_explainers_alike() -> None:
    values = {"dauc": {"a": 0.1, "b": 0.2, "c": 0.3, "d": None}, "iauc": {"a": 0.9, "b": 0.8, "c": 0.1, "d": 0.0}}
    found = of_metrics(values, {"dauc": False, "iauc": True})
    np.testing.assert_allclose(found, np.ones((2, 2)))
    assert np.isnan(of_metrics({key: {"a": 1.0, "b": math.pi} for key in values}, {"dauc": False, "iauc": True})).all()
