import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from interp_models.core.errors import InputError
from interp_models.report import visual

RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (8, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_uint8_scales_rounds_and_clips(dtype: torch.dtype) -> None:
    image = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0, 0.25], dtype=dtype, requires_grad=True).reshape(3, 1, 2)
    assert visual.to_uint8(image).tolist() == [[[0, 255, 255], [128, 0, 64]]]
    assert visual.to_uint8(image.detach().float().numpy()).tolist() == [[[0, 255, 255], [128, 0, 64]]]


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((1, 3, 4, 4)), np.full((3, 2, 2), np.nan)])
def test_to_uint8_refuses_what_is_no_image(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected an image|not finite"):
        visual.to_uint8(image)


def test_normalise_stretches_a_signed_map() -> None:
    assert visual.normalise([[-2, 0], [2, 6]]).tolist() == [[0.0, 0.25], [0.5, 1.0]]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
def test_normalise_turns_a_constant_map_into_zeros(value: float) -> None:
    assert visual.normalise(np.full((2, 3), value)).tolist() == [[0.0] * 3] * 2


def test_normalise_keeps_the_order_of_tiny_and_huge_values() -> None:
    assert visual.normalise([[0.0, 1e-300, 2e-300]]).tolist() == [[0.0, 0.5, 1.0]]
    assert visual.normalise([[-1e300, 0.0, 1e300]]).tolist() == [[0.0, 0.5, 1.0]]


@pytest.mark.parametrize("map", [np.zeros(4), np.zeros((2, 2, 2)), np.zeros((0, 3)), [[0.0, np.inf]], [[np.nan, 1.0]]])
def test_normalise_refuses_what_is_no_map(map: object) -> None:
    with pytest.raises(ValueError, match=r"expected a map|not finite"):
        visual.normalise(map)  # type: ignore[arg-type]


def test_resize_is_bilinear_with_centres_aligned() -> None:
    assert visual.resize([[0.0, 1.0]], (2, 4)).tolist() == [[0.0, 0.25, 0.75, 1.0]] * 2
    assert visual.resize([[0.0], [1.0]], (4, 1)).tolist() == [[0.0], [0.25], [0.75], [1.0]]


def test_resize_agrees_with_torch() -> None:
    map = RANDOM.random((7, 5), np.float32)
    expected = torch.nn.functional.interpolate(torch.tensor(map)[None, None], size=(28, 30), mode="bilinear")[0, 0]
    np.testing.assert_allclose(visual.resize(map, (28, 30)), expected, atol=1e-6)


def test_overlay_without_weight_is_the_picture_and_with_full_weight_the_colours() -> None:
    map = [[0.0, 1.0], [2.0, 4.0]]
    assert (visual.overlay(PICTURE, map, alpha=0) == PICTURE).all()
    whole = visual.overlay(PICTURE, map, alpha=1)
    colours = matplotlib.colormaps[visual.CMAP]([0.0, 1.0], bytes=True)[:, :3]
    assert whole[0, 0].tolist() == colours[0].tolist()  # the corners lie beyond the outermost centres
    assert whole[-1, -1].tolist() == colours[1].tolist()


def test_overlay_is_the_weighted_mean() -> None:
    colour = np.array(matplotlib.colormaps[visual.CMAP](0.0, bytes=True)[:3])
    found = visual.overlay(np.full((2, 2, 3), 200, np.uint8), np.ones((2, 2)), alpha=0.25)
    assert (found == np.round(0.75 * 200 + 0.25 * colour)).all()


FLOATS = np.asarray([[[0.0, 0.2, 1.0], [0.8, 0.4, 0.6]]], np.float32)  # one row of two pixels, from 0 to 1
BYTES = [[[0, 51, 255], [204, 102, 153]]]
FIRST = np.moveaxis(FLOATS, 2, 0).copy()


@pytest.mark.parametrize(
    "image",
    [
        np.asarray(BYTES, np.uint8),
        Image.fromarray(np.asarray(BYTES, np.uint8)),
        FLOATS,
        FLOATS.astype(np.float64),
        FIRST,
        torch.tensor(FIRST, requires_grad=True),
        torch.tensor(FIRST)[None],
        torch.tensor(FIRST) + 5e-4 * torch.tensor([-1.0, 1.0]),  # rounding
        torch.tensor(np.asarray(BYTES, np.uint8)).permute(2, 0, 1),
        torch.tensor(FLOATS),
    ],
)
def test_pictures_of_every_form_are_the_same(image: object) -> None:
    map, expected = [[0.0, 1.0]], np.asarray(BYTES, np.uint8)
    assert visual.as_picture(image).tolist() == BYTES
    assert visual.overlay(image, map, alpha=0).tolist() == BYTES
    assert (visual.overlay(image, map) == visual.overlay(expected, map)).all()
    assert (visual.rgb([map], image) == visual.rgb([map], expected)).all()
    assert (visual.boxed(image, (0, 0, 1, 1)) == visual.boxed(expected, (0, 0, 1, 1))).all()
    assert (visual.fitted(image, (4, 4)) == visual.fitted(expected, (4, 4))).all()
    assert (visual.shrunk(image, 1) == visual.shrunk(expected, 1)).all()
    assert visual.jpeg_uri(image) == visual.jpeg_uri(expected)


def test_channels_come_first_in_tensors_and_last_in_arrays() -> None:
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert (visual.as_picture(square) == square).all()
    assert (visual.as_picture(torch.tensor(square)) == np.moveaxis(square, 0, 2)).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (FLOATS * 255, r"expected a picture of uint8, or of floats in \[0, 1\], got floats from 0 to 255"),
        (torch.tensor(FIRST) * 4 - 2, "got floats from -2 to 2"),
        (FLOATS * np.nan, "got floats from nan to nan"),
        (np.asarray(BYTES), "got int64"),
        (FLOATS > 0.5, "got bool"),
        (FLOATS[..., :2], r"expected a picture of shape .* got \(1, 2, 2\)"),
        (torch.zeros(2, 3, 4, 4), r"got \(2, 3, 4, 4\)"),
        (Image.fromarray(np.zeros((2, 2), np.uint16)), "expected a picture of 8 bits, got a PIL image of mode I;16"),
        ("bird.jpg", r"got \(\)"),
    ],
)
def test_pictures_that_cannot_be_told_are_refused(image: object, message: str) -> None:
    for draw in (visual.overlay, lambda picture, map: visual.contact_sheet([[picture]], ["a"], ["b"], Path("x.png"))):
        with pytest.raises(InputError, match=message):
            draw(image, [[0.0, 1.0]])


