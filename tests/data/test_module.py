"""Splits, order, augmentation and transforms."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from interp_models.core.errors import InputError
from interp_models.data.base import Sample, collate
from interp_models.data.module import DataModule
from interp_models.data.sampling import AGAIN, ShardSampler, balanced
from interp_models.data.subsets import stratified_split, subsample
from interp_models.data.transforms import crop_to_box, hide_outside, transform_of
from interp_models.data.transforms.corner_crop_warp_jitter import random_corner
from tests.conftest import Cub
from tests.data.make_cub import make_cub

CARS = {"name": "warp_jitter", "perspective": 0.5, "hue": 0.4, "degrees": 15, "shift": None, "margin": 32}


def evaluation_transform(size: int, name: Any = "crop_flip_jitter") -> v2.Transform:
    return transform_of(name, size).evaluation()


def train_transform(size: int, name: Any = "crop_flip_jitter") -> v2.Transform:
    return transform_of(name, size).augmented()


def module(cub: Cub, **options: Any) -> DataModule:
    defaults = {"image_size": 32, "batch_size": 4, "num_workers": 0, "val_fraction": 0.25}
    return DataModule(dataset={"name": "cub", "root": str(cub.root)}, **defaults | options)


def assert_same(a: Sample, b: Sample) -> None:
    for name, left, right in zip(Sample._fields, a, b, strict=True):
        assert (left is None) == (right is None), name
        if left is not None:
            assert torch.equal(torch.as_tensor(left), torch.as_tensor(right)), name


# The split


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.0, [0, 0, 0, 0, 0]), (0.1, [0, 0, 0, 1, 4]), (0.25, [0, 0, 1, 2, 10]), (0.9, [0, 1, 2, 8, 36])],
)
def test_split_takes_the_fraction_of_each_class(fraction: float, expected: list[int]) -> None:
    labels = np.repeat(np.arange(5), [1, 2, 3, 9, 40])
    labels = labels[np.argsort(np.arange(55) * 17 % 55)]  # classes mixed
    for seed in range(5):
        rest, part = stratified_split(labels, np.arange(55), fraction, seed)
        assert [int((labels[part] == label).sum()) for label in range(5)] == expected
        assert sorted([*rest, *part]) == list(range(55))
        assert list(part) == sorted(part)
        assert set(labels[rest]) == set(range(5))  # no class loses its last training image


def test_split_depends_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(4), 20)
    splits = [stratified_split(labels, np.arange(80), 0.25, seed)[1].tolist() for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2] != splits[3] != splits[0]
    drawn = np.bincount(np.concatenate([stratified_split(labels, np.arange(80), 0.25, s)[1] for s in range(400)]))
    assert drawn.sum() == 400 * 20
    assert 60 < drawn.min() <= drawn.max() < 140  # 100 expected, standard deviation 8.7


def test_split_uses_the_kept_images_alone() -> None:
    labels = np.repeat(np.arange(2), 10)
    kept = np.array([0, 2, 4, 6, 11, 13])
    rest, part = stratified_split(labels, kept, 0.5, 0)
    assert sorted([*rest, *part]) == kept.tolist()
    assert np.bincount(labels[part]).tolist() == [2, 1]


def test_module_splits_the_training_images(tiny_cub: Cub) -> None:
    data = module(tiny_cub)
    labels = np.asarray(data.train_images.labels)
    assert np.bincount(labels[data.val_indices]).tolist() == [1, 1, 1]
    assert sorted([*data.train_indices, *data.val_indices]) == list(range(12))
    assert data.test_indices.tolist() == list(range(12))
    assert module(tiny_cub, seed=0).val_indices.tolist() == data.val_indices.tolist()
    assert any(module(tiny_cub, seed=seed).val_indices.tolist() != data.val_indices.tolist() for seed in range(1, 4))
    ids = {split: [images.image_id(i) for i in range(12)] for split, images in _images(data)}
    assert ids["train"] == [bird.path for bird in tiny_cub.birds if bird.train]
    assert ids["test"] == [bird.path for bird in tiny_cub.birds if not bird.train]


def _images(data: DataModule) -> list[tuple[str, Any]]:
    return [("train", data.train_images), ("test", data.test_images)]


def test_no_validation(tiny_cub: Cub) -> None:
    data = module(tiny_cub, val_fraction=0)
    assert data.train_indices.tolist() == list(range(12))
    assert data.val_indices.tolist() == []
    assert data.val_dataloader() == []


def test_draw() -> None:
    indices = np.array([3, 5, 8, 13, 21, 34, 55, 89])
    assert subsample(indices, None, 0).tolist() == indices.tolist()
    assert subsample(indices, 8, 0).tolist() == subsample(indices, 99, 0).tolist() == indices.tolist()
    three = subsample(indices, 3, 0)
    assert len(set(three)) == 3
    assert set(three) <= set(indices)
    assert three.tolist() == sorted(three)
    assert set(three) < set(subsample(indices, 4, 0))
    assert len({tuple(subsample(indices, 3, seed)) for seed in range(20)}) > 10
    for n in (0, -3):
        with pytest.raises(InputError, match=f"n_images must be at least 1; got {n}"):
            subsample(indices, n, 0)


def make_folder(root: Path, names: str) -> Path:
    """Images of 8 x 8 pixels, of one grey level each."""
    for number, name in enumerate(names.split()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(path, "PNG")
    return root


def of_folder(root: Path, **options: Any) -> DataModule:
    dataset = {"name": "image_folder", "root": str(root)} | options.pop("dataset", {})
    return DataModule(dataset=dataset, image_size=16, batch_size=2, num_workers=0, **options)


SPLITS = "train/a/1 train/a/2 train/b/1 train/b/2 train/b/3 val/a/1 val/b/1 test/a/1 test/b/1"
SPLITS = " ".join(f"{name}.png" for name in SPLITS.split())


def test_the_data_sets_own_validation_images_are_taken(tmp_path: Path) -> None:
    """In place of a drawn part, of whatever size; with val_fraction=0 they are not looked at."""
    make_folder(tmp_path, SPLITS)

    def named(data: DataModule, split: str) -> list[str]:
        own = data.dataset(split)
        return [own.images.image_id(int(index)) for index in own.indices]

    train = SPLITS.split()[:5]
    for options in ({}, {"val_fraction": 0.9}, {"seed": 7}):
        data = of_folder(tmp_path, **options)
        assert named(data, "train") == train
        assert named(data, "val") == ["val/a/1.png", "val/b/1.png"]
        assert [batch.label.tolist() for batch in data.val_dataloader()] == [[0, 1]]
        assert data.summary() == "2 classes; 5 training, 2 validation, 2 test images"
    data = of_folder(tmp_path, val_fraction=0)
    assert named(data, "train") == train
    assert data.val_dataloader() == []
    notice = "2 validation images are not used, as val_fraction is 0"
    assert data.summary() == f"2 classes; 5 training, 0 validation, 2 test images; {notice}"
    for name in ("a", "b"):
        (tmp_path / f"val/{name}/1.png").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"val_fraction=0\.1 leaves no validation image"):
        of_folder(tmp_path, skip_corrupt=True).check_training()


def test_a_folder_that_may_not_be_entered(tiny_cub: Cub, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(path: Path, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    module(tiny_cub)
    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(InputError, match=r"data set 'cub' cannot be read: .*Permission denied: '.*images.txt'"):
        module(tiny_cub)


def test_summary_of_what_is_drawn_and_left_out(tmp_path: Path) -> None:
    names = " ".join(f"{kind}/{i}.png" for kind, n in (("a", 10), ("b", 5), ("c", 1)) for i in range(n))
    make_folder(tmp_path, names)
    for name in ("a/1.txt", "a/2.txt", "b/x.svg", "b/y.mov"):
        (tmp_path / name).touch()
    assert of_folder(tmp_path, val_fraction=0.25).summary() == (
        "3 classes; 10 training, 3 validation, 3 test images; test images are 20 % of each class, drawn by seed 0; "
        "classes without a test image: 1 (c); left out: files that are not images: 4 (a/1.txt, a/2.txt, b/x.svg, ...)"
    )
    data = of_folder(tmp_path, val_fraction=0.25)
    data.test_indices = data.test_indices[:2]
    assert "3 validation, 2 of 3 test images" in data.summary()


def test_ranges_that_are_refused_are_not_left_out_without_a_word(tmp_path: Path) -> None:
    make_folder(tmp_path, SPLITS)
    deep = Image.fromarray(np.array([[0, 4080]], dtype=np.uint16))
    for name in ("train/a/x.png", "train/a/y.png", "test/b/x.png"):
        deep.save(tmp_path / name)
    (tmp_path / "train/b/1.png").write_bytes(b"junk")
    with pytest.raises(InputError) as error:
        of_folder(tmp_path).check_files("train", "test")
    first = f"image {tmp_path}/train/a/x.png is ambiguous: its values are from 0 to 4080, so their range need not be"
    assert str(error.value).startswith(f"4 images cannot be used; the first: {first}")
    data = of_folder(tmp_path, skip_corrupt=True)
    data.check_files("train", "val", "test")
    assert len(data.train_indices) == 4
    told = f"left out: images that are ambiguous: 3 (train/a/x.png, train/a/y.png, test/b/x.png); the first: {first}"
    assert told in data.summary()
    assert "images that cannot be decoded: 1 (train/b/1.png); the first: " in data.summary()
    assert of_folder(tmp_path, skip_corrupt=True, dataset={"max_value": 4080}).skipped.keys() == {"train/b/1.png"}
    for path in tmp_path.glob("test/*/*"):
        deep.save(path)
    with pytest.raises(InputError, match=r"no test image of 3 can be loaded; the first: image .* is ambiguous: "):
        of_folder(tmp_path, skip_corrupt=True)


def test_whole_files_are_not_decoded_by_a_check(tiny_cub: Cub, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(tiny_cub)
    monkeypatch.setattr(type(data.train_images), "load", lambda *_: pytest.fail("decoded"))
    data.check_files("train", "val", "test")


def test_classes_without_an_image(tmp_path: Path) -> None:
    make_folder(tmp_path, "1.png 2.png 3.png 4.png 5.png 6.png")
    rows = "1.png,a,train 2.png,b,val 3.png,a,train 4.png,c,test 5.png,a,test 6.png,d,train"
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows.split()]))
    data = of_folder(tmp_path, dataset={"list": "list.csv"})
    assert data.classes == ["a", "b", "c", "d"]
    assert data.classes_without("train") == ["b", "c"]
    assert data.classes_without("val") == ["a", "c", "d"]
    assert data.classes_without("test") == ["b", "d"]
    told = "classes without a training image: 2 (b, c); classes without a test image: 2 (b, d)"
    assert data.summary() == f"4 classes; 3 training, 1 validation, 2 test images; {told}"
    (tmp_path / "6.png").write_bytes(b"junk")
    data = of_folder(tmp_path, dataset={"list": "list.csv"}, skip_corrupt=True)
    assert data.classes_without("train") == ["b", "c", "d"]


# The order


def flat(lists: list[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


def order(size: int, rank: int, world: int, batch: int, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    """The positions of each step of a rank in training."""
    sampler = ShardSampler(size, rank=rank, world=world, seed=seed, global_batch=batch * world)
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(keys) == len(sampler)
    assert {at for at, _ in keys} == {epoch}
    positions = [position for _, position in keys]
    return [positions[i : i + batch] for i in range(0, len(positions), batch)]


LABELS = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
"""Seven, three and one image of three classes."""


def test_balanced_classes_come_equally_often_and_images_in_turn() -> None:
    extra = set()
    for seed in range(3):
        for epoch in range(8):
            positions, rounds = balanced(LABELS, seed, epoch)
            counts = np.bincount(LABELS[positions])
            assert sorted(counts) == [3, 4, 4]  # 11 images of 3 classes
            extra.add(int(counts.argmin()))
            for label in range(3):
                times = np.bincount(positions[LABELS[positions] == label], minlength=11)[label == LABELS]
                assert times.max() - times.min() <= 1  # none comes again before all others
            for position in np.unique(positions):
                assert sorted(rounds[positions == position]) == list(range((positions == position).sum()))
    assert extra == {0, 1, 2}
    seen = np.concatenate([balanced(LABELS, 0, epoch)[0] for epoch in range(300)])
    of_large = np.bincount(seen)[:7]
    assert of_large.sum() == pytest.approx(300 * 11 / 3, abs=40)
    assert of_large.min() > 0.8 * of_large.mean()  # all images of the large class, over the epochs


@pytest.mark.parametrize("world", [1, 2, 3])
def test_balanced_ranks_see_what_one_sees(world: int) -> None:
    """The same keys in the same steps, dropped incomplete batch included; also after a resume at any epoch."""
    for epoch in (0, 5):
        shards = []
        for rank in range(world):
            sampler = ShardSampler(11, rank=rank, world=world, seed=3, global_batch=2 * world, labels=LABELS)
            sampler.set_epoch(epoch)
            shards.append(list(sampler))
            assert len(shards[-1]) == len(sampler)
        alone = ShardSampler(11, rank=0, world=1, seed=3, global_batch=2 * world, labels=LABELS)
        alone.set_epoch(epoch)
        assert [key for step in zip(*shards, strict=True) for key in step] == list(alone)
        assert len(list(alone)) == 11 // (2 * world) * 2 * world
        assert {at % AGAIN for at, _ in alone} == {epoch}


def test_balanced_training(tmp_path: Path) -> None:
    """An image that comes again is augmented anew; positions of cached features are the same; tests are as without."""
    names = [
        f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind, n in (("a", 9), ("b", 1)) for i in range(n)
    ]
    make_folder(tmp_path, " ".join(names))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "train/b/0.png")
    data = of_folder(tmp_path, val_fraction=0, balanced=True)
    batches = list(data.train_dataloader())
    labels = torch.cat([batch.label for batch in batches])
    assert torch.bincount(labels).tolist() == [5, 5]
    rare = torch.cat([batch.image for batch in batches])[labels == 1]
    assert len({image.numpy().tobytes() for image in rare}) == 5
    index = torch.cat([batch.index for batch in batches]).tolist()
    assert [position for step in data.batches(0) for position in step] == index
    plain = of_folder(tmp_path, val_fraction=0)
    assert sorted(position for step in plain.batches(0) for position in step) == list(range(10))
    assert [b.index.tolist() for b in data.test_dataloader()] == [b.index.tolist() for b in plain.test_dataloader()]


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): flat(order(24, 0, 1, 4, epoch, seed)) for seed in range(3) for epoch in range(3)}
    for positions in orders.values():
        assert sorted(positions) == list(range(24))
    assert len({tuple(positions) for positions in orders.values()}) == 9
    assert flat(order(24, 0, 1, 4, 1, 2)) == orders[2, 1]
    assert flat(order(24, 0, 1, 8, 1, 2)) == orders[2, 1]  # batches cut it, no more


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_ranks_step_together_in_training(world: int, batch: int) -> None:
    for size in range(1, 30):
        steps = [order(size, rank, world, batch) for rank in range(world)]
        lengths = {tuple(len(step) for step in rank) for rank in steps}
        assert len(lengths) == 1  # the same steps of the same size on every rank
        seen = [position for rank in steps for step in rank for position in step]
        if size >= batch * world:
            assert len(seen) == size // (batch * world) * batch * world
            assert len(set(seen)) == len(seen)
            one = order(size, 0, 1, batch * world)
            assert [set(step) for step in one] == [set().union(*parts) for parts in zip(*steps, strict=True)]
        else:  # one step that holds everything, filled up to the number of ranks
            assert set(seen) == set(range(size))
            assert len(seen) < size + world


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_sees_every_image_once(world: int) -> None:
    for size in range(12):
        samplers = [ShardSampler(size, rank=rank, world=world) for rank in range(world)]
        shares = [[position for _, position in sampler] for sampler in samplers]
        assert sorted(flat(shares)) == list(range(size))
        assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
        assert all(share == sorted(share) for share in shares)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_loaders_share_the_images_of_ranks(tiny_cub: Cub) -> None:
    data = module(tiny_cub, batch_size=2)
    seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}
    for rank in range(2):
        progress = SimpleNamespace(current=SimpleNamespace(processed=3))
        loop = SimpleNamespace(epoch_progress=progress)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, fit_loop=loop)  # type: ignore[assignment]
        for split, loader in (
            ("train", data.train_dataloader()),
            ("val", data.val_dataloader()),
            ("test", data.test_dataloader()),
        ):
            seen[split].append([index for batch in loader for index in batch.index.tolist()])
    assert [len(rank) for rank in seen["train"]] == [4, 4]  # 9 images, of which one step of 4 is incomplete
    assert len(set(flat(seen["train"]))) == 8
    assert set(flat(seen["train"])) <= set(data.train_indices.tolist())
    assert sorted(flat(seen["val"])) == data.val_indices.tolist()
    order_of = ShardSampler(9, rank=0, world=1, seed=0, global_batch=4)
    order_of.set_epoch(3)  # a loader made for a run that goes on in epoch 3 begins with that epoch's order
    positions = [position for _, position in order_of]
    assert data.train_indices[positions[0::2]].tolist() == seen["train"][0]
    assert data.train_indices[positions[1::2]].tolist() == seen["train"][1]
    assert seen["test"] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


# Augmentation


def epochs(data: DataModule, number: int = 2) -> list[Sample]:
    loader = data.train_dataloader()
    batches = []
    for epoch in range(number):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches += list(loader)
    return batches


def test_workers_change_nothing(tiny_cub: Cub) -> None:
    torch.manual_seed(1)
    alone = epochs(module(tiny_cub))
    torch.manual_seed(2)
    together = epochs(module(tiny_cub, num_workers=2))
    assert len(alone) == len(together) == 4
    for a, b in zip(alone, together, strict=True):
        assert_same(a, b)


def test_augmentation_is_a_function_of_seed_epoch_and_image(tiny_cub: Cub) -> None:
    dataset = module(tiny_cub).dataset("train")
    again = module(tiny_cub, val_fraction=0).dataset("train")  # the same images at other positions
    for position, index in enumerate(dataset.indices):
        sample = dataset[3, position]
        torch.rand(5)
        assert_same(sample, dataset[3, position])
        elsewhere = int(np.flatnonzero(again.indices == index)[0])
        assert_same(sample, again[3, elsewhere])
        assert not torch.equal(sample.image, dataset[4, position].image)
    other = DataModule(dataset={"name": "cub", "root": str(tiny_cub.root)}, image_size=32, seed=1, val_fraction=0)
    assert not torch.equal(other.dataset("train")[3, 0].image, again[3, 0].image)


def test_augmentation_leaves_the_generators_alone(tiny_cub: Cub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of GPUs: dropout would repeat itself after every image that the main process loads."""
    dataset = module(tiny_cub).dataset("train")
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    assert isinstance(dataset[0, 0], Sample)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


