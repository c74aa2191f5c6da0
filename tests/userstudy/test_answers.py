"""The answers of a study: what is refused, and what scores say, against values known by hand."""

import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from interp_models.core.errors import InputError
from interp_models.userstudy.answers import answer_table, find_study
from interp_models.userstudy.making import _plan, check_fits, check_labels_known
from interp_models.userstudy.people import agreement, correlations, krippendorff, means, paired_differences
from interp_models.userstudy.reading import in_words, read_study
from tests.conftest import Script

MAPS = ("no map", "gradcam", "random")


def study_of(items: int = 6, participants: int = 12) -> dict[str, Any]:
    """A study in which each image is right or wrong; the first option is right for even images."""
    trials = {
        f"{item}.{place}": {
            "index": item,
            "image": f"bird {item}",
            "about": None,
            "condition": {"map": name},
            "questions": {
                "right": {"measure": "accuracy", "options": ["yes", "no"], "truth": item % 2},
                "sure": {"measure": "confidence", "options": list("12345")},
            },
        }
        for item in range(items)
        for place, name in enumerate(MAPS)
    }
    plan = [[f"{item}.{(item + one) % 3}" for item in range(items)] + ["check0"] for one in range(participants)]
    drops = {"gradcam": 0.1, "random": 0.9}
    values = {name: {"ad": {str(item): drop + item for item in range(items)}} for name, drop in drops.items()}
    return {
        "schema_version": 1, "study": "abc", "task": "correctness", "trials": trials, "plan": plan,
        "checks": {"check0": {"right": 1}}, "baselines": {"map": {"gradcam": "no map", "random": "no map"}},
        "judged_maps": True, "values": values, "higher_is_better": {"ad": False},
    }  # fmt: skip


def answers_of(study: dict[str, Any], number: int, correct: Any, sure: Any = lambda trial: 2) -> dict[str, Any]:
    """The file of a participant who is right where `correct` says so."""
    given = {}
    for key in study["plan"][(number - 1) % len(study["plan"])]:
        if key in study["checks"]:
            given[key] = {"given": dict(study["checks"][key]), "seconds": 3.0}
            continue
        trial = study["trials"][key]
        truth = trial["questions"]["right"]["truth"]
        answer = truth if correct(trial) else 1 - truth
        given[key] = {"given": {"right": answer, "sure": sure(trial)}, "seconds": 2.0}
    return {
        "schema_version": 1, "study": "abc", "task": "correctness", "participant": number, "begun": "", "saved": "",
        "answers": given,
    }  # fmt: skip


def write(folder: Path, study: dict[str, Any], files: dict[str, Any]) -> Path:
    """Write a study with its answers; returns the folder of the answers."""
    answers = folder / "answers"
    answers.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study))
    for name, one in files.items():
        (answers / name).write_text(one if isinstance(one, str) else json.dumps(one))
    return answers


