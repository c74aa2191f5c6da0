"""What evaluate.py writes of prototypes, against the same numbers had from Python image by image."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from interp_models import PROTOTYPE_METRICS, load
from interp_models.config.loading import check, override
from interp_models.core.boxes import activation_boxes
from interp_models.data.module import DataModule
from interp_models.evaluation import prototypes as prototype_evaluation
from interp_models.evaluation.config import EvaluateConfig
from interp_models.metrics.prototype_base import Found
from interp_models.prototypes.search import nearest_patches
from interp_models.report import gallery, visual
from interp_models.runs import evaluate
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config
from tests.conftest import QUICK_EVALUATION, TINY, Cub, copy_run, fit, tiny_config
from tests.data.make_cub import make_cub
from tests.report.test_page import Page

LRS = dict.fromkeys(("backbone", "add_on", "prototypes"), 3e-3)
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "protopnet": ({"prototypes_per_class": 4, "prune_neighbours": 4, "prune_least": 2}, ["push", "prune"]),
    "prototree": ({"depth": 3, "prune_factor": 1.075}, ["prune", "project"]),
}
WITHOUT_MASKS = [name for name in PROTOTYPE_METRICS.names() if "mask" not in PROTOTYPE_METRICS.get(name).needs]
ALL = f"prototype_metrics=[{', '.join(WITHOUT_MASKS)}]"
"""Metrics for the data here, which have no masks."""
KEYS = {key for name in WITHOUT_MASKS for key in PROTOTYPE_METRICS.get(name).keys}


def evaluated(*runs: Path, plan: tuple[str, ...] = ()) -> Path:
    # Where an image shows its own prototype, the log of nearly no distance makes a copy's rounding larger than 1e-5.
    settings = [*QUICK_EVALUATION, "preparation=none", *plan]
    return evaluate.evaluate(list(runs), check(EvaluateConfig, override({}, settings)))


def trained(name: str, out: Path, root: Path, **data: Any) -> Path:
    options, then = MODELS[name]
    phases = [{"epochs": 3, "lrs": LRS, "on_end": then, "select": "last"}]
    config = tiny_config(root, out=str(out), phases=phases)
    config["model"] = {"name": name, "backbone": TINY, "weights": None, "output_stride": 16, "channels": 8, **options}
    config["data"] |= data
    return fit(config)


@pytest.fixture(scope="module")
def runs(tiny_cub: Cub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind with prototypes, evaluated on five images of the twelve; not to be changed."""
    folder = tmp_path_factory.mktemp("prototypes") / "tiny"
    found = {name: trained(name, folder / name, tiny_cub.root) for name in MODELS}
    for run in found.values():
        evaluated(run, plan=(ALL, "n_images=5", "report_images=3"))
    return found


def opened(run: Path) -> tuple[Path, Any, Any, Path]:
    return run, load(run)[0], build_data(run_config(run)), run / "evaluation"


