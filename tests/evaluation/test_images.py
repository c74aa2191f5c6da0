"""Images to judge: numbers, digests, and refusals in one line; each refusal first shows that the right thing passes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from interp_models.core.errors import InputError
from interp_models.evaluation.images import Images, images_of

MODEL = nn.Conv2d(3, 2, 1)
PIXELS = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(PIXELS, torch.arange(5))


def read(images: Any, **options: Any) -> Tensor:
    """All images in order of their indices."""
    batches = list(images_of(images, MODEL, **options).batches())
    return torch.cat([batch.image for batch in batches])[torch.cat([batch.index for batch in batches]).argsort()]


class Once(IterableDataset[Tensor]):
    def __init__(self) -> None:
        self.items = iter(PIXELS)

    def __iter__(self) -> Iterator[Tensor]:
        return self.items


class Again(Once):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(PIXELS)


class NoLength(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return PIXELS[index]


class Reversed(BatchSampler):
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[4, 3], [2, 1], [0]])


def test_the_digest_tells_shapes_types_names_and_classes_apart() -> None:
    def digest(pixels: Tensor, classes: str = "ab", names: Any = None) -> str:
        data = DataLoader(TensorDataset(pixels), batch_size=2)
        return Images(data, range(len(pixels)), classes=classes, names=names).digest()

    pixels = torch.zeros(4, 3, 8, 16)
    assert digest(pixels) == digest(pixels.clone())
    others = [digest(pixels.reshape(4, 3, 16, 8)), digest(pixels, "ac"), digest(pixels, names="{}.png".format)]
    others += [digest(pixels.bfloat16()), digest(pixels.half())]
    assert len({digest(pixels), *others}) == 6


def test_only_known_orders_number_images() -> None:
    assert torch.equal(read(DataLoader(DATA, batch_size=2)), PIXELS)
    plain = DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 2, False))
    assert images_of(plain, MODEL).count == 5
    custom = DataLoader(DATA, batch_sampler=Reversed(SequentialSampler(DATA), 2, False))
    assert images_of(custom, MODEL).count is None
    assert torch.equal(read(custom), PIXELS.flip(0))  # numbered by position
    for sampler in (RandomSampler(DATA), SubsetRandomSampler(range(5)), WeightedRandomSampler([1.0] * 5, 5)):
        for loader in (
            DataLoader(DATA, sampler=sampler),
            DataLoader(DATA, batch_sampler=BatchSampler(sampler, 2, False)),
        ):
            with pytest.raises(InputError, match="the loader shuffles"):
                images_of(loader, MODEL)


def test_the_first_batch_is_not_lost() -> None:
    for data in (Again(), Once()):
        images = images_of(data, MODEL, batch_size=2)
        first = images.first()
        assert first is not None
        assert torch.equal(first.image, PIXELS[:2])
        assert torch.equal(torch.cat([batch.image for batch in images.batches()]), PIXELS)
    again = images_of(Again(), MODEL, batch_size=2)
    again.first()
    again.digest()
    assert torch.equal(torch.cat([batch.image for batch in again.batches()]), PIXELS)
    once = images_of(Once(), MODEL, batch_size=2)
    once.first()
    with pytest.raises(InputError, match="can be read only once"):
        once.digest()


def test_no_image_is_left_out() -> None:
    assert len(read(DataLoader(DATA, batch_size=5, drop_last=True))) == 5
    with pytest.raises(InputError, match="drop_last=False"):
        images_of(DataLoader(DATA, batch_size=2, drop_last=True), MODEL)


def test_two_ranks_of_a_distributed_sampler_draw_together() -> None:
    drawn: list[int] = []
    for rank in range(2):
        sampler: Any = DistributedSampler(DATA, num_replicas=2, rank=rank, shuffle=False)
        images = images_of(DataLoader(DATA, batch_size=1, sampler=sampler), MODEL).drawn(2, 0)
        assert images.count == 2
        assert images.first() is not None
        drawn += [int(batch.index) for batch in images.batches(rank, 2)]
    assert len(set(drawn)) == 2


def test_images_of_other_sizes_are_refused_at_once() -> None:
    batches: Any = DataLoader([PIXELS[0], PIXELS[1, :, :4], PIXELS[2]], batch_size=1)  # type: ignore[arg-type]
    found = images_of(batches, MODEL).batches()
    next(found)
    with pytest.raises(InputError, match=r"the first image is \(3, 8, 8\), image 1 is \(3, 4, 8\)"):
        next(found)
    with pytest.raises(InputError, match="make no batch"):
        read([PIXELS[0], PIXELS[1, :, :4]])


def test_labels_are_known_before_work() -> None:
    for images, options in ((PIXELS, {"labels": [0, 1, 2, 3, 4]}), (DATA, {})):
        known = images_of(images, MODEL, **options).labels
        assert known is not None
        assert known.tolist() == [0, 1, 2, 3, 4]
    for labels in (list("abcde"), [0, None, 1, 1, 1], [[0], [1, 2], 3, 4, 5], [2**70] * 5, [0.5] * 5, [-2] * 5):
        with pytest.raises(InputError, match="labels must be 5 whole numbers"):
            images_of(PIXELS, MODEL, labels=labels)  # type: ignore[arg-type]


def test_items_that_are_no_images_are_refused() -> None:
    picture = Image.new("RGB", (8, 8))
    assert torch.equal(read([(image.double().numpy(), 0) for image in PIXELS]), PIXELS)  # float64 becomes float32
    refused: dict[str, Any] = {
        "ToTensor": [(picture, 0)] * 2,
        "make no batch": DataLoader([(picture, 0)] * 2),  # type: ignore[arg-type]
        "needs __len__": NoLength(),
        "got dict": {"image": PIXELS},
        "got generator": (image for image in PIXELS),
        "/ 255": [(np.zeros((3, 8, 8), np.uint8), 0)] * 2,
    }
    for message, images in refused.items():
        with pytest.raises(InputError, match=message):
            read(images)


def test_image_sizes_are_checked(tmp_path: Path) -> None:
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    assert read(tmp_path, image_size=8).shape == (1, 3, 8, 8)
    for size in (0, -1, 8.0, True):
        with pytest.raises(InputError, match="image_size must be a whole number"):
            images_of(tmp_path, MODEL, image_size=size)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="image_size= is for a folder of image files"):
        images_of(PIXELS, MODEL, image_size=8)


def test_broken_files_are_refused_before_work(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (12, 12)).save(tmp_path / f"{name}.png")
    assert images_of(tmp_path, MODEL).drawn(None, 0).count == 2
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"b\.png .*; mend the file or take it out of the folder") as refusal:
        images_of(tmp_path, MODEL).drawn(None, 0)
    assert "skip_corrupt" not in str(refusal.value)
