"""Values of the prototype metrics by hand, and against loops after the papers that share no code with ours."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from interp_models.core.boxes import activation_boxes
from interp_models.core.rng import seed_of
from interp_models.metrics import consistency, prototype_usage, purity, stability
from interp_models.metrics.misalignment import Misalignment
from interp_models.metrics.prototype_base import Found, peaks
from interp_models.metrics.prototype_regions import Comprehensiveness, Distinctiveness
from interp_models.metrics.stability import noise
from tests.contract.prototype_metrics import Data, Fake, case, judge
from tests.data.make_cub import PARTS
from tests.mutation import mutated

# --- The papers' definitions in loops, image by image, prototype by prototype. ---


def kernel(t):
    """Keys' cubic convolution with a = -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def np_bicubic(a, size):
    for axis in (0, 1):
        cells = a.shape[axis]
        rows = np.zeros((size[axis], cells))
        for pixel in range(size[axis]):
            at = (pixel + 0.5) * cells / size[axis] - 0.5
            for cell in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
                rows[pixel, min(max(cell, 0), cells - 1)] += kernel(at - cell)
        a = np.moveaxis(np.tensordot(rows, a, (1, axis)), 0, axis)
    return a


def parts_found(saliency, parts, visible, size):
    """EvalProtoPNet's get_corresponding_object_parts: 1 for parts in the region around the peak, (J,)."""
    large = np_bicubic(saliency, size)
    row, column = (int(where[0]) for where in np.where(large == large.max()))
    half_height, half_width = 36 * size[0] / 224, 36 * size[1] / 224
    found = np.zeros(len(parts), int)
    for j, (x, y) in enumerate(parts):
        if visible[j]:
            high = max(0, row - half_height) <= y <= min(size[0], row + half_height)
            wide = max(0, column - half_width) <= x <= min(size[1], column + half_width)
            found[j] = high and wide
    return found


def images_of(model, data, prototype):
    return [i for i in range(len(data.label)) if model.prototype_classes[prototype, data.label[i]]]


def consistency_oracle(model, data):
    """EvalProtoPNet's evaluate_consistency."""
    values = []
    for p in range(len(model.prototype_classes)):
        images = images_of(model, data, p)
        to_part = [parts_found(model.maps[i, p].numpy(), data.parts[i], data.visible[i], data.size) for i in images]
        sums = np.sum(to_part, axis=0) if images else []
        shown = [sum(bool(data.visible[i, j]) for i in images) for j in range(data.parts.shape[1])]
        shares = [found / of for found, of in zip(sums, shown, strict=False) if of]
        values.append(float(max(shares) >= 0.8) if shares else np.nan)
    return values


def stability_oracle(model, data):
    """EvalProtoPNet's evaluate_stability, where the maps of noisy images are known."""
    values = []
    for p in range(len(model.prototype_classes)):
        same = []
        for i in images_of(model, data, p):
            before, after = (
                parts_found(maps[i, p].numpy(), data.parts[i], data.visible[i], data.size)
                for maps in (model.maps, model.moved)
            )
            same.append(list(before) == list(after))
        values.append(np.mean(same) if same else np.nan)
    return values


def purity_oracle(model, data):
    """PIP-Net's get_topk_cub and eval_prototypes_cub_parts_csv, with a stride that is not rounded."""
    values = []
    _, _, rows, columns = model.maps.shape
    high, wide = data.size[0] / 7, data.size[1] / 7
    for p in range(len(model.prototype_classes)):
        if not model.prototype_classes[p].any():
            values.append(np.nan)
            continue
        scores = [(-float(model.maps[i, p].max()), i) for i in range(len(data.label))]
        presences = {}
        for _, i in sorted(scores)[:10]:
            cells = [(-float(model.maps[i, p, r, c]), r, c) for r in range(rows) for c in range(columns)]
            _, r, c = min(cells)
            top, left = r * (data.size[0] - high) / (rows - 1), c * (data.size[1] - wide) / (columns - 1)
            in_image = {}
            for j, (x, y) in enumerate(data.parts[i].tolist()):
                if data.visible[i, j]:
                    inside = top <= y <= top + high and left <= x <= left + wide
                    name = PARTS[j].replace("left", "right")
                    in_image[name] = in_image.get(name, False) or inside
            for name, inside in in_image.items():
                presences.setdefault(name, []).append(inside)
        values.append(max((np.mean(seen) for seen in presences.values()), default=np.nan))
    return values


