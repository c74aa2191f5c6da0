"""One call for any classifier, against the same numbers from the public functions by hand."""

import copy
import json
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import interp_models
from interp_models import EXPLAINERS, METRICS, Classifier, InputError, judge, probabilities
from interp_models.core.errors import NotApplicable
from interp_models.core.scoring import logits
from interp_models.data.base import Sample, collate
from interp_models.evaluation.judgement import Judgement
from interp_models.evaluation.statistics import interval
from interp_models.explainers import GradCAM, Random
from interp_models.metrics.case import Case
from interp_models.metrics.perturbation import to_grid
from interp_models.report import numbers
from tests import processes

PLAN = ["gradcam", {"name": "rise", "masks": 20}, "random"]
QUICK: dict[str, Any] = {"progress": False, "max_steps": 4}


def network(k: int = 4, channels: int = 3) -> nn.Module:
    """A small network in train mode, whose batch norms have seen something."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, k),
    )  # fmt: skip
    net(torch.rand(8, channels, 32, 32))
    return net


def pictures(n: int = 7, side: int = 32) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def values(judgement: Judgement, explainer: str, metric: str) -> Any:
    table = judgement.per_image
    return table[(table["explainer"] == explainer) & (table["metric"] == metric)].sort_values("index")["value"]


def test_values_are_those_of_the_public_functions() -> None:
    model, images = network(), pictures()
    every_key = [key for name in METRICS.names() for key in METRICS.get(name).keys]
    found = judge(model, images, PLAN, every_key, batch_size=3, **QUICK)
    score_fn = probabilities(model)
    target = score_fn(images).argmax(dim=1)
    for label, options in (("gradcam", {}), ("rise", {"masks": 20}), ("random", {})):
        maps = EXPLAINERS.build(label, options, model=model).attribute(images, target)
        np.testing.assert_allclose(found.maps[label], maps, rtol=1e-4, atol=1e-6)
        for name in METRICS.names():
            if {"boxes", "mask", "parts", "correct", "patch_scores"} & set(METRICS.get(name).needs):
                reasons = {found.left_out[key] for key in METRICS.get(name).keys}
                assert all(why.startswith(("needs ", "Sequential holds no vision transformer")) for why in reasons)
                continue
            metric = METRICS.build(name, {"grid": (8, 8), "max_steps": 4})
            explain = partial(EXPLAINERS.build(label, options, model=model).attribute, target=target)
            case = Case(images, maps, target, score_fn, explain=explain, logit_fn=logits(model))
            for key, value in metric.score(case).items():
                np.testing.assert_allclose(values(found, label, key), value, atol=1e-3)  # float32 correlations
    row = found.summary[(found.summary["explainer"] == "gradcam") & (found.summary["metric"] == "dauc")].iloc[0]
    of_images = values(found, "gradcam", "dauc").to_numpy(np.float64)
    assert row["mean"] == pytest.approx(of_images.mean())
    assert (row["low"], row["high"]) == pytest.approx(interval(of_images))
    assert (row["n"], row["n_undefined"]) == (7, 0)
    assert list(found.summary.groupby("explainer", sort=False)["passes"].first()) == [1.0, 21.0, 0.0]


def test_the_interval_covers_the_mean() -> None:
    """Of 2000 samples of 8 values, 95 % of the intervals hold the true mean, up to three standard errors."""
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 8))
    ends = np.array([interval(row) for row in draws])
    covered = float(((ends[:, 0] <= 3) & (ends[:, 1] >= 3)).mean())
    assert abs(covered - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 2000)
    assert interval(draws[0, :1]) == (None, None)


def test_nothing_of_the_model_changes() -> None:
    model = network()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    judge(model, pictures(), PLAN, **QUICK)
    judge(Classifier(model, mean=(0.5,) * 3, std=(0.5,) * 3), pictures(), ["gradcam"], **QUICK)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


class Dicts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": pictures()[index], "labels": torch.tensor(index % 4)}


@pytest.mark.parametrize("kind", ["loader", "pairs", "dicts", "list", "loader of dicts"])
def test_images_of_any_form(kind: str) -> None:
    labels = torch.arange(7) % 4
    pairs = TensorDataset(pictures(), labels)
    forms: dict[str, Any] = {
        "loader": DataLoader(pairs, batch_size=3),
        "pairs": pairs,
        "dicts": Dicts(),
        "list": [(image, int(label)) for image, label in zip(pictures(), labels, strict=True)],
        "loader of dicts": DataLoader(Dicts(), batch_size=2),
    }
    expected = judge(network(), pictures(), ["gradcam"], labels=labels, target="label", **QUICK)
    found = judge(network(), forms[kind], ["gradcam"], target="label", **QUICK)
    np.testing.assert_allclose(found.maps["gradcam"], expected.maps["gradcam"], rtol=1e-4, atol=1e-6)
    assert list(found.per_image["label"]) == list(expected.per_image["label"])
    np.testing.assert_allclose(values(found, "gradcam", "iauc"), values(expected, "gradcam", "iauc"), atol=1e-5)


def test_labels_of_other_classes_than_the_models_are_refused() -> None:
    pairs = TensorDataset(pictures(), torch.arange(7) % 2)
    pairs.classes = list("abcd")  # type: ignore[attr-defined]
    found = judge(network(), pairs, ["gradcam"], target="label", **QUICK)
    assert found.classes == tuple("abcd")
    pairs.classes = list("ab")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="target 'label': the images have 2 classes, and the model has 4"):
        judge(network(), pairs, ["gradcam"], target="label", **QUICK)
    assert judge(network(), pairs, ["gradcam"], **QUICK).classes == ()


def test_a_folder_of_files_is_prepared_as_timm_says(tmp_path: Path) -> None:
    pixels = (pictures(3, 48).permute(0, 2, 3, 1) * 255).byte().numpy()
    for number, picture in enumerate(pixels):
        (tmp_path / "some").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "some" / f"{number}.png")
    model = timm.create_model("test_resnet", num_classes=3).eval()
    found = judge(model, tmp_path, ["gradcam"], **QUICK)
    config = timm.data.resolve_model_data_config(model)
    prepare = timm.data.create_transform(**config)
    images = torch.stack([prepare(Image.fromarray(picture)) for picture in pixels])
    with torch.no_grad():
        expected = model(images).softmax(dim=1)
    assert list(found.per_image["image_id"].unique()) == [f"some/{number}.png" for number in range(3)]
    first = found.per_image.drop_duplicates("index")
    np.testing.assert_allclose(first["confidence"], expected.max(dim=1).values, atol=2e-3)  # timm resamples 8 bits
    assert set(first["label"]) == {-1}


def test_normalisation_happens_inside() -> None:
    """The same as of a model that normalises itself, and images stay in [0, 1]."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))

    expected = judge(Inside(), pictures(), ["gradcam"], **QUICK)
    found = judge(network(), pictures(), ["gradcam"], normalize=(mean, std), **QUICK)
    np.testing.assert_allclose(found.maps["gradcam"], expected.maps["gradcam"], rtol=1e-4, atol=1e-6)
    layer = judge(network(), pictures(), [{"name": "gradcam", "layer": "0"}], normalize=(mean, std), **QUICK)
    assert layer.maps["gradcam"].shape == (7, 16, 16)


