"""Plain images as slides: every mode that files come in, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from slides.errors import SlideError
from slides.image import ImageSlide, read_image
from slides.open import open_slide
from tests.slides.toys import AWKWARD_NAME, psnr, rectangle, toy_pixels

PIXELS = toy_pixels(240, 170)[0]


def saved(path: Path, image: Image.Image | np.ndarray = PIXELS, **options: object) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)  # pyright: ignore[reportArgumentType]
    return path


def read(path: Path) -> np.ndarray:
    with open_slide(path, mpp=0.5) as slide:
        return slide.read(0, 0, 0, *slide.size)


@pytest.mark.parametrize("ending", ["png", "bmp", "webp", "tif"])
def test_lossless_formats_come_back_to_the_bit(tmp_path: Path, ending: str) -> None:
    path = saved(tmp_path / f"{AWKWARD_NAME}.{ending}", lossless=True)  # which only WebP heeds
    with open_slide(path, mpp=0.5) as slide:
        assert isinstance(slide, ImageSlide) and slide.levels[0].tile is None
        assert np.array_equal(slide.read(0, 0, 0, 240, 170), PIXELS)
        for x, y in ((-5, -7), (230, 160), (300, 0), (-50, 3), (17, 23)):
            assert np.array_equal(slide.read(0, x, y, 20, 30), rectangle(PIXELS, x, y, 20, 30))


def test_jpeg(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", quality=92)
    got = read(path)
    assert np.array_equal(got, np.asarray(Image.open(path))) and psnr(got, PIXELS) > 35


def test_grey_palette_and_bilevel(tmp_path: Path) -> None:
    grey = Image.fromarray(PIXELS).convert("L")
    expected = np.asarray(grey)[..., None].repeat(3, 2)
    assert np.array_equal(read(saved(tmp_path / "a.png", grey)), expected)
    assert np.array_equal(read(saved(tmp_path / "a.tif", grey)), expected)
    palette = Image.fromarray(PIXELS).quantize(32)
    assert np.array_equal(read(saved(tmp_path / "b.png", palette)), np.asarray(palette.convert("RGB")))
    bilevel = grey.convert("1")
    assert np.array_equal(read(saved(tmp_path / "c.png", bilevel)), np.asarray(bilevel.convert("RGB")))


def test_transparent_pixels_are_white_in_every_mode_that_has_them(tmp_path: Path) -> None:
    alpha = np.full((170, 240), 255, np.uint8)
    alpha[:50], alpha[50:80] = 0, 128
    rgba = np.dstack([np.where(alpha[..., None] == 0, 0, PIXELS), alpha])
    for ending in ("png", "tif"):
        got = read(saved(tmp_path / f"a.{ending}", rgba))
        assert (got[:50] == 255).all() and np.array_equal(got[80:], PIXELS[80:])
        mixed = PIXELS[50:80] * (128 / 255) + 255 * (127 / 255)
        assert np.abs(got[50:80] - mixed).max() <= 0.5
    la = np.asarray(Image.fromarray(rgba).convert("LA"))
    got = read(saved(tmp_path / "la.png", la))
    assert (got[:50] == 255).all() and np.array_equal(got[80:, :, 0], la[80:, :, 0])
    palette = Image.fromarray(PIXELS).quantize(16)
    clear = int(np.asarray(palette)[3, 3])
    got = read(saved(tmp_path / "p.png", palette, transparency=clear))
    assert (got[np.asarray(palette) == clear] == 255).all()


def test_tiffs_in_strips(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for compression in (None, "lzw", "zlib", "packbits"):
        tifffile.imwrite(path, PIXELS, photometric="rgb", compression=compression, rowsperstrip=16)
        assert np.array_equal(read(path), PIXELS)
    tifffile.imwrite(path, np.moveaxis(PIXELS, -1, 0), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read(path), PIXELS)
    tifffile.imwrite(path, PIXELS[..., 0], photometric="miniswhite")
    assert np.array_equal(read(path), 255 - PIXELS[..., :1].repeat(3, 2))
    jpeg = {"level": 95, "outcolorspace": "ycbcr"}
    tifffile.imwrite(path, PIXELS, photometric="rgb", compression="jpeg", compressionargs=jpeg, rowsperstrip=16)
    assert psnr(read(path), PIXELS) > 35 and np.array_equal(read(path), np.asarray(Image.open(path)))
    # Multiplied by alpha already: half-transparent white is white.
    premultiplied = np.full((40, 50, 4), 128, np.uint8)
    tifffile.imwrite(path, premultiplied, photometric="rgb", extrasamples=["assocalpha"])
    assert (read(path) == 255).all()


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (np.zeros((60, 50, 2), np.uint8), {"photometric": "minisblack", "extrasamples": ["unassalpha"]}),
        (np.zeros((60, 50, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}),
        (np.zeros((60, 50, 3), np.int8), {"photometric": "rgb"}),
        (np.zeros((60, 50, 4), np.uint8), {"photometric": "separated"}),
        (np.zeros((60, 50, 3), np.uint8), {"photometric": "cielab"}),
        (np.zeros((60, 50, 3), np.uint8), {"photometric": "ycbcr"}),
    ],
)
def test_tiffs_that_are_no_pictures_of_slides(tmp_path: Path, pixels: np.ndarray, options: dict) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(SlideError, match=r"a\.tif: .*is no slide: convert it to 8-bit RGB"):
        open_slide(tmp_path / "a.tif", mpp=0.5)


def test_sixteen_bits_are_not_guessed_at(tmp_path: Path) -> None:
    grey = (PIXELS[..., 0] * np.uint16(257)).astype(np.uint16)
    saved(tmp_path / "a.png", grey)
    tifffile.imwrite(tmp_path / "a.tif", grey)
    tifffile.imwrite(tmp_path / "rgb.tif", PIXELS.astype(np.uint16), photometric="rgb")
    tifffile.imwrite(tmp_path / "f.tif", PIXELS.astype(np.float32), photometric="rgb")
    deep = zlib.compress(b"".join(b"\0" + bytes(6 * 10) for _ in range(10)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 10, 10, 16, 2, 0, 0, 0)), (b"IDAT", deep), (b"IEND", b"")]
    png = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "rgb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)  # Pillow would halve it without a word
    for name in ("a.png", "a.tif", "rgb.tif", "f.tif", "rgb.png"):
        with pytest.raises(SlideError, match=rf"{name}: its pixels have more than 8 bits"):
            open_slide(tmp_path / name, mpp=0.5)


def test_the_pixel_limit_is_known_from_the_header(tmp_path: Path) -> None:
    for ending in ("png", "tif"):
        path = saved(tmp_path / f"a.{ending}")
        assert read_image(path, 240 * 170)[0].shape == (170, 240, 3)
        with pytest.raises(SlideError, match=r"240 x 170 pixels without tiles is over the limit of 40799.*vips"):
            read_image(path, 240 * 170 - 1)


def test_bombs(tmp_path: Path) -> None:
    """A header that claims gigapixels: Pillow's own limit and ours end in the same advice."""
    png = io.BytesIO()
    Image.fromarray(PIXELS).save(png, "PNG")
    data = bytearray(png.getvalue())
    struct.pack_into(">II", data, 16, 60_000, 60_000)
    struct.pack_into(">I", data, 29, zlib.crc32(bytes(data[12:29])))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(SlideError, match=r"a\.png: more than \d+ pixels without tiles.*vips"):
        open_slide(tmp_path / "a.png", mpp=0.5)
    tifffile.imwrite(tmp_path / "a.tif", PIXELS)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        for tag in ("ImageWidth", "ImageLength"):
            tiff.pages.first.tags[tag].overwrite(60_000)
    with pytest.raises(SlideError, match=r"a\.tif: 60000 x 60000 pixels without tiles.*vips"):
        open_slide(tmp_path / "a.tif", mpp=0.5)