ORACLES = [
    ("Consistency", consistency, consistency_oracle),
    ("Stability", stability, stability_oracle),
    ("Purity", purity, purity_oracle),
]
CASES = [
    {},
    {"seed": 1, "n": 9},
    {"seed": 2, "n": 40, "grid": (4, 5), "size": (56, 112)},
    {"seed": 3, "n": 5, "grid": (14, 14)},
]


def check_against_oracle(name, module, oracle, cases=CASES):
    for options in cases:
        model, data = case(**options)
        (values,) = judge(getattr(module, name)(model, PARTS), model, data).values()
        np.testing.assert_array_equal(values, np.float32(oracle(model, data)), str(options))


@pytest.mark.parametrize(("name", "module", "oracle"), ORACLES)
def test_metrics_equal_loops(name, module, oracle):
    check_against_oracle(name, module, oracle)


OWN_MUTATIONS = [
    (0, "ALWAYS = 0.8", "ALWAYS = 0.9"),
    (0, "visible.float()", "torch.ones_like(visible).float()"),
    (0, ".any(dim=1)\n        looked", ".all(dim=1)\n        looked"),
    (0, "undefined_without(self.hits, self.shown)", "(self.hits / self.shown.max())"),
    (0, "self.in_use(torch.where(looked, always.float(), torch.nan))", "always.float()"),
    (1, "(before == after).all(dim=1)", "(before == after).any(dim=1)"),
    (1, "for maps in (found.maps, noisy)", "for maps in (found.maps, found.maps)"),
    (2, "NEAREST = 10", "NEAREST = 9"),
    (2, "descending=True", "descending=False"),
    (2, "by_index = index.argsort(dim=1, stable=True)", "by_index = index.argsort(dim=1, descending=True)"),
    (2, "side = size / 7", "side = size / 8"),
    (2, "(size - side) / (cells - 1)", "size / cells"),
    (2, "x <= right", "x < right"),
    (2, "patch(cell // columns, rows,", "patch(cell % columns, rows,"),
    (2, "shown = found.visible[:, None].expand_as(inside)", "shown = torch.ones_like(inside)"),
    (2, "inside &= found.visible[:, None]", "inside &= True"),
    (2, '.replace("left ", "")', ""),
    (2, ".amax(dim=1)\n", ".mean(dim=1)\n"),
]


@pytest.mark.parametrize(("which", "right", "wrong"), OWN_MUTATIONS)
def test_the_loops_reject_mutations(which, right, wrong):
    name, module, oracle = ORACLES[which]
    copy = mutated(module.__name__, right, wrong)
    with pytest.raises(AssertionError):
        check_against_oracle(name, copy, oracle)


BASE_MUTATIONS = [
    ("* 36 / 224", "* 32 / 224"),
    ("away <= reach", "away < reach"),
    (".all(dim=2) & visible", ".all(dim=2)"),
    ("[size[1], size[0]]", "[size[0], size[1]]"),
    ("pixel % size[1], pixel // size[1]", "pixel // size[1], pixel % size[1]"),
]


@pytest.mark.parametrize(("right", "wrong"), BASE_MUTATIONS)
def test_the_loops_reject_mutations_of_what_is_shared(right, wrong, monkeypatch):
    copy = mutated("interp_models.metrics.prototype_base", right, wrong)
    for _, module, _ in ORACLES[:2]:
        monkeypatch.setattr(module, "near_parts", copy.near_parts)
    with pytest.raises(AssertionError):
        [check_against_oracle(*one) for one in ORACLES[:2]]


# --- Values known by hand. ---


def spots(cells, grid, value=1.0):
    """Maps (n, 1, h, w) that are 0 but in a cell (row, column) each."""
    maps = torch.zeros(len(cells), 1, *grid)
    for i, (row, column) in enumerate(cells):
        maps[i, 0, row, column] = value
    return maps


def one_class(maps, moved=None, **options):
    """A model with one prototype, of the one class."""
    return Fake(maps, torch.ones(1, 1, dtype=torch.bool), moved, **options)


