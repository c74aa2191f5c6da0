"""Read image files of all formats as 8-bit RGB, with one rule for value ranges."""

import struct
import zlib
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageFile, features
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from interp_models.core.errors import InputError, first_line

BROKEN, MISSING, AMBIGUOUS = "cannot be decoded", "is missing", "is ambiguous"
"""Kinds of problems; every message about a broken image starts with the image's path and one of them."""
ADVICE = "data.skip_corrupt=true leaves such images out"

ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, NotImplementedError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""The errors that Pillow raises for broken files."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Pillow's transposition for each EXIF orientation."""

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_VALUE, ORIENTATION, SAMPLE_FORMAT, MAX_VALUE_OF_FORMAT = 258, 262, 281, 274, 339, 341
"""Numbers of TIFF tags."""


def endings() -> frozenset[str]:
    """Endings of the image files that Pillow can decode here, in lower case; no vector formats, no films."""
    Image.init()
    optional = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
    absent = {form for form, feature in optional.items() if not features.check(feature)}

    def reads_pixels(form: str) -> bool:
        opener = Image.OPEN.get(form, (None,))[0]
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        return opener is not None and not stub and form not in {"EPS", "IPTC", "MPEG", *absent}

    return frozenset(ending.lower() for ending, form in Image.registered_extensions().items() if reads_pixels(form))


def open_image(path: str | Path) -> tv_tensors.Image:
    """Read an image file as a run reads its images.

    Args:
        path: the file, of any format that Pillow reads; a leading `~` is the home folder.

    Returns:
        uint8 RGB, (3, H, W), turned upright as its EXIF orientation says.

    Raises:
        InputError: see `decode_image`.
    """
    return decode_image(Path(path).expanduser())


def decode_image(path: Path, *, upright: bool = True, max_value: float | None = None) -> tv_tensors.Image:
    """Read an image file of any format as uint8 RGB, (3, H, W).

    A film or a file of several pages gives its first image. Transparent pixels keep their colour.

    Values of more than 8 bits are scaled from the range 0 to a maximum. The maximum is `max_value` if given, else the
    one that the file declares, else the largest value of the data type (1 for floats). The last one is used only if it
    is plausible: at least one value lies in the upper half, or all are multiples of 257 (8 bits expanded to 16).

    Args:
        path: the file.
        upright: whether to turn the image as its EXIF orientation says.
        max_value: maximum of the range of grey images of more than 8 bits.

    Raises:
        InputError: if the file is missing or cannot be decoded, or the range of its values is unknown.
    """
    try:
        with Image.open(path) as file:
            return tv_tensors.Image(F.pil_to_tensor(_rgb(file, upright, max_value)))
    except InputError as error:
        raise InputError(f"image {path} {AMBIGUOUS}: {error}; {ADVICE}") from None
    except FileNotFoundError:
        raise missing(path) from None
    except ERRORS as error:
        reason = first_line(error)
        raise InputError(f"image {path} {BROKEN} ({reason}); {ADVICE}") from None


def decode_classes(path: Path) -> Tensor:
    """Read a file whose pixels are numbers of classes, as palette or grey, (H, W) uint8.

    Raises:
        InputError: if the file is missing or cannot be decoded, or has colours.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("P", "L"):
                raise InputError(f"mask {path} must have a palette or be grey; its mode is {file.mode}")
            return torch.from_numpy(np.asarray(file).copy())
    except FileNotFoundError:
        raise missing(path) from None
    except ERRORS as error:
        raise InputError(f"mask {path} {BROKEN} ({first_line(error)}); {ADVICE}") from None


def missing(path: Path) -> InputError:
    """The error for an image file that does not exist."""
    why = "it is a broken link" if path.is_symlink() else "the data set's lists name it"
    return InputError(f"image {path} {MISSING}; {why}; {ADVICE}")


def looks_whole(path: Path) -> bool:
    """Whether header and end of a file are those of a complete image of 8 bits. If not, the file may be broken.

    It decodes nothing and takes a tenth of a millisecond.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            form, deep = image.format, _is_deep(image)
            size = file.seek(0, 2)
            file.seek(max(0, size - 64))
            tail = file.read()
            file.seek(4)
            length = int.from_bytes(file.read(4), "little")
    except ERRORS:
        return False
    if form == "WEBP":
        return length + 8 <= size
    if form == "GIF":
        return tail.endswith(b"\0;")
    ends = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
    return not deep and ends.get(str(form), b"") in tail


