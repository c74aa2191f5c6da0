"""What explainers, metrics and `probabilities` are handed: the right thing passes, others end in one line."""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from interp_models import EXPLAINERS, METRICS, MODELS, load, probabilities
from interp_models.core.errors import InputError
from interp_models.core.inputs import check_images
from interp_models.core.scoring import per_image
from interp_models.core.truth import Truth
from interp_models.metrics.case import Case
from tests.conftest import PoolLinear, tiny_options
from tests.contract.metrics import OfPatches

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MAPS = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ours() -> nn.Module:
    return MODELS.build("cnn", tiny_options("cnn"), num_classes=3).eval()


@pytest.fixture
def foreign() -> nn.Module:
    return PoolLinear().eval()


def full(images: Any, maps: Any, target: Any, score_fn: Any) -> Case:
    """A case of images of 32 pixels with everything that a metric can need."""
    n, size = len(maps) if isinstance(maps, Tensor) else len(IMAGES), (32, 32)
    if isinstance(images, Tensor) and not images.is_nested and images.dim() == 4:
        size = (images.shape[2], images.shape[3])
    mask = torch.zeros(n, *size, dtype=torch.bool)
    mask[:, 4:20, 8:28] = True
    truth = Truth(torch.tensor([[8.0, 4, 28, 20]] * n), mask, mask[:, None], torch.full((n, 1, 2), 12.0))
    return Case(
        images, maps, target, score_fn, None, truth, torch.ones(n), lambda others: others.mean(dim=1), score_fn,
        OfPatches(score_fn, (4, 4)),
    )  # fmt: skip


SCORED = [name for name in METRICS if "score_fn" in METRICS.get(name).needs]


def uses(model: nn.Module, names: Iterable[str] = tuple(METRICS)) -> list[Any]:
    """Every public way of images into the package; of the metrics, those named."""
    known = probabilities(model)
    return [
        EXPLAINERS.build("gradient", model=model).attribute,
        EXPLAINERS.build("occlusion", {"window": 16, "stride": 16}, model=model).attribute,
        EXPLAINERS.build("random", model=model).attribute,
        known,
        *(lambda x, n=n: METRICS.build(n).score(full(x, MAPS, 0, known)) for n in names),
        *(lambda x, n=n: METRICS.build(n).update(full(x, MAPS, 0, known)) for n in names),
    ]