def test_peaks_of_upsampled_maps():
    """An odd number of pixels per cell has one in the cell's middle, where the interpolation is exact."""
    cells = [(1, 1), (3, 5), (5, 2)]
    assert peaks(spots(cells, (7, 7))[:, 0], (21, 35)).tolist() == [[5 * c + 2, 3 * r + 1] for r, c in cells]
    pair = spots([(3, 2)], (7, 7))[:, 0]
    pair[0, 3, 3] = 1.0  # two equal cells: cubic pieces are highest between them, on either side of the middle
    assert peaks(pair, (21, 21))[0, 0] in (8, 9)
    many = torch.rand(70, 5, 6, dtype=torch.float64)  # more than are upsampled at a time
    for found, saliency in zip(peaks(many, (20, 48)), many, strict=True):
        large = np_bicubic(saliency.numpy(), (20, 48))
        assert found.tolist() == [large.argmax() % 48, large.argmax() // 48]
    assert peaks(torch.zeros(2, 3, 3), (9, 9)).tolist() == [[0, 0]] * 2
    assert peaks(torch.zeros(0, 3, 3), (9, 9)).shape == (0, 2)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(0, 0, 1), (36, 18, 1), (-36, -18, 1), (36.01, 0, 0), (-36.01, 0, 0), (0, 18.01, 0), (0, -18.01, 0), (30, 30, 0)],
)
def test_the_square_around_the_peak(x, y, expected):
    """72 / 224 of each side of the image; its border is inside. Cells of 7 pixels."""
    model = one_class(spots([(8, 15)], (16, 32)))
    data = Data([0], torch.tensor([[[7 * 15 + 3.0 + x, 7 * 8 + 3.0 + y]]]), size=(112, 224))
    (value,) = judge(consistency.Consistency(model, ["beak"]), model, data).values()
    assert value.tolist() == [expected]


def pointing(hits, n, visible=None):
    """A map that is highest in the middle of 21 x 21 pixels, and a part that is there in some of n images."""
    model = one_class(spots([(3, 3)] * n, (7, 7)))
    parts = torch.tensor([[[10.0, 10.0] if i in hits else [0.0, 0.0]] for i in range(n)])
    shown = None if visible is None else torch.tensor([[i in visible] for i in range(n)])
    return model, Data([0] * n, parts, shown, (21, 21))


@pytest.mark.parametrize(
    ("hits", "n", "expected"), [(4, 5, 1), (8, 10, 1), (12, 15, 1), (24, 30, 1), (7, 9, 0), (79, 100, 0), (80, 100, 1)]
)
def test_eighty_percent_are_enough(hits, n, expected):
    model, data = pointing(range(hits), n)
    assert judge(consistency.Consistency(model, ["beak"]), model, data)["consistency"].tolist() == [expected]


@pytest.mark.parametrize(
    ("hits", "visible", "expected"),
    [([0, 1], [0, 1], 1), ([0, 1], [0, 1, 2], 0), (range(5), [], np.nan), ([0, 1, 2, 3], [3, 4], 0)],
)
def test_parts_that_do_not_show_do_not_count(hits, visible, expected):
    model, data = pointing(hits, 5, visible)
    (value,) = judge(consistency.Consistency(model, ["beak"]), model, data)["consistency"].tolist()
    assert value == pytest.approx(expected, nan_ok=True)


def test_one_part_must_be_found_not_one_or_the_other():
    model, data = pointing(range(5), 10)
    data = Data(data.label, torch.cat([data.parts, data.parts.flip(0)], dim=1), size=(21, 21))
    assert judge(consistency.Consistency(model, ["beak", "tail"]), model, data)["consistency"].tolist() == [0]


def test_only_images_of_its_classes_count():
    """Prototypes of class 0, of no class, of a class without images and of both classes, that are right in class 0."""
    classes = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 1, 0], [0, 1, 0]]).bool()
    _, data = pointing([0, 1, 2], 6)
    data.label = torch.tensor([0, 0, 0, 1, 1, 1])
    maps = spots([(3, 3)] * 6, (7, 7)).expand(-1, 5, -1, -1)
    model = Fake(maps, classes, maps * (data.label == 0).view(-1, 1, 1, 1))
    value = judge(consistency.Consistency(model, ["beak"]), model, data)["consistency"]
    np.testing.assert_array_equal(value, [1, np.nan, np.nan, 0, 0])
    data.parts[3:] = 10.0  # in class 1 the peak is there without noise alone; then it is the first pixel
    value = judge(stability.Stability(model, ["beak"]), model, data)["stability"]
    np.testing.assert_array_equal(value, [1, np.nan, np.nan, 0.5, 0])


