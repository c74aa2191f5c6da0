"""Faster copies of models for many passes. Each copy is checked to return the same scores."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp_models.core.choices import Preparation
from interp_models.core.classifier import Classifier
from interp_models.core.eager import compiled_again, is_recomputed
from interp_models.core.endings import in_pass
from interp_models.core.errors import first_line
from interp_models.core.known import fingerprint, state_of
from interp_models.core.modes import alone, evaluating, full_float32
from interp_models.core.outputs import LabelLogits, Regression, has_labels
from interp_models.core.scoring import logits_of

TOLERANCE = 1e-5
"""Largest accepted difference of probabilities, and of logits relative to the largest logit (if that is above 1)."""

_prepared: "WeakKeyDictionary[nn.Module, dict[Preparation, tuple[Any, nn.Module | None]]]" = WeakKeyDictionary()


class Prepared(nn.Module):
    """A model's copy in eval mode.

    Batch norms are folded into convolutions, the memory format is channels last, and weights take no gradients.

    Args:
        model: the copy.
        bfloat16: whether to run it under autocast with bfloat16.
        compiled: whether to compile it.
    """

    def __init__(self, model: nn.Module, *, bfloat16: bool = False, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.autocasts = model, bfloat16
        self.run = torch.compile(model.__call__) if compiled else None
        self.named = class_name(model)
        """Class name of the original, for messages."""
        self.declared = getattr(model, "declared", False)
        """See `Classifier.declared`."""
        self.eval()

    def forward(self, images: Tensor) -> Tensor | LabelLogits | Regression:
        """Compute the logits (B, K) of images (B, C, H, W), in float32 or float64."""
        images = images.contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(images.device.type, torch.bfloat16) if self.autocasts else nullcontext()
        with autocast, in_pass(images), nullcontext() if self.run is None else compiled_again():
            output = (self.run or self.model)(images)
        logits = logits_of(output)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if has_labels(output):
            return LabelLogits(logits)
        return Regression(logits) if isinstance(output, Regression) else logits


KERNELS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
"""Activations that oneDNN can compute in the kernel of the convolution before them."""


class Fused(nn.Module):
    """A convolution and its activation in one kernel, as torch.compile makes it; with gradients, two separate ones.

    On a CPU, memory is slower than arithmetic, and eager torch is slow for some convolutions with one thread.
    """

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__()
        self.convolution, self.activation = convolution, activation
        self.kernel = KERNELS[type(activation)]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution, then the activation."""
        if torch.is_grad_enabled():
            y: Tensor = self.activation(self.convolution(x))
            return y
        c = self.convolution
        sizes = (c.padding, c.stride, c.dilation, c.groups)
        fused: Tensor = torch.ops.mkldnn._convolution_pointwise(x, c.weight, c.bias, *sizes, *self.kernel, "")
        return fused


def class_name(model: nn.Module) -> str:
    """The class name of a model, without the wrappers of this package."""
    inner = model.model if isinstance(model, Prepared) else model
    return type(inner.network if isinstance(inner, Classifier) else inner).__name__


def prepare(model: nn.Module, images: Tensor, how: Preparation = "exact") -> nn.Module:
    """Return a faster copy of a model for many passes.

    The copy is cached, and made again if the weights change. If its scores differ, or the model cannot be copied, the
    model itself is returned with a warning.

    Args:
        model: any module that returns logits, in train or eval mode; it may be compiled or wrapped by DDP.
        images: example images (B, C, H, W), on which the copy is checked.
        how: see `Preparation`.
    """
    done = isinstance(getattr(model, "_orig_mod", model), Prepared | torch.jit.ScriptModule)
    if how == "none" or not len(images) or done:
        return model
    with alone(model):
        known, state = _prepared.setdefault(model, {}), [*state_of(model), *fingerprint(model)]
        if how not in known or known[how][0] != state:
            # not under the caller's autocast, because the copy outlives it
            with torch.inference_mode(False), torch.autocast(images.device.type, enabled=False), evaluating(model):
                known[how] = (state, _prepare(model, images[:2].detach().clone(), how))
        made = known[how][1]
        return model if made is None else made


def release(model: nn.Module) -> None:
    """Drop a model's cached copies."""
    _prepared.pop(model, None)


