import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from interp_models.core.errors import InputError
from interp_models.data import cub
from interp_models.data.base import DATASETS, Sample, decode_image
from interp_models.data.cub import CUB
from tests.data.make_cub import PARTS, make_cub

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "cub"


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def box_of(sample: Sample) -> torch.Tensor:
    assert sample.box is not None
    return sample.box.as_subclass(torch.Tensor)


# The lists


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_record_is_as_written(tmp_path: Path, split: Any) -> None:
    birds = [bird for bird in make_cub(tmp_path) if bird.train == (split == "train")]
    images = CUB(split=split, root=str(tmp_path))
    assert len(images) == len(birds) == 6
    assert [images.image_id(index) for index in range(6)] == [bird.path for bird in birds]
    assert images.labels == [0, 0, 1, 1, 2, 2]
    assert images.classes == ["001.Kind_1", "002.Kind_2", "003.Kind_3"]
    assert images.part_names == PARTS
    assert images.part_names[6] == "left eye"
    for index, bird in enumerate(birds):
        sample = images.load(index)
        x, y, width, height = bird.box
        assert (sample.label, sample.index) == (bird.label, index)
        assert isinstance(sample.image, tv_tensors.Image)
        assert sample.image.shape == (3, *bird.size)
        assert isinstance(sample.box, tv_tensors.BoundingBoxes)
        assert sample.box.format == tv_tensors.BoundingBoxFormat.XYXY
        assert isinstance(sample.parts, tv_tensors.KeyPoints)
        assert sample.box.canvas_size == sample.parts.canvas_size == bird.size
        assert sample.box.tolist() == [[x, y, x + width, y + height]]
        assert torch.equal(sample.parts.as_subclass(torch.Tensor), torch.tensor(bird.parts))
        assert sample.visible is not None
        assert sample.visible.tolist() == bird.visible
        assert sample.masks is None
    assert images.mask_names == ()


def test_generated_birds_vary(tmp_path: Path) -> None:
    """The trees above would prove little if all sizes were one or all parts visible."""
    birds = make_cub(tmp_path)
    assert len({bird.size for bird in birds}) > 6
    assert len({bird.box for bird in birds}) == len(birds)
    assert 0.4 < np.mean([bird.visible for bird in birds]) < 0.9


def test_box_frames_the_bird(tmp_path: Path) -> None:
    """Coordinates are x before y: inside the box the image is even, around it noise."""
    make_cub(tmp_path)
    images = CUB(split="train", root=str(tmp_path))
    for index in range(len(images)):
        sample = images.load(index)
        assert sample.box is not None
        left, top, right, bottom = (int(edge) for edge in sample.box[0])
        inside = sample.image[:, top + 1 : bottom - 1, left + 1 : right - 1].float()
        assert inside.flatten(1).std(1).max() < 12
        assert sample.image.float().flatten(1).std(1).min() > 40


def test_root_may_be_the_parent(tmp_path: Path) -> None:
    birds = make_cub(tmp_path / "CUB_200_2011")
    images = DATASETS.build("cub", {"root": str(tmp_path)}, split="test")
    assert [images.image_id(index) for index in range(len(images))] == [bird.path for bird in birds if not bird.train]


def test_order_is_that_of_images_txt(tmp_path: Path) -> None:
    """Lists are joined by id, not by line."""
    birds = make_cub(tmp_path)
    for name in ("images.txt", "parts/part_locs.txt"):
        edit(tmp_path / name, lambda lines: lines[::-1])
    images = CUB(split="train", root=str(tmp_path))
    birds = [bird for bird in birds[::-1] if bird.train]
    assert [images.image_id(index) for index in range(6)] == [bird.path for bird in birds]
    assert images.labels == [2, 2, 1, 1, 0, 0]
    sample = images.load(0)
    assert sample.visible is not None
    assert sample.visible.tolist() == birds[0].visible
    assert sample.box is not None
    assert sample.box[0, :2].tolist() == list(birds[0].box[:2])


