"""Outputs of every form: each works, or ends in one line that says what to pass."""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp_models import EXPLAINERS, METRICS, Classifier, InputError, judge, probabilities
from interp_models.core.outputs import LabelLogits
from interp_models.core.scoring import logits_of, scores_of
from interp_models.metrics.case import Case

QUICK: dict[str, Any] = {"progress": False, "max_steps": 4, "grid": (4, 4)}


class Halves(nn.Module):
    """Class 0 is light at the left, class 1 at the right; the convolution passes pixels on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        return 10 * torch.stack([a[..., :16].mean((1, 2, 3)), a[..., 16:].mean((1, 2, 3))], dim=1) - 4


class Returns(nn.Module):
    """Halves, whose output is put in another form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.halves, self.form = Halves(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.halves(x), x)


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face's: keys are fields, too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


def images(n: int = 3) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


FORMS = {
    "object": lambda z, x: SimpleNamespace(logits=z, loss=z.mean()),
    "hugging face": lambda z, x: ModelOutput(loss=z.mean(), logits=z, hidden_states=(x,)),
    "dict": lambda z, x: {"features": x, "scores": z},
    "dict with logits": lambda z, x: {"logits": z, "embedding": x.flatten(1)},
    "tuple": lambda z, x: (x, z),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("explainer", ["gradcam", "rise"])
def test_forms_that_work_by_themselves(form: Any, explainer: str) -> None:
    options = {"masks": 8} if explainer == "rise" else {}
    expected = EXPLAINERS.build(explainer, options, model=Halves()).attribute(images(), 1)
    assert float(expected.std()) > 0
    torch.testing.assert_close(
        EXPLAINERS.build(explainer, options, model=Returns(form)).attribute(images(), 1), expected
    )
    found = judge(Returns(form), images(), ["gradcam"], target=1, **QUICK)
    again = judge(Halves(), images(), ["gradcam"], target=1, **QUICK)
    torch.testing.assert_close(torch.tensor(found.per_image["value"]), torch.tensor(again.per_image["value"]))


@pytest.mark.parametrize(
    ("form", "output", "says"),
    [
        (lambda z, x: (x.flatten(1), z), 1, r"several of them: 0 \(\d, 3072\), 1 \(\d, 2\); say which"),
        (lambda z, x: (z, -z), 0, r"several of them: 0 \(\d, 2\), 1 \(\d, 2\); say which"),
        (lambda z, x: {"a": z, "b": x.flatten(1)}, "a", r"several of them: 'a' \(\d, 2\)"),
        (lambda z, x: SimpleNamespace(y=z), "y", "or an object with a field 'logits'; got SimpleNamespace"),
        (lambda z, x: [{"deep": z}], 0, "with output=NAME or PLACE"),
    ],
)
def test_forms_that_must_be_named(form: Any, output: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        EXPLAINERS.build("gradcam", model=Returns(form)).attribute(images(), 1)
    with pytest.raises(InputError, match=says):
        judge(Returns(form), images(), ["gradcam"], **QUICK)
    named = Classifier(Returns(form), output=output)
    expected = EXPLAINERS.build("gradcam", model=Halves()).attribute(images(), 1)
    torch.testing.assert_close(EXPLAINERS.build("gradcam", model=named).attribute(images(), 1), expected)


class OneLogit(nn.Module):
    """High where light is at the left; (B,) or (B, 1)."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data = torch.eye(3)[:, :, None, None]
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        z = 20 * self.conv(x)[..., :16].mean((1, 2, 3)) - 10
        return z if self.flat else z[:, None]


@pytest.mark.parametrize("flat", [True, False])
def test_one_logit_for_two_classes(flat: bool) -> None:
    model = OneLogit(flat).eval()
    window = {"window": 8, "stride": 8}
    for explainer, options in (("rise", {"masks": 4}), ("occlusion", {**window, "score": "probability"})):
        with pytest.raises(InputError, match="output='one_logit'"):
            EXPLAINERS.build(explainer, options, model=model).attribute(images(), 0)
    with pytest.raises(InputError, match="output='one_logit'"):
        judge(model, images(), ["random"], **QUICK)
    two = Classifier(model, output="one_logit")
    z = model(images()).flatten()
    torch.testing.assert_close(probabilities(two)(images()), torch.stack([1 - z.sigmoid(), z.sigmoid()], dim=1))
    of_one, of_zero = (EXPLAINERS.build("occlusion", window, model=two).attribute(images(), k) for k in (1, 0))
    assert float(of_one[:, :, :16].mean()) > 0
    torch.testing.assert_close(of_one[:, :, 16:], torch.zeros_like(of_one[:, :, 16:]), atol=1e-6, rtol=0)
    torch.testing.assert_close(of_zero, -of_one)
    good = torch.zeros(3, 4, 4)
    good[:, :, :2] = 1 + 0.01 * torch.rand(3, 4, 2)
    metric = METRICS.build("dauc", {"max_steps": 4})
    right, wrong = (metric.score(Case(images(), m, 1, probabilities(two)))["dauc"] for m in (good, -good))
    assert bool((right < wrong).all())


class Labels(Returns):
    """Independent labels: logits, or their sigmoid."""

    def __init__(self, squashed: bool) -> None:
        super().__init__((lambda z, x: z.sigmoid()) if squashed else (lambda z, x: z))


@pytest.mark.parametrize("squashed", [True, False])
def test_independent_labels(squashed: bool) -> None:
    model = Labels(squashed)
    if squashed:
        with pytest.warns(UserWarning, match=r"Labels ends in a sigmoid.*output='sigmoid'"):
            judge(model, images(), ["random"], **QUICK)
    labels = Classifier(model, output="sigmoid")
    expected = Halves()(images()).sigmoid()
    torch.testing.assert_close(probabilities(labels)(images()), expected)
    assert isinstance(labels(images()), LabelLogits)
    torch.testing.assert_close(labels(images()).logits, Halves()(images()), rtol=1e-4, atol=1e-4)
    options = {"window": 8, "stride": 8, "score": "probability"}
    map_of_left = EXPLAINERS.build("occlusion", options, model=labels).attribute(images(), 0)
    assert float(map_of_left[:, :, :16].abs().mean()) > 1e-3
    torch.testing.assert_close(map_of_left[:, :, 16:], torch.zeros(3, 32, 16), atol=1e-6, rtol=0)  # no influence
    found = judge(model, images(), ["gradcam", "rise"], output="sigmoid", **QUICK)
    first = found.per_image.drop_duplicates("index")
    torch.testing.assert_close(torch.tensor(first["confidence"].to_numpy()), expected.max(dim=1).values)


def test_logits_that_lie_in_the_unit_interval_are_still_logits() -> None:
    model = Returns(lambda z, x: (z + 4) / 20)
    z = model(images())
    assert bool(((z > 0) & (z < 1)).all())
    torch.testing.assert_close(probabilities(model)(images()), z.softmax(dim=1))


def test_refusals() -> None:
    assert logits_of(torch.zeros(1, 2)).shape == (1, 2)
    for wrong, says in ((["softmax", "sigmoid"], "one of softmax, sigmoid, one_logit"), (1.5, "must be the name")):
        with pytest.raises((InputError, TypeError), match=says if wrong != 1.5 else None):
            Classifier(Halves(), output=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs mean and std, or neither"):
        Classifier(Halves(), mean=(0.5,) * 3)
    with pytest.raises(InputError, match="std must be above 0"):
        Classifier(Halves(), mean=(0.5,) * 3, std=(0.0,) * 3)
    with pytest.raises(InputError, match="output='nope': the model returns Tensor, which has none"):
        Classifier(Halves(), output="nope")(images())
    with pytest.raises(InputError, match="returns 2 values per image, not one"):
        Classifier(Halves(), output="one_logit")(images())
    with pytest.raises(InputError, match="whose softmax is always 1"):
        scores_of(torch.zeros(2, 1), "probability")
    with pytest.raises(InputError, match=r"must have 3 channels"):
        EXPLAINERS.build("gradcam", model=Classifier(Halves(), mean=(0.5,) * 3, std=(0.5,) * 3)).attribute(
            torch.rand(1, 1, 32, 32)
        )


class Ends(nn.Module):
    """A small network whose logits pass through a function."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.end = nn.Conv2d(3, 5, 4, 4), nn.Linear(5, 3), end

    def forward(self, x: Tensor) -> Any:
        return self.end(3 * self.fc(self.conv(x).relu().mean(dim=(2, 3))))


@pytest.mark.parametrize("score", ["logit", "probability"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("rise", {"masks": 20}), ("occlusion", {"window": 8, "stride": 8}), ("gradient", {}), ("gradcam", {})],
)
def test_a_network_that_ends_in_a_softmax_gets_no_second_one(name: str, options: Any, score: str) -> None:
    ended, declared = Ends(lambda z: z.softmax(dim=1)), Classifier(Ends(lambda z: z.softmax(1)), output="probabilities")
    with pytest.warns(UserWarning, match="returns probabilities already"):
        found = EXPLAINERS.build(name, {**options, "score": score}, model=ended).attribute(images(), 1)
    plain = Ends(lambda z: z)
    expected = EXPLAINERS.build(name, {**options, "score": score}, model=plain).attribute(images(), 1)
    assert float(expected.std()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    again = EXPLAINERS.build(name, {**options, "score": score}, model=declared).attribute(images(), 1)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probabilities(declared)(images()), ended(images()), rtol=1e-4, atol=1e-6)


def test_what_are_no_probabilities_is_refused() -> None:
    right = Classifier(Ends(lambda z: z.softmax(dim=1)), output="probabilities")
    assert right(images()).shape == (3, 3)
    with pytest.raises(InputError, match="output probabilities: the rows that the network returns are not in"):
        Classifier(Ends(lambda z: z), output="probabilities")(images())


def test_explainers_put_no_softmax_on_sigmoids() -> None:
    ended = Ends(lambda z: z.sigmoid())
    named = Classifier(Ends(lambda z: z), output="sigmoid")
    for name, options in (("rise", {"masks": 20}), ("occlusion", {"window": 8, "stride": 8, "score": "probability"})):
        expected = EXPLAINERS.build(name, options, model=named).attribute(images(), 1)
        assert float(expected.std()) > 0
        with pytest.warns(UserWarning, match=r"Ends ends in a sigmoid.*output='sigmoid'"):
            torch.testing.assert_close(EXPLAINERS.build(name, options, model=ended).attribute(images(), 1), expected)
        declared = EXPLAINERS.build(name, options, model=Classifier(ended, output="sigmoid"))
        torch.testing.assert_close(declared.attribute(images(), 1), expected)


def test_a_regression_is_explained_up_and_down() -> None:
    for shape in ((-1,), (-1, 1)):
        network = Ends(lambda z, shape=shape: z[:, 0].view(shape))
        model = Classifier(network, output="regression")
        x = images().requires_grad_(True)
        (expected,) = torch.autograd.grad(network(x).sum(), x)
        up, down = (
            EXPLAINERS.build("gradient", {"channels": "sum"}, model=model).attribute(images(), target)
            for target in (1, 0)
        )
        torch.testing.assert_close(up, expected.sum(dim=1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(down, -up)
        rise = EXPLAINERS.build("rise", {"masks": 20}, model=model)
        torch.testing.assert_close(rise.attribute(images(), 1), -rise.attribute(images(), 0))
        with pytest.raises(InputError, match="a regression has no class probabilities, which metrics need"):
            probabilities(model)(images())
        with pytest.raises(InputError, match="a regression has no class probabilities"):
            judge(model, images(), ["gradcam"], **QUICK)


def test_a_row_that_adds_up_to_one_by_chance_is_no_probability() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            light = x.mean(dim=(1, 2, 3))
            return torch.stack([light, light * 0], dim=1)

    white = torch.ones(1, 3, 8, 8)
    torch.testing.assert_close(probabilities(Sums())(white), torch.tensor([[1.0, 0.0]]).softmax(dim=1))
    with pytest.warns(UserWarning, match="returns probabilities already"):
        torch.testing.assert_close(
            probabilities(nn.Sequential(Sums(), nn.Softmax(dim=1)))(white), torch.tensor([[1.0, 0.0]]).softmax(dim=1)
        )