@pytest.mark.parametrize("form", [torch.tensor, np.asarray, lambda map: torch.tensor([map], requires_grad=True)])
def test_maps_of_every_form_are_the_same(form: object) -> None:
    map = [[0.0, 1.0], [2.0, 4.0]]
    given = form(map)  # type: ignore[operator]
    assert visual.normalise(given).tolist() == [[0.0, 0.25], [0.5, 1.0]]
    assert (visual.resize(given, (3, 5)) == visual.resize(map, (3, 5))).all()
    assert (visual.overlay(PICTURE, given) == visual.overlay(PICTURE, map)).all()


def test_heat_of_a_signed_map_keeps_0_in_the_middle() -> None:
    values, cmap = visual.heat([[-1.0, 0.0], [2.0, 4.0]])
    assert values.tolist() == [[0.375, 0.5], [0.75, 1.0]]
    assert cmap == visual.SIGNED
    assert max(matplotlib.colormaps[cmap](0.5)[:3]) < 0.1  # nearly black
    red, blue = matplotlib.colormaps[cmap](1.0), matplotlib.colormaps[cmap](0.0)
    assert red[0] > red[2] + 0.2
    assert blue[2] > blue[0] + 0.2
    assert visual.heat(np.full((2, 2), -3.0))[0].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_heat_of_pixels_is_not_ruled_by_a_few() -> None:
    map = np.tile(np.linspace(0, 1, 100), (100, 1))
    map[3, 5] = 1e6
    values, cmap = visual.heat(map)
    low, high = np.percentile(map, [0.5, 99.5])
    np.testing.assert_allclose(values, (np.clip(map, low, high) - low) / (high - low), atol=1e-6)
    assert cmap == visual.CMAP
    assert visual.heat(map[:20, :20])[0].max() == 1
    assert np.median(visual.heat(map[:20, :20])[0]) < 1e-5
    sparse = np.zeros((100, 100))
    sparse[7, 7] = 2.0
    assert visual.heat(sparse)[0][7, 7] == 1  # nothing is cut where nothing else would be left