def written(run: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The rows of `prototypes.json` by metric, and the table."""
    rows = json.loads((run / "evaluation/prototypes.json").read_text())["rows"]
    assert len({row["metric"] for row in rows}) == len(rows)
    return {row["metric"]: row for row in rows}, pd.read_parquet(run / "evaluation/prototypes.parquet")


def kept_of(model: Any) -> list[int]:
    kept = model.kept if hasattr(model, "kept") else model.nodes_kept
    return kept.nonzero()[:, 0].tolist()


@torch.no_grad()
def by_hand(model: Any, data: DataModule) -> dict[str, Tensor]:
    """Values by key, of all images of a split one at a time."""
    values = {}
    for name in WITHOUT_MASKS:
        metric = PROTOTYPE_METRICS.get(name)(model, data.test_images.part_names)
        dataset = data.dataset(metric.split or "test", augment=False)
        for position in range(len(dataset) if metric.split else 0):
            s = dataset[0, position]
            image, parts, visible = (x.as_subclass(Tensor)[None] for x in (s.image, s.parts, s.visible))
            found = Found(image, model(image).maps, torch.tensor([s.label]), torch.tensor([s.index]), parts, visible)
            metric.update(model, found)
        values |= metric.per_prototype()
    return values


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_what_python_gives(runs: dict[str, Path], name: str) -> None:
    _, model, data, _ = opened(runs[name])
    rows, table = written(runs[name])
    assert set(rows) == KEYS
    assert len(table) == len(model.prototypes)
    assert table["prototype"].tolist() == list(range(len(table)))
    for key, value in by_hand(model, data).items():
        attacked = key in PROTOTYPE_METRICS.get("misalignment").keys  # 50 steps by the sign of a gradient
        tolerance = {"rtol": 0.05, "atol": 0.05} if attacked else {"rtol": 1e-5}
        np.testing.assert_allclose(table[key], value, err_msg=key, **tolerance)
        assert rows[key]["mean"] == (pytest.approx(table[key].mean()) if table[key].notna().any() else None)
        assert rows[key]["n"] == table[key].notna().sum()
    kept = kept_of(model)
    assert 0 < len(kept) < len(table), "nothing to tell apart"
    for number, row in table.iterrows():
        labels = model.prototype_classes[number].nonzero()[:, 0].tolist()
        assert row["classes"] == ", ".join(data.classes[label] for label in labels)
        source = int(model.sources.image[number])
        assert row["source"] == (data.train_images.image_id(source) if source >= 0 else "")
        assert bool(row["used"] == 1) == (number in kept)
        assert bool(row[["purity", "spread"]].isna().all()) == (number not in kept)


@pytest.mark.parametrize("name", MODELS)
def test_every_prototype_that_is_left_has_its_pictures(runs: dict[str, Path], name: str) -> None:
    _, model, data, _ = opened(runs[name])
    folder = runs[name] / "evaluation/prototypes"
    sheets = {sheet: numbers for sheet, numbers in model.prototype_sheets(data.classes).items() if numbers}
    expected = {f"{sheet}/{number}.jpg" for sheet, numbers in sheets.items() for number in numbers}
    assert {int(Path(path).stem) for path in expected} == set(kept_of(model))
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.jpg")}
    assert found == expected | {f"{sheet}.jpg" for sheet in sheets}
    dataset = data.dataset("train", augment=False)
    images = [dataset[0, i].image.as_subclass(Tensor).permute(1, 2, 0).numpy() * 255 for i in range(len(dataset))]
    for sheet, numbers in sheets.items():
        for number in numbers:
            row = np.asarray(Image.open(folder / sheet / f"{number}.jpg"))
            assert row.shape == (146, 11 * 132 + 24, 3)  # six of the training and five of the test, below their classes
            first = np.asarray(Image.fromarray(row[16:144, 2:130]).resize((64, 64)), float)
            away = [np.abs(first - image).mean() for image in images]
            source = int(np.flatnonzero(data.train_indices == int(model.sources.image[number]))[0])
            assert int(np.argmin(away)) == source, "the nearest image is the one that the prototype comes from"


def test_nearest_images_come_in_order(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Below the title, each image with the box around the upper 5 % of the prototype's map there."""
    _, model, data, _ = opened(runs["protopnet"])
    tiles = []
    monkeypatch.setattr(gallery, "_tile", lambda image, box, title: tiles.append((image, box, title)) or BLANK)
    number = kept_of(model)[0]
    patches = [
        nearest_patches(model.features, data.loader(split, augment=False), model.prototypes, k=3)
        for split in ("train", "test")
    ]
    (path,) = gallery.draw_nearest(*patches, model.similarity, {"one": [number], "none": []}, data, tmp_path)
    assert path == tmp_path / "one.jpg"
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jpg")) == ["one.jpg", f"one/{number}.jpg"]
    expected = []
    for split in ("train", "test"):
        dataset, found = data.dataset(split, augment=False), []
        for position in range(len(dataset)):
            sample = dataset[0, position]
            with torch.no_grad():
                saliency = model(sample.image[None].as_subclass(Tensor)).maps[:, number]
            box = activation_boxes(saliency, (64, 64))[0].tolist()
            title = data.classes[sample.label]
            found.append((-float(saliency.max()), position, visual.to_uint8(sample.image), box, title))
        expected += sorted(found, key=lambda one: one[:2])[:3]
    # tiles are drawn image by image, so they are compared as sets
    assert sorted((box, title, image.tobytes()) for image, box, title in tiles) == sorted(
        (box, title, image.tobytes()) for _, _, image, box, title in expected
    )


BLANK = np.zeros((146, 132, 3), np.uint8)


def trees(page: Page) -> list[dict[str, Any]]:
    return [element for element in page.all("svg") if element["attrs"].get("class") != "plot"]


@pytest.mark.parametrize("name", MODELS)
def test_the_page_and_the_local_analysis(runs: dict[str, Path], name: str) -> None:
    run, model, data, _ = opened(runs[name])
    page = Page(run / "evaluation/report.html")
    (section,) = [element for element in page.all("section") if element["attrs"]["aria-labelledby"] == "prototypes"]
    rows, _ = written(run)
    text = re.sub(r"\s+", " ", section["text"])
    assert all(row["legend"] in text for row in rows.values())
    for key in ("purity", "used"):
        assert f"{100 * rows[key]['mean']:.1f}" in text
    assert bool(trees(page)) == (name == "prototree")
    if name == "prototree":
        (svg,) = trees(page)
        assert svg["text"].count("prototype ") == len(kept_of(model))
        assert len([e for e in page.all("image") if e["attrs"]["href"].startswith("data:image/jpeg")]) == len(
            kept_of(model)
        )
    index = pd.read_csv(run / "evaluation/maps/index.csv")
    expected, shown = set(), set()
    for row in (0, 2, 4):
        image_id, dataset = index["image_id"][row].replace("/", "_"), data.dataset("test")
        sample = dataset[0, int(np.flatnonzero(dataset.indices == index["index"][row])[0])]
        with torch.no_grad():
            output = model(sample.image[None].as_subclass(Tensor))
        (reading,) = model.readings(output, output.logits.argmax(dim=1), (64, 64))
        assert reading.total in re.sub(r"\s+", " ", page.all("main")[0]["text"])
        if reading.matches:
            expected.add(image_id)
            shown |= {match.prototype for match in reading.matches}
            picture = Image.open(run / "evaluation/local" / image_id)
            assert picture.size == (len(reading.matches) * 328, 18 + 36 + 160)  # two squares side by side each
    assert {path.name for path in (run / "evaluation/local").glob("*")} == expected
    captions = [e["text"].strip() for e in page.all("figcaption") if "details" in e["inside"]]
    assert {int(t.split()[1]) for t in captions if re.fullmatch(r"prototype \d+", t)} >= shown & set(kept_of(model))


def test_an_evaluation_of_the_same_work_is_done(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["protopnet"], tmp_path / "tiny" / "protopnet"))
    files = [path for path in (run / "evaluation").rglob("*") if path.is_file() and "prototypes" in str(path)]
    assert len(files) > 5
    before = {path: path.stat().st_mtime_ns for path in files}
    evaluated(run, plan=(ALL, "n_images=3"))
    assert {path: path.stat().st_mtime_ns for path in files} == before
    evaluated(run, plan=("prototype_metrics=[purity, prototype_usage]",))
    rows, table = written(run)
    assert list(rows) == ["purity", "used", "duplicates", "sparsity"]
    assert list(table) == ["prototype", "classes", "source", *rows]


