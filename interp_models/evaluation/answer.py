"""The answer in words: which explainers can be told apart from the reference, by which metrics, and which cannot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from interp_models.evaluation.statistics import LEVEL
from interp_models.explainers.controls import is_control
from interp_models.metrics.base import owner_of
from interp_models.report.numbers import label

Rows = Sequence[Mapping[str, Any]]
FEW_STEPS = 25
"""Curves with fewer steps are coarse, and so are correlations over their steps."""
FEW_IMAGES = 30
"""With fewer images, only differences that hold on nearly all of them can be told."""
LEAST = 6
"""With fewer images, no signed-rank test has a p-value below 0.05."""
OWN, RIVAL = "intrinsic", "gradcam"
"""Names of the model's own map, and of the explainer that it is measured against first."""
NAMED = 8
"""Most names in a sentence; the page shows all of them below."""
Verdicts = Mapping[Literal["better", "worse", "unclear", "same"], Sequence[str]]


@dataclass(frozen=True)
class Answer:
    """What an evaluation says of one run."""

    reference: str
    headline: str
    """The answer about faithfulness in one or two sentences."""
    groups: Sequence[str]
    """The other explainers against the reference: a line for each way in which the metrics agree."""
    notes: Sequence[str]
    """What has to be known beside it: metrics that see nothing here, controls that win, few images."""

    def __str__(self) -> str:
        """All lines, for a terminal."""
        groups = [f"Against `{self.reference}`:", *(f"- {line}" for line in self.groups)]
        return "\n".join([self.headline, *(groups if self.groups else []), *self.notes])


def answer(rows: Rows, differences: Rows) -> Answer | None:
    """The answer for one run; None if there is nothing to compare.

    Args:
        rows: means of the run, as in `results.json`.
        differences: its paired differences from the reference.
    """
    if not differences:
        return None
    names = {row["explainer"]: row["options"]["name"] for row in rows}
    reference = differences[0]["reference"]
    of_faith = [one for one in differences if _is_faithful(one["metric"])]
    pairs = {explainer: _verdicts(of_faith, explainer) for explainer in names if explainer != reference}
    run, n = rows[0]["run"], max((row["n"] for row in rows), default=0)
    own = f"{run}'s own map" if names[reference] == OWN else f"`{reference}`"
    rival = next((each for each, name in names.items() if name == RIVAL and each != reference), None)
    others = {each: verdicts for each, verdicts in pairs.items() if not is_control(names[each])} or pairs
    headline, groups = "No metric of faithfulness was computed.", []
    if of_faith:
        duel = rival is not None and names[reference] == OWN and any(pairs[rival].values())
        told = [each for each, verdicts in others.items() if verdicts["better"] or verdicts["worse"]]
        images = "this image" if n == 1 else f"these {n} images"
        headline = _duel(own, f"`{rival}`", pairs[rival], images) if duel else _told(own, told, images)
        groups = _groups(others)
    return Answer(reference, headline, groups, _notes(rows, names, differences))


def in_words(rows: Rows, differences: Rows) -> str:
    """All lines of `answer`; empty if there is nothing to compare."""
    said = answer(rows, differences)
    return "" if said is None else str(said)


def _is_faithful(metric: str) -> bool:
    owner = owner_of(metric)
    return owner is None or owner.family == "faithfulness"


def _verdicts(differences: Rows, explainer: str) -> Verdicts:
    """The metrics by which an explainer is better or worse than the reference, and by which it is neither."""
    found: dict[Any, list[str]] = {"better": [], "worse": [], "unclear": [], "same": []}
    for one in differences:
        if one["explainer"] == explainer and one["n"]:
            found[one["verdict"]].append(label(one["metric"]))
    return found


def _duel(own: str, other: str, verdicts: Verdicts, images: str) -> str:
    """The reference against one other explainer. `verdicts` are those of the other."""
    better, worse, unclear = verdicts["worse"], verdicts["better"], verdicts["unclear"]
    if verdicts["same"]:
        return f"On {images}, {own} and {other} are the same map."
    if not better and not worse:
        return f"On {images}, no metric of faithfulness tells {own} from {other}."
    parts = [f"more faithful than {other} by {listed(better)}"] if better else []
    parts += [f"less faithful {'' if better else f'than {other} '}by {listed(worse)}"] if worse else []
    first = f"On {images}, {own} is {' and '.join(parts)}."
    return f"{first} By {listed(unclear)} they cannot be told apart." if unclear else first


