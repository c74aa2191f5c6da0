"""Smooth and Integrate: closed forms of quadratic models, loops, completeness, and bases that are not gradients."""

import math

import pytest
import torch
from torch import nn

from interp_models import EXPLAINERS
from interp_models.core.errors import InputError
from interp_models.explainers import features
from interp_models.explainers.cam import GradCAM
from interp_models.explainers.combinators import Integrate, Smooth, points
from interp_models.explainers.features import shared_passes
from interp_models.explainers.gradients import Gradient, GradXInput, GuidedBackprop
from interp_models.explainers.mixtures import (
    IntegratedGradients,
    IntegratedGuidedBackprop,
    IntegratedSmoothGrad,
    SmoothedGuidedBackprop,
    SmoothedIntegratedGradients,
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)
from interp_models.explainers.occlusion import Occlusion
from interp_models.explainers.scorecam import ScoreCAM
from tests.conftest import PoolLinear
from tests.mutation import mutated

COMBINATORS = "interp_models.explainers.combinators"


class Quadratic(nn.Module):
    """y_c = Σ a_c x² / 2, whose gradient is a_c ⊙ x; by 1 x 1 convolutions, so that derivatives take images alone."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]], dtype=torch.float64))

    def forward(self, x):
        return x.square().sum(dim=(2, 3)) @ self.a.T / 2

    def of(self, c):
        return self.a.detach()[c].view(3, 1, 1)


def images(n=2, size=4):
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def relu_net():
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()


def raw(explainer, x, target):
    return explainer.raw(explainer.model, x, target)


# --- Smooth ---


def check_smooth(cls=Smooth):
    """The moments of a ⊙ (x + ε): n = 3000 samples, five standard errors."""
    model, n = Quadratic(), 3000
    x = images(1) * 2 + 1
    a = model.of(1)
    for scale, sigma in (("absolute", 0.3), ("range", 0.3 * float(x.max() - x.min()))):
        options = {"samples": n, "noise": 0.3, "noise_scale": scale, "batch": 500}
        error = (a * sigma / math.sqrt(n)).abs()
        mean = raw(cls(Gradient(model), **options), x, 1)[0]
        assert bool(((mean - a * x[0]).abs() < 5 * error).all())
        assert 0.5 < float(((mean - a * x[0]) / (a * sigma / math.sqrt(n))).std()) < 2  # and there is noise
        square = raw(cls(Gradient(model), average="square", **options), x, 1)[0]
        spread = (a**2 * torch.sqrt(2 * sigma**4 + 4 * x[0] ** 2 * sigma**2)) / math.sqrt(n)
        assert bool(((square - a**2 * (x[0] ** 2 + sigma**2)).abs() < 5 * spread).all())
        variance = raw(cls(Gradient(model), average="variance", **options), x, 1)[0]
        assert bool(((variance - a**2 * sigma**2).abs() < 5 * a**2 * sigma**2 * math.sqrt(2 / n)).all())


def test_smooth_has_the_moments_of_its_noise():
    check_smooth()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("total / self.samples\n", "total\n"),
        ("(squares - (total / self.samples).square())", "squares"),
        ("found = found - first[b]", "first = first"),
        ("- inputs.amin(dim=(1, 2, 3), keepdim=True))", ")"),
        ("inputs[b] + sigma[b]", "inputs[b] + 0.9 * sigma[b]"),
        ("seed_of(seed, number)", "seed_of(seed, 0)"),
        ("squares.index_add_(0, b, found.square())", "squares.index_add_(0, b, found.abs())"),
    ],
)
def test_mutations_of_smooth_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_smooth_in_both_ways(mutated(COMBINATORS, right, wrong).Smooth)


def check_smooth_in_both_ways(cls):
    """A lost shift is seen where numbers are large."""
    check_smooth(cls)
    check_variance_of_large_gradients(cls)


def check_variance_of_large_gradients(cls=Smooth):
    """In float32, of gradients of 1e4 that vary by 1: E[g²] - E[g]² would keep nothing of it."""

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return (1e4 * x + x.square() / 2).sum(dim=(1, 2, 3))[:, None] * self.a

    x = images(1).float()
    explainer = cls(Gradient(Steep()), samples=2000, noise=1.0, noise_scale="absolute", average="variance", batch=100)
    found = raw(explainer, x, 0)
    assert bool(((found - 1).abs() < 6 * math.sqrt(2 / 2000) + 0.01).all())


def test_variance_of_large_gradients():
    check_variance_of_large_gradients()


def test_samples_are_a_loop_and_do_not_depend_on_the_batch():
    model, x = relu_net(), images(3, 8)
    whole = Smooth(Gradient(model), samples=5, batch=7).attribute(x, 1)
    first, second = (Smooth(Gradient(model), samples=n, noise=0.15).attribute(x, 1) for n in (1, 5))
    torch.testing.assert_close(whole, second)
    assert not torch.allclose(first, second)
    assert not torch.equal(whole, Smooth(Gradient(model), samples=5, seed=1).attribute(x, 1))
    one_by_one = torch.cat([Smooth(Gradient(model), samples=5, batch=2).attribute(image[None], 1) for image in x])
    torch.testing.assert_close(whole, one_by_one)


@pytest.mark.parametrize("base", [Gradient, GradXInput, GuidedBackprop, GradCAM, ScoreCAM, IntegratedGradients])
def test_smooth_without_noise_is_the_base(base):
    model, x = relu_net(), images(3, 8)
    expected = base(model).attribute(x)
    torch.testing.assert_close(Smooth(base(model), noise=0.0, samples=3).attribute(x), expected, rtol=1e-5, atol=1e-9)
    if base in (GradCAM, ScoreCAM):
        squares = Smooth(base(model), noise=0.0, samples=3, average="square").attribute(x)
        torch.testing.assert_close(squares, expected**2, rtol=1e-5, atol=1e-9)
    assert float(Smooth(base(model), noise=0.0, samples=3, average="variance").attribute(x).abs().max()) < 1e-12


def test_the_class_is_that_of_the_image_without_noise():
    """Strong noise changes what is predicted; the gradient of a linear model tells which class was explained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()
    x = images(4)
    expected = model[1].weight.detach()[model(x).argmax(dim=1)].view(4, 3, 4, 4)
    for combined in (Smooth(Gradient(model), noise=20.0, samples=9), Integrate(Gradient(model), baseline=9.0, steps=5)):
        found = raw(combined, x, None)
        torch.testing.assert_close(found, expected if isinstance(combined, Smooth) else expected * (x - 9.0))


