"""Class scores of models, for explainers and metrics.

It knows torch, errors and checks of inputs alone, so that explainers and metrics work on any module that returns
logits.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.inputs import are_probabilities, check_images_for, check_probabilities, fitting
from interp_models.core.outputs import LabelLogits, field_of

Score = Literal["logit", "probability"]
Target = Tensor | int | None
ScoreFn = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> class probabilities (B, K)."""

ONE_LOGIT = (
    "the model returns one logit per image, whose softmax is always 1: for two classes pass output='one_logit', or "
    "Classifier(model, output='one_logit')"
)

_checked: ContextVar[bool] = ContextVar("checked_images", default=False)


class SelfExplaining(Protocol):
    """A model that names its feature layer and explains its own output (every architecture of this package)."""

    explanations: tuple[str, ...]

    @property
    def feature_layer(self) -> nn.Module:
        """The module whose output (B, C, h, w) is the last map of features."""

    def explain(self, output: Any, targets: Tensor, kind: str | None = None) -> Tensor:
        """(B, h, w) map of the evidence for `targets`."""

    def __call__(self, images: Tensor) -> Any:
        """Return the output that `explain` takes."""


def explains_itself(model: Any) -> TypeGuard[SelfExplaining]:
    """Whether a model has what `SelfExplaining` asks for."""
    return all(hasattr(model, name) for name in ("explanations", "feature_layer", "explain"))


class PrototypeModel(Protocol):
    """A model whose prototypes can be judged."""

    @property
    def prototypes(self) -> Tensor:
        """(P, D, a, b)."""

    @property
    def prototype_classes(self) -> Tensor:
        """(P, K) bool, the classes of each prototype; none for a removed one."""

    @property
    def prototype_weights(self) -> Tensor | None:
        """(K, P), the weight of each prototype for each class; None if the model has no such weights."""

    def __call__(self, images: Tensor) -> Any:
        """Return an output with similarity maps `maps` (B, P, h, w)."""


def logits_of(output: Any) -> Tensor:
    """The logits (B, K) of a model's output, see `outputs.field_of`.

    Raises:
        InputError: if there are none, or it is not clear which they are.
    """
    return field_of(output)


def scores_of(output: Any, score: Score) -> Tensor:
    """Scores (B, K) in float32 or better: logits as they are, or their softmax; of `LabelLogits` their sigmoid.

    Raises:
        InputError: as `logits_of`, and for the softmax of one logit, which is always 1.
    """
    logits = logits_of(output)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score == "logit":
        return logits
    if isinstance(output, LabelLogits):
        return logits.sigmoid()
    if logits.shape[1] == 1:
        raise InputError(ONE_LOGIT)
    return logits.softmax(dim=1)


def per_image(target: Tensor | int, batch: int) -> Tensor:
    """One class per image, int64 (B,), from one class for all or one per image.

    Raises:
        InputError: for another number of classes, and for numbers that are not whole, such as floats.

    >>> per_image(3, 2).tolist()
    [3, 3]
    """
    try:
        targets = torch.as_tensor(target)
    except (RuntimeError, TypeError, ValueError):  # text, rows of different lengths
        raise InputError(f"target must be a class number, or one per image; got {target!r}") from None
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise InputError(f"target must be whole numbers of classes (int64); got {targets.dtype}")
    targets = targets.long()
    if targets.dim() == 0:
        targets = targets.repeat(batch)
    if targets.shape != (batch,):
        raise InputError(
            f"target must be one class or {batch} of them, one per image; got shape {tuple(targets.shape)}"
        )
    return targets.clone()


def resolve_target(target: Target, logits: Tensor) -> Tensor:
    """The class to explain for each image, int64 (B,): None is the class of the highest logit.

    Raises:
        InputError: if a class does not exist or the number of targets is not that of the images.
    """
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    targets = per_image(target, batch).to(logits.device)
    if batch and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
        wrong = int(targets[(targets < 0) | (targets >= classes)][0])
        raise InputError(f"target {wrong} is out of range: the model has classes 0 to {classes - 1}")
    return targets


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode, and each back into its own mode afterwards, also after an exception."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


_backends: Any = torch.backends  # torch has no types for the new switches
PRODUCTS = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,
    _backends.cudnn.rnn,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
    _backends.mkldnn.rnn,
)
"""Everything that torch lets round float32 to TF32 or bfloat16; convolutions on GPUs do by default."""


@contextmanager
def full_float32() -> Iterator[None]:
    """While open, products of float32 are of float32, on GPUs and CPUs; the settings before come back afterwards, also
    after an exception. Autocast is another matter."""
    # Torch has old switches and new ones. Reading an old one fails where the two differ, as torch.compile reads them,
    # both are set. A caller who has mixed them cannot read the old ones, which then stay.
    tf32, matmul = _readable(lambda: torch.backends.cudnn.allow_tf32), _readable(torch.get_float32_matmul_precision)
    own = [product.fp32_precision for product in PRODUCTS]
    _set_precision(None if tf32 is None else False, None if matmul is None else "highest", ["ieee"] * len(PRODUCTS))
    try:
        yield
    finally:
        _set_precision(tf32, matmul, own)


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None


