"""Draw the scenes of `part_birds`: first a map of labels with hard edges, then colours, so that masks are exact."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from interp_models.core.rng import uniform
from interp_models.data.part_birds.scene import RGB, Background, Light, Occluder, Perch, Pose, Scene
from interp_models.data.part_birds.shapes import (
    ANCHORS,
    FOOT_Y,
    INK,
    LIGHT,
    NECK,
    RUMP,
    SHAPES,
    SHOULDER,
    Points,
    Stroke,
    curve,
    ellipse,
)

Floats = NDArray[np.float64]

PARTS = ("beak", "crown", "head", "eye", "wing", "body", "belly", "tail", "legs")
"""The parts of a bird, in the order of masks and key points; together they are the whole bird."""

_TONES = 4
_SLOTS = {part: slot for slot, part in enumerate(PARTS, 1)}  # slot 0 is the background
_PERCH, _OCCLUDER = len(PARTS) + 1, len(PARTS) + 2
_BACKDROP = 56  # side of the background before it is enlarged, which puts it out of focus


class Drawing(NamedTuple):
    """A picture with its ground truth."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    masks: NDArray[np.bool_]
    """(1 + P, H, W): masks of the visible pixels of the bird, then of each of PARTS."""
    keypoints: NDArray[np.float32]
    """(P, 2): x and y of each of PARTS in pixels; the middle of the first pixel is 0.5."""
    visible: NDArray[np.bool_]
    """(P,): whether the pixel at the key point shows the part."""


def draw(scene: Scene, size: int) -> Drawing:
    """Draw a scene with size × size pixels.

    Shapes are painted over one another as labels. Colours and masks are made from the labels.
    """
    labels = _label_map(scene, size)
    slots = labels // _TONES
    image = _backdrop(scene.background, scene.light, size)
    np.copyto(image, _colour(labels, scene), where=(labels > 0)[..., None])
    masks = slots == np.arange(len(PARTS) + 1, dtype=np.uint8)[:, None, None]
    np.logical_and(slots > 0, slots < _PERCH, out=masks[0])
    points = np.array([_placed(np.array(ANCHORS[part]), part, scene.pose) for part in PARTS]) * size
    x, y = np.floor(points.real).astype(int), np.floor(points.imag).astype(int)
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    shown = slots[y.clip(0, size - 1), x.clip(0, size - 1)] == np.arange(1, _PERCH)
    return Drawing(image, masks, np.stack((points.real, points.imag), 1).astype(np.float32), inside & shown)


def _placed(points: Points, part: str, pose: Pose) -> Points:
    """The points of a part's shape in image coordinates, after the bird's joints have moved it."""
    if part == "tail":
        points = RUMP + (points - RUMP) * np.exp(1j * pose.tail)
    elif part == "wing":
        points = SHOULDER + (points - SHOULDER) * np.exp(1j * pose.wing)
    elif part in ("head", "beak", "crown", "eye"):
        points = NECK + (points - NECK) * np.exp(1j * pose.head)
    if part != "legs":
        points = points * np.exp(1j * pose.tilt)
    return pose.place(points)


class _Pen:
    """Paints strokes as labels; coordinates are in units of the image's side."""

    def __init__(self, size: int) -> None:
        self.map = Image.new("L", (size, size))
        self._draw = ImageDraw.Draw(self.map)
        self._size = size
        self._ink = max(1, round(size / 224))

    def paint(self, slot: int, points: Points, stroke: Stroke, scale: float = 1.0) -> None:
        """Paint a stroke at `points`; `scale` multiplies its width."""
        xy = (points * self._size - (0.5 + 0.5j)).view(np.float64).tolist()  # Pillow counts from pixel middles
        label = slot * _TONES + stroke.tone
        if stroke.width is not None:
            width = max(1, round(stroke.width * scale * self._size))
            self._draw.line(xy, fill=label, width=width, joint="curve" if width > 3 else None)
            return
        self._draw.polygon(xy, fill=label)
        if stroke.outline:
            self._draw.line(xy + xy[:2], fill=slot * _TONES + INK, width=self._ink)


