"""What a class uses and what was found in an image, beside sums made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from interp_models import load
from interp_models.evaluation.part_sheets import CELL, PARTS
from interp_models.report import visual
from interp_models.runs.building import build_data
from interp_models.runs.loading import run_config
from tests.conftest import Cub, Script, copy_run, fit, tiny_config, tiny_options

PLAN = ["explainers=[intrinsic]", "metrics=[ad]", "max_steps=3", "n_images=4", "report_images=4"]
PLAN += ["logger.wandb=disabled", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def run(tiny_cub: Cub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DP-Net of two epochs."""
    model = {"name": "dpnet", **tiny_options("dpnet"), "parts_per_class": 3, "windows": [1, 2]}
    phases = [{"epochs": 2, "lrs": {"parts": 0.05, "head": 0.05}, "eval_modules": ["backbone"]}]
    out = tmp_path_factory.mktemp("runs") / "tiny" / "dpnet"
    return fit(tiny_config(tiny_cub.root, out=str(out), model=model, phases=phases))


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What strips of pictures are made of."""
    kept: list[Any] = []
    draw = visual.strip

    def keep(pictures: Any, title: str, height: int = 160) -> Any:
        kept.append((pictures, title))
        return draw(pictures, title, height)

    monkeypatch.setattr(visual, "strip", keep)
    return kept


def by_hand(run: Path) -> tuple[Any, Any, list[Any]]:
    """Model, data, and of every test image its label, pixels, the scores of all regions by part, and their boxes."""
    model, data = load(run)[0].eval(), build_data(run_config(run))
    dataset, found = data.dataset("test"), []
    for position in range(len(dataset)):
        sample = dataset[0, position]
        with torch.no_grad():
            features = model.backbone(sample.image[None].as_subclass(torch.Tensor))[0]
        units = model.parts.detach() / model.parts.detach().norm(dim=1, keepdim=True)
        scores, boxes = [], []
        _, rows, columns = features.shape
        for side in (1, 2):
            for y in range(rows - side + 1):
                for x in range(columns - side + 1):
                    scores.append(units @ features[:, y : y + side, x : x + side].mean(dim=(1, 2)))
                    boxes.append((x / columns, y / rows, (x + side) / columns, (y + side) / rows))
        found.append((int(sample.label), visual.to_uint8(sample.image), torch.stack(scores, dim=1), boxes))
    return model, data, found


def test_the_parts_of_an_image_and_of_a_class(script: Script, run: Path, tmp_path: Path, strips: list[Any]) -> None:
    run = copy_run(run, tmp_path / "run")
    outcome = script("evaluate", run, *PLAN)
    assert outcome.code == 0, outcome.err
    model, data, found = by_hand(run)
    weights = model.head.weight.detach()
    of_images = [strip for strip in strips if "come to the logit" in strip[1]]
    assert len(of_images) == 4
    assert len(list((run / "evaluation/local").glob("*.jpg"))) == 4
    names = {Path(data.test_images.image_id(i)).name.removesuffix(".jpg"): i for i in range(len(found))}
    for pictures, title in of_images:
        _, image, scores, boxes = found[next(i for name, i in names.items() if name in title)]
        best, regions = scores.max(dim=1)
        logits = weights @ best
        target = int(logits.argmax())
        terms = weights[target] * best
        assert f"All 9 parts come to the logit {float(logits[target]):.2f}." in title
        expected = sorted(range(9), key=lambda p: -float(terms[p]))[:PARTS]
        assert [name for name, _, _ in pictures] == [f"part {p}" for p in expected]
        for (_, picture, remark), p in zip(pictures, expected, strict=True):
            assert remark == f"{float(weights[target, p]):.2f} × {float(best[p]):.2f} = {float(terms[p]):.2f}"
            x0, y0, x1, y1 = (round(64 * v) for v in boxes[int(regions[p])])
            np.testing.assert_array_equal(picture, visual.boxed(image, (x0, y0, x1, y1)))
    of_classes = [strip for strip in strips if "come to the logit" not in strip[1]]
    labels = [label for label in range(3) if (run / f"evaluation/parts/{data.classes[label]}.jpg").is_file()]
    assert len(of_classes) == len(labels) == len(list((run / "evaluation/parts").iterdir())) > 0
    seen = {tuple(name for name, _, _ in pictures): pictures for pictures, _ in of_classes}
    for label in labels:
        order = sorted(range(9), key=lambda p: -float(weights[label, p]))[:PARTS]
        pictures = seen[tuple(f"part {p}" for p in order)]
        for (_, cell, remark), p in zip(pictures, order, strict=True):
            assert remark == f"weight {float(weights[label, p]):.2f}"
            _, image, scores, boxes = max((f for f in found if f[0] == label), key=lambda f: float(f[2][p].max()))
            x0, y0, x1, y1 = (round(64 * v) for v in boxes[int(scores[p].argmax())])
            np.testing.assert_array_equal(cell[CELL:], visual.fitted(image[y0:y1, x0:x1], (CELL, CELL)))
    page = (run / "evaluation/report.html").read_text()
    assert "come to the logit" in page
    assert '"name":"part ' in page


def test_runs_stand_below_each_other(script: Script, run: Path, bcnn_run: Path, tmp_path: Path) -> None:
    """Only those that have parts."""
    runs = [copy_run(run, tmp_path / "a"), copy_run(bcnn_run, tmp_path / "b"), copy_run(run, tmp_path / "c")]
    out = tmp_path / "out"
    outcome = script("evaluate", *runs, *PLAN, f"out={out}")
    assert outcome.code == 0, outcome.err
    assert json.loads((out / "results.json").read_text())["rows"]
    together = sorted((out / "parts").glob("*.jpg"))
    alone = sorted((runs[0] / "evaluation/parts").glob("*.jpg"))
    assert [path.name for path in together] == [path.name for path in alone] != []
    for a, b in zip(together, alone, strict=True):
        assert Image.open(a).height == 2 * Image.open(b).height
    assert not (runs[1] / "evaluation/parts").exists()