@pytest.mark.parametrize("options", [{"augment": False}, {}])
def test_what_is_not_augmented(tiny_cub: Cub, options: dict[str, Any]) -> None:
    data = module(tiny_cub, **options)
    for split in ("val", "test") if not options else ("train", "val", "test"):
        dataset = data.dataset(split)
        images = data.test_images if split == "test" else data.train_images
        for epoch in range(2):
            expected = evaluation_transform(32)(images.load(int(dataset.indices[1])))
            assert_same(dataset[epoch, 1], hide_outside(expected))
    assert_same(data.dataset("train", augment=False)[0, 1], module(tiny_cub, augment=False).dataset("train")[5, 1])


# Batches


def test_a_batch_of_one(tiny_cub: Cub) -> None:
    data = module(tiny_cub, batch_size=1)
    batches = list(data.test_dataloader())
    assert len(batches) == 12
    dataset = data.dataset("test")
    for position, batch in enumerate(batches):
        sample = dataset[0, position]
        assert torch.equal(batch.image, sample.image[None])
        assert batch.label.tolist() == [sample.label]
        assert batch.index.tolist() == [position]
        assert torch.equal(batch.box, sample.box[None])
        assert torch.equal(batch.parts, sample.parts[None])
        assert torch.equal(batch.visible, sample.visible[None])
        assert batch.masks is None


