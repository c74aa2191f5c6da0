"""What the answers of a study say: means with intervals, differences, agreement, and correlation with metrics."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from interp_models.evaluation.statistics import LEVEL, Floats, adjusted, interval, signed_rank

FACTORS = ("map", "scores")
"""Columns of the answers that a study can vary."""
LEVEL_OF = {"accuracy": "nominal", "preference": "nominal", "rating": "ordinal", "error": "interval"}
"""Level of measurement of the answers, for their agreement."""


def means(answers: pd.DataFrame) -> list[dict[str, Any]]:
    """The mean of every measure by condition, and by each factor if several are varied.

    A participant counts once: with the mean of their answers. The interval is that of the mean over participants, so it
    speaks of other participants and the same images (`statistics.interval`).
    """
    rows = []
    factors = [name for name in FACTORS if name in answers and answers[name].notna().any()]
    groupings = [factors] if len(factors) == 1 else [[factor] for factor in factors] + [factors]
    for grouping in groupings:
        for names, own in answers.groupby(["measure", "kind", *grouping], sort=False):
            measure, kind, *levels = names
            of_each = own.groupby("participant")["value"].mean().to_numpy(np.float64)
            low, high = interval(of_each)
            rows.append(
                {
                    "measure": measure,
                    "kind": kind,
                    **dict(zip(grouping, levels, strict=True)),
                    "mean": float(of_each.mean()),
                    "low": low,
                    "high": high,
                    "chance": None if own["chance"].isna().all() else float(own["chance"].mean()),
                    "participants": len(of_each),
                    "answers": len(own),
                }
            )
    return rows


def paired_differences(answers: pd.DataFrame, baselines: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """For each measure the mean difference of a condition from its baseline, over participants who saw both.

    p is that of Wilcoxon's signed-rank test over participants, adjusted over all rows (Benjamini-Hochberg).

    Args:
        answers: the answers, as `answers.answer_table` makes them.
        baselines: the baseline of each level of each factor.
    """
    rows: list[dict[str, Any]] = []
    for (measure, own), factor in itertools.product(answers.groupby("measure", sort=False), baselines):
        table = own.groupby(["participant", factor])["value"].mean().unstack()
        for level, baseline in baselines[factor].items():
            if not {level, baseline} <= set(table):
                continue
            away = (table[level] - table[baseline]).dropna().to_numpy(np.float64)
            if not len(away):
                continue
            low, high = interval(away)
            rows.append(
                {
                    "measure": measure, "factor": factor, "level": level, "baseline": baseline,
                    "mean": float(away.mean()), "low": low, "high": high, "participants": len(away),
                    "p": signed_rank(away),
                }
            )  # fmt: skip
    raw: list[float] = [row["p"] for row in rows]
    for row, p in zip(rows, adjusted(raw), strict=True):
        row |= {"p": p, "told_apart": bool(p < LEVEL)}
    return rows


def agreement(answers: pd.DataFrame) -> list[dict[str, Any]]:
    """Krippendorff's α of every measure: 1 is full agreement of participants who saw the same, 0 that of chance.

    Chance draws from all answers to the measure. For preferences it chooses each map equally often, because the maps
    of one pair are not those of the next, and α must not depend on which of them is called the first.
    """
    rows = []
    for (measure, kind), own in answers.groupby(["measure", "kind"], sort=False):
        coded = own.drop_duplicates(["participant", "trial", "question"])
        units = [one.to_numpy(np.float64) for _, one in coded.groupby("unit")["code"]]
        level = LEVEL_OF[str(kind)]
        if kind == "preference":
            alpha = beyond_even_chance(units, coded.groupby("unit")["chance"].first().to_numpy(np.float64))
        else:
            alpha = krippendorff(units, level)
        rows.append({"measure": measure, "level": level, "alpha": alpha})
    return rows


def beyond_even_chance(units: list[Floats], chances: Floats) -> float | None:
    """1 - observed / expected disagreement, if chance gives every value equally often (Bennett et al. 1954, S).

    Args:
        units: for each unit the values that it was given; units with fewer than two do not count.
        chances: for each unit 1 / (number of values that it can be given).

    Returns:
        The agreement; None if there are no two values of one unit.

    >>> beyond_even_chance([np.array([0.0, 0.0]), np.array([0.0, 1.0])], np.array([0.5, 0.5]))
    0.0
    """
    pairable = [(unit, chance) for unit, chance in zip(units, chances, strict=True) if len(unit) > 1]
    if not pairable:
        return None
    observed = sum(float((unit[:, None] != unit).sum()) / (len(unit) - 1) for unit, _ in pairable)
    return 1 - observed / sum(len(unit) * (1 - float(chance)) for unit, chance in pairable)


def krippendorff(units: list[Floats], level: str) -> float | None:
    """Krippendorff's α = 1 - observed / expected disagreement (Krippendorff 2011).

    Args:
        units: for each unit the values that it was given; units with fewer than two do not count.
        level: `nominal`, `ordinal` or `interval`; it decides how far two values are apart.

    Returns:
        α; None if there are no two values of one unit, or if all values are the same.

    >>> krippendorff([np.array([1.0, 1.0]), np.array([2.0, 2.0]), np.array([2.0])], "nominal")
    1.0
    """
    pairable = [unit for unit in units if len(unit) > 1]
    if not pairable:
        return None
    values, places = np.unique(np.concatenate(pairable), return_inverse=True)
    coincidences = np.zeros((len(values), len(values)))
    start = 0
    for unit in pairable:
        counts = np.bincount(places[start : start + len(unit)], minlength=len(values)).astype(float)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
        start += len(unit)
    totals = coincidences.sum(axis=0)
    if level == "ordinal":
        up_to = totals.cumsum() - totals / 2
        away = (up_to[:, None] - up_to[None, :]) ** 2
    elif level == "interval":
        away = (values[:, None] - values[None, :]) ** 2
    else:
        away = (values[:, None] != values[None, :]).astype(float)
    expected = float((np.outer(totals, totals) * away).sum() / (totals.sum() - 1))
    return None if expected == 0 else 1 - float((coincidences * away).sum()) / expected


def correlations(answers: pd.DataFrame, study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whether metrics rank the maps of an image as people do: Spearman's correlation within each image, then its mean.

    What people say of a map is the mean over participants. It and the metric are turned so that larger is better. An
    image counts if it has two maps that neither people nor the metric finds equal. The interval is that of the mean
    over images (`statistics.interval`). Tasks that are not about single images with judged maps have none.
    """
    rows: list[dict[str, Any]] = []
    for (measure, kind), own in answers.groupby(["measure", "kind"], sort=False) if study["judged_maps"] else ():
        people = own.groupby(["index", "map"])["value"].mean() * (-1 if kind == "error" else 1)
        for key, higher in study["higher_is_better"].items():
            found = []
            for index, of_image in people.groupby(level="index"):
                said = of_image.droplevel("index")
                values = {name: study["values"].get(name, {}).get(key, {}).get(str(index)) for name in said.index}
                known = [name for name, value in values.items() if value is not None]
                metric = np.array([values[name] for name in known], np.float64) * (1 if higher else -1)
                rho = spearman(said[known].to_numpy(np.float64), metric)
                found += [] if rho is None else [rho]
            of_images = np.array(found, np.float64)
            low, high = interval(of_images)
            mean = float(of_images.mean()) if found else None
            rows.append(
                {"measure": measure, "metric": key, "rho": mean, "low": low, "high": high, "images": len(found)}
            )
    return rows


def spearman(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation; None if one of both is constant."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]  # slow to import

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
