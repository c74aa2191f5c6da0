"""The class activation family against loops, closed forms on pool + linear, and singular vectors of numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from interp_models import EXPLAINERS
from interp_models.core.errors import InputError, NotApplicable
from interp_models.explainers import cam
from interp_models.explainers.ablation import LIFTCAM, AblationCAM
from interp_models.explainers.features import shared_passes
from tests.conftest import PoolLinear
from tests.mutation import mutated

METHODS = {
    "gradcam": cam.GradCAM,
    "gradcam_pp": cam.GradCAMPlusPlus,
    "hirescam": cam.HiResCAM,
    "xgradcam": cam.XGradCAM,
    "layercam": cam.LayerCAM,
    "guidancecam": cam.GuidanceCAM,
}


def deep(negative=False):
    """A tail that is not linear, so that gradients differ from cell to cell; signed activations if asked for."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh() if negative else nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(5 * 4 * 4, 3),
    ).double()  # fmt: skip


def by_autograd(net, images, target):
    """A and g of layer 1, in numpy."""
    a = net[:2](images).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(net[2:](a)[:, target].sum(), a)
    return a.detach().numpy(), g.numpy()


def by_loops(name, a, g):
    """The papers' formulas for one image, channel by channel and cell by cell, before a last ReLU."""
    channels, rows, columns = a.shape
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    found = np.zeros((rows, columns))
    guide = np.zeros((rows, columns))
    for i, j in cells:
        guide[i, j] = max(0.0, sum(g[k, i, j] * a[k, i, j] for k in range(channels)))
    for k in range(channels):
        mean = sum(g[k, i, j] for i, j in cells) / len(cells)
        total = sum(a[k, i, j] for i, j in cells)
        if name == "gradcam":
            weights = dict.fromkeys(cells, mean)
        elif name == "guidancecam":
            weights = {cell: mean * guide[cell] for cell in cells}
        elif name == "hirescam":
            weights = {cell: g[k][cell] for cell in cells}
        elif name == "layercam":
            weights = {cell: max(0.0, g[k][cell]) for cell in cells}
        elif name == "xgradcam":
            share = sum(g[k][cell] * a[k][cell] / total for cell in cells) if total != 0 else 0.0
            weights = dict.fromkeys(cells, share)
        else:
            w = 0.0
            for cell in cells:
                y = g[k][cell]
                below = 2 * y**2 + y**3 * total
                w += (y**2 / below if below != 0 else 0.0) * max(0.0, y)
            weights = dict.fromkeys(cells, w)
        for cell in cells:
            found[cell] += weights[cell] * a[k][cell]
    return found


def check(name, cls):
    for negative in (False, True):
        net, images = deep(negative), torch.rand(2, 3, 12, 12, dtype=torch.float64)
        a, g = by_autograd(net, images, 1)
        for relu in (False, True):
            maps = cls(net, layer="1", relu=relu).attribute(images, 1).numpy()
            for i in range(2):
                expected = by_loops(name, a[i], g[i])
                expected = np.maximum(expected, 0) if relu else expected
                np.testing.assert_allclose(maps[i], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", METHODS)
def test_formulas(name):
    check(name, METHODS[name])


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("gradcam", "return (g.mean(dim=(2, 3), keepdim=True) * a).sum(", "return (g * a).sum("),
        ("gradcam_pp", "denominator = 2 + g", "denominator = 2 - g"),
        ("gradcam_pp", "denominator = 2 + g * a.sum(", "denominator = 2 + g * a.mean("),
        ("gradcam_pp", "(alpha * g.relu())", "(alpha * g)"),
        ("hirescam", "        return (g * a).sum(dim=1)\n\n\n@EXPLAINERS.register(\"xgradcam\")",
         "        return (g.relu() * a).sum(dim=1)\n\n\n@EXPLAINERS.register(\"xgradcam\")"),
        ("xgradcam", "total = a.sum(", "total = a.mean("),
        ("layercam", "(g.relu() * a)", "(g * a)"),
        ("guidancecam", "guidance = (g * a).sum(dim=1).relu()", "guidance = (g * a).sum(dim=1)"),
        ("guidancecam", "return guidance * (g.mean(", "return guidance * (g.sum("),
    ],
)  # fmt: skip
def test_mutations_are_rejected(name, right, wrong):
    copy = mutated("interp_models.explainers.cam", right, wrong)
    with pytest.raises(AssertionError):
        check(name, getattr(copy, METHODS[name].__name__))


