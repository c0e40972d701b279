"""Slides that we write, as openslide, tifffile and Pillow read them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slides.errors import SlideError
from slides.pyramid import APERIO, JPEG, LOSSLESS, Encoding, Mosaic, level_sizes, mirrored, write_array, write_pyramid
from tests.slides import toys
from tests.slides.toys import toy_pixels, toy_slide

DATA = Path(__file__).parents[3] / "shared" / "data"


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(((one.astype(float) - two) ** 2).mean(), 1e-9)))


def block_means(pixels: np.ndarray, d: int) -> np.ndarray:
    """Means over d x d blocks, what does not fill a block left out."""
    h, w = pixels.shape[0] // d, pixels.shape[1] // d
    return pixels[: h * d, : w * d].reshape(h, d, w, d, 3).mean((1, 3))


def read(slide: openslide.OpenSlide, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
    """RGBA of a rectangle given in the level's own pixels."""
    d = round(slide.level_downsamples[level])
    return np.asarray(slide.read_region((x * d, y * d), level, (width, height)))


@pytest.mark.parametrize("compression", ["deflate", "lzw", "none", "jpeg2000"])
def test_openslide_reads_every_pixel_of_a_lossless_slide(tmp_path: Path, compression: str) -> None:
    encoding = Encoding(compression, quality=100)  # pyright: ignore[reportArgumentType]
    toy = toy_slide(tmp_path / "a.svs", 601, 421, encoding=encoding, power=40)
    with openslide.OpenSlide(toy.path) as slide:
        properties = slide.properties
        assert (properties["openslide.vendor"], properties["openslide.mpp-x"]) == ("aperio", "0.25")
        assert properties["openslide.objective-power"] == "40"
        assert slide.level_dimensions == ((601, 421), (150, 105), (37, 26))
        assert np.array_equal(read(slide, 0, 0, 0, 601, 421)[..., :3], toy.pixels)
        assert read(slide, 0, 0, 0, 601, 421)[..., 3].min() == 255
        for level, d in ((1, 4), (2, 16)):
            w, h = slide.level_dimensions[level]
            got = read(slide, level, 0, 0, w, h)[..., :3]
            assert np.abs(got - block_means(toy.pixels, d)).max() <= 0.5
        thumbnail = slide.associated_images["thumbnail"]
        assert thumbnail.size == (601, 421) and psnr(np.asarray(thumbnail)[..., :3], toy.pixels) > 38


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 580), st.integers(0, 400), st.integers(1, 90), st.integers(1, 90))
def test_rectangles_across_tile_borders(
    tmp_path_factory: pytest.TempPathFactory, x: int, y: int, w: int, h: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "borders.svs"
    if not path.exists():
        toy_slide(path, 601, 421, encoding=LOSSLESS, tile_size=64)
    pixels = toy_pixels(601, 421)[0][y : y + h, x : x + w]
    with openslide.OpenSlide(path) as slide:
        got = read(slide, 0, x, y, w, h)
    assert np.array_equal(got[: pixels.shape[0], : pixels.shape[1], :3], pixels)
    assert not got[pixels.shape[0] :].any() and not got[:, pixels.shape[1] :].any()  # beyond the slide: transparent


@pytest.mark.parametrize(
    ("encoding", "least"),
    [(JPEG, 37), (APERIO, 40), (Encoding(subsampling="422"), 38), (Encoding(subsampling="444"), 39)],
)
def test_jpeg_slides_look_alike_to_all_readers(tmp_path: Path, encoding: Encoding, least: float) -> None:
    toy = toy_slide(tmp_path / "a.svs", 601, 421, encoding=encoding)
    with openslide.OpenSlide(toy.path) as slide, tifffile.TiffFile(toy.path) as tiff:
        seen = read(slide, 0, 0, 0, 601, 421)[..., :3]
        assert psnr(seen, toy.pixels) > least
        assert psnr(tiff.asarray(), seen) > 45  # the same JPEG, perhaps by other upsampling of its chroma
        assert psnr(tiff.series[0].levels[1].asarray(), block_means(toy.pixels, 4)) > 34


@pytest.mark.parametrize("encoding", [JPEG, APERIO])
def test_stored_tiles_are_abbreviated_streams_as_scanners_write_them(tmp_path: Path, encoding: Encoding) -> None:
    """TIFF Technical Note 2: tables once for all, and in Aperio's files nothing in a tile tells its colour space."""
    toy = toy_slide(tmp_path / "a.svs", 601, 421, encoding=encoding)
    stored = toys.tile_bytes(toy.path, 0, 1, 0)
    with tifffile.TiffFile(toy.path) as tiff:
        page = tiff.pages.first
        tables, photometric = page.jpegtables, page.photometric
    assert tables is not None and tables.startswith(b"\xff\xd8\xff\xdb") and tables.endswith(b"\xff\xd9")
    assert photometric == (tifffile.PHOTOMETRIC.RGB if encoding is APERIO else tifffile.PHOTOMETRIC.YCBCR)
    scan = stored.index(b"\xff\xda")
    assert not any(marker in stored[:scan] for marker in (b"\xff\xdb", b"\xff\xc4", b"\xff\xe0", b"\xff\xee"))
    spliced = tables[:-2] + stored[2:]  # a JPEG file again; without a marker, decoders take it for YCbCr
    seen = np.asarray(Image.open(io.BytesIO(spliced)).convert("RGB"))
    truth = toy.pixels[:256, 256:512]
    assert psnr(seen, truth) < 20 if encoding is APERIO else psnr(seen, truth) > 37


def test_the_real_scanner_writes_the_same_headers() -> None:
    """Marker by marker, a tile of ours is like one of CMU-1-Small-Region.svs."""
    real = DATA / "wsi" / "CMU-1-Small-Region.svs"
    if not real.is_file():
        pytest.skip("the sample data is not beside the checkout")
    ours = Encoding(quality=30, photometric="rgb")
    tile = ours.encode(np.full((240, 240, 3), 200, np.uint8))
    theirs = toys.tile_bytes(real, 0, 0, 0)
    end = theirs.index(b"\xff\xda") + 14
    assert tile[:end] == theirs[:end]
    with tifffile.TiffFile(real) as tiff:
        tables = tiff.pages.first.jpegtables
    assert tables is not None and ours.jpeg_tables is not None and len(ours.jpeg_tables) == len(tables)


def test_generic_and_ome_say_their_mpp_where_readers_look(tmp_path: Path) -> None:
    toy_slide(tmp_path / "a.tif", 601, 421, flavour="generic", mpp=0.5, encoding=LOSSLESS)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff" and slide.level_count == 3
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-6)
    toy = toy_slide(tmp_path / "a.ome.tif", 601, 421, flavour="ome", mpp=0.5, encoding=LOSSLESS)
    with tifffile.TiffFile(toy.path) as tiff:
        assert tiff.is_ome and len(tiff.pages) == 1 and len(tiff.series[0].levels) == 3
        assert np.array_equal(tiff.asarray(), toy.pixels)
        assert tiff.ome_metadata is not None and 'PhysicalSizeX="0.5"' in tiff.ome_metadata


