"""Explainers against closed forms, other libraries and independent derivations; each fails under mutations."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from interp_models.explainers import cam
from interp_models.explainers.cam import ActivationMap, GradCAM
from interp_models.explainers.controls import Random
from interp_models.explainers.intrinsic import Intrinsic
from interp_models.explainers.rise import RISE
from tests.conftest import PoolLinear
from tests.mutation import mutated

CAM = "interp_models.explainers.cam"
RISE_FILE = "interp_models.explainers.rise"


def numpy_features(model, images):
    """The features of PoolLinear by loops over windows, in numpy."""
    conv = model.features[0]
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    x = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.empty((len(x), len(weight), images.shape[2] // 2, images.shape[3] // 2))
    for i, j in itertools.product(range(out.shape[2]), range(out.shape[3])):
        window = x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        out[:, :, i, j] = np.tensordot(window, weight, axes=((1, 2, 3), (1, 2, 3))) + bias
    return np.maximum(out, 0) if isinstance(model.features[1], nn.ReLU) else np.tanh(out)


def check_gradcam(cls=GradCAM):
    """On pool + linear the gradient is w / cells: Grad-CAM = ReLU(Σ_k w_ck A_k) / cells (the identity with CAM)."""
    for seed, negative in ((0, False), (1, True)):
        torch.manual_seed(seed)
        model, images = PoolLinear(negative=negative).double(), torch.rand(2, 3, 8, 12, dtype=torch.float64)
        features = numpy_features(model, images)
        for target in range(4):
            weights = model.head.weight.detach().numpy()[target]
            expected = np.tensordot(features, weights, axes=(1, 0)) / (4 * 6)
            signed = cls(model, relu=False).attribute(images, target).numpy()
            np.testing.assert_allclose(signed, expected, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(
                cls(model).attribute(images, target), np.maximum(signed, 0), rtol=1e-5, atol=1e-7
            )


def check_activation_map(cls=ActivationMap):
    torch.manual_seed(0)
    model, images = PoolLinear().double(), torch.rand(2, 3, 8, 12, dtype=torch.float64)
    np.testing.assert_allclose(cls(model).attribute(images), numpy_features(model, images).mean(1), rtol=1e-5)


def test_gradcam_on_pool_and_linear():
    check_gradcam()


def test_activation_map():
    check_activation_map()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("output, explainer.score, target))", "output, explainer.score, None))"),
        ("output, explainer.score, target))", 'output, "probability", target))'),
    ],
)
def test_mutations_of_what_gradcam_reads_are_rejected(right, wrong, monkeypatch):
    copy = mutated("interp_models.explainers.features", right, wrong)
    monkeypatch.setattr(cam, "activations_and_gradients", copy.activations_and_gradients)
    with pytest.raises(AssertionError):
        check_gradcam()


def test_a_mutation_of_what_is_captured_is_rejected(monkeypatch):
    copy = mutated("interp_models.explainers.captures", "swapped(output, start.clone())", "swapped(output, start * 2)")
    monkeypatch.setattr("interp_models.explainers.features.captured", copy.captured)
    with pytest.raises(AssertionError):
        check_gradcam()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return a.mean(dim=1)", "return a.amax(dim=1)"),
        ("return a.mean(dim=1)", "return a.sum(dim=1)"),
    ],
)
def test_mutations_of_activation_map_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_activation_map(mutated(CAM, right, wrong).ActivationMap)


def test_gradcam_of_probability_follows_the_chain_rule():
    """∂p_c/∂A = p_c Σ_k (δ_ck - p_k) ∂y_k/∂A, here with ∂y_k/∂A = w_k / cells."""
    model, images = PoolLinear().double(), torch.rand(1, 3, 8, 12, dtype=torch.float64)
    features = numpy_features(model, images)[0]
    logits = model.head.weight.detach().numpy() @ features.mean((1, 2)) + model.head.bias.detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum()
    w = p[2] * (model.head.weight.detach().numpy()[2] - p @ model.head.weight.detach().numpy())
    expected = np.tensordot(w, features, axes=(0, 0)) / 24
    got = GradCAM(model, relu=False, score="probability").attribute(images, 2)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)


def test_gradcam_in_a_deeper_layer_equals_plain_autograd():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 4 * 4, 3),
    ).double().eval()  # fmt: skip
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    activations = net[0](images).detach().requires_grad_(True)
    torch.nn.functional.linear(net[2:7](activations.relu()), net[7].weight, net[7].bias)[:, 1].sum().backward()
    expected = (activations.grad.mean((2, 3), keepdim=True) * activations).sum(1).relu()
    torch.testing.assert_close(GradCAM(net, layer="0").attribute(images, 1), expected.detach().float())


def test_layers_by_name():
    net = PoolLinear().double()
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    net.features[1] = nn.ReLU(inplace=True)  # must not reach into what the convolution gave
    convolved = net.features[0](images)
    maps = ActivationMap(net, layer="features.0").attribute(images)
    torch.testing.assert_close(maps, convolved.detach().mean(dim=1).float())
    assert float(maps.min()) < 0
    weights = net.head.weight[1][None, :, None, None] * (convolved > 0)
    signed = (weights.mean(dim=(2, 3), keepdim=True) * convolved).sum(dim=1) / 16
    maps = GradCAM(net, layer="features.0", relu=False).attribute(images, 1)
    torch.testing.assert_close(maps, signed.detach().float())
    with pytest.raises(ValueError, match="unknown layer 'feature'; did you mean 'features'"):
        GradCAM(net, layer="feature").attribute(images)
    with pytest.raises(ValueError, match="layer head gives no feature map"):
        GradCAM(net, layer="head").attribute(images)
    with pytest.raises(ValueError, match="Sequential has no layer that all evidence passes"):
        GradCAM(nn.Sequential(nn.Flatten(), nn.Linear(192, 3))).attribute(images.float())


def test_gradcam_says_when_there_is_no_gradient_path():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).detach().mean((2, 3))

    with pytest.raises(ValueError, match="no gradient path from the score back to layer conv"):
        GradCAM(Cut(), layer="conv").attribute(torch.rand(1, 3, 8, 8))


# --- RISE ---


class Light(nn.Module):
    """Probability of class 0 is linear in the image, p = 0.1 + Σ w x; the logits are log p and log (1 - p)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        p = 0.1 + (x * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([p.log(), (1 - p).log()], 1)


def expected_rise(weight, image, cells, p1):
    """E[S] = (Σ_q w x(q) E[M(q) M(p)] + 0.1 E[M(p)]) / p1, by enumerating every grid and every shift."""
    _, height, width = image.shape
    cell = (math.ceil(height / cells), math.ceil(width / cells))
    total, light = np.zeros((height, width)), (weight * image).sum(0)
    for bits in itertools.product((0.0, 1.0), repeat=cells * cells):
        chance = np.prod([p1 if bit else 1 - p1 for bit in bits])
        grid = np.array(bits).reshape(cells, cells)
        rows = np.clip((np.arange((cells + 1) * cell[0]) + 0.5) * cells / ((cells + 1) * cell[0]) - 0.5, 0, cells - 1)
        cols = np.clip((np.arange((cells + 1) * cell[1]) + 0.5) * cells / ((cells + 1) * cell[1]) - 0.5, 0, cells - 1)
        by_row = np.array([[np.interp(r, np.arange(cells), grid[:, c]) for c in range(cells)] for r in rows])
        large = np.array([[np.interp(c, np.arange(cells), line) for c in cols] for line in by_row])
        for y, x in itertools.product(range(cell[0]), range(cell[1])):
            mask = large[y : y + height, x : x + width]
            total += chance / (cell[0] * cell[1]) * mask * (0.1 + (light * mask).sum())
    return total / p1


def check_rise(cls=RISE):
    rng = np.random.default_rng(0)
    weight, image = rng.random((3, 4, 6)) * 0.02, rng.random((3, 4, 6))
    exact = expected_rise(weight, image, 2, 0.4)
    model = Light(torch.tensor(weight, dtype=torch.float32))
    images = torch.tensor(image, dtype=torch.float32)[None]
    rise = cls(model, masks=50000, cells=2, p1=0.4, batch=500, seed=1).attribute(images, 0)[0].numpy()
    # p is at most 0.46, so a draw f · M / p1 has a standard deviation below 0.46 / 0.4 / 2; five standard errors.
    np.testing.assert_allclose(rise, exact, atol=5 * 0.575 / math.sqrt(50000))


def test_rise_converges_to_the_exact_expectation():
    check_rise()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("draws[:, :-2] < self.p1", "draws[:, :-2] > self.p1"),
        ("total / (self.masks * self.p1)", "total / self.masks"),
        ("(self.cells + 1) * cell[0], ", "self.cells * cell[0] + 1, "),
        ("c.expand(len(masks), 1)", "(c * 0 + 1).expand(len(masks), 1)"),
        ("draws[:, -2:] * cell", "draws[:, -2:] * 0"),
        ('score: Score = "probability"', 'score: Score = "logit"'),
    ],
)
def test_mutations_of_rise_are_rejected(right, wrong):
    copy = mutated(RISE_FILE, right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check_rise(copy.RISE)


def test_rise_adds_up_in_float32_under_autocast():
    model, images = PoolLinear(), torch.rand(1, 3, 16, 16)
    expected = RISE(model, masks=300).attribute(images, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = RISE(model, masks=300).attribute(images, 0)
    torch.testing.assert_close(maps, expected, rtol=0, atol=0.01 * float(expected.max() - expected.min()))


def test_rise_does_not_depend_on_the_size_of_its_passes():
    torch.manual_seed(0)
    model, images = PoolLinear().eval(), torch.rand(2, 3, 21, 30)
    maps = [RISE(model, masks=37, batch=batch).attribute(images, 1) for batch in (1, 5, 37, 64)]
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0])
    assert not torch.allclose(RISE(model, masks=37, seed=1).attribute(images, 1), maps[0])
    with pytest.raises(ValueError, match="rise needs masks"):
        RISE(model, masks=0)


