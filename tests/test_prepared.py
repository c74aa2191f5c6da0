"""Prepared copies give the same scores, follow the weights, and give way where they cannot be had."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from interp_models import MODELS
from interp_models.core.eager import eagerly
from interp_models.core.known import known_of
from interp_models.core.prepared import KERNELS, Fused, Prepared, prepare, release
from interp_models.core.scoring import logits_of
from tests.conftest import TINY, tiny_options


def trained(net: nn.Module) -> nn.Module:
    """Statistics of batch norm as after some training."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return net


def ours(name: str) -> nn.Module:
    return MODELS.build(name, tiny_options(name), num_classes=4)


NETS: dict[str, Any] = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None, num_classes=4),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(weights=None, num_classes=4),
    "densenet": lambda: timm.create_model("densenet121", num_classes=4),
    "efficientnet": lambda: timm.create_model(TINY, num_classes=4),
    "vit": lambda: timm.create_model("test_vit", num_classes=4, img_size=64),
    **{name: lambda name=name: ours(name) for name in MODELS.names()},
}
FOLDED = {"resnet18", "mobilenet", "efficientnet", *MODELS.names()}
"""Without any batch norm left."""


@pytest.mark.parametrize("name", NETS)
def test_scores_are_the_models(name: str) -> None:
    torch.manual_seed(0)
    net, images = trained(NETS[name]()), torch.rand(3, 3, 64, 64)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = prepare(net, images)
    assert isinstance(made, Prepared)
    left = sum(isinstance(part, nn.BatchNorm2d) for part in made.modules())
    assert (left == 0) == (name in FOLDED | {"vit"})
    assert net.training
    assert not made.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(parameter.requires_grad for parameter in made.parameters())
    net.eval()
    other = torch.rand(4, 3, 64, 64)  # not those that it was checked with
    with torch.no_grad():
        torch.testing.assert_close(made(other), logits_of(net(other)), rtol=1e-4, atol=1e-5)
    assert prepare(net, other) is made


