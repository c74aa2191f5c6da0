"""Read the answers of a study with people back: tables, a picture, and words."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from interp_models.core.errors import InputError
from interp_models.core.files import whole, write_json
from interp_models.userstudy.answers import (
    ANSWERS,
    PICTURE,
    RESULTS,
    answer_table,
    attentive,
    files_in,
    find_study,
)
from interp_models.userstudy.people import FACTORS, agreement, correlations, means, paired_differences

FEW = 6
"""Fewer participants can never be told apart: the smallest p of five is 0.06."""


def read_study(answers: Path, folders: Iterable[Path]) -> Path:
    """Read the answers in a folder, and write what they say beside the study: `people.json` (all numbers), `people.csv`
    (a row per answer) and `people.png` (means with intervals). Prints the tables.

    Participants who failed a check of attention do not count; they are named.

    Args:
        answers: folder with the files that participants saved.
        folders: folders in which the study may lie.

    Returns:
        The path of `people.json`.

    Raises:
        InputError: see `answers.find_study`; and if no participant is left.
    """
    folder, study, everyone = find_study(answers, folders)
    counted = [one for one in everyone if attentive(one, study)]
    excluded = [one.number for one in everyone if one not in counted]
    table = answer_table(counted, study)
    if table.empty:
        why = f"of {len(everyone)} participants, {len(excluded)} failed a check of attention"
        raise InputError(f"answers={answers}: nothing to read ({why})")
    places = {trial: place for place, trial in enumerate(study["trials"])}
    table = table.sort_values(["trial", "participant"], key=lambda own: own.map(places) if own.name == "trial" else own)
    of_plan = {one.number: len(study["plan"][(one.number - 1) % len(study["plan"])]) for one in counted}
    incomplete = {
        one.number: f"{len(one.given)} of {of_plan[one.number]}"
        for one in counted
        if len(one.given) < of_plan[one.number]
    }
    results = {
        "study": study["study"],
        "task": study["task"],
        "participants": [one.number for one in counted],
        "excluded": excluded,
        "incomplete": incomplete,
        "seconds_per_trial": float(table.drop_duplicates(["participant", "trial"])["seconds"].median()),
        "means": means(table),
        "baselines": study["baselines"],
        "differences": paired_differences(table, study["baselines"]),
        "agreement": agreement(table),
        "correlations": correlations(table, study),
    }
    write_json(folder / RESULTS, results)
    with whole(folder / ANSWERS) as partial:
        table.drop(columns=["unit", "code"]).to_csv(partial, index=False)
    with whole(folder / PICTURE) as partial:
        _figure(results["means"]).savefig(partial, format="png", dpi=150)
    if unread := files_in(answers)[1]:
        print(f"answers={answers}: not read, as they are no *.json: {', '.join(path.name for path in unread)}")
    print(in_words(results))
    print(f"people: {folder / RESULTS}")
    return folder / RESULTS


def in_words(results: Mapping[str, Any]) -> str:
    """The results as text: who counts, means, differences, agreement and correlations."""
    n = len(results["participants"])
    seconds = f"median {results['seconds_per_trial']:.1f} s per trial"
    lines = [f"{results['task']}: {n} participant{'s' * (n != 1)}, {seconds}"]
    if results["excluded"]:
        lines.append(f"left out, as they failed a check of attention: {_listed(results['excluded'])}")
    if results["incomplete"]:
        cells = [f"{number} ({text})" for number, text in results["incomplete"].items()]
        lines.append(f"not all trials answered: {', '.join(cells)}")
    rows = pd.DataFrame([{**_levels(row), **_numbers(row)} for row in results["means"]])
    factors = [factor for factor in FACTORS if factor in rows]
    rows = rows[["measure", *factors, *(name for name in rows if name not in ("measure", *factors))]]
    lines += ["", rows.fillna("").to_string(index=False)]
    for row in results["differences"]:
        verdict = "differs" if row["told_apart"] else "cannot be told apart"
        bounds = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(
            f"{row['measure']}: {row['level']} {verdict} from {row['baseline']} ({row['mean']:+.3f}{bounds}, "
            f"p = {row['p']:.3g}, {row['participants']} participants)"
        )
    if any(results["baselines"].values()) and not results["differences"]:
        lines.append("no participant saw both a condition and its baseline: differences cannot be computed")
    if n < FEW and results["differences"]:
        lines.append(f"with fewer than {FEW} participants nothing can be told apart")
    for row in results["agreement"]:
        if row["alpha"] is not None:
            lines.append(f"agreement on {row['measure']}: Krippendorff's α = {row['alpha']:.2f} ({row['level']})")
    known = [row for row in results["correlations"] if row["rho"] is not None]
    if known:
        table = [
            {
                "measure": row["measure"],
                "metric": row["metric"],
                "Spearman's ρ": f"{row['rho']:+.2f}" + _bounds(row),
                "images": row["images"],
            }
            for row in known
        ]
        lines += ["", "Do metrics rank the maps of an image as people do? (1: alike, 0: unrelated, -1: reversed)"]
        lines.append(pd.DataFrame(table).to_string(index=False))
    return "\n".join(lines)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _levels(row: Mapping[str, Any]) -> dict[str, str]:
    return {"measure": row["measure"], **{factor: row[factor] for factor in FACTORS if factor in row}}


def _numbers(row: Mapping[str, Any]) -> dict[str, str]:
    chance = "" if row["chance"] is None else f"{row['chance']:.2f}"
    return {
        "mean": f"{row['mean']:.3f}{_bounds(row)}",
        "by one answer": chance,
        "participants": str(row["participants"]),
        "answers": str(row["answers"]),
    }


def _bounds(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"


def _figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel per measure: the mean of every condition with its interval; a dashed line is chance."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    of_measure = [[row for row in rows if row["measure"] == measure] for measure in measures]
    heights = [len(own) + 1.5 for own in of_measure]
    figure = Figure((7, 0.34 * sum(heights) + 0.4 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, measure, own in zip(panels, measures, of_measure, strict=True):
        for place, row in enumerate(own):
            panel.plot(row["mean"], place, "o", color="#1f5fbf", markersize=5)
            if row["low"] is not None:
                panel.plot([row["low"], row["high"]], [place, place], color="#1f5fbf", linewidth=1.5)
        if own[0]["chance"] is not None:
            panel.axvline(own[0]["chance"], color="grey", linestyle="--", linewidth=1)
        names = [", ".join(f"{f} {row[f]}" if f == "scores" else row[f] for f in FACTORS if f in row) for row in own]
        panel.set_yticks(range(len(own)), names, parse_math=False)
        panel.set_ylim(len(own) - 0.5, -0.5)
        panel.set_title(measure, loc="left", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure
