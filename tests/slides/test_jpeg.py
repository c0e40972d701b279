"""A stored tile as a JPEG of its own: against Pillow, OpenCV, simplejpeg, libjpeg-turbo's own codec and openslide."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slides import jpeg
from slides.open import open_slide
from slides.pyramid import APERIO, JPEG, Encoding
from tests.slides.toys import openslide_level, psnr, toy_pixels, toy_slide

SIDE = 128
NOISE = np.random.default_rng(0).normal(0, 6, (SIDE, SIDE, 3))
TILE = np.clip(toy_pixels(1000, 800)[0][200 : 200 + SIDE, 200 : 200 + SIDE] + NOISE, 0, 255).astype(np.uint8)
ENCODINGS = {
    "ycbcr 4:2:0": JPEG,
    "ycbcr 4:2:2": Encoding(subsampling="422"),
    "ycbcr 4:4:4": Encoding(subsampling="444"),
    "rgb, no marker": APERIO,
    "ycbcr, tables and JFIF of its own": Encoding(tables=False),
    "rgb, tables of its own": Encoding(photometric="rgb", tables=False),
}


def file_of(encoding: Encoding, tile: np.ndarray = TILE) -> bytes:
    head = jpeg.prefix(encoding.jpeg_tables or b"", encoding.photometric == "rgb")
    return jpeg.standalone(encoding.encode(tile), head)


def decoders(file: bytes) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(io.BytesIO(file)).convert("RGB")),
        np.asarray(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR))[..., ::-1],
        simplejpeg.decode_jpeg(file, "RGB"),
        imagecodecs.jpeg8_decode(file),
    ]


def with_restarts(tile: np.ndarray, blocks: int = 3) -> bytes:
    done, file = cv2.imencode(".jpg", tile[..., ::-1], [cv2.IMWRITE_JPEG_RST_INTERVAL, blocks])
    assert done and b"\xff\xd0" in file.tobytes()
    return file.tobytes()


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_decoder_sees_what_openslide_sees(tmp_path: Path, name: str) -> None:
    toy = toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64, encoding=ENCODINGS[name], downsamples=(1, 2))
    with open_slide(toy.path) as slide:
        for level in (0, 1):
            whole = openslide_level(toy.path, level)
            for row in range(whole.shape[0] // 64):
                for column in range(whole.shape[1] // 64):
                    expected = whole[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
                    file = slide.tile_jpeg(level, column, row)
                    assert file is not None
                    for pixels in decoders(file):
                        assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("name", ENCODINGS)
def test_pixels_come_back(name: str) -> None:
    assert psnr(jpeg.decode(file_of(ENCODINGS[name]), SIDE, SIDE, 1), TILE) > 30


def test_the_colour_marker_is_what_keeps_an_rgb_tile_right() -> None:
    """Spliced without it, as is often done, the tile is taken for YCbCr: far off, and silently."""
    tile, tables = APERIO.encode(TILE), APERIO.jpeg_tables
    assert tables is not None
    naive = tables[:-2] + tile[2:]
    assert np.abs(simplejpeg.decode_jpeg(naive, "RGB").astype(int) - TILE).mean() > 20
    right = jpeg.standalone(tile, jpeg.prefix(tables, rgb=True))
    assert np.abs(simplejpeg.decode_jpeg(right, "RGB").astype(int) - TILE).mean() < 5


def test_a_tile_s_own_colour_segments_give_way_to_the_tiff_s() -> None:
    """JFIF says YCbCr; the TIFF says RGB, and libtiff and openslide go by it. EXIF and the like go too."""
    tile = APERIO.encode(TILE)
    jfif = b"\xff\xe0" + struct.pack(">H", 16) + b"JFIF\0\1\1\0\0\1\0\1\0\0"
    exif = b"\xff\xe1" + struct.pack(">H", 8) + b"Exif\0\0"
    head = jpeg.prefix(APERIO.jpeg_tables or b"", rgb=True)
    assert jpeg.standalone(tile[:2] + jfif + exif + tile[2:], head) == jpeg.standalone(tile, head)
    assert b"JFIF" not in jpeg.standalone(Encoding(tables=False).encode(TILE), jpeg.prefix(b"", rgb=False))


def test_restart_markers_are_no_damage() -> None:
    file = jpeg.standalone(with_restarts(TILE), jpeg.prefix(b"", rgb=False))
    jpeg.check_whole(file)
    for pixels in decoders(file):
        assert np.array_equal(pixels, jpeg.decode(file, SIDE, SIDE, 1))


def test_padding_after_the_end_goes_and_padding_before_it_does_no_harm() -> None:
    tile, head = JPEG.encode(TILE), jpeg.prefix(JPEG.jpeg_tables or b"", rgb=False)
    whole = jpeg.standalone(tile, head)
    assert jpeg.standalone(tile + bytes(7), head) == whole
    inside = jpeg.standalone(tile[:-2] + bytes(5) + tile[-2:], head)
    jpeg.check_whole(inside)
    assert np.array_equal(jpeg.decode(inside, SIDE, SIDE, 2), jpeg.decode(whole, SIDE, SIDE, 2))


def test_bytes_left_over_that_are_no_padding_mean_that_decoding_lost_its_way() -> None:
    """libjpeg fills the whole tile and only says that bytes were left: the pixels are another picture's."""
    file, flat = file_of(JPEG), file_of(JPEG, np.full_like(TILE, 200))
    wrong = flat[:-2] + file[file.find(b"\xff\xda") + 14 :]
    assert psnr(simplejpeg.decode_jpeg(wrong, "RGB", strict=False), TILE) < 25
    with pytest.raises(jpeg.BrokenJpeg, match="extraneous"):
        jpeg.decode(wrong, SIDE, SIDE, 1)


