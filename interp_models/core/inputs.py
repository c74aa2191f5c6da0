"""Checks of images and scores that callers pass; the errors say what was expected.

This module imports only torch and errors, so that explainers and metrics work on any module that returns logits.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError, first_line

ROUNDING = 1e-3
"""Tolerance outside [0, 1], for rounding errors in pixels."""


CHANGED = ", or for a copy of it with a part changed; expected finite logits for all images in [0, 1], also a black one"
"""Ending of messages about scores that are not finite."""


def check_images(images: object, name: str = "inputs") -> None:
    """Raise `InputError` unless images are a float tensor (B, C, H, W) with at least one image.

    It reads no pixels, so it does not wait for the device.
    """
    hint = ""
    if isinstance(images, Tensor):
        if images.layout is not torch.strided or images.is_meta or images.is_nested:
            kind = f"of layout {images.layout}" if not images.is_nested else "of several sizes (nested)"
            kind = "on the device meta, without pixels" if images.is_meta else kind
            raise InputError(f"{name} must be a dense tensor with pixels; got one {kind}")
        if images.device.type == "mps":
            raise InputError(f"{name} are on an MPS device, which has no float64; move the model and them to the CPU")
        found = f"{images.dtype} {tuple(images.shape)}"
        channels_last = images.dim() == 4 and images.shape[3] == 3 and min(images.shape[1:3]) > 4
        if channels_last:
            hint = f"; channels come before rows: {name}.permute(0, 3, 1, 2)"
        elif images.dim() == 3:
            hint = f"; a single image needs an axis for the batch: {name}[None]"
        elif images.dtype == torch.uint8:
            hint = f"; pixels from 0 to 255 become values in [0, 1] by {name} / 255"
        if images.dim() == 4 and images.is_floating_point() and images.numel() and not channels_last:
            return
    else:
        found = " ".join(filter(None, [type(images).__name__, str(getattr(images, "shape", ""))]))
        hint = "; make a tensor: torch.from_numpy of an array, torch.stack of a list, a transform of a PIL image"
    raise InputError(f"{name} must be a tensor of float images (batch, channels, height, width); got {found}{hint}")


def pixel_range(images: Tensor, name: str = "inputs") -> tuple[float, float]:
    """The lowest and the highest pixel; it waits for the device once.

    Raises:
        InputError: for NaN and infinite pixels.
    """
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()  # far cheaper than isfinite of every pixel
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{name} hold NaN or infinite pixels")
    return low, high


def check_unit(found: tuple[float, float], why: str, name: str = "inputs") -> None:
    """Raise `InputError` unless the lowest and the highest pixel (`found`) are in [0, 1]; `why` explains it."""
    low, high = found
    if low < -ROUNDING or high > 1 + ROUNDING:
        hint = f"; divide by 255: {name} / 255" if low >= 0 and high > 16 else ""
        raise InputError(f"{name} must have pixels in [0, 1]; got {low:.3g} to {high:.3g}; {why}{hint}")


def check_images_for(model: nn.Module, images: Tensor, name: str = "inputs") -> None:
    """Raise `InputError` unless images are a float tensor (B, C, H, W) of finite pixels.

    Models that normalise images themselves (all of this package) also need 3 channels with pixels in [0, 1]. Other
    models may need any values.
    """
    check_images(images, name)
    lazy = next((part for part in model.modules() if _is_lazy(part)), None)
    if lazy is not None:
        raise InputError(
            f"{type(lazy).__name__} has no weights yet, and a pass would draw them: pass images through the model "
            "once, or load its weights"
        )
    found = pixel_range(images, name)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) else model
    if getattr(inner, "unit_images", False):
        channels = getattr(inner, "image_channels", 3)
        if images.shape[1] != channels:
            raise InputError(
                f"{name} must have {channels} channels (batch, {channels}, height, width); got {tuple(images.shape)}"
            )
        check_unit(found, "the model normalises images itself: leave Normalize out of your transform", name)


def _is_lazy(part: nn.Module) -> bool:
    """Whether weights of a module are made by its first pass."""
    tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    return any(map(nn.parameter.is_lazy, tensors))


@contextmanager
def fitting(model: nn.Module, images: Tensor, name: str = "inputs") -> Iterator[None]:
    """Replace the error of a model for images that do not fit it by an `InputError`.

    These are images on another device or of another type than the weights, and those of another size or with other
    channels than the network takes. To tell the latter from errors of other kinds, the model gets one of them alone.
    """
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        weight = next((x for x in model.parameters() if x.is_floating_point()), images)
        of_weights, of_images = (weight.device, weight.dtype), (images.device, images.dtype)
        of_torch = isinstance(error, RuntimeError)
        if of_torch and of_weights != of_images and any(word in str(error) for word in ("type", "device")):
            theirs, own = (f"{dtype} on {device}" for device, dtype in (of_images, of_weights))
            raise InputError(f"{name} are {theirs}, the model's weights are {own}: they must be the same") from None
        if (why := _misfit(model, images)) is not None:
            who, shape = getattr(model, "named", type(model).__name__), tuple(images.shape[1:])
            raise InputError(f"{who} does not take {name} of shape {shape}: {why}") from None
        raise


SIZES = ("size", "shape", "channel", "dimension", "height", "width")
"""Words in the errors of networks for images of other sizes than theirs."""


def _misfit(model: nn.Module, images: Tensor) -> str | None:
    """What a model says of the size of one image; None if it takes it or fails for another reason."""
    try:
        with torch.no_grad():
            model(images[:1].clone())
    except torch.OutOfMemoryError:
        return None
    except (RuntimeError, ValueError, AssertionError) as error:
        why = first_line(error)
        return why if any(word in why.lower() for word in SIZES) else None
    return None


def are_probabilities(scores: Tensor, tolerance: float) -> bool:
    """Whether each row of scores (B, K) is a distribution: not negative and with sum 1, within a tolerance."""
    values = scores.detach().double() if scores.device.type == "cpu" else scores.detach().float()
    return bool((values >= -tolerance).all() & ((values.sum(dim=1) - 1).abs() <= tolerance).all())


def check_probabilities(scores: object, batch: int, *, labels: bool = False) -> None:
    """Raise `InputError` unless scores are class probabilities (B, K) whose rows add up to 1.

    The tolerance is 0.01, because scores in float32 may come from a model in bfloat16.

    Args:
        scores: what a score function returned.
        batch: number of images B.
        labels: whether the columns are independent labels; then each value must be in [0, 1].
    """
    wanted = "score_fn must return class probabilities (batch, classes)"
    mend = "write score_fn = probabilities(model)"
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != batch:
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"{wanted} of {batch} images; got {found}; {mend}")
    if labels:
        low, high = torch.stack(torch.aminmax(scores.detach().float())).tolist()
        if not -0.01 <= low <= high <= 1.01:
            raise InputError(f"{wanted}, each in [0, 1]; got values from {low:.3g} to {high:.3g}; {mend}")
        return
    if scores.shape[1] < 2:
        raise InputError(f"{wanted} of at least two classes; got one column, p; return torch.cat([1 - p, p], dim=1)")
    if not are_probabilities(scores, 0.01):
        low, high = torch.stack(torch.aminmax(scores.detach().float())).tolist()
        mend = mend if not math.isnan(low) else f"the model returns NaN or infinite values for an image{CHANGED}"
        raise InputError(f"{wanted}, in [0, 1] and with row sums of 1; got values from {low:.3g} to {high:.3g}; {mend}")


def finite(scores: Tensor) -> Tensor:
    """The scores (B, ...) of B images themselves.

    Raises:
        InputError: if one of them is NaN or infinite: a comparison with NaN is false, so it would look like a result.
    """
    broken = ~scores.detach().isfinite()
    if bool(broken.any()):
        which = int(broken.flatten(1).any(dim=1).nonzero()[0])
        raise InputError(f"the model returns NaN or infinite values for image {which}{CHANGED}")
    return scores


def check_clean(clean: object, batch: int) -> None:
    """Raise `InputError` unless `clean` has the probability of the target class of each unmasked image, (B,)."""
    if not isinstance(clean, Tensor) or clean.shape != (batch,):
        found = tuple(clean.shape) if isinstance(clean, Tensor) else type(clean).__name__
        raise InputError(f"clean must be the target's probability of each of {batch} images, a tensor; got {found}")
    if not bool(((clean >= 0) & (clean <= 1.01)).all()):
        raise InputError(f"clean must be the target's probability of each image, from 0 to 1; got {clean.tolist()}")
