"""Every registered explainer keeps the contract, on our models and on anybody's; wrong ones do not."""

import copy
import inspect
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from interp_models import EXPLAINERS, MODELS
from interp_models.core.errors import InputError, NotApplicable
from interp_models.explainers.base import Explainer
from tests.conftest import tiny_options
from tests.contract import explainers as contract
from tests.contract.applicability import ALL, APPLIES, PASSES, table

# Options that make a method fast enough for a test.
OPTIONS = {
    "rise": {"masks": 12, "batch": 5},
    "opticam": {"steps": 4},
    "kernelshap": {"samples": 8, "cells": 2},
    "lime": {"samples": 6, "cells": 2},
    "occlusion": {"window": 40, "stride": 24},
    "integrated_gradients": {"steps": 3, "batch": 2},
    "smoothgrad": {"samples": 3},
    "smoothgrad_squared": {"samples": 3},
    "vargrad": {"samples": 3, "batch": 5},
    "smoothed_integrated_gradients": {"samples": 2, "steps": 3},
    "smoothed_guided_backprop": {"samples": 3},
    "integrated_smoothgrad": {"samples": 2, "steps": 3},
    "integrated_guided_backprop": {"steps": 3},
}
OPTIONS_OF = {("scorecam", "resnet18"): {"layer": "layer1"}}  # 64 channels instead of 512


def options(explainer, subject):
    return OPTIONS_OF.get((explainer, subject), OPTIONS.get(explainer))


AMPLIFIES = {"kernelshap", "lime", "occlusion", "opticam", "xgradcam"}
"""Small differences of scores, Adam's steps of one size however small gradients are, and quotients by channels' sums
that are nearly 0 drown in the rounding of untrained networks: whether a batch matters is asked in float64."""
NEEDS_EXPLAIN = {"intrinsic"}
TRUTH = {"gt_background", "gt_box"}
BLIND = {"center_gaussian", "edges", "fakecam", "random", *TRUTH}
"""Pass no image through the model, so they know of no classes."""
LAYERS = {name for name in EXPLAINERS.names() if "layer" in EXPLAINERS.options(name, {}, given=("model",))}
CLASS_AGNOSTIC = {"activation_map", "cls_attention", "eigencam", "rollout", *BLIND}


class Shown:
    """An explainer that is given the same box of every image."""

    def __init__(self, explainer):
        self.explainer = explainer

    def attribute(self, images, target=None):
        return self.explainer.attribute(images, target, torch.tensor([[8.0, 16.0, 40.0, 30.0]] * len(images)))

    def __enter__(self):
        self.explainer.__enter__()
        return self

    def __exit__(self, *error):
        self.explainer.__exit__(*error)


def maker(explainer, subject):
    def make(model):
        made = EXPLAINERS.build(explainer, options(explainer, subject), model=model)
        return Shown(made) if explainer in TRUTH else made

    return make


def bare() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4),
    )  # fmt: skip


def resnet() -> nn.Module:
    return torchvision.models.resnet18(weights=None, num_classes=4)


CLASS_MAPS = {"protopnet", "prototree", "dpnet"}
"""Models whose own map depends on the class."""
SMALL = {"prototree": {"depth": 3, "channels": 4}}
"""Else almost no image goes right at any node of an untrained tree, and gradients drown in rounding."""


def ours(name: str) -> nn.Module:
    options = {**tiny_options(name), **SMALL.get(name, {})}
    if "dropout" in inspect.signature(MODELS.get(name)).parameters:  # what must not act in an explanation
        options["dropout"] = 0.5
    model = MODELS.build(name, options, num_classes=4)
    with torch.no_grad():  # a tree without a batch behind it gives all classes the same
        model.observe(model.eval()(torch.rand(4, 3, 64, 64)), torch.arange(4))
        if name == "prototree":
            model.leaves.mul_(100)  # and after one it hardly knows them apart
    return model.train()


def vgg() -> nn.Module:
    """Its classifier reads every cell of the last map."""
    features = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(4)]
    features += [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 4)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(7), *classifier)


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=4, img_size=64)


SUBJECTS = {"sequential": bare, "resnet18": resnet, "vgg": vgg, "vit": vit} | {
    name: lambda name=name: ours(name) for name in MODELS.names()
}


def host(explainer):
    """What it applies to, as simple as can be."""
    return next(subject for subject in ("sequential", "cnn", "vit") if subject in APPLIES[explainer])


def cases():
    return [pytest.param(e, s, id=f"{e}-{s}") for e in EXPLAINERS.names() for s in APPLIES.get(e, ALL)]


