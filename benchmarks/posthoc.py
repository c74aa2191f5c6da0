"""Time of post-hoc explainers on timm's EfficientNet-Lite0 with ImageNet weights ÷ the passes that they need.

Methods of many passes are measured with the model as it is (`plain`) and with its prepared copy (`prepared`). Both are
divided by passes of the model as it is, in float32. captum, grad-cam and torchcam run on the same images if they are
installed. For methods that need gradients of the images, the passes of the floor compute these gradients too.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    CLOCKS,
    Bench,
    Memory,
    Row,
    Timing,
    Work,
    imagenet_network,
    load_images,
    parse,
    parser,
    peak_memory,
    write,
)
from benchmarks.tables import show
from interp_models.core.prepared import Prepared
from interp_models.explainers import EXPLAINERS
from interp_models.explainers.base import Explainer
from interp_models.explainers.features import shared_passes
from interp_models.explainers.layers import target_layer

FAMILY = (
    "activation_map", "cam", "gradcam", "gradcam_pp", "hirescam", "xgradcam", "layercam", "eigencam", "guidancecam",
    "ablationcam", "liftcam",
)  # fmt: skip
"""Class activation maps that one pass serves together, on networks that end in a pool and a linear layer."""
LAST, NARROW = "1.bn2", "1.blocks.6"
"""Layers of the network: the default target layer with 1280 channels, and a layer with 320."""


@dataclass(frozen=True)
class Case:
    """A method with its options and the images that it is measured on."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    """Number of images; None is all."""
    passes: int | None = None
    """Passes per image of the floor; None counts those of the method. Images of another size count by their area."""
    gradient: bool = False
    many: bool = False


def cases(scale: int) -> list[Case]:
    """All methods; those of many passes make about 100 · scale passes."""
    n = 100 * scale
    few = max(2, n // 25)
    return [
        *(Case(name) for name in FAMILY),
        *(Case(name) for name in ("fem", "mlfem", "finercam", "relevancecam")),
        *(Case(name, gradient=True) for name in ("gradient", "grad_x_input", "deconvnet", "guided_backprop")),
        *(Case(name, gradient=True) for name in ("fullgrad", "deeplift", "lrp")),
        Case("cameras", {}, 1, passes=61),
        Case("rise", {"masks": n}, 1, many=True),
        Case("occlusion", {}, 1, many=True),
        Case("lime", {"samples": n}, 1, many=True),
        Case("kernelshap", {"samples": n}, 1, many=True),
        Case("scorecam", {"layer": NARROW}, 1, many=True),
        Case("sise", {"threshold": 0.8}, 1, many=True),
        Case("ada_sise", {}, 1, many=True),
        Case("sobol", {"designs": 2 * scale}, 1, many=True),
        Case("hsic", {"samples": n}, 1, many=True),
        Case("prediction_difference", {"stride": 16, "samples": 2}, 1, many=True),
        Case("integrated_gradcam", {"steps": few * 3}, 4, many=True),
        Case("opticam", {"steps": few}, 4, gradient=True, many=True),
        Case("integrated_gradients", {"steps": few * 3}, 4, gradient=True, many=True),
        *(Case(name, {}, 4, gradient=True, many=True) for name in ("smoothgrad", "vargrad")),
        Case("smooth_fullgrad", {"samples": few * 3}, 4, gradient=True, many=True),
        Case("gradientshap", {"samples": few * 3}, 4, gradient=True, many=True),
        Case("extremal_perturbation", {"steps": few * 6}, 1, gradient=True, many=True),
        Case("smoothed_guided_backprop", {}, 4, gradient=True, many=True),
        Case("integrated_guided_backprop", {"steps": few * 3}, 4, gradient=True, many=True),
        Case("smoothed_integrated_gradients", {"samples": 3, "steps": few}, 4, gradient=True, many=True),
        Case("integrated_smoothgrad", {"samples": 3, "steps": few}, 4, gradient=True, many=True),
    ]


class Benches:
    """Benches by number of images and kind of pass."""

    def __init__(self, model: nn.Module, images: Tensor, pairs: int, seconds: float, clock: str) -> None:
        self.model, self.images, self.settings = model, images, (pairs, seconds, CLOCKS[clock])
        self.made: dict[bool, Bench] = {}

    def of(self, count: int | None, gradient: bool) -> Bench:
        """A bench; the best batch size of the floor is found once for each kind of pass."""
        if gradient not in self.made:
            self.made[gradient] = Bench(self.model, self.images, *self.settings, (2, 4, 8, 16), gradient)
        bench = replace(self.made[gradient], sizes=(self.made[gradient].batch,))
        bench.images = self.images[:count]
        return bench


def timings(benches: Benches, scale: int, methods: Sequence[str]) -> list[Timing]:
    """One row per method, two for methods of many passes, and one for all class activation maps."""
    rows = []
    layer = target_layer(benches.model, None, benches.images)  # warm-up: it is found once
    assert layer.module is benches.model.get_submodule(LAST)
    for case in cases(scale):
        if methods and case.name not in methods:
            continue
        bench = benches.of(case.count, case.gradient)
        target = torch.zeros(len(bench.images), dtype=torch.long)
        explainer: Explainer = EXPLAINERS.build(case.name, case.options, model=bench.model)
        explainer.preparation = "none"
        explainer.attribute(bench.images[:1], target[:1])  # warm-up: layers are found once
        work = partial(explainer.attribute, bench.images, target)
        what = ", ".join([case.name, *(f"{key} {value}" for key, value in case.options.items() if key != "layer")])
        floor = "passes there and back" if case.gradient else "passes"
        fixed = None if case.passes is None else case.passes * len(bench.images)
        row = bench.compare(f"{what}, plain" if case.many else what, floor, work, fixed)
        rows.append(row)
        if case.many:
            explainer.preparation = "exact"
            assert isinstance(explainer.prepared(bench.images), Prepared)
            prepared = bench.compare(f"{what}, prepared", floor, work, round(row.passes * len(bench.images)))
            rows.append(replace(prepared, passes=row.passes, flops=None))  # torch counts no FLOPs of fused kernels
    return rows


def family(benches: Benches) -> Timing:
    """All class activation maps together ÷ one pass."""
    bench = benches.of(None, False)
    methods = [EXPLAINERS.build(name, {}, model=bench.model) for name in FAMILY]
    target = torch.zeros(len(bench.images), dtype=torch.long)

    def together() -> None:
        with shared_passes():
            for method in methods:
                method.attribute(bench.images, target)

    return bench.compare(f"{len(FAMILY)} class activation maps together", "passes", together)


def captums(benches: Benches, scale: int) -> list[Timing]:
    """captum's methods, with the chunk sizes that are fastest."""
    from captum import attr

    n, model = 100 * scale, benches.model
    side, steps = benches.images.shape[-1], max(2, n // 25) * 3
    cells = torch.arange(side) * 7 // side
    grid = (cells[:, None] * 7 + cells).expand(1, 3, -1, -1)
    works: list[tuple[str, int | None, bool, Any]] = [
        ("captum Saliency", None, True, lambda x, t: attr.Saliency(model).attribute(x, t)),
        ("captum InputXGradient", None, True, lambda x, t: attr.InputXGradient(model).attribute(x, t)),
        ("captum GuidedBackprop", None, True, lambda x, t: attr.GuidedBackprop(model).attribute(x, t)),
        (
            f"captum IntegratedGradients, {steps} steps, internal_batch_size 4", 4, True,
            lambda x, t: attr.IntegratedGradients(model).attribute(x, target=t, n_steps=steps, internal_batch_size=4),
        ),
        (
            "captum SmoothGrad, 15 samples, nt_samples_batch_size 1", 4, True,
            lambda x, t: attr.NoiseTunnel(attr.Saliency(model)).attribute(
                x, nt_samples=15, nt_samples_batch_size=1, stdevs=0.15, target=t, abs=False
            ),
        ),
        (
            "captum Occlusion 32/16, perturbations_per_eval 4", 1, False,
            lambda x, t: attr.Occlusion(model).attribute(
                x, (3, 32, 32), (3, 16, 16), target=t, perturbations_per_eval=4
            ),
        ),
        (
            f"captum Lime, {n} samples, 7 × 7 grid, perturbations_per_eval 8", 1, False,
            lambda x, t: attr.Lime(model).attribute(
                x, target=t, feature_mask=grid, n_samples=n, perturbations_per_eval=8
            ),
        ),
        (
            f"captum KernelShap, {n} samples, 7 × 7 grid, perturbations_per_eval 8", 1, False,
            lambda x, t: attr.KernelShap(model).attribute(
                x, target=t, feature_mask=grid, n_samples=n, perturbations_per_eval=8
            ),
        ),
    ]  # fmt: skip
    rows = []
    for what, count, gradient, call in works:
        bench = benches.of(count, gradient)
        target = torch.zeros(len(bench.images), dtype=torch.long)
        floor = "passes there and back" if gradient else "passes"
        rows.append(bench.compare(what, floor, partial(_detached, call, bench.images, target)))
    return rows


def _detached(call: Any, images: Tensor, target: Tensor) -> None:
    call(images.clone(), target)


def grad_cams(benches: Benches) -> list[Timing]:
    """Methods of pytorch-grad-cam."""
    import pytorch_grad_cam as peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, rows = benches.model, []
    last, narrow = model.get_submodule(LAST), model.get_submodule(NARROW)
    for name, count, layer in (
        *((name, None, last) for name in ("GradCAM", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "EigenCAM")),
        ("ScoreCAM", 1, narrow),
        ("AblationCAM", 1, last),
    ):
        bench = benches.of(count, False)
        if name == "AblationCAM":  # takes a minute
            bench.pairs = 1
        targets = [ClassifierOutputTarget(0)] * len(bench.images)
        with getattr(peer, name)(model, [layer]) as method:
            what = f"grad-cam {name}" + (", one pair" if bench.pairs == 1 else "")
            rows.append(bench.compare(what, "passes", partial(method, bench.images, targets)))
    return rows


def torchcams(benches: Benches) -> list[Timing]:
    """Methods of torchcam."""
    from torchcam import methods as peer

    model, rows = benches.model, []
    last, narrow = model.get_submodule(LAST), model.get_submodule(NARROW)
    for name, count, layer, options in (
        *((name, None, last, {}) for name in ("GradCAM", "XGradCAM", "LayerCAM")),
        ("ScoreCAM", 1, narrow, {"batch_size": 8}),
    ):
        bench = benches.of(count, False)
        with getattr(peer, name)(model, layer, **options) as method:
            work = partial(_torchcam, model, method, bench.images)
            rows.append(bench.compare(f"torchcam {name}", "passes", work))
    return rows


def _torchcam(model: nn.Module, method: Any, images: Tensor) -> None:
    method([0] * len(images), model(images))


def wide_model(channels: int) -> nn.Module:
    """A network with so many channels on 7 × 7 cells, to measure memory."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 32, stride=32),
        nn.ReLU(),
        nn.Conv2d(8, channels, 1),  # few weights: a prepared copy copies them
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    ).eval()


SIZES = {
    "rise": "masks",
    "scorecam": "",
    "integrated_gradients": "steps",
    "smoothgrad": "samples",
    "integrated_gradcam": "steps",
    "gradientshap": "samples",
    "sobol": "designs",
    "hsic": "samples",
    "extremal_perturbation": "steps",
    "sise": "",
}
"""Methods whose memory is measured, and the option that sets their passes; without one they are as many as channels."""


def work_of_size(name: str, amount: int) -> Work:
    """A method with so many passes, of two images."""
    torch.manual_seed(0)
    key = SIZES[name]
    options = {key: amount} if key else {}
    explainer: Explainer = EXPLAINERS.build(name, options, model=wide_model(8 if key else amount))
    return partial(explainer.attribute, torch.rand(2, 3, 224, 224), torch.zeros(2, dtype=torch.long))


def memories(methods: Sequence[str], amounts: Sequence[int]) -> list[Memory]:
    """Peak memory of methods, of all without a choice."""
    chosen = [name for name in SIZES if name in methods or not methods]
    return [
        Memory(name, f"{n} {SIZES[name] or 'channels'}", peak_memory(work_of_size, name, n))
        for name in chosen
        for n in amounts
    ]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__, memory=(100, 1000, 8000))
    p.add_argument(
        "--scale", type=int, default=1, help="methods of many passes make about 100 times this number of passes"
    )
    p.add_argument("--methods", nargs="+", default=[], help="measure only these explainers, without peers")
    p.add_argument("--name", default="posthoc", help="name of the results")
    args = parse(p, "posthoc", argv)
    warnings.filterwarnings("ignore", module="captum")  # it warns at every call
    images, described = load_images(args)
    benches = Benches(imagenet_network(), images, args.pairs, args.seconds, args.clock)
    rows: list[Row] = [*timings(benches, args.scale, args.methods)]
    if args.methods:
        rows += memories(args.methods, args.memory)
        return write(args.name, args, described, [*rows, *benches.of(None, False).values()])
    rows.append(family(benches))
    write(args.name, args, described, rows)  # in case the peers fail
    peers = {"captum": partial(captums, benches, args.scale), "pytorch_grad_cam": partial(grad_cams, benches)}
    for module, measure in (peers | {"torchcam": partial(torchcams, benches)}).items():
        if importlib.util.find_spec(module):
            rows += measure()
            write(args.name, args, described, rows)
    rows += memories((), args.memory)
    return write(args.name, args, described, [*rows, *benches.of(None, False).values()])


if __name__ == "__main__":
    print(show(main()))
