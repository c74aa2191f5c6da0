"""Every registered prototype metric keeps the contract; wrong ones do not."""

import pytest
import torch

from interp_models import METRICS, PROTOTYPE_METRICS
from interp_models.metrics.consistency import Consistency
from interp_models.metrics.prototype_usage import PrototypeUsage
from interp_models.metrics.purity import Purity
from tests.contract import prototype_metrics as contract


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", PROTOTYPE_METRICS.names())
def test_contract(name, check):
    check(PROTOTYPE_METRICS.get(name))


def test_every_key_belongs_to_one_metric():
    keys = [
        key for registry in (METRICS, PROTOTYPE_METRICS) for name in registry.names() for key in registry.get(name).keys
    ]
    assert len(set(keys)) == len(keys) > 10


class NoLegend(Consistency):
    legend = {}  # noqa: RUF012


class Percent(Consistency):
    def per_prototype(self):
        return {key: 100 * value for key, value in super().per_prototype().items()}


class MeanOfBatches(Consistency):
    def per_prototype(self):
        return {key: value * self._update_count / 10 for key, value in super().per_prototype().items()}


class FirstTen(Purity):
    """Of equal similarities, those that come first."""

    def update(self, model, found):
        super().update(model, found._replace(number=torch.arange(len(found.number)) + 100 * self._update_count))


class KeepsRemoved(Purity):
    def in_use(self, values):
        return values


class Remembers(Purity):
    def reset(self):
        kept = self.similarity, self.index, self.shown, self.inside
        super().reset()
        self.similarity, self.index, self.shown, self.inside = kept


class Inverted(Consistency):
    higher_is_better_by_key = {"consistency": False}  # noqa: RUF012


class NothingIsZero(PrototypeUsage):
    zero_if_removed = ()


WRONG = [
    (NoLegend, contract.check_keys, "keys, higher_is_better_by_key and legend name different keys"),
    (Percent, contract.check_keys, "consistency is no share"),
    (MeanOfBatches, contract.check_batch, "in other batches: consistency"),
    (FirstTen, contract.check_batch, "in other batches: purity"),
    (KeepsRemoved, contract.check_removed, "purity is undefined elsewhere than for removed prototypes"),
    (NothingIsZero, contract.check_removed, "used is undefined elsewhere than for removed prototypes"),
    (Remembers, contract.check_reset, "after a reset there are values without images"),
    (Inverted, contract.check_direction, "for pointing, .* for any"),
]


def test_every_check_has_a_wrong_example():
    assert {check for _, check, _ in WRONG} == set(contract.CHECKS)


@pytest.mark.parametrize(("wrong", "check", "reason"), WRONG)
def test_wrong_metrics_are_rejected(wrong, check, reason):
    check(wrong.__base__)
    with pytest.raises(AssertionError, match=reason):
        check(wrong)