def _prepare(model: nn.Module, images: Tensor, how: Preparation) -> nn.Module | None:
    """Make the copy; None, with a warning, if that fails."""
    # Noise extends the check beyond the pixels of these images, because the copy is used for any image.
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    images = torch.cat([images, images.mean() + noise * images.std().clamp(min=0.25)])
    with torch.no_grad(), full_float32():  # outside the try: an error of the model itself must be raised
        expected, again = (logits_of(model(images.clone())) for _ in range(2))
    made: Any
    try:
        with torch.no_grad(), full_float32():
            made = copied(unwrapped(model)).eval().requires_grad_(False)
            _fold(made, images[:1].clone(), fuse=how == "exact" and _has_kernels(images))
            made = made.to(memory_format=torch.channels_last)
            made = Prepared(made, bfloat16=how == "bfloat16", compiled=how == "compiled")
            found = logits_of(made(images.clone()))
            if how == "exact":  # with gradients the copy uses other kernels
                try:
                    with torch.enable_grad():
                        found = torch.cat([found, logits_of(made(images.clone())).detach()])
                    again, expected = (torch.cat([logits, logits]) for logits in (again, expected))
                except RuntimeError as error:
                    if not is_recomputed(error):  # else methods by gradients are refused, and others need none
                        raise
        if _apart(again, expected):
            why: str | None = "its scores change from pass to pass"
        elif how != "bfloat16" and (apart := _apart(found, expected)):
            why = f"logits of its copy are {apart[0]:.1g} of the largest away, probabilities {apart[1]:.1g}"
        else:
            why = None
    except Exception as error:  # any model can come here, and copies can fail in many ways
        if is_recomputed(error):
            raise
        why = f"{type(error).__name__}: {first_line(error)}"
    if why is not None:
        warnings.warn(f"{type(model).__name__} is used without a faster copy: {why}", stacklevel=4)
        return None
    return cast(nn.Module, made)


def _apart(found: Tensor, expected: Tensor) -> tuple[float, float] | None:
    """Differences of logits (relative to the largest) and of probabilities; None if both are within the tolerance."""
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    probabilities = float((found.softmax(dim=1) - expected.softmax(dim=1)).abs().max())
    return None if apart <= TOLERANCE and probabilities <= TOLERANCE else (apart, probabilities)  # not None for NaN


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of DDP and torch.compile; a prepared and compiled copy is returned as it is."""
    inner = getattr(model, "_orig_mod", None)
    if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = model.module
    return unwrapped(inner) if isinstance(inner, nn.Module) and not isinstance(inner, Prepared) else model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy without the trainer of a LightningModule."""
    trainers = (getattr(part, "_trainer", None) for part in model.modules())
    return copy.deepcopy(model, {id(trainer): None for trainer in trainers if trainer is not None})


def _has_kernels(images: Tensor) -> bool:
    mkldnn = images.device.type == "cpu" and images.dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise"))


def _fold(model: nn.Module, image: Tensor, *, fuse: bool) -> None:
    """Fold every batch norm, in place, into the convolution before it; fuse the activation inside timm's batch norms.

    Only pairs are folded where the batch norm is the only known user of the convolution's output.
    """
    for norm_name, norm, name, convolution in list(_pairs(model, image)):
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        shift = shift if norm.bias is None else shift + norm.bias.double()
        weight = convolution.weight.double()
        bias = shift if convolution.bias is None else shift + convolution.bias.double() * scale
        convolution.weight = nn.Parameter((weight * scale.view(-1, 1, 1, 1)).to(norm.running_mean.dtype), False)
        convolution.bias = nn.Parameter(bias.to(norm.running_mean.dtype), False)
        rest = nn.Sequential(norm.drop, norm.act) if type(norm) is not nn.BatchNorm2d else nn.Identity()
        activation = rest[1] if isinstance(rest, nn.Sequential) and type(rest[0]) is nn.Identity else rest
        can_fuse = type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros"
        if fuse and can_fuse and isinstance(convolution.padding, tuple) and type(activation) in KERNELS:
            _replace(model, name, Fused(convolution, activation))
            rest = nn.Identity()
        _replace(model, norm_name, rest)


def _replace(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)


def _pairs(model: nn.Module, image: Tensor) -> Iterator[tuple[str, Any, str, Any]]:
    """Name and module of each batch norm and of the convolution before it, where both are used once in a pass."""
    made: dict[int, tuple[Tensor, nn.Module]] = {}  # tensors are kept alive, so that ids stay unique
    taken: list[tuple[nn.Module, nn.Module | None]] = []
    used: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        used.append(module)
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (output, module)
        elif isinstance(module, nn.BatchNorm2d):
            taken.append((module, made.get(id(args[0]), (None, None))[1]))

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, kinds)]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    takers = [convolution for _, convolution in taken]
    for norm, convolution in taken:
        known = type(norm) is nn.BatchNorm2d or (hasattr(norm, "drop") and hasattr(norm, "act"))
        tracked = getattr(norm, "running_mean", None) is not None
        if convolution is None or not (known and tracked):
            continue
        if used.count(norm) == used.count(convolution) == takers.count(convolution) == 1:
            yield names[norm], norm, names[convolution], convolution
