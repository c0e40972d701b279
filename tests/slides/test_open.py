"""Which reader a file gets, and that hostile files end in one line: never in another exception, a crash or a hang."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from slides.errors import SlideError, TileError
from slides.geometry import geometry
from slides.image import ImageSlide
from slides.open import open_slide
from slides.openslides import OpenSlideSlide
from slides.overview import overview
from slides.patches import CORRUPT, read_patches
from slides.pyramid import APERIO, JPEG, LOSSLESS, Encoding
from slides.reader import Slide
from slides.tiff import TiffSlide
from tests.slides import toys
from tests.slides.toys import AWKWARD_NAME, openslide_level, toy_slide

DATA = Path(__file__).parents[3] / "shared" / "data" / "wsi"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")

KINDS = {
    "jpeg.svs": {"encoding": JPEG},
    "rgb.svs": {"encoding": APERIO},
    "lossless.tif": {"encoding": LOSSLESS, "flavour": "generic"},
    "lzw.svs": {"encoding": Encoding("lzw")},
    "wavelets.svs": {"encoding": Encoding("jpeg2000", quality=40)},
    "ome.ome.tif": {"flavour": "ome"},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small slides of every kind, a few kilobytes each."""
    folder = tmp_path_factory.mktemp("small")
    files = {
        name: toy_slide(folder / name, 200, 150, tile_size=64, downsamples=(1, 4), **options).path.read_bytes()
        for name, options in KINDS.items()
    }
    files["alpha.tif"] = toys.rgba_slide(folder / "alpha.tif", 200, 150).read_bytes()
    files["grey.tif"] = toys.grey_slide(folder / "grey.tif", 200, 150).read_bytes()
    pixels = toys.toy_pixels(200, 150)[0]
    tifffile.imwrite(folder / "strips.tif", pixels, resolution=(2e4, 2e4), resolutionunit="CENTIMETER")
    Image.fromarray(pixels).save(folder / "image.png", dpi=(50_800, 50_800))
    Image.fromarray(pixels).save(folder / "image.jpg", dpi=(50_800, 50_800))
    return files | {n: (folder / n).read_bytes() for n in ("strips.tif", "image.png", "image.jpg")}


