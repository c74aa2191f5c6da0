"""Data sets whose images have several labels."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from interp_models import DATASETS
from interp_models.core.errors import InputError
from interp_models.data.base import ImageDataset, labels_of
from interp_models.data.checks import check_labels
from interp_models.data.module import DataModule
from interp_models.data.subsets import strata

SETS = [(0,), (0, 1), (), (2,), (1, 2), (0, 1, 2), (1,), (0, 2)]
"""Labels of `squares`, in turn."""
OPTIONS: dict[str, Any] = {"image_size": 64, "batch_size": 5, "num_workers": 0, "val_fraction": 0.25}


def module(dataset: dict[str, Any], **options: Any) -> DataModule:
    return DataModule(dataset=dataset, **OPTIONS | options)


def test_batches_have_the_labels_of_their_images(squares: dict[str, Any]) -> None:
    data = module(squares)
    for batch in (*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
        assert batch.label.dtype == torch.bool
        for index, label in zip(batch.index.tolist(), batch.label.tolist(), strict=True):
            assert tuple(np.flatnonzero(label)) == SETS[index % 8]
    assert sum(len(batch.index) for batch in data.test_dataloader()) == 16
    assert data.summary().startswith("3 classes, several per image; ")


def test_digests_know_every_label(squares: dict[str, Any]) -> None:
    data, other, turned = module(squares), module(squares), module(squares)
    other.test_images.labels = [*other.test_images.labels[:4], (1,), *other.test_images.labels[5:]]
    turned.test_images.labels = [labels[::-1] for labels in turned.test_images.labels]  # the same labels
    assert data.fingerprint("test") == turned.fingerprint("test") != other.fingerprint("test")
    assert data.contents("test") == turned.contents("test")
    differ = [a != b for a, b in zip(data.contents("test"), other.contents("test"), strict=True)]
    assert differ == [place == 4 for place in range(16)]


def test_images_of_one_label_are_split_as_those_of_single_classes(squares: dict[str, Any]) -> None:
    for seed in range(4):
        one, plain = (module({**squares, key: True, "count": 40}, seed=seed) for key in ("one", "plain"))
        assert one.val_indices.tolist() == plain.val_indices.tolist()
        assert 8 <= len(one.val_indices) <= 12
        assert list(one.batches(0)) == list(plain.batches(0))
        assert one.classes_without("train") == plain.classes_without("train") == []


def test_the_rarest_label_is_that_of_the_images_to_split() -> None:
    labels = [(0, 1), (0, 1), (1,), (0,), (0,), ()]
    assert strata(labels, np.arange(6)).tolist() == [1, 1, 1, 0, 0, -1]
    assert strata(labels, np.array([0, 1, 2])).tolist()[:3] == [0, 0, 1]


def test_classes_without_an_image(squares: dict[str, Any]) -> None:
    data = module(squares, val_fraction=0)
    assert data.classes_without("test") == []
    data.test_images.labels = [tuple(label for label in own if label != 1) for own in data.test_images.labels]
    assert data.classes_without("test") == ["green"]


def test_labels_are_renumbered_as_the_models(squares: dict[str, Any]) -> None:
    data = module(squares)
    data.as_classes(["red", "white", "green", "blue"], "model")
    assert labels_of(data.test_images, 4) == (2, 3)
    assert data.dataset("test")[0, 4].label.tolist() == [False, False, True, True]
    assert data.test_images.annotation(4) == module(squares).test_images.annotation(4)
    assert data.multilabel


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (1, "labels must be a tuple of classes from 0 to 2; got 1"),
        ((0, 3), r"labels must be a tuple of classes from 0 to 2; got \(0, 3\)"),
        ((-1,), r"labels must be a tuple of classes from 0 to 2; got \(-1,\)"),
        ("01", "labels must be a tuple of classes from 0 to 2; got '01'"),
        ((1, 1), r"a class is listed twice among its labels \(1, 1\)"),
    ],
)
def test_labels_of_another_form_are_refused(squares: dict[str, Any], labels: Any, expected: str) -> None:
    cls = DATASETS.get("squares")

    class Wrong(cls):  # type: ignore[misc,valid-type]
        def __init__(self, *, split: str, right: bool = False) -> None:
            super().__init__(split=split)
            self.labels[7] = (0, 2) if right else labels

    DATASETS.register("wrong_squares")(Wrong)
    assert module({"name": "wrong_squares", "right": True}).multilabel
    with pytest.raises(InputError, match=f"data set 'wrong_squares', train image 7: {expected}"):
        module({"name": "wrong_squares"})


def test_a_sample_of_another_label_is_refused(squares: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(squares)
    assert data.dataset("test")[0, 0].label.tolist() == [True, False, False]
    monkeypatch.setattr(ImageDataset, "target", lambda self, index: 0)
    with pytest.raises(InputError, match=r"the label of a sample must be bool \(3,\), as target\(index\) gives it"):
        data.dataset("test")[0, 0]


def test_what_needs_one_class_is_refused(squares: dict[str, Any]) -> None:
    assert module({**squares, "plain": True}, balanced=True).balanced
    with pytest.raises(InputError, match=r"data.balanced needs one class per image; the images .* have several labels"):
        module(squares, balanced=True)
    data = module(squares)
    data.check_training()
    data.test_images.labels = [()] * 16
    with pytest.raises(InputError, match="no test image has a label; no class can be learnt or measured"):
        data.check_training()


def test_bools_are_no_classes(squares: dict[str, Any]) -> None:
    images = DATASETS.build("squares", {}, split="train")
    check_labels(images, "image")
    images.labels = [(True, False), *images.labels[1:]]
    with pytest.raises(
        InputError, match=r"image 0: labels must be a tuple of classes from 0 to 2; got \(True, False\)"
    ):
        check_labels(images, "image")


def test_plain_tensors_are_scaled_as_images(squares: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = DATASETS.get("squares")
    real = own.load
    expected = [
        next(iter(loader)) for loader in (module(squares).train_dataloader(), module(squares).test_dataloader())
    ]

    def plain(self: Any, index: int) -> Any:
        sample = real(self, index)
        return sample._replace(image=sample.image.as_subclass(torch.Tensor))

    monkeypatch.setattr(own, "load", plain)
    data = module(squares)
    for loader, batch in zip((data.train_dataloader(), data.test_dataloader()), expected, strict=True):
        found = next(iter(loader))
        assert float(batch.image.max()) <= 1
        assert torch.equal(found.image, batch.image)
        assert torch.equal(found.label, batch.label)
    given: list[Any] = [expected[1].image[0].clamp(0, 1)]
    monkeypatch.setattr(own, "load", lambda self, index: real(self, index)._replace(image=given[0]))
    next(iter(data.test_dataloader()))  # floats in [0, 1] are images, too
    for given[0], found in (
        (torch.zeros(3, 64, 64).int(), r"\(3, 64, 64\) of torch.int32"),
        (torch.zeros(1, 64, 64, dtype=torch.uint8), r"\(1, 64, 64\) of torch.uint8"),
        (torch.full((3, 64, 64), 255.0), r"\(3, 64, 64\) of torch.float32, not all of them in \[0, 1\]"),
        (torch.full((3, 64, 64), torch.nan), ".*not all of them in"),
        (Image.new("RGB", (64, 64)), "Image, image"),
        (np.zeros((64, 64, 3), dtype=np.uint8), "ndarray, image"),
    ):
        wanted = r"Squares: the image of a sample must be a tensor \(3, H, W\) of uint8, or of floats in \[0, 1\]; got "
        with pytest.raises(InputError, match=wanted + found):
            next(iter(data.test_dataloader()))
