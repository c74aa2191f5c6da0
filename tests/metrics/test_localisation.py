"""Localisation and form: values by hand, in numpy pixel by pixel, and of maps that are perfect, random and wrong."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from interp_models import METRICS
from interp_models.core.boxes import components
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.truth import Truth, in_boxes
from interp_models.metrics import Case
from interp_models.metrics.box_accuracy import BoxAccuracy
from interp_models.metrics.regions import overlaps, top_pixels

SIDE = 32
GRID = 8  # cells of 4 pixels


def images(n=1):
    return torch.full((n, 3, SIDE, SIDE), 0.5)


def pixel_map(*boxes):
    """A map with a pixel per cell: 1 in boxes (left, top, right, bottom), 0 elsewhere."""
    found = torch.zeros(len(boxes), SIDE, SIDE)
    for one, (x0, y0, x1, y1) in zip(found, boxes, strict=True):
        one[y0:y1, x0:x1] = 1
    return found


def score(name, maps, truth, **more):
    metric = METRICS.build(name, {"grid": tuple(maps.shape[1:])})
    values = metric.score(Case(images(len(maps)), maps, truth=truth, **more))
    return {key: metric.over_images(key, value).tolist() for key, value in values.items()}


def boxes_of(*boxes):
    return Truth(torch.tensor(boxes, dtype=torch.float32))


def test_boxes_by_hand():
    """The map is a square of 8 x 8, the box another one: half of it overlaps."""
    maps = pixel_map((8, 8, 16, 16), (8, 8, 16, 16), (8, 8, 16, 16))
    truth = boxes_of((12, 8, 20, 16), (8, 8, 16, 16), (20, 20, 30, 30))
    found = score("box_localisation", maps, truth)
    assert found["pointing"] == pytest.approx([0.5, 1, 0])  # half of the highest pixels are inside
    # Pixels with centres at 8.5 to 11.5 are 3.5 to 0.5 pixels from the box at 12; the tolerance is 15/224 of 32.
    assert pytest.approx(2.14, abs=0.01) == 15 / 224 * SIDE
    assert found["pointing_15"] == pytest.approx([6 / 8, 1, 0])
    assert found["energy"] == pytest.approx([0.5, 1, 0])
    assert found["f1"] == pytest.approx([0.5, 1, 0])  # precision and recall are 1/2
    assert found["le"] == [1, 0, 1]  # intersection over union 1/3


def test_several_boxes_and_none():
    """Energy counts the union, F1 the best box, an image without a box nothing."""
    nan = torch.nan
    maps = pixel_map((0, 0, 8, 4), (0, 0, 8, 4))
    truth = Truth(torch.tensor([[[0.0, 0, 4, 4], [4, 0, 8, 4]], [[nan] * 4, [nan] * 4]]))
    found = score("box_localisation", maps, truth)
    assert [value[0] for value in found.values()] == pytest.approx([1, 1, 1, 2 * 0.5 * 1 / 1.5, 1])
    assert all(math.isnan(value[1]) for value in found.values())
    overlapping = Truth(torch.tensor([[[0.0, 0, 6, 4], [2, 0, 8, 4]]]))
    assert score("box_localisation", maps[:1], overlapping)["energy"] == [1]


def test_om_needs_the_right_class_and_box():
    maps = pixel_map(*[(8, 8, 16, 16)] * 4)
    truth = boxes_of((8, 8, 16, 16), (8, 8, 16, 16), (20, 20, 30, 30), (8, 8, 16, 16))
    found = score("om", maps, truth, correct=torch.tensor([1.0, 0, 1, torch.nan]))["om"]
    assert found[:3] == [0, 1, 1]
    assert math.isnan(found[3])


def test_ties_of_the_pointing_game_count_in_part():
    maps = torch.zeros(1, GRID, GRID)
    maps[0, 0, 0] = maps[0, 7, 7] = maps[0, 0, 7] = 1.0
    assert score("box_localisation", maps, boxes_of((0, 0, 8, 8)))["pointing"] == pytest.approx([1 / 3])


def np_upsample(a):
    at = np.clip((np.arange(SIDE) + 0.5) * len(a) / SIDE - 0.5, 0, len(a) - 1)
    big = ndimage.map_coordinates(a, np.meshgrid(at, at, indexing="ij"), order=1, mode="nearest")
    return (big - big.min()) / (big.max() - big.min())


def np_largest(mask):
    """The largest component by flood fill."""
    left, best = {tuple(p) for p in np.argwhere(mask)}, set()
    while left:
        queue, own = [left.pop()], set()
        while queue:
            y, x = queue.pop()
            own.add((y, x))
            for p in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if p in left:
                    left.remove(p)
                    queue.append(p)
        best = own if len(own) > len(best) else best
    ys, xs = zip(*best, strict=True)
    found = np.zeros_like(mask)
    found[min(ys) : max(ys) + 1, min(xs) : max(xs) + 1] = True
    return found


def np_boxes(a, box):
    """All values of `box_localisation` for a map and one box."""
    m = np_upsample(a)
    inside, near = np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), bool)
    x0, y0, x1, y1 = box
    for y in range(SIDE):
        for x in range(SIDE):
            inside[y, x] = x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1
            away = math.hypot(max(x0 - x - 0.5, 0, x + 0.5 - x1), max(y0 - y - 0.5, 0, y + 0.5 - y1))
            near[y, x] = away <= 15 / 224 * SIDE
    p, r = m[inside].sum() / m.sum(), m[inside].sum() / inside.sum()
    rectangle = np_largest(m > m.mean())
    iou = (rectangle & inside).sum() / (rectangle | inside).sum()
    top = m == m.max()
    return [inside[top].mean(), near[top].mean(), p, 2 * p * r / (p + r), float(iou <= 0.5)]


def test_boxes_equal_numpy():
    rng = np.random.default_rng(0)
    maps, boxes = [], []
    for _ in range(12):
        x, y = rng.uniform(0, 14, 2)
        boxes.append((x, y, x + rng.uniform(6, 18), y + rng.uniform(6, 18)))
        x0, y0, x1, y1 = (round(edge / 4) for edge in boxes[-1])
        cells = rng.random((GRID, GRID))
        cells[y0:y1, x0:x1] += 1
        maps.append(ndimage.gaussian_filter(cells, 0.5))
    found = score("box_localisation", torch.tensor(np.stack(maps)), Truth(torch.tensor(boxes)))
    expected = [np_boxes(a, b) for a, b in zip(maps, boxes, strict=True)]
    np.testing.assert_allclose(np.stack(list(found.values()), axis=1), expected, atol=1e-5)
    assert 0 < np.mean(found["le"]) < 1


def test_box_accuracy_takes_the_best_threshold_of_all_images():
    """A pyramid of three levels: its box matches at the middle level only."""
    maps = torch.zeros(2, SIDE, SIDE)
    for level, half in ((0.2, 14), (0.5, 8), (0.9, 3)):
        maps[:, 16 - half : 16 + half, 16 - half : 16 + half] = level
    maps[0, 0, 0] = maps[1, 0, 0] = 1.0
    middle, small = (8, 8, 24, 24), (13, 13, 19, 19)
    assert score("box_accuracy", maps, boxes_of(middle, middle))["box_accuracy"] == [1, 1]
    # One image needs the middle level, the other the high one: one threshold finds one of them.
    found = score("box_accuracy", maps, boxes_of(middle, small))
    assert sorted(found["box_accuracy"]) == [0, 1]
    assert found["box_accuracy"][0] == 1  # of equal thresholds the first
    # 12 x 12 of 16 x 16: an overlap of .5625, which is enough for .3 and .5
    assert score("box_accuracy", maps[:1], boxes_of((10, 10, 22, 22)))["box_accuracy_v2"] == pytest.approx([2 / 3])


def test_box_accuracy_v2_takes_any_component():
    maps = pixel_map((0, 0, 12, 12))
    maps[0, 20:26, 20:26] = 1
    found = score("box_accuracy", maps, boxes_of((20, 20, 26, 26)))
    assert found == {"box_accuracy": [0], "box_accuracy_v2": [1]}


def test_box_accuracy_over_batches_is_that_of_all():
    rng = torch.Generator().manual_seed(0)
    maps = torch.rand(6, GRID, GRID, generator=rng)
    truth = Truth(torch.tensor([[4.0 + i, 4, 20, 24 - i] for i in range(6)]))
    whole, parts = (BoxAccuracy(grid=(GRID, GRID)) for _ in range(2))
    whole.update(Case(images(6), maps, truth=truth))
    for rows in ([0, 1], [2, 3, 4], [5]):
        parts.update(Case(images(len(rows)), maps[rows], truth=truth.each(lambda x, rows=rows: x[rows])))
    assert all(torch.equal(whole.per_image()[key], parts.per_image()[key]) for key in whole.keys)
    assert whole.compute().keys() == set(BoxAccuracy.keys)


def test_sm_by_hand():
    """The box around the map is a quarter of the image; the crop is the bright quarter alone."""
    image = torch.zeros(1, 3, SIDE, SIDE)
    image[:, :, :16, :16] = 0.8

    def light(x):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([mean, 1 - mean], dim=1)

    maps = pixel_map((0, 0, 16, 16), (0, 0, 4, 4))
    case = Case(image.expand(2, -1, -1, -1), maps, 0, light)
    found = METRICS.build("sm", {"grid": (SIDE, SIDE)}).score(case)["sm"]
    assert found.tolist() == pytest.approx([math.log(0.25) - math.log(0.8), math.log(0.05) - math.log(0.8)], abs=1e-5)


def mask_truth(*boxes):
    return Truth(mask=pixel_map(*boxes).bool())


def test_masks_by_hand():
    """64 of 1024 pixels; the map marks the right half of the object and as much beside it."""
    found = score("mask_localisation", pixel_map((12, 8, 20, 16)), mask_truth((8, 8, 16, 16)))
    edges = found.pop("edges")
    assert {key: value[0] for key, value in found.items()} == pytest.approx(
        {
            "iou": 1 / 3, "dice": 0.5, "mask_energy": 0.5, "energy_outside": 0.5,
            # The 102 most salient pixels are the 64 of the map and 38 of the other 960, of which 32 are in the object.
            "mask_relevance": (32 + 38 * 32 / 960) / 102, "object_coverage": 0.5,
        },
        abs=1e-5,
    )  # fmt: skip
    assert -0.1 < edges[0] < 0.6


def test_edges_are_the_cosine_of_gradients():
    rng = np.random.default_rng(1)
    a, box = ndimage.gaussian_filter(rng.random((GRID, GRID)), 1), (6, 9, 21, 27)
    found = score("mask_localisation", torch.tensor(a)[None], mask_truth(box))["edges"]
    mask = pixel_map(box)[0].numpy().reshape(GRID, 4, GRID, 4).mean(axis=(1, 3))

    def gradient(big):
        padded = np.pad(big, 1, mode="edge")
        down, right = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2, (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
        return np.concatenate([down.ravel(), right.ravel()])

    ours, theirs = gradient(np_upsample(a)), gradient(np_upsample(mask))
    assert found[0] == pytest.approx(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs), abs=1e-5)


def test_a_perfect_map_beats_a_random_one_beats_the_inverse():
    """On grids that are coarser than the object, too."""
    generator = torch.Generator().manual_seed(0)
    boxes = [(4, 4, 20, 24), (8, 12, 28, 28), (0, 8, 16, 24), (12, 0, 28, 16)] * 4
    mask = pixel_map(*boxes).bool()
    truth = Truth(
        torch.tensor(boxes).float(), mask, None, torch.tensor([[[(a + c) / 2, (b + d) / 2]] for a, b, c, d in boxes])
    )
    perfect = torch.nn.functional.avg_pool2d(mask.float(), 4)
    random = torch.rand(len(boxes), GRID, GRID, generator=generator)
    for name in ("box_localisation", "mask_localisation", "box_accuracy", "part_relevance"):
        means = []
        for maps in (perfect, random, 1 - perfect):
            metric = METRICS.build(name, {"grid": (GRID, GRID)})
            metric.update(Case(images(len(boxes)), maps, truth=truth))
            means.append({key: float(value) for key, value in metric.compute().items()})
        for key, higher in metric.higher_is_better_by_key.items():
            best, middle, worst = (mean[key] if higher else -mean[key] for mean in means)
            assert best > middle, key
            assert middle >= worst if key in ("le", "box_accuracy", "box_accuracy_v2") else middle > worst, key
    assert score("mask_localisation", perfect, truth)["edges"] == pytest.approx([1] * len(boxes), abs=1e-5)
    assert score("mask_localisation", 1 - perfect, truth)["edges"] == pytest.approx([-1] * len(boxes), abs=1e-5)


def test_part_relevance_by_hand():
    """Of the 102 highest pixels 64 are in a corner, and the others may be any."""
    truth = Truth(
        parts=torch.tensor([[[4.0, 4.0], [28.0, 28.0]]] * 3),
        visible=torch.tensor([[True, False], [True, True], [False, False]]),
    )
    found = score("part_relevance", pixel_map(*[(0, 0, 8, 8)] * 3), truth)["part_relevance"]
    disk = sum(math.hypot(x + 0.5, y + 0.5) <= 15 / 224 * SIDE for x in range(-4, 4) for y in range(-4, 4))
    rest = (102 - 64) / (SIDE**2 - 64)
    assert found[:2] == pytest.approx([disk / 102, (disk + rest * disk) / 102])
    assert math.isnan(found[2])


def test_form_by_hand():
    maps = torch.zeros(3, 2, 4)
    maps[0, 0, 0] = 1.0
    maps[1, 0] = 1.0
    maps[2].view(-1)[:] = torch.arange(8.0)
    found = METRICS.build("form", {"grid": (2, 4)}).score(Case(images(3), maps))
    assert found["complexity"][:2].tolist() == pytest.approx([0, math.log(4)])
    assert found["gini"].tolist() == pytest.approx(
        [1 - 1 / 8, 1 - 4 / 8, 1 - 2 * sum(k / 28 * (8 - k - 0.5) / 8 for k in range(8))]
    )
    levels = [stats.entropy([7, 1]), stats.entropy([4, 4]), math.log(8)]
    assert found["entropy"].tolist() == pytest.approx(levels)


def test_top_pixels_share_ties():
    chosen = top_pixels(torch.tensor([[[3.0, 2.0], [2.0, 1.0]]]), torch.tensor([2]))
    assert chosen.tolist() == [[[1, 0.5], [0.5, 0]]]


def test_components_and_overlaps():
    region = np.zeros((6, 6), bool)
    region[0, 0] = region[2:5, 1:3] = region[5, 3] = True
    assert components(region)[0].tolist() == [1, 2, 3, 5]
    assert overlaps(components(region), region).tolist() == pytest.approx([6 / 8, 1 / 8, 1 / 8])


def test_pixel_centres_decide():
    assert in_boxes(torch.tensor([[[0.4, 0.6, 1.5, 2.0]]]), (2, 2))[0, 0].tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("name", ["box_localisation", "om", "box_accuracy", "mask_localisation", "part_relevance"])
def test_without_ground_truth_a_metric_says_what_it_needs(name):
    with pytest.raises(NotApplicable, match=r"needs (a box|a mask|key points|the label).*, which is unknown here"):
        score(name, torch.rand(1, 4, 4), Truth())


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (Truth(boxes=torch.zeros(2, 4)), r"boxes must be a tensor \(1, any, 4\); got \(2, 1, 4\)"),
        (Truth(boxes=torch.zeros(1, 3)), r"boxes must be a tensor \(1, any, 4\)"),
        (Truth(boxes=[[0, 0, 1, 1]]), r"boxes must be a tensor \(1, any, 4\); got list"),
        (Truth(mask=torch.zeros(1, SIDE, SIDE)), r"mask must be a tensor \(1, 32, 32\) of torch.bool"),
        (
            Truth(mask=torch.zeros(1, 8, 8).bool()),
            r"mask must be a tensor \(1, 32, 32\) of torch.bool; got \(1, 8, 8\)",
        ),
        (Truth(parts=torch.zeros(1, 3, 3)), r"parts must be a tensor \(1, any, 2\)"),
        (Truth(parts=torch.zeros(1, 3, 2), visible=torch.ones(1, 2).bool()), r"visible must be a tensor \(1, 3\)"),
    ],
)
def test_wrong_ground_truth_is_refused(truth, message):
    score("form", torch.rand(1, 4, 4), Truth(torch.zeros(1, 4)))
    with pytest.raises(InputError, match=message):
        score("form", torch.rand(1, 4, 4), truth)


@pytest.mark.parametrize("name", ["box_localisation", "box_accuracy"])
def test_a_batch_without_any_box_is_undefined(name):
    """As an image without a box in a batch with others is."""
    maps = torch.rand(2, 4, 4)
    none, nan = (Truth(boxes) for boxes in (torch.zeros(2, 0, 4), torch.full((2, 1, 4), torch.nan)))
    for boxes in (none, nan):
        metric = METRICS.build(name)
        for key, value in metric.score(Case(images(2), maps, truth=boxes)).items():
            assert metric.over_images(key, value).isnan().all()
