"""What evaluate.py and the validation of a training write, against the same numbers had from Python by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import interp_models
from interp_models import EXPLAINERS, METRICS, probabilities
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.protocols import explains_itself
from interp_models.evaluation.cache import FolderCache
from interp_models.evaluation.config import ExplanationConfig
from interp_models.metrics.case import Case
from tests.conftest import BCNN_LRS, Cub, Script, copy_run, fit, tiny_config

PLAN = ["explainers=[intrinsic, gradcam]", "max_steps=6", "report_images=2", "logger.wandb=disabled"]


@pytest.fixture
def run(bcnn_run: Path, tmp_path: Path) -> Path:
    return copy_run(bcnn_run, tmp_path / "tiny" / "run")


def rows_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "evaluation/results.json").read_text())["rows"]


@pytest.mark.parametrize("target", ["prediction", "label", "2"])
def test_the_table_is_what_python_gives(script: Script, run: Path, tiny_cub: Cub, target: str) -> None:
    """Image by image through the public functions, from the files themselves."""
    assert script("evaluate", run, *PLAN, f"target={target}").code == 0
    table = pd.read_parquet(run / "evaluation/per_image.parquet")
    index = pd.read_csv(run / "evaluation/maps/index.csv")
    model, transform = interp_models.load(run)
    score_fn = probabilities(model)
    assert len(index) == 12
    for _, entry in index.iterrows():
        path = next(tiny_cub.root.rglob(entry["image_id"]))
        image = transform(Image.open(path))[None]
        scores = score_fn(image)[0]
        of_image = table[table["image_id"] == entry["image_id"]]
        label = int(of_image["label"].iloc[0])
        assert path.parent.name.startswith(f"{label + 1:03d}.")
        explained = {"prediction": int(scores.argmax()), "label": label, "2": 2}[target]
        assert set(of_image["target_class"]) == {explained}
        assert set(of_image["prediction"]) == {int(scores.argmax())}
        np.testing.assert_allclose(of_image["probability"], float(scores[explained]), rtol=1e-4)
        np.testing.assert_allclose(of_image["confidence"], float(scores.max()), rtol=1e-4)
        for explainer in ("intrinsic", "gradcam"):
            maps = EXPLAINERS.build(explainer, model=model).attribute(image, explained)
            kept = np.load(run / f"evaluation/maps/{explainer}.npy")[entry["row"]]
            np.testing.assert_allclose(kept, maps[0], rtol=1e-3, atol=1e-5)
            for name in ("deletion_insertion", "masked_confidence"):
                metric = METRICS.build(name, {"grid": (4, 4), "max_steps": 6})
                for key, value in metric.score(Case(image, maps, explained, score_fn)).items():
                    if key not in ExplanationConfig().metrics:  # another metric, which the plan does not name
                        continue
                    found = of_image[(of_image["explainer"] == explainer) & (of_image["metric"] == key)]["value"]
                    np.testing.assert_allclose(found, value, atol=2e-4)
    for row in rows_of(run):
        values = table[(table["explainer"] == row["explainer"]) & (table["metric"] == row["metric"])]["value"]
        assert (row["n"], row["n_undefined"]) == (12, int(values.isna().sum()))
        assert row["mean"] == pytest.approx(values.mean())
        assert row["std"] == pytest.approx(values.std(ddof=0))
        assert (row["grid"], row["target"]) == ("4x4", target)


def test_mixed_precision_does_not_reach_the_scores(script: Script, run: Path) -> None:
    """Lightning's pass is of bfloat16, masked images' are not: a clean score from the first would rise by itself."""
    assert script("evaluate", run, *PLAN).code == 0
    before = pd.read_parquet(run / "evaluation/per_image.parquet")
    shutil.rmtree(run / "evaluation")
    assert script("evaluate", run, *PLAN, "trainer.precision=bf16-mixed").code == 0
    pd.testing.assert_frame_equal(pd.read_parquet(run / "evaluation/per_image.parquet"), before)


@pytest.mark.parametrize("file", ["per_image.parquet", "maps/gradcam.npy", "maps/index.csv"])
def test_a_folder_that_lost_a_file_is_not_finished(script: Script, run: Path, file: str) -> None:
    assert script("evaluate", run, *PLAN).code == 0
    before = rows_of(run)
    (run / "evaluation" / file).unlink()
    assert script("evaluate", run, *PLAN).code == 0
    assert (run / "evaluation" / file).is_file()
    assert rows_of(run) == before


def test_a_copied_run_gets_rows_of_its_own_name(script: Script, run: Path, tmp_path: Path) -> None:
    assert script("evaluate", run, *PLAN).code == 0
    copy = Path(shutil.copytree(run, run.with_name("copy")))
    assert script("evaluate", run, copy, *PLAN, f"out={tmp_path / 'both'}").code == 0
    assert {row["run"] for row in rows_of(copy)} == {"tiny/copy"}
    assert not (run / "evaluation/.partial").exists()


def test_other_pixels_are_another_evaluation(script: Script, run: Path) -> None:
    assert script("evaluate", run, *PLAN, "grid=[4, 4]").code == 0
    before = rows_of(run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("image_size: 64", "image_size: 96"))
    assert script("evaluate", run, *PLAN, "grid=[4, 4]").code == 0
    assert [row["mean"] for row in rows_of(run)] != [row["mean"] for row in before]


def test_a_broken_part_is_computed_again(script: Script, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderCache, "clear", lambda self: None)
    assert script("evaluate", run, *PLAN).code == 0
    before = rows_of(run)
    (run / "evaluation/results.json").unlink()
    part = sorted((run / "evaluation/.partial").rglob("*.pt"))[0]
    part.write_bytes(part.read_bytes()[:100])
    assert script("evaluate", run, *PLAN).code == 0
    assert rows_of(run) == before


def test_what_does_not_apply_is_left_out_and_says_why(script: Script, run: Path) -> None:
    plan = ["explainers=[cam, gradcam, liftcam]", *PLAN[1:]]
    for _ in range(2):  # the second finds a finished evaluation
        outcome = script("evaluate", run, *plan)
        assert outcome.code == 0
        results = json.loads((run / "evaluation/results.json").read_text())
        assert list(results["left_out"]) == ["cam", "liftcam"]
        assert results["left_out"]["cam"].startswith("BCNN does not end, after the layer, in the mean over cells")
        assert {row["explainer"] for row in results["rows"]} == {"gradcam"}
        assert sorted(path.name for path in (run / "evaluation/maps").iterdir()) == ["gradcam.npy", "index.csv"]
        page = (run / "evaluation/report.html").read_text()
        assert "Left out of tiny/run, where they do not apply: cam, liftcam" in page
        assert "<li>cam: BCNN does not end" in page
    assert "left out" not in outcome.err


def test_an_evaluation_to_which_nothing_applies_is_refused(script: Script, run: Path) -> None:
    outcome = script("evaluate", run, "explainers=[cam]", *PLAN[1:])
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: no explainer applies: cam: BCNN does not end")
    assert not (run / "evaluation/results.json").exists()


def test_another_list_of_explainers_keeps_what_stays(
    script: Script, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal at the third batch; what the others had done by then is found by an evaluation of them alone, which
    leaves the parts of a third list alone."""
    calls = []

    def fails(self: Any, inputs: torch.Tensor, target: Any) -> torch.Tensor:
        calls.append(len(inputs))
        if len(calls) == 3:
            raise InputError("the third batch")
        return torch.zeros(len(inputs), 2, 2)

    monkeypatch.setattr(EXPLAINERS.get("random"), "_attribute", fails)
    outcome = script("evaluate", run, "explainers=[intrinsic, gradcam, random]", *PLAN[1:], "batch_size=4")
    assert outcome.code == 2
    assert "the third batch" in outcome.err
    kept = {path: path.stat().st_mtime_ns for path in (run / "evaluation/.partial").rglob("*.pt")}
    assert len(kept) == 3 + 3 + 2
    kept_of_gradcam = [path for path in kept if path.parent.name.startswith("gradcam-")]
    monkeypatch.setattr(EXPLAINERS.get("gradcam"), "_attribute", fails)  # not called: its parts are there
    assert script("evaluate", run, "explainers=[gradcam]", *PLAN[1:], "batch_size=4").code == 0
    assert len(calls) == 3
    left = {path: path.stat().st_mtime_ns for path in (run / "evaluation/.partial").rglob("*.pt")}
    assert left == {path: time for path, time in kept.items() if path not in kept_of_gradcam}


