"""SISE and Ada-SISE, against loops over pixels and thresholds, for layers by name; Otsu's threshold by trying all."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from interp_models import EXPLAINERS, InputError
from interp_models.explainers.sise import SISE, AdaSISE, otsu
from tests.mutation import mutated


def by_trying(values: np.ndarray) -> float:
    """Otsu's threshold: the split with the smallest variance within the classes."""
    best, threshold = np.inf, -np.inf
    for t in np.unique(values)[:-1]:
        low, high = values[values <= t], values[values > t]
        within = low.size * low.var() + high.size * high.var()
        if within < best - 1e-15:
            best, threshold = within, t
    return float(threshold)


def test_otsus_threshold_has_the_least_variance_within_classes() -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).gamma(1.5, size=50).round(seed % 3 + 1)
        assert float(otsu(torch.tensor(values))) == by_trying(values)
    assert float(otsu(torch.ones(3))) == float(otsu(torch.ones(1))) == -np.inf


def network() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(True),
        nn.MaxPool2d(2), nn.Conv2d(10, 9, 3, padding=1), nn.Tanh(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Linear(36, 4),
    ).double()  # fmt: skip
    with torch.no_grad():
        net[-1].weight.mul_(6)
    return net


def written_out(net: nn.Sequential, image: torch.Tensor, c: int, threshold: float | None) -> tuple[np.ndarray, int]:
    """The map of one image, and the number of masks; without a threshold, of Ada-SISE."""
    fused, count = np.zeros(image.shape[1:]), 0
    for number, stop in enumerate((2, 5, 8)):
        a = net[:stop](image[None]).detach().requires_grad_(True)
        (g,) = torch.autograd.grad(net[stop:](a.clone())[0, c], a)
        means = [float(x.mean()) for x in g[0]]
        positive = [m for m in means if m > 0]
        limit = by_trying(np.array(positive)) if threshold is None else threshold * max(means)
        v = np.zeros(image.shape[1:])
        for k, mean in enumerate(means):
            mask = F.interpolate(a[0, k][None, None].detach(), size=image.shape[1:], mode="bilinear")[0, 0]
            if mean <= max(limit, 0) or mask.max() == mask.min():
                continue
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            p = net((image * mask)[None]).softmax(dim=1)[0, c].item()
            v += p * (mask / mask.sum()).numpy()
            count += 1
        v = (v - v.min()) / (v.max() - v.min() or 1.0)
        fused = v if number == 0 else (fused + v) * (v > by_trying(v))
    return fused, count


def check(module: object) -> None:
    net, images = network(), torch.rand(3, 3, 16, 20, dtype=torch.float64)
    cases = {
        0.0: module.SISE(net, batch=3),
        0.3: module.SISE(net, threshold=0.3),
        None: module.AdaSISE(net),
    }
    counts = []
    for threshold, made in cases.items():
        maps = made.attribute(images, torch.tensor([0, 3, 2]))
        expected, numbers = zip(
            *(written_out(net, x, c, threshold) for x, c in zip(images, (0, 3, 2), strict=False)), strict=True
        )
        assert abs(made.selected - np.mean(numbers)) < 1e-9
        np.testing.assert_allclose(maps.numpy(), np.stack(expected), rtol=1e-4, atol=1e-6)
        counts.append(sum(numbers))
    assert counts[0] > counts[1] > 9
    assert counts[0] > counts[2] > 9


def test_sise_and_ada_sise_written_out() -> None:
    import interp_models.explainers.sise as right_one

    check(right_one)
    for right, wrong in (
        ("scores / masks.sum(dim=(1, 2, 3))", "scores"),
        ("(fused + seen) * (seen > otsu(seen))", "fused + seen"),
        ("means > self.threshold * means.amax()", "means > 0"),
        ("means > otsu(means[positive])", "means > 0"),
        ("score(image * masks.to(image.dtype))[:, c]", "score(image * masks.to(image.dtype))[:, 0]"),
    ):
        with pytest.raises(AssertionError):
            check(mutated("interp_models.explainers.sise", right, wrong))


@pytest.mark.slow
def test_layers_by_name_are_those_that_are_found() -> None:
    torch.manual_seed(0)
    net, images = (
        torchvision.models.resnet18(weights=None, num_classes=4).double().eval(),
        torch.rand(1, 3, 64, 64).double(),
    )
    named = {"layer": ["relu", "layer1", "layer2", "layer3", "layer4"], "threshold": 0.7}
    found = EXPLAINERS.build("sise", {"threshold": 0.7}, model=net).attribute(images, 1)
    torch.testing.assert_close(EXPLAINERS.build("sise", named, model=net).attribute(images, 1), found)
    one = EXPLAINERS.build("sise", {"layer": "layer4", "threshold": 0.7}, model=net).attribute(images, 1)
    assert not torch.allclose(one, found)
    # Where the highest layer is not above its threshold, nothing is shown.
    assert not found[one <= otsu(one)].any()


def test_without_positive_gradients_the_map_is_zero() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[-1].weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
    images = torch.rand(1, 3, 8, 8)
    for name in ("sise", "ada_sise"):
        made = EXPLAINERS.build(name, model=net)
        assert not made.attribute(images, 0).any()
        assert made.selected == 0
        assert made.attribute(images, 1).any()


def test_options_that_make_no_sense() -> None:
    SISE(network(), threshold=0.9)
    with pytest.raises(InputError, match="sise: threshold must be at least 0 and below 1; got 1"):
        SISE(network(), threshold=1)
    with pytest.raises(InputError, match="batch must be at least 1"):
        AdaSISE(network(), batch=0)
