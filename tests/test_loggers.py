"""What loggers are sent: pictures with what they show."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from interp_models import load
from interp_models.data.base import collate
from interp_models.evaluation import evaluate
from interp_models.evaluation.logged import log_evaluation
from interp_models.report import visual
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config
from interp_models.training import loggers
from interp_models.training.attention_logger import AttentionLogger
from tests.conftest import Script, copy_run


class Board(TensorBoardLogger):
    """TensorBoard that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, np.ndarray, int, str]] = []

    @property
    def experiment(self) -> Any:
        return self

    def add_image(self, tag: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        self.sent.append((tag, picture, step, dataformats))


class Biases(WandbLogger):
    """W&B that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, list[Any], list[str]]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, *, caption: list[str]) -> None:
        self.sent.append((key, images, caption))


def test_picture_files_go_to_both(tmp_path: Path) -> None:
    paths = [tmp_path / "wren.png", tmp_path / "level-0.png"]
    for path, value in zip(paths, (30, 200), strict=True):
        Image.new("RGB", (3, 2), (value, 0, 0)).save(path)
    board, biases = Board(), Biases()
    loggers.log_pictures([board, biases], "prototypes", paths, 7)
    loggers.log_pictures([board, biases], "parts", [])
    assert biases.sent == [("prototypes", [str(path) for path in paths], ["wren", "level-0"])]
    tags, pictures, steps, formats = zip(*board.sent, strict=True)
    assert (tags, steps, formats) == (("prototypes/wren", "prototypes/level-0"), (7, 7), ("HWC", "HWC"))
    for picture, value in zip(pictures, (30, 200), strict=True):
        assert (picture == np.asarray([[[value, 0, 0]] * 3] * 2)).all()


def test_maps_of_a_training_carry_what_they_show(bcnn_run: Path, tmp_path: Path) -> None:
    model, _ = load(bcnn_run, "last")
    data = build_data(run_config(bcnn_run))
    board, biases = Board(), Biases()

    class Trainer:
        current_epoch, datamodule, loggers = 3, data, (board, biases)

    AttentionLogger(1, 2, tmp_path).on_train_epoch_end(Trainer(), model)  # type: ignore[arg-type]
    dataset = data.dataset("val")
    batch = collate([dataset[0, position] for position in (0, len(dataset) - 1)])
    output = model(batch.image)
    probabilities, guesses = output.logits.softmax(dim=1).max(dim=1)
    ((key, pictures, captions),) = biases.sent
    assert key == "attention"
    assert captions == [
        f"{data.train_images.image_id(index)}: {data.classes[label]} → {data.classes[guess]}, {100 * chance:.0f} %"
        for index, label, guess, chance in zip(
            batch.index.tolist(), batch.label.tolist(), guesses.tolist(), probabilities.tolist(), strict=True
        )
    ]
    maps = model.explain(output, guesses).detach().numpy()
    for picture, image, own in zip(pictures, batch.image, maps, strict=True):
        assert picture.shape == (64, 3 * 64, 3)
        assert (picture[:, :64] == visual.to_uint8(image)).all()
        assert (picture[:, 64:128] == visual.overlay(image, own)).all()
    ((tag, sheet, step, _),) = board.sent
    assert (tag, step) == ("attention", 3)
    assert (sheet == np.asarray(Image.open(tmp_path / "attention" / "epoch-003.png").convert("RGB"))).all()


def test_tensorboard_has_no_metric_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lightning would log -1 as `hp_metric` of every run."""
    from interp_models.training.config import LoggerConfig

    made: list[dict[str, Any]] = []
    monkeypatch.setattr(loggers, "TensorBoardLogger", lambda folder, **options: made.append({"at": folder, **options}))
    config = LoggerConfig(wandb="disabled", tensorboard=True)
    loggers.make_loggers(config, tmp_path, group="g")
    assert made == [{"at": tmp_path, "name": "", "version": "tensorboard", "default_hp_metric": False}]


def test_an_evaluation_in_weights_and_biases(
    script: Script, bcnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means with intervals, differences, images with maps and scores, curves, page and files, all written offline."""
    tables: dict[str, Any] = {}
    kept: dict[str, list[Path]] = {}
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, key, **what: tables.update({key: what}))

    def keep(loggers: Any, own: Any, answer: str, images: Any, files: dict[str, list[Path]]) -> None:
        kept.update(files)
        log_evaluation(loggers, own, answer, images, files)

    monkeypatch.setattr(evaluate, "log_evaluation", keep)
    run = copy_run(bcnn_run, tmp_path / "tiny" / "run")
    plan = ["explainers=[intrinsic, random]", "metrics=[ad, dauc]", "max_steps=3", "report_images=3"]
    assert script("evaluate", run, *plan, "logger.wandb=offline").code == 0
    values = pd.read_parquet(run / "evaluation/per_image.parquet")
    results = tables["results"]["dataframe"].set_index("explainer")
    assert list(results.index) == ["intrinsic", "random"]
    cells = ["", " low", " high", " std", " rank", " p", " n"]
    assert list(results) == [f"{key}{cell}" for key in ("ad", "dauc") for cell in cells] + ["passes", "seconds"]
    for (explainer, metric), of in values.groupby(["explainer", "metric"]):
        row = results.loc[explainer]
        assert row[metric] == pytest.approx(of["value"].mean(), nan_ok=True)
        assert row[f"{metric} std"] == pytest.approx(of["value"].std(ddof=0), nan_ok=True)
        assert row[f"{metric} n"] == of["value"].notna().sum()
        assert row[f"{metric} low"] < row[metric] < row[f"{metric} high"]
    columns, rows = tables["maps"]["columns"], tables["maps"]["data"]
    about = ["image", "class", "prediction", "probability", "right", "pixels", "intrinsic", "random"]
    assert columns == [*about, "intrinsic ad", "intrinsic dauc", "random ad", "random dauc"]
    listing = pd.read_csv(run / "evaluation/maps/index.csv")
    assert [row[0] for row in rows] == [listing["image_id"][i] for i in (0, 6, 11)]
    for row in rows:
        of_image = values[values["image_id"] == row[0]]
        first = of_image.iloc[0]
        assert row[3] == pytest.approx(first["confidence"])
        assert row[4] == (first["prediction"] == first["label"]) == (row[1] == row[2])
        pictures = [np.asarray(picture.image) for picture in row[5:8]]
        assert len({picture.tobytes() for picture in pictures}) == 3  # the image and two unlike maps
        assert {picture.shape for picture in pictures} == {(64, 64, 3)}
        np.testing.assert_allclose(row[8:], of_image["value"])
    differences = json.loads((run / "evaluation/results.json").read_text())["differences"]
    assert tables["differences"]["dataframe"].to_dict("records") == differences
    assert [path.name for path in kept["evaluation"]] == ["report.html", "results.json", "per_image.parquet"]
    assert [path.name for path in kept["model"]] == ["best.ckpt", "config.yaml"]
    assert all(path.is_file() for paths in kept.values() for path in paths)
    (offline,) = (run / "wandb").glob("offline-run-*")
    written = [path.name for path in (offline / "files/media").rglob("*") if path.is_file()]
    assert any(name.startswith("page_") and name.endswith(".html") for name in written)
    assert any(name.startswith("curves") or "dauc" in name for name in written)


def test_an_evaluation_in_tensorboard(script: Script, bcnn_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = copy_run(bcnn_run, tmp_path / "tiny" / "run")
    plan = ["explainers=[intrinsic, random]", "metrics=[ad]", "max_steps=3", "report_images=2"]
    assert script("evaluate", run, *plan, "logger.wandb=disabled", "logger.tensorboard=true").code == 0
    events = EventAccumulator(str(run / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    (text,) = events.Tensors("results/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert "| explainer | AD % ↓ | passes | s |" in said
    assert "On these 12 images" in said
    assert "\n\n- " in said  # a list in Markdown
    listing = pd.read_csv(run / "evaluation/maps/index.csv")
    tags = [f"maps/{listing['image_id'][i]}" for i in (0, 11)]
    assert sorted(tag for tag in events.Tags()["images"] if tag.startswith("maps/")) == sorted(tags)
    picture = np.asarray(Image.open(io.BytesIO(events.Images(tags[0])[0].encoded_image_string)))
    assert picture.shape == (160 + 36 + 18, 3 * (160 + 8), 3)  # the image and two maps below their names
