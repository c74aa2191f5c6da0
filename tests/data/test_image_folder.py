import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from interp_models.core.errors import InputError
from interp_models.data.base import DATASETS, printable
from interp_models.data.image_folder import ImageFolder


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
        assert sample[3:] == (None,) * 6
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
    assert error_of(tmp_path).endswith("train images: found none of the classes emu")
    (tmp_path / "test/emu/a.heic").touch()
    says = "test images: found none of the classes emu; 1 files are not images, such as test/emu/a.heic"
    assert error_of(tmp_path, "test").endswith(says)


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


def ids(root: Path, split: Any = "train", **options: Any) -> list[str]:
    images = ImageFolder(split=split, root=str(root), **options)
    return [images.image_id(index) for index in range(len(images))]


# What is no data


def test_hidden_files_and_folders_are_no_data(tmp_path: Path) -> None:
    """The root itself may lie in a hidden folder."""
    root = make_tree(tmp_path / ".cache" / "data", NAMES)
    before = ids(root), ids(root, "test")
    assert list(map(len, before)) == [4, 3]
    hidden = [".ipynb_checkpoints/a/0.png", "train/.ipynb_checkpoints/0.png", "train/owl/.ipynb_checkpoints/0.png"]
    hidden += ["train/owl/._b.png", "train/auk/deep/.x.png", "test/__MACOSX/owl/._1.png", "test/.@__thumb/1.png"]
    hidden += ["train/owl/@eaDir/b.png", "test/.DS_Store", "test/auk/Thumbs.db", "train/owl/desktop.ini"]
    make_tree(root, hidden)
    assert (ids(root), ids(root, "test")) == before
    for split in ("train", "test"):
        images = ImageFolder(split=split, root=str(root))  # type: ignore[arg-type]
        assert images.classes == ["auk", "owl"]
        assert images.left_out == {}


