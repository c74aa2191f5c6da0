"""Every registered explainer keeps the contract, on our models and on anybody's; wrong ones do not."""

import contextlib
import copy
import dataclasses
import inspect
import typing

import pytest
import torch
from torch import nn

from interp_models import EXPLAINERS, MODELS
from interp_models.config.describe import attribute_notes
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.modes import evaluating
from interp_models.core.schema import schema_of
from interp_models.core.scoring import resolve_target
from interp_models.core.traits import TRAITS
from interp_models.explainers.base import Explainer
from tests.contract import explainers as contract
from tests.contract.subjects import SUBJECTS, applies, bare, host, maker, options, prepare, shown

LAYERS = {name for name in EXPLAINERS if "layer" in EXPLAINERS.options(name, {}, given=("model",))}


QUICK = ("cnn", "sequential", "vit")
"""Networks on which the contract is always checked, beside the explainer's own; the others are slow together."""


def cases():
    pairs = [(e, s) for e in EXPLAINERS for s in SUBJECTS if applies(e, s)]
    marks = {pair: () if pair[1] in (*QUICK, host(pair[0])) else pytest.mark.slow for pair in pairs}
    return [pytest.param(*pair, id="-".join(pair), marks=marks[pair]) for pair in pairs]


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_what_it_needs_exists(explainer):
    cls = EXPLAINERS.get(explainer)
    assert set(cls.needs) <= set(TRAITS)
    assert host(explainer)
    EXPLAINERS.options(explainer, cls.small, given=("model",))  # which are options


def without_text(cls):
    """Options that `--help` gives no text for."""
    names = {field.name for field in dataclasses.fields(schema_of(cls, ("model",)))}
    notes = attribute_notes(cls) if dataclasses.is_dataclass(cls) else {}
    return {name for name in names if name not in notes and f"\n    {name}: " not in (inspect.getdoc(cls) or "")}


def fields_that_are_no_options(cls):
    """Fields of a class without the decorator of a dataclass, which its constructor does not take."""
    bases = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    written = {name: hint for base in bases for name, hint in inspect.get_annotations(base).items() if name != "_"}
    fields = {name for name, hint in written.items() if typing.get_origin(hint) is not typing.ClassVar}
    return fields - set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_options_are_told(explainer):
    cls = EXPLAINERS.get(explainer)
    assert without_text(cls) == set()
    assert fields_that_are_no_options(cls) == set()


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_choices_are_checked(explainer):
    """Of an option with a few words, in Python as in configs."""
    cls, net = EXPLAINERS.get(explainer), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    hints = typing.get_type_hints(cls.__init__)
    words = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    for name, allowed in words.items():
        with pytest.raises(InputError, match=f"^{name} must be one of .*; got 'neither'$"):
            cls(net, **{name: "neither"})
        for word in allowed:
            with contextlib.suppress(NotApplicable):
                assert cls(net, **{name: word})


def test_options_that_are_not_told_are_found():
    class Undecorated(EXPLAINERS.get("fem")):
        factor: float = 1.0

    @dataclasses.dataclass(kw_only=True, eq=False, repr=False)
    class Untold(EXPLAINERS.get("fem")):
        factor: float = 1.0

    assert fields_that_are_no_options(Undecorated) == {"factor"}
    assert without_text(Untold) == {"factor"}


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_passes_are_those_that_it_says(explainer):
    subject = host(explainer)
    made = EXPLAINERS.get(explainer)
    contract.check_passes(lambda model: made(model, **options(explainer, subject)), *prepare(subject))


REFUSED = [pytest.param(e, s, id=f"{e}-{s}") for e in EXPLAINERS for s in SUBJECTS if not applies(e, s)]


