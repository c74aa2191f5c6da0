"""Outputs of models: the type that our architectures return, and how logits are found in other outputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from interp_models.core.errors import InputError


class InterpOutput(NamedTuple):
    """Output of a forward pass of every architecture, in training and in evaluation.

    A named tuple is a pytree: DDP, `torch.export` and Lightning handle it without conversion.
    """

    logits: Tensor
    """(B, K): logits of the classes, before the softmax or, of a `LabelOutput`, the sigmoid."""
    maps: Tensor
    """(B, N, h, w): one map per part, prototype or head, on the model's own grid and not normalised. Values are at
    least 0 unless the model sets `signed_maps`."""
    aux: Mapping[str, Tensor] = {}  # never written to; a read-only mapping would not be a pytree
    """Further tensors for the model's own loss and explanations, such as features or distances."""


class LabelOutput(InterpOutput):
    """Output of an architecture that was built for several labels per image; its logits are those of `LabelLogits`."""

    __slots__ = ()


class LabelLogits(NamedTuple):
    """Logits of independent labels: the probability of label k is sigmoid(logits[:, k])."""

    logits: Tensor
    """(B, K): logits of the labels."""


class Regression(NamedTuple):
    """Output of a network that predicts one number z."""

    logits: Tensor
    """(B, 2): the scores -z of class 0 (down) and z of class 1 (up)."""


def has_labels(output: Any) -> bool:
    """Whether a model's output has the logits of independent labels, whose probabilities are their sigmoids."""
    return isinstance(output, LabelLogits | LabelOutput)


def field_of(output: Any, where: str | int | None = None, *, one: bool = False) -> Tensor:
    """Find the logits (B, K) in a model's output.

    Args:
        output: a tensor, an object with a field `logits` (such as `InterpOutput` or an output of Hugging Face), a
            tuple, list or dict.
        where: name of a field or key, or position in a tuple. None takes the tensor itself, else the field `logits`,
            else the only tensor (B, K) of a tuple, list or dict.
        one: whether to accept one value per image, (B,) or (B, 1).

    Raises:
        InputError: if there are no logits, several tensors (B, K), or whole numbers; the message says how to name one.
    """
    if where is not None:
        output = _named(output, where)
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            raise InputError(f"the model must return logits (batch, classes); got whole numbers ({output.dtype})")
        if output.dim() == 2 and not output.shape[1]:
            raise InputError(f"the model returns no classes: its logits have shape {tuple(output.shape)}")
        if output.dim() == 2 or (one and output.dim() == 1):
            return output
        if output.dim() == 1:
            raise InputError(
                "the model must return logits (batch, classes); got one value per image: for two classes pass "
                "output='one_logit', or Classifier(model, output='one_logit')"
            )
        raise InputError(f"the model must return logits (batch, classes); got shape {tuple(output.shape)}")
    if isinstance(getattr(output, "logits", None), Tensor):
        return field_of(output.logits, one=one)
    items: list[tuple[str | int, Any]] = []
    if isinstance(output, Mapping):
        if isinstance(output.get("logits"), Tensor):
            return field_of(output["logits"], one=one)
        items = list(output.items())
    elif isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        items = list(zip(names, output, strict=True))
    found = [(key, value) for key, value in items if isinstance(value, Tensor) and value.dim() == 2]
    rows = {len(value) for _, value in found}
    # Beside features (B, D), the logits may be one value per image, or (B, K, 1, 1).
    found += [(key, value) for key, value in items if _may_be_logits(value) and len(value) in rows]
    if len({id(value) for _, value in found}) == 1:
        return field_of(found[0][1])
    shown = ", ".join(f"{key!r} {tuple(value.shape)}" for key, value in found or items if isinstance(value, Tensor))
    what = f"several of them: {shown}" if found else f"{type(output).__name__}{f' with {shown}' if shown else ''}"
    raise InputError(
        "the model must return logits (batch, classes), or an object with a field 'logits'; "
        f"got {what}; say which they are with output=NAME or PLACE, or Classifier(model, output=...)"
    )


def _may_be_logits(value: Any) -> bool:
    """Whether a value is one number per image, (B,), or logits (B, K, 1, 1)."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.dim() == 1 or (value.dim() == 4 and value.shape[2:] == (1, 1))


def are_finite(logits: Tensor) -> Tensor:
    """Whether each image's logits (B, K) have a softmax: no NaN nor +∞, and not only -∞; bool (B,)."""
    return logits.detach().reshape(len(logits), -1).amax(dim=1).isfinite()


def check_finite(finite: Tensor, first: int | None = 0) -> None:
    """Raise `InputError` unless all values of `are_finite` hold; `first` is the number of the first image, if known."""
    if not bool(finite.all()):
        where = "" if first is None else f" for image {first + int((~finite).nonzero()[0])}"
        raise InputError(f"the model returns NaN or infinite values{where}")


def _named(output: Any, where: str | int) -> Any:
    try:
        if isinstance(where, str) and not isinstance(output, Mapping):
            return getattr(output, where)
        return output[where]
    except (AttributeError, KeyError, IndexError, TypeError):
        raise InputError(f"output={where!r}: the model returns {type(output).__name__}, which has none") from None
