"""GradientSHAP: linear and quadratic models, completeness in expectation, a loop, and captum's with the same draws."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from interp_models.core.errors import InputError
from interp_models.explainers.gradientshap import GradientSHAP
from interp_models.explainers.mixtures import IntegratedGradients
from tests.mutation import mutated

MODULE = "interp_models.explainers.gradientshap"


def images(n=2, size=8):
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).double()


class Squares(nn.Module):
    """y_c = Σ a_c x² / 2, whose gradient is a_c ⊙ x."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]], dtype=torch.float64))

    def forward(self, x):
        return x.square().sum(dim=(2, 3)) @ self.a.T / 2


def net():
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Softplus()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).double()


def raw(explainer, x, target):
    return explainer.raw(explainer.model, x, target).detach()


def check_linear(cls=GradientSHAP):
    """Of a linear model, any α: weight ⊙ (x - the mean baseline), exactly for one baseline."""
    model, x = linear(), images()
    weight = model[1].weight.detach()[2].view(3, 8, 8)
    for value in (0.0, 0.7):
        found = raw(cls(model, samples=3, baselines=[value], batch=4), x, 2)
        torch.testing.assert_close(found, weight * (x - value))
    n = 2000
    mixed = raw(cls(model, samples=n, baselines=[0.0, 1.0, 0.2], batch=500), x[:1], 2)[0]
    share = (weight * x[0] - mixed) / weight  # the same for all pixels: the mean of what was drawn
    assert float(share.std()) < 1e-9
    assert float(share.mean()) == pytest.approx(0.4, abs=5 * 0.43 / math.sqrt(n))
    # Random baselines have a mean of 1/2 and a variance of 1/12, in each pixel.
    for noise in (0.0, 0.5):
        found = raw(cls(model, samples=n, noise=noise, batch=500), x[:1], 2)[0]
        apart = (found / weight - (x[0] - 0.5)) / math.sqrt((1 / 12 + noise**2) / n)
        assert float(apart.abs().max()) < 5
        assert 0.8 < float(apart.std()) < 1.2


def check_squares(cls=GradientSHAP):
    """E of (x + ε - x') a (x' + α (x + ε - x')) is a (x² + σ² - x'²) / 2, for which α has to be uniform."""
    model, x, n = Squares(), images(1) * 2, 4000
    a = model.a.detach()[1].view(3, 1, 1)
    for value, noise in ((0.4, 0.0), (0.0, 0.3)):
        found = raw(cls(model, samples=n, baselines=[value], noise=noise, batch=500), x, 1)[0]
        expected = a * (x[0] ** 2 + noise**2 - value**2) / 2
        error = a.abs() * 5 * ((x[0] - value).abs() + noise) ** 2 / math.sqrt(n)  # generous: α's own is 0.29 of that
        assert bool(((found - expected).abs() < error + 1e-9).all())


def check_loop(cls=GradientSHAP):
    """One sample at a time, with the draws that it says, and a batch that does not matter."""
    model, x = net(), images(3)
    for score, options in (("logit", {"noise": 0.2}), ("probability", {"baselines": [0.1, 0.9]})):
        explainer = cls(model, samples=7, score=score, seed=4, batch=5, **options)
        found = explainer.attribute(x, torch.tensor([2, 0, 1]))
        for image, c, map_ in zip(x, (2, 0, 1), found, strict=True):
            total = 0
            for n in range(7):
                alpha, start, noise = explainer._drawn(n, x)
                at = (alpha * (image + noise) + (1 - alpha) * start)[None].requires_grad_()
                y = model(at)
                y = y if score == "logit" else y.softmax(dim=1)
                total = total + (image + noise - start) * torch.autograd.grad(y[0, c], at)[0][0]
            torch.testing.assert_close(map_, (total.sum(dim=0) / 7).float(), rtol=1e-4, atol=1e-6)
        alone = torch.cat([explainer.attribute(image[None], c) for image, c in zip(x, (2, 0, 1), strict=True)])
        torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-7)
        drawn = [explainer._drawn(n, x) for n in range(7)]
        assert len({float(alpha) for alpha, _, _ in drawn}) == 7


def check_all(cls=GradientSHAP):
    check_linear(cls)
    check_squares(cls)
    check_loop(cls)


def test_gradientshap():
    check_all()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("inputs[b] + noise - starts", "inputs[b] - starts"),
        ("starts + alphas.view", "alphas.view"),
        ("total / self.samples", "total"),
        ("(change * gradient)", "gradient"),
        ("seed_of(self.seed, number)", "seed_of(self.seed, 0)"),
        ("uniform(self.seed, number, [0, 1])", "uniform(self.seed, number, [0, 1]) ** 2"),
        ("int(which * len(self.baselines))", "0"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_all(mutated(MODULE, right, wrong).GradientSHAP)


def test_maps_are_complete_in_expectation():
    """The sum of a map tends to y(x) - mean y(x'), and for one baseline the map to integrated gradients."""
    model, x = net(), images(1)
    options = {"samples": 3000, "batch": 500}
    explainer = GradientSHAP(model, **options)
    found = raw(explainer, x, 1).sum()
    starts = torch.stack([explainer._drawn(n, x)[1] for n in range(3000)])
    change = (model(x)[0, 1] - model(starts)[:, 1].mean()).detach()
    assert abs(float(found - change)) < 0.05 * abs(float(change))
    exact = IntegratedGradients(model, steps=40, quadrature="gauss_legendre", baseline=0.3)
    expected = exact.raw(model, x, 1).detach()
    found = raw(GradientSHAP(model, baselines=[0.3], **options), x, 1)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_captum_with_the_same_draws():
    """One image, one baseline, no noise: captum draws α by NumPy, here from ours."""
    attr = pytest.importorskip("captum.attr")
    model, x = net(), images(1)
    explainer = GradientSHAP(model, samples=11, baselines=[0.25])
    alphas = np.array([float(explainer._drawn(n, x)[0]) for n in range(11)])
    with mock.patch("numpy.random.uniform", return_value=alphas) as drawn:
        expected = attr.GradientShap(model).attribute(x, torch.full_like(x, 0.25), n_samples=11, target=2)
    assert drawn.call_args.args == (0.0, 1.0, 11)
    torch.testing.assert_close(raw(explainer, x, 2), expected.detach())


def test_bad_options():
    for options in ({"samples": 0}, {"baselines": []}, {"baselines": ()}, {"noise": -0.1}, {"batch": 0}):
        with pytest.raises(
            InputError, match="samples and batch must be at least 1, noise at least 0, and baselines not"
        ):
            GradientSHAP(net(), **options)