def test_a_refusal_at_a_later_batch_leaves_no_rows(script: Script, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuses(self: Any, inputs: torch.Tensor, target: Any) -> torch.Tensor:
        calls.append(len(inputs))
        if len(calls) > 1:
            raise NotApplicable("not to these")
        return torch.zeros(len(inputs), 2, 2)

    monkeypatch.setattr(EXPLAINERS.get("random"), "_attribute", refuses)
    outcome = script("evaluate", run, "explainers=[random, gradcam]", *PLAN[1:], "batch_size=4")
    assert outcome.code == 0
    assert outcome.err.count("left out random: not to these") == 1
    assert len(calls) == 2
    results = json.loads((run / "evaluation/results.json").read_text())
    assert results["left_out"] == {"random": "not to these"}
    assert {row["explainer"] for row in results["rows"]} == {"gradcam"}
    assert set(pd.read_parquet(run / "evaluation/per_image.parquet")["explainer"]) == {"gradcam"}
    assert not (run / "evaluation/.partial").exists()


def test_ground_truth_is_left_out_where_there_is_none(script: Script, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for split in ("train", "test"):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(3):
                pixels = torch.full((32, 32, 3), 40 + 90 * label + 5 * i, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / str(label) / f"{i}.png")
    node = tiny_config(root, out=str(tmp_path / "tiny" / "run"), phases=[{"epochs": 1, "lrs": BCNN_LRS}])
    node["data"] |= {"dataset": {"name": "image_folder", "root": str(root)}, "val_fraction": 0}
    fit(node)
    run = tmp_path / "tiny" / "run"
    assert script("evaluate", run, "explainers=[gt_box, random]", *PLAN[1:]).code == 0
    left_out = json.loads((run / "evaluation/results.json").read_text())["left_out"]
    assert left_out.keys() == {"gt_box"}
    assert left_out["gt_box"].startswith("GTBox shows ground truth")


def test_the_page_says_the_accuracy_of_what_was_judged(script: Script, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "test/acc": 0.123, "test/n": 777.0}))
    assert script("evaluate", run, *PLAN, "n_images=5").code == 0
    table = pd.read_parquet(run / "evaluation/per_image.parquet").drop_duplicates("image_id")
    accuracy = 100 * (table["prediction"] == table["label"]).mean()
    page = (run / "evaluation/report.html").read_text()
    assert f"<td>12.3</td><td>777</td>\n<td>{accuracy:.1f}</td><td>5</td>" in page