def _told(own: str, told: Sequence[str], images: str) -> str:
    """How many explainers some metric tells from the reference."""
    if not told:
        return f"On {images}, no metric of faithfulness tells an explainer from {own}."
    names = listed(f"`{name}`" for name in told)
    return f"On {images}, some metric of faithfulness tells {names} from {own}."


def _groups(others: Mapping[str, Verdicts]) -> list[str]:
    """All other explainers against the reference, by how the metrics agree."""
    groups: dict[str, list[str]] = {}
    for explainer, of_metric in others.items():
        groups.setdefault(_kind(of_metric), []).append(f"`{explainer}`")
    words = {
        "more": "More faithful by at least one metric, and less by none",
        "less": "Less faithful by at least one metric, and more by none",
        "both": "More faithful by some metrics, and less by others",
        "unclear": "Told apart by no metric",
        "same": "The same map",
        "unknown": "Without a common image",
    }
    return [f"{text}: {listed(groups[kind], most=20)}." for kind, text in words.items() if kind in groups]


def _kind(verdicts: Verdicts) -> str:
    if not any(verdicts.values()):
        return "unknown"
    if verdicts["same"]:
        return "same"
    better, worse = bool(verdicts["better"]), bool(verdicts["worse"])
    return {(True, False): "more", (False, True): "less", (True, True): "both"}.get((better, worse), "unclear")


def _notes(rows: Rows, names: Mapping[str, str], differences: Rows) -> list[str]:
    """What limits the answer."""
    of_metric: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_metric.setdefault(row["metric"], []).append(row)
    n, tests = max(row["n"] for row in rows), len(of_metric) * len(names) * (len(names) - 1) // 2
    notes = _of_number(n, tests)
    if n >= LEAST:
        notes += _of_controls(of_metric, names, n)
    short = {row["steps"] for row in rows if row["steps"] == _cells(row["grid"]) and row["steps"] < FEW_STEPS}
    if short:
        steps = listed(map(str, sorted(short)))
        notes.append(f"Curves have only {steps} steps, one for each cell of the maps.")
    if lacking := [f"`{name}`" for name in names if any(r["n_undefined"] for r in rows if r["explainer"] == name)]:
        least = min((one["n"] for one in differences), default=0)
        notes.append(f"Not every value is defined for {listed(lacking)}: compared on common images, {least} at least.")
    return notes


def _of_controls(of_metric: Mapping[str, Rows], names: Mapping[str, str], n: int) -> list[str]:
    """Metrics that tell no explainer from the control, and metrics of faithfulness that a control wins."""
    blind, won = [], []
    control = next((row["control"] for rows in of_metric.values() for row in rows if row["control"]), None)
    for key, rows in of_metric.items():
        known = [row for row in rows if row["mean"] is not None]
        tested = [row for row in known if not is_control(names[row["explainer"]]) and row["p"] is not None]
        if tested and not any(row["p"] < LEVEL for row in tested):
            blind.append(label(key))
        if tested and _is_faithful(key) and _control_leads(known, names):
            won.append(label(key))
    notes = [f"By {listed(blind, most=20)} these {n} images tell no explainer from `{control}`."] if blind else []
    if won:
        notes.append(f"By {listed(won)} a control has the best mean: a good value does not show a good explanation.")
    return notes


def _of_number(n: int, tests: int) -> list[str]:
    """What the number of images allows."""
    if n == 1:
        return ["One image says nothing about others."]
    smallest = f"{2 / 2**n:.2g}"
    if n < LEAST:
        return [
            f"{n} images cannot tell explainers apart: the test's smallest p-value is {smallest}. Judge more images."
        ]
    if n < FEW_IMAGES:
        return [
            f"{n} images are few: the test's smallest p-value is {smallest}, before the adjustment for {tests} tests. "
            "More images (`n_images`) tell more."
        ]
    return []


def _cells(grid: str) -> int:
    rows, columns = grid.split("x")
    return int(rows) * int(columns)


def _control_leads(rows: Rows, names: Mapping[str, str]) -> bool:
    """Whether the best mean is that of controls alone."""
    best = (max if rows[0]["higher_is_better"] else min)(row["mean"] for row in rows)
    return all(is_control(names[row["explainer"]]) for row in rows if row["mean"] == best)


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """Names in a sentence, some of many.

    >>> listed(["DAUC", "DC", "IC"]), listed(["DAUC", "DC", "IC"], most=2)
    ('DAUC, DC and IC', 'DAUC and 2 others')
    """
    *first, last = names
    if len(first) >= most:
        first, last = first[: most - 1], f"{len(first) - most + 2} others"
    return f"{', '.join(first)} and {last}" if first else last
