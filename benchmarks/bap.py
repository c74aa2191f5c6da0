"""Time of a training step of B-CNN's head ÷ a training step of the backbone.

The head starts from given features: attention, pooling, classifier and loss, then backward to its parameters and to the
features. The floor is a forward pass of the backbone on the images and its backward pass from a given gradient.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    CLOCKS,
    Timing,
    Value,
    Work,
    flops,
    interleaved,
    load_images,
    parse,
    parser,
    repeated,
    summary,
    write,
)
from benchmarks.tables import show
from interp_models.models.bcnn import BCNN
from interp_models.training.module import InterpModule


class Given(nn.Module):
    """Replaces a backbone: returns given features for any images."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features
        self.channels = features.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """The features, for any images."""
        return self.features


def steps(model: InterpModule, images: Tensor) -> tuple[Work, Work]:
    """The head's part and the backbone's part of a training step. Replaces the model's backbone by `Given`."""
    model.train()
    backbone: nn.Module = model.get_submodule("backbone")
    targets = torch.arange(len(images)) % model.num_classes
    features = backbone(images).detach().requires_grad_()
    gradient = torch.randn_like(features) / features[0].numel()
    del model.backbone
    model.backbone = Given(features)

    def head() -> None:
        features.grad = None
        model.zero_grad()
        output = model(images)
        torch.autograd.backward(list(model.loss(output, targets).values()))
        with torch.no_grad():
            model.observe(output, targets)

    def trunk() -> None:
        backbone.zero_grad()
        torch.autograd.backward(backbone(images), gradient)

    return head, trunk


def timing(
    name: str, model: InterpModule, images: Tensor, pairs: int, seconds: float, clock: str
) -> list[Timing | Value]:
    """The ratio of head and backbone, and the milliseconds of each.

    The head is much shorter than the backbone, so it runs several times per measurement; its time is divided by their
    number.
    """
    head, trunk = steps(model, images)
    share = flops(head) / flops(trunk)
    ((head_s, trunk_s),) = interleaved(head, trunk, 1, CLOCKS[clock])
    repeats = max(1, round(trunk_s / head_s))
    rounds = max(1, round(seconds / trunk_s))
    measured = interleaved(repeated(head, repeats * rounds), repeated(trunk, rounds), pairs, CLOCKS[clock])
    both = [(a / repeats / rounds, b / rounds) for a, b in measured]
    what = f"{name}, {len(images)} images, {model.num_classes} classes"
    floor = "forward and backward of the backbone"
    unit = "ms per step"
    return [
        Timing(what, floor, None, share, summary(both), repeats * rounds, both),
        Value(name, 1e3 * sorted(a for a, _ in both)[pairs // 2], unit),
        Value("backbone", 1e3 * sorted(b for _, b in both)[pairs // 2], unit),
    ]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__)
    p.add_argument("--classes", type=int, default=200, help="classes of the classifier")
    p.set_defaults(count=16)
    args = parse(p, "bap", argv)
    images, described = load_images(args)
    model = BCNN(args.classes, weights="bundled")
    return write("bap", args, described, timing("BAP head", model, images, args.pairs, args.seconds, args.clock))


if __name__ == "__main__":
    print(show(main()))
