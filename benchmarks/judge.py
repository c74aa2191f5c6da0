"""Values and time of `judge` beside captum, pytorch-grad-cam and saliency-maps-metrics.

Both explain and score the same images with EfficientNet-Lite0 and ImageNet weights: Grad-CAM, HiResCAM and LayerCAM
(pytorch-grad-cam), integrated gradients and occlusion (captum), with the preset `saliency-maps-metrics` on 7 × 7 cells.
The peers' metrics get one image at a time, because their values are wrong for batches. `judge` runs with all its
checks, tables and intervals. Runs of both take turns. The results are the median and the quartiles of the ratios
ours ÷ theirs, and the largest differences of values. Two causes of differences lie outside the metrics: the protocol
leaves the order of tied cells open (a ReLU makes zeros), and integrated gradients amplifies the rounding of float32. So
the differences are also given without such maps, and the maps of integrated gradients are compared in float64.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Value, imagenet_network, load_images, parse, parser, summary, write
from benchmarks.tables import show
from interp_models import EXPLAINERS as REGISTERED
from interp_models import Judgement, judge

GRID, STEPS, WINDOW, STRIDE = 7, 8, 64, 32
EXPLAINERS: list[Any] = [
    "gradcam",
    "hirescam",
    "layercam",
    {"name": "integrated_gradients", "steps": STEPS, "quadrature": "riemann", "baseline": 0.0},
    {"name": "occlusion", "window": WINDOW, "stride": STRIDE, "fill": 0.0, "score": "logit"},
]
METRICS = ("ad", "iic", "add", "dauc", "dc", "iauc", "ic")
NAMES = {"hirescam": "HiResCAM", "gradcam": "GradCAM", "layercam": "LayerCAM"}
"""Our names, and the names of the classes of pytorch-grad-cam."""
Values = dict[tuple[str, str], list[float]]
"""Values of all images by explainer and metric."""


def ours(model: nn.Module, images: Tensor) -> Judgement:
    """The work, done by `judge`."""
    return judge(
        model, images, EXPLAINERS, METRICS, preset="saliency-maps-metrics", grid=(GRID, GRID), batch_size=len(images),
        progress=False,
    )  # fmt: skip


def theirs(model: nn.Module, layer: nn.Module, images: Tensor) -> Values:
    """The same work, done by the peers."""
    squashed = nn.Sequential(model, nn.Softmax(dim=1)).eval()
    with torch.no_grad():
        target = model(images).argmax(dim=1)
    found: Values = {}
    for explainer in EXPLAINERS:
        name = explainer if isinstance(explainer, str) else explainer["name"]
        maps = explained(name, model, layer, images, target)
        for i, image in enumerate(images):
            for key, value in scored(squashed, image, maps[i], int(target[i])).items():
                found.setdefault((name, key), []).append(value)
    return found


def explained(name: str, model: nn.Module, layer: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """The peers' maps, on the layer's grid; maps of pixels are averaged to it."""
    from captum.attr import IntegratedGradients, Occlusion

    if name in NAMES:
        return class_activation(NAMES[name], model, layer, images, target)
    if name == "integrated_gradients":
        found = IntegratedGradients(model).attribute(images, 0.0, target, n_steps=STEPS, method="riemann_right")
        maps = found.sum(dim=1).detach()
    else:
        window, stride = (3, WINDOW, WINDOW), (3, STRIDE, STRIDE)
        with torch.no_grad():
            maps = Occlusion(model).attribute(images, window, stride, baselines=0.0, target=target)[:, 0]
    return F.adaptive_avg_pool2d(maps.float()[:, None], GRID)[:, 0]


def class_activation(name: str, model: nn.Module, layer: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """pytorch-grad-cam's map, before it is resized to the image and scaled to [0, 1]."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(int(c)) for c in target]
    with getattr(pytorch_grad_cam, name)(model, [layer]) as method:
        outputs = method.activations_and_grads(images)
        model.zero_grad()
        torch.stack([one(output) for one, output in zip(targets, outputs, strict=True)]).sum().backward()
        a = method.activations_and_grads.activations[0].numpy()
        g = method.activations_and_grads.gradients[0].numpy()
        found = method.get_cam_image(images, layer, targets, a, g, False)
    signed = torch.as_tensor(np.asarray(found))
    return signed if name == "HiResCAM" else signed.relu()  # as in the papers: HiResCAM keeps its sign


