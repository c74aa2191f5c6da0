"""`part_birds`: exact masks, tight boxes, classes told apart by one part, and nothing told by colour."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from interp_models.core.errors import InputError
from interp_models.data.base import DATASETS, Sample, collate
from interp_models.data.part_birds.dataset import PartBirds
from interp_models.data.part_birds.drawing import PARTS, draw
from interp_models.data.part_birds.scene import CLASSES, CLOSE_PAIRS, VARIED, Background, Scene, make_scene
from interp_models.data.part_birds.shapes import SHAPES

BLACK, WHITE = ((0, 0, 0), (0, 0, 0)), ((255, 255, 255), (255, 255, 255))


def scenes(split: str = "train") -> list[Scene]:
    """Two scenes of every class."""
    return [make_scene(0, split, index, index % 12) for index in range(24)]


def changed(a: Scene, b: Scene, size: int = 224) -> NDArray[np.bool_]:
    return (draw(a, size).image != draw(b, size).image).any(-1)


def painted(scene: Scene, *parts: str) -> NDArray[np.bool_]:
    """The pixels that show the parts: those that differ when only the parts' colours do."""
    dark = replace(scene, colours=scene.colours | dict.fromkeys(parts, BLACK))
    return changed(dark, replace(scene, colours=scene.colours | dict.fromkeys(parts, WHITE)))


def equal(a: Sample, b: Sample) -> bool:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None or y is not None]
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs)


@pytest.mark.parametrize("part", PARTS)
def test_a_parts_mask_is_the_pixels_that_its_colour_reaches(part: str) -> None:
    for scene in scenes():
        mask = draw(scene, 224).masks[1 + PARTS.index(part)]
        assert mask.any()
        assert np.array_equal(painted(scene, part), mask)


def test_the_birds_mask_is_its_parts_which_do_not_overlap() -> None:
    for scene in scenes("test"):
        masks = draw(scene, 224).masks
        assert np.array_equal(painted(scene, *PARTS), masks[0])
        assert np.array_equal(masks[1:].sum(0), masks[0])


def test_what_stands_in_front_is_in_no_mask() -> None:
    hidden = 0.0
    for scene in scenes():
        bare, masks = draw(replace(scene, occluders=()), 224).masks, draw(scene, 224).masks
        assert not (masks & ~bare).any()
        recoloured = tuple(replace(o, colour=tuple(255 - c for c in o.colour)) for o in scene.occluders)
        assert not (changed(scene, replace(scene, occluders=recoloured)) & masks[0]).any()
        hidden += float((bare[0] & ~masks[0]).sum())
    assert hidden > 0


def test_no_part_is_ever_hidden_as_a_whole() -> None:
    for index in range(240):
        scene = make_scene(1, "train", index, index % 12)
        bare, shown = (draw(s, 96).masks.sum((1, 2)) for s in (replace(scene, occluders=()), scene))
        assert (shown >= 0.4 * bare).all()


def test_key_points_lie_on_their_parts() -> None:
    hidden = 0
    for scene in scenes() + scenes("test"):
        bare = replace(scene, occluders=())
        assert draw(bare, 224).visible.all()
        _, masks, points, visible = draw(scene, 224)
        x, y = points.astype(int).T
        assert np.array_equal(visible, masks[np.arange(1, 1 + len(PARTS)), y, x])
        assert np.array_equal(points, draw(bare, 224).keypoints)
        hidden += int((~visible).sum())
    assert hidden > 0


@pytest.mark.parametrize("size", [32, 100, 224])
def test_samples_have_the_documented_types_and_tight_boxes(size: int) -> None:
    data = PartBirds(split="test", image_size=size)
    for index in range(12):
        sample = data.load(index)
        assert isinstance(sample.image, tv_tensors.Image)
        assert sample.image.shape == (3, size, size)
        assert sample.image.dtype == torch.uint8
        assert isinstance(sample.masks, tv_tensors.Mask)
        assert sample.masks.shape == (len(data.mask_names), size, size)
        assert sample.masks.dtype == torch.bool
        assert isinstance(sample.parts, tv_tensors.KeyPoints)
        assert sample.parts.shape == (len(data.part_names), 2)
        assert sample.parts.canvas_size == (size, size)
        assert isinstance(sample.visible, torch.Tensor)
        assert sample.visible.shape == (len(data.part_names),)
        assert isinstance(sample.box, tv_tensors.BoundingBoxes)
        exclusive = torch.tensor([0, 0, 1, 1])
        assert torch.equal(sample.box.as_subclass(torch.Tensor), masks_to_boxes(sample.masks[:1]) + exclusive)
    assert collate([data.load(0), data.load(1)]).masks.shape == (2, len(data.mask_names), size, size)


def test_masks_and_key_points_follow_a_flip() -> None:
    """Exactly: a point halfway between two pixels belongs to the other one after a flip, and there is none."""
    data = PartBirds(split="train")
    for index in range(24):
        for sample in (data.load(index), v2.RandomHorizontalFlip(p=1.0)(data.load(index))):
            x, y = sample.parts.round().long().T
            on_part = sample.masks[torch.arange(1, 1 + len(PARTS)), y, x]
            assert torch.equal(on_part, sample.visible)


