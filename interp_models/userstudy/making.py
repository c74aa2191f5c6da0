"""Write a study: the page to hand out, and the file with the right answers that stays with the researchers."""

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from tqdm import tqdm

from interp_models.core.errors import InputError
from interp_models.core.files import whole, write_json
from interp_models.evaluation.config import StudyConfig
from interp_models.report import visual
from interp_models.report.page import environment
from interp_models.userstudy.base import TASKS, Condition, Item, Question, Task, Trial
from interp_models.userstudy.pool import NO_MAP, Pool

SCHEMA_VERSION = 1
"""Version of the format of `study.json` and of files of answers."""
CHECKS = 2
"""Number of questions that check attention, per participant."""
PAGE, KEY, STUDIES = "study.html", "study.json", "studies"


def check_study(name: str, study: StudyConfig) -> str | None:
    """Check what can be checked before models are judged; returns the text to consent to.

    Raises:
        InputError: for an unknown task, numbers below 1, or a file that cannot be read.
    """
    TASKS.get(name)
    for key in ("trials", "participants"):
        if getattr(study, key) < 1:
            raise InputError(f"study.{key} must be at least 1; got {getattr(study, key)}")
    if study.consent is None:
        return None
    try:
        return Path(study.consent).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise InputError(f"study.consent={study.consent} cannot be read: {why}") from None


def check_fits(name: str, models: int, target: Any, labels: Sequence[str]) -> None:
    """Raise `InputError` if a task cannot be made of an evaluation; before models are judged.

    Args:
        name: name of the task.
        models: number of models.
        target: class that is explained.
        labels: labels of the explainers.
    """
    task = TASKS.get(name)
    if models > 1 and not task.several_models:
        raise InputError(f"userstudy={name} is of one model; ratings such as quality can compare several")
    if target != "prediction" and not task.several_models:
        raise InputError(f"userstudy={name} asks about predictions, so that target must be prediction; got {target!r}")
    if NO_MAP in labels:
        raise InputError(f"userstudy: an explainer must have another label than {NO_MAP!r}")


def check_labels_known(name: str, without: Sequence[str]) -> None:
    """Raise `InputError` if a task needs labels that models do not have.

    Args:
        name: name of the task.
        without: names of the models whose images have no labels of their classes.
    """
    if TASKS.get(name).needs_label and without:
        raise InputError(f"userstudy={name} needs images with known classes of the model; {without[0]} has none")


def study_folder(folder: Path, name: str) -> Path:
    """Folder of a study beside a report."""
    return folder / STUDIES / name


