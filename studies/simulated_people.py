"""Do studies with people find what is there? Simulated participants with known habits fill in the pages in Chromium.

python -m studies.simulated_people RUN/evaluation/studies/simulation [...] [--best gradcam] [--participants 12]

Participants do better with the map `best` than with any other, or rate and prefer it (`chances`). They click through
the page of each study, save their files, and the files are read back. Beside what was found stands the true value of
this habit, and how many of `--repeats` further studies, answered without a browser, hold it in their 95 % intervals.
Needs Chromium and its driver (apt-get install chromium chromium-driver).
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.harness import STUDIES, plain_parser, write
from interp_models.report.text import markdown
from interp_models.userstudy.answers import HIGHEST, Participant, answer_table
from interp_models.userstudy.people import means
from interp_models.userstudy.reading import read_study
from tests.drive_page import Session, browser

Chances = NDArray[np.float64]

BEGIN = """
const done = arguments[0], agree = document.querySelector('#agree');
if (agree) agree.click();
const begin = () => {  // a form that is not yet drawn ignores clicks
  document.querySelector('#start button').click();
  if (document.querySelector('#start').hidden) done(); else setTimeout(begin, 20);
};
begin();
"""
ANSWER = """
const given = arguments[0], trial = document.querySelector('#trial');
if (trial.hidden) return 'no trial';
for (const [key, value] of Object.entries(given)) {
  const number = trial.querySelector(`input[type=number][name=${key}]`);
  if (number) number.value = value; else trial.querySelector(`input[name=${key}][value="${value}"]`).click();
}
const before = document.querySelector('#progress').textContent;
trial.querySelector('button').click();
return before;
"""


def chances(question: Mapping[str, Any], facts: Mapping[str, Any], best: str) -> Chances:
    """How often a participant gives each answer to a question: its options, or the numbers from 0 to 100.

    With the best map, 90 % of the answers are right, else 60 %; ratings are about 80 % of the scale, else 40 %; numbers
    are near the truth (a standard deviation of 5, else 20); the best map is preferred to others in 85 %.
    """
    count = len(question["options"]) or HIGHEST + 1
    places = np.arange(count)
    if "stands_for" in question:
        names = question["stands_for"]
        if best not in names:
            return np.full(count, 1 / count)
        return np.where([name == best for name in names], 0.85, 0.15 / (count - 1))
    good = facts["condition"]["map"] == best
    if "truth" not in question:
        weights = np.exp(-(((places - (0.8 if good else 0.4) * (count - 1)) / (0.2 * count)) ** 2))
    elif question["options"]:
        return np.where(places == question["truth"], 0.9 if good else 0.6, (0.1 if good else 0.4) / (count - 1))
    else:
        weights = np.exp(-(((places - question["truth"]) / (5 if good else 20)) ** 2) / 2)
    shares: Chances = weights / weights.sum()
    return shares


def answers_to(study: Mapping[str, Any], trial: str, best: str, draw: np.random.Generator) -> dict[str, int]:
    """The answers of a participant to a trial; checks of attention are answered as asked."""
    if trial in study["checks"]:
        return dict(study["checks"][trial])
    facts = study["trials"][trial]
    of_each = {key: chances(question, facts, best) for key, question in facts["questions"].items()}
    return {key: int(draw.choice(len(own), p=own)) for key, own in of_each.items()}


def fill_in(session: Session, page: Path, study: Mapping[str, Any], number: int, best: str, downloads: Path) -> None:
    """Fill in the page as one participant, who closes it halfway and goes on, and save the answers."""
    draw, plan = np.random.default_rng(number), study["plan"][(number - 1) % len(study["plan"])]
    half = len(plan) // 2
    for part in (plan[:half], plan[half:]):
        session.open(f"{page.resolve().as_uri()}?participant={number}")  # this leaves the page
        session("POST", "/execute/async", {"script": BEGIN, "args": []})
        for trial in part:
            given = answers_to(study, trial, best, draw)
            shown = session("POST", "/execute/sync", {"script": ANSWER, "args": [given]})
            expected = f"{plan.index(trial) + 1} of {len(plan)}"
            if shown != expected:
                raise SystemExit(f"{page}: expected trial {expected}, got {shown}")
    before = set(downloads.glob("*.json"))
    session("POST", "/execute/sync", {"script": "document.querySelector('#save').click()", "args": []})
    for _ in range(200):
        if any(path.stat().st_size for path in set(downloads.glob("*.json")) - before):  # an empty one is being written
            return
        time.sleep(0.05)
    raise SystemExit(f"{page}: participant {number} could not save")


def true_values(study: Mapping[str, Any], best: str) -> dict[tuple[str, str], float]:
    """The expected mean of every measure by map: over all trials and all answers."""
    sums: dict[tuple[str, str], list[float]] = {}
    for trial, facts in study["trials"].items():
        for key, question in facts["questions"].items():
            of_each = chances(question, facts, best)
            expected: dict[tuple[str, str], float] = {}
            for answer, share in enumerate(of_each):
                given = {one: answer if one == key else 0 for one in facts["questions"]}
                table = answer_table([Participant(1, {trial: given}, {trial: 0.0}, Path())], study)
                for row in table[table["question"] == key].itertuples():
                    place = (row.measure, row.map)
                    expected[place] = expected.get(place, 0.0) + share * row.value
            for place, value in expected.items():
                sums.setdefault(place, []).append(value)
    return {place: float(np.mean(values)) for place, values in sums.items()}


def covered(study: Mapping[str, Any], best: str, participants: int, repeats: int) -> dict[tuple[str, str], float]:
    """The share of studies whose interval holds the true value, by measure and map."""
    truth = true_values(study, best)
    held: dict[tuple[str, str], list[bool]] = {}
    for repeat in tqdm(range(repeats), desc="coverage", leave=False):
        draw = np.random.default_rng([repeat, 1])
        people = []
        for number in range(1, participants + 1):
            plan = study["plan"][(number - 1) % len(study["plan"])]
            given = {trial: answers_to(study, trial, best, draw) for trial in plan}
            people.append(Participant(number, given, dict.fromkeys(given, 0.0), Path()))
        for row in means(answer_table(people, study)):
            if "map" in row and "scores" not in row and row["low"] is not None:
                place = (row["measure"], row["map"])
                held.setdefault(place, []).append(row["low"] <= truth[place] <= row["high"])
    return {place: float(np.mean(own)) for place, own in held.items()}


def main(argv: Sequence[str] | None = None) -> Path:
    """Fill in, read back, and write the table."""
    p = plain_parser(__doc__, STUDIES)
    p.add_argument("studies", type=Path, nargs="+", help="folders with study.html and study.json")
    p.add_argument("--best", default="gradcam", help="the map that helps")
    p.add_argument("--participants", type=int, default=12)
    p.add_argument("--repeats", type=int, default=200, help="studies for the coverage of intervals")
    args = p.parse_args(argv)
    lines: list[dict[str, Any]] = []
    for folder in args.studies:
        study = json.loads((folder / "study.json").read_text())
        with tempfile.TemporaryDirectory() as downloads, browser() as session:
            session.protocol("Browser.setDownloadBehavior", behavior="allow", downloadPath=downloads)
            for number in tqdm(range(1, args.participants + 1), desc=study["task"], leave=False):
                fill_in(session, folder / "study.html", study, number, args.best, Path(downloads))
            found = json.loads(read_study(Path(downloads), [folder]).read_text())
        coverage = covered(study, args.best, args.participants, args.repeats)
        lines += summary(study["task"], found, true_values(study, args.best), coverage, args.best)
    args.command = "python -m studies.simulated_people RUN/evaluation/studies/TASK [...]"
    print(table_of(lines))
    return write("simulated_people", args, "images of the studies", [], {"table": lines})


def summary(
    task: str,
    found: Mapping[str, Any],
    truth: Mapping[tuple[str, str], float],
    coverage: Mapping[tuple[str, str], float],
    best: str,
) -> list[dict[str, Any]]:
    """A row for each measure: with the best map and with all others, what is true and what was found."""
    rows = [row for row in found["means"] if "map" in row and "scores" not in row]
    lines = []
    for measure in dict.fromkeys(row["measure"] for row in rows):
        own = [row for row in rows if row["measure"] == measure]
        (with_best,) = (row for row in own if row["map"] == best)
        others = [row for row in own if row["map"] != best]
        of_measure = [row for row in found["differences"] if row["measure"] == measure]
        away = [row for row in of_measure if best in (row["level"], row["baseline"])]
        lines.append(
            {
                "task": task, "measure": measure, "best_true": truth[measure, best], "best_found": with_best["mean"],
                "low": with_best["low"], "high": with_best["high"],
                "others_true": float(np.mean([truth[measure, row["map"]] for row in others])) if others else None,
                "others_found": float(np.mean([row["mean"] for row in others])) if others else None,
                "told_apart": all(row["told_apart"] for row in away) if away else None,
                "coverage": float(np.mean([share for (one, _), share in coverage.items() if one == measure])),
            }
        )  # fmt: skip
    return lines


def table_of(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    head = ["Task: measure", "Helped: true", "found", "Others: true", "found", "Told apart", "Intervals that hold it"]
    table = []
    for line in lines:
        bounds = "" if line["low"] is None else f" [{line['low']:.2f}, {line['high']:.2f}]"
        others = ["–" if line[key] is None else f"{line[key]:.2f}" for key in ("others_true", "others_found")]
        apart = {True: "yes", False: "no", None: "–"}[line["told_apart"]]
        cells = [
            f"`{line['task']}`: {line['measure']}",
            f"{line['best_true']:.2f}",
            f"{line['best_found']:.2f}{bounds}",
        ]
        table.append([*cells, *others, apart, f"{100 * line['coverage']:.0f} %"])
    return markdown(head, table)


if __name__ == "__main__":
    print(main())