def test_the_table_knows_everything_that_is_registered():
    assert list(APPLIES) == EXPLAINERS.names()
    assert set(ALL) == set(SUBJECTS)


def test_the_page_shows_the_table():
    """python -m tests.contract.applicability prints it."""
    page = Path(__file__).parents[2] / "docs" / "explainers.md"
    assert table() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("explainer", PASSES)
def test_passes_are_those_of_the_table(explainer):
    subject = host(explainer)
    model, images = prepare(subject)
    made = EXPLAINERS.build(explainer, options(explainer, subject), model=model)
    made.preparation = "plain"
    known = {"channels": 8, "windows": 4, **vars(made), **vars(getattr(made, "base", made))}
    passes = []
    handle = model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    (Shown(made) if explainer in TRUTH else made).attribute(images, torch.tensor([0, 1, 2]))
    handle.remove()
    if explainer in LAYERS:
        passes.remove(1)  # one image, by which the layer was found
    assert sum(passes) == eval(PASSES[explainer], known) * len(images)


REFUSED = [(e, s) for e in EXPLAINERS.names() for s in ALL if s not in APPLIES.get(e, ALL)]


@pytest.mark.parametrize(("explainer", "subject"), REFUSED)
def test_refusals_outside_the_table(explainer, subject):
    model, images = prepare(subject)
    with pytest.raises(NotApplicable, match=type(model).__name__):
        EXPLAINERS.build(explainer, options(explainer, subject), model=model).attribute(images)


class InPlace(nn.Module):
    """Normalises the images that it is given, and not a copy of them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images.sub_(0.5).div_(0.25))


class OutOfPlace(InPlace):
    def forward(self, images):
        return super().forward(images.clone())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("explainer", ["gradcam", "rise", "occlusion", "lime"])
def test_models_that_change_their_images(explainer, channels_last):
    """Refused, or explained as those that do not; the caller's images stay as they were."""
    model, images = prepare("sequential")
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    before = images.clone()
    expected = maker(explainer, "sequential")(OutOfPlace(model)).attribute(images)
    explain = maker(explainer, "sequential")(InPlace(model)).attribute
    if explainer == "gradcam" or channels_last:
        with pytest.raises(InputError, match="InPlace changes its images in place"):
            explain(images)
    else:  # copies are given images in another memory format, and change those
        torch.testing.assert_close(explain(images), expected)
    assert torch.equal(images, before)


def prepare(subject: str):
    torch.manual_seed(1)
    model = SUBJECTS[subject]()
    for module in model.modules():  # statistics as after some training, so that modes differ
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval(), torch.rand(3, 3, 64, 64)


@pytest.mark.parametrize(("explainer", "subject"), cases())
@pytest.mark.parametrize("check", contract.CHECKS)
def test_contract(explainer, subject, check):
    model, images = prepare(subject)
    if explainer in AMPLIFIES and check is contract.check_output:
        model, images = model.double(), images.double()
    if check is contract.check_refusals and explainer in BLIND:
        with pytest.raises(ValueError, match="NaN"):
            maker(explainer, subject)(model).attribute(images * torch.nan)
        return
    check(maker(explainer, subject), model, images)


@pytest.mark.parametrize(("explainer", "subject"), cases())
def test_target(explainer, subject):
    model, images = prepare(subject)
    uses = subject in CLASS_MAPS if explainer in NEEDS_EXPLAIN else explainer not in CLASS_AGNOSTIC
    contract.check_target(maker(explainer, subject), model, images, uses_target=uses)


WRAPPERS = {"parallel": nn.DataParallel, "compiled": lambda model: torch.compile(model, backend="eager")}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("explainer", ["gradcam", "scorecam", "guided_backprop", "integrated_gradients", "rise"])
def test_wrapped_models(explainer, wrap):
    model, images = prepare("sequential")
    expected = maker(explainer, "sequential")(model).attribute(images, 1)
    wrapped = wrap(model)
    wrapped(images)
    torch.testing.assert_close(maker(explainer, "sequential")(wrapped).attribute(images, 1), expected)


class Elementwise(nn.Module):
    """Its scores are of float32 under autocast, too, so that only an explainer's own sums could be coarse."""

    def __init__(self):
        super().__init__()
        self.features = nn.Identity()
        self.weight = nn.Parameter(torch.rand(4, 5) - 0.3)

    def forward(self, x):
        parts = [x[:, 0], x[:, 1] * x[:, 2], (x[:, 0] - x[:, 1]).relu(), x[:, 2].square(), x.mean(dim=1)]
        pooled = self.features(torch.stack(parts, dim=1)).mean(dim=(2, 3)).tanh()
        return (pooled[:, None] * self.weight).sum(dim=2)