def _rgb(file: Image.Image, upright: bool, max_value: float | None) -> Image.Image:
    deep, grey = _is_deep(file), file.mode[0] in "IF"
    file.load()
    if grey:
        image = _scaled(file, max_value)
    elif "transparency" in file.info or file.mode[-1] in "Aa":
        image = file.convert("RGBA")
        *colours, (least, most) = _extrema(image)
        if least != most and all(low == high for low, high in colours):
            raise InputError("only its transparency shows a picture, and models do not see transparency")
    else:
        image = file
        if not deep and file.mode in ("L", "RGB"):
            ranges = _extrema(file)
            if max(high for _, high in ranges) == 1 and any(low != high for low, high in ranges):
                raise InputError("its values are 0 and 1, of 255: it looks like a mask")
    image = image.convert("RGB")
    if deep and not grey:
        _check_deep_colours(file, image, max_value)
    return turned(image, file) if upright else image


def turned(image: Image.Image, file: Image.Image) -> Image.Image:
    """An image turned by the EXIF orientation of its file."""
    turn = TURNS.get(_orientation(file))
    return image if turn is None else image.transpose(turn)


def _extrema(image: Image.Image) -> list[tuple[float, float]]:
    """The smallest and the largest value of every band."""
    return [cast(tuple[float, float], band.getextrema()) for band in image.split()]


def _is_deep(file: Image.Image) -> bool:
    """Whether an image that is not loaded yet has more than 8 bits per value."""
    if file.mode[0] in "IF":
        return True
    if file.format == "TIFF":
        return bool(np.max(file.tag_v2.get(BITS_PER_SAMPLE, 1)) > 8)  # type: ignore[attr-defined]
    # The only trace of 16-bit colours in Pillow is the way in which it is going to read them
    ways = [f"{tile[0]} {tile[3] if isinstance(tile[3], str) else tile[3][0]}" for tile in getattr(file, "tile", ())]
    return file.format in ("PNG", "SGI") and any("16" in way for way in ways)


def _orientation(file: Image.Image) -> int:
    try:
        return int(file.getexif().get(ORIENTATION, 1))
    except ERRORS:  # broken EXIF data; the pixels may be fine
        return 1


def _range(file: Image.Image) -> tuple[float, bool]:
    """The maximum of the range of an image of more than 8 bits, and whether the file itself declares it."""
    if file.format in ("PPM", "JPEG2000") and file.mode != "F":  # both declare their bits, and Pillow scales to 16
        return 65535, True
    bits, signed = {"F": (0, False), "I": (32, True)}.get(file.mode, (16, False))
    if file.format == "PNG":
        bits, signed = 16, False
    if file.format == "TIFF":
        tags = file.tag_v2  # type: ignore[attr-defined]
        for tag in (MAX_VALUE_OF_FORMAT, MAX_VALUE):
            if tag in tags:
                return float(np.max(tags[tag])), True
        if file.mode != "F":
            bits, signed = int(np.max(tags.get(BITS_PER_SAMPLE, 16))), np.max(tags.get(SAMPLE_FORMAT, 1)) == 2
    return (2.0 ** (bits - signed) - 1 if bits else 1.0), bits not in (0, 16, 32)


def _scaled(file: Image.Image, max_value: float | None) -> Image.Image:
    """Scale grey values of more than 8 bits to 8 bits."""
    values = np.asarray(file)
    top, known = _range(file)
    if file.mode == "I" and top > 2**31:
        values = values.view(np.uint32)  # Pillow reads unsigned as signed
    top, known = (max_value, True) if max_value is not None else (top, known)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # also true for NaN
        raise InputError(f"its values are from {low:g} to {high:g}, not from 0 to {top:g}")
    of_bytes = top == 65535 and bool((values % 257 == 0).all())
    if not known and not of_bytes and high <= top / 2:
        raise InputError(
            f"its values are from {low:g} to {high:g}, so their range need not be 0 to {top:g}; "
            "data.dataset.max_value of image_folder gives it"
        )
    levels = values.astype(np.float64) / top
    if file.format == "TIFF" and file.tag_v2.get(PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
        levels = 1 - levels  # Pillow inverts "white is zero" only for 8 bits
    return Image.fromarray(np.rint(255 * levels).astype(np.uint8))


def _check_deep_colours(file: Image.Image, image: Image.Image, max_value: float | None) -> None:
    """Refuse 16-bit colours of another range: Pillow keeps their upper 8 bits, which fits only the range of 16 bits."""
    top, known = (max_value, True) if max_value is not None else _range(file)
    if known and top != 65535:
        raise InputError(f"its 16-bit colours cannot be read for a range of 0 to {top:g}; convert it to 8 bits")
    if not known and max(high for _, high in image.getextrema()) < 128:  # type: ignore[misc]
        raise InputError(
            "its 16-bit colours all lie in the lower half of 0 to 65535, so their range may be another one; convert "
            "it to 8 bits, or give data.dataset.max_value=65535 of image_folder"
        )
