"""The scenes of `part_birds`: the contents of a picture, made from integers. They do not depend on the drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from interp_models.core.rng import seed_of, uniform
from interp_models.data.part_birds.shapes import Points

T = TypeVar("T")
RGB = tuple[int, int, int]

VARIED = ("beak", "crown", "wing", "tail", "belly", "legs")
"""The parts whose variants define the classes."""
_SAME = {"head": "plain", "body": "plain", "eye": "plain"}

CLASSES: Mapping[str, tuple[str, ...]] = {
    "short-billed jay": ("short", "crest", "bars", "fan", "plain", "feathered"),
    "hook-billed jay": ("hooked", "crest", "bars", "fan", "plain", "feathered"),
    "smooth-headed reedling": ("curved", "smooth", "plain", "pointed", "streaked", "thin"),
    "crested reedling": ("curved", "crest", "plain", "pointed", "streaked", "thin"),
    "bar-winged siskin": ("short", "tuft", "bars", "forked", "spotted", "thin"),
    "spot-winged siskin": ("short", "tuft", "spots", "forked", "spotted", "thin"),
    "fork-tailed tern": ("long", "smooth", "spots", "forked", "plain", "webbed"),
    "fan-tailed tern": ("long", "smooth", "spots", "fan", "plain", "webbed"),
    "streak-bellied thrush": ("hooked", "smooth", "plain", "fan", "streaked", "feathered"),
    "spot-bellied thrush": ("hooked", "smooth", "plain", "fan", "spotted", "feathered"),
    "thin-legged godwit": ("long", "tuft", "bars", "pointed", "plain", "thin"),
    "web-footed godwit": ("long", "tuft", "bars", "pointed", "plain", "webbed"),
}
"""Variants of the VARIED parts, by class name, in the order of the labels."""

CLOSE_PAIRS: Mapping[tuple[int, int], str] = {
    (2 * k, 2 * k + 1): part for k, part in enumerate(("beak", "crown", "wing", "tail", "belly", "legs"))
}
"""Pairs of labels that differ in only one part, and the name of this part."""


@dataclass(frozen=True)
class Pose:
    """Position and pose of the bird. Lengths are in units of the image's side, angles in radians."""

    x: float
    """Position of the middle of the bird; 0 is the left edge of the image, 1 the right edge."""
    y: float
    scale: float
    """Length in the image of one unit of the shapes; a bird is about 1.4 units long."""
    flip: bool
    """Whether the bird faces left."""
    angle: float
    """Rotation of the bird together with its perch."""
    tilt: float
    """Rotation of the bird above its legs."""
    head: float
    tail: float
    wing: float

    def place(self, points: Points) -> Points:
        """Map bird coordinates to the image, whose side is 1."""
        turned = (points + 0.05j) * np.exp(1j * self.angle) * self.scale
        return np.asarray(complex(self.x, self.y) + (-turned.conj() if self.flip else turned))


@dataclass(frozen=True)
class Light:
    """The illumination: an RGB gain for all colours, and a gradient over the bird towards the light."""

    gain: tuple[float, float, float]
    angle: float
    contrast: float


@dataclass(frozen=True)
class Background:
    """The background; `key` is the seed of its details."""

    kind: str
    colours: tuple[RGB, RGB, RGB]
    key: int


@dataclass(frozen=True)
class Perch:
    """The perch; `key` is the seed of its details."""

    kind: Literal["branch", "rock", "ground"]
    colour: RGB
    key: int


@dataclass(frozen=True)
class Occluder:
    """A plant in front of the bird: a stem from `base` to `tip`, both (x, y) in units of the image's side."""

    kind: Literal["sprig", "twig", "reed"]
    base: tuple[float, float]
    tip: tuple[float, float]
    bend: float
    """Offset of the middle of the stem from the straight line, as a fraction of its length."""
    size: float
    """Length of a leaf, in units of the image's side."""
    colour: RGB


@dataclass(frozen=True)
class Scene:
    """The contents of a picture. `dataclasses.replace` makes a changed copy.

    >>> import dataclasses
    >>> scene = make_scene(0, "train", 0, 0)
    >>> hooked = dataclasses.replace(scene, variants=scene.variants | {"beak": "hooked"})
    >>> no_wing = dataclasses.replace(scene, variants=scene.variants | {"wing": "none"})
    """

    variants: dict[str, str]
    """Variant of each part; "none" omits the part."""
    colours: dict[str, tuple[RGB, RGB]]
    """Colours of each part and of its marks."""
    pose: Pose
    light: Light
    background: Background
    perch: Perch
    occluders: tuple[Occluder, ...]


