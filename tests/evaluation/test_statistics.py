"""Intervals, tests, effect sizes and ranks: by hand, against scipy, and on simulations."""

import itertools

import numpy as np
import pytest
from scipy import stats

from interp_models.evaluation.differences import differences
from interp_models.evaluation.statistics import (
    RESAMPLES,
    adjusted,
    compare,
    interval,
    mean_ranks,
    paired_tests,
    signed_rank,
    superiority,
    tied_ranks,
)


def bca_of_scipy(values):
    """scipy's BCa interval, whose quantiles are those of z, at the level that makes them those of t."""
    n = len(values)
    z = np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)
    found = stats.bootstrap((values,), np.mean, confidence_level=2 * stats.norm.cdf(z) - 1, n_resamples=40000,
                            method="BCa", rng=np.random.default_rng(1))  # fmt: skip
    return found.confidence_interval


@pytest.mark.parametrize("seed", range(4))
def test_interval_is_that_of_scipy_with_the_quantiles_of_t(seed):
    values = np.random.default_rng(seed).exponential(size=25 + 10 * seed)
    low, high = bca_of_scipy(values)
    width = high - low
    assert interval(values) == pytest.approx((low, high), abs=0.05 * width)  # 2000 samples against 40000


DISTRIBUTIONS = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
    "two ends": (lambda rng, n: rng.beta(0.5, 0.5, n), 0.5),
    "skewed": (lambda rng, n: rng.beta(1, 5, n), 1 / 6),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [20, 60])
def test_intervals_cover_the_mean_in_93_to_97_of_100_trials(name, n):
    draw, mean = DISTRIBUTIONS[name]
    rng, hits, trials = np.random.default_rng(5), 0, 1000
    for _ in range(trials):
        low, high = interval(draw(rng, n))
        hits += low <= mean <= high
    assert 0.93 <= hits / trials <= 0.97


def test_intervals_of_few_and_of_equal_values():
    assert interval(np.array([0.3])) == (None, None)
    assert interval(np.array([0.3, 0.3, 0.3])) == (None, None)
    low, high = interval(np.array([0.0, 1.0]))
    assert 0 <= low < high <= 1
    values = np.random.default_rng(0).random(50)
    assert interval(values) == interval(values)  # the draws are fixed
    assert interval(values)[0] == pytest.approx(interval(values - 1)[0] + 1)
    assert RESAMPLES >= 1000


@pytest.mark.parametrize("n", [1, 4, 9, 25, 31, 80])
def test_signed_rank_equals_scipy(n):
    d = np.random.default_rng(n).normal(0.3, 1, n)
    method = "exact" if n <= 30 else "asymptotic"
    assert signed_rank(d) == pytest.approx(stats.wilcoxon(d, method=method, correction=False).pvalue, abs=1e-9)


def test_signed_rank_with_ties_counts_all_signs():
    """By definition: of all choices of signs, those whose sum is at least as far from 0."""
    d = np.array([1.0, 1.0, -1.0, 2.0, 3.0, 0.0, 3.0, 5.0])
    ranks = stats.rankdata(np.abs(d[d != 0]))
    own = abs((np.sign(d[d != 0]) * ranks).sum())
    sums = [abs((np.array(signs) * ranks).sum()) for signs in itertools.product((-1, 1), repeat=len(ranks))]
    assert signed_rank(d) == pytest.approx(np.mean(np.array(sums) >= own - 1e-9))
    many = np.random.default_rng(0).integers(-3, 5, 90).astype(float)
    expected = stats.wilcoxon(many, method="asymptotic", correction=False).pvalue
    assert signed_rank(many) == pytest.approx(expected, rel=1e-6)
    assert signed_rank(np.zeros(5)) == 1


def test_adjusted_is_benjamini_hochberg():
    p = np.random.default_rng(0).random(30) ** 3
    np.testing.assert_allclose(adjusted(p.tolist()), stats.false_discovery_control(p))
    assert adjusted([]) == []


def test_false_discoveries_stay_below_5_percent():
    """Explainers that do not differ from the control, a third that do: of what is told apart, at most 5 % is wrong."""
    rng, shares, power = np.random.default_rng(3), [], []
    for _ in range(60):
        p, real = [], []
        for explainer in range(30):
            differs = explainer % 3 == 0
            p.append(signed_rank(rng.normal(0.6 if differs else 0.0, 1, 40)))
            real.append(differs)
        told = np.array(adjusted(p)) < 0.05
        shares.append((told & ~np.array(real)).sum() / max(told.sum(), 1))
        power.append(told[np.array(real)].mean())
    assert np.mean(shares) < 0.05
    assert np.mean(power) > 0.5  # the test is not only silent


def test_superiority():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 5.0, 1.0])
    assert superiority(a, b, higher_is_better=True) == 2 / 4 + 1 / 8
    assert superiority(a, b, higher_is_better=False) == 1 / 4 + 1 / 8


def test_ranks_are_shared_by_those_that_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    base = rng.random(40)
    values = {
        "good": base + 1, "as good": base + 1 + 0.001 * rng.normal(size=40), "middle": base + 0.5, "bad": base - 1,
        "same": base - 1,
    }  # fmt: skip
    assert ranks(values, True) == {
        "good": (1, True), "as good": (1, True), "middle": (3, False), "bad": (4, True), "same": (4, True),
    }  # fmt: skip
    assert ranks(values, False)["bad"] == (1, True)
    assert ranks({"one": base}, True) == {"one": (1, False)}
    assert ranks({"a": base, "b": np.full(40, np.nan)}, True) == {}


def ranks(values, higher_is_better):
    tests = paired_tests({label: {"m": own} for label, own in values.items()})
    return tied_ranks("m", values, tests, higher_is_better=higher_is_better)


