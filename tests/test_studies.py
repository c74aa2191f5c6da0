"""Benchmarks of trained prototype models: stages end as a training does that has them, sources are looked for anew."""

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks.harness import Value
from interp_models import MODELS, load
from interp_models.config.loading import as_dict, check, load_yaml, override
from interp_models.core.outputs import InterpOutput
from interp_models.models.prototree import ProtoTree
from interp_models.runs.building import build_data, build_model
from interp_models.runs.config import TrainConfig
from interp_models.runs.folders import run_name
from interp_models.runs.loading import run_config
from interp_models.training.feature_cache import phases_on_features
from studies import (
    class_token,
    controls,
    every_metric,
    prototype_parts,
    prototype_pictures,
    prototype_recipes,
    prototype_sources,
    prototype_stages,
    trainings,
)
from studies import trained as trained_benchmark
from tests.conftest import TINY, TINY_VIT, Cub, fit, tiny_config, tiny_options

ROOT = Path(__file__).parents[1]
LRS = dict.fromkeys(("backbone", "add_on", "prototypes"), 3e-3)
PROTOPNET = {"name": "protopnet", "backbone": TINY, "weights": None, "prototypes_per_class": 2, "channels": 8}
PROTOTREE = {"name": "prototree", "backbone": TINY, "weights": None, "depth": 2, "channels": 8, "prune_factor": 1.001}


def trained(cub: Cub, out: Path, model: dict[str, Any], then: list[str]) -> Path:
    phases = [{"epochs": 2, "lrs": LRS, "on_end": then, "select": "last"}]
    config = tiny_config(cub.root, out=str(out), phases=phases, model=model)
    config["data"] |= {"val_fraction": 0.0, "augment": False}
    return fit(config)


