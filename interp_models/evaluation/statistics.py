"""Statistics of tables: intervals of means, paired tests, effect sizes and ranks.

All functions are pure: the same values give the same numbers, whatever the number of processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Values = Mapping[str, Mapping[str, Floats]]
"""Values per image (n,) by explainer and metric, NaN where undefined."""
RESAMPLES = 2000
"""Bootstrap samples of an interval."""
LEVEL = 0.05
"""Differences with a smaller adjusted p are told apart; intervals cover 1 - LEVEL."""
EXACT = 30
"""Up to so many differences, p-values of the signed-rank test are exact."""
DEFAULT_CONTROL = "random"
"""Name of the explainer that the others are tested against if no other is named."""
AT_ONCE = 4_000_000
"""Most numbers of a bootstrap that are in memory at once."""


def interval(values: Floats) -> tuple[float | None, float | None]:
    """The 95 % bootstrap interval of the mean over images: bias-corrected and accelerated (BCa; Efron 1987).

    For few images the quantiles are those of Student's t distribution, √(n / (n - 1)) t instead of z (Hesterberg, The
    American Statistician 2015, section 3.4.1): a plain bootstrap interval is too narrow for them. Fewer than two
    images and equal values have no interval, (None, None), because resampling them says nothing of other images.

    Args:
        values: one value per image (n,), all defined.

    >>> [round(end, 2) for end in interval(np.array([1.0, 2.0, 3.0, 6.0]))]
    [1.25, 6.0]
    """
    from scipy import special  # type: ignore[import-untyped]  # slow to import, and only needed here

    n = len(values)
    if n < 2 or values.min() == values.max():
        return None, None
    mean = float(values.mean())
    means = np.sort(_bootstrap_means(values))
    below = (np.searchsorted(means, mean, "left") + np.searchsorted(means, mean, "right")) / 2
    bias = special.ndtri(np.clip(below / len(means), 0.5 / len(means), 1 - 0.5 / len(means)))
    away = values - mean  # n - 1 times what the mean loses without each image
    skew = float((away**3).sum() / (6 * (away**2).sum() ** 1.5))
    z = np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, 1 - LEVEL / 2) * np.array([-1, 1])
    levels = special.ndtr(bias + (bias + z) / (1 - skew * (bias + z)))
    low, high = np.quantile(means, np.clip(levels, 0, 1))
    return float(low), float(high)


def _bootstrap_means(values: Floats) -> Floats:
    """Means of `RESAMPLES` bootstrap samples, drawn with a fixed seed."""
    n = len(values)
    rng, some = np.random.default_rng(0), max(1, AT_ONCE // n)
    found = []
    for first in range(0, RESAMPLES, some):
        drawn = rng.integers(0, n, (min(some, RESAMPLES - first), n))
        found.append(values[drawn].mean(axis=1))
    return np.concatenate(found)


def signed_rank(differences: Floats) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test of paired differences (n,).

    Zeros are left out. Equal sizes share their mean rank. Up to 30 differences p is exact, the share of the 2^n choices
    of signs with a sum of ranks as far from its mean; otherwise it is that of a normal distribution with the variance
    Σ rank² / 4. Without a difference p is 1.

    >>> signed_rank(np.array([1.0, 2.0, 3.0, 4.0]))  # of 16 choices of signs, two are as extreme
    0.125
    """
    from scipy import special, stats

    nonzero = differences[differences != 0]
    if not len(nonzero):
        return 1.0
    ranks = stats.rankdata(np.abs(nonzero))
    total, away = ranks.sum(), abs(2 * ranks[nonzero > 0].sum() - ranks.sum())  # twice the distance from the mean
    if len(nonzero) > EXACT:
        return float(2 * special.ndtr(-away / np.sqrt((ranks**2).sum())))
    chances = _sums_of_signs(tuple(np.round(2 * ranks).astype(int).tolist()))
    sums = np.arange(len(chances)) / 2  # of the positive ranks
    return float(min(1.0, chances[np.abs(2 * sums - total) >= away - 1e-9].sum()))