def test_stability_is_the_share_of_images_with_the_very_same_parts():
    """Five images: the peak stays; it moves with the same parts near; loses one; swaps one; finds none either way."""
    before, after = [(3, 3)] * 5, [(3, 3), (3, 4), (0, 6), (0, 6), (6, 0)]
    model = one_class(spots(before, (7, 7)), spots(after, (7, 7)))
    middle, corner, away = [31.0, 31.0], [60.0, 2.0], [2.0, 2.0]  # 63 x 63 pixels: cells of 9, reach of 10.125
    first = torch.tensor([middle, [36.0, 31.0], middle, middle, away])
    second = torch.tensor([middle, [36.0, 31.0], away, corner, away])
    data = Data([0] * 5, torch.stack([first, second], dim=1), size=(63, 63))
    metric = stability.Stability(model, ["beak", "tail"])
    assert judge(metric, model, data)["stability"].tolist() == [pytest.approx(3 / 5)]
    data.visible[2, 0] = False  # what was lost does not show
    metric.reset()
    assert judge(metric, model, data)["stability"].tolist() == [pytest.approx(4 / 5)]


def test_images_are_given_again_with_noise():
    model, data = case(n=6)
    judge(stability.Stability(model, PARTS), model, data, 2, [4, 1, 0])
    plain, noisy = torch.cat(model.seen[::2]), torch.cat(model.seen[1::2])
    assert plain[:, 0, 0, 0].tolist() == [4, 1, 0]
    torch.testing.assert_close(noisy - plain, noise(torch.tensor([4, 1, 0]), (56, 56)), rtol=0, atol=1e-6)


def check_noise(noise=noise):
    """A function of the image's number; normal with σ = 0.2, cut off at 0.25, in ImageNet's units."""
    together = noise(torch.tensor([5, 0, 123456]), (40, 30))
    assert together.shape == (3, 3, 40, 30)
    for number, drawn in zip([5, 0, 123456], together, strict=True):
        torch.manual_seed(number + 1)  # torch's own generator has no part in it
        assert torch.equal(noise(torch.tensor([number]), (40, 30))[0], drawn)
    assert len(together.unique(dim=0)) == 3
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    drawn = noise(torch.arange(4), (100, 100)) / std
    assert float(drawn.abs().max()) == pytest.approx(0.25)
    cut = drawn.abs() > 0.2499
    assert float(cut.float().mean()) == pytest.approx(0.2113, abs=0.005)  # of a normal variable beyond 1.25 σ
    assert float((drawn.abs() < 0.2).float().mean()) == pytest.approx(0.6827, abs=0.005)
    np.testing.assert_allclose(drawn.mean(dim=(0, 2, 3)), 0, atol=0.004)
    correlation = np.corrcoef(drawn.transpose(0, 1).flatten(1))
    np.testing.assert_allclose(correlation, np.eye(3), atol=0.02)  # colours differ, too


def test_noise():
    check_noise()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("SIGMA, MOST = 0.2, 0.25", "SIGMA, MOST = 0.25, 0.25"),
        ("SIGMA, MOST = 0.2, 0.25", "SIGMA, MOST = 0.2, 0.3"),
        ("clamp(-MOST, MOST) * std", "clamp(-MOST, MOST)"),
        ("torch.randn(3, *size,", "torch.randn(1, *size,"),
        ("seed_of(int(i))", "seed_of(len(index))"),
        (", generator=torch.Generator().manual_seed(seed_of(int(i)))", ""),
        ("(0.229, 0.224, 0.225)", "(0.229, 0.229, 0.225)"),
    ],
)
def test_mutations_of_the_noise_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_noise(mutated("interp_models.metrics.stability", right, wrong).noise)


