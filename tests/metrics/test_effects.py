"""Metrics of the effects of cells, and of the curves' variants, against loops in numpy that share no code with them."""

import dataclasses
import functools
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from interp_models import METRICS, probabilities
from interp_models.core.errors import InputError
from interp_models.core.truth import Truth
from interp_models.metrics import Case
from interp_models.metrics.effects import _groups, _sizes, _squares, _subsets
from interp_models.metrics.imputation import impute
from interp_models.metrics.perturbation import rise_blur
from interp_models.metrics.presets import PRESETS
from interp_models.metrics.road import FRACTIONS, NOISE
from tests.conftest import PoolLinear

HEIGHT, WIDTH, GRID = 16, 24, (4, 6)  # weights of bilinear upsampling are eighths, so that ties are exact
CELLS = GRID[0] * GRID[1]
MEAN = np.array([0.485, 0.456, 0.406])[:, None, None]


@functools.cache
def data(seed=0, n=3):
    """Weights of a small network, images, maps and targets."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(16, 3 * HEIGHT * WIDTH)) * 0.05, rng.normal(size=(4, 16)) * 2
    maps = (4096 * rng.normal(size=(n, *GRID))).round() / 4096
    return weights, rng.random((n, 3, HEIGHT, WIDTH)), maps, rng.integers(0, 4, n)


def np_logits(image):
    v, w = data()[0]
    return w @ np.tanh(v @ image.ravel())


def f(image, c):
    z = np_logits(image)
    e = np.exp(z - z.max())
    return e[c] / e.sum()


def logits(x):
    v, w = (torch.as_tensor(a) for a in data()[0])
    return torch.tanh(x.double().flatten(1) @ v.T) @ w.T


def score(name, preset="gomez2023", **options):
    _, images, maps, target = data()
    case = Case(
        torch.tensor(images), torch.tensor(maps), torch.tensor(target), lambda x: logits(x).softmax(1),
        logit_fn=logits, truth=Truth(torch.tensor([[2.0, 3, 15, 14]] * len(images))),
        explain=lambda x: x.double().mean(dim=1),
    )  # fmt: skip
    found = METRICS.build(name, {"preset": preset, "batch": 7, **options}).score(case)
    return {key: value.double().numpy() for key, value in found.items()}


def cell_of(y, x, rows=GRID[0], columns=GRID[1]):
    return (y * rows // HEIGHT) * columns + x * columns // WIDTH


def without(image, cells, fill=0.0, rows=GRID[0], columns=GRID[1]):
    """The image with some cells filled, pixel by pixel."""
    found = image.copy()
    fill = np.broadcast_to(fill, image.shape)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            if cell_of(y, x, rows, columns) in cells:
                found[:, y, x] = fill[:, y, x]
    return found


def each():
    _, images, maps, target = data()
    return zip(images, maps, target, strict=True)


def scaled(a):
    return (a - a.min()) / (a.max() - a.min())


def upsampled(a):
    rows = np.clip((np.arange(HEIGHT) + 0.5) * a.shape[0] / HEIGHT - 0.5, 0, a.shape[0] - 1)
    columns = np.clip((np.arange(WIDTH) + 0.5) * a.shape[1] / WIDTH - 0.5, 0, a.shape[1] - 1)
    return ndimage.map_coordinates(a, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")


def in_order(a):
    return sorted(range(a.size), key=lambda cell: (-a.ravel()[cell], cell))


@pytest.mark.parametrize(("preset", "fill"), [("gomez2023", 0.0), ("idsds", MEAN)])
def test_monotonicity(preset, fill):
    expected = []
    for image, a, c in each():
        drops = [f(image, c) - f(without(image, {cell}, fill), c) for cell in range(CELLS)]
        expected.append(stats.spearmanr(a.ravel(), drops)[0])
    assert score("monotonicity", preset)["monotonicity"] == pytest.approx(expected, abs=1e-6)


def test_monotonicity_of_many_cells_is_of_a_coarser_grid():
    expected = []
    for image, a, c in each():
        drops = [f(image, c) - f(without(image, {cell}, 0.0, 2, 2), c) for cell in range(4)]
        coarse = a.reshape(2, 2, 2, 3).mean(axis=(1, 3))
        expected.append(stats.spearmanr(coarse.ravel(), drops)[0])
    assert score("monotonicity", max_steps=4)["monotonicity"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("preset", "fill"), [("gomez2023", 0.0), ("idsds", MEAN)])
def test_idsds(preset, fill):
    expected = []
    for image, a, c in each():
        large = upsampled(a)
        pixels = [(y, x) for y in range(HEIGHT) for x in range(WIDTH)]
        own = [np.mean([large[p] for p in pixels if cell_of(*p, 4, 4) == k]) for k in range(16)]
        drops = [np_logits(image)[c] - np_logits(without(image, {k}, fill, 4, 4))[c] for k in range(16)]
        expected.append(stats.spearmanr(own, drops)[0])
    assert score("idsds", preset)["idsds"] == pytest.approx(expected, abs=1e-6)


def test_sensitivity_n():
    assert _sizes(CELLS) == [1, 2, 4, 5, 8, 13, 19]
    expected = []
    for image, a, c in each():
        own, of_size = scaled(a).ravel(), []
        for size in _sizes(CELLS):
            sets = [np.flatnonzero(row) for row in _subsets(CELLS, size).numpy()]
            assert all(len(cells) == size for cells in sets)
            drops = [f(image, c) - f(without(image, set(cells)), c) for cells in sets]
            of_size.append(stats.pearsonr([own[cells].sum() for cells in sets], drops)[0])
        expected.append(np.mean(of_size))
    assert score("sensitivity_n")["sensitivity_n"] == pytest.approx(expected, abs=1e-6)


def test_infidelity():
    squares = _squares(*GRID).numpy()
    sides = {tuple(sorted((square.any(axis=1).sum(), square.any(axis=0).sum()))) for square in squares}
    assert sides == {(1, 1), (2, 2)}
    expected = []
    for image, a, c in each():
        sums = np.array([scaled(a)[square].sum() for square in squares])
        drops = np.array([f(image, c) - f(without(image, set(np.flatnonzero(square))), c) for square in squares])
        beta = max(0, np.linalg.lstsq(sums[:, None], drops, rcond=None)[0][0])
        expected.append(np.mean((beta * sums - drops) ** 2) / np.mean(drops**2))
    assert score("infidelity")["infidelity"] == pytest.approx(expected, abs=1e-6)


def test_saco():
    expected = []
    for image, a, c in each():
        order, counts = in_order(a), _groups(CELLS)
        groups = [order[i:j] for i, j in pairwise(counts)]
        assert [len(group) for group in groups] == [2, 3, 2, 3, 2, 2, 3, 2, 3, 2]
        sums = [scaled(a).ravel()[group].sum() for group in groups]
        drops = [
            f(image, c) - f(without(image, set(group), image.mean(axis=(1, 2))[:, None, None]), c) for group in groups
        ]
        value = whole = 0.0
        for i in range(10):
            for j in range(i + 1, 10):
                w = sums[i] - sums[j]
                value += w if drops[i] >= drops[j] else -w
                whole += abs(w)
        expected.append(value / whole)
    assert score("saco")["saco"] == pytest.approx(expected, abs=1e-6)


def test_single_steps():
    deletion, insertion = [], []
    for image, a, c in each():
        blurred = image
        taps = np.exp(-((np.arange(11) - 5.0) ** 2) / 50)
        for axis in (1, 2):
            blurred = ndimage.correlate1d(blurred, taps / taps.sum(), axis=axis, mode="mirror")
        others = [set(range(CELLS)) - {cell} for cell in range(CELLS)]
        deletion.append(stats.pearsonr(a.ravel(), [f(image, c) - f(without(image, {k}), c) for k in range(CELLS)])[0])
        rises = [f(without(image, rest, blurred), c) - f(blurred, c) for rest in others]
        insertion.append(stats.pearsonr(a.ravel(), rises)[0])
    found = score("single_steps")
    assert found["dc_single"] == pytest.approx(deletion, abs=1e-5)
    assert found["ic_single"] == pytest.approx(insertion, abs=1e-5)


def test_single_steps_equal_saliency_maps_metrics():
    """The package with cumulative=False, one image at a time, several cells per step."""
    package = pytest.importorskip("saliency_maps_metrics.multi_step_metrics")
    net = lambda x: logits(x).softmax(1).float()  # noqa: E731
    found = score("single_steps", "saliency-maps-metrics", max_steps=8)
    for i, (image, a, c) in enumerate(each()):
        x, s = torch.tensor(image)[None].float(), torch.tensor(a)[None, None].float()
        for key, cls in (("dc_single", package.Deletion), ("ic_single", package.Insertion)):
            metric = cls(max_step_nb=8, cumulative=False)
            scores, saliency = metric.compute_scores(net, x, s, [int(c)])
            expected = metric.compute_calibration_metric(scores, saliency)[0]
            assert found[key][i] == pytest.approx(expected, abs=1e-5)


def test_hard_zones():
    expected = []
    for image, a, c in each():
        zone = scaled(upsampled(a)) > 0.5
        y, kept, removed = f(image, c), f(image * zone, c), f(image * ~zone, c)
        expected.append([max(0, y - kept) / y, kept > y, max(0, y - removed) / y, removed > y])
    np.testing.assert_allclose(np.stack(list(score("hard_zones").values()), axis=1), expected, atol=1e-6)


def test_box_split():
    expected = []
    for image, a, c in each():
        mask, inside, y = scaled(upsampled(a)), np.zeros((HEIGHT, WIDTH)), f(image, c)
        inside[3:14, 2:15] = 1
        row = []
        for part in (inside, 1 - inside):
            o = f(image * mask * part, c)
            row += [max(0, y - o) / y, max(0, o - y) / (1 - y), float(o > y)]
        expected.append(row)
    np.testing.assert_allclose(np.stack(list(score("box_split").values()), axis=1), expected, atol=1e-6)


def np_impute(image, known):
    """The linear system, written out densely."""
    unknown = [tuple(p) for p in np.argwhere(~known)]
    number = {p: i for i, p in enumerate(unknown)}
    a, b = np.zeros((len(unknown), len(unknown))), np.zeros((len(unknown), len(image)))
    for i, (y, x) in enumerate(unknown):
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                q, weight = (y + dy, x + dx), 1 / 12 if dy and dx else 1 / 6
                if (dy, dx) == (0, 0) or not (0 <= q[0] < known.shape[0] and 0 <= q[1] < known.shape[1]):
                    continue
                a[i, i] += weight
                if q in number:
                    a[i, number[q]] -= weight
                else:
                    b[i] += weight * image[:, q[0], q[1]]
    found = image.copy()
    for (y, x), value in zip(unknown, np.linalg.solve(a, b), strict=True):
        found[:, y, x] = value
    return found


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_solves_the_equations(share):
    rng = np.random.default_rng(3)
    images = rng.random((2, 3, 33, 40))
    smooth = ndimage.gaussian_filter(rng.random((2, 33, 40)), (0, 3, 3))
    known = smooth > np.quantile(smooth, share, axis=(1, 2), keepdims=True)
    found = impute(torch.tensor(images), torch.tensor(known))
    for image, own, mask in zip(images, found.numpy(), known, strict=True):
        np.testing.assert_allclose(own, np_impute(image, mask), atol=2e-4)
    single = impute(torch.tensor(images[:1]), torch.tensor(known[:1]))
    torch.testing.assert_close(single, found[:1], atol=2e-4, rtol=0)


def test_imputation_equals_grad_cam():
    """The authors' code, as pytorch-grad-cam has it, without noise."""
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    rng = np.random.default_rng(4)
    image, known = torch.tensor(rng.random((3, 32, 32)), dtype=torch.float32), torch.ones(32, 32)
    known[5:29, 8:30] = 0
    expected = road.NoisyLinearImputer(noise=0)(image, known)
    torch.testing.assert_close(impute(image[None], known[None].bool())[0], expected, atol=2e-4, rtol=0)


