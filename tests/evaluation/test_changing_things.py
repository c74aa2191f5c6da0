"""Evaluations beside each other, of data that changed, and of other classes: the right table, or one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

import interp_models
from interp_models.core.files import locked
from interp_models.evaluation.cache import FolderCache
from tests.conftest import TINY_CNN, Cub, Outcome, Script, copy_run, fit, tiny_config

PLAN = ["explainers=[intrinsic]", "metrics=[ad, dauc]", "max_steps=3", "report_images=0", "logger.wandb=disabled"]


@pytest.fixture
def run(bcnn_run: Path, tmp_path: Path) -> Path:
    return copy_run(bcnn_run, tmp_path / "tiny" / "run")


def table(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "per_image.parquet")


def refused(outcome: Outcome) -> str:
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    return outcome.err.splitlines()[-1]


def test_a_second_evaluation_is_refused_and_costs_the_first_nothing(
    script: Script, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins when the first has done a batch."""
    keep, outcomes = FolderCache.keep, []

    def keep_and_start(self: FolderCache, *args: Any) -> None:
        keep(self, *args)
        if not outcomes:
            outcomes.append(None)
            outcomes[0] = script("evaluate", run, "explainers=[random]", *PLAN[1:], "n_images=4")

    monkeypatch.setattr(FolderCache, "keep", keep_and_start)
    assert script("evaluate", run, *PLAN).code == 0
    line = refused(outcomes[0])
    assert f"{run}/evaluation is in use by an evaluation of process" in line
    assert "out=FOLDER" in line
    beside = table(run / "evaluation")
    monkeypatch.undo()
    shutil.rmtree(run / "evaluation")
    assert script("evaluate", run, *PLAN).code == 0
    pd.testing.assert_frame_equal(beside, table(run / "evaluation"))
    assert set(beside.groupby("metric").size()) == {12}