def purity_of(
    cells, parts, visible=None, grid=(7, 7), size=(224, 224), names=("beak", "tail"), order=None, heights=None
):
    """Of one prototype whose map i is highest in cell i."""
    maps = spots(cells, grid)
    if heights is not None:
        maps = maps * torch.tensor(heights).view(-1, 1, 1, 1)
    model = one_class(maps)
    parts = torch.tensor(parts, dtype=torch.float32)
    data = Data([0] * len(cells), parts, None if visible is None else torch.tensor(visible), size)
    (value,) = judge(purity.Purity(model, names), model, data, 4, order)["purity"].tolist()
    return value


@pytest.mark.parametrize(
    ("grid", "size", "cell", "box"),
    [
        ((7, 7), (224, 224), (0, 6), (192, 0, 224, 32)),
        ((7, 7), (224, 224), (2, 3), (96, 64, 128, 96)),
        ((4, 4), (224, 224), (3, 1), (64, 192, 96, 224)),
        ((28, 13), (224, 224), (27, 12), (192, 192, 224, 224)),
        ((28, 13), (224, 224), (9, 6), (96, 64, 128, 96)),
        ((1, 1), (224, 224), (0, 0), (96, 96, 128, 128)),
        ((7, 3), (112, 448), (6, 1), (192, 96, 256, 112)),
    ],
)
def test_the_patch_of_a_cell(grid, size, cell, box):
    x0, y0, x1, y1 = box
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    inside = [(x0, y0), (x1, y1), (x0, y1), middle]
    outside = [(x0 - 0.1, middle[1]), (x1 + 0.1, middle[1]), (middle[0], y0 - 0.1), (middle[0], y1 + 0.1)]
    for expected, points in ((1, inside), (0, outside)):
        for point in points:
            assert purity_of([cell], [[point]], grid=grid, size=size, names=["beak"]) == expected, point


IN, OUT = (16.0, 16.0), (100.0, 100.0)
"""Places in the patch of the first cell, and not."""


def test_the_ten_most_similar_images_count():
    """Of 12, the two least similar are the only ones that show the beak in the patch; then three others do."""
    heights = [3.0, 2.0, 9.0, 8.0, 7.0, 1.5, 6.0, 5.0, 4.0, 1.0, 10.0, 11.0]
    for shown, expected in (([5, 9], 0.0), ([1, 5, 9], 0.1), ([0, 1, 2, 9], 0.3)):
        parts = [[IN if i in shown else OUT] for i in range(12)]
        value = purity_of([(0, 0)] * 12, parts, names=["beak"], heights=heights)
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("order", [range(12), range(11, -1, -1), [11, 3, 10, 0, 9, 1, 8, 2, 7, 4, 6, 5]])
def test_the_first_of_equally_similar_images_count(order):
    parts = [[IN if i in (0, 1, 9, 10, 11) else OUT] for i in range(12)]
    assert purity_of([(0, 0)] * 12, parts, names=["beak"], order=order) == pytest.approx(0.3)


def test_the_first_of_equal_cells_counts():
    model = one_class(torch.ones(1, 1, 7, 7))
    data = Data([0], torch.tensor([[IN]]), size=(224, 224))
    assert judge(purity.Purity(model, ["beak"]), model, data)["purity"].tolist() == [1]


def test_purity_is_that_of_the_purest_part_among_images_that_show_it():
    """The beak shows in 8 of 10 images, in the patch in 6; the tail in all, in the patch in 7; a leg in 2, in one."""
    parts = [[IN if i < 6 else OUT, IN if i < 7 else OUT, IN if i == 0 else OUT] for i in range(10)]
    visible = [[i < 8, True, i < 2] for i in range(10)]
    assert purity_of([(0, 0)] * 10, parts, visible, names=["beak", "tail", "right leg"]) == pytest.approx(0.75)
    hidden = [[False, True, i > 0] for i in range(10)]
    assert purity_of([(0, 0)] * 10, parts, hidden, names=["beak", "tail", "right leg"]) == pytest.approx(0.7)