# --- Integrate ---


def check_integrate(cls=Integrate):
    model, x = Quadratic(), images()
    for c, b, steps in ((0, 0.0, 7), (1, 0.4, 3)):
        a, d = model.of(c), x - b
        gauss = raw(cls(Gradient(model), steps=steps, baseline=b, quadrature="gauss_legendre", batch=5), x, c)
        torch.testing.assert_close(gauss, a * d * (b + d / 2))
        riemann = raw(cls(Gradient(model), steps=steps, baseline=b, batch=5), x, c)
        torch.testing.assert_close(riemann, a * d * (b + d * (steps + 1) / (2 * steps)))


def test_integrals_of_quadratic_models():
    check_integrate()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("np.arange(1, steps + 1) / steps", "np.arange(0, steps) / steps"),
        ("total * change if", "total * inputs if"),
        ("self.baseline + alphas", "alphas"),
        ("(x + 1) / 2, weights / 2", "x, weights / 2"),
        ("(x + 1) / 2, weights / 2", "(x + 1) / 2, weights"),
        ("total * change if", "total if"),
    ],
)
def test_mutations_of_integrate_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_integrate(mutated(COMBINATORS, right, wrong).Integrate)


def test_integrated_gradients_are_complete():
    """Exactly so on a smooth network, within the quadrature's error on one of ReLUs, which falls as 1 / steps."""
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Softplus(), nn.Flatten(), nn.Linear(6 * 36, 3)).double()
    x = images(3, 8)
    for model, options, error in (
        (smooth, {"quadrature": "gauss_legendre", "steps": 20}, 1e-6),
        (relu_net(), {"steps": 2000}, 2e-3),
    ):
        explainer = IntegratedGradients(model, baseline=0.3, **options)
        total = explainer.attribute(x, 2).double().sum(dim=(1, 2))
        change = (model(x) - model(torch.full_like(x, 0.3)))[:, 2].detach()
        torch.testing.assert_close(total, change, rtol=error, atol=error * float(change.abs().max()))


def test_maps_of_layers_are_averaged_along_the_path():
    model, x = PoolLinear().double(), images(3, 8)
    points_ = [k / 4 * x for k in (1, 2, 3, 4)]
    expected = sum(GradCAM(model).attribute(p, 1) for p in points_) / 4
    torch.testing.assert_close(Integrate(GradCAM(model), steps=4, batch=3).attribute(x, 1), expected)