def test_labels_count_the_classes_present(tmp_path: Path) -> None:
    """A subset keeps the official class ids; a class with images in one split only has its label in both."""
    make_cub(tmp_path, classes=4)
    # Of 16 images keep the 2nd class whole (ids 5 to 8) and of the 4th (13 to 16) a test image.
    edit(tmp_path / "images.txt", lambda lines: [*lines[4:8], lines[13]])
    train, test = (CUB(split=split, root=str(tmp_path)) for split in ("train", "test"))
    assert train.classes == test.classes == ["002.Kind_2", "004.Kind_4"]
    assert train.labels == [0, 0]
    assert test.labels == [0, 0, 1]


def test_labels_follow_the_order_of_classes_txt(tmp_path: Path) -> None:
    make_cub(tmp_path)
    edit(tmp_path / "classes.txt", lambda lines: lines[::-1])
    images = CUB(split="train", root=str(tmp_path))
    assert images.classes == ["003.Kind_3", "002.Kind_2", "001.Kind_1"]
    assert images.labels == [2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "classes",
    [[3, 1], ["003.Kind_3", "001.Kind_1"], ["Kind_1", 3], ["1", "3"]],
    ids=["numbers", "names", "both", "text"],
)
def test_some_classes(tmp_path: Path, classes: list[Any]) -> None:
    """Labels count those that are taken, in the order of classes.txt."""
    birds = [bird for bird in make_cub(tmp_path) if bird.train and bird.label != 1]
    images = DATASETS.build("cub", {"root": str(tmp_path), "classes": classes}, split="train")
    assert images.classes == ["001.Kind_1", "003.Kind_3"]
    assert [images.image_id(index) for index in range(len(images))] == [bird.path for bird in birds]
    assert images.labels == [0, 0, 1, 1]
    for index, bird in enumerate(birds):
        assert torch.equal(images.load(index).parts.as_subclass(torch.Tensor), torch.tensor(bird.parts))


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["Kind_4"], "unknown class in data.dataset.classes: 'Kind_4'; did you mean '003.Kind_3'"),
        ([4], "unknown class in data.dataset.classes: '4'"),
        ([1, "Kind_1"], "data.dataset.classes must name some classes, each once; got 1, Kind_1"),
        ([], "data.dataset.classes must name some classes, each once; got none"),
        (2, "dataset 'cub'.classes: "),
    ],
)
def test_classes_that_are_none(tmp_path: Path, classes: Any, says: str) -> None:
    make_cub(tmp_path)
    with pytest.raises(InputError) as error:
        DATASETS.build("cub", {"root": str(tmp_path), "classes": classes}, split="train")
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    birds = make_cub(tmp_path)
    for path in tmp_path.rglob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    images = CUB(split="train", root=str(tmp_path))
    assert images.part_names == PARTS
    assert images.classes[2] == "003.Kind_3"
    assert images.load(1).image.shape == (3, *birds[2].size)


def test_part_outside_the_image_is_not_visible(tmp_path: Path) -> None:
    bird = make_cub(tmp_path)[0]
    edit(tmp_path / "parts/part_locs.txt", lambda lines: [lines[0], f"1 2 {bird.size[1] + 3}.0 5.0 1", *lines[2:]])
    sample = CUB(split="train", root=str(tmp_path)).load(0)
    assert sample.visible is not None
    assert sample.visible.tolist() == [bird.visible[0], False, *bird.visible[2:]]


def test_samples_do_not_share_memory_with_the_data_set(tmp_path: Path) -> None:
    make_cub(tmp_path)
    images = CUB(split="train", root=str(tmp_path))
    first = images.load(0)
    expected = [value.tolist() for value in first[3:] if value is not None]
    for value in (first.box, first.parts, first.visible):
        assert value is not None
        value.zero_()
    assert [value.tolist() for value in images.load(0)[3:] if value is not None] == expected


# Masks


