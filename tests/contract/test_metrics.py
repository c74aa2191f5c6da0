"""Every registered metric keeps the contract under every preset; wrong ones do not."""

import functools
import re
from dataclasses import replace

import pytest
import torch

from interp_models import METRICS
from interp_models.core.errors import InputError
from interp_models.metrics.base import MetricRegistry, metrics_of
from interp_models.metrics.case import Case
from interp_models.metrics.deletion_insertion import DeletionInsertion
from interp_models.metrics.masked_confidence import MaskedConfidence
from interp_models.metrics.presets import PRESETS
from tests.contract import metrics as contract


def presets(name):
    """The presets that can change a metric: all, if it makes passes."""
    return PRESETS if METRICS.get(name).perturbs() else ["gomez2023"]


QUICK = ("gomez2023", "rise")
"""Presets that are always checked: by cells and by pixels, with black and another colour."""


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(name, preset, marks=[] if preset in QUICK else pytest.mark.slow)
        for name in METRICS.names()
        for preset in presets(name)
    ],
)
def test_contract(name, preset, check):
    if check is contract.check_refusals:
        check(METRICS.get(name))
    else:
        check(functools.partial(METRICS.get(name), preset=preset))


def test_every_key_belongs_to_one_metric():
    keys = [key for name in METRICS.names() for key in METRICS.get(name).keys]
    assert len(set(keys)) == len(keys)
    assert metrics_of(keys) == {key: name for name in METRICS.names() for key in METRICS.get(name).keys}
    assert metrics_of(["ai"]) == {"iic": "masked_confidence"}
    assert metrics_of(["d*"]).keys() == {"dauc", "dc", "dice", "dc_single"}
    assert set(metrics_of(["*"])) == set(keys)
    assert list(metrics_of(["iauc", "ia*"])) == ["iauc"]
    with pytest.raises(ValueError, match=r"unknown metric 'z\*'"):
        metrics_of(["z*"])
    with pytest.raises(ValueError, match="unknown metric 'iau'; did you mean 'iauc'"):
        metrics_of(["iau"])


class BatchMean(MaskedConfidence):
    def _score(self, case):
        return {key: value.mean().expand_as(value) for key, value in super()._score(case).items()}


class PoisonsTheMean(MaskedConfidence):
    def compute(self):
        return {key: torch.cat(getattr(self, f"values_{key}")).mean() for key in self.keys}


class UsesTheMapAsItIs(MaskedConfidence):
    def _score(self, case):
        return super()._score(replace(case, images=case.images * case.maps.mean(dim=(1, 2)).view(-1, 1, 1, 1)))


class Inverted(MaskedConfidence):
    higher_is_better_by_key = {key: not higher for key, higher in MaskedConfidence.higher_is_better_by_key.items()}  # noqa: RUF012


class MissingKey(MaskedConfidence):
    keys = (*MaskedConfidence.keys, "extra")
    higher_is_better_by_key = MaskedConfidence.higher_is_better_by_key | {"extra": True}
    legend = MaskedConfidence.legend | {"extra": "Not computed."}


class Forgets(MaskedConfidence):
    """Keeps the last update alone."""

    def add(self, values):
        self.reset()
        super().add(values)


class IgnoresTheCleanScore(MaskedConfidence):
    def score(self, case):
        found = super().score(case)
        return found if case.clean is None else {key: value + 0.1 for key, value in found.items()}


class Doubles(MaskedConfidence):
    def score(self, case):
        twice = 2 if case.images.dtype == torch.float64 else 1
        return {key: value * twice for key, value in super().score(case).items()}


class FillsNaN(MaskedConfidence):
    def score(self, case):
        return super().score(replace(case, maps=case.maps.nan_to_num()))


class ClampsTheClass(MaskedConfidence):
    def score(self, case):
        return super().score(replace(case, target=torch.as_tensor(case.target).clamp(max=2)))


class WrongAlias(MaskedConfidence):
    aliases = {"ai": "increase"}  # noqa: RUF012


WRONG = [
    (BatchMean, contract.check_batch, "one by one: "),
    (PoisonsTheMean, contract.check_undefined, "the mean of .* is not finite"),
    (UsesTheMapAsItIs, contract.check_scale, "a scaled map: "),
    (Inverted, contract.check_direction, "for the evidence, .* for its negative"),
    (
        MissingKey,
        contract.check_keys,
        "must return a dict with exactly the keys ad, iic, add, ag, context_increase, extra; got ad, iic, add, ag, "
        "context_increase$",
    ),
    (WrongAlias, contract.check_keys, "the alias 'ai' stands for 'increase', which is not a key"),
    (Forgets, contract.check_split, "two updates: "),
    (IgnoresTheCleanScore, contract.check_split, "two updates: "),
    (Doubles, contract.check_precision, "ad of images in float64: "),
    (FillsNaN, contract.check_refusals, "a map with NaN is not refused"),
    (ClampsTheClass, contract.check_refusals, "class 9 is not refused"),
]