@pytest.fixture(scope="module")
def finished(tiny_cub: Cub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each model whose prototypes are patches, by the stages."""
    folder = tmp_path_factory.mktemp("finished")
    found = {}
    for model, stages in ((PROTOPNET, ["push"]), (PROTOTREE, ["prune", "project"])):
        run = trained(tiny_cub, folder / str(model["name"]), model, [])
        argv = ["--runs", run, "--name", f"of_{model['name']}", "--stages", *stages, "--reference", run, "--save"]
        path = prototype_stages.main([*map(str, argv), "--out", str(folder)])
        values = {row["what"]: row["value"] for row in json.loads(path.read_text())["values"]}
        name = str(model["name"])
        found[name] = run.with_name(f"{name}-finished")
        for stage, where in (("as trained", run), (f"{len(stages)}. after {stages[-1]}", found[name])):
            metrics = json.loads((where / "metrics.json").read_text())
            assert values[f"{stage}: accuracy"] == pytest.approx(100 * metrics["test/acc"], rel=1e-4)
            assert values[f"{stage}, {run_name(run)}: acc"] == pytest.approx(100 * metrics["test/acc"], rel=1e-4)
    return found


@pytest.mark.parametrize("model", [PROTOPNET, PROTOTREE], ids=["protopnet", "prototree"])
def test_stages_end_as_a_training_that_has_them(
    tiny_cub: Cub, tmp_path: Path, finished: dict[str, Path], model: dict[str, Any]
) -> None:
    then = ["push"] if model is PROTOPNET else ["prune", "project"]
    run = trained(tiny_cub, tmp_path / "run", model, then)
    a, b = (load(r)[0].state_dict() for r in (run, finished[str(model["name"])]))
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


@pytest.mark.parametrize("name", ["protopnet", "prototree"])
def test_sources_are_found(finished: dict[str, Path], tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[name], run)

    def values() -> dict[str, float]:
        rows = prototype_sources.measure(run)
        return {row.what.split(": ")[1]: row.value for row in rows if isinstance(row, Value)}

    found = values()
    left = found["prototypes that are left"]
    assert left >= 2
    whats = ("found at their image and cell", "of an image of their class", "receptive box holds the patch's cells")
    assert [found[what] for what in whats] == [left] * 3
    assert found["largest difference to the patch there"] < 1e-5
    assert found["lowest correlation of picture and pixels in the box"] > 0.8
    # Sources that lie are found out
    path = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    state["sources.cell"] = (state["sources.cell"] + 1) % 2
    train = torch.as_tensor(build_data(run_config(run)).train_indices)
    other = dict(zip(train.tolist(), train.flip(0).tolist(), strict=True))  # the last class's for the first's
    state["sources.image"].apply_(lambda image: other.get(image, image))
    torch.save(checkpoint, path)
    found = values()
    assert found["largest difference to the patch there"] > 1e-3
    if name == "protopnet":  # the nodes of a tree may take many classes
        assert found["of an image of their class"] < left


def test_margin_is_that_of_the_closest_decision_on_the_path() -> None:
    """Depth 2, node 2 removed: leaf 3 alone is left below it."""
    net = ProtoTree(3, backbone=TINY, weights=None, depth=2, channels=4)
    net.leaf_kept[2] = False
    p = torch.tensor([[0.9, 0.45, 0.5], [0.2, 0.7, 0.5], [0.45, 0.2, 0.5]])
    output = InterpOutput(
        torch.zeros(3, 3), torch.zeros(3, 3, 1, 1), {"distances": -p.log(), "paths": torch.ones(3, 4)}
    )
    assert net.decide(output).tolist() == [3, 1, 0]
    torch.testing.assert_close(prototype_stages.margin(net, output), torch.tensor([0.4, 0.2, 0.05]))


def test_class_tokens_before_and_after(tiny_cub: Cub, tmp_path: Path) -> None:
    model = {"name": "vit_cls", **tiny_options("vit_cls")}
    phases = [{"epochs": 1, "lrs": {"backbone": 0.01, "head": 0.01}}]
    run = fit(tiny_config(tiny_cub.root, out=str(tmp_path / "tiny" / "run"), model=model, phases=phases))
    path = class_token.main(["--runs", str(run), "--out", str(tmp_path)])
    values = {row["what"]: row["value"] for row in json.loads(path.read_text())["values"]}
    heads = len([what for what in values if "before: energy, head" in what])
    assert heads == load(run)[0].backbone.blocks[-1].attn.num_heads
    assert len(values) == 2 * 2 * (heads + 1) + 1
    assert values["tiny, before: energy, mean over heads"] != values["tiny, seed 0: energy, mean over heads"]
    assert 0 < values["tiny: box, share of the image"] < 100


def test_records_say_what_runs_reach_and_are_compared_image_by_image(tiny_cub: Cub, tmp_path: Path) -> None:
    phases = [{"epochs": 1, "lrs": {"backbone": 3e-3, "head": 3e-3}}]
    model = {"name": "cnn", **tiny_options("cnn")}
    config = tiny_config(tiny_cub.root, out=str(tmp_path / "run"), model=model, phases=phases)
    run = fit(config)
    (path,) = trained_benchmark.main(["--runs", str(run), "--out", str(tmp_path)])
    of_run = json.loads(path.read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    assert path.stem == f"{of_run['experiment']}-{of_run['run_seed']}"
    assert len(of_run["correct"]) == metrics["test/n"]
    assert of_run["correct"].count("1") == round(metrics["test/acc"] * metrics["test/n"])

    def save(experiment: str, seed: int, correct: str, images: int = of_run["test_images"]) -> str:
        made = {"experiment": experiment, "run_seed": seed, "correct": correct, "test_images": images, "values": []}
        (path.parent / f"{experiment}-{seed}.json").write_text(json.dumps(made))
        return f"{experiment}-{seed}"

    names = [save("one", 0, "1100"), save("two", 0, "1000"), save("two", 1, "1001"), save("three", 0, "0011")]
    (table,) = trained_benchmark.main(["--records", *names, "--name", "all", "--out", str(tmp_path)])
    values = {row["what"]: row["value"] for row in json.loads(table.read_text())["values"]}
    assert values["two, mean of 2 seed(s): accuracy"] == 37.5
    assert values["two, mean of 2 seed(s): accuracy minus that of one"] == -12.5
    difference = "three, mean of 1 seed(s): accuracy minus that of one"
    ends = [values[f"{difference}, {end} end of 95 %"] for end in ("lower", "upper")]
    assert ends == [-100, 100]  # differences are -1, -1, 1, 1: one resample of 16 has none above 0
    with pytest.raises(SystemExit):  # a name is of a comparison; records are named by their runs
        trained_benchmark.main(["--runs", str(run), "--name", "all", "--out", str(tmp_path)])
    other = save("four", 0, "1100", images=7)
    with pytest.raises(SystemExit, match="four has other test images than one"):
        trained_benchmark.main(["--records", names[0], other, "--name", "all", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", trainings.TRAININGS)
def test_trainings_of_the_results_have_sound_configs(name: str) -> None:
    node = load_yaml(ROOT / trainings.TRAININGS[name][0])
    config = check(TrainConfig, override(node, trainings.overrides(name, 1, root="data", vit="timm")))
    assert (config.experiment, config.seed, config.data["val_fraction"]) == (name, 1, 0)
    config.model["backbone"] = TINY_VIT if "vit" in config.model["backbone"] else TINY
    config.model.pop("output_stride", None)
    build_model(as_dict(config), 3, trained=True)


@pytest.fixture
def starts() -> Iterator[Any]:
    """The module of the trials' own model, which other tests must not find in the registry."""
    module = importlib.import_module("studies.prototype_starts")
    MODELS.register("prototree_started")(module.StartedTree)
    yield module
    del MODELS._known["prototree_started"]


@pytest.mark.usefixtures("starts")
@pytest.mark.parametrize("name", prototype_recipes.TRIALS)
def test_trials_of_recipes_have_sound_configs(name: str) -> None:
    path, *changes = prototype_recipes.TRIALS[name]
    config = check(TrainConfig, override(load_yaml(ROOT / path), [*changes, "feature_cache=x", "feature_copies=12"]))
    config.model |= {"backbone": TINY, "weights": None}
    model = build_model(as_dict(config), 3, trained=True)
    model.check_recipe()
    assert phases_on_features(model) == model.recipe.phases[:1]


def test_means_of_clusters_by_hand(starts: Any) -> None:
    """Three tight clusters of patches have three means; random patches are among the patches."""
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    patches = (centres + 1e-3 * torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0))).flatten(0, 1)
    means = starts.started(patches, 3, "kmeans")
    torch.testing.assert_close(means[(means @ torch.tensor([1.0, 2.0])).argsort()], patches.view(50, 3, 2).mean(dim=0))
    random = starts.started(patches, 5, "patches")
    assert len(random.unique(dim=0)) == 5
    assert bool((random[:, None] == patches).all(dim=2).any(dim=1).all())