def test_what_normalises_itself_is_not_normalised_twice(tmp_path: Path) -> None:
    """Of files, ImageNet's statistics are taken for a network that says nothing, with a warning."""
    for number, picture in enumerate((pictures(2, 48).permute(0, 2, 3, 1) * 255).byte().numpy()):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")

    def found(model: nn.Module, normalize: Any) -> Any:
        return judge(model, tmp_path, ["gradcam"], normalize=normalize, image_size=32, **QUICK).maps["gradcam"]

    first = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    bare, inside = network(), nn.Sequential(first, network())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = found(bare, "imagenet")
        np.testing.assert_allclose(found(inside, "auto"), expected, rtol=1e-4, atol=1e-6)
        assert not np.allclose(found(bare, None), expected)
    with pytest.warns(UserWarning, match="does not say how its images are normalised: ImageNet's mean and standard"):
        np.testing.assert_array_equal(found(bare, "auto"), expected)
    with pytest.warns(UserWarning, match="does not say"):  # of features, not of images
        found(nn.Sequential(network(), LengthOne()), "auto")


class LengthOne(nn.Module):
    """A layer named Normalize that is no normalisation of images."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x)


LengthOne.__name__ = "Normalize"


def test_timm_models_bring_their_own_statistics_and_torchvisions_must_be_told() -> None:
    import torchvision

    model = timm.create_model("test_resnet", num_classes=3).eval()
    found = judge(model, pictures(3, 96), ["activation_map"], **QUICK).per_image.drop_duplicates("index")
    about = model.pretrained_cfg
    mean, std = (torch.tensor(about[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        probabilities = model((pictures(3, 96) - mean) / std).softmax(dim=1)
    np.testing.assert_allclose(found["confidence"], probabilities.max(dim=1).values, atol=1e-5)
    resnet = torchvision.models.resnet18(weights=None, num_classes=3)
    judge(resnet, pictures(2, 64), ["random"], normalize="imagenet", grid=(4, 4), **QUICK)
    with pytest.raises(InputError, match="of torchvision does not say how its images are normalised"):
        judge(resnet, pictures(2, 64), ["random"], **QUICK)


def test_a_folder_holds_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = judge(network(), pictures(), PLAN, batch_size=3, **QUICK)
    real, calls = EXPLAINERS.get("random")._attribute, []

    def dies(self: Any, inputs: Tensor, target: Any) -> Tensor:
        calls.append(len(inputs))
        if len(calls) == 2:
            raise OSError("the disk is full")
        maps: Tensor = real(self, inputs, target)
        return maps

    monkeypatch.setattr(EXPLAINERS.get("random"), "_attribute", dies)
    with pytest.raises(OSError, match="the disk is full"):
        judge(network(), pictures(), PLAN, batch_size=3, folder=tmp_path, **QUICK)
    asked: list[int] = []
    monkeypatch.setattr(GradCAM, "_combine", lambda *_: asked.append(1))  # the first two batches are there
    monkeypatch.setattr(EXPLAINERS.get("random"), "_attribute", real)
    monkeypatch.undo()
    found = judge(network(), pictures(), PLAN, batch_size=3, folder=tmp_path, **QUICK)
    assert not asked
    pd.testing.assert_series_equal(found.per_image["value"], expected.per_image["value"])
    assert not (tmp_path / ".partial").exists()
    monkeypatch.setattr(EXPLAINERS.get("random"), "_attribute", dies)  # and is not asked again
    again = judge(network(), pictures(), PLAN, batch_size=3, folder=tmp_path, **QUICK)
    assert len(calls) == 2
    pd.testing.assert_frame_equal(again.per_image, Judgement.load(tmp_path).per_image)
    assert again.report(tmp_path / "page.html").is_file()
    calls.clear()
    with pytest.raises(OSError, match="the disk is full"):  # of other images it is
        judge(network(), pictures().flip(0), PLAN, batch_size=3, folder=tmp_path, **QUICK)


def test_tables_in_markdown_and_latex() -> None:
    found = judge(network(), pictures(), ["gradcam", "random"], ["dauc", "ad"], **QUICK)
    lines = found.to_markdown().splitlines()
    assert lines[0] == "| explainer | DAUC ↓ | AD % ↓ | passes | s |"
    row = found.summary.set_index(["explainer", "metric"]).loc[("gradcam", "dauc")]
    assert f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in lines[2].replace("*", "")
    of_dauc = found.summary[found.summary["metric"] == "dauc"]
    alone = of_dauc[of_dauc["best"].astype(bool)]
    bold = re.findall(r"\| (\w+) \| \*\*", found.to_markdown())
    assert bold == alone["explainer"].tolist()
    latex = found.to_latex()
    assert latex.count(r"\\") == 3
    assert r"AD \% $\downarrow$" in latex
    assert "%" not in latex.replace(r"\%", "").partition(r"\end{tabular}")[0]


def test_labels_with_special_characters_keep_the_tables_whole() -> None:
    explainers = [{"name": "random", "label": "[plain]"}, {"name": "random", "label": r"a|b_50%&c#$~^{}\<d>"}]
    found = judge(network(), pictures(), explainers, ["dauc"], **QUICK)
    rows = found.to_markdown().splitlines()
    bars = [len(re.findall(r"(?<!\\)\|", row)) for row in rows[:4]]  # those that part cells
    assert bars == [5] * 4
    assert r"| a\|b_50%&c#$~^{}\<d> |" in rows[3]
    latex = found.to_latex().splitlines()
    assert latex[4].startswith("{[}plain] & ")  # a bracket would be an option of the line's end before it
    special = (
        r"a\textbar{}b\_50\%\&c\#\$\textasciitilde{}\textasciicircum{}\{\}\textbackslash{}\textless{}d\textgreater{} & "
    )
    assert latex[5].startswith(special)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    labels = [0, 1, 2, 3, 7, -1, 0]  # the model has classes 0 to 3
    found = judge(
        network(), pictures(), ["random"], ["ad"], labels=labels, classes=["wren", "owl", "jay", "tit"], **QUICK
    )
    assert [found.class_name(label) for label in (0, 3, 4, 7, -1)] == ["wren", "tit", "class 4", "class 7", "?"]
    page = found.report("~/r.html")
    assert page == tmp_path / "r.html"
    assert "class 7" in page.read_text()
    assert found.report(tmp_path, n_images=0).is_file()
    with pytest.raises(InputError, match="n_images must be at least 0; got -1"):
        found.report(tmp_path, n_images=-1)


def test_explainers_of_ones_own() -> None:
    model = network()
    found = judge(model, pictures(), [GradCAM(model), GradCAM(model, layer="0")], **QUICK)
    assert list(found.maps) == ["GradCAM", "GradCAM-2"]
    assert found.maps["GradCAM-2"].shape == (7, 16, 16)


def test_images_are_drawn_by_seed() -> None:
    some = judge(network(), pictures(), ["gradcam"], n_images=3, seed=1, **QUICK)
    whole = judge(network(), pictures(), ["gradcam"], **QUICK)
    chosen = some.per_image["index"].unique().tolist()
    assert len(chosen) == 3
    np.testing.assert_allclose(some.maps["gradcam"], whole.maps["gradcam"][chosen], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": "nowhere"}, "nowhere is not a folder"),
        ({"images": 3}, "images must be a tensor"),
        ({"images": pictures()[0]}, "an axis for the batch"),
        ({"images": pictures() * 255}, r"must have pixels in \[0, 1\]"),
        ({"labels": torch.zeros(7, 1)}, r"; pass labels\[:, 0\]\.long\(\)$"),
        ({"labels": torch.zeros(7)}, r"; pass labels\.long\(\)$"),
        ({"explainers": ["gradcm"]}, "did you mean 'gradcam'"),
        ({"explainers": []}, "at least one of each"),
        ({"metrics": ["dac"]}, "unknown metric 'dac'"),
        ({"preparation": "folded"}, "judge.preparation: "),
        ({"max_steps": "many"}, "judge.max_steps: "),
        ({"preset": "gomez"}, "unknown preset 'gomez'"),
        ({"target": "label"}, "needs labels, and the images have none"),
        ({"target": 9}, "target 9 is out of range"),
        ({"classes": ["a", "b"]}, "classes: 2 names are given, and the model has 4 classes"),
        ({"normalize": "imagnet"}, "normalize must be auto"),
        ({"grid": (7,)}, "grid must be"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels must be 7 whole numbers"),
        ({"explainers": ["cls_attention"]}, "no explainer applies"),
        ({"images": DataLoader(TensorDataset(pictures()), shuffle=True)}, "the loader shuffles"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    given = {"images": pictures(), "explainers": ["gradcam"], **QUICK, **arguments}
    with pytest.raises(InputError, match=message):
        judge(network(), **given)


def _on_a_rank(rank: int, folder: Path, with_folder: bool, kind: str) -> None:
    images: Any = pictures()
    if kind == "distributed loader":
        data = TensorDataset(pictures())
        sampler = torch.utils.data.distributed.DistributedSampler(data, shuffle=False)
        images = DataLoader(data, batch_size=2, sampler=sampler)
    out = folder / "out" if with_folder else None
    found = judge(network(), images, PLAN, batch_size=2, folder=out, **QUICK)
    found.per_image.to_parquet(folder / f"{rank}.parquet")
    np.save(folder / f"{rank}.npy", found.maps["gradcam"])
    assert dist.get_world_size() == 2


@pytest.mark.parametrize(
    ("kind", "with_folder"), [pytest.param("tensor", False, marks=pytest.mark.slow), ("distributed loader", True)]
)
def test_two_ranks_give_the_result_of_one(tmp_path: Path, with_folder: bool, kind: str) -> None:
    """The sampler gives one image to both ranks, which counts once."""
    processes.run_ranks(_on_a_rank, tmp_path, with_folder, kind)
    expected = judge(network(), pictures(), PLAN, batch_size=2, **QUICK)
    for rank in range(2):
        found = pd.read_parquet(tmp_path / f"{rank}.parquet")
        assert list(found["index"]) == list(expected.per_image["index"])
        np.testing.assert_allclose(found["value"], expected.per_image["value"], atol=1e-5)
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected.maps["gradcam"], rtol=1e-4, atol=1e-6)


def test_models_of_ours_show_what_they_see(bcnn_run: Path, tiny_cub: Any, tmp_path: Path) -> None:
    model, transform = interp_models.load(bcnn_run)
    files = sorted(tiny_cub.root.rglob("*.jpg"))[:4]
    images = torch.stack([transform(Image.open(path)) for path in files])
    found = judge(model, images, ["intrinsic", "gradcam"], classes=model.classes, **QUICK)
    with torch.no_grad():
        output = model(images)
    expected = model.explain(output, output.logits.argmax(dim=1))
    np.testing.assert_allclose(found.maps["intrinsic"], expected, rtol=1e-3, atol=1e-5)
    page = found.report(tmp_path)
    assert page == tmp_path / "report.html"
    assert all(name in page.read_text() for name in {model.classes[int(k)] for k in output.logits.argmax(dim=1)})


WITH_EDGES: dict[str, Any] = {"explainers": [*PLAN, "edges"], "metrics": ["ad", "dauc"], **QUICK}


def compared_anew(folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: str) -> tuple[Judgement, Judgement]:
    """A finished evaluation with another comparison, which makes no map; and the same judged from the start."""
    asked: list[int] = []
    monkeypatch.setattr(GradCAM, "_combine", lambda *_: asked.append(1))
    found = judge(network(), pictures(), folder=folder, **changed, **WITH_EDGES)
    assert not asked
    monkeypatch.undo()
    return found, judge(network(), pictures(), **changed, **WITH_EDGES)


def test_another_control_is_tested_without_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished evaluation has all values: another control needs no other map."""
    options = WITH_EDGES
    judge(network(), pictures(), folder=tmp_path, **options)
    found, expected = compared_anew(tmp_path, monkeypatch, control="edges")
    assert found.tables.rows == expected.tables.rows
    assert {row["control"] for row in found.tables.rows} == {None, "edges"}
    assert found.tables.mean_ranks == expected.tables.mean_ranks
    again = judge(network(), pictures(), folder=tmp_path, **options)
    assert {row["control"] for row in again.tables.rows} == {None, "random"}
    with pytest.raises(InputError, match="control 'nobody' is no explainer of this evaluation: gradcam, rise"):
        judge(network(), pictures(), folder=tmp_path, control="nobody", **options)