def test_broken_images(tmp_path: Path) -> None:
    for ending in ("png", "jpg", "bmp", "webp", "tif"):
        path = saved(tmp_path / f"a.{ending}")
        whole = path.read_bytes()
        for part in range(1, 20):
            path.write_bytes(whole[: len(whole) * part // 20])
            try:
                got = read(path)
            except SlideError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert got.shape == PIXELS.shape and ending in ("jpg", "webp", "tif")


def test_what_is_no_image(tmp_path: Path) -> None:
    for name, data in (("a.svs", b""), ("b.svs", b"hello"), ("c.tif", b"II*\0"), ("d.png", b"\x89PNG\r\n\x1a\n")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SlideError, match=rf"{name}: no slide"):
            open_slide(tmp_path / name, mpp=0.5)


def test_resolution_counts_where_it_is_a_scanner_s(tmp_path: Path) -> None:
    with open_slide(saved(tmp_path / "a.png", dpi=(50_800, 50_800))) as slide:
        assert slide.mpp == pytest.approx(0.5, rel=1e-3) and slide.mpp_source == "tiff.XResolution"
    for ending in ("png", "jpg"):
        with pytest.raises(SlideError, match=r"its mpp is not known \(tiff\.XResolution is 352\.7"):
            open_slide(saved(tmp_path / f"b.{ending}", dpi=(72, 72)))
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp == pytest.approx(0.5)


def test_a_profile_comes_along(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for ending in ("png", "tif"):
        with open_slide(saved(tmp_path / f"a.{ending}", icc_profile=profile), mpp=0.5) as slide:
            assert slide.icc == profile
