"""What every explainer promises, as functions that fail with AssertionError."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.passes import are_counted
from interp_models.core.truth import Truth
from interp_models.explainers.base import Explainer


class DeliberateError(Exception):
    """What a model under test raises."""


Make = Callable[[nn.Module], Explainer]


def snapshot(model: nn.Module) -> list[object]:
    """Everything of a model that an explainer must leave as it was."""
    return [
        [(name, module.training) for name, module in model.named_modules()],
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for m in model.modules()
        ],
        [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()],
        [tensor.clone() for tensor in model.state_dict().values()],
        torch.is_grad_enabled(),
    ]


def same(before: list[object], after: list[object]) -> bool:
    """Whether two snapshots agree."""
    tensors = all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))  # type: ignore[call-overload]
    return tensors and before[:3] + before[4:] == after[:3] + after[4:]


def near(a: Tensor, b: Tensor, what: str, **tolerance: float) -> None:
    """Equal, or an AssertionError that says what is not."""
    torch.testing.assert_close(a, b, **tolerance, msg=lambda text: f"{what}: {text}")


def check_output(make: Make, model: nn.Module, images: Tensor) -> None:
    """Float32 (B, h, w), finite, detached, on the images' device, the same again, and no function of the batch."""
    explainer = make(model)
    maps = explainer.attribute(images)
    assert maps.dtype == torch.float32, f"maps are {maps.dtype}"
    assert maps.dim() == 3, f"maps have {maps.dim()} dimensions"
    assert len(maps) == len(images), "not one map per image"
    assert not maps.requires_grad, "maps have a graph"
    assert maps.device == images.device, "maps are on another device"
    assert bool(torch.isfinite(maps).all()), "maps are not finite"
    near(explainer.attribute(images), maps, "another map when asked again", rtol=0, atol=0)
    near(make(model).attribute(images), maps, "another map by another object", rtol=0, atol=0)
    scale = 1e-5 * float(maps.abs().max())
    one_by_one = torch.cat([explainer.attribute(image[None]) for image in images])
    near(one_by_one, maps, "another map one by one", rtol=1e-4, atol=scale)
    near(explainer.attribute(images.flip(0)).flip(0), maps, "another map in another order", rtol=1e-4, atol=scale)


def check_target(make: Make, model: nn.Module, images: Tensor, *, uses_target: bool) -> None:
    """None is the predicted class; a number or a tensor name it; other classes give other maps if they should."""
    explainer = make(model)
    with torch.no_grad():
        was = [(m, m.training) for m in model.modules()]
        model.eval()
        output = model(images)
        for module, mode in was:
            module.training = mode
    logits = output if isinstance(output, Tensor) else output.logits
    predicted = logits.argmax(dim=1)
    maps = explainer.attribute(images)
    near(explainer.attribute(images, predicted), maps, "None is not the predicted class")
    zero = explainer.attribute(images, 0)
    named = explainer.attribute(images, torch.zeros(len(images), dtype=torch.long))
    near(named, zero, "a tensor of classes is not read as a number")
    others = [explainer.attribute(images, c) for c in range(logits.shape[1])]
    scale = max(float(other.abs().max()) for other in others) or 1.0  # maps of products of gradients are tiny
    differ = any(not torch.allclose(other / scale, others[0] / scale, atol=1e-6) for other in others[1:])
    assert differ == uses_target, f"uses_target is {uses_target}, but maps of other classes differ: {differ}"