def test_a_model_without_prototypes_has_none(cnn_run: Path, tmp_path: Path) -> None:
    run = copy_run(cnn_run, tmp_path / "tiny" / "run")
    page = Page(evaluated(run, plan=(ALL,)))
    assert sorted(path.name for path in (run / "evaluation").glob("[!.]*")) == [
        "maps",
        "per_image.parquet",
        "report.html",
        "results.json",
        "shown",
    ]
    assert "Prototypes" not in page.text
    assert not trees(page)


def test_runs_with_and_without_prototypes_share_a_page(runs: dict[str, Path], cnn_run: Path, tmp_path: Path) -> None:
    """Each run has its line; the table of all has rows of prototypes beside those of maps."""
    copies = [Path(shutil.copytree(run, tmp_path / "tiny" / run.name)) for run in runs.values()]
    copies.append(copy_run(cnn_run, tmp_path / "tiny" / "cnn"))
    page = Page(evaluated(*copies, plan=(ALL, "n_images=5", f"out={tmp_path / 'all'}")))
    (section,) = [element for element in page.all("section") if element["attrs"]["aria-labelledby"] == "prototypes"]
    for name in MODELS:
        assert f"tiny/{name}" in section["text"]
    assert "tiny/cnn" not in section["text"]
    assert len(trees(page)) == 1
    rows = json.loads((tmp_path / "all/results.json").read_text())["prototypes"]
    assert {(row["run"], row["metric"]) for row in rows} == {(f"tiny/{name}", key) for name in MODELS for key in KEYS}


