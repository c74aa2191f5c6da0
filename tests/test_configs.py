"""Every config that is shipped trains or evaluates, on small images and with a small trunk."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from interp_models import EXPLAINERS, MODELS
from interp_models.config.loading import check, load_yaml
from interp_models.core.errors import InputError
from interp_models.evaluation.config import EvaluateConfig
from interp_models.evaluation.plan import expanded, explainer_specs
from interp_models.metrics.base import metrics_of
from interp_models.runs.building import build_model
from interp_models.runs.config import TrainConfig
from interp_models.runs.loading import load, run_config
from interp_models.training.trainer import seed_everything
from tests.conftest import TINY_VIT, Cub, Script, copy_run, tiny_options
from tests.contract.subjects import applies

ROOT = Path(__file__).parents[1] / "configs"
TRAIN = [
    path for path in sorted(ROOT.rglob("*.yaml")) if path.parent.name not in ("eval", "paper") and path.name[0] != "_"
]
EVALUATE = sorted((ROOT / "eval").glob("*.yaml"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def test_there_are_configs() -> None:
    assert {"quickstart", "cub/bcnn_lite0", "cub/cnn_lite0"} <= {label(path) for path in TRAIN}
    assert {"eval/faithfulness", "eval/posthoc", "eval/quickstart"} <= {label(path) for path in EVALUATE}


AGAIN = ("aircraft", "cars", "tiny_imagenet")
"""Data sets whose configs differ from others' in numbers only."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.parent.name in AGAIN else []) for path in TRAIN],
    ids=label,
)
def test_training(script: Script, tiny_cub: Cub, bcnn_run: Path, tmp_path: Path, path: Path) -> None:
    node = load_yaml(path)
    shipped: TrainConfig = check(TrainConfig, node)
    assert len(shipped.phases) > 0
    run = tmp_path / "run"
    name = shipped.model["name"]
    untrained = MODELS.get(name).untrained
    tiny = TINY_VIT if shipped.optimizer.layer_decay < 1 else tiny_options(name).get("backbone")
    trunk = {"backbone": tiny, "weights": "null"} if "backbone" in shipped.model else {}
    small = {} if trunk else MODELS.get(name).small  # a network of its own takes images of one size
    named_block = isinstance(shipped.model.get("block"), str)  # a layer of the shipped trunk
    outcome = script(
        "train",
        path,
        f"out={run}",
        f"data.dataset={{name: cub, root: {tiny_cub.root}}}",
        "data.image_size=64",
        "data.batch_size=4",
        "data.num_workers=0",
        "data.val_fraction=0.25",
        *(f"model.{key}={value}" for key, value in {**trunk, **small}.items()),
        *(f"phases[{number}].epochs=1" for number in range(len(shipped.phases))),
        *(f"model.{key}={value}" for key, value in untrained.items()),
        *(["model.block=blocks.4"] if named_block else []),
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
    changed = {"backbone", "weights", *small, *untrained} | ({"block"} if named_block else set())
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


def test_every_model_has_a_config() -> None:
    """One is enough; each says how it is started and, where it is no recipe of ours, what was published."""
    configs = {path: check(TrainConfig, load_yaml(path)) for path in TRAIN}
    assert {config.model["name"] for config in configs.values()} == set(MODELS)
    for path, config in configs.items():
        text = path.read_text()
        assert f"python train.py configs/{label(path)}.yaml" in text or label(path) == "quickstart"
        if "_lite0" not in path.name and label(path) != "quickstart":
            assert "# Published: " in text or "not published" in text
            assert config.experiment == label(path).replace("/", "_")


def test_posthoc_has_all_explainers() -> None:
    """Each once, and options only where they differ from the defaults."""
    shipped = check(EvaluateConfig, load_yaml(ROOT / "eval/posthoc.yaml"))
    specs = explainer_specs(shipped.explainers)
    assert sorted(name for _, name, _ in specs) == EXPLAINERS.names()
    for item in shipped.explainers:
        if isinstance(item, dict):
            defaults = EXPLAINERS.options(item["name"], {}, given=("model",))
            assert not [key for key, value in item.items() if defaults.get(key) == value]


def test_patterns_of_explainers() -> None:
    """They stand for all registered names that match and are not named elsewhere, in order of the alphabet."""
    assert expanded(["random", "smoothgrad*", {"name": "smoothgrad", "samples": 2}]) == [
        "random", "smoothgrad_squared", {"name": "smoothgrad", "samples": 2},
    ]  # fmt: skip
    assert expanded(["*"]) == EXPLAINERS.names()
    assert sorted(expanded(["g*", "*", "grad*"])) == EXPLAINERS.names()
    with pytest.raises(InputError, match=r"no explainer matches 'z\*'; known: ablationcam"):
        expanded(["z*"])


FEW = {"masks": 8, "samples": 2, "steps": 2}


SLOW = ("eval/posthoc", "eval/every_metric")


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.slow if label(path) in SLOW else []) for path in EVALUATE], ids=label
)
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
    specs = explainer_specs(shipped.explainers)
    labels = [label for label, _, _ in specs]
    assert list(results["left_out"]) == [label for label, name, _ in specs if not applies(name, "bcnn")]
    names = [name for name in labels if name not in results["left_out"]]
    keys = [key for key in metrics_of(shipped.metrics) if key not in results.get("unmeasured", {})]
    assert [(row["explainer"], row["metric"]) for row in rows] == [(name, key) for name in names for key in keys]
    assert {row["n"] for row in rows} == {5}
    assert {row["preset"] for row in rows} == {shipped.preset}
    shares = [row for row in rows if row["metric"] in EvaluateConfig().metrics and row["mean"] is not None]
    assert all(-1 <= row["mean"] <= 1 for row in shares)