def test_curves_are_those_behind_the_values(tmp_path: Path) -> None:
    keys = ["dauc", "iauc", "lerf", "road_morf"]
    options = {"explainers": PLAN, "metrics": keys, "preset": "saliency-maps-metrics", **QUICK}
    in_memory, in_files = (judge(network(), pictures(5), folder=folder, **options) for folder in (None, tmp_path))
    assert set(in_files.tables.curves) == {"gradcam", "rise", "random"}
    for label, curves in in_files.tables.curves.items():
        assert set(curves) == set(keys)
        own = in_files.per_image[in_files.per_image["explainer"] == label].sort_values("index")
        for key, curve in curves.items():
            np.testing.assert_array_equal(curve, in_memory.tables.curves[label][key])
            fractions, scores = curve[:, 0].astype(float), curve[:, 1].astype(float)
            area = scores.mean(axis=1) if key == "road_morf" else np.trapezoid(scores, fractions, axis=1)
            np.testing.assert_allclose(own.loc[own["metric"] == key, "value"], area, rtol=1e-5)
            if key != "road_morf":
                clean = own.loc[own["metric"] == key, "probability"]
                np.testing.assert_allclose(scores[:, -1 if key == "iauc" else 0], clean, rtol=1e-5)


def test_a_judgement_prints_its_table_and_its_answer() -> None:
    found = judge(network(), pictures(6), ["gradcam", "random"], ["ad", "dauc"], name="<net>", **QUICK)
    text = repr(found)
    assert "AD % ↓" in text
    assert found.answer in text
    assert len(text) < 2000
    assert "6 images are few: the test's smallest p-value is 0.031, before the adjustment for 2 tests." in found.answer
    assert found.differences["reference"].tolist() == ["gradcam", "gradcam"]
    page = found._repr_html_()
    assert "&lt;net&gt;" in page
    assert "<net>" not in page
    for row in found.tables.rows:
        assert numbers.number(row["metric"], row["mean"]) in page


