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
        self.conv, self.fc, self.end, self.scale = nn.Conv2d(3, 5, 4, 4), nn.Linear(5, 3), end, scale

    def forward(self, x: Tensor) -> Any:
        return self.end(self.scale * self.fc(self.conv(x).relu().mean(dim=(2, 3))))


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
}
SIGMOIDS = {
    "method": lambda z: z.sigmoid(),
    "module": nn.Sigmoid(),
    "in place": lambda z: z.clone().sigmoid_(),
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
    "logarithms": lambda z: z.log_softmax(dim=1),
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
