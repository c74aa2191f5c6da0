"""BR-NPA against loops, and on a hand-made map of features whose parts are known."""

import numpy as np
import pytest
import torch

from interp_models.models.br_npa import BRNPA, parts
from tests.conftest import TINY
from tests.mutation import mutated


def parts_by_loops(features, n):
    """Of one image (C, h, w): part vectors and maps, cell by cell as the paper tells it."""
    _, height, width = features.shape
    cells = [features[:, i, j] for i in range(height) for j in range(width)]
    norms = [np.sqrt(sum(x * x for x in cell)) for cell in cells]
    scores, vectors, maps = list(norms), [], []
    for _ in range(n):
        best = max(range(len(cells)), key=lambda i: scores[i])
        cosines = [
            max(0.0, float(cell @ cells[best]) / (a * norms[best])) for cell, a in zip(cells, norms, strict=True)
        ]
        total = sum(cosines)
        maps.append(np.array(cosines).reshape(height, width) / total)
        vectors.append(sum(c / total * cell for c, cell in zip(cosines, cells, strict=True)))
        scores = [(1 - c) * score for c, score in zip(cosines, scores, strict=True)]
    return np.array(vectors), np.array(maps)


def check_parts(function=parts):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 6, 3, 5)) + 0.5  # cosines of both signs
    vectors, maps = function(torch.tensor(features), 3)
    for b in range(4):
        expected = parts_by_loops(features[b], 3)
        np.testing.assert_allclose(vectors[b], expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(maps[b], expected[1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(maps.sum(dim=(2, 3)), 1, rtol=1e-6)


def test_parts_equal_loops():
    check_parts()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("score.argmax(dim=1)", "score.argmin(dim=1)"),
        ("score * (1 - similarity.detach())", "score"),
        ("score * (1 - similarity.detach())", "length * (1 - similarity.detach())"),
        ("F.relu(", "("),
        (" / length[images, chosen][:, None]", ""),
        ("[:, :, 0] / length)", "[:, :, 0])"),
        ("similarity / similarity.sum(dim=1, keepdim=True)", "(similarity / similarity.softmax(dim=1))"),
        ("attention @ vectors", "attention @ F.normalize(vectors, dim=2)"),
    ],
)
def test_mutations_are_rejected(right, wrong):
    with pytest.raises(AssertionError):
        check_parts(mutated("interp_models.models.br_npa", right, wrong).parts)


def test_known_parts():
    """Three groups of cells of orthogonal features, the second of the highest norm: it is part 1, and red."""
    features = torch.zeros(1, 3, 4, 4)
    features[0, 0, :2], features[0, 1, 2, :3], features[0, 2, 3] = 2.0, 5.0, 1.0
    vectors, maps = parts(features, 3)
    expected = torch.zeros(3, 4, 4)
    expected[0, 2, :3], expected[1, :2], expected[2, 3] = 1 / 3, 1 / 8, 1 / 4
    torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vectors[0], torch.tensor([[0.0, 5, 0], [2, 0, 0], [0, 0, 1]]), rtol=1e-4, atol=1e-5)


def test_an_image_without_features_has_no_nan():
    features = torch.zeros(2, 3, 4, 4, requires_grad=True)
    vectors, maps = parts(features, 2)
    (vectors.sum() + maps.sum()).backward()
    assert all(bool(torch.isfinite(x).all()) for x in (vectors, maps, features.grad))


def test_gradients_reach_the_representative_too():
    """By finite steps in float64: similarities are differentiated in both vectors, the choice is not."""
    features = torch.rand(1, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(1, 2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: (parts(x, 2)[0] * weight).sum(), features, eps=1e-7, atol=1e-5)


def model(**options):
    torch.manual_seed(0)
    return BRNPA(num_classes=5, backbone=TINY, weights=None, output_stride=16, **options).eval()


@torch.no_grad()
def test_class_decomposition_sums_to_the_logit():
    net, images = model(), torch.rand(3, 3, 64, 96)
    output = net(images)
    for target in torch.tensor([[0, 1, 2], [3, 4, 0]]):
        terms = net.explain(output, target, "class")
        logit = output.logits.gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(terms.sum(dim=(1, 2)) + net.head.bias[target], logit, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_salience_is_the_mean_of_maps_times_norms():
    net, images = model(n_parts=4), torch.rand(2, 3, 64, 64)
    output = net(images)
    norms = net.backbone(images).square().sum(dim=1).sqrt()
    expected = sum(output.maps[:, n] * norms for n in range(4)) / 4
    torch.testing.assert_close(net.explain(output, torch.tensor([0, 1])), expected)
    torch.testing.assert_close(net.display(output, torch.tensor([0, 1])), output.maps[:, :3] * norms[:, None])