def test_the_last_batch_is_small_and_nothing_is_lost(tiny_cub: Cub) -> None:
    batches = list(module(tiny_cub, batch_size=5).test_dataloader())
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    labels = [bird.label for bird in tiny_cub.birds if not bird.train]
    assert [label for batch in batches for label in batch.label.tolist()] == labels
    assert batches[0].label.dtype == batches[0].index.dtype == torch.int64


def test_masks_come_along(tmp_path: Path) -> None:
    root = tmp_path / "cub"
    birds = make_cub(root, segmentations=True)
    data = DataModule(dataset={"name": "cub", "root": str(root)}, image_size=64, num_workers=0, val_fraction=0)
    (batch,) = list(data.test_dataloader())
    assert batch.masks.shape == (6, 1, 64, 64)
    assert batch.masks.dtype == torch.bool
    for mask, box in zip(batch.masks[:, 0], batch.box[:, 0], strict=True):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        edges = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        assert (edges - box).abs().max() < 2.5  # pixels; the bird fills the whole pixels inside its box
    assert len(birds) == 12


# Transforms

RED, BLUE = (210, 40, 40), (40, 40, 210)


def scene(height: int, width: int) -> Sample:
    """Two squares on grey, the blue one left of the red one; a mask, and a key point in the middle, of each."""
    image = torch.full((3, height, width), 128, dtype=torch.uint8)
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    side = min(height, width) // 4
    y, x = height // 2 - side // 2, width // 2
    parts = []
    for mask, colour, left in ((masks[0], RED, x + 2), (masks[1], BLUE, x - 2 - side)):
        mask[y : y + side, left : left + side] = True
        image[:, mask] = torch.tensor(colour, dtype=torch.uint8)[:, None]
        parts.append((left + (side - 1) / 2, y + (side - 1) / 2))
    box = torch.tensor([[x + 2, y, x + 2 + side, y + side]]).float()
    canvas = (height, width)
    return Sample(
        image=tv_tensors.Image(image),
        label=3,
        index=5,
        box=tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=canvas),
        masks=tv_tensors.Mask(masks),
        parts=tv_tensors.KeyPoints(torch.tensor(parts), canvas_size=canvas),
        visible=torch.tensor([True, True]),
    )