def test_the_time_of_a_shared_pass_counts_for_each_explainer() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.1)
            return self.net(x)

    found = judge(Slow().eval(), pictures(2), ["gradcam", "layercam", "random"], ["gini"], normalize=None, **QUICK)
    costs = found.tables.costs
    assert costs["gradcam"]["passes"] == costs["layercam"]["passes"] == 1
    assert all(2 * costs[name]["seconds"] >= 0.1 for name in ("gradcam", "layercam"))
    assert 2 * costs["random"]["seconds"] < 0.1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"preset": "gomez"}, "unknown preset 'gomez'; did you mean 'gomez2023'"),
        ({"grid": 7}, "grid must be \\[rows, columns\\], 'native' or null; got 7"),
        ({"max_steps": 0}, "max_steps must be at least 1; got 0"),
    ],
)
def test_wrong_options_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge(network(), pictures(2), ["random"], ["ad"], **{**QUICK, **option})


def test_the_name_of_a_metric_stands_for_all_its_keys() -> None:
    found = judge(network(), pictures(2), ["random"], ["masked_confidence"], **QUICK)
    assert [row["metric"] for row in found.tables.rows] == list(METRICS.get("masked_confidence").keys)


def test_an_error_in_a_metric_of_a_plugin_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "own_metric.py").write_text(
        "from interp_models.metrics.base import METRICS, MapMetric\n\n"
        "@METRICS.register('breaks')\nclass Breaks(MapMetric):\n    keys = ('breaks',)\n    percent = False\n"
        "    higher_is_better_by_key = {'breaks': True}\n    legend = {'breaks': 'Breaks.'}\n\n"
        "    def _score(self, case):\n        return {'breaks': case.truth.boxes[0]}\n\n"
        "    def protocol(self, key, grid):\n        return None, 'none'\n"
    )
    options = {"metrics": ["breaks"], "plugins": [str(tmp_path / "own_metric.py")], **QUICK}
    try:
        with pytest.raises(
            InputError, match=r"metric Breaks: own_metric\.py line 11: TypeError: 'NoneType' object is not"
        ):
            judge(network(), pictures(2), ["random"], **options)
    finally:
        METRICS._known.pop("breaks", None)  # other tests read the registry


