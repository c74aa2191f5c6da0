"""FullGrad: gradient times image, and gradients times the biases of all layers, which add up to the logit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp_models.core.batches import default_batch
from interp_models.core.eager import HIDING, name_of, nodes_of
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.known import known_of
from interp_models.core.maps import full_precision
from interp_models.core.passes import uncounted
from interp_models.core.prepared import class_name
from interp_models.core.scoring import Target, resolve_target, scores_of
from interp_models.explainers.base import EXPLAINERS, Explainer, gradient_of
from interp_models.explainers.bias_places import misplaced, readings
from interp_models.explainers.combinators import NoiseScale, noise_like, resolved, sigmas

TOLERANCE = 1e-3
"""Largest accepted difference of the logit and the sum of all terms, relative to the sum of the terms' sizes."""

BIASED = ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
"""Functions with a weight and a bias as second and third argument."""
ADD = ("add", "add_", "__add__", "__radd__", "__iadd__")
SUBTRACT = ("sub", "sub_", "__sub__", "__isub__", "subtract", "subtract_")
REVERSED = ("rsub", "__rsub__")
CLAMP = ("clamp", "clamp_", "clip", "clip_", "clamp_max", "clamp_max_", "clamp_min", "clamp_min_")
BENT = ("hardtanh", "hardtanh_", "relu6")
CURVED = {
    "Gelu", "Silu", "Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Elu", "Mish", "Softplus", "Hardswish", "Hardsigmoid",
    "NativeLayerNorm", "NativeGroupNorm", "Exp", "Log", "Pow", "Rsqrt", "Sqrt", "Var", "Std", "Norm",
    "LinalgVectorNorm",
    "Threshold", "Constant", "Bmm", "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductEfficientAttention",
    "ScaledDotProductFlashAttention", "ScaledDotProductCudnnAttention",
}  # fmt: skip
"""Operations of the autograd graph that are not piecewise linear, or have constants that fullgrad does not find."""


