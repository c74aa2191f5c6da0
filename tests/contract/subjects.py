"""Networks that explainers are tried on, with what each offers: ours, and anybody's."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn

from interp_models import EXPLAINERS, MODELS
from interp_models.core.traits import Trait
from interp_models.core.truth import Truth
from tests.conftest import tiny_options


class Subject(NamedTuple):
    """A network."""

    make: Callable[[], nn.Module]
    """Makes it, with 4 classes, for images of 64 pixels."""
    offers: tuple[Trait, ...]
    """As of `InterpModule`; here with `relu` where its activations are."""
    head: str
    """What the table calls it."""


def bare() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4),
    )  # fmt: skip


def resnet() -> nn.Module:
    return torchvision.models.resnet18(weights=None, num_classes=4)


def vgg() -> nn.Module:
    """Its classifier reads every cell of the last map."""
    features = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(4)]
    features += [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 4)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(7), *classifier)


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=4, img_size=64)


def ours(name: str) -> nn.Module:
    options = tiny_options(name)
    if "dropout" in inspect.signature(MODELS.get(name)).parameters:  # what must not act in an explanation
        options["dropout"] = 0.5
    model = MODELS.build(name, options, num_classes=4)
    with torch.no_grad():  # as after some steps: before them a tree gives all classes the same
        output = model.eval()(torch.rand(4, 3, 64, 64))
        for _ in range(40):
            model.observe(output, torch.arange(4))
    return model.train()


SUBJECTS: dict[str, Subject] = {
    **{
        name: Subject(lambda name=name: ours(name), MODELS.get(name).offers, f"`{name}`")  # type: ignore[misc]
        for name in MODELS.names()
    },
    "resnet18": Subject(
        resnet,
        ("any_size", "mean_and_linear", "piecewise_linear", "plain_cnn", "relu", "rescale", "rescale_tail", "rules"),
        "ResNet",
    ),
    "vgg": Subject(
        vgg, ("any_size", "piecewise_linear", "plain_cnn", "relu", "rescale", "rescale_tail", "rules"), "VGG"
    ),
    "vit": Subject(vit, ("any_size", "attention", "rescale", "rules"), "ViT (timm)"),
    "sequential": Subject(
        bare,
        ("any_size", "mean_and_linear", "piecewise_linear", "plain_cnn", "relu", "rescale", "rescale_tail", "rules"),
        "Sequential",
    ),
}


def applies(explainer: str, subject: str) -> bool:
    """Whether a network offers what an explainer needs, as both say."""
    return set(EXPLAINERS.get(explainer).needs) <= set(SUBJECTS[subject].offers)


def host(explainer: str) -> str:
    """What it applies to, as simple as can be."""
    first: Iterable[str] = ("sequential", "cnn", "vit")
    return next(subject for subject in (*first, *SUBJECTS) if applies(explainer, subject))


def prepare(subject: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode, and three images."""
    torch.manual_seed(1)
    model = SUBJECTS[subject].make()
    for module in model.modules():  # statistics as after some training, so that modes differ
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval(), torch.rand(3, 3, 64, 64)


SMALL_ON: dict[tuple[str, str], dict[str, Any]] = {("scorecam", "resnet18"): {"layer": "layer1"}}
"""64 channels instead of 512."""


def options(explainer: str, subject: str) -> dict[str, Any]:
    """Options that make an explainer fast enough for a test."""
    return SMALL_ON.get((explainer, subject), dict(EXPLAINERS.get(explainer).small))


class Shown:
    """An explainer that is given the same box of every image."""

    def __init__(self, explainer: Any) -> None:
        self.explainer = explainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.explainer, name)

    def attribute(self, images: Tensor, target: Any = None) -> Tensor:
        return self.explainer.attribute(images, target, Truth(torch.tensor([[8.0, 16.0, 40.0, 30.0]] * len(images))))

    def __enter__(self) -> "Shown":
        self.explainer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.explainer.__exit__(*error)


def shown(explainer: Any) -> Any:
    """The explainer, with boxes where it is shown them."""
    return Shown(explainer) if explainer.shown else explainer


def maker(explainer: str, subject: str) -> Callable[[nn.Module], Any]:
    """Makes the explainer for a model."""
    return lambda model: shown(EXPLAINERS.build(explainer, options(explainer, subject), model=model))
