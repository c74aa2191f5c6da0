"""VOC, COCO, ImageNet, Tiny ImageNet, Pets, CIFAR-10 and MNIST, on generated trees in their official layouts."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from interp_models import DATASETS
from interp_models.core.errors import InputError
from interp_models.data.base import Sample, collate, truth_of
from interp_models.data.module import DataModule
from interp_models.data.voc import CLASSES


def picture(path: Path, number: int, size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 50, 90)).save(path, "PNG")  # whatever its ending says


def xml(path: Path, objects: list[tuple[str, list[int], int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, (x0, y0, x1, y1), hard in objects
    )
    path.write_text(f"<annotation><size><width>20</width><height>10</height></size>{body}</annotation>")


def make_voc(root: Path) -> Path:
    top = root / "VOCdevkit" / "VOC2012"
    objects = {
        "2008_01": [("dog", [1, 1, 8, 10], 0), ("person", [11, 2, 20, 9], 0), ("dog", [3, 3, 4, 4], 0)],
        "2008_02": [("cat", [1, 1, 5, 5], 1)],
        "2008_03": [("cat", [1, 1, 5, 5], 0), ("sofa", [2, 1, 20, 5], 0)],
        "2008_04": [("sofa", [2, 1, 20, 5], 0)],
    }
    for number, (name, own) in enumerate(objects.items(), start=1):
        picture(top / "JPEGImages" / f"{name}.jpg", number)
        xml(top / "Annotations" / f"{name}.xml", own)
    pixels = np.zeros((10, 20), np.uint8)
    pixels[:, :8], pixels[2:9, 10:], pixels[0, 0] = CLASSES.index("dog") + 1, CLASSES.index("person") + 1, 255
    mask = Image.fromarray(pixels, "P")
    mask.putpalette(list(range(256)) * 3)
    (top / "SegmentationClass").mkdir()
    mask.save(top / "SegmentationClass/2008_01.png")
    for kind, lists in (
        ("Main", {"train": ["2008_01", "2008_02"], "val": ["2008_03", "2008_04"]}),
        ("Segmentation", {"train": ["2008_01"], "val": []}),
    ):
        (top / "ImageSets" / kind).mkdir(parents=True)
        for split, names in lists.items():
            (top / "ImageSets" / kind / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def make_coco(root: Path) -> Path:
    for split, first in (("train2017", 1), ("val2017", 5)):
        images = [{"id": 10 - i, "file_name": f"{10 - i:012d}.jpg", "height": 10, "width": 20} for i in range(2)]
        for number, image in enumerate(images, start=first):
            picture(root / split / image["file_name"], number)
        square = [[2, 2, 8, 2, 8, 8, 2, 8]]
        annotations = [
            {"image_id": 10, "category_id": 18, "bbox": [2, 2, 6, 6], "segmentation": square, "iscrowd": 0},
            {"image_id": 10, "category_id": 1, "bbox": [10, 0, 10, 10], "segmentation": [[10, 0, 20, 0, 20, 10]]},
            {"image_id": 10, "category_id": 3, "bbox": [0, 0, 5, 5], "segmentation": {"counts": []}, "iscrowd": 1},
            {"image_id": 9, "category_id": 1, "bbox": [1, 1, 3, 3], "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]]},
        ]
        kinds = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": kinds}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def make_imagenet(root: Path) -> Path:
    for split in ("train", "val"):
        for number, (one, name) in enumerate([("n01443537", "b"), ("n01440764", "a"), ("n01440764", "c")], start=1):
            picture(root / split / one / f"{split}_{name}.JPEG", number)
    xml(root / "boxes/val/val_a.xml", [("n01440764", [1, 1, 5, 5], 0), ("n01440764", [6, 6, 20, 10], 0)])
    xml(root / "boxes/n01443537/val_b.xml", [("n01443537", [2, 2, 3, 3], 0), ("n01440764", [9, 9, 10, 10], 0)])
    return root


def make_tiny_imagenet(root: Path) -> Path:
    top = root / "tiny-imagenet-200"
    top.mkdir()
    (top / "wnids.txt").write_text("n02\nn01\n")
    (top / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tfrog\nn03\tother\n")
    for one in ("n01", "n02"):
        rows = []
        for number in range(2):
            picture(top / f"train/{one}/images/{one}_{number}.JPEG", number + 1)
            rows.append(f"{one}_{number}.JPEG\t0\t1\t9\t{number + 5}")
        (top / f"train/{one}/{one}_boxes.txt").write_text("\n".join(rows) + "\n")
    for number in range(2):
        picture(top / f"val/images/val_{number}.JPEG", number + 3)
    (top / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t2\t2\t5\t6\nval_1.JPEG\tn01\t0\t0\t19\t9\n")
    return root


def make_pets(root: Path) -> Path:
    top = root / "oxford-iiit-pet"
    rows = {
        "trainval": ["Abyssinian_1 1 1 1", "american_bulldog_2 2 2 1"],
        "test": ["american_bulldog_7 2 2 1", "Abyssinian_3 1 1 1"],
    }
    (top / "annotations/trimaps").mkdir(parents=True)
    for file, lines in rows.items():
        (top / f"annotations/{file}.txt").write_text("\n".join(lines) + "\n")
        for number, line in enumerate(lines, start=1):
            name = line.split()[0]
            picture(top / f"images/{name}.jpg", number)
            trimap = np.full((10, 20), 2, np.uint8)
            trimap[2:8, 4:10], trimap[2, 4:10] = 1, 3
            Image.fromarray(trimap).save(top / f"annotations/trimaps/{name}.png")
    return root


def make_cifar10(root: Path) -> Path:
    top = root / "cifar-10-batches-py"
    top.mkdir()
    from torchvision.datasets import CIFAR10

    for name in [entry[0] for entry in (*CIFAR10.train_list, *CIFAR10.test_list)]:
        data = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)
        (top / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 0]}))
    (top / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    return root


def make_mnist(root: Path) -> Path:
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 3), ("t10k", 2)):
        pixels = bytes(i % 251 for i in range(count * 28 * 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    return root


@pytest.fixture(autouse=True)
def no_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision compares the files of CIFAR-10 with the digests of the real ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())


MAKERS = {
    "voc": make_voc, "coco": make_coco, "imagenet": make_imagenet, "tiny_imagenet": make_tiny_imagenet,
    "pets": make_pets, "cifar10": make_cifar10, "mnist": make_mnist,
}  # fmt: skip


def split(name: str, root: Path, which: str, **options: Any) -> Any:
    return DATASETS.get(name)(split=which, root=str(root), **options)


def tensor(value: Any) -> Any:
    return value.as_subclass(torch.Tensor)


def test_voc(tmp_path: Path) -> None:
    make_voc(tmp_path)
    train, test = (split("voc", tmp_path, which) for which in ("train", "test"))
    dog, person, cat, sofa = (CLASSES.index(name) for name in ("dog", "person", "cat", "sofa"))
    assert train.labels == [(dog, person), ()]  # a difficult object makes no label
    assert test.labels == [(cat, sofa), (sofa,)]
    sample = train.load(0)
    assert (int(sample.image[0, 0, 0]), sample.image.shape, train.image_id(0)) == (1, (3, 10, 20), "2008_01.jpg")
    assert sample.box.tolist() == [[0, 0, 8, 10], [10, 1, 20, 9], [2, 2, 4, 4]]
    assert sample.box_classes.tolist() == [dog, person, dog]
    assert sample.masks is None
    assert train.load(1).box.shape == (0, 4)
    masked = split("voc", tmp_path, "train", masks=True)
    assert len(masked) == 1
    found = masked.load(0)
    assert found.mask_classes.tolist() == [dog, person]
    assert found.masks.sum(dim=(1, 2)).tolist() == [8 * 10 - 1, 7 * 10]  # without the open border
    assert "person" in train.annotation(0)


def test_coco(tmp_path: Path) -> None:
    test = split("coco", make_coco(tmp_path), "test")
    assert test.classes == ["person", "car", "dog"]
    assert [test.image_id(i) for i in range(2)] == ["000000000009.jpg", "000000000010.jpg"]
    assert test.labels == [(0,), (0, 2)]  # a crowd makes no label
    sample = test.load(1)
    assert int(sample.image[0, 0, 0]) == 5
    assert sample.box.tolist() == [[2, 2, 8, 8], [10, 0, 20, 10]]
    assert sample.box_classes.tolist() == [2, 0]
    assert sample.mask_classes.tolist() == [0, 2]
    expected = torch.zeros(10, 20, dtype=torch.bool)
    expected[2:8, 2:8] = True
    assert float((tensor(sample.masks[1]) == expected).float().mean()) > 0.93  # edges of polygons
    assert bool(tensor(sample.masks[1])[3:7, 3:7].all())
    triangle = Image.new("1", (20, 10))
    ImageDraw.Draw(triangle).polygon([9.5, -0.5, 19.5, -0.5, 19.5, 9.5], fill=1)
    assert tensor(sample.masks[0]).numpy().tolist() == np.asarray(triangle).tolist()


def test_imagenet(tmp_path: Path) -> None:
    test = split("imagenet", make_imagenet(tmp_path), "test")
    assert len(test.classes) == 1000
    assert test.labels == [0, 0, 1]
    assert test.classes[0].startswith("tench")
    assert [test.image_id(i) for i in range(3)] == [
        "n01440764/val_a.JPEG",
        "n01440764/val_c.JPEG",
        "n01443537/val_b.JPEG",
    ]
    assert test.load(0).box is None
    boxed = split("imagenet", tmp_path, "test", boxes=str(tmp_path / "boxes"))
    assert [boxed.load(i).box.tolist() for i in range(3)] == [[[0, 0, 5, 5], [5, 5, 20, 10]], [], [[1, 1, 3, 3]]]
    (tmp_path / "val/cats").mkdir()
    with pytest.raises(InputError, match="cats is not named by one of the 1000 WordNet ids"):
        split("imagenet", tmp_path, "test")


def test_tiny_imagenet(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    train, test = (split("tiny_imagenet", tmp_path, which) for which in ("train", "test"))
    assert train.classes == ["goldfish, Carassius", "frog"]
    assert (train.labels, test.labels) == ([0, 0, 1, 1], [1, 0])
    assert train.load(1).box.tolist() == [[0, 1, 10, 7]]
    assert test.load(0).box.tolist() == [[2, 2, 6, 7]]
    assert [int(test.load(i).image[0, 0, 0]) for i in range(2)] == [3, 4]


def test_pets(tmp_path: Path) -> None:
    make_pets(tmp_path)
    for root in (tmp_path, tmp_path / "oxford-iiit-pet"):
        train, test = (split("pets", root, which) for which in ("train", "test"))
        assert train.classes == ["Abyssinian", "american bulldog"]
        assert (train.labels, test.labels) == ([0, 1], [1, 0])
    sample = test.load(1)
    assert int(sample.image[0, 0, 0]) == 2
    assert sample.masks.sum().item() == 5 * 6
    assert sample.box.tolist() == [[4, 3, 10, 8]]
    assert len(test.files(0)) == 2


def test_cifar10_and_mnist(tmp_path: Path) -> None:
    cifar = split("cifar10", make_cifar10(tmp_path), "train")
    assert (len(cifar), cifar.labels[:2], cifar.classes[3]) == (10, [3, 0], "class 3")
    assert cifar.load(0).image[:, 0, 1].tolist() == [1, 1024 % 256 + 1, 2048 % 256 + 1]
    mnist = split("mnist", make_mnist(tmp_path), "test")
    assert (len(mnist), mnist.labels, mnist.image_id(1)) == (2, [0, 1], "test/00001")
    assert mnist.load(1).image.shape == (3, 28, 28)
    assert mnist.load(1).image[:, 0, 3].tolist() == [(28 * 28 + 3) % 251] * 3


@pytest.mark.parametrize("name", MAKERS)
def test_the_data_module_takes_them(tmp_path: Path, name: str) -> None:
    data = DataModule(
        dataset={"name": name, "root": str(MAKERS[name](tmp_path))},
        image_size=8,
        batch_size=2,
        num_workers=0,
        val_fraction=0,
    )
    batch = next(iter(data.test_dataloader()))
    assert batch.image.shape == (2, 3, 8, 8)
    if data.multilabel:
        assert batch.label.dtype == torch.bool
        assert batch.box.shape[0] == batch.box_classes.shape[0] == 2


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_folder_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as error:
        split(name, tmp_path, "test")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_ground_truth_of_the_class_that_is_explained(tmp_path: Path) -> None:
    """Of several objects, those of the class; an image without one has none."""
    images = split("coco", make_coco(tmp_path), "test")
    batch = collate([images.load(i) for i in range(2)])
    assert batch.box.shape == (2, 2, 4)
    person, dog = (truth_of(batch, torch.full((2,), label)) for label in (0, 2))
    assert person.boxes.nan_to_num(-1).tolist() == [[[1, 1, 4, 4], [-1] * 4], [[-1] * 4, [10, 0, 20, 10]]]
    assert dog.boxes.nan_to_num(-1).tolist() == [[[-1] * 4] * 2, [[2, 2, 8, 8], [-1] * 4]]
    assert dog.mask.any(dim=(1, 2)).tolist() == [False, True]
    assert person.mask.any(dim=(1, 2)).tolist() == [True, True]
    assert person.part_masks is None


def test_boxes_of_whole_pixels_and_samples_without_one() -> None:
    box = torch.tensor([[1, 2, 3, 4]])
    batch = collate([Sample(torch.zeros(3, 8, 8), 0, 0, box), Sample(torch.zeros(3, 8, 8), 1, 1)])
    assert batch.box.nan_to_num(-1).tolist() == [[[1, 2, 3, 4]], [[-1] * 4]]


def test_real_pets(shared_pets: Path) -> None:
    """The masks of real photographs: the animal covers a part of the image, and the box is around it."""
    images = split("pets", shared_pets, "test")
    assert (len(images), images.classes) == (298, ["Abyssinian", "american bulldog", "Bengal"])
    for index in range(0, 298, 60):
        sample = images.load(index)
        share = float(tensor(sample.masks).float().mean())
        assert 0.05 < share < 0.9
        left, top, right, bottom = (int(edge) for edge in sample.box[0])
        assert sample.masks[0].sum() == sample.masks[0, top:bottom, left:right].sum()