@pytest.mark.parametrize("place", ["CUB_200_2011/segmentations", "segmentations"])
def test_masks_are_the_majority(tmp_path: Path, place: str) -> None:
    birds = [bird for bird in make_cub(tmp_path / "CUB_200_2011", segmentations=True) if bird.train]
    (tmp_path / "CUB_200_2011/segmentations").rename(tmp_path / place)
    images = CUB(split="train", root=str(tmp_path))
    assert images.mask_names == ("bird",)
    for index, bird in enumerate(birds):
        expected = torch.zeros(1, *bird.size, dtype=torch.bool)
        expected[:, bird.rows, bird.columns] = True
        masks = images.load(index).masks
        assert isinstance(masks, tv_tensors.Mask)
        assert torch.equal(masks.as_subclass(torch.Tensor), expected)


def test_mask_threshold_and_alpha(tmp_path: Path) -> None:
    """127 is not yet a majority; masks with an alpha channel count by their grey."""
    bird = make_cub(tmp_path, segmentations=True)[0]
    grey = np.zeros((*bird.size, 2), dtype=np.uint8)
    grey[0, :2, 0] = 127, 128
    Image.fromarray(grey, "LA").save((tmp_path / "segmentations" / bird.path).with_suffix(".png"))
    masks = CUB(split="train", root=str(tmp_path)).load(0).masks
    assert masks is not None
    assert masks.nonzero().tolist() == [[0, 0, 1]]


def test_missing_or_misfit_mask_is_named(tmp_path: Path) -> None:
    birds = [bird for bird in make_cub(tmp_path, segmentations=True) if bird.train]
    images = CUB(split="train", root=str(tmp_path))
    first, second = ((tmp_path / "segmentations" / bird.path).with_suffix(".png") for bird in birds[:2])
    first.unlink()
    Image.new("L", (7, 5)).save(second)
    with pytest.raises(InputError, match=f"{first.name} is missing"):
        images.load(0)
    with pytest.raises(InputError, match=rf"{second.name} is 7x5 pixels, but its image is \d+x\d+$"):
        images.load(1)


# Errors in the lists


def assert_one_line(error: pytest.ExceptionInfo[InputError], *parts: object) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.mark.parametrize("name", cub.CONTENTS)
def test_missing_list_is_named(tmp_path: Path, name: str) -> None:
    make_cub(tmp_path / "CUB_200_2011")
    path = tmp_path / "CUB_200_2011" / name
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(InputError) as error:
        CUB(split="train", root=str(tmp_path))
    assert_one_line(error, f"{path} is missing", "parts/part_locs.txt", "download=true")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        CUB(split="train", root=str(tmp_path / "none"))
    assert_one_line(error, tmp_path / "none", "images.txt", "download=true")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("images.txt", "3"),
        ("images.txt", "three a.jpg"),
        ("image_class_labels.txt", "3 1 1"),
        ("train_test_split.txt", "3 2"),
        ("bounding_boxes.txt", "3 1.0 2.0 3.0"),
        ("bounding_boxes.txt", "3 1.0 2.0 3.0 4.0 5.0"),
        ("bounding_boxes.txt", "3 1.0 nan 3.0 4.0"),
        ("bounding_boxes.txt", "3 1.0 2.0 0.0 4.0"),
        ("bounding_boxes.txt", "3 1,0 2.0 3.0 4.0"),
        ("classes.txt", "3"),
        ("parts/parts.txt", "breast"),
        ("parts/part_locs.txt", "1 3 1.0 inf 1"),
        ("parts/part_locs.txt", "1 3 1.0 1.0 yes"),
        ("parts/part_locs.txt", "\x00\x8e\x01"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, name: str, line: str) -> None:
    make_cub(tmp_path)
    edit(tmp_path / name, lambda lines: [*lines[:2], line, *lines[3:]])
    with pytest.raises(InputError) as error:
        CUB(split="train", root=str(tmp_path))
    assert_one_line(error, f"{tmp_path / name}, line 3: expected '", repr(line))


