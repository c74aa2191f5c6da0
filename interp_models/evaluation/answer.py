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
"""With fewer images, small differences stay unseen."""
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
    notes: Sequence[str]
    """What has to be known beside it: metrics that see nothing here, controls that win, few images."""


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
    said = []
    if not of_faith:
        said.append("No metric of faithfulness was computed.")
    elif names[reference] == OWN and rival is not None:
        said.append(_duel(own, f"`{rival}`", pairs[rival], n))
    others = {e: v for e, v in pairs.items() if not is_control(names[e]) and (e != rival or names[reference] != OWN)}
    if of_faith and others:
        said.append(_summary(own, others, n))
    return Answer(run, reference, " ".join(said), _notes(rows, names, differences))


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
    """The reference against one other explainer. `verdicts` are the other's."""
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


def _summary(own: str, others: Mapping[str, Verdicts], n: int) -> str:
    """All other explainers against the reference, by how the metrics agree."""
    groups: dict[str, list[str]] = {}
    for explainer, of_metric in others.items():
        groups.setdefault(_kind(of_metric), []).append(f"`{explainer}`")
    words = {
        "more": "more faithful by at least one metric and less by none",
        "less": "less faithful by at least one metric and more by none",
        "both": "more faithful by some metrics and less by others",
        "unclear": "told apart by no metric",
        "same": "the same map",
    }
    parts = [f"{text}: {listed(groups[kind])}" for kind, text in words.items() if kind in groups]
    return f"Against {own}: {'; '.join(parts)}."


def _kind(verdicts: Verdicts) -> str:
    if verdicts["same"]:
        return "same"
    better, worse = bool(verdicts["better"]), bool(verdicts["worse"])
    return {(True, False): "more", (False, True): "less", (True, True): "both"}.get((better, worse), "unclear")


def _notes(rows: Rows, names: Mapping[str, str], differences: Rows) -> list[str]:
    """What limits the answer."""
    notes = []
    of_metric: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of_metric.setdefault(row["metric"], []).append(row)
    control = next((row["control"] for row in rows if row["control"]), None)
    methods = [name for name in names if not is_control(names[name])]
    if control is not None and methods:
        blind = [key for key, own in of_metric.items() if not _sees(own, methods)]
        if blind:
            notes.append(f"By {listed(map(label, blind))} no explainer can be told from `{control}`.")
    won = [label(key) for key, own in of_metric.items() if _is_faithful(key) and _control_leads(own, names)]
    if won:
        notes.append(f"By {listed(won)} a control has the best mean: a good value does not show a good explanation.")
    if (n := max(row["n"] for row in rows)) < FEW_IMAGES:
        notes.append(f"{n} images are few: smaller differences cannot be seen. More images tell more (`n_images`).")
    if few := sorted({row["grid"] for row in rows if _cells(row["grid"]) < FEW_CELLS}):
        notes.append(f"The grid of {listed(few)} cells is small: curves have few steps.")
    if short := sorted({f"`{one['explainer']}`" for one in differences if one["n"] < n}):
        least = min(one["n"] for one in differences)
        notes.append(f"Not every value is defined for {listed(short)}: compared on common images, {least} at least.")
    return notes


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
