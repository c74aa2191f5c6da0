"""Metrics against those of other libraries, where they compute the same."""

import contextlib
import warnings

import captum.metrics
import numpy as np
import pytest
import torch
from torch import nn
from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

from interp_models import METRICS, probabilities
from interp_models.core.rng import uniform
from interp_models.core.truth import Truth
from interp_models.metrics.case import Case
from interp_models.metrics.effects import _squares
from interp_models.metrics.perturbation import min_max, rise_blur, to_pixels
from interp_models.metrics.presets import PRESETS

TARGET = torch.tensor([0, 2, 1, 2])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 3)).eval()


def data(grid=(16, 24)):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, 16, 24, generator=generator), torch.rand(4, *grid, generator=generator)


class Extractor:
    """Gives torchcam maps that are already there."""

    def __init__(self, model, maps):
        self.model, self.maps = model, maps

    def __call__(self, class_idx=None, scores=None, normalized=True, **options):
        return [self.maps]

    def fuse_cams(self, cams):
        return cams[0]

    def _hooks_off(self):
        return contextlib.nullcontext()


def test_torchcam_drop_and_increase():
    net, (images, maps) = network(), data((4, 6))
    maps = min_max(maps)
    metric = ClassificationMetric(Extractor(net, maps), lambda logits: logits.softmax(dim=1))
    metric.update(images, TARGET.tolist())
    # It upsamples after the normalisation; a preset that does neither again sees the same masks.
    fine = nn.functional.interpolate(maps[:, None], size=(16, 24), mode="bilinear")[:, 0]
    score_fn, masked = probabilities(net), images * fine[:, None]
    clean, low = (score_fn(x).gather(1, TARGET[:, None])[:, 0] for x in (images, masked))
    expected = metric.summary()
    assert expected["avg_drop"] == pytest.approx(float(((clean - low).relu() / clean).mean()), abs=1e-6)
    whole = torch.stack([min_max(m[None])[0] for m in fine])
    metric = ClassificationMetric(Extractor(net, whole), lambda logits: logits.softmax(dim=1))
    metric.update(images, TARGET.tolist())
    with warnings.catch_warnings(action="ignore"):  # one cell per pixel
        ours = METRICS.build("ad").score(Case(images, fine, TARGET, score_fn))
    assert float(ours["ad"].mean()) == pytest.approx(metric.summary()["avg_drop"], abs=1e-5)
    assert float(ours["iic"].mean()) == metric.summary()["conf_increase"]


@pytest.mark.parametrize("steps", [10, 48])
def test_torchcam_curves(steps):
    """Its curves by pixels are those of the preset `opticam`, with the same image for removed pixels."""
    net, (images, maps) = network(), data((4, 6))
    case = Case(images, maps, TARGET, probabilities(net))
    ours = METRICS.build("dauc", {"preset": "opticam", "max_steps": steps}).score(case)
    for key, baseline in (("deletion", None), ("insertion", rise_blur)):
        metric = DeletionInsertionMetric(
            Extractor(net, maps), lambda logits: logits.softmax(dim=1), steps=steps, baseline=baseline
        )
        metric.update(images, TARGET.tolist())
        own = ours["dauc" if key == "deletion" else "iauc"]
        assert float(own.mean()) == pytest.approx(metric.summary()[f"{key}_auc"], abs=1e-5)