def test_repeated_line_is_named(tmp_path: Path) -> None:
    make_cub(tmp_path)
    edit(tmp_path / "train_test_split.txt", lambda lines: [*lines, "2 1"])
    with pytest.raises(InputError, match=r"train_test_split.txt, line 13: a second line for 2$"):
        CUB(split="train", root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("image_class_labels.txt", "12"),
        ("train_test_split.txt", "12"),
        ("bounding_boxes.txt", "12"),
        ("classes.txt", "3"),
        ("parts/part_locs.txt", "12 15"),
    ],
)
def test_record_missing_from_a_list_is_named(tmp_path: Path, name: str, ids: str) -> None:
    make_cub(tmp_path)
    edit(tmp_path / name, lambda lines: lines[:-1])
    with pytest.raises(InputError) as error:
        CUB(split="test", root=str(tmp_path))
    assert_one_line(error, f"{tmp_path / name} has no line for {ids},")


# Image files


def stored_as(tmp_path: Path, save: Callable[[io.BytesIO], None]) -> Sample:
    """The first training image of a tree, with other contents in its file."""
    bird = make_cub(tmp_path)[0]
    stream = io.BytesIO()
    save(stream)
    (tmp_path / "images" / bird.path).write_bytes(stream.getvalue())
    return CUB(split="train", root=str(tmp_path)).load(0)


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 10, 255])
    image.putpixel((1, 0), 1)
    return image


RAMP16 = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)


