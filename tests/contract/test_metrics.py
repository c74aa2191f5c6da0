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
    better = {key: not higher for key, higher in MaskedConfidence.better.items()}  # noqa: RUF012


class MissingKey(MaskedConfidence):
    keys = ("ad", "iic", "add", "ag", "extra")


WRONG = [
    (BatchMean, contract.check_batch),
    (PoisonsTheMean, contract.check_undefined),
    (UsesTheMapAsItIs, contract.check_scale),
    (Inverted, contract.check_direction),
    (MissingKey, contract.check_keys),
]


@pytest.mark.parametrize(("wrong", "check"), WRONG)
def test_wrong_metrics_are_rejected(wrong, check):
    check(MaskedConfidence)
    with pytest.raises((AssertionError, KeyError)):
        check(wrong)
