"""Several runs together are the mean of their probabilities."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from interp_models import load
from interp_models.runs.building import build_data
from interp_models.runs.folders import run_name
from interp_models.runs.loading import run_config
from tests.conftest import Script


def test_the_mean_of_probabilities(script: Script, bcnn_run: Path, cnn_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "both"
    outcome = script("evaluate", "--ensemble", bcnn_run, cnn_run, f"out={out}")
    assert outcome.code == 0, outcome.err
    probabilities, alone = [], {}
    for run in (bcnn_run, cnn_run):
        model, _ = load(run)
        dataset = build_data(run_config(run)).dataset("test")
        images = torch.stack([dataset[0, i].image.as_subclass(Tensor) for i in range(len(dataset))])
        labels = np.array([dataset[0, i].label for i in range(len(dataset))])
        with torch.no_grad():
            probabilities.append(model(images).logits.softmax(dim=1).numpy())
        alone[run_name(run)] = float((probabilities[-1].argmax(axis=1) == labels).mean())
    together = float(((probabilities[0] + probabilities[1]).argmax(axis=1) == labels).mean())
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == {"test/acc": together, "test/n": 12, "members": alone}
    assert f"{100 * together:.2f} % of 2 runs together on 12 images: {out}" in outcome.out


def test_refusals(script: Script, bcnn_run: Path) -> None:
    for arguments, message in (
        ([bcnn_run], "an ensemble needs at least two runs; got 1"),
        ([bcnn_run, bcnn_run], "two runs have the same name"),
        ([bcnn_run, "nowhere"], "nowhere is not a run folder"),
        ([bcnn_run, bcnn_run, "n_images=3"], "unknown key in config: 'n_images'"),
    ):
        outcome = script("evaluate", "--ensemble", *arguments)
        assert outcome.code != 0
        assert message in outcome.err
        assert "Traceback" not in outcome.err