def check_leaves_no_trace(make: Make, model: nn.Module, images: Tensor) -> None:
    """The model is as it was after a call, after a context, and after an exception inside the model."""
    for index, module in enumerate(model.modules()):
        if index % 3 == 0:
            module.training = not module.training
    next(iter(model.parameters())).requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    before = snapshot(model)
    with make(model) as explainer:
        explainer.attribute(images)
    assert same(before, snapshot(model)), "a call left something behind"
    assert bool((last.grad == 1).all()), "a call changed .grad"

    leaves = [module for module in model.modules() if not list(module.children())]
    calls = {"left": 2 * len(leaves) // 3}

    def fail(module: nn.Module, args: object) -> None:
        calls["left"] -= are_counted()
        if calls["left"] <= 0:
            raise DeliberateError

    handles = [leaf.register_forward_pre_hook(fail) for leaf in leaves]
    before = snapshot(model)
    explainer = make(model)
    with contextlib.suppress(DeliberateError):  # a method that passes no image through the model does not meet it
        explainer.attribute(images)
    assert same(before, snapshot(model)), "a call that failed left something behind"
    for handle in handles:
        handle.remove()


def check_modes(make: Make, model: nn.Module, images: Tensor) -> None:
    """The same map in training mode, under no_grad, in inference mode, and for a frozen model."""
    maps = make(model.eval()).attribute(images)
    near(make(model.train()).attribute(images), maps, "another map in training mode")
    model.eval()
    with allowed("under no_grad"), torch.no_grad():
        near(make(model).attribute(images), maps, "another map under no_grad")
    with allowed("in inference mode"), torch.inference_mode():
        near(make(model).attribute(images.clone()), maps, "another map in inference mode")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with allowed("of a frozen model"):
        near(make(model).attribute(images), maps, "another map of a frozen model")


@contextlib.contextmanager
def allowed(where: str) -> Iterator[None]:
    """An error of torch here is a failure."""
    try:
        yield
    except RuntimeError as error:
        raise AssertionError(f"no map {where}: {error}") from None


def check_refusals(make: Make, model: nn.Module, images: Tensor) -> None:
    """Bad input ends in one clear line."""
    explainer = make(model)
    unordered = "float images (batch, channels, height, width)"
    refused(lambda: explainer.attribute(images[0]), unordered, "one image without a batch")
    refused(lambda: explainer.attribute(images[:0]), "float images", "no images")
    refused(lambda: explainer.attribute(torch.full_like(images, torch.nan)), "NaN", "NaN")
    if not explainer.uses_class and explainer.passes == "0":
        return
    out_of_range = "target 99 is out of range: the model has classes 0 to"
    refused(lambda: explainer.attribute(images, 99), out_of_range, "class 99")
    one_too_many = torch.zeros(len(images) + 1, dtype=torch.long)
    refused(lambda: explainer.attribute(images, one_too_many), "one per image", "a class too many")


def refused(call: Callable[[], object], message: str, what: str) -> None:
    """A call ends in one line with this message, an InputError."""
    line = refusal(call, what)
    assert line is not None, f"{what} is not refused"
    assert message in line, f"{what} is refused in other words: {line}"
    assert "\n" not in line, f"{what} is refused in several lines"


def refusal(call: Callable[[], object], what: str, kind: type[InputError] = InputError) -> str | None:
    """The message that a call ends in; None if it ends well."""
    try:
        call()
    except kind as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what} ends in {type(error).__name__}: {error}") from error
    return None


def check_passes(make: Make, model: nn.Module, images: Tensor) -> None:
    """Forward passes are as many as the class says, and go back to the images if it says so."""
    explainer = make(model)
    cls = type(explainer)
    explainer.preparation = "none"
    passes: list[tuple[int, bool]] = []
    truth = Truth(torch.tensor([[8.0, 16.0, 40.0, 30.0]] * len(images)))

    def note(module: nn.Module, args: Any) -> None:
        if are_counted():  # those that find out about the model, once, are not
            passes.append((len(args[0]), args[0].requires_grad and torch.is_grad_enabled()))

    handle = model.register_forward_pre_hook(note)
    explainer.attribute(images, torch.arange(len(images)), truth)
    handle.remove()
    known = {"channels": 8, "windows": 4, **vars(explainer), **vars(getattr(explainer, "base", explainer))}
    found = sum(count for count, _ in passes) / len(images)
    assert found == eval(cls.passes, known), f"passes = {cls.passes!r}, but there were {found}"
    back = any(differentiated for _, differentiated in passes)
    assert back == cls.back_to_images, f"back_to_images is {cls.back_to_images}, but a pass went back: {back}"


def check_refuses(make: Make, model: nn.Module, images: Tensor) -> None:
    """A network that lacks what the class says that it needs is refused, by name."""
    name = type(model).__name__
    line = refusal(lambda: make(model).attribute(images), name, NotApplicable)
    assert line is not None, f"{name} lacks what it says that it needs, but is not refused"
    assert name in line, f"the refusal does not name {name}: {line}"


CHECKS = (check_output, check_leaves_no_trace, check_modes, check_refusals)
