"""The forms of several labels that `judge` takes, and those that it refuses in one line."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from interp_models import Classifier, InputError, judge
from interp_models.evaluation import table_making
from interp_models.evaluation.images import as_sample
from interp_models.evaluation.labels import several_labels
from tests.evaluation.test_judge import network, pictures

QUICK: dict[str, Any] = {"progress": False, "max_steps": 2}
AS_BOOL = r"several labels of each image must be bool \(N, K\): labels.bool\(\) makes them from ones and zeros"


def judged(images: Any, **options: Any) -> Any:
    return judge(Classifier(network(3), output="sigmoid"), images, ["random"], ["ad"], **options, **QUICK)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            [[True, False], [False, True], [True]],
            r"labels\[0\] must list .* got \[True, False\]; rows of bool must",
        ),
        (
            [0, [], [1]],
            r"must be 3 whole numbers, one per image, or 3 lists of classes; got both: labels\[0\] is 0, which",
        ),
        ([[0, 7], [], [1]], "labels: label 7 is out of range; the model has classes 0 to 2"),
        ([torch.tensor([0, 0]), [], [1]], r"labels\[0\] must list different classes"),
        ([torch.tensor([True, False, True])] * 3, r"labels\[0\] must list different classes"),
        (torch.ones(3, 3), rf"got \(3, 3\) of torch.float32; {AS_BOOL}"),
        (torch.ones(3, 3, dtype=torch.long), rf"got \(3, 3\) of torch.int64; {AS_BOOL}"),
        (torch.ones(3, 2).bool(), r"bool \(N, 3\), as the model has 3 classes; got 2 columns"),
        (torch.ones(3, 9).bool(), r"bool \(N, 3\), as the model has 3 classes; got 9 columns"),
    ],
)
def test_labels_that_are_refused(labels: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        judged(pictures(3), labels=labels)


@pytest.mark.parametrize("kind", ["pairs", "loader"])
@pytest.mark.parametrize("labels", [torch.ones(3, 3), torch.ones(3, 3).long(), torch.ones(3, 2).bool()])
def test_batches_with_labels_that_are_refused(kind: str, labels: Any) -> None:
    pairs = TensorDataset(pictures(3), labels)
    given: Any = pairs if kind == "pairs" else DataLoader(pairs, batch_size=2)
    expected = "got 2 columns" if labels.dtype == torch.bool else rf"labels of a batch: {AS_BOOL}; got \(\d, 3\)"
    with pytest.raises(InputError, match=expected):
        judged(given)


def test_batches_have_labels_of_one_shape() -> None:
    class Mixed(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield pictures(2), torch.ones(2, 3, dtype=torch.bool)
            yield pictures(1), torch.ones(1, dtype=torch.long)

    expected = r"those of the first image are \(3,\), of image 2 \(\)"
    with pytest.raises(InputError, match=expected):
        judged(DataLoader(Mixed(), batch_size=None))


def test_lists_may_be_tensors_and_of_few_classes() -> None:
    given = [torch.tensor([0, 2]), torch.tensor([], dtype=torch.long), torch.tensor([1])]
    assert several_labels(given, 3).tolist() == several_labels([[0, 2], [], [1]], 3).tolist()  # type: ignore[union-attr]
    assert [list(own) for own in judged(pictures(3), labels=given).per_image["labels"]] == [[0, 2], [], [1]]
    for few in ([[0], []], np.array([[0], []], dtype=object)):
        assert [list(own) for own in judged(pictures(2), labels=few).per_image["labels"]] == [[0], []]
    assert as_sample((pictures(2), torch.tensor([0.5, 1.0]))).label.tolist() == [-1, -1]


def test_images_without_a_label_are_told_once(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    judged(pictures(2), labels=[[0], []], target="label")
    assert capsys.readouterr().err.strip() == "1 image has no label and was not explained (target=label)"
    judged(pictures(4), labels=[[0], [], [], []], target="label")
    assert "3 images have no label and were not explained (target=label)" in capsys.readouterr().err
    monkeypatch.setattr(table_making, "is_first", lambda: False)
    judged(pictures(2), labels=[[0], []], target="label")
    assert "no label" not in capsys.readouterr().err