def test_a_false_scan_header_is_mended_and_hides_no_later_damage() -> None:
    """Some scanners write zeros where a baseline scan must say "coefficients 0 to 63"; libjpeg warns of it first.

    It tells no second warning: were the first one merely ignored, broken pixels would pass.
    """
    file = file_of(JPEG)
    start = file.find(b"\xff\xda") + 14
    odd = file[: start - 3] + b"\0\0\0" + file[start:]
    assert np.array_equal(jpeg.decode(odd, SIDE, SIDE, 1), jpeg.decode(file, SIDE, SIDE, 1))
    short = odd[: start + (len(odd) - start) // 2] + b"\xff\xd9"
    with pytest.raises(ValueError, match="Invalid SOS"):
        simplejpeg.decode_jpeg(short, "RGB")
    with pytest.raises(jpeg.BrokenJpeg, match="premature end"):
        jpeg.decode(short, SIDE, SIDE, 1)


@pytest.mark.parametrize("encoding", [JPEG, APERIO])
def test_reduced_scale_is_close_to_area_averages(encoding: Encoding) -> None:
    smooth = cv2.GaussianBlur(TILE, (0, 0), 1.5)
    file = file_of(encoding, smooth)
    whole = jpeg.decode(file, SIDE, SIDE, 1)
    for reduce in (2, 4, 8):
        small = jpeg.decode(file, SIDE, SIDE, reduce)
        area = cv2.resize(whole, (SIDE // reduce,) * 2, interpolation=cv2.INTER_AREA)
        assert psnr(small, area) > 40


def test_a_tile_of_another_size_is_refused_before_it_takes_memory() -> None:
    file = file_of(JPEG)
    with pytest.raises(jpeg.BrokenJpeg, match="holds 128 x 128 pixels, its tile 256 x 256"):
        jpeg.decode(file, 256, 256, 1)
    at = file.find(b"\xff\xc0") + 5  # height and width of the frame
    huge = file[:at] + struct.pack(">HH", 65_500, 65_500) + file[at + 4 :]
    with pytest.raises(jpeg.BrokenJpeg, match="holds 65500 x 65500"):
        jpeg.decode(huge, SIDE, SIDE, 8)


@pytest.mark.parametrize(
    "tile",
    [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0\xff\xd9", b"\xff\xd8\xff\xe0\x00\x00\xff\xd9",
     b"\xff\xd8\xff\xe0\xff\xff\xff\xd9", b"\xff\xd8\xff\xe0\x00\x06\xff\xd9", bytes(64), b"\xff\xd8" + bytes(64),
     b"GIF89a" + bytes(64), b"\xff\xd8\xff\xda\xff\xd9", b"\xff\xd8\xff\xda\x00\x0c\xff\xd9"],
)  # fmt: skip
def test_stubs_are_broken_and_nothing_else(tile: bytes) -> None:
    for way in (jpeg.check_whole, lambda file: jpeg.decode(file, SIDE, SIDE, 1)):
        with pytest.raises(jpeg.BrokenJpeg):
            way(jpeg.standalone(tile, jpeg.prefix(JPEG.jpeg_tables or b"", rgb=False)))


def test_half_a_tile_is_refused_both_ways() -> None:
    tile, head = JPEG.encode(TILE), jpeg.prefix(JPEG.jpeg_tables or b"", rgb=False)
    half = len(tile) // 2
    for broken in (tile[:half], tile[:half] + bytes(len(tile) - half)):
        with pytest.raises(jpeg.BrokenJpeg, match="ends early"):
            jpeg.standalone(broken, head)


def test_check_whole_sees_markers_inside_the_pixels() -> None:
    file = file_of(JPEG)
    jpeg.check_whole(file)
    middle = (file.find(b"\xff\xda") + len(file)) // 2
    for marker in (b"\xff\xd9", b"\xff\xc4", b"\xff\xda", b"\xff\x01"):
        with pytest.raises(jpeg.BrokenJpeg, match="compressed data"):
            jpeg.check_whole(file[:middle] + marker + file[middle + 2 :])
    for cut in (file[: file.find(b"\xff\xda")], file[: file.find(b"\xff\xda")] + b"\xff\xd9"):
        with pytest.raises(jpeg.BrokenJpeg, match="header"):
            jpeg.check_whole(cut)


def test_a_scan_marker_inside_a_table_is_no_scan() -> None:
    """A quantisation table may hold 255 and 218 side by side."""
    file = bytearray(file_of(JPEG))
    table = file.find(b"\xff\xdb") + 10
    file[table : table + 2] = b"\xff\xda"
    jpeg.check_whole(bytes(file))
    assert jpeg.decode(bytes(file), SIDE, SIDE, 1).shape == (SIDE, SIDE, 3)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([JPEG, APERIO]), st.data())
def test_damage_gives_pixels_or_one_kind_of_error(encoding: Encoding, data: st.DataObject) -> None:
    tile = bytearray(encoding.encode(TILE))
    for at in data.draw(st.lists(st.integers(0, len(tile) - 1), min_size=1, max_size=4)):
        tile[at] = data.draw(st.integers(0, 255))
    cut = bytes(tile[: data.draw(st.integers(0, len(tile)))]) if data.draw(st.booleans()) else bytes(tile)
    head = jpeg.prefix(encoding.jpeg_tables or b"", encoding.photometric == "rgb")
    for reduce in (1, 2):
        with contextlib.suppress(jpeg.BrokenJpeg):
            file = jpeg.standalone(cut, head)
            with contextlib.suppress(jpeg.BrokenJpeg):
                jpeg.check_whole(file)
            pixels = jpeg.decode(file, SIDE, SIDE, reduce)
            # What is let through is what libjpeg makes of it.
            asked = {"min_height": SIDE // reduce, "min_width": SIDE // reduce, "strict": False}
            assert np.array_equal(pixels, simplejpeg.decode_jpeg(file, "RGB", **asked))
