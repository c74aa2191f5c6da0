"""Occlusion, segments, LIME and KernelSHAP against loops, least squares written out, and Shapley's definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.explainers.occlusion import Occlusion
from interp_models.explainers.rise import RISE
from interp_models.explainers.segments import _lab, grid, means, superpixels
from interp_models.explainers.surrogates import LIME, KernelSHAP
from tests.mutation import mutated

SURROGATES, SEGMENTS = "interp_models.explainers.surrogates", "interp_models.explainers.segments"


def images(n=2, height=12, width=16):
    return torch.rand(n, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 3), nn.Softplus(beta=0.3),
    ).double()  # fmt: skip


# --- Occlusion ---


def check_occlusion(cls=Occlusion):
    model, x = net(), images()
    for score, window, stride, fill in (("logit", 5, 3, 0.2), ("probability", 4, 4, 0.5), ("logit", 14, 7, 0.0)):
        found = cls(model, window=window, stride=stride, fill=fill, score=score, batch=3).attribute(x, 1)
        for image, map_ in zip(x, found, strict=True):

            def read(some, score=score):
                y = model(some[None])[0].detach()
                return float((y if score == "logit" else y.softmax(0))[1])

            total, count = np.zeros((12, 16)), np.zeros((12, 16))
            top = 0
            while True:
                left = 0
                while True:
                    hidden = image.clone()
                    hidden[:, top : top + window, left : left + window] = fill
                    total[top : top + window, left : left + window] += read(image) - read(hidden)
                    count[top : top + window, left : left + window] += 1
                    if left + window >= 16:
                        break
                    left += stride
                if top + window >= 12:
                    break
                top += stride
            np.testing.assert_allclose(map_, total / count, rtol=1e-4, atol=1e-8)


def test_occlusion_is_its_loop():
    check_occlusion()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("side - self.window + self.stride", "side - self.window"),
        ("starts + self.window)", "starts + self.stride)"),
        ("self.fill, inputs", "0.0, inputs"),
        ("across.sum(dim=0))", "1)"),
        ("[:, :, None] - scores", "[:, :, None] * 0 - scores"),
        ("rows[square // len(columns)]", "rows[square % len(rows)]"),
    ],
)
def test_mutations_of_occlusion_are_rejected(right, wrong):
    with pytest.raises((AssertionError, NotApplicable)):  # pixels in no window have no value
        check_occlusion(mutated("interp_models.explainers.occlusion", right, wrong).Occlusion)


def test_occlusion_of_a_linear_model():
    """Squares side by side, filled with black: a pixel has what its square adds to the score."""
    weight = torch.rand(3, 12, 16, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, 1)).double()
    model[1].weight.data = weight.view(1, -1)
    x = images(1)
    map_ = Occlusion(model, window=4, stride=4, fill=0.0, score="logit").attribute(x, 0)[0]
    light = (weight * x[0]).sum(0).view(3, 4, 4, 4).sum(dim=(1, 3))
    torch.testing.assert_close(map_, light.repeat_interleave(4, 0).repeat_interleave(4, 1).float())
    with pytest.raises(InputError, match="1 <= stride <= window"):
        Occlusion(model, window=4, stride=5)
    with pytest.raises(InputError, match="a window of 16 pixels hides all of"):
        Occlusion(model, window=16).attribute(x)


# --- Segments ---


def test_colours_are_cielabs():
    """Values that everybody's tables give (D65)."""
    known = {(1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0), (1, 0, 0): (53.24, 80.09, 67.20)}
    known |= {(0, 1, 0): (87.73, -86.18, 83.18), (0, 0, 1): (32.30, 79.19, -107.86), (0.5, 0.5, 0.5): (53.39, 0, 0)}
    for rgb, lab in known.items():
        found = _lab(torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1)).flatten()
        np.testing.assert_allclose(found, lab, atol=0.05)


def test_means_of_segments():
    values = torch.tensor([[[1.0, 2.0, 6.0]]])
    assert means(values, torch.tensor([[0, 0, 2]]), 4).tolist() == [[[1.5, 0.0, 6.0, 0.0]]]


