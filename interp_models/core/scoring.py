"""Class scores of models, for explainers and metrics.

This module imports only torch, errors and checks of inputs, so that explainers and metrics work on any module that
returns logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interp_models.core.endings import Ending, without
from interp_models.core.errors import InputError
from interp_models.core.inputs import check_images_for, check_probabilities, fitting
from interp_models.core.known import known_of
from interp_models.core.maps import at_least_float32
from interp_models.core.modes import alone, evaluating, full_float32
from interp_models.core.outputs import Regression, are_finite, check_finite, field_of, has_labels
from interp_models.core.reading import check_unrounded, ending_to_leave_out, is_declared, network_of, typed_logits

Score = Literal["logit", "probability"]
Target = Tensor | int | None
ScoreFn = Callable[[Tensor], Tensor]
"""A score function: it maps images (B, 3, H, W) to class probabilities (B, K)."""

ONE_LOGIT = (
    "the model returns one logit per image, whose softmax is always 1: for two classes pass output='one_logit', or "
    "Classifier(model, output='one_logit')"
)

_read: ContextVar[Literal["labels", "probabilities"] | None] = ContextVar("read", default=None)
"""What outputs without a type of their own are: logits of labels, probabilities of classes, or (None) logits."""
_finite: ContextVar["_Finite | None"] = ContextVar("finite_logits", default=None)
"""Whether logits that were read are finite, see `finite_logits`."""
_checked: ContextVar[object | None] = ContextVar("checked_images", default=None)


def logits_of(output: Any) -> Tensor:
    """The logits (B, K) of a model's output; see `outputs.field_of`.

    Raises:
        InputError: if there are none, or if several tensors could be the logits.
    """
    logits = field_of(output)
    if (finite := _finite.get()) is not None and len(logits):
        finite.add(are_finite(logits))
    return logits


@contextmanager
def finite_logits(images: Tensor, first: int = 0) -> Iterator[None]:
    """Check that all logits that are read inside the context are finite. It waits for the device once, at its end.

    Args:
        images: images (B, C, H, W) of the context.
        first: the number of the first one, for the message.

    Raises:
        InputError: if not.
    """
    finite = _Finite(len(images))
    token = _finite.set(finite)
    try:
        yield
    finally:
        _finite.reset(token)
    if finite.of_images is not None:
        check_finite(finite.of_images, first)
    for every in finite.every.values():
        check_finite(every[None], None)


class _Finite:
    """Whether all logits of many passes are finite, in one tensor per device: a tensor kept of each pass would fragment
    the memory.

    Args:
        images: number of images of the context.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.of_images: Tensor | None = None
        """Whether the logits of each image are finite, in the first pass of as many images."""
        self.every: dict[torch.device, Tensor] = {}
        """Whether all are, by device."""

    def add(self, finite: Tensor) -> None:
        """Add one pass, bool (b,)."""
        if self.of_images is None and len(finite) == self.images:
            self.of_images = finite
        if finite.device in self.every:
            self.every[finite.device].logical_and_(finite.all())
        else:
            self.every[finite.device] = finite.all()


def scores_of(output: Any, score: Score) -> Tensor:
    """The scores of a model's output.

    A `Regression` has no probabilities; its scores are its values. Within `read_as` a network may end in a softmax or
    sigmoid.

    Args:
        output: what the model returned.
        score: `logit` for the logits, or `probability` for their softmax (for independent labels, their sigmoid).

    Returns:
        (B, K), in float32 or float64.

    Raises:
        InputError: as `logits_of`, and for the softmax of a single logit, which is always 1.
    """
    logits = at_least_float32(logits_of(output))
    read = None if isinstance(output, Regression) or has_labels(output) else _read.get()
    if read == "probabilities":
        return logits if score == "probability" else logits.clamp(min=torch.finfo(logits.dtype).tiny).log()
    if score == "logit" or isinstance(output, Regression):
        return logits
    if has_labels(output) or read == "labels":
        return logits.sigmoid()
    if logits.shape[1] == 1:
        raise InputError(ONE_LOGIT)
    return logits.softmax(dim=1)


@contextmanager
def read_as(model: nn.Module, images: Tensor, score: Score) -> Iterator[None]:
    """Interpret the model's outputs correctly inside the context, also if it ends in a softmax, log_softmax or sigmoid.

    What it ends in is found out once per model. Its last such call is left out inside, so that logits are
    those before it, also where a probability is 1 up to rounding.

    Args:
        model: the model, in eval mode.
        images: images (B, C, H, W).
        score: the score that is read.

    Raises:
        InputError: if the prediction for an image changes from pass to pass or with its batch; if all outputs lie in
            [0, 1] but it is unclear whether they are probabilities; and if logits are lost by rounding.
    """
    typed = typed_logits(model, images)
    if typed is None:  # a method that reads logits says so
        yield
        return
    ending = ending_to_leave_out(model, images, typed=typed)
    if ending is None:
        yield
        return
    if ending.call is None and score == "logit":
        check_unrounded(model, images, ending.kind)
    read: Literal["labels", "probabilities"] | None = None
    if not is_declared(model):
        read = "labels" if ending.kind == "sigmoid" else None
        if ending.kind == "softmax" and ending.call is None:
            read = "probabilities"
    token = _read.set(read)
    try:
        with nullcontext() if ending.call is None else without(ending, network_of(model)):
            yield
    finally:
        _read.reset(token)