def test_imputation_of_nothing_and_of_everything():
    images = torch.rand(2, 3, 16, 16)
    known = torch.zeros(2, 16, 16, dtype=torch.bool)
    known[0] = True
    found = impute(images, known)
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1], torch.zeros(3, 16, 16))


def test_road():
    from interp_models.metrics.imputation import normal_noise

    noise = normal_noise(3, HEIGHT, WIDTH).numpy()
    assert (abs(noise.mean()), noise.std()) == pytest.approx((0, 1), abs=0.05)
    found, expected = score("road"), []
    for image, a, c in each():
        large, means = upsampled(a), []
        for order in (in_order(large), in_order(-large)):
            scores = []
            for fraction in FRACTIONS:
                known = np.ones(HEIGHT * WIDTH, bool)
                known[order[: round(fraction * HEIGHT * WIDTH)]] = False
                known = known.reshape(HEIGHT, WIDTH)
                filled = np.where(known, image, np_impute(image, known) + NOISE * noise)
                scores.append(f(filled.clip(0, 1), c))
            means.append(np.mean(scores))
        expected.append([*means, (means[1] - means[0]) / 2])
    np.testing.assert_allclose(np.stack(list(found.values()), axis=1), expected, atol=1e-3)


def test_f_fidelity_is_bounded_and_of_the_right_part():
    """A score that is linear in the light has a drop that is known: that of the expected removal."""
    bright = torch.zeros(1, 3, 10, 10)
    bright[:, :, :, :5] = 1.0  # all light in the left half

    def light(x):
        p = x.mean(dim=(1, 2, 3)) * 2
        return torch.stack([p, 1 - p], dim=1)

    maps = torch.linspace(1, 0, 10).expand(1, 10, 10)
    case = Case(bright, maps, 0, light)
    found = METRICS.build("f_fidelity").score(case)
    # 10, 30, 50 % lie in the light, and of 70 and 90 % only 5/7 and 5/9; of each 10 of 100 cells are removed on average
    # (5 of the first 10): 2 % of the light each.
    plus = np.mean([0.05 * 2, 0.2, 0.2, 0.2 * 5 / 7, 0.2 * 5 / 9])
    minus = np.mean([0.1 * 2 * 40 / 90, 0.1 * 2 * 20 / 70, 0, 0, 0])
    assert float(found["ffid_plus"]) == pytest.approx(plus, abs=0.02)
    assert float(found["ffid_minus"]) == pytest.approx(minus, abs=0.02)
    inverse = METRICS.build("f_fidelity").score(Case(bright, -maps, 0, light))
    assert float(inverse["ffid_plus"]) < float(found["ffid_plus"]) / 2


