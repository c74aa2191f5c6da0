"""Networks that end in a softmax or a sigmoid, in all the ways that people write them."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp_models import EXPLAINERS, Classifier, InputError, judge, probabilities
from interp_models.core.endings import ending_of, without
from interp_models.core.scoring import read_as


class Ends(nn.Module):
    """A small network whose logits pass through a function."""

    def __init__(self, end: Any, scale: float = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.fc = nn.Conv2d(3, 5, 4, 4), nn.ReLU(), nn.Linear(5, 3)
        self.end, self.scale = end, scale

    def forward(self, x: Tensor) -> Any:
        return self.end(self.scale * self.fc(self.relu(self.conv(x)).mean(dim=(2, 3))))


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def no_grad(end: Any) -> Any:
    def ended(z: Tensor) -> Tensor:
        with torch.no_grad():
            return end(z)

    return ended


SOFTMAXES = {
    "method": lambda z: z.softmax(dim=1),
    "module": nn.Softmax(dim=1),
    "reshaped": lambda z: z.softmax(dim=1)[:, :, None, None].flatten(1),
    "of another": lambda z: z.softmax(dim=1).softmax(dim=1),
    "without a gradient": no_grad(lambda z: z.softmax(dim=1)),
    "softmin": lambda z: nn.functional.softmin(-z, dim=1),
    "softmin module": lambda z: nn.Softmin(dim=1)(-z),
    "operator": lambda z: torch.ops.aten.softmax.int(z, 1),
    "operator by its name": lambda z: torch.ops.aten._softmax(z, 1, half_to_float=False),
    "vmap": torch.vmap(lambda z: z.softmax(dim=0)),
}
SIGMOIDS = {
    "method": lambda z: z.sigmoid(),
    "module": nn.Sigmoid(),
    "in place": lambda z: z.clone().sigmoid_(),
    "operator": lambda z: torch.ops.aten.sigmoid.default(z),
    "of another": lambda z: z.sigmoid().sub(0.5).sigmoid(),
    "no_grad": no_grad(torch.sigmoid),
}
VALUES = {
    "stacked": lambda z: torch.stack([z[:, 0].sigmoid(), z[:, 1].sigmoid(), z[:, 2].sigmoid()], dim=1),
    "exponential": lambda z: 1 / (1 + (-z).exp()),
    "clamped": lambda z: z.sigmoid().clamp(1e-6, 1 - 1e-6),
    "mean of two": lambda z: (z.sigmoid() + (2 * z).sigmoid()) / 2,
    "dropped column": lambda z: z.softmax(dim=1)[:, :2],
    "two heads": lambda z: torch.cat([z.softmax(dim=1), (-z).softmax(dim=1)], dim=1),
}
LOGITS = {
    "plain": lambda z: z,
    "squared": lambda z: z**2,
    "gate": lambda z: z * z.sigmoid(),
    "behind a sigmoid": lambda z: nn.functional.linear(z.sigmoid(), torch.tensor([[2.0, -1, 1]] * 3)),
}


@pytest.mark.parametrize("end", SOFTMAXES.values(), ids=SOFTMAXES)
def test_a_softmax_is_found_and_left_out(end: Any) -> None:
    network = Ends(end).eval()
    ending = ending_of(network, images())
    assert ending is not None
    assert ending.kind == "softmax"
    assert ending.call is not None
    with without(ending, network):
        found = network(images())
    torch.testing.assert_close(found.softmax(dim=1), network(images()))
    plain = Ends(lambda z: z.softmax(dim=1) if end is SOFTMAXES["of another"] else z).eval()
    torch.testing.assert_close(found, plain(images()))


def test_a_softmax_of_half_precision_in_float32_is_found() -> None:
    for kind in (torch.float16, torch.bfloat16):
        network = Ends(lambda z, kind=kind: nn.functional.softmax(z.to(kind), dim=1, dtype=torch.float32)).eval()
        plain = Ends(lambda z, kind=kind: z.to(kind)).eval()
        for name in ("gradient", "gradcam", "rise"):
            options = {**EXPLAINERS.get(name).small, "score": "logit"}
            own, expected = (EXPLAINERS.build(name, options, model=model) for model in (network, plain))
            own.preparation = expected.preparation = "none"  # a copy rounds otherwise
            with pytest.warns(UserWarning, match="returns probabilities already"):
                found = own.attribute(images(), 1)
            torch.testing.assert_close(found, expected.attribute(images(), 1))


@pytest.mark.parametrize("name", ["gradient", "rise"])
def test_maps_behind_a_softmax_in_vmap_are_those_of_the_logits(name: str) -> None:
    network, plain, options = Ends(SOFTMAXES["vmap"]), Ends(nn.Identity()), EXPLAINERS.get(name).small
    options = {**options, "score": "logit"}
    with pytest.warns(UserWarning, match="returns probabilities already"):
        found = EXPLAINERS.build(name, options, model=network).attribute(images(), 1)
    torch.testing.assert_close(found, EXPLAINERS.build(name, options, model=plain).attribute(images(), 1))
    with pytest.warns(UserWarning, match="returns probabilities already"):
        torch.testing.assert_close(probabilities(network)(images()), plain(images()).softmax(dim=1))


LOG_SOFTMAXES = {
    "operator": lambda z: torch.ops.aten._log_softmax.default(z, 1, False),
    "method": lambda z: z.log_softmax(dim=1),
    "function": lambda z: nn.functional.log_softmax(z, dim=1),
    "module": nn.LogSoftmax(dim=1),
    "of another": lambda z: z.log_softmax(dim=1).log_softmax(dim=1),
}


@pytest.mark.parametrize("end", LOG_SOFTMAXES.values(), ids=LOG_SOFTMAXES)
def test_a_log_softmax_is_found_and_left_out(end: Any) -> None:
    network, plain = Ends(end).eval(), Ends(lambda z: z).eval()
    ending = ending_of(network, images())
    assert ending is not None
    assert ending.kind == "log_softmax"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(probabilities(network)(images()), plain(images()).softmax(dim=1))
    if end is not LOG_SOFTMAXES["of another"]:
        for score in ("logit", "probability"):
            found = EXPLAINERS.build("gradient", {"score": score}, model=network).attribute(images(), 1)
            expected = EXPLAINERS.build("gradient", {"score": score}, model=plain).attribute(images(), 1)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("explainer", ["gradient", "hirescam", "lime"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_maps_behind_a_log_softmax_are_no_rounding_noise(explainer: str, wrapped: bool) -> None:
    network, plain = Ends(nn.LogSoftmax(dim=1), scale=2000).eval(), Ends(lambda z: z, scale=2000).eval()
    target = int(plain(images(1)).argmax())
    assert float(network(images(1)).detach()[0, target]) == 0
    small = EXPLAINERS.get(explainer).small
    expected = EXPLAINERS.build(explainer, small, model=plain).attribute(images(1), target)
    assert float(expected.std()) > 0
    found = EXPLAINERS.build(explainer, small, model=Classifier(network) if wrapped else network)
    torch.testing.assert_close(found.attribute(images(1), target), expected)


def test_logarithms_by_other_operations_are_refused_where_they_are_rounded() -> None:
    def end(z: Tensor) -> Tensor:
        return z - z.logsumexp(dim=1, keepdim=True)

    found = EXPLAINERS.build("gradient", model=Ends(end)).attribute(images(), 0)
    assert float(found.std()) > 0
    with pytest.raises(InputError, match="image 0: Ends returns a probability of 1 up to rounding"):
        EXPLAINERS.build("gradient", model=Ends(end, scale=2000)).attribute(images(), 0)


class Loops(nn.Module):
    """A network that pools the cells of one image after another by an attention of its own."""

    def __init__(self, end: Any, *, own_heads: bool = False, some: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.q, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 1), nn.Linear(8, 5)
        self.end, self.own_heads, self.some = end, own_heads, some

    def forward(self, x: Tensor) -> Tensor:
        cells = self.conv(x).relu().flatten(2).transpose(1, 2)
        out = []
        for t in cells:
            weights = self.q(t).softmax(0) if not self.some or t.mean() > cells.mean() else self.q(t).sigmoid()
            weights = weights.softmax(0) if self.some and t.mean() > 0.2 else weights
            out.append((weights * t).sum(0))
        if self.own_heads:
            return torch.stack([self.end(self.head(one)[None])[0] for one in out])
        return self.end(self.head(torch.stack(out)))


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1), nn.Sigmoid()])
@pytest.mark.parametrize("explainer", ["gradient", "rise", "guided_backprop"])
def test_networks_that_loop_over_their_images(end: nn.Module, explainer: str) -> None:
    """The number of calls of softmax depends on the batch; the last one is left out."""
    network, plain = Loops(end).eval(), Loops(nn.Identity()).eval()
    ending = ending_of(network, images())
    assert ending is not None
    for n in (1, 2, 4):
        with without(ending, network):
            torch.testing.assert_close(network(images(n)), plain(images(n)))
    options = {"masks": 20, "score": "logit"} if explainer == "rise" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = EXPLAINERS.build(explainer, options, model=network).attribute(images(4), 1)
    torch.testing.assert_close(
        found, EXPLAINERS.build(explainer, options, model=plain).attribute(images(4), 1), rtol=1e-4, atol=1e-5
    )


def test_a_softmax_for_each_image_is_no_last_call() -> None:
    network = Loops(nn.Softmax(1), own_heads=True).eval()
    ending = ending_of(network, images())
    assert ending is not None
    assert (ending.kind, ending.call) == ("softmax", None)


def test_passes_with_another_number_of_calls_are_refused() -> None:
    class Twice(Loops):
        def forward(self, x: Tensor) -> Tensor:
            if self.some and len(x) == 4:
                x = x + 0 * x.softmax(1)
            return super().forward(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = Twice(nn.Softmax(1)).eval()
        EXPLAINERS.build("gradient", model=network).attribute(images(4), 1)
        ending = ending_of(network, images())
        assert ending is not None
        network.some = True
        with without(ending, network), pytest.raises(InputError, match="Twice calls softmax, sigmoid or log_softmax"):
            network(images(4))


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_mixtures_of_softmaxes_are_probabilities(score: str) -> None:
    merge = torch.eye(3)[[0, 1, 1]]
    network = Ends(lambda z: z.softmax(dim=1) @ merge).eval()
    with pytest.warns(UserWarning, match="returns probabilities already"):
        torch.testing.assert_close(probabilities(network)(images()), network(images()))
    end = torch.log if score == "logit" else nn.Identity()
    plain = Ends(lambda z: end((z.softmax(dim=1) @ merge)[:, :2])).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = EXPLAINERS.build("gradient", {"score": score}, model=network).attribute(images(), 1)
        expected = Ends(plain.end)
        x = images().requires_grad_(True)
        expected(x)[:, 1].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(found, x.grad.abs().amax(dim=1))


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1), nn.Identity()])
@pytest.mark.parametrize("explainer", ["gradient", "rise", "gradcam", "lime", "occlusion"])
def test_logits_that_are_not_finite_are_refused(explainer: str, end: nn.Module) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Ends(end)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return torch.where(x.mean(dim=(1, 2, 3))[:, None] > 0.9, torch.nan, y)

    network, x = Fails().eval(), images(3)
    bad = x.clone()
    bad[1] = 1
    small = {"window": 8, "stride": 8} if explainer == "occlusion" else EXPLAINERS.get(explainer).small
    method = EXPLAINERS.build(explainer, small, model=network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="the model returns NaN or infinite values for image 0"):
            method.attribute(bad[1:], 1)
        expected = EXPLAINERS.build(explainer, small, model=Ends(end).eval()).attribute(x, 1)
        torch.testing.assert_close(method.attribute(x, 1), expected)
        with pytest.raises(InputError, match="the model returns NaN or infinite values for image 1"):
            method.attribute(bad, 1)


@pytest.mark.parametrize(
    "explainer", ["deeplift", "excitation_backprop", "lrp", "relevancecam", "liftcam", "guided_backprop"]
)
@pytest.mark.parametrize("end", ["softmax", "sequential", "in place", "log_softmax", "wrapped"])
def test_rules_do_not_see_what_is_left_out(explainer: str, end: str) -> None:
    ends: dict[str, Any] = {
        "softmax": lambda z: z.softmax(dim=1),
        "in place": lambda z: nn.functional.softmax(z, 1).mul_(1.0),
        "log_softmax": lambda z: z.log_softmax(dim=1),
    }
    plain = Ends(lambda z: z, scale=30).eval()
    network: nn.Module = Ends(ends.get(end, nn.Identity()), scale=30).eval()
    network = nn.Sequential(network, nn.Softmax(1)) if end in ("sequential", "wrapped") else network
    network = Classifier(network, output="probabilities") if end == "wrapped" else network
    expected = EXPLAINERS.build(explainer, model=plain).attribute(images(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = EXPLAINERS.build(explainer, model=network).attribute(images(), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("end", SIGMOIDS.values(), ids=SIGMOIDS)
def test_a_sigmoid_is_found_and_left_out(end: Any) -> None:
    network = Ends(end).eval()
    ending = ending_of(network, images())
    assert ending is not None
    assert ending.kind == "sigmoid"
    assert ending.call is not None
    with without(ending, network):
        found = network(images())
    torch.testing.assert_close(found.sigmoid(), network(images()))
    with without(ending, network):
        torch.testing.assert_close(network(images()), found)  # each pass anew


@pytest.mark.parametrize("end", VALUES.values(), ids=VALUES)
def test_values_in_the_unit_interval_must_be_declared_or_are_taken_as_they_are(end: Any) -> None:
    network = Ends(end).eval()
    ending = ending_of(network, images())
    assert ending is not None
    assert (ending.kind, ending.call) == ("sigmoid", None)
    for explainer, options in (("rise", {"masks": 8}), ("gradcam", {"score": "probability"})):
        with pytest.raises(InputError, match=r"all outputs of Ends lie in \[0, 1\], also for noise: pass"):
            EXPLAINERS.build(explainer, options, model=network).attribute(images(), 1)
    with pytest.raises(InputError, match="pass output='sigmoid'"):
        judge(network, images(), ["random"], progress=False)
    labels = Classifier(network, output="sigmoid")
    torch.testing.assert_close(probabilities(labels)(images()), network(images()))
    logits = Classifier(network, output="softmax")
    torch.testing.assert_close(probabilities(logits)(images()), network(images()).softmax(dim=1))


@pytest.mark.parametrize("end", LOGITS.values(), ids=LOGITS)
def test_logits_are_no_probabilities(end: Any) -> None:
    network = Ends(end).eval()
    assert ending_of(network, images()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(probabilities(network)(images()), network(images()).softmax(dim=1))


@pytest.mark.parametrize("explainer", ["gradcam", "gradient", "occlusion", "rise"])
@pytest.mark.parametrize("output", [None, "softmax", "sigmoid", "probabilities"])
def test_maps_are_those_of_the_logits_also_where_probabilities_are_rounded_to_1(explainer: str, output: Any) -> None:
    """With this scale the probability of the first class is exactly 1; its logarithm has no gradient."""
    kind = output or "softmax"
    end = torch.sigmoid if kind == "sigmoid" else lambda z: z.softmax(dim=1)
    network, plain = Ends(end, scale=2000).eval(), Ends(lambda z: z, scale=2000).eval()
    target = int(plain(images(1)).argmax())
    assert float(network(images(1)).detach()[0, target]) == 1
    options: dict[str, Any] = {"rise": {"masks": 8}, "occlusion": {"window": 8, "stride": 8}}.get(explainer, {})
    expected = EXPLAINERS.build(explainer, {**options, "score": "logit"}, model=plain).attribute(images(1), target)
    assert float(expected.std()) > 0
    model = network if output is None else Classifier(network, output="softmax" if output == "softmax" else output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = EXPLAINERS.build(explainer, {**options, "score": "logit"}, model=model).attribute(images(1), target)
    torch.testing.assert_close(found, expected)


def test_a_logit_that_is_lost_by_rounding_is_refused() -> None:
    right = Classifier(Ends(lambda z: 1 / (1 + (-z).exp())), output="sigmoid")
    assert float(EXPLAINERS.build("gradient", model=right).attribute(images(), 0).std()) > 0
    lost = Classifier(Ends(lambda z: 1 / (1 + (-z).exp()), scale=2000), output="sigmoid")
    with pytest.raises(InputError, match="image 0: Classifier returns a probability of 1 up to rounding"):
        EXPLAINERS.build("gradient", model=lost).attribute(images(), 0)
    lost = Classifier(Ends(lambda z: 1 / (1 + (-z).exp()), scale=100), output="sigmoid")
    with pytest.raises(InputError, match="image 0: Classifier returns a probability of 1 up to rounding"):
        EXPLAINERS.build("gradient", model=lost).attribute(images(), 0)
    EXPLAINERS.build("gradient", {"score": "probability"}, model=lost).attribute(images(), 0)


@pytest.mark.parametrize("end", [*SIGMOIDS.values(), VALUES["exponential"]], ids=[*SIGMOIDS, "exponential"])
def test_one_value_behind_a_sigmoid_is_a_probability(end: Any) -> None:
    network = Ends(lambda z: end(z[:, :1])).eval()
    two = Classifier(network, output="one_logit")
    p = network(images())
    torch.testing.assert_close(probabilities(two)(images()), torch.cat([1 - p, p], dim=1))
    if end is not SIGMOIDS["no_grad"]:
        maps = EXPLAINERS.build("gradient", {"channels": "sum"}, model=two).attribute(images(), 1)
        plain = Classifier(Ends(lambda z: z[:, :1]).eval(), output="one_logit")
        if end is not SIGMOIDS["of another"]:
            torch.testing.assert_close(
                maps, EXPLAINERS.build("gradient", {"channels": "sum"}, model=plain).attribute(images(), 1)
            )


def test_percentages_are_refused() -> None:
    assert probabilities(Ends(lambda z: z))(images()).shape == (3, 3)
    with pytest.raises(InputError, match="values that add up to 100 for every image"):
        probabilities(Ends(lambda z: 100 * z.softmax(dim=1)))(images())


def test_prepared_copies_leave_it_out_too() -> None:
    network, plain = Ends(nn.Softmax(dim=1)).eval(), Ends(lambda z: z).eval()
    with pytest.warns(UserWarning, match="returns probabilities already"):
        probabilities(network)(images())
    options = {"masks": 40, "score": "logit"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = EXPLAINERS.build("rise", options, model=network).attribute(images(), 1)
    assert not any("faster copy" in str(warning.message) for warning in caught)
    torch.testing.assert_close(found, EXPLAINERS.build("rise", options, model=plain).attribute(images(), 1))


def test_predictions_that_change_are_refused() -> None:
    for end, says in (
        (lambda z: nn.functional.dropout(z, 0.5), "from pass to pass"),
        (lambda z: z - z.mean(dim=0), "with its batch"),
        (lambda z: z[:1], "returns 1 rows of logits for 1 image and 1 for 3"),
    ):
        with pytest.raises(InputError, match=says):
            EXPLAINERS.build("gradient", model=Ends(end)).attribute(images(), 0)
        with pytest.raises(InputError, match=says):
            probabilities(Ends(end))(images())
    with read_as(Ends(lambda z: z).eval(), images(), "logit"):
        pass