def use(path: Path) -> None:
    """All that is done with a slide. Whatever is wrong with it, it is a SlideError."""
    with contextlib.suppress(SlideError), open_slide(path) as slide:
        for number, level in enumerate(slide.levels[:3]):
            with contextlib.suppress(TileError):
                assert slide.read(number, 0, 0, 130, 90).shape == (90, 130, 3)
            if level.tile is not None:
                for column in range(min(2, -(-level.width // level.tile[0]))):
                    with contextlib.suppress(TileError):
                        slide.read_tile(number, column, 0)
                    with contextlib.suppress(TileError):
                        slide.tile_jpeg(number, column, 0)
        seen = overview(slide, 4.0)
        assert seen.image.shape[2] == 3
        wanted = geometry(slide, size=32, mpp=0.5)
        coords = np.array([[0, 0], [40, 60]]) * wanted.snap
        for chunk in read_patches(slide, wanted, coords, lambda pixels, status: pixels.shape):
            assert chunk.value == (2, 32, 32, 3) and (chunk.status == CORRUPT).any() == bool(chunk.broken)


@pytest.mark.parametrize("name", KINDS)
def test_cut_at_twenty_places(tmp_path: Path, small: dict[str, bytes], name: str) -> None:
    data = small[name]
    for cut in np.linspace(0, len(data) - 1, 20).astype(int):
        path = tmp_path / name
        path.write_bytes(data[:cut])
        use(path)


def test_random_damage_to_every_kind(tmp_path: Path, small: dict[str, bytes]) -> None:
    """Bytes anywhere, and close to the ends, where headers are."""
    rng = np.random.default_rng(0)
    for number in range(25 * len(small)):
        name = list(small)[number % len(small)]
        data = bytearray(small[name])
        for _ in range(int(rng.integers(1, 6))):
            edge = min(len(data), 1200)
            at = int(rng.integers(len(data) if number % 2 else edge)) * int(rng.choice([-1, 1]))
            data[at] = (0, 255, int(rng.integers(256)), data[at] ^ 1 << int(rng.integers(8)))[rng.integers(4)]
        path = tmp_path / f"{number % 2}{name}"
        path.write_bytes(data)
        use(path)


def entries(data: bytes) -> Iterator[int]:
    """Where the twelve bytes of every tag of a small-endian TIFF lie."""
    ifd = struct.unpack_from("<I", data, 4)[0]
    while ifd:
        count = struct.unpack_from("<H", data, ifd)[0]
        yield from range(ifd + 2, ifd + 2 + 12 * count, 12)
        ifd = struct.unpack_from("<I", data, ifd + 2 + 12 * count)[0]


@pytest.mark.parametrize("name", ["jpeg.svs", "lossless.tif", "alpha.tif", "strips.tif", "ome.ome.tif"])
def test_any_tag_with_any_extreme(tmp_path: Path, small: dict[str, bytes], name: str) -> None:
    """Sizes, tile sizes, counts and types that lie.

    openslide ends the whole process where it cannot allocate what a header claims: this test would not fail, it would
    take the others with it.
    """
    data = small[name]
    path = tmp_path / name
    for at in entries(data):
        _, kind, count, value = struct.unpack_from("<HHII", data, at)
        extremes = [(kind, count, 0), (kind, count, 0x7FFFFFFF), (4, 1, 60_000), (4, 1, 0xFFFFFFFF)]
        for lie in [*extremes, (kind, 0xFFFFFFFF, value), (16, count, value)]:
            changed = bytearray(data)
            struct.pack_into("<HII", changed, at + 2, *lie)
            path.write_bytes(changed)
            use(path)


def test_tiles_of_impossible_size_or_number_are_refused_by_name(tmp_path: Path) -> None:
    for tag, value in (("TileWidth", 1 << 30), ("TileLength", 1 << 30), ("ImageWidth", 1 << 20)):
        toy = toy_slide(tmp_path / f"{tag}.svs", 200, 150, tile_size=64, downsamples=(1,))
        with tifffile.TiffFile(toy.path, mode="r+") as tiff:
            tiff.pages.first.tags[tag].overwrite(value, dtype="I")
        with pytest.raises(SlideError, match=rf"{tag}\.svs: its header is broken"):
            open_slide(toy.path)


def test_a_circle_of_headers(tmp_path: Path, small: dict[str, bytes]) -> None:
    data = bytearray(small["lossless.tif"])
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(SlideError, match=r"a\.tif: its header is broken: its images go round"):
        open_slide(tmp_path / "a.tif")


def test_each_kind_has_its_reader(tmp_path: Path, small: dict[str, bytes]) -> None:
    images = ("strips.tif", "image.png", "image.jpg")
    for name, data in small.items():
        (tmp_path / name).write_bytes(data)
        with open_slide(tmp_path / name) as slide:
            assert isinstance(slide, ImageSlide if name in images else TiffSlide), name
            assert slide.path.name == name and slide.size == (200, 150)
            assert slide.mpp == pytest.approx(0.25 if name in KINDS else 0.5, rel=1e-3)
            assert np.ptp(slide.read(0, 0, 0, 200, 150)) > 50


def test_what_the_tile_reader_leaves_alone_goes_through_openslide(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    planes = np.moveaxis(toys.toy_pixels(200, 150)[0], -1, 0)
    tifffile.imwrite(path, planes, tile=(64, 64), photometric="rgb", planarconfig="separate")
    if openslide.OpenSlide.detect_format(path) is None:
        pytest.skip("this openslide does not read planar files")
    with open_slide(path, mpp=0.5) as slide:
        assert isinstance(slide, OpenSlideSlide)
        assert np.array_equal(slide.read(0, 0, 0, 200, 150), openslide_level(path))


@pytest.mark.parametrize("name", [AWKWARD_NAME, "a b.svs", "ü'\".svs", "胃 #1 %20.svs", "-.svs"])
def test_any_name(tmp_path: Path, name: str) -> None:
    toy = toy_slide(tmp_path / "in here" / name, 300, 200, tile_size=64)
    expected = openslide_level(toy.path)
    for path in (toy.path, str(toy.path)):
        with open_slide(path) as slide:
            assert np.array_equal(slide.read(0, 0, 0, 300, 200), expected)


def test_no_slide_at_all(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "none.svs", "no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / ("long" * 100), "cannot be read"),
        (Path("\0.svs"), "no such file"),
    ):
        with pytest.raises(SlideError, match=why):
            open_slide(path)


def test_a_slide_of_one_level_and_one_smaller_than_a_patch(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 90, 70, downsamples=(1,), encoding=LOSSLESS)
    with open_slide(toy.path) as slide:
        wanted = geometry(slide, size=128, mpp=0.25)
        (chunk,) = read_patches(slide, wanted, np.array([[0, 0]]), lambda pixels, status: pixels)
        assert np.array_equal(chunk.value[0], toys.rectangle(toy.pixels, 0, 0, 128, 128))
        assert chunk.status.tolist() == [0]


def test_deep_tiled_tiffs_say_what_to_do(tmp_path: Path) -> None:
    for path in (toys.sixteen_bit_slide(tmp_path / "deep.tif"), toys.grey_slide(tmp_path / "grey.tif", dtype="uint16")):
        with pytest.raises(SlideError, match=rf"{path.name}.*more than 8 bits: convert them"):
            open_slide(path)


def test_a_broken_colour_profile_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy = toy_slide(tmp_path / "a.svs", 200, 150, icc=b"no profile at all" * 20)
    with open_slide(toy.path) as slide:
        assert slide.icc is None and slide.read(0, 0, 0, 9, 9).shape == (9, 9, 3)
    assert "a.svs: its colour profile is broken" in caplog.text


def readable(name: str) -> Slide:
    return open_slide(DATA / name, mpp=0.5)


@real
def test_real_aperio_pixels() -> None:
    whole = openslide_level(DATA / "CMU-1-Small-Region.svs")
    with open_slide(DATA / "CMU-1-Small-Region.svs") as slide:
        assert isinstance(slide, TiffSlide) and (slide.size, slide.mpp) == ((2220, 2967), 0.499)
        assert np.array_equal(slide.read(0, 0, 0, 2220, 2967), whole)
        file = slide.tile_jpeg(0, 3, 4)  # RGB without a marker, 240 pixels
        assert file is not None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), whole[960:1200, 720:960])


@real
def test_real_levels() -> None:
    with readable("boxes.tiff") as slide:
        assert [one.downsample for one in slide.levels] == [1, 2, 4, 8]
        for level in range(4):
            whole = openslide_level(DATA / "boxes.tiff", level)
            assert np.array_equal(slide.read(level, 0, 0, whole.shape[1], whole.shape[0]), whole)
    with pytest.raises(SlideError, match=r"boxes\.tiff: its mpp is not known \(.*352\.778"):
        open_slide(DATA / "boxes.tiff")


@real
def test_real_dicom() -> None:
    for name in ("boxes_0.dcm", "boxes_1.dcm"):
        with open_slide(DATA / name) as slide:
            assert isinstance(slide, OpenSlideSlide) and slide.mpp == pytest.approx(0.499)
            whole = openslide_level(DATA / name)
            assert np.array_equal(slide.read(0, -3, -2, 25, 25), toys.rectangle(whole, -3, -2, 25, 25))
            assert overview(slide, 1.0).image.shape == (8, 8, 3)


@real
def test_real_small_and_broken_slides() -> None:
    with open_slide(DATA / "small.svs") as slide:
        assert np.array_equal(slide.read(0, 0, 0, 16, 16), openslide_level(DATA / "small.svs"))
    with pytest.raises(SlideError, match=r"unopenable\.tiff: .*Unsupported TIFF compression"):
        open_slide(DATA / "unopenable.tiff")
    with open_slide(DATA / "unreadable.svs") as slide:
        wanted = geometry(slide, size=8)
        (chunk,) = read_patches(slide, wanted, np.array([[0, 0], [8, 8]]), lambda pixels, status: None)
        assert chunk.status.tolist() == [CORRUPT, CORRUPT]
        assert len(chunk.broken) == 1 and "unreadable.svs: tile (0, 0) of level 0" in chunk.broken[0]
        with pytest.raises(SlideError, match="none of its tiles can be decoded"):
            overview(slide, 1.0)
    handle = openslide.OpenSlide(DATA / "unreadable.svs")
    with OpenSlideSlide(DATA / "unreadable.svs", handle, mpp=0.5, mpp_source="table") as slide:
        for _ in range(2):
            with pytest.raises(TileError):
                slide.read(0, 0, 0, 8, 8)
    with pytest.raises(SlideError, match=r"SOURCE\.md: no slide"):
        readable("SOURCE.md")
