"""Two processes do what one does, through the command line; by gloo on CPUs, as there may be no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from interp_models import METRICS, PROTOTYPE_METRICS, load
from interp_models.core.distributed import gathered_objects
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config
from tests import processes
from tests.conftest import BCNN_LRS, copy_run, fit, squares_config, tiny_config, tiny_options, write_config
from tests.contract.prototype_metrics import case, equal, judge
from tests.data.make_cub import PARTS, make_cub
from tests.training.test_class_report import report_of

ROOT = Path(__file__).parents[2]
TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true"]
PLAN = ["explainers=[intrinsic, gradcam, cam, random]", "max_steps=5", "report_images=2", "logger.wandb=disabled"]


def command(script: str, *arguments: str | Path, cwd: Path) -> str:
    """Run a script as a user does; returns its output."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("PL_", "MASTER_", "LOCAL_", "NODE_"))
    }
    line = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=clean, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def odd_cub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 9 test images, in the order of their classes: ranks see classes in unlike numbers."""
    root = tmp_path_factory.mktemp("odd_cub")
    make_cub(root, per_class=7)
    return root


def config_of(root: Path, out: Path, batch_size: int) -> dict[str, Any]:
    """A training without anything that depends on how images are dealt out to processes."""
    phases = [
        {"epochs": 1, "lrs": {"head": 0.1}, "eval_modules": ["backbone"]},  # the other groups are frozen
        {"epochs": 2, "lrs": dict.fromkeys(BCNN_LRS, 0.1), "eval_modules": ["backbone"]},
    ]
    config = tiny_config(root, out=str(out), phases=phases, optimizer={"name": "sgd"})
    config["data"] |= {"batch_size": batch_size, "augment": False}
    return config


@pytest.fixture(scope="module")
def one_process(odd_cub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training by one process."""
    return fit(config_of(odd_cub, tmp_path_factory.mktemp("one") / "tiny" / "run", 4))


