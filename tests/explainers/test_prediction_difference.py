"""Prediction difference analysis against loops, Gaussians written out, and images whose patches are predictable."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.rng import uniform
from interp_models.explainers.prediction_difference import Patches, PredictionDifference
from tests.mutation import mutated

MODULE = "interp_models.explainers.prediction_difference"


def images(n=2, height=18, width=23):
    x = torch.rand(n, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (x + x.roll(1, 2) + x.roll(1, 3)) / 3  # neighbours are alike


def net():
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(3), nn.Flatten()]
    model = nn.Sequential(*features, nn.Linear(54, 4)).double()
    model[-1].weight.data *= 10
    return model


def gaussian_sample(image, top, left, window, padding, number, seed):
    """By the textbook's conditional of a Gaussian, from patches that are collected one by one."""
    stats = pytest.importorskip("scipy.stats")
    size, made = window + 2 * padding, np.zeros((3, window, window))
    y, x = min(max(top - padding, 0), image.shape[1] - size), min(max(left - padding, 0), image.shape[2] - size)
    z = stats.norm.ppf(uniform(seed, number, np.arange(3 * window**2))).reshape(3, -1)
    covariances, means = [], []
    for channel in image:
        every = [
            channel[i : i + size, j : j + size].ravel()
            for i in range(image.shape[1] - size + 1)
            for j in range(image.shape[2] - size + 1)
        ]
        centred = np.array(every) - np.mean(every, axis=0)
        means.append(np.mean(every, axis=0))
        covariances.append(sum(np.outer(one, one) for one in centred) / len(every))
    ridge = 1e-6 * np.mean([np.trace(one) / size**2 for one in covariances]) + 1e-12
    for c in range(3):
        covariance = covariances[c] + ridge * np.eye(size**2)
        hidden = [
            (i, j) for i in range(size) for j in range(size)
            if top <= y + i < top + window and left <= x + j < left + window
        ]  # fmt: skip
        one = [i * size + j for i, j in hidden]
        two = [k for k in range(size**2) if k not in one]
        patch = image[c, y : y + size, x : x + size].ravel()
        inverse = np.linalg.inv(covariance[np.ix_(two, two)])
        mean = means[c][one] + covariance[np.ix_(one, two)] @ inverse @ (patch[two] - means[c][two])
        left_over = covariance[np.ix_(one, one)] - covariance[np.ix_(one, two)] @ inverse @ covariance[np.ix_(two, one)]
        made[c] = (mean + np.linalg.cholesky(left_over) @ z[c]).reshape(window, window)
        made[c] = np.minimum(np.maximum(made[c], image[c].min()), image[c].max())
    return made


def check_loop(cls=PredictionDifference):
    model, x = net(), images()
    for sampling, window, stride, padding in (("conditional", 5, 4, 1), ("marginal", 6, 3, 2)):
        options = {"sampling": sampling, "window": window, "stride": stride, "padding": padding}
        explainer = cls(model, samples=3, instances=500, seed=2, batch=7, **options)
        found = explainer.attribute(x, torch.tensor([2, 0]))
        for image, c, map_ in zip(x.numpy(), (2, 0), found, strict=True):

            def odds(p):
                p = (p * 500 + 1) / (500 + 4)
                return math.log2(p / (1 - p))

            def probability(some, c=c):
                return float(model(torch.as_tensor(some)[None]).softmax(1)[0, c])

            total, covers, number = np.zeros((18, 23)), np.zeros((18, 23)), 0
            tops = [*range(0, 18 - window, stride), 18 - window]
            lefts = [*range(0, 23 - window, stride), 23 - window]
            for top in tops:
                for left in lefts:
                    some = []
                    for _ in range(3):
                        changed = image.copy()
                        if sampling == "conditional":
                            sample = gaussian_sample(image, top, left, window, padding, number, 2)
                        else:
                            u = uniform(2, number, [0, 1])
                            i, j = int(u[0] * (19 - window)), int(u[1] * (24 - window))
                            sample = image[:, i : i + window, j : j + window]
                        changed[:, top : top + window, left : left + window] = sample
                        some.append(probability(changed))
                        number += 1
                    evidence = odds(probability(image)) - odds(sum(some) / 3)
                    total[top : top + window, left : left + window] += evidence
                    covers[top : top + window, left : left + window] += 1
            np.testing.assert_allclose(map_, total / covers, rtol=1e-4, atol=1e-6)
        alone = torch.cat([explainer.attribute(image[None], c) for image, c in zip(x, (2, 0), strict=True)])
        torch.testing.assert_close(alone, found)