def read(study: dict[str, Any], files: list[dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    answers = write(tmp_path / "study", study, {f"{number}.json": one for number, one in enumerate(files)})
    return dict(json.loads(read_study(answers, []).read_text()))


def test_answers_that_are_right_with_one_map_alone(tmp_path: Path) -> None:
    """All are right with Grad-CAM; with nothing and with noise they are right for half of the images."""
    study = study_of()

    def correct(trial: dict[str, Any]) -> bool:
        return trial["condition"]["map"] == "gradcam" or trial["index"] < 3

    found = read(study, [answers_of(study, number, correct) for number in range(1, 13)], tmp_path)
    by_map = {row["map"]: row for row in found["means"] if row["measure"] == "accuracy"}
    assert {name: row["mean"] for name, row in by_map.items()} == {"no map": 0.5, "gradcam": 1.0, "random": 0.5}
    assert [by_map[name]["answers"] for name in MAPS] == [24, 24, 24]
    assert by_map["gradcam"]["chance"] == 0.5
    assert by_map["gradcam"]["participants"] == 12
    (confidence,) = {row["mean"] for row in found["means"] if row["measure"] == "confidence"}
    assert confidence == 3.0  # the third option
    differences = {row["level"]: row for row in found["differences"] if row["measure"] == "accuracy"}
    assert differences["gradcam"]["mean"] == 0.5
    assert differences["gradcam"]["told_apart"]
    assert differences["random"]["mean"] == 0.0
    assert not differences["random"]["told_apart"]
    assert found["participants"] == list(range(1, 13))
    assert found["excluded"] == []
    assert found["seconds_per_trial"] == 2.0
    text = in_words(found)
    assert "accuracy: gradcam differs from no map (+0.500" in text
    assert "accuracy: random cannot be told apart from no map (+0.000" in text
    rows = pd.read_csv(tmp_path / "study" / "people.csv")
    assert len(rows) == 12 * 6 * 2
    assert (tmp_path / "study" / "people.png").stat().st_size > 5000


def test_who_fails_a_check_does_not_count(tmp_path: Path) -> None:
    study = study_of()
    files = [answers_of(study, number, lambda trial: True) for number in (1, 2, 3)]
    files[1]["answers"]["check0"]["given"] = {"right": 0}
    found = read(study, files, tmp_path)
    assert (found["participants"], found["excluded"]) == ([1, 3], [2])
    assert "failed a check of attention: 2" in in_words(found)


def test_part_of_the_answers_counts_and_is_named(tmp_path: Path) -> None:
    study = study_of()
    files = [answers_of(study, number, lambda trial: True) for number in (1, 2)]
    first = study["plan"][1][0]
    files[1]["answers"] = {first: files[1]["answers"][first]}
    found = read(study, files, tmp_path)
    assert found["incomplete"] == {"2": "1 of 7"}
    assert sum(row["answers"] for row in found["means"] if row["measure"] == "accuracy") == 7


def test_a_participant_beyond_the_plan_begins_again(tmp_path: Path) -> None:
    study = study_of(participants=2)
    found = read(study, [answers_of(study, number, lambda trial: True) for number in (1, 3)], tmp_path)
    assert found["participants"] == [1, 3]


def test_a_file_that_was_saved_twice_counts_once(tmp_path: Path) -> None:
    study = study_of()
    found = read(study, [answers_of(study, 1, lambda trial: True)] * 2, tmp_path)
    assert found["participants"] == [1]


def damaged(change: Any) -> dict[str, Any]:
    one = answers_of(study_of(), 1, lambda trial: True)
    change(one)
    return one


def set_seconds(value: Any, one: dict[str, Any]) -> None:
    one["answers"]["0.0"]["seconds"] = value


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no file of answers"),
        ({"a.json": "{"}, "a.json cannot be read"),
        ({"a.json": {"x": 1}}, "a.json is no file of answers"),
        ({"a.json": damaged(lambda one: one.update(study="other"))}, "study 'other' is not found"),
        (
            {"a.json": damaged(lambda one: None), "b.json": damaged(lambda one: one.update(study="other"))},
            "holds answers of several studies: 'abc', 'other'",
        ),
        ({"a.json": damaged(lambda one: one.update(participant=0))}, "must be a whole number from 1; got 0"),
        ({"a.json": damaged(lambda one: one.update(schema_version=9))}, "has another format"),
        ({"a.json": damaged(lambda one: one.update(answers=[1]))}, "answers must hold `given` and `seconds`"),
        ({"a.json": damaged(lambda one: one["answers"].update({"0.1": one["answers"]["0.0"]}))}, "has no trial '0.1'"),
        ({"a.json": damaged(lambda one: one["answers"]["0.0"]["given"].pop("sure"))}, "answers to right, sure"),
        (
            {"a.json": damaged(lambda one: one["answers"]["0.0"]["given"].update(sure=5))},
            "sure must be a whole number from 0 to 4; got 5",
        ),
        (
            {"a.json": damaged(lambda one: one["answers"]["0.0"]["given"].update(sure=1.5))},
            "sure must be a whole number from 0 to 4; got 1.5",
        ),
        (
            {"a.json": damaged(lambda one: None), "b.json": damaged(lambda one: one["answers"].pop("0.0"))},
            "hold other answers of the same participant, 1",
        ),
        ({"a.json": "[" * 100_000}, "a.json cannot be read"),
        ({"a.json": damaged(lambda one: one.update(study="x\ny"))}, r"study 'x\ny' is not found"),
        ({"a.json": damaged(lambda one: one.update(task="quality"))}, "is of the task 'quality'; the study is of"),
        *(
            ({"a.json": damaged(partial(set_seconds, value))}, "trial 0.0: seconds must be a number from 0 to 1e+09")
            for value in (float("inf"), float("nan"), -1, "3", True, 10**400)
        ),
        (
            {"a.json": damaged(lambda one: one["answers"]["check0"]["given"].update(right=0))},
            "nothing to read (of 1 participants, 1 failed a check of attention)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    files: dict[str, Any], says: str, tmp_path: Path, script: Script
) -> None:
    answers = write(tmp_path / "right", study_of(), {"a.json": damaged(lambda one: None)})
    assert script("evaluate", "userstudy=read", f"answers={answers}").code == 0
    answers = write(tmp_path / "wrong", study_of(), files)
    outcome = script("evaluate", "userstudy=read", f"answers={answers}")
    assert outcome.code != 0
    assert says in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["userstudy=read"], "userstudy=read reads answers=FOLDER"),
        (["userstudy=read", "answers=/nowhere"], "is no folder"),
        (["RUN", "answers=x"], "answers: are read by userstudy=read"),
        (["RUN", "userstudy=corectness"], "did you mean 'correctness'"),
        (["RUN", "userstudy=quality", "study.trials=0"], "study.trials must be at least 1; got 0"),
        (["RUN", "userstudy=quality", "study.consent=/nowhere.txt"], "study.consent=/nowhere.txt cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_work(
    arguments: list[str], says: str, cnn_run: Path, script: Script
) -> None:
    outcome = script("evaluate", *(str(cnn_run) if one == "RUN" else one for one in arguments))
    assert outcome.code != 0
    assert says in outcome.err


# Four observers, twelve units, from "Computing Krippendorff's Alpha-Reliability" (2011); 0 is a missing value.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_agreement_is_that_of_krippendorffs_example(level: str, alpha: float) -> None:
    units = [np.array([value for value in unit if value], float) for unit in zip(*OBSERVERS, strict=True)]
    found = krippendorff(units, level)
    assert found is not None
    assert round(found, 3) == alpha


def test_agreement_of_chance_is_about_zero() -> None:
    draw = np.random.default_rng(0)
    found = krippendorff([draw.integers(0, 2, 5).astype(float) for _ in range(2000)], "nominal")
    assert found is not None
    assert abs(found) < 0.02


def participants_of(study: dict[str, Any], files: list[dict[str, Any]], tmp_path: Path) -> pd.DataFrame:
    answers = write(tmp_path, study, {f"{number}.json": one for number, one in enumerate(files)})
    _, known, everyone = find_study(answers, [])
    return answer_table(everyone, known)


def test_people_who_rate_as_a_metric_ranks(tmp_path: Path) -> None:
    """A drop is better if it is small: who rates the map of the small drop highest agrees with it, whichever images
    are easy."""
    study = study_of(items=6)

    def likes(name: str) -> Any:
        return lambda trial: 2 + trial["index"] % 2 + (1 if trial["condition"]["map"] == name else -1)

    for name, rho in (("gradcam", 1.0), ("random", -1.0)):
        files = [answers_of(study, number, lambda trial: True, likes(name)) for number in range(1, 4)]
        rows = correlations(participants_of(study, files, tmp_path / name), study)
        (own,) = (row for row in rows if row["measure"] == "confidence")
        assert own["rho"] == pytest.approx(rho)
        assert own["images"] == 6
        (constant,) = (row for row in rows if row["measure"] == "accuracy")
        assert (constant["rho"], constant["images"]) == (None, 0)  # all are right
    assert correlations(participants_of(study, files, tmp_path / "none"), study | {"judged_maps": False}) == []


@pytest.mark.parametrize("maps", [3, 6, 8, 10])
def test_who_always_chooses_left_prefers_no_map(maps: int) -> None:
    """Each pair stands in both orders about equally often, also for few participants."""
    pairs = [pair for one in itertools.combinations(range(maps), 2) for pair in (one, one[::-1])]
    shown: Counter[tuple[int, int]] = Counter()
    for participant in range(24):
        for trial in _plan(0, participant, 24, len(pairs), []):
            shown[pairs[int(trial.split(".")[1])]] += 1
    assert len(shown) == len(pairs)
    for name in range(maps):
        left = sum(count for pair, count in shown.items() if pair[0] == name)
        right = sum(count for pair, count in shown.items() if pair[1] == name)
        assert 0.45 <= left / (left + right) <= 0.55


def test_the_best_constant_answer_is_the_chance(tmp_path: Path) -> None:
    study = study_of()
    for key, trial in study["trials"].items():
        trial["questions"]["right"]["truth"] = 0 if key[0] == "0" else 1
    found = read(study, [answers_of(study, number, lambda trial: True) for number in (1, 2, 3)], tmp_path)
    chances = {row["chance"] for row in found["means"] if row["measure"] == "accuracy"}
    assert {round(chance, 6) for chance in chances} == {round(5 / 6, 6)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda study: study.update(schema_version=99), "study.json has another format than this version reads"),
        (lambda study: study.pop("plan"), "study.json is damaged: plan is missing or of another type"),
        (lambda study: study.update(plan={"0": []}), "study.json is damaged: plan is missing or of another type"),
        (lambda study: study.pop("higher_is_better"), "study.json is damaged: higher_is_better is missing"),
        (lambda study: study.update(plan=[]), "study.json is damaged: it has no trials"),
    ],
)
def test_a_damaged_study_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    files = {"1.json": answers_of(study_of(), 1, lambda trial: True)}
    read_study(write(tmp_path / "right", study_of(), files), [])
    study = study_of()
    change(study)
    with pytest.raises(InputError, match=says):
        read_study(write(tmp_path / "wrong", study, files), [])