@pytest.fixture(scope="module")
def two_processes(odd_cub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training by two processes with half the batch each."""
    folder = tmp_path_factory.mktemp("two")
    run = folder / "tiny" / "run"
    out = command("train.py", write_config(folder / "c.yaml", config_of(odd_cub, run, 2)), *TWO, cwd=folder)
    assert out.count("test accuracy") == 1
    assert "on 9 images" in out
    return run


def assert_same_training(run: Path, other: Path) -> None:
    for name in ("best", "last"):
        a, b = (torch.load(r / f"checkpoints/{name}.ckpt", weights_only=True) for r in (run, other))
        assert a["epoch"] == b["epoch"]
        for key, tensor in a["state_dict"].items():
            torch.testing.assert_close(tensor, b["state_dict"][key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: k + m)
    a, b = (json.loads((r / "metrics.json").read_text()) for r in (run, other))
    assert a == b
    a, b = (pd.read_csv(r / "metrics.csv") for r in (run, other))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)


def test_training(one_process: Path, two_processes: Path) -> None:
    assert_same_training(two_processes, one_process)
    assert json.loads((two_processes / "metrics.json").read_text())["test/n"] == 9
    table = pd.read_csv(two_processes / "metrics.csv")
    assert table["val/n"].dropna().tolist() == [3, 3, 3]
    assert table["train/loss"].nunique() == 3
    assert table["epoch"].tolist() == [0, 1, 2]
    assert table["train/acc"].nunique() > 1
    assert (two_processes / "classes.csv").read_text() == (one_process / "classes.csv").read_text()
    assert pd.read_csv(two_processes / "classes.csv")["n"].tolist() == [3, 3, 3]


OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "wsdan": ({"n_maps": 3, "crop_drop": False}, ["backbone", "attention", "head"]),
    "br_npa": ({}, ["backbone", "head"]),
    "dpnet": ({"parts_per_class": 2, "covering": 0.1, "complementary": 1.0, "specific": 0.1}, ["parts", "head"]),
    "vit_cls": ({"layer_decay": 0.5, "drop_path": 0.0}, ["backbone", "head"]),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS])
def test_models(bcnn_run: Path, odd_cub: Path, tmp_path: Path, name: str) -> None:
    """Centres, a teacher, features computed by two processes, and learning rates of blocks."""
    options, groups = OTHERS[name]
    runs = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        node = config_of(odd_cub, folder / "run", 4 // ranks)
        node["model"] = {"name": name, **tiny_options(name), **options}
        node["phases"] = [{"epochs": 2, "lrs": dict.fromkeys(groups, 0.01), "eval_modules": ["backbone"]}]
        if name == "wsdan":  # roots of small features make much of the last digits
            node["trainer"]["precision"] = "64-true"
        if name == "br_npa":
            node["distillation"] = {"teacher": str(bcnn_run), "temperature": 2.0, "weight": 0.5}
        if name == "dpnet":
            node["feature_cache"] = str(folder / "features")
        folder.mkdir()
        if ranks == 1:
            fit(node)
        else:
            command("train.py", write_config(folder / "c.yaml", node), *TWO, cwd=tmp_path)
        runs.append(folder / "run")
    assert_same_training(runs[1], runs[0])
    state = torch.load(runs[1] / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert name != "wsdan" or float(state["centres.rows"].abs().sum()) > 0


@pytest.mark.slow
def test_crops_drops_and_effects_go_on_alike(odd_cub: Path, tmp_path: Path) -> None:
    """What is drawn at random differs between processes, but not between a training and one that was broken off."""
    for name, epochs in (("whole", 3), ("broken", 2)):
        node = config_of(odd_cub, tmp_path / name, 2)
        node["model"] = {"name": "cal", **tiny_options("cal")}
        node["phases"] = [{"epochs": epochs, "lrs": dict.fromkeys(BCNN_LRS, 0.01)}]
        node["optimizer"] = {"name": "sgd"}
        command("train.py", write_config(tmp_path / f"{name}.yaml", node), *TWO, cwd=tmp_path)
    command("train.py", f"resume={tmp_path / 'broken'}", "phases[0].epochs=3", cwd=tmp_path)
    a, b = (torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True) for n in ("whole", "broken"))
    assert float(a["state_dict"]["centres.rows"].abs().sum()) > 0
    for key, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][key]), key


def test_one_run_folder(two_processes: Path) -> None:
    names = sorted(path.name for path in two_processes.glob("[!.]*"))
    assert names == [
        "checkpoints",
        "classes.csv",
        "config.yaml",
        "confusion.png",
        "metrics.csv",
        "metrics.json",
        "times.csv",
    ]
    folder = two_processes.parents[1]
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "tiny"]
    assert [path.name for path in (folder / "tiny").iterdir()] == ["run"]


def test_evaluation(bcnn_run: Path, odd_cub: Path, tmp_path: Path) -> None:
    from interp_models.config.loading import check, override
    from interp_models.evaluation.config import EvaluateConfig
    from interp_models.runs import evaluate

    alone, together = (copy_run(bcnn_run, tmp_path / name / "tiny" / "run") for name in ("alone", "together"))
    plan = [*PLAN, f"dataset.root={odd_cub}"]
    evaluate.evaluate([alone], check(EvaluateConfig, override({}, plan)))
    plan += [f"config={ROOT}/configs/eval/faithfulness.yaml", "n_images=null"]
    command("evaluate.py", together, *plan, *TWO, cwd=tmp_path)
    a, b = (folder / "evaluation" for folder in (alone, together))
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    assert [list(of["left_out"]) for of in results] == [["cam"], ["cam"]]
    rows, others = (of["rows"] for of in results)
    assert len(rows) == 24
    for row, other in zip(rows, others, strict=True):
        assert row["n"] == 9
        for key in ("mean", "std", "low", "high", "distance"):
            near = 1e-4 if row["metric"] in ("dc", "ic") else 1e-6
            assert other.pop(key) == pytest.approx(row.pop(key), abs=near, nan_ok=True)
        assert row == other
    images = [pd.read_parquet(folder / "per_image.parquet") for folder in (a, b)]
    assert len(images[0]) == 9 * 24
    assert images[0]["prediction"].nunique() > 1
    for correlations in (True, False):  # of small differences; they feel the last digits of float32
        parts = [frame[frame["metric"].isin(["dc", "ic"]) == correlations] for frame in images]
        pd.testing.assert_frame_equal(*parts, rtol=1e-5, atol=1e-4 if correlations else 1e-6)
    assert (a / "maps/index.csv").read_text() == (b / "maps/index.csv").read_text()
    for name in ("intrinsic", "gradcam", "random"):
        maps = [np.load(folder / f"maps/{name}.npy") for folder in (a, b)]
        np.testing.assert_allclose(*maps, rtol=1e-5, atol=1e-7)
    files = ["maps", "per_image.parquet", "report.html", "results.json", "shown"]
    assert sorted(path.name for path in b.glob("[!.]*")) == files


@pytest.mark.slow
def test_every_metric_over_two_and_four_processes(bcnn_run: Path, odd_cub: Path, tmp_path: Path) -> None:
    """Values, intervals, ranks, tests and distances do not depend on how images are dealt out."""
    plan = ["explainers=[intrinsic, gradcam, random]", 'metrics=["*"]', "n_images=8", f"dataset.root={odd_cub}"]
    plan += [*PLAN[1:], "trainer.accelerator=cpu"]
    found = []
    for ranks in (1, 2, 4) if (os.cpu_count() or 1) >= 4 else (1, 2):  # trainings refuse more processes than cores
        run = copy_run(bcnn_run, tmp_path / str(ranks) / "tiny" / "run")
        many = [] if ranks == 1 else [f"trainer.devices={ranks}", "trainer.strategy=ddp"]
        command("evaluate.py", run, *plan, *many, cwd=tmp_path)
        found.append(json.loads((run / "evaluation" / "results.json").read_text()))
    alone, *others = found
    assert len({row["metric"] for row in alone["rows"]}) > 40
    for other in others:
        assert other["unmeasured"] == alone["unmeasured"]
        for row, own in zip(alone["rows"], other["rows"], strict=True):
            for key, value in row.items():
                if isinstance(value, float):  # correlations of small differences feel the last digits of float32
                    near = 2e-3 if key in ("mean", "std", "low", "high") else 1e-6
                    assert own[key] == pytest.approx(value, abs=near, rel=1e-4), (row["metric"], key)
                else:
                    assert own[key] == value, (row["metric"], key)


SHORT = {"backbone": 0.01, "add_on": 0.1, "prototypes": 0.1}
PROTOTYPES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "protopnet": (
        {"prototypes_per_class": 3, "channels": 6, "unique": True, "last_layer_steps": 5}
        | {"prune_neighbours": 4, "prune_least": 2},
        [
            {"name": "warm", "epochs": 1, "lrs": {"add_on": 0.1, "prototypes": 0.1}, "select": "none"},
            {"name": "joint", "epochs": 2, "lrs": SHORT, "on_end": ["push", "fit_last_layer"], "select": "last"},
            {"name": "last", "epochs": 1, "lrs": {"last_layer": 0.01}, "on_end": ["prune", "fit_last_layer"]},
        ],
    ),
    "prototree": (
        {"depth": 4, "channels": 6, "prune_factor": 1.02},
        [
            {"name": "freeze", "epochs": 1, "lrs": {"add_on": 0.1, "prototypes": 0.1}, "select": "none"},
            {"name": "all", "epochs": 4, "lrs": SHORT, "on_end": ["prune", "project"], "select": "last"},
        ],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "protopnet" else pytest.mark.slow) for name in PROTOTYPES]
)
def test_prototypes(odd_cub: Path, tmp_path: Path, name: str) -> None:
    """Leaves, patches with their sources, the cached last layer and what is pruned, over shards of uneven size."""
    options, phases = PROTOTYPES[name]
    runs = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks) / "run"
        node = config_of(odd_cub, run, 4 // ranks)
        node["model"] = {**node["model"], "name": name, **options}
        node["phases"] = [{**phase, "eval_modules": ["backbone"]} for phase in phases]
        node["data"]["val_fraction"] = 0.25  # 9 images are left: 5 and 4
        # In float32 a match has a distance of 1e-7 instead of 0, which ln((d + 1) / (d + 1e-4)) makes 1e-3.
        node["trainer"]["precision"] = "64-true"
        (tmp_path / str(ranks)).mkdir()
        config = write_config(tmp_path / str(ranks) / "c.yaml", node)
        command("train.py", config, *(TWO if ranks == 2 else []), cwd=tmp_path)
        runs.append(run)
    assert_same_training(*runs)
    state = torch.load(runs[1] / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert bool((state["sources.image"] >= 0).any())
    kept = state["kept" if name == "protopnet" else "leaf_kept"]
    assert 0 < int(kept.sum()) < len(kept)


@pytest.mark.slow
def test_prototypes_are_patches_of_the_saved_model(odd_cub: Path, tmp_path: Path) -> None:
    """Also those that the second rank found: its batch-norm statistics were others after the last step."""
    run = tmp_path / "tiny" / "run"
    node = config_of(odd_cub, run, 2)
    node["model"] = {**node["model"], "name": "protopnet", "prototypes_per_class": 8, "channels": 8}
    node["phases"] = [{"epochs": 2, "lrs": SHORT, "on_end": ["push"], "select": "last"}]
    command("train.py", write_config(tmp_path / "c.yaml", node), *TWO, cwd=tmp_path)
    model, _ = load(run, "last")
    images = build_data(run_config(run)).dataset("train", augment=False)
    place = {int(index): position for position, index in enumerate(images.indices)}
    sources = model.sources
    ranks = set()
    for number, prototype in enumerate(model.prototypes.detach()[:, :, 0, 0]):
        position = place[int(sources.image[number])]
        ranks.add(position % 2)
        row, column = sources.cell[number].tolist()
        with torch.no_grad():
            z = model.features(images[0, position].image[None].as_subclass(torch.Tensor))
        torch.testing.assert_close(prototype, z[0, :, row, column], rtol=0, atol=1e-5)
    assert ranks == {0, 1}


@pytest.mark.slow
def test_resuming(odd_cub: Path, one_process: Path, tmp_path: Path) -> None:
    """One process begins, two go on: the second one leaves the files of the first alone."""
    node = config_of(odd_cub, tmp_path / "tiny" / "run", 2)
    phases, node["phases"] = node["phases"], node["phases"][:1]
    command("train.py", write_config(tmp_path / "c.yaml", node), *TWO, cwd=tmp_path)
    run = tmp_path / "tiny" / "run"
    command("train.py", f"resume={run}", f"phases={json.dumps(phases)}", cwd=tmp_path)
    assert_same_training(run, one_process)


# Several labels per image


@pytest.mark.slow
def test_several_labels(squares: dict[str, Any], tmp_path: Path) -> None:
    """Average precision is of the images of all ranks, 5 and 4 of them; so are the maps of every label."""
    runs = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks) / "tiny" / "run"
        node = squares_config(run, optimizer={"name": "sgd"})
        node["data"] |= {"batch_size": 4 // ranks, "augment": False, "val_fraction": 0.4}
        node["data"]["dataset"] |= {"count": 19}
        node["phases"] = [{"epochs": 2, "lrs": {"backbone": 0.05, "head": 0.05}, "eval_modules": ["backbone"]}]
        (tmp_path / str(ranks)).mkdir()
        plan = [*PLAN[1:], "explainers=[intrinsic, gradcam, random]", "target=label"]
        if ranks == 1:
            fit(node)
            command("evaluate.py", run, *plan, cwd=tmp_path)
        else:
            command("train.py", write_config(tmp_path / "c.yaml", node), *TWO, cwd=tmp_path)
            command("evaluate.py", run, *plan, *TWO, cwd=tmp_path)
        runs.append(run)
    assert_same_training(runs[1], runs[0])
    metrics = json.loads((runs[1] / "metrics.json").read_text())
    assert 0 < metrics["val/mean_ap"] < 1
    assert metrics["test/n"] == 19
    a, b = (run / "evaluation" for run in runs)
    assert (a / "maps/index.csv").read_text() == (b / "maps/index.csv").read_text()
    assert len(pd.read_csv(a / "maps/index.csv")) > 19
    tables = [pd.read_parquet(folder / "per_image.parquet") for folder in (a, b)]
    keys = ["explainer", "metric", "index", "target_class", "prediction"]
    pd.testing.assert_frame_equal(*(of[keys] for of in tables))
    np.testing.assert_allclose(*(of["probability"] for of in tables), rtol=1e-3)
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (a, b)]
    assert [(row["n"], row["explainer"]) for row in rows[0]] == [(row["n"], row["explainer"]) for row in rows[1]]
    maps = [np.load(folder / "maps/random.npy") for folder in (a, b)]
    np.testing.assert_allclose(*maps, rtol=1e-5, atol=1e-7)


# Classes of a test


def _report(rank: int, folder: Path) -> None:
    logits, labels = scores_and_labels()
    found = report_of(logits[rank::2], labels[rank::2])  # 12 and 11 images
    torch.save((found[0].counts, found[1]), folder / f"{rank}.pt")


def scores_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(23, 8, generator=generator), torch.randint(8, (23,), generator=generator)


@pytest.mark.slow
def test_classes_are_judged_by_the_images_of_all_ranks(tmp_path: Path) -> None:
    processes.run_ranks(_report, tmp_path)
    report, logged = report_of(*scores_and_labels())
    assert int(report.counts.sum()) == 23
    assert set(logged) == {"test/acc_class_mean", "test/acc_top5"}
    for rank in range(2):
        counts, values = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(counts, report.counts)
        assert values == pytest.approx(logged)


# A rank without images


def _rank(rank: int, folder: Path, values: dict[str, dict[str, list[float]]]) -> None:
    found: dict[str, Any] = {"objects": gathered_objects({"rank": rank} if rank else {})}
    for name, of_keys in values.items():
        metric = METRICS.get(name)()
        if rank == 0:
            rows = {key: torch.tensor(numbers).view(-1, *[1] * len(metric.width)) for key, numbers in of_keys.items()}
            metric.add({key: row.expand(-1, *metric.width) for key, row in rows.items()})
        means = {key: float(mean) for key, mean in metric.compute().items()}
        found[name] = {"means": means, "images": {key: v.tolist() for key, v in metric.per_image().items()}}
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_a_rank_that_saw_no_image(tmp_path: Path) -> None:
    """Both ranks know the mean over the images of one of them; an undefined value is left out."""
    values = {
        name: {key: [0.5, float("nan"), 0.25 + i] for i, key in enumerate(METRICS.get(name).keys)}
        for name in METRICS.names()
    }
    processes.run_ranks(_rank, tmp_path, values)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["objects"] == [{}, {"rank": 1}]
        for name, of_keys in values.items():
            expected = {key: np.nanmean(numbers) for key, numbers in of_keys.items()}
            assert found[name]["means"] == pytest.approx(expected)
            for key, numbers in of_keys.items():
                np.testing.assert_allclose(found[name]["images"][key], numbers)


SHARDS = [[range(0, 23, 2), range(1, 23, 2)], [range(23), range(0)]]
"""Numbers of the images of two ranks: every second one each, or all and none."""


def _judge(rank: int, folder: Path) -> None:
    model, data = case()
    found: dict[str, Any] = {}
    for name in PROTOTYPE_METRICS.names():
        found[name] = []
        for shards in SHARDS:
            metric = PROTOTYPE_METRICS.get(name)(model, PARTS)
            judge(metric, model, data, 4, shards[rank])
            found[name].append((metric.of_all_ranks(), metric.compute(), metric.of_all_ranks()))
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_prototypes_are_judged_by_the_images_of_all_ranks(tmp_path: Path) -> None:
    """To the last digit, though most images are equally similar to some prototypes."""
    processes.run_ranks(_judge, tmp_path)
    model, data = case()
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            expected = judge(PROTOTYPE_METRICS.get(name)(model, PARTS), model, data, 4, range(23))
            for values, means, again in found:
                equal(values, expected)
                equal(again, expected)
                equal(means, {key: value.nanmean() for key, value in expected.items()})
