"""The figure that shows maps of several runs side by side."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp_models import load
from interp_models.data.base import collate
from interp_models.data.subsets import subsample
from interp_models.report import visual
from interp_models.report.pictures import SIDE
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config
from tests.conftest import TINY_CNN, Script, copy_run

PLAN = ["explainers=[intrinsic, gradcam, random, guided_backprop]", "metrics=[ad]", "max_steps=3"]
PLAN += ["logger.wandb=disabled", "trainer.accelerator=cpu", "n_images=5", "report_images=3"]


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What contact sheets are made of."""
    kept: list[Any] = []
    draw = visual.contact_sheet

    def keep(rows: Any, row_labels: Any, column_labels: Any, path: Path) -> None:
        kept.append((rows, row_labels, column_labels, path))
        draw(rows, row_labels, column_labels, path)

    monkeypatch.setattr(visual, "contact_sheet", keep)
    return kept


def test_columns_are_the_first_runs_maps_and_every_runs_own(
    script: Script, bcnn_run: Path, cnn_run: Path, tmp_path: Path, sheets: list[Any]
) -> None:
    """What does not apply is left out; three maps are one picture in red, green and blue."""
    runs = [copy_run(run, tmp_path / run.name) for run in (cnn_run, bcnn_run)]
    out = tmp_path / "out"
    figure = "figure=[random, gradcam, guided_backprop]"
    outcome = script("evaluate", *runs, *PLAN, figure, f"out={out}")
    assert outcome.code == 0, outcome.err
    rows, labels, columns, path = sheets[-1]
    assert path == out / "figure.png"
    assert path.is_file()
    assert columns == ["image", "random", "gradcam", "cnn", "bcnn"]
    model, data = load(runs[1])[0], build_data(run_config(runs[0]))
    dataset = data.dataset("test")
    indices = subsample(data.test_indices, 5, 0)[[0, 2, 4]]
    samples = [dataset[0, int(np.flatnonzero(dataset.indices == index)[0])] for index in indices]
    assert labels == [data.classes[sample.label] for sample in samples]
    maps = {name: np.load(runs[0] / f"evaluation/maps/{name}.npy")[[0, 2, 4]] for name in ("random", "gradcam")}
    maps["cnn"] = np.load(runs[0] / "evaluation/maps/intrinsic.npy")[[0, 2, 4]]
    output = model.eval()(collate(samples).image)
    several = model.display(output, output.logits.argmax(dim=1)).detach().numpy()
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        image = visual.to_uint8(sample.image)
        expected = [image, *(visual.overlay(image, maps[name][i]) for name in ("random", "gradcam", "cnn"))]
        expected.append(visual.rgb(several[i], image))
        for cell, picture in zip(row, expected, strict=True):
            wanted = visual.fitted(picture, (SIDE, SIDE)).astype(int)
            assert np.abs(cell.astype(int) - wanted).mean() < 1


def test_runs_of_one_model_are_told_apart_by_their_names(
    script: Script, cnn_run: Path, tmp_path: Path, sheets: list[Any]
) -> None:
    runs = [copy_run(cnn_run, tmp_path / name) for name in ("a", "b")]
    outcome = script("evaluate", *runs, *PLAN, "figure=[gradcam]", f"out={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert len(set(sheets[-1][2])) == 4
    assert TINY_CNN["name"] not in sheets[-1][2]


def test_explainers_that_are_not_evaluated_are_refused(script: Script, cnn_run: Path, tmp_path: Path) -> None:
    run = copy_run(cnn_run, tmp_path / "run")
    outcome = script("evaluate", run, *PLAN, "figure=[rise]")
    assert outcome.code == 2
    assert "figure: 'rise' is not among the explainers (intrinsic, gradcam, random, guided_backprop)" in outcome.err
    outcome = script("evaluate", run, *PLAN, "explainers=[random]", "figure=[random]")
    assert outcome.code == 2
    assert "figure: shows every run's own map, so that explainers must have intrinsic" in outcome.err
    outcome = script("evaluate", run, *PLAN, "figure=[random]", "report_images=0")
    assert "figure: shows images of the page, so that report_images must be at least 1" in outcome.err
    assert not (run / "evaluation").exists()
    outcome = script("evaluate", run, *PLAN)
    assert outcome.code == 0
    assert not (run / "evaluation/figure.png").exists()