NO_SUCH_MODEL = {"cam", "liftcam", "deconvnet", "guided_backprop", "smoothed_guided_backprop"}
NO_SUCH_MODEL |= {"integrated_guided_backprop", *TRUTH}
NO_SUCH_MODEL |= {name for name, applies in APPLIES.items() if "sequential" not in applies}


@pytest.mark.parametrize("explainer", sorted(set(APPLIES) - NO_SUCH_MODEL))
def test_sums_are_of_float32_under_autocast(explainer):
    torch.manual_seed(0)
    model, images = Elementwise().eval(), torch.rand(2, 3, 64, 64)
    settings = options(explainer, "elementwise") or {}
    layer = {"layer": "features"} if explainer in LAYERS else {}
    make = EXPLAINERS.build(explainer, settings | layer, model=model)
    expected = make.attribute(images, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = make.attribute(images, 1)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("explainer", sorted(set(APPLIES) - NEEDS_EXPLAIN - TRUTH - {"kernelshap", "lime"}))
def test_autocast(explainer):
    """Passes in bfloat16: near the map of float32, as far as bfloat16's eight bits go. (The differences of scores that
    surrogates are fitted to drown in them.)"""
    subject = host(explainer)
    model, images = prepare(subject)
    expected = maker(explainer, subject)(copy.deepcopy(model)).attribute(images, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = maker(explainer, subject)(model).attribute(images, 0)
    assert maps.dtype == torch.float32
    alike = torch.nn.functional.cosine_similarity(maps.flatten(1), expected.flatten(1))
    assert float(alike.min()) > 0.9


def test_intrinsic_refuses_a_model_that_does_not_explain_itself():
    with pytest.raises(ValueError, match="needs a model with explain"):
        EXPLAINERS.build("intrinsic", model=bare())


class Good(Explainer):
    """The absolute gradient, done right."""

    def _attribute(self, inputs, target):
        x = inputs.clone().requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(x)
            logits = logits if isinstance(logits, torch.Tensor) else logits.logits
            from interp_models.core.scoring import resolve_target

            score = logits.gather(1, resolve_target(target, logits)[:, None]).sum()
        return torch.autograd.grad(score, x)[0].abs().sum(1)


class BatchNormalised(Good):
    def _attribute(self, inputs, target):
        maps = super()._attribute(inputs, target)
        return maps / maps.max()


class Backward(Good):
    def _attribute(self, inputs, target):
        x = inputs.clone().requires_grad_(True)
        with torch.enable_grad():
            self.model(x).max(1).values.sum().backward()
        return x.grad.abs().sum(1)


class LeavesHook(Good):
    def _attribute(self, inputs, target):
        self.model[0].register_forward_hook(lambda *_: None)
        return super()._attribute(inputs, target)


class LeavesHookOnError(Good):
    def _attribute(self, inputs, target):
        handle = self.model[0].register_forward_hook(lambda *_: None)
        maps = super()._attribute(inputs, target)
        handle.remove()
        return maps


class Unseeded(Good):
    def _attribute(self, inputs, target):
        return super()._attribute(inputs + 0.1 * torch.randn_like(inputs), target)


class TrainsOnTheQuiet(Good):
    def _attribute(self, inputs, target):
        self.model.train()
        return super()._attribute(inputs, target)


class IgnoresTarget(Good):
    def _attribute(self, inputs, target):
        return super()._attribute(inputs, None)


WRONG = {
    BatchNormalised: contract.check_output,
    Unseeded: contract.check_output,
    Backward: contract.check_leaves_no_trace,
    LeavesHook: contract.check_leaves_no_trace,
    LeavesHookOnError: contract.check_leaves_no_trace,
    TrainsOnTheQuiet: contract.check_leaves_no_trace,
}


@pytest.mark.parametrize("check", contract.CHECKS)
def test_a_right_explainer_passes(check):
    check(Good, *prepare("sequential"))


@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_wrong_explainers_are_rejected(wrong):
    with pytest.raises(AssertionError):
        WRONG[wrong](wrong, *prepare("sequential"))


def test_an_explainer_that_ignores_the_target_is_rejected():
    contract.check_target(Good, *prepare("sequential"), uses_target=True)
    with pytest.raises(AssertionError):
        contract.check_target(IgnoresTarget, *prepare("sequential"), uses_target=True)