def _label_map(scene: Scene, size: int) -> NDArray[np.uint8]:
    pen = _Pen(size)
    _paint_perch(pen, scene.perch, scene.pose)
    for part, variants in SHAPES.items():
        for stroke in () if scene.variants[part] == "none" else variants[scene.variants[part]]:
            pen.paint(_SLOTS[part], _placed(stroke.points, part, scene.pose), stroke, scene.pose.scale)
    for slot, occluder in enumerate(scene.occluders, _OCCLUDER):
        _paint_occluder(pen, slot, occluder)
    return np.array(pen.map)


def _paint_perch(pen: _Pen, perch: Perch, pose: Pose) -> None:
    outline, marks = _PERCHES[perch.kind](uniform(perch.key, np.arange(40)))
    for stroke in (Stroke(outline), *marks):
        pen.paint(_PERCH, pose.place(stroke.points), stroke, pose.scale)


def _branch(u: Floats) -> tuple[Points, list[Stroke]]:
    x = np.linspace(-2.4, 2.4, 25)
    wobble = 0.02 * (u[:25] - 0.5)
    upper, lower = x + 1j * (FOOT_Y - 0.02 + wobble), x + 1j * (FOOT_Y + 0.09 + wobble[::-1] + 0.03 * u[30])
    knots = [x[3 * k] + 0.1 + 1j * (FOOT_Y + 0.02 + 0.04 * u[k]) for k in range(8)]
    marks = [Stroke(curve(knot, knot + 0.1 + 0.01j, knot + 0.22, closed=False), INK, 0.01) for knot in knots]
    return np.concatenate((upper, lower[::-1])), marks


def _rock(u: Floats) -> tuple[Points, list[Stroke]]:
    side = np.array((-1.1, -0.9, -0.68, -0.4, 0.0, 0.4, 0.68, 0.9, 1.1))
    top = side + 1j * (FOOT_Y + 1.5 * side**4 + 0.06 * (u[:9] - 0.5) * abs(side))
    glint = curve(-0.42 + 0.74j, -0.3 + 0.65j, 0.0 + 0.63j, -0.05 + 0.67j, -0.25 + 0.72j)
    specks = [_speck(*row) for row in u[20:34].reshape(7, 2)]
    return curve(*top, 1.2 + 4j, -1.2 + 4j), [Stroke(glint, LIGHT, outline=False), *specks]


def _ground(u: Floats) -> tuple[Points, list[Stroke]]:
    top = np.linspace(-2.4, 2.4, 25) + 1j * (FOOT_Y - 0.01 + 0.05 * (u[:25] - 0.5))
    return np.append(top, (2.4 + 3j, -2.4 + 3j)), [_grass(*row) for row in u[10:].reshape(10, 3)]


def _speck(u: float, v: float) -> Stroke:
    return Stroke(ellipse(1.2 * u - 0.6 + 1j * (FOOT_Y + 0.16 + 0.4 * v), 0.03, 0.015, steps=8), INK, outline=False)


def _grass(u: float, v: float, w: float) -> Stroke:
    """A tuft of grass somewhere on the ground."""
    root = 2 * u - 1 + 1j * (FOOT_Y + 0.03 + 0.4 * v * v)
    blades = (-0.01, -0.05 - 0.06j, 0.0 - 0.02j, 0.01 - 0.1j, 0.02 - 0.02j, 0.07 - 0.06j, 0.03)
    tone = LIGHT if v > 0.4 else INK
    return Stroke(np.asarray(root + (0.8 + 0.6 * w) * np.array(blades), complex), tone, outline=False)


_PERCHES: Mapping[str, Callable[[Floats], tuple[Points, list[Stroke]]]] = {
    "branch": _branch,
    "rock": _rock,
    "ground": _ground,
}