def test_a_damaged_study_of_another_task_is_no_obstacle(tmp_path: Path) -> None:
    files = {"1.json": answers_of(study_of(), 1, lambda trial: True)}
    answers = write(tmp_path / "quality", study_of(), files)
    answers = answers.rename(tmp_path / "answers")
    (tmp_path / "agreement").mkdir()
    (tmp_path / "agreement/study.json").write_text("{")
    folders = [tmp_path / "agreement", tmp_path / "quality"]
    assert read_study(answers, folders) == tmp_path / "quality/people.json"
    with pytest.raises(InputError, match=r"'abc' is not found \(.*agreement/study.json cannot be read\)"):
        read_study(answers, folders[:1])


def test_what_is_not_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (answers_of(study_of(), number, lambda trial: True) for number in (1, 2))
    answers = write(tmp_path / "study", study_of(), {"1.json": one, "2.JSON": two, "3.json.txt": one})
    (answers / "sub").mkdir()
    (answers / ".hidden").touch()
    found = json.loads(read_study(answers, []).read_text())
    assert found["participants"] == [1, 2]
    assert "not read, as they are no *.json: 3.json.txt, sub\n" in capsys.readouterr().out


def test_agreement_on_preferences_does_not_depend_on_names() -> None:
    """Two of three maps are compared; nine of ten choose the one of the higher rank. The agreement is 1 - 2 · (share
    of pairs of answers that differ)."""
    draw = np.random.default_rng(0)
    rows = [
        (f"{unit} {better} {worse}", participant, better if draw.random() < 0.9 else worse)
        for unit, (better, worse) in enumerate([("a", "b"), ("a", "c"), ("b", "c")])
        for participant in range(10)
    ]
    alphas = set()
    for names in itertools.permutations("abc"):
        turned = dict(zip("abc", names, strict=True))
        table = pd.DataFrame(
            {
                "measure": "preference", "kind": "preference", "chance": 0.5, "unit": unit, "participant": participant,
                "trial": unit, "question": "better",
                "code": sorted(turned[name] for name in unit.split()[1:]).index(turned[chosen]),
            }
            for unit, participant, chosen in rows
        )  # fmt: skip
        (row,) = agreement(table)
        alphas.add(round(row["alpha"], 12))
    differ = []
    for _, own in pd.DataFrame(rows).groupby(0):
        chosen = own[2].to_numpy()
        differ.append((chosen[:, None] != chosen[None]).sum() / (10 * 9))
    (alpha,) = alphas
    assert alpha == pytest.approx(1 - 2 * np.mean(differ))
    assert 0.3 < alpha < 0.9


