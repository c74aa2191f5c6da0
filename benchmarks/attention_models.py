"""Time of heads of attention models, and of the class token's attention.

Heads of BR-NPA, DP-Net, WS-DAN and CAL ÷ the backbone's training step, as in `bap`. A ViT-S/16 with its class token's
attention ÷ without.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks.bap import timing
from benchmarks.harness import CLOCKS, Bench, Row, Timing, load_images, parse, parser, write
from benchmarks.tables import show
from interp_models.models.br_npa import BRNPA
from interp_models.models.cal import CAL
from interp_models.models.dpnet import DPNet
from interp_models.models.wsdan import WSDAN
from interp_models.nn.attention import attentions, class_rows

EIGHT: dict[str, Any] = {"n_maps": 8, "crop_drop": False}


def heads(images: Tensor, classes: int, args: Any) -> list[Row]:
    """Every head at the network's own stride; BR-NPA also at a stride of 8."""
    rows: list[Row] = []
    for what, cls, options in (
        ("BR-NPA", BRNPA, {}),
        ("BR-NPA, stride 8", BRNPA, {"output_stride": 8}),
        ("DP-Net, all constraints", DPNet, {"complementary": 1.0, "covering": 0.1, "specific": 0.1}),
        ("B-CNN, normalised, centres, 8 maps", WSDAN, EIGHT),
        ("B-CNN, counterfactual too", CAL, EIGHT),
    ):
        model = cls(classes, weights="bundled", **options)
        rows += timing(what, model, images, args.pairs, args.seconds, args.clock)
    return rows


def capture(images: Tensor, args: Any) -> Timing:
    """A pass of a ViT-S/16 that records the class token's attention ÷ a pass that does not."""
    size = (images.shape[2], images.shape[3])
    vit: Any = timm.create_model("vit_small_patch16_224", img_size=size).eval()

    def captured() -> None:
        with torch.no_grad(), class_rows(attentions(vit)[-1]):
            for part in images.split(bench.batch):
                vit(part)

    bench = Bench(vit, images, args.pairs, args.seconds, CLOCKS[args.clock], (4, 8, 16))
    return bench.compare("ViT-S/16 with the class token's attention", "passes without", captured)


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__)
    p.add_argument("--classes", type=int, default=200, help="classes of the heads")
    p.set_defaults(count=16)
    args = parse(p, "attention_models", argv)
    images, described = load_images(args)
    rows = heads(images, args.classes, args)
    rows.append(capture(images, args))
    return write("attention_models", args, described, rows)


if __name__ == "__main__":
    print(show(main()))