def test_max_sensitivity():
    """A map that ignores the image has 0; for the mean colour the changes are written out."""
    from interp_models.core.rng import uniform

    _, images, _, _ = data()
    x = torch.tensor(images)
    maps = x.mean(dim=1)
    fixed = METRICS.build("max_sensitivity").score(Case(x, maps, explain=lambda _: maps))
    assert fixed["max_sensitivity"].tolist() == [0, 0, 0]
    found = METRICS.build("max_sensitivity").score(Case(x, maps, explain=lambda x: x.mean(dim=1)))
    expected = []
    for image in images:
        own, changes = scaled(image.mean(axis=0)), []
        for sample in range(10):
            noise = 0.04 * uniform(sample, np.arange(image.size)).reshape(image.shape) - 0.02
            changes.append(np.linalg.norm(scaled((image + noise).clip(0, 1).mean(axis=0)) - own) / np.linalg.norm(own))
        expected.append(max(changes))
    assert found["max_sensitivity"].tolist() == pytest.approx(expected, rel=1e-4)


def rise_causal(image, a, c, mode, step):
    """The loop of RISE's evaluation, with its kernel."""
    delta = np.zeros((11, 11))
    delta[5, 5] = 1
    kernel = ndimage.gaussian_filter(delta, 5)
    blurred = np.stack([ndimage.convolve(channel, kernel, mode="constant") for channel in image])
    start, end = (image, np.broadcast_to(MEAN, image.shape)) if mode == "del" else (blurred, image)
    order, now, scores = in_order(upsampled(a)), start.copy().reshape(3, -1), []
    for k in range(-(-len(order) // step) + 1):
        scores.append(f(now.reshape(image.shape), c))
        some = order[step * k : step * (k + 1)]
        now[:, some] = end.reshape(3, -1)[:, some]
    return (sum(scores) - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


def test_preset_rise():
    found = score("deletion_insertion", "rise", max_steps=16)
    for key, mode in (("dauc", "del"), ("iauc", "ins")):
        expected = [rise_causal(image, a, c, mode, HEIGHT * WIDTH // 16) for image, a, c in each()]
        assert found[key] == pytest.approx(expected, abs=1e-5)
    assert PRESETS["rise"].counts(224 * 224, 224) == list(range(0, 224 * 224 + 1, 224))


def test_rise_blur():
    delta = np.zeros((11, 11))
    delta[5, 5] = 1
    kernel = ndimage.gaussian_filter(delta, 5)
    image = np.random.default_rng(0).random((1, 3, 16, 20))
    expected = np.stack([ndimage.convolve(channel, kernel, mode="constant") for channel in image[0]])
    np.testing.assert_allclose(rise_blur(torch.tensor(image))[0], expected, atol=1e-9)


def test_effects_are_measured_once_for_all_explainers():
    _, images, maps, target = data()
    calls = []

    def counting(x):
        calls.append(len(x))
        return logits(x).softmax(1)

    shared = {}
    for own in (maps, -maps, maps**2):
        case = Case(
            torch.tensor(images), torch.tensor(own), torch.tensor(target), counting, logit_fn=logits, shared=shared
        )
        for name in ("monotonicity", "sensitivity_n", "infidelity", "idsds"):
            METRICS.build(name).score(case)
    clean = 3 * 3 * len(images)  # each of three metrics passes the clean images of each explainer
    assert sum(calls) == len(images) * (CELLS + 7 * 32 + 64) + clean


def test_box_split_has_directions():
    """Half of the evidence is in the box; a distractor is outside, too. Maps of the evidence beat maps of the rest."""
    image = torch.full((1, 3, 16, 16), 0.1)
    image[:, :, 4:12, 4:12] = 1.0
    image[:, :, 12:, 12:] = 1.0
    truth = Truth(torch.tensor([[0.0, 0, 8, 16]]))
    maps = torch.zeros(1, 4, 4)
    maps[0, 1:3, 1:3] = 1

    def values(own, distraction):
        def net(x):
            a, b = x[:, :, 4:12, 4:12].mean(dim=(1, 2, 3)), x[:, :, 12:, 12:].mean(dim=(1, 2, 3))
            return (4 * torch.stack([a, distraction * b], dim=1)).softmax(dim=1)

        found = METRICS.build("box_split").score(Case(image, own, 0, net, truth=truth))
        return {key: float(value) for key, value in found.items()}

    plain = [values(own, 0) for own in (maps, 1 - maps)]
    distracted = [values(own, 1.2) for own in (maps, 1 - maps)]
    for where in ("box", "outside"):
        assert plain[0][f"ad_{where}"] < plain[1][f"ad_{where}"]
        assert distracted[0][f"ag_{where}"] > distracted[1][f"ag_{where}"]
    assert distracted[0]["ai_outside"] > distracted[1]["ai_outside"]


@pytest.mark.parametrize("channels", [1, 11])
def test_images_of_other_channels_turn_black(channels):
    """Metrics of passes take them; ImageNet's mean colour does not fit."""
    images, maps = torch.rand(2, channels, 16, 24), torch.rand(2, 4, 6)

    def net(x):
        light = x.mean(dim=(1, 2, 3))
        return torch.stack([light, 1 - light], dim=1)

    case = Case(images, maps, 0, net, logit_fn=net, explain=lambda x: x.mean(dim=1))
    for name in METRICS.names():
        if not {"boxes", "mask", "parts", "patch_scores"} & set(METRICS.get(name).needs):
            assert METRICS.build(name, {"grid": (4, 6)}).score(case)
    with pytest.raises(InputError, match=f"ImageNet's mean colour has 3 channels; the images have {channels}"):
        METRICS.build("dauc", {"preset": "rise"}).score(case)


def test_effects_of_another_class_are_measured_anew():
    """What is measured once for all explainers belongs to the images and their classes."""
    torch.manual_seed(0)
    net, images, maps = PoolLinear().eval(), torch.rand(3, 3, 16, 16), torch.rand(3, 4, 4)
    metric = METRICS.build("monotonicity", {"grid": (4, 4)})
    case = Case(images, maps, 0, probabilities(net))
    metric.score(case)
    for other in ({"target": 2}, {"images": images.flip(0)}):
        shared, fresh = dataclasses.replace(case, **other), dataclasses.replace(case, **other, shared={})
        torch.testing.assert_close(metric.score(shared), metric.score(fresh), equal_nan=True)