def test_levels_rounded_up_seem_a_little_less_shrunk(tmp_path: Path) -> None:
    size, downsamples = (8001, 4001), (1, 4, 16)
    assert level_sizes(size, downsamples) == [(8001, 4001), (2000, 1000), (500, 250)]
    assert level_sizes(size, downsamples, "ceil") == [(8001, 4001), (2001, 1001), (501, 251)]
    assert level_sizes((3, 40), downsamples) == [(3, 40), (1, 10), (1, 2)]
    pixels = toy_pixels(1001, 777)[0]
    write_array(tmp_path / "a.svs", pixels, mpp=0.5, rounding="ceil", encoding=LOSSLESS)
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        assert slide.level_dimensions == ((1001, 777), (251, 195), (63, 49))
        assert slide.level_downsamples[1] < 4
    # openslide places by 3.988, the mean of the apparent ratios; what is stored is the means over 4
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        stored = tiff.series[0].levels[1].asarray()
    assert np.abs(stored[:194, :250] - block_means(pixels, 4)).max() <= 0.5
    last = pixels[:776, 1000].reshape(194, 4, 3).mean(1)  # one column of level 0 is left for it
    assert np.abs(stored[:194, 250] - last).max() <= 0.5


def test_a_tile_that_was_not_scanned_has_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / "sparse.svs"

    def tile(level: int, column: int, row: int) -> np.ndarray | None:
        return None if column == 0 else np.full((256, 256, 3), 40 + 10 * level, np.uint8)

    write_pyramid(path, (2048, 512), tile, mpp=0.25, downsamples=(1, 4), encoding=LOSSLESS)
    assert toys.tile_place(path, 0, 0, 1)[1:] == (0, 0) and toys.tile_place(path, 0, 1, 1)[2] > 0
    with openslide.OpenSlide(path) as slide:
        both = read(slide, 0, 200, 0, 200, 100)
    assert not both[:, :56].any() and (both[:, 56:] == (40, 40, 40, 255)).all()


