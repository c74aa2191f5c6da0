"""Every kind of image file as 8-bit RGB, by values written here by hand."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin

from interp_models.core.errors import InputError
from interp_models.data.base import decode_image
from interp_models.data.decoding import endings, looks_whole, open_image
from interp_models.data.transforms import of_known_range


def grey(values: Any, dtype: str) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


def levels(path: Path, **options: Any) -> list[int]:
    """The grey levels of a row."""
    image = decode_image(path, **options)
    assert image.dtype == torch.uint8
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    return image[0, 0].tolist()


def png16(values: np.ndarray, chunks: bytes = b"") -> bytes:
    """A PNG of 16-bit RGB (h, w, 3), which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(path: Path, image: Image.Image, **tags: int) -> Path:
    """A TIFF with further tags, by their number as `t281`."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[int(name[1:])] = value
    image.save(path, "TIFF", tiffinfo=info)
    return path


# Ranges of values


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("a.png", grey([0, 257, 32896, 65535], "uint16"), [0, 1, 128, 255]),
        ("a.tif", grey([0, 257, 32896, 65535], "uint16"), [0, 1, 128, 255]),
        ("dark.png", grey([0, 257, 514, 7 * 257], "uint16"), [0, 1, 2, 7]),  # 8 bits in 16, by their multiples
        ("black.png", grey([0, 0], "uint16"), [0, 0]),
        ("half.png", grey([0, 32767, 32768], "uint16"), [0, 127, 128]),
        ("a.tiff", grey([0, 2**30, 2**31 - 1], "int32"), [0, 128, 255]),
        ("b.tiff", grey([0, 0.2, 0.6, 1], "float32"), [0, 51, 153, 255]),
        ("a.pgm", grey([0, 65535, 257], "uint16"), [0, 255, 1]),
    ],
)
def test_known_ranges_are_scaled(tmp_path: Path, name: str, image: Image.Image, expected: list[int]) -> None:
    image.save(tmp_path / name)
    assert levels(tmp_path / name) == expected
    assert not looks_whole(tmp_path / name)  # so that a check before training decodes it


@pytest.mark.parametrize(
    ("name", "image", "says"),
    [
        (
            "12.png",
            grey([0, 16, 4080], "uint16"),
            "its values are from 0 to 4080, so their range need not be 0 to 65535",
        ),
        ("14.tif", grey([0, 16383], "uint16"), "from 0 to 16383, so their range need not be 0 to 65535"),
        ("8.png", grey([3, 255], "uint16"), "from 3 to 255, so their range need not be 0 to 65535"),
        ("int.tif", grey([0, 255], "int32"), "from 0 to 255, so their range need not be 0 to 2.14748e+09"),
        ("minus.tif", grey([-5, 2**31 - 1], "int32"), "from -5 to 2.14748e+09, not from 0 to 2.14748e+09"),
        ("255.tif", grey([0.0, 255.0], "float32"), "from 0 to 255, not from 0 to 1"),
        ("minus1.tif", grey([-1.0, 1.0], "float32"), "from -1 to 1, not from 0 to 1"),
        ("dim.tif", grey([0.0, 0.004], "float32"), "from 0 to 0.004, so their range need not be 0 to 1"),
        ("nan.tif", grey([0.0, np.nan], "float32"), "from nan to nan, not from 0 to 1"),
    ],
)
def test_unknown_ranges_are_refused(tmp_path: Path, name: str, image: Image.Image, says: str) -> None:
    image.save(tmp_path / name)
    with pytest.raises(InputError) as error:
        decode_image(tmp_path / name)
    assert str(error.value).startswith(f"image {tmp_path / name} is ambiguous: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_given_range(tmp_path: Path) -> None:
    grey([0, 273, 4095], "uint16").save(tmp_path / "12.png")
    assert levels(tmp_path / "12.png", max_value=4095) == [0, 17, 255]
    assert levels(tmp_path / "12.png", max_value=65535) == [0, 1, 16]  # a dark one, as somebody said
    grey([0, 51.0, 255.0], "float32").save(tmp_path / "f.tif")
    assert levels(tmp_path / "f.tif", max_value=255) == [0, 51, 255]
    with pytest.raises(InputError, match="from 0 to 4095, not from 0 to 1023"):
        decode_image(tmp_path / "12.png", max_value=1023)
    Image.new("L", (1, 1), 9).save(tmp_path / "8.png")
    assert levels(tmp_path / "8.png", max_value=4095) == [9]  # 8 bits are 8 bits


def test_ranges_that_files_declare(tmp_path: Path) -> None:
    twelve = grey([0, 273, 4095], "uint16")
    assert levels(tiff(tmp_path / "a.tif", twelve, t281=4095)) == [0, 17, 255]
    with pytest.raises(InputError, match="from 0 to 4095, not from 0 to 1023"):
        decode_image(tiff(tmp_path / "b.tif", twelve, t281=1023))
    (tmp_path / "c.pgm").write_bytes(b"P5 3 1 4095\n" + struct.pack(">HHH", 0, 273, 4095))
    assert levels(tmp_path / "c.pgm") == [0, 17, 255]
    grey([0, 273, 65535], "uint16").save(tmp_path / "d.tif")  # white is zero
    data = (tmp_path / "d.tif").read_bytes()
    tag = struct.pack("<HHI", 262, 3, 1)
    assert data.count(tag) == 1
    (tmp_path / "d.tif").write_bytes(data.replace(tag + b"\1", tag + b"\0"))
    assert levels(tmp_path / "d.tif") == [255, 254, 0]


def test_16_bit_colours(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png16(np.array([[[0, 257, 65535], [32896, 7 * 257, 300]]])))
    assert decode_image(path).tolist() == [[[0, 128]], [[1, 7]], [[255, 1]]]
    for top in (0, 255, 4095, 16383):  # Pillow's upper 8 bits are 0, 0, 15 and 63
        path.write_bytes(png16(np.array([[[0, top // 2, top]]])))
        with pytest.raises(InputError, match="is ambiguous: its 16-bit colours all lie in the lower half"):
            decode_image(path)
        assert not looks_whole(path)
    assert decode_image(path, max_value=65535).tolist() == [[[0]], [[31]], [[63]]]
    with pytest.raises(InputError, match="its 16-bit colours cannot be read for a range of 0 to 16383"):
        decode_image(path, max_value=16383)
    dark = tmp_path / "dark.png"
    Image.new("RGB", (2, 2), (3, 2, 1)).save(dark)
    assert decode_image(dark)[:, 0, 0].tolist() == [3, 2, 1]
    Image.new("RGB", (2, 2), (3, 2, 1)).save(tmp_path / "dark.tif", compression="tiff_lzw")
    assert decode_image(tmp_path / "dark.tif")[:, 0, 0].tolist() == [3, 2, 1]


# Other kinds


def test_few_bits_and_palettes(tmp_path: Path) -> None:
    for bits, expected in ((1, [0, 255]), (2, [0, 85, 170, 255]), (4, [0, 17, 119, 255])):
        values = {1: [0, 1], 2: [0, 1, 2, 3], 4: [0, 1, 7, 15]}[bits]
        packed = int("".join(f"{v:0{bits}b}" for v in values).ljust(16, "0"), 2).to_bytes(2, "big")
        packed = packed[: -(-bits * len(values) // 8)]

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + packed)) + chunk(b"IEND", b"")
        (tmp_path / f"{bits}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        assert levels(tmp_path / f"{bits}.png") == expected
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 10, 255])
    image.putpixel((1, 0), 1)
    for name in ("p.png", "p.gif"):
        image.save(tmp_path / name, transparency=0)
        assert decode_image(tmp_path / name).tolist() == [[[255, 0]], [[0, 10]], [[0, 255]]]


def test_transparency_keeps_colours_and_is_no_picture(tmp_path: Path) -> None:
    """A drawing in black on nothing has all of itself in its transparency: without it, it is black all over."""
    ramp = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    red = Image.new("L", (3, 1), 200)
    Image.merge("RGBA", [ramp, red, red, ramp]).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png").tolist() == [[[0, 128, 255]], [[200] * 3], [[200] * 3]]
    black = Image.new("L", (3, 1), 0)
    drawings = {"rgba.png": ("RGBA", [black] * 3), "la.png": ("LA", [black]), "rgba.webp": ("RGBA", [black] * 3)}
    for name, (mode, bands) in drawings.items():
        Image.merge(mode, [*bands, ramp]).save(tmp_path / name, **({"exact": True} if "webp" in name else {}))
        with pytest.raises(InputError, match="is ambiguous: only its transparency shows a picture"):
            decode_image(tmp_path / name)
    Image.merge("LA", [black, black]).save(tmp_path / "nothing.png")
    assert levels(tmp_path / "nothing.png") == [0, 0, 0]


def test_cmyk(tmp_path: Path) -> None:
    """Adobe stores ink upside down in JPEG, others do not; both come out red."""
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    ink.save(tmp_path / "adobe.jpg", quality=100)  # Pillow writes as Adobe does
    assert b"Adobe" in (tmp_path / "adobe.jpg").read_bytes()
    ink.save(tmp_path / "a.tif")
    for name in ("adobe.jpg", "a.tif"):
        assert decode_image(tmp_path / name)[:, 8, 8].tolist() == [255, 0, 0]


def test_the_first_of_many_images(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif", "a.avif"):
        quality = {"lossless": True} if name == "a.webp" else {"quality": 100} if name == "a.avif" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **quality)
        red, green, blue = decode_image(tmp_path / name).float().mean(dim=(1, 2)).tolist()
        assert red > 250
        assert max(green, blue) < 5


# EXIF


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_every_orientation(tmp_path: Path, name: str) -> None:
    """The picture is one and the same; files hold it turned in eight ways. Pillow's own function agrees."""
    upright = np.zeros((48, 32, 3), dtype=np.uint8)
    upright[:16, :16] = (255, 0, 0)  # red top left, green top right, blue below
    upright[:16, 16:] = (0, 255, 0)
    upright[16:] = (0, 0, 255)
    k = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, 3),
    }  # fmt: skip
    path = tmp_path / name
    for orientation, stored in k.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"a.jpg": {"quality": 95, "subsampling": 0}, "a.webp": {"lossless": True}}.get(name, {})
        Image.fromarray(stored.copy()).save(path, exif=exif, **options)
        image = decode_image(path)
        assert image.shape == (3, 48, 32)
        assert (image.permute(1, 2, 0).int() - torch.tensor(upright.astype(int))).abs().max() < 12
        with Image.open(path) as file:
            assert image.shape[:0:-1] == ImageOps.exif_transpose(file).size
        if name != "a.tif":  # which Pillow itself turns
            assert decode_image(path, upright=False).shape[1:] == stored.shape[:2]


