"""Evaluations of images with several labels: a map and values for each label of an image."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from interp_models import DATASETS, EXPLAINERS, METRICS, Classifier, InputError, judge, load, probabilities
from interp_models.evaluation.engine import _correct
from interp_models.evaluation.judgement import Judgement
from interp_models.evaluation.statistics import interval
from interp_models.evaluation.tables import image_means, read_tables
from interp_models.metrics.case import Case
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config
from tests import processes
from tests.conftest import QUICK_EVALUATION, Script, fit, squares_config
from tests.evaluation.test_judge import network, pictures

LABELS = [[1, 3], [], [0], [0, 1, 2], [2], [], [3, 0]]
ROWS = [(0, 1), (0, 3), (2, 0), (3, 0), (3, 1), (3, 2), (4, 2), (6, 0), (6, 3)]
"""Index of the image and class of every row."""
PLAN = ["gradcam", {"name": "rise", "masks": 20}, "integrated_gradients", "random"]
QUICK: dict[str, Any] = {"progress": False, "max_steps": 4}


def model() -> Classifier:
    """A network of four independent labels."""
    return Classifier(network(), output="sigmoid")


def hot() -> Tensor:
    found = torch.zeros(7, 4, dtype=torch.bool)
    for index, label in ROWS:
        found[index, label] = True
    return found


def table(judgement: Judgement, explainer: str, metric: str) -> pd.DataFrame:
    rows = judgement.per_image
    return rows[(rows["explainer"] == explainer) & (rows["metric"] == metric)]


# judge


def test_each_label_has_the_map_and_the_values_of_its_class() -> None:
    net, images = model(), pictures()
    every_key = [key for name in METRICS.names() for key in METRICS.get(name).keys]
    found = judge(net, images, PLAN, every_key, labels=LABELS, target="label", batch_size=3, **QUICK)
    score_fn = probabilities(net)
    rows, target = (torch.tensor(values) for values in zip(*ROWS, strict=True))
    with torch.no_grad():
        sigmoids = net.network.eval()(images).sigmoid()
    for label, options in (("gradcam", {}), ("rise", {"masks": 20}), ("integrated_gradients", {}), ("random", {})):
        explainer = EXPLAINERS.build(label, options, model=net)
        maps = torch.cat([explainer.attribute(images[i : i + 1], k) for i, k in ROWS])
        np.testing.assert_allclose(found.maps[label], maps, rtol=1e-3, atol=1e-5)
        for name in ("deletion_insertion", "masked_confidence"):
            metric = METRICS.build(name, {"grid": (8, 8), "max_steps": 4})
            for key, value in metric.score(Case(images[rows], maps, target, score_fn)).items():
                own = table(found, label, key)
                assert list(zip(own["index"], own["target_class"], strict=True)) == ROWS
                np.testing.assert_allclose(own["value"], value, atol=1e-3)
    own = table(found, "gradcam", "dauc")
    np.testing.assert_allclose(own["probability"], sigmoids[rows, target], rtol=1e-5)
    np.testing.assert_allclose(own["confidence"], sigmoids[rows].amax(dim=1), rtol=1e-5)
    assert own["prediction"].tolist() == sigmoids[rows].argmax(dim=1).tolist()
    assert [list(labels) for labels in own["labels"]] == [sorted(LABELS[index]) for index, _ in ROWS]
    assert "label" not in own
    listing = found.tables.listing
    assert list(zip(listing["index"], listing["target_class"], strict=True)) == ROWS
    assert listing["row"].tolist() == list(range(9))
    assert not np.allclose(found.maps["gradcam"][0], found.maps["gradcam"][1])  # of two labels of one image


def test_means_and_intervals_are_over_images() -> None:
    """Rows of one image are not independent: they are averaged first. n = 5 images."""
    found = judge(model(), pictures(), ["random"], ["dauc", "iic"], labels=LABELS, target="label", **QUICK)
    value = table(found, "random", "dauc")["value"].tolist()
    of_images = [(value[0] + value[1]) / 2, value[2], sum(value[3:6]) / 3, value[6], (value[7] + value[8]) / 2]
    row = found.summary[found.summary["metric"] == "dauc"].iloc[0]
    mean = sum(of_images) / 5
    low, high = interval(np.array(of_images))
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((mean, low, high))
    assert (row["n"], row["n_undefined"]) == (5, 0)
    assert row["passes"] == pytest.approx(0)
    costs = judge(model(), pictures(), ["gradcam"], labels=LABELS, target="label", **QUICK).summary
    assert costs["passes"].tolist() == pytest.approx([9 / 5] * len(costs))  # 9 maps of 5 images
    nan = torch.nan
    found_means = image_means(torch.tensor([7, 2, 7, 2, 5]), torch.tensor([1.0, nan, 3.0, nan, nan]))
    np.testing.assert_equal(found_means.numpy(), np.array([nan, nan, 2.0], np.float32))


def test_images_without_a_label_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = judge(model(), pictures(), ["gradcam"], labels=LABELS, target="label", **QUICK)
    assert "2 images have no label and were not explained (target=label)" in capsys.readouterr().err
    assert found.tables.without_label == 2
    assert (found.summary_of_model.n_judged, found.summary_of_model.without_label) == (5, 2)
    every = judge(model(), pictures(), ["gradcam"], labels=[[0]] * 7, target="label", **QUICK)
    assert "no label" not in capsys.readouterr().err
    assert every.tables.without_label == 0


def test_a_prediction_has_one_row() -> None:
    found = judge(model(), pictures(), ["gradcam"], labels=LABELS, **QUICK)
    plain = judge(model(), pictures(), ["gradcam"], **QUICK)
    np.testing.assert_array_equal(found.maps["gradcam"], plain.maps["gradcam"])
    own = table(found, "gradcam", "dauc")
    assert own["index"].tolist() == list(range(7))
    right = [prediction in labels for prediction, labels in zip(own["prediction"], LABELS, strict=True) if labels]
    assert found.tables.accuracy == pytest.approx(sum(right) / 5)
    assert plain.tables.accuracy is None
    assert "target_class" not in found.tables.listing
    number = judge(model(), pictures(), ["gradcam"], labels=LABELS, target=2, **QUICK)
    assert set(number.per_image["target_class"]) == {2}
    assert len(number.maps["gradcam"]) == 7


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_one_label_each_is_as_single_classes(output: str) -> None:
    labels = [3, 1, 0, 2, 2, 1, 0]
    net = Classifier(network(), output=output)
    single = judge(net, pictures(), PLAN, labels=labels, target="label", batch_size=3, **QUICK)
    several = judge(net, pictures(), PLAN, labels=[[k] for k in labels], target="label", batch_size=3, **QUICK)
    for label in ("gradcam", "rise", "integrated_gradients", "random"):
        np.testing.assert_array_equal(several.maps[label], single.maps[label])
    assert several.tables.rows == single.tables.rows
    assert several.tables.accuracy == single.tables.accuracy
    shared = [column for column in single.per_image if column != "label"]
    pd.testing.assert_frame_equal(several.per_image[shared], single.per_image[shared])


class Pairs(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        return {"image": pictures()[index], "labels": hot()[index]}


@pytest.mark.parametrize("kind", ["tensor", "array", "tuples", "objects", "pairs", "loader", "dicts"])
def test_labels_of_any_form(kind: str) -> None:
    images, more = pictures(), {}
    given: Any = images
    if kind in ("tensor", "array", "tuples", "objects"):
        labels: Any = {"tensor": hot(), "array": hot().numpy(), "tuples": [tuple(own) for own in LABELS]}
        labels["objects"] = np.array(LABELS, dtype=object)
        more = {"labels": labels[kind]}
    else:
        pairs = TensorDataset(images, hot())
        given = {"pairs": pairs, "loader": DataLoader(pairs, batch_size=2), "dicts": Pairs()}[kind]
    found = judge(model(), given, ["gradcam"], target="label", **more, **QUICK)
    expected = judge(model(), images, ["gradcam"], labels=LABELS, target="label", **QUICK)
    np.testing.assert_allclose(found.maps["gradcam"], expected.maps["gradcam"], rtol=1e-4, atol=1e-6)
    assert table(found, "gradcam", "ad")[["index", "target_class"]].to_numpy().tolist() == [list(row) for row in ROWS]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0]] * 6, "labels: 6 lists of classes are given, and there are 7 images"),
        ([[0, 0], *[[1]] * 6], r"labels\[0\] must list different classes, whole numbers from 0; got \[0, 0\]"),
        ([*[[1]] * 6, [-1]], r"labels\[6\] must list different classes, whole numbers from 0; got \[-1\]"),
        ([[0.5], *[[1]] * 6], r"labels\[0\] must list different classes"),
        ([[4], *[[1]] * 6], "target 'label': label 4 is out of range; the model has classes 0 to 3"),
        ([[]] * 7, "target 'label': no image has a label; target='prediction' works"),
        (torch.ones(7, 4), r"labels must be 7 whole numbers, one per image; got \(7, 4\) of torch.float32"),
        (torch.ones(6, 4, dtype=torch.bool), "labels: 6 rows of bool are given, and there are 7 images"),
        (np.array([[0], [1, 2]], dtype=object), "labels: 2 lists of classes are given, and there are 7 images"),
    ],
)
def test_wrong_labels_are_refused(labels: Any, expected: str) -> None:
    assert len(judge(model(), pictures(), ["random"], labels=[[3]] * 7, target="label", **QUICK).maps["random"]) == 7
    with pytest.raises(InputError, match=expected):
        judge(model(), pictures(), ["random"], labels=labels, target="label", **QUICK)


def test_a_broken_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other batches than before: rows of an image stay together, and each occurs once."""
    call: dict[str, Any] = {"labels": LABELS, "target": "label", **QUICK}
    expected = judge(model(), pictures(), ["gradcam", "random"], batch_size=2, **call)
    seen = 0
    real = EXPLAINERS.get("random").attribute

    def broken(self: Any, *args: Any, **options: Any) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(EXPLAINERS.get("random"), "attribute", broken)
        with pytest.raises(KeyboardInterrupt):
            judge(model(), pictures(), ["gradcam", "random"], batch_size=3, folder=tmp_path / "out", **call)
    assert list((tmp_path / "out/.partial").rglob("*.pt"))
    found = judge(model(), pictures(), ["gradcam", "random"], batch_size=2, folder=tmp_path / "out", **call)
    for label in ("gradcam", "random"):
        np.testing.assert_allclose(found.maps[label], expected.maps[label], rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(found.per_image, expected.per_image, rtol=1e-4, atol=1e-4)
    again = Judgement.load(tmp_path / "out")
    assert again.tables.without_label == 2
    assert [list(own) for own in again.per_image["labels"]] == [list(own) for own in found.per_image["labels"]]
    other = judge(model(), pictures(), ["random"], labels=[[0]] * 7, target="label", folder=tmp_path / "out", **QUICK)
    assert len(other.maps["random"]) == 7  # other labels, so the old results are not taken


def test_the_page_shows_every_label(tmp_path: Path) -> None:
    names = ["ape", "bee", "cow", "dog"]
    labels = [[1, 3], [], [0], [0, 1, 2], [2], [], [3, 0]]
    found = judge(model(), pictures(), ["gradcam"], labels=labels, classes=names, target="label", **QUICK)
    page = found.report(tmp_path / "page.html").read_text()
    views = page.split('<article class="view"')[1:]
    assert len(views) == 9
    own = table(found, "gradcam", "ad")
    for view, (index, label), prediction in zip(views, ROWS, own["prediction"], strict=True):
        assert f"<h3>{index}</h3>" in view
        assert re.search(r"true labels</span><br>([^<]*)<", view)[1] == ", ".join(
            names[k] for k in sorted(labels[index])
        )  # type: ignore[index]
        assert re.search(r"class explained</span><br>(\w+)<", view)[1] == names[label]  # type: ignore[index]
        assert ("✓ right" in view) == (prediction in labels[index])
        assert ("✗ wrong" in view) == (prediction not in labels[index])
    assert "2 without label" in page
    by_prediction = judge(model(), pictures(), ["gradcam"], labels=labels, classes=names, **QUICK)
    page = by_prediction.report(tmp_path / "page.html").read_text()
    assert page.count("true labels</span><br>none<") == 2
    assert page.count("✓ right") + page.count("✗ wrong") == 5
    assert "class explained</span>" not in page


def test_a_data_set_is_judged(squares: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Classifier(network(3), mean=(0.5,) * 3, std=(0.5,) * 3, output="sigmoid")
    images = DATASETS.build("squares", {}, split="test")
    found = judge(net, images, ["gradcam"], target="label", n_images=6, image_size=64, **QUICK)
    listing = found.tables.listing
    assert all(label in images.labels[i] for i, label in zip(listing["index"], listing["target_class"], strict=True))
    assert len(listing) == sum(len(images.labels[i]) for i in set(listing["index"]))
    assert listing["index"].nunique() + found.tables.without_label == 6


def _rank(rank: int, folder: Path) -> None:
    found = judge(model(), pictures(), ["gradcam", "random"], labels=LABELS, target="label", batch_size=2, **QUICK)
    torch.save({key: torch.as_tensor(np.array(maps)) for key, maps in found.maps.items()}, folder / f"{rank}.pt")
    found.per_image.drop(columns=["labels", "steps"]).to_parquet(folder / f"{rank}.parquet")
    (folder / f"{rank}.json").write_text(json.dumps([found.tables.without_label, len(found.tables.listing)]))


def test_two_processes_judge_as_one(tmp_path: Path) -> None:
    processes.run_ranks(_rank, tmp_path)
    alone = judge(model(), pictures(), ["gradcam", "random"], labels=LABELS, target="label", batch_size=2, **QUICK)
    for rank in range(2):
        maps = torch.load(tmp_path / f"{rank}.pt")
        for label in ("gradcam", "random"):
            np.testing.assert_allclose(maps[label], alone.maps[label], rtol=1e-5, atol=1e-6)
        both = pd.read_parquet(tmp_path / f"{rank}.parquet")
        pd.testing.assert_frame_equal(both, alone.per_image.drop(columns=["labels", "steps"]), rtol=1e-4, atol=1e-4)
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [2, 9]


# evaluate.py


@pytest.fixture
def run(squares: dict[str, Any], tmp_path: Path) -> Path:
    return fit(squares_config(tmp_path / "tiny" / "run"))


def test_a_run_is_evaluated(run: Path, script: Script) -> None:
    plan = [*QUICK_EVALUATION, "explainers=[intrinsic, gradcam, random]", "target=label"]
    done = script("evaluate", run, *plan)
    assert done.code == 0, done.err
    assert "2 images have no label and were not explained (target=label)" in done.err
    assert "over 14 images; class explained: label" in done.out
    tables, data = read_tables(run / "evaluation"), build_data(run_config(run))
    net = load(run)[0]
    rows = [(i, k) for i, own in enumerate(data.test_images.labels) for k in own]
    listing = tables.listing
    assert list(zip(listing["index"], listing["target_class"], strict=True)) == rows
    images = torch.stack([data.dataset("test")[0, i].image for i, _ in rows])
    maps = EXPLAINERS.build("gradcam", {}, model=net).attribute(images, torch.tensor([k for _, k in rows]))
    np.testing.assert_allclose(tables.maps["gradcam"], maps, rtol=1e-3, atol=1e-5)
    own = tables.per_image[(tables.per_image["explainer"] == "gradcam") & (tables.per_image["metric"] == "dauc")]
    with torch.no_grad():
        expected = net(images).logits.sigmoid()[torch.arange(len(rows)), torch.tensor([k for _, k in rows])]
    np.testing.assert_allclose(own["probability"], expected, rtol=1e-4)
    page = (run / "evaluation/report.html").read_text()
    assert "<small>mean average precision</small>" in page
    assert "2 without label" in page
    again = script("evaluate", run, *plan)
    assert "nothing has changed since; it is not repeated" in again.out


def test_the_same_run_by_single_classes(squares: dict[str, Any], tmp_path: Path, script: Script) -> None:
    """Images of one label each: every table and map is that of a data set of single classes."""
    found = []
    run = fit(squares_config(tmp_path / "tiny" / "run"))
    for name in ("one", "plain"):
        out = tmp_path / name
        net = load(run)[0]
        images = DATASETS.build("squares", {name: True}, split="test")
        found.append(judge(net, images, ["gradcam", "intrinsic"], target="label", folder=out, image_size=64, **QUICK))
    assert found[0].tables.rows == found[1].tables.rows
    for label in ("gradcam", "intrinsic"):
        np.testing.assert_array_equal(found[0].maps[label], found[1].maps[label])


def test_data_of_another_task_are_refused(run: Path, script: Script) -> None:
    assert script("evaluate", run, *QUICK_EVALUATION).code == 0
    done = script("evaluate", run, *QUICK_EVALUATION, "dataset.plain=true")
    assert done.code != 0
    assert "was trained for several labels per image, the images of the data set have one class" in done.err


def test_validation_judges_every_label(squares: dict[str, Any], tmp_path: Path) -> None:
    plan = {"every_n_epochs": 1, "explainers": ["random"], "metrics": ["dauc"], "target": "label", "max_steps": 3}
    run = fit(squares_config(tmp_path / "run", evaluation=plan, phases=[{"epochs": 1, "lrs": {"head": 0.1}}]))
    logged = pd.read_csv(run / "metrics.csv")["val/dauc/random"].iloc[0]
    net, data = load(run, "last")[0], build_data(run_config(run))
    dataset = data.dataset("val")
    means = []
    for position, index in enumerate(data.val_indices.tolist()):
        own = data.train_images.labels[index]
        if not own:
            continue
        images, target = dataset[0, position].image[None].repeat(len(own), 1, 1, 1), torch.tensor(own)
        maps = EXPLAINERS.build("random", {}, model=net).attribute(images, target)
        metric = METRICS.build("dauc", {"grid": tuple(net(images).maps.shape[2:]), "max_steps": 3})
        means.append(float(metric.score(Case(images, maps, target, probabilities(net)))["dauc"].mean()))
    assert len(means) >= 2
    assert logged == pytest.approx(sum(means) / len(means), abs=1e-4)


def test_a_run_judges_image_files(run: Path, script: Script, tmp_path: Path) -> None:
    """Options of the run's own data set do not stay, and images without labels have no task."""
    (tmp_path / "files").mkdir()
    for number in range(3):
        Image.new("RGB", (70, 64), (80 * number, 30, 60)).save(tmp_path / f"files/{number}.png")
    data = ["dataset.name=image_files", f"dataset.root={tmp_path / 'files'}"]
    done = script("evaluate", run, *QUICK_EVALUATION, "n_images=null", "explainers=[random]", *data)
    assert done.code == 0, done.err
    assert "data: 3 images without labels" in done.err
    tables = read_tables(run / "evaluation")
    assert set(tables.per_image["label"]) == {-1}
    assert tables.accuracy is None
    done = script("evaluate", run, *QUICK_EVALUATION, "explainers=[random]", "target=label", *data)
    assert done.code == 2
    assert done.err.endswith("target label: the images have no labels; target=prediction works\n")


def test_an_image_without_a_label_is_neither_right_nor_wrong() -> None:
    label = torch.tensor([[False, True], [False, False], [True, False]])
    np.testing.assert_array_equal(_correct(torch.tensor([1, 0, 1]), label), [1.0, np.nan, 0.0])
