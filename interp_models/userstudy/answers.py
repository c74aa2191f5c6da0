"""Read the files of answers of a study with people, and refuse what does not fit the study."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from interp_models.core.errors import InputError
from interp_models.userstudy.making import KEY, PAGE, SCHEMA_VERSION

RESULTS, ANSWERS, PICTURE = "people.json", "people.csv", "people.png"
"""Files of what the answers say."""
HIGHEST = 100
"""Largest number that a question without options takes."""
LONGEST = 1e9
"""Most seconds that a trial can take: 30 years. It keeps out numbers that are no times."""
PARTS: Mapping[str, type] = {
    "task": str,
    "trials": dict,
    "plan": list,
    "checks": dict,
    "baselines": dict,
    "values": dict,
    "judged_maps": bool,
    "higher_is_better": dict,
}
"""What a `study.json` has, beside its version and its name."""


@dataclass(frozen=True)
class Participant:
    """The answers of one participant."""

    number: int
    given: Mapping[str, Mapping[str, int]]
    """The answer to each question by trial: the place of the option, or the number."""
    seconds: Mapping[str, float]
    """Time from the first sight of each trial to its answer."""
    path: Path


def find_study(answers: Path, folders: Iterable[Path]) -> tuple[Path, dict[str, Any], list[Participant]]:
    """Read the answers in a folder, and find the study that they belong to.

    Args:
        answers: folder with the files of answers.
        folders: folders in which `study.json` of the study may lie; the folder of the answers and the one above are
            searched first.

    Returns:
        The folder of the study, its `study.json`, and the participants by number.

    Raises:
        InputError: for a folder without answers, answers of several studies, a study that is not found, or files that
            do not fit it.
    """
    if not answers.is_dir():
        raise InputError(f"answers={answers} is no folder; it must hold the files that participants saved")
    read = {path: _json(path) for path in files_in(answers)[0] if path.name != RESULTS}
    found = {path: one for path, one in read.items() if isinstance(one, dict) and "answers" in one and "study" in one}
    if other := [path for path, one in read.items() if path not in found and not _is_study(one)]:
        raise InputError(f"{other[0]} is no file of answers; answers= must name a folder with nothing else")
    if not found:
        raise InputError(f"answers={answers} holds no file of answers (*.json)")
    studies = sorted({repr(one["study"]) for one in found.values()})
    if len(studies) > 1:
        raise InputError(
            f"answers={answers} holds answers of several studies: {', '.join(studies)}; give each a folder"
        )
    name = next(iter(found.values()))["study"]
    damaged = []
    for folder in (answers, answers.parent, *folders):
        if not (key := folder / KEY).is_file():
            continue
        try:
            study = _json(key)
        except InputError:
            damaged.append(str(key))
            continue
        if _is_study(study) and study["study"] == name:
            return folder, _checked(study, key), _participants(found, study)
    unread = f" ({', '.join(damaged)} cannot be read)" if damaged else ""
    raise InputError(
        f"answers={answers}: study {studies[0]} is not found{unread}; name the folder of the report that it was made "
        f"with (for one model, its RUN), or put its {KEY} beside the answers"
    )


def files_in(answers: Path) -> tuple[list[Path], list[Path]]:
    """The files of answers in a folder, `*.json`, and what else it holds that no study and no reading wrote."""
    listed = sorted(path for path in answers.iterdir() if not path.name.startswith("."))
    files = [path for path in listed if path.is_file() and path.suffix.lower() == ".json"]
    return files, [path for path in listed if path not in files and path.name not in (PAGE, ANSWERS, PICTURE)]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _is_study(value: Any) -> bool:
    return isinstance(value, dict) and "trials" in value and "study" in value


def _checked(study: dict[str, Any], path: Path) -> dict[str, Any]:
    if study.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} has another format than this version reads")
    if wrong := [key for key, kind in PARTS.items() if not isinstance(study.get(key), kind)]:
        raise InputError(f"{path} is damaged: {wrong[0]} is missing or of another type")
    if not study["plan"] or not study["trials"]:
        raise InputError(f"{path} is damaged: it has no trials")
    return study


def _participants(found: Mapping[Path, dict[str, Any]], study: Mapping[str, Any]) -> list[Participant]:
    participants: dict[int, Participant] = {}
    for path, one in found.items():
        read = _participant(path, one, study)
        twin = participants.setdefault(read.number, read)
        if twin.given != read.given:
            raise InputError(f"{twin.path} and {path} hold other answers of the same participant, {read.number}")
    return [participants[number] for number in sorted(participants)]


def _participant(path: Path, one: Mapping[str, Any], study: Mapping[str, Any]) -> Participant:
    if one.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} has another format than this version reads")
    if one.get("task", study["task"]) != study["task"]:
        raise InputError(f"{path} is of the task {one['task']!r}; the study is of {study['task']!r}")
    number = one.get("participant")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InputError(f"{path}: participant must be a whole number from 1; got {number!r}")
    plan = study["plan"][(number - 1) % len(study["plan"])]
    try:
        answers = {str(trial): dict(own["given"]) for trial, own in one["answers"].items()}
        seconds = {str(trial): own["seconds"] for trial, own in one["answers"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: answers must hold `given` and `seconds` of every trial") from None
    for trial, value in seconds.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LONGEST:
            raise InputError(
                f"{path}: trial {trial}: seconds must be a number from 0 to {LONGEST:.0e}; got {value!r:.40}"
            )
    for trial, given in answers.items():
        if trial not in plan:
            raise InputError(f"{path}: participant {number} has no trial {trial!r} in this study")
        limits = _limits(study, trial)
        if set(given) != set(limits):
            raise InputError(f"{path}: trial {trial}: expected answers to {', '.join(limits)}; got {', '.join(given)}")
        for key, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limits[key]:
                what = f"a whole number from 0 to {limits[key]}"
                raise InputError(f"{path}: trial {trial}: {key} must be {what}; got {value!r}")
    return Participant(number, answers, seconds, path)


def _limits(study: Mapping[str, Any], trial: str) -> dict[str, int]:
    """The largest answer to each question of a trial."""
    asked = study["checks"].get(trial)
    questions = study["trials"][trial if asked is None else next(iter(study["trials"]))]["questions"]
    wanted = questions if asked is None else {key: questions[key] for key in asked}
    return {key: len(one["options"]) - 1 if one["options"] else HIGHEST for key, one in wanted.items()}


def attentive(one: Participant, study: Mapping[str, Any]) -> bool:
    """Whether a participant answered all checks of attention that they came to as asked."""
    return all(one.given.get(check, right) == right for check, right in study["checks"].items())


def constant_answers(study: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy of the best constant answer, by key of the question: of always choosing one place."""
    truths: dict[str, list[int]] = {}
    for facts in study["trials"].values():
        for key, question in facts["questions"].items():
            if question["options"] and "truth" in question:
                truths.setdefault(key, []).append(question["truth"])
    return {key: max(map(own.count, own)) / len(own) for key, own in truths.items()}