def slic(image, cells, compactness, iterations):
    """k-means with loops over pixels and their nine candidates."""
    lab = _lab(image[None].float())[0].double().numpy()
    height, width = image.shape[1:]
    side = math.sqrt(height * width) / cells
    home = {(y, x): (y * cells // height, x * cells // width) for y in range(height) for x in range(width)}
    label = dict(home)
    feature = {(y, x): np.array([*lab[:, y, x], compactness / side * y, compactness / side * x]) for y, x in home}
    centre = {}
    for _ in range(iterations):
        for c in set(label.values()):  # one that is empty stays where it was
            centre[c] = np.mean([feature[p] for p in home if label[p] == c], axis=0)
        moved = {}
        for p, (r, s) in home.items():
            around = [(r + i, s + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            around = [c for c in around if 0 <= c[0] < cells and 0 <= c[1] < cells]
            apart = [np.square(feature[p] - centre[c]).sum() for c in around]
            moved[p] = around[int(np.argmin(apart))]
        label = moved
    return np.array([[label[y, x][0] * cells + label[y, x][1] for x in range(width)] for y in range(height)])


def check_superpixels(function=superpixels):
    x = images().float()
    x[0, :, :, 5:] += 1.0
    for cells, compactness, iterations in ((3, 10.0, 4), (4, 40.0, 2)):
        found = function(x, cells, compactness=compactness, iterations=iterations)
        for image, numbers in zip(x, found, strict=True):
            np.testing.assert_array_equal(numbers, slic(image, cells, compactness, iterations))


def test_superpixels_are_k_means():
    check_superpixels()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(compactness / side)", "compactness"),
        ("(height * width) ** 0.5", "(height + width)"),
        ("torch.arange(-1, 2, device=device), torch", "torch.arange(-1, 1, device=device), torch"),
        ("total / size.clamp(min=1)", "total"),
    ],
)
def test_mutations_of_superpixels_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_superpixels(mutated(SEGMENTS, right, wrong).superpixels)


def test_superpixels_keep_to_borders():
    """A border of colours that no grid follows: no segment lies on both sides of it."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    right = x > 21 + 6 * torch.sin(y / 7)
    image = torch.where(
        right, torch.tensor([0.9, 0.2, 0.1])[:, None, None], torch.tensor([0.1, 0.4, 0.8])[:, None, None]
    )
    numbers = superpixels(image[None], 6)[0]
    assert not set(numbers[right].tolist()) & set(numbers[~right].tolist())
    cells = grid(image[None], 6)[0]
    assert set(cells[right].tolist()) & set(cells[~right].tolist())


# --- LIME and KernelSHAP ---


def hidden(image, numbers, on, fill):
    """The image with segments off, one by one."""
    made = image.clone()
    for segment in range(len(on)):
        if not on[segment]:
            for channel in range(3):
                inside = numbers == segment
                if inside.any():
                    made[channel][inside] = image[channel][inside].mean() if fill == "mean" else 0.0
    return made


def scored(model, image, numbers, z, fill, target, score):
    y = model(torch.stack([hidden(image, numbers, on, fill) for on in z])).detach()
    return (y if score == "logit" else y.softmax(1))[:, target].numpy()


def painted(values, numbers):
    return values[numbers.numpy()]


def check_lime(cls=LIME):
    model, x = net(), images()
    for segments, fill, score in (("superpixels", "mean", "probability"), ("grid", "black", "logit")):
        options = {"samples": 40, "cells": 3, "segments": segments, "fill": fill, "score": score}
        explainer = cls(model, kernel_width=0.4, ridge=0.3, batch=7, **options)
        found = explainer.attribute(x, 2)
        z = explainer._switched()
        assert z.shape == (40, 9)
        assert z[0].all()
        assert 0.4 < z[1:].mean() < 0.6
        assert len(np.unique(z, axis=0)) > 30
        for i, image in enumerate(x):
            numbers = superpixels(x, 3)[i] if segments == "superpixels" else grid(x, 3)[i]
            y = scored(model, image, numbers, z, fill, 2, score)
            cosine = z.sum(1) / (np.sqrt(z.sum(1)) * 3)
            root = np.sqrt(np.exp(-((1 - cosine) ** 2) / 0.4**2))
            # min |root (z w + w0 - y)|² + 0.3 |w|², as one least squares
            rows = np.hstack([root[:, None] * z, root[:, None]])
            rows = np.vstack([rows, np.hstack([math.sqrt(0.3) * np.eye(9), np.zeros((9, 1))])])
            w = np.linalg.lstsq(rows, np.concatenate([root * y, np.zeros(9)]), rcond=None)[0][:9]
            expected = painted(w, numbers) if segments == "superpixels" else w.reshape(3, 3)
            np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-7)


def test_lime_is_the_regression_written_out():
    check_lime()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("np.arange(self.cells**2)) < 0.5", "np.arange(self.cells**2)) < 0.8"),
        ("on[0] = True", "on[1] = True"),
        ("np.sqrt(on.mean(axis=1))", "on.mean(axis=1)"),
        ("/ self.kernel_width**2", "/ self.kernel_width"),
        ("on - np.average(on, axis=0, weights=weights)", "on - on.mean(axis=0)"),
        ("self.ridge * np.eye", "np.eye"),
        ('if self.fill == "mean":', "if True:"),
        ("torch.where(shown, inputs[b], off[b])", "torch.where(shown, off[b], inputs[b])"),
    ],
)
def test_mutations_of_lime_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_lime(mutated(SURROGATES, right, wrong).LIME)


def shapley(values):
    """Mean over all orders of what a segment adds, of values by the tuple of segments that are on."""
    count = len(next(iter(values)))
    total = np.zeros(count)
    for order in itertools.permutations(range(count)):
        on = [False] * count
        for segment in order:
            before = values[tuple(on)]
            on[segment] = True
            total[segment] += values[tuple(on)] - before
    return total / math.factorial(count)


def check_exact_shap(cls=KernelSHAP):
    model, x = net(), images()
    for segments, fill, score in (("superpixels", "mean", "probability"), ("grid", "black", "logit")):
        options = {"samples": 14, "cells": 2, "segments": segments, "fill": fill, "score": score}
        found = cls(model, batch=3, **options).attribute(x, 2)
        for i, image in enumerate(x):
            numbers = superpixels(x, 2)[i] if segments == "superpixels" else grid(x, 2)[i]
            z = list(itertools.product((False, True), repeat=4))
            values = dict(zip(z, scored(model, image, numbers, np.array(z), fill, 2, score), strict=True))
            expected = shapley(values)
            expected = painted(expected, numbers) if segments == "superpixels" else expected.reshape(2, 2)
            np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-7)


class Game(nn.Module):
    """A score by which of nine cells are black, with every pair of neighbours worth something of their own."""

    def forward(self, x):
        on = (nn.functional.adaptive_max_pool2d(x, 3).amax(dim=1) > 0).double().flatten(1)
        pairs = (on[:, :-1] * on[:, 1:]) @ torch.linspace(-2, 1, 8).double()
        y = on @ torch.linspace(1, 3, 9).double() + pairs + 4 * on[:, :5].prod(dim=1)
        return torch.stack([y, -y], dim=1)


def check_sampled_shap(cls=KernelSHAP):
    """Drawn samples: near the exact values (all 510), nearer by more, and always adding up to the score."""
    x = images(1, 12, 15) + 0.1
    options = {"cells": 3, "segments": "grid", "fill": "black", "score": "logit"}
    exact = cls(Game(), samples=510, **options).attribute(x, 0)
    # A pair's worth is shared by halves, that of five by fifths.
    worth = torch.linspace(1, 3, 9).double()
    pairs = torch.linspace(-2, 1, 8).double() / 2
    worth = worth + torch.cat([pairs, torch.zeros(1)]) + torch.cat([torch.zeros(1), pairs])
    worth[:5] += 4 / 5
    torch.testing.assert_close(exact.flatten(), worth.float(), rtol=1e-4, atol=1e-5)
    errors = []
    for samples in (60, 500):
        apart = []
        for seed in range(8):
            found = cls(Game(), samples=samples, seed=seed, **options).attribute(x, 0)
            assert float(found.sum()) == pytest.approx(float(worth.sum()), rel=1e-4)
            apart.append(float((found - exact).square().mean().sqrt()))
        errors.append(np.mean(apart))
    assert errors[1] < 0.5 * errors[0]  # as 1 / sqrt(samples) it would be 0.35
    assert errors[1] < 0.15  # of values of about 2.5


def check_drawn_sizes(cls=KernelSHAP):
    """Pairs of complements, all different, as many of each size as there are, and all alike within a size."""
    z = cls(nn.Identity(), samples=20000, cells=3)._switched()[2:]
    assert {tuple(row) for row in z} == set(itertools.product((False, True), repeat=9)) - {(False,) * 9, (True,) * 9}
    assert len(z) == 510
    every = []
    for seed in range(40):
        z = cls(nn.Identity(), samples=1001, cells=4, seed=seed)._switched()[2:]
        assert len(z) == 1000
        assert (z[::2] == ~z[1::2]).all()
        assert len(np.unique(z, axis=0)) == 1000
        sizes = np.bincount(z.sum(1), minlength=17)
        assert (sizes[1], sizes[15]) == (16, 16)  # all that there are
        assert abs(sizes[2:15] - 968 / 13).max() <= 1.5
        every.append(z)
    every = np.concatenate(every)
    for size in (2, 3, 8):
        some = every[every.sum(1) == size]
        rate, count = size / 16, len(some)
        np.testing.assert_allclose(some.mean(0), rate, atol=5 * math.sqrt(rate * (1 - rate) / count))
        together = (some[:, 0] & some[:, 5]).mean()
        assert together == pytest.approx(rate * (size - 1) / 15, abs=5 * math.sqrt(rate / count))
    assert not np.array_equal(every[:1000], every[1000:2000])


def check_weights_of_sets(cls=KernelSHAP):
    """The regression is that of all sets, each with its kernel by the share of its size that was drawn."""
    explainer = cls(nn.Identity(), samples=100, cells=4)
    z = explainer._switched()
    scores = np.random.default_rng(0).normal(size=(2, len(z)))
    found = explainer._fit(z, scores)
    for y, values in zip(scores, found, strict=True):
        drawn, y0, change = z[2:].astype(float), y[0], y[1] - y[0]
        sizes = drawn.sum(1)
        weights = [
            15 / (math.comb(16, int(s)) * s * (16 - s)) / (np.sum(sizes == s) / math.comb(16, int(s))) for s in sizes
        ]
        # Lagrange: the normal equations, with a multiplier of the sum.
        w = np.diag(weights)
        matrix = np.block([[drawn.T @ w @ drawn, np.ones((16, 1))], [np.ones((1, 16)), np.zeros((1, 1))]])
        right = np.concatenate([drawn.T @ w @ (y[2:] - y0), [change]])
        np.testing.assert_allclose(values, np.linalg.solve(matrix, right)[:16], rtol=1e-6, atol=1e-8)


def check_kernelshap(cls=KernelSHAP):
    check_exact_shap(cls)
    check_sampled_shap(cls)
    check_drawn_sizes(cls)
    check_weights_of_sets(cls)


def test_kernelshap():
    check_kernelshap()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(np.bincount(size)[size] * size", "(size"),
        ("* size * (count - size))", "* size)"),
        ("z[:, :-1] - z[:, -1:]", "z[:, :-1]"),
        ("- last * change.T", "- last"),
        ("change - found.sum(axis=1, keepdims=True)", "change"),
        ("1 if 2 * size == count else 2 for", "size for"),
        ("key=lambda size: left[size] / share[size]", "key=lambda size: -size"),
        ("np.sort(np.unique(found, axis=0, return_index=True)[1])", "slice(None)"),
        ("np.where(on[:, :1], on, ~on) if half else on", "on"),
        ("uniform(seed, size,", "uniform(0, size,"),
    ],
)
def test_mutations_of_kernelshap_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_kernelshap(mutated(SURROGATES, right, wrong).KernelSHAP)


def by_kernel(values, count, samples, seed):
    """KernelSHAP as before: pairs in proportion to π, which may repeat; the same constraint."""
    rng = np.random.default_rng(seed)
    sizes = np.arange(1, count)
    weights = 1 / (sizes * (count - sizes))
    z = np.zeros((samples // 2, count), bool)
    for row, size in zip(z, rng.choice(sizes, len(z), p=weights / weights.sum()), strict=True):
        row[rng.choice(count, size, replace=False)] = True
    z = np.concatenate([z, ~z])
    none, change = values(np.zeros((1, count), bool)), values(np.ones((1, count), bool)) - values(np.zeros((1, count)))
    y = values(z) - none - z[:, -1] * change
    found = np.linalg.lstsq(z[:, :-1].astype(float) - z[:, -1:], y, rcond=None)[0]
    return np.append(found, change - found.sum())


def test_leverage_has_a_smaller_error_than_the_kernel():
    """Games whose Shapley values are known: c for those in T, if all of T are on, is shared evenly in T."""
    rng = np.random.default_rng(5)
    ratios = {}
    for cells, largest in ((3, 5), (4, 5), (4, 12), (7, 5)):
        count = cells**2
        members = np.zeros((60, count))
        for row in members:
            row[rng.choice(count, rng.integers(1, largest + 1), replace=False)] = 1
        worth = rng.normal(size=60)
        exact = (worth / members.sum(1)) @ members

        def values(z, members=members, worth=worth):
            return (z.astype(float) @ members.T >= members.sum(1)) @ worth

        for samples in (4 * count, 10 * count, 40 * count):
            errors = {"leverage": [], "kernel": []}
            for seed in range(12):
                explainer = KernelSHAP(nn.Identity(), samples=samples, cells=cells, seed=seed)
                on = explainer._switched()
                found = explainer._fit(on, values(on)[None])[0]
                assert found.sum() == pytest.approx(float(np.diff(values(on[:2]))[0]))
                errors["leverage"].append(np.linalg.norm(found - exact))
                errors["kernel"].append(np.linalg.norm(by_kernel(values, count, samples, seed) - exact))
            ratios[count, largest, samples] = np.mean(errors["leverage"]) / np.mean(errors["kernel"])
    assert max(ratios.values()) < 1.1
    assert np.mean(list(ratios.values())) < 0.8
    assert ratios[9, 5, 360] < 0.4  # where most of all sets are drawn


def test_additive_models_give_what_segments_add():
    """LIME with hardly a ridge, and KernelSHAP by few samples, are exact."""
    weight = torch.rand(3, 12, 16, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, 1)).double()
    model[1].weight.data = weight.view(1, -1)
    x = images(1)
    light = (weight * x[0]).sum(0).view(4, 3, 4, 4).sum(dim=(1, 3)).float()
    options = {"cells": 4, "segments": "grid", "fill": "black", "score": "logit"}
    shap = KernelSHAP(model, samples=60, **options).attribute(x, 0)[0]
    torch.testing.assert_close(shap, light, rtol=1e-4, atol=1e-5)
    lime = LIME(model, samples=60, ridge=1e-9, **options).attribute(x, 0)[0]
    torch.testing.assert_close(lime, light, rtol=1e-4, atol=1e-5)


def test_bad_options():
    for make, message in (
        (lambda: LIME(net(), samples=0), "samples, cells and batch must be at least 1"),
        (lambda: LIME(net(), ridge=0.0), "lime needs kernel_width and ridge > 0"),
        (lambda: KernelSHAP(net(), samples=90), "kernelshap needs cells >= 2 and samples >= 2 cells²; got 7 and 90"),
    ):
        with pytest.raises(InputError, match=message.replace("²", ".")):
            make()
    with pytest.raises(InputError, match="cells must be at most the side of the images; got 13 for images of"):
        LIME(net(), cells=13).attribute(images())


# --- RISE's other masks ---


def test_nearest_masks_lie_still_and_have_hard_borders():
    x = images(1)
    rise = RISE(nn.Identity(), masks=400, cells=4, p1=0.3, upsampling="nearest")
    masks = torch.cat(list(rise._masks(x, 64)))
    cells = masks.view(400, 4, 3, 4, 4)
    assert torch.equal(cells.amax(dim=(2, 4)), cells.amin(dim=(2, 4)))
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert float(masks.mean()) == pytest.approx(0.3, abs=4 * 0.46 / math.sqrt(400 * 16))
    assert not torch.equal(masks[0], masks[1])