_PLUMAGES: Sequence[tuple[RGB, RGB, RGB, RGB]] = (  # main, dark, light, accent
    ((158, 118, 84), (98, 70, 54), (247, 230, 204), (221, 96, 58)),
    ((98, 150, 208), (48, 78, 134), (246, 232, 212), (236, 150, 84)),
    ((238, 198, 76), (92, 82, 70), (252, 242, 206), (214, 84, 62)),
    ((208, 78, 70), (116, 42, 52), (248, 222, 200), (66, 60, 68)),
    ((128, 178, 92), (54, 102, 72), (240, 240, 200), (232, 104, 84)),
    ((76, 166, 164), (34, 92, 108), (240, 238, 220), (246, 176, 78)),
    ((164, 170, 180), (88, 94, 110), (246, 246, 242), (230, 178, 72)),
    ((156, 128, 190), (86, 68, 128), (244, 234, 244), (248, 196, 98)),
    ((228, 148, 158), (142, 78, 98), (252, 238, 234), (108, 150, 156)),
    ((196, 140, 92), (112, 66, 46), (250, 232, 200), (76, 124, 152)),
    ((92, 100, 124), (50, 54, 72), (232, 234, 238), (226, 88, 84)),
    ((226, 128, 72), (120, 62, 48), (252, 236, 204), (70, 84, 110)),
)  # fmt: skip
_HORN: Sequence[RGB] = ((240, 158, 56), (246, 200, 84), (92, 86, 92), (216, 124, 96), (150, 140, 130))
_IRIS: Sequence[RGB] = ((250, 246, 236), (248, 214, 120), (240, 170, 96), (214, 228, 236))
_BACKGROUNDS: Mapping[str, Sequence[tuple[RGB, RGB, RGB]]] = {
    "sky": (
        ((116, 176, 226), (222, 238, 246), (252, 252, 252)),
        ((246, 190, 150), (252, 232, 200), (255, 244, 226)),
        ((150, 160, 206), (244, 214, 208), (250, 236, 232)),
    ),
    "foliage": (
        ((92, 138, 84), (150, 188, 112), (206, 222, 150)),
        ((74, 118, 100), (124, 168, 136), (192, 216, 176)),
        ((178, 128, 72), (216, 172, 98), (240, 214, 150)),
    ),
    "wood": (
        ((188, 204, 186), (118, 132, 112), (150, 176, 126)),
        ((214, 206, 190), (138, 118, 102), (190, 166, 120)),
        ((196, 210, 220), (120, 130, 144), (160, 178, 176)),
    ),
    "water": (
        ((128, 182, 198), (88, 148, 176), (212, 234, 236)),
        ((150, 184, 172), (104, 150, 144), (220, 236, 220)),
        ((206, 178, 168), (150, 144, 162), (246, 222, 200)),
    ),
    "hills": (
        ((206, 228, 240), (142, 178, 160), (108, 150, 110)),
        ((250, 226, 196), (204, 168, 150), (150, 128, 122)),
        ((216, 222, 238), (160, 172, 200), (126, 150, 150)),
    ),
    "haze": (
        ((170, 196, 166), (214, 222, 190), (134, 164, 146)),
        ((206, 190, 170), (232, 220, 200), (170, 160, 150)),
        ((172, 184, 204), (222, 220, 226), (150, 158, 182)),
    ),
}
_PERCHES: Mapping[Literal["branch", "rock", "ground"], Sequence[RGB]] = {
    "branch": ((132, 100, 76), (112, 98, 90), (150, 122, 92)),
    "rock": ((150, 146, 142), (132, 126, 132), (172, 158, 140)),
    "ground": ((120, 156, 84), (196, 176, 132), (146, 142, 92)),
}
_LEAVES: Sequence[RGB] = ((96, 148, 76), (126, 166, 84), (74, 122, 88), (176, 138, 70))


