"""Parts of a network that are recomputed, compiled or scripted: the right map, or the reason why there is none."""

import copy
import threading
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interp_models import EXPLAINERS, InputError, NotApplicable, probabilities
from interp_models.core.eager import compiled_again, eagerly
from interp_models.core.modes import PRODUCTS, full_float32


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU())


class Pooled(nn.Module):
    def __init__(self, features: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features, self.fc = features, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


class Checkpointed(Pooled):
    def __init__(self, features: Any, reentrant: bool) -> None:
        super().__init__(features)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(checkpoint(self.features, x, use_reentrant=self.reentrant).mean(dim=(2, 3)))


def images(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))


def explained(name: str, model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return EXPLAINERS.build(name, {**EXPLAINERS.get(name).small, **options}, model=model).attribute(x, 1)


OF_GRADIENTS = ("gradient", "guided_backprop", "smoothgrad", "integrated_gradients")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_recomputed_activations_are_refused(name: str, reentrant: bool) -> None:
    assert explained(name, Pooled(body()).eval(), images()).abs().sum() > 0
    with pytest.raises(NotApplicable, match="the network recomputes activations in its backward pass"):
        explained(name, Checkpointed(body(), reentrant).eval(), images())


@pytest.mark.parametrize("name", ["rise", "occlusion", "lime", "scorecam", "ablationcam", "sobol"])
def test_methods_without_gradients_take_checkpoints(name: str) -> None:
    options = {"window": 8, "stride": 8} if name == "occlusion" else {}
    expected = explained(name, Pooled(body()).eval(), images(), **options)
    model = Checkpointed(body(), reentrant=False).eval()
    torch.testing.assert_close(explained(name, model, images(), **options), expected)
    with pytest.raises(NotApplicable, match="the network recomputes activations"):
        explained("gradient", model, images())


class Inference(Pooled):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("name", ["gradient", "excitation_backprop", "relevancecam", "lrp", "deeplift", "gradcam"])
def test_a_forward_in_inference_mode_is_refused_where_gradients_are_needed(name: str) -> None:
    assert explained(name, Pooled(body()).eval(), images()).isfinite().all()
    with pytest.raises(NotApplicable, match=r"no gradient path|runs in inference mode"):
        explained(name, Inference(body()).eval(), images())
    torch.testing.assert_close(
        explained("rise", Inference(body()).eval(), images()), explained("rise", Pooled(body()).eval(), images())
    )


@pytest.mark.parametrize(("arch", "size"), [("test_vit", 64), ("resnet18", 64)])
@pytest.mark.parametrize("name", [*OF_GRADIENTS, "gradcam", "chefer", "gradsam", "attention_gradcam", "deconvnet"])
def test_timms_checkpoints_are_off_during_a_call(name: str, arch: str, size: int) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(arch, num_classes=4, **({"img_size": size} if "vit" in arch else {})).eval()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    try:
        expected = explained(name, plain, images(size))
    except NotApplicable:
        with pytest.raises(NotApplicable):
            explained(name, saving, images(size))
    else:
        assert torch.allclose(explained(name, saving, images(size)), expected, rtol=1e-4, atol=1e-7)
    assert saving.grad_checkpointing is True


class Two(nn.Module):
    """A part of any kind, and a ReLU in Python after it."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.part, self.after, self.fc = part, nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.after(self.part(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet", "smoothed_guided_backprop"])
def test_rules_do_not_pass_over_scripted_parts(name: str) -> None:
    assert explained(name, Two(body()).eval(), images()).abs().sum() > 0
    for part in (torch.jit.script(body()), torch.jit.trace(body(), images())):  # type: ignore[no-untyped-call]
        why = r"that (guided_backprop|deconvnet) cannot see|has parts made by torch.jit"
        with pytest.raises(NotApplicable, match=why):
            explained(name, Two(part).eval(), images())


@pytest.mark.parametrize("name", ["guided_backprop", "gradient", "gradcam"])
def test_compiled_parts_run_eagerly(name: str) -> None:
    expected = explained(name, Two(body()).eval(), images())
    model = Two(torch.compile(body(), backend="aot_eager")).eval()
    with torch.no_grad():
        model(images())  # compiled before hooks are there
    assert torch.allclose(explained(name, model, images()), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["guided_backprop", "gradient", "gradcam"])
def test_compiled_functions_run_eagerly(name: str) -> None:
    class Inside(Two):
        def __init__(self) -> None:
            super().__init__(body())
            self.g = torch.compile(super().forward, backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.g(x)
            return found

    expected = explained(name, Two(body()).eval(), images())
    assert torch.allclose(explained(name, Inside().eval(), images()), expected, rtol=1e-4, atol=1e-7)


def test_modules_without_weights_are_refused_before_a_pass() -> None:
    model = nn.Sequential(body(), nn.Flatten(), nn.LazyLinear(4)).eval()
    for call in (lambda: explained("gradient", model, images()), lambda: probabilities(model)(images())):
        with pytest.raises(InputError, match="LazyLinear has no weights yet"):
            call()
        assert isinstance(model[2], nn.LazyLinear)
    model(images())
    assert explained("gradient", model, images()).abs().sum() > 0


@pytest.mark.parametrize("name", ["gradcam", "activation_map", "scorecam", "random", "rise", "gradient"])
def test_scripted_networks(name: str) -> None:
    model, x = Pooled(body()).eval(), images()
    expected = explained(name, model, x)
    scripted = torch.jit.freeze(torch.jit.script(model))
    if name in ("random", "rise", "gradient"):
        assert torch.allclose(explained(name, scripted, x), expected, rtol=1e-4, atol=1e-6)
        return
    with pytest.raises(NotApplicable, match=r"parts made by torch\.jit cannot be read"):
        explained(name, scripted, x)


def test_quantised_layers_give_no_map_of_zeros() -> None:
    model = nn.Sequential(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    for name in ("gradient", "guided_backprop", "deconvnet", "opticam", "smoothed_guided_backprop"):
        assert explained(name, model, images()).abs().sum() > 0
        with pytest.raises(NotApplicable, match=r"no gradient path|has linear_dynamic, an operation that"):
            explained(name, quantised, images())


@pytest.mark.parametrize(("name", "training"), [("gradcam", False), ("scorecam", False), ("gradient", True)])
def test_threads_get_the_maps_of_one_alone(name: str, training: bool) -> None:
    model = Pooled(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())).train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pictures = [torch.rand(1, 3, 32, 32) for _ in range(4)]
    expected = [explained(name, model, x) for x in pictures]
    scored = [probabilities(model)(x) for x in pictures]
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(20):
                if not torch.allclose(explained(name, model, pictures[number]), expected[number], rtol=1e-4, atol=1e-8):
                    wrong.append("map")
                if not torch.allclose(probabilities(model)(pictures[number]), scored[number], atol=1e-6):
                    wrong.append("scores")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(part.training is training for part in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_precision_is_restored_by_the_last_of_several_threads() -> None:
    own = [product.fp32_precision for product in PRODUCTS]
    torch.set_float32_matmul_precision("high")
    try:
        first = full_float32()
        first.__enter__()
        second = full_float32()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        for product, precision in zip(PRODUCTS, own, strict=True):
            product.fp32_precision = precision


def test_an_error_of_the_network_is_not_taken_for_a_checkpoint() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken") as error:
        explained("gradient", Broken(), images())
    assert not isinstance(error.value, InputError)


@pytest.mark.parametrize("leaves_first", ["eagerly", "compiled_again"])
def test_the_stance_on_compilation_comes_back_after_several_threads(leaves_first: str) -> None:
    """Two threads: one in `eagerly`, one in `eagerly` and `compiled_again`. The user has a stance of their own."""
    model, meets, seen = nn.Linear(2, 2), [threading.Barrier(2, timeout=60) for _ in range(3)], []

    def stance() -> str:
        return str(torch._dynamo.eval_frame._stance.stance)

    def one() -> None:
        with eagerly(model):
            seen.append(stance())
            meets[0].wait()
            meets[1].wait()
            if leaves_first == "compiled_again":
                meets[2].wait()
        if leaves_first == "eagerly":
            meets[2].wait()

    def other() -> None:
        meets[0].wait()
        with eagerly(model):
            with compiled_again():
                seen.append(stance())
                meets[1].wait()
                if leaves_first == "eagerly":
                    meets[2].wait()
            if leaves_first == "compiled_again":
                seen.append(stance())
        if leaves_first == "compiled_again":
            meets[2].wait()

    with torch.compiler.set_stance("eager_on_recompile"):
        threads = [threading.Thread(target=work) for work in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stance() == "eager_on_recompile"
    assert seen == ["force_eager", "default", "force_eager"][: len(seen)]
    assert stance() == "default"


def test_what_was_compiled_runs_as_such_only_inside_eagerly() -> None:
    with torch.compiler.set_stance("eager_on_recompile"), compiled_again():
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"
