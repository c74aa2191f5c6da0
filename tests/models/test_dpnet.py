"""DP-Net's constraints by hand, its scores region by region, and its sums."""

import math

import numpy as np
import pytest
import torch

from interp_models.models.dpnet import DPNet, complementary, covering, specific
from tests.conftest import TINY
from tests.mutation import mutated


def test_complementary_by_hand():
    """u_1 = (1, 0), u_2 = (0.6, 0.8), u_3 = (0, 1): squares of 0.6, 0 and 0.8, each twice, over 9."""
    parts = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.5]])
    assert complementary(parts).item() == pytest.approx(2 * (0.36 + 0.64) / 9)
    assert complementary(torch.eye(4)).item() == pytest.approx(0, abs=1e-7)
    assert complementary(torch.ones(5, 3)).item() == pytest.approx(20 / 25)


def test_covering_by_hand():
    """Two parts: probabilities 3/4 and 1/4 in one region, 1/2 each in another."""
    scores = torch.tensor([[[math.log(3), 5.0], [0.0, 5.0]]])
    entropies = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), math.log(2)]
    assert covering(scores).item() == pytest.approx(sum(entropies) / 2 / math.log(2))
    assert covering(torch.zeros(3, 7, 5)).item() == pytest.approx(1)
    assert covering(1000 * torch.eye(4)[None]).item() == pytest.approx(0, abs=1e-6)


def test_specific_by_hand():
    """Three classes of two parts each: of 18 weights 12 are of other classes."""
    net = DPNet(3, backbone=TINY, weights=None, parts_per_class=2)
    weights = torch.arange(18.0).view(3, 6) - 9
    others = [weights[k, p].abs().item() for k in range(3) for p in range(6) if p // 2 != k]
    assert len(others) == 12
    assert specific(weights, net.own).item() == pytest.approx(sum(others) / 12)
    assert specific(net.own.float(), net.own).item() == 0


@pytest.mark.parametrize(
    ("right", "wrong", "check"),
    [
        ("- unit.square().sum(dim=1).square().sum()", "", test_complementary_by_hand),
        ("gram.square().sum()", "gram.sum()", test_complementary_by_hand),
        ("unit.T @ unit if", "unit.T @ parts if", test_complementary_by_hand),
        ("/ len(parts) ** 2", "/ len(parts)", test_complementary_by_hand),
        ("unit = F.normalize(parts, dim=1)", "unit = parts", test_complementary_by_hand),
        ("log_softmax(dim=1)", "log_softmax(dim=2)", test_covering_by_hand),
        ("return -(log.exp()", "return (log.exp()", test_covering_by_hand),
        ("/ math.log(max(2, scores.shape[1]))", "", test_covering_by_hand),
        ("(weights.abs() * ~own)", "(weights.abs() * own)", test_specific_by_hand),
        ("weights.abs()", "weights", test_specific_by_hand),
        ("/ (~own).sum()", "/ own.numel()", test_specific_by_hand),
        ("// parts_per_class", "% num_classes", test_specific_by_hand),
    ],
)
def test_mutations_are_rejected(right, wrong, check, monkeypatch):
    wrong_module = mutated("interp_models.models.dpnet", right, wrong)
    for name in ("complementary", "covering", "specific", "DPNet"):
        monkeypatch.setitem(globals(), name, getattr(wrong_module, name))
    with pytest.raises(AssertionError):
        check()


def model(**options):
    torch.manual_seed(0)
    return DPNet(num_classes=4, backbone=TINY, weights=None, output_stride=16, parts_per_class=3, **options).eval()


@torch.no_grad()
def test_scores_region_by_region():
    """The mean vector of every window, times every part; the best of them, its box, and the logits."""
    net, images = model(windows=(1, 3)), torch.rand(2, 3, 64, 96)
    output, features = net(images), net.backbone(images).double().numpy()
    height, width = features.shape[2:]
    assert (height, width) == (4, 6)
    parts = net.parts.double().numpy()
    parts = parts / np.sqrt((parts**2).sum(axis=1, keepdims=True))
    for b in range(2):
        regions = [(y, x, side) for side in (1, 3) for y in range(height - side + 1) for x in range(width - side + 1)]
        vectors = np.array([features[b, :, y : y + side, x : x + side].mean(axis=(1, 2)) for y, x, side in regions])
        scores = parts @ vectors.T
        best = scores.max(axis=1)
        np.testing.assert_allclose(output.aux["regions"][b], scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(output.aux["best"][b], best, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(output.logits[b], net.head.weight.double().numpy() @ best, rtol=1e-4, atol=1e-5)
        for p, box in enumerate(net.boxes(output)[b].numpy()):
            y, x, side = regions[int(scores[p].argmax())]
            np.testing.assert_allclose(box, [x / 6, y / 4, (x + side) / 6, (y + side) / 4], rtol=1e-6)


@torch.no_grad()
def test_contributions_sum_to_the_logit():
    net, images = model(), torch.rand(3, 3, 64, 64)
    output = net(images)
    targets = torch.tensor([3, 0, 2])
    contributions = net.evidence(output, targets)
    torch.testing.assert_close(contributions.sum(dim=1), output.logits.gather(1, targets[:, None])[:, 0])
    maps = net.explain(output, targets)
    expected = sum(net.head.weight[targets, p][:, None, None] * output.maps[:, p] for p in range(12))
    torch.testing.assert_close(maps, expected)
    shown = net.display(output, targets)
    order = contributions.argsort(dim=1, descending=True)
    for b in range(3):
        torch.testing.assert_close(shown[b], output.maps[b, order[b, :3]].clamp(min=0))


def test_the_loss_has_the_constraints_that_are_asked_for():
    net = model(complementary=2.0, covering=0.5, specific=3.0, temperature=4.0)
    output, targets = net(torch.rand(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3])
    terms = net.loss(output, targets)
    assert terms["complementary"].item() == pytest.approx(2 * complementary(net.parts).item())
    assert terms["covering"].item() == pytest.approx(0.5 * covering(output.aux["regions"] / 4).item())
    assert terms["specific"].item() == pytest.approx(3 * specific(net.head.weight, net.own).item())
    assert net.loss(output, targets).keys() == {"ce", "complementary", "covering", "specific"}
    assert model().loss(output, targets).keys() == {"ce"}


def test_a_map_smaller_than_all_windows_is_one_region():
    net = model(windows=(5, 7))
    output = net(torch.rand(2, 3, 64, 64))
    assert output.aux["regions"].shape == (2, 12, 1)
    torch.testing.assert_close(output.aux["best"], output.maps.mean(dim=(2, 3)))
    assert net.boxes(output).unique().tolist() == [0, 1]
