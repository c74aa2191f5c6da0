"""Class scores of models, for explainers and metrics.

This module imports only torch, errors and checks of inputs, so that explainers and metrics work on any module that
returns logits.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from interp_models.core.classifier import Classifier
from interp_models.core.endings import Ending, ending_of, without
from interp_models.core.errors import InputError, first_line
from interp_models.core.inputs import check_images_for, check_probabilities, fitting
from interp_models.core.known import known_of
from interp_models.core.outputs import Regression, field_of, has_labels
from interp_models.core.passes import uncounted

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
_checked: ContextVar[bool] = ContextVar("checked_images", default=False)
_free = threading.Condition()
"""Tells waiting threads that modules in `_busy` were released."""
_busy: dict[int, tuple[int, int]] = {}
"""By id of a module that a thread uses in `alone`: the thread, and how many such contexts it is in."""
_guard = threading.RLock()
"""Held while one of the next two changes."""
_held: dict[int, int] = {}
"""By id of a module that is in train mode outside of `evaluating`: how many such contexts it is in. They keep it alive,
and the hash of torchmetrics' modules changes with their state."""
_precision: list[Any] = []
"""Settings of the caller of `full_float32`, for every context that is open."""


class SelfExplaining(Protocol):
    """A model that names its feature layer and explains its own output, as every architecture of this package."""

    explanations: tuple[str, ...]
    """The kinds of map that `explain` returns, the default first."""

    @property
    def feature_layer(self) -> nn.Module:
        """The module whose output is the last feature map, (B, C, h, w)."""

    def explain(self, output: Any, targets: Tensor, kind: str | None = None) -> Tensor:
        """Maps of the evidence for the classes `targets`, (B, h, w)."""

    def __call__(self, images: Tensor) -> Any:
        """Return the output that `explain` takes."""


def explains_itself(model: Any) -> TypeGuard[SelfExplaining]:
    """Whether a model has the attributes of `SelfExplaining`."""
    return all(hasattr(model, name) for name in ("explanations", "feature_layer", "explain"))


class PrototypeModel(Protocol):
    """A model with prototypes that prototype metrics can judge."""

    @property
    def prototypes(self) -> Tensor:
        """(P, D, a, b): the prototypes, in the feature space of the model."""

    @property
    def prototype_classes(self) -> Tensor:
        """(P, K) bool: the classes of each prototype; a removed prototype has none."""

    @property
    def prototype_weights(self) -> Tensor | None:
        """(K, P): the weight of each prototype for each class; None if the model has no such weights."""

    def __call__(self, images: Tensor) -> Any:
        """Return an output whose `maps` are the similarity maps, (B, P, h, w)."""


def logits_of(output: Any) -> Tensor:
    """The logits (B, K) of a model's output; see `outputs.field_of`.

    Raises:
        InputError: if there are none, or if several tensors could be the logits.
    """
    return field_of(output)


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
    logits = logits_of(output)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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
    """Read the model's outputs rightly inside the context, also if the model ends in a softmax or a sigmoid.

    What it ends in is found out once per model. Its last softmax or sigmoid is left out inside, so that logits are
    those before it, also where a probability is 1 up to rounding.

    Args:
        model: the model, in eval mode.
        images: images (B, C, H, W).
        score: the score that is read.

    Raises:
        InputError: if the prediction for an image changes from pass to pass or with its batch; if all outputs lie in
            [0, 1] but it cannot be told whether they are probabilities; and if logits are lost by rounding.
    """
    if not _has_logits(model, images):  # a method that reads them says so
        yield
        return
    if not explains_itself(model):
        _check_steady(model, images)
    ending = _ending_of(model, images)
    if ending is None:
        yield
        return
    if ending.call is None and score == "logit":
        _check_unrounded(model, images)
    read: Literal["labels", "probabilities"] | None = None
    if not _is_declared(model):
        read = "labels" if ending.kind == "sigmoid" else "probabilities" if ending.call is None else None
    token = _read.set(read)
    try:
        with nullcontext() if ending.call is None else without(ending, network_of(model)):
            yield
    finally:
        _read.reset(token)


def _has_logits(model: nn.Module, images: Tensor) -> bool:
    known = known_of(model)
    if "logits" not in known:
        try:
            with uncounted(), torch.no_grad():
                logits_of(model(images[:1].clone()))
            known["logits"] = True
        except InputError:
            known["logits"] = False
        except AssertionError:  # of an exported program, see `_check_steady`
            known["logits"] = True
    return bool(known["logits"])


