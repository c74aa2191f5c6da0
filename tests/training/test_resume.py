"""Broken trainings and evaluations go on as if nothing had happened."""

import itertools
import json
import logging
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.data.base import Sample
from interp_models.explainers.base import Explainer
from interp_models.explainers.cam import GradCAM
from interp_models.models.cnn import CNN
from interp_models.runs.loading import run_config
from interp_models.training import epoch_times
from interp_models.training.attention_logger import AttentionLogger
from interp_models.training.epoch_times import training_cost
from interp_models.training.module import InterpModule
from tests import processes
from tests.conftest import TINY_CNN, Cub, Script, copy_run, fit, tiny_config, tiny_options, write_config

LOG = logging.getLogger(__name__)
Inject = Callable[..., None]


class BreakAt(pl.Callback):
    """Raises after a batch of a training."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.moment = (epoch, batch)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.moment:
            raise RuntimeError("broken")


def config_of(cub: Cub, out: Path, **data: Any) -> dict[str, Any]:
    """All that is random at once: dropout, augmentation, batch norm; over two phases with schedules."""
    config = tiny_config(
        cub.root,
        out=str(out),
        phases=[
            {"epochs": 1, "lrs": {"head": 3e-3, "attention": 3e-3}, "warmup": 0.5},
            {"epochs": 3, "lrs": dict.fromkeys(("backbone", "attention", "head"), 3e-3), "schedule": "cosine"},
        ],
        optimizer={"name": "adamw", "weight_decay": 0.01},
    )
    config["model"]["dropout"] = 0.5
    config["data"] |= data
    return config


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Nested containers are equal, tensors bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, where=f"{where}/{i}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_runs(run: Path, other: Path) -> None:
    """The same weights, optimizer states, tables and test results."""
    for name in ("best", "last"):
        a, b = (torch.load(r / "checkpoints" / f"{name}.ckpt", weights_only=True) for r in (run, other))
        for key in ("state_dict", "optimizer_states", "epoch", "global_step"):
            assert_equal(a[key], b[key], f"{name}/{key}")
    assert (run / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    assert (run / "metrics.json").read_text() == (other / "metrics.json").read_text()


@pytest.fixture(scope="module")
def whole_run(tiny_cub: Cub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted training."""
    return fit(config_of(tiny_cub, tmp_path_factory.mktemp("whole") / "run"))


