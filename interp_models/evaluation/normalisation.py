"""How images are normalised for a network from elsewhere."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.classifier import Classifier, Output
from interp_models.core.errors import InputError
from interp_models.core.prepared import class_name, unwrapped

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation per channel of ImageNet; most ImageNet models and timm's default use them."""


def classifier_of(model: nn.Module, normalize: Any, output: Output, *, from_files: bool) -> nn.Module:
    """Wrap the model so that it normalises its images and returns logits; see `judge` for the arguments.

    Returns:
        A `Classifier`, or the model itself if it needs neither.

    Raises:
        InputError: for a torchvision model with tensors and `normalize="auto"`: torchvision does not say how its models
            expect images to be normalised.
    """
    bare = unwrapped(model)
    if isinstance(bare, Classifier):
        if normalize != "auto" or output is not None:
            raise InputError("normalize and output are those of the Classifier; give them to it")
        return model
    family = type(bare).__module__.split(".")[0]
    of_timm = hasattr(bare, "pretrained_cfg") or hasattr(bare, "default_cfg")
    if normalize == "auto":
        if getattr(bare, "unit_images", False):
            normalize = None
        elif family == "torchvision" and not from_files:
            raise InputError(
                f"{class_name(bare)} of torchvision does not say how its images are normalised; pass images in [0, 1] "
                "and normalize='imagenet' or (mean, std), or normalize=None if the model does it itself"
            )
        elif not of_timm:
            normalize = "imagenet" if from_files and not _normalises(bare) else None
            if normalize and family != "torchvision":
                warnings.warn(
                    f"{class_name(bare)} does not say how its images are normalised: ImageNet's mean and standard "
                    "deviation are taken; normalize='imagenet', (mean, std) or None says what is right",
                    stacklevel=3,
                )
    mean, std = statistics(normalize, data_config(model) if normalize == "auto" else {})
    if mean is None and output is None and not isinstance(bare, torch.jit.ScriptModule):  # which take no hooks
        return model
    wrapped = Classifier(bare, mean=mean, std=std, output=output).to(device_of(model))
    wrapped.training = model.training  # `train` would change the modes of the model's own modules
    return wrapped


def _normalises(network: nn.Module) -> bool:
    """Whether the first part of a network is a `Normalize`, as of torchvision's transforms."""
    parts = (part for part in network.modules() if not list(part.children()))
    first = next(parts, network)
    return type(first).__name__ == "Normalize" and hasattr(first, "mean") and hasattr(first, "std")


def data_config(network: nn.Module) -> dict[str, Any]:
    """timm's data config of a network; missing entries get timm's defaults."""
    from timm.data.config import resolve_model_data_config

    found = dict(resolve_model_data_config(unwrapped(network)))  # type: ignore[no-untyped-call]
    if found["crop_mode"] not in ("center", "squash"):
        raise InputError(f"crop_mode {found['crop_mode']!r} of timm's data config is not supported")
    return found


def statistics(normalize: Any, about: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]] | tuple[None, None]:
    """Resolve `normalize` to mean and standard deviation per channel; (None, None) means no normalisation.

    Args:
        normalize: `auto`, `imagenet`, `none`, None, or a pair of sequences of numbers.
        about: timm's data config, used for `auto`.

    Raises:
        InputError: for any other value.
    """
    if normalize in (None, "none"):
        return None, None
    if normalize == "auto":
        return about["mean"], about["std"]
    if normalize == "imagenet":
        return IMAGENET
    try:
        mean, std = ([float(value) for value in part] for part in normalize)
    except (TypeError, ValueError):
        raise InputError(f"normalize must be auto, imagenet, none or [mean, std]; got {normalize!r}") from None
    if len(mean) != len(std):
        raise InputError(f"normalize: mean and std must be of the same length; got {normalize!r}")
    return mean, std


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's weights; the CPU if it has none."""
    tensor: Tensor | None = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device