def scored(model: nn.Module, image: Tensor, saliency: Tensor, label: int) -> dict[str, float]:
    """The values of saliency-maps-metrics on one image."""
    from saliency_maps_metrics.multi_step_metrics import Deletion, Insertion
    from saliency_maps_metrics.single_step_metrics import ADD, IIC_AD

    if not hasattr(np, "trapz"):  # the package uses a name that NumPy 2.4 has removed
        np.trapz = np.trapezoid  # type: ignore[attr-defined]  # noqa: NPY201
    values: dict[str, float] = {}
    with torch.no_grad():
        for metric in (Deletion(), Insertion(), IIC_AD(), ADD()):
            found = metric(model, image[None], saliency[None, None], torch.tensor([label]))
            values |= {key.lower(): float(value) for key, value in found.items()}
    return values


def apart(judgement: Judgement, values: Values, *, plain: bool) -> dict[str, float]:
    """By metric, the largest difference of two values of an image.

    It is taken over all explainers and images; with `plain`, only over maps without tied cells, and not of integrated
    gradients.
    """
    table = judgement.per_image.set_index(["explainer", "metric"]).sort_index()
    found: dict[str, float] = {}
    for (explainer, metric), expected in values.items():
        if metric not in METRICS or (plain and explainer == "integrated_gradients"):
            continue
        own = table.loc[(explainer, metric)].sort_values("index")["value"].to_numpy()
        both = np.abs(own - np.asarray(expected))
        if plain:
            both = both[[not tied(saliency) for saliency in judgement.maps[explainer]]]
        found[metric] = max(found.get(metric, 0.0), float(np.nanmax(both, initial=0.0)))
    return found


def tied(saliency: np.ndarray[Any, Any]) -> bool:
    """Whether two cells of a map have the same value, on the grid of the metrics."""
    cells = F.adaptive_avg_pool2d(torch.as_tensor(np.array(saliency))[None, None], GRID)
    return len(cells.unique()) < GRID**2


def apart_in_float64(model: nn.Module, layer: nn.Module, images: Tensor) -> float:
    """The largest difference of the maps of integrated gradients in float64, relative to the largest value."""
    (options,) = (dict(e) for e in EXPLAINERS if not isinstance(e, str) and e["name"] == "integrated_gradients")
    name, double, inputs = options.pop("name"), copy.deepcopy(model).double(), images.double()
    with torch.no_grad():
        target = double(inputs).argmax(dim=1)
    own = REGISTERED.build(name, options, model=double).attribute(inputs, target)
    peers = explained(name, double, layer, inputs, target)
    return float((F.adaptive_avg_pool2d(own[:, None], GRID)[:, 0] - peers).abs().max() / peers.abs().max())


def run(args: argparse.Namespace) -> list[Value]:
    """All rows."""
    images, args.described = load_images(args)
    model = imagenet_network()
    layer = model[1].bn2
    with torch.no_grad():
        assert (
            layer(model[1].conv_head(model[1].blocks(model[1].bn1(model[1].conv_stem(images[:1]))))).shape[-1] == GRID
        )
    judgement, values = ours(model, images), theirs(model, layer, images)
    rows = []
    for plain, which in ((False, ""), (True, ", without ties and integrated gradients")):
        found = apart(judgement, values, plain=plain)
        rows += [Value(f"largest difference, {key}{which}", value, "") for key, value in found.items()]
    found_64 = apart_in_float64(model, layer, images)
    rows.append(Value("largest relative difference of maps, integrated gradients in float64", found_64, ""))
    pairs = []
    works: tuple[Callable[[], object], ...] = (lambda: ours(model, images), lambda: theirs(model, layer, images))
    for number in range(args.pairs):
        seconds = []
        for work in works:
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        pairs.append((seconds[0], seconds[1]))
        print(f"pair {number + 1} of {args.pairs}: {seconds[0]:.1f} s and {seconds[1]:.1f} s", flush=True)
    ratio = summary(pairs)
    for what, value in (("median", ratio.median), ("first quartile", ratio.q1), ("third quartile", ratio.q3)):
        rows.append(Value(f"time ours ÷ theirs, {what}", value, ""))
    rows.append(Value("time of judge, median", float(np.median([a for a, _ in pairs])), "s"))
    rows.append(Value("time of the peers, median", float(np.median([b for _, b in pairs])), "s"))
    return rows


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    args = parse(parser(__doc__), "judge", argv)
    rows = run(args)
    return write("judge", args, args.described, rows)


if __name__ == "__main__":
    print(show(main()))