def test_what_pillow_reads_is_read_and_the_rest_is_named(tmp_path: Path) -> None:
    make_tree(tmp_path, NAMES)
    more = ["a.jfif", "b.JPE", "c.gif", "d.Avif", "e.jp2", "f.TIFF", "g.jpeg"]
    for name in more:
        (tmp_path / "test/owl" / name).write_bytes((tmp_path / "test/owl/1.png").read_bytes())
    assert ids(tmp_path, "test") == ["test/auk/1.webp", *(f"test/owl/{name}" for name in ("1.png", "2.bmp", *more))]
    for name in ("test/owl/notes.txt", "test/owl/film.mpg", "test/auk/deep/x.heic", "test/readme", "test/lost.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "extra").mkdir()
    images = ImageFolder(split="test", root=str(tmp_path))
    assert len(images) == 3 + len(more)
    assert images.left_out == {
        "files that are not images": ["test/auk/deep/x.heic", "test/owl/film.mpg", "test/owl/notes.txt", "test/readme"],
        "images outside class folders": ["test/lost.png"],
        "folders that are not splits": ["extra"],
    }


def test_links(tmp_path: Path) -> None:
    """A link to images is followed; one that leads back up would bring in other classes."""
    make_tree(tmp_path / "elsewhere", ["x.png", "deep/y.png"])
    root = make_tree(tmp_path / "data", NAMES)
    (root / "train/owl/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere")
    for number, target in enumerate((root, root / "train", root / "train/owl")):
        (root / f"train/owl/up{number}").symlink_to(target)
    images = ImageFolder(split="train", root=str(root))
    owls = [images.image_id(i) for i in range(len(images)) if images.labels[i] == 1]
    assert owls == ["train/owl/a.PNG", "train/owl/b.png", "train/owl/more/x.png", "train/owl/more/deep/y.png"]
    expected = ["train/owl/more/again", "train/owl/up0", "train/owl/up1", "train/owl/up2"]
    assert images.left_out == {"links to a folder above": expected}


def test_names_of_all_kinds(tmp_path: Path) -> None:
    r"""Bytes that are no UTF-8, blanks, line ends and backslashes: an identifier prints, and is that of one file."""
    make_tree(tmp_path, NAMES)
    names = [
        b"caf\xe9.png",
        rb"caf\xe9.png",
        "caf\u00e9.png".encode(),
        b"a b.png",
        b"a\nb.png",
        b"\xc2\x85.png",
        b"\x85.png",
    ]
    for name in names:
        (tmp_path / "test/owl" / os.fsdecode(name)).write_bytes((tmp_path / "test/owl/1.png").read_bytes())
    for split in ("train", "test"):
        os.rename(tmp_path / split / "auk", tmp_path / split / os.fsdecode(b"\xe9 auk"))
    images = ImageFolder(split="test", root=str(tmp_path))
    found = ids(tmp_path, "test")
    shown = [r"caf\xe9.png", r"caf\\xe9.png", "caf\u00e9.png", "a b.png", r"a\u000ab.png", r"\u0085.png", r"\x85.png"]
    assert {f"test/owl/{name}" for name in shown} <= set(found)
    assert len(set(found)) == len(found) == 3 + len(names)
    assert all(name.isprintable() and name.encode() for name in [*found, *images.classes])
    assert images.classes == ["owl", r"\xe9 auk"]
    for index in range(len(images)):
        assert images.load(index).image.shape[0] == 3
    assert printable("\U000e0001\udcff\\") == r"\U000e0001\xff\\"


def test_roots_that_are_none(tmp_path: Path) -> None:
    make_tree(tmp_path / "a", NAMES)
    assert ids(tmp_path / "a") == ids(Path(f"{tmp_path}/a/"))
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file; expected a folder" in error_of(tmp_path / "file")
    (tmp_path / "a/validation/owl").mkdir(parents=True)
    (tmp_path / "a/val").mkdir()
    assert "/val and " in error_of(tmp_path / "a")
    assert error_of(tmp_path / "a").endswith("are both for val; keep one")


def test_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As os.walk tells of them, which by default says nothing."""
    make_tree(tmp_path, NAMES)
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    assert len(ids(tmp_path)) == 4
    monkeypatch.setattr(os, "scandir", scandir)
    assert error_of(tmp_path).endswith("train/auk/deep cannot be read: Permission denied")


# Validation


@pytest.mark.parametrize("name", ["val", "Valid", "VALIDATION"])
def test_val_beside_test_is_for_validation(tmp_path: Path, name: str) -> None:
    make_tree(tmp_path, [*NAMES, f"{name}/owl/1.png", f"{name}/owl/2.png"])
    images = ImageFolder(split="train", root=str(tmp_path))
    expected = ["train/auk/z.jpeg", "train/auk/deep/er.png", "train/owl/a.PNG", "train/owl/b.png"]
    assert ids(tmp_path) == [*expected, f"{name}/owl/1.png", f"{name}/owl/2.png"]
    assert images.validation == [4, 5]
    assert list(images.labels) == [0, 0, 1, 1, 1, 1]
    assert ids(tmp_path, "test") == ["test/auk/1.webp", "test/owl/1.png", "test/owl/2.bmp"]
    assert ImageFolder(split="test", root=str(tmp_path)).validation == []
    make_tree(tmp_path, [f"{name}/emu/1.png"])
    assert error_of(tmp_path).endswith(f"{tmp_path / name} must hold the same classes; only one has emu")


# A folder without splits


def test_a_flat_folder_is_split_by_class_names_and_seed(tmp_path: Path) -> None:
    make_tree(tmp_path, [f"{kind}/{i}.png" for kind, n in (("auk", 10), ("owl", 5), ("emu", 1)) for i in range(n)])
    every = {f"auk/{i}.png" for i in range(10)} | {f"owl/{i}.png" for i in range(5)} | {"emu/0.png"}
    train, test = ids(tmp_path), ids(tmp_path, "test")
    assert set(train) | set(test) == every
    assert not set(train) & set(test)
    assert Counter(name[:3] for name in test) == {"auk": 2, "owl": 1}  # 20 %; the only emu is to train on
    images = ImageFolder(split="test", root=str(tmp_path))
    assert images.classes == ["auk", "emu", "owl"]
    assert [images.classes[label] for label in images.labels] == [name[:3] for name in test]
    assert images.note == "test images are 20 % of each class, drawn by seed 0"
    half = Counter(name[:3] for name in ids(tmp_path, "test", test_fraction=0.5))
    assert half == {"auk": 5, "owl": 2}
    others = {tuple(ids(tmp_path, "test", seed=seed)) for seed in range(6)}
    assert len(others) > 3
    # Another image moves none but by the one that the larger class gives.
    make_tree(tmp_path, ["auk/00.png"])
    assert len(set(test) ^ set(ids(tmp_path, "test"))) <= 2
    for fraction in (0, 1, -0.5):
        with pytest.raises(InputError, match=f"test_fraction must be above 0 and below 1; got {fraction}"):
            ImageFolder(split="train", root=str(tmp_path), test_fraction=fraction)


def test_a_fraction_of_a_folder_with_splits_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, NAMES)
    with pytest.raises(InputError, match=r"test_fraction=0\.3: .* already says which images are for the test"):
        ImageFolder(split="train", root=str(tmp_path), test_fraction=0.3)


def test_layouts_that_can_be_read_in_two_ways(tmp_path: Path) -> None:
    vehicles = make_tree(tmp_path / "a", ["train/1.png", "bus/1.png", "car/1.png"])
    assert error_of(vehicles).endswith(f"in {vehicles}; give other names to {vehicles / 'train'} if they are classes")
    os.rename(vehicles / "train", vehicles / "railway")
    assert set(ids(vehicles)) == {"railway/1.png", "bus/1.png", "car/1.png"}
    unknown = make_tree(tmp_path / "b", ["learn/owl/1.png", "learn/auk/1.png", "judge/owl/1.png", "judge/auk/1.png"])
    assert "/judge and " in error_of(unknown)
    assert "/learn both hold auk; if they are splits, name them train, val, test" in error_of(unknown)
    capital = make_tree(tmp_path / "c", ["Training/owl/1.png", "Training/auk/1.png", "Testing/owl/1.png", "TEST"])
    assert "must hold the same classes; only one has auk" in error_of(capital)


# Lists


def write_list(root: Path, text: str, name: str = "list.csv") -> Path:
    (root / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return root / name


def test_a_list_says_path_label_and_split(tmp_path: Path) -> None:
    make_tree(tmp_path, ["x/1.png", "x/2.png", "x/a, b.png", "y/1.png", "y/4.dat"])
    text = (
        '\ufeffLabel, path ,split\r\n"owl, grey",x/1.png,train\r\n007,x/2.png,Validation\r\n007,"x/a, b.png",train\r\n'
    )
    file = write_list(tmp_path, text + "owl/brown,y/1.png,test\r\n007,y/4.dat,TEST\r\n")
    for given in (str(file), "list.csv"):
        images = ImageFolder(split="train", root=str(tmp_path), list=given)
        assert images.classes == ["007", "owl, grey", "owl-brown"]
        assert ids(tmp_path, list=given) == ["x/1.png", "x/a, b.png", "x/2.png"]
        assert images.labels == [1, 0, 0]
        assert images.validation == [2]
        assert [images.load(i).image[0, 0, 0] for i in range(3)] == [10, 30, 20]
        assert ids(tmp_path, "test", list=given) == ["y/1.png", "y/4.dat"]
        assert ImageFolder(split="test", root=str(tmp_path), list=given).labels == [2, 0]


def test_a_list_of_its_own_folder_and_without_test(tmp_path: Path) -> None:
    make_tree(tmp_path / "images", ["1.png", "2.png"])
    (tmp_path / "none").mkdir()
    file = write_list(tmp_path / "images", "path,label,split\n1.png,a,train\n2.png,a,val\n")
    assert ids(tmp_path / "none", list=str(file)) == ["1.png"]
    assert ids(tmp_path / "none", "test", list=str(file)) == ["2.png"]
    assert ImageFolder(split="test", root=str(tmp_path / "none"), list=str(file)).load(0).image[0, 0, 0] == 20


def test_a_list_without_splits_is_split(tmp_path: Path) -> None:
    make_tree(tmp_path, [f"{i}.png" for i in range(10)])
    write_list(tmp_path, "path,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(10)))
    test = ids(tmp_path, "test", list="list.csv", test_fraction=0.4)
    assert sorted(int(name[0]) % 2 for name in test) == [0, 0, 1, 1]
    assert sorted([*test, *ids(tmp_path, list="list.csv", test_fraction=0.4)]) == [f"{i}.png" for i in range(10)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "its first line must name the columns path,label or path,label,split; label and path not found in ''"),
        ("path;label\n1.png;a\n", "label and path not found in 'path;label'"),
        ("1.png,a\n", "label and path not found in '1.png,a'"),
        ("path,label\n", "names no image"),
        ("path,label\n1.png,a\n2.png\n", "line 3: expected 2 values, path,label"),
        ("path,label\n1.png,a,b\n", "line 2: expected 2 values, path,label"),
        ("path,label\n1.png, \n", "line 2: a path and a label are needed"),
        ("path,label,split\n1.png,a,trian\n", "line 2: 'trian'; did you mean 'train'?"),
        ("path,label,split\n1.png,a,train\n2.png,a,\n", "line 3: ''; "),
        ("path,label\n1.png,a\n./1.png,b\n", "line 3: ./1.png is already in line 2"),
        ("path,label,split\n1.png,a,train\n", "no image is of split test"),
        ("path,label,split\n1.png,a,test\n", "no image is of split train"),
        ("path,label\n1.png,a/b\n2.png,a-b\n", "two classes have the name a-b, as / becomes -"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, says: str) -> None:
    make_tree(tmp_path, ["1.png", "2.png"])
    write_list(tmp_path, text)
    with pytest.raises(InputError) as error:
        ImageFolder(split="train", root=str(tmp_path), list="list.csv")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"list none\.csv cannot be read: .*No such file"):
        ImageFolder(split="train", root=str(tmp_path), list="none.csv")