def test_every_check_has_a_wrong_example():
    assert {check for _, check, _ in WRONG} == set(contract.CHECKS)


@pytest.mark.parametrize(("wrong", "check", "reason"), WRONG)
def test_wrong_metrics_are_rejected(wrong, check, reason):
    check(MaskedConfidence)
    with pytest.raises((AssertionError, InputError), match=reason):
        check(wrong)


def returning(values):
    """A metric whose `_score` returns `values` of what the right one returns."""

    class Returns(MaskedConfidence):
        def _score(self, case):
            return values(super()._score(case))

    return Returns()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda own: own | {"ad": own["ad"][:1]}, "ad must be a tensor of one value per image, (5,); got shape (1,)"),
        (lambda own: own | {"ad": own["ad"][0]}, "ad must be a tensor of one value per image, (5,); got shape ()"),
        (lambda own: own | {"ad": own["ad"][:, None]}, "(5,); got shape (5, 1)"),
        (lambda own: own | {"ad": 0.5}, "(5,); got float"),
        (
            lambda own: own | {"more": own["ad"]},
            "exactly the keys ad, iic, add, ag, context_increase; got ad, iic, add, ag, context_increase, more",
        ),
        (lambda own: {"ad": own["ad"]}, "exactly the keys ad, iic, add, ag, context_increase; got ad"),
        (lambda own: own["ad"], "exactly the keys ad, iic, add, ag, context_increase; got Tensor"),
        (lambda own: own | {"ad": own["ad"] / 0}, "ad is infinite for an image; undefined is NaN"),
    ],
)
def test_values_of_another_form_are_refused(values, message):
    """Torch would broadcast some of them over all images."""
    images, maps, target = contract.data()
    case = Case(images, maps, target, contract.score_fn)
    contract.equal(returning(dict).score(case), MaskedConfidence().score(case), "the same values")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        returning(values).score(case)
    assert str(error.value).startswith("metric Returns")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"legend": {"ad": "A."}}, "metric Own: legend has no entry for the key 'iic'"),
        ({"_score": lambda self, score_fn, images, maps, target, clean: {}}, r"metric Own: _score takes one argument"),
        ({"needs": ("image",)}, "metric Own needs 'image'; a case can have score_fn, "),
        ({"higher_is_better_by_key": {}}, "metric Own: higher_is_better_by_key has no entry for the key 'ad'"),
        ({"keys": "ad"}, "metric Own: keys must be a tuple of names; got 'ad'"),
        ({"aliases": {"ai": "increase"}}, "metric Own: the alias 'ai' stands for 'increase', which is not a key"),
    ],
)
def test_a_class_that_does_not_describe_its_keys_is_refused_at_once(attributes, message):
    type("Own", (MaskedConfidence,), {"legend": dict(MaskedConfidence.legend)})()
    wrong = type("Own", (MaskedConfidence,), attributes)
    with pytest.raises(InputError, match=re.escape(message)):
        wrong()
    registry = MetricRegistry("metric")
    with pytest.raises(InputError, match=re.escape(message)):
        registry.register("own")(wrong)
    assert registry.aliases() == {}  # other metrics go on working


def test_two_metrics_of_one_key_are_refused():
    registry = MetricRegistry("metric")
    registry.register("masked_confidence")(MaskedConfidence)
    registry.register("deletion_insertion")(DeletionInsertion)
    assert registry.aliases()["dauc"] == "deletion_insertion"
    registry.register("mine")(one_key("Mine", "dauc"))
    both = "metrics 'deletion_insertion' and 'mine' both have the key or name 'dauc'; rename one"
    with pytest.raises(InputError, match=both):
        registry.aliases()


@pytest.mark.parametrize("name", ["dauc", "ai"])
def test_a_metric_with_the_name_of_anothers_key_is_refused(name):
    registry = MetricRegistry("metric")
    registry.register("masked_confidence")(MaskedConfidence)
    registry.register("deletion_insertion")(DeletionInsertion)
    registry.register("mine")(one_key("Mine", "mine"))
    assert registry.aliases()["mine"] == "mine"  # its own key is no conflict
    registry.register(name)(one_key("Named", "other"))
    with pytest.raises(InputError, match=f"both have the key or name '{name}'"):
        registry.aliases()


def one_key(class_name, key):
    attributes = {"keys": (key,), "higher_is_better_by_key": {key: True}, "legend": {key: "A."}, "aliases": {}}
    return type(class_name, (MaskedConfidence,), attributes)