@pytest.mark.parametrize(
    ("mode", "image", "form", "expected"),
    [
        ("1", Image.fromarray(np.array([[False, True]])), "PNG", [[0, 255]] * 3),
        ("L", Image.fromarray(np.array([[7, 200]], dtype=np.uint8)), "PNG", [[7, 200]] * 3),
        ("LA", Image.merge("LA", [Image.new("L", (2, 1), 9), Image.new("L", (2, 1), 0)]), "PNG", [[9, 9]] * 3),
        ("P", palette(), "PNG", [[255, 0], [0, 10], [0, 255]]),
        ("RGBA", Image.new("RGBA", (2, 1), (10, 20, 30, 0)), "PNG", [[10, 10], [20, 20], [30, 30]]),
        ("CMYK", Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF", [[255, 255], [0, 0], [0, 0]]),
        pytest.param(
            "I;16",
            Image.fromarray(RAMP16),
            "PNG",
            [[0, 1, 128, 255]] * 3,
        ),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, image: Image.Image, form: str, expected: Any) -> None:
    assert image.mode == mode
    sample = stored_as(tmp_path, lambda stream: image.save(stream, form))
    assert sample.image.dtype == torch.uint8
    assert sample.image.tolist() == [[channel] for channel in expected]


def test_grey_jpeg_and_16_bit_have_three_channels_of_bytes(tmp_path: Path) -> None:
    grey = stored_as(tmp_path, lambda stream: Image.new("L", (5, 3), 77).save(stream, "JPEG"))
    assert grey.image.tolist() == [[[77] * 5] * 3] * 3
    deep = stored_as(tmp_path, lambda stream: Image.fromarray(RAMP16).save(stream, "PNG"))
    assert (deep.image.dtype, deep.image.shape) == (torch.uint8, (3, 1, 4))


def test_corrupt_and_missing_images_are_named(tmp_path: Path) -> None:
    birds = [bird for bird in make_cub(tmp_path) if bird.train]
    images = CUB(split="train", root=str(tmp_path))
    files = [tmp_path / "images" / bird.path for bird in birds]
    files[0].write_bytes(b"\xff\xd8 this is no image")
    files[1].write_bytes(files[1].read_bytes()[: files[1].stat().st_size // 2])
    files[2].write_bytes(b"")
    files[3].unlink()
    for index in range(4):
        with pytest.raises(InputError) as error:
            images.load(index)
        assert_one_line(error, files[index], "missing" if index == 3 else "cannot be decoded")
    assert images.load(4).image.shape == (3, *birds[4].size)


# Download


class Served:
    """Archives of a generated tree on a local server, the requests it got, and the tree's birds."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.birds = make_cub(folder / "tree/CUB_200_2011", segmentations=True)
        (folder / "tree/CUB_200_2011/segmentations").rename(folder / "tree/segmentations")
        (folder / "tree/attributes.txt").write_text("the official archive has this file beside the folder\n")
        self.fetched: set[str] = set()
        for archive, names, constant in (
            ("CUB_200_2011.tgz", ["attributes.txt", "CUB_200_2011"], "IMAGES"),
            ("segmentations.tgz", ["segmentations"], "SEGMENTATIONS"),
        ):
            with tarfile.open(folder / archive, "w:gz") as tar:
                for name in names:
                    tar.add(folder / "tree" / name, name)
            md5 = hashlib.md5((folder / archive).read_bytes()).hexdigest()
            monkeypatch.setattr(cub, f"{constant}_MD5", md5)
        served = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                served.fetched.add(self.path)
                super().do_GET()

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Torchvision leaves the request by which it looks for redirects unread."""

        self.server = Server(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True)
        self.thread.start()
        base = f"http://127.0.0.1:{self.server.server_port}"
        monkeypatch.setattr(cub, "IMAGES_URL", f"{base}/CUB_200_2011.tgz")
        monkeypatch.setattr(cub, "SEGMENTATIONS_URL", f"{base}/segmentations.tgz")

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def check(self, root: Path) -> None:
        """The data set in `root` is the whole tree, and nothing else is left there."""
        images = CUB(split="test", root=str(root))
        expected = [bird for bird in self.birds if not bird.train]
        assert [images.image_id(index) for index in range(len(images))] == [bird.path for bird in expected]
        for index, bird in enumerate(expected):
            sample = images.load(index)
            assert torch.equal(sample.image, decode_image(self.folder / "tree/CUB_200_2011/images" / bird.path))
            assert sample.masks is not None
            size = (bird.rows.stop - bird.rows.start) * (bird.columns.stop - bird.columns.start)
            assert sample.masks.sum() == size
        assert [path.name for path in root.iterdir()] == ["CUB_200_2011"]
        assert not list((root / "CUB_200_2011").glob("*.partial"))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    server = Served(tmp_path / "served", monkeypatch)
    yield server
    server.close()


def test_download_brings_images_and_masks(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "new/root"
    CUB(split="train", root=str(root), download=True)
    progress = capsys.readouterr().err
    assert progress.count("100%") == 2
    served.check(root)
    assert served.fetched == {"/CUB_200_2011.tgz", "/segmentations.tgz"}
    served.fetched.clear()
    CUB(split="train", root=str(root), download=True)
    assert not served.fetched


def test_download_fetches_only_what_is_not_there(served: Served, tmp_path: Path) -> None:
    make_cub(tmp_path / "mine")
    images = CUB(split="train", root=str(tmp_path / "mine"), download=True)
    assert served.fetched == {"/segmentations.tgz"}
    assert images.mask_names == ("bird",)
    images.load(0)


@pytest.mark.parametrize("constant", ["IMAGES_MD5", "SEGMENTATIONS_MD5"])
def test_wrong_checksum(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    root = tmp_path / "root"
    with monkeypatch.context() as patch:
        patch.setattr(cub, constant, "0" * 32)
        with pytest.raises(InputError) as error:
            CUB(split="train", root=str(root), download=True)
    assert_one_line(error, getattr(cub, constant.replace("MD5", "URL")), "0" * 32, "corrupted")
    assert not (root / "CUB_200_2011/segmentations").exists()
    CUB(split="train", root=str(root), download=True)
    served.check(root)


def test_truncated_download_is_fetched_again(served: Served, tmp_path: Path) -> None:
    archive = served.folder / "CUB_200_2011.tgz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="corrupted"):
        CUB(split="train", root=str(tmp_path / "root"), download=True)
    archive.write_bytes(whole)
    CUB(split="train", root=str(tmp_path / "root"), download=True)
    served.check(tmp_path / "root")


def test_unreachable_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cub, "IMAGES_URL", (tmp_path / "none/CUB_200_2011.tgz").as_uri())
    with pytest.raises(InputError) as error:
        CUB(split="train", root=str(tmp_path / "root"), download=True)
    assert_one_line(error, cub.IMAGES_URL, tmp_path / "root/CUB_200_2011")


@pytest.mark.parametrize("stop", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("written", [3, 12 + 7 + 1 + 3])  # in the first archive, then in the second
def test_interrupted_extraction_is_not_taken_as_complete(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, written: int
) -> None:
    root = tmp_path / "root"
    makefile = tarfile.TarFile.makefile
    files: list[Any] = []

    def stopping(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        files.append(path)
        if len(files) > written:
            raise stop
        makefile(tar, member, path)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", stopping)
        with pytest.raises(InputError if isinstance(stop, OSError) else KeyboardInterrupt):
            CUB(split="train", root=str(root), download=True)
    assert len(files) == written + 1
    if written == 3:
        with pytest.raises(InputError, match="is missing"):
            CUB(split="train", root=str(root))
    else:
        assert CUB(split="train", root=str(root)).mask_names == ()
    served.fetched.clear()
    CUB(split="train", root=str(root), download=True)
    served.check(root)
    # The archive that was being unpacked is whole and is not fetched again.
    assert served.fetched == ({"/segmentations.tgz"} if written == 3 else set())


# The real images


@pytest.fixture(scope="module")
def real() -> dict[str, CUB]:
    if not REAL.is_dir():
        pytest.skip("the real images are not beside the repository (shared/data/cub)")
    return {"train": CUB(split="train", root=str(REAL)), "test": CUB(split="test", root=str(REAL))}


def test_real_counts(real: dict[str, CUB]) -> None:
    assert (len(real["train"]), len(real["test"])) == (750, 652)
    for images in real.values():
        assert len(images.classes) == 25
        assert images.classes[16] == "017.Cardinal"
        assert set(images.labels) == set(range(25))
        assert all(
            images.image_id(index).startswith(f"{images.classes[label]}/") for index, label in enumerate(images.labels)
        )
    assert real["train"].labels.count(0) == 30


def test_real_parts_lie_in_their_boxes(real: dict[str, CUB]) -> None:
    visible_parts = 0
    for images in real.values():
        for index in range(len(images)):
            sample = images.load(index)
            assert sample.box is not None
            assert sample.parts is not None
            assert sample.visible is not None
            left, top, right, bottom = sample.box[0].tolist()
            x, y = sample.parts.as_subclass(torch.Tensor)[sample.visible].unbind(-1)
            visible_parts += len(x)
            assert ((x >= left - 2) & (x <= right + 2) & (y >= top - 2) & (y <= bottom + 2)).all(), index
    # None was hidden for lying outside its image.
    assert visible_parts == sum(line.endswith(" 1") for line in (REAL / "parts/part_locs.txt").read_text().splitlines())


def test_real_record_read_by_hand(real: dict[str, CUB]) -> None:
    """Image 2 of the lists: 381x256 pixels, box 105.9 22.9 116.6 201.1, belly, left eye and both legs not visible."""
    assert real["train"].image_id(0) == "001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg"
    sample = real["train"].load(0)
    assert sample.image.shape == (3, 256, 381)
    assert sample.label == 0
    assert sample.parts is not None
    assert sample.visible is not None
    torch.testing.assert_close(box_of(sample), torch.tensor([[105.9, 22.9, 222.5, 224.0]]))
    names = real["train"].part_names
    shown = dict(zip(names, sample.visible.tolist(), strict=True))
    assert [name for name, visible in shown.items() if not visible] == ["belly", "left eye", "left leg", "right leg"]
    spots = dict(zip(names, sample.parts.as_subclass(torch.Tensor), strict=True))
    torch.testing.assert_close(spots["back"], torch.tensor([173.7, 105.1]))
    torch.testing.assert_close(spots["throat"], torch.tensor([198.1, 118.1]))


def test_real_boxes_by_another_parse(real: dict[str, CUB]) -> None:
    lines = np.loadtxt(REAL / "bounding_boxes.txt")
    training = np.loadtxt(REAL / "train_test_split.txt")[:, 1] == 1
    for split, rows in (("train", lines[training]), ("test", lines[~training])):
        boxes = np.array([box_of(real[split].load(index))[0].tolist() for index in range(0, len(rows), 50)])
        expected = np.column_stack([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:]])[::50]
        np.testing.assert_allclose(boxes, expected, rtol=1e-6)