@lru_cache(maxsize=256)
def _sums_of_signs(ranks: tuple[int, ...]) -> Floats:
    """The chance of every sum of those ranks whose sign is positive, if signs are drawn by coins."""
    chances = np.zeros(sum(ranks) + 1)
    chances[0] = 1.0
    for rank in ranks:
        moved = np.roll(chances, rank)  # what rolls over the end is 0
        chances = (chances + moved) / 2
    return chances


def adjusted(p: Sequence[float]) -> list[float]:
    """p-values adjusted by Benjamini and Hochberg (1995): rejecting those below a level keeps the expected share of
    false rejections below it.

    >>> adjusted([0.01, 0.04, 0.03])
    [0.03, 0.04, 0.04]
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values)[::-1]
    scaled = values[order] * len(values) / np.arange(len(values), 0, -1)
    found = np.empty_like(scaled)
    found[order] = np.minimum(1, np.minimum.accumulate(scaled))
    return [float(value) for value in found]


def paired(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Paired values (n,), of the images where both are defined."""
    both = ~(np.isnan(a) | np.isnan(b))
    return a[both], b[both]


def superiority(a: Floats, b: Floats, *, higher_is_better: bool) -> float:
    """The common-language effect size of paired values: the share of images where a is better than b; ties count half
    (McGraw and Wong 1992, of pairs).

    >>> superiority(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 4.0]), higher_is_better=True)
    0.5
    """
    better = a > b if higher_is_better else a < b
    return float(better.mean() + (a == b).mean() / 2)


@dataclass(frozen=True)
class PairedTests:
    """Signed-rank tests of all pairs of explainers by all metrics. Every statement of an evaluation reads these, so no
    two of them contradict each other."""

    p: Mapping[tuple[str, frozenset[str]], float]
    """Adjusted p-value by metric and pair; a pair without a common image has none."""
    signs: Mapping[tuple[str, str, str], int]
    """By metric, explainer and other: 1 or -1, the sign of the mean difference, if the signed ranks have the same sign;
    else 0: then a few images decide the mean, and nothing is said."""

    def told(self, metric: str, explainer: str, other: str) -> int:
        """1 if the explainer's values are higher than the other's, -1 if lower, 0 if the images do not tell."""
        p = self.p.get((metric, frozenset((explainer, other))), 1.0)
        return self.signs[metric, explainer, other] if p < LEVEL else 0


def paired_tests(values: Values, same: Sequence[Sequence[str]] = ()) -> PairedTests:
    """Test every pair of explainers by every metric, on the images where both are defined: the signed-rank test,
    adjusted over all pairs and metrics by Benjamini and Hochberg.

    Args:
        values: values per image by explainer and metric.
        same: groups of explainers with the same maps. Their values differ by rounding, so their p is 1, and they do not
            count for the adjustment.
    """
    names, raw = list(values), {}
    signs: dict[tuple[str, str, str], int] = {}
    equal = {frozenset((a, b)) for group in same for a in group for b in group if a != b}
    for place, first in enumerate(names):
        for key, own in values[first].items():
            for second in names[place + 1 :]:
                ours, other = paired(own, values[second][key])
                away = ours - other
                if frozenset((first, second)) not in equal and len(away):
                    raw[key, frozenset((first, second))] = signed_rank(away)
                    sign = _sign(away)
                    signs |= {(key, first, second): sign, (key, second, first): -sign}
    p = dict(zip(raw, adjusted(list(raw.values())), strict=True))
    keys = dict.fromkeys(key for of_metric in values.values() for key in of_metric)
    return PairedTests({**p, **{(key, pair): 1.0 for key in keys for pair in equal}}, signs)


def _sign(away: Floats) -> int:
    """The sign of the mean of differences (n,), if their signed ranks have the same sign; else 0."""
    from scipy import stats

    nonzero = away[away != 0]
    ranks = float((stats.rankdata(np.abs(nonzero)) * np.sign(nonzero)).sum())
    return int(np.sign(ranks)) if ranks * away.mean() > 0 else 0