def test_validation_of_a_training(tiny_cub: Cub, tmp_path: Path) -> None:
    """Every second epoch, on the drawn validation images: the numbers of the weights at that moment."""
    out = tmp_path / "tiny" / "run"
    evaluation = {"every_n_epochs": 2, "explainers": ["intrinsic"], "metrics": ["ad", "dauc"], "n_images": 2}
    fit(tiny_config(tiny_cub.root, out=str(out), phases=[{"epochs": 2, "lrs": BCNN_LRS}], evaluation=evaluation))
    table = pd.read_csv(out / "metrics.csv")
    assert table["val/ad/intrinsic"].notna().tolist() == (table["epoch"].eq(1) & table["val/acc"].notna()).tolist()
    model, _ = interp_models.load(out, "last")
    data = interp_models.runs.building.build_data(interp_models.runs.loading.run_config(out))
    from interp_models.data.subsets import subsample

    drawn = set(subsample(data.val_indices, 2, 0).tolist())
    batch = next(iter(data.val_dataloader()))
    images = batch.image[[index in drawn for index in batch.index.tolist()]]
    assert len(images) == 2
    score_fn = probabilities(model)
    target = score_fn(images).argmax(dim=1)
    maps = EXPLAINERS.build("intrinsic", model=model).attribute(images, target)
    for name, key in (("masked_confidence", "ad"), ("deletion_insertion", "dauc")):
        expected = METRICS.build(name, {"grid": (4, 4)}).score(Case(images, maps, target, score_fn))[key].nanmean()
        assert table[f"val/{key}/intrinsic"].dropna().tolist() == pytest.approx([float(expected)], abs=1e-4)


def test_any_module_may_explain_itself() -> None:
    """A submodule called feature_layer is an attribute that only getattr finds."""

    class Foreign(nn.Module):
        explanations = ("mean",)

        def __init__(self) -> None:
            super().__init__()
            self.feature_layer = nn.Conv2d(3, 4, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.feature_layer(images).mean(dim=(2, 3))

        def explain(self, output: Any, targets: torch.Tensor, kind: str | None = None) -> torch.Tensor:
            return output[:, :, None] * torch.ones(4, 2)

    model = Foreign()
    assert explains_itself(model)
    assert not explains_itself(model.feature_layer)
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(
        EXPLAINERS.build("intrinsic", model=model).attribute(images), model(images)[:, :, None] * torch.ones(4, 2)
    )
    gradcam: Callable[..., torch.Tensor] = EXPLAINERS.build("gradcam", model=model).attribute
    assert gradcam(images, 1).shape == (2, 4, 4)


def test_another_control_keeps_the_values(script: Script, run: Path) -> None:
    assert script("evaluate", run, *PLAN).code == 0
    before = rows_of(run)
    assert {row["control"] for row in before} == {None}
    ended = script("evaluate", run, *PLAN, "control=gradcam")
    assert ended.code == 0
    assert "the explainers are compared with another one" in ended.out
    after = rows_of(run)
    assert {row["control"] for row in after} == {None, "gradcam"}
    assert all(row["p"] is not None for row in after if row["explainer"] == "intrinsic")
    tested = ("control", "p", "superiority")
    assert [row | dict.fromkeys(tested) for row in after] == [row | dict.fromkeys(tested) for row in before]
    assert "nothing has changed since" in script("evaluate", run, *PLAN, "control=gradcam").out