def test_left_and_right_are_one_part():
    """In the patch: the left eye in two images, the right one in two others, both in one; one image shows neither."""
    parts = [[IN if i in (0, 1, 4) else OUT, IN if i in (2, 3, 4) else OUT] for i in range(7)]
    visible = [[i != 6 and i != 2, i != 6] for i in range(7)]
    eyes = purity_of([(0, 0)] * 7, parts, visible, names=["left eye", "right eye"])
    assert eyes == pytest.approx(5 / 6)
    assert purity_of([(0, 0)] * 7, parts, visible, names=["left eye", "right wing"]) == pytest.approx(3 / 5)


def test_fewer_than_ten_images():
    parts = [[IN], [OUT], [IN]]
    assert purity_of([(0, 0)] * 3, parts, names=["beak"]) == pytest.approx(2 / 3)
    assert purity_of([(0, 0)] * 3, parts, [[False], [True], [False]], names=["beak"]) == 0
    assert np.isnan(purity_of([(0, 0)] * 3, parts, [[False]] * 3, names=["beak"]))


def test_similarities_may_be_negative():
    parts = [[IN]] * 10 + [[OUT]] * 2
    maps = spots([(0, 0)] * 12, (7, 7)) - 5
    maps[10:] -= 1  # linear activations: the nearest are those closest to 0
    model = one_class(maps)
    data = Data([0] * 12, torch.tensor(parts), size=(224, 224))
    assert judge(purity.Purity(model, ["beak"]), model, data)["purity"].tolist() == [1]


def test_splits():
    assert (purity.Purity.split, purity.PurityTrain.split) == ("test", "train")
    model, data = case()
    train, test = (judge(cls(model, PARTS), model, data) for cls in (purity.PurityTrain, purity.Purity))
    np.testing.assert_array_equal(train["purity_train"], test["purity"])


# --- Prototypes by themselves. ---


def usage_model():
    """Six prototypes in two classes: 1 removed, 3 and 4 without a weight of note, 2 and 5 equal to 0."""
    classes = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 1], [0, 1], [0, 1]]).bool()
    prototypes = torch.tensor([1.0, 1, 1, 1, 2, 1]).view(6, 1, 1, 1).expand(-1, 3, 2, 1).clone()
    weights = torch.tensor([[1.0, 9, 0.002, 1e-3, -5, 0], [-0.5, 9, 0, -2, 0.0005, 0.5]])
    return classes, prototypes, weights


