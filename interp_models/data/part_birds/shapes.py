"""The shapes of `part_birds`: outlines of every variant of every part, as complex numbers x + iy.

The bird stands at y = FOOT_Y and faces right. Its body is about 0.7 long. y points down, as in images.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.complex128]

FOOT_Y = 0.56
NECK, RUMP, SHOULDER = 0.16 - 0.2j, -0.31 + 0.05j, 0.12 - 0.06j  # joints of the head, the tail and the wing

FILL, INK, LIGHT, MARK = range(4)
"""Tones of a part: its colour, a darker one for outlines, a lighter one for highlights; its second colour."""


class Stroke(NamedTuple):
    """A filled area with an outline, or an open line if `width` is given; `outline` False omits the outline."""

    points: Points
    tone: int = FILL
    width: float | None = None
    outline: bool = True


def curve(*points: complex, closed: bool = True, steps: int = 6) -> Points:
    """A smooth (Catmull-Rom) curve through the points; a point given twice is a corner."""
    p = np.array(points)
    p = np.concatenate((p[-1:], p, p[:2])) if closed else np.concatenate((p[:1], p, p[-1:]))
    a, b, c, d = p[:-3, None], p[1:-2, None], p[2:-1, None], p[3:, None]
    t = np.arange(steps) / steps
    smooth = b + ((c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3) / 2
    return smooth.ravel() if closed else np.append(smooth.ravel(), p[-1])


def ellipse(centre: complex, rx: float, ry: float, angle: float = 0.0, steps: int = 24) -> Points:
    """An ellipse whose x axis is turned by `angle` radians, clockwise in the image."""
    turn = np.arange(steps) * (2 * np.pi / steps)
    return np.asarray(centre + (rx * np.cos(turn) + 1j * ry * np.sin(turn)) * np.exp(1j * angle))


def _lines(*ends: tuple[complex, ...], width: float, tone: int = INK) -> tuple[Stroke, ...]:
    return tuple(Stroke(curve(*points, closed=False), tone, width) for points in ends)


def _dots(*centres: complex, rx: float, ry: float, angle: float = 0.0) -> tuple[Stroke, ...]:
    return tuple(Stroke(ellipse(centre, rx, ry, angle, 12), MARK, outline=False) for centre in centres)


_GAPE = 0.008

_BEAKS = {
    "short": (
        Stroke(curve(0.38 - 0.39j, 0.38 - 0.39j, 0.5 - 0.36j, 0.61 - 0.26j, 0.61 - 0.26j, 0.5 - 0.2j, 0.38 - 0.18j)),
        *_lines((0.40 - 0.27j, 0.5 - 0.285j, 0.58 - 0.262j), width=_GAPE),
    ),
    "long": (
        Stroke(curve(0.38 - 0.345j, 0.38 - 0.345j, 0.74 - 0.25j, 0.74 - 0.25j, 0.38 - 0.205j, 0.38 - 0.205j)),
        *_lines((0.40 - 0.27j, 0.7 - 0.255j), width=_GAPE),
    ),
    "hooked": (
        Stroke(curve(0.37 - 0.22j, 0.37 - 0.28j, 0.5 - 0.26j, 0.53 - 0.2j, 0.46 - 0.155j, 0.38 - 0.17j), INK),
        Stroke(
            curve(
                0.37 - 0.40j, 0.5 - 0.425j, 0.61 - 0.34j, 0.625 - 0.22j, 0.585 - 0.12j, 0.585 - 0.12j, 0.55 - 0.215j,
                0.47 - 0.235j, 0.37 - 0.22j,
            )
        ),
        *_dots(0.46 - 0.35j, rx=0.016, ry=0.01),
    ),
    "curved": (
        Stroke(
            curve(
                0.38 - 0.35j, 0.5 - 0.345j, 0.64 - 0.275j, 0.73 - 0.16j, 0.755 - 0.03j, 0.755 - 0.03j, 0.68 - 0.13j,
                0.59 - 0.205j, 0.48 - 0.235j, 0.38 - 0.2j,
            )
        ),
        *_lines((0.40 - 0.28j, 0.53 - 0.275j, 0.64 - 0.215j, 0.71 - 0.12j), width=_GAPE),
    ),
}  # fmt: skip

_CAP = (0.40 - 0.385j, 0.30 - 0.43j, 0.17 - 0.415j, 0.035 - 0.31j)  # from the forehead over the eye to the nape
_CROWNS = {
    "smooth": (Stroke(curve(*_CAP, 0.045 - 0.40j, 0.12 - 0.485j, 0.23 - 0.52j, 0.34 - 0.485j)),),
    "crest": (
        Stroke(
            curve(
                *_CAP, 0.03 - 0.4j, -0.01 - 0.5j, -0.06 - 0.57j, -0.06 - 0.57j, 0.01 - 0.575j, -0.02 - 0.68j,
                -0.05 - 0.74j, -0.05 - 0.74j, 0.13 - 0.69j, 0.27 - 0.6j, 0.37 - 0.48j,
            )
        ),
        *_lines((0.25 - 0.49j, 0.14 - 0.57j, 0.04 - 0.65j), (0.15 - 0.46j, 0.08 - 0.52j, 0.03 - 0.55j), width=_GAPE),
    ),
    "tuft": (
        Stroke(curve(*_CAP, 0.045 - 0.40j, 0.12 - 0.485j, 0.23 - 0.52j, 0.34 - 0.485j)),
        *_lines((0.24 - 0.5j, 0.23 - 0.6j, 0.29 - 0.67j), (0.2 - 0.5j, 0.16 - 0.62j, 0.2 - 0.7j), width=0.018),
        Stroke(ellipse(0.33 - 0.685j, 0.055, 0.036, 0.4)),
        Stroke(ellipse(0.23 - 0.725j, 0.055, 0.036, 0.2)),
    ),
}  # fmt: skip

_WING = Stroke(
    curve(
        0.17 - 0.09j, 0.14 + 0.03j, 0.02 + 0.1j, -0.16 + 0.13j, -0.3 + 0.13j, -0.44 + 0.12j, -0.44 + 0.12j,
        -0.36 + 0.03j, -0.25 - 0.08j, -0.1 - 0.16j, 0.08 - 0.16j,
    )
)  # fmt: skip
_FEATHERS = _lines(
    (-0.2 + 0.02j, -0.29 + 0.06j, -0.39 + 0.1j), (-0.18 + 0.07j, -0.26 + 0.1j, -0.33 + 0.115j), width=_GAPE
)
_WINGS = {
    "plain": (_WING, *_FEATHERS),
    "bars": (
        _WING,
        *_FEATHERS,
        *_lines(
            (0.01 - 0.135j, 0.035 - 0.03j, -0.01 + 0.075j), (-0.13 - 0.115j, -0.105 - 0.01j, -0.15 + 0.095j),
            width=0.05, tone=MARK,
        ),
    ),
    "spots": (
        _WING,
        *_FEATHERS,
        *_dots(
            0.09 - 0.1j, 0.08 - 0.0j, -0.01 - 0.115j, -0.015 - 0.02j, -0.05 + 0.065j, -0.11 - 0.08j, -0.12 + 0.01j,
            -0.15 + 0.09j, -0.21 - 0.05j, rx=0.028, ry=0.028,
        ),
    ),
}  # fmt: skip

_TAIL_ROOT = (-0.27 - 0.05j, -0.27 - 0.05j)
_TAIL_UNDER = (-0.25 + 0.14j, -0.25 + 0.14j)
_TAILS = {
    "pointed": (
        Stroke(curve(*_TAIL_ROOT, -0.5 + 0.01j, -0.74 + 0.16j, -0.74 + 0.16j, -0.5 + 0.175j, *_TAIL_UNDER)),
        *_lines((-0.4 + 0.06j, -0.69 + 0.15j), width=_GAPE),
    ),
    "forked": (
        Stroke(
            curve(
                *_TAIL_ROOT, -0.52 - 0.03j, -0.74 - 0.06j, -0.74 - 0.06j, -0.63 + 0.04j, -0.56 + 0.11j, -0.56 + 0.11j,
                -0.62 + 0.19j, -0.7 + 0.31j, -0.7 + 0.31j, -0.5 + 0.23j, *_TAIL_UNDER,
            )
        ),
        *_lines((-0.36 + 0.0j, -0.6 - 0.005j), (-0.36 + 0.12j, -0.58 + 0.21j), width=_GAPE),
    ),
    "fan": (
        Stroke(
            curve(
                *_TAIL_ROOT, -0.48 - 0.1j, -0.63 - 0.15j, -0.7 - 0.12j, -0.69 - 0.05j, -0.74 - 0.02j, -0.735 + 0.06j,
                -0.765 + 0.11j, -0.74 + 0.18j, -0.74 + 0.25j, -0.69 + 0.3j, -0.65 + 0.34j, -0.58 + 0.34j,
                -0.45 + 0.25j, *_TAIL_UNDER,
            )
        ),
        *_lines(
            (-0.4 - 0.02j, -0.67 - 0.05j), (-0.4 + 0.035j, -0.715 + 0.05j), (-0.4 + 0.1j, -0.72 + 0.18j),
            (-0.38 + 0.13j, -0.67 + 0.28j), width=_GAPE,
        ),
    ),
}  # fmt: skip

_BELLY = Stroke(
    curve(
        0.35 - 0.08j, 0.37 + 0.04j, 0.3 + 0.19j, 0.14 + 0.29j, -0.04 + 0.3j, -0.2 + 0.235j, -0.3 + 0.15j, -0.16 + 0.1j,
        0.02 + 0.07j, 0.15 + 0.0j, 0.24 - 0.09j,
    )
)  # fmt: skip
_BELLY_SPOTS = (
    0.29 - 0.04j, 0.23 + 0.03j, 0.31 + 0.06j, 0.15 + 0.1j, 0.24 + 0.13j, 0.06 + 0.16j, 0.15 + 0.2j, -0.04 + 0.19j,
    0.05 + 0.25j, -0.13 + 0.2j,
)  # fmt: skip
_BELLIES = {
    "plain": (_BELLY,),
    "streaked": (
        _BELLY,
        *_lines(
            *((x - 0.5 * dx, x + 0.5 * dx) for x, dx in (
                (0.31 + 0.03j, -0.02 + 0.17j), (0.235 + 0.07j, -0.04 + 0.2j), (0.155 + 0.135j, -0.05 + 0.18j),
                (0.065 + 0.175j, -0.06 + 0.16j), (-0.03 + 0.195j, -0.065 + 0.13j), (-0.12 + 0.185j, -0.07 + 0.09j),
            )),
            width=0.026, tone=MARK,
        ),
    ),
    "spotted": (_BELLY, *_dots(*_BELLY_SPOTS, rx=0.027, ry=0.027)),
}  # fmt: skip


def _toes(foot: complex, length: float, width: float) -> tuple[Stroke, ...]:
    ends = (foot + length * (1.0 + 0.16j), foot + length * (0.75 + 0.55j), foot - length * (0.7 - 0.2j))
    return _lines(*((foot, end) for end in ends), width=width, tone=FILL)


def _thin_leg(hip: complex, foot: complex) -> tuple[Stroke, ...]:
    knee = 0.5 * (hip + foot) - 0.035
    shank = _lines((hip, knee), (knee, foot), width=0.03, tone=FILL)
    return *shank, Stroke(ellipse(knee, 0.026, 0.026, steps=10), outline=False), *_toes(foot, 0.12, 0.024)


def _webbed_leg(hip: complex, foot: complex) -> tuple[Stroke, ...]:
    web = curve(
        *[foot - 0.05 - 0.05j] * 2, foot + 0.06 - 0.045j, *[foot + 0.19 - 0.01j] * 2, foot + 0.13 + 0.02j,
        *[foot + 0.135 + 0.065j] * 2, foot + 0.06 + 0.045j, *[foot - 0.0 + 0.09j] * 2,
    )  # fmt: skip
    shank, bone = (hip, foot), (foot + 0.02j, foot + 0.11 + 0.05j)
    return *_lines(shank, width=0.045, tone=FILL), Stroke(web), *_lines(bone, width=_GAPE)


def _feathered_leg(hip: complex, foot: complex) -> tuple[Stroke, ...]:
    top = hip - 0.06j
    trousers = curve(
        top - 0.085, top + 0.085, hip + 0.075 + 0.09j, *[hip + 0.035 + 0.2j] * 2, hip + 0.01 + 0.165j,
        *[hip - 0.02 + 0.205j] * 2, hip - 0.075 + 0.08j,
    )  # fmt: skip
    return *_lines((hip, foot), width=0.03, tone=FILL), *_toes(foot, 0.085, 0.028), Stroke(trousers, MARK)


_LEGS = {
    name: (*leg(0.11 + 0.24j, 0.13 + 1j * FOOT_Y - 0.03j), *leg(-0.06 + 0.24j, -0.05 + 1j * FOOT_Y))
    for name, leg in (("thin", _thin_leg), ("webbed", _webbed_leg), ("feathered", _feathered_leg))
}

_BODY = curve(
    0.33 - 0.2j, 0.36 - 0.08j, 0.38 + 0.04j, 0.31 + 0.2j, 0.14 + 0.3j, -0.04 + 0.31j, -0.2 + 0.245j, -0.32 + 0.15j,
    -0.36 + 0.03j, -0.26 - 0.1j, -0.12 - 0.22j, 0.02 - 0.335j, 0.2 - 0.36j,
)  # fmt: skip
_EYE = 0.285 - 0.345j

SHAPES: Mapping[str, Mapping[str, tuple[Stroke, ...]]] = {
    "tail": _TAILS,
    "legs": _LEGS,
    "body": {"plain": (Stroke(_BODY),)},
    "belly": _BELLIES,
    "wing": _WINGS,
    "head": {
        "plain": (
            Stroke(ellipse(0.22 - 0.31j, 0.2, 0.2, steps=32)),
            Stroke(ellipse(0.275 - 0.205j, 0.06, 0.04), LIGHT, outline=False),
        )
    },
    "beak": _BEAKS,
    "crown": _CROWNS,
    "eye": {
        "plain": (
            Stroke(ellipse(_EYE, 0.055, 0.055)),
            Stroke(ellipse(_EYE + 0.005, 0.038, 0.038, steps=16), MARK, outline=False),
            Stroke(ellipse(_EYE + 0.018 - 0.016j, 0.015, 0.015, steps=8), LIGHT, outline=False),
        )
    },
}
"""Outlines by part and variant. Parts are in drawing order; later ones cover earlier ones."""

ANCHORS: Mapping[str, complex] = {
    "tail": -0.5 + 0.095j,
    "legs": -0.05 + 0.555j,
    "body": -0.02 - 0.225j,
    "belly": 0.2 + 0.08j,
    "wing": -0.06 - 0.03j,
    "head": 0.12 - 0.3j,
    "beak": 0.47 - 0.3j,
    "crown": 0.23 - 0.475j,
    "eye": _EYE,
}
"""The key point of each part: every variant of the part covers it, and no other part does."""
