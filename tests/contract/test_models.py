"""Every registered model keeps the contract; wrong ones do not."""

import functools

import pytest
import torch

from interp_models import MODELS
from interp_models.models.bcnn import BCNN
from interp_models.models.wsdan import WSDAN
from tests.conftest import tiny_options
from tests.contract import models as contract


def make(name):
    torch.manual_seed(0)
    return MODELS.build(name, tiny_options(name), num_classes=3)


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", MODELS.names())
def test_contract(name, check):
    check(functools.partial(make, name))


def make_on_a_transformer(name):
    torch.manual_seed(0)
    model = MODELS.build(name, {**tiny_options(name), "backbone": "test_vit"}, num_classes=3)
    torch.nn.init.normal_(model.backbone.trunk.norm.weight)  # BR-NPA sorts by the tokens' lengths
    return model


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", [name for name in MODELS.names() if name not in ("selu_cnn", "vit_cls")])
def test_contract_on_patch_tokens(name, check):
    check(functools.partial(make_on_a_transformer, name))


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


class OtherFieldsInTraining(BCNN):
    def forward(self, images):
        output = super().forward(images)
        return output._replace(aux={**output.aux, "seed": 1} if self.training else output.aux)


class OtherUnderAutocast(BCNN):
    def forward(self, images):
        output = super().forward(images)
        return output._replace(logits=output.logits * (-3 if torch.is_autocast_enabled("cpu") else 1))


class MixesTheBatch(BCNN):
    def forward(self, images):
        output = super().forward(images)
        return output._replace(logits=output.logits * (1 + output.logits.mean(dim=0)))


class CutsTheGraph(BCNN):
    def forward(self, images):
        output = super().forward(images)
        return output._replace(logits=output.logits + images.detach().mean(dim=(1, 2, 3))[:, None])


class MovesWhatIsFrozen(BCNN):
    def loss(self, output, targets):
        with torch.no_grad():
            self.head.bias.add_(0.1)
        return super().loss(output, targets)


class LeavesTheBackbone(BCNN):
    def loss(self, output, targets):
        pooled = output.aux["pooled"].detach() + 0 * self.attention.weight.sum()
        return {"ce": torch.nn.functional.cross_entropy(self.head(pooled.flatten(1)), targets)}


class LearnsOtherLabels(BCNN):
    def loss(self, output, targets):
        return super().loss(output, (targets + 1) % 3)


WRONG = [
    (SignedMaps, contract.check_output, "maps below 0, but signed_maps is False"),
    (BatchDependent, contract.check_output, "other maps of an image alone"),
    (MixesTheBatch, contract.check_gradients, "another gradient of an image alone"),
    (CutsTheGraph, contract.check_gradients, "the gradient is not that of finite steps"),
    (OtherFieldsInTraining, contract.check_modes, "aux differs between training and evaluation"),
    (OtherUnderAutocast, contract.check_modes, "other logits under autocast"),
    (WrongEvidence, contract.check_evidence, "evidence does not add up to the logit"),
    (LeavesAGroupOut, contract.check_groups_and_loss, "groups: parameter 'head.weight' is in no parameter group"),
    (OverlappingGroups, contract.check_groups_and_loss, "groups: parameter '.*' is in groups 'backbone' and 'all'"),
    (DetachedAttention, contract.check_groups_and_loss, "group (backbone|attention) gets no gradient"),
    (ForgetsItsState, contract.check_state, "other logits with the same state"),
    (AnyKind, contract.check_explain, "an unknown kind is not refused"),
    (OtherFeatureLayer, contract.check_feature_layer, "the feature layer gives no map of features"),
    (MovesWhatIsFrozen, contract.check_freezing, "group head moved"),
    (LeavesTheBackbone, contract.check_freezing, "group (backbone|attention) did not move"),
    (LearnsOtherLabels, contract.check_learns, "six images are not learnt"),
]


class CutsTheGraphAtARoot(WSDAN):
    def forward(self, images):
        output = super().forward(images)
        return output._replace(logits=output.logits + images.detach().mean(dim=(1, 2, 3))[:, None])


def test_a_gradient_that_is_cut_is_found_with_smaller_steps():
    """As of models whose gradient bends too fast for the larger ones."""
    assert WSDAN.amplifies_rounding
    contract.check_gradients(functools.partial(make, "wsdan"))
    with pytest.raises(AssertionError, match="the gradient is not that of finite steps"):
        contract.check_gradients(lambda: CutsTheGraphAtARoot(num_classes=3, **tiny_options("wsdan")))


def test_every_check_has_a_wrong_example():
    assert {check for _, check, _ in WRONG} == set(contract.CHECKS)


@pytest.mark.parametrize(("wrong", "check", "reason"), WRONG)
def test_wrong_models_are_rejected(wrong, check, reason):
    class Unseeded(wrong):  # instances differ, as in real use
        pass

    check(functools.partial(make, "bcnn"))  # what they are made of is right
    with pytest.raises(AssertionError, match=reason):
        check(lambda: Unseeded(num_classes=3, **tiny_options("bcnn")))
