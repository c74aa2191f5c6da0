"""Studies with people: each task is made of a real evaluation, and its right answers are derived anew."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from interp_models import EXPLAINERS, load, probabilities
from interp_models.evaluation.config import EvaluateConfig
from interp_models.report import visual
from interp_models.runs.evaluate import judging_of
from interp_models.userstudy import TASKS
from interp_models.userstudy.changes import Features
from interp_models.userstudy.pool import Seen, readable
from interp_models.userstudy.prediction import ModelAccuracy
from tests.conftest import Script, copy_run

PLAN = (
    "explainers=[intrinsic, gradcam, random]",
    "metrics=[ad, dauc]",
    "max_steps=3",
    "report_images=1",
    "logger.wandb=disabled",
    "study.trials=6",
    "study.participants=14",
)


class Study:
    """A study that was made of a run."""

    def __init__(self, run: Path, task: str) -> None:
        self.folder = run / "evaluation" / "studies" / task
        self.key: dict[str, Any] = json.loads((self.folder / "study.json").read_text())
        self.trials: dict[str, dict[str, Any]] = self.key["trials"]
        page = (self.folder / "study.html").read_text()
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
        assert found is not None
        self.page: dict[str, Any] = json.loads(found[1])
        images = pd.read_parquet(run / "evaluation" / "per_image.parquet").drop_duplicates("index").set_index("index")
        self.label, self.prediction = images["label"].to_dict(), images["prediction"].to_dict()

    def truths(self, key: str) -> list[tuple[dict[str, Any], int, list[str]]]:
        """Of every trial its facts, the right answer to a question, and the options."""
        return [
            (trial, trial["questions"][key]["truth"], trial["questions"][key]["options"])
            for trial in self.trials.values()
        ]


@pytest.fixture(scope="module")
def run(cnn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is evaluated once; some of its predictions are wrong."""
    return copy_run(cnn_run, tmp_path_factory.mktemp("study") / "run")


@pytest.fixture
def make(run: Path, script: Script) -> Callable[[str], Study]:
    """Makes the study of a task, once."""

    def made(task: str) -> Study:
        if not (run / "evaluation" / "studies" / task).exists():
            outcome = script("evaluate", run, *PLAN, f"userstudy={task}")
            assert outcome.code == 0, outcome.err
        return Study(run, task)

    return made