class _Numbers:
    """The random numbers of one group of fields, used in order."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = iter(values)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def choice(self, options: Sequence[T]) -> T:
        return options[int(next(self._values) * len(options))]

    def near(self, colour: RGB, spread: float = 14) -> RGB:
        """A random colour near `colour`."""
        r, g, b = (min(max(round(c + self.between(-spread, spread)), 0), 255) for c in colour)
        return r, g, b


def make_scene(seed: int, split: str, index: int, label: int) -> Scene:
    """Make scene `index` of a split with a bird of class `label`, a pure function of the arguments.

    The label decides the variants of the parts and nothing else: the same index with another label is the same
    picture with another bird.
    """
    key = (seed, ("train", "test").index(split), index)
    groups = uniform(*key, np.arange(6)[:, None], np.arange(48)).tolist()
    pose, plumage, light, behind, below, front = map(_Numbers, groups)
    where = _pose(pose)
    return Scene(
        variants=dict(zip(VARIED, list(CLASSES.values())[label], strict=True)) | _SAME,
        colours=_colours(plumage),
        pose=where,
        light=_light(light),
        background=_background(behind, seed_of(*key, 6)),
        perch=_perch(below, seed_of(*key, 7)),
        occluders=_occluders(front, where),
    )


def _pose(numbers: _Numbers) -> Pose:
    scale = numbers.between(0.44, 0.56)
    return Pose(
        x=0.5 + numbers.between(-1, 1) * (0.47 - 0.78 * scale),
        y=0.5 + numbers.between(-1, 1) * (0.46 - 0.68 * scale),
        scale=scale,
        flip=numbers.choice((False, True)),
        angle=numbers.between(-0.14, 0.14),
        tilt=numbers.between(-0.2, 0.16),
        head=numbers.between(-0.22, 0.22),
        tail=numbers.between(-0.25, 0.3),
        wing=numbers.between(-0.08, 0.12),
    )


def _colours(numbers: _Numbers) -> dict[str, tuple[RGB, RGB]]:
    main, dark, light, accent = (numbers.near(colour) for colour in numbers.choice(_PLUMAGES))
    head, crown = numbers.choice(((main, accent), (main, dark), (dark, accent), (accent, dark)))
    tail = numbers.choice((dark, main, accent))
    mark = numbers.choice((dark, accent))
    horn, legs = numbers.near(numbers.choice(_HORN)), numbers.near(numbers.choice(_HORN))
    return {
        "tail": (tail, light),
        "legs": (legs, main),
        "body": (main, dark),
        "belly": (light, mark),
        "wing": (dark, light),
        "head": (head, light),
        "beak": (horn, (40, 34, 40)),
        "crown": (crown, light),
        "eye": (numbers.near(numbers.choice(_IRIS), 6), (34, 28, 34)),
    }


def _light(numbers: _Numbers) -> Light:
    level, warmth = numbers.between(0.82, 1.08), numbers.between(-0.07, 0.07)
    gain = (level * (1 + warmth), level, level * (1 - warmth))
    return Light(gain, angle=numbers.between(-2.6, -0.5), contrast=numbers.between(0.08, 0.22))


def _background(numbers: _Numbers, key: int) -> Background:
    kind = numbers.choice(list(_BACKGROUNDS))
    a, b, c = (numbers.near(colour) for colour in numbers.choice(_BACKGROUNDS[kind]))
    return Background(kind, (a, b, c), key)


def _perch(numbers: _Numbers, key: int) -> Perch:
    kind = numbers.choice(list(_PERCHES))
    return Perch(kind, numbers.near(numbers.choice(_PERCHES[kind])), key)


def _occluders(numbers: _Numbers, pose: Pose) -> tuple[Occluder, ...]:
    """Up to two plants. Their tips and leaves are in front of the trunk, so small parts are never hidden completely."""
    return tuple(_occluder(numbers, pose) for _ in range(numbers.choice((0, 0, 1, 1, 2))))


def _occluder(numbers: _Numbers, pose: Pose) -> Occluder:
    kind: Literal["sprig", "twig", "reed"] = numbers.choice(("sprig", "sprig", "twig", "reed"))
    aim = complex(numbers.between(-0.3, 0.3), numbers.between(-0.15, 0.25))
    tip = complex(pose.place(np.array(aim)))
    base = complex(tip.real + numbers.between(-0.35, 0.35), 1.05)
    return Occluder(
        kind=kind,
        base=(base.real, base.imag),
        tip=(tip.real, tip.imag),
        bend=numbers.between(-0.15, 0.15),
        size=numbers.between(0.065, 0.1),
        colour=numbers.near(numbers.choice(_LEAVES)),
    )