@pytest.mark.parametrize("negative", [False, True])
def test_identities_on_pool_and_linear(negative):
    """CAM / cells = Grad-CAM = HiRes-CAM = XGrad-CAM; with positive weights LayerCAM too; the guided map is the square
    of Grad-CAM's. (Fact: the gradient is w / cells everywhere.)"""
    torch.manual_seed(1)
    net, images = PoolLinear(negative=negative).double(), torch.rand(3, 3, 8, 12, dtype=torch.float64)
    maps = {name: cls(net, relu=False).attribute(images, 2) for name, cls in METHODS.items()}
    expected = cam.CAM(net).attribute(images, 2) / (4 * 6)
    for name in ("gradcam", "hirescam", "xgradcam"):
        torch.testing.assert_close(maps[name], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cam.GuidanceCAM(net).attribute(images, 2), expected.relu() ** 2, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        net.head.weight.abs_()
    torch.testing.assert_close(
        cam.LayerCAM(net, relu=False).attribute(images, 2), cam.CAM(net).attribute(images, 2) / 24, rtol=1e-4, atol=1e-6
    )


def test_cam_is_the_weighted_sum_and_its_mean_the_logit():
    torch.manual_seed(1)
    net, images = PoolLinear(negative=True).double(), torch.rand(3, 3, 8, 12, dtype=torch.float64)
    features = net.features(images).detach().numpy()
    targets = torch.tensor([1, 0, 3])
    maps = cam.CAM(net).attribute(images, targets).numpy()
    for i, c in enumerate(targets.tolist()):
        expected = sum(net.head.weight[c, k].item() * features[i, k] for k in range(5))
        np.testing.assert_allclose(maps[i], expected, rtol=1e-5, atol=1e-6)
        logit = net(images)[i, c].item() - net.head.bias[c].item()
        np.testing.assert_allclose(maps[i].mean(), logit, rtol=1e-4)


@pytest.mark.parametrize(
    "net", [deep(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3))]
)
def test_cam_refuses_networks_that_do_not_end_in_mean_and_linear(net):
    with pytest.raises(InputError, match="Sequential does not end, after the layer, in the mean over cells"):
        cam.CAM(net).attribute(torch.rand(1, 3, 12, 12, dtype=next(net.parameters()).dtype))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [(8, 12), (4, 4)])  # more cells than channels, and fewer
def test_eigencam_is_numpys_first_component(centred, sign, size):
    torch.manual_seed(2)
    net = PoolLinear(negative=True).double()
    with torch.no_grad():  # activations mostly of one sign
        net.features[0].bias.fill_(sign * 0.5)
    images = torch.rand(4, 3, *size, dtype=torch.float64)
    maps = cam.EigenCAM(net, centred=centred).attribute(images).numpy()
    activation = cam.ActivationMap(net).attribute(images).numpy()
    for i, a in enumerate(net.features(images).detach().numpy()):
        cells = a.reshape(5, -1).T
        cells = cells - cells.mean(0) if centred else cells
        expected = (cells @ np.linalg.svd(cells, full_matrices=False)[2][0]).reshape(size[0] // 2, size[1] // 2)
        assert min(np.abs(maps[i] - expected).max(), np.abs(maps[i] + expected).max()) < 1e-5
        assert np.corrcoef(maps[i].ravel(), activation[i].ravel())[0, 1] > 0


def test_the_family_shares_one_pass():
    net, images = PoolLinear().double(), torch.rand(3, 3, 8, 12, dtype=torch.float64)
    family = {**METHODS, "cam": cam.CAM, "activation_map": cam.ActivationMap, "eigencam": cam.EigenCAM}
    family |= {"ablationcam": AblationCAM, "liftcam": LIFTCAM}
    alone = {name: cls(net).attribute(images, 2) for name, cls in family.items()}
    passes = []
    handle = net.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    for size in (8, 12):  # finds out about the model, once per size and layer
        for layer in (None, "features"):
            cam.GradCAM(net, layer=layer).attribute(images[..., :size], 2)
    passes.clear()
    with shared_passes():
        together = {name: cls(net).attribute(images, 2) for name, cls in reversed(family.items())}
        other = cam.GradCAM(net).attribute(images, 1)
        changed = cam.GradCAM(net).attribute(images * 0.5, 2)
        turned = cam.GradCAM(net, layer="features").attribute(images[..., :8].transpose(2, 3), 2)
        upright = cam.GradCAM(net, layer="features").attribute(images[..., :8], 2)
        probability = cam.GradCAM(net, score="probability").attribute(images, 2)
    cam.GradCAM(net).attribute(images, 2)
    handle.remove()
    assert not torch.equal(turned, upright)
    assert passes == [3] * 5  # together with those of another class and of probabilities, other images, and alone
    for name, maps in alone.items():
        assert torch.equal(maps, together[name])
    for maps in (other, changed, probability):
        assert not torch.allclose(maps, alone["gradcam"])


def test_the_sign_of_eigencam_does_not_come_from_rounding():
    """Behind a layer norm with its first weights, the activation map is 0 up to rounding."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 16, 4, stride=4)

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = convolution, nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean(dim=(1, 2)))

    images = torch.rand(4, 3, 32, 32)
    maps = [
        cam.EigenCAM(Normed().to(kind), layer="norm", reshape="nhwc").attribute(images.to(kind), 0)
        for kind in (torch.float32, torch.float64)
    ]
    assert float((maps[0] - maps[1]).abs().max()) < 1e-3 * float(maps[0].abs().max())
    assert float(maps[0].pow(3).sum(dim=(1, 2)).min()) > 0
    # Another odd power would turn this one round.
    odd = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(15))[1:2]
    found = cam.EigenCAM(Normed().double(), layer="norm", reshape="nhwc", centred=True).attribute(odd.double(), 0)
    assert float(found.pow(5).sum()) < 0 < float(found.pow(3).sum())


class Root(nn.Module):
    """Mean pooling of powers, as GeM without an epsilon. The slope of its root at 0 is infinite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.pow(3).mean(dim=(2, 3)).pow(1 / 3)


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "layercam", "gradcam_pp", "finercam", "cameras"])
def test_maps_that_are_not_finite_are_refused(name: str) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 1)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), Root(), nn.Linear(5, 3))
    nn.init.zeros_(net[2].bias)
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        for weight in (net[0].weight, net[2].weight):
            weight.abs_()
    explainer = EXPLAINERS.build(name, EXPLAINERS.get(name).small, model=net.eval())
    assert explainer.attribute(images, 1).isfinite().all()
    images[1:] = 0  # all channels are 0
    with pytest.raises(NotApplicable, match="the map of image 1 is not finite: a gradient or another value in Seq"):
        explainer.attribute(images, 1)
