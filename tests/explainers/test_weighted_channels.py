"""Score-CAM, Ablation-CAM and LIFT-CAM against loops over channels, closed forms and a chain of slopes by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interp_models.core.errors import InputError
from interp_models.explainers import ablation, scorecam
from interp_models.explainers.ablation import LIFTCAM, AblationCAM
from interp_models.explainers.cam import CAM
from interp_models.explainers.scorecam import ScoreCAM
from tests.conftest import PoolLinear
from tests.mutation import mutated


def deep(activation=nn.ReLU, inplace=False):
    torch.manual_seed(0)
    act = nn.ReLU(inplace=True) if inplace else activation()
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * 25, 6), act, nn.Linear(6, 3)
    ).double()  # fmt: skip


def images(n=2, size=12):
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# --- Score-CAM ---


@torch.no_grad()
def scorecam_by_loops(net, image, target, weights, probability):
    """Algorithm 1, a channel at a time."""
    a = net[:2](image[None])[0]
    score = (lambda x: net(x[None]).softmax(1)[0, target]) if probability else (lambda x: net(x[None])[0, target])
    u, live = [], []
    for k in range(len(a)):
        large = F.interpolate(a[k][None, None], size=image.shape[1:], mode="bilinear", align_corners=False)
        large = large[0, 0].numpy()
        live.append(bool(a[k].max() > a[k].min()))
        mask = (large - large.min()) / (large.max() - large.min()) if live[-1] else np.zeros_like(large)
        u.append(float(score(image * torch.as_tensor(mask))))
    if weights == "softmax":
        powers = [np.exp(value) if on else 0.0 for value, on in zip(u, live, strict=True)]
        w = [power / sum(powers) for power in powers]
    else:
        black = float(score(torch.zeros_like(image)))
        w = [value - black if on else 0.0 for value, on in zip(u, live, strict=True)]
    return np.maximum(0, sum(w[k] * a[k].numpy() for k in range(len(a))))


def check_scorecam(cls=ScoreCAM):
    net, x = deep(), images()
    with torch.no_grad():  # a constant channel
        net[0].weight[2] = 0
        net[0].bias[2] = 0.7
    for weights in ("softmax", "increase"):
        for score in ("logit", "probability"):
            for batch in (1, 3, None):
                maps = cls(net, layer="1", weights=weights, score=score, batch=batch).attribute(x, torch.tensor([1, 0]))
                for i in range(2):
                    expected = scorecam_by_loops(net, x[i], 1 - i, weights, score == "probability")
                    np.testing.assert_allclose(maps[i], expected, rtol=1e-4, atol=1e-6)


def test_scorecam_is_the_algorithm():
    check_scorecam()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("weights, a).relu()", "weights, a)"),
        ("u - black.gather", "u + black.gather"),
        ("u.masked_fill(constant, -torch.inf)", "u"),
        ("a[b, channel]", "a[b, channel - 1]"),
    ],
)
def test_mutations_of_scorecam_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_scorecam(mutated("interp_models.explainers.scorecam", right, wrong).ScoreCAM)


@pytest.mark.parametrize(
    ("right", "wrong"), [("(large - low) / torch", "large / torch"), ('mode="bilinear"', 'mode="bicubic"')]
)
def test_mutations_of_stretching_are_rejected(right, wrong, monkeypatch):
    monkeypatch.setattr(scorecam, "stretched", mutated("interp_models.core.maps", right, wrong).stretched)
    with pytest.raises(AssertionError):
        check_scorecam()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("gather(1, target[b][:, None])", "gather(1, target[b * 0][:, None])"),
        ("b = jobs // count", "b = jobs % len(images)"),
        ("jobs % count)", "jobs // len(images))"),
        ("b[:1] if of_one", "b[:1] * 0 if of_one"),
    ],
)
def test_mutations_of_variants_are_rejected(right, wrong, monkeypatch):
    monkeypatch.setattr(
        scorecam, "scores_of_variants", mutated("interp_models.core.batches", right, wrong).scores_of_variants
    )
    with pytest.raises((AssertionError, IndexError)):
        check_scorecam()


# --- Ablation-CAM ---


@torch.no_grad()
def ablation_by_loops(net, image, target):
    a = net[:2](image[None])
    y = net[2:](a)[0, target].item()
    w = []
    for k in range(a.shape[1]):
        without = a.clone()
        without[0, k] = 0
        w.append((y - net[2:](without)[0, target].item()) / abs(y))
    return np.maximum(0, sum(w[k] * a[0, k].numpy() for k in range(a.shape[1])))


def check_ablation(cls=AblationCAM):
    for net in (deep(), deep(nn.GELU), deep(inplace=True)):
        for target in (0, 2):  # logits of either sign
            maps = cls(net, layer="1").attribute(images(), target)
            for i, image in enumerate(images()):
                np.testing.assert_allclose(maps[i], ablation_by_loops(net, image, target), rtol=1e-4, atol=1e-6)


def test_ablation_takes_channels_away(monkeypatch):
    check_ablation()
    monkeypatch.setattr(ablation, "VALUES", 1)  # a channel at a time
    check_ablation()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("variants[torch.arange(len(some)), some] = 0.0", "variants[torch.arange(len(some)), some] = -1.0"),
        ("(y - without)", "(without - y)"),
        ("size = y.abs()", "size = y"),
    ],
)
def test_mutations_of_ablation_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_ablation(mutated("interp_models.explainers.ablation", right, wrong).AblationCAM)


@pytest.mark.parametrize("cls", [AblationCAM, LIFTCAM])
def test_closed_forms_are_what_the_tail_gives(cls, monkeypatch):
    """On pool + linear: w_ck · mean of A_k, and for ablation ÷ |y|; the same with passes of the tail."""
    torch.manual_seed(0)
    net, x = PoolLinear(negative=True).double(), images()
    features = net.features(x).detach()
    w = net.head.weight[1].detach() * features.mean(dim=(2, 3))
    w = w / net(x)[:, 1:2].detach().abs() if cls is AblationCAM else w
    expected = (w[:, :, None, None] * features).sum(1)
    passes = []
    handle = net.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    cls(net, layer="features").attribute(x, 1)  # finds out about the model, once
    passes.clear()
    closed = cls(net, layer="features", relu=False).attribute(x, 1)
    torch.testing.assert_close(closed, expected.float(), rtol=1e-4, atol=1e-6)
    assert sum(passes) == len(x)
    handle.remove()
    monkeypatch.setattr(ablation, "linear_head", refuse)
    general = cls(net, layer="features", relu=False).attribute(x, 1)
    torch.testing.assert_close(general, closed, rtol=1e-4, atol=1e-6)


def refuse(*_):
    return None


@pytest.mark.parametrize("cls", [AblationCAM, LIFTCAM])
def test_a_tail_that_knows_the_number_of_images_from_before(cls):
    """It would fold one image's variants into one."""

    class Reader(nn.Module):
        def __init__(self, reads):
            super().__init__()
            torch.manual_seed(0)
            self.reads, self.features, self.head = reads, nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(4, 5), nn.ReLU())
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            n = x.shape[0]
            a = self.features(x).relu()
            pooled = a.reshape(n if self.reads else a.shape[0], 4, -1).mean(dim=2)
            return self.last(self.head(pooled))

    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    found, expected = (cls(Reader(reads).double(), layer="features").attribute(x, 1) for reads in (True, False))
    assert float(expected.max()) > 0
    torch.testing.assert_close(found, expected)


