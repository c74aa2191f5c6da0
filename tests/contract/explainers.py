"""What every explainer promises, as functions that fail with AssertionError."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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


def check_output(make: Make, model: nn.Module, images: Tensor) -> None:
    """Float32 (B, h, w), finite, detached, on the images' device, the same again, and no function of the batch."""
    explainer = make(model)
    maps = explainer.attribute(images)
    assert maps.dtype == torch.float32
    assert maps.dim() == 3
    assert len(maps) == len(images)
    assert not maps.requires_grad
    assert maps.device == images.device
    assert bool(torch.isfinite(maps).all())
    torch.testing.assert_close(explainer.attribute(images), maps, rtol=0, atol=0)
    torch.testing.assert_close(make(model).attribute(images), maps, rtol=0, atol=0)
    one_by_one = torch.cat([explainer.attribute(image[None]) for image in images])
    torch.testing.assert_close(one_by_one, maps, rtol=1e-4, atol=1e-5 * float(maps.abs().max()))
    backwards = explainer.attribute(images.flip(0)).flip(0)
    torch.testing.assert_close(backwards, maps, rtol=1e-4, atol=1e-5 * float(maps.abs().max()))


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
    torch.testing.assert_close(explainer.attribute(images, predicted), maps)
    zero = explainer.attribute(images, 0)
    torch.testing.assert_close(explainer.attribute(images, torch.zeros(len(images), dtype=torch.long)), zero)
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
        calls["left"] -= 1
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
    torch.testing.assert_close(make(model.train()).attribute(images), maps)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(make(model).attribute(images), maps)
    with torch.inference_mode():
        torch.testing.assert_close(make(model).attribute(images.clone()), maps)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(make(model).attribute(images), maps)


def check_refusals(make: Make, model: nn.Module, images: Tensor) -> None:
    """Bad input ends in one clear line."""
    explainer = make(model)
    with pytest.raises(ValueError, match=r"float images \(batch, channels, height, width\)"):
        explainer.attribute(images[0])
    with pytest.raises(ValueError, match="float images"):
        explainer.attribute(images[:0])
    with pytest.raises(ValueError, match="NaN"):
        explainer.attribute(torch.full_like(images, torch.nan))
    with pytest.raises(ValueError, match="target 99 is out of range: the model has classes 0 to"):
        explainer.attribute(images, 99)
    with pytest.raises(ValueError, match="one per image"):
        explainer.attribute(images, torch.zeros(len(images) + 1, dtype=torch.long))


CHECKS = (check_output, check_leaves_no_trace, check_modes, check_refusals)
