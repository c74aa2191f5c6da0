"""Write a study: the page to hand out, and the file with the right answers that stays with the researchers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from tqdm import tqdm

from interp_models.core.errors import InputError
from interp_models.core.files import whole, write_json
from interp_models.evaluation.config import StudyConfig
from interp_models.report import visual
from interp_models.report.page import for_script
from interp_models.userstudy.base import TASKS, Condition, Item, Question, Task, Trial
from interp_models.userstudy.pool import Pool

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
    """Write `study.html` and `study.json` of a task to a folder.

    Every participant sees every item once, in an order of their own. Participant p sees item i under condition
    (i + p) mod the number of conditions, so that over as many participants every item is seen once under each.

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
    conditions = task.conditions()
    items = task.shuffled(task.items(study.trials))
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
    plan = [_plan(seed, one, len(items), len(conditions), list(checks)) for one in range(study.participants)]
    pictures: dict[str, str] = {}
    shown = {key: _for_page(trial, pictures) for key, trial in {**trials, **checks}.items()}
    described = {"task": name, "trials": facts, "plan": plan, "pictures": list(pictures), "consent": consent}
    identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    data = {"study": identity, "task": name, "trials": shown, "plan": plan, "pictures": pictures}
    _write_page(folder / PAGE, task.intro, consent, data)
    facts_of_study = {
        "schema_version": SCHEMA_VERSION, "study": identity, "task": name, "source": task.source, "runs": pool.runs,
        "participants": study.participants, "seed": seed, "baselines": _baselines(task, conditions),
        "trials": facts, "checks": {key: dict(trial.truth) for key, trial in checks.items()},
        "plan": plan, "values": pool.values(), "higher_is_better": pool.directions(),
    }  # fmt: skip
    write_json(folder / KEY, facts_of_study)
    return folder / PAGE


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
    """What each level of each factor is compared with: a map with no map or, without that, with the reference; scores
    that are shown with hidden ones."""
    pool, names = task.pool, task.maps()
    no_map = {pool.parts(name)[0]: name for name in names if pool.parts(name)[1] is None}
    reference = pool.reference()
    of_maps = {name: base for name in names if (base := no_map.get(pool.parts(name)[0], reference)) in names}
    found = {"map": {name: base for name, base in of_maps.items() if name != base}}
    if "scores" in conditions[0]:
        found["scores"] = {"shown": "hidden"}
    return found


def _check(trial: Trial, number: int) -> Trial:
    """A trial that checks attention: it names the answers to give."""
    questions, truth = [], {}
    for question in trial.questions:
        if question.options:
            answer = (number + 1) % len(question.options) if number else len(question.options) - 1
            wanted = f"“{question.options[answer]}”"
        else:
            answer = 17 + 20 * number
            wanted = str(answer)
        text = f"This question checks that you read it. Please answer {wanted}."
        questions.append(Question(question.key, text, question.options))
        truth[question.key] = answer
    return Trial(trial.pictures, questions, trial.examples, truth)


def _plan(seed: int, participant: int, items: int, conditions: int, checks: Sequence[str]) -> list[str]:
    """The trials of a participant (from 0) in their order, with the checks evenly between them."""
    draw = np.random.default_rng([seed, participant])
    plan = [f"{item}.{(item + participant) % conditions}" for item in draw.permutation(items).tolist()]
    for number, check in enumerate(checks):
        plan.insert(round((number + 1) * items / (len(checks) + 1)) + number, check)
    return plan


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
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["script"] = for_script
    here = files("interp_models.userstudy")
    style = files("interp_models.report").joinpath("page.css").read_text("utf-8")
    page = environment.from_string(here.joinpath("study.html.j2").read_text("utf-8")).render(
        style=Markup(style + here.joinpath("study.css").read_text("utf-8")),
        code=Markup(here.joinpath("study.js").read_text("utf-8")),
        intro=intro,
        consent=consent,
        data=data,
    )
    with whole(path) as partial:
        partial.write_text(page, "utf-8", errors="backslashreplace")