def write_study(name: str, pool: Pool, folder: Path, study: StudyConfig, seed: int, consent: str | None) -> Path:
    """Write `study.html` and `study.json` of a task to a folder; beside it, if the folder has another study.

    Says on stderr which explainers are left out, and if fewer items were found than wanted.

    Every participant sees every item once, in an order of their own. Participant p sees item i under condition
    i + offset(p), mod the number of conditions. As many participants as there are conditions have all offsets, so that
    every item is seen once under each; the offsets of few participants are far from each other.

    Args:
        name: name of the task.
        pool: the judged images.
        folder: the folder; it is made if needed.
        study: the numbers of trials and participants, see `StudyConfig`.
        seed: draws images and orders.
        consent: text that participants must agree to.

    Returns:
        The path of the page.
    """
    task: Task = TASKS.get(name)(pool, np.random.default_rng(seed))
    conditions, items = task.conditions(), task.shuffled(task.items(study.trials))
    for line in _warnings(name, pool, task, len(conditions), len(items), study.trials):
        print(line, file=sys.stderr)
    trials: dict[str, Trial] = {}
    facts: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(items) * len(conditions), desc=f"study {name}", leave=False) as bar:
        for number, item in enumerate(items):
            for place, condition in enumerate(conditions):
                key = f"{number}.{place}"
                trials[key] = task.trial(item, condition)
                facts[key] = _facts(trials[key], item, condition, pool)
                bar.update()
    checks = {f"check{number}": _check(trials["0.0"], number) for number in range(CHECKS)}
    rounds = -(-study.participants // len(conditions))  # the last begins and ends, or conditions were not balanced
    plan = [_plan(seed, one, len(items), len(conditions), list(checks)) for one in range(rounds * len(conditions))]
    pictures: dict[str, str] = {}
    shown = {key: _for_page(trial, pictures) for key, trial in {**trials, **checks}.items()}
    of_study = {
        "task": name, "source": task.source, "runs": pool.runs, "participants": study.participants, "seed": seed,
        "baselines": _baselines(task, conditions), "judged_maps": task.judged_maps, "trials": facts,
        "checks": {key: dict(trial.truth) for key, trial in checks.items()},
        "plan": plan, "values": pool.values(), "higher_is_better": pool.directions(),
    }  # fmt: skip
    described = json.dumps([of_study, task.intro, shown, list(pictures), consent], sort_keys=True)
    identity = hashlib.sha256(described.encode()).hexdigest()[:12]
    folder = _free(folder, identity)
    folder.mkdir(parents=True, exist_ok=True)
    data = {"study": identity, "task": name, "trials": shown, "plan": plan, "pictures": pictures}
    write_json(folder / KEY, {"schema_version": SCHEMA_VERSION, "study": identity, **of_study})
    _write_page(folder / PAGE, task.intro, consent, data)  # no page without its key
    return folder / PAGE


def _warnings(name: str, pool: Pool, task: Task, conditions: int, items: int, wanted: int) -> list[str]:
    """What whoever hands out a study must know of it."""
    lines = []
    left_out = [label for label in pool.sources() if label not in task.maps] if task.needs_classes else []
    if left_out:
        lines.append(f"{', '.join(left_out)}: left out, as no maps were found that differ between classes")
    if items < wanted:
        lines.append(f"{items} of {wanted} wanted items are found; judge more images for more")
    if items < conditions:
        lines.append(f"no participant sees all {conditions} conditions, as there are only {items} item(s)")
    return [f"userstudy={name}: {line}" for line in lines]


def _free(folder: Path, identity: str) -> Path:
    """The folder, or the next with a number if it holds another study, which may have been handed out."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([folder], numbered) if _is_free(one, identity))


def _is_free(folder: Path, identity: str) -> bool:
    """Whether a folder has no study, or this one."""
    if not (folder / KEY).is_file():
        return not (folder / PAGE).exists()
    try:
        return bool(json.loads((folder / KEY).read_text("utf-8"))["study"] == identity)
    except (ValueError, KeyError, TypeError, RecursionError):  # not ours, or damaged
        return False


def _facts(trial: Trial, item: Item, condition: Condition, pool: Pool) -> dict[str, Any]:
    """What reading the answers must know of a trial."""
    questions = {
        question.key: {
            "measure": question.measure or question.key,
            "options": list(question.options),
            **({"truth": trial.truth[question.key]} if question.key in trial.truth else {}),
            **({"stands_for": list(trial.stands_for[question.key])} if question.key in trial.stands_for else {}),
        }
        for question in trial.questions
    }
    about = {"index": item.index, "image": pool.seen(item.index).image_id, "about": item.about}
    return {**about, "condition": dict(condition), "questions": questions}


def _baselines(task: Task, conditions: Sequence[Condition]) -> dict[str, dict[str, str]]:
    """What each level of each factor is compared with: a map with no map or, without that, with the reference, a
    control, or the first map; scores that are shown with hidden ones."""
    pool, names = task.pool, task.maps
    no_map = {pool.parts(name)[0]: name for name in names if pool.parts(name)[1] is None}
    reference = next(name for name in (pool.reference(), *pool.controls(), names[0]) if name in names)
    of_maps = {name: base for name in names if (base := no_map.get(pool.parts(name)[0], reference)) in names}
    found = {"map": {name: base for name, base in of_maps.items() if name != base}}
    if "scores" in conditions[0]:
        found["scores"] = {"shown": "hidden"}
    return found


def _check(trial: Trial, number: int) -> Trial:
    """A trial without pictures that checks attention: it names the answer to give to the trial's first question."""
    question = trial.questions[0]
    answer = (0 if number else len(question.options) - 1) if question.options else 17 + 20 * number
    wanted = f"“{question.options[answer]}”" if question.options else str(answer)
    text = f"This question checks that you read it. Please answer {wanted}."
    return Trial([], [Question(question.key, text, question.options)], truth={question.key: answer})


def _plan(seed: int, participant: int, items: int, conditions: int, checks: Sequence[str]) -> list[str]:
    """The trials of a participant (from 0) in their order, with the checks evenly between them."""
    draw = np.random.default_rng([seed, participant])
    offset = participant * _step(conditions) % conditions
    plan = [f"{item}.{(item + offset) % conditions}" for item in draw.permutation(items).tolist()]
    for number, check in enumerate(checks):
        plan.insert(round((number + 1) * items / (len(checks) + 1)) + number, check)
    return plan


def _step(conditions: int) -> int:
    """The number without a common divisor that is nearest to the golden section of the conditions."""
    whole = [step for step in range(1, conditions + 1) if math.gcd(step, conditions) == 1]
    return min(whole, key=lambda step: abs(step - 0.618 * conditions))


def _for_page(trial: Trial, pictures: dict[str, str]) -> dict[str, Any]:
    """What the page shows of a trial, without the right answers; its pictures are added to `pictures`."""

    def refer(shown: Sequence[Any]) -> list[dict[str, str]]:
        found = []
        for one in shown:
            digest = hashlib.sha256(np.ascontiguousarray(one.picture).tobytes()).hexdigest()[:16]
            if digest not in pictures:
                pictures[digest] = visual.jpeg_uri(one.picture)
            found.append({"picture": digest, "caption": one.caption})
        return found

    questions = [{"key": one.key, "text": one.text, "options": list(one.options)} for one in trial.questions]
    return {"examples": refer(trial.examples), "pictures": refer(trial.pictures), "questions": questions}


def _write_page(path: Path, intro: str, consent: str | None, data: Mapping[str, Any]) -> None:
    here = files("interp_models.userstudy")
    style = files("interp_models.report").joinpath("page.css").read_text("utf-8")
    page = (
        environment()
        .from_string(here.joinpath("study.html.j2").read_text("utf-8"))
        .render(
            style=Markup(style + here.joinpath("study.css").read_text("utf-8")),
            code=Markup(here.joinpath("study.js").read_text("utf-8")),
            intro=intro,
            consent=consent,
            data=data,
        )
    )
    with whole(path) as partial:
        partial.write_text(page, "utf-8", errors="backslashreplace")
