"""Aircraft, cars and indoor scenes, each on a generated tree in its official layout."""

import functools
import os
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from interp_models.core.errors import InputError
from interp_models.data.aircraft import Aircraft
from interp_models.data.base import DATASETS, ImageDataset
from interp_models.data.cars import Cars
from interp_models.data.mit67 import MIT67
from interp_models.data.module import DataModule


def picture(path: Path, number: int) -> None:
    """20 × 10 pixels whose red channel is the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (number, 50, 90)).save(path, "PNG")  # whatever its ending says


def make_aircraft(root: Path) -> Path:
    """Five images, numbers 1 to 5; variants 707-320 and F/A-18 of two families."""
    data = root / "fgvc-aircraft-2013b" / "data"
    labels = {"0000001": "F/A-18", "0000002": "707-320", "0000003": "F/A-18", "0000004": "707-320", "0000005": "F/A-18"}
    for name in labels:
        picture(data / "images" / f"{name}.jpg", int(name))
    (data / "variants.txt").write_text("707-320\nF/A-18\n")
    (data / "families.txt").write_text("Boeing 707\nF/A-18\n")
    (data / "manufacturers.txt").write_text("Boeing\nMcDonnell Douglas\n")
    family = {"F/A-18": "F/A-18", "707-320": "Boeing 707"}
    for split, names in (("trainval", ["0000003", "0000002", "0000004"]), ("test", ["0000005", "0000001"])):
        (data / f"images_variant_{split}.txt").write_text("".join(f"{name} {labels[name]}\n" for name in names))
        (data / f"images_family_{split}.txt").write_text("".join(f"{name} {family[labels[name]]}\n" for name in names))
    (data / "images_box.txt").write_text("".join(f"{name} {int(name)} 2 10 9\n" for name in labels))
    return root


def make_cars(root: Path) -> Path:
    """Three images to train on, two to test; the lists are as the authors' toolbox writes them."""
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"], dtype=object)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    kind = [("bbox_x1", "O"), ("bbox_y1", "O"), ("bbox_x2", "O"), ("bbox_y2", "O"), ("class", "O"), ("fname", "O")]
    for split, file, rows in (
        ("cars_train", "devkit/cars_train_annos.mat", [(1, 2, 10, 9, 2, 1), (3, 1, 20, 10, 1, 2), (2, 2, 5, 5, 2, 3)]),
        ("cars_test", "cars_test_annos_withlabels.mat", [(1, 1, 4, 4, 1, 4), (5, 5, 6, 6, 2, 5)]),
    ):
        for row in rows:
            picture(folder / split / f"{row[-1]:05d}.jpg", row[-1])
        annotations = np.array([(*row[:5], f"{row[5]:05d}.jpg") for row in rows], dtype=kind)
        savemat(folder / file, {"annotations": annotations})
    return root


def make_mit67(root: Path) -> Path:
    lists = {"TrainImages.txt": ["bar/b.jpg", "attic/1 a.jpg"], "TestImages.txt": ["attic/2.jpg", "bar/3.jpg"]}
    for number, name in enumerate(lists["TrainImages.txt"] + lists["TestImages.txt"], start=1):
        picture(root / "Images" / name, number)
    for file, names in lists.items():
        (root / file).write_text("\n".join(names) + "\n")
    return root


def told(images: ImageDataset) -> list[tuple[str, str, int, list[float] | None]]:
    """Of every image its name, its class, its number by its colour, and its box."""
    found = []
    for index in range(len(images)):
        sample = images.load(index)
        assert sample.image.shape == (3, 10, 20)
        assert sample.index == index
        assert sample.label == images.labels[index]
        box = None if sample.box is None else torch.Tensor(sample.box).flatten().tolist()
        found.append((images.image_id(index), images.classes[sample.label], int(sample.image[0, 0, 0]), box))
    return found


def test_aircraft(tmp_path: Path) -> None:
    root = str(make_aircraft(tmp_path))
    assert told(Aircraft(split="train", root=root)) == [
        ("0000003.jpg", "F-A-18", 3, [2.0, 1.0, 10.0, 9.0]),
        ("0000002.jpg", "707-320", 2, [1.0, 1.0, 10.0, 9.0]),
        ("0000004.jpg", "707-320", 4, [3.0, 1.0, 10.0, 9.0]),
    ]
    assert [row[:3] for row in told(Aircraft(split="test", root=root, level="family"))] == [
        ("0000005.jpg", "F-A-18", 5),
        ("0000001.jpg", "F-A-18", 1),
    ]


def test_cars(tmp_path: Path) -> None:
    root = str(make_cars(tmp_path))
    assert told(Cars(split="train", root=root)) == [
        ("cars_train/00001.jpg", "Ram C-V Cargo Van Minivan 2012", 1, [0.0, 1.0, 10.0, 9.0]),
        ("cars_train/00002.jpg", "AM General Hummer SUV 2000", 2, [2.0, 0.0, 20.0, 10.0]),
        ("cars_train/00003.jpg", "Ram C-V Cargo Van Minivan 2012", 3, [1.0, 1.0, 5.0, 5.0]),
    ]
    assert [row[:3] for row in told(Cars(split="test", root=root))] == [
        ("cars_test/00004.jpg", "AM General Hummer SUV 2000", 4),
        ("cars_test/00005.jpg", "Ram C-V Cargo Van Minivan 2012", 5),
    ]