def bounds(mask: Tensor) -> Tensor:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def assert_on_the_squares(sample: Sample) -> None:
    """The truth lies where the colours are."""
    assert sample.masks is not None
    assert sample.parts is not None
    assert sample.box is not None
    image = sample.image
    for number, (mask, (x, y)) in enumerate(zip(sample.masks, sample.parts, strict=True)):
        seen = (image[0] - image[2]) * (1 if number == 0 else -1) > 0.15
        assert (seen & mask).sum() / (seen | mask).sum() > 0.75
        left, top, right, bottom = bounds(seen).tolist()
        if right < image.shape[-1] and bottom < image.shape[-2] and left > 0 and top > 0:
            assert abs(float(x) - (left + right - 1) / 2) < 1
            assert abs(float(y) - (top + bottom - 1) / 2) < 1
        if number == 0:
            assert (bounds(seen) - sample.box[0].as_subclass(Tensor)).abs().max() <= 1


@pytest.mark.parametrize("size", [(90, 140), (140, 90), (64, 64), (200, 80)])
def test_truth_moves_with_the_image(size: tuple[int, int]) -> None:
    before = scene(*size)
    sample = evaluation_transform(64)(before)
    assert sample.image.shape == (3, 64, 64)
    assert (sample.label, sample.index, sample.visible.tolist()) == (3, 5, [True, True])
    assert_on_the_squares(sample)
    # Squashed to 73 pixels, of which 4 are cut off at the left and the top.
    expected = (before.parts.as_subclass(Tensor) + 0.5) * 73 / torch.tensor([size[1], size[0]]) - 0.5 - 4
    assert (sample.parts.as_subclass(Tensor) - expected).abs().max() < 0.6
    flips = []
    for seed in range(20):
        torch.manual_seed(seed)
        sample = train_transform(64)(before)
        assert sample.image.shape == (3, 64, 64)
        assert_on_the_squares(sample)
        flips.append(bool(sample.parts[0, 0] < sample.parts[1, 0]))
    assert 3 < sum(flips) < 17