class _Biases(TorchFunctionMode):
    """Notes the bias of every operation that depends on the images, in the order of the pass.

    The bias of an operation is the constant part of its output: the argument `bias` of convolutions and linear layers;
    β - γ μ / σ of batch norms; a constant that is added; and the bound at which an activation such as ReLU6 is cut. It
    does not matter which module runs an operation, nor how often. The network's weights must take no gradients.

    Args:
        note: is called with the number of the operation, its bias, and ∂y/∂(its output), in the backward pass. Cells
            (B, h, w, C) of a linear layer become (B, C, h, w).
        see: is called with every output (B, C, h, w) that has a bias.
    """

    def __init__(
        self, note: Callable[[int, Tensor, Tensor], None], see: Callable[[Tensor], None] | None = None
    ) -> None:
        super().__init__()
        self.note, self.see, self.count = note, see, 0
        self.coarsest = 0.0
        """The largest rounding error of an output."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or not output.requires_grad or not output.is_floating_point():
            return output
        name = getattr(func, "__name__", "")
        bias = _bias(name, args, kwargs, output)
        if bias is None:
            return output
        number, self.count = self.count, self.count + 1
        self.coarsest = max(self.coarsest, torch.finfo(output.dtype).eps)

        def channels_first(x: Tensor) -> Tensor:
            return x.movedim(-1, 1) if name == "linear" and x.dim() == 4 else x

        # The hook gets the gradient of this value, also if a later operation overwrites it.
        # It is called with None where the path ends in an operation without a gradient.
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: None if gradient is None else self.note(number, bias, channels_first(gradient))
        )
        if self.see is not None and output.dim() == 4:
            self.see(channels_first(output.detach()))
        return output


def _bias(name: str, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
    """The constant part of an operation's output, in a shape that broadcasts with it, of a linear layer with its
    channels first; None if it is 0 or not known."""

    def argument(place: int, key: str, default: Any = None) -> Any:
        return args[place] if len(args) > place else kwargs.get(key, default)

    if name in BIASED:
        bias: Tensor | None = argument(2, "bias")
        if bias is None:
            return None
        behind = 2 * (output.dim() == 4) if name == "linear" else int(name[-2])
        return bias.detach().view(-1, *[1] * behind)
    if name == "batch_norm":
        mean, variance = argument(1, "running_mean"), argument(2, "running_var")
        if argument(5, "training", False) or mean is None or variance is None:
            return None
        weight, beta, eps = argument(3, "weight"), argument(4, "bias"), argument(7, "eps", 1e-5)
        shift: Tensor = -mean / (variance + eps).sqrt()
        shift = shift if weight is None else shift * weight
        shift = shift if beta is None else shift + beta
        return shift.detach().view(-1, *[1] * (output.dim() - 2))
    if name in (*ADD, *SUBTRACT, *REVERSED):
        first, second = argument(0, "input"), argument(1, "other")
        alpha = kwargs.get("alpha", 1)
        if name in REVERSED:
            first, second = second, first
        signs = (1, alpha if name in ADD else -alpha)
        terms = [sign * x for sign, x in zip(signs, (first, second), strict=True) if not _depends(x)]
        if len(terms) != 1:
            return None
        return torch.as_tensor(terms[0], dtype=output.dtype, device=output.device).detach()
    if name in BENT or name in CLAMP:
        low, high = (0.0, 6.0) if name == "relu6" else (-1.0, 1.0) if name in BENT else (None, None)
        if name != "relu6":
            only_high = name.startswith("clamp_max")
            low = None if only_high else argument(1, "min_val" if name in BENT else "min", low)
            high = argument(1, "max", high) if only_high else argument(2, "max_val" if name in BENT else "max", high)
            high = None if name.startswith("clamp_min") else high
        if not all(bound is None or isinstance(bound, int | float) for bound in (low, high)):
            return None
        cut = torch.zeros_like(output, dtype=torch.bool)
        cut = cut if low is None or low == 0 else cut | (output <= low)
        cut = cut if high is None else cut | (output >= high)
        return torch.where(cut, output.detach(), 0.0) if low or high else None
    return None


def _depends(x: Any) -> bool:
    """Whether an operand depends on the images."""
    return isinstance(x, Tensor) and x.requires_grad


def _maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The `readings` of every map whose bias is drawn."""
    found: list[Tensor] = []
    biases = _Biases(lambda number, bias, gradient: None, lambda output: found.extend(readings(output)))
    with _frozen(model), torch.enable_grad(), biases:
        model(images.clone().requires_grad_(True).clone())
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, weights take no gradients, so that what has a graph depends on the images."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class _Terms(Explainer):
    """Abstract: reads the terms of the logit of a network that is piecewise linear."""

    needs = ("piecewise_linear",)
    back_to_images = True

    def _terms(self, inputs: Tensor, target: Target, note: Callable[[int, Tensor], object]) -> None:
        """Call `note` with the number and the terms (B, C, H, W) of the image, number 0, and of every bias.

        Raises:
            NotApplicable: if the terms do not add up to the logit.
        """
        known, key = known_of(self.model), ("places of biases", tuple(inputs.shape[1:]))
        if key not in known:
            with uncounted():
                known[key] = misplaced(inputs[:1].detach(), lambda images: _maps(self.model, images))
        if known[key] is not None:
            raise NotApplicable(f"{class_name(self.model)} {known[key]}, so fullgrad cannot show its bias as a map")
        images = inputs.detach().clone().requires_grad_(True)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        total, size = (torch.zeros(len(inputs), dtype=wide, device=inputs.device) for _ in range(2))

        def add(number: int, terms: Tensor) -> None:
            nonlocal total, size
            if terms.numel() % len(inputs):
                return  # no row per image: the sum will say so
            sums = terms.reshape(len(inputs), -1).sum(dim=1)
            total, size = total + sums, size + sums.abs()
            if terms.dim() == 4 and len(terms) == len(inputs):
                note(number, terms)

        def of_bias(number: int, bias: Tensor, gradient: Tensor) -> None:
            with torch.no_grad(), full_precision(inputs):
                add(number + 1, gradient.to(wide) * bias.to(wide))

        with _frozen(self.model), torch.enable_grad():
            with _Biases(of_bias) as biases:
                output = self.model(images.clone())  # it may work in place, which a leaf forbids
            scores = scores_of(output, "logit")
            logits = scores.gather(1, resolve_target(target, scores)[:, None])[:, 0]
            gradient = gradient_of(logits.sum(), images, "the images")
        with torch.no_grad(), full_precision(inputs):
            add(0, gradient.to(wide) * inputs.to(wide))
            values = logits.detach().to(wide)
            away = (total - values).abs() / (size + values.abs()).clamp(min=torch.finfo(wide).tiny)
        worst = int(away.argmax())
        if not float(away[worst]) <= max(TOLERANCE, 16 * biases.coarsest):
            names = {name_of(node) for node in nodes_of(logits.grad_fn)}
            hidden = any(part in name for part in HIDING for name in names)
            hidden = hidden or any(isinstance(part, torch.jit.ScriptModule) for part in self.model.modules())
            found = "parts made by torch.jit or torch.compile" if hidden else ", ".join(sorted(names & CURVED))
            raise NotApplicable(
                f"{class_name(self.model)}: the terms of the image and of the biases add up to "
                f"{float(total[worst]):.4g}, the logit is {float(values[worst]):.4g}; fullgrad needs a network that is "
                "piecewise linear, and this one has "
                f"{found or 'products of features, or constants that fullgrad does not find'}"
            )