def test_it_is_said_that_nothing_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One image: the first participant sees it under the first condition alone. Of one condition nothing is said."""
    study, line = study_of(items=1), "no participant saw both a condition and its baseline"
    files = {"1.json": answers_of(study, 1, lambda trial: True)}
    read_study(write(tmp_path / "one", study, files), [])
    assert line in capsys.readouterr().out
    read_study(write(tmp_path / "alone", study | {"baselines": {"map": {}}}, files), [])
    assert line not in capsys.readouterr().out


def test_results_beside_the_answers_are_no_answers(tmp_path: Path) -> None:
    study = study_of()
    answers = write(tmp_path / "study", study, {"1.json": answers_of(study, 1, lambda trial: True)})
    (tmp_path / "study" / "study.json").rename(answers / "study.json")
    assert read_study(answers, []) == read_study(answers, []) == answers / "people.json"


def test_a_preference_counts_for_one_map_and_against_the_other(tmp_path: Path) -> None:
    study = study_of(items=2, participants=2)
    study["task"], study["baselines"] = "preference", {"map": {"random": "gradcam"}}
    for key, trial in study["trials"].items():
        pair = ("gradcam", "random") if key.endswith("0") else ("random", "gradcam")
        trial["questions"] = {"better": {"measure": "preference", "options": ["left", "right"], "stands_for": pair}}
    study["checks"], study["plan"] = {}, [["0.0", "1.1"], ["0.1", "1.0"]]
    files = []
    for number, plan in enumerate(study["plan"], 1):
        given = {}
        for key in plan:
            likes = 0 if study["trials"][key]["questions"]["better"]["stands_for"][0] == "gradcam" else 1
            given[key] = {"given": {"better": likes if key[0] == "0" else 1 - likes}, "seconds": 1.0}
        files.append(
            {"schema_version": 1, "study": "abc", "task": "preference", "participant": number, "answers": given}
        )
    table = participants_of(study, files, tmp_path)
    assert len(table) == 8
    assert {row["map"]: row["mean"] for row in means(table)} == {"gradcam": 0.5, "random": 0.5}
    first = table[table["index"] == 0].groupby("map")["value"].mean()
    assert first.to_dict() == {"gradcam": 1.0, "random": 0.0}  # all prefer Grad-CAM for the first image
    (row,) = agreement(table)
    assert row["alpha"] == pytest.approx(1.0)  # in both orders


def test_intervals_hold_the_mean_of_other_participants() -> None:
    """Participants differ in how often they are right; 95 % intervals of twelve hold the mean of all."""
    draw, held, told, trials = np.random.default_rng(0), 0, 0, 1000
    for _ in range(trials):
        own = draw.beta(8, 4, 12)  # mean 2/3
        rows = []
        for participant, share in enumerate(own):
            for name, chance in (("no map", share), ("gradcam", share)):
                rows += [
                    {"participant": participant, "map": name, "measure": "accuracy", "kind": "accuracy",
                     "chance": 0.5, "value": float(value)}
                    for value in draw.random(8) < chance
                ]  # fmt: skip
        table = pd.DataFrame(rows)
        (first, _) = means(table)
        held += first["low"] <= 2 / 3 <= first["high"]
        (away,) = paired_differences(table, {"map": {"gradcam": "no map"}})
        told += away["told_apart"]
    assert 0.93 <= held / trials <= 0.97
    assert told / trials <= 0.05


def test_a_study_without_labels_is_refused_before_work() -> None:
    check_labels_known("quality", ["a network"])
    with pytest.raises(InputError, match="userstudy=correctness needs images with known classes"):
        check_labels_known("correctness", ["a network"])


def test_a_study_that_cannot_be_made_is_refused_before_work() -> None:
    check_fits("quality", 2, "label", ["gradcam"])
    check_fits("correctness", 1, "prediction", ["gradcam"])
    with pytest.raises(InputError, match="userstudy=correctness is of one model"):
        check_fits("correctness", 2, "prediction", ["gradcam"])
    with pytest.raises(InputError, match="target must be prediction; got 'label'"):
        check_fits("correctness", 1, "label", ["gradcam"])
    with pytest.raises(InputError, match="another label than 'no map'"):
        check_fits("quality", 1, "prediction", ["no map"])