def test_a_map_of_one_channel_is_not_taken_for_colours():
    """Occlusion along the path, of grey images: not multiplied, as it is not for three colours."""
    grey, rgb = (nn.Sequential(nn.Flatten(), nn.Linear(n * 64, 2)).double() for n in (1, 3))
    rgb[1].weight.data = grey[1].weight.data.repeat(1, 3) / 3
    rgb[1].bias.data = grey[1].bias.data
    x = images(2, 8)[:, :1]
    found, expected = (
        Integrate(Occlusion(model, window=4, stride=2, score="logit"), steps=3).attribute(some, 1)
        for model, some in ((grey, x), (rgb, x.repeat(1, 3, 1, 1)))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_bases_keep_their_own_settings_and_no_passes():
    model, x = relu_net(), images(2, 8)
    base = ScoreCAM(model)
    base.preparation = "none"
    with shared_passes():
        Smooth(base, samples=3).attribute(x)
        assert not features._shared.get()
    assert base.preparation == "none"


@pytest.mark.parametrize("name", ["integrated_gradcam", "cameras"])
def test_methods_of_many_passes_keep_none_for_others(name):
    explainer, x = EXPLAINERS.build(name, {}, model=relu_net()), images(2, 16)
    expected = explainer.attribute(x, 1)
    with shared_passes():
        torch.testing.assert_close(explainer.attribute(x, 1), expected)
        assert not features._shared.get()


def test_every_mixture_keeps_to_its_batch():
    model, x, largest = relu_net(), images(3, 8), []
    model.register_forward_pre_hook(lambda part, args: largest.append(len(args[0])))
    for cls, options in ((VarGrad, {"of": "integrated_gradients", "samples": 2}), (SmoothedIntegratedGradients, {})):
        explainer = cls(model, batch=2, **options)
        explainer.preparation = "none"
        explainer.attribute(x, 0)
    assert max(largest) == 3  # of the images themselves, once
    assert largest.count(3) <= 2


def test_points_are_those_of_their_rules():
    for steps in (1, 2, 5):
        at, weights = points(steps, "gauss_legendre")
        for power in range(2 * steps):  # exact for polynomials up to that degree
            assert math.isclose(sum(weights * at**power), 1 / (power + 1))


# --- Mixtures ---


def test_what_noise_does_in_mixtures():
    """Of a quadratic model's integrated gradients a x² (m + 1) / 2m: smoothed, x² becomes x² + σ²; integrated
    SmoothGrad keeps x² as its factor x has no noise."""
    model, x, steps, n = Quadratic(), images(1) * 2, 2, 4000
    a, options = model.of(0), {"steps": steps, "samples": n, "noise": 0.5, "noise_scale": "absolute", "batch": 500}
    factor = (steps + 1) / (2 * steps)
    smoothed = raw(SmoothedIntegratedGradients(model, **options), x, 0)[0]
    spread = (a * factor).abs() * torch.sqrt(2 * 0.5**4 + 4 * x[0] ** 2 * 0.5**2) / math.sqrt(n)
    assert bool(((smoothed - a * factor * (x[0] ** 2 + 0.5**2)).abs() < 5 * spread).all())
    integrated = raw(IntegratedSmoothGrad(model, **options), x, 0)[0]
    spread = (a * x[0]).abs() * 0.5 / math.sqrt(n)
    assert bool(((integrated - a * factor * x[0] ** 2).abs() < 5 * spread).all())


def test_registered_methods_are_their_combinators():
    model, x = relu_net(), images(3, 8)
    noise = {"samples": 4, "noise": 0.2, "seed": 3}
    gradient, guided = Gradient(model, channels="sum"), GuidedBackprop(model, channels="sum")
    for found, expected in (
        (SmoothGrad(model, channels="sum", **noise), Smooth(gradient, **noise)),
        (SmoothGradSquared(model, channels="sum", **noise), Smooth(gradient, average="square", **noise)),
        (VarGrad(model, channels="sum", **noise), Smooth(gradient, average="variance", **noise)),
        (
            VarGrad(model, of="integrated_gradients", channels="sum", **noise),
            Smooth(Integrate(gradient, steps=50), average="variance", **noise),
        ),
        (SmoothedGuidedBackprop(model, channels="sum", **noise), Smooth(guided, **noise)),
        (IntegratedGuidedBackprop(model, steps=6), Integrate(guided, steps=6)),
        (IntegratedSmoothGrad(model, steps=3, **noise), Integrate(Smooth(gradient, **noise), steps=3)),
        (SmoothedIntegratedGradients(model, steps=3, **noise), Smooth(Integrate(gradient, steps=3), **noise)),
    ):
        torch.testing.assert_close(found.attribute(x, 1), expected.attribute(x, 1), rtol=1e-6, atol=1e-12)
    defaults = [IntegratedGradients(model).steps, SmoothGrad(model).samples, SmoothGrad(model).noise]
    assert defaults == [50, 15, 0.15]
    along = sum(guided.raw(model, k / 6 * x, 1) for k in range(1, 7)) / 6 * x
    found = IntegratedGuidedBackprop(model, steps=6).attribute(x, 1)
    torch.testing.assert_close(found, along.sum(dim=1).float(), rtol=1e-5, atol=1e-9)


def test_bad_options():
    model = relu_net()
    for make, message in (
        (lambda: SmoothGrad(model, samples=0), "samples must be at least 1"),
        (lambda: SmoothGrad(model, noise=-1.0), "noise not below 0"),
        (lambda: IntegratedGradients(model, steps=0), "steps must be at least 1"),
        (lambda: IntegratedGradients(model, batch=0), "batch must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            make()
