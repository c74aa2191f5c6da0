"""How a model's outputs are to be read: as logits, or as probabilities because it ends in a softmax or a sigmoid."""

import warnings

import torch
from torch import Tensor, nn

from interp_models.core.classifier import Classifier
from interp_models.core.endings import Ending, ending_of
from interp_models.core.errors import InputError, first_line
from interp_models.core.known import known_of
from interp_models.core.outputs import Regression, are_finite, check_finite, field_of, has_labels
from interp_models.core.passes import uncounted
from interp_models.core.protocols import explains_itself


def typed_logits(model: nn.Module, images: Tensor) -> bool | None:
    """Whether the type of a model's output says what its logits are; None if there are no logits.

    It is found out once per state of the model, by a pass of the first image. With the same pass begins the check that
    logits depend neither on chance nor on the other images of a batch; models that explain themselves are trusted.

    Args:
        model: the model, in eval mode.
        images: images (B, C, H, W).

    Raises:
        InputError: if the logits of an image change from pass to pass, or with its batch.
    """
    known = known_of(model)
    if "typed_logits" in known:
        return bool(known["typed_logits"])
    with uncounted(), torch.no_grad():
        try:
            output = model(images[:1].clone())
            logits = field_of(output)
        except InputError:
            _check_squeezed(model, images)
            return None
        except AssertionError as error:
            shape = (1, *images.shape[1:])  # an exported program may take batches of another size only
            raise InputError(f"{name_of(model)} does not take images of shape {shape}: {first_line(error)}") from None
        if not explains_itself(model):
            _check_steady(model, images, logits)
    known["typed_logits"] = found = isinstance(output, Regression) or has_labels(output)
    return found


def _check_squeezed(model: nn.Module, images: Tensor) -> None:
    """Raise `InputError` if a model that gives no logits (1, K) for one image gives (2, K) for two."""
    try:
        field_of(model(torch.cat([images[:1], images[:1]])))
    except (InputError, AssertionError):
        return
    raise InputError(
        f"{name_of(model)} gives no logits (1, classes) for one image, but for two it does: it drops the axis of the "
        "batch, as squeeze() does; use flatten(1)"
    )


def _check_steady(model: nn.Module, images: Tensor, first: Tensor) -> None:
    """Raise `InputError` if the logits `first` of the first image depend on chance or on the other images of its
    batch."""
    name = name_of(model)
    check_finite(are_finite(first))
    other = images[:1].flip(3).roll(images.shape[2] // 2, dims=2)
    try:
        again = field_of(model(images[:1].clone()))
        beside = field_of(model(torch.cat([images[:1], other, other.flip(2)])))
    except AssertionError as error:
        raise _of_one_size(model, error) from None
    if len(first) != 1 or len(beside) != 3:
        raise InputError(f"{name} returns {len(first)} rows of logits for 1 image and {len(beside)} for 3")
    for found, why in ((again, "from pass to pass: switch its randomness off"), (beside[:1], "with its batch")):
        away = float((found.double() - first.double()).abs().max())
        if away > 1e-3 + 0.02 * float(first.double().abs().max()):
            raise InputError(f"the prediction of {name} for an image changes by {away:.2g} {why}; no map explains it")


def _of_one_size(model: nn.Module, error: AssertionError) -> InputError:
    """The refusal of an exported program, which takes batches of one size only."""
    return InputError(f"{name_of(model)} does not take batches of one and of three images: {first_line(error)}")


def name_of(model: nn.Module) -> str:
    """The class name of a model, for messages."""
    return str(getattr(model, "named", type(model).__name__))


def network_of(model: nn.Module) -> nn.Module:
    """The network in a `Classifier`, or the model itself."""
    return model.network if isinstance(model, Classifier) else model


def is_declared(model: nn.Module) -> bool:
    """Whether a `Classifier` was told that outputs may be probabilities."""
    return isinstance(model, Classifier) and model.kind in ("probabilities", "sigmoid", "one_logit")


def ending_to_leave_out(model: nn.Module, images: Tensor, *, typed: bool) -> Ending | None:
    """The softmax, log_softmax or sigmoid at the end of a model that is to be left out; None if there is none.

    Args:
        model: the model, in eval mode.
        images: images (B, C, H, W).
        typed: what `typed_logits` found.

    Raises:
        InputError: if it is unclear whether outputs are probabilities or logits.
    """
    if isinstance(model, Classifier):
        ending = None if model.kind == "regression" else model.ending(images)
    else:
        ending = None if typed else ending_of(model, images)
    if ending is not None and ending.kind == "log_softmax":
        return None if isinstance(model, Classifier) and model.kind != "softmax" else ending
    if ending is None or is_declared(model):
        return ending
    if ending.kind == "softmax":
        what = "returns probabilities already (rows add up to 1): no second softmax is applied"
    elif getattr(model, "declared", False):  # also of a classifier's prepared copy
        return None
    elif ending.call is not None:
        what = "ends in a sigmoid: its outputs are read as probabilities of independent labels (output='sigmoid')"
    else:
        raise InputError(
            f"all outputs of {name_of(model)} lie in [0, 1], also for noise: pass output='sigmoid', or "
            "Classifier(model, output='sigmoid'), if they are probabilities of independent labels, "
            "output='probabilities' if rows add up to 1, and output='softmax' if they are logits"
        )
    warnings.warn(f"{name_of(model)} {what}", stacklevel=4)
    return ending


def check_unrounded(model: nn.Module, images: Tensor, kind: str) -> None:
    """Raise `InputError` if a probability of an image, or its logarithm, is that of 1 up to rounding, so that its logit
    is lost."""
    where, given = (model.where, model.normalised(images)) if isinstance(model, Classifier) else (None, images)
    with uncounted(), torch.no_grad():
        found = field_of(network_of(model)(given.clone()), where, one=True)
    most = 0 if kind == "log_softmax" else 1
    lost = found.reshape(len(images), -1).amax(dim=1) >= most - 2 * torch.finfo(found.dtype).eps
    if bool(lost.any()):
        raise InputError(
            f"image {int(lost.nonzero()[0])}: {name_of(model)} returns a probability of 1 up to rounding, so its "
            "logit is lost; let the network return logits, or explain score='probability'"
        )
