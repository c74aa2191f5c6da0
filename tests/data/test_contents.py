"""The keys of cached results change with every pixel and every box, and with nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from interp_models.core.errors import InputError
from interp_models.data import DATASETS, contents
from interp_models.data.contents import MEMORY, content_digests
from tests.conftest import Cub


def digests(root: Path, folder: Path | None = None) -> list[str]:
    images = DATASETS.build("cub", {"root": str(root)}, split="test")
    return content_digests(images, range(len(images)), folder)


@pytest.fixture
def root(tiny_cub: Cub, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cub.root, tmp_path / "cub"))


def picture(root: Path, number: int = 0) -> Path:
    images = DATASETS.build("cub", {"root": str(root)}, split="test")
    return images.files(number)[0]


def test_pixels_boxes_points_masks_and_class_names_count(root: Path) -> None:
    before = digests(root)
    assert len(set(before)) == len(before)
    assert digests(root) == before
    path = picture(root)
    os.utime(path, (0, 0))
    assert digests(root) == before  # another time, the same file
    image = Image.open(path)
    pixel = image.getpixel((0, 0))
    image.putpixel((0, 0), tuple(255 - value for value in pixel))  # type: ignore[union-attr]
    image.save(path, "PNG")
    changed = digests(root)
    assert [a != b for a, b in zip(before, changed, strict=True)] == [True] + [False] * (len(before) - 1)
    for name, column in (("bounding_boxes.txt", 1), ("parts/part_locs.txt", 2), ("classes.txt", 1)):
        file = root / name
        lines = [line.split() for line in file.read_text().splitlines()]
        text = file.read_text()
        lines[-1][column] = f"{float(lines[-1][column]) + 1}" if name != "classes.txt" else "003.Other"
        file.write_text("".join(" ".join(line) + "\n" for line in lines))
        assert digests(root) != changed, name
        file.write_text(text)
        assert digests(root) == changed


def test_an_unchanged_file_is_not_read_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "SETTLED", 0)
    paths = [picture(root, number) for number in range(12)]
    before = digests(root, tmp_path)
    assert before == digests(root)
    assert len(json.loads((tmp_path / MEMORY).read_text())) >= 12
    read = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: read.append(self) or real(self, *args, **kwargs))
    assert digests(root, tmp_path) == before
    assert not set(read) & set(paths)
    shutil.copyfile(paths[0], paths[3])  # its time is now: it is read, and its digest that of what it holds
    read.clear()
    after = digests(root, tmp_path)
    assert set(read) & set(paths) == {paths[3]}
    assert after[3] != before[3]
    assert after[:3] + after[4:] == before[:3] + before[4:]


def test_a_file_that_has_just_changed_is_not_remembered(root: Path, tmp_path: Path) -> None:
    """Within one tick of a clock it may change again, and keep its size and time."""
    path = picture(root)
    os.utime(path)
    state = path.stat()
    before = digests(root, tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digests(root, tmp_path)[0] != before[0]


def test_a_copy_with_its_own_time_is_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cp -p` keeps the time, and the size may be the same too."""
    monkeypatch.setattr(contents, "SETTLED", 0)
    path = picture(root)
    before, state = digests(root, tmp_path), path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "other").write_bytes(data)
    os.utime(tmp_path / "other", ns=(state.st_atime_ns, state.st_mtime_ns))
    shutil.copy2(tmp_path / "other", path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert digests(root, tmp_path)[0] != before[0]


def test_a_broken_memory_is_forgotten(root: Path, tmp_path: Path) -> None:
    before = digests(root)
    for text in ("", "[]", "{"):
        (tmp_path / MEMORY).write_text(text)
        assert digests(root, tmp_path) == before


def test_drawn_images_are_told_apart_by_their_pixels() -> None:
    def of(**options: int) -> list[str]:
        images = DATASETS.build("part_birds", {"image_size": 32, "test_per_class": 1, **options}, split="test")
        return content_digests(images, range(len(images)))

    assert of() == of(train_per_class=1)
    assert not set(of()) & set(of(seed=1))


def test_a_missing_image_is_named(root: Path) -> None:
    assert len(digests(root)) == 12
    path = picture(root, 5)
    path.unlink()
    with pytest.raises(InputError, match=f"image {path} is missing"):
        digests(root)
