"""Every registered metric keeps the contract under every preset; wrong ones do not."""

import functools

import pytest
import torch

from interp_models import METRICS
from interp_models.metrics.base import PRESETS, metrics_of
from interp_models.metrics.masked_confidence import MaskedConfidence
from tests.contract import metrics as contract


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", METRICS.names())
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
    with pytest.raises(ValueError, match="unknown metric 'iau'; did you mean 'iauc'"):
        metrics_of(["iau"])


class BatchMean(MaskedConfidence):
    def _score(self, *args):
        return {key: value.mean().expand_as(value) for key, value in super()._score(*args).items()}


class PoisonsTheMean(MaskedConfidence):
    def compute(self):
        return {key: torch.cat(getattr(self, f"values_{key}")).mean() for key in self.keys}


class UsesTheMapAsItIs(MaskedConfidence):
    def _score(self, score_fn, images, maps, target, clean):
        return super()._score(score_fn, images * maps.mean(dim=(1, 2)).view(-1, 1, 1, 1), maps, target, clean)


class Inverted(MaskedConfidence):
    higher_is_better_by_key = {key: not higher for key, higher in MaskedConfidence.higher_is_better_by_key.items()}  # noqa: RUF012


class MissingKey(MaskedConfidence):
    keys = ("ad", "iic", "add", "ag", "extra")


class Forgets(MaskedConfidence):
    """Keeps the last update alone."""

    def add(self, values):
        self.reset()
        super().add(values)


class IgnoresTheCleanScore(MaskedConfidence):
    def score(self, score_fn, images, maps, target, clean=None):
        found = super().score(score_fn, images, maps, target)
        return found if clean is None else {key: value + 0.1 for key, value in found.items()}


class Doubles(MaskedConfidence):
    def score(self, score_fn, images, maps, target, clean=None):
        found = super().score(score_fn, images, maps, target, clean)
        return {key: value * (2 if images.dtype == torch.float64 else 1) for key, value in found.items()}


class FillsNaN(MaskedConfidence):
    def score(self, score_fn, images, maps, target, clean=None):
        return super().score(score_fn, images, maps.nan_to_num(), target, clean)


class ClampsTheClass(MaskedConfidence):
    def score(self, score_fn, images, maps, target, clean=None):
        return super().score(score_fn, images, maps, torch.as_tensor(target).clamp(max=2), clean)


class WrongAlias(MaskedConfidence):
    aliases = {"ai": "increase"}  # noqa: RUF012


WRONG = [
    (BatchMean, contract.check_batch, "one by one: "),
    (PoisonsTheMean, contract.check_undefined, "the mean of .* is not finite"),
    (UsesTheMapAsItIs, contract.check_scale, "a scaled map: "),
    (Inverted, contract.check_direction, "for the evidence, .* for its negative"),
    (MissingKey, contract.check_keys, "it lists .*'extra'|extra"),
    (WrongAlias, contract.check_keys, "an alias stands for no key"),
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
    with pytest.raises((AssertionError, KeyError), match=reason):
        check(wrong)
