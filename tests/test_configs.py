"""Every config that is shipped trains or evaluates, on small images and with a small trunk."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from interp_models import EXPLAINERS, MODELS
from interp_models.config.loading import check, load_yaml
from interp_models.metrics.base import metrics_of
from interp_models.runs.building import build_model
from interp_models.runs.config import EvaluateConfig, TrainConfig
from interp_models.runs.loading import load, run_config
from interp_models.training.trainer import seed_everything
from tests.conftest import Cub, Script, copy_run, tiny_options
from tests.contract.applicability import ALL, APPLIES

ROOT = Path(__file__).parents[1] / "configs"
TRAIN = [path for path in sorted(ROOT.rglob("*.yaml")) if path.parent.name != "eval" and path.name[0] != "_"]
EVALUATE = sorted((ROOT / "eval").glob("*.yaml"))


OTHER = {
    "protopnet": ["model.prune_least=0"],
    # An epoch of three steps teaches leaves little.
    "prototree": ["model.prune_factor=0.5"],
}
"""What else a model needs to pass its phases in no time."""


def label(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def test_there_are_configs() -> None:
    assert {"quickstart", "cub/bcnn_lite0", "cub/cnn_lite0"} <= {label(path) for path in TRAIN}
    assert {"eval/faithfulness", "eval/posthoc", "eval/quickstart"} <= {label(path) for path in EVALUATE}


@pytest.mark.parametrize("path", TRAIN, ids=label)
def test_training(script: Script, tiny_cub: Cub, bcnn_run: Path, tmp_path: Path, path: Path) -> None:
    node = load_yaml(path)
    shipped: TrainConfig = check(TrainConfig, node)
    assert len(shipped.phases) > 0
    run = tmp_path / "run"
    outcome = script(
        "train",
        path,
        f"out={run}",
        f"data.dataset={{name: cub, root: {tiny_cub.root}}}",
        "data.image_size=64",
        "data.batch_size=4",
        "data.num_workers=0",
        "data.val_fraction=0.25",
        f"model.backbone={tiny_options(shipped.model['name'])['backbone']}",
        "model.weights=null",
        *(f"phases[{number}].epochs=1" for number in range(len(shipped.phases))),
        *OTHER.get(shipped.model["name"], []),
        *(["model.block=blocks.4"] if shipped.model["name"] == "prototree" and "block" in shipped.model else []),
        *([f"distillation.teacher={bcnn_run}"] if shipped.distillation.teacher else []),
        *([f"feature_cache={tmp_path / 'features'}"] if shipped.feature_cache else []),
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "logger.wandb=disabled",
        "attention.every_n_epochs=0",
    )
    assert outcome.code == 0, outcome.err
    # What was trained is what the file says
    config = run_config(run)
    changed = {"backbone", "weights", "prune_factor", "prune_least"}
    changed |= {"block"} if shipped.model["name"] == "prototree" else set()
    for key, value in shipped.model.items():
        assert key in changed or config["model"][key] == value
    for ours, theirs in zip(config["phases"], shipped.phases, strict=True):
        assert ours == {**vars(theirs), "epochs": 1}
    assert config["optimizer"] == vars(shipped.optimizer)
    assert config["experiment"] == shipped.experiment
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test/n"] == 12
    table = pd.read_csv(run / "metrics.csv")
    losses = table["train/loss"].dropna()
    assert len(losses) == len(shipped.phases)
    assert losses.between(0, 20).all()
    # The groups that have a learning rate in some phase have moved, and no other
    model, _ = load(run, "last")
    seed_everything(config["seed"])
    fresh = build_model(config, 3).parameter_groups()
    moved = {
        group
        for group, parameters in model.parameter_groups().items()
        if any(not torch.equal(ours, theirs) for ours, theirs in zip(parameters, fresh[group], strict=True))
    }
    trained = {group for phase in shipped.phases for group in phase.lrs}
    fitted = {"last_layer" for phase in shipped.phases if "fit_last_layer" in phase.on_end}
    assert moved == trained | fitted


def test_every_model_has_a_config_of_every_data_set() -> None:
    """Of the three that papers use."""
    found = {(path.parent.name, check(TrainConfig, load_yaml(path)).model["name"]) for path in TRAIN}
    for name in MODELS.names():
        assert {(folder, name) for folder in ("cub", "aircraft", "cars")} <= found
    for path in TRAIN:
        text = path.read_text()
        assert f"python train.py configs/{label(path)}.yaml" in text or label(path) == "quickstart"
        if "_lite0" not in path.name and label(path) != "quickstart":
            assert "# Published: " in text or "not published" in text
            assert check(TrainConfig, load_yaml(path)).experiment == label(path).replace("/", "_")


def test_posthoc_has_all_explainers() -> None:
    shipped = check(EvaluateConfig, load_yaml(ROOT / "eval/posthoc.yaml"))
    names = [item if isinstance(item, str) else item["name"] for item in shipped.explainers]
    assert sorted(names) == EXPLAINERS.names()


FEW = {"masks": 8, "samples": 2, "steps": 2}


@pytest.mark.parametrize("path", EVALUATE, ids=label)
def test_evaluation(script: Script, bcnn_run: Path, tmp_path: Path, path: Path) -> None:
    node: dict[str, Any] = load_yaml(path)
    shipped: EvaluateConfig = check(EvaluateConfig, node)
    run = copy_run(bcnn_run, tmp_path / "run")
    few = [
        f"explainers[{number}].{key}={FEW[key] if item['name'] != 'kernelshap' else 2 * 7**2}"
        for number, item in enumerate(shipped.explainers)
        if isinstance(item, dict)
        for key in FEW.keys() & item.keys()
    ]
    options = ["max_steps=4", "n_images=5", "report_images=1", "trainer.accelerator=cpu", "logger.wandb=disabled"]
    outcome = script("evaluate", run, f"config={path}", *options, *few)
    assert outcome.code == 0, outcome.err
    results = json.loads((run / "evaluation/results.json").read_text())
    rows = results["rows"]
    labels = [item if isinstance(item, str) else item.get("label", item["name"]) for item in shipped.explainers]
    assert list(results["left_out"]) == [name for name in labels if "bcnn" not in APPLIES.get(name, ALL)]
    names = [name for name in labels if name not in results["left_out"]]
    keys = list(metrics_of(shipped.metrics))
    assert [(row["explainer"], row["metric"]) for row in rows] == [(name, key) for name in names for key in keys]
    assert {row["n"] for row in rows} == {5}
    assert {row["preset"] for row in rows} == {shipped.preset}
    assert all(-1 <= row["mean"] <= 1 for row in rows if row["mean"] is not None)
