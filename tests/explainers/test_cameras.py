"""CAMERAS, against algorithm 1 written out, a network that sees no size, and networks that take one size."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from interp_models import EXPLAINERS, NotApplicable
from interp_models.explainers.cameras import CAMERAS
from tests.mutation import mutated


def network() -> nn.Sequential:
    """It ends in maxima, so that gradients differ from cell to cell."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(3), nn.Flatten(),
        nn.Linear(45, 4),
    ).double()  # fmt: skip


def images() -> torch.Tensor:
    return torch.rand(8, 3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def written_out(net: nn.Sequential, image: torch.Tensor, target: int, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Algorithm 1 for one image; also whether a resolution was left out."""
    features, gradients = [], []
    label = int(net(image[None]).argmax())
    for size in sizes:
        x = image[None] if size == (24, 32) else F.interpolate(image[None], size=size, mode="bicubic")
        a = net[:2](x).detach().requires_grad_(True)
        logits = net[2:](a)
        if int(logits.argmax()) != label:
            continue
        (g,) = torch.autograd.grad(logits[0, target], a)
        features.append(F.interpolate(a.detach(), size=(24, 32), mode="bilinear"))
        gradients.append(F.interpolate(g, size=(24, 32), mode="bilinear"))
    mean_a, mean_g = (torch.stack(x).mean(dim=0) for x in (features, gradients))
    return (mean_a * mean_g).sum(dim=1)[0].clamp(min=0), len(features)


SIZES = [(24, 32), (38, 51), (53, 70), (67, 90), (82, 109)]  # 1, 1.6, 2.2, 2.8 and 3.4 times


def check(cls: type) -> None:
    net, x = network(), images()
    target = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    found = cls(net, layer="1", resolutions=5, largest=3.4).attribute(x, target)
    numbers = set()
    for i, c in enumerate(target.tolist()):
        expected, number = written_out(net, x[i], c, SIZES)
        torch.testing.assert_close(found[i], expected.float(), rtol=1e-5, atol=1e-9)
        numbers.add(number)
    assert numbers - {5}, "no resolution was left out"


def test_it_is_algorithm_1_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check(CAMERAS)
    monkeypatch.setattr("interp_models.explainers.cameras.VALUES", 2 * 24 * 32)  # two channels at a time
    check(CAMERAS)
    for right, wrong in (
        ("(classes == predicted)", "(classes == classes)"),
        ('mode="bicubic"', 'mode="bilinear"'),
        ("/ len(maps)", "/ 5"),
        (".sum(dim=0).relu()", ".sum(dim=0)"),
    ):
        with pytest.raises(AssertionError):
            check(mutated("interp_models.explainers.cameras", right, wrong).CAMERAS)


def test_one_resolution_is_hirescam_enlarged_channel_by_channel() -> None:
    net, x = network(), images()
    a = net[:2](x).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(net[2:](a)[:, 2].sum(), a)
    up = (F.interpolate(y.detach(), size=(24, 32), mode="bilinear") for y in (a, g))
    expected = torch.stack(list(up)).prod(dim=0).sum(dim=1).relu()
    found = EXPLAINERS.build("cameras", {"layer": "1", "resolutions": 1}, model=net).attribute(x, 2)
    torch.testing.assert_close(found, expected.float())


def test_the_authors_resolutions() -> None:
    assert CAMERAS(network())._sizes((224, 224)) == [(n, n) for n in range(224, 1000, 100)]


def vit(dynamic: bool) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=4, img_size=64, dynamic_img_size=dynamic).double().eval()


def test_networks_of_one_size_are_refused_in_one_line() -> None:
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    options = {"resolutions": 3, "largest": 2.0}
    assert EXPLAINERS.build("cameras", options, model=vit(True)).attribute(x).shape == (2, 64, 64)
    with pytest.raises(NotApplicable, match="VisionTransformer does not take images of 96 × 96 beside those of 64"):
        EXPLAINERS.build("cameras", options, model=vit(False)).attribute(x)
    torch.manual_seed(0)
    fixed = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 62 * 62, 3)).double()
    with pytest.raises(NotApplicable, match=r"Sequential does not take images of 96 × 96 .*, as cameras needs: mat1"):
        EXPLAINERS.build("cameras", options, model=fixed).attribute(x)
    assert EXPLAINERS.build("cameras", {"resolutions": 1}, model=fixed).attribute(x).shape == (2, 64, 64)
