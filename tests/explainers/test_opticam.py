"""Opti-CAM against Adam written out, and a model whose best mixture is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interp_models.core.errors import InputError
from interp_models.core.maps import stretched
from interp_models.explainers import opticam
from interp_models.explainers.features import activations, activations_and_gradients
from interp_models.explainers.opticam import OptiCAM
from tests.mutation import mutated


def test_activations_of_a_float64_model_are_not_rounded() -> None:
    """Adam makes whole steps of what is rounding in float32."""
    model, images = net(), torch.rand(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = model[:3](images)
    found, _ = activations(OptiCAM(model, layer="2"), images, 0)
    assert torch.equal(found, expected)
    a, g = activations_and_gradients(OptiCAM(model, layer="2"), images, 0)
    assert torch.equal(a, expected)
    assert g.dtype == torch.float64
    half, _ = activations(OptiCAM(model.bfloat16(), layer="2"), images.bfloat16(), 0)
    assert half.dtype == torch.float32


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(20, 3),
    ).double()  # fmt: skip


def written_out(model, image, target, steps, patience=None):
    """One image; Adam by its formulas; the best mixture seen."""
    a = model[:2](image[None])[0].detach().clamp(min=0)
    u, m, v = np.full(4, 0.5), np.zeros(4), np.zeros(4)
    best, kept, since, made = -np.inf, None, 0, 0
    for t in range(1, steps + 1):
        variable = torch.tensor(u, requires_grad=True)
        weights = variable.exp() / variable.exp().sum()
        mixture = sum(weights[k] * a[k] for k in range(4))
        large = F.interpolate(mixture[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
        mask = (large - large.min()) / (large.max() - large.min())
        score = model((image * mask)[None])[0, target]
        score.backward()
        made += 1
        if score.item() > best:
            best, kept, since = score.item(), u.copy(), 0
        else:
            since += 1
        g = -variable.grad.numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = u - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        if patience is not None and since == patience:
            break
    weights = np.exp(kept) / np.exp(kept).sum()
    return sum(weights[k] * a[k].numpy() for k in range(4)), made


def check(cls=OptiCAM):
    model, images = net(), torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for bias in (0.0, 0.8):  # the second time the map is above 0 everywhere
        model[0].bias.data += bias
        maps = cls(model, layer="1", steps=12).attribute(images, 2)
        for found, image in zip(maps, images, strict=True):
            np.testing.assert_allclose(found, written_out(model, image, 2, 12)[0], rtol=1e-4, atol=1e-6)


def test_the_optimisation_is_the_papers():
    check()


def test_images_stop_on_their_own():
    model, images = net(), torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    model[0].bias.data += 0.3
    passes = []
    explainer = OptiCAM(model, layer="1", steps=60, patience=2)
    handle = model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    explainer.attribute(images, 0)  # finds out about the model, once
    passes.clear()
    explainer.preparation = "none"
    maps = explainer.attribute(images, 0)
    handle.remove()
    total = 0
    for found, image in zip(maps, images, strict=True):
        expected, made = written_out(model, image, 0, 60, patience=2)
        total += made
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert sum(passes) == len(images) + total  # the layer, then steps
    assert total < 3 * 60


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("-found.sum()", "found.sum()"),
        ("a.relu(), self", "a, self"),
        ("better = found > best[live]", "better = found < best[live]"),
        ("u.softmax(dim=1), a)", "u, a)"),
        ("lr=self.lr", "lr=self.lr * 2"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check(mutated("interp_models.explainers.opticam", right, wrong).OptiCAM)


@pytest.mark.parametrize(
    ("right", "wrong"), [("(large - low) / torch", "large / torch"), ('mode="bilinear"', 'mode="bicubic"')]
)
def test_mutations_of_stretching_are_rejected(right, wrong, monkeypatch):
    monkeypatch.setattr(opticam, "stretched", mutated("interp_models.core.maps", right, wrong).stretched)
    with pytest.raises(AssertionError):
        check()


class Halves(nn.Module):
    """Two feature maps, the left and the right half of an image; the score is the light on the left less that on the
    right."""

    def __init__(self):
        super().__init__()
        self.features = nn.Identity()

    def forward(self, x):
        side = torch.linspace(-1, 1, x.shape[-1]) < 0
        light = x.mean(dim=1)
        halves = self.features(torch.stack([light.detach() * side, light.detach() * ~side], dim=1)).sum(dim=(2, 3))
        score = (light * side).sum(dim=(1, 2)) - (light * ~side).sum(dim=(1, 2))
        score = score + 1e-3 * (halves[:, 0] - halves[:, 1])  # else no logit would read the layer
        return torch.stack([score, -score], dim=1)


def test_the_best_mixture_is_found():
    images = 0.5 + 0.5 * torch.rand(2, 3, 16, 16)
    left, right = (OptiCAM(Halves(), layer="features", steps=100).attribute(images, c) for c in (0, 1))
    assert float(left[:, :, 8:].mean()) < 0.05 * float(left[:, :, :8].mean())
    assert float(right[:, :, :8].mean()) < 0.05 * float(right[:, :, 8:].mean())


def test_constant_maps_and_bad_options():
    assert float(stretched(torch.ones(1, 2, 2), (4, 4)).abs().max()) == 0
    for options in ({"steps": 0}, {"lr": 0.0}, {"patience": 0}):
        with pytest.raises(InputError, match="opticam needs steps, patience >= 1 and lr > 0"):
            OptiCAM(net(), **options)
