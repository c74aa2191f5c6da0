"""What is known of a model is forgotten when the model changes."""

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils import prune

from interp_models import EXPLAINERS
from interp_models.core.known import fingerprint, known_of, state_of
from interp_models.core.modes import evaluating


class Holds(nn.Module):
    """A network with an attribute that is no module."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.config = nn.Conv2d(3, 5, 4, 4), nn.Linear(5, 3), held

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.conv(x).relu().mean(dim=(2, 3)))
        on = self.config[0] if isinstance(self.config, np.ndarray) else self.config.on
        return y.flip(1) if on else y


def nested(on: bool) -> SimpleNamespace:
    config = SimpleNamespace(on=on, text=SimpleNamespace(sizes=[1, 2]), layer=nn.Linear(2, 2))
    config.itself = config
    return config


@pytest.mark.parametrize("kind", ["namespace", "array"])
def test_a_changed_config_is_seen(kind: str) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = Holds(nested(False) if kind == "namespace" else np.zeros(2)).eval()
    method = EXPLAINERS.build("rise", {"masks": 20}, model=model)
    method.attribute(images, 0)
    if kind == "namespace":
        model.config.on = True
    else:
        model.config[0] = 1
    fresh = Holds(nested(True) if kind == "namespace" else np.ones(2)).eval()
    expected = EXPLAINERS.build("rise", {"masks": 20}, model=fresh).attribute(images, 0)
    torch.testing.assert_close(method.attribute(images, 0), expected)


def test_what_lies_deeper_is_seen_and_what_stays_is_kept() -> None:
    model = Holds(nested(False))
    known_of(model)["a"] = 1
    assert known_of(model) == {"a": 1}
    model.config.text.sizes[1] = 3
    assert known_of(model) == {}
    known_of(model)["a"] = 1
    with torch.no_grad():
        model.config.layer.weight.zero_()
    assert known_of(model) == {}


def test_what_was_first_met_deep_inside_is_seen_where_it_lies_higher() -> None:
    model = Holds(None)
    model.config = [[shared := nested(False)]]  # too deep to look inside
    model.options = shared
    known_of(model)["a"] = 1
    assert known_of(model) == {"a": 1}
    shared.text.sizes[1] = 3
    assert known_of(model) == {}


@pytest.mark.parametrize("name", ["pruning", "weight norm", "spectral norm"])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_a_hook_computes_in_each_pass_do_not_change_the_state(name: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    for part in (model[0], model[2]):
        if name == "pruning":
            prune.custom_from_mask(part, "weight", torch.ones_like(part.weight))
        else:
            (nn.utils.weight_norm if name == "weight norm" else nn.utils.spectral_norm)(part)
    images = torch.rand(2, 3, 16, 16)
    model(images)
    before = state_of(model)
    model(images)
    assert state_of(model) == before
    explainer = EXPLAINERS.build("integrated_gradcam", {"steps": 3, "batch": 2}, model=model)
    assert explainer.attribute(images, 1).shape == (2, 7, 7)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert state_of(model) != before


@dataclass(slots=True)
class Slots:
    on: bool = False


CHANGES: dict[str, tuple[Any, Any]] = {
    "set": (lambda: set(), lambda held: held.add("b")),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda held: held.append(3)),
    "slots": (Slots, lambda held: setattr(held, "on", True)),
    "deep list": (lambda: [[[[[[1]]]]]], lambda held: held[0][0][0][0][0].append(2)),
    "deep dict": (lambda: {1: {2: {3: {4: 5}}}}, lambda held: held[1][2][3].update({4: 6})),
    "slots in a list": (lambda: [[Slots()]], lambda held: setattr(held[0][0], "on", True)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_values_of_containers_and_slots_are_seen(kind: str) -> None:
    make, change = CHANGES[kind]
    model = Holds(make())
    known_of(model)["a"] = 1
    assert known_of(model) == {"a": 1}
    change(model.config)
    assert known_of(model) == {}
    model.config = [make()]
    model.config += [model.config, {"again": model.config}]  # inside itself
    before = state_of(model)
    assert state_of(model) == before
    change(model.config[0])
    assert state_of(model) != before


def test_updates_of_metrics_do_not_change_the_state() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    metrics = {"a": torchmetrics.MeanMetric(), "b": torchmetrics.classification.MulticlassAccuracy(3)}
    model.accuracy, model.several = torchmetrics.MeanMetric(), torchmetrics.MetricCollection(metrics)
    model.after = nn.Linear(3, 3)
    state, weights = state_of(model), fingerprint(model)
    model.accuracy.update(torch.rand(3))
    model.several["a"].update(torch.rand(3))
    model.several["b"].update(torch.rand(4, 3), torch.tensor([0, 1, 2, 0]))
    assert state_of(model) == state
    assert fingerprint(model) == weights
    with torch.no_grad():
        model.after.weight.zero_()
    assert state_of(model) != state
    assert fingerprint(model) != weights


class Lists(nn.Module):
    """A network whose batch norms are in plain containers, one of them in the list of another's list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        inner = nn.Identity()
        inner.within = ([nn.BatchNorm2d(4)],)
        self.norms = {"first": [nn.BatchNorm2d(4)], "second": inner}

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms["first"][0](self.conv(x))
        y: Tensor = self.fc(self.norms["second"].within[0][0](x).relu().mean(dim=(2, 3)))
        return y


@pytest.mark.parametrize("name", ["gradient", "rise", "gradcam"])
def test_batch_norms_in_plain_lists_are_in_eval_mode_during_a_call(name: str) -> None:
    model, images = Lists().train(), torch.rand(4, 3, 16, 16)
    norms = [model.norms["first"][0], model.norms["second"].within[0][0]]  # type: ignore[union-attr, index]
    before = [norm.running_mean.clone() for norm in norms]
    found = EXPLAINERS.build(name, {}, model=model).attribute(images, 1)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert all(norm.training and not norm.num_batches_tracked for norm in norms)
    with evaluating(model):
        assert not any(norm.training for norm in norms)
        expected = EXPLAINERS.build(name, {}, model=model).attribute(images, 1)
    torch.testing.assert_close(found, expected)


def test_a_hook_on_gradients_is_seen_by_prepared_copies() -> None:
    """It is added after the copy is made: one pass of a copy has the gradient of the model itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    images = torch.rand(2, 3, 8, 8)
    plain = EXPLAINERS.build("smoothgrad", {"samples": 1, "noise": 0.0, "channels": "max_abs"}, model=model)
    before = plain.attribute(images, 1)
    model[1].register_full_backward_hook(lambda part, inner, outer: (inner[0].clamp(min=0),))
    found, due = plain.attribute(images, 1), EXPLAINERS.build("gradient", {}, model=model).attribute(images, 1)
    assert not torch.allclose(due, before)
    torch.testing.assert_close(found, due)