def test_rgb_puts_each_map_in_its_channel() -> None:
    maps = np.zeros((4, 2, 2))
    maps[0, 0, 0], maps[1, 0, 1], maps[2, 1, 0], maps[3, 1, 1] = 1, 5, 0.1, 9  # the fourth is left out
    assert visual.rgb(maps).tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]


def test_rgb_with_fewer_maps_leaves_channels_zero() -> None:
    assert visual.rgb([[[0.0, 2.0]]]).tolist() == [[[0, 0, 0], [255, 0, 0]]]
    assert visual.rgb(np.zeros((0, 1, 2))).tolist() == [[[0, 0, 0]] * 2]


def test_rgb_over_a_picture_darkens_its_grey() -> None:
    picture = np.full((1, 2, 3), 100, np.uint8)
    assert visual.rgb([[[0.0, 1.0]]], picture, alpha=0.6).tolist() == [[[40, 40, 40], [193, 40, 40]]]


@pytest.mark.parametrize("call", [lambda: visual.rgb(np.zeros((2, 2))), lambda: visual.overlay(PICTURE[..., 0], [[1]])])
def test_wrong_shapes_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()  # type: ignore[operator]


def test_contact_sheet_keeps_pixels_in_order(tmp_path: Path) -> None:
    colours = [[(250, 0, 0), (0, 250, 0), (0, 0, 250)], [(250, 250, 0), (0, 250, 250)]]
    rows = [[np.full((100, 120, 3), colour, np.uint8) for colour in row] for row in colours]
    path = tmp_path / "sheet.png"
    visual.contact_sheet(rows, ["$a$ and $", "b"], ["input", "a label that is too long", "<c>"], path)
    sheet = np.asarray(Image.open(path).convert("RGB"))
    places = {}
    for colour in itertools.chain(*colours):
        y, x = np.nonzero((sheet == colour).all(axis=2))
        assert len(y) >= 119 * 99  # the crop to the labels may cut into a pixel at the edges
        places[colour] = (round(y.mean()), round(x.mean()))
    y0, x0 = places[(250, 0, 0)]
    for i, row in enumerate(colours):
        for j, colour in enumerate(row):
            assert places[colour] == pytest.approx((y0 + 104 * i, x0 + 124 * j), abs=1)


def test_contact_sheet_enlarges_small_pictures(tmp_path: Path) -> None:
    visual.contact_sheet([[np.zeros((7, 7, 3), np.uint8)]], ["r"], ["c"], tmp_path / "sheet.png")
    assert (np.asarray(Image.open(tmp_path / "sheet.png").convert("L")) == 0).sum() >= 97 * 97


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels"),
    [
        ([], [], ["a"]),
        ([[]], ["a"], ["a"]),
        ([[PICTURE, PICTURE[1:]]], ["a"], ["a", "b"]),
        ([[PICTURE]], [], ["a"]),
        ([[PICTURE, PICTURE]], ["a"], ["a"]),
    ],
)
def test_contact_sheet_refuses_what_does_not_fit(
    rows: list[list[np.ndarray]], row_labels: list[str], column_labels: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"pictures"):
        visual.contact_sheet(rows, row_labels, column_labels, tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []
