"""Every registered model keeps the contract; wrong ones do not."""

import functools

import pytest
import torch

from interp_models import MODELS
from interp_models.models.bcnn import BCNN
from tests.conftest import tiny_options
from tests.contract import models as contract


def make(name):
    torch.manual_seed(0)
    return MODELS.build(name, tiny_options(name), num_classes=3)


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", MODELS.names())
def test_contract(name, check):
    check(functools.partial(make, name))


class SignedMaps(BCNN):
    def forward(self, images):
        output = super().forward(images)
        return output._replace(maps=output.maps - 2)


class WrongEvidence(BCNN):
    def evidence(self, output, targets):
        return super().evidence(output, targets).relu()


class LeavesAGroupOut(BCNN):
    def parameter_groups(self):
        groups = super().parameter_groups()
        groups.pop("head")
        return groups


class OverlappingGroups(BCNN):
    def parameter_groups(self):
        return super().parameter_groups() | {"all": list(self.parameters())}


class DetachedAttention(BCNN):
    def loss(self, output, targets):
        return {"ce": torch.nn.functional.cross_entropy(output.logits.detach() + 0 * self.head.bias, targets)}


class BatchDependent(BCNN):
    def forward(self, images):
        output = super().forward(images)
        return output._replace(maps=output.maps / output.maps.max())


class ForgetsItsState(BCNN):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = torch.rand(1)

    def forward(self, images):
        output = super().forward(images)
        return output._replace(logits=output.logits * self.scale)


class AnyKind(BCNN):
    def explain(self, output, targets, kind=None):
        return super().explain(output, targets, None)


class OtherFeatureLayer(BCNN):
    @property
    def feature_layer(self):
        return self.dropout


WRONG = [
    (SignedMaps, contract.check_output),
    (BatchDependent, contract.check_output),
    (WrongEvidence, contract.check_evidence),
    (LeavesAGroupOut, contract.check_groups_and_loss),
    (OverlappingGroups, contract.check_groups_and_loss),
    (DetachedAttention, contract.check_groups_and_loss),
    (ForgetsItsState, contract.check_state),
    (AnyKind, contract.check_explain),
    (OtherFeatureLayer, contract.check_feature_layer),
]


@pytest.mark.parametrize(("wrong", "check"), WRONG)
def test_wrong_models_are_rejected(wrong, check):
    class Unseeded(wrong):  # instances differ, as in real use
        pass

    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check(lambda: Unseeded(num_classes=3, **tiny_options("bcnn")))