@pytest.mark.parametrize("name", ["warp_flip", "warp_jitter", CARS], ids=str)
def test_truth_moves_with_turned_and_skewed_images(name: Any) -> None:
    before = scene(96, 96)
    sample = evaluation_transform(48, name)(before)
    assert_on_the_squares(sample)
    assert (sample.parts.as_subclass(Tensor) - ((before.parts.as_subclass(Tensor) + 0.5) / 2 - 0.5)).abs().max() < 0.6
    outcomes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        sample = train_transform(96, name)(before)
        assert sample.image.shape == (3, 96, 96)
        coloured = sample.image.amax(dim=0) - sample.image.amin(dim=0) > 0.1  # of whatever hue
        squares = sample.masks.any(dim=0)
        assert (coloured & squares).sum() / (coloured | squares).sum() > 0.7
        for mask, (x, y) in zip(sample.masks, sample.parts.tolist(), strict=True):
            rows, columns = mask.nonzero().T
            if mask.sum() > 300:  # wholly inside: the middle stays the middle, but for the perspective
                assert abs(x - float(columns.float().mean())) < 2.5
                assert abs(y - float(rows.float().mean())) < 2.5
        outcomes.add(tuple(sample.parts.flatten().tolist()))
    assert len(outcomes) > 35


def test_protopnets_rotation_and_shear_are_bounded() -> None:
    """By 15 and 10 degrees, seen in where two points on a line end up; flips half of the time."""
    canvas = (101, 101)
    parts = tv_tensors.KeyPoints(torch.tensor([[50.0, 50.0], [90.0, 50.0], [50.0, 10.0]]), canvas_size=canvas)
    sample = Sample(tv_tensors.Image(torch.zeros(3, *canvas, dtype=torch.uint8)), 0, 0, parts=parts)
    transform = train_transform(101, "warp_flip")
    angles, flips = [], 0
    for seed in range(300):
        torch.manual_seed(seed)
        middle, right, up = transform(sample).parts.as_subclass(Tensor).float()
        across, along = right - middle, middle - up
        flips += bool(across[0] < 0)
        angles.append(
            (float(torch.atan2(across[1], across[0].abs()).rad2deg()), float(torch.atan2(along[0], along[1]).rad2deg()))
        )
    assert 120 < flips < 180
    assert 12 < np.abs(angles).max() < 17
    turned = [a for a, b in angles if abs(a) > 1 and abs(abs(a) - abs(b)) < 1]
    assert len(turned) > 60