def test_captum_infidelity():
    """The same squares, with the map's sum over a square as its prediction; ours is divided by the mean squared
    drop."""
    net, (images, maps) = network(), data((4, 6))
    score_fn = probabilities(net)
    squares = to_pixels(_squares(4, 6).float(), (16, 24))  # (64, H, W)

    def perturb(x):  # captum asks for all samples of an image at once
        own = squares.repeat(len(x) // len(squares), 1, 1)[:, None]
        return own.expand_as(x), x * (1 - own)

    per_pixel = to_pixels(min_max(maps), (16, 24))[:, None].expand(-1, 3, -1, -1) / (3 * 16)
    theirs = captum.metrics.infidelity(
        score_fn, perturb, images, per_pixel, target=TARGET, n_perturb_samples=len(squares), normalize=True
    )
    clean = score_fn(images).gather(1, TARGET[:, None])[:, 0]
    drops = [clean - score_fn(images * (1 - square)).gather(1, TARGET[:, None])[:, 0] for square in squares]
    expected = theirs / torch.stack(drops).square().mean(dim=0)
    ours = METRICS.build("infidelity").score(Case(images, maps, TARGET, score_fn))["infidelity"]
    sums = min_max(maps).flatten(1) @ _squares(4, 6).flatten(1).float().T
    follows = (sums * torch.stack(drops, dim=1)).sum(dim=1) > 0  # captum's scale is below 0 for the others
    assert follows.tolist().count(True) in (1, 2, 3)
    torch.testing.assert_close(ours[follows], expected[follows], rtol=1e-3, atol=1e-4)
    assert ours[~follows].tolist() == pytest.approx([1] * int((~follows).sum()))


def test_captum_sensitivity():
    images = data()[0]

    def explain(x):
        return min_max(torch.tanh(3 * x).mean(dim=1) ** 2)

    def of_any(inputs):  # captum gives the images in a tuple, and changed images without
        return (explain(inputs[0] if isinstance(inputs, tuple) else inputs),)

    def perturb(x, radius):
        """Our changes, one after the other for each image."""
        own = [torch.as_tensor(2 * uniform(row % 10, np.arange(x[0].numel())) - 1) for row in range(len(x))]
        return (x + radius * torch.stack(own).view_as(x).float()).clamp(0, 1)

    theirs = captum.metrics.sensitivity_max(of_any, images, perturb, 0.02, 10)
    with warnings.catch_warnings(action="ignore"):  # one cell per pixel
        ours = METRICS.build("max_sensitivity").score(Case(images, explain(images), explain=explain))
    torch.testing.assert_close(ours["max_sensitivity"], theirs.float(), rtol=1e-4, atol=1e-5)


def quantus_scores(metric, net, images, maps, mask):
    x, y, a = images.numpy(), TARGET.numpy(), maps[:, None].numpy()
    return np.asarray(metric(net, x, y, a, mask[:, None].numpy(), softmax=True))


OPTIONS = {"disable_warnings": True, "abs": False, "normalise": False}


def test_quantus_form_and_localisation():
    quantus = pytest.importorskip("quantus", reason="the peer is not installed")
    net, (images, maps) = network(), data()
    maps = min_max(maps)
    mask = torch.zeros(4, 16, 24, dtype=torch.bool)
    mask[:, 3:11, 5:20] = True
    truth = Truth(torch.tensor([[5.0, 3, 20, 11]] * 4), mask)
    with warnings.catch_warnings(action="ignore"):
        case = Case(images, maps, TARGET, probabilities(net), truth=truth)
        ours = {name: METRICS.build(name).score(case) for name in ("form", "mask_localisation", "box_localisation")}
        peers = {
            ("form", "gini"): quantus.Sparseness(**OPTIONS),
            ("form", "complexity"): quantus.Complexity(**OPTIONS),
            ("box_localisation", "pointing"): quantus.PointingGame(**OPTIONS),
            ("mask_localisation", "mask_energy"): quantus.RelevanceMassAccuracy(**OPTIONS),
            ("mask_localisation", "object_coverage"): quantus.RelevanceRankAccuracy(**OPTIONS),
            ("mask_localisation", "mask_relevance"): quantus.TopKIntersection(k=round(0.1 * 16 * 24), **OPTIONS),
        }
        for (name, key), peer in peers.items():
            theirs = quantus_scores(peer, net, images, maps, mask)
            np.testing.assert_allclose(ours[name][key], theirs, atol=1e-4, err_msg=key)


def test_quantus_pixel_flipping():
    """With all channels of a pixel in one step, its curve is that of deletion by cells of one pixel."""
    quantus = pytest.importorskip("quantus", reason="the peer is not installed")
    net, (images, maps) = network(), data()
    with warnings.catch_warnings(action="ignore"):
        metric = quantus.PixelFlipping(
            features_in_step=48, perturb_baseline="black", return_auc_per_sample=False, **OPTIONS
        )
        three = maps[:, None].expand(-1, 3, -1, -1) + torch.tensor([2e-7, 1e-7, 0]).view(3, 1, 1)  # order of channels
        curves = np.asarray(
            metric(model=net, x_batch=images.numpy(), y_batch=TARGET.numpy(), a_batch=three.numpy(), softmax=True)
        )
        case = Case(images, maps, TARGET, probabilities(net))
        clean = probabilities(net)(images).gather(1, TARGET[:, None]).numpy()
        area = np.trapezoid(np.concatenate([clean, curves], axis=1), dx=1 / curves.shape[1], axis=1)
        ours = METRICS.build("dauc", {"preset": "opticam", "max_steps": curves.shape[1]}).score(case)["dauc"]
    assert PRESETS["opticam"].counts(16 * 24, 24)[1] == 16
    np.testing.assert_allclose(ours, area, atol=2e-3)