def test_broken_exif_is_no_broken_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), (9, 9, 9))
    for number, exif in enumerate(
        (b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\0\xff", b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1")
    ):
        image.save(tmp_path / f"{number}.jpg", exif=exif)
        assert decode_image(tmp_path / f"{number}.jpg").shape == (3, 4, 6)


# Files


def test_endings() -> None:
    known = endings()
    assert known >= {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".gif",
        ".avif",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
    }
    assert not known & {".txt", ".pdf", ".eps", ".mpg", ".h5", ".hdf", ".svg", ".csv", ".wmf", ".npy", ""}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp"])
def test_a_file_that_is_cut_off_is_seen_without_decoding(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    assert looks_whole(path)
    for length in (0, 3, 20, 200, len(whole) - 70, len(whole) - 1 if name == "a.webp" else len(whole) - 66):
        path.write_bytes(whole[:length])
        assert not looks_whole(path), length
    path.write_bytes(b"no image" * 10)
    assert not looks_whole(path)
    path.unlink()
    assert not looks_whole(path)
    # What comes behind the end is no fault; a file in doubt is decoded.
    path.write_bytes(whole + bytes(100))
    assert decode_image(path).shape == (3, 40, 40)


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "empty.jpg").touch()
    stream = io.BytesIO()
    Image.new("RGB", (50, 50)).save(stream, "PNG")
    (tmp_path / "cut.png").write_bytes(stream.getvalue()[:60])
    for name, says in (
        ("none.jpg", "is missing; the data set's lists name it"),
        ("link.jpg", "is missing; it is a broken link"),
        ("empty.jpg", "cannot be decoded (cannot identify image file"),
        ("cut.png", "cannot be decoded ("),
        ("", "cannot be decoded ([Errno 21] Is a directory"),
    ):
        with pytest.raises(InputError) as error:
            decode_image(tmp_path / name)
        assert str(error.value).startswith(f"image {tmp_path / name} {says}")
        assert str(error.value).endswith("; data.skip_corrupt=true leaves such images out")


def test_an_image_from_python_is_that_of_a_run(tmp_path: Path) -> None:
    """A photo that lies on its side: the reader of files, and the transform of a run given a PIL image."""
    pixels = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(pixels, -1)
    np.testing.assert_array_equal(open_image(str(tmp_path / "a.png")).permute(1, 2, 0), upright)
    for image in (Image.open(tmp_path / "a.png"), Image.open(tmp_path / "a.png").convert("RGB")):
        np.testing.assert_array_equal(np.asarray(of_known_range(image)), upright)


def test_a_mask_is_no_picture(tmp_path: Path) -> None:
    """Values of 0 and 1 would be black; of 0 and 255, and a black picture, they are what they say."""
    for colours, shape in ((1, (6, 6)), (3, (6, 6, 3))):
        mask = np.zeros(shape, np.uint8)
        mask[:3] = 1
        path = tmp_path / f"{colours}.png"
        for values in (mask * 255, mask * 0):
            Image.fromarray(values).save(path)
            assert int(decode_image(path).max()) == int(values.max())
        Image.fromarray(mask).save(path)
        with pytest.raises(InputError, match="its values are 0 and 1, of 255: it looks like a mask"):
            decode_image(path)
