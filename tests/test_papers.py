"""The configs of papers' tables, on generated trees with the official layouts, and published numbers beside ours."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from interp_models.config.loading import check, load_yaml
from interp_models.core.errors import InputError
from interp_models.evaluation.config import EvaluateConfig
from interp_models.evaluation.plan import explainer_specs
from interp_models.metrics.base import metrics_of
from interp_models.report.published import beside, check_published
from studies import paper_trainings
from tests.conftest import CNN_LRS, TINY, TINY_CNN, Script, copy_run, fit, tiny_config
from tests.data.test_public_sets import make_coco, make_imagenet, make_voc

ROOT = Path(__file__).parents[1] / "configs" / "paper"
TABLES = sorted(path for path in ROOT.glob("*.yaml") if path.name[0] != "_" and not path.name.startswith("dpnet"))
NAMES = [path.stem for path in TABLES]
MODELS = ("protopnet", "bcnn", "br_npa")


@pytest.mark.parametrize("path", TABLES, ids=NAMES)
def test_published_numbers_are_of_what_is_measured(path: Path) -> None:
    config: EvaluateConfig = check(EvaluateConfig, load_yaml(path))
    labels = [label for label, _, _ in explainer_specs(config.explainers)]
    keys = list(metrics_of(config.metrics))
    check_published(config.published)
    for name, numbers in config.published.get("explainers", {}).items():
        assert name in labels or name.partition("/")[0] in MODELS
        assert set(numbers) <= set(keys)
        assert all(float(value) < 100 for value in numbers.values())


NETWORK = "networks=[{timm: test_efficientnet, weights: null, image_size: 64}]"
FEW = ("logger.wandb=disabled", "report_images=1", "n_images=3", "max_steps=3", "trainer.accelerator=cpu")


@pytest.mark.parametrize("name", [name for name in NAMES if "opticam" in name or name == "guidance_imagenet"])
def test_tables_on_imagenet(name: str, script: Script, tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "imagenet")
    config: EvaluateConfig = check(EvaluateConfig, load_yaml(ROOT / f"{name}.yaml"))
    quick = [label for label in ("gt_box", "fakecam", "gradcam", "layercam") if label in config.explainers]
    out = tmp_path / "out"
    given = [
        NETWORK,
        f"dataset.root={root}",
        f"dataset.boxes={root / 'boxes'}",
        f"out={out}",
        f"explainers=[{', '.join([*quick, 'random'])}]",
    ]
    outcome = script("evaluate", f"config=paper/{name}", *given, *FEW)
    assert outcome.code == 0, outcome.err
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["metric"] for row in rows} == set(metrics_of(config.metrics))
    table = (out / "published.md").read_text()
    assert table.strip() in outcome.out
    for explainer, numbers in config.published["explainers"].items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {explainer} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        assert [float(cell) for cell in cells[1::2] if cell != "–"] == [
            float(numbers[key]) for key in metrics_of(config.metrics) if key in numbers
        ]
        assert (cells[0] == "–") == (explainer not in quick)


def trained_on(dataset: dict[str, Any], out: Path) -> Path:
    """A small CNN, trained for an epoch."""
    config = tiny_config("", out=str(out), model=TINY_CNN, phases=[{"epochs": 1, "lrs": CNN_LRS}])
    config["data"] |= {"dataset": dataset, "val_fraction": 0}
    return fit(config)


def make_voc_with_masks(root: Path) -> Path:
    """A tree in which a test image has a mask, too."""
    top = make_voc(root) / "VOCdevkit" / "VOC2012"
    shutil.copy(top / "SegmentationClass/2008_01.png", top / "SegmentationClass/2008_03.png")
    (top / "ImageSets/Segmentation/val.txt").write_text("2008_03\n")
    return root


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("guidance_voc", make_voc_with_masks, {"name": "voc", "masks": True}),
        ("guidance_coco", make_coco, {"name": "coco"}),
    ],
    ids=["voc", "coco"],
)
def test_tables_of_several_labels(
    name: str, make: Any, options: dict[str, Any], script: Script, tmp_path: Path
) -> None:
    run = trained_on({"root": str(make(tmp_path / "data")), **options}, tmp_path / "run")
    outcome = script("evaluate", run, f"config=paper/{name}", *FEW, "explainers=[gradcam, guidancecam, random]")
    assert outcome.code == 0, outcome.err
    config: EvaluateConfig = check(EvaluateConfig, load_yaml(ROOT / f"{name}.yaml"))
    rows = json.loads((run / "evaluation" / "results.json").read_text())["rows"]
    assert {row["metric"] for row in rows} == set(metrics_of(config.metrics))
    assert "| guidancecam |" in (run / "evaluation" / "published.md").read_text()


@pytest.mark.parametrize("name", ["tutorial_table1", "tutorial_table2", "tutorial_figure8"])
def test_tables_of_the_tutorial(name: str, script: Script, tmp_path: Path, cnn_run: Path, bcnn_run: Path) -> None:
    runs = [copy_run(cnn_run, tmp_path / "cnn"), copy_run(bcnn_run, tmp_path / "bcnn")]
    few = "explainers=[intrinsic, activation_map, gradcam_pp, random]"
    figure = ["figure=[activation_map, gradcam_pp]"] if "figure" in name else []
    out = tmp_path / "out"
    outcome = script("evaluate", *runs, f"config=paper/{name}", *FEW, few, *figure, f"out={out}")
    assert outcome.code == 0, outcome.err
    if figure:
        assert (out / "figure.png").is_file()
        return
    table = (out / "published.md").read_text().splitlines()
    own = json.loads((runs[1] / "evaluation" / "results.json").read_text())["rows"]
    (line,) = (line for line in table if line.startswith("| bcnn/intrinsic |"))
    first = "dauc" if name.endswith("1") else "iic"
    (row,) = (row for row in own if (row["explainer"], row["metric"]) == ("intrinsic", first))
    shown = f"{row['mean']:.3f}" if first == "dauc" else f"{100 * row['mean']:.1f}"
    assert line.split("|")[2].split()[0] == shown
    (missing,) = (line for line in table if line.startswith("| br_npa/intrinsic |"))
    assert missing.split("|")[2].strip() == "–"
    found = re.search(r'<table class="published">(.*?)</table>', (out / "report.html").read_text(), re.DOTALL)[1]
    on_page = [re.findall(r"<t[hd][^>]*>(?:<span[^>]*>)?([^<]*)", row) for row in found.split("</tr>")[1:-1]]
    assert on_page == [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:-2]]
    assert not any("Beside published" in (run / "evaluation" / "report.html").read_text() for run in runs)


@pytest.mark.parametrize("name", [name for name in NAMES if "combinations" in name])
def test_combinations(name: str, script: Script, tmp_path: Path, cnn_run: Path) -> None:
    run = copy_run(cnn_run, tmp_path / "run")
    few = "explainers=[gradient, {name: smoothed_integrated_gradients, samples: 2, steps: 2}, random]"
    outcome = script("evaluate", run, f"config=paper/{name}", *FEW, few, "userstudy=visual_coherence", "study.trials=2")
    assert outcome.code == 0, outcome.err
    assert (run / "evaluation" / "studies" / "visual_coherence" / "study.html").is_file()


@pytest.mark.parametrize("path", sorted(ROOT.glob("dpnet_*.yaml")), ids=lambda path: path.stem)
def test_trainings_of_dpnet(path: Path, tmp_path: Path, tiny_cub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its trainings, on small images with a small trunk."""
    listed = yaml.safe_load(path.read_text())
    short = tmp_path / path.name
    few = [one for one in listed["trainings"] if one["dataset"] == "cub" and "vgg16" not in str(one.get("changes"))][:2]
    short.write_text(yaml.safe_dump(listed | {"trainings": few}))
    small = [
        "data.image_size=64", "data.batch_size=4", "data.num_workers=0", "data.val_fraction=0",
        f"model.backbone={TINY}", "model.weights=null", "phases[0].epochs=1", "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false", "logger.wandb=disabled", "attention.every_n_epochs=0",
        "feature_cache=null",
    ]  # fmt: skip
    arguments = [str(short), f"cub={tiny_cub.root}", "--folder", str(tmp_path / "runs"), "--more", *small]
    table = paper_trainings.main(arguments).read_text().splitlines()
    for one, line in zip(few, table[2:], strict=False):
        what, ours, published = (cell.strip() for cell in line.strip("|").split("|"))
        assert (what, float(published)) == (one["what"], one["published"])
        assert 0 <= float(ours) <= 100
    monkeypatch.setattr(paper_trainings.subprocess, "run", None)  # all are finished
    assert paper_trainings.main(arguments).read_text().splitlines() == table


