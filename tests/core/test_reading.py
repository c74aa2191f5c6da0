"""What is found out about a model before its outputs are read: by few passes, and not from a refused image."""

import pytest
import torch
from torch import Tensor, nn

from interp_models import EXPLAINERS, InputError, NotApplicable, probabilities
from interp_models.core.modes import evaluating
from interp_models.core.outputs import field_of
from interp_models.core.reading import typed_logits
from interp_models.core.scoring import read_as

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
sizes: list[int] = []
"""Number of images of each pass. It is no attribute of the network, whose state must not change."""


class Watched(nn.Module):
    """A network that notes its passes, and refuses images of other sides than 8."""

    def __init__(self, *, by_batch: bool = False) -> None:
        super().__init__()
        self.layer, self.by_batch = nn.Conv2d(3, 2, 4, stride=4), by_batch

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2)."""
        sizes.append(len(images))
        if images.shape[-1] != 8:
            raise InputError("images must have sides of 8 pixels")
        logits: Tensor = self.layer(images).mean(dim=(2, 3)) - 5
        return logits + (len(images) if self.by_batch else 0)


def test_one_pass_tells_logits_and_their_type_and_begins_the_check() -> None:
    model = Watched()
    sizes.clear()
    with evaluating(model):
        assert typed_logits(model, IMAGES) is False
        assert sizes == [1, 1, 3]
        assert typed_logits(model, IMAGES) is False
    assert sizes == [1, 1, 3]


def test_images_that_a_network_refuses_do_not_switch_the_check_off() -> None:
    model = Watched(by_batch=True)
    with evaluating(model):
        with read_as(model, torch.rand(1, 3, 9, 9), "logit"):
            pass
        with pytest.raises(InputError, match=r"changes by .* with its batch"), read_as(model, IMAGES, "logit"):
            pass


class Squeezed(nn.Module):
    """Its head drops all axes of size 1, of one image also that of the batch."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        """(B, K); of one image, (K,)."""
        return self.layer(images).mean(dim=(2, 3), keepdim=True).squeeze().softmax(-1)


@pytest.mark.parametrize("name", ["kernelshap", "gradcam", "rise"])
def test_a_network_that_drops_the_axis_of_one_image_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1)).eval()
    small = dict(EXPLAINERS.get(name).small)
    with pytest.warns(UserWarning, match="probabilities already"):
        assert EXPLAINERS.build(name, small, model=model).attribute(IMAGES, 1).any()
    with pytest.raises(InputError, match=r"no logits \(1, classes\) for one image, but for two .*; use flatten\(1\)"):
        EXPLAINERS.build(name, small, model=Squeezed().eval()).attribute(IMAGES, 1)


def test_scores_follow_a_network_that_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).eval()
    score, due = probabilities(model), model(IMAGES).softmax(dim=1)
    torch.testing.assert_close(score(IMAGES), due)
    model.append(nn.Softmax(dim=1))
    with pytest.warns(UserWarning, match="probabilities already"):
        torch.testing.assert_close(score(IMAGES), due)
    torch.testing.assert_close(score(IMAGES), due)
    del model[2]
    torch.testing.assert_close(score(IMAGES), due)


def test_features_beside_one_value_per_image_are_not_taken_for_logits() -> None:
    features, score, wide = torch.rand(2, 5), torch.rand(2), torch.rand(2, 3, 1, 1)
    assert field_of((features, torch.rand(()), torch.rand(7), torch.zeros(2, dtype=torch.long))) is features
    for output in ((features, score), {"embedding": features, "score": score}, (features, wide)):
        with pytest.raises(InputError, match=r"got several of them: .*; say which they are with output=NAME or PLACE"):
            field_of(output)
    assert field_of((features, wide), 0) is features


class Hooked(nn.Module):
    """The network of a tutorial: it keeps the gradient of its features."""

    def __init__(self, *, guarded: bool) -> None:
        super().__init__()
        self.layer, self.guarded = nn.Conv2d(3, 4, 4, stride=4), guarded

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer(images).relu()
        if features.requires_grad or not self.guarded:
            features.register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]
        return features.mean(dim=(2, 3))


@pytest.mark.parametrize("name", ["gradcam", "gradient", "rise"])
def test_a_hook_that_needs_gradients_is_named(name: str) -> None:
    small = dict(EXPLAINERS.get(name).small)
    assert EXPLAINERS.build(name, small, model=Hooked(guarded=True).eval()).attribute(IMAGES, 1).any()
    with pytest.raises(NotApplicable, match="Hooked registers a hook on a tensor in its forward, which fails in"):
        EXPLAINERS.build(name, small, model=Hooked(guarded=False).eval()).attribute(IMAGES, 1)