def _check_steady(model: nn.Module, images: Tensor) -> None:
    """Raise `InputError` if the logits of an image depend on chance or on the other images of its batch."""
    known = known_of(model)
    if "steady" in known:
        return
    name = _name_of(model)
    other = images[:1].flip(3).roll(images.shape[2] // 2, dims=2)
    with uncounted(), torch.no_grad():
        try:
            first, again = (logits_of(model(images[:1].clone())) for _ in range(2))
            beside = logits_of(model(torch.cat([images[:1], other, other.flip(2)])))
        except AssertionError as error:  # of an exported program, which takes batches of one size only
            raise InputError(f"{name} does not take batches of one and of three images: {first_line(error)}") from None
    if len(first) != 1 or len(beside) != 3:
        raise InputError(f"{name} returns {len(first)} rows of logits for 1 image and {len(beside)} for 3")
    for found, why in ((again, "from pass to pass: switch its randomness off"), (beside[:1], "with its batch")):
        away = float((found.double() - first.double()).abs().max())
        if away > 1e-3 + 0.02 * float(first.double().abs().max()):
            raise InputError(f"the prediction of {name} for an image changes by {away:.2g} {why}; no map explains it")
    known["steady"] = True


def _name_of(model: nn.Module) -> str:
    """The class name of a model, for messages."""
    return str(getattr(model, "named", type(model).__name__))


def network_of(model: nn.Module) -> nn.Module:
    """The network in a `Classifier`, or the model itself."""
    return model.network if isinstance(model, Classifier) else model


def _is_declared(model: nn.Module) -> bool:
    """Whether a `Classifier` was told that outputs may be probabilities."""
    return isinstance(model, Classifier) and model.kind in ("probabilities", "sigmoid", "one_logit")


def _ending_of(model: nn.Module, images: Tensor) -> Ending | None:
    """The softmax or sigmoid that a model ends in and that is to be left out of its logits; None for other models.

    Raises:
        InputError: if it cannot be told whether outputs are probabilities or logits.
    """
    if isinstance(model, Classifier):
        ending = None if model.kind == "regression" else model.ending(images)
    else:
        known = known_of(model)
        if "declares" not in known:
            with uncounted(), torch.no_grad():
                output = model(images[:1].clone())
            known["declares"] = isinstance(output, Regression) or has_labels(output)
        ending = None if known["declares"] else ending_of(model, images)
    if ending is None or _is_declared(model):
        return ending
    if ending.kind == "softmax":
        what = "returns probabilities already (rows add up to 1): no second softmax is applied"
    elif getattr(model, "declared", False):  # also of a classifier's prepared copy
        return None
    elif ending.call is not None:
        what = "ends in a sigmoid: its outputs are read as probabilities of independent labels (output='sigmoid')"
    else:
        raise InputError(
            f"all outputs of {_name_of(model)} lie in [0, 1], also for noise: pass output='sigmoid', or "
            "Classifier(model, output='sigmoid'), if they are probabilities of independent labels, and "
            "output='softmax' if they are logits"
        )
    warnings.warn(f"{_name_of(model)} {what}", stacklevel=4)
    return ending


def _check_unrounded(model: nn.Module, images: Tensor) -> None:
    """Raise `InputError` if a probability of an image is 1 up to rounding, so that its logit is lost."""
    where, given = (model.where, model.normalised(images)) if isinstance(model, Classifier) else (None, images)
    with uncounted(), torch.no_grad():
        found = field_of(network_of(model)(given.clone()), where, one=True)
    lost = found.reshape(len(images), -1).amax(dim=1) >= 1 - 2 * torch.finfo(found.dtype).eps
    if bool(lost.any()):
        raise InputError(
            f"image {int(lost.nonzero()[0])}: {_name_of(model)} returns a probability of 1 up to rounding, so its "
            "logit is lost; let the network return logits, or explain score='probability'"
        )


def per_image(target: Tensor | int, batch: int) -> Tensor:
    """The class of each image, int64 (B,), from one class for all images or one class per image.

    Raises:
        InputError: if the number of classes does not fit, and for numbers that are not integers.

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
    if batch and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
        wrong = int(targets[(targets < 0) | (targets >= classes)][0])
        raise InputError(f"target {wrong} is out of range: the model has classes 0 to {classes - 1}")
    return targets


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode inside the context, and restore its own mode afterwards.

    Contexts of several threads may overlap; the last one to end restores the mode.
    """
    with _guard:
        held = [part for part in model.modules() if getattr(part, "training", False) or id(part) in _held]
        for module in held:
            _held[id(module)] = _held.get(id(module), 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _guard:
            for module in held:
                _held[id(module)] -= 1
                if not _held[id(module)]:
                    del _held[id(module)]
                    module.training = True


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread explains or scores with any part of the model, and make others wait meanwhile.

    Explainers hook and change modules for the length of a call; another thread's pass would meet these changes.
    """
    me, parts = threading.get_ident(), [id(part) for part in model.modules()]
    with _free:
        _free.wait_for(lambda: all(_busy.get(part, (me, 0))[0] == me for part in parts))
        for part in parts:
            _busy[part] = (me, _busy.get(part, (me, 0))[1] + 1)
    try:
        yield
    finally:
        with _free:
            for part in parts:
                count = _busy.pop(part)[1] - 1
                if count:
                    _busy[part] = (me, count)
            _free.notify_all()


_backends: Any = torch.backends  # torch has no types for the new switches
PRODUCTS = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,
    _backends.cudnn.rnn,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
    _backends.mkldnn.rnn,
)
"""All backends that torch allows to round float32 to TF32 or bfloat16; convolutions on GPUs do so by default."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 in full float32 inside the context, on GPUs and CPUs, without TF32 or bfloat16.

    The settings are restored afterwards. Autocast is not affected.
    """
    # Torch has old and new switches. torch.compile reads the old ones, and this fails if the two differ, so both are
    # set. If the caller has mixed them, the old ones cannot be read and are left as they are.
    with _guard:  # the settings are those of all threads; the first context changes them, the last one restores them
        if not _precision:
            tf32 = _readable(lambda: torch.backends.cudnn.allow_tf32)
            matmul = _readable(torch.get_float32_matmul_precision)
            _precision.append((tf32, matmul, [product.fp32_precision for product in PRODUCTS]))
            full = ["ieee"] * len(PRODUCTS)
            _set_precision(None if tf32 is None else False, None if matmul is None else "highest", full)
        else:
            _precision.append(_precision[0])
    try:
        yield
    finally:
        with _guard:
            own = _precision.pop()
            if not _precision:
                _set_precision(*own)


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None


def _set_precision(tf32: bool | None, matmul: str | None, products: Iterable[str]) -> None:
    """Set both kinds of switches: the old ones first, because they change the new ones."""
    if tf32 is not None:
        torch.backends.cudnn.allow_tf32 = tf32
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    for product, precision in zip(PRODUCTS, products, strict=True):
        product.fp32_precision = precision


@contextmanager
def checked_images() -> Iterator[None]:
    """Skip the check of images in `probabilities` inside the context: the caller has checked the original images."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def checked(score_fn: ScoreFn) -> ScoreFn:
    """Wrap a score function so that its first result is checked by `check_probabilities`."""
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
    found_out = False

    def score(images: Tensor) -> Tensor:
        nonlocal ending, found_out
        if not _checked.get():
            check_images_for(model, images, "images")
        with alone(model), torch.no_grad(), evaluating(model), full_float32(), fitting(model, images, "images"):
            if not found_out:  # only once, because it waits for the device
                if not explains_itself(model):
                    _check_steady(model, images)
                ending, found_out = _ending_of(model, images), True
            found = model(images)
        if has_labels(found):
            score.of_labels = True  # type: ignore[attr-defined]  # `checked` accepts rows that do not add up to 1
            return scores_of(found, "probability")
        if isinstance(found, Regression):
            raise InputError("a regression has no class probabilities, which metrics need; explainers take it")
        if ending is None or _is_declared(model):
            return scores_of(found, "probability")
        if ending.kind == "sigmoid":
            score.of_labels = True  # type: ignore[attr-defined]
        output = logits_of(found)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    return score


def all_scores(score_fn: ScoreFn, images: Tensor, batch: int | None = None) -> Tensor:
    """The scores (B, K) of images, computed in batches of size `batch`; None chooses it by the device."""
    return torch.cat([score_fn(part) for part in torch.split(images, batch or default_batch(images))])


def scores_of_variants(
    score_fn: ScoreFn,
    images: Tensor,
    count: int,
    variant: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    batch: int | None = None,
) -> Tensor:
    """Scores of the target class for variants of each image, such as masked copies.

    Variants of all images form one sequence, which is passed in batches. So memory does not grow with their number.

    Args:
        score_fn: maps images to class scores.
        images: (B, C, H, W).
        count: number of variants of each image.
        variant: makes variants (m, C, H, W) from positions of images and numbers of variants, both (m,). If all
            variants are of one image, its position comes as (1,).
        target: class of each image, (B,).
        batch: images per pass; None chooses a size for the device.

    Returns:
        (B, count).
    """
    total, size = len(images) * count, batch or default_batch(images)
    # One tensor for all scores: many small ones would fragment the memory.
    scores = torch.empty(total, device=images.device, dtype=torch.promote_types(images.dtype, torch.float32))
    for first in range(0, total, size):
        jobs = torch.arange(first, min(first + size, total), device=images.device)
        b = jobs // count
        of_one = first // count == (first + len(jobs) - 1) // count  # all of one image, which need not be repeated
        found = score_fn(variant(b[:1] if of_one else b, jobs % count))
        if not first:  # only once, because it waits for the device
            target = resolve_target(target, found[:1].expand(len(images), -1))
        scores[first : first + len(jobs)] = found.gather(1, target[b][:, None])[:, 0].to(scores.dtype)
    return scores.view(len(images), count)


def default_batch(images: Tensor) -> int:
    """Batch size for many passes of images of the size of `images`, (..., H, W).

    On a CPU it is four images of 224 pixels per thread, and at most 16. Larger batches are not faster there, because
    memory is mapped again for every pass (see docs/results/speed.md).
    """
    at_224 = min(16, 4 * torch.get_num_threads()) if images.device.type == "cpu" else 128
    return max(1, at_224 * 224**2 // (images.shape[-2] * images.shape[-1]))