def test_a_tail_that_joins_with_what_came_before():
    """A residual sum and a concatenation around the layer."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x):
            before = self.a(x).tanh()
            after = self.b(before)
            return self.head(torch.cat([after + before, before], dim=1).tanh().mean((2, 3)))

    torch.manual_seed(0)
    net, x = Joined().double(), images(1)
    maps = AblationCAM(net, layer="b", relu=False).attribute(x, 1)
    with torch.no_grad():
        before = net.a(x).tanh()
        a = net.b(before)

        def tail(after):
            return net.head(torch.cat([after + before, before], dim=1).tanh().mean((2, 3)))[0, 1]

        expected = torch.zeros(10, 10, dtype=torch.float64)
        for k in range(4):
            without = a.clone()
            without[:, k] = 0
            expected += (tail(a) - tail(without)) / tail(a).abs() * a[0, k]
    torch.testing.assert_close(maps[0], expected.float(), rtol=1e-4, atol=1e-6)


# --- LIFT-CAM ---


def lift_by_hand(net, image, target):
    """Slopes between the image's activations and zeros, through average pool, linear, activation, linear."""
    with torch.no_grad():
        a = net[:2](image[None])
        pooled = net[2:4](a)[0].numpy()
        first, second = net[4], net[6]
        before = [first(net[2:4](z))[0] for z in (a, torch.zeros_like(a))]
        after = [net[5](z.clone()) for z in before]
        slope = ((after[0] - after[1]) / (before[0] - before[1])).numpy()
    per_input = (second.weight[target].detach().numpy() * slope) @ first.weight.detach().numpy() * pooled
    w = per_input.reshape(4, -1).sum(1)
    return np.maximum(0, sum(w[k] * a[0, k].numpy() for k in range(4)))