def test_resized_crops_are_of_40_to_100_percent() -> None:
    """Seen in where two points go that no such crop loses; tested as `crop_flip_jitter`."""
    height, width, side = 90, 120, 64
    parts = tv_tensors.KeyPoints(torch.tensor([[58.0, 43.0], [62.0, 47.0]]), canvas_size=(height, width))
    sample = Sample(tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8)), 0, 0, parts=parts)
    areas, shapes, flips = [], [], 0
    for seed in range(300):
        torch.manual_seed(seed)
        out = train_transform(side, "resized_crop")(sample)
        assert out.image.shape == (3, side, side)
        a, b = out.parts.as_subclass(Tensor)
        flips += bool(b[0] < a[0])
        across, down = (side * 4 / (b - a).abs()).tolist()  # of the crop, in pixels of the image
        areas.append(across * down / (height * width))
        shapes.append(across / down)
    assert 120 < flips < 180
    assert 0.38 < min(areas) < 0.45
    assert 0.9 < max(areas) < 1.02
    assert 0.7 < min(shapes) < 0.8
    assert 1.25 < max(shapes) < 1.4
    middle, usual = (evaluation_transform(side, name)(sample).parts for name in ("resized_crop", "crop_flip_jitter"))
    assert torch.equal(middle, usual)