def check_usage(module=prototype_usage):
    classes, prototypes, weights = usage_model()
    model = Fake(torch.zeros(1, 6, 2, 2), classes, weights=weights, prototypes=prototypes)
    values = module.PrototypeUsage(model).per_prototype()
    expected = {
        "used": [1, 0, 1, 0, 0, 1],
        "duplicates": [0, np.nan, 1, np.nan, np.nan, 1],
        "sparsity": [0, np.nan, 0.5, 0.5, 0.5, 0.5],
    }
    for key, value in expected.items():
        np.testing.assert_array_equal(values[key], np.float32(value), key)
    means = module.PrototypeUsage(model).of_all_ranks()
    assert {key: float(value.nanmean()) for key, value in means.items()} == pytest.approx(
        {"used": 1 / 2, "duplicates": 2 / 3, "sparsity": 2 / 5}
    )
    model.prototypes[2, 0, 1, 0] += 1e-6  # as near as can be, but no duplicate
    assert module.PrototypeUsage(model).per_prototype()["duplicates"].nansum() == 1
    model.prototype_weights = None  # a tree: all that are left are used
    values = module.PrototypeUsage(model).per_prototype()
    np.testing.assert_array_equal(values["used"], [1, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(values["duplicates"], [0, np.nan, 0, 1, 0, 1])
    assert bool(values["sparsity"].isnan().all())


def test_usage_by_hand():
    check_usage()


def spread_oracle(vectors):
    distances = torch.cdist(vectors, vectors).square().numpy()
    n = len(vectors)
    return [sum(distances[i, j] for j in range(n) if j != i) / (n - 1) for i in range(n)]


def check_spread(module=prototype_usage):
    classes = torch.ones(7, 2, dtype=torch.bool)
    classes[[2, 5]] = False
    prototypes = torch.rand(7, 6, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    model = Fake(torch.zeros(1, 7, 2, 2), classes, prototypes=prototypes)
    metric = module.PrototypeSpread(model)
    value, kept = metric.per_prototype()["spread"], [0, 1, 3, 4, 6]
    assert value[[2, 5]].isnan().all()
    np.testing.assert_allclose(value[kept], spread_oracle(prototypes[kept].flatten(1)), rtol=1e-9)
    off_diagonal = torch.pdist(prototypes[kept].flatten(1)).square().mean()
    assert float(metric.of_all_ranks()["spread"].nanmean()) == pytest.approx(float(off_diagonal))
    classes[1:] = False
    assert module.PrototypeSpread(model).per_prototype()["spread"].isnan().all()  # one has no other


def test_spread_is_the_mean_of_all_distances():
    check_spread()


USAGE_MUTATIONS = [
    ("(weights.detach() > ZERO)", "(weights.detach().abs() > ZERO)"),
    ("(weights.detach() > ZERO)", "(weights.detach() >= ZERO)"),
    ("ZERO = 1e-3", "ZERO = 1e-2"),
    ("abs() <= ZERO", "abs() < ZERO"),
    ("(weights.detach().abs() <= ZERO)", "(weights.detach() <= ZERO)"),
    (".float().mean(dim=0))", ".float().amax(dim=0))"),
    ("first[group] < numbers", "first[group] == numbers"),
    ('numbers, "amin"', 'numbers, "amax"'),
    ("_vectors(model)[self.used]", "_vectors(model)[self.used].round(decimals=3)"),
    ("self.used = self.classes.any(dim=1)", "self.used = self.classes.any(dim=1) | True"),
    ("max(len(vectors) - 1, 1)", "len(vectors)"),
    ("(len(vectors) * energy + energy.sum())", "(len(vectors) * energy)"),
    ("used = self.classes.any(dim=1)\n        vectors", "used = self.classes.any(dim=1) | True\n        vectors"),
]


@pytest.mark.parametrize(("right", "wrong"), USAGE_MUTATIONS)
def test_mutations_of_usage_and_spread_are_rejected(right, wrong):
    copy = mutated("interp_models.metrics.prototype_usage", right, wrong)
    with pytest.raises(AssertionError):
        (check_usage(copy), check_spread(copy))


class Pooled(torch.nn.Module):
    """Two prototypes of class 0 and one of class 1 over 4 x 4 cells: brightness of a cell's middle, or of all."""

    def __init__(self, whole: float) -> None:
        super().__init__()
        self.whole = whole
        self.prototype_classes = torch.tensor([[True, False], [True, False], [False, True]])

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        cells = images.mean(dim=1, keepdim=True)[:, :, 3::8, 3::8]
        maps = (1 - self.whole) * cells + self.whole * cells.mean(dim=(2, 3), keepdim=True) * (cells > 0.8)
        maps = torch.cat([maps, 0.5 * maps, 0.9 * maps.flip(3)], dim=1)
        return SimpleNamespace(maps=maps, logits=maps.flatten(2).amax(dim=2)[:, [0, 2]])


def found_of(model, images, label):
    n = len(images)
    return Found(images, model(images).maps, label, torch.arange(n), None, None)


def test_misalignment_of_a_local_prototype_is_none() -> None:
    """A prototype of one cell cannot be changed from outside its box; one that reads the whole image can."""
    images = torch.full((3, 3, 32, 32), 0.3)
    images[:, :, 8:16, 8:16] = 0.9
    label = torch.tensor([0, 0, 1])
    values = {}
    for whole in (0.0, 1.0):
        model = Pooled(whole)
        metric = Misalignment(model)
        metric.update(model, found_of(model, images, label))
        values[whole] = {key: value.tolist() for key, value in metric.per_prototype().items()}
    local = {key: value[0] for key, value in values[0.0].items()}
    assert local["pac"] == pytest.approx(0, abs=1e-6)
    assert local["plc"] < 0.35  # the other cells change a little, and so the edge of the region
    assert (local["prc"], local["ac"]) == (0, 0)
    assert values[0.0]["pac"][2] > 0.05  # its map shows another place than the one that it reads
    # Outside lie 15 of 16 cells. Each colour loses at most 0.4 standard deviations, and at most 0.5 from its start.
    std, lost = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), []
    for image in (0, 1):
        start = 0.4 * (2 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed_of(image, 1))) - 1)
        change = ((start - 0.5).clamp(min=-0.4) * std).mean(dim=0)[3::8, 3::8]
        lost.append(-(change.sum() - change[1, 1]) / 16)
    assert values[1.0]["pac"][0] == pytest.approx(float(sum(lost) / 2) / ((15 * 0.3 + 0.9) / 16), rel=1e-3)
    assert math.isnan(values[1.0]["pac"][1])  # the second prototype is never the highest