def test_an_evaluation_with_a_folder_of_its_own_may_go_on_beside(script: Script, run: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    with locked(run / "evaluation", "an evaluation"):
        assert script("evaluate", run, *PLAN, f"out={own}").code == 0
    assert not (run / "evaluation/results.json").exists()
    assert {"results.json", "per_image.parquet", "report.html", "maps"} <= {path.name for path in own.iterdir()}
    assert script("evaluate", run, *PLAN).code == 0
    pd.testing.assert_frame_equal(table(own), table(run / "evaluation"))
    outcome = script("evaluate", run, *PLAN, f"out={own}")  # the folder of an evaluation is taken up again
    assert outcome.code == 0
    assert "it is not repeated" in outcome.out
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    line = refused(script("evaluate", run, *PLAN, f"out={tmp_path / 'full'}"))
    assert "holds files that are not those of an evaluation" in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_lost_part_is_no_finished_table(script: Script, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a process whose folder is not seen here."""
    of = FolderCache.of
    monkeypatch.setattr(FolderCache, "of", lambda self, *args: of(self, *args)[:-1])
    line = refused(script("evaluate", run, *PLAN))
    assert "4 of 12 images have no result of intrinsic" in line
    assert not (run / "evaluation/results.json").exists()
    monkeypatch.undo()
    assert script("evaluate", run, *PLAN).code == 0
    assert len(table(run / "evaluation")) == 24


def test_a_finished_one_is_not_repeated_and_says_when_it_was(script: Script, run: Path) -> None:
    assert "it is not repeated" not in script("evaluate", run, *PLAN).out
    outcome = script("evaluate", run, *PLAN)
    (line,) = [line for line in outcome.out.splitlines() if "it is not repeated" in line]
    assert line.startswith(f"{run}/evaluation: finished 20")
    assert "intrinsic" in outcome.out  # the table is shown all the same


def test_the_table_stands_in_the_terminal(script: Script, run: Path) -> None:
    outcome = script("evaluate", run, *PLAN)
    head, line, note, report = outcome.out.splitlines()[-4:]
    assert head.split() == ["AD", "%", "↓", "DAUC", "↓"]
    rows = {row["metric"]: row for row in json.loads((run / "evaluation/results.json").read_text())["rows"]}
    ad, dauc = ([rows[key][end] for end in ("mean", "low", "high")] for key in ("ad", "dauc"))
    cells = [*(f"{100 * end:.1f}" for end in ad), *(f"{end:.3f}" for end in dauc)]
    assert [text.strip("[],") for text in line.split()] == ["intrinsic", *cells]
    own = "tiny/run: mean and its 95 % interval over 12 images; class explained: prediction; preset gomez2023; grid 4x4"
    assert note == own
    assert report == f"report: {run}/evaluation/report.html"


@pytest.mark.parametrize("change", ["pixels", "box", "label"])
def test_data_that_changed_are_judged_anew(
    script: Script, tiny_cub: Cub, bcnn_run: Path, tmp_path: Path, change: str
) -> None:
    root = Path(shutil.copytree(tiny_cub.root, tmp_path / "cub"))
    run, plan = copy_run(bcnn_run, tmp_path / "tiny" / "run"), [*PLAN, f"dataset.root={root}"]
    if change == "box":
        plan[0] = "explainers=[gt_box]"
    assert script("evaluate", run, *plan).code == 0
    before = table(run / "evaluation")
    if change == "pixels":
        for path in (root / "images").rglob("*.jpg"):
            ImageOps.invert(Image.open(path).convert("RGB")).save(path, "PNG")
    else:
        file = root / {"box": "bounding_boxes.txt", "label": "image_class_labels.txt"}[change]
        lines = [line.split() for line in file.read_text().splitlines()]
        for line in lines:
            line[1:] = ["20", "20", "10", "10"] if change == "box" else [str(1 + int(line[1]) % 3)]
        file.write_text("".join(" ".join(line) + "\n" for line in lines))
    outcome = script("evaluate", run, *plan)
    assert outcome.code == 0
    assert "it is not repeated" not in outcome.out
    again = table(run / "evaluation")
    shutil.rmtree(run / "evaluation")
    assert script("evaluate", run, *plan).code == 0
    pd.testing.assert_frame_equal(again, table(run / "evaluation"))
    column = {"pixels": "confidence", "box": "value", "label": "label"}[change]
    assert not before[column].equals(again[column])


def folder_of_classes(root: Path, names: list[str], colours: dict[str, int]) -> Path:
    for split in ("train", "test"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(colours[name] + 10 * i).integers(0, 60, (40, 40, 3))
                pixels[..., colours[name]] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def test_classes_are_known_by_name(script: Script, tmp_path: Path) -> None:
    """A part of the classes has the predictions that its images have among all; other classes are refused."""
    colours = {"a": 0, "b": 1, "c": 2}
    whole = folder_of_classes(tmp_path / "whole", ["a", "b", "c"], colours)
    node = tiny_config(whole, out=str(tmp_path / "tiny" / "run"), model=TINY_CNN)
    node["data"]["dataset"] = {"name": "image_folder", "root": str(whole)}
    node["phases"] = [{"epochs": 6, "lrs": {"backbone": 1e-2, "head": 1e-2}}]
    run = fit(node)
    assert interp_models.load(run)[0].classes == ("a", "b", "c")
    assert script("evaluate", run, *PLAN).code == 0
    full = table(run / "evaluation")
    part = folder_of_classes(tmp_path / "part", ["b", "c"], colours)
    assert script("evaluate", run, *PLAN, f"dataset.root={part}").code == 0
    rows = table(run / "evaluation")
    expected = full[full["label"] != 0].reset_index(drop=True)
    for column in ("image_id", "label", "prediction", "target_class"):
        assert rows[column].tolist() == expected[column].tolist()
    np.testing.assert_allclose(rows["value"], expected["value"], rtol=1e-4, atol=1e-5)
    assert rows["label"].unique().tolist() == [1, 2]
    other = folder_of_classes(tmp_path / "other", ["b", "c", "z"], colours | {"z": 0})
    line = refused(script("evaluate", run, *PLAN, f"dataset.root={other}"))
    assert "the data set has a class 'z' that the model was not trained on; it knows 'a', 'b', 'c'" in line
    pd.testing.assert_frame_equal(rows, table(run / "evaluation"))


def test_another_order_of_classes_is_refused(tiny_cub: Cub) -> None:
    from interp_models.core.errors import InputError
    from interp_models.data.module import DataModule

    data = DataModule(dataset={"name": "cub", "root": str(tiny_cub.root)}, val_fraction=0.25)
    one, two, three = data.classes
    labels = list(data.test_images.labels)
    data.as_classes([one, two, three], "run")
    assert data.test_images.labels == labels
    with pytest.raises(InputError, match=f"run: .*class 0 is {one!r}, but {two!r} in the model"):
        data.as_classes([two, one, three], "run")
    assert data.test_images.labels == labels
    data.as_classes(["x", one, "y", two, three], "run")
    assert data.classes == ["x", one, "y", two, three]
    assert data.test_images.labels == [[1, 3, 4][label] for label in labels]
    sample = data.dataset("test")[0, 0]
    assert (sample.label, data.classes[sample.label]) == (1, one)


def test_runs_on_other_pictures_of_the_same_names_are_not_compared(
    script: Script, tiny_cub: Cub, bcnn_run: Path, cnn_run: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_cub.root, tmp_path / "cub"))
    runs = [copy_run(bcnn_run, tmp_path / "tiny" / "a"), copy_run(cnn_run, tmp_path / "tiny" / "b")]
    config = (runs[1] / "config.yaml").read_text()
    (runs[1] / "config.yaml").write_text(config.replace(str(tiny_cub.root), str(root)))
    assert script("evaluate", *runs, *PLAN, f"out={tmp_path / 'same'}").code == 0
    for path in (root / "images").rglob("*.jpg"):
        ImageOps.invert(Image.open(path).convert("RGB")).save(path, "PNG")
    line = refused(script("evaluate", *runs, *PLAN, f"out={tmp_path / 'other'}"))
    assert "have different test images and cannot be compared" in line
    assert not (tmp_path / "other").exists()


def test_a_range_of_values_is_part_of_the_images(tmp_path: Path) -> None:
    from interp_models.data import DATASETS
    from interp_models.data.contents import content_digests

    for name in ("a", "b"):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / split / name / "0.png")

    def of(**options: float) -> tuple[list[str], int]:
        images = DATASETS.build("image_folder", {"root": str(tmp_path), **options}, split="test")
        return content_digests(images, range(2)), int(images.load(0).image[0, 0, 0])

    assert of(max_value=4000) == of(max_value=4000)
    assert of(max_value=4000)[1] == 255
    assert of(max_value=8000)[1] != 255
    assert not set(of(max_value=4000)[0]) & set(of(max_value=8000)[0])


def test_drawn_test_images_that_were_trained_on_are_refused(script: Script, tmp_path: Path) -> None:
    """A folder without splits that grew since: the share of each class that is drawn is another one."""
    root = tmp_path / "flat"
    for name, colour in (("a", 0), ("b", 1)):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(10 * colour + i).integers(0, 60, (40, 40, 3))
            pixels[..., colour] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    node = tiny_config(root, out=str(tmp_path / "tiny" / "run"), model=TINY_CNN)
    node["data"]["dataset"] = {"name": "image_folder", "root": str(root)}
    node["phases"] = [{"epochs": 1, "lrs": {"backbone": 1e-2, "head": 1e-2}}]
    run = fit(node)
    assert script("evaluate", run, *PLAN).code == 0
    for name in ("a", "b"):
        shutil.copy(root / name / "0.png", root / name / "8.png")
    line = refused(script("evaluate", run, *PLAN))
    assert "test images are 20 % of each class, drawn by seed 0, but the training images are others" in line
    elsewhere = shutil.move(root, tmp_path / "moved")
    with pytest.warns(UserWarning, match="some may have been trained on"):
        assert script("evaluate", run, *PLAN, f"dataset.root={elsewhere}").code == 0


@pytest.mark.parametrize("file", ["results.json", "per_image.parquet", "maps/index.csv", "maps/intrinsic.npy"])
@pytest.mark.parametrize("content", [b"", pytest.param(b"{}", marks=pytest.mark.slow)])
def test_a_damaged_file_is_made_anew(script: Script, run: Path, file: str, content: bytes) -> None:
    assert script("evaluate", run, *PLAN).code == 0
    before = table(run / "evaluation")
    (run / "evaluation" / file).write_bytes(content)
    outcome = script("evaluate", run, *PLAN)
    assert outcome.code == 0
    assert "it is not repeated" not in outcome.out
    pd.testing.assert_frame_equal(table(run / "evaluation"), before)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("target=3", "target 3 is out of range: the model has classes 0 to 2"),
        ("target=-1", "target -1 is out of range: the model has classes 0 to 2"),
        ("grid=foo", "grid must be [rows, columns], 'native' or null; got 'foo'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_first(script: Script, run: Path, option: str, message: str) -> None:
    outcome = script("evaluate", run, *PLAN, option)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"error: {message}\n")
    assert not (run / "evaluation").exists()
