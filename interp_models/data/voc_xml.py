"""Annotations in the XML of PASCAL VOC, which ImageNet, Oxford-IIIT Pet and VOC itself use."""

from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from interp_models.core.errors import InputError

Box = tuple[float, float, float, float]


class Object(NamedTuple):
    """One object of an image."""

    name: str
    box: Box
    """XYXY in pixels; x1 and y1 are the first ones outside."""
    difficult: bool


def objects_of(path: Path) -> list[Object]:
    """The objects that an annotation file lists. Its pixels count from 1, and its boxes include their last pixels.

    Raises:
        InputError: if the file is missing or is no such annotation.
    """
    try:
        root = ElementTree.parse(path).getroot()
        return [
            Object(
                str(one.findtext("name")),
                _box([float(str(one.findtext(f"bndbox/{end}"))) for end in ("xmin", "ymin", "xmax", "ymax")]),
                one.findtext("difficult", "0").strip() == "1",
            )
            for one in root.iter("object")
        ]
    except FileNotFoundError:
        raise InputError(f"annotation {path} is missing") from None
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise InputError(f"annotation {path} cannot be read: {error}") from None


def _box(edges: list[float]) -> Box:
    left, top, right, bottom = edges
    return left - 1, top - 1, right, bottom