def per_image(target: Tensor | int, batch: int) -> Tensor:
    """The class of each image, int64 (B,), from one class for all images or one class per image.

    Raises:
        InputError: if the number of classes does not fit, and for numbers that are not integers or below 0.

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
    if batch and (lowest := int(targets.min())) < 0:
        raise InputError(f"target {lowest} is out of range: classes are numbered from 0")
    return targets.clone()


def resolve_target(target: Target, logits: Tensor) -> Tensor:
    """The class to explain for each image.

    Args:
        target: one class for all images, one class per image, or None for the class of the highest logit.
        logits: (B, K).

    Returns:
        int64 (B,).

    Raises:
        InputError: if a class does not exist, or the number of targets differs from the number of images.
    """
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    targets = per_image(target, batch).to(logits.device)
    if batch and int(targets.max()) >= classes:
        wrong = int(targets[targets >= classes][0])
        raise InputError(f"target {wrong} is out of range: the model has classes 0 to {classes - 1}")
    return targets


@contextmanager
def checked_images() -> Iterator[None]:
    """Skip checks in `probabilities` inside the context: the caller has checked the original images, and the model does
    not change."""
    token = _checked.set(object())  # tells contexts apart
    try:
        yield
    finally:
        _checked.reset(token)


def checked(score_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a score function, of images and maybe more, so that its first result is checked by `check_probabilities`."""
    seen = False

    def score(images: Tensor, *more: Tensor) -> Tensor:
        nonlocal seen
        scores = score_fn(images, *more)
        if not seen:
            check_probabilities(scores, len(images), labels=getattr(score_fn, "of_labels", False))
            seen = True
        return scores

    return score


def probabilities(model: nn.Module) -> ScoreFn:
    """The score function of a model, for metrics.

    It maps images (B, C, H, W) to the softmax of the logits, (B, K). The model runs in eval mode, without gradients. If
    the model ends in a softmax or a sigmoid, its outputs are taken as they are, and a warning says so. The score
    function raises `InputError` if the images are not a float tensor (B, C, H, W), if the model is one of this package
    and pixels are not in [0, 1], and for the models that `read_as` refuses.

    Args:
        model: any module that returns logits.

    >>> probabilities(nn.Flatten())(torch.zeros(1, 1, 1, 4)).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    ending: Ending | None = None
    found_in: object | None = None
    """The context in which the ending was last found."""

    def score(images: Tensor) -> Tensor:
        nonlocal ending, found_in
        context = _checked.get()
        if context is None:
            check_images_for(model, images, "images")
        with alone(model), torch.no_grad(), evaluating(model), full_float32(), fitting(model, images, "images"):
            if context is None or context is not found_in:
                known = known_of(model)
                if "ending of scores" not in known:  # once, because it waits for the device, and warns
                    typed = typed_logits(model, images)
                    if typed is None:
                        logits_of(model(images[:1].clone()))  # raises
                    known["ending of scores"] = ending_to_leave_out(model, images, typed=bool(typed))
                ending, found_in = known["ending of scores"], context
            found = model(images)
        if isinstance(found, Regression):
            raise InputError("a regression has no class probabilities, which metrics need; explainers take it")
        are_logits = has_labels(found) or ending is None or ending.kind == "log_softmax" or is_declared(model)
        # `checked` accepts rows of independent labels, which do not add up to 1.
        score.of_labels = has_labels(found) if are_logits else ending.kind == "sigmoid"  # type: ignore[attr-defined, union-attr]
        return scores_of(found, "probability") if are_logits else at_least_float32(logits_of(found))

    return score


def logits(model: nn.Module) -> ScoreFn:
    """The logits of a model as a score function, for metrics that need them.

    It maps images (B, C, H, W) to logits (B, K), those before a softmax or sigmoid at the end of the model. The model
    runs in eval mode, without gradients. It raises `InputError` for the models that `read_as` refuses.

    Args:
        model: any module that returns logits.

    >>> logits(nn.Flatten())(torch.zeros(1, 1, 1, 4)).tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    """

    def score(images: Tensor) -> Tensor:
        if _checked.get() is None:
            check_images_for(model, images, "images")
        with (
            alone(model), torch.no_grad(), evaluating(model), full_float32(), fitting(model, images, "images"),
            read_as(model, images, "logit"),
        ):  # fmt: skip
            return scores_of(model(images), "logit")

    return score