def _set_precision(tf32: bool | None, matmul: str | None, products: Iterable[str]) -> None:
    """Set the old switches first, as they change the new ones."""
    if tf32 is not None:
        torch.backends.cudnn.allow_tf32 = tf32
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    for product, precision in zip(PRODUCTS, products, strict=True):
        product.fp32_precision = precision


@contextmanager
def checked_images() -> Iterator[None]:
    """While open, `probabilities` skips its check: the caller has checked the original images."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def checked(score_fn: ScoreFn) -> ScoreFn:
    """Wrap a score function: its first result goes through `check_probabilities`."""
    seen = False

    def score(images: Tensor) -> Tensor:
        nonlocal seen
        scores = score_fn(images)
        if not seen:
            check_probabilities(scores, len(images), labels=getattr(score_fn, "of_labels", False))
            seen = True
        return scores

    return score


def probabilities(model: nn.Module) -> ScoreFn:
    """Return the score function for metrics: images -> softmax of the logits, in eval mode, without gradients.

    If what the model returns first is probabilities already, its outputs are taken as they are, with a warning.
    The function raises `InputError` for what is no float tensor (B, C, H, W), and for images that are not in [0, 1] if
    the model is one of this package.

    >>> probabilities(nn.Flatten())(torch.zeros(1, 1, 1, 4)).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    ends_in_softmax: bool | None = None

    def score(images: Tensor) -> Tensor:
        nonlocal ends_in_softmax
        if not _checked.get():
            check_images_for(model, images, "images")
        with torch.no_grad(), evaluating(model), full_float32(), fitting(model, images, "images"):
            found = model(images)
        if isinstance(found, LabelLogits):
            score.of_labels = True  # type: ignore[attr-defined]  # rows need not add up to 1
            return scores_of(found, "probability")
        output = logits_of(found)
        if ends_in_softmax is None:  # once, as it waits for the device
            rounding = max(1e-5, 2 * torch.finfo(output.dtype).eps)
            ends_in_softmax = output.shape[1] > 1 and are_probabilities(output, rounding)
            if not ends_in_softmax and output.shape[1] > 1:
                _refuse_sigmoid(model, images, output)
            if ends_in_softmax:
                name = type(model).__name__
                warnings.warn(
                    f"{name} returns probabilities already (rows add up to 1): no second softmax is applied",
                    stacklevel=2,
                )
        return scores_of(output, "logit" if ends_in_softmax else "probability")

    return score


def _refuse_sigmoid(model: nn.Module, images: Tensor, output: Tensor) -> None:
    """Raise `InputError` for a model that ends in a sigmoid: a softmax of that would be wrong."""
    from interp_models.core.classifier import ends_in

    low, high = torch.aminmax(output)
    if float(low) < 0 or float(high) > 1:
        return
    with evaluating(model), full_float32():
        kind = ends_in(model, images[:1])
    if kind == "sigmoid":
        name = getattr(model, "named", type(model).__name__)
        raise InputError(
            f"{name} ends in a sigmoid, so that its outputs are probabilities of independent labels: "
            "pass output='sigmoid', or Classifier(model, output='sigmoid')"
        )


def all_scores(score_fn: ScoreFn, images: Tensor, batch: int | None = None) -> Tensor:
    """The scores (B, K) of images, a few at a time; `batch` None chooses by the device."""
    return torch.cat([score_fn(part) for part in torch.split(images, batch or default_batch(images))])


def scores_of_variants(
    score_fn: ScoreFn,
    images: Tensor,
    count: int,
    variant: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    batch: int | None = None,
) -> Tensor:
    """Scores (B, count) of variants of each image.

    Images and variants are one stream of jobs, passed a few at a time, so that memory does not grow with the variants.

    Args:
        score_fn: images -> scores of the classes.
        images: (B, C, H, W).
        count: variants of each image.
        variant: numbers of images (m,), or (1,) if it is one, and of variants (m,) -> these variants (m, C, H, W).
        target: class of each image (B,).
        batch: images per pass; None chooses by the device.
    """
    total, size = len(images) * count, batch or default_batch(images)
    # One tensor for all scores: many small ones would lie scattered among the large ones and fragment the memory.
    scores = torch.empty(total, device=images.device, dtype=torch.promote_types(images.dtype, torch.float32))
    for first in range(0, total, size):
        jobs = torch.arange(first, min(first + size, total), device=images.device)
        b = jobs // count
        of_one = first // count == (first + len(jobs) - 1) // count  # then it need not be repeated
        found = score_fn(variant(b[:1] if of_one else b, jobs % count))
        if not first:  # once, as it waits for the device
            target = resolve_target(target, found[:1].expand(len(images), -1))
        scores[first : first + len(jobs)] = found.gather(1, target[b][:, None])[:, 0].to(scores.dtype)
    return scores.view(len(images), count)


def default_batch(images: Tensor) -> int:
    """Batch size for many passes of images of the size of `images` (..., H, W).

    On a CPU four of 224 pixels for each thread, up to 16: what larger batches gain in arithmetic they lose to memory
    that is mapped anew for every pass (see docs/results/speed.md).
    """
    at_224 = min(16, 4 * torch.get_num_threads()) if images.device.type == "cpu" else 128
    return max(1, at_224 * 224**2 // (images.shape[-2] * images.shape[-1]))