def test_bytes_pass_through_and_only_where_they_belong(tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    red, blue = (JPEG.encode(np.full((256, 256, 3), colour, np.uint8)) for colour in ((220, 30, 40), (30, 40, 220)))

    def tile(level: int, column: int, row: int) -> bytes:
        calls.append((level, column, row))
        return red if (column + row) % 2 else blue

    path = write_pyramid(tmp_path / "a.svs", (700, 300), tile, mpp=1, downsamples=(1, 2))
    assert calls == [(0, c, r) for r in range(2) for c in range(3)] + [(1, c, 0) for c in range(2)]
    assert [toys.tile_bytes(path, 0, c, 0) for c in range(3)] == [blue, red, blue]
    with openslide.OpenSlide(path) as slide:
        assert np.abs(read(slide, 0, 300, 10, 5, 5)[..., :3].astype(int) - (220, 30, 40)).max() < 4


@pytest.mark.parametrize("encoding", [LOSSLESS, APERIO])
def test_a_mosaic_is_its_textures_over_its_map(tmp_path: Path, encoding: Encoding) -> None:
    rng = np.random.default_rng(3)
    smooth = [toy_pixels(96, 80, seed)[0] for seed in (1, 2)]
    textures = [np.full((16, 16, 3), 243, np.uint8), mirrored(smooth[0]), smooth[1]]
    regions = rng.integers(0, 3, (9, 14)).astype(np.uint8)
    regions[:4, :6] = 1  # whole tiles of one texture too
    size, cell = (1101, 701), 80
    mosaic = Mosaic(regions, cell, textures, size, tile_size=64, encoding=encoding)
    y, x = np.mgrid[: size[1], : size[0]]
    labels = regions[np.minimum(y // cell, 8), np.minimum(x // cell, 13)]
    truth = np.choose(labels[..., None], [t[y % t.shape[0], x % t.shape[1]] for t in textures])
    path = mosaic.write(tmp_path / "a.svs", mpp=0.5)
    with openslide.OpenSlide(path) as slide:
        for level, d in ((0, 1), (1, 4), (2, 16)):
            w, h = slide.level_dimensions[level]
            seen, expected = read(slide, level, 0, 0, w, h)[..., :3], block_means(truth, d)
            if encoding is LOSSLESS:
                assert np.abs(seen - expected).max() <= 0.5
            else:
                assert psnr(seen, expected) > 25
        small = np.asarray(slide.associated_images["thumbnail"])[..., :3]
        assert np.abs(small[20:60, 20:60].mean((0, 1)) - textures[1].mean((0, 1))).max() < 3


def test_a_mosaic_encodes_a_tile_once_and_leaves_out_what_was_not_scanned(tmp_path: Path) -> None:
    texture = toy_pixels(64, 64)[0]
    mosaic = Mosaic(np.repeat([[0, 1]], 20, 0), 640, [None, texture], (12_800, 12_800), tile_size=64)
    assert mosaic(0, 0, 0) is None and mosaic(0, 10, 0) is mosaic(0, 55, 199)
    mosaic.write(tmp_path / "a.svs", mpp=0.5)
    assert len(mosaic._kept) == 3  # one tile a level: the texture is a tile wide, or fits into it
    with pytest.raises(SlideError, match="every downsample must divide"):
        Mosaic(np.zeros((2, 2), int), 100, [texture], (200, 200), (1, 8))


def test_colour_profile_and_associated_images_come_back(tmp_path: Path) -> None:
    profile = b"not read by anyone" * 10
    label = np.full((40, 60, 3), (200, 100, 50), np.uint8)
    toy = toy_slide(tmp_path / "a.svs", 600, 500, icc=profile, associated={"label": label, "macro": label[:, :50]})
    with openslide.OpenSlide(toy.path) as slide:
        assert set(slide.associated_images) == {"thumbnail", "label", "macro"}
        assert slide.associated_images["label"].size == (60, 40)
        assert np.abs(np.asarray(slide.associated_images["label"])[..., :3].astype(int) - label).max() < 5
        assert slide.level_count == 3
    with tifffile.TiffFile(toy.path) as tiff:
        assert tiff.pages.first.iccprofile == profile


def test_64_bit_offsets_where_they_are_needed(tmp_path: Path) -> None:
    def nothing(level: int, column: int, row: int) -> None:
        return None

    for size, big in (((40_000, 30_000), False), ((120_000, 90_000), True)):
        path = write_pyramid(tmp_path / "a.tif", size, nothing, mpp=0.25, tile_size=2048)
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_bigtiff is big and tiff.pages.first.shape == (size[1], size[0], 3)
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (120_000, 90_000)


def test_a_broken_run_leaves_what_was_there(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "a.svs", 300, 300).path
    before = path.read_bytes()

    def tile(level: int, column: int, row: int) -> np.ndarray:
        if level:
            raise RuntimeError("out of paint")
        return np.zeros((256, 256, 3), np.uint8)

    with pytest.raises(RuntimeError, match="out of paint"):
        write_pyramid(path, (300, 300), tile, mpp=1, encoding=LOSSLESS)
    assert path.read_bytes() == before and [found.name for found in tmp_path.iterdir()] == ["a.svs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (0, 10)}, "no pyramid"),
        ({"downsamples": (2, 4)}, "no pyramid"),
        ({"downsamples": (1, 8, 4)}, "no pyramid"),
        ({"tile_size": 100}, "multiple of 16"),
        ({"tile": lambda *_: np.zeros((300, 10, 3), np.uint8)}, "a tile is uint8"),
        ({"tile": lambda *_: np.zeros((30, 10, 3), np.float32)}, "a tile is float32"),
        ({"path": Path("/proc/nowhere/a.svs")}, "cannot be written"),
    ],
)
def test_what_is_no_slide_is_said_in_one_line(tmp_path: Path, change: dict, message: str) -> None:
    arguments = {"path": tmp_path / "a.svs", "size": (300, 200), "tile": lambda *_: None, "mpp": 0.5} | change
    with pytest.raises(SlideError, match=message) as caught:
        write_pyramid(**arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_breakers_break_what_they_say(tmp_path: Path) -> None:
    """The other tests stand on these: each does its own harm, to one tile only."""
    harms = {
        "header": toys.break_header, "zeros": toys.halve_tile, "short": lambda p: toys.halve_tile(p, how="short"),
        "beyond": toys.misplace_tile,
    }  # fmt: skip
    for name, harm in harms.items():
        toy = toy_slide(tmp_path / f"{name}.svs", encoding=APERIO)
        with openslide.OpenSlide(harm(toy.path)) as slide:
            assert psnr(read(slide, 0, 0, 0, 256, 256)[..., :3], toy.pixels[:256, :256]) > 38
            with pytest.raises(openslide.OpenSlideError):
                read(slide, 0, 256, 256, 256, 256)
    toy = toy_slide(tmp_path / "empty.svs", encoding=APERIO)
    with openslide.OpenSlide(toys.empty_tile(toy.path)) as slide:
        assert not read(slide, 0, 256, 256, 256, 256).any() and read(slide, 0, 255, 256, 1, 1)[0, 0, 3] == 255
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(toys.truncate(toy.path))
    for said, seen in (("0", "0"), ("nan", None), ("1000", "1000"), (None, None)):
        path = toys.set_mpp(toy_slide(tmp_path / toys.AWKWARD_NAME).path, said)
        with openslide.OpenSlide(path) as slide:
            assert slide.properties.get("openslide.mpp-x") == seen and slide.properties.get("aperio.MPP") == said


def test_odd_formats_are_what_they_say(tmp_path: Path) -> None:
    pixels, tissue, _ = toy_pixels(600, 500)
    with openslide.OpenSlide(toys.rgba_slide(tmp_path / "rgba.tif")) as slide:
        seen = read(slide, 0, 0, 0, 600, 500)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
    assert np.array_equal(seen[..., 3] == 255, tissue) and not seen[~tissue].any()
    assert np.array_equal(seen[tissue][:, :3], pixels[tissue])
    assert np.array_equal(tifffile.imread(toys.sixteen_bit_slide(tmp_path / "16.tif")) // 257, pixels)
    grey = tifffile.imread(toys.grey_slide(tmp_path / "grey.tif"))
    assert grey.shape == (500, 600) and np.array_equal(grey, pixels.mean(-1).astype(np.uint8))