def check_lift(cls=LIFTCAM):
    for net in (deep(), deep(nn.GELU), deep(nn.ReLU6), deep(nn.Sigmoid), deep(inplace=True)):
        maps = cls(net, layer="1").attribute(images(), 1)
        for i, image in enumerate(images()):
            np.testing.assert_allclose(maps[i], lift_by_hand(net, image, 1), rtol=1e-4, atol=1e-6)


def test_lift_is_the_rescale_rule():
    check_lift()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("contributions.sum(dim=(1, 2))", "contributions.mean(dim=(1, 2))"), ("multiplier[0] * both[0]", "multiplier[0]")],
)
def test_mutations_of_lift_are_rejected(right, wrong):
    with pytest.raises((AssertionError, InputError)):
        check_lift(mutated("interp_models.explainers.ablation", right, wrong).LIFTCAM)


def test_a_mutation_of_the_rescale_rule_is_rejected(monkeypatch):
    copy = mutated("interp_models.explainers.deeplift", "(c - d) / torch.where(same, 1.0, a - b)", "at_zero")
    monkeypatch.setattr(ablation, "Rescale", copy.Rescale)
    with pytest.raises((AssertionError, InputError)):
        check_lift()


def test_lift_at_functions_is_lift_at_modules():
    """ReLU as a function, as a maximum, in place, and one module for two places."""

    class Written(nn.Module):
        def __init__(self, net, relu):
            super().__init__()
            self.net, self.relu = net, relu

        def forward(self, x):
            return self.net[6](self.relu(self.net[4](self.net[3](self.net[2](self.net[1](self.net[0](x)))))))

    net = deep()
    expected = LIFTCAM(net, layer="1").attribute(images(), 1)
    for relu in (F.relu, lambda x: torch.maximum(x, torch.zeros_like(x)), lambda x: x.clamp_(min=0), net[5]):
        torch.testing.assert_close(LIFTCAM(Written(net, relu), layer="net.1").attribute(images(), 1), expected)


@pytest.mark.parametrize("tail", [nn.Softmax(dim=1), nn.GroupNorm(2, 4)], ids=["softmax", "group norm"])
def test_lift_refuses_tails_whose_contributions_do_not_add_up(tail):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), tail, nn.Flatten(), nn.LazyLinear(3)).double()
    net(images())
    with pytest.raises(InputError, match="liftcam: contributions add up to"):
        LIFTCAM(net, layer="1").attribute(images(), 1)


def test_cam_is_the_family_on_pool_and_linear():
    """All of them weigh channels by w or w · mean, so for one channel they are one map up to a factor."""
    torch.manual_seed(1)  # a channel that is not off nearly everywhere
    net, x = PoolLinear(channels=1).double(), images()
    expected = CAM(net).attribute(x, 1)
    for cls in (AblationCAM, LIFTCAM):
        maps = cls(net, relu=False).attribute(x, 1)
        for a, b in zip(maps, expected, strict=True):
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] ** 2 == pytest.approx(1, abs=1e-5)