def test_the_training_is_worth_comparing(whole_run: Path) -> None:
    table = pd.read_csv(whole_run / "metrics.csv")
    assert table["train/loss"].nunique() == 4
    assert table["val/loss"].nunique() == 4
    checkpoint = torch.load(whole_run / "checkpoints/last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (3, 8)


@pytest.mark.parametrize(
    ("moments", "workers"),
    [
        ([(0, 1)], 0),  # before the first checkpoint
        ([(1, 0)], 0),
        ([(2, 0)], 0),
        ([(3, 1)], 0),
        ([(1, 1), (1, 0), (2, 1)], 0),  # again and again
        ([(2, 0)], 2),
    ],
)
def test_a_broken_training_goes_on(
    script: Script, tiny_cub: Cub, whole_run: Path, tmp_path: Path, inject: Inject, moments: Any, workers: int
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", config_of(tiny_cub, run, num_workers=workers))
    arguments = [str(config)]
    for moment in moments:
        inject(BreakAt(*moment))
        with pytest.raises(RuntimeError, match="broken"):
            script("train", *arguments)
        last = run / "checkpoints/last.ckpt"
        assert last.is_file() == (moment[0] > 0)
        if moment[0]:
            assert torch.load(last, weights_only=True)["epoch"] == moment[0] - 1
        assert not (run / "metrics.json").exists()
        arguments = [f"resume={run}"]
    inject()
    outcome = script("train", *arguments)
    assert outcome.code == 0
    assert_same_runs(run, whole_run)


def test_times_of_epochs(script: Script, tiny_cub: Cub, tmp_path: Path, inject: Inject, monkeypatch: Any) -> None:
    """The clock goes on by 10 s whenever it is read, and by 25 s after a break. An interrupted epoch counts once."""
    run = tmp_path / "run"
    config = config_of(tiny_cub, run)
    monkeypatch.setattr(epoch_times, "perf_counter", itertools.count(0, 10).__next__)
    inject(BreakAt(2, 0))
    with pytest.raises(RuntimeError, match="broken"):
        script("train", write_config(tmp_path / "c.yaml", config))
    assert training_cost(run) == "2 epochs, 0.3 min, 1 x cpu"
    monkeypatch.setattr(epoch_times, "perf_counter", itertools.count(0, 25).__next__)
    inject()
    assert script("train", f"resume={run}").code == 0
    assert pd.read_csv(run / "times.csv").to_numpy().tolist() == [
        [0, 10.0, "1 x cpu"], [1, 10.0, "1 x cpu"], [2, 25.0, "1 x cpu"], [3, 25.0, "1 x cpu"],
    ]  # fmt: skip
    assert training_cost(run) == "4 epochs, 1.2 min, 1 x cpu"
    assert training_cost(tmp_path) == ""  # as of runs of earlier versions
    (run / "times.csv").write_text("epoch,seconds\n")
    assert training_cost(run) == ""


OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "cal": ({"n_maps": 3}, ("backbone", "attention", "head")),
    "br_npa": ({"dropout": 0.5}, ("backbone", "head")),
    "dpnet": ({"parts_per_class": 2, "covering": 0.1, "dropout": 0.5}, ("parts", "head")),
    "vit_cls": ({"layer_decay": 0.5, "drop_path": 0.5}, ("backbone", "head")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_broken_trainings_of_other_models_go_on(
    script: Script, tiny_cub: Cub, bcnn_run: Path, tmp_path: Path, inject: Inject, name: str
) -> None:
    """With centres and what is drawn by chance, with a teacher, on cached features, with unlike learning rates."""
    options, groups = OTHERS[name]
    nodes = []
    for run in (tmp_path / "whole", tmp_path / "broken"):
        node = config_of(tiny_cub, run)
        node["model"] = {"name": name, **tiny_options(name), **options}
        node["phases"] = [{"epochs": 3, "lrs": dict.fromkeys(groups, 3e-3), "eval_modules": ["backbone"]}]
        if name == "br_npa":
            node["distillation"] = {"teacher": str(bcnn_run), "temperature": 2.0, "weight": 0.5}
        if name == "dpnet":
            node["feature_cache"] = str(run.with_suffix(".features"))
            node["data"]["augment"] = False
        nodes.append(node)
    whole = fit(nodes[0])
    inject(BreakAt(1, 1))
    with pytest.raises(RuntimeError, match="broken"):
        script("train", write_config(tmp_path / "c.yaml", nodes[1]))
    inject()
    outcome = script("train", f"resume={tmp_path / 'broken'}")
    assert outcome.code == 0, outcome.err
    assert_same_runs(tmp_path / "broken", whole)


def test_a_killed_training_goes_on(tiny_cub: Cub, whole_run: Path, tmp_path: Path) -> None:
    """As above with processes that end without a chance to tidy up."""
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", config_of(tiny_cub, run))
    assert processes.run("train", [str(config)], tmp_path / "log", die_at=(2, 1)) == 9
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert processes.run("train", [f"resume={run}"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same_runs(run, whole_run)


def test_a_complete_run_stays_as_it_is(script: Script, whole_run: Path, tmp_path: Path) -> None:
    run = copy_run(whole_run, tmp_path / "run")
    assert script("train", f"resume={run}").code == 0
    assert_same_runs(run, whole_run)


def test_more_epochs(script: Script, tiny_cub: Cub, tmp_path: Path) -> None:
    def config(name: str, epochs: int) -> Path:
        node = config_of(tiny_cub, tmp_path / name)
        node["phases"] = [{"epochs": epochs, "lrs": dict.fromkeys(("backbone", "attention", "head"), 3e-3)}]
        return write_config(tmp_path / f"{name}.yaml", node)

    assert script("train", config("long", 4)).code == 0
    assert script("train", config("short", 2)).code == 0
    assert script("train", f"resume={tmp_path}/short", "phases[0].epochs=4").code == 0
    assert_same_runs(tmp_path / "short", tmp_path / "long")


def test_a_moved_run_keeps_its_best_epoch(
    script: Script, tiny_cub: Cub, tmp_path: Path, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [3, 0, 1, 2]

    def validation_step(self: InterpModule, batch: Sample, batch_idx: int) -> Any:
        wrong = (torch.arange(len(batch.label)) >= right[self.current_epoch]).long()
        metric: Any = self.accuracy["val_acc"]
        metric.update(F.one_hot((batch.label + wrong) % 3, 3).float(), batch.label)
        self.log("val/acc", metric, batch_size=len(batch.label))
        return self(batch.image)

    monkeypatch.setattr(CNN, "validation_step", validation_step)
    inject(BreakAt(2, 1))
    phases = [{"epochs": 4, "lrs": {"head": 0.01}}]
    with pytest.raises(RuntimeError, match="broken"):
        fit(tiny_config(tiny_cub.root, out=str(tmp_path / "here"), model=TINY_CNN, phases=phases))
    inject()
    run = shutil.move(tmp_path / "here", tmp_path / "there")
    assert script("train", f"resume={run}").code == 0
    epochs = {name: torch.load(run / f"checkpoints/{name}.ckpt")["epoch"] for name in ("best", "last")}
    assert epochs == {"best": 0, "last": 3}
    assert json.loads((run / "metrics.json").read_text())["epoch"] == 0
    assert not (tmp_path / "here").exists()


# Evaluation

PLAN = ["explainers=[intrinsic, gradcam, random]", "max_steps=5", "report_images=2", "logger.wandb=disabled"]


def results(run: Path) -> dict[str, Any]:
    """Everything an evaluation leaves, to be compared."""
    folder = run / "evaluation"
    return {
        "results": re.sub(r'("\w*seconds": )[^,\n}]+', r"\1_", (folder / "results.json").read_text()),  # of the clock
        "images": pd.read_parquet(folder / "per_image.parquet"),
        "index": (folder / "maps/index.csv").read_text(),
        "maps": {path.name: np.load(path) for path in sorted((folder / "maps").glob("*.npy"))},
        "shown": {path.name: {**np.load(path)} for path in sorted((folder / "shown").glob("*.npz"))},
        "others": sorted(path.name for path in folder.rglob("[!.]*") if path.suffix not in (".npy", ".npz", ".csv")),
    }


def assert_same_results(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["results"] == b["results"]
    assert a["index"] == b["index"]
    pd.testing.assert_frame_equal(a["images"], b["images"], check_exact=True)
    assert a["maps"].keys() == b["maps"].keys()
    for name in a["maps"]:
        np.testing.assert_array_equal(a["maps"][name], b["maps"][name])
    assert a["shown"].keys() == b["shown"].keys()
    for name in a["shown"]:
        assert a["shown"][name].keys() == b["shown"][name].keys()
        for key, own in a["shown"][name].items():
            np.testing.assert_array_equal(own, b["shown"][name][key])
    assert a["others"] == b["others"] == ["maps", "per_image.parquet", "report.html", "results.json", "shown"]


@pytest.fixture
def twin(bcnn_run: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of a run that have the same name, which result rows hold."""
    numbers: Iterator[int] = iter(range(99))
    return lambda: copy_run(bcnn_run, tmp_path / str(next(numbers)) / "tiny" / "bcnn")


class Calls:
    """Counts the images that explainers are asked about, and breaks one of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, self.calls, self.broken = 0, 0, -1
        attribute = Explainer.attribute

        def counted(explainer: Explainer, inputs: Tensor, *rest: Any) -> Tensor:
            if self.calls == self.broken:
                raise RuntimeError("broken")
            self.calls += 1
            self.images += len(inputs)
            return attribute(explainer, inputs, *rest)

        monkeypatch.setattr(Explainer, "attribute", counted)

    def reset(self, broken: int = -1) -> None:
        self.images, self.calls, self.broken = 0, 0, broken


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("broken", [0, 4, 8])
def test_a_broken_evaluation_goes_on(script: Script, twin: Callable[[], Path], calls: Calls, broken: int) -> None:
    whole, run = twin(), twin()
    plan = [*PLAN, "target=label"]  # of predictions, those that are wrong are explained twice
    assert script("evaluate", whole, *plan).code == 0
    assert calls.images == 36  # 12 images by 3 explainers, in batches of 4
    calls.reset(broken)
    with pytest.raises(RuntimeError, match="broken"):
        script("evaluate", run, *plan)
    assert not (run / "evaluation/results.json").exists()
    calls.reset()
    assert script("evaluate", run, *plan).code == 0
    assert calls.calls == 9 - broken  # the others were found again
    assert_same_results(results(run), results(whole))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["explainers=[{name: random, seed: 1, label: intrinsic}]"], []),
        ([], ["batch_size=5"]),
        (["n_images=5", "seed=1"], ["n_images=5", "seed=2"]),
        *(
            pytest.param(first, second, marks=pytest.mark.slow)
            for first, second in (
                (["max_steps=4"], []),
                (["preset=saliency-maps-metrics"], []),
                (["target=label"], []),
                (["grid=[2, 2]"], []),
                (["metrics=[ad]"], []),
                (["ckpt=last"], []),
                (["n_images=7"], []),
                (["batch_size=3"], []),
                ([], ["n_images=7"]),
            )
        ),
    ],
)
def test_what_an_other_evaluation_left_is_not_taken_up(
    script: Script, twin: Callable[[], Path], calls: Calls, first: list[str], second: list[str]
) -> None:
    """Results are those of an evaluation that was never broken, whatever lies in the folder."""
    whole, run = twin(), twin()
    assert script("evaluate", whole, *PLAN, *second).code == 0
    calls.reset(broken=2)
    with pytest.raises(RuntimeError, match="broken"):
        script("evaluate", run, *PLAN, *first)
    calls.reset()
    assert script("evaluate", run, *PLAN, *second).code == 0
    assert_same_results(results(run), results(whole))


def test_other_images_are_not_taken_up(script: Script, twin: Callable[[], Path], calls: Calls, tmp_path: Path) -> None:
    """The same names in another data set are other images."""
    from PIL import Image

    from tests.data.make_cub import make_cub

    other = tmp_path / "other"
    for bird in make_cub(other, per_class=8):
        path = other / "images" / bird.path
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    whole, run = twin(), twin()
    assert script("evaluate", whole, *PLAN).code == 0
    calls.reset(broken=4)
    with pytest.raises(RuntimeError, match="broken"):
        script("evaluate", run, *PLAN, f"dataset.root={other}")
    calls.reset()
    assert script("evaluate", run, *PLAN).code == 0
    assert_same_results(results(run), results(whole))


def test_labels_that_begin_alike_are_kept_apart(script: Script, twin: Callable[[], Path]) -> None:
    plain, mixed = twin(), twin()
    assert script("evaluate", plain, *PLAN).code == 0
    names = "explainers=[{name: random, label: a}, {name: gradcam, label: a-b}, {name: intrinsic, label: 'a[0-9]'}]"
    assert script("evaluate", mixed, *PLAN, names).code == 0
    maps, others = results(plain)["maps"], results(mixed)["maps"]
    assert sorted(others) == ["a-b.npy", "a.npy", "a[0-9].npy"]
    for name, other in (("random", "a"), ("gradcam", "a-b"), ("intrinsic", "a[0-9]")):
        np.testing.assert_array_equal(maps[f"{name}.npy"], others[f"{other}.npy"])
        a, b = (r["images"] for r in (results(plain), results(mixed)))
        a, b = a[a["explainer"] == name], b[b["explainer"] == other]
        assert a["value"].tolist() == pytest.approx(b["value"].tolist(), nan_ok=True, rel=0)


def test_an_evaluation_replaces_the_one_before(script: Script, twin: Callable[[], Path]) -> None:
    fresh, run = twin(), twin()
    options = ["explainers=[intrinsic]", "n_images=5"]
    assert script("evaluate", fresh, *PLAN, *options).code == 0
    assert script("evaluate", run, *PLAN).code == 0
    assert script("evaluate", run, *PLAN, *options).code == 0
    assert_same_results(results(run), results(fresh))
    assert list(results(run)["maps"]) == ["intrinsic.npy"]
    assert len(results(run)["maps"]["intrinsic.npy"]) == 5


def test_a_finished_evaluation_is_not_repeated(
    script: Script, twin: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = twin()
    assert script("evaluate", run, *PLAN).code == 0
    before = results(run)
    with monkeypatch.context() as patch:
        patch.setattr(GradCAM, "attribute", None)  # would fail
        assert script("evaluate", run, *PLAN, "report_images=1").code == 0
    assert_same_results(results(run), before)
    page = (run / "evaluation/report.html").read_text()
    assert script("evaluate", run, *PLAN, "max_steps=3").code == 0
    assert results(run)["results"] != before["results"]
    assert (run / "evaluation/report.html").read_text() != page


def test_an_evaluation_that_dies_while_it_writes_is_not_taken_for_finished(
    script: Script, twin: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = twin()
    assert script("evaluate", run, *PLAN).code == 0
    before = results(run)

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("interp_models.evaluation.table_making.write_json", die)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            script("evaluate", run, *PLAN, "n_images=5")
    assert not (run / "evaluation/results.json").exists()
    assert script("evaluate", run, *PLAN).code == 0
    assert_same_results(results(run), before)


# Killed at any moment

KILLS = 5


def kills(start: Callable[[], Any], seed: int, duration: float, kept: Callable[[], str]) -> None:
    """Start a process and SIGKILL it at a moment drawn by seed, again and again, until one comes to its end."""
    moments = random.Random(seed)
    for number in range(KILLS):
        moment = moments.uniform(0, 0.8 * duration)
        process = start()
        process.join(moment)
        alive = process.is_alive()
        process.kill()
        process.join()
        LOG.warning("%s after %.2f s of %.2f: %s", "killed" if alive else "came to its end", moment, duration, kept())
        if not alive:
            assert number, "the first process should have been killed"
            return


def timed(script: str, arguments: list[str], log: Path) -> float:
    """Seconds that a script takes."""
    begin = time.monotonic()
    assert processes.run(script, arguments, log) == 0, log.read_text()
    return time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kill_9_at_any_moment_of_a_training(tiny_cub: Cub, tmp_path: Path, seed: int) -> None:
    def config(run: Path) -> str:
        node = config_of(tiny_cub, run, num_workers=seed % 2)
        node["phases"][1]["epochs"] = 19
        return str(write_config(tmp_path / f"{run.name}.yaml", node))

    log, run = tmp_path / "log", tmp_path / "run"
    processes.run("train", ["--help"], log)  # the server of processes begins
    duration = timed("train", [config(tmp_path / "whole")], log)

    def arguments() -> list[str]:
        if (run / "config.yaml").is_file():
            return [f"resume={run}"]
        shutil.rmtree(run, ignore_errors=True)
        return [config(run)]

    def kept() -> str:
        checkpoint = run / "checkpoints/last.ckpt"
        done = torch.load(checkpoint, weights_only=True)["epoch"] + 1 if checkpoint.is_file() else 0
        return f"{done} epochs of 20 done"

    kills(lambda: processes.start("train", arguments(), log), seed, duration, kept)
    assert processes.run("train", arguments(), log) == 0, log.read_text()
    assert_same_runs(run, tmp_path / "whole")
    assert sorted(path.name for path in (run / "checkpoints").glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kill_9_at_any_moment_of_an_evaluation(twin: Callable[[], Path], tmp_path: Path, seed: int) -> None:
    log = tmp_path / "log"
    plan = [*PLAN, "explainers=[intrinsic, gradcam, {name: rise, masks: 200}, random]", "max_steps=16", "batch_size=1"]
    whole, run = twin(), twin()
    processes.run("evaluate", ["--help"], log)
    duration = timed("evaluate", [str(whole), *plan], log)

    def kept() -> str:
        return f"{len(list((run / 'evaluation').rglob('*.pt')))} parts of 48 kept"

    kills(lambda: processes.start("evaluate", [str(run), *plan], log), seed, duration, kept)
    assert processes.run("evaluate", [str(run), *plan], log) == 0, log.read_text()
    assert_same_results(results(run), results(whole))


def test_attention_logger_is_what_the_helpers_replace() -> None:
    """`inject` and `processes` put callbacks in its place."""
    from interp_models.runs import train

    assert train.AttentionLogger is AttentionLogger


@pytest.mark.parametrize("lost", ["row", "cells", "file"])
def test_what_a_kill_after_a_checkpoint_lost_is_written_again(whole_run: Path, tmp_path: Path, lost: str) -> None:
    """The last row, or what a training logs in it after the checkpoint, is in the checkpoint too; earlier rows were
    written before the checkpoint was."""
    run = copy_run(whole_run, tmp_path / "run")
    table = run / "metrics.csv"
    text = table.read_text()
    header, *lines = text.splitlines(keepends=True)
    assert len(lines) == 4
    if lost == "row":
        table.write_text("".join([header, *lines[:-1]]))
    elif lost == "cells":
        last = dict(zip(header.strip().split(","), lines[-1].strip().split(","), strict=True))
        early = [value if key.startswith("val/") or key in ("epoch", "step") else "" for key, value in last.items()]
        table.write_text("".join([header, *lines[:-1], ",".join(early) + "\n"]))
        assert table.read_text() != text
    else:
        table.unlink()
    fit(run_config(run), resume=run)
    assert table.read_text() == (text if lost != "file" else header + lines[-1])


def test_rows_of_earlier_versions_are_merged(whole_run: Path, tmp_path: Path) -> None:
    """They had a row of the validation, one of the training, and one of the test."""
    run = copy_run(whole_run, tmp_path / "run")
    table = run / "metrics.csv"
    text = table.read_text()
    frame = pd.read_csv(table, dtype=str)
    columns = [*frame.columns, "test/acc", "test/n"]
    rows = []
    for row in frame.to_dict("records"):
        shared = {key: row[key] for key in ("epoch", "step")}
        rows += [
            shared | {key: value for key, value in row.items() if key.startswith("val/")},
            shared | {key: value for key, value in row.items() if not key.startswith("val/")},
        ]
    rows.append({"epoch": "4", "step": "8", "test/acc": "0.5", "test/n": "12"})
    pd.DataFrame(rows)[sorted(columns)].to_csv(table, index=False)
    for name in ("best", "last"):  # nor did checkpoints hold numbers of the validation, or what tells images apart
        path = run / f"checkpoints/{name}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        own = checkpoint["interp_models"]
        own["metrics"] = {key: value for key, value in own["metrics"].items() if not key.startswith("val/")}
        del own["images"]
        torch.save(checkpoint, path)
    fit(run_config(run), resume=run)
    assert table.read_text() == text
    assert (run / "metrics.json").read_text() == (whole_run / "metrics.json").read_text()


def test_the_last_row_is_written_before_further_epochs(tiny_cub: Cub, tmp_path: Path) -> None:
    """Also where phases were renamed, and the file was cut while it was written."""
    config = config_of(tiny_cub, tmp_path / "run")
    config["phases"] = [{"name": "a", "epochs": 2, "lrs": {"head": 0.01}}]
    run = fit(config)
    text = (run / "metrics.csv").read_text()
    lines = text.splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:-1]) + "1,")
    config["phases"] += [{"name": "b", "epochs": 1, "lrs": {"head": 0.01}}]
    fit(config, resume=run)
    resumed = (run / "metrics.csv").read_text()
    assert resumed.startswith(text)
    table = pd.read_csv(run / "metrics.csv")
    assert table["phase"].dropna().tolist() == ["a", "a", "b"]
    assert table["epoch"].tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"epoch 0 was number 0 of phase 'a', phases say 0 of 'c'"):
        fit(config | {"phases": [{"name": "c", "epochs": 3, "lrs": {"head": 0.01}}]}, resume=run)
    config["phases"][0]["epochs"], config["phases"][1]["epochs"] = 1, 2
    with pytest.raises(InputError, match=r"epoch 1 was number 1 of phase 'a', phases say 0 of 'b'"):
        fit(config, resume=run)