@pytest.mark.parametrize("task", TASKS.names())
def test_every_task_is_balanced_and_keeps_its_answers_to_itself(make: Callable[[str], Study], task: str) -> None:
    study = make(task)
    conditions = {json.dumps(trial["condition"], sort_keys=True) for trial in study.trials.values()}
    items = {key.split(".")[0] for key in study.trials}
    assert len(study.trials) == len(conditions) * len(items)
    seen: Counter[tuple[int, str]] = Counter()
    for participant, plan in enumerate(study.key["plan"]):
        checks = [key for key in plan if key.startswith("check")]
        real = [key for key in plan if key not in checks]
        assert sorted(checks) == sorted(study.key["checks"])
        assert sorted(key.split(".")[0] for key in real) == sorted(items)  # every item once
        seen.update((participant // len(conditions), key) for key in real)
    rounds = len(study.key["plan"]) // len(conditions)
    for number in range(rounds):  # so many participants see every item once under each condition
        assert {key: seen[number, key] for key in study.trials} == dict.fromkeys(study.trials, 1)
    assert study.page["study"] == study.key["study"]
    assert {"truth", "stands_for", "condition", "measure"}.isdisjoint(re.findall(r'"(\w+)":', json.dumps(study.page)))
    shown = {one["picture"] for trial in study.page["trials"].values() for one in trial["pictures"]}
    assert shown <= set(study.page["pictures"])
    for trial in study.page["trials"].values():
        for name in ("gradcam", "intrinsic", "random"):  # participants do not know which map they see
            assert name not in json.dumps([trial["examples"], trial["pictures"], trial["questions"]])


def test_correctness(make: Callable[[str], Study]) -> None:
    study = make("correctness")
    for trial, right, options in study.truths("right"):
        index = trial["index"]
        assert options[right] == ("yes" if study.label[index] == study.prediction[index] else "no")
    assert Counter(right for _, right, _ in study.truths("right")) == {
        0: len(study.trials) / 2,
        1: len(study.trials) / 2,
    }


def test_simulation(make: Callable[[str], Study], run: Path) -> None:
    study = make("simulation")
    names = readable(load(run)[0].classes)
    for key, trial in study.trials.items():
        (text,) = (one["text"] for one in study.page["trials"][key]["questions"] if one["key"] == "recognised")
        asked = names.index(re.findall("“(.*)”", text)[0])
        truth = trial["questions"]["recognised"]["truth"]
        assert truth == (0 if study.prediction[trial["index"]] == asked else 1)
        examples = [one["caption"] for one in study.page["trials"][key]["examples"]]
        assert len(examples) == len({one.split(" Its score")[0] for one in examples}) >= 2
        assert all(("Its score: " in one) == (trial["condition"]["scores"] == "shown") for one in examples)
    assert {(one["condition"]["map"], one["condition"]["scores"]) for one in study.trials.values()} == {
        (name, scores) for name in ("no map", "intrinsic", "gradcam", "random") for scores in ("shown", "hidden")
    }


def image_of(run: Path, index: int) -> torch.Tensor:
    """A test image (3, H, W)."""
    dataset = judging_of(run, EvaluateConfig()).data.dataset("test")
    return dataset[0, int(np.flatnonzero(dataset.indices == index)[0])].image


def test_model_accuracy(make: Callable[[str], Study], run: Path) -> None:
    study = make("model_accuracy")
    indices = {visual.jpeg_uri(visual.to_uint8(image_of(run, index))): index for index in study.label}
    shares = set()
    for key, trial in study.trials.items():
        if trial["condition"]["map"] == "no map":
            shown = [indices[_picture(study, one["picture"])] for one in study.page["trials"][key]["pictures"]]
            assert len(set(shown)) == 8
            share = 100 * np.mean([study.label[index] == study.prediction[index] for index in shown])
            shares.add(share)
            assert trial["questions"]["percent"]["truth"] == round(share)
    assert len(shares) > 1


@pytest.mark.parametrize("task", ["class_name", "agreement"])
def test_the_class(make: Callable[[str], Study], run: Path, task: str) -> None:
    study = make(task)
    names = readable(load(run)[0].classes)
    for trial, right, options in study.truths("class"):
        assert options[right] == names[study.label[trial["index"]]]


def test_distinction(make: Callable[[str], Study], run: Path) -> None:
    """The map of the right option is that of the true class."""
    study = make("distinction")
    explainer = EXPLAINERS.build("gradcam", {}, model=load(run)[0])
    assert {trial["condition"]["map"] for trial in study.trials.values()} == {"gradcam"}  # the others know no class
    for key, trial in study.trials.items():
        image = image_of(run, trial["index"])
        shown = study.page["trials"][key]["pictures"][1:]
        right = trial["questions"]["map"]["truth"]
        own = explainer.attribute(image[None], study.label[trial["index"]])[0].numpy()
        assert _picture(study, shown[right]["picture"]) == _drawn(image, own)


def _picture(study: Study, key: str) -> str:
    return str(study.page["pictures"][key])


def _drawn(image: torch.Tensor, map: np.ndarray) -> str:
    return visual.jpeg_uri(visual.drawn(visual.to_uint8(image), map)[0])


def covered(image: torch.Tensor, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
    changed = image.clone()
    changed[:, top:bottom, left:right] = 0.5
    return changed


@pytest.mark.parametrize("task", ["simulation", "class_name"])
def test_no_example_is_asked_about(make: Callable[[str], Study], task: str) -> None:
    """Its caption tells the answer."""
    study = make(task)
    plain = [study.page["trials"][key] for key, one in study.trials.items() if one["condition"]["map"] == "no map"]
    asked = {one["picture"] for trial in plain for one in trial["pictures"]}
    examples = {one["picture"] for trial in plain for one in trial["examples"]}
    assert asked
    assert examples
    assert not asked & examples


@pytest.mark.parametrize(("task", "key"), [("simulation", "recognised"), ("counterfactual", "same")])
def test_both_answers_are_right_equally_often(make: Callable[[str], Study], task: str, key: str) -> None:
    counts = Counter(right for _, right, _ in make(task).truths(key))
    assert counts[0] == counts[1]


def test_another_study_does_not_replace_one_that_may_be_handed_out(
    make: Callable[[str], Study], run: Path, script: Script
) -> None:
    first = make("coverage").key
    assert script("evaluate", run, *PLAN, "userstudy=coverage").code == 0
    assert not (run / "evaluation" / "studies" / "coverage-2").exists()  # the same study
    outcome = script("evaluate", run, *PLAN, "userstudy=coverage", "study.trials=3")
    assert "studies/coverage-2/study.html" in outcome.out
    assert make("coverage").key == first


def test_a_study_that_was_handed_out_is_kept(make: Callable[[str], Study], run: Path, script: Script) -> None:
    """Another evaluation shows the same pictures, but its values belong to the answer key; a page alone may be out."""
    make("quality")
    folder, before = run / "evaluation/studies/quality", {}
    for name in ("study.html", "study.json"):
        before[name] = (folder / name).read_bytes()
    plan = [one.replace("[ad, dauc]", "[dauc]") for one in PLAN]
    assert script("evaluate", run, *plan, "userstudy=quality").code == 0
    assert {name: (folder / name).read_bytes() for name in before} == before
    of_second = json.loads((run / "evaluation/studies/quality-2/study.json").read_text())
    assert list(of_second["higher_is_better"]) == ["dauc"]
    (folder / "study.json").rename(run / "kept.json")
    (run / "evaluation/studies/quality-2/study.json").write_text("{")
    assert script("evaluate", run, *PLAN, "userstudy=quality").code == 0
    assert (folder / "study.html").read_bytes() == before["study.html"]
    assert (run / "evaluation/studies/quality-3/study.json").is_file()


def test_the_same_eight_images_are_shown_once() -> None:
    """Of 7 right and 2 wrong predictions there are nine sets: one wrong with all right, or both with six."""
    seen = [Seen(index, "", 0, int(index > 6), 1.0, 0) for index in range(9)]
    pool: Any = SimpleNamespace(indices=list(range(9)), sources=lambda **_: ["map"], seen=lambda index: seen[index])
    items = ModelAccuracy(pool, np.random.default_rng(0)).items(24)
    sets = {frozenset(item.about) for item in items}
    assert 5 <= len(items) == len(sets) <= 9
    assert {len(own) for own in sets} == {8}


def test_what_a_study_lacks_is_said(run: Path, script: Script) -> None:
    outcome = script("evaluate", run, *PLAN, "userstudy=agreement", "study.trials=100")
    assert outcome.code == 0
    assert "userstudy=agreement: intrinsic, random: left out, as no maps were found that differ" in outcome.err
    assert "of 100 wanted items are found; judge more images for more" in outcome.err


def test_features(make: Callable[[str], Study], run: Path) -> None:
    score, study = probabilities(load(run)[0].eval()), make("features")
    edges = [round(64 * place / 3) for place in range(4)]
    for trial, right, _ in study.truths("cell"):
        index = trial["index"]
        image = image_of(run, index)
        cells = [covered(image, edges[y], edges[y + 1], edges[x], edges[x + 1]) for y in range(3) for x in range(3)]
        with torch.no_grad():
            left = score(torch.stack(cells))[:, study.prediction[index]]
        assert right == int(left.argmin())


def test_features_takes_the_clearest_images_of_each_field() -> None:
    """Of 20 images, field 4 matters most on 14; the clearest have the highest numbers."""
    fields = [0, 1, 1, 2, 2, 2, *[4] * 14]

    class Known(Features):
        def _drops(self, index: int, name: str) -> NDArray[np.float64]:
            if index == 20:  # no field matters most
                return np.full(9, 100.0)
            return np.eye(9)[fields[index]] * (1 + index)

    pool: Any = SimpleNamespace(indices=list(range(21)), sources=lambda **_: ["map"])
    task = Known(pool, np.random.default_rng(0))
    assert {item.index for item in task.items(7)} == {0, 1, 2, 4, 5, 18, 19}
    assert {item.index for item in task.items(8)} == {0, 1, 2, 4, 5, 17, 18, 19}


def test_counterfactual(make: Callable[[str], Study], run: Path) -> None:
    model, study = load(run)[0].eval(), make("counterfactual")
    for trial, right, options in study.truths("same"):
        with torch.no_grad():
            found = int(model(covered(image_of(run, trial["index"]), *trial["about"])[None]).logits.argmax())
        assert options[right] == ("yes" if found == study.prediction[trial["index"]] else "no")
    assert {right for _, right, _ in study.truths("same")} == {0, 1}


def test_preference_has_both_orders(make: Callable[[str], Study]) -> None:
    study = make("preference")
    pairs = Counter(tuple(trial["questions"]["better"]["stands_for"]) for trial in study.trials.values())
    names = ("intrinsic", "gradcam", "random")
    assert set(pairs) == {(a, b) for a in names for b in names if a != b}
    assert len(set(pairs.values())) == 1


def test_justification_shows_errors_alone(make: Callable[[str], Study]) -> None:
    study = make("justification")
    assert all(study.label[trial["index"]] != study.prediction[trial["index"]] for trial in study.trials.values())
