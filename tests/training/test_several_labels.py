"""Trainings on images with several labels: loss, mean average precision, checkpoints, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from interp_models import MODELS, load, probabilities
from interp_models.core.errors import InputError
from interp_models.core.outputs import InterpOutput, LabelOutput
from interp_models.core.scoring import scores_of
from interp_models.models.cnn import CNN
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config
from interp_models.runs.preparation import check_images
from interp_models.runs.resume import check_same_task
from interp_models.training.checkpoints import read_checkpoint
from interp_models.training.module import FORMAT_VERSION, LABELS_VERSION, InterpModule
from interp_models.training.recipe import Optimizer, Phase, Recipe
from interp_models.training.tasks import MeanAveragePrecision, average_precision, cross_entropy
from tests.conftest import Cub, Script, copy_run, fit, squares_config, tiny_config, tiny_options
from tests.contract.models import images

PRESENT = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
FOR_LABELS = [name for name in MODELS.names() if "labels" in MODELS.get(name).tasks]


# The loss


def test_the_loss_by_hand() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -2.0], [1.0, 1.0, -0.5]], dtype=torch.float64)
    probability = [[1 / (1 + math.exp(-z)) for z in row] for row in logits.tolist()]
    pairs = [
        (p, y) for row, own in zip(probability, PRESENT.tolist(), strict=True) for p, y in zip(row, own, strict=True)
    ]
    by_hand = -sum(math.log(p) if y else math.log(1 - p) for p, y in pairs) / 9
    assert float(cross_entropy("labels", logits, PRESENT)) == pytest.approx(by_hand, abs=1e-15)
    smooth = -sum((0.9 * y + 0.05) * math.log(p) + (0.95 - 0.9 * y) * math.log(1 - p) for p, y in pairs) / 9
    assert float(cross_entropy("labels", logits, PRESENT, 0.1)) == pytest.approx(smooth, abs=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_label_is_a_class_of_two(smoothing: float) -> None:
    """sigmoid(z) is the softmax of -z / 2 and z / 2, and the smoothed targets are the same."""
    z = torch.randn(6, 1, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    two = cross_entropy("classes", torch.cat([-z / 2, z / 2], dim=1), y, smoothing)
    torch.testing.assert_close(cross_entropy("labels", z, y[:, None].bool(), smoothing), two, rtol=1e-14, atol=0)


def test_the_loss_of_classes_is_torchs() -> None:
    logits, y = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    assert torch.equal(cross_entropy("classes", logits, y, 0.1), F.cross_entropy(logits, y, label_smoothing=0.1))


# Mean average precision


def test_average_precision_of_four_images_by_hand() -> None:
    scores = torch.tensor([[9.0, 1.0, 5.0, 0.0], [7.0, 2.0, 5.0, 1.0], [5.0, 3.0, 5.0, 2.0], [3.0, 4.0, 1.0, 3.0]])
    present = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]).bool()
    by_hand = [
        (1 / 1 + 2 / 3) / 2,  # right at ranks 1 and 3
        (1 / 1 + 2 / 4) / 2,  # right at ranks 1 and 4, from the last image on
        (1 / 3 + 2 / 4) / 2,  # three images of one score come together: one of them is right
        math.nan,  # it does not occur
    ]
    found = average_precision(scores, present)
    assert found.tolist() == pytest.approx(by_hand, nan_ok=True)
    metric = MeanAveragePrecision()
    for rows in ([2, 0], [3], [1]):  # in any order and batches
        metric.update(scores[rows], present[rows])
    assert float(metric.compute()) == pytest.approx(sum(by_hand[:3]) / 3)


def test_mean_average_precision_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 4, generator=generator).mul(20).round() / 20  # with equal ones
    present = torch.rand(50, 4, generator=generator) < torch.tensor([0.1, 0.4, 0.8, 0.5])
    other, own = MultilabelAveragePrecision(4, average="macro"), MeanAveragePrecision()
    other.update(scores, present.long())
    own.update(scores, present)
    assert float(own.compute()) == pytest.approx(float(other.compute()), abs=1e-6)
    assert float(own.compute()) < 0.9
    own.update(torch.tensor([[math.nan, 0, 0, 0]]), present[:1])
    assert math.isnan(own.compute())


def test_large_logits_keep_their_order() -> None:
    metric = MeanAveragePrecision()
    metric.update(torch.tensor([[60.0], [50.0], [0.5]]), torch.tensor([[True], [False], [False]]))
    assert float(metric.compute()) == 1.0


# Every model


def made(name: str, task: Any = "labels") -> InterpModule:
    torch.manual_seed(0)
    model = MODELS.build(name, tiny_options(name), num_classes=3)
    model.learn(task)
    return model


def test_models_that_can() -> None:
    assert FOR_LABELS == ["bcnn", "br_npa", "cnn", "dpnet", "selu_cnn", "vit_cls"]


@pytest.mark.parametrize("name", MODELS.names())
def test_a_model_learns_labels_or_refuses(name: str) -> None:
    """Its output says how it is read; nothing else of it changes; six images are learnt by heart."""
    if name not in FOR_LABELS:
        assert made(name, "classes").task == "classes"
        with pytest.raises(InputError, match="learns one class per image, as its loss needs; it cannot learn several"):
            made(name)
        return
    model, other = made(name).eval(), made(name, "classes").eval()
    x = images(6)
    found, plain = model(x), other(x)
    assert type(found) is LabelOutput
    assert type(plain) is InterpOutput
    assert torch.equal(found.logits, plain.logits)
    assert torch.equal(found.maps, plain.maps)
    torch.testing.assert_close(scores_of(found, "probability"), found.logits.sigmoid())
    torch.testing.assert_close(probabilities(model)(x), found.logits.sigmoid(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probabilities(other)(x), plain.logits.softmax(dim=1), rtol=1e-5, atol=1e-6)
    y = PRESENT.repeat(2, 1)
    assert model.loss(found, y)["ce"].item() == pytest.approx(cross_entropy("labels", found.logits, y).item())
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.stack(list(model.loss(model(x), y).values())).sum().backward()
        optimizer.step()
    assert bool(((model(x).logits[:3] > 0) == PRESENT).all())


# A training


@pytest.fixture
def run(squares: dict[str, Any], tmp_path: Path) -> Path:
    return fit(squares_config(tmp_path / "tiny" / "run"))


def by_hand(run: Path, ckpt: Any, split: str) -> float:
    """The mean average precision of a run, from its outputs."""
    model, _ = load(run, ckpt)
    data = build_data(run_config(run))
    batches = list(data.loader(split))
    with torch.no_grad():
        logits = torch.cat([model(batch.image).logits for batch in batches])
    targets = torch.cat([batch.label for batch in batches])
    values = []
    for z, y in zip(logits.T.tolist(), targets.T.tolist(), strict=True):
        ranked = [present for _, present in sorted(zip(z, y, strict=True), key=lambda pair: -pair[0])]
        hits = [sum(ranked[: n + 1]) / (n + 1) for n, present in enumerate(ranked) if present]
        if hits:
            values.append(sum(hits) / len(hits))
    return sum(values) / len(values)


def test_a_run(run: Path) -> None:
    """Epochs are selected by the mean average precision of all validation images; a loaded run knows its task."""
    metrics, table = json.loads((run / "metrics.json").read_text()), pd.read_csv(run / "metrics.csv")
    assert {"val/mean_ap", "test/mean_ap", "test/n"} <= metrics.keys()
    assert not any("acc" in key for key in (*metrics, *table))
    assert metrics["val/mean_ap"] == pytest.approx(table["val/mean_ap"].max())
    assert metrics["epoch"] == table["val/mean_ap"].argmax()
    assert metrics["val/mean_ap"] == pytest.approx(by_hand(run, "best", "val"), abs=1e-6)
    assert metrics["test/mean_ap"] == pytest.approx(by_hand(run, "best", "test"), abs=1e-6)
    assert metrics["test/n"] == 16
    own = read_checkpoint(run / "checkpoints/best.ckpt")["interp_models"]
    assert (own["task"], own["format_version"]) == ("labels", LABELS_VERSION)
    assert not (run / "confusion.png").exists()
    model, _ = load(run)
    assert model.task == "labels"
    assert type(model(images(2))) is LabelOutput


def test_a_run_of_classes_is_as_before(bcnn_run: Path) -> None:
    own = read_checkpoint(bcnn_run / "checkpoints/best.ckpt")["interp_models"]
    assert own["format_version"] == FORMAT_VERSION == 1
    assert "task" not in own
    assert load(bcnn_run)[0].task == "classes"


def test_one_step_is_that_of_plain_torch(squares: dict[str, Any], tmp_path: Path) -> None:
    config = squares_config(tmp_path / "run", optimizer={"name": "sgd", "momentum": 0.0, "weight_decay": 0.0})
    config["data"] |= {"batch_size": 5, "augment": False}
    config["phases"] = [{"epochs": 1, "lrs": {"head": 0.5}, "eval_modules": ["backbone"]}]
    config["trainer"]["limit_train_batches"] = 1
    after, epochs = [], (0, 1)
    for number in epochs:
        config["phases"][0]["lrs"] = {"head": 0.5 * number}
        run = fit(config | {"out": str(tmp_path / str(number))})
        after.append(read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"])
    data = build_data(config)
    batch = next(iter(data.train_dataloader()))
    model = load(tmp_path / "0", "last")[0]
    with torch.no_grad():
        pooled = model.backbone(batch.image).mean(dim=(2, 3))
        logits = pooled @ after[0]["head.weight"].T + after[0]["head.bias"]
        gradient = (logits.sigmoid() - batch.label.float()) / logits.numel()  # of the mean over images and classes
    for key, step in (("head.weight", gradient.T @ pooled), ("head.bias", gradient.sum(dim=0))):
        torch.testing.assert_close(after[1][key], after[0][key] - 0.5 * step, rtol=1e-4, atol=1e-6)
        assert float(step.abs().max()) > 1e-3


def test_a_resumed_run_ends_with_the_same_weights(squares: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(squares_config(tmp_path / "a" / "run"))
    config = squares_config(tmp_path / "b" / "run")
    two = config["phases"]
    part = fit(config | {"phases": [{**two[0], "epochs": 1}]})
    fit(config, resume=part)
    a, b = (read_checkpoint(run / "checkpoints/last.ckpt") for run in (whole, part))
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())
    assert a["epoch"] == b["epoch"] == 1
    assert (whole / "metrics.csv").read_text() == (part / "metrics.csv").read_text()


def test_features_pictures_and_lists(squares: dict[str, Any], tmp_path: Path, script: Script) -> None:
    """Cached features train as images do; pictures name all labels; the list of runs has the measure."""
    frozen = {"phases": [{"epochs": 2, "lrs": {"head": 0.1}, "eval_modules": ["backbone"]}]}
    states = []
    for name, more in (("images", {}), ("features", {"feature_cache": str(tmp_path / "cache")})):
        config = squares_config(tmp_path / "runs" / name, **frozen, **more)
        config["data"] |= {"augment": False}
        config["attention"] = {"every_n_epochs": 1, "n_images": 3}
        states.append(read_checkpoint(fit(config) / "checkpoints/last.ckpt")["state_dict"])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)
    assert len(list((tmp_path / "runs/images/attention").glob("*.png"))) == 2
    listed = script("train", "--list-runs", str(tmp_path / "runs")).out
    test = json.loads((tmp_path / "runs/images/metrics.json").read_text())["test/mean_ap"]
    assert listed.count(f"{100 * test:.2f}") >= 2


# What is refused


def test_models_and_data_of_other_tasks_are_refused(
    squares: dict[str, Any], tiny_cub: Cub, run: Path, cnn_run: Path, tmp_path: Path
) -> None:
    wrong = squares_config(tmp_path / "wrong", model={"name": "protopnet", **tiny_options("protopnet")})
    wrong["phases"] = [{"epochs": 1, "lrs": {"add_on": 0.1, "prototypes": 0.1}, "on_end": ["push"], "select": "last"}]
    with pytest.raises(InputError, match="ProtoPNet learns one class per image, as its loss needs"):
        fit(wrong)
    assert not (tmp_path / "wrong").exists()
    plain, several = build_data(tiny_config(tiny_cub.root)), build_data(squares_config(tmp_path))
    check_same_task("classes", plain, "a")
    check_same_task("labels", several, "a")
    with pytest.raises(InputError, match=r"a: was trained for one class per image, the images .* have several labels"):
        check_same_task("classes", several, "a")
    with pytest.raises(InputError, match=r"a: was trained for several labels per image, the images .* have one class"):
        check_same_task("labels", plain, "a")


class Forgetful(CNN):
    def forward(self, images: Tensor) -> InterpOutput:
        return InterpOutput(*super().forward(images))


def test_a_model_whose_output_does_not_say_how_it_is_read_is_refused(squares: dict[str, Any], tmp_path: Path) -> None:
    data = build_data(squares_config(tmp_path))
    options = {"backbone": "test_efficientnet", "weights": None, "output_stride": 16}
    for cls, task in ((CNN, "labels"), (Forgetful, "classes"), (Forgetful, "labels")):
        model = cls(3, **options)
        model.learn(task)
        model.recipe = Recipe([Phase(lrs={"head": 0.1})], Optimizer("sgd"))
        if cls is CNN or task == "classes":
            check_images(model, data, 1)
            continue
        with pytest.raises(InputError, match=r"Forgetful: forward must make its output by self.output\(...\)"):
            check_images(model, data, 1)


def test_a_resumed_run_of_another_task_is_refused(squares: dict[str, Any], run: Path, tmp_path: Path) -> None:
    config = squares_config(run, phases=[{"epochs": 3, "lrs": {"backbone": 1e-2, "head": 1e-2}}])
    config["data"]["dataset"] = {"name": "squares"}
    path = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["interp_models"].pop("task")
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="was trained for one class per image, the images of the data set"):
        fit(config, resume=run)


def test_teachers_are_refused(squares: dict[str, Any], run: Path, tiny_cub: Cub, cnn_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"distillation.teacher: needs one class per image; the images have several"):
        fit(squares_config(tmp_path / "student", distillation={"teacher": str(run)}))
    student = squares_config(tmp_path / "student", distillation={"teacher": str(run)})
    student["data"]["dataset"] = {"name": "squares", "plain": True}
    with pytest.raises(InputError, match="was trained for several labels per image, the images have one"):
        fit(student)


def test_ensembles_are_refused(squares: dict[str, Any], run: Path, tmp_path: Path, script: Script) -> None:
    other = copy_run(run, tmp_path / "tiny" / "other")
    done = script("evaluate", "--ensemble", run, other, "out=" + str(tmp_path / "out"))
    assert done.code != 0
    assert "an ensemble needs one class per image; the images of these runs have several labels" in done.err
