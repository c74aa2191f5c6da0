from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from interp_models.data.base import DATASETS
from interp_models.data.image_folder import ImageFolder
from interp_models.errors import InputError


def make_tree(root: Path, names: list[str]) -> Path:
    """Write images whose red channel counts up from 10 in steps of 10, green is 20 and blue 30."""
    for number, name in enumerate(names, start=1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + number, 3), (10 * number, 20, 30)).save(path, "PNG")
    return root


NAMES = ["train/owl/b.png", "train/owl/a.PNG", "train/auk/deep/er.png", "train/auk/z.jpeg", "test/auk/1.webp"]
NAMES += ["test/owl/2.bmp", "test/owl/1.png"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (
            "train",
            [
                ("train/auk/z.jpeg", 0, 40),
                ("train/auk/deep/er.png", 0, 30),
                ("train/owl/a.PNG", 1, 20),
                ("train/owl/b.png", 1, 10),
            ],
        ),
        ("test", [("test/auk/1.webp", 0, 50), ("test/owl/1.png", 1, 70), ("test/owl/2.bmp", 1, 60)]),
    ],
)
def test_images_labels_and_order(tmp_path: Path, split: Any, expected: list[tuple[str, int, int]]) -> None:
    make_tree(tmp_path, NAMES)
    (tmp_path / "train/owl/notes.txt").write_text("not an image")
    (tmp_path / "train/readme.txt").write_text("not a class")
    images = DATASETS.build("image_folder", {"root": str(tmp_path)}, split=split)
    assert images.classes == ["auk", "owl"]
    assert len(images) == len(expected)
    for index, (name, label, red) in enumerate(expected):
        sample = images.load(index)
        assert images.image_id(index) == name
        assert images.labels[index] == sample.label == label
        assert sample.index == index
        colour = torch.tensor([red, 20, 30], dtype=torch.uint8)
        assert torch.equal(sample.image, colour[:, None, None].expand(3, 3, 4 + red // 10))
        assert sample[3:] == (None, None, None, None)
    assert images.part_names == images.mask_names == ()


def test_val_stands_in_for_test(tmp_path: Path) -> None:
    make_tree(tmp_path, [name.replace("test/", "val/") for name in NAMES])
    images = ImageFolder(split="test", root=str(tmp_path))
    assert [images.image_id(index) for index in range(3)] == ["val/auk/1.webp", "val/owl/1.png", "val/owl/2.bmp"]
    make_tree(tmp_path, ["test/auk/t.png", "test/owl/t.png"])
    images = ImageFolder(split="test", root=str(tmp_path))
    assert [images.image_id(index) for index in range(2)] == ["test/auk/t.png", "test/owl/t.png"]


def error_of(root: Path, split: Any = "train") -> str:
    with pytest.raises(InputError) as error:
        ImageFolder(split=split, root=str(root))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_of_one_split_only(tmp_path: Path, split: str) -> None:
    make_tree(tmp_path, [*NAMES, "train/emu/1.png", "test/kea/1.png"])
    assert error_of(tmp_path, split).endswith("only one has emu, kea")


def test_missing_folders(tmp_path: Path) -> None:
    assert str(tmp_path / "none/train") in error_of(tmp_path / "none")
    make_tree(tmp_path, NAMES[:4])
    assert f"{tmp_path / 'test'} is missing; expected train/<class>/*.jpg" in error_of(tmp_path)


def test_folders_without_images(tmp_path: Path) -> None:
    make_tree(tmp_path, NAMES)
    (tmp_path / "train/emu").mkdir()
    (tmp_path / "test/emu").mkdir()
    assert "train images: Found no valid file for the classes emu." in error_of(tmp_path)
    assert "test images: Found no valid file for the classes emu." in error_of(tmp_path, "test")


def test_no_class(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert f"find any class folder in {tmp_path / 'train'}" in error_of(tmp_path)


def test_corrupt_and_truncated_images_are_named(tmp_path: Path) -> None:
    make_tree(tmp_path, NAMES)
    images = ImageFolder(split="train", root=str(tmp_path))
    (tmp_path / "train/auk/z.jpeg").write_bytes(b"no image")
    path = tmp_path / "train/auk/deep/er.png"
    path.write_bytes(path.read_bytes()[:40])
    for index, name in enumerate(["z.jpeg", "er.png"]):
        with pytest.raises(InputError, match=f"{name} cannot be decoded"):
            images.load(index)