def test_images_without_key_points(tmp_path: Path) -> None:
    """What needs parts is left out, with one line that says so."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(12):
            path = tmp_path / f"data/{split}/{'abc'[number % 3]}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    dataset = {"name": "image_folder", "root": str(tmp_path / "data")}
    run = trained("protopnet", tmp_path / "tiny" / "run", tmp_path, dataset=dataset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluated(run, plan=(ALL,))
    lines = [str(warning.message) for warning in caught if "key points" in str(warning.message)]
    every = f"prototype_metrics=[{', '.join(PROTOTYPE_METRICS.names())}]"
    with pytest.warns(UserWarning, match="comprehensiveness needs a mask of the object"):
        evaluated(run, plan=(every,))
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert all(name in lines[0] for name in ("consistency", "stability", "purity", "purity_train"))
    assert "spread" not in lines[0]
    rows, table = written(run)
    assert set(rows) == {
        "used", "duplicates", "sparsity", "spread", "plc", "pac", "prc", "ac", "distinctiveness",
    } < set(table)  # fmt: skip
    assert "Prototypes" in (run / "evaluation/report.html").read_text()


def test_the_training_of_a_tree_says_how_it_decides(runs: dict[str, Path]) -> None:
    """`metrics.json` holds the means of the tree's statistics over all test images."""
    run, model, data, _ = opened(runs["prototree"])
    dataset = data.dataset("test")
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        for position in range(len(dataset)):
            sample = dataset[0, position]
            output, label = model(sample.image[None].as_subclass(Tensor)), torch.tensor([sample.label])
            for name, value in model.measure(output, label).items():
                found.setdefault(f"test/{name}", []).append(float(value))
    metrics = json.loads((run / "metrics.json").read_text())
    assert {key: value for key, value in metrics.items() if key in found} == {
        key: pytest.approx(np.mean(values)) for key, values in found.items()
    }
    assert len(found) == 9
    table = pd.read_csv(run / "metrics.csv")
    assert table["val/acc_greedy"].notna().sum() == 3


# Known problems.


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "tiny" / run.name))


def test_pictures_that_an_interruption_cost_are_drawn_later(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = copied(runs["protopnet"], tmp_path)
    shutil.rmtree(run / "evaluation")
    with monkeypatch.context() as patched:
        patched.setattr(prototype_evaluation, "draw_nearest", None)
        with pytest.raises(TypeError):
            evaluated(run, plan=(ALL,))
    evaluated(run, plan=(ALL,))
    assert list((run / "evaluation/prototypes").glob("*.jpg"))


def test_prototypes_of_other_training_images_have_no_source(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["protopnet"], tmp_path)
    make_cub(tmp_path / "cub", per_class=6)
    with pytest.warns(UserWarning, match="of other training images"):
        evaluated(run, plan=(ALL, f"dataset.root={tmp_path / 'cub'}"))
    assert set(written(run)[1]["source"]) == {""}


def test_local_pictures_are_those_of_the_page(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["protopnet"], tmp_path)
    evaluated(run, plan=(ALL, "n_images=5", "report_images=1"))
    assert len(list((run / "evaluation/local").glob("*"))) == 1


def test_scores_of_other_weights_are_not_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["protopnet"], tmp_path)
    state = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    state["state_dict"]["prototypes"] += 1
    torch.save(state, run / "checkpoints/best.ckpt")
    page = Page(evaluated(run, plan=("prototype_metrics=[]", "report_images=0")))
    assert "Means over prototypes" not in page.text


def test_long_sheets_break_into_rows_and_pages(tmp_path: Path) -> None:
    pages = list(gallery._pages({"few": range(3), "none": [], "many": range(600)}))
    assert [(name, len(numbers)) for name, numbers in pages] == [
        ("few", 3), ("many", 256), ("many-2", 256), ("many-3", 88)
    ]  # fmt: skip
    assert [number for _, numbers in pages[1:] for number in numbers] == list(range(600))
    cells = [np.full((4, 2, 3), number, np.uint8) for number in range(18)]
    sheet = gallery._in_rows(cells)
    assert sheet[::4, ::2, 0].tolist() == [list(range(16)), [16, 17] + 14 * [255]]
    assert gallery._in_rows(cells[:3])[::4, ::2, 0].tolist() == [[0, 1, 2]]