def test_rise_masks_are_the_papers():
    """Values in [0, 1], mean p1, and shifted by less than one cell."""
    rise = RISE(nn.Identity(), masks=2000, cells=7, p1=0.3)
    masks = torch.cat(list(rise._masks(torch.zeros(1, 3, 64, 64), 128)))
    assert masks.shape == (2000, 64, 64)
    assert float(masks.min()) >= 0
    assert float(masks.max()) <= 1
    assert float(masks.mean()) == pytest.approx(0.3, abs=4 * 0.46 / math.sqrt(2000 * 49 / 4))
    prefix = RISE(nn.Identity(), masks=500, cells=7, p1=0.3)
    torch.testing.assert_close(torch.cat(list(prefix._masks(torch.zeros(1, 3, 64, 64), 77))), masks[:500])


# --- random, intrinsic ---


def test_random_is_uniform_and_a_function_of_image_and_seed():
    images = torch.rand(4, 3, 16, 16)
    maps = Random(nn.Identity()).attribute(images)
    assert maps.shape == (4, 16, 16)
    assert float(maps.mean()) == pytest.approx(0.5, abs=4 * 0.29 / 32)
    assert float(maps.std()) == pytest.approx(12**-0.5, abs=0.03)
    assert not torch.equal(maps[0], maps[1])
    assert not torch.equal(Random(nn.Identity(), seed=1).attribute(images), maps)
    changed = images.clone()
    changed[0, 0, 0, 0] += 0.1
    again = Random(nn.Identity()).attribute(changed)
    assert not torch.equal(again[0], maps[0])
    assert torch.equal(again[1:], maps[1:])


def test_intrinsic_is_what_the_model_says():
    class Own(nn.Module):
        explanations = ("first", "second")
        feature_layer = nn.Identity()

        def forward(self, x):
            return x.mean(dim=(2, 3))

        def explain(self, output, targets, kind=None):
            return output[:, :, None] * targets[:, None, None] + (kind == "second")

    images = torch.rand(2, 3, 4, 4)
    maps = Intrinsic(Own()).attribute(images, torch.tensor([1, 2]))
    torch.testing.assert_close(maps, images.mean(dim=(2, 3))[:, :, None] * torch.tensor([1.0, 2.0])[:, None, None])
    torch.testing.assert_close(Intrinsic(Own(), kind="second").attribute(images, torch.tensor([1, 2])), maps + 1)
