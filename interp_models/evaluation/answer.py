"""The answer in words: which explainers can be told apart from the reference, by which metrics, and which cannot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from interp_models.evaluation.statistics import LEVEL
from interp_models.explainers.controls import is_control
from interp_models.metrics.base import owner_of
from interp_models.report.numbers import label

Rows = Sequence[Mapping[str, Any]]
FEW_CELLS = 25
"""A smaller grid has so few cells that curves and correlations are coarse."""
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

    run: str
    reference: str
    headline: str
    """The answer about faithfulness in one or two sentences."""
    groups: Sequence[str]
    """The other explainers against the reference: a line for each way in which the metrics agree."""
    notes: Sequence[str]
    """What has to be known beside it: metrics that see nothing here, controls that win, few images."""

    def __str__(self) -> str:
        """All lines, for a terminal."""
        groups = [f"All explainers against `{self.reference}`:", *(f"- {line}" for line in self.groups)]
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
    others = {each: own for each, own in pairs.items() if not is_control(names[each])}
    headline, groups = "No metric of faithfulness was computed.", []
    if of_faith:
        duel = rival is not None and names[reference] == OWN
        told = [each for each, verdicts in others.items() if verdicts["better"] or verdicts["worse"]]
        headline = _duel(own, f"`{rival}`", pairs[rival], n) if duel else _told(own, told, n)
        groups = _groups(others)
    return Answer(run, reference, headline, groups, _notes(rows, names, differences))


def _is_faithful(metric: str) -> bool:
    owner = owner_of(metric)
    return owner is None or owner.family == "faithfulness"


def _verdicts(differences: Rows, explainer: str) -> Verdicts:
    """The metrics by which an explainer is better or worse than the reference, and by which it is neither."""
    found: dict[Any, list[str]] = {"better": [], "worse": [], "unclear": [], "same": []}
    for one in differences:
        if one["explainer"] == explainer:
            found[one["verdict"]].append(label(one["metric"]))
    return found


def _duel(own: str, other: str, verdicts: Verdicts, n: int) -> str:
    """The reference against one other explainer. `verdicts` are those of the other."""
    better, worse, unclear = verdicts["worse"], verdicts["better"], verdicts["unclear"]
    images = f"On these {n} images"
    if verdicts["same"]:
        return f"{own[0].upper()}{own[1:]} and {other} are the same map."
    if not better and not worse:
        return f"{images}, no metric of faithfulness tells {own} from {other}."
    parts = [f"more faithful than {other} by {listed(better)}"] if better else []
    parts += (
        [f"less faithful {f'by {listed(worse)}' if better else f'than {other} by {listed(worse)}'}"] if worse else []
    )
    first = f"{images}, {own} is {' and '.join(parts)}."
    return f"{first} By {listed(unclear)} they cannot be told apart." if unclear else first


def _told(own: str, told: Sequence[str], n: int) -> str:
    """How many explainers some metric tells from the reference."""
    if not told:
        return f"On these {n} images, no metric of faithfulness tells an explainer from {own}."
    names = listed(f"`{name}`" for name in told)
    return f"On these {n} images, some metric of faithfulness tells {names} from {own}."


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
    }
    return [f"{text}: {listed(groups[kind], most=20)}." for kind, text in words.items() if kind in groups]


def _kind(verdicts: Verdicts) -> str:
    if verdicts["same"]:
        return "same"
    better, worse = bool(verdicts["better"]), bool(verdicts["worse"])
    return {(True, False): "more", (False, True): "less", (True, True): "both"}.get((better, worse), "unclear")


def _notes(rows: Rows, names: Mapping[str, str], differences: Rows) -> list[str]:
    """What limits the answer."""
    of_metric: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_metric.setdefault(row["metric"], []).append(row)
    control = next((row["control"] for row in rows if row["control"]), None)
    methods = [name for name in names if not is_control(names[name])]
    n, tests = max(row["n"] for row in rows), len(of_metric) * len(names) * (len(names) - 1) // 2
    notes = _of_number(n, tests)
    blind = [label(key) for key, own in of_metric.items() if not _sees(own, methods)]
    if control is not None and methods and blind and n >= LEAST:
        notes.append(f"By {listed(blind, most=20)} these {n} images tell no explainer from `{control}`.")
    won = [label(key) for key, own in of_metric.items() if _is_faithful(key) and _control_leads(own, names)]
    if won and n >= LEAST:
        notes.append(f"By {listed(won)} a control has the best mean: a good value does not show a good explanation.")
    if few := sorted({row["grid"] for row in rows if _cells(row["grid"]) < FEW_CELLS}):
        notes.append(f"The grid of {listed(few)} cells is small: curves have few steps.")
    if short := sorted({f"`{one['explainer']}`" for one in differences if one["n"] < n}):
        least = min(one["n"] for one in differences)
        notes.append(f"Not every value is defined for {listed(short)}: compared on common images, {least} at least.")
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


def _sees(rows: Rows, methods: Iterable[str]) -> bool:
    """Whether a metric tells an explainer that is no control from the control."""
    return any(row["p"] is not None and row["p"] < LEVEL for row in rows if row["explainer"] in methods)


def _control_leads(rows: Rows, names: Mapping[str, str]) -> bool:
    """Whether the best mean is that of a control alone."""
    means = {row["explainer"]: row["mean"] for row in rows if row["mean"] is not None}
    if not means:
        return False
    best = (max if rows[0]["higher_is_better"] else min)(means.values())
    return all(is_control(names[explainer]) for explainer, mean in means.items() if mean == best)


def _cells(grid: str) -> int:
    rows, columns = grid.split("x")
    return int(rows) * int(columns)


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """Names in a sentence, some of many.

    >>> listed(["DAUC", "DC", "IC"]), listed(["DAUC", "DC", "IC"], most=2)
    ('DAUC, DC and IC', 'DAUC and 2 others')
    """
    *first, last = names
    if len(first) >= most:
        first, last = first[: most - 1], f"{len(first) - most + 2} others"
    return f"{', '.join(first)} and {last}" if first else last