def test_mit67(tmp_path: Path) -> None:
    root = str(make_mit67(tmp_path))
    assert told(MIT67(split="train", root=root)) == [("bar/b.jpg", "bar", 1, None), ("attic/1 a.jpg", "attic", 2, None)]
    assert told(MIT67(split="test", root=root)) == [("attic/2.jpg", "attic", 3, None), ("bar/3.jpg", "bar", 4, None)]


MAKERS = {"aircraft": make_aircraft, "cars": make_cars, "mit67": make_mit67}


@pytest.mark.parametrize("name", MAKERS)
def test_the_data_module_takes_them(tmp_path: Path, name: str) -> None:
    root = MAKERS[name](tmp_path)
    data = DataModule(
        dataset={"name": name, "root": str(root)}, image_size=8, batch_size=2, num_workers=0, val_fraction=0
    )
    batch = next(iter(data.test_dataloader()))
    assert batch.image.shape == (2, 3, 8, 8)
    assert (batch.box is None) == (name == "mit67")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    root = make_mit67(tmp_path)
    folder = b"caf\xe9"
    (root / "Images" / os.fsdecode(folder)).mkdir()
    os.rename(root / "Images/bar/b.jpg", root / "Images" / os.fsdecode(folder) / "b.jpg")
    (root / "TrainImages.txt").write_bytes(folder + b"/b.jpg\nattic/1 a.jpg\n")
    images = MIT67(split="train", root=str(root))
    assert images.classes == ["attic", "bar", r"caf\xe9"]
    assert told(images)[0][:3] == (r"caf\xe9/b.jpg", r"caf\xe9", 1)


@pytest.mark.parametrize(
    ("name", "gone", "says"),
    [
        ("aircraft", "fgvc-aircraft-2013b", "must hold fgvc-aircraft-2013b/data with images"),
        ("aircraft", "fgvc-aircraft-2013b/data/images_box.txt", "images_box.txt"),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt", "images_variant_test.txt"),
        ("cars", "stanford_cars/devkit/cars_meta.mat", "cars_meta.mat is missing"),
        ("cars", "stanford_cars/cars_test", "cars_test is missing"),
        ("mit67", "TestImages.txt", "TestImages.txt is missing"),
        ("mit67", "Images", "Images is missing"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, gone: str, says: str) -> None:
    root = MAKERS[name](tmp_path / "data")
    (root / gone).rename(tmp_path / "gone")
    with pytest.raises(InputError, match=says) as error:
        DATASETS.build(name, {"root": str(root)}, split="test")
    assert "\n" not in str(error.value)


def test_a_malformed_list_is_named(tmp_path: Path) -> None:
    from scipy.io import savemat

    root = make_mit67(tmp_path / "a")
    (root / "TrainImages.txt").write_text("kitchen.jpg\n")
    with pytest.raises(InputError, match=r"TrainImages.txt names 'kitchen.jpg'; expected <class>/<image>"):
        MIT67(split="test", root=str(root))
    root = make_cars(tmp_path / "c")
    meta = root / "stanford_cars/devkit/cars_meta.mat"
    meta.write_text("<html>moved</html>")
    with pytest.raises(InputError, match=r"Stanford Cars: the lists of .* cannot be read"):
        Cars(split="test", root=str(root))
    savemat(meta, {"class_names": ["a", "b"]}, do_compression=True)  # as the official ones are
    meta.write_bytes(meta.read_bytes()[:150] + b"junk")
    with pytest.raises(InputError, match=r"Stanford Cars: the lists of .* cannot be read"):
        Cars(split="test", root=str(root))
    savemat_7_3 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    meta.write_bytes(savemat_7_3.ljust(600, b"\0"))
    with pytest.raises(InputError, match=r"Stanford Cars: the lists of .* cannot be read"):
        Cars(split="test", root=str(root))
    root = make_mit67(tmp_path / "d")
    (root / "TrainImages.txt").unlink()
    (root / "TrainImages.txt").mkdir()
    with pytest.raises(InputError, match=r"MIT Indoor: the lists of .* cannot be read"):
        MIT67(split="test", root=str(root))
    root = make_aircraft(tmp_path / "b")
    boxes = root / "fgvc-aircraft-2013b/data/images_box.txt"
    boxes.write_text(boxes.read_text() + "\n")  # a blank line is none
    assert len(Aircraft(split="test", root=str(root))) == 2
    boxes.write_text("".join(boxes.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="has no line for image 0000001"):
        Aircraft(split="test", root=str(root))


def test_aircraft_can_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a local stand-in of the authors' server."""
    source = make_aircraft(tmp_path / "source")
    with tarfile.open(tmp_path / "fgvc-aircraft-2013b.tar.gz", "w:gz") as tar:
        tar.add(source / "fgvc-aircraft-2013b", "fgvc-aircraft-2013b")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/fgvc-aircraft-2013b.tar.gz"
    monkeypatch.setattr("interp_models.data.aircraft.URL", url)
    options: Any = {"root": str(tmp_path / "new"), "download": True}
    archive = tmp_path / "fgvc-aircraft-2013b.tar.gz"
    everything = archive.read_bytes()
    try:
        archive.write_bytes(everything[: len(everything) // 2])  # a broken transfer: the next one begins anew
        with pytest.raises(InputError, match="cannot download"):
            DATASETS.build("aircraft", options, split="train")
        archive.write_bytes(everything)
        assert len(DATASETS.build("aircraft", options, split="train")) == 3
    finally:
        server.shutdown()