@pytest.mark.usefixtures("starts")
def test_prototypes_start_at_patches_of_training_images(tiny_cub: Cub, tmp_path: Path) -> None:
    model = {"name": "prototree_started", "backbone": TINY, "weights": None, "depth": 2, "channels": 8}
    phases = [{"epochs": 1, "lrs": {"add_on": 1e-9}, "eval_modules": ["backbone"], "select": "last"}]
    run = fit(tiny_config(tiny_cub.root, out=str(tmp_path), phases=phases, model=model | {"start": "patches"}))
    tree = load(run)[0]
    assert isinstance(tree, ProtoTree)
    loader = build_data(run_config(run)).loader("train", augment=False)
    with torch.no_grad():
        cells = torch.cat([tree.features(batch.image).movedim(1, -1).flatten(0, -2) for batch in loader])
    nearest = torch.cdist(tree.prototypes[:, :, 0, 0].detach(), cells).amin(dim=1)
    assert float(nearest.max()) < 1e-4 < float(torch.cdist(cells, cells).mean())


def test_a_run_is_recorded_under_its_own_trial_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "net_l2/0"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    pd.DataFrame({"train/acc": [0.5, 1], "val/acc": [0.7, 0.6]}).to_csv(run / "metrics.csv")
    found = prototype_recipes.run("net_l2", 0, tmp_path, "", "", 1)
    assert (found["train"], found["val"], found["best"], found["epochs"]) == (1, 0.6, 0.7, 2)
    argv = ["--names", "net_l2", "--seeds", "0", "--out", str(tmp_path), "--folder", str(tmp_path), "--root", ""]
    prototype_recipes.main([*argv, "--cache", ""])
    prototype_recipes.main(argv)  # it has a record
    changed = {"net_l2": [*prototype_recipes.TRIALS["net_l2"], "model.channels=8"]}
    monkeypatch.setattr(prototype_recipes, "TRIALS", changed)
    with pytest.raises(SystemExit, match="is of another trial of this name; delete it"):
        prototype_recipes.run("net_l2", 0, tmp_path, "", "", 1)
    with pytest.raises(SystemExit, match=r"net_l2-0\.json is of another trial of this name; delete it"):
        prototype_recipes.main(argv)


