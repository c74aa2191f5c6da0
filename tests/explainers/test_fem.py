"""FEM against loops and the formula by hand; the layers that stages finds in known architectures."""

import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from interp_models import EXPLAINERS, InputError, NotApplicable
from interp_models.explainers.fem import FEM, MLFEM
from interp_models.explainers.layers import stages, target_layer
from interp_models.explainers.of_layer import fused
from tests.contract.subjects import vgg
from tests.mutation import mutated


def by_loops(a: np.ndarray, k: float) -> np.ndarray:
    found = np.zeros(a.shape[1:])
    for channel in a:
        values = [float(v) for v in channel.ravel()]
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        for cell in np.ndindex(*channel.shape):
            if channel[cell] > mean + k * deviation:
                found[cell] += mean
    return found


def check(cls: type) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(4 * 64, 3)).double()
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    for k in (0.5, 2.0):
        found = cls(net, layer="1", sigmas=k).attribute(images).numpy()
        for image, one in zip(images, found, strict=True):
            expected = by_loops(net[:2](image[None])[0].detach().numpy(), k)
            assert len(np.unique(expected)) > 3
            assert expected.min() < 0 < expected.max()
            np.testing.assert_allclose(one, expected, rtol=1e-6)


def test_fem_is_the_k_sigma_rule_written_out() -> None:
    check(FEM)
    for right, wrong in (("correction=0", "correction=1"), ("mean[:, :, 0, 0]", "a.amax(dim=(2, 3))")):
        with pytest.raises(AssertionError):
            check(mutated("interp_models.explainers.fem", right, wrong).FEM)


def test_a_feature_map_with_one_high_cell_by_hand() -> None:
    """9 cells, eight 0 and one 9: μ = 1, σ = √8. With K = 2, 9 > 1 + 5.66; with K = 3, 9 < 1 + 8.49 fails, too."""
    net = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.zeros(1, 3, 3, 3)
    images[0, 0, 1, 2] = 9.0
    images[0, 1] = 5.0  # a constant map has no high cell
    expected = torch.zeros(1, 3, 3)
    expected[0, 1, 2] = 1.0
    made = FEM(net, layer="0")
    torch.testing.assert_close(made.attribute(images), expected)
    made.sigmas = 2.9
    assert not made.attribute(images).any()
    with pytest.raises(InputError, match="sigmas must not be below 0"):
        FEM(net, sigmas=-1)


def test_mlfem_fuses_the_maps_of_fem_of_each_stage() -> None:
    torch.manual_seed(0)
    net, images = (
        torchvision.models.resnet18(weights=None, num_classes=4).double().eval(),
        torch.rand(2, 3, 64, 64).double(),
    )
    names = ["relu", "layer1", "layer2", "layer3", "layer4"]
    maps = [FEM(net, layer=name).attribute(images) for name in names]
    for fuse in ("mean", "max"):
        found = EXPLAINERS.build("mlfem", {"fuse": fuse}, model=net).attribute(images)
        assert found.shape == (2, 32, 32)
        torch.testing.assert_close(found, fused(maps, fuse))
    own = MLFEM(net, layer=["layer2", "layer3"]).attribute(images)
    torch.testing.assert_close(own, fused(maps[2:4], "mean"))


STAGES = {
    "resnet": (lambda: torchvision.models.resnet18(weights=None), ["relu", "layer1", "layer2", "layer3", "layer4"]),
    "vgg": (lambda: torchvision.models.vgg11(weights=None), [f"features.{n}" for n in (1, 4, 9, 14, 19)]),
    "lite": (
        lambda: timm.create_model("efficientnet_lite0"),
        ["blocks.1.0.bn1", "blocks.2.0.bn1", "blocks.3.0.bn1", "blocks.5.0.bn1", "bn2"],
    ),
    "convnext": (
        lambda: timm.create_model("test_convnext"),
        [*(f"stages.{n}.downsample.0" for n in (1, 2, 3)), "norm_pre"],
    ),
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=96, window_size=3, depths=(1, 1, 1, 1)),
        ["layers.0", "layers.1", "layers.2", "norm"],
    ),
    "small": (vgg, ["1", "5"]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "small" else pytest.mark.slow) for name in STAGES]
)
def test_the_last_layers_of_the_stages(name: str) -> None:
    make, expected = STAGES[name]
    side = 96 if name == "swin" else 160
    torch.manual_seed(0)
    model, images = make().eval(), torch.rand(1, 3, side, side)
    found = stages(model, images)
    seen: dict[str, tuple[int, ...]] = {}
    handles = [
        layer.module.register_forward_hook(
            lambda module, args, output, layer=layer: seen.update({layer.name: layer.feature_map(output).shape[2:]})
        )
        for layer in found
    ]
    model(images)
    for handle in handles:
        handle.remove()
    sides = [seen[layer.name][0] for layer in found]
    assert sides == sorted(set(sides), reverse=True)
    assert [layer.name for layer in found] == expected


def test_a_transformer_has_one_stage() -> None:
    vit, images = timm.create_model("test_vit", img_size=64).eval(), torch.rand(1, 3, 64, 64)
    assert stages(vit, images) == [target_layer(vit, None, images)]
    assert stages(vit, images)[0].name == "blocks.5.norm1"


def test_a_network_whose_resolutions_cannot_be_seen_is_read_at_one_layer_with_a_warning() -> None:
    class Net(nn.Module):
        def __init__(self, detached: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.detached, self.head = detached, nn.Linear(8, 3)
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, padding=1), nn.ReLU()
            )

        def forward(self, x: Tensor) -> Tensor:
            logits = self.head(self.features(x).mean(dim=(2, 3)))
            return logits.detach() if self.detached else logits

    images = torch.rand(1, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(stages(Net(False).eval(), images)) == 2
    with pytest.warns(UserWarning, match="using only layer .* of Net: it is not shown"):
        assert len(stages(Net(True).eval(), images)) == 1


@pytest.mark.parametrize("name", ["mlfem", "sise", "ada_sise"])
def test_a_view_without_a_gradient_is_not_left_out(name: str) -> None:
    """As a momentum encoder, which has the weights of the other: the logits read both."""

    class Views(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
            self.head, self.weight = nn.Linear(8, 3), weight

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                other = self.features(x.flip(3)).mean(dim=(2, 3)) if self.weight else torch.tensor(0.0)
            return self.head(self.features(x).mean(dim=(2, 3)) + self.weight * other)

    images = torch.rand(1, 3, 32, 32)
    assert EXPLAINERS.build(name, model=Views(0.0).eval()).attribute(images, 1).any()
    with pytest.raises(NotApplicable, match="Views has no layer that all evidence passes"):
        EXPLAINERS.build(name, model=Views(5.0).eval()).attribute(images, 1)