def test_classes_are_known_variants_and_differ() -> None:
    assert len(CLASSES) >= 10
    for variants in CLASSES.values():
        assert all(variant in SHAPES[part] for part, variant in zip(VARIED, variants, strict=True))
    close = {
        (a, b): [p for p, x, y in zip(VARIED, u, v, strict=True) if x != y]
        for (a, u), (b, v) in combinations(enumerate(CLASSES.values()), 2)
    }
    assert {pair: parts[0] for pair, parts in close.items() if len(parts) == 1} == CLOSE_PAIRS
    assert len(CLOSE_PAIRS) >= 3
    assert all(close.values())


@pytest.mark.parametrize("pair", CLOSE_PAIRS)
def test_a_close_pair_differs_in_pixels_of_one_part_only(pair: tuple[int, int]) -> None:
    row = 1 + PARTS.index(CLOSE_PAIRS[pair])
    for index in range(20):
        a, b = (make_scene(0, "train", index, label) for label in pair)
        assert replace(a, variants=b.variants) == b
        difference = changed(a, b)
        assert not (difference & ~draw(a, 224).masks[row] & ~draw(b, 224).masks[row]).any()
        assert difference.sum() > 100


@pytest.mark.parametrize("part", PARTS)
def test_a_part_can_be_removed(part: str) -> None:
    scene = make_scene(0, "test", 5, 5)
    scene = replace(scene, colours=scene.colours | {part: ((255, 0, 255), (200, 0, 200))})  # unlike what is behind it
    removed = replace(scene, variants=scene.variants | {part: "none"})
    row = PARTS.index(part)
    drawing = draw(removed, 224)
    assert not drawing.masks[1 + row].any()
    assert not drawing.visible[row]
    assert np.array_equal(changed(scene, removed), draw(scene, 224).masks[1 + row])


def test_the_background_can_be_changed_behind_all_else() -> None:
    scene = make_scene(0, "test", 5, 5)
    other = replace(scene, background=Background("sky", ((0, 0, 0), (0, 0, 0), (0, 0, 0)), 0))
    difference = changed(scene, other)
    drawing = draw(scene, 224)
    assert difference.mean() > 0.3
    assert not (difference & drawing.masks[0]).any()
    assert np.array_equal(draw(other, 224).masks, drawing.masks)


def test_images_depend_on_seed_split_and_index_alone() -> None:
    data = PartBirds(split="train", image_size=64)
    forward = [data.load(index) for index in range(24)]
    again = PartBirds(split="train", image_size=64, train_per_class=3)  # fewer images, read backwards
    backward = [again.load(index) for index in reversed(range(24))][::-1]
    assert all(map(equal, forward, backward))
    others = [PartBirds(split="test", image_size=64), PartBirds(split="train", image_size=64, seed=1)]
    drawn = [sample.image for sample in forward + [other.load(index) for other in others for index in range(24)]]
    assert len({image.numpy().tobytes() for image in drawn}) == 72


def test_labels_are_balanced_and_image_ids_unique() -> None:
    train, test = PartBirds(split="train"), PartBirds(split="test")
    assert (len(train), len(test)) == (720, 240)
    assert set(Counter(train.labels).values()) == {60}
    assert set(Counter(test.labels).values()) == {20}
    assert len({data.image_id(index) for data in (train, test) for index in range(len(data))}) == 960
    assert train.image_id(27) == "train/03_000027"
    assert train.load(27).label == train.labels[27] == 3


def test_bad_input() -> None:
    data = DATASETS.build("part_birds", {"test_per_class": 1}, split="test")
    for index in (-1, 12):
        with pytest.raises(IndexError, match=f"no test image {index}"):
            data.load(index)
        with pytest.raises(IndexError):
            data.image_id(index)
    for options in ({"train_per_class": 0}, {"test_per_class": -1}, {"image_size": 31}):
        with pytest.raises(InputError, match="must be at least"):
            PartBirds(split="train", **options)
    with pytest.raises(InputError, match="split"):
        PartBirds(split="val")  # type: ignore[arg-type]


def histograms(data: PartBirds) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots of 8 × 8 × 8 RGB histograms of whole images and of their birds, (N, 1024), and the labels."""
    rows = []
    for index in range(len(data)):
        drawing = draw(data.scene(index), data.image_size)
        bins = (drawing.image // 32) @ np.array([64, 8, 1])
        counts = [np.sqrt(np.bincount(b, minlength=512)) for b in (bins.ravel(), bins[drawing.masks[0]])]
        rows.append(np.concatenate([c / np.linalg.norm(c) for c in counts]))
    return torch.tensor(np.array(rows), dtype=torch.float32), torch.tensor(data.labels)


def test_colour_does_not_tell_the_classes() -> None:
    (x, y), (test_x, test_y) = (histograms(PartBirds(split=split, image_size=96)) for split in ("train", "test"))
    weights = torch.zeros(x.shape[1], 12, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.02, weight_decay=1e-4)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x @ weights, y).backward()
        optimizer.step()
    nearest = y[(test_x @ x.T).argmax(1)]
    assert (x @ weights).argmax(1).eq(y).float().mean() > 0.5  # it fits what it has seen
    assert (test_x @ weights).argmax(1).eq(test_y).float().mean() <= 0.5
    assert nearest.eq(test_y).float().mean() <= 0.5
