"""What Weights & Biases gets of an evaluation, read where it leaves our hands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pytorch_lightning.loggers import WandbLogger

from tests.conftest import Script, copy_run


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