@pytest.mark.parametrize(("explainer", "subject"), REFUSED)
def test_refusals_where_a_need_is_missing(explainer, subject):
    model, images = prepare(subject)
    if subject in MODELS:  # features of its small trunk are tiny: a product of two would hardly show
        factor = 8 if subject == "prototree" else 30  # with 30 its routes are sure, and nothing changes its scores
        trunk = {id(parameter) for parameter in model.parameter_groups()["backbone"]}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 if id(parameter) in trunk else factor)
    contract.check_refuses(maker(explainer, subject), model, images)


class InPlace(nn.Module):
    """Normalises the images that it is given, and not a copy of them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images.sub_(0.5).div_(0.25))


class OutOfPlace(InPlace):
    def forward(self, images):
        return super().forward(images.clone())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("explainer", ["gradcam", "rise", "occlusion", "lime"])
def test_models_that_change_their_images(explainer, channels_last):
    """Refused, or explained as those that do not; the caller's images stay as they were."""
    model, images = prepare("sequential")
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    before = images.clone()
    expected = maker(explainer, "sequential")(OutOfPlace(model)).attribute(images)
    explain = maker(explainer, "sequential")(InPlace(model)).attribute
    if explainer == "gradcam" or channels_last:
        with pytest.raises(InputError, match="InPlace changes its images in place"):
            explain(images)
    else:  # copies are given images in another memory format, and change those
        torch.testing.assert_close(explain(images), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("explainer", "subject"), cases())
@pytest.mark.parametrize("check", contract.CHECKS)
def test_contract(explainer, subject, check):
    model, images = prepare(subject)
    cls = EXPLAINERS.get(explainer)
    amplified = cls.amplifies_rounding or getattr(model, "amplifies_rounding", False)
    if amplified and check is contract.check_output:
        model, images = model.double(), images.double()
    check(maker(explainer, subject), model, images)


@pytest.mark.parametrize(("explainer", "subject"), cases())
def test_target(explainer, subject):
    model, images = prepare(subject)
    cls = EXPLAINERS.get(explainer)
    uses = MODELS.get(subject).class_maps if "explain" in cls.needs else cls.uses_class
    contract.check_target(maker(explainer, subject), model, images, uses_target=uses)


WRAPPERS = {"parallel": nn.DataParallel, "compiled": lambda model: torch.compile(model, backend="eager")}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("explainer", ["gradcam", "scorecam", "guided_backprop", "integrated_gradients", "rise"])
def test_wrapped_models(explainer, wrap):
    model, images = prepare("sequential")
    expected = maker(explainer, "sequential")(model).attribute(images, 1)
    wrapped = wrap(model)
    wrapped(images)
    torch.testing.assert_close(maker(explainer, "sequential")(wrapped).attribute(images, 1), expected)


class Elementwise(nn.Module):
    """Its scores are of float32 under autocast, too, so that only an explainer's own sums could be coarse."""

    def __init__(self):
        super().__init__()
        self.features = nn.Identity()
        self.weight = nn.Parameter(torch.rand(4, 5) - 0.3)

    def forward(self, x):
        parts = [x[:, 0], x[:, 1] * x[:, 2], (x[:, 0] - x[:, 1]).relu(), x[:, 2].square(), x.mean(dim=1)]
        pooled = self.features(torch.stack(parts, dim=1)).mean(dim=(2, 3)).tanh()
        return (pooled[:, None] * self.weight).sum(dim=2)


