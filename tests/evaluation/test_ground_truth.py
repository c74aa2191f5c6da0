"""Metrics that need ground truth in evaluations: values, what is left out, several objects, and several labels."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from interp_models import EXPLAINERS, METRICS, InputError, judge, probabilities
from interp_models.core.truth import Truth
from interp_models.data.base import ImageDataset, Sample, collate, truth_of
from interp_models.data.part_birds.dataset import PartBirds
from interp_models.metrics import Case
from tests.conftest import PoolLinear

LOCAL = ["pointing", "energy", "le", "box_accuracy", "box_accuracy_v2", "iou", "edges", "part_relevance", "om", "sm"]
QUICK: dict[str, Any] = {"grid": (8, 8), "max_steps": 4, "progress": False, "normalize": None}


def model() -> nn.Module:
    torch.manual_seed(1)
    return PoolLinear(classes=12).eval()


def values(found: Any, explainer: str, key: str) -> Any:
    table = found.per_image
    return table[(table["explainer"] == explainer) & (table["metric"] == key)]["value"].to_numpy()


def test_values_are_those_of_the_public_functions() -> None:
    net, birds = model(), PartBirds(split="test", image_size=32)
    samples = [birds.load(index) for index in range(0, 60, 12)]
    samples = [one._replace(image=one.image.float() / 255) for one in samples]
    loader = DataLoader(samples, batch_size=2, collate_fn=collate)  # type: ignore[arg-type, var-annotated]  # a list is a data set, too
    found = judge(net, loader, ["gradcam", "gt_box"], LOCAL, **QUICK)
    batch = collate(samples)
    images = batch.image
    target = probabilities(net)(images).argmax(dim=1)
    truth = truth_of(batch, target)
    for label in ("gradcam", "gt_box"):
        maps = EXPLAINERS.build(label, model=net).attribute(images, target, truth)
        correct = (target == batch.label).float()
        case = Case(images, maps, target, probabilities(net), truth=truth, correct=correct)
        for name in (
            "box_localisation",
            "box_accuracy",
            "mask_localisation",
            "part_relevance",
            "om",
            "saliency_metric",
        ):
            metric = METRICS.build(name, {"grid": (8, 8)})
            for key, value in metric.score(case).items():
                if key in LOCAL:
                    expected = metric.over_images(key, value)
                    np.testing.assert_allclose(values(found, label, key), expected, atol=1e-4, err_msg=key)
    assert values(found, "gt_box", "energy").mean() > 0.8 > values(found, "gradcam", "energy").mean()
    assert found.summary[found.summary["metric"] == "box_accuracy"]["n_undefined"].tolist() == [0, 0]
    assert found.tables.mean_ranks["gt_box"][0] < found.tables.mean_ranks["gradcam"][0]


def test_metrics_without_their_ground_truth_are_left_out_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    images = torch.rand(4, 3, 32, 32)
    found = judge(model(), images, ["gradcam", "random"], ["ad", "pointing", "iou", "om"], **QUICK)
    assert set(found.summary["metric"]) == {"ad"}
    assert found.left_out["pointing"] == "needs a box around the object, which is unknown here"
    assert found.left_out["om"] == "needs the label of every image and a box around the object, which is unknown here"
    assert "left out iou: needs a mask of the object" in capsys.readouterr().err
    with pytest.raises(InputError, match="no metric applies: pointing needs a box around the object"):
        judge(model(), images, ["gradcam"], ["pointing"], **QUICK)


def test_results_in_a_folder_say_what_was_left_out(tmp_path: Any) -> None:
    images = torch.rand(4, 3, 32, 32)
    for _ in range(2):  # the second one reads the finished results
        found = judge(model(), images, ["gradcam", "random"], ["ad", "pointing"], folder=tmp_path / "r", **QUICK)
        assert set(found.left_out) == {"pointing"}
        assert set(found.tables.mean_ranks) == {"gradcam", "random"}
    assert set(json.loads((tmp_path / "r/results.json").read_text())["unmeasured"]) == {"pointing"}


class Squares(ImageDataset):
    """Grey images with squares of two classes, each with its box and mask; the third image has one square only."""

    multilabel, drawn, classes = True, True, ("red", "green")
    labels = ((0, 1), (0, 1), (1,))
    places = ((0, 0), (16, 0), (16, 16))

    def image_id(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> Any:
        from torchvision import tv_tensors

        image, masks, boxes = torch.full((3, 32, 32), 90, dtype=torch.uint8), [], []
        for label in self.labels[index]:
            x, y = self.places[(index + label) % 3]
            image[label, y : y + 16, x : x + 16] = 250
            mask = torch.zeros(32, 32, dtype=torch.bool)
            mask[y : y + 16, x : x + 16] = True
            masks.append(mask)
            boxes.append([x, y, x + 16, y + 16])
        own = torch.tensor(self.labels[index])
        box = tv_tensors.BoundingBoxes(torch.tensor(boxes).float(), format="XYXY", canvas_size=(32, 32))
        mask = tv_tensors.Mask(torch.stack(masks))
        return Sample(image, self.target(index), index, box, mask, box_classes=own, mask_classes=own)


def test_each_label_is_judged_with_its_own_objects() -> None:
    """A network that reads red and green where they are: the map of each class points at its own square."""

    class Colours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.AvgPool2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 8 * (self.features(x).relu() - 0.5).relu().mean(dim=(2, 3))[:, :2] - 1

    keys = ["energy", "mask_energy", "pointing"]
    options: dict[str, Any] = {"target": "label", "image_size": 32, "output": "sigmoid", **QUICK}
    found = judge(Colours(), Squares(), ["hirescam", "gt_box", "random"], keys, **options)
    table = found.per_image[found.per_image["explainer"] == "hirescam"]
    rows = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1)]
    assert (
        list(zip(*(table[table["metric"] == "energy"][key] for key in ("index", "target_class")), strict=True)) == rows
    )
    for key in ("energy", "mask_energy", "pointing"):
        assert values(found, "hirescam", key).min() > 0.7, key
        assert values(found, "gt_box", key).min() > 0.7, key
        assert values(found, "random", key).mean() < 0.5, key


def test_truth_is_checked() -> None:
    with pytest.raises(InputError, match="boxes must be a tensor"):
        EXPLAINERS.build("gt_box", model=model()).attribute(torch.rand(2, 3, 32, 32), 0, Truth(torch.zeros(2, 5)))


def test_key_points_that_only_fill_up_a_batch_are_not_visible() -> None:
    """Samples do not say which of their key points are visible: all of them are, but not those that fill up."""
    image, points = torch.zeros(3, 8, 8), torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    batch = collate([Sample(image, 0, 0, parts=points), Sample(image, 1, 1, parts=points[:1])])
    assert batch.visible is not None
    assert batch.visible.tolist() == [[True, True], [True, False]]
    nan = Truth(parts=torch.tensor([[[2.0, 3.0], [torch.nan, 1.0]]])).checked(torch.zeros(1, 3, 8, 8))
    assert nan.visible is not None
    assert nan.visible.tolist() == [[True, False]]


def test_batches_in_which_no_image_has_a_mask() -> None:
    image, none = torch.zeros(3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.bool)
    empty = truth_of(collate([Sample(image, 0, 0, masks=none)]), torch.tensor([0]))
    assert empty.mask is not None
    assert empty.mask.shape == (1, 8, 8)
    assert not empty.mask.any()
    assert empty.part_masks is None
    one = truth_of(collate([Sample(image, 0, 0, masks=torch.ones(1, 8, 8, dtype=torch.bool))]), torch.tensor([0]))
    assert one.mask is not None
    assert one.mask.all()