def test_a_wrong_prediction_has_maps_of_its_true_class(tmp_path: Path) -> None:
    net, images = network().eval(), pictures(6)
    with torch.no_grad():
        prediction = net(images).argmax(dim=1)
    labels = prediction.clone()
    labels[1], labels[4], labels[5] = (labels[1] + 1) % 4, (labels[4] + 2) % 4, -1
    options = {"explainers": ["gradcam", "gradient", "random"], "metrics": ["gini"], "normalize": None, **QUICK}
    in_memory, in_files = (judge(net, images, labels=labels, folder=f, **options) for f in (None, tmp_path))
    assert set(in_files.tables.of_label) == {"gradcam", "gradient"}  # noise has no class
    for name in ("gradcam", "gradient"):
        found = in_files.tables.of_label[name]
        assert list(found) == [1, 4]
        expected = EXPLAINERS.build(name, model=net).attribute(images[[1, 4]], labels[[1, 4]])
        for own, map in zip(found.values(), to_grid(expected, found[1].shape).numpy(), strict=True):
            np.testing.assert_allclose(own, map / max(np.abs(map).max(), 1e-30), atol=2e-3)
        for row, own in found.items():
            np.testing.assert_array_equal(own, in_memory.tables.of_label[name][row])
    views = [
        json.loads(text) for text in re.findall(r'class="data">(.*?)</script>', in_files.report(tmp_path).read_text())
    ]
    assert [["label" in map for map in view["runs"][0]["maps"]] for view in views] == [
        [row in (1, 4), row in (1, 4), False] for row in range(6)
    ]
    labels[1] = 9  # no class of the model
    assert list(judge(net, images, labels=labels, **options).tables.of_label["gradcam"]) == [4]
    costs = judge(net, images, labels=prediction, **options).tables.costs
    assert {name: costs[name]["passes"] for name in costs} == {
        name: in_memory.tables.costs[name]["passes"] for name in costs
    }  # they cost the explainer nothing
    judge(net, images, labels=prediction, folder=tmp_path, **options)
    assert not Judgement.load(tmp_path).tables.of_label