def test_an_image_without_activation_leaves_the_others_their_activation_change() -> None:
    """A prototype that one of its images does not show at all: (a - a') / a is the mean over the other images."""
    images = torch.full((2, 3, 32, 32), 0.3)
    images[:, :, 8:16, 8:16] = 0.9
    model, label = Pooled(1.0), torch.zeros(2, dtype=torch.long)
    alone, both = Misalignment(model), Misalignment(model)
    alone.update(model, found_of(model, images[:1], label[:1]))
    found = found_of(model, images, label)
    maps = found.maps.clone()
    maps[1] = 0
    both.update(model, found._replace(maps=maps))
    expected, values = alone.per_prototype(), both.per_prototype()
    assert float(expected["pac"][0]) > 0.1
    torch.testing.assert_close(values["pac"], expected["pac"], equal_nan=True)
    assert values["plc"][0] != expected["plc"][0]


def test_attack_stays_within_its_bounds() -> None:
    torch.manual_seed(0)
    images, model = torch.rand(2, 3, 32, 32), Pooled(1.0)
    seen = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    found = found_of(model, images, torch.tensor([0, 0]))
    Misalignment(model).update(model, found)
    attacked = seen[-2]
    change = (attacked - images).abs() / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert float(change.max()) <= 0.4 + 1e-5
    assert float(attacked.min()) >= 0
    for image, maps in zip(change, found.maps[:, 0], strict=True):
        x0, y0, x1, y1 = activation_boxes(maps[None], (32, 32))[0].tolist()
        assert float(image[:, y0:y1, x0:x1].max()) == 0
    assert len(seen) == 1 + 50 + 2


def test_distinctiveness_by_hand() -> None:
    """Peaks 20 pixels apart along a row: squares of 72/224 of 56 = 18 pixels do not meet; 9 pixels apart they do."""
    classes = torch.tensor([[True, False], [True, False], [False, True]])
    maps = torch.zeros(2, 3, 56, 56)
    for image, (a, b) in enumerate(((10, 30), (10, 19))):
        maps[image, 0, 20, a] = maps[image, 1, 20, b] = 1
        maps[image, 2, 5, 5] = 1
    model = SimpleNamespace(prototype_classes=classes, prototypes=torch.zeros(3, 1, 1, 1))
    metric = Distinctiveness(model)
    images = torch.zeros(2, 3, 56, 56)
    metric.update(model, Found(images, maps, torch.tensor([0, 0]), torch.arange(2), None, None))
    overlap = 9 * 18 / (2 * 18 * 18 - 9 * 18)
    value = metric.per_prototype()["distinctiveness"]
    assert value[:2].tolist() == pytest.approx([1 - overlap / 2] * 2)
    assert bool(value[2].isnan())


@pytest.mark.parametrize("below", [0, 1])
def test_comprehensiveness_by_hand(below: float) -> None:
    """Two regions of a quarter each; the object is the upper half: one quarter of three is common. Maps may be below
    0."""
    classes = torch.tensor([[True, False], [True, False], [False, True]])
    maps = torch.zeros(1, 3, 8, 8)
    maps[0, 0, :4, :4] = 1
    maps[0, 1, 4:, :4] = 0.5
    maps -= below
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4] = True
    model = SimpleNamespace(prototype_classes=classes, prototypes=torch.zeros(3, 1, 1, 1))
    metric = Comprehensiveness(model)
    for own in (mask, torch.zeros_like(mask)):  # an image without a mask does not count
        metric.update(model, Found(torch.zeros(1, 3, 8, 8), maps, torch.tensor([0]), torch.arange(1), None, None, own))
    value = metric.per_prototype()["comprehensiveness"]
    assert value[:2].tolist() == pytest.approx([1 / 3] * 2)
    assert bool(value[2].isnan())