def test_prototrees_corners() -> None:
    """The five crops of the authors' script, by hand: a box of 40 x 20 at (30, 50) in 160 x 120, margins 4 and 2."""
    image = torch.arange(160 * 120, dtype=torch.float32).view(1, 120, 160).expand(3, -1, -1)
    box = tv_tensors.BoundingBoxes(torch.tensor([[30.0, 50.0, 70.0, 70.0]]), format="XYXY", canvas_size=(120, 160))
    sample = Sample(tv_tensors.Image(image), 0, 0, box=box)
    expected = {(0, 0, 74, 72), (0, 48, 74, 120), (26, 0, 160, 72), (26, 48, 160, 120), (0, 0, 160, 120)}
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        out = random_corner(sample)
        top, left = divmod(int(out.image[0, 0, 0]), 160)
        edges = (left, top, left + out.image.shape[2], top + out.image.shape[1])
        assert out.box[0].tolist() == [30 - left, 50 - top, 70 - left, 70 - top]
        found.append(edges)
    assert set(found) == expected
    assert min(found.count(edges) for edges in expected) > 20
    with pytest.raises(InputError, match=r"data\.transforms=corner_crop_warp_jitter needs a data set with boxes"):
        random_corner(Sample(torch.zeros(3, 4, 4), 0, 0))


def test_prototrees_images(tiny_cub: Cub) -> None:
    """Projection sees boxes, test images are whole."""
    data = module(tiny_cub, transforms="corner_crop_warp_jitter")
    for split, crop in (("train", crop_to_box), ("test", lambda sample: sample)):
        dataset = data.dataset(split, augment=False)
        images = data.train_images if split == "train" else data.test_images
        expected = hide_outside(
            evaluation_transform(32, "corner_crop_warp_jitter")(crop(images.load(int(dataset.indices[1]))))
        )
        assert torch.equal(dataset[0, 1].image, expected.image)


def test_augmentation_is_the_papers() -> None:
    """Crops anywhere in 73 pixels, flips half of the time, jitters brightness by 12.6 % and saturation by 50 %."""
    canvas = (73, 73)
    grey = torch.full((3, 73, 73), 226, dtype=torch.uint8)
    parts = torch.tensor([[36.0, 36.0], [40.0, 36.0]])
    sample = Sample(tv_tensors.Image(grey), 0, 0, parts=tv_tensors.KeyPoints(parts, canvas_size=canvas))
    offsets, flips, brightness = set(), 0, []
    transform = train_transform(64)
    for seed in range(300):
        torch.manual_seed(seed)
        out = transform(sample)
        (x, y), (other, _) = out.parts.tolist()
        flip = x > other
        flips += flip
        offsets |= {("x", 36 - (63 - x if flip else x)), ("y", 36 - y)}
        brightness.append(float(out.image.mean()) / (226 / 255))
    assert offsets == {(axis, float(offset)) for axis in "xy" for offset in range(10)}
    assert 120 < flips < 180
    assert 0.869 < min(brightness) < 0.885  # 1 - 0.126, rounded down to a whole grey level
    assert 1.115 < max(brightness) <= 1.126
    red = Sample(
        tv_tensors.Image(torch.tensor([200, 50, 50], dtype=torch.uint8)[:, None, None].expand(3, 73, 73)), 0, 0
    )
    chroma = []
    for seed in range(200):
        torch.manual_seed(seed)
        r, g, _ = transform(red).image.mean(dim=(1, 2)).tolist()
        chroma.append((r - g) / (0.299 * r + 0.701 * g) / (150 / 94.85))
    assert 0.49 < min(chroma) < 0.55
    assert 1.45 < max(chroma) < 1.52


def test_test_transform_is_the_centre() -> None:
    image = torch.randint(256, (3, 73, 73), dtype=torch.uint8)
    out = evaluation_transform(64)(tv_tensors.Image(image))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.as_subclass(Tensor), image[:, 4:68, 4:68] / 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 500), (500, 3), (2, 2)])
