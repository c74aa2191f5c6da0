"""ResNets for small images, as timm models."""

from typing import Any, cast

from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from interp_models.core.errors import InputError


@register_model
def resnet18_small(pretrained: bool = False, **options: Any) -> ResNet:
    """ResNet-18 for images of 32 or 64 pixels, as usual for CIFAR-10: the first convolution is 3 × 3 with stride 1, and
    there is no pooling behind it, so that a cell of the last map has 8 pixels.

    Args:
        pretrained: there are no weights.
        options: those of timm's `ResNet`.

    Raises:
        InputError: for pretrained weights.
    """
    if pretrained:
        raise InputError("there are no weights of resnet18_small; model.weights=null starts from random ones")
    for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(unused, None)
    options["output_stride"] = 4 * options.get("output_stride", 8)  # of the usual stem
    model: Any = ResNet(block=BasicBlock, layers=(2, 2, 2, 2), **options)  # type: ignore[arg-type]
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    model.pretrained_cfg = model.default_cfg = {
        "input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1", "classifier": "fc",
    }  # fmt: skip
    return cast(ResNet, model)
