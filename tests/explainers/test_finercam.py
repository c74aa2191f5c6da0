"""Finer-CAM: closed form on mean and linear layer, finite differences, Grad-CAM as its limit, and pytorch-grad-cam."""

import numpy as np
import pytest
import torch
from torch import nn

from interp_models import EXPLAINERS, InputError, NotApplicable
from interp_models.explainers.finercam import FinerCAM
from tests.conftest import PoolLinear
from tests.mutation import mutated


def nearest(logits: list[float], c: int, count: int) -> list[int]:
    """The classes with the nearest logits, by one after the other."""
    left, found = [d for d in range(len(logits)) if d != c], []
    while left and len(found) < count:
        found.append(min(left, key=lambda d: abs(logits[d] - logits[c])))
        left.remove(found[-1])
    return found


def check(cls: type) -> None:
    torch.manual_seed(0)
    net, images = PoolLinear(channels=5, classes=6).double().eval(), torch.rand(3, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        net.head.weight.mul_(5)
    a = net.features(images).detach()
    for references in (1, 3, 9):
        found = cls(net, layer="features", references=references, relu=False).attribute(images, torch.tensor([0, 4, 5]))
        for i, c in enumerate((0, 4, 5)):
            others = nearest(net(images)[i].tolist(), c, references)
            assert c not in others
            w = (net.head.weight[c] - 0.6 * sum(net.head.weight[d] for d in others) / len(others)).detach()
            expected = torch.einsum("k,khw->hw", w, a[i]) / a[0, 0].numel()
            torch.testing.assert_close(found[i], expected.float())


def test_closed_form_on_mean_and_linear_layer() -> None:
    check(FinerCAM)
    for right, wrong in (
        ("scatter(1, targets, torch.inf)", "scatter(1, targets, 0.0)"),
        ("of_target[:, 0] - self.alpha", "of_target[:, 0] + self.alpha"),
        (".detach().abs()", ".detach()"),
    ):
        with pytest.raises(AssertionError):
            check(mutated("interp_models.explainers.finercam", right, wrong).FinerCAM)


def tail() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 5)
    ).double()  # fmt: skip


def test_weights_by_probability_by_finite_differences() -> None:
    net, images, c = tail(), torch.rand(1, 3, 8, 8, dtype=torch.float64), 2
    with torch.no_grad():
        net[-1].weight.mul_(8)
    a = net[:2](images).detach()
    references = nearest(net(images)[0].tolist(), c, 3)

    def value(features: torch.Tensor) -> float:
        y = net[2:](features)[0].detach().numpy()
        p = np.exp(y) / np.exp(y).sum()
        return sum(p[d] * (y[c] - 0.7 * y[d]) for d in references) / sum(p[d] for d in references)

    g = torch.zeros_like(a)
    for place in np.ndindex(*a.shape):
        up, down = a.clone(), a.clone()
        up[place] += 1e-6
        down[place] -= 1e-6
        g[place] = (value(up) - value(down)) / 2e-6
    expected = (g.mean(dim=(2, 3), keepdim=True) * a).sum(dim=1).relu()
    assert float(expected.max()) > 1e-3
    options = {"layer": "1", "alpha": 0.7, "weights": "probability"}
    found = EXPLAINERS.build("finercam", options, model=net).attribute(images, c)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-7)
    equal = EXPLAINERS.build("finercam", {"layer": "1", "alpha": 0.7}, model=net).attribute(images, c)
    assert not torch.allclose(found, equal, rtol=1e-2)


def test_without_comparison_it_is_gradcam() -> None:
    net, images = tail(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    gradcam = EXPLAINERS.build("gradcam", {"layer": "1"}, model=net).attribute(images, 3)
    for weights in ("equal", "probability"):
        found = EXPLAINERS.build("finercam", {"layer": "1", "alpha": 0.0, "weights": weights}, model=net)
        torch.testing.assert_close(found.attribute(images, 3), gradcam)


def test_beside_pytorch_grad_cam() -> None:
    """Its map of the predicted class; it scales to [0, 1]."""
    peer = pytest.importorskip("pytorch_grad_cam")
    net, images = tail().float(), torch.rand(3, 3, 8, 8)
    made = EXPLAINERS.build("finercam", {"layer": "1", "alpha": 0.8, "weights": "probability"}, model=net)
    found = made.attribute(images).numpy()
    with peer.FinerCAM(net, [net[1]]) as cam:
        for image, ours in zip(images, found, strict=True):
            cam(image[None], alpha=0.8)
            theirs = cam.base_cam.get_cam_image(
                image[None], net[1], None, *(x[-1].numpy() for x in (
                    cam.base_cam.activations_and_grads.activations, cam.base_cam.activations_and_grads.gradients,
                )), False,
            )[0]  # fmt: skip
            np.testing.assert_allclose(ours, np.maximum(theirs, 0), rtol=1e-4, atol=1e-7)


def test_one_class_cannot_be_compared() -> None:
    two = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    FinerCAM(two).attribute(torch.rand(1, 3, 8, 8))
    two[-1] = nn.Linear(4, 1)
    with pytest.raises(NotApplicable, match="finercam compares classes; the model has only one"):
        FinerCAM(two).attribute(torch.rand(1, 3, 8, 8))
    with pytest.raises(InputError, match="finercam: references must be at least 1"):
        FinerCAM(two, references=0)