def test_explainer_objects_are_known_by_their_registered_names() -> None:
    net = network().eval()
    found = judge(net, pictures(6), [Random(net), GradCAM(net)], ["ad"], normalize=None, **QUICK)
    assert found.differences["reference"].tolist() == ["GradCAM"]
    assert {row["control"] for row in found.tables.rows} == {None, "Random"}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:99])])
def test_a_broken_file_of_the_page_is_made_anew(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    options = {"explainers": PLAN, "metrics": ["dauc"], "folder": tmp_path, **QUICK}
    first = judge(network(), pictures(3), **options)
    damage(tmp_path / "shown/gradcam.npz")
    again = judge(network(), pictures(3), **options)
    for label, curves in first.tables.curves.items():
        np.testing.assert_array_equal(again.tables.curves[label]["dauc"], curves["dauc"])


def test_another_reference_is_compared_without_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = WITH_EDGES
    first = judge(network(), pictures(), folder=tmp_path, **options)
    assert {one["reference"] for one in first.tables.differences} == {"gradcam"}
    found, expected = compared_anew(tmp_path, monkeypatch, reference="edges")
    assert found.tables.differences == expected.tables.differences
    assert {(one["explainer"], one["reference"]) for one in expected.tables.differences} == {
        ("gradcam", "edges"), ("rise", "edges"), ("random", "edges"),
    }  # fmt: skip
    values = {name: own.sort_values("index")["value"].to_numpy() for name, own in expected.per_image[
        expected.per_image["metric"] == "ad"].groupby("explainer")}  # fmt: skip
    means = {one["explainer"]: one["mean"] for one in found.tables.differences if one["metric"] == "ad"}
    for label, mean in means.items():
        assert mean == pytest.approx(np.nanmean(values[label] - values["edges"]))
    with pytest.raises(InputError, match="reference 'nobody' is no explainer of this evaluation: gradcam, rise"):
        judge(network(), pictures(), reference="nobody", **options)


def test_a_scripted_network_is_judged_as_the_network_itself() -> None:
    net, options = network().eval(), {"grid": (8, 8), "explainers": ["random", "rise"], "metrics": ["ad"], **QUICK}
    found, expected = (judge(one, pictures(), normalize=None, **options) for one in (torch.jit.script(net), net))
    np.testing.assert_allclose(found.per_image["value"], expected.per_image["value"], atol=1e-5)


def test_a_metric_for_which_an_explainer_cannot_explain_is_undefined(capsys: pytest.CaptureFixture[str]) -> None:
    class Once(GradCAM):
        """Explains the judged images, and no others."""

        def _attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
            if not torch.equal(inputs, pictures(3)):
                raise NotApplicable("these images are too noisy")
            return super()._attribute(inputs, target)

    net = network().eval()
    metrics = ["ad", "max_sensitivity"]
    found = judge(net, pictures(3), [Once(net), GradCAM(net)], metrics, normalize=None, **QUICK)
    rows = {(row["explainer"], row["metric"]): row for row in found.tables.rows}
    assert rows["Once", "max_sensitivity"]["n_undefined"] == 3
    assert rows["Once", "ad"]["mean"] == rows["GradCAM", "ad"]["mean"] is not None
    assert rows["GradCAM", "max_sensitivity"]["n_undefined"] == 0
    line = "undefined for some images: max_sensitivity of Once: these images are too noisy"
    assert line in capsys.readouterr().err


def loader_of(batches: list[Sample]) -> Any:
    """A loader of these batches."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type, var-annotated]  # a list is a data set, too


class Contrast(nn.Module):
    """A network whose scores are NaN for an image of one colour: it divides by the spread of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network().eval()

    def forward(self, x: Tensor) -> Tensor:
        spread = x.std(dim=(1, 2, 3), keepdim=True)
        logits: Tensor = self.net((x - x.mean(dim=(1, 2, 3), keepdim=True)) / spread)
        return logits


@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("metric", ["dauc", "idsds", "monotonicity"])
def test_scores_of_changed_images_that_are_not_finite_are_refused(metric: str, batch: int | None) -> None:
    """A comparison with NaN is false: it would look like a score that does not rise. Other metrics still work."""
    options: dict[str, Any] = {"grid": (4, 4), "normalize": None, "batch": batch, "progress": False}
    images = pictures(2)
    images[:, :, 8:], images[:, :, :, 8:] = 0, 0  # without the first cell, all is black
    judge(Contrast(), images, ["random"], ["gini"], **options)
    judge(network().eval(), images, ["random"], [metric], **options)
    with pytest.raises(InputError, match="the model returns NaN or infinite values for "):
        judge(Contrast(), images, ["random"], [metric], **options)


def test_ground_truth_is_part_of_what_a_folder_has_results_of(tmp_path: Path) -> None:
    """The same pixels with other boxes are other images; with the same ones they are not judged again."""
    found = []
    for corner in (0, 0, 16):
        box = torch.tensor([[[corner, corner, corner + 16, corner + 16]]]).float().expand(7, -1, -1)
        sample = Sample(pictures(), torch.zeros(7, dtype=torch.long), torch.arange(7), box=box)
        loader = loader_of([sample])
        options: dict[str, Any] = {"normalize": None, "grid": (4, 4), **QUICK}
        result = judge(
            network().eval(), loader, ["center_gaussian", "gradient"], ["energy"], folder=tmp_path, **options
        )
        found.append(list(values(result, "gradient", "energy")))
    assert found[0] == found[1] != found[2]


def test_labels_of_other_classes_are_not_compared_with_predictions() -> None:
    """A network of 4 classes on images of 2 classes: no prediction is right or wrong, and boxes of a class are unknown.
    Boxes that do not say their class are those of the object."""
    box = torch.tensor([[[0.0, 0.0, 16.0, 16.0]]]).expand(6, -1, -1)
    labels = torch.tensor([0, 1] * 3)
    classes = torch.zeros(6, 1, dtype=torch.long)

    class Two(torch.utils.data.Dataset[Any]):
        classes = ("cat", "dog")

        def __init__(self, box_classes: Tensor | None) -> None:
            self.box_classes = box_classes

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Sample:
            own = None if self.box_classes is None else self.box_classes[i]
            return Sample(pictures(6)[i], int(labels[i]), i, box=box[i], box_classes=own)

    def judged(net: nn.Module, of_class: Tensor | None) -> Judgement:
        loader = DataLoader(Two(of_class), batch_size=3, collate_fn=collate)
        options: dict[str, Any] = {"grid": (4, 4), "normalize": None, **QUICK}
        return judge(net, loader, ["gradient", "random"], ["ad", "om", "pointing"], **options)

    assert not judged(network(k=2).eval(), None).left_out
    plain, of_class = judged(network().eval(), None), judged(network().eval(), classes)
    assert set(plain.left_out) == {"om"}
    assert set(of_class.left_out) == {"om", "pointing"}


def test_images_of_a_later_batch_may_have_the_labels_that_a_metric_needs() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 16.0, 16.0]]]).expand(2, -1, -1)
    batches = [
        Sample(pictures(4)[2 * i : 2 * i + 2], torch.full((2,), label), torch.arange(2) + 2 * i, box=boxes)
        for i, label in enumerate((-1, 1))
    ]
    options: dict[str, Any] = {"grid": (4, 4), "normalize": None, **QUICK}
    for own in (batches, batches[::-1]):
        loader = loader_of(own)
        (row,) = judge(network().eval(), loader, ["gradient"], ["om"], **options).tables.rows
        assert (row["n"], row["n_undefined"]) == (4, 2)
    loader = loader_of(batches[:1])
    with pytest.raises(InputError, match="no metric applies: om needs the label of every image"):
        judge(network().eval(), loader, ["gradient"], ["om"], **options)


def test_curves_of_pixels_say_how_many_steps_they_take(tmp_path: Path) -> None:
    options: dict[str, Any] = {"explainers": ["random"], "metrics": ["dauc"], "normalize": None, "progress": False}
    for side, steps in ((8, 64), (28, 196), (32, 205)):
        found = judge(network().eval(), pictures(1, side), preset="rise", **options)
        assert {row["steps"] for row in found.tables.rows} == {steps}


def test_passes_of_changed_images_are_not_kept() -> None:
    """A metric that explains changed images shares no pass with another explainer."""
    from interp_models.explainers import features

    kept: list[int] = []

    class Counts(GradCAM):
        def _attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
            shared = features._shared.get()
            assert shared is not None
            kept.append(len(shared))
            return super()._attribute(inputs, target)

    net = network().eval()
    explainers = [Counts(net), GradCAM(net, layer="3"), Counts(net)]
    judge(net, pictures(3), explainers, ["max_sensitivity"], normalize=None, **QUICK)
    assert len(kept) == 22
    assert max(kept) <= 2