@pytest.mark.parametrize("explainer", [e for e in EXPLAINERS if not EXPLAINERS.get(e).needs])
def test_sums_are_of_float32_under_autocast(explainer):
    torch.manual_seed(0)
    model, images = Elementwise().eval(), torch.rand(2, 3, 64, 64)
    settings = options(explainer, "elementwise")
    layer = {"layer": "features"} if explainer in LAYERS else {}
    make = shown(EXPLAINERS.build(explainer, settings | layer, model=model))
    expected = make.attribute(images, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = make.attribute(images, 1)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("explainer", [e for e in EXPLAINERS if EXPLAINERS.get(e).stands_bfloat16])
def test_autocast(explainer):
    """Passes in bfloat16: near the map of float32, as far as bfloat16's eight bits go."""
    subject = host(explainer)
    model, images = prepare(subject)
    expected = maker(explainer, subject)(copy.deepcopy(model)).attribute(images, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = maker(explainer, subject)(model).attribute(images, 0)
    assert maps.dtype == torch.float32
    alike = torch.nn.functional.cosine_similarity(maps.flatten(1), expected.flatten(1))
    assert float(alike.min()) > 0.9


def test_intrinsic_refuses_a_model_that_does_not_explain_itself():
    with pytest.raises(ValueError, match=r"needs a model that explains itself; .* has no method explain"):
        EXPLAINERS.build("intrinsic", model=bare())


class Good(Explainer):
    """The absolute gradient, done right."""

    def _attribute(self, inputs, target):
        x = inputs.clone().requires_grad_(True)
        with torch.enable_grad():
            logits = self.model(x)
            logits = logits if isinstance(logits, torch.Tensor) else logits.logits
            score = logits.gather(1, resolve_target(target, logits)[:, None]).sum()
        return torch.autograd.grad(score, x)[0].abs().sum(1)


class BatchNormalised(Good):
    def _attribute(self, inputs, target):
        maps = super()._attribute(inputs, target)
        return maps / maps.max()


class Backward(Good):
    def _attribute(self, inputs, target):
        x = inputs.clone().requires_grad_(True)
        with torch.enable_grad():
            self.model(x).max(1).values.sum().backward()
        return x.grad.abs().sum(1)


class LeavesHook(Good):
    def _attribute(self, inputs, target):
        self.model[0].register_forward_hook(lambda *_: None)
        return super()._attribute(inputs, target)


class LeavesHookOnError(Good):
    def _attribute(self, inputs, target):
        handle = self.model[0].register_forward_hook(lambda *_: None)
        maps = super()._attribute(inputs, target)
        handle.remove()
        return maps


class Unseeded(Good):
    def _attribute(self, inputs, target):
        return super()._attribute(inputs + 0.1 * torch.randn_like(inputs), target)


class TrainsOnTheQuiet(Good):
    def _attribute(self, inputs, target):
        self.model.train()
        return super()._attribute(inputs, target)


class IgnoresTarget(Good):
    def _attribute(self, inputs, target):
        return super()._attribute(inputs, None)


class ForTraining(Good):
    """Turns to training mode what was in training mode."""

    def attribute(self, inputs, target=None, truth=None):
        return self._attribute(inputs, target).detach()


class NeedsGradients(Good):
    """Relies on gradients being on."""

    def attribute(self, inputs, target=None, truth=None):
        with evaluating(self.model):
            x = inputs.clone().requires_grad_(True)
            logits = self.model(x)
            score = logits.gather(1, resolve_target(target, logits)[:, None]).sum()
            return torch.autograd.grad(score, x)[0].abs().sum(1)


class NeedsWeights(Good):
    """Relies on weights that learn."""

    def _attribute(self, inputs, target):
        with torch.enable_grad():
            logits = self.model(inputs)
            score = logits.gather(1, resolve_target(target, logits)[:, None]).sum()
            torch.autograd.grad(score, next(iter(self.model.parameters())))
        return super()._attribute(inputs, target)


class TakesAnything(Good):
    def attribute(self, inputs, target=None, truth=None):
        try:
            return super().attribute(inputs, target, truth)
        except InputError:
            return torch.zeros(1, 1, 1)


class AnyClass(Good):
    def _attribute(self, inputs, target):
        return super()._attribute(inputs, None if target is None else torch.as_tensor(target).clamp(max=3))


class TwoLines(Good):
    def attribute(self, inputs, target=None, truth=None):
        try:
            return super().attribute(inputs, target, truth)
        except InputError as error:
            raise InputError(f"{error}\nSee above.") from None


WRONG = [
    (BatchNormalised, contract.check_output, "another map one by one"),
    (Unseeded, contract.check_output, "another map when asked again"),
    (Backward, contract.check_leaves_no_trace, "a call left something behind|a call changed .grad"),
    (LeavesHook, contract.check_leaves_no_trace, "a call left something behind"),
    (LeavesHookOnError, contract.check_leaves_no_trace, "a call that failed left something behind"),
    (TrainsOnTheQuiet, contract.check_leaves_no_trace, "a call left something behind"),
    (ForTraining, contract.check_modes, "another map in training mode"),
    (NeedsGradients, contract.check_modes, "no map under no_grad"),
    (NeedsWeights, contract.check_modes, "no map of a frozen model"),
    (TakesAnything, contract.check_refusals, "one image without a batch is not refused"),
    (AnyClass, contract.check_refusals, "class 99 is not refused"),
    (TwoLines, contract.check_refusals, "one image without a batch is refused in several lines"),
]


@pytest.mark.parametrize("check", contract.CHECKS)
def test_a_right_explainer_passes(check):
    check(Good, *prepare("sequential"))


def test_every_check_has_a_wrong_example():
    assert {check for _, check, _ in WRONG} == set(contract.CHECKS)


@pytest.mark.parametrize(("wrong", "check", "reason"), WRONG)
def test_wrong_explainers_are_rejected(wrong, check, reason):
    with pytest.raises(AssertionError, match=reason):
        check(wrong, *prepare("sequential"))


def test_an_explainer_that_ignores_the_target_is_rejected():
    contract.check_target(Good, *prepare("sequential"), uses_target=True)
    with pytest.raises(AssertionError, match="uses_target is True, but maps of other classes differ: False"):
        contract.check_target(IgnoresTarget, *prepare("sequential"), uses_target=True)
    contract.check_target(IgnoresTarget, *prepare("sequential"), uses_target=False)
    with pytest.raises(AssertionError, match="uses_target is False, but maps of other classes differ: True"):
        contract.check_target(Good, *prepare("sequential"), uses_target=False)


class Honest(Good):
    back_to_images = True


class SaysTwoPasses(Honest):
    passes = "2"


class SaysNothingGoesBack(Honest):
    back_to_images = False


class SaysItNeedsAttention(Honest):
    needs = ("attention",)


def test_what_a_class_says_wrongly_is_found():
    """Its passes, whether they go back, and what it needs."""
    contract.check_passes(Honest, *prepare("sequential"))
    for wrong, reason in (
        (SaysTwoPasses, "passes = '2', but there were 1"),
        (SaysNothingGoesBack, "back_to_images is False, but a pass went back: True"),
    ):
        with pytest.raises(AssertionError, match=reason):
            contract.check_passes(wrong, *prepare("sequential"))
    rollout = EXPLAINERS.get("rollout")
    contract.check_refuses(rollout, *prepare("sequential"))
    with pytest.raises(AssertionError, match="Sequential lacks what it says that it needs, but is not refused"):
        contract.check_refuses(SaysItNeedsAttention, *prepare("sequential"))


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda x: x.mean(dim=1).numpy(), "got ndarray"),
        (lambda x: x.mean(), r"got \(\)"),
        (lambda x: x, r"got \(2, 3, 8, 8\)"),
        (lambda x: x[:1].mean(dim=1), r"got \(1, 8, 8\)"),
    ],
)
def test_an_explainer_must_return_one_map_per_image(made, what):
    class Plugin(Explainer):
        def _attribute(self, inputs, target):
            return made(inputs)

    class Right(Explainer):
        def _attribute(self, inputs, target):
            return inputs.mean(dim=1)

    net, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval(), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(Right(net).attribute(images), images.mean(dim=1))
    with pytest.raises(InputError, match=rf"Plugin\._attribute must return a tensor \(B, h, w\) of 2 maps; {what}$"):
        Plugin(net).attribute(images)


def test_options_must_be_a_mapping():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert EXPLAINERS.build("random", {}, model=net)
    with pytest.raises(InputError, match="options of explainer 'random' must be a mapping; got Sequential"):
        EXPLAINERS.build("random", net)
