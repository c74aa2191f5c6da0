"""What a run that goes on may find elsewhere, and what must not have changed."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from interp_models.config.loading import load_yaml
from interp_models.core.errors import InputError
from interp_models.runs.building import build_data, build_model
from interp_models.runs.loading import run_config
from interp_models.runs.resume import check_assignment, check_same_classes
from interp_models.training.checkpoints import read_checkpoint
from tests.conftest import BCNN_LRS, Script, fit, tiny_config, write_config

NAMES = ("ash", "elm", "oak")


def make_folder(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Four training and two test images of every class."""
    for label, name in enumerate(names):
        for split, count in (("train", 4), ("test", 2)):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = np.random.default_rng([label, number]).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def config_of(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    config = tiny_config(root, out=str(out), phases=[{"epochs": 1, "lrs": BCNN_LRS}], **changes)
    config["data"]["dataset"] = {"name": "image_folder", "root": str(root)}
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set `d`, the run `teacher`, and the run `run` that it taught for one epoch."""
    folder = tmp_path_factory.mktemp("source")
    make_folder(folder / "d")
    fit(config_of(folder / "d", folder / "teacher"))
    fit(config_of(folder / "d", folder / "run", distillation={"teacher": str(folder / "teacher")}))
    return folder


@pytest.fixture
def place(source: Path, tmp_path: Path) -> Path:
    """A copy of all that, whose run knows where it is."""
    place = Path(shutil.copytree(source, tmp_path / "place"))
    node = load_yaml(place / "run/config.yaml")
    node["data"]["dataset"]["root"] = str(place / "d")
    node["distillation"]["teacher"] = str(place / "teacher")
    write_config(place / "run/config.yaml", node)
    return place


def epochs(run: Path) -> int:
    return 1 + int(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"])


def refused(script: Script, place: Path, *arguments: str) -> str:
    """The one line that a resumed training is refused with before it changes anything."""
    files = {path: path.read_bytes() for path in (place / "run").rglob("[!.]*") if path.is_file()}
    outcome = script("train", f"resume={place / 'run'}", "phases[0].epochs=2", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert {path: path.read_bytes() for path in (place / "run").rglob("[!.]*") if path.is_file()} == files
    (line,) = outcome.err.splitlines()
    return line


def test_data_and_teacher_may_lie_elsewhere(script: Script, place: Path) -> None:
    """The training is the same as if nothing had moved, and places given by the command count for the command alone."""
    shutil.copytree(place / "run", place / "still")
    assert script("train", f"resume={place}/still", "phases[0].epochs=2").code == 0
    before = load_yaml(place / "run/config.yaml")
    (place / "d").rename(place / "images")
    (place / "teacher").rename(place / "master")
    moved = [f"data.dataset.root={place}/images", f"distillation.teacher={place}/master"]
    outcome = script("train", f"resume={place}/run", "phases[0].epochs=2", *moved)
    assert outcome.code == 0, outcome.err
    states = [torch.load(place / name / "checkpoints/last.ckpt", weights_only=True) for name in ("run", "still")]
    assert states[0]["epoch"] == 1
    for key, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][key]), key
    before["phases"][0]["epochs"] = 2
    assert load_yaml(place / "run/config.yaml") == before


def test_config_yaml_may_say_where_they_lie(script: Script, place: Path) -> None:
    (place / "d").rename(place / "images")
    (place / "teacher").rename(place / "master")
    node = load_yaml(place / "run/config.yaml")
    node["data"]["dataset"]["root"] = str(place / "images")
    node["distillation"]["teacher"] = str(place / "master")
    write_config(place / "run/config.yaml", node)
    outcome = script("train", f"resume={place}/run", "phases[0].epochs=2")
    assert outcome.code == 0, outcome.err
    assert epochs(place / "run") == 2


def test_pretrained_weights_are_not_needed_again(script: Script, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    build = build_model
    for module in ("preparation", "loading"):
        monkeypatch.setattr(
            f"interp_models.runs.{module}.build_model", lambda *a, **k: asked.append(k.get("trained")) or build(*a, **k)
        )
    assert script("train", f"resume={place}/run", "phases[0].epochs=2").code == 0
    assert asked == [True, True]  # the model and its teacher


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "data.batch_size",
            3,
            ": was trained with data.batch_size 4, the config now says 3; the steps of an epoch and",
        ),
        ("data.image_size", 96, "was trained with data.image_size 64, the config now says 96; the images or their fo"),
        ("data.dataset.name", "cub", "was trained with data.dataset.name 'image_folder', the config now says 'cub'"),
        ("distillation.weight", 0.1, "was trained with distillation.weight 0.5, the config now says 0.1; the loss wo"),
        ("distillation.teacher", None, ", the config now says None; the loss would change in the middle of the train"),
        ("model.n_maps", 2, "was trained with model.n_maps "),
        (
            "feature_copies",
            3,
            "was trained with feature_copies 0, the config now says 3; the copies that its epochs",
        ),
        ("seed", 1, "was trained with seed 0, the config now says 1; the split, the order and the augmentation"),
    ],
)
def test_other_changes_in_config_yaml_are_refused(
    script: Script, place: Path, key: str, value: Any, message: str
) -> None:
    node: Any = load_yaml(place / "run/config.yaml")
    *parents, name = key.split(".")
    inner = node
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    if key == "seed":
        node["data"]["seed"] = 0
    if key == "data.dataset.name":  # with options that this data set has
        node["data"]["dataset"] = {"name": value, "root": node["data"]["dataset"]["root"]}
    write_config(place / "run/config.yaml", node)
    line = refused(script, place)
    assert line.startswith(f"error: {place}/run/checkpoints/last.ckpt: was trained with {key} ")
    assert message in line


def test_options_that_were_added_since_have_their_defaults(script: Script, place: Path) -> None:
    """A checkpoint and a config.yaml of before do not know them."""
    for name in ("best", "last"):
        path = place / f"run/checkpoints/{name}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["interp_models"]["config"]["data"]["transforms"]
        del checkpoint["interp_models"]["config"]["model"]["label_smoothing"]
        torch.save(checkpoint, path)
    assert script("train", f"resume={place}/run", "phases[0].epochs=2").code == 0


# Classes and images


def rename(place: Path, old: str, new: str) -> None:
    for split in ("train", "test"):
        (place / "d" / split / old).rename(place / "d" / split / new)


def test_other_class_names_are_refused(script: Script, place: Path) -> None:
    rename(place, "ash", "yew")  # which comes last
    assert refused(script, place) == (
        f"error: {place}/run/checkpoints/last.ckpt: was trained with 'ash' as class 0, the data set has 'elm' there"
    )


def test_more_classes_are_refused(script: Script, place: Path) -> None:
    make_folder(place / "d", (*NAMES, "yew"))
    assert refused(script, place) == (
        f"error: {place}/run/checkpoints/last.ckpt: was trained with 3 classes, the data set has 4: 'yew' is new"
    )


def test_a_teacher_of_other_classes_is_refused(script: Script, place: Path) -> None:
    make_folder(place / "e", ("ash", "elm", "fir"))
    node = config_of(place / "e", place / "new", distillation={"teacher": str(place / "teacher")})
    outcome = script("train", write_config(place / "c.yaml", node))
    assert outcome == (
        2,
        "",
        f"error: distillation.teacher: {place}/teacher: was trained with 'oak' as class 2, the data set has 'fir' "
        "there\n",
    )
    assert not (place / "new").exists()


def test_a_teachers_checkpoint_is_read_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = read_checkpoint
    for module in ("train", "loading"):
        monkeypatch.setattr(
            f"interp_models.runs.{module}.read_checkpoint", lambda path, *a: read.append(Path(path)) or real(path, *a)
        )
    fit(config_of(place / "d", place / "new", distillation={"teacher": str(place / "teacher")}))
    assert len([path for path in read if place / "teacher" in path.parents]) == 1


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("ab", "ab", None),
        ("ab", "ba", "R: was trained with 'a' as class 0, the data set has 'b' there"),
        ("abc", "ab", "R: was trained with 3 classes, the data set has 2: 'c' is missing"),
    ],
)
def test_first_difference(before: str, now: str, message: str | None) -> None:
    if message is None:
        check_same_classes(list(before), list(now), "R")
    else:
        with pytest.raises(InputError) as error:
            check_same_classes(list(before), list(now), "R")
        assert str(error.value) == message


def test_other_images_are_refused(script: Script, place: Path) -> None:
    """Another name in training or validation, wherever the split put it; and an image more."""
    where = f"error: {place}/run/checkpoints/last.ckpt: was trained with"
    data = build_data(run_config(place / "run"))
    for split, indices in (("train", data.train_indices), ("val", data.val_indices)):
        image = place / "d" / data.train_images.image_id(int(indices[-1]))
        renamed = image.rename(image.with_stem(f"{image.stem}_"))  # at the same place, so that the split is the same
        says = f"{where} other {split} images; their names, labels or order differ"
        assert refused(script, place).startswith(says)
        renamed.rename(image)
        pixels = image.read_bytes()
        Image.new("RGB", (72, 72), (9, 9, 9)).save(image)
        assert refused(script, place).startswith(f"{where} other {split} images; their files differ")
        image.write_bytes(pixels)
    shutil.copy(place / "d/train/elm/0.png", place / "d/train/elm/4.png")
    assert refused(script, place).startswith(f"{where} 9 train images, the data set now has 10")


def test_a_run_without_its_last_epoch_is_refused(script: Script, place: Path) -> None:
    """It would begin anew, and write over the best epoch."""
    (place / "run/checkpoints/last.ckpt").unlink()
    assert refused(script, place).startswith(
        f"error: {place}/run/checkpoints/last.ckpt is missing; without it the training would start again"
    )


def test_assignments() -> None:
    for good in ("phases[0].epochs=3", "phases=[]", "trainer.devices=2", "logger.wandb=online", "feature_cache=x"):
        check_assignment(good)
    for bad in ("phasess=1", "data.dataset.name=x", "distillation={}", "data.num_workerss=1", "model=x"):
        with pytest.raises(InputError, match="a resumed run can change"):
            check_assignment(bad)
