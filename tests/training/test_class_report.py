"""What a test says of each class: counts by hand, and of a training by a plain loop."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from interp_models import load
from interp_models.core.outputs import InterpOutput
from interp_models.data.base import Sample
from interp_models.report.confusion import draw_confusion
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config
from interp_models.training.class_report import ClassReport, class_table
from tests.conftest import copy_run


def report_of(
    logits: torch.Tensor, labels: torch.Tensor, run: Path | None = None
) -> tuple[ClassReport, dict[str, float]]:
    """A report after a test of batches of 7, and what it logged."""
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(device="cpu", log=lambda key, value: logged.update({key: float(value)}))
    trainer: Any = SimpleNamespace()
    report = ClassReport(logits.shape[1], run)
    for _ in range(2):  # the second test begins anew
        report.on_test_start(trainer, module)
        for number, (some, of) in enumerate(zip(logits.split(7), labels.split(7), strict=True)):
            batch = Sample(torch.zeros(len(of), 3, 1, 1), of, torch.arange(len(of)))  # type: ignore[arg-type]
            report.on_test_batch_end(trainer, module, InterpOutput(some, some[:, :1, None, None]), batch, number)
        report.on_test_epoch_end(trainer, module)
    return report, logged


def test_by_hand() -> None:
    """Class 0: two right of three, one taken for 2; class 1: none of one; class 2 has no image."""
    guesses, labels = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 0, 0, 1])
    report, logged = report_of(torch.eye(3)[guesses], labels)
    assert report.counts.tolist() == [[2, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert logged == {"test/acc_class_mean": pytest.approx((2 / 3 + 0) / 2)}  # of three classes there is no top 5
    assert class_table(report.counts, ["a", "b", 'c, "d"']).splitlines() == [
        "class,n,right,accuracy,most_confused_with,times",
        'a,3,2,0.6667,"c, ""d""",1',
        'b,1,0,0.0,"c, ""d""",1',
        '"c, ""d""",0,0,,,0',
    ]


@pytest.mark.parametrize(("classes", "top"), [(5, False), (6, True), (40, True)])
def test_against_a_loop(classes: int, top: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(100, classes, generator=generator), torch.randint(classes, (100,), generator=generator)
    report, logged = report_of(logits, labels)
    order = logits.argsort(dim=1, descending=True)
    expected = np.zeros((classes, classes), int)
    for label, guess in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
        expected[label, guess] += 1
    np.testing.assert_array_equal(report.counts, expected)
    assert ("test/acc_top5" in logged) == top
    if top:
        right = sum(label in first for label, first in zip(labels.tolist(), order[:, :5].tolist(), strict=True)) / 100
        assert logged["test/acc_top5"] == pytest.approx(right)
        assert right > expected.trace() / 100


def test_names_that_are_no_text() -> None:
    """Names of folders that are no UTF-8."""
    table = class_table(torch.tensor([[0, 1], [0, 1]]), ["caf\udce9", "b"])
    assert table.splitlines()[1] == "caf\\udce9,1,0,0.0,b,1"


def test_of_a_training(bcnn_run: Path) -> None:
    model, _ = load(bcnn_run)
    data = build_data(run_config(bcnn_run))
    counts = np.zeros((3, 3), int)
    for batch in data.test_dataloader():
        with torch.no_grad():
            np.add.at(counts, (batch.label.numpy(), model(batch.image).logits.argmax(dim=1).numpy()), 1)
    metrics = json.loads((bcnn_run / "metrics.json").read_text())
    assert metrics["test/acc_class_mean"] == pytest.approx((counts.diagonal() / 4).mean())
    assert "test/acc_top5" not in metrics
    table = pd.read_csv(bcnn_run / "classes.csv")
    assert table["class"].tolist() == data.classes
    assert table["n"].tolist() == [4, 4, 4]
    assert table["right"].tolist() == counts.diagonal().tolist()
    assert (bcnn_run / "confusion.png").is_file()


@pytest.mark.parametrize(("classes", "side"), [(3, 34), (60, 11), (500, 2)])
def test_the_picture_shows_every_cell(tmp_path: Path, classes: int, side: int) -> None:
    """A diagonal of the darkest blue on white, of as many cells as there are classes; `$` is no formula."""
    names = [f"{label}. $a_{{$ {'x' * label}" for label in range(classes)]
    draw_confusion(torch.eye(classes, dtype=torch.long) * 3, names, tmp_path / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    blue = (np.abs(pixels - (8, 48, 107)).max(axis=2) <= 2).nonzero()  # the end of the colour map
    for place in blue:
        assert np.ptp(place) + 1 == pytest.approx(max(classes * side, 100), abs=4)  # the frame covers its edge
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


def test_loggers_get_the_picture(bcnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, **options: sent.append((key, images)))
    run = copy_run(bcnn_run, tmp_path / "run")
    (run / "confusion.png").unlink()
    report = ClassReport(3, run)
    data = build_data(run_config(run))
    report.on_test_end(SimpleNamespace(datamodule=data, loggers=[WandbLogger(offline=True)]), None)  # type: ignore[arg-type]
    assert sent == [("confusion", [str(run / "confusion.png")])]
    assert (run / "confusion.png").is_file()
