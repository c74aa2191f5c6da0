"""What loggers are sent: pictures with what they show."""

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


def test_tables_of_an_evaluation(
    script: Script, bcnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means with deviation and number, a row per explainer; and a row per image with its maps."""
    tables: dict[str, Any] = {}
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, key, **what: tables.update({key: what}))
    run = copy_run(bcnn_run, tmp_path / "tiny" / "run")
    plan = ["explainers=[intrinsic, random]", "metrics=[ad, ic]", "max_steps=3", "report_images=3"]
    assert script("evaluate", run, *plan, "logger.wandb=offline").code == 0
    values = pd.read_parquet(run / "evaluation/per_image.parquet")
    results = tables["results"]["dataframe"].set_index("explainer")
    assert list(results.index) == ["intrinsic", "random"]
    assert list(results) == ["ad", "ad std", "ad n", "ic", "ic std", "ic n"]
    for (explainer, metric), of in values.groupby(["explainer", "metric"]):
        row = results.loc[explainer]
        assert row[metric] == pytest.approx(of["value"].mean(), nan_ok=True)
        assert row[f"{metric} std"] == pytest.approx(of["value"].std(ddof=0), nan_ok=True)
        assert row[f"{metric} n"] == of["value"].notna().sum()
    columns, rows = tables["maps"]["columns"], tables["maps"]["data"]
    assert columns == ["image", "class", "prediction", "probability", "right", "pixels", "intrinsic", "random"]
    listing = pd.read_csv(run / "evaluation/maps/index.csv")
    assert [row[0] for row in rows] == [listing["image_id"][i] for i in (0, 6, 11)]
    for row in rows:
        of_image = values[values["image_id"] == row[0]].iloc[0]
        assert row[3] == pytest.approx(of_image["confidence"])
        assert row[4] == (of_image["prediction"] == of_image["label"]) == (row[1] == row[2])
        pictures = [np.asarray(picture.image) for picture in row[5:]]
        assert len({picture.tobytes() for picture in pictures}) == 3  # the image and two unlike maps
        assert {picture.shape for picture in pictures} == {(64, 64, 3)}
    assert json.loads((run / "evaluation/results.json").read_text())["rows"]
