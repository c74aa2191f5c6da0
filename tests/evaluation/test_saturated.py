"""Logits so large that their probabilities are equal: the prediction is that of the highest logit, everywhere."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from interp_models import EXPLAINERS, Classifier, judge
from interp_models.core.batches import all_scores, predicted
from interp_models.core.outputs import LabelLogits
from interp_models.core.scoring import probabilities
from interp_models.explainers import base
from interp_models.explainers.base import target_scores
from tests.evaluation.test_judge import network, pictures

QUICK: dict[str, Any] = {"progress": False, "max_steps": 4}
LABELS = [[1], [1], [1], [1], [1], []]


def saturated(ending: nn.Module | None = None) -> nn.Module:
    """A network of three classes whose logits are near 20, 35 and -3; the sigmoids of the first two are exactly 1."""
    net = network(3)
    with torch.no_grad():
        net[-1].bias.copy_(torch.tensor([20.0, 35.0, -3.0]))
    return net.eval() if ending is None else nn.Sequential(net, ending).eval()


@pytest.mark.parametrize("kind", ["logits", "classifier", "ends in a sigmoid", "tied softmax"])
@pytest.mark.filterwarnings("ignore:.*ends in a sigmoid")
def test_the_prediction_is_that_of_the_highest_logit(kind: str) -> None:
    net, output, normalize = saturated(), "sigmoid", None
    expected: Any = [1] * 6
    if kind == "classifier":
        net, output, normalize = Classifier(saturated(), output="sigmoid"), None, "auto"
    elif kind == "ends in a sigmoid":
        net, output = saturated(nn.Sigmoid()), None
    elif kind == "tied softmax":  # float32 logits that differ by less than their probabilities can show
        output = None
        with torch.no_grad():
            net[-1].weight.zero_()
            net[-1].bias.copy_(torch.tensor([0.2, 0.20000002, -1.0]))
        assert len(set(net(pictures(1)).softmax(dim=1)[0, :2].tolist())) == 1
    found = judge(
        net, pictures(6), ["gradcam"], ["ad"], labels=LABELS, output=output, normalize=normalize, batch_size=4, **QUICK
    )
    assert found.per_image["prediction"].tolist() == expected
    assert found.per_image["target_class"].tolist() == expected
    assert found.tables.accuracy == 1.0
    by_label = judge(
        net,
        pictures(6),
        ["gradcam"],
        ["ad"],
        labels=LABELS,
        target="label",
        output=output,
        normalize=normalize,
        **QUICK,
    )
    assert by_label.per_image["prediction"].tolist() == expected[:5]
    np.testing.assert_allclose(by_label.maps["gradcam"], found.maps["gradcam"][:5], rtol=1e-4, atol=1e-6)


def test_only_tied_images_are_passed_again() -> None:
    seen = []
    net = saturated()
    net.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    images = pictures(6)
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.9, 0.2, 0.1]] * 3)
    assert predicted(net, images, scores).tolist() == [1, 0] * 3
    assert seen[-1] == 3
    seen.clear()
    assert predicted(net, images, all_scores(probabilities(net), images) * torch.tensor([0, 1, 0])).tolist() == [1] * 6


@pytest.mark.parametrize("name", ["rise", "gradcam"])
def test_explainers_choose_the_same_class_for_both_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Classifier(saturated(), output="sigmoid")
    images, options = pictures(2), {**EXPLAINERS.get(name).small, "score": "probability"}
    chosen: list[list[int]] = []
    real = base.resolve_target
    monkeypatch.setattr(base, "resolve_target", lambda *args: chosen.append(real(*args).tolist()) or real(*args))
    own, by_number = (EXPLAINERS.build(name, options, model=net).attribute(images, target) for target in (None, 1))
    torch.testing.assert_close(own, by_number)
    assert chosen == [[1, 1]] * len(chosen) != []


def test_target_scores_choose_by_logits() -> None:
    logits = torch.tensor([[20.0, 35.0, -3.0]], dtype=torch.float64).float().requires_grad_()
    (gradient,) = torch.autograd.grad(target_scores(LabelLogits(logits * 0.99), "logit", None).sum(), logits)
    assert gradient.argmax() == 1
    scaled = LabelLogits(torch.tensor([[16.7, 16.8, 0.0]], dtype=torch.float32).requires_grad_())
    assert scaled.logits.sigmoid()[0, 0] == scaled.logits.sigmoid()[0, 1]
    (gradient,) = torch.autograd.grad(target_scores(scaled, "probability", None).sum(), scaled.logits)
    assert gradient[0, 1] == gradient.abs().max()
    assert gradient[0, 0] == 0