ROWS = [{"explainer": "gradcam", "metric": "ad", "mean": 0.1, "low": 0.05, "high": 0.2, "n_undefined": 0}]


def test_a_table_by_hand() -> None:
    found = beside(
        {"source": "a paper", "explainers": {"gradcam": {"ad": 12.2}, "bcnn/gradcam": {"ad": 3}}},
        {("first", "cnn"): ROWS, ("second", "bcnn"): [ROWS[0] | {"mean": 0.5, "low": None, "high": None}]},
    )
    assert str(found).splitlines() == [
        "| explainer | AD %, ours | published |",
        "| --- | ---: | ---: |",
        "| gradcam | 10.0 [5.0, 20.0] | 12.2 |",
        "| bcnn/gradcam | 50.0 | 3 |",
        "",
        "published: a paper",
    ]


@pytest.mark.parametrize(
    ("published", "says"),
    [
        ({"source": "x", "explainers": {}}, "must hold numbers by explainer; got {}"),
        ({"explainers": {}}, "published must have `source` and `explainers`"),
        ({"source": "x", "explainers": {"gradcam": 3}}, "must hold a number by metric; got 3"),
        ({"source": "x", "explainers": {"gradcam": {"dauk": 1}}}, "did you mean 'dauc'"),
        ({"source": "x", "explainers": {"gradcam": {"ad": "low"}}}, "must be a number; got 'low'"),
        ({"source": "x", "explainers": {"gradcam": {"ad": float("nan")}}}, "must be a number; got nan"),
    ],
)
def test_published_numbers_that_do_not_fit_are_refused(published: dict[str, Any], says: str) -> None:
    check_published({"source": "x", "explainers": {"gradcam": {"ad": 1}}})
    with pytest.raises(InputError, match=says):
        check_published(published)