def _seen(terms: Tensor, size: tuple[int, int]) -> Tensor:
    """ψ: terms (B, C, h, w) of a layer -> map (B, *size). Absolute values are scaled to [0, 1] by the minimum and
    maximum over all channels and cells, summed over channels, and enlarged bilinearly with aligned corners."""
    terms = terms.abs()
    low, high = terms.amin(dim=(1, 2, 3), keepdim=True), terms.amax(dim=(1, 2, 3), keepdim=True)
    scaled = (terms - low) / torch.where(high > low, high - low, 1.0)
    return F.interpolate(scaled.sum(dim=1, keepdim=True), size=size, mode="bilinear", align_corners=True)[:, 0]


@EXPLAINERS.register("fullgrad")
class FullGrad(_Terms):
    """FullGrad = Σ_c ψ(x ⊙ ∂y/∂x) + Σ_l Σ_c ψ(b_l ⊙ ∂y/∂b_l) over the biases b_l of all layers l and their channels c
    (Srinivas and Fleuret, NeurIPS 2019).

    ψ takes absolute values, scales them to [0, 1] by the minimum and maximum over all channels and cells of the layer,
    and enlarges them to the image. y is the target's logit. Biases are those of convolutions and batch norms (β - γ μ /
    σ), constants that are added, such as those of the normalisation of the images, and the bounds of activations such
    as ReLU6. Biases without cells, such as those of linear layers, are not part of the map, but they are part of the
    sum of all terms, Σ x ⊙ ∂y/∂x + Σ_l Σ b_l ⊙ ∂y/∂b_l, which must be the logit: this is checked for every image. The
    order of modules does not matter, and modules may be used several times. Every layer must keep the positions of the
    image, as for class activation maps: this is tested once per model and image size, with a few dozen passes. Small
    maps cannot be checked fully, because a cell sees nearly all of the image. With 3 or 4 rows or columns, only
    mirroring, transposing, a shift by half the map, and channels-last order are detected; with 1 or 2, nothing.
    Channels-last linear layers are allowed.

    Args:
        model: any module that returns logits and is piecewise linear: with ReLU, but without products of features.

    Raises:
        NotApplicable: if the terms do not add up to the logit, as with GELU, attention or a softmax, or if a layer with
            biases does not keep the positions of the image.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        size = (inputs.shape[2], inputs.shape[3])
        total = torch.zeros(
            len(inputs), *size, device=inputs.device, dtype=torch.promote_types(inputs.dtype, torch.float32)
        )
        self._terms(inputs, target, lambda number, terms: total.add_(_seen(terms, size)))
        return total


@EXPLAINERS.register("smooth_fullgrad")
class SmoothFullGrad(_Terms):
    """FullGrad whose signed terms, of the image and of each bias, are first averaged over n noisy copies x + ε_i,
    ε_i ~ N(0, σ²) (the authors' code of Srinivas and Fleuret, NeurIPS 2019).

    See `fullgrad`. Without a target, the class is predicted from the image without noise.

    Args:
        model: any module that returns logits and is piecewise linear: with ReLU, but without products of features.
        samples: number n of noisy copies. Each takes one forward and one backward pass.
        noise: standard deviation σ of the noise, in units of `noise_scale`.
        noise_scale: `range` (each image's maximum minus minimum) or `absolute`.
        seed: seed of the noise.
        batch: images per forward pass; None chooses it for the device.

    Raises:
        NotApplicable: as `fullgrad`.
    """

    passes = "samples"
    small: ClassVar[Mapping[str, Any]] = {"samples": 3, "batch": 2}

    def __init__(
        self,
        model: nn.Module,
        *,
        samples: int = 25,
        noise: float = 0.15,
        noise_scale: NoiseScale = "range",
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        super().__init__(model)
        if samples < 1 or not noise >= 0 or (batch is not None and batch < 1):
            raise InputError(
                f"smooth_fullgrad: samples and batch must be at least 1, noise not below 0; got {samples}, {batch}, "
                f"{noise}"
            )
        self.samples, self.noise, self.noise_scale = samples, noise, noise_scale
        self.seed, self.batch = seed, batch

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        targets, size = resolved(self.model, inputs, target), (inputs.shape[2], inputs.shape[3])
        maps = []
        for image, c, sigma in zip(inputs, targets, sigmas(inputs, self.noise, self.noise_scale), strict=True):
            sums: dict[int, Tensor] = {}  # of one image at a time: they are as large as all its activations

            def add(number: int, terms: Tensor, sums: dict[int, Tensor] = sums) -> None:
                some = terms.sum(dim=0, keepdim=True)
                sums[number] = sums[number] + some if number in sums else some

            for numbers in torch.split(torch.arange(self.samples), self.batch or default_batch(inputs)):
                noise = torch.stack([noise_like(image, self.seed, n) for n in numbers.tolist()])
                self._terms(image + sigma * noise, c.expand(len(noise)), add)
            with full_precision(inputs):
                maps.append(torch.stack([_seen(terms, size) for terms in sums.values()]).sum(dim=0))
        return torch.cat(maps)
