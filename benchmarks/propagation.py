"""Time of propagation rules ÷ passes there and back, and the same methods of captum, zennit and grad-cam.

A pass there and back is a forward pass and the gradient of a logit with respect to the images. Convolutional networks
are measured with torchvision's VGG-11, which all peers can read, and transformers with timm's ViT-S/16. Weights are
random: times do not depend on them. zennit and grad-cam are left out if they are not installed.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.harness import CLOCKS, Bench, Memory, Row, Timing, Work, load_images, parse, parser, peak_memory, write
from benchmarks.tables import show
from interp_models.explainers import EXPLAINERS
from interp_models.explainers.base import Explainer

FLOOR = "passes there and back"
OF_CNNS: list[tuple[str, dict[str, Any]]] = [
    ("guided_backprop", {}),
    ("excitation_backprop", {}),
    ("relevancecam", {}),
    ("deeplift", {}),
    ("fullgrad", {}),
    ("cnn_fixations", {}),
    *(
        ("lrp", {"composite": composite})
        for composite in (
            "epsilon", "epsilon_plus", "epsilon_gamma_box", "epsilon_alpha2_beta1", "epsilon_plus_flat",
        )
    ),
]  # fmt: skip
OF_TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("legrad", {}),
    ("transformer_attribution", {}),
    ("deeplift", {}),
    ("lrp", {"composite": "epsilon"}),
]


def timings(bench: Bench, network: str, methods: Sequence[tuple[str, dict[str, Any]]]) -> list[Timing]:
    """One row per method."""
    rows = []
    target = torch.zeros(len(bench.images), dtype=torch.long)
    for name, options in methods:
        explainer: Explainer = EXPLAINERS.build(name, options, model=bench.model)
        what = ", ".join([network, name, *map(str, options.values())])
        rows.append(bench.compare(what, FLOOR, partial(explainer.attribute, bench.images, target)))
    return rows


def captums(bench: Bench) -> list[Timing]:
    """captum's methods on VGG-11."""
    from captum import attr

    works = {
        "captum GuidedBackprop": lambda x: attr.GuidedBackprop(bench.model).attribute(x, target=0),
        "captum DeepLift": lambda x: attr.DeepLift(bench.model).attribute(x, target=0),
        "captum LRP, its default rules": lambda x: attr.LRP(bench.model).attribute(x, target=0),
    }
    return [_compared(bench, what, call) for what, call in works.items()]


def _compared(bench: Bench, what: str, call: Any) -> Timing:
    return bench.compare(f"VGG-11, {what}", FLOOR, lambda: call(bench.images.clone().requires_grad_()))


def zennits(bench: Bench) -> list[Timing]:
    """zennit's composites on VGG-11."""
    from zennit import attribution, composites

    named = {
        "ExcitationBackprop": composites.ExcitationBackprop(),
        "EpsilonPlus": composites.EpsilonPlus(),
        "EpsilonGammaBox": composites.EpsilonGammaBox(low=0.0, high=1.0),
        "EpsilonAlpha2Beta1": composites.EpsilonAlpha2Beta1(),
        "EpsilonPlusFlat": composites.EpsilonPlusFlat(),
    }
    rows = []
    chosen = torch.eye(1000)[[0] * len(bench.images)]
    for name, composite in named.items():

        def attributed(images: Tensor, composite: Any = composite) -> None:
            with attribution.Gradient(bench.model, composite) as attributor:
                attributor(images, chosen)

        rows.append(_compared(bench, f"zennit {name}", attributed))
    return rows


def grad_cams(bench: Bench) -> list[Timing]:
    """Methods of pytorch-grad-cam on VGG-11."""
    from pytorch_grad_cam import FullGrad
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(0)] * len(bench.images)
    with FullGrad(bench.model, []) as method:
        return [_compared(bench, "grad-cam FullGrad", partial(method, targets=targets))]


def vgg() -> nn.Module:
    """VGG-11 whose activations do not work in place, which hooks of captum and zennit do not allow."""
    network = models.vgg11(weights=None).eval()
    for part in network.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    return network


def work_of_depth(name: str, options: dict[str, Any], depth: int) -> Work:
    """A method on a network with so many convolutions."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 8, stride=4), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]  # it keeps the signal through all layers
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    explainer: Explainer = EXPLAINERS.build(name, options, model=network)
    return partial(explainer.attribute, torch.rand(4, 3, 224, 224), 0)


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__, memory=(8, 32))
    args = parse(p, "propagation", argv)
    warnings.filterwarnings("ignore", module="captum")  # it warns at every call
    images, described = load_images(args)
    settings = (args.pairs, args.seconds, CLOCKS[args.clock], (1, 2, 4), True)
    cnn = Bench(vgg(), images, *settings)
    rows: list[Row] = [*timings(cnn, "VGG-11", OF_CNNS), *captums(cnn)]
    for module, measure in {"zennit": zennits, "pytorch_grad_cam": grad_cams}.items():
        if importlib.util.find_spec(module):
            rows += measure(cnn)
    vit = Bench(timm.create_model("vit_small_patch16_224"), images, *settings)
    rows += timings(vit, "ViT-S/16", OF_TRANSFORMERS)
    for name, options in (("gradient", {}), ("deeplift", {}), ("lrp", {}), ("fullgrad", {})):
        rows += [
            Memory(name, f"{depth} convolutions", peak_memory(work_of_depth, name, options, depth))
            for depth in args.memory
        ]
    return write("propagation", args, described, [*rows, *cnn.values(" of VGG-11"), *vit.values(" of ViT-S/16")])


if __name__ == "__main__":
    print(show(main()))