def test_the_table_of_trials_by_hand() -> None:
    records = [
        {"trial": "net_l2", "trial_seed": seed, "epochs": 40, "train": 0.9, "val": val, "best": 0.75}
        for seed, val in ((1, 0.7), (0, 0.6))
    ]
    tree = {"trial": "tree_l2_16", "trial_seed": 0, "epochs": 5, "train": 1, "val": 0.5, "best": 0.5, "greedy": 0.4}
    rows = prototype_recipes.table([*records, tree]).splitlines()[2:]
    assert rows == [
        "| `tree_l2_16` | 5 | 100.0 | 50.0 | 50.0 | 50.0 | 40.0 |",
        "| `net_l2` | 40 | 90.0 | 60.0, 70.0 | 65.0 | 75.0 | – |",
    ]


@pytest.mark.slow
def test_trainings_are_done_once(tiny_cub: Cub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student's teacher is trained too. What has a record is not trained, what is trained already is recorded."""
    tiny = ["data.image_size=64", "data.batch_size=4", "data.num_workers=0", "phases[0].epochs=1"]
    tiny += [f"model.backbone={TINY}", "model.weights=null", "model.output_stride=16", "trainer.accelerator=cpu"]
    argv = ["--root", str(tiny_cub.root), "--folder", str(tmp_path / "runs"), "--out", str(tmp_path), "--more", *tiny]
    (record,) = trainings.main(["--names", "cub_br_npa_lite0_high", "--seeds", "3", *argv])
    assert record == tmp_path / "trained" / "cub_br_npa_lite0_high-3.json"
    config = run_config(tmp_path / "runs/cub_br_npa_lite0_high/3")
    assert config["distillation"]["teacher"] == str(tmp_path / "runs/cub_br_npa_lite0/3")
    assert config["seed"] == 3

    monkeypatch.setattr(trainings, "HERE", tmp_path / "nowhere")  # so that nothing can be trained
    assert trainings.main(["--names", "cub_br_npa_lite0_high", "--seeds", "3", *argv]) == []
    (of_teacher,) = trainings.main(["--names", "cub_br_npa_lite0", "--seeds", "3", *argv])
    assert of_teacher.stem == "cub_br_npa_lite0-3"


def evaluated(folder: Path, values: dict[str, dict[str, list[float]]]) -> Path:
    """A folder with the values per image of an evaluation: by explainer and metric."""
    rows = [
        {
            "explainer": name, "options": json.dumps({"name": name}), "metric": metric,
            "higher_is_better": metric != "ad", "index": index, "value": value,
        }
        for name, metrics in values.items()
        for metric, images in metrics.items()
        for index, value in enumerate(images)
    ]  # fmt: skip
    (folder / "evaluation").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(folder / "evaluation/per_image.parquet")
    return folder


def test_explainers_are_counted_against_controls_and_metrics_ranked(tmp_path: Path) -> None:
    noise = [0.5, 0.1, 0.3, 0.7]
    shifted = {name: [x + shift for x in noise] for name, shift in (("gradcam", 0.1), ("rise", 0.2), ("cam", -0.1))}
    values = {name: {"iauc": images, "ad": images} for name, images in shifted.items()}
    undecided = [0.7, 0.0, 0.4, float("nan")]
    values["hirescam"] = {"iauc": undecided, "ad": [x + 0.15 for x in noise]}
    values["random"] = {"iauc": noise, "ad": noise}
    path = controls.main(["--run", str(evaluated(tmp_path / "run", values)), "--out", str(tmp_path)])
    found = {row["what"]: row["value"] for row in json.loads(path.read_text())["values"]}
    assert found["explainers"] == 4
    counts = {what.removeprefix("random: "): value for what, value in found.items() if ": " in what}
    assert counts == {"iauc, better": 2, "iauc, worse": 1, "ad, better": 1, "ad, worse": 3}
    # Ranks of cam, hirescam, gradcam, rise: 1, 2, 3, 4 by iauc and 4, 2, 3, 1 by ad
    assert found["rank correlation of iauc and ad"] == pytest.approx(-0.8)
    del values["random"]
    with pytest.raises(SystemExit, match="evaluated without controls"):
        controls.main(["--run", str(evaluated(tmp_path / "other", values)), "--out", str(tmp_path)])


def test_intervals_are_those_of_the_bootstrap() -> None:
    """Of rows with all values: the quantiles of means of the same resamples, one by one."""
    values = np.random.default_rng(3).normal(size=(2, 9))
    low, high = controls.intervals(values)
    drawn = np.random.default_rng(0).integers(0, 9, (trained_benchmark.RESAMPLES, 9))
    for row in range(2):
        ends = np.percentile(values[row][drawn].mean(axis=1), [2.5, 97.5])
        assert [low[row], high[row]] == pytest.approx(ends.tolist())


def test_a_table_of_metrics_counts_what_can_be_told_apart() -> None:
    def row(name: str, rank: int | None, p: float | None, superiority: float | None) -> dict[str, Any]:
        return {
            "explainer": name, "options": {"name": name}, "metric": "dauc", "higher_is_better": False, "rank": rank,
            "p": p, "superiority": superiority, "control": None if p is None else "random", "distance": 0.5,
        }  # fmt: skip

    rows = [
        row("gradcam", 1, 0.01, 1.0), row("rise", 1, 0.04, 0.8), row("gradient", 4, 0.03, 0.2),
        row("lime", 3, 0.05, 0.9), row("random", 5, None, None), row("edges", None, 0.9, 0.5),
    ]  # fmt: skip
    ranks = {"gradcam": (1.5, 0.5), "rise": (1.25, 0.4)}
    found = every_metric.tables({"rows": rows, "mean_ranks": ranks, "costs": {"rise": {"passes": 1001.0}}})
    assert "| First | Ranks of `random`, `edges` | Distance |" in found
    assert "| `dauc` ↓ | 2 / 1 / 1 | `gradcam`, `rise` | 5, – | 0.50 |" in found
    assert found.endswith("| `rise` | 1.2 ± 0.4 | 1001 | – |\n| `gradcam` | 1.5 ± 0.5 | – | – |")


def test_maps_that_are_equal_before_a_mean_and_a_linear_layer(tmp_path: Path) -> None:
    assert every_metric.identities(tmp_path) == []
    gradcam = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    for name, maps in (("gradcam", gradcam), ("xgradcam", gradcam), ("guidancecam", 5 * np.maximum(gradcam, 0) ** 2)):
        np.save(tmp_path / f"{name}.npy", maps)
    (line,) = every_metric.identities(tmp_path)
    assert line.startswith("XGrad-CAM is Grad-CAM to 0.0e+00, ")
    assert float(line.split(" to ")[2].split(" ")[0]) < 1e-6
    np.save(tmp_path / "xgradcam.npy", gradcam * 1.5)
    assert float(every_metric.identities(tmp_path)[0].split(" to ")[1].split(",")[0]) == pytest.approx(0.5, rel=0.05)


def test_pictures_of_prototypes_take_the_purest_and_the_least_pure(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "evaluation"
    with pytest.raises(SystemExit, match="has no evaluated prototypes"):
        prototype_pictures.extremes(tmp_path / "run", 2)
    (folder / "prototypes" / "a").mkdir(parents=True)
    purity = [0.2, float("nan"), 0.9, 0.5, 0.7, 0.1]
    pd.DataFrame({"prototype": range(6), "purity": purity}).to_parquet(folder / "prototypes.parquet")
    for number in (0, 1, 2, 3, 5):  # 4 has no sheet
        Image.new("RGB", (40, 10), (40 * number, 0, 0)).save(folder / "prototypes" / "a" / f"{number}.jpg")
    assert prototype_pictures.extremes(tmp_path / "run", 2)["prototype"].tolist() == [2, 3, 0, 5]
    assert prototype_pictures.extremes(tmp_path / "run", 1)["prototype"].tolist() == [2, 5]
    path = prototype_pictures.main([str(tmp_path / "run"), "--picture", str(tmp_path / "p.png"), "--count", "1"])
    with Image.open(path) as drawn:
        assert drawn.width == 1100


def test_means_of_prototype_metrics_are_those_of_the_evaluation(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no prototype metrics"):
        prototype_parts.found(tmp_path / "e" / "0")
    (tmp_path / "e" / "0" / "evaluation").mkdir(parents=True)
    rows = [
        {"metric": "purity", "mean": 0.25, "n": 4, "percent": True},
        {"metric": "used", "mean": 0.4, "n": 10, "percent": True},
        {"metric": "sparsity", "mean": None, "n": 4, "percent": True},
        {"metric": "misalignment", "mean": 3.5, "n": 4, "percent": False},
    ]
    (tmp_path / "e" / "0" / "evaluation" / "prototypes.json").write_text(json.dumps({"rows": rows}))
    assert [(row.what, row.value, row.unit) for row in prototype_parts.found(tmp_path / "e" / "0")] == [
        ("e/0: prototypes in use", 4, ""),
        ("e/0: purity", 25, "%"),
        ("e/0: misalignment", 3.5, ""),
    ]
