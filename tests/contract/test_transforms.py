"""Every registered transform keeps the contract; wrong ones do not."""

import functools

import pytest
from torchvision.transforms import v2

from interp_models.data.transforms import TRANSFORMS
from interp_models.data.transforms.base import to_float
from interp_models.data.transforms.warp_flip import WarpFlip
from tests.contract import transforms as contract


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_contract(name, check):
    check(functools.partial(TRANSFORMS.get(name)))


class OtherSize(WarpFlip):
    def evaluation(self):
        return v2.Compose([v2.Resize(self.size), to_float()])


class Bytes(WarpFlip):
    def evaluation(self):
        return v2.Resize([self.size, self.size])


class AlwaysTheSame(WarpFlip):
    def augmented(self):
        return self.evaluation()


class EvaluationFlips(WarpFlip):
    def evaluation(self):
        return v2.Compose([super().evaluation(), v2.RandomHorizontalFlip()])


class ImageAlone(WarpFlip):
    def augmented(self):
        flip = v2.RandomHorizontalFlip(p=1.0)
        return v2.Compose([super().augmented(), lambda sample: sample._replace(image=flip(sample.image))])


class HidesItsNeed(WarpFlip):
    def augmented(self):
        from interp_models.data.transforms.corner_crop_warp_jitter import random_corner

        return v2.Compose([random_corner, super().augmented()])


class NeedsNone(WarpFlip):
    crops_training_images = True


WRONG = [
    (OtherSize, contract.check_output, "the size is not what was asked for"),
    (Bytes, contract.check_output, "images are not float32"),
    (AlwaysTheSame, contract.check_draws, "augmented images are always the same"),
    (EvaluationFlips, contract.check_draws, "the evaluation transform draws random numbers"),
    (ImageAlone, contract.check_truth, "the mask covers|the box is|the part is not"),
    (HidesItsNeed, contract.check_boxes, "does not say that it needs a box"),
    (NeedsNone, contract.check_boxes, "needs a box, and does without"),
]


@pytest.mark.parametrize(("wrong", "check", "reason"), WRONG)
def test_wrong_transforms_are_rejected(wrong, check, reason):
    check(WarpFlip)
    with pytest.raises(AssertionError, match=reason):
        check(wrong)


def test_every_check_has_a_wrong_example():
    assert {check for _, check, _ in WRONG} == set(contract.CHECKS)