def _paint_occluder(pen: _Pen, slot: int, occluder: Occluder) -> None:
    base, tip = complex(*occluder.base), complex(*occluder.tip)
    middle = (base + tip) / 2 + 1j * (tip - base) * occluder.bend
    stem = curve(base, middle, tip, closed=False, steps=10)
    if occluder.kind == "reed":
        across = 1j * (tip - base) / abs(tip - base) * 0.3 * occluder.size * np.linspace(1, 0.05, len(stem))
        blade = np.concatenate((stem + across, (stem - across)[::-1]))
        pen.paint(slot, blade, Stroke(blade))
        pen.paint(slot, stem, Stroke(stem, INK, 0.004))
        return
    pen.paint(slot, stem, Stroke(stem, INK, 0.014 if occluder.kind == "twig" else 0.009))
    along = (tip - base) / abs(tip - base) * occluder.size
    for root, turn in zip(stem[::-3], (0.0, 0.9, -0.9, 0.9), strict=False):
        _paint_leaf(pen, slot, root, along * np.exp(1j * turn) * (0.6 if occluder.kind == "twig" else 1.0))


def _paint_leaf(pen: _Pen, slot: int, root: complex, along: complex) -> None:
    leaf = curve(root, root, root + along * (0.45 - 0.3j), root + along, root + along, root + along * (0.45 + 0.3j))
    pen.paint(slot, leaf, Stroke(leaf))
    pen.paint(slot, np.array([root, root + 0.85 * along]), Stroke(leaf, INK, 0.004))


def _colour(labels: NDArray[np.uint8], scene: Scene) -> NDArray[np.uint8]:
    """The colours of a map of labels, (H, W, 3), with light that changes over the bird."""
    pairs = [((0, 0, 0), (0, 0, 0)), *(scene.colours[part] for part in PARTS)]
    pairs += [(colour, colour) for colour in (scene.perch.colour, *(o.colour for o in scene.occluders))]
    table = np.concatenate([_tones(fill, mark) for fill, mark in pairs]) * np.array(scene.light.gain)
    shade = _shade(scene.light, scene.pose, len(labels))
    lit = table.clip(0, 255).astype(np.uint16)[labels] * shade[..., None]
    return np.asarray(np.minimum(lit >> 7, 255), np.uint8)


def _tones(fill: RGB, mark: RGB) -> Floats:
    """(4, 3): the colours of the tones FILL, INK, LIGHT and MARK."""
    colour = np.array(fill, float)
    return np.stack((colour, 0.55 * colour, 0.6 * colour + 0.4 * 255, np.array(mark, float)))


def _shade(light: Light, pose: Pose, size: int) -> NDArray[np.uint16]:
    """(H, W): factors of the brightness, where 128 means 1; near the bird they increase towards the light."""
    axis = (np.arange(size) + 0.5) / size
    x, y = ((axis - middle) / (0.6 * pose.scale) for middle in (pose.x, pose.y))
    slope = (x * np.cos(light.angle))[None] + (y * np.sin(light.angle))[:, None]
    return np.asarray(128 * (1 + light.contrast * slope.clip(-1.2, 1.2)), np.uint16)


def _backdrop(background: Background, light: Light, size: int) -> NDArray[np.uint8]:
    u = uniform(background.key, np.arange(240)).reshape(-1, 4)
    colours = np.array(background.colours) * np.array(light.gain)
    image = _BACKDROPS[background.kind](colours.clip(0, 255), u)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def _rgb(colour: Floats) -> tuple[int, ...]:
    return tuple(map(int, colour))


def _blend(a: Floats, b: Floats, t: Floats) -> Floats:
    """Colours between a and b, one for each of t."""
    return np.asarray(a + (b - a) * t[:, None])


def _gradient(top: Floats, bottom: Floats) -> Image.Image:
    rows = _blend(top, bottom, np.linspace(0, 1, _BACKDROP)).astype(np.uint8)
    return Image.fromarray(np.repeat(rows[:, None], _BACKDROP, 1))


def _blobs(image: Image.Image, colours: Iterable[Floats], u: Floats, rx: float, ry: float) -> None:
    """Paint an ellipse for each row (x, y, size) of u."""
    pen = ImageDraw.Draw(image)
    for (x, y, size), colour in zip(u[:, :3].tolist(), colours, strict=True):
        x, y = _BACKDROP * (1.2 * x - 0.1), _BACKDROP * (1.2 * y - 0.1)
        a, b = _BACKDROP * rx * (0.5 + size), _BACKDROP * ry * (0.5 + size)
        pen.ellipse((x - a, y - b, x + a, y + b), fill=_rgb(colour))