def tied_ranks(
    key: str, values: Mapping[str, Floats], tests: PairedTests, *, higher_is_better: bool
) -> dict[str, tuple[int, bool]]:
    """Rank of each explainer by its mean over common images, and whether it shares the rank.

    The best one begins the first group. The next one, by its mean, joins the group unless a test tells it from the one
    that began it; then it begins the next group. All of a group have the same rank: 1 more than the number of
    explainers in the groups before.

    Args:
        key: the metric.
        values: paired values (n,) by explainer, NaN where undefined. Images that are undefined for one do not count for
            the mean.
        tests: the tests, see `paired_tests`.
        higher_is_better: the metric's direction.

    Returns:
        Rank, from 1 on, and whether others have the same one, by explainer. Without a common image nobody has a rank.
    """
    table = np.stack(list(values.values()))
    table = table[:, ~np.isnan(table).any(axis=0)]
    if not table.shape[1]:
        return {}
    names = list(values)
    means = table.mean(axis=1)
    groups: list[list[str]] = []
    for place in np.argsort(-means if higher_is_better else means, kind="stable").tolist():
        name = names[place]
        if groups and not tests.told(key, groups[-1][0], name):
            groups[-1].append(name)
        else:
            groups.append([name])
    found: dict[str, tuple[int, bool]] = {}
    before = 1
    for group in groups:
        found |= {name: (before, len(group) > 1) for name in group}
        before += len(group)
    return found


def mean_ranks(
    medians: Mapping[str, Mapping[str, float]], higher_is_better: Mapping[str, bool]
) -> dict[str, tuple[float, float]]:
    """LATEC's summary: the mean and the standard deviation of each explainer's rank over metrics (Klein et al. 2024).

    Args:
        medians: for each metric, the median over images by explainer. Metrics that lack an explainer are left out.
        higher_is_better: direction by metric.

    Returns:
        Mean rank (1 is best; equal medians share their mean rank) and standard deviation (divisor n), by explainer.
    """
    from scipy import stats

    names = list(dict.fromkeys(name for of_metric in medians.values() for name in of_metric))
    rows = []
    for metric, of_metric in medians.items():
        own = np.array([of_metric.get(name, np.nan) for name in names])
        if not np.isnan(own).any():
            rows.append(stats.rankdata(-own if higher_is_better[metric] else own))
    if not rows:
        return {}
    ranks = np.stack(rows)
    means, stds = ranks.mean(axis=0), ranks.std(axis=0)
    return {name: (float(mean), float(std)) for name, mean, std in zip(names, means, stds, strict=True)}


def compare(
    rows: Sequence[dict[str, Any]], values: Values, tests: PairedTests, control: str | None
) -> dict[str, tuple[float, float]]:
    """Compare explainers on the same images; every row gets the results.

    - `rank`, `tied`: see `tied_ranks`; None if no image has a value of all explainers.
    - `best`: whether the tests tell the explainer from every other one, as the better one.
    - `control`: the explainer that the others are tested against, or None.
    - `p`: p-value of the test against the control, see `paired_tests`. None for the control itself.
    - `superiority`: the share of the images where both are defined on which the explainer is better than the control.

    Args:
        rows: rows of the explainers and metrics.
        values: values per image by explainer and metric.
        tests: the tests of all pairs.
        control: label of the control; None, or a label that is not there, for none.

    Returns:
        Mean and standard deviation of each explainer's rank over metrics.
    """
    other = None if control is None else values.get(control)
    better = {row["metric"]: row["higher_is_better"] for row in rows}
    ranks = {
        key: tied_ranks(key, {label: own[key] for label, own in values.items()}, tests, higher_is_better=higher)
        for key, higher in better.items()
    }
    for row in rows:
        label, key = row["explainer"], row["metric"]
        rank, tied = ranks[key].get(label, (None, None))
        sign, others = 1 if better[key] else -1, [one for one in values if one != label]
        best = bool(others) and all(tests.told(key, label, one) == sign for one in others)
        row |= {"rank": rank, "tied": tied, "best": best, "control": None, "p": None, "superiority": None}
        if control is None or other is None or label == control:
            continue
        ours, theirs = paired(values[label][key], other[key])
        row["control"] = control
        if len(ours):
            row["p"] = tests.p[key, frozenset((label, control))]
            row["superiority"] = superiority(ours, theirs, higher_is_better=better[key])
    medians: dict[str, dict[str, float]] = {}
    for label, of_metric in values.items():
        for key, own in of_metric.items():
            if not np.isnan(own).all():
                medians.setdefault(key, {})[label] = float(np.nanmedian(own))
    return mean_ranks(medians, better)