def test_prediction_difference_is_its_loop():
    check_loop()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("+ roots @ normal", "+ 0.9 * roots @ normal"),
        ("slopes @ apart", "0 * slopes @ apart"),
        (".mean(dim=3)", ".amax(dim=3)"),
        ("self.instances + 1) /", "self.instances + 2) /"),
        (".log2()", ".log()"),
        ("[*range(0, last, self.stride), last]", "[*range(0, last + 1, self.stride)]"),
        ("min(max(start - padding, 0)", "min(max(start, 0)"),
        ("number // self.samples, len(columns)", "number // self.samples, len(rows)"),
        ("across.sum(dim=0))", "1)"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises((AssertionError, IndexError, NotApplicable)):  # pixels in no window have no value
        check_loop(mutated(MODULE, right, wrong).PredictionDifference)


def test_samples_have_the_conditional_moments():
    """Of a texture made by a known rule: each pixel is 0.9 of its left neighbour and noise."""
    rng = np.random.default_rng(0)
    image = np.zeros((3, 90, 90))
    image[:, :, 0] = rng.normal(size=(3, 90))
    for column in range(1, 90):
        image[:, :, column] = 0.9 * image[:, :, column - 1] + math.sqrt(1 - 0.81) * rng.normal(size=(3, 90))
    patches = Patches(image, 5)
    samples = np.array([patches.sample(40, 40, rng.normal(size=(3, 1, 1))) for _ in range(3000)])[:, :, 0, 0]
    # Given both neighbours l and r: mean (l + r) 0.9 / 1.81, variance (1 - 0.81) / 1.81.
    expected = (image[:, 40, 39] + image[:, 40, 41]) * 0.9 / 1.81
    np.testing.assert_allclose(samples.mean(0), expected, atol=0.12)
    np.testing.assert_allclose(samples.var(0), 0.19 / 1.81, rtol=0.15)


def test_what_the_rest_tells_is_no_evidence():
    """A smooth wave is told by the pixels around a patch, so only marginal samples change the score."""
    y, x = torch.meshgrid(torch.arange(48.0).double(), torch.arange(48.0).double(), indexing="ij")
    image = (0.5 + 0.4 * torch.sin(x / 3) * torch.cos(y / 4)).expand(1, 3, -1, -1)
    model = net()
    options = {"window": 6, "stride": 6, "samples": 4}
    sizes = {
        how: float(PredictionDifference(model, sampling=how, **options).attribute(image, 1).abs().mean())
        for how in ("conditional", "marginal")
    }
    assert sizes["conditional"] < 0.05 * sizes["marginal"]


def test_refusals():
    for options, message in (
        ({"stride": 17}, "1 <= stride <= window"),
        ({"samples": 0}, "samples 0"),
        ({"padding": 0}, "padding must be at least 1; got 0"),
    ):
        with pytest.raises(InputError, match=message):
            PredictionDifference(net(), **options)
    PredictionDifference(net(), window=14, samples=1).attribute(images(1), 0)
    with pytest.raises(NotApplicable, match="18 × 23 pixels are too small for windows of 15 with a margin of 2"):
        PredictionDifference(net(), window=15).attribute(images(1), 0)
    PredictionDifference(net(), window=17, samples=1, sampling="marginal").attribute(images(1), 0)
    with pytest.raises(NotApplicable, match=r"18 × 23 pixels are too small for windows of 19$"):
        PredictionDifference(net(), window=19, sampling="marginal").attribute(images(1), 0)