def _sky(c: Floats, u: Floats) -> Image.Image:
    image = _gradient(c[0], c[1])
    for (x, y, size, _), puffs in zip(u[:3], u[3:18].reshape(3, 5, 4), strict=True):
        place = puffs * (0.28, 0.06, 1, 1) + (x - 0.14, y - 0.03, 0, 0)
        _blobs(image, _blend(c[1], c[2], puffs[:, 3]), place, 0.07 + 0.05 * size, 0.035 + 0.02 * size)
    return image.filter(ImageFilter.GaussianBlur(1))


def _foliage(c: Floats, u: Floats) -> Image.Image:
    image = _gradient(c[1], c[0])
    _blobs(image, _blend(c[0], c[1], u[:36, 3]), u[:36], 0.12, 0.12)
    _blobs(image, _blend(c[1], c[2], u[36:48, 3]), u[36:48], 0.05, 0.05)
    return image.filter(ImageFilter.GaussianBlur(1.3))


def _wood(c: Floats, u: Floats) -> Image.Image:
    leaves = _blend(c[0], c[2], 0.4 + 0.6 * u[7:17, 3])
    image = _gradient(c[0], (c[0] + 2 * c[2]) / 3)
    pen = ImageDraw.Draw(image)
    for (x, lean, width, _), colour in zip(u[:7], _blend(c[0], c[1], np.linspace(0.35, 0.9, 7)), strict=True):
        ends = (x * _BACKDROP, -1, (x + 0.2 * (lean - 0.5)) * _BACKDROP, _BACKDROP)
        pen.line(ends, fill=_rgb(colour), width=1 + int(5 * width))
    _blobs(image, leaves, u[7:17] * (1, 0.25, 1, 1), 0.1, 0.07)
    return image.filter(ImageFilter.GaussianBlur(1))


def _water(c: Floats, u: Floats) -> Image.Image:
    image = _gradient(c[0], c[1])
    _blobs(image, _blend(c[0], c[2], u[:26, 3]), u[:26], 0.12, 0.01)
    _blobs(image, _blend(c[1], 0.8 * c[1], u[26:40, 3]), u[26:40], 0.14, 0.01)
    return image.filter(ImageFilter.GaussianBlur(0.7))


def _hills(c: Floats, u: Floats) -> Image.Image:
    image = _gradient(c[0], 0.7 * c[0] + 0.3 * c[1])
    pen = ImageDraw.Draw(image)
    x = np.linspace(0, 1, 15)
    ridges = zip((0.47, 0.59, 0.75), (0.3 * c[0] + 0.7 * c[1], 0.8 * c[1] + 0.2 * c[2], c[2]), u[:3], strict=True)
    for height, colour, (phase, waves, rise, _) in ridges:
        y = height + 0.12 * (rise - 0.5) + 0.06 * np.sin(2 * np.pi * (phase + (0.6 + waves) * x))
        outline = np.concatenate((np.stack((x, y), 1), [[1, 1.1], [0, 1.1]]))
        pen.polygon((outline * _BACKDROP).ravel().tolist(), fill=_rgb(colour))
    return image.filter(ImageFilter.GaussianBlur(1))


def _haze(c: Floats, u: Floats) -> Image.Image:
    t, s = (_noise(u.ravel()[: n * n].reshape(n, n)) for n in (6, 12))
    mixed = c[0] * (1 - t) + c[1] * t
    return Image.fromarray((mixed + 0.45 * s * (c[2] - mixed)).clip(0, 255).astype(np.uint8))


def _noise(grid: Floats) -> Floats:
    """(S, S, 1): the values in [0, 1] of a coarse grid, enlarged smoothly."""
    image = Image.fromarray((255 * grid).astype(np.uint8)).resize((_BACKDROP, _BACKDROP), Image.Resampling.BICUBIC)
    return np.asarray(image, float)[..., None] / 255


_BACKDROPS: Mapping[str, Callable[[Floats, Floats], Image.Image]] = {
    "sky": _sky, "foliage": _foliage, "wood": _wood, "water": _water, "hills": _hills, "haze": _haze,
}  # fmt: skip