def test_tiny_and_long_images(size: tuple[int, int]) -> None:
    colour = torch.tensor([250, 3, 77], dtype=torch.uint8)
    image = tv_tensors.Image(colour[:, None, None].expand(3, *size).clone())
    box = tv_tensors.BoundingBoxes([[0.0, 0.0, size[1], size[0]]], format="XYXY", canvas_size=size)
    sample = crop_to_box(Sample(image, 0, 0, box=box))
    out = hide_outside(evaluation_transform(64)(sample))
    torch.testing.assert_close(out.image.as_subclass(Tensor), (colour / 255)[:, None, None].expand(3, 64, 64))
    assert out.box.tolist() == [[0, 0, 64, 64]]
    assert train_transform(64)(sample).image.shape == (3, 64, 64)


# Crop to box, hidden parts


def test_crop_to_box_keeps_what_is_in_the_box() -> None:
    before = scene(80, 120)
    sample = crop_to_box(before)
    left, top, right, bottom = (int(edge) for edge in before.box[0])
    height, width = sample.image.shape[-2:]
    assert bottom - top <= height <= bottom - top + 1
    assert right - left <= width <= right - left + 1
    assert torch.equal(sample.image, before.image[:, top : top + height, left : left + width])
    assert torch.equal(sample.masks, before.masks[:, top : top + height, left : left + width])
    assert sample.box.tolist() == [[0, 0, right - left, bottom - top]]
    assert sample.parts[0].tolist() == [before.parts[0, 0] - left, before.parts[0, 1] - top]
    assert sample.visible.tolist() == [True, False]  # the blue square is outside
    assert before.visible.tolist() == [True, True]


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((10.0, 5.0, 20.0, 9.0), (5, 9), (10, 20)),
        ((10.7, 5.2, 20.4, 9.9), (5, 10), (10, 21)),
        ((-5.0, -2.0, 200.0, 100.0), (0, 40), (0, 60)),
        ((50.0, 30.0, 60.0, 40.0), (30, 40), (50, 60)),
        ((59.9, 39.9, 60.0, 40.0), (39, 40), (59, 60)),
        ((70.0, 50.0, 80.0, 60.0), (39, 40), (59, 60)),
    ],
)
def test_crop_to_box_stays_in_the_image(
    box: tuple[float, ...], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    image = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    boxes = tv_tensors.BoundingBoxes([box], format="XYXY", canvas_size=(40, 60))
    cropped = crop_to_box(Sample(tv_tensors.Image(image), 0, 0, box=boxes))
    assert torch.equal(cropped.image, image[:, slice(*rows), slice(*columns)])


def test_crop_to_box_needs_a_box() -> None:
    with pytest.raises(InputError, match="crop_to_box=true needs a data set with boxes; this one has none"):
        crop_to_box(Sample(torch.zeros(3, 4, 4), 0, 0))


def test_module_crops_in_training_and_test(tiny_cub: Cub) -> None:
    cropped = module(tiny_cub, crop_to_box=True, augment=False)
    for split in ("train", "val", "test"):
        dataset = cropped.dataset(split)
        images = cropped.test_images if split == "test" else cropped.train_images
        expected = hide_outside(evaluation_transform(32)(crop_to_box(images.load(int(dataset.indices[0])))))
        assert_same(dataset[0, 0], expected)
        assert not torch.equal(dataset[0, 0].image, module(tiny_cub, augment=False).dataset(split)[0, 0].image)


def test_hide_outside() -> None:
    points = [[-0.6, 3], [-0.5, 3], [9.4, 3], [9.5, 3], [3, -0.6], [3, -0.5], [3, 4.4], [3, 4.5], [2, 2]]
    parts = tv_tensors.KeyPoints(torch.tensor(points), canvas_size=(5, 10))
    visible = torch.ones(9, dtype=torch.bool)
    visible[8] = False
    sample = hide_outside(Sample(torch.zeros(3, 5, 10), 0, 0, parts=parts, visible=visible))
    assert sample.visible.tolist() == [False, True, True, False, False, True, True, False, False]
    bare = Sample(torch.zeros(3, 5, 10), 0, 0)
    assert hide_outside(bare) is bare


def test_collate_stacks_what_there_is() -> None:
    samples = [evaluation_transform(16)(scene(20, 30)), evaluation_transform(16)(scene(30, 20))]
    batch = collate(samples)
    for name in ("image", "masks", "parts", "visible"):
        for position, sample in enumerate(samples):
            assert torch.equal(getattr(batch, name)[position], getattr(sample, name).as_subclass(Tensor))
        assert type(getattr(batch, name)) is Tensor
    assert torch.equal(batch.box, torch.stack([sample.box.as_subclass(Tensor) for sample in samples]))
    assert batch.label.tolist() == [3, 3]
    bare = collate([Sample(torch.zeros(3, 4, 4), 1, 2)])
    assert bare[3:] == (None,) * 6