WRONG = [
    (
        IMAGES.numpy(),
        r"must be a tensor of float images \(batch, channels, height, width\); got ndarray \(2, 3, 32, 32\)",
    ),
    (Image.new("RGB", (32, 32)), r"got Image.*a transform of a PIL image"),
    ([Image.new("RGB", (32, 32))], r"got list; make a tensor"),
    (list(IMAGES), r"got list; .*torch.stack of a list"),
    (None, "got NoneType"),
    ((255 * IMAGES).byte(), r"got torch.uint8 \(2, 3, 32, 32\); .*/ 255"),
    ((255 * IMAGES).long(), r"got torch.int64"),
    (IMAGES[0], r"got torch.float32 \(3, 32, 32\); a single image .*\[None\]"),
    (IMAGES.permute(0, 2, 3, 1), r"got torch.float32 \(2, 32, 32, 3\); .*permute\(0, 3, 1, 2\)"),
    (IMAGES * torch.nan, "hold NaN or infinite pixels"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_what_is_no_batch_of_float_images_is_refused(foreign: nn.Module, wrong: Any, message: str) -> None:
    for use in uses(foreign):
        use(IMAGES)
        with pytest.raises(InputError, match=message) as error:
            use(wrong)
        assert "\n" not in str(error.value)


NOT_UNIT = [
    (255 * IMAGES, r"must have pixels in \[0, 1\]; got 0\.\d+ to 255; .* / 255"),
    (4 * IMAGES - 2, r"must have pixels in \[0, 1\]; got -2 to 2; "),
    (IMAGES - 0.01, r"got -0\.0\d+ to 0\.99"),
]


@pytest.mark.parametrize(("wrong", "message"), NOT_UNIT)
def test_models_of_this_package_take_images_in_0_1(ours: nn.Module, wrong: Tensor, message: str) -> None:
    for use in uses(ours):
        use(IMAGES + 5e-4 * (2 * IMAGES - 1))  # beyond [0, 1] by rounding
        with pytest.raises(InputError, match=message):
            use(wrong)
    with pytest.raises(InputError, match=message):
        probabilities(nn.DataParallel(ours))(wrong)
    with pytest.raises(InputError, match=r"inputs must have 3 channels .* got \(2, 1, 32, 32\)"):
        uses(ours)[0](IMAGES[:, :1])


def test_foreign_models_may_want_other_images_but_in_metrics(foreign: nn.Module) -> None:
    explain, occlude, noise, known, *metrics = uses(foreign)
    for images in (255 * IMAGES, 4 * IMAGES - 2):
        for use in (explain, occlude, noise):
            assert use(images).shape[0] == 2
        torch.testing.assert_close(known(images), foreign(images).softmax(1))
        for use in metrics:
            with pytest.raises(
                InputError,
                match="0 is black; leave Normalize out of your transform, and put it before the",
            ):
                use(images)


class Sized(nn.Module):
    """A network that takes images of 32 x 32 pixels, as transformers do, and fails for dark ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3 * 32 * 32, 3)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > 32:
            raise ValueError("Input image size does not match the model")
        if images.max() == 0:
            raise RuntimeError("it is dark")
        logits: Tensor = self.fc(images.flatten(1))
        return logits


def test_images_that_a_network_does_not_take_are_refused_by_their_shape() -> None:
    torch.manual_seed(0)
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 25), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    for model, wrong, why in (
        (convolutional, IMAGES[:, :1], r"\(1, 32, 32\): Given groups=1, weight of size"),
        (convolutional, torch.rand(2, 4, 32, 32), r"\(4, 32, 32\): Given groups=1"),
        (convolutional, IMAGES[:, :, :24, :24], r"\(3, 24, 24\): Calculated padded input size"),
        (Sized().eval(), IMAGES[:, :, :24, :24], r"\(3, 24, 24\): mat1 and mat2 shapes cannot be multiplied"),
        (Sized().eval(), torch.rand(2, 3, 64, 64), r"\(3, 64, 64\): Input image size does not match"),
    ):
        explain, occlude, noise, known, *metrics = uses(model, SCORED)
        for use in (explain, occlude, known, *metrics):
            use(IMAGES)
            with pytest.raises(InputError, match=rf"(Sequential|Sized) does not take (inputs|images) of shape {why}"):
                use(wrong)
        assert noise(wrong).shape[0] == 2


def test_images_without_dense_pixels_are_refused(foreign: nn.Module) -> None:
    class OnMPS(torch.Tensor):
        device = torch.device("mps")

    with pytest.raises(InputError, match="are on an MPS device, which has no float64; move the model and them to the"):
        check_images(IMAGES.as_subclass(OnMPS))
    for wrong, why in (
        (IMAGES.to_sparse(), "of layout torch.sparse_coo"),
        (IMAGES.to("meta"), "on the device meta"),
        (torch.nested.nested_tensor([IMAGES[0], IMAGES[0, :, 1:]]), r"of several sizes \(nested\)"),
    ):
        for use in uses(foreign):
            with pytest.raises(InputError, match=f"must be a dense tensor with pixels; got one {why}"):
                use(wrong)


def test_a_model_without_classes_is_refused() -> None:
    model = nn.Sequential(PoolLinear(), nn.Linear(4, 0))
    for use in uses(model)[:2]:
        with pytest.raises(InputError, match=r"the model returns no classes: its logits have shape \(\d, 0\)"):
            use(IMAGES)


class Watched(PoolLinear):
    """A model of this package, as far as its images go, that counts images out of [0, 1]."""

    unit_images = True
    outside = 0

    def forward(self, images: Tensor) -> Tensor:
        self.outside += int(((images < -0.01) | (images > 1.01)).any())
        return super().forward(images)


def test_what_metrics_make_of_images_is_not_refused() -> None:
    """Bicubic masks go beyond [0, 1]."""
    model, maps = Watched().eval(), torch.zeros(2, 4, 4)
    maps[:, 1, 1] = 1
    metric = METRICS.build("ad", {"preset": "saliency-maps-metrics"})
    score_fn = probabilities(model)
    metric.score(Case(torch.ones_like(IMAGES), maps, 0, score_fn))
    assert model.outside
    with pytest.raises(InputError, match=r"pixels in \[0, 1\]"):  # what the user hands over still is
        score_fn(2 * IMAGES)


@pytest.mark.parametrize("name", SCORED)
def test_scores_that_are_no_probabilities_are_refused(foreign: nn.Module, name: str) -> None:
    metric = METRICS.build(name)

    def score(score_fn: Any, clean: Any = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = metric.score(replace(full(IMAGES, MAPS, 0, score_fn), clean=clean))
        return found

    right = probabilities(foreign)
    expected = score(right)
    for dtype in (torch.float16, torch.bfloat16):
        score(lambda x, to=dtype: right(x).to(to))
        score(lambda x, to=dtype: right(x).to(to).float())
    wrong = {
        "got values from -": lambda x: foreign(x).detach() - 1,
        r"score_fn = probabilities\(model\)": foreign,
        r"in \[0, 1\] and with row sums of 1": lambda x: foreign(x).sigmoid(),
        "got one column, p; return torch.cat": lambda x: right(x)[:, :1],
        r"of 2 images; got shape \(2,\)": lambda x: right(x)[:, 0],
        r"of 2 images; got shape \(1, 4\)": lambda x: right(x)[:1],
        "got ndarray": lambda x: right(x).numpy(),
        "got values from nan": lambda x: right(x) * torch.nan,
    }
    for message, score_fn in wrong.items():
        with pytest.raises(InputError, match=f"score_fn must return class probabilities.*{message}"):
            score(score_fn)
    clean = right(IMAGES)[:, 0]
    for key, value in score(right, clean).items():
        torch.testing.assert_close(value, expected[key], equal_nan=True)
    with pytest.raises(InputError, match="score_fn must return class probabilities"):
        score(foreign, clean)
    for other, message in ((clean.numpy(), "got ndarray"), (clean[:1], r"got \(1,\)"), (clean + 5, r"got \[5")):
        with pytest.raises(InputError, match=f"clean must be the target's probability.*{message}"):
            score(right, other)


def test_what_a_model_of_this_package_returns_is_no_score(ours: nn.Module) -> None:
    with pytest.raises(InputError, match=r"got InterpOutput; write score_fn = probabilities\(model\)"):
        METRICS.build("dauc").score(Case(IMAGES, MAPS, 0, ours))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_second_softmax(foreign: nn.Module, dtype: torch.dtype) -> None:
    model, images = foreign.to(dtype), IMAGES.to(dtype)
    ends = nn.Sequential(model, nn.Softmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = probabilities(model)(images)
    with pytest.warns(UserWarning, match="Sequential returns probabilities already .*: no second softmax is applied"):
        found = probabilities(ends)(images)
    torch.testing.assert_close(found, expected, atol=torch.finfo(dtype).eps, rtol=1e-2)


TARGETS = [1, np.int64(1), np.uint8(1), [1, 1], np.asarray([1, 1]), np.asarray([1, 1], np.uint8), torch.tensor([1, 1])]


@pytest.mark.parametrize("target", [*TARGETS, torch.tensor(1, dtype=torch.int32)])
def test_targets_of_every_form_are_the_same(target: Any) -> None:
    assert per_image(target, 2).dtype == torch.long
    assert per_image(target, 2).tolist() == [1, 1]


NO_TARGETS = [
    1.0,
    True,
    "wren",
    [0.9, 2.7],
    torch.tensor([1.0, 2.0]),
    np.asarray([0.5, 1.5]),
    torch.tensor([True, False]),
]


@pytest.mark.parametrize("target", [*NO_TARGETS, torch.tensor([[0, 1, 0], [1, 0, 0]]), [1, 1, 1], [[1], [1, 2]], -1, 4])
def test_targets_that_are_no_classes_are_refused(foreign: nn.Module, target: Any) -> None:
    explain = EXPLAINERS.build("gradient", model=foreign).attribute
    score = METRICS.build("ad").score
    explain(IMAGES, [3, 0])
    score(Case(IMAGES, MAPS, [3, 0], probabilities(foreign)))
    with pytest.raises(InputError, match=r"^target"):
        explain(IMAGES, target)
    with pytest.raises(InputError, match=r"^target"):
        score(Case(IMAGES, MAPS, target, probabilities(foreign)))


@pytest.mark.parametrize("name", ["random", "edges", "sobol"])
def test_no_method_takes_a_negative_class(foreign: nn.Module, name: str) -> None:
    """Controls do not know the number of classes, but no class is negative."""
    explain = EXPLAINERS.build(name, EXPLAINERS.get(name).small, model=foreign).attribute
    assert explain(IMAGES, [1, 0]).shape[0] == 2
    for target in (-1, [0, -1], torch.tensor([-2, 1])):
        with pytest.raises(InputError, match=r"^target -[12] is out of range: classes are numbered from 0$"):
            explain(IMAGES, target)


def test_the_transform_of_a_run_takes_known_ranges_alone(bcnn_run: Path) -> None:
    _, transform = load(bcnn_run)
    pixels = (torch.arange(48).reshape(3, 4, 4) * 5).byte()
    expected = transform(pixels)
    for same in (to_pil_image(pixels), pixels.permute(1, 2, 0).numpy()):
        torch.testing.assert_close(transform(same), expected, rtol=0, atol=0)
    torch.testing.assert_close(transform(pixels / 255), expected, atol=1 / 255, rtol=0)
    for wrong, found in (
        (pixels.float(), "floats from 0 to 235"),
        (pixels / 255 * 4 - 2, "floats from -2"),
        (pixels.permute(1, 2, 0).numpy() * 1.0, "floats from 0 to 235"),
        (pixels.int(), "torch.int32"),
        (Image.fromarray(np.zeros((4, 4), np.uint16)), "a PIL image of mode I;16"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "a PIL image of mode F"),
        ("bird.jpg", "str"),
    ):
        with pytest.raises(
            InputError, match=r"expected a PIL image of 8 bits, or uint8 or floats in \[0, 1\]; got " + found
        ):
            transform(wrong)


@pytest.mark.parametrize("explainer", ["gradient", "gradcam", "kernelshap"])
def test_precision_of_images_and_weights_is_the_same(foreign: nn.Module, explainer: str) -> None:
    message = "are torch.float64 on cpu, the model's weights are torch.float32 on cpu: they must be the same"
    for make in (EXPLAINERS.build(explainer, model=foreign).attribute, probabilities(foreign)):
        make(IMAGES)
        with pytest.raises(InputError, match=message):
            make(IMAGES.double())

    class Converts(PoolLinear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.float())

    model = Converts().eval()
    maps = EXPLAINERS.build(explainer, model=model).attribute(IMAGES.double())  # nothing is refused that works
    torch.testing.assert_close(maps, EXPLAINERS.build(explainer, model=model).attribute(IMAGES))


def test_other_errors_of_a_model_stay_what_they_are(foreign: nn.Module) -> None:
    for use in uses(foreign)[:2]:
        assert use(0 * IMAGES).shape[0] == 2
    for use in uses(Sized().eval())[:2]:
        with pytest.raises(RuntimeError, match="it is dark"):
            use(0 * IMAGES)


def test_device_of_images_and_weights_is_the_same(foreign: nn.Module) -> None:
    elsewhere = PoolLinear().eval().to("meta")
    for make in (lambda x: EXPLAINERS.build("gradient", model=x).attribute, probabilities):
        make(foreign)(IMAGES)
        with pytest.raises(
            InputError, match=r"are torch.float32 on cpu, the model's weights are torch.float32 on meta"
        ):
            make(elsewhere)(IMAGES)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (MAPS.numpy(), "got ndarray; torch.from_numpy"),
        (MAPS[:, None], r"got \(2, 1, 4, 4\); drop the channel: maps\[:, 0\]"),
        (list(MAPS), "got list"),
        (None, "got NoneType"),
    ],
)
def test_maps_that_are_none_are_refused(foreign: nn.Module, maps: Any, message: str) -> None:
    for metric in (METRICS.build(name) for name in METRICS):
        for use in (metric.score, metric.update):
            use(full(IMAGES, MAPS, 0, probabilities(foreign)))
            with pytest.raises(InputError, match=rf"maps must be \(batch, rows, columns\) for 2 images.*{message}"):
                use(replace(full(IMAGES, MAPS, 0, probabilities(foreign)), maps=maps))


@pytest.mark.parametrize("name", METRICS)
def test_one_grid_for_one_mean(foreign: nn.Module, name: str) -> None:
    """Values on different grids are not averaged; brought to one grid they are."""
    score_fn, fine = probabilities(foreign), MAPS.repeat_interleave(2, 1).repeat_interleave(2, 2)
    message = r"maps have the grid \(8, 8\), earlier ones \(4, 4\): values on different grids are not comparable"
    for kept in ("update", "forward"):
        metric = METRICS.build(name)
        use = getattr(metric, kept)
        use(full(IMAGES, MAPS, 0, score_fn))
        use(full(IMAGES[:1], MAPS[:1], 0, score_fn))
        before = metric.compute()
        with pytest.raises(InputError, match=message):
            use(full(IMAGES, fine, 0, score_fn))
        assert all(torch.equal(value, before[key]) for key, value in metric.compute().items())
        metric.reset()
        use(full(IMAGES, fine, 0, score_fn))
    one = METRICS.build(name, {"grid": (4, 4)})
    for maps in (MAPS, fine):
        one.update(full(IMAGES, maps, 0, score_fn))
    for value in one.per_image().values():
        torch.testing.assert_close(value[:2], value[2:], equal_nan=True)


def test_maps_without_a_grid_of_their_own_are_told(foreign: nn.Module) -> None:
    score_fn = probabilities(foreign)
    pixels = torch.nn.functional.interpolate(MAPS[None], size=(32, 32), mode="bilinear")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = METRICS.build("dauc")
        metric.score(Case(IMAGES, MAPS, 0, score_fn))
        metric.score(Case(IMAGES, MAPS, 1, score_fn))
        METRICS.build("dauc", {"grid": (4, 4)}).score(Case(IMAGES, pixels, 0, score_fn))
    with pytest.warns(UserWarning, match=r"have the grid \(32, 32\), earlier ones \(4, 4\): values on different"):
        metric.score(Case(IMAGES, pixels, 0, score_fn))
    with pytest.warns(UserWarning, match=r"have the grid \(32, 32\), one cell per pixel; .*such as grid=\(7, 7\)"):
        METRICS.build("dauc").score(Case(IMAGES, pixels, 0, score_fn))