@pytest.mark.parametrize("activation", KERNELS)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 4}, {"padding": (0, 2), "dilation": 2, "bias": False}])
def test_fused_convolutions_are_one_after_the_other(activation: type[nn.Module], options: dict[str, Any]) -> None:
    convolution, x = nn.Conv2d(4, 8, 3, **options), 4 * torch.randn(3, 4, 9, 12)
    fused = Fused(convolution, activation())
    expected = fused(x)
    assert expected.requires_grad
    with torch.no_grad():
        for laid in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(fused(laid), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_is_fused_and_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = trained(timm.create_model("tf_efficientnet_lite0", num_classes=4)).eval(), torch.rand(2, 3, 64, 64)
    made = prepare(net, images)
    assert sum(isinstance(part, Fused) for part in made.modules()) == 44
    monkeypatch.setitem(KERNELS, nn.ReLU6, ("hardtanh", [0.0, 5.0]))
    release(net)
    with pytest.warns(UserWarning, match="logits of its copy are"):
        assert prepare(net, images) is net
    assert not any(isinstance(part, Fused) for part in prepare(net, images, "bfloat16").modules())


def test_a_copy_that_errs_with_gradients_alone_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = trained(NETS["efficientnet"]()).eval(), torch.rand(2, 3, 64, 64)
    right = Fused.forward
    monkeypatch.setattr(Fused, "forward", lambda part, x: right(part, x) * (0.9 if torch.is_grad_enabled() else 1.0))
    with pytest.warns(UserWarning, match="logits of its copy are"):
        assert prepare(net, images) is net


def test_gradients_to_the_images_are_the_models() -> None:
    net = trained(NETS["resnet18"]()).eval()
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(net(images)[:, 1].sum(), images)
    (found,) = torch.autograd.grad(prepare(net, images)(images)[:, 1].sum(), images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_a_copy_follows_the_weights() -> None:
    net, images = trained(NETS["efficientnet"]()).eval(), torch.rand(2, 3, 64, 64)
    first = prepare(net, images)
    with torch.no_grad():
        net.conv_stem.weight.mul_(1.5)
    second = prepare(net, images)
    assert second is not first
    with torch.no_grad():
        torch.testing.assert_close(second(images), net(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first(images), net(images), atol=1e-3)
    net.conv_stem.weight.data.mul_(1.5)  # counts no version
    with torch.no_grad():
        torch.testing.assert_close(prepare(net, images)(images), net(images), rtol=1e-4, atol=1e-5)
    made = prepare(net, images)
    net.classifier = nn.Identity()  # another module, and a hook that intervenes
    assert prepare(net, images) is not made
    made = prepare(net, images)
    handle = net.conv_stem.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.warns(
        UserWarning, match="EfficientNet is used without a faster copy"
    ):  # it comes between what is folded
        assert prepare(net, images) is net
    handle.remove()
    net.classifier = NETS["efficientnet"]().classifier
    net.load_state_dict(NETS["efficientnet"]().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(prepare(net, images)(images), net(images), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """One batch norm after two convolutions, and one convolution before two batch norms: nothing can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return (self.norm(a) + self.norm(b) + self.other(a)).relu().mean(dim=(2, 3))


def test_what_is_used_twice_is_not_folded() -> None:
    net, images = trained(Twice()).eval(), torch.rand(2, 3, 16, 16)
    made = prepare(net, images)
    with torch.no_grad():
        torch.testing.assert_close(made(images), net(images), rtol=1e-4, atol=1e-5)


class Skip(nn.Module):
    """A convolution whose output goes on beside the batch norm, unseen by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return (self.norm(z) + z).mean(dim=(2, 3))


def test_a_copy_with_other_scores_gives_way_with_one_warning() -> None:
    net, images = trained(Skip()).eval(), torch.rand(2, 3, 16, 16)
    with pytest.warns(UserWarning, match="Skip is used without a faster copy: .* copy are .* of the largest away"):
        assert prepare(net, images) is net
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(net, images) is net


def test_a_model_that_cannot_be_copied_gives_way() -> None:
    net, images = NETS["efficientnet"]().eval(), torch.rand(2, 3, 64, 64)
    net.held = net.conv_stem.weight * 2  # no leaf of a graph: deepcopy refuses
    with pytest.warns(UserWarning, match="EfficientNet is used without a faster copy"):
        assert prepare(net, images) is net


def test_wrapped_models_and_trainers() -> None:
    class Wrapper(nn.Module):
        """As torch.compile does it."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

        def forward(self, x: Tensor) -> Any:
            return self._orig_mod(x)

    model, images = trained(ours("cnn")).eval(), torch.rand(2, 3, 64, 64)
    trainer = object()
    model._trainer = trainer  # type: ignore[assignment]
    made = prepare(Wrapper(model), images)
    assert isinstance(made, Prepared)
    assert type(made.model) is type(model)
    assert made.model._trainer is None
    assert model._trainer is trainer
    model._trainer = None  # type: ignore[assignment]
    assert prepare(made, images) is made
    assert prepare(model, images, "none") is model


def test_a_compiled_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
    net, images = trained(NETS["resnet18"]()).eval(), torch.rand(2, 3, 64, 64)
    made = prepare(net, images, "compiled")
    assert isinstance(made, Prepared)
    assert hasattr(made.run, "_torchdynamo_orig_callable")
    with torch.no_grad():
        torch.testing.assert_close(made(images), net(images), rtol=1e-4, atol=1e-5)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
        with eagerly(net):
            made(images)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert prepare(made, images) is made
    monkeypatch.setattr(torch, "compile", lambda model: 1 / 0)
    other = NETS["resnet18"]().eval()
    with pytest.warns(UserWarning, match="ResNet is used without a faster copy.*ZeroDivisionError"):
        assert prepare(other, images, "compiled") is other


class Late(nn.Module):
    """A convolution whose output is read where it is bright, beside its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return (self.norm(z) + (z - 0.3).relu()).mean(dim=(2, 3))


class Drawing(nn.Module):
    """Drops out in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x).mean(dim=(2, 3))


def test_what_a_few_dark_images_do_not_show_is_looked_for() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="Late is used without a faster copy"):
        prepare(trained(Late()).eval(), 0.01 * torch.rand(2, 3, 16, 16))


def test_a_model_that_draws_is_told_so() -> None:
    with pytest.warns(UserWarning, match="Drawing is used without a faster copy.*scores change from pass to pass"):
        prepare(Drawing().eval(), torch.rand(2, 3, 16, 16))


def test_autocast_is_the_callers() -> None:
    """A copy made under autocast is the copy made outside, and passes in the caller's precision."""
    net, images = trained(NETS["resnet18"]()).eval(), torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        made = prepare(net, images)
        coarse = made(images)
    assert isinstance(made, Prepared)
    assert prepare(net, images) is made
    with torch.no_grad():
        torch.testing.assert_close(made(images), net(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(coarse, made(images), rtol=1e-6, atol=1e-6)


def test_released_copies_are_made_anew() -> None:
    net, images = NETS["resnet18"]().eval(), torch.rand(2, 3, 64, 64)
    made = prepare(net, images)
    release(net)
    assert prepare(net, images) is not made


def test_bfloat16_is_near() -> None:
    net, images = trained(NETS["resnet18"]()).eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found, expected = prepare(net, images, "bfloat16")(images), net(images)
    assert found.dtype == torch.float32
    assert not torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


class Switched(nn.Module):
    """A network that reads more than its modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.sign, self.options, self.extra = 1.0, {"scale": [1.0]}, [torch.ones(4)]
        self.bag = [nn.Linear(6, 4)]

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.bn(self.conv(x)).relu().mean(dim=(2, 3))
        z: Tensor = self.sign * self.options["scale"][0] * (self.fc(pooled) + self.bag[0](pooled)) * self.extra[0]
        return z


def swap_rows(net: Switched) -> None:
    net.fc.weight.data = net.fc.weight.data[[1, 0, 3, 2]]


SURGERY: dict[str, Callable[[Switched], object]] = {
    "an attribute": lambda net: setattr(net, "sign", -1.0),
    "a value in a dictionary": lambda net: net.options.__setitem__("scale", [3.0]),
    "a tensor in a list": lambda net: net.extra[0].neg_(),
    "forward": lambda net: setattr(net, "forward", lambda x: Switched.forward(net, x) + x.mean(dim=(1, 2, 3))[:, None]),
    "forward of a part": lambda net: setattr(net.fc, "forward", lambda z: -nn.functional.linear(z, net.fc.weight)),
    "rows": swap_rows,
    "rows in place": lambda net: net.fc.weight.data.copy_(net.fc.weight.data[[1, 0, 3, 2]]),
    "a module in a list": lambda net: net.bag[0].weight.data.mul_(-1),
    "a module": lambda net: setattr(net, "fc", nn.Linear(6, 4)),
    "a hook": lambda net: net.fc.register_forward_hook(lambda module, args, output: -output),
}


@pytest.mark.parametrize("change", SURGERY.values(), ids=SURGERY)
def test_a_copy_is_made_again_after_surgery(change: Callable[[Switched], object]) -> None:
    net, images = Switched().eval(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        made = prepare(net, images)
        torch.testing.assert_close(made(images), net(images))
        assert prepare(net, images) is made
        known_of(net)["a"] = 1
        change(net)
        assert float((net(images) - made(images)).abs().max()) > 1e-3
        torch.testing.assert_close(prepare(net, images)(images), net(images))
    if change not in (
        SURGERY["rows in place"],
        SURGERY["a module in a list"],
    ):  # other values of the same weights leave the rest as it is
        assert known_of(net) == {}