def answer_table(participants: Iterable[Participant], study: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each answer of the participants, without checks of attention.

    `value` is 1 for a right answer and 0 for a wrong one (`kind` accuracy), the distance from the right number (error),
    the place on the scale from 1 (rating), or whether a map was preferred (preference; a row for each of both maps).
    `unit` and `code` are what agreement compares: participants with one unit saw the same, and code is what they chose.
    """
    rows, constant = [], constant_answers(study)
    for one in participants:
        for trial, given in one.given.items():
            if trial not in study["trials"]:
                continue
            facts = study["trials"][trial]
            common = {"participant": one.number, "trial": trial, "index": facts["index"], "image": facts["image"]}
            common |= {"seconds": one.seconds[trial]}
            for key, answer in given.items():
                question = facts["questions"][key]
                own = common | {"question": key, "measure": question["measure"], "answer": answer}
                rows += [own | of for of in _scored(facts, question, f"{trial} {key}", answer, constant.get(key))]
    return pd.DataFrame(rows)


def _scored(
    facts: Mapping[str, Any], question: Mapping[str, Any], unit: str, answer: int, constant: float | None
) -> list[dict[str, Any]]:
    condition, chance = facts["condition"], None
    if "stands_for" in question:
        names = question["stands_for"]
        unit = f"{facts['index']} {' '.join(sorted(names))}"
        code = sorted(names).index(names[answer])
        own = {"kind": "preference", "chance": 1 / len(names), "unit": unit, "code": code}
        return [own | {"value": float(place == answer), "map": name} for place, name in enumerate(names)]
    if "truth" not in question:
        kind, value = "rating", float(answer + 1)
    elif question["options"]:
        kind, value = "accuracy", float(answer == question["truth"])
        chance = max(constant or 0.0, 1 / len(question["options"]))
    else:
        kind, value = "error", float(abs(answer - question["truth"]))
    return [{"kind": kind, "value": value, "chance": chance, "unit": unit, "code": answer, **condition}]