def test_ranks_are_of_common_images():
    a = np.array([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    b = np.array([np.nan, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6])
    assert ranks({"a": a, "b": b}, True) == {"b": (1, False), "a": (2, False)}


def test_mean_ranks():
    medians = {"x": {"a": 0.1, "b": 0.2, "c": 0.2}, "y": {"a": 5.0, "b": 1.0, "c": 0.0}, "z": {"a": 1.0}}
    found = mean_ranks(medians, {"x": False, "y": True, "z": True})
    assert found == {"a": (1, 0), "b": (2.25, 0.25), "c": (2.75, 0.25)}


def test_comparison_of_a_table():
    rng = np.random.default_rng(0)
    values = {
        "random": {"ad": rng.random(30), "dauc": rng.random(30)},
        "good": {"ad": rng.random(30) - 0.7, "dauc": rng.random(30)},
    }
    values["good"]["dauc"][:3] = np.nan
    rows = [
        {"explainer": label, "metric": key, "higher_is_better": False} for label in values for key in ("ad", "dauc")
    ]
    found = compare(rows, values, paired_tests(values), "random")
    by = {(row["explainer"], row["metric"]): row for row in rows}
    assert [by["random", key]["p"] for key in ("ad", "dauc")] == [None, None]
    p = [signed_rank((values["good"][key] - values["random"][key])[3 * (key == "dauc") :]) for key in ("ad", "dauc")]
    assert [by["good", key]["p"] for key in ("ad", "dauc")] == pytest.approx(adjusted(p))
    assert by["good", "ad"]["p"] < 1e-4 < 0.05 < by["good", "dauc"]["p"]
    assert by["good", "ad"]["superiority"] == (values["good"]["ad"] < values["random"]["ad"]).mean()
    assert (by["good", "ad"]["rank"], by["random", "ad"]["rank"], by["good", "ad"]["tied"]) == (1, 2, False)
    assert by["good", "dauc"]["rank"] == by["random", "dauc"]["rank"] == 1
    assert by["good", "dauc"]["tied"]
    assert set(found) == {"random", "good"}
    assert compare([dict(row) for row in rows], values, paired_tests(values), "good")["good"] == found["good"]
    for row in rows:
        row.pop("control")
    compare(rows, values, paired_tests(values), "good")
    assert {row["control"] for row in rows} == {None, "good"}


def test_one_adjustment_over_all_pairs_and_metrics():
    rng = np.random.default_rng(3)
    values = {name: {key: rng.random(12) for key in ("ad", "dauc")} for name in "abc"}
    values["a"]["ad"][:2] = np.nan
    found = paired_tests(values)
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    raw = {}
    for key in ("ad", "dauc"):
        for first, second in pairs:
            away = values[first][key] - values[second][key]
            raw[key, frozenset((first, second))] = stats.wilcoxon(away[~np.isnan(away)], method="exact").pvalue
    assert set(found.p) == set(raw)
    np.testing.assert_allclose([found.p[each] for each in raw], stats.false_discovery_control(list(raw.values())))


def test_ranks_control_and_differences_cannot_contradict_each_other():
    """The explainer of rank 1 alone is told from the second one by every statement, or by none."""
    rng = np.random.default_rng(0)
    for trial in range(40):
        values = {name: {"ad": rng.normal(shift, 1, 10), "dc": rng.normal(0, 1, 10)}
                  for name, shift in zip("abcd", (0, 0, 0.5, 1.5), strict=True)}  # fmt: skip
        tests = paired_tests(values)
        rows = [{"explainer": a, "metric": key, "higher_is_better": True} for a in values for key in ("ad", "dc")]
        compare(rows, values, tests, "a")
        away = {(d.explainer, d.metric): d for d in differences(values, tests, "a", {"ad": True, "dc": True})}
        rank = {(row["explainer"], row["metric"]): row["rank"] for row in rows}
        for row in rows:
            if row["explainer"] != "a":
                assert row["p"] == away[row["explainer"], row["metric"]].p, trial
                told = {1: "better", -1: "worse", 0: "unclear"}[tests.told(row["metric"], row["explainer"], "a")]
                assert away[row["explainer"], row["metric"]].verdict == told
            if row["best"]:
                others = [one for one in values if one != row["explainer"]]
                assert all(tests.told(row["metric"], row["explainer"], one) == 1 for one in others)
            if row["rank"] == 1 and rank["a", row["metric"]] > 1 and not row["tied"]:
                assert row["p"] < 0.05


def named(**values):
    return {label: {"m": np.asarray(own, float)} for label, own in values.items()}


def rows_of(values, higher_is_better=True, same=()):
    rows = [{"explainer": label, "metric": "m", "higher_is_better": higher_is_better} for label in values]
    compare(rows, values, paired_tests(values, same), None)
    return {row["explainer"]: row for row in rows}


def test_best_is_told_from_every_other_explainer():
    """The second one is told from the first, and a noisy third one, with a lower mean, is not."""
    rng = np.random.default_rng(0)
    base = rng.random(40)
    noisy = rng.normal(0, 1, 40)
    values = named(first=base, second=base - 0.01, third=base + noisy - noisy.mean() - 0.02)
    found = rows_of(values)
    assert (found["first"]["rank"], found["first"]["tied"], found["second"]["rank"]) == (1, False, 2)
    assert not found["first"]["best"]
    del values["third"]
    assert rows_of(values)["first"]["best"]
    assert not rows_of(values)["second"]["best"]
    assert rows_of(values, higher_is_better=False)["second"]["best"]
    assert not rows_of(named(alone=base))["alone"]["best"]


def test_ranks_say_nothing_where_a_few_images_decide_the_mean():
    values = named(a=[0.5] * 36 + [5.0] * 4, b=[0.6] * 40)
    tests = paired_tests(values)
    assert tests.p["m", frozenset("ab")] < 0.05
    assert tests.told("m", "a", "b") == 0
    found = rows_of(values)
    assert [found[name]["rank"] for name in "ab"] == [1, 1]
    assert not found["a"]["best"]


def test_the_same_maps_are_not_told_apart_by_rounding():
    rng = np.random.default_rng(0)
    base = rng.random(40)
    values = named(a=base, b=base + 1e-9, c=base - rng.random(40))
    assert paired_tests(values).told("m", "b", "a") == 1
    tests = paired_tests(values, [["a", "b"]])
    assert tests.told("m", "b", "a") == 0
    assert tests.p["m", frozenset("ab")] == 1
    assert tests.told("m", "a", "c") == 1
    assert tests.p["m", frozenset("ac")] == pytest.approx(signed_rank(base - values["c"]["m"]), rel=1e-6)
    found = rows_of(values, same=[["a", "b"]])
    assert [found[name]["rank"] for name in "abc"] == [1, 1, 3]
