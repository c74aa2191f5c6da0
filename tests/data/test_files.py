"""What an image is read from, and the ground truth beside it: what results of a data set are keyed by."""

from pathlib import Path
from typing import Any

import pytest

from interp_models.core.errors import InputError
from interp_models.data.base import DATASETS, ImageDataset
from interp_models.data.part_birds.dataset import PartBirds
from tests.data.make_cub import make_cub
from tests.data.test_fine_grained import make_aircraft, make_cars, make_mit67
from tests.data.test_image_folder import NAMES, make_tree

MAKE: dict[str, Any] = {
    "aircraft": make_aircraft,
    "cars": make_cars,
    "cub": lambda root: make_cub(root, segmentations=True),
    "image_folder": lambda root: make_tree(root, NAMES),
    "mit67": make_mit67,
}


def build(name: str, root: Path) -> ImageDataset:
    return DATASETS.build(name, {"root": str(root)}, split="train")


@pytest.mark.parametrize("name", MAKE)
def test_an_image_is_read_from_its_files_alone(tmp_path: Path, name: str) -> None:
    MAKE[name](tmp_path)
    images = build(name, tmp_path)
    (image, *masks) = images.files(1)
    assert len(masks) == (name == "cub")
    images.load(1)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file not in (image, *masks):
            file.unlink()
    images.load(1)
    for file in (image, *masks):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(InputError, match=f"{file.name} is missing"):
            images.load(1)
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("aircraft", "fgvc-aircraft-2013b/data/images_box.txt", "0000002 2 2", "0000002 2 3"),
        ("cub", "bounding_boxes.txt", "\n3 ", "\n3 1"),
        ("cub", "classes.txt", "001.Kind_1", "001.Kind_9"),
        ("cub", "parts/part_locs.txt", "\n3 2 ", "\n3 2 1"),
    ],
)
def test_an_annotation_changes_with_the_ground_truth(tmp_path: Path, name: str, file: str, old: str, new: str) -> None:
    MAKE[name](tmp_path)
    images = build(name, tmp_path)
    before = [images.annotation(index) for index in range(len(images))]
    again = build(name, tmp_path)
    assert [again.annotation(index) for index in range(len(images))] == before
    path = tmp_path / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    images = build(name, tmp_path)
    changed = [index for index, text in enumerate(before) if images.annotation(index) != text]
    assert 1 in changed  # image 3 of CUB's lists, and 0000002 of the aircraft, come second in train
    assert changed == [1] or file == "classes.txt"


def test_annotations_of_classes_and_cars(tmp_path: Path) -> None:
    for name, expected in (
        ("image_folder", "owl"),
        ("mit67", "attic"),
        ("cars", "Ram C-V Cargo Van Minivan 2012 (1.0, 1.0, 5.0, 5.0)"),
    ):
        MAKE[name](tmp_path / name)
        images = build(name, tmp_path / name)
        assert images.annotation(len(images) - 1) == expected


def test_a_drawn_image_is_told_by_what_it_is_drawn_from() -> None:
    images = PartBirds(split="train")
    assert images.files(3) == ()
    others = [PartBirds(split="test"), PartBirds(split="train", seed=1), PartBirds(split="train", image_size=64)]
    told = {images.annotation(3), images.annotation(15), *(other.annotation(3) for other in others)}
    assert len(told) == 5
    assert PartBirds(split="train", train_per_class=3).annotation(3) == images.annotation(3)
